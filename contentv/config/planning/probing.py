"""`calibrate=true`: real training steps of small models of the family, through the engine, weighed, then timed.

One after the other, because on the CPU weighing needs an allocator that gives memory back, and that one is slow. It
comes first, because memory that was once kept is used again.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from contentv.base import device as devices
from contentv.base.types import Batch, Bucket, TextCond, TokenCounts
from contentv.config.planning.calibration import Calibration, Probe, Weighed, fit
from contentv.config.planning.memory import Job, Layout, device_memory, weights_per_rank
from contentv.config.planning.speed import UPDATE_BYTES, operations
from contentv.diffusion.timesteps import TimestepConfig, build_sampler
from contentv.engine.optim import OptimConfig
from contentv.engine.zero import ZeroEngine, build_engine
from contentv.models.io import initial_weights
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.models.positions import WIDTH_MULTIPLE
from contentv.objectives.flow import FlowMatching
from contentv.parallel.mesh import single_process_mesh

BUDGET_S, WEIGHED_SHARE = 60.0, 0.5
REPEATS, REPEATED_S = 3, 2.0  # steps that are timed: at least so many, more while they take less than that
# Of malloc.h: larger blocks go back to the system when they are freed. glibc by itself raises the threshold to 32 MiB.
M_MMAP_THRESHOLD, SMALLEST_BYTES, LARGEST_BYTES = -3, 128 * 1024, 32 * 2**20


@dataclass(frozen=True)
class Shape:
    """A model of the family and the clips it is run on: latent frames x 2 side x 2 side, so frames x side^2 tokens."""

    layers: int
    heads: int
    frames: int
    side: int
    batch: int = 1
    recompute: str = "none"

    def model(self, family: MMDiTConfig) -> MMDiTConfig:
        """Returns the model: the family's head size and text widths, fewer heads and layers."""
        return replace(family, num_layers=self.layers, num_attention_heads=self.heads)


def shapes_of(family: MMDiTConfig, device: torch.device) -> tuple[list[Shape], list[Shape]]:
    """Returns what is timed, cheapest first, and what is weighed.

    Few and many tokens are timed, so that dense work and attention can be told apart. At one shape that is weighed the
    optimiser's step needs most memory, at the others the backward pass.
    """
    if device.type == "cpu":
        heads = [_heads(family, width) for width in (256, 512)]
        timed = [(1, 1, 8, 1), (2, 4, 8, 1), (2, 4, 8, 4), (1, 8, 16, 1), (4, 4, 16, 1)]
        weighed = [(1, 1, 8, 1), (2, 4, 8, 8), (4, 8, 8, 4)]
    else:
        heads = [_heads(family, 0), _heads(family, 0)]
        timed = [(2, 1, 16, 1), (2, 4, 32, 1), (2, 4, 32, 4), (1, 16, 32, 1), (4, 32, 32, 1)]
        weighed = [(2, 1, 16, 1), (2, 16, 32, 1), (4, 32, 32, 1)]
    return tuple(  # type: ignore[return-value]
        [Shape(layers, count, frames, side, batch) for layers, frames, side, batch in sizes]
        for count, sizes in zip(heads, (timed, weighed), strict=True)
    )


