"""Decoding frames in spatial tiles without seams: every pixel is computed from all it depends on, nothing is blended.

The decoder is cut behind its middle block, whose attention sees a whole latent frame. That first part runs untiled, a
latent frame at a time. The up blocks see only so far: a tile is computed with a margin (its *halo*) at least that wide,
which is cut off again. The halo shrinks from up block to up block, since less and less is still to come. Where a halo
meets the border of the image it ends there, so the zeros a convolution pads with are those of the image.

Work: for a tile of T x T output pixels up block i, whose input is 2^i times as fine as the latents, computes a square
of side T 2^i / f + 2 h_i (f: pixels per latent), so its work grows by (1 + 2 h_i f / (T 2^i))^2, less at the borders of
the image. Backward from the output: h is the reach of the last convolution; a block with upsampling has h_i =
ceil((h_(i+1) + 1) / 2) + r, where 1 is the convolution behind the upsampling and r the 3x3 convolutions of the block's
residual branches; one without has h_i = h_(i+1) + r. Wan 2.1's blocks have h = (13, 12, 10, 7), its last convolution 1.
Weighted with the blocks' multiplications that makes 1.97, 1.43 and 1.20 times the work for tiles of 128, 256 and 512.

Memory: tile outermost, time inside. One tile's temporal caches live at a time, so the device holds, apart from the
latents, one tile's caches and activations, whatever the frame and the clip; the middle block's own part grows with the
frame at latent resolution. In exchange the middle block's output of the whole clip and the decoded clip wait in host
memory. The other order keeps every tile's caches: for Wan 2.1 about 2300 numbers per pixel of a frame, against 4.5 per
pixel and frame here, so it would take more than 500 frames to break even.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from jaxtyping import Float
from torch import Tensor, nn

from contentv.base.errors import UserError
from contentv.models.vae_chunks import empty_caches

CACHED_FRAMES = 2  # a causal convolution of three frames looks back two
MIN_TILE_LATENTS = 4
# What an up block may be made of. Apart from convolutions and upsampling by 2, all of it works pixel by pixel.
CONVOLUTIONS = (wan.WanCausalConv3d, nn.Conv2d)
PIXEL_BY_PIXEL = (wan.WanRMS_norm, wan.DupUp3D, nn.SiLU, nn.Dropout, nn.Identity)
WAN_BLOCKS = (wan.WanUpBlock, wan.WanResidualUpBlock, wan.WanResidualBlock)
CONTAINERS = (*WAN_BLOCKS, wan.WanResample, nn.ModuleList, nn.Sequential)


class Span(NamedTuple):
    """Positions start <= x < stop along one axis."""

    start: int
    stop: int

    def widened(self, by: int, size: int) -> Span:
        """Returns the span with `by` more positions at each end, as far as the axis of `size` has them."""
        return Span(max(0, self.start - by), min(size, self.stop + by))

    def finer(self, scale: int) -> Span:
        """Returns the same part of an axis with `scale` positions for each of this one's."""
        return Span(scale * self.start, scale * self.stop)


