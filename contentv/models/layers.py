"""The parts of the MMDiT: two token streams (video and text) that meet in one joint attention.

Module names follow diffusers' SD3 transformer, so that published weights load as they are. Every parameter is read
only inside the forward of the module that owns it, and the modules run in the same order for every input: both are
what a partitioned optimiser needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from contentv_kernels import modulated_layer_norm, rms_norm
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from contentv.base.types import TokenCounts

NORM_EPS = 1e-6
TIME_CHANNELS = 256

Attend = Callable[[Tensor, Tensor, Tensor, TokenCounts], Tensor]


class RMSNorm(nn.Module):
    """Divides each head by its root mean square and multiplies by a weight (dh,); statistics in fp32."""

    def __init__(self, dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "b s heads dh"]) -> Float[Tensor, "b s heads dh"]:
        return rms_norm(x, self.weight, self.eps)


def timestep_code(timestep: Float[Tensor, "b"], dim: int = TIME_CHANNELS) -> Float[Tensor, "b dim"]:
    """Returns [cos(timestep f_k), sin(timestep f_k)] with f_k = 10000^(-2k/dim), fp32.

    Args:
        timestep: 1000 sigma, in [0, 1000].
        dim: channels, even.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * k / half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ConditionMLP(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b d"]:
        out: Tensor = self.linear_2(functional.silu(self.linear_1(x)))
        return out


class TimeTextEmbed(nn.Module):
    """One vector per sample that says how noisy it is and what its caption is about."""

    def __init__(self, dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = ConditionMLP(TIME_CHANNELS, dim)
        self.text_embedder = ConditionMLP(pooled_dim, dim)

    def forward(self, timestep: Float[Tensor, "b"], text_pooled: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        code = timestep_code(timestep).to(text_pooled.dtype)
        condition: Tensor = self.timestep_embedder(code) + self.text_embedder(text_pooled)
        return condition


class PatchEmbed(nn.Module):
    """Cuts every latent frame into patches and projects each to a token, in the order (t h w)."""

    def __init__(self, channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b n d"]:
        b = latents.shape[0]
        patches: Tensor = self.proj(latents.transpose(1, 2).flatten(0, 1))  # (b t) d h w
        # Channels last in memory too: the tokens of a single frame would else stay strided through all layers.
        return patches.flatten(2).transpose(1, 2).reshape(b, -1, patches.shape[1]).contiguous()


def unpatchify(tokens: Float[Tensor, "b n _"], t: int, h: int, w: int, patch_size: int) -> Float[Tensor, "b c t _h _w"]:
    """Returns the latents whose patches are `tokens`; channels of a token are (row, column, channel), channel fastest.

    Args:
        tokens: n = t h w tokens in the order (t h w), patch_size^2 c channels each.
        t, h, w: the grid of patches.
        patch_size: latent pixels along a patch's side.
    """
    grid = tokens.reshape(tokens.shape[0], t, h, w, patch_size, patch_size, -1)  # b t h w row column c
    return grid.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class Modulation(nn.Module):
    """Projects the (activated) condition to `chunks` vectors of the model's width.

    The order of the chunks is the reader's business, and differs: the norms of a block have (shift, scale, gate) for
    the attention, then for the feed-forward; the final norm and the last block's text norm have (scale, shift).
    """

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(dim, chunks * dim)

    def forward(self, condition: Float[Tensor, "b d"]) -> tuple[Tensor, ...]:
        out: Tensor = self.linear(condition)
        return out.chunk(self.chunks, dim=1)


class GELUProjection(nn.Module):
    """A linear layer followed by the tanh approximation of GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s hidden"]:
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The feed-forward of one stream, four times as wide inside."""

    def __init__(self, dim: int, factor: int = 4) -> None:
        super().__init__()
        # The identity keeps the place of diffusers' dropout, so that the second linear is named `net.2`.
        self.net = nn.Sequential(GELUProjection(dim, factor * dim), nn.Identity(), nn.Linear(factor * dim, dim))

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s_own d"]:
        # As many tokens as came, unless the second layer is split and leaves each rank its own.
        out: Tensor = self.net(x)
        return out


def begun(attend: Attend, x: Float[Tensor, "b s heads dh"]) -> Any:
    """Returns what `attend` takes for `x`: `x` itself, or what the `begin` of an `attend` that has one makes of it."""
    begin = getattr(attend, "begin", None)
    return x if begin is None else begin(x)


class JointAttention(nn.Module):
    """Attention of the video and text tokens over all of them, with own projections per stream.

    The number of heads is read from the width of the projections when it runs: a projection that holds only some of
    the heads needs no change here.
    """

    def __init__(self, dim: int, head_dim: int, qk_norm: bool, last: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            RMSNorm(head_dim) if qk_norm else nn.Identity() for _ in range(4)
        )
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.to_add_out = None if last else nn.Linear(dim, dim)

    def forward(
        self, video: Float[Tensor, "b n d"], text: Float[Tensor, "b l d"], attend: Attend, tokens: TokenCounts
    ) -> tuple[Tensor, Tensor | None]:
        heads = (-1, self.head_dim)
        # Each as soon as it is there, values first: they have no norm to wait for.
        v_video = self.to_v(video).unflatten(2, heads)
        v_text = self.add_v_proj(text).unflatten(2, heads)
        v = begun(attend, torch.cat([v_video, v_text], dim=1))
        k_video = self.norm_k(self.to_k(video).unflatten(2, heads))
        k_text = self.norm_added_k(self.add_k_proj(text).unflatten(2, heads))
        k = begun(attend, torch.cat([k_video, k_text], dim=1))
        q_video = self.norm_q(self.to_q(video).unflatten(2, heads))
        q_text = self.norm_added_q(self.add_q_proj(text).unflatten(2, heads))
        q = begun(attend, torch.cat([q_video, q_text], dim=1))
        out = attend(q, k, v, tokens).flatten(2)

        n = video.shape[1]
        out_text = None if self.to_add_out is None else self.to_add_out(out[:, n:])
        return self.to_out(out[:, :n]), out_text


class JointBlock(nn.Module):
    """One layer: joint attention, then a feed-forward per stream, each modulated and gated by the condition.

    The last layer's text is only read by the attention, so it has no text output and no text feed-forward.
    """

    def __init__(self, dim: int, head_dim: int, qk_norm: bool, last: bool) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, head_dim, qk_norm, last)
        self.ff = FeedForward(dim)
        self.ff_context = None if last else FeedForward(dim)

    def forward(
        self,
        video: Float[Tensor, "b n d"],
        text: Float[Tensor, "b l d"],
        condition: Float[Tensor, "b d"],
        attend: Attend,
        tokens: TokenCounts,
    ) -> tuple[Tensor, Tensor]:
        """Returns the layer's video and text tokens; the last layer hands the text on untouched.

        Args:
            video, text: this process's tokens.
            condition: what the layer is modulated by, already activated.
            attend: (q, k, v, tokens) -> out, all (b, s, heads, dh), video first.
            tokens: numbers of tokens of the whole sequence.
        """
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(condition)
        normed = modulated_layer_norm(video, scale, shift, NORM_EPS)
        if self.ff_context is None:
            scale_text, shift_text = self.norm1_context(condition)
        else:
            shift_text, scale_text, *rest = self.norm1_context(condition)
        normed_text = modulated_layer_norm(text, scale_text, shift_text, NORM_EPS)

        attended, attended_text = self.attn(normed, normed_text, attend, tokens)

        video = torch.addcmul(video, gate[:, None], attended)
        normed = modulated_layer_norm(video, scale_ff, shift_ff, NORM_EPS)
        video = torch.addcmul(video, gate_ff[:, None], self.ff(normed))
        if self.ff_context is None:
            return video, text

        gate_text, shift_text_ff, scale_text_ff, gate_text_ff = rest
        text = torch.addcmul(text, gate_text[:, None], attended_text)
        normed_text = modulated_layer_norm(text, scale_text_ff, shift_text_ff, NORM_EPS)
        return video, torch.addcmul(text, gate_text_ff[:, None], self.ff_context(normed_text))
