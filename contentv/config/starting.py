"""The transformer a stage trains: its shape, where its values come from, and which part of it is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.config.inputs import Weights
from contentv.config.schema import TrainRoot
from contentv.models.io import TransformerSource, adapt_image_transformer, initial_weights, open_transformer
from contentv.models.lora import adapted_weights, add_lora
from contentv.models.lora_files import read_lora
from contentv.models.lora_merge import merged
from contentv.models.mmdit import MMDiT


def open_weights(root: TrainRoot, weights: Weights) -> TransformerSource:
    """Returns the weights a stage starts from: those of its predecessor, or random ones. None is read yet.

    Those of a predecessor that trained a LoRA are its base with the LoRA merged in.
    """
    if weights.folder is None:
        get_logger().warning("init=none: the stage starts from random weights")
        return initial_weights(root.model, root.train.seed)
    if weights.manifest.stage == "sd3":
        return adapt_image_transformer(
            weights.folder, root.model, reinit_io=root.stage.reinit_io, seed=root.train.seed
        )  # fmt: skip
    source = open_transformer(weights.folder)
    expected, found = asdict(root.model), asdict(source.config)
    if expected != found:
        different = next(key for key in expected if expected[key] != found.get(key))
        raise UserError(
            f"the weights' {different} is {found.get(different)}, the model's is {expected[different]}",
            where=f"init={root.init}", remedy="choose the model= of these weights",
        )  # fmt: skip
    return source if weights.lora is None else merged(source, read_lora(weights.lora))


def model_of_shapes(root: TrainRoot) -> MMDiT:
    """Returns the model that a stage trains, on the meta device; with a LoRA all but that is frozen."""
    with torch.device("meta"):
        model = MMDiT(root.model)
    if root.lora.rank > 0:
        add_lora(model, root.lora, root.train.seed)
    return model


def starting_values(root: TrainRoot, source: TransformerSource) -> Mapping[str, Any]:
    """Returns the values of `model_of_shapes` by name: the source's, and those a LoRA starts from."""
    return adapted_weights(source, root.lora, root.train.seed) if root.lora.rank > 0 else source.tensors


def lora_facts(root: TrainRoot, weights: Weights) -> dict[str, Any]:
    """Returns what `stage.json` says of a stage's LoRA, or an empty dict for a stage that trains the whole model.

    Raises:
        UserError: a LoRA does not go with the rest of the configuration.
    """
    if root.lora.rank == 0:
        return {}
    problem = where = remedy = ""
    if root.parallel.tp > 1:
        problem, where = f"a LoRA cannot be trained with parallel.tp={root.parallel.tp}", "parallel.tp"
        remedy = "use parallel.tp=1, and parallel.sp= for more ranks per clip"
    elif weights.folder is None:
        problem, where, remedy = (
            "a LoRA needs weights to add to, and init=none has none",
            "init",
            "name a trained model",
        )
    elif weights.lora is not None:
        problem, where = (
            "the predecessor trained a LoRA, and this stage's would need a base of both",
            f"init={root.init}",
        )
        remedy = "merge that one first: contentv convert"
    elif root.stage.reinit_io:
        problem, where = "a LoRA cannot begin the patch embedding and the output layer anew", "stage.reinit_io"
        remedy = "use stage.reinit_io=false, or train the whole model (lora.rank=0)"
    if problem:
        raise UserError(problem, where=where, remedy=remedy)
    return {"base": os.path.abspath(str(weights.folder)), "rank": root.lora.rank, "alpha": root.lora.effective_alpha}
