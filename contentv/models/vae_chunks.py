"""A clip through the causal VAE piece by piece: what is held does not grow with its length.

Every causal convolution keeps the last two frames of its input for the next piece, so pieces give what the whole gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from jaxtyping import Float
from torch import Tensor, nn

from contentv.base.errors import UserError

CHUNK_FRAMES = 4  # the encoder takes frame 0 alone, then four frames at a time


def empty_caches(part: nn.Module) -> list[Any]:
    """Returns the caches of an encoder's or decoder's convolutions before the first piece."""
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in part.modules())


def encoder_pieces(parts: Iterable[Tensor]) -> Iterator[Float[Tensor, "b rgb T H W"]]:
    """Yields the frames of `parts` as the encoder takes them: one, then `CHUNK_FRAMES` at a time.

    Args:
        parts: groups of frames (b 3 T_i H W) in their order, T_i >= 0.

    Raises:
        UserError: frames are left over, or there are none.
    """
    held: list[Tensor] = []
    count, wanted, frames = 0, 1, 0
    for part in parts:
        start = 0
        while start < part.shape[2]:
            taken = part[:, :, start : start + wanted - count]
            held.append(taken)
            start += taken.shape[2]
            count += taken.shape[2]
            if count == wanted:
                yield held[0] if len(held) == 1 else torch.cat(held, dim=2)
                held, count, wanted = [], 0, CHUNK_FRAMES
        frames += part.shape[2]
    if count or not frames:
        raise UserError(
            f"the VAE cannot encode {frames} frames",
            where="video",
            remedy=f"the number of frames must be {CHUNK_FRAMES}k + 1",
        )


def encode_pieces(model: Any, pieces: Iterable[Tensor], patch_size: int) -> Float[Tensor, "b moments t h w"]:
    """Returns the means and log variances of the latents, holding one piece's activations at a time.

    Args:
        model: diffusers' AutoencoderKLWan.
        pieces: as `encoder_pieces` yields them; each is moved to the model's device and dtype when its turn comes.
        patch_size: side of the squares of pixels that are packed into channels first; 1: none.
    """
    caches = empty_caches(model.encoder)
    weight = model.quant_conv.weight
    encoded = []
    for piece in pieces:
        pixels = patchify(piece.to(weight.device, weight.dtype), patch_size)
        encoded.append(model.encoder(pixels, feat_cache=caches, feat_idx=[0]))
    moments: Tensor = model.quant_conv(torch.cat(encoded, dim=2))
    return moments


def decode_pieces(
    model: Any, projected: Float[Tensor, "b c t h w"], patch_size: int
) -> Iterator[Float[Tensor, "b rgb T H W"]]:
    """Yields the frames of each latent frame in turn (1, then the temporal factor), clamped, on the model's device.

    Args:
        model: diffusers' AutoencoderKLWan.
        projected: latents after the model's `post_quant_conv`.
        patch_size: see `encode_pieces`.
    """
    caches = empty_caches(model.decoder)
    for i in range(projected.shape[2]):
        frames = model.decoder(projected[:, :, i : i + 1], feat_cache=caches, feat_idx=[0], first_chunk=i == 0)
        yield unpatchify(frames, patch_size).clamp(-1.0, 1.0)
