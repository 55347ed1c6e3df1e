"""What timestep-aware quality decoupling costs: a million draws on one core, and its share of a training step.

python benchmarks/tqd_cost.py                       # rows in benchmarks/results/

`draws` times `sample` on a million scored clips at once, `clip` the keyed draw of a training batch (one generator a
clip, made before) and beside it what of that TQD adds to its base; `step_share` is that addition over the objective's
forward and backward on the same clips. All on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import cast

import measure
import torch
from omegaconf import OmegaConf

from contentv.base.rng import keyed_generators
from contentv.base.types import Batch, Bucket, TextCond
from contentv.diffusion.timesteps import TQD, Beta, LogitNormal, Mode, SigmaSampler, Uniform, draw
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.objectives.flow import FlowMatching

DRAWS = 1_000_000
LATENTS = {"tiny": (32, (16, 5, 10, 10)), "small": (1, (16, 5, 32, 32))}  # clips of a step, c t h w; tiny: the demo's
TEXT_TOKENS = 32
BASES: tuple[SigmaSampler, ...] = (LogitNormal(), Uniform(shift=3.0), Mode(), Beta())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each thing")
    parser.add_argument("--models", nargs="*", default=list(LATENTS), choices=list(LATENTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    common = measure.provenance(device) | {"benchmark": "tqd_cost", "threads": 1, "repeats": args.repeats}
    rows = [common | row for row in [*draws(args.repeats), *(step(name, args.repeats) for name in args.models)]]
    print(measure.append_rows(rows, "tqd-cost", device))


def draws(repeats: int) -> list[dict[str, object]]:
    """Returns the seconds of a million draws, of each base alone and under TQD."""
    generator = torch.Generator().manual_seed(0)
    motion, visual = torch.rand(DRAWS, generator=generator), torch.rand(DRAWS, generator=generator)
    rows: list[dict[str, object]] = []
    for base in BASES:
        for name, tqd in (("quantile", TQD(base)), ("quantile, floor", TQD(base, floor=0.1))):
            found = timed(lambda tqd=tqd: tqd.sample(motion, visual, generator), repeats)
            rows.append({"measure": "draws", "sampler": repr(base), "tqd": name, "draws": DRAWS, **found})
        found = timed(lambda base=base: base.sample(DRAWS, generator), repeats)
        rows.append({"measure": "draws", "sampler": repr(base), "tqd": "off", "draws": DRAWS, **found})
    return rows


def step(name: str, repeats: int) -> dict[str, object]:
    """Returns the seconds of a batch's draws and of the step they belong to."""
    values = OmegaConf.load(measure.ROOT / "conf" / "model" / f"{name}.yaml")
    config = MMDiTConfig(**cast(dict, OmegaConf.to_container(values)))
    clips, shape = LATENTS[name]
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(config, clips, shape, generator)
    base, tqd = LogitNormal(shift=3.0), TQD(LogitNormal(shift=3.0))
    generators = keyed_generators(0, 0, batch.sample_index, "sigma")
    of_base = timed(lambda: draw(base, batch.motion, batch.visual, generators), 20 * repeats)["median_s"]
    of_tqd = timed(lambda: draw(tqd, batch.motion, batch.visual, generators), 20 * repeats)["median_s"]
    model, objective = MMDiT(config), FlowMatching(tqd, 0, batch.text[:1])
    whole = timed(lambda: objective(model, batch, 0).loss_sum.backward(), repeats)["median_s"]
    return {
        "measure": "clip", "model": name, "clips": clips, "latents": list(shape), "text_tokens": TEXT_TOKENS,
        "base_us_per_clip": of_base / clips * 1e6, "tqd_us_per_clip": of_tqd / clips * 1e6,
        "step_s": whole, "step_share": (of_tqd - of_base) / whole,
    }  # fmt: skip


def make_batch(config: MMDiTConfig, clips: int, shape: tuple[int, ...], generator: torch.Generator) -> Batch:
    """Returns clips of noise with random scores."""
    tokens = torch.randn(clips, TEXT_TOKENS, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(clips, config.pooled_projection_dim, generator=generator)
    scores = torch.rand(2, clips, generator=generator)
    return Batch(
        [f"clip-{i}" for i in range(clips)], [""] * clips, Bucket(17, 8 * shape[2], 8 * shape[3]),
        torch.randn(clips, *shape, generator=generator), TextCond(tokens, pooled), scores[0], scores[1],
        torch.arange(clips), clips,
    )  # fmt: skip


def timed(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Returns median, least and most seconds of a call, and its median CPU time, after two that are not counted."""
    times, cpu = [], []
    for i in range(repeats + 2):
        begin, of_process = time.perf_counter(), time.process_time()
        function()
        if i >= 2:
            cpu.append(time.process_time() - of_process)
            times.append(time.perf_counter() - begin)
    return {
        "median_s": statistics.median(times), "least_s": min(times), "most_s": max(times),
        "median_cpu_s": statistics.median(cpu),
    }  # fmt: skip


if __name__ == "__main__":
    main()
