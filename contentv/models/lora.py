"""LoRA: low-rank additions to the transformer's linear layers, trained by peft's layers, merged and un-merged.

This is the module to import from; the parts are `lora_config` (what a LoRA is), `lora_files` (on disk), `lora_layer`
(the adapted layer) and `lora_merge` (into the weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from contentv.base.rng import keyed_generator
from contentv.models.io import TransformerSource
from contentv.models.lora_config import ADAPTER, LIVE, A, B, LoRA, LoRAConfig, adapted_layers, base_name, lora_name
from contentv.models.lora_files import read_lora, save_lora, write_lora
from contentv.models.lora_merge import merged, unmerged
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.models.stored import ComputedTensors

__all__ = [
    "LoRA", "LoRAConfig", "adapted_layers", "adapted_weights", "add_lora", "base_name", "lora_initial", "lora_name",
    "lora_names", "merge_live", "merged", "read_lora", "save_lora", "unmerge_live", "unmerged",
    "write_lora",
]  # fmt: skip


def lora_initial(config: LoRAConfig, model: MMDiTConfig, seed: int) -> Mapping[str, Tensor]:
    """Returns what a LoRA starts from, by our names: A uniform in +-1/sqrt(in), B zero, fp32; each made when taken.

    Every tensor has a generator of its own, so that ranks and layouts agree without talking.

    Args:
        config: the LoRA's.
        model: the model's shape.
        seed: any integer.
    """
    layers = adapted_layers(config, model)

    def make(name: str) -> Tensor:
        out, width = layers[name.removesuffix(A).removesuffix(B)]
        if name.endswith(B):
            return torch.zeros(out, config.rank)
        bound = 1 / math.sqrt(width)
        generator = keyed_generator(seed, 0, 0, f"lora/{name}")
        return torch.empty(config.rank, width).uniform_(-bound, bound, generator=generator)

    return ComputedTensors((module + part for module in layers for part in (A, B)), make)


def add_lora(model: MMDiT, config: LoRAConfig, seed: int) -> None:
    """Puts LoRA layers into a model, in place, and freezes everything else; the output does not change yet.

    Names change: "<module>.weight" of an adapted layer becomes "<module>.base_layer.weight", and
    "<module>.lora_A.default.weight" and "<module>.lora_B.default.weight" join it, in fp32. On the meta device they
    have no values either: `adapted_weights` has them.

    Args:
        model: a whole model, not yet parallelized.
        config: the LoRA's; rank 1 or more.
        seed: any integer, see `lora_initial`.

    Raises:
        UserError: the rank is larger than a layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from contentv.models.lora_layer import LoRALinear

    if config.rank < 1 or lora_names(model):
        raise ValueError("a LoRA of rank 0 is none" if config.rank < 1 else "this model has a LoRA already")
    initial = lora_initial(config, model.config, seed)
    peft = LoraConfig(
        r=config.rank, lora_alpha=config.effective_alpha, target_modules=config.layers, init_lora_weights=False
    )
    peft._register_custom_module({nn.Linear: LoRALinear})
    model.requires_grad_(False)
    # On the meta device at first: peft draws from the global generator otherwise.
    inject_adapter_in_model(peft, model, ADAPTER, low_cpu_mem_usage=True)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            place = next(module.base_layer.parameters()).device
            for part, layer in ((A, module.lora_A[ADAPTER]), (B, module.lora_B[ADAPTER])):
                value = layer.weight if place.type == "meta" else initial[name + part].to(place)
                layer.weight = nn.Parameter(value)


def lora_names(model: nn.Module) -> dict[str, str]:
    """Returns the name of each LoRA parameter of a live model -> our name of it."""
    return {name: lora_name(name) for name, _ in model.named_parameters() if name.endswith(tuple(LIVE))}


def adapted_weights(source: TransformerSource, config: LoRAConfig, seed: int) -> Mapping[str, Any]:
    """Returns all weights of a model with LoRA layers under that model's own names: those given, and `lora_initial`.

    Args:
        source: the weights the LoRA is trained on.
        config: the LoRA's.
        seed: as for `add_lora`.
    """
    initial = lora_initial(config, source.config, seed)
    layers = adapted_layers(config, source.config)
    places: dict[str, tuple[Mapping[str, Any], str]] = {}
    for name in source.tensors:
        module, _, kind = name.rpartition(".")
        places[f"{module}.base_layer.{kind}" if module in layers else name] = (source.tensors, name)
    for module in layers:
        for live, ours in LIVE.items():
            places[module + live] = (initial, module + ours)

    def take(name: str) -> Any:
        tensors, theirs = places[name]
        return tensors[theirs]

    return ComputedTensors(places, take)


def merge_live(model: nn.Module) -> None:
    """Adds a live model's LoRA to its weights, in fp64 rounded once; the weights themselves are kept aside."""
    for layer in _adapted(model):
        layer.merge()


def unmerge_live(model: nn.Module) -> None:
    """Takes a live model's LoRA out of its weights again: bit for bit the weights before `merge_live`."""
    for layer in _adapted(model):
        layer.unmerge()


def _adapted(model: nn.Module) -> list[Any]:
    from contentv.models.lora_layer import LoRALinear

    return [module for module in model.modules() if isinstance(module, LoRALinear)]
