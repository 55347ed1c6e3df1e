"""A stage's configuration to a running stage: data, model, engine, objective, loop, export. The composition root."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from contentv.base import device as devices
from contentv.base.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, StoppedBySignalError, UserError
from contentv.base.lock import lock_folder
from contentv.base.log import get_logger, is_main_process
from contentv.base.types import Bucket, Objective, TextCond, TokenCounts
from contentv.config.graph import config_hash
from contentv.config.inputs import (
    Weights,
    check_data_fits,
    check_reward_folders,
    choose_buckets,
    clip_fps,
    existing_folder,
    open_data,
    resolve_weights,
)
from contentv.config.noise import watch_noise
from contentv.config.schema import TrainRoot
from contentv.config.starting import lora_facts, model_of_shapes, open_weights, starting_values
from contentv.data import DatasetSource, JoinedDatasets, open_dataset
from contentv.data.weighting import KeepWeighted
from contentv.diffusion.timesteps import build_sampler, build_weight
from contentv.diffusion.tqd import keep_probability
from contentv.engine import checkpoint
from contentv.engine.frozen import frozen_model
from contentv.engine.zero import ZeroEngine, build_engine
from contentv.models.io import write_transformer
from contentv.models.lora_files import write_lora
from contentv.models.mmdit import MMDiT, flops_per_forward
from contentv.models.reward import CLIPReward
from contentv.models.vae import VideoVAE
from contentv.objectives.flow import FlowMatching
from contentv.objectives.reward import RewardConfig, RewardObjective
from contentv.parallel.collectives import barrier, start, stop
from contentv.parallel.mesh import Mesh, build_mesh
from contentv.train.loop import LoopConfig, Progress, run
from contentv.train.manifest import MANIFEST, StageManifest, check_predecessor
from contentv.train.metrics import JsonlSink, MetricSink, Recorder, TensorBoardSink, WandbSink
from contentv.train.pipeline import write_status


@dataclass(frozen=True)
class Plan:
    """A checked stage: nothing has been built or written yet."""

    root: TrainRoot
    info: JoinedDatasets
    buckets: list[Bucket]
    weights: Weights
    manifest: StageManifest  # what this stage will have produced


def plan_stage(root: TrainRoot) -> Plan:
    """Returns a stage whose configuration, data and predecessor fit together.

    Raises:
        UserError: something is missing or does not fit.
    """
    info = open_data(root.data)
    check_data_fits(root.model, info)
    buckets = choose_buckets(root, info)
    weights = resolve_weights(root.init, root.init_weights)
    manifest = StageManifest(
        stage=root.stage.name,
        geometry=asdict(root.model),
        vae_fingerprint=info.vae.fingerprint,
        text_fingerprint=info.text.fingerprint,
        shift=root.timestep.shift,
        buckets=[bucket.name for bucket in buckets],
        fps=clip_fps(info),
        steps=root.train.max_steps,
        config_hash=config_hash(root),
        consumed={
            "init": root.init,
            "init_stage": weights.manifest.stage,
            "data": root.data.path,
            "data_hash": info.fingerprint,
        },
        weights={"ema": "export/ema", "raw": "export/raw"} if root.optim.ema_decay > 0 else {"raw": "export/raw"},
        lora=lora_facts(root, weights),
        vae_path=_absolute(root.vae.path),
        text_path=_absolute(root.text.path),
    )
    check_predecessor(root.stage, manifest, weights.manifest, root.init)
    check_reward_folders(root)
    if root.stage.objective == "reward" and root.reward.shift not in (RewardConfig().shift, root.timestep.shift):
        raise UserError(
            f"reward.shift={root.reward.shift:g} differs from timestep.shift={root.timestep.shift:g}, and rollouts "
            "follow the trained shift", where="reward.shift", remedy="leave it out, and set timestep.shift=",
        )  # fmt: skip
    return Plan(root, info, buckets, weights, manifest)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def micro_batch_size(root: TrainRoot, dp: int, tokens: int) -> int:
    """Returns the clips per forward on a rank: as asked, or the most that `train.max_tokens` allows.

    Where `train.global_tokens` makes a bucket's steps larger by a whole factor, its forwards are larger by it too.

    Args:
        dp: data-parallel degree.
        tokens: video tokens of a clip times that factor, of the bucket with the most.

    Raises:
        UserError: the global batch does not divide by the data-parallel degree and the micro-batch.
    """
    total = root.train.global_batch_size
    if total % dp:
        raise UserError(
            f"a global batch of {total} does not divide over {dp} data-parallel ranks", where="train.global_batch_size",
            remedy=f"use {max(dp, total // dp * dp)} or {(total // dp + 1) * dp}",
        )  # fmt: skip
    local = total // dp
    asked = root.train.micro_batch_size
    if asked:
        if local % asked:
            raise UserError(
                f"{local} clips per rank do not divide into micro-batches of {asked}", where="train.micro_batch_size",
                remedy=f"use a divisor of {local}",
            )  # fmt: skip
        return asked
    most = local if not root.train.max_tokens else max(1, root.train.max_tokens // tokens)
    return max(size for size in range(1, local + 1) if local % size == 0 and size <= most)


def batch_multiples(config: LoopConfig, tokens: dict[str, int]) -> dict[str, int]:
    """Returns for each bucket how many times `global_batch_size` clips its steps take: what `global_tokens` allows.

    Args:
        tokens: bucket -> video tokens of a clip.
    """
    return {
        name: max(1, config.global_tokens // (config.global_batch_size * count)) if config.global_tokens else 1
        for name, count in tokens.items()
    }


def token_counts(root: TrainRoot, info: JoinedDatasets, bucket: Bucket) -> TokenCounts:
    """Returns the numbers of video and text tokens of a clip of a bucket."""
    _, t, h, w = info.latent_shape(bucket.name)
    patch = root.model.patch_size
    return TokenCounts(t * (h // patch) * (w // patch), info.text.num_tokens)


def build_objective(plan: Plan, null_text: TextCond, mesh: Mesh, device: torch.device) -> Objective:
    """Returns flow matching, or the reward objective with its frozen VAE, reward model and reference."""
    root = plan.root
    sampler, weight = build_sampler(root.timestep), build_weight(root.timestep)
    flow = FlowMatching(sampler, root.train.seed, null_text, root.text.dropout, weight)
    if root.stage.objective == "flow":
        return flow
    vae_path = existing_folder(plan.manifest.vae_path, "vae.path", "the VAE the dataset was made with")
    vae = VideoVAE.from_folder(vae_path).to(device)
    if vae.fingerprint != plan.info.vae.fingerprint:
        raise UserError(
            f"this VAE ({vae.fingerprint}) is not the dataset's ({plan.info.vae.fingerprint})",
            where=f"vae.path={vae_path}", remedy="name the VAE that the dataset was curated with",
        )  # fmt: skip
    reward = CLIPReward.from_folder(existing_folder(root.reward.path, "reward.path", "a reward model's folder")).to(
        device
    )
    reference = None
    if root.reward.kl_weight > 0:
        with torch.device("meta"):
            model = MMDiT(root.model)
        weights = open_weights(root, plan.weights).tensors  # where a LoRA is trained, its base
        reference = frozen_model(model, mesh, root.parallel, root.train.precision, device, weights=weights)
    config = replace(root.reward, shift=root.timestep.shift)
    return RewardObjective(vae, reward, reference, config, root.train.seed, flow, null_text)


def build_source(plan: Plan, mesh: Mesh, micro: int, multiples: dict[str, int]) -> DatasetSource:
    """Returns the resumable stream of this rank's micro-batches."""
    root = plan.root
    return open_dataset(
        root.data.path,
        reader=mesh.reader,
        global_batch_size=root.train.global_batch_size,
        micro_batch_size=micro,
        seed=root.train.seed,
        buckets=[bucket.name for bucket in plan.buckets],
        bucket_weights=root.data.bucket_weights or None,
        batch_multiples=multiples,
        image_ratio=root.data.image_ratio,
        source_weights=root.data.source_weights,
        source_max_epochs=root.data.source_max_epochs,
        keep_probability=keep_probability if root.data.quality_dropout else None,
        prefetch=root.data.prefetch,
        workers=root.data.workers,
        storage=root.data,
        quality_mode=root.data.quality_mode,
        quality_scope=root.data.quality_scope,
        max_bad_samples=root.data.max_bad_samples,
        max_bad_fraction=root.data.max_bad_fraction,
        quarantine_path=Path(root.out) / "quarantine.jsonl" if mesh.sp_rank == mesh.tp_rank == 0 else None,
    )


