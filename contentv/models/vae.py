"""The causal video VAE (Wan 2.1, by diffusers): pixels to latents and back.

*Raw* latents are the VAE's own; *model space* is (raw - mean) / std per channel. Frame 0 of a video depends on latent
frame 0 alone, and the other way round: a first frame is decoded exactly, without the rest. Clips are encoded and
decoded piece by piece (`vae_chunks`), and in tiles if asked (`vae_tiles`); neither changes what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor, nn

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.models.folders import WEIGHTS, fingerprint, read_json, weight_files
from contentv.models.stored import StoredTensors
from contentv.models.vae_chunks import CHUNK_FRAMES, decode_pieces, encode_pieces, encoder_pieces
from contentv.models.vae_tiles import TiledDecoder, check_tile

CONFIG_KEYS = (
    "base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample",
    "is_residual", "in_channels", "out_channels", "latents_mean", "latents_std",
)  # fmt: skip


class VideoVAE(nn.Module):
    """A frozen video VAE.

    Args:
        model: diffusers' Wan VAE; it is put in evaluation mode and its weights take no gradients.

    Attributes:
        fingerprint: xxh128 over what of the config has an effect and every weight, as hexadecimal digits; taken
            here, so that of a VAE read from a folder does not depend on the dtype it is read in.

    Raises:
        UserError: the model's config is one that this wrapper cannot serve.
    """

    def __init__(self, model: AutoencoderKLWan) -> None:
        super().__init__()
        untyped: Any = model
        self.model: Any = untyped.eval().requires_grad_(False)
        config = self.model.config
        self.latents_mean = tuple(float(x) for x in config.latents_mean)
        self.latents_std = tuple(float(x) for x in config.latents_std)
        self.latent_channels = int(config.z_dim)
        self.temporal_factor = 2 ** sum(bool(x) for x in config.temperal_downsample)
        self.patch_size = int(config.patch_size or 1)  # Wan 2.2 packs patches of pixels into channels first
        self.spatial_factor = self.patch_size * 2 ** len(config.temperal_downsample)
        self._check()
        self.fingerprint = fingerprint({key: config[key] for key in CONFIG_KEYS}, self.model.state_dict().items())

    @classmethod
    def from_folder(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> VideoVAE:
        """Returns the VAE stored in a diffusers folder, on the CPU.

        Args:
            path: holds config.json and safetensors weights.
            dtype: to compute in; fp32 is what the published pipeline uses.

        Raises:
            UserError: the folder is no such model, or its tensors are not those its config describes.
        """
        folder = Path(path)
        config = read_json(folder / "config.json")
        if config.get("_class_name") != "AutoencoderKLWan":
            raise UserError(
                f'a VAE of class "{config.get("_class_name")}"',
                where=str(folder),
                remedy="use the vae folder of ContentV or Wan 2.1 (AutoencoderKLWan)",
            )
        untyped_class: Any = AutoencoderKLWan
        with torch.device("meta"):
            model = untyped_class.from_config(config)
        state = {name: stored.read() for name, stored in StoredTensors(weight_files(folder, WEIGHTS)).items()}
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        wrong = {n for n in set(state) | set(expected) if n not in state or state[n].shape != expected.get(n)}
        if wrong:
            raise UserError(
                f"{len(wrong)} tensors are missing, unknown or misshapen, such as {min(wrong)}",
                where=str(folder),
                remedy="use a complete folder of one model",
            )
        model.load_state_dict(state, assign=True)
        return cls(model).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self.model.post_quant_conv.weight.dtype
        return dtype

    def encode(
        self, video: Float[Tensor, "b 3 T H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c t h w"]:
        """Returns the raw latents of a video, on the VAE's device.

        Args:
            video: pixels in [-1, 1]; T = 4k + 1 frames, H and W multiples of the spatial factor. It may be in host
                memory with the VAE on a device: frames are moved when their turn comes.
            generator: draws the latents from their distribution; None takes its mode, which is its mean.

        Raises:
            UserError: the video's shape does not fit.
        """
        self.latent_shape(Bucket(*video.shape[2:]))
        return self.encode_chunks([video], generator)

    @torch.no_grad()
    def encode_chunks(
        self, chunks: Iterable[Float[Tensor, "b 3 _ H W"]], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c t h w"]:
        """Returns the raw latents of a video that comes in groups of frames: those of `encode`, bit for bit.

        Five frames at most are on the device at a time, and the activations of four.

        Args:
            chunks: groups of any numbers of frames, in their order, together 4k + 1 frames; taken one by one.
            generator: see `encode`.

        Raises:
            UserError: the frames' number or size does not fit.
        """
        pieces = encoder_pieces(self._fitting(part) for part in chunks)
        posterior: Any = DiagonalGaussianDistribution(encode_pieces(self.model, pieces, self.patch_size))
        latents: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        return latents

    @torch.no_grad()
    def decode(self, raw: Float[Tensor, "b c t h w"], tile_px: int = 0) -> Float[Tensor, "b 3 T H W"]:
        """Returns the video of raw latents, clamped to [-1, 1], on the VAE's device.

        Args:
            raw: latents before any normalisation, see `denormalize`.
            tile_px: see `decode_chunks`.

        Raises:
            UserError: see `decode_chunks`.
        """
        self.check_tile(tile_px)
        device = self.model.post_quant_conv.weight.device
        b, _, t, h, w = raw.shape
        frames, factor = 1 + (t - 1) * self.temporal_factor, self.spatial_factor
        video = torch.empty(b, 3, frames, factor * h, factor * w, dtype=self.dtype, device=device)
        start = 0
        for group in self._decoded(raw, tile_px):
            video[:, :, start : start + group.shape[2]] = group
            start += group.shape[2]
        return video

    def decode_chunks(self, raw: Float[Tensor, "b c t h w"], tile_px: int = 0) -> Iterator[Float[Tensor, "b 3 _ H W"]]:
        """Returns an iterator over the frames of `decode`, group after group, in host memory.

        The first group is frame 0, every further one the frames of a latent frame (the temporal factor). The device
        holds the latents and what decoding one latent frame takes, whatever the clip's length.

        Args:
            raw: latents before any normalisation, see `denormalize`.
            tile_px: longest side in pixels of the tiles in which frames are decoded, 0 for none; a multiple of the
                spatial factor. With tiles what the device holds does not grow with the frame either, except for the
                decoder's part at latent resolution. Each tile is computed with all that it depends on (see
                `vae_tiles` for what that costs), so the video is that without tiles up to rounding; it is
                gathered in host memory, and the iterator begins once all tiles are done.

        Raises:
            UserError: the side does not fit, or this VAE's decoder cannot be tiled exactly.
        """
        self.check_tile(tile_px)
        return (group.cpu() for group in self._decoded(raw, tile_px))

    def check_tile(self, tile_px: int) -> None:
        """Refuses a side of tiles that `decode` would refuse.

        Raises:
            UserError: see `decode_chunks`.
        """
        check_tile(tile_px, self.spatial_factor)
        if tile_px:
            TiledDecoder(self.model, self.patch_size)

    def decode_first_frame(self, raw: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 H W"]:
        """Returns frame 0 of the video of raw latents: exact, not clamped, differentiable in latent frame 0.

        Args:
            raw: latents before any normalisation; those after frame 0 have no influence.
        """
        # The whole is projected as `decode` does it: convolutions round differently on other shapes.
        projected = self.model.post_quant_conv(raw.to(self.dtype))
        frames: Tensor = self.model.decoder(projected[:, :, :1], first_chunk=True)
        if self.patch_size > 1:
            frames = unpatchify(frames, self.patch_size)
        return frames[:, :, 0]

    def normalize(self, raw: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Returns (raw - mean) / std per channel: the latents the transformer works on."""
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def denormalize(self, z: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Returns z std + mean per channel: the latents the VAE decodes."""
        mean, std = self._statistics(z)
        return z * std + mean

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """Returns (c, t, h, w) of the latents of clips of this bucket.

        Raises:
            UserError: the VAE cannot encode such clips; the message names the nearest that it can.
        """
        frames, height, width = bucket
        f = self.spatial_factor
        if frames < 1 or (frames - 1) % CHUNK_FRAMES or height < f or width < f or height % f or width % f:
            nearest = Bucket(
                1 + CHUNK_FRAMES * max(0, round((frames - 1) / CHUNK_FRAMES)),
                f * max(1, round(height / f)),
                f * max(1, round(width / f)),
            )
            raise UserError(
                f"the VAE cannot encode {frames} frames of {height} x {width}",
                where=f"bucket {bucket.name}",
                remedy=f"frames must be {CHUNK_FRAMES}k + 1, height and width multiples of {f}: "
                f"the nearest is {nearest.name}",
            )
        t = 1 + (frames - 1) // self.temporal_factor
        return self.latent_channels, t, height // f, width // f

    @torch.no_grad()
    def _decoded(self, raw: Tensor, tile_px: int) -> Iterator[Tensor]:
        weight = self.model.post_quant_conv.weight
        projected = self.model.post_quant_conv(raw.to(weight.device, weight.dtype))
        tile = tile_px // self.spatial_factor
        if tile and max(raw.shape[3:]) > tile:
            yield from TiledDecoder(self.model, self.patch_size).decode(projected, tile)
        else:
            yield from decode_pieces(self.model, projected, self.patch_size)

    def _fitting(self, part: Tensor) -> Tensor:
        self.latent_shape(Bucket(1, *part.shape[3:]))
        return part

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1, 1)
        return like.new_tensor(self.latents_mean).view(shape), like.new_tensor(self.latents_std).view(shape)

    def _check(self) -> None:
        problem = ""
        if self.temporal_factor > CHUNK_FRAMES:
            problem = f"a temporal factor of {self.temporal_factor}: at most {CHUNK_FRAMES} is supported"
        elif not len(self.latents_mean) == len(self.latents_std) == self.latent_channels:
            given = f"{len(self.latents_mean)} means and {len(self.latents_std)} deviations"
            problem = f"{given} for {self.latent_channels} channels"
        elif min(self.latents_std) <= 0:
            problem = f"latents_std {self.latents_std}: every deviation must be positive"
        if problem:
            raise UserError(problem, where="VAE config", remedy="use the vae folder of ContentV or Wan 2.1")
