"""One sample of a shard: KEY.json and KEY.safetensors to records and back, every field checked."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save as save_safetensors
from torch import Tensor
from typing_extensions import NotRequired

from contentv.data.dataset import TextInfo
from contentv.data.index import MAX_META_BYTES, Score

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MAX_HEADER_BYTES = 1 << 16
_NUMBERS = ("fps", "start_s", "duration_s")
_OPTIONAL: dict[str, Any] = {"visual_raw": None, "motion_raw": None, "scores": {}, "media_xxh128": None}
# The smallest integer, as signed and as unsigned, whose bits are an infinity: of either sign, everything from there on
# is an infinity or NaN.
INFINITY: dict[torch.dtype, tuple[Any, int, Any, int]] = {
    torch.bfloat16: (np.dtype(np.int16), 0x7F80, np.dtype(np.uint16), 0xFF80),
    torch.float16: (np.dtype(np.int16), 0x7C00, np.dtype(np.uint16), 0xFC00),
    torch.float32: (np.dtype(np.int32), 0x7F800000, np.dtype(np.uint32), 0xFF800000),
}
_MAX_LAYOUTS = 64
_LENGTH = struct.Struct("<Q")
_AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e300)]


class _Meta(TypedDict):
    """What KEY.json holds."""

    key: str
    caption: str
    source: Annotated[str, msgspec.Meta(min_length=1)]
    kind: Literal["image", "video"]
    num_frames: _AtLeastOne
    height_px: _AtLeastOne
    width_px: _AtLeastOne
    fps: _NotNegative
    start_s: _NotNegative
    duration_s: _NotNegative
    visual_raw: NotRequired[Score]
    motion_raw: NotRequired[Score]
    scores: NotRequired[dict[str, Any]]
    media_xxh128: NotRequired[str | None]


_META = msgspec.json.Decoder(_Meta)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
META_FIELDS = tuple(_Meta.__annotations__)


class BadSampleError(Exception):
    """A stored sample that may not be used; the message says why."""


@dataclass
class StoredSample:
    """A sample as stored: its KEY.json, raw latents (before mean/std) and encoded caption."""

    meta: dict[str, Any]
    latents: Float[Tensor, "c t h w"]
    text_tokens: Float[Tensor, "l d"]
    text_pooled: Float[Tensor, " p"]


class Layout(NamedTuple):
    """One tensor of a member: name, dtype, shape, its place in bytes after the header, and its number of values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    numel: int


@dataclass(frozen=True)
class SampleShapes:
    """The tensors every sample of a bucket must have."""

    latents: tuple[int, ...]
    text_tokens: tuple[int, ...]
    text_pooled: tuple[int, ...]
    # Samples of one writer have equal headers, and one that was found sound is so again.
    known: dict[bytes, list[Layout]] = field(default_factory=dict, compare=False, repr=False)

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
    try:
        msgspec.convert(meta, _Meta)
    except msgspec.ValidationError as error:
        raise BadSampleError(_told(error, meta)) from error
    for name in _NUMBERS:
        if math.isnan(meta[name]):
            raise BadSampleError(f"KEY.json: {name} is not a number")


def _told(error: msgspec.ValidationError, meta: Any) -> str:
    """Returns what is wrong with a description, with the value that is."""
    what, _, place = str(error).partition(" - at `$.")
    name = place.rstrip("`")
    if isinstance(meta, Mapping) and name in meta:
        return f"KEY.json: {name} is {meta[name]!r} ({what})"
    return f"KEY.json: {error}"


def _any_json(data: bytes | bytearray | memoryview) -> Any:
    try:
        return msgspec.json.decode(data)
    except _UNREADABLE:
        return None


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


def decode_meta(data: bytes | bytearray | memoryview, key: str) -> dict[str, Any]:
    """Returns the checked content of KEY.json.

    Raises:
        BadSampleError: not a JSON object, another key's, or a field fails its check.
    """
    if len(data) > MAX_META_BYTES:
        raise BadSampleError(f"KEY.json has {len(data)} bytes")
    try:
        meta = {**_OPTIONAL, **_META.decode(data)}
    except msgspec.ValidationError as error:
        raise BadSampleError(_told(error, _any_json(data))) from error
    except _UNREADABLE as error:
        raise BadSampleError(f"KEY.json is not JSON ({error})") from error
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


