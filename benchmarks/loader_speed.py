"""Samples a second of the loader, in turns with bare reads of the same bytes and with webdataset on the same tars.

    python benchmarks/loader_speed.py                      # 1000 samples of 449 KB in 64 MB shards; about two minutes
    python benchmarks/loader_speed.py --samples 200 --turns 3

All candidates run in one process on files in the page cache, A-B-A-B. Ours reads in the random order of training and
delivers stacked micro-batches. Checksums are compared at every reading; a sample's values are looked at when a process
reads it for the first time, which each candidate but `ours, first epoch` has done in the turn that is not counted.

    ours, first epoch   opened anew in each turn: shards' indexes are read, and all values looked at

What it is compared with:

    bare            os.pread at known places + safetensors.torch.load in random order, each sample dropped at once
    bare batches    the same, the samples of a micro-batch kept until it is full, as any loader has to
    bare stacked    the same, and stacked: what ours delivers, without any check
    webdataset      WebDataset(tars).decode(), the default pipeline, + safetensors.torch.load; stored order, unchecked
    tiny            a training step (forward, backward, AdamW) of `model=tiny` on 17 frames of 96 x 96 pixels
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import measure
import numpy as np
import torch
import webdataset
from omegaconf import OmegaConf
from safetensors.torch import load

from contentv.base.types import Bucket, TextCond
from contentv.data import DatasetInfo, DatasetWriter, TextInfo, VaeInfo, open_dataset
from contentv.models.mmdit import MMDiT, MMDiTConfig

CPU = torch.device("cpu")
BUCKET = Bucket(17, 384, 384)
VAE = VaeInfo("benchmark", (0.0,) * 16, (1.0,) * 16, 16, 4, 8)
TEXT = TextInfo("benchmark", 512, 768, 77)
MICRO_BATCH = 8
TINY = {"latents": (16, 5, 12, 12), "tokens": 77}


def make_dataset(folder: Path, samples: int) -> DatasetInfo:
    """Returns a dataset of random bf16 samples, 449 KB each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    null = TextCond(torch.zeros(1, 77, 512), torch.zeros(1, 768))
    with DatasetWriter(folder, VAE, TEXT, null, max_shard_bytes=64 << 20) as writer:
        for i in range(samples):
            meta = {
                "caption": "a red ball rolls to the left over a dark wooden table, seen from above", "source": "films",
                "kind": "video", "num_frames": 17, "height_px": 384, "width_px": 384, "fps": 8.0, "start_s": 0.0,
                "duration_s": 2.125, "visual_raw": float(i % 97), "motion_raw": float(i % 89),
                "scores": {"blur": 211.5, "contrast": 0.31, "flicker": 0.02},
            }  # fmt: skip
            latents = normal(*VAE.latent_shape(BUCKET))
            writer.add(f"sample-{i:06d}", meta, latents, normal(77, 512), normal(768), bucket=BUCKET)
    return DatasetInfo.load(folder)


