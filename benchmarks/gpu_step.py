"""A training step (forward and backward, bf16, no optimizer) of our MMDiT against diffusers' SD3 transformer.

    python benchmarks/gpu_step.py                                   # all shapes, 8B width, as many layers as fit
    python benchmarks/gpu_step.py --tokens 14669 --layers 12
    python benchmarks/gpu_step.py --device cpu --tiny               # seconds: does the benchmark itself work?

Both run in this process, in turns, with the same weights and random inputs, eager and compiled block by block. The
model of diffusers has one table of positions and no frames: it gets an image with as many patches as the video has, and
as a check the two are compared on an image with the peer's positions in both (`difference`). `diffusers_..._cudnn` also
has our preference of attention kernels: what remains then is the model and not torch's choice.

MFU = 3 F_fwd / (step time x data-sheet rate), F_fwd by `flops_per_forward`; recomputation is not counted. The ceiling
is the MFU of a step that only does its matrix products and its attention, at the rates measured in this run.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import measure
import torch
from torch import Tensor, nn

from contentv.base.types import TokenCounts
from contentv.engine.parallelize import parallelize
from contentv.models.mmdit import MMDiT, MMDiTConfig, flops_per_forward
from contentv.parallel.mesh import single_process_mesh

TEXT_TOKENS = 333
# tokens of the joint sequence -> (batch, patches: frames, rows, columns), and what it is a clip of
SHAPES = {
    1357: (16, (1, 32, 32), "512 px image"),
    4429: (4, (1, 64, 64), "1024 px image"),
    14669: (1, (32, 16, 28), "125 frames 256x448"),
    33093: (1, (21, 30, 52), "81 frames 480x832"),
    41805: (1, (32, 27, 48), "125 frames 432x768"),
}
TINY_SHAPES = {21: (2, (1, 4, 4), "tiny image"), 29: (1, (2, 4, 3), "tiny video")}
TINY = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=24, pooled_projection_dim=16
)
MEMORY_SHARE = 0.9  # of the device's memory, when choosing the number of layers


def main() -> None:
    args = parse()
    device, dtype = torch.device(args.device), torch.bfloat16
    shapes = TINY_SHAPES if args.tiny else {n: SHAPES[n] for n in args.tokens}
    warmups, repeats = (1, 2) if args.tiny else (max(3, args.warmups), max(20, args.repeats))
    config = TINY if args.tiny else MMDiTConfig()
    for total, (batch, patches, clip) in shapes.items():
        tokens = TokenCounts(math.prod(patches), total - math.prod(patches))
        layers = args.layers or fitting_layers(config, batch, patches, tokens, device, dtype)
        bench = Bench(replace(config, num_layers=layers), batch, patches, tokens, device, dtype, args.recompute)
        rows = bench.rows(warmups, repeats, compiled=not args.no_compile)
        common = measure.provenance(device) | {"clip": clip, "tokens": total, "batch": batch, "patches": patches}
        path = measure.append_rows([common | row for row in rows], "step", device, args.out)
        for row in rows:
            print(
                {k: row[k] for k in ("impl", "median_ms", "mfu", "share_of_ceiling", "error") if k in row},
                path,
                flush=True,
            )
        del bench
        release(device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="0: as many as fit, at most 38")
    parser.add_argument(
        "--recompute", default="none", choices=["none", "selective", "full"], help="of ours, not the peer's"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a toy model, 2 repeats: a test of this file, not a result")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    return parser.parse_args()


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def near_square(n: int) -> tuple[int, int]:
    """Returns rows and columns of an image with n patches, as square as n allows."""
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    return rows, n // rows


def build_ours(config: MMDiTConfig, device: torch.device, dtype: torch.dtype) -> MMDiT:
    """Returns our model with random weights, also where training starts at zero: every path and gradient is alive."""
    with torch.device(device):
        model = MMDiT(config).to(dtype)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.0, 1.0)  # biases, and the weights of norms, which are positive
    return model


def build_peer(ours: MMDiT, rows: int, columns: int) -> nn.Module:
    """Returns diffusers' model over the same weight storage, its positions reaching over rows x columns patches."""
    from diffusers import SD3Transformer2DModel

    config = ours.config
    weight = ours.pos_embed.proj.weight
    with torch.device(weight.device):
        peer = SD3Transformer2DModel(
            sample_size=config.patch_size * max(rows, columns),
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            joint_attention_dim=config.joint_attention_dim,
            caption_projection_dim=config.inner_dim,
            pooled_projection_dim=config.pooled_projection_dim,
            pos_embed_max_size=max(rows, columns),
            qk_norm=config.qk_norm,
        ).to(weight.dtype)
    missing = peer.load_state_dict(ours.state_dict(), strict=False, assign=True)
    if missing.missing_keys != ["pos_embed.pos_embed"] or missing.unexpected_keys:
        raise RuntimeError(f"the two models' weights have different names: {missing}")
    return peer.requires_grad_()


