"""Fixed positions of video tokens: a sine-cosine code of (frame, column, row), added to the patch embedding.

Channels of a token at latent frame i, patch row r and patch column c, for model width d:
    [0, d/4)       code(i)
    [d/4, 5d/8)    code(2 c)
    [5d/8, d)      code(2 r)
with code(p) = [sin(p w_0), sin(p w_1), ..., cos(p w_0), cos(p w_1), ...] and w_k = 10000^(-k / (half the channels)).

Sources: ContentV (arXiv 2506.05343) and its released code; one axis: Vaswani et al. 2017, section 3.5.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

WIDTH_MULTIPLE = 16  # d/4 and 3d/8 must both split into a sine and a cosine half
SPATIAL_STEP = 2.0  # a patch is two latent pixels wide


def sincos_axis(count: int, dim: int, step: float = 1.0) -> Float[Tensor, "count dim"]:
    """Returns the code of the positions 0, step, 2 step, ..., float64 on the CPU, sines in the first half.

    Args:
        count: number of positions.
        dim: channels, even.
        step: distance of two neighbours.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
    angle = torch.outer(torch.arange(count, dtype=torch.float64, device="cpu") * step, frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class SinCos3D:
    """Positions as a callable (t, h, w, dim) -> (n, dim), n = t h w in the order (t h w), fp32.

    The table is made on torch's current default device, which the model sets to that of its latents. The three axes
    are computed once per shape, in float64 on the CPU (not every accelerator has float64), and kept: they are a few
    hundred kilobytes, the table made from them is hundreds of megabytes.
    """

    def __init__(self) -> None:
        self._axes: dict[tuple[int, int, int, int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, t: int, h: int, w: int, dim: int) -> Float[Tensor, "n dim"]:
        """Returns the positions of a grid of t frames, h rows and w columns of patches.

        Raises:
            ValueError: `dim` is no multiple of 16.
        """
        if dim % WIDTH_MULTIPLE != 0:
            raise ValueError(f"3D positions need a width that is a multiple of {WIDTH_MULTIPLE}, not {dim}")
        frame, column, row = self._axes_on(t, h, w, dim, torch.get_default_device())
        grid = (t, h, w)
        parts = [
            frame[:, None, None].expand(*grid, -1),
            column[None, None, :].expand(*grid, -1),
            row[None, :, None].expand(*grid, -1),
        ]
        return torch.cat(parts, dim=-1).flatten(0, 2)

    def _axes_on(self, t: int, h: int, w: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        key = (t, h, w, dim, device)
        if key not in self._axes:
            temporal, spatial = dim // 4, 3 * dim // 8
            codes = (
                sincos_axis(t, temporal),
                sincos_axis(w, spatial, SPATIAL_STEP),
                sincos_axis(h, spatial, SPATIAL_STEP),
            )
            frame, column, row = (code.to(torch.float32).to(device) for code in codes)
            self._axes[key] = (frame, column, row)
        return self._axes[key]
