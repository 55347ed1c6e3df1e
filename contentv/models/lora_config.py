"""What a LoRA is: which linear layers of the blocks it adapts, under which names, and with what strength.

A LoRA adds scale x B A to the weight of a linear layer: A is (rank, in), B is (out, rank), scale = alpha / rank.

Three kinds of names meet here. Ours, in files and in `LoRA`: "<module>.lora_A.weight". The model's own, once the
layers are in place: "<module>.lora_A.default.weight", and the layer's old weights become "<module>.base_layer.weight".
The transformer's published names: "<module>.weight".

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from contentv.base.errors import UserError, nearest
from contentv.models.io import TransformerSource, state_shapes
from contentv.models.mmdit import MMDiTConfig

ADAPTER = "default"
BLOCKS = "transformer_blocks."
A, B = ".lora_A.weight", ".lora_B.weight"
LIVE = {f".lora_A.{ADAPTER}.weight": A, f".lora_B.{ADAPTER}.weight": B}

# The linear layers of a block. The last block has no attn.to_add_out and no ff_context.
BLOCK_LINEARS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    "norm1.linear", "norm1_context.linear",
)  # fmt: skip
DEFAULT_TARGETS = BLOCK_LINEARS[:4]


@dataclass
class LoRAConfig:
    """Trains low-rank additions to some linear layers instead of the whole model."""

    rank: int = field(default=0, metadata={"help": "rank of the additions; 0 = train the whole model"})
    alpha: float = field(
        default=0.0, metadata={"help": "the additions are multiplied by alpha / rank; > 0, or 0 = as rank"}
    )
    targets: list[str] = field(
        default_factory=lambda: list(DEFAULT_TARGETS),
        metadata={"help": f"linear layers of a block, by the end of their names: {', '.join(BLOCK_LINEARS)}"},
    )

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"{self.rank} is negative", where="lora.rank", remedy="use 1 or more, or 0 for no LoRA")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise UserError(f"{self.alpha} is not possible", where="lora.alpha", remedy="use > 0, or 0 = as rank")
        if not self.targets:
            raise UserError(
                "no layers to adapt", where="lora.targets", remedy=f"name some of {', '.join(BLOCK_LINEARS)}"
            )
        for target in self.targets:
            if not any(_ends(name, target) for name in BLOCK_LINEARS):
                raise UserError(
                    f'"{target}" is no linear layer of a block', where="lora.targets",
                    remedy=nearest(target, BLOCK_LINEARS) or f"name some of {', '.join(BLOCK_LINEARS)}",
                )  # fmt: skip

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / rank."""
        return self.effective_alpha / self.rank

    @property
    def effective_alpha(self) -> float:
        """Alpha, where 0 has become the rank."""
        return self.alpha or float(self.rank)

    @property
    def layers(self) -> list[str]:
        """The linear layers of a block that the targets mean, by their whole names inside it."""
        return [name for name in BLOCK_LINEARS if any(_ends(name, target) for target in self.targets)]


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def adapted_layers(config: LoRAConfig, model: MMDiTConfig) -> dict[str, tuple[int, int]]:
    """Returns the module name -> (out, in) of every layer that a LoRA adapts, in the model's order.

    Raises:
        UserError: the rank is larger than a layer.
    """
    found: dict[str, tuple[int, int]] = {}
    wanted = set(config.layers)
    for name, shape in state_shapes(model).items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and name.startswith(BLOCKS) and module.split(".", 2)[2] in wanted:
            found[module] = (shape[0], shape[1])
            if config.rank > min(shape):
                raise UserError(
                    f"rank {config.rank} on {module} of {shape[0]} x {shape[1]}", where="lora.rank",
                    remedy=f"use at most {min(shape)}; 8 to 128 is usual",
                )  # fmt: skip
    return found


def lora_name(name: str) -> str:
    """Returns our name of a LoRA's tensor, from the name of a live model's parameter or from ours.

    Raises:
        ValueError: it is neither.
    """
    for live, ours in LIVE.items():
        if name.endswith(live):
            return name.removesuffix(live) + ours
    if not name.endswith((A, B)):
        raise ValueError(f'"{name}" is no tensor of a LoRA')
    return name


def base_name(name: str) -> str:
    """Returns the published name of a parameter of a model with LoRA layers that is not the LoRA's."""
    module, _, kind = name.rpartition(".")
    return f"{module.removesuffix('.base_layer')}.{kind}"


@dataclass(frozen=True)
class LoRA:
    """A LoRA: its tensors by name, and how strong each layer's addition is.

    Attributes:
        tensors: "<module>.lora_A.weight" (rank, in) and "<module>.lora_B.weight" (out, rank) -> the tensor, or
            anything sliced like one.
        ranks: module -> rank.
        scales: module -> what B A is multiplied by, alpha / rank; > 0.
        origin: for messages.
    """

    tensors: Mapping[str, Any]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    origin: str = "LoRA"

    def alpha(self, module: str) -> float:
        """Returns the alpha of a layer: scale x rank, without the rounding where a shorter number says the same."""
        alpha = self.scales[module] * self.ranks[module]
        short = float(f"{alpha:.12g}")
        return short if short / self.ranks[module] == self.scales[module] else alpha

    @property
    def config(self) -> LoRAConfig:
        """The rank and alpha that most layers have, and the layers of a block that are adapted anywhere."""
        pairs = Counter((rank, self.alpha(module)) for module, rank in self.ranks.items())
        rank, alpha = pairs.most_common(1)[0][0]
        ends = {module.split(".", 2)[2] for module in self.ranks if module.startswith(BLOCKS)}
        return LoRAConfig(rank, alpha, [name for name in BLOCK_LINEARS if name in ends] or list(DEFAULT_TARGETS))

    def check_fits(self, source: TransformerSource) -> None:
        """Checks that a transformer has the layers this LoRA adapts.

        Raises:
            UserError: it does not, or in other sizes; they are named.
        """
        absent = [m for m in self.ranks if len(self._weight_shape(source, m)) != 2]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(
                f"it adapts {absent[0]}{more}, no linear layer of this model", where=self.origin,
                remedy=f"use a LoRA of the model in {source.origin}",
            )  # fmt: skip
        for module, rank in self.ranks.items():
            out, width = self._weight_shape(source, module)
            shapes = tuple(self.tensors[module + A].shape), tuple(self.tensors[module + B].shape)
            if shapes != ((rank, width), (out, rank)):
                raise UserError(
                    f"it adapts {module} as {shapes[1][0]} x {shapes[0][1]}, and the model has {out} x {width}",
                    where=self.origin, remedy=f"use a LoRA of the model in {source.origin}",
                )  # fmt: skip

    @staticmethod
    def _weight_shape(source: TransformerSource, module: str) -> tuple[int, ...]:
        stored = source.tensors.get(f"{module}.weight")
        return () if stored is None else tuple(stored.shape)