def fitting_layers(
    config: MMDiTConfig,
    batch: int,
    patches: tuple[int, int, int],
    tokens: TokenCounts,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Returns how many layers every eager variant can train in the device's memory, from peaks at 1 and 2 layers."""
    if device.type == "cpu":
        return config.num_layers
    peaks = []
    for layers in (1, 2):
        bench = Bench(replace(config, num_layers=layers), batch, patches, tokens, device, dtype)
        peaks.append(max(bench.peak_bytes(step) for _, step in bench.steps(compiled=False)))
        del bench
        release(device)
    a_layer, room = peaks[1] - peaks[0], MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    return max(1, min(config.num_layers, 1 + int((room - peaks[0]) / a_layer)))


class Bench:
    """One model and one shape: its inputs, its variants, and what they cost."""

    def __init__(
        self, config: MMDiTConfig, batch: int, patches: tuple[int, int, int], tokens: TokenCounts,
        device: torch.device, dtype: torch.dtype, recompute: str = "none",
    ) -> None:  # fmt: skip
        self.config, self.batch, self.tokens, self.device, self.dtype = config, batch, tokens, device, dtype
        self.recompute = recompute
        self.model = build_ours(config, device, dtype)
        t, h, w = patches
        p, c = config.patch_size, config.in_channels
        self.image = near_square(tokens.video)
        generator = torch.Generator(device).manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.latents, self.target = draw(batch, c, t, p * h, p * w), draw(batch, c, t, p * h, p * w)
        rows, columns = self.image
        self.image_latents, self.image_target = (draw(batch, c, p * rows, p * columns) for _ in range(2))
        self.timestep = torch.linspace(100, 900, batch, device=device)
        self.text = draw(batch, tokens.text, config.joint_attention_dim)
        self.pooled = draw(batch, config.pooled_projection_dim)

    def our_step(self, model: nn.Module) -> Callable[[], None]:
        """Returns a forward and backward of a module that is called like MMDiT, on the video."""
        return self._step(
            model, lambda: model(self.latents, self.timestep, self.text, self.pooled), self.target
        )  # fmt: skip

    def peer_step(self, peer: nn.Module, ordered: bool = False) -> Callable[[], None]:
        """Returns a forward and backward of diffusers' module, on the image; `ordered` has our kernel preference."""
        from contentv_kernels.attention.sdpa import CUDA_ORDER
        from torch.nn.attention import sdpa_kernel

        def forward() -> Tensor:
            return peer(self.image_latents, self.text, self.pooled, self.timestep, return_dict=False)[0]

        def forward_ordered() -> Tensor:
            with sdpa_kernel(CUDA_ORDER, set_priority=True):
                return forward()

        return self._step(peer, forward_ordered if ordered else forward, self.image_target)

    @staticmethod
    def _step(model: nn.Module, forward: Callable[[], Tensor], target: Tensor) -> Callable[[], None]:
        def step() -> None:
            (forward().float() - target.float()).square().mean().backward()
            model.zero_grad(set_to_none=True)

        return step

    def steps(self, compiled: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yields each variant's name and step; all share one set of weights."""
        for suffix in ("eager", "compiled") if compiled else ("eager",):
            with torch.device("meta"):
                ours = MMDiT(self.config)
            ours.load_state_dict(self.model.state_dict(), assign=True)
            parallelize(
                ours.requires_grad_(), single_process_mesh(),
                recompute=self.recompute, compile=suffix == "compiled", device=self.device,
            )  # fmt: skip
            yield f"contentv_{suffix}", self.our_step(ours)
            for ordered in (False, True):
                peer = build_peer(self.model, *self.image)
                if suffix == "compiled":
                    for block in peer.transformer_blocks:  # compile_repeated_blocks, which this class does not offer
                        block.compile(fullgraph=True)
                yield f"diffusers_{suffix}" + "_cudnn" * ordered, self.peer_step(peer, ordered)

    def peak_bytes(self, step: Callable[[], None]) -> int:
        """Returns the most memory allocated during one step; 0 on the CPU."""
        if self.device.type == "cpu":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    @torch.no_grad()
    def difference(self) -> float:
        """Returns how far the two models are apart on an image, with the peer's positions in both (relative norm)."""
        peer = build_peer(self.model, *self.image)
        theirs = peer(self.image_latents, self.text, self.pooled, self.timestep, return_dict=False)[0]
        p = self.config.patch_size
        table = peer.pos_embed.cropped_pos_embed(*(p * side for side in self.image))[0]
        kept, self.model.positions = self.model.positions, lambda t, h, w, dim: table
        ours = self.model(self.image_latents[:, :, None], self.timestep, self.text, self.pooled)[:, :, 0]
        self.model.positions = kept
        return measure.relative_error(ours, theirs)

    def ceiling_seconds(self) -> tuple[float, dict[str, float]]:
        """Returns the time of a step's matrix products and attention at the rates measured here, and those rates."""
        d, s = self.config.inner_dim, sum(self.tokens)
        sizes = [(self.batch * s, d, 4 * d), (self.batch * s, 4 * d, d)]
        if self.device.type == "cuda":
            sizes.append((8192, 8192, 8192))
        gemm = measure.gemm_flops_per_s(sizes, self.dtype, self.device)
        heads, dh = self.config.num_attention_heads, self.config.attention_head_dim
        attention = measure.attention_flops_per_s(self.batch, s, heads, dh, self.dtype, self.device)
        attention_flops = 3 * self.batch * self.config.num_layers * 4 * s * s * d
        seconds = (self.flops() - attention_flops) / gemm + attention_flops / attention
        return seconds, {"gemm_tflops": round(gemm / 1e12, 3), "attention_tflops": round(attention / 1e12, 3)}

    def flops(self) -> int:
        """Returns the operations of one training step."""
        return 3 * self.batch * flops_per_forward(self.config, self.tokens)

    def rows(self, warmups: int, repeats: int, compiled: bool) -> list[dict[str, object]]:
        """Returns a row for each variant, those that ran out of memory too."""
        difference = self.difference()
        ceiling, rates = self.ceiling_seconds()
        peak = measure.peak_flops(self.device)
        common = {
            "layers": self.config.num_layers, "width": self.config.inner_dim,
            "dtype": str(self.dtype).removeprefix("torch."), "recompute": self.recompute, "flops": self.flops(),
            "difference": round(difference, 6), **rates,
        }  # fmt: skip
        candidates, memory, failed = {}, {}, {}
        for name, step in self.steps(compiled):
            try:
                step()  # compiles
                memory[name] = self.peak_bytes(step)
                candidates[name] = step
            except torch.OutOfMemoryError:
                failed[name] = "out of memory"
                release(self.device)
        rows = [common | {"impl": name, "error": error} for name, error in failed.items()]
        for name, times in measure.interleave(candidates, warmups, repeats, self.device).items():
            row = common | {"impl": name, "peak_bytes": memory[name]} | measure.spread(times)
            seconds = row["median_ms"] / 1000
            row["tokens_per_s"] = round(self.batch * sum(self.tokens) / seconds, 1)
            row["share_of_ceiling"] = round(ceiling / seconds, 4)
            if peak is not None:
                row |= {
                    "mfu": round(self.flops() / seconds / peak, 4),
                    "ceiling_mfu": round(self.flops() / ceiling / peak, 4),
                }
            rows.append(row)
        return rows


if __name__ == "__main__":
    main()
