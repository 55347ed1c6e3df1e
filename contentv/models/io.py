"""Transformer weights on disk: diffusers folders of Stable Diffusion 3, 3.5 and ContentV, read and written.

A folder holds config.json and either one safetensors file or several with an index. Reading is strict both ways: a
tensor too few, too many or of another shape is an error that names it. The one exception is the two-dimensional
position table of the image models, which has no place in a video model and is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.models.folders import WEIGHTS, read_json, weight_files, write_json
from contentv.models.mmdit import MMDiT, MMDiTConfig, init_parameter
from contentv.models.stored import ComputedTensors, StoredTensors, TensorFile, whole

CONFIG = "config.json"
INDEX = f"{WEIGHTS}.index.json"
VIDEO_CLASS = "SD3Transformer3DModel"
IMAGE_CLASS = "SD3Transformer2DModel"
IMAGE_POSITIONS = "pos_embed.pos_embed"
IO_LAYERS = ("pos_embed.proj.", "proj_out.")  # what touches the VAE's latents
IO_KEYS = ("in_channels", "out_channels", "patch_size")
NAMES_SHOWN = 8

# What diffusers' image class assumes when config.json leaves a key out.
IMAGE_DEFAULTS: dict[str, Any] = {
    "num_layers": 18, "num_attention_heads": 18, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
    "patch_size": 2, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": None,
}  # fmt: skip


def read_config(folder: str | Path) -> MMDiTConfig:
    """Returns the transformer's shape as `folder`/config.json describes it.

    Args:
        folder: a diffusers transformer folder.

    Raises:
        UserError: the file is missing, unreadable, of another class, or asks for parts this model does not have.
    """
    path = Path(folder) / CONFIG
    raw = read_json(path)
    kind = raw.get("_class_name")
    if kind not in (VIDEO_CLASS, IMAGE_CLASS):
        raise UserError(
            f'a transformer of class "{kind}"',
            where=str(path),
            remedy=f"use the transformer folder of an SD3, SD3.5 or ContentV model ({IMAGE_CLASS} or {VIDEO_CLASS})",
        )
    if raw.get("dual_attention_layers"):
        raise UserError(
            f"dual attention in the layers {raw['dual_attention_layers']}, which this model does not have",
            where=str(path),
            remedy="use a model without them, such as SD3.5 Large (SD3.5 Medium has them)",
        )
    defaults = IMAGE_DEFAULTS if kind == IMAGE_CLASS else asdict(MMDiTConfig())
    values = {key: raw.get(key, default) for key, default in defaults.items()}
    if values["out_channels"] is None:
        values["out_channels"] = values["in_channels"]
    wrong = [k for k, v in values.items() if k != "qk_norm" and (not isinstance(v, int) or isinstance(v, bool))]
    if wrong:
        raise UserError(f"no whole number in {', '.join(wrong)}", where=str(path), remedy="fetch the file again")
    config = MMDiTConfig(**values)
    text_width = raw.get("caption_projection_dim", config.inner_dim)
    if text_width != config.inner_dim:
        raise UserError(
            f"caption_projection_dim {text_width} differs from the model's width {config.inner_dim}",
            where=str(path),
            remedy="text and video tokens of this model have one width: use another folder",
        )
    return config


@dataclass(frozen=True)
class TransformerSource:
    """Where a transformer's weights come from: every name and shape is known and right, values are read when taken.

    Attributes:
        config: the model's shape.
        tensors: name -> the tensor, or anything sliced like one; exactly the names of the model's state dict, in its
            order. One tensor of it need be in memory at a time.
        origin: for messages.
    """

    config: MMDiTConfig
    tensors: Mapping[str, Any]
    origin: str


def state_shapes(config: MMDiTConfig) -> dict[str, torch.Size]:
    """Returns the names and shapes of a transformer's weights, in the order of its state dict."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in MMDiT(config).state_dict().items()}