def build_sinks(root: TrainRoot, step: int) -> list[MetricSink]:
    """Returns metrics.jsonl and the logger asked for."""
    out = Path(root.out)
    sinks: list[MetricSink] = [JsonlSink(out / "metrics.jsonl", step)]
    if root.logger == "wandb":
        sinks.append(WandbSink(out, root.wandb.project, root.wandb.mode, asdict(root)))
    elif root.logger == "tensorboard":
        sinks.append(TensorBoardSink(out))
    return sinks


def run_stage(root: TrainRoot) -> None:
    """Runs a stage to its end: from the predecessor's weights, or from the newest checkpoint of its run folder.

    Raises:
        UserError: something the user can fix; how the run ended is also written to `status.json`.
        StoppedBySignalError: stopped by a signal after saving.
    """
    out = Path(root.out)
    code, message, lock = EXIT_FAILED, "failed", -1
    try:
        plan = plan_stage(root)
        if (out / MANIFEST).is_file() and root.train.resume != "none" and _finished(plan, out):
            get_logger().info("nothing to do: %s is done (%d steps)", out, StageManifest.read(out).steps)
        else:
            if is_main_process():
                out.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(out, "training in this folder")
            _train(plan, out)
        code, message = EXIT_OK, "done"
    except UserError as error:
        code, message = EXIT_USER_ERROR, str(error)
        raise
    except StoppedBySignalError as error:
        code, message = EXIT_STOPPED, str(error)
        raise
    finally:
        if is_main_process():
            write_status(out, code, message)
        if code in (EXIT_OK, EXIT_STOPPED):
            barrier()  # torchrun ends every rank as soon as one exits: nobody leaves before rank 0 has written
        stop()
        if lock >= 0:
            os.close(lock)


