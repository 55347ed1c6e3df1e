"""LoRA files: `pytorch_lora_weights.safetensors` as diffusers' Stable Diffusion 3 pipeline reads and writes it.

Files of others are read too: diffusers' own, with or without its header, and peft's `adapter_model.safetensors`. What
is not plain low-rank addition to layers of a transformer (DoRA, LoKr, text encoders, ...) is refused by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.models.folders import read_json
from contentv.models.lora_config import A, B, LoRA, LoRAConfig, lora_name
from contentv.models.lora_header import PREFIX, header_of, layer_scales
from contentv.models.stored import StoredTensors, whole

FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NAMES_SHOWN = 4

# What others call the two tensors, and the alpha, of a layer.
PARTS = (
    (re.compile(r"\.(lora_A(\.[^.]+)?|lora\.down|lora_down)\.weight$"), A),
    (re.compile(r"\.(lora_B(\.[^.]+)?|lora\.up|lora_up)\.weight$"), B),
    (re.compile(r"\.alpha$"), ".alpha"),
)
# Tensors that plain LoRA does not have: (in their names, what they are, what to do).
FOREIGN = (
    (r"^(text_encoder|text_model|lora_te)", "additions to a text encoder", "use a LoRA of the transformer alone"),
    (r"dora_scale|lora_magnitude_vector", "the magnitudes of DoRA", "merge it where it was trained"),
    (r"\.(lokr|hada|oft|boft|vera|ia3)_", "another kind of adapter", "merge it where it was trained"),
    (r"\.lora_(A|B)(\.[^.]+)?\.bias$|\.diff(_b)?$", "additions to biases or norms", "merge it where it was trained"),
    (r"^lora_(unet|transformer)_", "kohya's names of layers", "convert it to diffusers' names first"),
)


def write_lora(
    stream: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: str | Path,
    config: LoRAConfig,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a trained LoRA as diffusers does and returns the file; it appears under its name only when whole.

    Args:
        stream: (name, whole tensor) of every part, under our names or a live model's.
        folder: made if it does not exist.
        config: the LoRA's; rank and alpha go into the file's header.
        dtype: what to convert to; None keeps the tensors' dtypes.

    Raises:
        ValueError: a name is no LoRA's, or a layer has only one of its two tensors, or another rank.
    """
    items = stream.items() if isinstance(stream, Mapping) else stream
    tensors = {lora_name(name): tensor.detach() for name, tensor in items}
    ranks = _ranks(tensors, "the tensors given")
    if set(ranks.values()) != {config.rank}:
        raise ValueError(f"ranks {sorted(set(ranks.values()))}, and the config says {config.rank}")
    return save_lora(LoRA(tensors, ranks, dict.fromkeys(ranks, config.scale)), folder, dtype=dtype)