def decode_tensors(data: bytes | bytearray | memoryview, shapes: SampleShapes) -> dict[str, Tensor]:
    """Returns `latents`, `text_tokens` and `text_pooled` from KEY.safetensors, in their stored dtype.

    The tensors lie in `data` itself where it can be written to, which a bytearray can.

    Raises:
        BadSampleError: the header is not exactly these tensors with the bucket's shapes and an allowed dtype, the
            file is not valid, or values are not finite.
    """
    length = _LENGTH.unpack_from(data)[0] if len(data) >= 8 else 0
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise BadSampleError(f"KEY.safetensors claims a header of {length} bytes in a member of {len(data)}")
    header = bytes(data[8 : 8 + length])
    layouts = shapes.known.get(header)
    if layouts is None:
        layouts = _checked_layouts(header, shapes)
        if len(shapes.known) >= _MAX_LAYOUTS:
            shapes.known.clear()
        shapes.known[header] = layouts
    payload = memoryview(data)[8 + length :]
    if len(payload) != layouts[-1].end:
        raise BadSampleError(f"KEY.safetensors is not valid ({len(payload)} bytes of values, not {layouts[-1].end})")
    if payload.readonly:
        payload = memoryview(bytearray(payload))
    _require_finite_parts(payload, layouts)
    return {layout.name: _tensor(payload, layout) for layout in layouts}


def _tensor(payload: memoryview, layout: Layout) -> Tensor:
    tensor = torch.frombuffer(payload, dtype=layout.dtype, count=layout.numel, offset=layout.begin)
    if tensor.data_ptr() % 4:  # others' files need not keep to multiples of a number's size
        tensor = torch.frombuffer(bytearray(payload[layout.begin : layout.end]), dtype=layout.dtype)
    return tensor.view(layout.shape)


def _checked_layouts(text: bytes, shapes: SampleShapes) -> list[Layout]:
    """Returns the tensors that a header describes, in the order of their places."""
    try:
        header = json.loads(text)
        found = {name: (str(t["dtype"]), tuple(t["shape"])) for name, t in header.items() if name != "__metadata__"}
        places = {name: tuple(header[name]["data_offsets"]) for name in found}
        if any(len(place) != 2 or not all(type(byte) is int for byte in place) for place in places.values()):
            raise ValueError("data_offsets are two numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"the header of KEY.safetensors cannot be read ({error})") from error
    expected = dict(shapes.items())
    if found.keys() != expected.keys():
        raise BadSampleError(f"KEY.safetensors holds {sorted(found)}, not {sorted(expected)}")
    layouts, end = [], 0
    for name in sorted(found, key=lambda name: places[name]):
        dtype, shape = found[name]
        if shape != expected[name] or dtype not in DTYPES:
            raise BadSampleError(f"{name} is {dtype} {shape}, not BF16, F16 or F32 {expected[name]}")
        begin, end = end, end + math.prod(expected[name]) * DTYPES[dtype].itemsize
        if places[name] != (begin, end):
            raise BadSampleError(f"KEY.safetensors is not valid ({name} is at {places[name]}, not {(begin, end)})")
        layouts.append(Layout(name, DTYPES[dtype], expected[name], begin, end, math.prod(expected[name])))
    return layouts


def _require_finite_parts(payload: memoryview, layouts: list[Layout]) -> None:
    first, second, third = layouts
    if first.dtype is second.dtype is third.dtype and all_finite(payload, first.dtype):
        return  # all of them in one pass
    for layout in layouts:
        if not all_finite(payload[layout.begin : layout.end], layout.dtype):
            raise BadSampleError(f"{layout.name} has values that are not finite")


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        if not all_finite(values.view(-1).view(torch.uint8).numpy(), values.dtype):
            raise BadSampleError(f"{name} has values that are not finite")


def all_finite(values: Any, dtype: torch.dtype) -> bool:
    """Whether a buffer of floats has neither NaN nor infinity: exact, from the bits, without a copy."""
    signed, positive, unsigned, negative = INFINITY[dtype]
    return bool(
        np.maximum.reduce(np.frombuffer(values, signed), initial=0) < positive
        and np.maximum.reduce(np.frombuffer(values, unsigned), initial=0) < negative
    )


def _null_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
