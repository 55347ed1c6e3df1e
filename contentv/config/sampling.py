"""Prompts to videos: encodes the prompts, samples latents by Euler with guidance, decodes them into MP4 files.

A video is a function of its prompt, its seed and the settings, on any number of processes: its noise is keyed, prompts
are encoded one by one, and batches follow from the order of the prompts alone and are dealt out whole. Processes that
share one video (`sp`) change it by rounding.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from contentv.base import device as devices
from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.base.rng import keyed_normal
from contentv.base.types import Bucket, TextCond
from contentv.config.prompts import Prompt, read_prompts
from contentv.config.sample_record import open_record, output_files
from contentv.config.sampling_inputs import DTYPES, SamplingInputs, open_inputs
from contentv.config.schema import SampleConfig
from contentv.curation.video_io import write_mp4
from contentv.diffusion.solver import euler_sample, euler_sigmas, guided
from contentv.engine.parallelize import parallelize
from contentv.models.io import TransformerSource, load_whole
from contentv.models.mmdit import MMDiT
from contentv.models.stored import ComputedTensors, whole
from contentv.models.vae import VideoVAE
from contentv.parallel.collectives import gather_json, start, stop
from contentv.parallel.mesh import Mesh, ParallelConfig, build_mesh

STREAM = "sample_noise"

Texts = dict[str, TextCond]  # caption -> its encoding, one row, on the CPU


@dataclass(frozen=True)
class Sampler:
    """A model and its VAE on a device, and how to sample them."""

    model: MMDiT
    vae: VideoVAE
    bucket: Bucket
    shift: float
    config: SampleConfig
    device: torch.device

    def noise(self, prompts: Sequence[Prompt]) -> Float[Tensor, "b c t h w"]:
        """Returns the initial noise of the prompts' videos, fp32 on the CPU, each keyed by its own seed and index."""
        shape = self.vae.latent_shape(self.bucket)
        return torch.cat([keyed_normal(shape, prompt.seed, 0, [prompt.index], STREAM) for prompt in prompts])

    @torch.no_grad()
    def latents(self, prompts: Sequence[Prompt], texts: Texts) -> Float[Tensor, "b c t h w"]:
        """Returns the latents of the prompts' videos in model space, fp32, sampled as one batch.

        Args:
            prompts: one or more.
            texts: from `encode_prompts`; has all their captions.
        """
        config = self.config
        text = self._rows(texts[prompt.text] for prompt in prompts)
        negative = self._rows(texts[prompt.negative] for prompt in prompts) if config.guidance_scale != 1 else None
        velocity = guided(
            self.model, text, negative, config.guidance_scale, batched=config.guidance == "batched"
        )  # fmt: skip
        noise = self.noise(prompts).to(self.device)
        return euler_sample(velocity, noise, euler_sigmas(config.steps, self.shift).to(self.device))

    def _rows(self, texts: Iterable[TextCond]) -> TextCond:
        rows = list(texts)
        tokens, pooled = torch.cat([row.tokens for row in rows]), torch.cat([row.pooled for row in rows])
        return TextCond(tokens, pooled).to(self.device)

    @torch.no_grad()
    def frames(self, latents: Float[Tensor, "1 c t h w"]) -> Iterator[UInt8[np.ndarray, "T H W 3"]]:
        """Yields a video's frames as they are decoded, some at a time."""
        for part in self.vae.decode_chunks(self.vae.denormalize(latents.float()), self.config.vae_tile_px):
            yield to_uint8(part[0])


def to_uint8(video: Float[Tensor, "3 T H W"]) -> UInt8[np.ndarray, "T H W 3"]:
    """Returns a video in [-1, 1] as bytes."""
    pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array: np.ndarray = pixels.permute(1, 2, 3, 0).cpu().numpy()
    return array


def encode_prompts(inputs: SamplingInputs, captions: Iterable[str], device: torch.device, dtype: torch.dtype) -> Texts:
    """Returns the encodings of the captions, on the CPU; the encoders are read for it and let go of.

    Args:
        inputs: where the encoders are.
        captions: repeated ones are encoded once; one at a time, so that none depends on the others.
        device: where to encode.
        dtype: to keep them in: what the transformer computes in.
    """
    text = inputs.read_text().to(device)
    return {caption: text.encode([caption]).to(torch.device("cpu"), dtype) for caption in dict.fromkeys(captions)}


