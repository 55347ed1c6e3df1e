"""What a run says about itself: metrics.jsonl always, wandb or TensorBoard by choice, and a progress bar."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from contentv.base.errors import UserError
from contentv.base.log import console, is_main_process
from contentv.train.noise_watch import NoiseWatch


@runtime_checkable
class MetricSink(Protocol):
    """Somewhere to send a step's numbers."""

    def log(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends one JSON object a row. Rows past the step a run resumes from are cut, so that no step stands twice."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _truncate_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Mapping[str, Any]) -> None:
        # JSON has no NaN: a number that is not finite is written as null and stays visible as such.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _truncate_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the torn last line of a killed run
        if row.get("step", 0) <= step:
            kept.append(line)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


class WandbSink:
    """Weights & Biases, offline unless asked otherwise; the key is read from the environment by wandb alone."""

    def __init__(self, out: Path, project: str, mode: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logger=wandb needs the wandb package", where="logger", remedy="pip install 'contentv[wandb]'"
            ) from None
        self._run = wandb.init(dir=str(out), project=project, mode=mode, config=dict(config), name=out.name)  # type: ignore[arg-type]

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """TensorBoard event files in the run folder."""

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logger=tensorboard needs the tensorboard package", where="logger", remedy="pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(out / "tensorboard"))

    def log(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(key, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class Recorder:
    """Sends rows to every sink and the ledger, and moves the progress bar; silent on ranks other than 0."""

    def __init__(
        self,
        sinks: Sequence[MetricSink],
        ledger: JsonlSink | None,
        stage: str,
        max_steps: int,
        step: int,
        watch: NoiseWatch | None = None,
    ) -> None:
        self._sinks = list(sinks) if is_main_process() else []
        self._ledger = ledger if is_main_process() else None
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console,
            disable=not is_main_process() or not (console.is_terminal or os.environ.get("CONTENTV_PROGRESS") == "1"),
        )  # fmt: skip
        self._task = self._bar.add_task(stage, total=max_steps, completed=step, info="")
        self._bar.start()
        self._stage = stage
        self._watch = watch

    def ids(self, step: int, keys: Sequence[str]) -> None:
        """Writes the sample keys of a global batch, in order, to the ledger."""
        if self._ledger is not None:
            self._ledger.log({"step": step, "ids": list(keys)})

    def row(self, row: Mapping[str, Any]) -> None:
        """Sends one logged step everywhere."""
        row = row if self._watch is None or not self._sinks else self._watch.complete(row)
        for sink in self._sinks:
            sink.log(row)
        self.advance(int(row["step"]), _brief(row))
        if self._bar.disable and self._sinks:
            console.print(f"{self._stage} step {row['step']}  {_brief(row)}", highlight=False)

    def advance(self, step: int, info: str | None = None) -> None:
        """Moves the progress bar."""
        fields = {} if info is None else {"info": info}
        self._bar.update(self._task, completed=step, **fields)  # type: ignore[arg-type]

    def close(self) -> None:
        """Flushes and closes every sink."""
        self._bar.stop()
        for sink in self._sinks:
            sink.close()
        if self._ledger is not None:
            self._ledger.close()


def _brief(row: Mapping[str, Any]) -> str:
    parts = [f"loss {row['loss']:.4f}", f"grad {row['grad_norm']:.3f}", f"{row['step_s']:.3f} s/step"]
    parts.append(f"data {100 * row['data_wait_s'] / max(row['step_s'], 1e-9):.0f}%")
    if row.get("reward") is not None:
        parts.insert(1, f"reward {row['reward']:.3f}")
    return "  ".join(parts)
