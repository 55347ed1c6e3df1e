"""The adapted linear layer: peft's, with a forward and a merge of our own.

This module imports peft, which takes seconds: it is imported where a model gets its LoRA, not before.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from peft.tuners.lora import Linear
from torch import Tensor

from contentv.models.lora_config import ADAPTER
from contentv.models.lora_merge import add_low_rank


class LoRALinear(Linear):
    """peft's adapted linear layer; reads each parameter in its own module's forward only, and un-merges exactly."""

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        """Returns base(x) + scale B A x, in the dtype of the base's output."""
        out: Tensor = self.base_layer(x)
        if self.merged or self.disable_adapters:
            return out
        down, up = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        # By iteration: naming another module's weight would make ZeRO-3 keep it gathered (peft's forward does).
        dtype = next(down.parameters()).dtype
        added: Tensor = up(down(x.to(dtype))) * self.scaling[ADAPTER]
        return (out + added).to(out.dtype)

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        """Adds the LoRA to the weight; the weight itself is kept aside, whole, for `unmerge`."""
        if self.merged:
            return
        weight = self.base_layer.weight
        self._kept = weight.data
        a, b = self.lora_A[ADAPTER].weight.data, self.lora_B[ADAPTER].weight.data
        weight.data = add_low_rank(weight.data, a, b, self.scaling[ADAPTER], weight.dtype).to(weight.device)
        self.merged_adapters.append(ADAPTER)

    def unmerge(self) -> None:
        """Puts back the weight that `merge` kept: the same bits."""
        if not self.merged:
            return
        self.base_layer.weight.data = self._kept
        del self._kept
        self.merged_adapters.clear()