def _heads(family: MMDiTConfig, width: int) -> int:
    """Returns heads for about this width, at most the family's; 0 = the family's own."""
    heads = min(family.num_attention_heads, max(1, width // family.attention_head_dim)) if width else 0
    heads = heads or family.num_attention_heads
    while heads * family.attention_head_dim % WIDTH_MULTIPLE:
        heads += 1
    return heads


def calibrate(
    family: MMDiTConfig, precision: str, text: int, device: torch.device, *, timed: Sequence[Shape] = (),
    weighed: Sequence[Shape] = (), budget_s: float = BUDGET_S,
) -> Calibration:  # fmt: skip
    """Returns the rates of this machine, measured in about `budget_s` seconds.

    Args:
        family: the model whose head size and text widths are used.
        precision: bf16 or fp32.
        text: text tokens of a clip.
        device: where.
        timed, weighed: what is run; empty: `shapes_of`.
        budget_s: no further shape is begun when there may be no time for it; three are timed and one is weighed in any
            case.
    """
    begin = time.perf_counter()
    usual = shapes_of(family, device)
    # Libraries, thread pools and buffers of the system count on no side: a first engine comes and goes.
    weigh(family, Shape(1, usual[1][0].heads, 1, 2), precision, text, device)
    scales: list[Weighed] = []
    longest = 0.0
    for shape in weighed or usual[1]:
        started = time.perf_counter()
        if not scales or started - begin + longest < WEIGHED_SHARE * budget_s:
            scales.append(weigh(family, shape, precision, text, device))
            longest = max(longest, time.perf_counter() - started)
    _stop_weighing(device)
    clock(family, Shape(1, usual[0][0].heads, 1, 2), precision, text, device, repeats=1)
    probes: list[Probe] = []
    longest = 0.0
    for shape in timed or usual[0]:
        started = time.perf_counter()
        if len(probes) < 3 or started - begin + longest < budget_s:
            probes.append(clock(family, shape, precision, text, device))
            longest = max(longest, time.perf_counter() - started)
    machine = platform.machine() if device.type == "cpu" else devices.module(device).get_device_name(device)
    return fit(device.type, machine, precision, probes, scales)


def clock(
    family: MMDiTConfig, shape: Shape, precision: str, text: int, device: torch.device, repeats: int = REPEATS
) -> Probe:
    """Returns what the steps of one shape took (the shortest of them), and what the formulas count in them."""
    model, layout, tokens = _parts(family, shape, text)
    counted = operations(Job(model, precision, True, device.type), layout, tokens)
    engine, objective, batch = _build(model, layout, shape, precision, text, device)
    # The first step makes buffers, and traces which weights are needed when.
    _step(engine, objective, batch, 0, device)
    times: list[tuple[float, float]] = []
    while len(times) < repeats or (len(times) < 4 * repeats and sum(map(sum, times)) < REPEATED_S):
        times.append(_step(engine, objective, batch, 1 + len(times), device))
    engine.close()
    return Probe(
        _facts(shape, model, tokens), float(shape.batch * counted.dense), float(shape.batch * counted.attention),
        float(UPDATE_BYTES * weights_per_rank(model, 1)), min(t[0] for t in times), min(t[1] for t in times),
        shape.layers,
    )  # fmt: skip


def weigh(family: MMDiTConfig, shape: Shape, precision: str, text: int, device: torch.device) -> Weighed:
    """Returns the memory that two steps of one shape needed, and what the formulas say; 0 where nothing can tell."""
    model, layout, tokens = _parts(family, shape, text)
    before = _start_weighing(device)
    engine, objective, batch = _build(model, layout, shape, precision, text, device)
    for step in range(2):
        _step(engine, objective, batch, step, device)
    peak = _peak_bytes(device)
    engine.close()
    predicted = device_memory(Job(model, precision, True, device.type), layout, 1, tokens).total
    return Weighed(_facts(shape, model, tokens), predicted, max(0, peak - before) if peak else 0)


def _parts(family: MMDiTConfig, shape: Shape, text: int) -> tuple[MMDiTConfig, Layout, TokenCounts]:
    tokens = TokenCounts(shape.frames * shape.side**2, text)
    return shape.model(family), Layout(recompute=shape.recompute, micro_batch=shape.batch), tokens


def _facts(shape: Shape, model: MMDiTConfig, tokens: TokenCounts) -> dict[str, Any]:
    counts = {"width": model.inner_dim, "video_tokens": tokens.video, "text_tokens": tokens.text}
    return asdict(shape) | counts


def _build(
    model: MMDiTConfig, layout: Layout, shape: Shape, precision: str, text: int, device: torch.device
) -> tuple[ZeroEngine, FlowMatching, Batch]:
    """Returns the engine as `contentv train` builds it, flow matching, and a batch of noise."""
    with torch.device("meta"):
        empty = MMDiT(model)
    engine = build_engine(
        empty, single_process_mesh(), OptimConfig(), precision=precision, parallel=layout.parallel(),
        micro_batch_size=shape.batch, max_steps=1000, device=device, weights=initial_weights(model, 0).tensors,
    )  # fmt: skip
    b, side = shape.batch, shape.side * model.patch_size

    def caption(rows: int) -> TextCond:
        return TextCond(
            torch.randn(rows, text, model.joint_attention_dim), torch.randn(rows, model.pooled_projection_dim)
        )

    unscored = torch.full((b,), float("nan"))
    batch = Batch(
        [str(i) for i in range(b)], [""] * b, Bucket(shape.frames, side, side),
        torch.randn(b, model.in_channels, shape.frames, side, side), caption(b), unscored, unscored, torch.arange(b), b,
    ).to(device)  # fmt: skip
    null = caption(1).to(device)
    return engine, FlowMatching(build_sampler(TimestepConfig()), 0, null, 0.1), batch


def _step(
    engine: ZeroEngine, objective: FlowMatching, batch: Batch, step: int, device: torch.device
) -> tuple[float, float]:
    """Runs one step and returns the seconds of its passes and of the optimiser."""
    marks = []
    for mark in _marks(device):
        marks.append(mark)
        if len(marks) == 1:
            out = objective(engine.module, batch, step)
            engine.backward(out.loss_sum, len(batch))
        elif len(marks) == 2:
            engine.step()
        else:
            break
    return marks[1] - marks[0], marks[2] - marks[1]


def _marks(device: torch.device) -> Iterator[float]:
    """Yields the time, over and over, once the device has done what it was given."""
    # On a CPU of one thread the process's own time: what others do on the machine is then not counted.
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    while True:
        devices.synchronize(device)
        yield clock()


def _start_weighing(device: torch.device) -> int:
    """Returns the bytes held now; the highest count starts anew."""
    gc.collect()
    if device.type != "cpu":
        module = devices.module(device)
        module.empty_cache()
        module.reset_peak_memory_stats(device)
        return int(module.memory_allocated(device))
    if platform.libc_ver()[0] != "glibc":
        return 0
    # glibc would keep what was freed below a threshold that grows as it is used: what is held would not be seen.
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, SMALLEST_BYTES)
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _stop_weighing(device: torch.device) -> None:
    """Lets the CPU's allocator keep what is freed again, as in training."""
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)


def _peak_bytes(device: torch.device) -> int:
    """Returns the highest count since, or 0 where the system does not tell."""
    if device.type != "cpu":
        return devices.peak_memory_bytes(device)
    return _status("VmHWM") if platform.libc_ver()[0] == "glibc" else 0


def _status(key: str) -> int:
    """Returns a count of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0