def save_lora(lora: LoRA, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes any LoRA, such as one that was read, as diffusers does and returns the file.

    Args:
        lora: the LoRA; its layers may differ in rank and strength.
        folder: made if it does not exist.
        dtype: what to convert to; None keeps the tensors' dtypes.
    """
    kept = {name: whole(tensor, dtype).to("cpu").contiguous() for name, tensor in lora.tensors.items()}
    # safetensors refuses tensors that share memory, such as views of one buffer.
    tensors = {PREFIX + name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for name, t in kept.items()}
    metadata = {"format": "pt", HEADER: json.dumps(header_of(lora), indent=2, sort_keys=True)}
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, str(partial), metadata=metadata)
    os.replace(partial, path)
    return path


def read_lora(path: str | Path) -> LoRA:
    """Returns the LoRA in a file or a folder; its tensors are read when taken.

    A layer's strength is alpha / rank, alpha being a tensor of the file, or what the file's header or peft's
    adapter_config.json says, or else the rank, as diffusers has it.

    Args:
        path: a .safetensors file, or a folder with pytorch_lora_weights.safetensors or adapter_model.safetensors.

    Raises:
        UserError: it is missing, a pickle, damaged, or holds something else than a LoRA of a transformer.
    """
    file = _find(Path(path))
    header = _header(file)
    tensors: dict[str, Any] = {}
    alphas: dict[str, float] = {}
    for stored_name, tensor in StoredTensors([file]).items():
        name = _our_name(stored_name, file)
        if name.endswith(".alpha"):
            if tensor.shape.numel() != 1:
                raise UserError(f'"{stored_name}" is no single number', where=str(file), remedy="fetch the file again")
            alphas[name.removesuffix(".alpha")] = float(tensor.read())
        else:
            tensors[name] = tensor
    ranks = _ranks(tensors, str(file))
    if not alphas and not header:
        get_logger().info(f"{file} says nothing of alpha: taken as the rank, as diffusers does")
    return LoRA(tensors, ranks, layer_scales(ranks, header, alphas, str(file)), str(file))


def _find(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise UserError(
            f"{path.name} is a pickle, which could run any code when loaded", where=str(path),
            remedy="have its maker save it as safetensors (diffusers' save_lora_weights does)",
        )  # fmt: skip
    if path.is_file():
        return path
    if not path.exists():
        raise UserError("no such file or folder", where=str(path), remedy=f"give a folder with {FILE}, or a file")
    for name in (FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    found = sorted(p.name for p in path.iterdir() if p.suffix in (*PICKLES, ".safetensors"))
    if any(name.endswith(PICKLES) for name in found):
        _find(path / next(name for name in found if name.endswith(PICKLES)))
    listing = f" (there are {', '.join(found[:NAMES_SHOWN])})" if found else ""
    raise UserError(f"no {FILE} in it{listing}", where=str(path), remedy="name the LoRA's own file or folder")


def _header(file: Path) -> dict[str, Any]:
    """Returns what is known of a LoRA beside its tensors: diffusers' header, or peft's file beside it."""
    if file.name == PEFT_FILE and (file.parent / PEFT_CONFIG).is_file():
        return read_json(file.parent / PEFT_CONFIG)
    StoredTensors([file]).close()  # says so where the file is damaged
    with safe_open(str(file), framework="pt") as opened:
        text = (opened.metadata() or {}).get(HEADER)
    if text is None:
        return {}
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"unreadable {HEADER} ({error})", where=str(file), remedy="fetch the file again") from error
    if not isinstance(header, dict):
        raise UserError(f"{HEADER} is not a JSON object", where=str(file), remedy="fetch the file again")
    if any(key.startswith(PREFIX) for key in header):
        header = {key.removeprefix(PREFIX): value for key, value in header.items() if key.startswith(PREFIX)}
    return header


def _our_name(stored: str, file: Path) -> str:
    name = stored.removeprefix("base_model.model.").removeprefix(PREFIX)
    for pattern, what, remedy in FOREIGN:
        if re.search(pattern, name):
            raise UserError(f'"{stored}": {what}, not plain LoRA', where=str(file), remedy=remedy)
    for ending, ours in PARTS:
        if ending.search(name):
            return ending.sub(ours, name)
    raise UserError(
        f'"{stored}" is no tensor of a LoRA', where=str(file), remedy="a whole model goes where its folder is asked for"
    )


def _ranks(tensors: Mapping[str, Any], where: str) -> dict[str, int]:
    """Returns the rank of each layer, from tensors that must be whole pairs of matrices."""
    modules = dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in tensors)
    if not modules:
        raise UserError("there is no layer in it", where=where, remedy="use a file that holds a LoRA")
    ranks: dict[str, int] = {}
    for module in modules:
        a, b = tensors.get(module + A), tensors.get(module + B)
        if a is None or b is None:
            missing = A if a is None else B
            raise UserError(f'"{module}{missing}" is missing', where=where, remedy="fetch the file again")
        sizes = tuple(a.shape), tuple(b.shape)
        if [len(size) for size in sizes] != [2, 2] or sizes[0][0] != sizes[1][1] or 0 in (*sizes[0], *sizes[1]):
            raise UserError(
                f"{module} has {sizes[0]} and {sizes[1]}, not (rank, in) and (out, rank)", where=where,
                remedy="use a LoRA of linear layers",
            )  # fmt: skip
        wrong = [t.dtype for t in (a, b) if not t.dtype.is_floating_point]
        if wrong:
            raise UserError(f"{module} is stored as {wrong[0]}", where=where, remedy="use floating point weights")
        ranks[module] = sizes[0][0]
    return ranks
