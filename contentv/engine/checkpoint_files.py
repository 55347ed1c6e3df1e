"""A checkpoint folder on disk: safetensors files and a manifest that names, sizes and hashes all of them.

    manifest.json                       written last; a folder without it is not a checkpoint
    param-00000-000.safetensors         <kind>-<writing rank>-<chunk>; kinds: param, exp_avg, exp_avg_sq, ema
    ../latest                           name of the newest folder, replaced in one step

Every tensor is a whole parameter in fp32 under the parameter's name, so the folder says nothing of the layout that
wrote it. Nothing in it can execute: tensors are safetensors, all else is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import xxhash
from torch import Tensor

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.models.stored import StoredTensors

MANIFEST = "manifest.json"
LATEST = "latest"
VERSION = 1
CHUNK_BYTES = 1 << 30
READ_BYTES = 1 << 24


@dataclass
class ChunkWriter:
    """Writes one rank's tensors of one kind, in files of one chunk each; `files` and `where` say what went where.

    After a failed write it accepts tensors and writes none, so that a rank with a full disk keeps step with the others
    until all of them have heard of it (`error`).
    """

    folder: Path
    kind: str
    rank: int
    chunk_bytes: int = CHUNK_BYTES
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    error: str = ""
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _bytes: int = 0

    def add(self, name: str, value: Tensor) -> None:
        """Takes a whole parameter; it is copied to the CPU."""
        if self.error:
            return
        size = value.numel() * value.element_size()
        if self._pending and self._bytes + size > self.chunk_bytes:
            self.flush()
        self._pending[name] = value.detach().cpu().contiguous()
        self._bytes += size

    def flush(self) -> None:
        """Writes what has been taken and not yet written."""
        if not self._pending or self.error:
            return
        file = f"{self.kind}-{self.rank:05d}-{len(self.files):03d}.safetensors"
        data = safetensors.torch.save(self._pending)
        try:
            write_durably(self.folder / file, data)
        except OSError as error:
            self.error = f"{self.folder / file}: {error.strerror or error} ({len(data)} bytes)"
            return
        self.files[file] = {"bytes": len(data), "xxh128": xxhash.xxh3_128_hexdigest(data)}
        self.where.update(dict.fromkeys(self._pending, file))
        self._pending, self._bytes = {}, 0


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Returns the bytes that can be written below `folder`, or below the nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def partial_folder(folder: Path) -> Path:
    """Returns where a checkpoint is written before it gets its name."""
    return folder.with_name(folder.name + ".tmp")


def commit(folder: Path, manifest: dict[str, Any], keep: int) -> None:
    """Makes the written `.tmp` folder the checkpoint `folder`, points `latest` at it, removes old and unfinished ones.

    Args:
        folder: the checkpoint's final place; one that is already there is replaced.
        manifest: what the folder holds.
        keep: newest sibling checkpoints to keep, this one included; 0 = all.
    """
    partial = partial_folder(folder)
    write_durably(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(partial)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a crash; `folder` came after it
        os.rename(folder, old)
    os.rename(partial, folder)
    pointer = folder.with_name(LATEST + ".tmp")
    write_durably(pointer, f"{folder.name}\n".encode())
    os.replace(pointer, folder.with_name(LATEST))
    sync_folder(folder.parent)
    leftovers = [old, *folder.parent.glob("*.tmp"), *(checkpoints(folder.parent)[keep:] if keep > 0 else [])]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)


def checkpoints(root: Path) -> list[Path]:
    """Returns the folders in `root` that have a manifest, newest (highest step, then name) first."""
    found = [p.parent for p in root.glob(f"*/{MANIFEST}") if not p.parent.name.endswith(".tmp")]

    def order(path: Path) -> tuple[int, bool, str]:
        # `.old` is a checkpoint that was being replaced by one of the same name: good if the replacement never came.
        replaced = path.name.endswith(".old")
        digits = path.name.removesuffix(".old").rpartition("-")[2]
        return (int(digits) if digits.isdigit() else -1, not replaced, path.name)

    return sorted(found, key=order, reverse=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest.

    Raises:
        UserError: there is none, it is not JSON, or of a version this program does not know.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no complete checkpoint: it has no {MANIFEST}",
            where=str(path),
            remedy="use another checkpoint of the run",
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"the manifest cannot be read: {error}", where=str(path), remedy="use another checkpoint of the run"
        ) from None
    needed = {"version", "tensors", "files", "step", "optimizer_step", "extra"}
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION or not needed <= manifest.keys():
        raise UserError(
            f"not a checkpoint manifest of version {VERSION}",
            where=str(path),
            remedy="use a checkpoint of this program",
        )
    return manifest


def damage(folder: Path, manifest: dict[str, Any], part: int = 0, parts: int = 1) -> list[str]:
    """Returns one line per damaged file of a checkpoint: missing, of another size, or with another checksum.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        part, parts: look at every `parts`-th file only, from number `part` on (ranks share the work).
    """
    problems = []
    for file in sorted(manifest["files"])[part::parts]:
        path, facts = folder / file, manifest["files"][file]
        if os.path.basename(file) != file or not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, should be {facts['bytes']}")
        elif hash_file(path) != facts["xxh128"]:
            problems.append(f"{path}: its checksum is not the one written down when it was saved")
    return problems


def hash_file(path: Path) -> str:
    """Returns the xxh128 of a file's bytes, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while block := f.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def newest_complete(root: Path | str) -> Path | None:
    """Returns the newest undamaged checkpoint in `root`, every byte of it verified, or None; logs what it passed over.

    Args:
        root: the folder with a run's checkpoints. Its `latest` file is for people: a crash may have left it behind.
    """
    root = Path(root)
    for path in sorted(root.glob("*.tmp")):
        if path.is_dir():
            get_logger().warning("%s: a checkpoint that was not finished; passed over", path)
    for folder in checkpoints(root):
        try:
            problems = damage(folder, read_manifest(folder))
        except UserError as error:
            problems = [str(error)]
        if not problems:
            return folder
        get_logger().warning("%s: damaged, passed over: %s", folder, "; ".join(problems))
    return None


def read_weights(folder: Path | str, *, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, whole fp32 tensor) of a checkpoint's weights, one at a time; see `open_weights`."""
    for name, stored in open_weights(folder, ema=ema).items():
        yield name, stored.read()


def open_weights(folder: Path | str, *, ema: bool = False) -> StoredTensors:
    """Returns a checkpoint's weights by name, whole and in fp32, each read when taken; needs one process alone.

    The checksum of every file that holds them is verified first.

    Args:
        folder: the checkpoint.
        ema: the moving average instead of the weights themselves.

    Raises:
        UserError: the folder is damaged, or has no moving average.
    """
    folder = Path(folder)
    manifest, kind = read_manifest(folder), "ema" if ema else "param"
    wanted = {name: facts["files"].get(kind) for name, facts in manifest["tensors"].items()}
    if not all(wanted.values()):
        raise UserError(
            f"{folder} holds no moving average", where=str(folder), remedy="use the weights themselves (raw)"
        )
    of_kind = {f: facts for f, facts in manifest["files"].items() if f in set(wanted.values())}
    problems = damage(folder, {**manifest, "files": of_kind})
    if problems:
        raise UserError(problems[0], where=str(folder), remedy="use another checkpoint of the run")
    return StoredTensors(folder / file for file in sorted(of_kind))
