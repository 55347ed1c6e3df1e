"""The aesthetic score: a head on CLIP's image features, as LAION's predictors are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from contentv.base.errors import UserError
from contentv.curation.scoring.clip_tower import ClipTower
from contentv.curation.scoring.model_folder import read_json, read_tensors, require_folder
from contentv.curation.scoring.view import ClipView

HEAD_WEIGHTS = "aesthetic_head.safetensors"
HEAD_CONFIG = "aesthetic_head.json"
ACTIVATIONS = ("none", "relu")


class Aesthetic:
    """The mean over a clip's pictures of a linear or multi-layer head on L2-normalised CLIP features.

    LAION's head of 2022 (768 -> 1024 -> 128 -> 64 -> 16 -> 1) has dropout but no activation between its layers; a head
    that has them says so in its JSON.
    """

    name = "aesthetic"
    meaning = "how much people like the pictures: a head on CLIP features"
    range = "about 1 .. 10 for LAION's heads"
    unit = ""
    kind = "plug-in"
    needs_time = False

    def __init__(self, tower: ClipTower, layers: list[tuple[Tensor, Tensor]], activation: str) -> None:
        self._tower, self._layers, self._activation = tower, layers, activation

    @classmethod
    def from_folder(cls, path: str | Path, device: str) -> Aesthetic:
        """Returns the scorer stored in a folder.

        Args:
            path: a CLIP vision model with its preprocessor_config.json; aesthetic_head.safetensors, whose matrices are
                named `weight`, or `NAME.<number>.weight` in the order of their numbers, with biases beside;
                aesthetic_head.json {"input_width": 768, "activation": "none" | "relu"}.
            device: where CLIP runs.

        Raises:
            UserError: something is missing or does not fit together.
        """
        folder = require_folder(path, "scoring.clip_aesthetic", "a CLIP vision model with an aesthetic head")
        config = read_json(folder / HEAD_CONFIG)
        activation = config.get("activation", "none")
        if activation not in ACTIVATIONS:
            raise UserError(f"activation={activation}", where=str(folder / HEAD_CONFIG), remedy="use none or relu")
        layers = _layers(read_tensors(folder / HEAD_WEIGHTS), folder / HEAD_WEIGHTS)
        tower = ClipTower.from_folder(folder, device, "scoring.clip_aesthetic")
        made = tower.features([np.zeros((8, 8, 3), np.uint8)]).shape[1]
        stated, head = config.get("input_width"), layers[0][0].shape[1]
        if not made == stated == head:
            raise UserError(
                f"CLIP gives features of width {made}, {HEAD_CONFIG} says {stated}, the head takes {head}",
                where=str(folder), remedy="put a head beside the CLIP model that it was trained on",
            )  # fmt: skip
        return cls(tower, layers, activation)

    @torch.inference_mode()
    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pictures."""
        values = torch.from_numpy(self._tower.features(clip.pictures))
        for number, (weight, bias) in enumerate(self._layers):
            if number and self._activation == "relu":
                values = functional.relu(values)
            values = functional.linear(values, weight, bias)
        return float(values.mean())


def _layers(tensors: dict[str, Tensor], where: Path) -> list[tuple[Tensor, Tensor]]:
    """Returns the head's matrices and biases in order, checked to form a chain that ends in one number."""
    weights = [name for name in tensors if name == "weight" or name.endswith(".weight")]
    layers = []
    for name in sorted(weights, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)]):
        bias = name.removesuffix("weight") + "bias"
        layers.append((tensors[name], tensors.get(bias, torch.zeros(tensors[name].shape[:1]))))
    fits = bool(layers) and all(w.ndim == 2 and b.shape == w.shape[:1] for w, b in layers)
    if fits:
        widths = [weight.shape[1] for weight, _ in layers[1:]] + [1]
        fits = [weight.shape[0] for weight, _ in layers] == widths
    if not fits or len({*tensors}) != len(weights) + sum(name.endswith("bias") for name in tensors):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise UserError(
            f"no chain of linear layers that ends in one number: {shapes}", where=str(where),
            remedy="store the head's weights and biases as layers.<number>.weight and layers.<number>.bias",
        )  # fmt: skip
    return layers
