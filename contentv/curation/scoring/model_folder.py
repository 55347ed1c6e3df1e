"""Model folders of plug-ins: JSON and safetensors, never a pickle, never the network."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from transformers.utils.logging import disable_progress_bar

from contentv.base.errors import UserError

# A bar for every model that every worker reads would tear the command's own.
disable_progress_bar()


def require_folder(path: str | Path, key: str, what: str) -> Path:
    """Returns the path of a folder that is there.

    Raises:
        UserError: it is not.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", where=key, remedy=f"name the folder of {what}")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        UserError: the file is missing, unreadable, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path), remedy="complete the model's folder") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"unreadable ({error})", where=str(path), remedy="fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path), remedy="fetch the file again")
    return value


def tensor_names(path: Path) -> list[str]:
    """Returns the names of the tensors in a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    return list(_open(path).keys())


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file in fp32, all of them or those of `names`.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = _open(path)
    return {name: file.get_tensor(name).float() for name in (file.keys() if names is None else names)}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path), remedy="complete the model's folder") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"unreadable ({error})", where=str(path), remedy="fetch the file again") from error


def load_model(model_class: Any, folder: Path, **options: Any) -> Any:
    """Returns a transformers model in evaluation mode, in fp32, on the CPU.

    Args:
        model_class: of transformers.
        folder: config.json and safetensors weights; other models' tensors may lie beside.
        options: more arguments of from_pretrained.

    Raises:
        UserError: the folder holds no such model, or not all of it.
    """
    try:
        model, report = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot be read ({error})", where=str(folder), remedy="use a folder with safetensors weights that fit its "
            "config.json",
        ) from error  # fmt: skip
    if report["missing_keys"]:
        raise UserError(
            f"tensors are missing, such as {min(report['missing_keys'])}", where=str(folder),
            remedy="use a complete folder of one model",
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def three_numbers(values: dict[str, Any], key: str, where: Path) -> Float[Tensor, "3 1 1"]:
    """Returns one number per colour from a JSON object.

    Raises:
        UserError: it holds something else.
    """
    found = values.get(key)
    if not isinstance(found, list) or len(found) != 3 or not all(isinstance(x, (int, float)) for x in found):
        raise UserError(f"no three numbers in {key}", where=str(where), remedy="fetch the file again")
    return torch.tensor([float(x) for x in found]).view(3, 1, 1)


def resized(picture: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> Float[Tensor, "3 height width"]:
    """Returns a picture of another size (bicubic, antialiased), 0..1."""
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    scaled = functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return scaled[0].round().clamp(0, 255) / 255