def open_transformer(folder: str | Path, config_check: MMDiTConfig | None = None) -> TransformerSource:
    """Returns the weights stored in a diffusers folder of SD3, SD3.5 or ContentV; none of them is read yet.

    An image model's position table is left out.

    Args:
        folder: holds config.json and safetensors weights, one file or several with an index.
        config_check: the shape that the caller expects; None takes whatever the folder has.

    Raises:
        UserError: the folder is no such model, has another shape, or tensors are missing, unknown or misshapen.
    """
    config = read_config(folder)
    if config_check is not None:
        _check_same(config, config_check, str(folder))
    stored = StoredTensors(weight_files(Path(folder), WEIGHTS), without=[IMAGE_POSITIONS])
    return checked_source(config, stored, str(folder))


def initial_weights(config: MMDiTConfig, seed: int, origin: str = "random weights") -> TransformerSource:
    """Returns weights for training from scratch, see `init_parameter`; each is made when taken."""
    shapes = state_shapes(config)

    def make(name: str) -> Tensor:
        value = torch.empty(shapes[name], dtype=torch.float32)
        init_parameter(name, value, seed)
        return value

    return TransformerSource(config, ComputedTensors(shapes, make), origin)


def load_whole(source: TransformerSource, dtype: torch.dtype | None = None) -> MMDiT:
    """Returns the whole model on the CPU.

    Args:
        source: the weights.
        dtype: what to convert them to; None keeps what is stored.
    """
    with torch.device("meta"):
        model = MMDiT(source.config)
    model.load_state_dict({name: whole(stored, dtype) for name, stored in source.tensors.items()}, assign=True)
    return model


def read_transformer(
    folder: str | Path, dtype: torch.dtype | None = None, config_check: MMDiTConfig | None = None
) -> MMDiT:
    """Returns the transformer stored in a diffusers folder of SD3, SD3.5 or ContentV, on the CPU.

    Args:
        folder: holds config.json and safetensors weights.
        dtype: what to convert the weights to; None keeps what is stored.
        config_check: the shape that the caller expects; None takes whatever the folder has.

    Raises:
        UserError: the folder is no such model, has another shape, or tensors are missing, unknown or misshapen.
    """
    return load_whole(open_transformer(folder, config_check), dtype)


def adapt_image_transformer(
    folder: str | Path, config: MMDiTConfig | None = None, *, reinit_io: bool = False, seed: int = 0
) -> TransformerSource:
    """Returns the weights of a video transformer that starts from an image transformer's.

    The image model's two-dimensional position table is dropped for the fixed three-dimensional code and everything
    else is kept, as ContentV reports doing. Its patch embedding and output layer were trained on another VAE's
    latents: they are what has most to learn.

    Args:
        folder: a diffusers transformer folder of SD3 or SD3.5.
        config: the shape wanted; None takes the folder's. Channels may differ from the folder's only with `reinit_io`.
        reinit_io: starts the patch embedding and the output layer anew, for a VAE whose latents have nothing in common
            with the old one's. An option of this project, not of the paper.
        seed: of the new layers' weights.

    Raises:
        UserError: as `open_transformer`.

    Source: Lin et al. 2025 (arXiv 2506.05343).
    """
    source = open_transformer(folder)
    wanted = source.config if config is None else config
    _check_same(source.config, wanted, str(folder), IO_KEYS if reinit_io else ())
    ends = "started anew" if reinit_io else "kept"
    get_logger().info(f"video model from the image model in {folder}: patch embedding and output layer {ends}")
    if not reinit_io:
        return source
    new = initial_weights(wanted, seed)

    def make(name: str) -> Any:
        return (new if name.startswith(IO_LAYERS) else source).tensors[name]

    return TransformerSource(wanted, ComputedTensors(new.tensors, make), source.origin)


