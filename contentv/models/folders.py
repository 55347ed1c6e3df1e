"""Model folders on disk: JSON and safetensors, never a pickle; and the fingerprint that tells two models apart."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from contentv.base.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name; several files are listed in WEIGHTS.index.json
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        UserError: the file is missing, unreadable, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError("no such file", where=str(path), remedy="give the folder of a downloaded model") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"unreadable ({error})", where=str(path), remedy="fetch the file again") from error
    if not isinstance(raw, dict):
        raise UserError("not a JSON object", where=str(path), remedy="fetch the file again")
    return raw


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON object; the file appears only when whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def weight_files(folder: Path, name: str) -> list[Path]:
    """Returns the safetensors files of a folder: `name` itself, or those that `name`.index.json lists.

    Raises:
        UserError: there are none, or the index points outside the folder.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).exists():
        return [folder / name]
    if not index.exists():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
        found = f" ({', '.join(pickled[:3])} is a pickle, which could run any code when loaded)" if pickled else ""
        raise UserError(
            f"no {name} and no {index.name}{found}", where=str(folder),
            remedy="fetch the model's safetensors files" + (", or have its maker save them" if pickled else ""),
        )  # fmt: skip
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError("no weight_map", where=str(index), remedy="fetch the file again")
    names = sorted(set(weight_map.values()))
    outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    if outside:
        raise UserError(
            f'"{outside[0]}" is no safetensors file of this folder',
            where=str(index),
            remedy="fetch the model from a source you trust",
        )
    return [folder / n for n in names]


def fingerprint(config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], elements: int | None = None) -> str:
    """Returns 32 hexadecimal digits (xxh128) that depend on the config, and on names, shapes and values of the weights.

    Values are taken as fp32, so neither the device nor an exact change of dtype matters.

    Args:
        config: what of the model's config has an effect, JSON-compatible.
        weights: (name, tensor), in any order.
        elements: how many evenly spaced values of each tensor to look at; None looks at all. A part is enough to tell
            models apart, not to find a damaged file.
    """
    digest = xxhash.xxh128(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.detach().reshape(-1)
        if elements is not None and values.numel() > elements:
            values = values[:: values.numel() // elements]
        digest.update(values.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