class Bare:
    """Reads the tensors of samples at known places, and checks nothing."""

    def __init__(self, info: DatasetInfo) -> None:
        self.places = []
        for shard in info.shards:
            descriptor = os.open(info.shard_path(shard), os.O_RDONLY)
            for sample in json.loads((info.path / shard.index_file).read_bytes())["samples"]:
                member = sample["members"]["safetensors"]
                self.places.append((descriptor, member["offset"], member["size"]))
        self.order = np.random.default_rng(0).permutation(len(self.places)).tolist()

    def samples(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the tensors of every sample once, in random order."""
        for number in self.order:
            descriptor, offset, size = self.places[number]
            yield load(os.pread(descriptor, size, offset))

    def dropped(self) -> None:
        """Keeps no sample."""
        for _ in self.samples():
            pass

    def batches(self, stacked: bool = False) -> None:
        """Keeps a micro-batch at a time."""
        batch: list[dict[str, torch.Tensor]] = []
        for sample in self.samples():
            batch.append(sample)
            if len(batch) == MICRO_BATCH:
                if stacked:
                    _ = {name: torch.stack([one[name] for one in batch]) for name in sample}
                batch = []


class Ours:
    """The loader as training uses it: stacked micro-batches in the order of the seed, without end."""

    def __init__(self, info: DatasetInfo, workers: int, prefetch: int) -> None:
        self.samples = info.samples
        self.stream = open_dataset(
            info.path, global_batch_size=MICRO_BATCH, micro_batch_size=MICRO_BATCH, workers=workers, prefetch=prefetch
        )  # fmt: skip

    def epoch(self) -> None:
        """Takes as many samples as the dataset has."""
        for _ in range(self.samples // MICRO_BATCH):
            next(self.stream)

    @classmethod
    def first_epoch(cls, info: DatasetInfo) -> None:
        """Opens the dataset, takes all samples once and closes it."""
        ours = cls(info, 0, 0)
        ours.epoch()
        ours.stream.close()


def read_webdataset(tars: list[str], samples: int) -> None:
    """Reads all samples by webdataset's default pipeline, and their tensors."""
    count = 0
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode():
        load(sample["safetensors"])
        count += 1
    if count != samples:
        raise RuntimeError(f"webdataset gave {count} of {samples} samples")


def tiny_step() -> Callable[[], None]:
    """Returns a training step of `model=tiny` on a micro-batch of random latents."""
    values = OmegaConf.load(measure.ROOT / "conf" / "model" / "tiny.yaml")
    config = MMDiTConfig(**cast(dict[str, Any], OmegaConf.to_container(values)))
    model = MMDiT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    latents = torch.randn(MICRO_BATCH, *TINY["latents"])  # type: ignore[misc]
    tokens = torch.randn(MICRO_BATCH, cast(int, TINY["tokens"]), config.joint_attention_dim)
    pooled = torch.randn(MICRO_BATCH, config.pooled_projection_dim)

    def step() -> None:
        optimizer.zero_grad()
        velocity = model(latents, torch.full((MICRO_BATCH,), 500.0), tokens, pooled)
        velocity.square().mean().backward()
        optimizer.step()

    return step


def rates(seconds: list[float], samples: int) -> dict[str, float]:
    """Returns samples a second: median over the turns, and the slowest and fastest tenth."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    values = {"median": statistics.median(seconds), "p10": cuts[-1], "p90": cuts[0]}
    return {name: round(samples / value, 1) for name, value in values.items()}


def main() -> None:
    """Measures, prints a line a candidate, and appends the rows to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        info = make_dataset(Path(folder) / "dataset", arguments.samples // MICRO_BATCH * MICRO_BATCH)
        bare = Bare(info)
        tars = [str(info.shard_path(shard)) for shard in info.shards]
        step = tiny_step()
        ours = {
            f"ours, workers={workers}, prefetch={prefetch}": Ours(info, workers, prefetch)
            for workers, prefetch in ((0, 0), (0, 2), (1, 2), (2, 2))
        }
        candidates: dict[str, Callable[[], object]] = {
            "bare": bare.dropped,
            **{name: one.epoch for name, one in ours.items()},
            "ours, first epoch": lambda: Ours.first_epoch(info),
            "bare batches": bare.batches,
            "bare stacked": lambda: bare.batches(stacked=True),
            "webdataset": lambda: read_webdataset(tars, info.samples),
            "tiny": lambda: [step() for _ in range(4)],
        }
        seconds = measure.interleave(candidates, 1, arguments.turns, CPU)
        for one in ours.values():
            one.stream.close()
        write(info, bare.places[0][2], seconds, arguments.out)


def write(info: DatasetInfo, sample_bytes: int, seconds: dict[str, list[float]], out: Path) -> None:
    """Appends a row for each candidate, with its ratio to each thing it is compared with, from the same turns."""
    counts = {name: 4 * MICRO_BATCH if name == "tiny" else info.samples for name in seconds}
    speed = {name: [counts[name] / s for s in times] for name, times in seconds.items()}
    rows: list[dict[str, object]] = []
    for name, times in seconds.items():
        row: dict[str, object] = {
            "benchmark": "loader_speed", "candidate": name, "samples_per_s": rates(times, counts[name]),
            "turns": len(times), "sample_bytes": sample_bytes, "samples": info.samples, "shards": len(info.shards),
            "micro_batch": MICRO_BATCH, "cpus": os.cpu_count(), "load_average": os.getloadavg()[0],
        }  # fmt: skip
        if name.startswith("ours"):
            for other in ("bare", "bare batches", "bare stacked", "webdataset", "tiny"):
                ratios = [a / b for a, b in zip(speed[name], speed[other], strict=True)]
                row[f"x_{other.replace(' ', '_')}"] = round(statistics.median(ratios), 3)
        rows.append(row | measure.provenance(CPU))
        print(json.dumps({key: row[key] for key in row if key.startswith(("candidate", "samples_per_s", "x_"))}))
    print(measure.append_rows(rows, "loader", CPU, out))


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
