"""A LoRA added to a transformer's weights, and taken out again, one tensor at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contentv.base.errors import UserError
from contentv.models.io import TransformerSource
from contentv.models.lora_config import A, B, LoRA
from contentv.models.stored import ComputedTensors, whole


def add_low_rank(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns weight + scale b a in `dtype` on the CPU: computed in fp64 (which some accelerators lack), rounded once.

    Args:
        weight: (out, in).
        a: (rank, in).
        b: (out, rank).
        scale: any number.
        dtype: of what comes back.
    """
    wide = [t.to("cpu", torch.float64) for t in (weight, b, a)]
    return torch.addmm(*wide, alpha=scale).to(dtype)


class MergedTensor:
    """One tensor of a merged transformer, made when it is read; shape and dtype are known before."""

    def __init__(self, owner: Merge, name: str, shape: torch.Size) -> None:
        self.name, self.shape, self.dtype = name, shape, owner.dtype
        self._owner = owner

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self._owner.part(self.name, index)
        return part

    def read(self) -> Tensor:
        """Returns the whole tensor on the CPU."""
        return self._owner.make(self.name)


class Merge:
    """Makes the tensors of a merged transformer, and keeps the one that was sliced last.

    Its readers take one tensor after another, each in several slices: a slice of an adapted tensor costs all of it.
    """

    def __init__(self, source: TransformerSource, lora: LoRA, scale: float, dtype: torch.dtype) -> None:
        self.source, self.lora, self.scale, self.dtype = source, lora, scale, dtype
        self._last: tuple[str, Tensor] | None = None

    def tensor(self, name: str) -> MergedTensor:
        """Returns a tensor that has not been made."""
        return MergedTensor(self, name, torch.Size(self.source.tensors[name].shape))

    def part(self, name: str, index: Any) -> Tensor:
        """Returns a slice of a tensor."""
        if self._layer(name) is None:
            stored: Tensor = self.source.tensors[name][index]
            return stored.to(self.dtype)
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next is made, not after
            self._last = (name, self.make(name))
        return self._last[1][index]

    def make(self, name: str) -> Tensor:
        """Returns a whole tensor."""
        weight, layer = whole(self.source.tensors[name]), self._layer(name)
        if layer is None:
            return weight.to(self.dtype)
        a, b = (whole(self.lora.tensors[layer + part]) for part in (A, B))
        out = add_low_rank(weight, a, b, self.scale * self.lora.scales[layer], self.dtype)
        if not bool(torch.isfinite(out).all()):
            raise UserError(
                f"with {layer} merged there are values in {self.dtype} that are not finite", where=self.lora.origin,
                remedy="the LoRA or the model is damaged, or its values need another dtype",
            )  # fmt: skip
        return out

    def _layer(self, name: str) -> str | None:
        module, _, kind = name.rpartition(".")
        return module if kind == "weight" and module in self.lora.ranks else None


def merged(
    source: TransformerSource, lora: LoRA, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> TransformerSource:
    """Returns the weights with the LoRA added; each tensor is computed, in fp64 rounded once, when it is read.

    Args:
        source: the weights that the LoRA was trained on.
        lora: the LoRA.
        scale: multiplies the LoRA's own alpha / rank; 1 = as trained.
        dtype: of the tensors that come back, of all of them.

    Raises:
        UserError: the LoRA is another model's.
    """
    lora.check_fits(source)
    merge = Merge(source, lora, scale, dtype)
    origin = f"{source.origin} with {lora.origin}"
    return TransformerSource(source.config, ComputedTensors(source.tensors, merge.tensor), origin)


def unmerged(
    source: TransformerSource, lora: LoRA, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> TransformerSource:
    """Returns the weights with the LoRA taken out again: what it was merged into, as nearly as the file can say.

    Let M be a merged weight, kept in fp32, and W what it was made of. What is computed here is off by at most
    2^-24 |M|, the rounding of M (the fp64 arithmetic adds far less). Rounded to W's own dtype of p bits (8 in bf16, 11
    in fp16) it is W itself wherever |W| >= 2^(p - 22) |M|; where W is smaller still, M does not hold all of it.

    Args:
        source: weights that hold the LoRA.
        lora: the LoRA.
        scale: as it was merged.
        dtype: of the tensors that come back, of all of them.

    Raises:
        UserError: the LoRA is another model's.
    """
    return merged(source, lora, -scale, dtype)
