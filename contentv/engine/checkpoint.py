"""Saving and loading a partitioned state, collectively, in a form that fits any layout.

Each parameter is put together on one rank (they are dealt out, so all ranks write at once and none holds more than a
chunk) and written as a whole; on loading each rank reads its own stretch. A checkpoint of 8 ranks, ZeRO-3, sp 2 is
one of 1 rank, ZeRO-1, tp 2.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from contentv.base.errors import UserError
from contentv.engine import checkpoint_files as files
from contentv.engine.checkpoint_files import ChunkWriter
from contentv.engine.partition import Partition
from contentv.parallel.collectives import gather_json

State = dict[str, Sequence[Tensor]]  # kind -> this rank's flat tensors


@dataclass
class Counters:
    """The numbers that belong to a training state."""

    step: int = 0  # calls of the optimiser, skipped ones included
    optimizer_step: int = 0  # those that were applied
    ema_updates: int = 0


def save(
    partition: Partition, state: State, counters: Counters, folder: Path, extra: dict[str, Any], *,
    frozen: int = 0, keep: int = 0, chunk_bytes: int = files.CHUNK_BYTES,
) -> None:  # fmt: skip
    """Writes a checkpoint. Collective; when it returns the checkpoint is complete and on the disk.

    Args:
        partition: where the parameters are.
        state: the flat tensors of each kind.
        counters: the numbers to go with them.
        folder: the checkpoint's folder, such as `out/checkpoints/step-00000200`.
        extra: JSON-compatible facts of the caller.
        frozen: weights of the model that the checkpoint does not hold, for its manifest.
        keep: newest checkpoints to keep beside each other; 0 = all.
        chunk_bytes: size of a file.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    mesh, partial = partition.mesh, files.partial_folder(folder)
    bytes_needed = partition.numel() * 4 * len(state)
    _agree(partition, _prepare(partial, bytes_needed) if mesh.rank == 0 else "")
    writers = {kind: ChunkWriter(partial, kind, mesh.rank, chunk_bytes) for kind in state}
    for kind, flats in state.items():
        for index, entry in enumerate(partition.entries):
            value = partition.gather(entry, flats, to=partition.writer(index))
            if value is not None:
                writers[kind].add(entry.name, value)
        writers[kind].flush()
    errors = [w.error for w in writers.values() if w.error]
    report = {
        "error": errors[0] if errors else "",
        "files": {f: facts for w in writers.values() for f, facts in w.files.items()},
        "where": {kind: w.where for kind, w in writers.items()},
    }
    reports = gather_json(report, None, partition.device)
    failed = next((r["error"] for r in reports if r["error"]), "")
    if mesh.rank == 0:
        if failed:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            failed = _commit(folder, _manifest(partition, counters, frozen, reports, extra), keep)
    _agree(partition, failed)


def _prepare(partial: Path, bytes_needed: int) -> str:
    """Makes an empty folder to write to and returns what is wrong with it, if anything is."""
    try:
        free = files.free_bytes(partial.parent)
        if free < bytes_needed:
            return f"{partial.parent}: a checkpoint needs {bytes_needed} bytes, {free} bytes are free"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        return f"{partial}: {error.strerror or error}"
    return ""


def _commit(folder: Path, manifest: dict[str, Any], keep: int) -> str:
    try:
        files.commit(folder, manifest, keep)
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return ""


def _agree(partition: Partition, problem: str) -> None:
    """Raises on every rank when there is a problem on any; also a barrier."""
    problems = [p for p in gather_json(problem, None, partition.device) if p]
    if problems:
        raise UserError(
            f"the checkpoint could not be written: {problems[0]}",
            where="checkpoint",
            remedy="free space on the disk or choose another folder; earlier checkpoints are untouched",
        )