def write_transformer(
    source: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: str | Path,
    config: MMDiTConfig,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a transformer as a diffusers folder (config.json and safetensors, several with an index when large).

    A stream of (name, tensor) is written tensor by tensor, in any order. Every file appears under its name only when
    whole, config.json last.

    Args:
        source: the model, its state dict, or an iterable of (name, whole tensor).
        folder: made if it does not exist.
        config: the model's shape.
        dtype: what to convert to, for all tensors or by name; None keeps the dtypes of a model or a state dict.
        max_shard_bytes: most bytes of tensors in one file.

    Raises:
        ValueError: the tensors are not those of a model of this shape; they are named.
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    stream = source.items() if isinstance(source, Mapping) else source
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)

    shapes = state_shapes(config)
    dtypes = _dtypes(source, shapes, dtype)
    plan = _plan_files({name: (shape, dtypes[name]) for name, shape in shapes.items()}, max_shard_bytes)
    files = {file: TensorFile(folder / file, tensors) for file, tensors in plan.items()}
    places = {name: file for file, tensors in plan.items() for name in tensors}
    missing = dict.fromkeys(shapes)
    try:
        for name, tensor in stream:
            if name not in missing or tensor.shape != shapes[name]:
                raise ValueError(f'"{name}" {tuple(tensor.shape)} is no tensor of this model, or was given before')
            del missing[name]
            files[places[name]].write(name, tensor.detach().to("cpu", dtypes[name]))
    finally:
        for file in files.values():
            file.close()
    if missing:
        raise ValueError(f"tensors that were not given: {_some(set(missing))}")
    if len(plan) > 1:
        total_bytes = sum(shape.numel() * dtypes[name].itemsize for name, shape in shapes.items())
        write_json({"metadata": {"total_size": total_bytes}, "weight_map": places}, folder / INDEX)
    _remove_others(folder, {*plan, *([INDEX] if len(plan) > 1 else [])})
    write_json(_diffusers_config(config), folder / CONFIG)


def _dtypes(source: Any, names: Iterable[str], dtype: Any) -> Mapping[str, torch.dtype]:
    """Returns the dtype in which each tensor is written."""
    if isinstance(dtype, Mapping):
        return dtype
    if dtype is not None:
        return dict.fromkeys(names, dtype)
    if not isinstance(source, Mapping):
        raise ValueError("the tensors of a stream are not known before they come: give their dtype")
    absent = set(names) - set(source)
    if absent:
        raise ValueError(f"tensors that were not given: {_some(absent)}")
    return {name: source[name].dtype for name in names}


def checked_source(config: MMDiTConfig, tensors: Mapping[str, Any], origin: str) -> TransformerSource:
    """Returns the tensors as a model's weights, in the order of its state dict.

    Raises:
        UserError: tensors are missing, unknown or misshapen; they are named.
    """
    shapes = state_shapes(config)
    problems = {
        "missing": set(shapes) - set(tensors),
        "unknown": set(tensors) - set(shapes),
        "of another shape": {n for n in set(shapes) & set(tensors) if shapes[n] != tensors[n].shape},
        "not of floating point": {n for n in set(tensors) if not tensors[n].dtype.is_floating_point},
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(
            f"the tensors are not those that the config describes ({'; '.join(found)})",
            where=origin,
            remedy="use a complete folder of one model",
        )
    return TransformerSource(config, ComputedTensors(shapes, tensors.__getitem__), origin)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:NAMES_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def _check_same(found: MMDiTConfig, wanted: MMDiTConfig, where: str, free: tuple[str, ...] = ()) -> None:
    have, want = asdict(found), asdict(wanted)
    differ = [f"{key} {have[key]} (wanted {want[key]})" for key in have if have[key] != want[key] and key not in free]
    if differ:
        raise UserError(
            f"the stored model has another shape: {', '.join(differ)}",
            where=where,
            remedy="choose the model config of this folder, or another folder",
        )


def _plan_files(
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]], max_bytes: int
) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """Returns the files of a folder, in order, and which tensors each holds."""
    parts: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{}]
    used = 0
    for name, (shape, dtype) in tensors.items():
        size = shape.numel() * dtype.itemsize
        if used and used + size > max_bytes:
            parts.append({})
            used = 0
        used += size
        parts[-1][name] = (shape, dtype)
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    stem, suffix = WEIGHTS.rsplit(".", 1)
    return {f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}": part for number, part in enumerate(parts, 1)}


def _diffusers_config(config: MMDiTConfig) -> dict[str, Any]:
    values = asdict(config)
    values |= {"caption_projection_dim": config.inner_dim, "dual_attention_layers": []}
    return {"_class_name": VIDEO_CLASS, **dict(sorted(values.items()))}


def _remove_others(folder: Path, written: set[str]) -> None:
    """An older save in the same folder would otherwise be read instead of, or beside, this one."""
    for path in folder.glob("diffusion_pytorch_model*"):
        if path.name not in written:
            path.unlink()
