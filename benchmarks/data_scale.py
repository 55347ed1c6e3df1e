"""What the order of samples costs when the dataset is large: time to open, to resume, and memory.

python benchmarks/data_scale.py                      # both parts, rows in benchmarks/results/
python benchmarks/data_scale.py --part epoch         # 100,000 samples in 1,000 shards, one epoch read in full
python benchmarks/data_scale.py --part huge          # 100 M clips in 100,000 shards, opened and planned

`epoch` writes small samples, reads all of an epoch, and compares what came with what was written. `huge` writes a
dataset.json, empty tars and a full-size table: nothing is read but what opening and planning need. Every measurement of
time or memory runs in a process of its own; `base_mib` is that process after importing the library.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from measure import append_rows, provenance

from contentv.base.types import Bucket, TextCond
from contentv.data import DatasetInfo, DatasetSource, DatasetWriter, ShardInfo, TextInfo, VaeInfo, open_dataset
from contentv.data.dataset import null_text_bytes
from contentv.data.quality import write_quality
from contentv.data.table import _header  # the file is written by columns here, not from indexes

VAE = VaeInfo("vae", (0.0,) * 4, (1.0,) * 4, 4, 4, 8)
TEXT = TextInfo("text", 8, 8, 4)
NULL = TextCond(torch.zeros(1, 4, 8), torch.zeros(1, 8))
SOURCES = ("films", "stock", "phones")
WEIGHTS = {"films": 5.0, "stock": 3.0, "phones": 2.0}
HUGE_BUCKETS = ("f1_h432_w768", "f17_h432_w768", "f61_h432_w768", "f125_h432_w768")
BATCH = 80  # divides 100,000: an epoch is every sample once
MIB = 1 << 20


def rss_bytes() -> int:
    """Returns the memory of this process that is in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes() -> int:
    """Returns the part of it that is not a mapped file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def peak_bytes() -> int:
    """Returns the most memory this process ever had in RAM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Returns what a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def keep(motion: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """TQD's probability of keeping a clip."""
    return torch.maximum(motion, visual)


# -- 100,000 samples, read


def write_small(folder: Path, samples: int, shards: int) -> None:
    """Writes a dataset of one bucket: random latents, three sources, scores."""
    bucket, rng = Bucket(1, 16, 16), np.random.default_rng(0)
    meta = {"caption": "a clip", "kind": "image", "num_frames": 1, "height_px": 16, "width_px": 16,
            "fps": 24.0, "start_s": 0.0, "duration_s": 1.0}  # fmt: skip
    draws = torch.from_numpy(rng.standard_normal((samples, 4, 1, 2, 2), dtype=np.float32)).bfloat16()
    tokens, pooled = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    sample_bytes = 2048  # two members of one block and their headers
    with DatasetWriter(folder, VAE, TEXT, NULL, max_shard_bytes=sample_bytes * samples // shards) as writer:
        for i in range(samples):
            scores = {"visual_raw": float(i % 97), "motion_raw": float(i % 89)}
            writer.add(f"clip-{i:06d}", {**meta, "source": SOURCES[i % 3], **scores}, draws[i], tokens, pooled, bucket)


def opened(folder: Path, state: dict[str, Any] | None = None, **options: Any) -> DatasetSource:
    """Returns the source, at its beginning or at a place."""
    source = open_dataset(folder, global_batch_size=BATCH, micro_batch_size=BATCH, seed=1, **options)
    if state is not None:
        source.load_state_dict(state)
    return source


def read_epoch(folder: Path, samples: int) -> dict[str, Any]:
    """Reads one epoch; returns times, memory at 20 % and 100 %, how often samples came, and states on the way."""
    begin = time.perf_counter()
    source = opened(folder)
    keys = next(source)[0].keys
    first_batch_s = time.perf_counter() - begin
    steps = samples // BATCH
    memory: dict[str, int] = {}
    states: dict[float, dict[str, Any]] = {}
    seen = np.full(samples, 1, dtype=np.uint8) - 1  # written to, so that it does not grow while we look
    seen[[int(key[5:]) for key in keys]] += 1
    for step in range(1, steps):
        share = step / steps
        for mark in (0.1, 0.7, 0.9):
            if mark not in states and share >= mark:
                states[mark] = source.state_dict()
        if "20" not in memory and share >= 0.2:
            memory["20"] = rss_bytes()
        seen[[int(key[5:]) for key in next(source)[0].keys]] += 1
    memory["100"] = rss_bytes()
    seconds = time.perf_counter() - begin
    return {
        "first_batch_s": first_batch_s, "epoch_s": seconds, "samples_per_s": steps * BATCH / seconds,
        "steps": steps, "seen_once": int((seen == 1).sum()), "seen_more": int((seen > 1).sum()),
        "rss_20_mib": memory["20"] / MIB, "rss_100_mib": memory["100"] / MIB,
        "rss_growth": memory["100"] / memory["20"] - 1, "states": states,
    }  # fmt: skip


def resume(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Returns how long it takes from nothing to the first batch at a saved place."""
    begin = time.perf_counter()
    source = opened(folder, state)
    keys = next(source)[0].keys
    return {"seconds": time.perf_counter() - begin, "keys": keys}


def measure_epoch(work: Path, samples: int, shards: int) -> list[dict[str, object]]:
    """Returns the row of the part that reads."""
    folder = work / "small"
    begin = time.perf_counter()
    if not (folder / "dataset.json").is_file():
        write_small(folder, samples, shards)
    written_s = time.perf_counter() - begin
    found = apart(read_epoch, folder, samples)
    states = found.pop("states")
    times = {f"resume_{mark:.0%}_s".replace("%", ""): apart(resume, folder, s)["seconds"] for mark, s in states.items()}
    count = len(DatasetInfo.load(folder).shards)
    return [{
        "benchmark": "data_scale", "part": "epoch", "samples": samples, "shards": count, "global_batch": BATCH,
        "write_s": written_s, **found, **times, "state_bytes": len(json.dumps(states[0.7])),
    }]  # fmt: skip


# -- 100 M clips, planned


def write_huge(folder: Path, clips: int, shards: int) -> None:
    """Writes what opening and planning look at: dataset.json, empty tars, quality.json and a table of full size."""
    names = [f"{bucket}/{i:06d}.tar" for bucket in HUGE_BUCKETS for i in range(shards // len(HUGE_BUCKETS))]
    each = clips // len(names)
    for bucket in HUGE_BUCKETS:
        (folder / "shards" / bucket).mkdir(parents=True)
    for name in names:
        (folder / "shards" / name).touch()
    (folder / "null_text.safetensors").write_bytes(null_text_bytes(NULL, TEXT))
    write_quality(folder, [(source, i / 100, i / 100) for source in SOURCES for i in range(101)])
    records = [ShardInfo(name, each, each * 450_000, f"{i:032x}", f"{i:032x}") for i, name in enumerate(names)]
    info = DatasetInfo(folder, VAE, TEXT, dict.fromkeys(SOURCES, each * len(names) // 3), records)
    info.table = write_columns(info)
    info.write()


def write_columns(info: DatasetInfo) -> Any:
    """Writes a table of random hashes, sources and scores in the layout of `contentv.data.table`."""
    from contentv.data.dataset import TABLE_FILE, TableInfo

    count, rng = info.samples, np.random.default_rng(0)
    dtypes = {"key_hash": np.dtype("<u8"), "source": np.dtype("<u2"), "scores": np.dtype("<f4")}
    shapes = {"key_hash": [count], "source": [count], "scores": [count, 2]}
    header, _ = _header(shapes, dtypes, sorted(SOURCES))
    digests = {}
    with (info.path / TABLE_FILE).open("wb") as stream:
        stream.write(header)
        for name, dtype in dtypes.items():
            digest, width = xxhash.xxh128(), 2 if name == "scores" else 1
            for first in range(0, count, 1 << 22):
                rows = min(1 << 22, count - first)
                if name == "key_hash":
                    values = rng.integers(0, 1 << 64, rows, dtype=np.uint64)
                elif name == "source":
                    values = rng.choice(3, rows, p=[0.6, 0.3, 0.1]).astype(dtype)
                else:
                    values = rng.random((rows, width), dtype=np.float32)
                digest.update(values.tobytes())
                stream.write(values.tobytes())
            digests[name] = digest.hexdigest()
    return TableInfo(TABLE_FILE, count, digests)


def plan_huge(folder: Path, choice: str) -> dict[str, Any]:
    """Opens the dataset and plans batches on one rank, at the beginning and at a late place; reads no sample."""
    base, begin = rss_bytes(), time.perf_counter()
    options: dict[str, Any] = {
        "plain": {}, "source_weights": {"source_weights": WEIGHTS}, "image_ratio": {"image_ratio": 0.2},
        "keep": {"keep_probability": keep}, "keep_and_weights": {"keep_probability": keep, "source_weights": WEIGHTS},
    }[choice]  # fmt: skip
    source = open_dataset(folder, global_batch_size=BATCH * 4, micro_batch_size=4, seed=1, prefetch=0, **options)
    open_s = time.perf_counter() - begin
    order = source._steps._before._before._before._before._order
    first = order.next()
    first_plan_s = time.perf_counter() - begin
    steps = 200
    for _ in range(steps):
        order.next()
    per_step_s = (time.perf_counter() - begin - first_plan_s) / steps
    return {
        "choice": choice, "open_s": open_s, "open_and_plan_s": first_plan_s, "plan_ms_per_step": per_step_s * 1000,
        "base_mib": base / MIB, "rss_mib": rss_bytes() / MIB, "peak_mib": peak_bytes() / MIB,
        "anonymous_mib": anonymous_bytes() / MIB, "first_batch": len(first.samples),
        "state_bytes": len(json.dumps(source.state_dict())),
    }  # fmt: skip


def measure_huge(work: Path, clips: int, shards: int) -> list[dict[str, object]]:
    """Returns the rows of the part that plans."""
    folder = work / "huge"
    if not (folder / "dataset.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_huge(folder, clips, shards)
    sizes = {"dataset_json_bytes": (folder / "dataset.json").stat().st_size,
             "table_bytes": (folder / "samples.safetensors").stat().st_size}  # fmt: skip
    choices = ("plain", "image_ratio", "source_weights", "keep", "keep_and_weights")
    common = {"benchmark": "data_scale", "part": "huge", "clips": clips, "shards": shards, **sizes}
    return [{**common, **apart(plan_huge, folder, choice)} for choice in choices]


def main() -> None:
    """Measures, appends the rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "epoch", "huge"), default="all")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--clips", type=int, default=100_000_000)
    parser.add_argument("--huge-shards", type=int, default=100_000)
    parser.add_argument("--work", type=Path, help="folder for the datasets, kept; else a temporary one, about 2 GB")
    parser.add_argument("--dry", action="store_true", help="print the rows and keep none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows: list[dict[str, object]] = []
        if options.part in ("all", "epoch"):
            rows += measure_epoch(work, options.samples, options.shards)
        if options.part in ("all", "huge"):
            rows += measure_huge(work, options.clips, options.huge_shards)
    device = torch.device("cpu")
    for row in rows:
        print(json.dumps(row))
    if not options.dry:
        origin = {**provenance(device), "cores": len(os.sched_getaffinity(0))}
        print(append_rows([{**row, **origin} for row in rows], "data-scale", device))


if __name__ == "__main__":
    main()