def _finished(plan: Plan, out: Path) -> bool:
    done = StageManifest.read(out)
    if done.config_hash != plan.manifest.config_hash:
        raise UserError(
            "this folder holds a finished run of another configuration", where=f"out={out}",
            remedy="use another out=, or train.resume=none to start it anew",
        )  # fmt: skip
    return True


def _train(plan: Plan, out: Path) -> None:
    root = plan.root
    device = devices.select(root.device)
    torch.manual_seed(root.train.seed)
    rank, world = start(device)
    mesh = build_mesh(root.parallel, world, rank, heads=root.model.num_attention_heads)
    clip_tokens = {bucket.name: token_counts(root, plan.info, bucket).video for bucket in plan.buckets}
    multiples = batch_multiples(root.train, clip_tokens)
    micro = micro_batch_size(root, mesh.dp, max(clip_tokens[name] * multiples[name] for name in clip_tokens))
    if is_main_process():
        _open_folder(plan, out)
    accumulation = root.train.global_batch_size // (mesh.dp * micro)
    get_logger().info(
        "%s: %s, %s on %s, ZeRO-%d, %s, micro-batch %d x %d accumulated",
        root.stage.name, ", ".join(b.name for b in plan.buckets), mesh.describe(), device,
        root.parallel.zero_stage, root.train.precision, micro, accumulation,
    )  # fmt: skip
    resumed = _checkpoint(root, out, rank, device)
    engine = build_engine(
        model_of_shapes(root), mesh, root.optim, precision=root.train.precision, parallel=root.parallel,
        micro_batch_size=micro, accumulation_steps=accumulation, max_steps=root.train.max_steps, device=device,
        weights=starting_values(root, open_weights(root, plan.weights)), load_follows=resumed is not None,
    )  # fmt: skip
    source = build_source(plan, mesh, micro, multiples)
    objective = build_objective(plan, source.null_text.to(device), mesh, device)
    progress = Progress() if resumed is None else _resume(plan, resumed, engine, source)
    watch = watch_noise(root, source, out)
    recorder = Recorder(
        build_sinks(root, progress.step) if is_main_process() else [],
        JsonlSink(out / "ledger.jsonl", progress.step) if is_main_process() else None,
        root.stage.name, root.train.max_steps, progress.step, watch,
    )  # fmt: skip
    weighed = root.data.quality_weight
    batches = KeepWeighted(source, keep_probability, engine.sum_over_data_ranks) if weighed else source

    def save(now: Progress) -> None:
        folder = out / "checkpoints" / f"step-{now.step:08d}"
        extra = {"progress": asdict(now), "data": source.state_dict(), "config_hash": plan.manifest.config_hash,
                 "lora": plan.manifest.lora}  # fmt: skip
        engine.save(folder, extra, keep=root.train.keep_checkpoints)

    def tokens(bucket: Bucket) -> int:
        return clip_tokens[bucket.name]

    def flops(bucket: Bucket) -> int:
        passes = 3 if root.lora.rank == 0 else 2  # frozen weights have no gradients to compute
        return passes * flops_per_forward(root.model, token_counts(root, plan.info, bucket))

    try:
        ended = run(
            engine, batches, objective, root.train, recorder, progress=progress, save=save, tokens_per_clip=tokens,
            flops_per_clip=flops, peak_flops=devices.peak_flops(device) * world, stage=root.stage.name,
        )  # fmt: skip
    finally:
        recorder.close()
        source.close()
    export(engine, replace(plan, manifest=replace(plan.manifest, steps=ended.step)), out)


