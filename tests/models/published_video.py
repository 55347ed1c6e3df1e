"""The published video transformer, written twice from its description alone, to compare ours with.

`by_formula` is plain arithmetic on a state dict, in whatever dtype the state dict has: fp64 is the truth.
`PublishedVideo` is built as the published class is: diffusers' image class with another patch embedding, other
positions and another way back to latents; its error in bf16 is what ours is measured by. Neither uses anything of
`contentv`.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from einops import rearrange
from torch import Tensor

State = dict[str, Tensor]
EPS = 1e-6


class PublishedVideo(SD3Transformer2DModel):
    """diffusers' class with frames: its own layers, forward written anew."""

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        t, h, w = latents.shape[2:]
        p = self.config.patch_size
        frames = [self.pos_embed.proj(latents[:, :, i]) for i in range(t)]
        video = torch.cat([rearrange(x, "b d h w -> b (h w) d") for x in frames], dim=1)
        positions = get_3d_sincos_pos_embed(
            embed_dim=self.inner_dim, spatial_size=(w // p, h // p), temporal_size=t, spatial_interpolation_scale=0.5
        )
        video = video + positions.reshape(1, -1, self.inner_dim).to(video.dtype)
        condition, text = self.time_text_embed(timestep, pooled), self.context_embedder(text)
        for block in self.transformer_blocks:
            text, video = block(video, text, condition)
        tokens = self.proj_out(self.norm_out(video, condition))
        return to_latents(tokens, t, h // p, w // p, p)


def to_latents(tokens: Tensor, t: int, rows: int, columns: int, p: int) -> Tensor:
    """Token n of the order (frame, row, column) holds its patch as (row, column, channel)."""
    b = tokens.shape[0]
    frames = []
    for i in range(t):
        lines = []
        for r in range(rows):
            start = (i * rows + r) * columns
            patches = [tokens[:, start + c].reshape(b, p, p, -1) for c in range(columns)]
            lines.append(torch.cat(patches, dim=2))
        frames.append(torch.cat(lines, dim=1))
    return torch.stack(frames, dim=1).permute(0, 4, 1, 2, 3)


def code(position: float, channels: int) -> Tensor:
    """Sines of the position at falling frequencies, then the cosines."""
    half = channels // 2
    angles = [position / 10000 ** (k / half) for k in range(half)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def position_table(t: int, rows: int, columns: int, width: int) -> Tensor:
    """A quarter of the channels says the frame, three eighths twice the column, three eighths twice the row."""
    table = [
        torch.cat([code(i, width // 4), code(2 * c, 3 * width // 8), code(2 * r, 3 * width // 8)])
        for i in range(t)
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(table)


def by_formula(state: State, heads: int, latents: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """Returns the velocity, computed in the dtype of the state dict."""
    weight = state["pos_embed.proj.weight"]
    p, width = weight.shape[-1], weight.shape[0]
    latents, text, pooled = (x.to(weight.dtype) for x in (latents, text, pooled))
    t, rows, columns = latents.shape[2], latents.shape[3] // p, latents.shape[4] // p

    patches = rearrange(latents, "b c t (h p) (w q) -> b (t h w) (c p q)", p=p, q=p)
    video = patches @ weight.reshape(width, -1).T + state["pos_embed.proj.bias"]
    video = video + position_table(t, rows, columns, width).to(weight.dtype)
    text = linear(state, "context_embedder", text)
    condition = silu(condition_vector(state, timestep, pooled))

    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    for layer in range(layers):
        part = f"transformer_blocks.{layer}."
        inside = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        video, text = block(inside, heads, video, text, condition, last=layer == layers - 1)

    scale, shift = linear(state, "norm_out.linear", condition).chunk(2, dim=-1)  # this order here
    tokens = linear(state, "proj_out", modulate(video, shift, scale))
    return rearrange(
        tokens, "b (t h w) (p q c) -> b c t (h p) (w q)", t=t, h=rows, w=columns, p=p, q=p
    )  # fmt: skip


def block(
    state: State, heads: int, video: Tensor, text: Tensor, condition: Tensor, last: bool
) -> tuple[Tensor, Tensor]:
    # shift, scale, gate of the attention, then of the feed-forward
    of_video = linear(state, "norm1.linear", condition).chunk(6, dim=-1)
    if last:
        scale, shift = linear(state, "norm1_context.linear", condition).chunk(2, dim=-1)
    else:
        of_text = linear(state, "norm1_context.linear", condition).chunk(6, dim=-1)
        shift, scale = of_text[0], of_text[1]
    a, a_text = modulate(video, of_video[0], of_video[1]), modulate(text, shift, scale)

    parts = []
    for own, added, norm, norm_added in (
        ("to_q", "add_q_proj", "norm_q", "norm_added_q"),
        ("to_k", "add_k_proj", "norm_k", "norm_added_k"),
        ("to_v", "add_v_proj", None, None),
    ):
        both = []
        for x, projection, normed in ((a, own, norm), (a_text, added, norm_added)):
            y = rearrange(linear(state, f"attn.{projection}", x), "b s (heads dh) -> b heads s dh", heads=heads)
            if normed is not None and f"attn.{normed}.weight" in state:
                y = y / (y.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * state[f"attn.{normed}.weight"]
            both.append(y)
        parts.append(torch.cat(both, dim=2))  # video first
    q, k, v = parts
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    mixed = rearrange(scores.softmax(dim=-1) @ v, "b heads s dh -> b s (heads dh)")

    n = video.shape[1]
    video = video + of_video[2][:, None] * linear(state, "attn.to_out.0", mixed[:, :n])
    video = video + of_video[5][:, None] * feed_forward(state, "ff", modulate(video, of_video[3], of_video[4]))
    if last:
        return video, text
    text = text + of_text[2][:, None] * linear(state, "attn.to_add_out", mixed[:, n:])
    return video, text + of_text[5][:, None] * feed_forward(state, "ff_context", modulate(text, of_text[3], of_text[4]))


def condition_vector(state: State, timestep: Tensor, pooled: Tensor) -> Tensor:
    angles = timestep.double()[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    x = torch.cat([angles.cos(), angles.sin()], dim=-1).to(pooled.dtype)
    total = torch.zeros((), dtype=pooled.dtype)
    for name, inputs in (("timestep_embedder", x), ("text_embedder", pooled)):
        hidden = silu(linear(state, f"time_text_embed.{name}.linear_1", inputs))
        total = total + linear(state, f"time_text_embed.{name}.linear_2", hidden)
    return total


def feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    y = linear(state, f"{name}.net.0.proj", x)
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return linear(state, f"{name}.net.2", y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