def build_sampler(inputs: SamplingInputs, config: SampleConfig, device: torch.device, mesh: Mesh) -> Sampler:
    """Returns the sampler; the transformer's weights are read tensor by tensor, converted and moved at once."""
    dtype = DTYPES[config.precision]

    def place(name: str) -> Tensor:
        return whole(inputs.source.tensors[name], dtype).to(device)

    tensors = ComputedTensors(inputs.source.tensors, place)
    model = (
        load_whole(TransformerSource(inputs.source.config, tensors, inputs.source.origin)).eval().requires_grad_(False)
    )
    if mesh.sp > 1:
        parallelize(model, mesh, device=device)
    return Sampler(model, inputs.vae.to(device), inputs.bucket, inputs.shift, config, device)


def sample_to_files(config: SampleConfig) -> list[Path]:
    """Samples the prompts that have no video yet and returns the files this process wrote.

    Under torchrun every process calls it: groups of `sp` processes share each video, and the groups the prompts.

    Raises:
        UserError: something the user can fix; on every process, and before anything is sampled.
    """
    prompts = read_prompts(config)
    files, record = output_files(config.out, prompts)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_ranks(config.sp, world)
    device = devices.select(config.device)
    inputs = open_inputs(config)
    rank = start(device)[0] if world > 1 else 0
    mesh = build_mesh(ParallelConfig(sp=config.sp, ring=config.ring), world, rank)

    def open_files() -> list[int]:
        return open_record(files, record, prompts, inputs.settings(config), overwrite=config.overwrite)

    todo = set(_from_rank_0(open_files, rank, device))
    if mesh.sp == 1:
        stop()  # from here on no process waits for another
    written = _sample(config, inputs, prompts, files, todo, mesh, device)
    stop()
    return written


def check_ranks(sp: int, world: int) -> None:
    """Returns if `world` processes divide into groups of `sp`.

    Raises:
        UserError: they do not.
    """
    if world % sp:
        fitting = max(n for n in range(1, min(sp, world) + 1) if world % n == 0)
        raise UserError(
            f"{world} processes do not divide into groups of sp={sp}", where="sp",
            remedy=f"use sp={fitting}, or start {-(-world // sp) * sp} processes with torchrun",
        )  # fmt: skip


def _from_rank_0(make: Any, rank: int, device: torch.device) -> Any:
    """Returns what `make` returns on rank 0, on every rank; its UserError is raised on every rank, too."""
    answer: dict[str, Any] = {}
    if rank == 0:
        try:
            answer = {"value": make()}
        except UserError as error:
            answer = {"error": [error.what, error.where, error.remedy]}
    answer = gather_json(answer, None, device)[0]
    if "error" in answer:
        what, where, remedy = answer["error"]
        raise UserError(what, where=where, remedy=remedy)
    return answer["value"]


def _sample(
    config: SampleConfig, inputs: SamplingInputs, prompts: list[Prompt], files: list[Path], todo: set[int], mesh: Mesh,
    device: torch.device,
) -> list[Path]:  # fmt: skip
    size, count = config.batch_size, len(prompts)
    batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
    # A batch is sampled as a whole even if some of its videos are there: the others come out as they would have.
    pending = [batch for batch in batches if not todo.isdisjoint(batch)]
    _report(count, len(todo), len(pending), mesh)
    mine = pending[mesh.dp_rank :: mesh.dp]
    if not pending or (not mine and mesh.sp == 1):
        return []
    wanted = [prompts[i] for batch in mine for i in batch]
    negatives = [prompt.negative for prompt in wanted] if config.guidance_scale != 1 else []
    texts = encode_prompts(inputs, [*(p.text for p in wanted), *negatives], device, DTYPES[config.precision])
    sampler = build_sampler(inputs, config, device, mesh)
    started, written = time.perf_counter(), []
    for done, batch in enumerate(mine, start=1):
        latents = sampler.latents([prompts[i] for i in batch], texts)
        for place, index in enumerate(batch):
            if index in todo and place % mesh.sp == mesh.sp_rank:
                _write(files[index], sampler.frames(latents[place : place + 1]), inputs.fps)
                written.append(files[index])
        get_logger().info("batch %d of %d, %.1f s", done, len(mine), time.perf_counter() - started)
    return written


def _report(prompts: int, todo: int, pending: int, mesh: Mesh) -> None:
    log = get_logger()
    if mesh.sp_rank == 0 and mesh.rank > 0:
        log.setLevel(logging.WARNING)  # this process alone sees its prompts: what it says of them must be heard
    if todo == 0:
        log.info("nothing to do: all %d videos are there", prompts)
    elif todo < prompts:
        log.info("%d of %d videos are there", prompts - todo, prompts)
    if 0 < pending < mesh.dp:
        log.info("%d of %d groups of processes have nothing to do", mesh.dp - pending, mesh.dp)


def _write(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    try:
        write_mp4(frames, path, fps)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror or error})", where=str(path),
            remedy="free space and run the same command again: it goes on",
        ) from None  # fmt: skip
