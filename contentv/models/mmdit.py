"""The text-to-video transformer: an MMDiT over joint (video, text) tokens that predicts a velocity.

Every latent frame is cut into patches; a fixed 3D position is added; video and text tokens then pass the same layers,
each stream with its own weights, meeting in one unmasked attention. An image is a video of one frame. The default
configuration is ContentV-8B, whose parameters are those of Stable Diffusion 3.5 Large: only the positions differ.

The model runs on one process and knows of no other. What a split over several needs are three attributes that may be
replaced: `attend`, `split_tokens`, `merge_tokens`.

Sources: Esser et al. 2024 (arXiv 2403.03206, SD3), Lin et al. 2025 (arXiv 2506.05343, ContentV).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from contentv_kernels import attention, modulated_layer_norm
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from contentv.base.errors import UserError
from contentv.base.rng import keyed_generator
from contentv.base.types import TokenCounts
from contentv.models.layers import (
    NORM_EPS,
    TIME_CHANNELS,
    Attend,
    JointBlock,
    Modulation,
    PatchEmbed,
    TimeTextEmbed,
    unpatchify,
)
from contentv.models.positions import WIDTH_MULTIPLE, SinCos3D

EMBEDDING_STD = 0.02


@dataclass
class MMDiTConfig:
    """The shape of the transformer; the defaults are ContentV-8B (8,056,627,520 parameters)."""

    num_layers: int = field(default=38, metadata={"help": "joint layers, >= 1"})
    num_attention_heads: int = field(default=38, metadata={"help": "attention heads, >= 1"})
    attention_head_dim: int = field(default=64, metadata={"help": "channels per head; heads x this: a multiple of 16"})
    in_channels: int = field(default=16, metadata={"help": "latent channels read, >= 1"})
    out_channels: int = field(default=16, metadata={"help": "latent channels predicted, >= 1"})
    patch_size: int = field(default=2, metadata={"help": "latent pixels along the side of a patch, >= 1"})
    joint_attention_dim: int = field(default=4096, metadata={"help": "channels of a text token, >= 1"})
    pooled_projection_dim: int = field(default=2048, metadata={"help": "channels of the pooled text vector, >= 1"})
    qk_norm: str | None = field(default="rms_norm", metadata={"help": "norm of queries and keys: rms_norm or null"})

    def __post_init__(self) -> None:
        for key in (
            "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size",
            "joint_attention_dim", "pooled_projection_dim",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise UserError(f"{getattr(self, key)} is too small", where=f"model.{key}", remedy="use 1 or more")
        if self.qk_norm not in ("rms_norm", None):
            raise UserError(
                f'"{self.qk_norm}" is no norm of queries and keys',
                where="model.qk_norm",
                remedy="use rms_norm (SD3.5, ContentV) or null (SD3)",
            )
        if self.inner_dim % WIDTH_MULTIPLE != 0:
            raise UserError(
                f"the width {self.inner_dim} = {self.num_attention_heads} heads x {self.attention_head_dim} "
                f"is no multiple of {WIDTH_MULTIPLE}",
                where="model.num_attention_heads, model.attention_head_dim",
                remedy="choose heads and channels whose product is one",
            )

    @property
    def inner_dim(self) -> int:
        """The width of the model: heads x channels per head."""
        return self.num_attention_heads * self.attention_head_dim


def attend_locally(
    q: Float[Tensor, "b s heads dh"],
    k: Float[Tensor, "b s heads dh"],
    v: Float[Tensor, "b s heads dh"],
    tokens: TokenCounts,
) -> Float[Tensor, "b s heads dh"]:
    """Returns the attention of all tokens over all tokens, when this process holds them all."""
    return attention(q, k, v)


def keep_tokens(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Returns `x`: this process takes all tokens."""
    return x


def have_all_tokens(x: Float[Tensor, "b n d"], n: int) -> Float[Tensor, "b n d"]:
    """Returns `x`: this process already has all n tokens."""
    return x


