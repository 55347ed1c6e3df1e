"""Damaged samples: written down, counted, and stopped at when they are more than an accident."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from contentv.base.errors import UserError
from contentv.base.log import get_logger


class Quarantine:
    """The damaged samples met so far, by any thread.

    Args:
        path: a JSON-lines file that gets {"shard", "key", "reason"} of each, once; None keeps no file.
        max_samples: how many are tolerated however few samples were read.
        max_fraction: how many are tolerated as a fraction of the samples read.
    """

    def __init__(self, path: str | Path | None = None, *, max_samples: int = 10, max_fraction: float = 0.01) -> None:
        self.count = 0
        self.reads = 0
        self._path = Path(path) if path is not None else None
        self._max_samples = max_samples
        self._max_fraction = max_fraction
        self._written = _entries(self._path)
        self._lock = threading.Lock()

    def count_read(self) -> None:
        """Counts one more sample that was asked for."""
        with self._lock:
            self.reads += 1

    def add(self, shard: str, key: str, reason: str) -> None:
        """Records one damaged sample.

        Raises:
            UserError: there are now more damaged samples than tolerated.
        """
        with self._lock:
            self.count += 1
            count, reads = self.count, self.reads
            if (shard, key) not in self._written:
                self._written.add((shard, key))
                get_logger().warning(f"quarantined {key} of {shard}: {reason}")
                if self._path is not None:
                    _append(self._path, {"shard": shard, "key": key, "reason": reason})
        if count > max(self._max_samples, self._max_fraction * reads):
            listed = f"; all are listed in {self._path}" if self._path is not None else ""
            raise UserError(
                f"{count} of {reads} samples read are damaged, the last one {key}: {reason}",
                where=shard,
                remedy="restore the damaged shards from a copy or remove them from the dataset, "
                f"or raise data.max_bad_samples and data.max_bad_fraction{listed}",
            )


def _append(path: Path, record: dict[str, str]) -> None:
    """Adds one line in a single write, so that several ranks can share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())
    finally:
        os.close(descriptor)


def _entries(path: Path | None) -> set[tuple[str, str]]:
    """Returns what an earlier run already wrote; a torn last line is ignored."""
    if path is None or not path.exists():
        return set()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {entry for entry in map(_parse, lines) if entry is not None}


def _parse(line: str) -> tuple[str, str] | None:
    try:
        record = json.loads(line)
        return str(record["shard"]), str(record["key"])
    except (ValueError, KeyError, TypeError):
        return None