@dataclass(frozen=True)
class Stage:
    """What an up block does to positions: convolutions that reach `before`, upsampling, convolutions behind it."""

    before: int
    scale: int = 1
    after: int = 0

    def needs(self, output: Span, size: int) -> Span:
        """Returns the input positions that the output positions depend on, on an input axis of `size`."""
        made = output.widened(self.after, size * self.scale)
        return Span(made.start // self.scale, -(-made.stop // self.scale)).widened(self.before, size)


class TiledDecoder:
    """The decoder of a Wan VAE, run in tiles.

    Args:
        model: diffusers' AutoencoderKLWan in evaluation mode.
        patch_size: side of the squares of pixels that the decoder's output packs into channels; 1: none.

    Raises:
        UserError: the up blocks hold a module that may mix pixels at a distance, so that tiles could not be exact.
    """

    def __init__(self, model: Any, patch_size: int) -> None:
        self._decoder = model.decoder
        self._patch = patch_size
        for name, module in [*self._decoder.up_blocks.named_modules(), ("norm_out", self._decoder.norm_out)]:
            _check_local(name, module)
        self.stages = [_stage(block) for block in self._decoder.up_blocks] + [Stage(_reach(self._decoder.conv_out))]
        self.scale = math.prod(stage.scale for stage in self.stages)

    def spans(self, output: Span, size: int) -> list[Span]:
        """Returns, for each stage, the input positions that output positions of the whole depend on.

        Args:
            output: positions of the decoder's output (before patches are unpacked).
            size: length of the axis in latents.
        """
        sizes = [size]
        for stage in self.stages[:-1]:
            sizes.append(sizes[-1] * stage.scale)
        spans = []
        for stage, length in zip(reversed(self.stages), reversed(sizes), strict=True):
            output = stage.needs(output, length)
            spans.append(output)
        return spans[::-1]

    def decode(
        self, projected: Float[Tensor, "b c t h w"], tile_latents: int
    ) -> Iterator[Float[Tensor, "b rgb T H W"]]:
        """Yields the frames of each latent frame in turn, clamped, in host memory, once all tiles are done.

        Args:
            projected: latents after the model's `post_quant_conv`.
            tile_latents: longest side of a tile in latents; tiles are of even size.
        """
        height, width = projected.shape[3:]
        middle = list(self._middle(projected))
        groups: list[Tensor] = []
        for rows, columns in itertools.product(tiles(height, tile_latents), tiles(width, tile_latents)):
            y, x = (slice(*span.finer(self.scale * self._patch)) for span in (rows, columns))
            for i, pixels in enumerate(self._tile(middle, rows, columns, projected.device)):
                if i == len(groups):
                    size = (self.scale * self._patch * height, self.scale * self._patch * width)
                    groups.append(torch.empty(*pixels.shape[:3], *size, dtype=pixels.dtype))
                groups[i][..., y, x] = pixels
        middle.clear()
        while groups:
            yield groups.pop(0)

    def _middle(self, projected: Tensor) -> Iterator[Tensor]:
        caches = empty_caches(self._decoder)
        for i in range(projected.shape[2]):
            index = [0]
            features = _convolve(self._decoder.conv_in, projected[:, :, i : i + 1], caches, index)
            yield self._decoder.mid_block(features, feat_cache=caches, feat_idx=index).cpu()

    def _tile(self, middle: list[Tensor], rows: Span, columns: Span, device: torch.device) -> Iterator[Tensor]:
        area = (rows.finer(self.scale), columns.finer(self.scale))
        height, width = middle[0].shape[3:]
        spans = list(zip(self.spans(area[0], height), self.spans(area[1], width), strict=True))
        caches = empty_caches(self._decoder)
        for i, features in enumerate(middle):
            index = [0]
            x = _cut(features, (Span(0, height), Span(0, width)), spans[0]).to(device)
            for number, block in enumerate(self._decoder.up_blocks):
                x = block(x, feat_cache=caches, feat_idx=index, first_chunk=i == 0)
                made = tuple(span.finer(self.stages[number].scale) for span in spans[number])
                x = _cut(x, made, spans[number + 1])
            x = self._decoder.nonlinearity(self._decoder.norm_out(x))
            x = _cut(_convolve(self._decoder.conv_out, x, caches, index), spans[-1], area)
            yield wan.unpatchify(x, self._patch).clamp(-1.0, 1.0).cpu()


def tiles(size: int, most: int) -> list[Span]:
    """Returns spans that cover an axis: as few as can be of at most `most` positions, all of nearly the same length."""
    number = -(-size // most)
    edges = [i * size // number for i in range(number + 1)]
    return [Span(*pair) for pair in itertools.pairwise(edges)]


def check_tile(tile_px: int, spatial_factor: int) -> None:
    """Refuses sides of tiles that cannot be used; 0, for no tiles, passes.

    Args:
        tile_px: longest side of a tile in output pixels.
        spatial_factor: pixels per latent.

    Raises:
        UserError: the side is negative, off the latent grid, or too small.
    """
    least = MIN_TILE_LATENTS * spatial_factor
    if tile_px == 0 or (tile_px >= least and tile_px % spatial_factor == 0):
        return
    below = max(least, tile_px // spatial_factor * spatial_factor)
    why = f"less than the minimum of {least}" if tile_px < least else f"not a multiple of {spatial_factor}"
    raise UserError(
        f"tiles of {tile_px} pixels: {why}",
        where="vae_tile_px",
        remedy=f"use 0 (no tiles) or a multiple of {spatial_factor} from {least} on, such as {below}",
    )


def _cut(x: Tensor, has: tuple[Span, ...], wants: tuple[Span, ...]) -> Tensor:
    rows, columns = (slice(w.start - h.start, w.stop - h.start) for h, w in zip(has, wants, strict=True))
    return x[:, :, :, rows, columns]


def _convolve(convolution: nn.Module, x: Tensor, caches: list[Any], index: list[int]) -> Tensor:
    """Returns a causal convolution of `x` behind the frames in its cache, which it brings up to date."""
    seen = caches[index[0]]
    output: Tensor = convolution(x, seen)
    if seen is not None and x.shape[2] < CACHED_FRAMES:
        x = torch.cat([seen[:, :, x.shape[2] - CACHED_FRAMES :], x], dim=2)
    caches[index[0]] = x[:, :, -CACHED_FRAMES:].clone()
    index[0] += 1
    return output


def _stage(block: Any) -> Stage:
    # Wan 2.1 has a list of upsamplers or None, Wan 2.2 one or None.
    upsampler = block.upsamplers[0] if getattr(block, "upsamplers", None) else getattr(block, "upsampler", None)
    if upsampler is None:
        return Stage(_reach(block))
    after = _reach(upsampler)
    return Stage(_reach(block) - after, scale=2, after=after)


def _reach(part: nn.Module) -> int:
    """Returns how many positions away the convolutions in `part` see together; side branches only add 1x1 ones."""
    return sum(max(m.kernel_size[-2:]) // 2 for m in part.modules() if isinstance(m, CONVOLUTIONS))


def _check_local(name: str, module: nn.Module) -> None:
    known = isinstance(module, (*CONVOLUTIONS, *PIXEL_BY_PIXEL, *CONTAINERS))
    if isinstance(module, CONVOLUTIONS):  # odd kernels, so that padding keeps the size
        known = set(module.stride[-2:]) == {1} == set(module.dilation) and all(k % 2 for k in module.kernel_size[-2:])
    elif isinstance(module, wan.WanRMS_norm):
        known = module.channel_first  # over the channels of one pixel
    elif isinstance(module, nn.Upsample):
        known = module.mode.startswith("nearest") and module.scale_factor == (2.0, 2.0)
    elif isinstance(module, wan.WanResample):
        known = module.mode in ("upsample2d", "upsample3d")
    if not known:
        raise UserError(
            f"no tiles with this VAE: {type(module).__name__} ({name}) in its up blocks may mix distant pixels",
            where="vae_tile_px",
            remedy="set it to 0 (no tiles)",
        )
