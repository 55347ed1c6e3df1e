"""Processes under torchrun share a curation; the dataset is that of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from curation_process import curate_folder, tree
from toy_media import make_world, put

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.dist


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(HERE / "curation_process.py"), str(source), str(output), json.dumps({"chunk_size": 1}),
    ]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "kernels"), str(HERE)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=env, start_new_session=True, cwd=ROOT)


def test_two_ranks_killed_once_make_the_dataset_of_one_process(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for n in range(5):
        put(source / f"{n}.mp4", make_world(n, 18 + n), f"world {n}")
    put(source / "copy.mp4", (source / "0.mp4").read_bytes(), "a copy")
    curate_folder(source, tmp_path / "one", chunk_size=1)

    running = start(source, tmp_path / "two")
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "two").rglob("scan/*.jsonl"))) < 2:
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait(60)
    assert start(source, tmp_path / "two").wait(300) == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    times = [path.name for path in (tmp_path / "two").rglob("times-*.jsonl")]
    assert sorted(times) == ["times-0.jsonl", "times-1.jsonl"], "both had a part of it"
