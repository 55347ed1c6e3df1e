"""A training step of our MMDiT against diffusers' SD3 transformer: the same weights, in turns, in one process.

    python benchmarks/model_step.py                                  # `small`, 4096 video tokens, fp32, CPU
    python benchmarks/model_step.py --device cuda --dtype bfloat16   # eager and compiled
    python benchmarks/model_step.py --patches 4 --repeats 2          # seconds: does the benchmark itself work?

One image of patches x patches, with diffusers' positions in both, so that both compute the same function: their outputs
and gradients are compared before anything is timed. A step is forward, mean square error and backward, no optimizer.
`ratio` is the median over the turns of our time over theirs in the same turn; below 1 is faster. On the CPU `cpu_ratio`
is the same of processor seconds, which other programs on the machine lengthen less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import measure
import torch
from gpu_step import TEXT_TOKENS, build_ours, build_peer
from omegaconf import OmegaConf
from torch import Tensor, nn

from contentv.base.types import TokenCounts
from contentv.models.cost import flops_per_step, parameter_count
from contentv.models.mmdit import MMDiTConfig

OUTPUT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative norms
GRADIENT_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


@dataclass
class Candidate:
    """A model on its inputs: what it predicts, and a training step of it."""

    model: nn.Module
    predict: Callable[[], Tensor]
    target: Tensor
    cpu_s: list[float] = field(default_factory=list)  # processor seconds of every step, of all threads

    def step(self) -> None:
        """Runs forward and backward; the gradients are kept until the next step."""
        start = time.process_time()
        self.model.zero_grad(set_to_none=True)
        (self.predict().float() - self.target.float()).square().mean().backward()
        self.cpu_s.append(time.process_time() - start)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    values = OmegaConf.load(measure.ROOT / "conf" / "model" / f"{args.model}.yaml")
    config = MMDiTConfig(**cast(dict, OmegaConf.to_container(values)))
    for mode in ("eager", "compiled") if device.type == "cuda" and not args.no_compile else ("eager",):
        pair = build_pair(config, args.patches, device, dtype, compiled=mode == "compiled")
        errors = compare(pair, dtype)
        steps = {name: candidate.step for name, candidate in pair.items()}
        times = measure.interleave(steps, args.warmups, args.repeats, device)
        common = measure.provenance(device) | describe(config, args) | {"mode": mode} | errors
        cpu_times = {name: candidate.cpu_s[-args.repeats :] for name, candidate in pair.items()}
        if device.type == "cpu":
            common |= {f"cpu_{name}": value for name, value in turns(cpu_times).items()}
        rows = [common | row for row in make_rows(times, config, args.patches)]
        path = measure.append_rows(rows, "model-step", device, args.out)
        for row in rows:
            print({key: row[key] for key in ("impl", "mode", "median_ms", "ratio", "output_error")}, path, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--model", default="small", help="a file of conf/model")
    parser.add_argument("--patches", type=int, default=64, help="along each side of the image; 64: 4096 tokens")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--warmups", type=int, default=0, help="beside the step that compares the gradients")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="on CUDA, leave the compiled variants out")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    return parser.parse_args()


def build_pair(
    config: MMDiTConfig, patches: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> dict[str, Candidate]:
    """Returns both models over one storage of weights, on the same image, text and noise level."""
    ours = build_ours(config, device, dtype)
    peer = build_peer(ours, patches, patches)
    side = config.patch_size * patches
    table = peer.pos_embed.cropped_pos_embed(side, side)[0]
    ours.positions = lambda t, h, w, dim: table
    if compiled:
        for block in (*ours.transformer_blocks, *peer.transformer_blocks):
            block.compile(fullgraph=True)
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    latents, target = draw(1, config.in_channels, side, side), draw(1, config.out_channels, side, side)
    text, pooled = draw(1, TEXT_TOKENS, config.joint_attention_dim), draw(1, config.pooled_projection_dim)
    timestep = torch.tensor([500.0], device=device)
    return {
        "contentv": Candidate(ours, lambda: ours(latents[:, :, None], timestep, text, pooled)[:, :, 0], target),
        "diffusers": Candidate(peer, lambda: peer(latents, text, pooled, timestep, return_dict=False)[0], target),
    }


def compare(pair: dict[str, Candidate], dtype: torch.dtype) -> dict[str, float]:
    """Returns how far outputs and gradients are apart (relative norms); too far is no comparison at all."""
    ours, peer = pair.values()
    with torch.no_grad():
        output = measure.relative_error(ours.predict(), peer.predict())
    found = []
    for candidate in (ours, peer):
        candidate.step()
        found.append({name: p.grad for name, p in candidate.model.named_parameters() if p.grad is not None})
        candidate.model.zero_grad(set_to_none=True)
    difference = sum((found[0][name].double() - grad.double()).square().sum() for name, grad in found[1].items())
    gradient = (difference / sum(grad.double().square().sum() for grad in found[1].values())).sqrt().item()
    for what, error, bound in (("outputs", output, OUTPUT_BOUND), ("gradients", gradient, GRADIENT_BOUND)):
        if not error <= bound[dtype]:
            raise RuntimeError(f"the two models' {what} differ by {error:.3g}, at most {bound[dtype]:.3g}")
    return {"output_error": output, "gradient_error": gradient}


def describe(config: MMDiTConfig, args: argparse.Namespace) -> dict[str, object]:
    """Returns what was run."""
    return {
        "model": args.model, "layers": config.num_layers, "width": config.inner_dim,
        "parameters": parameter_count(config), "video_tokens": args.patches**2, "text_tokens": TEXT_TOKENS,
        "dtype": args.dtype, "threads": args.threads,
    }  # fmt: skip


def turns(times: dict[str, list[float]]) -> dict[str, float]:
    """Returns our time over theirs in the same turn: the median and the extremes over the turns."""
    ratios = [a / b for a, b in zip(times["contentv"], times["diffusers"], strict=True)]
    found = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return {name: round(value, 4) for name, value in found.items()}


def make_rows(times: dict[str, list[float]], config: MMDiTConfig, patches: int) -> list[dict[str, object]]:
    """Returns a row a model: its times, its rate, and our time over theirs."""
    flops = flops_per_step(config, TokenCounts(patches**2, TEXT_TOKENS))
    return [
        {
            "impl": name,
            **measure.spread(seconds),
            "gflops": round(flops / statistics.median(seconds) / 1e9, 1),
            **turns(times),
        }
        for name, seconds in times.items()
    ]


if __name__ == "__main__":
    main()
