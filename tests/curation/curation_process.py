"""A curation in a process of its own, with toy encoders and a real dataset: to be killed, and to run as ranks.

    python curation_process.py INPUT OUTPUT '{"workers": 2, ...}' [point]

With a point the process kills itself (SIGKILL) when it has written that many files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from toy_encoders import ToyText, ToyVAE

import contentv.base.files as base_files
from contentv.base.errors import StoppedBySignalError
from contentv.base.stop import StopSignal
from contentv.config.curating import ShardSink
from contentv.curation.curate import CurateConfig, CurateReport, curate
from contentv.curation.near_duplicates import DedupConfig
from contentv.data import DatasetWriter, TextInfo, VaeInfo
from contentv.parallel.peers import join_peers

BUCKETS = ["f1_h32_w32", "f9_h32_w32"]
VAE = VaeInfo("toy", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 3, 4, 8)
TEXT = TextInfo("toy", 2, 2, 4)


def config_of(source: Path, output: Path, **changes: Any) -> CurateConfig:
    """Returns a configuration with small clips and chunks."""
    settings: dict[str, Any] = {"buckets": BUCKETS, "min_clip_s": 1.0, "max_clip_s": 3.0, "chunk_size": 3, **changes}
    if isinstance(settings.get("dedup"), dict):
        settings["dedup"] = DedupConfig(**settings["dedup"])
    return CurateConfig(input=str(source), output=str(output), **settings)


def curate_folder(source: Path, output: Path, **changes: Any) -> CurateReport:
    """Curates a folder into a real dataset, as this process's rank."""
    torch.set_num_threads(1)
    config = config_of(source, output, **changes)
    with StopSignal() as stop, join_peers(lambda: stop.received != 0) as peers:
        writer = None
        if peers.rank == 0:
            writer = DatasetWriter(output, VAE, TEXT, ToyText().encode([" "]))
        try:
            sink = ShardSink(output, VAE, TEXT, writer)
            return curate(
                config, ToyVAE(), ToyText(), sink, peers=peers, stopping=lambda: stop.received != 0
            )  # fmt: skip
        finally:
            if writer is not None:
                writer.abandon()


def tree(output: Path) -> dict[str, bytes]:
    """Returns what of a dataset must not depend on how it was made: all but the work folder's notes of times."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in files
        if path.name != "summary.json" and not path.name.startswith("times-")
    }


def kill_at(point: int) -> None:
    """Kills this process at the `point`-th renaming of a finished file: before it, where the point is odd."""
    replace, count = os.replace, 0

    def counted(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count > point // 2:
            if point % 2 == 0:
                replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    base_files.os.replace = counted  # type: ignore[assignment]


if __name__ == "__main__":
    if len(sys.argv) > 4:
        kill_at(int(sys.argv[4]))
    try:
        curate_folder(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
    except StoppedBySignalError:
        sys.exit(75)
