"""`contentv convert`: weights of one folder to another, whole pipelines included; everything is checked first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.config.card import write_card
from contentv.config.parts import Parts, find_parts
from contentv.config.schema import ConvertConfig
from contentv.config.sources import Source, lineage, open_source
from contentv.engine.checkpoint_files import free_bytes
from contentv.models.io import TransformerSource, write_transformer
from contentv.models.lora_files import read_lora, save_lora
from contentv.models.lora_merge import merged, unmerged
from contentv.models.mmdit import MMDiTConfig
from contentv.models.pipeline_folder import check_target, copy_licences, whole_folder
from contentv.models.stored import whole

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert(config: ConvertConfig) -> Path:
    """Writes the folder that was asked for and returns it.

    Raises:
        UserError: the source is not what a transformer needs, a part is missing or does not fit, or `to` is taken.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("convert runs in one process", where="contentv convert", remedy="run it without torchrun")
    to = _target(config)
    source = _with_lora(open_source(config.source, config.weights), config)
    weights, apart = _weights(source, config)
    parts = find_parts(source, config) if config.layout == "diffusers" else None
    _check_space(weights, parts, config, to)
    with whole_folder(to, overwrite=config.overwrite) as folder:
        inner = folder / "transformer" if parts else folder
        write_transformer(
            _stream(weights, DTYPES[config.dtype]), inner, weights.config,
            dtype=DTYPES[config.dtype] or {name: stored.dtype for name, stored in weights.tensors.items()},
            max_shard_bytes=max(1, int(config.max_shard_gb * 1e9)),
        )  # fmt: skip
        if apart and source.lora is not None:
            save_lora(source.lora, folder / "lora")
        if parts:
            parts.write(folder, source.root)
        for _, ancestor in lineage(source):
            copy_licences(ancestor, folder)
            copy_licences(ancestor / "transformer", inner)
        write_card(folder, source, config, parts.shift if parts else 0.0)
    _tell_published(weights.config)
    if source.manifest.stage == "sd3":
        get_logger().info("an image model's weights: they have to learn video positions and the video VAE first")
    return to


def _target(config: ConvertConfig) -> Path:
    if not config.to:
        raise UserError("to is not set", where="to", remedy="name the folder to write, to=DIR")
    to, source = Path(config.to).resolve(), Path(config.source or "/").resolve()
    if config.source and (to == source or to in source.parents or source in to.parents):
        raise UserError(
            f"one of the folders {source} and {to} would lie in the other", where="to", remedy="name a folder elsewhere"
        )
    check_target(to, overwrite=config.overwrite)
    return to


def _with_lora(source: Source, config: ConvertConfig) -> Source:
    if not config.lora:
        if source.lora is None and (config.lora_mode != "merge" or config.lora_scale != 1.0):
            key = "lora_mode" if config.lora_mode != "merge" else "lora_scale"
            raise UserError("there is no LoRA", where=key, remedy="name one, lora=DIR, or leave this key out")
        return source
    if source.lora is not None:
        raise UserError(
            "what is converted is a LoRA already", where="lora",
            remedy="merge it first (leave lora= out), and convert the result with this one",
        )  # fmt: skip
    return Source(source.weights, source.manifest, source.root, source.what, read_lora(Path(config.lora)))


def _weights(source: Source, config: ConvertConfig) -> tuple[TransformerSource, bool]:
    """Returns the weights to write, and whether the LoRA goes beside them."""
    lora, dtype = source.lora, DTYPES[config.dtype]
    if lora is None:
        return source.weights, False
    lora.check_fits(source.weights)
    if config.lora_mode == "apart":
        if config.lora_scale != 1.0:
            raise UserError(
                "a LoRA apart is kept as it is: whoever loads it chooses its scale", where="lora_scale",
                remedy="leave it out, or use lora_mode=merge",
            )  # fmt: skip
        return source.weights, True
    if config.lora_mode == "unmerge" and not config.lora:
        raise UserError(
            "this run's base has its LoRA apart already", where="lora_mode=unmerge", remedy="use lora_mode=apart"
        )
    change = merged if config.lora_mode == "merge" else unmerged
    stored = {tensor.dtype for tensor in source.weights.tensors.values()}
    # One rounding, to what is written; tensors of several dtypes are written in the widest.
    kept = next(iter(stored)) if len(stored) == 1 else torch.float32
    return change(source.weights, lora, config.lora_scale, kept if dtype is None else dtype), False


def _stream(weights: TransformerSource, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) in the model's order, each read when its turn comes."""
    for name, stored in weights.tensors.items():
        value = whole(stored)
        if dtype is torch.float16:
            value = _as_fp16(value, name, weights.origin)
        yield name, value


def _as_fp16(value: Tensor, name: str, origin: str) -> Tensor:
    small = value.to(torch.float16)
    if bool((small.isinf() & value.isfinite()).any()):
        raise UserError(
            f"{name} holds values beyond fp16 (up to {float(value.abs().max()):.3g}, fp16 ends at 65504)",
            where=origin, remedy="use dtype=bf16 or dtype=keep",
        )  # fmt: skip
    return small


def _tell_published(config: MMDiTConfig) -> None:
    """The published class takes six of the config's keys; the others must be what it sets itself."""
    fixed = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
    other = [f"{key} {getattr(config, key)}" for key, value in fixed.items() if getattr(config, key) != value]
    if other:
        get_logger().info(
            "%s: contentv and diffusers load this size; the published ContentV class is fixed at %s",
            ", ".join(other), ", ".join(f"{key} {value}" for key, value in fixed.items()),
        )  # fmt: skip


def _check_space(weights: TransformerSource, parts: Parts | None, config: ConvertConfig, to: Path) -> None:
    dtype = DTYPES[config.dtype]
    sizes = ((t.shape.numel(), t.dtype if dtype is None else dtype) for t in weights.tensors.values())
    needed = sum(numel * kind.itemsize for numel, kind in sizes)
    needed += parts.size() if parts else 0
    free = free_bytes(to.parent)
    if free < needed:
        raise UserError(
            f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", where=f"to={to}",
            remedy="free space on the disk, or name a folder on another one",
        )  # fmt: skip