def _manifest(
    partition: Partition, counters: Counters, frozen: int, reports: list[dict[str, Any]], extra: dict[str, Any]
) -> dict[str, Any]:
    mesh = partition.mesh
    tensors: dict[str, Any] = {
        e.name: {"shape": list(partition.whole_shape(e)), "files": {}} for e in partition.entries
    }
    for report in reports:
        for kind, where in report["where"].items():
            for name, file in where.items():
                tensors[name]["files"][kind] = file
    return {
        "version": files.VERSION,
        "step": counters.step,
        "optimizer_step": counters.optimizer_step,
        "ema_updates": counters.ema_updates,
        "weights": {"trained": partition.numel(), "frozen": frozen},  # the trained ones are here
        "written_by": {"dp": mesh.dp, "sp": mesh.sp, "tp": mesh.tp},
        "extra": extra,
        "files": {f: facts for report in reports for f, facts in report["files"].items()},
        "tensors": tensors,
    }


def newest(root: Path | str, rank: int, device: torch.device) -> Path | None:
    """Returns the newest undamaged checkpoint in `root`, the same on every rank. Collective.

    Args:
        root: the folder with a run's checkpoints.
        rank: this rank; the first looks.
        device: where collectives want their tensors.
    """
    found = files.newest_complete(root) if rank == 0 else None
    name = gather_json(str(found) if found else "", None, device)[0]
    return Path(name) if name else None


def load(
    partition: Partition, state: State, folder: Path, *, optional: Sequence[str] = ("ema",)
) -> tuple[Counters, dict[str, Any], set[str]]:
    """Fills the flat tensors from a checkpoint of any layout and returns (counters, the caller's extra, kinds found).

    Collective: ranks share the verification, and either all of them go on or none.

    Args:
        partition: where the parameters go.
        state: the flat tensors of each kind, overwritten.
        folder: the checkpoint.
        optional: kinds that the checkpoint need not have; their tensors are left alone then.

    Raises:
        UserError: a file is missing or damaged (it is named), or the checkpoint is of another model.
    """
    mesh = partition.mesh
    problems, manifest = [], {}
    try:
        manifest = files.read_manifest(folder)
        problems = _misfits(partition, manifest, set(state) - set(optional))
        problems = problems or files.damage(folder, manifest, mesh.rank, mesh.world)
    except UserError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{error.filename or folder}: {error.strerror or error}"]
    found = [p for of_rank in gather_json(problems, None, partition.device) for p in of_rank]
    if found:
        raise UserError(found[0], where=str(folder), remedy="use another checkpoint, or the model this one is of")
    kinds = {k for k in state if all(k in facts["files"] for facts in manifest["tensors"].values())}
    for kind in sorted(kinds):
        _read(partition, state[kind], kind, folder, manifest)
    counters = Counters(manifest["step"], manifest["optimizer_step"], manifest.get("ema_updates", 0))
    return counters, manifest["extra"], kinds


def _misfits(partition: Partition, manifest: dict[str, Any], kinds: set[str]) -> list[str]:
    """Returns what keeps a checkpoint from being one of this model."""
    tensors = manifest["tensors"]
    names = set(partition.by_name)
    if names != set(tensors):
        missing, extra = sorted(names - set(tensors)), sorted(set(tensors) - names)
        return [
            "the checkpoint is of another model: "
            + "; ".join(
                f"{len(some)} parameters {what}, such as {some[0]}"
                for some, what in ((missing, "missing"), (extra, "too many"))
                if some
            )
        ]
    for entry in partition.entries:
        shape, stored = list(partition.whole_shape(entry)), tensors[entry.name]["shape"]
        if shape != stored:
            return [f"the checkpoint is of another model: {entry.name} is {stored} in it, should be {shape}"]
        lacking = kinds - set(tensors[entry.name]["files"])
        if lacking:
            return [f"the checkpoint has no {', '.join(sorted(lacking))} of {entry.name}"]
    return []


def _read(partition: Partition, flats: Sequence[Tensor], kind: str, folder: Path, manifest: dict[str, Any]) -> None:
    by_file: dict[str, list[str]] = {}
    for name, facts in manifest["tensors"].items():
        by_file.setdefault(facts["files"][kind], []).append(name)
    for file, names in sorted(by_file.items()):
        with safetensors.safe_open(folder / file, framework="pt") as f:
            for name in names:
                partition.fill(partition.by_name[name], flats, f.get_slice(name))
