"""What real steps on a machine took and held, next to the formulas, and the rates that follow from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from contentv.base.errors import UserError
from contentv.config.planning.link_rates import LinkRates
from contentv.config.planning.options import ClusterConfig

VERSION = 1
FASTEST = 10.0  # a rate that the probes cannot tell is taken as this many times the overall one
LEAST_WORK = 0.1  # of the passes: what is waited for is measured apart, and may come out as more than all
ALONE = LinkRates()
DEFAULT_FILE = "plan-calibration.json"


@dataclass(frozen=True)
class Probe:
    """One shape that was timed.

    Attributes:
        dense_flops, attention_flops: executed in one step.
        update_bytes: moved by the optimiser's step.
        layers_s: measured forward and backward.
        update_s: measured optimiser's step.
        layers: of the model, times micro-batches of the step.
        exchanged_bytes, shared_bytes: sent by a rank in all-to-alls, and in ZeRO's collectives.
    """

    shape: dict[str, Any]
    dense_flops: float
    attention_flops: float
    update_bytes: float
    layers_s: float
    update_s: float
    layers: int
    exchanged_bytes: float = 0.0
    shared_bytes: float = 0.0

    @property
    def step_s(self) -> float:
        """A whole step, measured."""
        return self.layers_s + self.update_s


@dataclass(frozen=True)
class Weighed:
    """One shape's memory: by the formulas, and the most that was held over that before the engine was built."""

    shape: dict[str, Any]
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class Calibrated:
    """What was measured: the kind of device, its name, the precision, and how many processes shared the work."""

    device: str
    machine: str
    precision: str
    processes: int = 1


@dataclass(frozen=True)
class Calibration:
    """Rates of one device, fitted to probes, and of the links between the processes, measured (0 = a single one)."""

    device: str
    machine: str
    precision: str
    dense_flops_s: float
    attention_flops_s: float
    overhead_s: float
    update_bytes_s: float
    memory_factor: float
    probes: list[Probe] = field(default_factory=list)
    weighed: list[Weighed] = field(default_factory=list)
    processes: int = 1
    exchange_bytes_s: float = 0.0
    ring_bytes_s: float = 0.0
    overlap: float = 0.0

    def seconds(self, probe: Probe) -> float:
        """Returns what the fitted rates predict for a probe's step."""
        layers = probe.dense_flops / self.dense_flops_s + probe.attention_flops / self.attention_flops_s
        waiting = _waiting(probe, LinkRates(self.exchange_bytes_s, self.ring_bytes_s), self.overlap * layers)
        return layers + waiting + probe.layers * self.overhead_s + probe.update_bytes / self.update_bytes_s

    def applied(self, cluster: ClusterConfig, precision: str) -> ClusterConfig:
        """Returns the cluster at the measured rates.

        Raises:
            UserError: it was measured on another kind of device or in another precision.
        """
        for key, mine, other in (("cluster.device", self.device, cluster.device),
                                 ("train.precision", self.precision, precision)):  # fmt: skip
            if mine != other:
                raise UserError(
                    f"was measured with {key}={mine}, and this plan is for {key}={other}", where="calibration",
                    remedy="measure there with calibrate=true, or leave calibration= out",
                )  # fmt: skip
        fastest = max(self.dense_flops_s, self.attention_flops_s)
        peak = max(cluster.peak_flops(precision), fastest)
        cluster = replace(cluster, peak_tflops=peak / 1e12) if precision == "bf16" else replace(
            cluster, peak_tflops_fp32=peak / 1e12
        )  # fmt: skip
        if self.processes > 1:
            cluster = replace(
                cluster, intra_gb_s=self.ring_bytes_s / 1e9, exchange_gb_s=self.exchange_bytes_s / 1e9,
                inter_gb_s=cluster.inter_gb_s * cluster.link_efficiency, link_efficiency=1.0,
            )  # fmt: skip
        return replace(
            cluster, dense_efficiency=self.dense_flops_s / peak,
            attention_efficiency=self.attention_flops_s / peak, overhead_ms=1000 * self.overhead_s,
            memory_gb_s=self.update_bytes_s / 1e9, rates="measured",
        )  # fmt: skip

    def write(self, path: Path) -> None:
        """Writes the file that later plans read."""
        rows = [
            asdict(probe) | {"predicted_s": self.seconds(probe), "measured_s": probe.step_s} for probe in self.probes
        ]
        content = {"version": VERSION, **asdict(self), "probes": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Returns the calibration in a file.

        Raises:
            UserError: there is none, or it is not one.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("version") != VERSION:
                raise ValueError("another version")
            rows = [
                {k: v for k, v in row.items() if k not in ("predicted_s", "measured_s")} for row in content["probes"]
            ]
            weighed = [Weighed(**row) for row in content["weighed"]]
            found = cls(**{**content, "probes": [Probe(**row) for row in rows], "weighed": weighed})
            rates = (found.dense_flops_s, found.attention_flops_s, found.update_bytes_s, found.memory_factor)
            if not all(isinstance(rate, float | int) and rate > 0 for rate in rates):
                raise ValueError("rates must be positive")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"is no calibration: {error}", where=f"calibration={path}",
                remedy=f"make one: contentv plan calibrate=true calibration={path}",
            ) from None  # fmt: skip
        return found


def _waiting(probe: Probe, links: LinkRates, hidden_s: float) -> float:
    """Returns a step's seconds of communication, of which ZeRO's hides behind so much work."""
    exchanging = probe.exchanged_bytes / links.exchange_bytes_s if probe.exchanged_bytes else 0.0
    sharing = probe.shared_bytes / links.ring_bytes_s if probe.shared_bytes else 0.0
    return exchanging + max(0.0, sharing - hidden_s)


def fit(
    what: Calibrated, probes: list[Probe], weighed: list[Weighed], links: LinkRates = ALONE, overlap: float = 0.0
) -> Calibration:
    """Returns the rates that reproduce the probes best, in relative terms and none of them negative.

    Time of both passes, less what is waited for links = dense / rate + attention / rate + layers x overhead, by
    non-negative least squares.

    Args:
        what: was measured.
        probes: at least three shapes.
        weighed: shapes whose memory was measured; the factor is the largest ratio, at least 1.
        links: between the processes.
        overlap: share of the layers' time that ZeRO's communication hides behind.
    """
    from scipy.optimize import nnls

    rows = np.array([[p.dense_flops, p.attention_flops, p.layers] for p in probes], dtype=np.float64)
    whole = np.array([p.layers_s for p in probes])
    waited = np.array([_waiting(p, links, overlap * p.layers_s) for p in probes])
    seconds = np.maximum(whole - waited, LEAST_WORK * whole)
    scale = rows.max(axis=0)
    weights, _ = nnls(rows / scale / seconds[:, None], np.ones(len(probes)))
    dense, attention, overhead = weights / scale
    overall = float(rows[:, :2].sum() / seconds.sum())
    moved = sum(p.update_bytes for p in probes) / sum(p.update_s for p in probes)
    rates = [float(1 / value) if value > 0 else FASTEST * overall for value in (dense, attention)]
    factor = max([1.0, *(w.measured_bytes / w.predicted_bytes for w in weighed)])
    return Calibration(
        what.device, what.machine, what.precision, rates[0], rates[1], float(overhead), moved, factor, probes, weighed,
        what.processes, links.exchange_bytes_s, links.ring_bytes_s, overlap,
    )  # fmt: skip
