"""Tensors in safetensors files as a mapping from names: each is read only when, and as far as, it is asked for.

Opening reads the headers alone, so a folder of any size is checked before a byte of a weight is touched. One file is
mapped into memory at a time: what a reader costs is at most the largest file, and as little as one tensor for those
who copy what they read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from contentv.base.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensor:
    """One tensor on the disk; slicing it reads that part, `[:]` or `read()` all of it."""

    def __init__(self, owner: StoredTensors, name: str, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name, self.path, self.shape, self.dtype = name, path, torch.Size(shape), dtype
        self._owner = owner

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self._owner.opened(self.path).get_slice(self.name)[index]
        return part

    def read(self) -> Tensor:
        """Returns the whole tensor on the CPU as stored; it may share the file's memory."""
        whole: Tensor = self._owner.opened(self.path).get_tensor(self.name)
        return whole


class StoredTensors(Mapping[str, StoredTensor]):
    """The tensors of some safetensors files.

    Args:
        paths: the files.
        without: names to leave out.

    Raises:
        UserError: a file is missing or damaged, or a name is stored twice.
    """

    def __init__(self, paths: Iterable[Path], without: Iterable[str] = ()) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        self._path: Path | None = None
        self._file: Any = None
        left_out = set(without)
        for path in paths:
            file = self.opened(path)
            for name in sorted(set(file.keys()) - left_out):
                if name in self._tensors:
                    raise UserError(f'"{name}" is stored twice', where=str(path), remedy="fetch the folder again")
                facts = file.get_slice(name)
                if facts.get_dtype() not in DTYPES:
                    raise UserError(
                        f'"{name}" is stored as {facts.get_dtype()}', where=str(path),
                        remedy=f"use weights in one of {', '.join(DTYPES)}",
                    )  # fmt: skip
                dtype = DTYPES[facts.get_dtype()]
                self._tensors[name] = StoredTensor(self, name, path, tuple(facts.get_shape()), dtype)

    def opened(self, path: Path) -> Any:
        """Returns the open file; the one that was open before is closed.

        Raises:
            UserError: it is missing or damaged.
        """
        if path != self._path:
            self.close()
            try:
                self._file = safe_open(str(path), framework="pt", device="cpu").__enter__()
            except (SafetensorError, OSError) as error:
                raise UserError(f"damaged weights ({error})", where=str(path), remedy="fetch the file again") from error
            self._path = path
        return self._file

    def close(self) -> None:
        """Closes the open file, if any; a later read opens it again."""
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._file = self._path = None

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class ComputedTensors(Mapping[str, Any]):
    """Tensors that are made when asked for, and not kept.

    Args:
        names: which there are, in order.
        make: name -> the tensor, or anything sliced like one.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Any]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TensorFile:
    """A safetensors file written tensor by tensor, in any order; it gets its name when all of them are in it.

    Args:
        path: the file; until it is whole it is called `path`.partial.
        tensors: the name, shape and dtype of each tensor.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.partial")
        self._tensors = dict(tensors)
        self._places: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # The widest dtype first keeps every tensor aligned, as the format's own writer does.
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
            self._places[name], end = end, end + shape.numel() * dtype.itemsize
            offsets = [self._places[name], end]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = open(self._partial, "wb")  # noqa: SIM115  (closed by `close`)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, which is on the CPU.

        Raises:
            ValueError: it is of another shape or dtype, unknown, or written before.
        """
        if name not in self._places or (tensor.shape, tensor.dtype) != self._tensors[name]:
            raise ValueError(f'"{name}" {tuple(tensor.shape)} {tensor.dtype} has no place in {self._path.name}')
        self._file.seek(self._start + self._places.pop(name))
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        if not self._places:
            self.close()
            os.replace(self._partial, self._path)

    def close(self) -> None:
        """Ends writing; a file that is not whole keeps its `.partial` name."""
        self._file.close()


def whole(stored: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Returns all of a tensor that a mapping gave, converted to `dtype` unless that is None."""
    value: Tensor = stored if isinstance(stored, Tensor) else stored.read()
    return value if dtype is None else value.to(dtype)