class MMDiT(nn.Module):
    """Predicts the velocity noise - latents of noisy latents, given the noise level and a caption.

    Args:
        config: the model's shape. The weights are torch's defaults until `init_weights` or a checkpoint sets them;
            the constructor also works under `torch.device("meta")`.

    Attributes:
        attend: (q, k, v, tokens) -> out; q, k, v, out are (b, s, heads, dh), video first; scale 1/sqrt(dh). If it has
            a method `begin`, that is given v, k and q as soon as each is there, and `attend` what it returns.
        split_tokens: (b, n, d) -> (b, n_local, d), called on the video tokens and on the text tokens.
        merge_tokens: (b, n_local, d), n -> (b, n, d), called on the output tokens.
        positions: (t, h, w, dim) -> (n, dim) in the order (t h w), on torch's default device.
        transformer_blocks: the layers; their `forward` may be wrapped.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, last = config.inner_dim, config.num_layers - 1

        self.attend: Attend = attend_locally
        self.split_tokens: Callable[[Tensor], Tensor] = keep_tokens
        self.merge_tokens: Callable[[Tensor, int], Tensor] = have_all_tokens
        self.positions: Callable[[int, int, int, int], Tensor] = SinCos3D()

        self.pos_embed = PatchEmbed(config.in_channels, config.patch_size, dim)
        self.time_text_embed = TimeTextEmbed(dim, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(dim, config.attention_head_dim, config.qk_norm is not None, last=layer == last)
            for layer in range(config.num_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in: that of its weights."""
        # By iteration: naming another module's weight would make ZeRO-3 keep it gathered for the whole forward pass.
        return next(self.context_embedder.parameters()).dtype

    def forward(
        self,
        noisy_latents: Float[Tensor, "b c t h w"],
        timestep: Float[Tensor, "b"],
        text_tokens: Float[Tensor, "b l joint"],
        text_pooled: Float[Tensor, "b pooled"],
    ) -> Float[Tensor, "b c_out t h w"]:
        """Returns the predicted velocity, whole on every process, in the dtype of `noisy_latents`.

        Args:
            noisy_latents: (1 - sigma) latents + sigma noise, in model space.
            timestep: 1000 sigma, in [0, 1000]; keep it fp32, bf16 cannot tell 999 from 1000.
            text_tokens: one vector per text token; padding tokens are attended to like any other.
            text_pooled: one vector per caption.

        Raises:
            ValueError: height or width is no multiple of the patch size.
        """
        t, h, w = noisy_latents.shape[2:]
        p = self.config.patch_size
        if h % p != 0 or w % p != 0:
            raise ValueError(f"latents of {h} x {w} do not divide into patches of {p} x {p}")
        h, w = h // p, w // p
        tokens = TokenCounts(video=t * h * w, text=text_tokens.shape[1])

        video = self.pos_embed(noisy_latents.to(self.dtype))
        with torch.device(video.device):
            positions = self.positions(t, h, w, self.config.inner_dim)
        video = self.split_tokens(video + positions.to(video))
        text = self.split_tokens(self.context_embedder(text_tokens.to(self.dtype)))
        # Each layer's modulation begins with this SiLU: it is the same for all of them.
        condition = functional.silu(self.time_text_embed(timestep, text_pooled.to(self.dtype)))

        for block in self.transformer_blocks:
            video, text = block(video, text, condition, self.attend, tokens)

        scale, shift = self.norm_out(condition)
        out = self.proj_out(modulated_layer_norm(video, scale, shift, NORM_EPS))
        out = self.merge_tokens(out, tokens.video)
        return unpatchify(out, t, h, w, p).to(noisy_latents.dtype)

    def init_weights(self, seed: int) -> None:
        """Sets every parameter for training from scratch, see `init_parameter`; a function of the seed alone.

        Args:
            seed: any integer.
        """
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter, seed)


@torch.no_grad()
def init_parameter(name: str, parameter: Tensor, seed: int) -> None:
    """Sets one whole parameter of an MMDiT, in place, for training from scratch.

    The output layer and all modulations start at zero: every layer is then the identity and the predicted velocity 0.
    The condition's MLPs start normal with std 0.02, all other weights Xavier uniform, biases 0, norms 1. Each
    parameter has a generator of its own, so the order, the device and the partitioning do not matter.

    Args:
        name: its name in the model's state dict.
        parameter: the parameter, not a part of it.
        seed: any integer.

    Source: Peebles and Xie 2023 (DiT), section 3.2 and released code.
    """
    generator = keyed_generator(seed, 0, 0, f"init/{name}")
    if name.rsplit(".", 2)[-2].startswith("norm_") and parameter.ndim == 1 and ".attn." in name:
        parameter.fill_(1.0)
        return
    is_modulation = name.startswith("norm_out.") or ".norm1." in name or ".norm1_context." in name
    if name.endswith(".bias") or is_modulation or name.startswith("proj_out."):
        parameter.zero_()
        return
    value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    if name.startswith("time_text_embed."):
        value.normal_(std=EMBEDDING_STD, generator=generator)
    else:
        fan_out, fan_in = parameter.shape[0], math.prod(parameter.shape[1:])
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        value.uniform_(-bound, bound, generator=generator)
    parameter.copy_(value)


def flops_per_forward(config: MMDiTConfig, tokens: TokenCounts) -> int:
    """Returns the floating point operations of one sample's forward pass; a training step is three times as many.

    Matrix products count 2 per multiply-add. With width D, L layers, s = video + text tokens:
    L (24 D^2 s + 4 s^2 D + 24 D^2) for the layers, less 18 D^2 text + 8 D^2 that the last layer does not have,
    and the embeddings and the output layer.

    Args:
        config: the model's shape.
        tokens: video and text tokens of the sample.
    """
    d, s = config.inner_dim, tokens.video + tokens.text
    layers = config.num_layers * (24 * d * d * s + 4 * s * s * d + 24 * d * d)
    last = 18 * d * d * tokens.text + 8 * d * d
    patch = config.patch_size**2 * (config.in_channels + config.out_channels)
    ends = 2 * d * patch * tokens.video + 2 * d * config.joint_attention_dim * tokens.text
    condition = 2 * d * (TIME_CHANNELS + config.pooled_projection_dim + 2 * d) + 4 * d * d
    return layers - last + ends + condition