def _open_folder(plan: Plan, out: Path) -> None:
    """Writes the run's configuration; `train.resume=none` drops the records of an earlier run in the folder."""
    if plan.root.train.resume == "none":
        for name in (MANIFEST, "metrics.jsonl", "ledger.jsonl"):
            (out / name).unlink(missing_ok=True)
    OmegaConf.save(OmegaConf.structured(plan.root), out / "config.yaml")


def _checkpoint(root: TrainRoot, out: Path, rank: int, device: torch.device) -> Path | None:
    """Returns the checkpoint that a configuration asks to go on from, if any, the same on every rank."""
    if root.train.resume == "none":
        return None
    if root.train.resume == "auto":
        return checkpoint.newest(out / "checkpoints", rank, device)
    return existing_folder(root.train.resume, "train.resume", "a checkpoint folder, auto or none")


def _resume(plan: Plan, folder: Path, engine: ZeroEngine, source: Any) -> Progress:
    """Loads a checkpoint and returns where it stands."""
    extra = engine.load(folder)
    trained_on = extra.get("lora") or {}
    if trained_on.get("base") != plan.manifest.lora.get("base"):
        raise UserError(
            f"the LoRA in it was trained on {trained_on.get('base')}, and init= has {plan.manifest.lora.get('base')}",
            where=str(folder), remedy="use the init= that the run began with, or train.resume=none",
        )  # fmt: skip
    source.load_state_dict(extra["data"])
    get_logger().info("going on from %s", folder)
    return Progress(**extra["progress"])


def export(engine: ZeroEngine, plan: Plan, out: Path) -> None:
    """Writes the EMA and the raw weights as diffusers does, then `stage.json`; every rank calls it.

    They are transformer folders, or of a stage that trained a LoRA the LoRA.
    """
    for which, folder in plan.manifest.weights.items():
        stream = engine.state_tensors(ema=which == "ema")
        if is_main_process() and plan.manifest.lora:
            write_lora(stream, out / folder, plan.root.lora)
        elif is_main_process():
            write_transformer(stream, out / folder, plan.root.model, dtype=torch.float32)
        else:
            for _ in stream:  # gathering a parameter takes every rank
                pass
    if is_main_process():
        plan.manifest.write(out)
        get_logger().info("weights exported to %s", out / "export")
