"""One sample of a shard: KEY.json and KEY.safetensors to records and back, every field checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from contentv.data.dataset import TextInfo
from contentv.data.index import MAX_META_BYTES

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MAX_HEADER_BYTES = 1 << 16
KINDS = ("image", "video")
_NUMBERS = ("fps", "start_s", "duration_s")
_COUNTS = ("num_frames", "height_px", "width_px")
_SCORES = ("visual_raw", "motion_raw")
_OPTIONAL: dict[str, Any] = {"visual_raw": None, "motion_raw": None, "scores": {}, "media_xxh128": None}
META_FIELDS = ("key", "caption", "source", "kind", *_COUNTS, *_NUMBERS, *_SCORES, "scores", "media_xxh128")


class BadSampleError(Exception):
    """A stored sample that may not be used; the message says why."""


@dataclass
class StoredSample:
    """A sample as stored: its KEY.json, raw latents (before mean/std) and encoded caption."""

    meta: dict[str, Any]
    latents: Float[Tensor, "c t h w"]
    text_tokens: Float[Tensor, "l d"]
    text_pooled: Float[Tensor, " p"]


@dataclass(frozen=True)
class SampleShapes:
    """The tensors every sample of a bucket must have."""

    latents: tuple[int, ...]
    text_tokens: tuple[int, ...]
    text_pooled: tuple[int, ...]

    @classmethod
    def of(cls, latent_shape: tuple[int, int, int, int], text: TextInfo) -> SampleShapes:
        """Returns the shapes for one bucket of a dataset."""
        return cls(latent_shape, (text.num_tokens, text.token_width), (text.pooled_width,))

    def items(self) -> list[tuple[str, tuple[int, ...]]]:
        """Returns (name, shape) of each tensor."""
        return [("latents", self.latents), ("text_tokens", self.text_tokens), ("text_pooled", self.text_pooled)]

    @property
    def max_bytes(self) -> int:
        """The largest size a member with these tensors can have."""
        return 8 + MAX_HEADER_BYTES + 4 * sum(math.prod(shape) for _, shape in self.items())


def check_meta(meta: Mapping[str, Any]) -> None:
    """Passes over a sample's description that has every field with the right type and range.

    Raises:
        BadSampleError: a field is missing, has another type, or is out of range.
    """
    missing = [name for name in META_FIELDS if name not in meta]
    if missing:
        raise BadSampleError(f"KEY.json lacks {', '.join(missing)}")
    for name in ("key", "caption", "source"):
        _require(isinstance(meta[name], str), name, meta[name], "a string")
    _require(meta["source"] != "", "source", "", "a name")
    _require(meta["kind"] in KINDS, "kind", meta["kind"], "image or video")
    for name in _COUNTS:
        _require(_is_number(meta[name], (int,)) and meta[name] >= 1, name, meta[name], "a positive integer")
    for name in _NUMBERS:
        _require(_is_number(meta[name]) and meta[name] >= 0, name, meta[name], "a finite number, at least 0")
    for name in _SCORES:
        _require(meta[name] is None or _is_number(meta[name]), name, meta[name], "a finite number or null")
    _require(isinstance(meta["scores"], dict), "scores", meta["scores"], "an object")
    media = meta["media_xxh128"]
    _require(media is None or isinstance(media, str), "media_xxh128", media, "a hex string or null")


def encode_meta(meta: Mapping[str, Any]) -> bytes:
    """Returns KEY.json; fields in a fixed order, NaN scores as null, absent scores and media checksum as null or {}.

    Raises:
        BadSampleError: a field is missing, unknown, of another type or out of range.
    """
    complete = {**_OPTIONAL, **meta}
    record = {name: _null_if_nan(complete[name]) for name in META_FIELDS if name in complete}
    unknown = sorted(complete.keys() - record.keys())
    if unknown:
        raise BadSampleError(f"unknown fields {', '.join(unknown)} (further measurements belong into scores)")
    check_meta(record)
    record["scores"] = {name: _null_if_nan(score) for name, score in record["scores"].items()}
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadSampleError(f"KEY.json cannot be written ({error})") from error


def decode_meta(data: bytes, key: str) -> dict[str, Any]:
    """Returns the checked content of KEY.json.

    Raises:
        BadSampleError: not a JSON object, another key's, or a field fails its check.
    """
    if len(data) > MAX_META_BYTES:
        raise BadSampleError(f"KEY.json has {len(data)} bytes")
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"KEY.json is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise BadSampleError("KEY.json is not an object")
    meta = {**_OPTIONAL, **meta}
    check_meta(meta)
    if meta["key"] != key:
        raise BadSampleError(f"KEY.json is of another sample ({meta['key']!r})")
    return meta


def encode_tensors(
    latents: Float[Tensor, "c t h w"],
    text_tokens: Float[Tensor, "l d"],
    text_pooled: Float[Tensor, " p"],
    shapes: SampleShapes,
) -> bytes:
    """Returns KEY.safetensors.

    Raises:
        BadSampleError: a tensor has another shape or dtype than the dataset allows, or values that are not finite.
    """
    tensors = {"latents": latents, "text_tokens": text_tokens, "text_pooled": text_pooled}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in DTYPES.values():
            raise BadSampleError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not bf16, fp16 or fp32 {shape}")
    _require_finite(tensors)
    return bytes(save_safetensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def decode_tensors(data: bytes, shapes: SampleShapes) -> dict[str, Tensor]:
    """Returns `latents`, `text_tokens` and `text_pooled` from KEY.safetensors, in their stored dtype.

    Raises:
        BadSampleError: the header is not exactly these tensors with the bucket's shapes and an allowed dtype, the
            file is not valid, or values are not finite.
    """
    _check_header(data, shapes)
    try:
        tensors: dict[str, Tensor] = load_safetensors(data)
    except SafetensorError as error:
        raise BadSampleError(f"KEY.safetensors is not valid ({error})") from error
    _require_finite(tensors)
    return tensors


def _check_header(data: bytes, shapes: SampleShapes) -> None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise BadSampleError(f"KEY.safetensors claims a header of {length} bytes in a member of {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length])
        found = {name: (str(t["dtype"]), tuple(t["shape"])) for name, t in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"the header of KEY.safetensors cannot be read ({error})") from error
    expected = dict(shapes.items())
    if found.keys() != expected.keys():
        raise BadSampleError(f"KEY.safetensors holds {sorted(found)}, not {sorted(expected)}")
    for name, (dtype, shape) in found.items():
        if shape != expected[name] or dtype not in DTYPES:
            raise BadSampleError(f"{name} is {dtype} {shape}, not BF16, F16 or F32 {expected[name]}")


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadSampleError(f"{name} has values that are not finite")


def _is_number(value: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
    return type(value) in kinds and abs(value) <= 1e300  # False for NaN, and for bool, which is not a number here


def _null_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise BadSampleError(f"{name} is {value!r}, not {expected}")
