"""A pipeline configuration to launchable stages; every stage's configuration is checked before the first starts."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from contentv.base.errors import UserError
from contentv.config.compose import load_config
from contentv.config.inputs import check_reward_folders, data_paths, resolve_weights
from contentv.config.schema import PipelineConfig, TrainRoot
from contentv.train.manifest import MANIFEST
from contentv.train.pipeline import StageRun, local_launcher

# Keys that change where or how a run is shown, not what it computes.
NOT_HASHED = ("out", "init", "logger", "wandb", "device")
NOT_HASHED_LOOP = ("resume", "log_every", "checkpoint_every", "keep_checkpoints")
NOT_HASHED_DATA = ("workers", "cache_dir", "cache_bytes", "retries", "retry_s", "timeout_s")
# Keys that came later: left at their defaults, a run has the digest that it had before there were any.
LATER = {
    "parallel": ("ring", "sequence_norms", "offload_activations", "hpz", "compile"),
    "train": ("global_tokens",),
    "data": ("image_ratio", "source_weights", "source_max_epochs", "quality_weight", "quality_scope"),
    "timestep": ("alpha", "beta", "levels", "missing", "loss_weight", "snr_gamma"),
}


def config_hash(root: TrainRoot) -> str:
    """Returns a digest of everything in a configuration that changes what a run computes."""
    values = {key: value for key, value in asdict(root).items() if key not in NOT_HASHED}
    if root.lora.rank == 0:  # a run of the whole model has the digest that it had before there were LoRAs
        del values["lora"]
    del values["parallel"]["exchange"]  # the same numbers, sent one after another or together
    for group, left_out in (("train", NOT_HASHED_LOOP), ("data", NOT_HASHED_DATA)):
        for key in left_out:
            del values[group][key]
    defaults = asdict(TrainRoot())
    for group, keys in LATER.items():
        for key in keys:
            if values[group][key] == defaults[group][key]:
                del values[group][key]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def launcher_of(config: PipelineConfig) -> list[str]:
    """Returns the command that stages are launched with.

    Raises:
        UserError: a launcher is asked for in a pipeline that was itself launched.
    """
    if "RANK" in os.environ:
        if config.launcher:
            raise UserError(
                "the pipeline has been started once per process already", where="pipeline.launcher",
                remedy="leave it out, or start the pipeline itself without torchrun or srun",
            )  # fmt: skip
        return [sys.executable]
    return shlex.split(config.launcher) if config.launcher else local_launcher(config.nproc)


def build_graph(config: PipelineConfig, out: Path) -> list[StageRun]:
    """Returns the stages in order, each with the overrides it will be launched with.

    Raises:
        UserError: the graph is empty, a name stands twice, a predecessor is unknown or comes later, or a stage's
            configuration is wrong.
    """
    if not config.stages:
        raise UserError(
            "the pipeline has no stages", where="pipeline.stages", remedy="choose a pipeline= that has some"
        )
    runs: list[StageRun] = []
    for node in config.stages:
        name = node.name or node.stage
        known = [run.name for run in runs]
        if name in known:
            raise UserError(f'stage "{name}" stands twice', where="pipeline.stages", remedy="give each its own name")
        if node.init and node.init not in known:
            raise UserError(
                f'stage "{name}" starts from "{node.init}", which no stage before it is called',
                where="pipeline.stages",
                remedy=f"use one of: {', '.join(known) or '(none: it is the first)'}",
            )  # fmt: skip
        overrides = [f"stage={node.stage}", *config.overrides, *config.extra, *node.overrides, f"out={out / name}"]
        if node.init:
            overrides.append(f"init={out / node.init}")
        elif config.init:
            overrides.append(f"init={config.init}")
        root = load_config("train", overrides)
        runs.append(StageRun(name, out / name, tuple(overrides), config_hash(root)))
    return runs


def check_inputs(runs: Sequence[StageRun]) -> None:
    """Looks for what the stages that are not done will read, so that weeks into a pipeline nothing turns out missing.

    Raises:
        UserError: a stage's dataset, weights, VAE or reward model is not there; the message names the stage.
    """
    made_here = {str(run.out) for run in runs}
    for run in runs:
        if (run.out / MANIFEST).is_file():
            continue
        root = load_config("train", list(run.overrides))
        try:
            data_paths(root.data)
            check_reward_folders(root)
            if root.init not in made_here:
                resolve_weights(root.init, root.init_weights)
        except UserError as error:
            remedy = f"{error.remedy}; for all stages at once: 'pipeline.extra=[KEY=VALUE,...]'"
            raise UserError(error.what, where=f"stage {run.name}, {error.where}", remedy=remedy) from None
