"""What a run starts from: folders of weights, frozen encoders, datasets. Everything is checked first."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.config.schema import TrainRoot
from contentv.data import DataConfig, JoinedDatasets, is_url, read_metas
from contentv.models.io import read_config
from contentv.models.mmdit import MMDiTConfig
from contentv.models.pipeline_folder import read_shift
from contentv.train.manifest import MANIFEST, StageManifest

SD3_CLASS = "SD3Transformer2DModel"
VIDEO_CLASS = "SD3Transformer3DModel"


@dataclass(frozen=True)
class Weights:
    """Where a transformer's weights lie (None: random weights) and what is known about how they were made.

    Attributes:
        folder: the transformer's folder; of a run that trained a LoRA, the one the LoRA was trained on.
        manifest: the facts.
        lora: the folder of the LoRA that belongs to them, if the run trained one.
    """

    folder: Path | None
    manifest: StageManifest
    lora: Path | None = None


def existing_folder(path: str, key: str, what: str) -> Path:
    """Returns the folder a key names.

    Raises:
        UserError: the key is empty, or there is no such folder.
    """
    if not path:
        raise UserError(f"{key} is not set", where=key, remedy=f"name {what}, {key}=DIR")
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f'"{path}" is not a folder', where=key, remedy=f"name {what}")
    return folder


def resolve_weights(path: str, which: str, key: str = "init") -> Weights:
    """Returns the transformer folder behind a run folder, a pipeline folder or a transformer folder.

    Args:
        path: the folder, or `none` for random weights.
        which: ema or raw, for run folders.
        key: the configuration key, for messages.

    Raises:
        UserError: the folder is none of these.
    """
    if path == "none":
        return Weights(None, StageManifest("none", {}))
    folder = existing_folder(path, key, "a diffusers folder, a run folder, or none")
    if (folder / MANIFEST).is_file():
        manifest = StageManifest.read(folder)
        if which not in manifest.weights:
            raise UserError(
                f"this run has no {which} weights (it has: {', '.join(manifest.weights)})", where=str(folder),
                remedy="choose another with init_weights= (train) or weights= (sample)",
            )  # fmt: skip
        own = folder / manifest.weights[which]
        if not manifest.lora:
            return Weights(own, manifest)
        base = existing_folder(str(manifest.lora.get("base", "")), key, f"the weights that the LoRA in {own} is for")
        return Weights(base, manifest, own)
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        StageManifest.read(folder)  # says that the run has not finished
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (inner / "config.json").is_file():
        raise UserError(
            "holds no transformer (no config.json, no transformer/ inside, no stage.json)", where=f"{key}={path}",
            remedy="name a diffusers folder (SD3, SD3.5, ContentV) or a finished run",
        )  # fmt: skip
    raw = json.loads((inner / "config.json").read_text(encoding="utf-8"))
    stages = {SD3_CLASS: "sd3", VIDEO_CLASS: "diffusers"}
    if raw.get("_class_name") not in stages:
        raise UserError(
            f'config.json is of class "{raw.get("_class_name")}"', where=str(inner),
            remedy=f"a transformer of class {SD3_CLASS} or {VIDEO_CLASS} is needed",
        )  # fmt: skip
    stage, geometry = stages[raw["_class_name"]], asdict(read_config(inner))
    return Weights(inner, StageManifest(stage, geometry, shift=read_shift(folder)))


def check_fingerprint(what: str, found: str, trained: str, key: str) -> None:
    """Refuses a part that is not the one a model was trained with; an empty `trained` is not known and passes.

    Raises:
        UserError: they differ.
    """
    if trained and found != trained:
        raise UserError(
            f"this {what} ({found}) is not the one the model was trained with ({trained})", where=key,
            remedy="name the folder that the dataset was curated with",
        )  # fmt: skip


def open_data(data: DataConfig) -> JoinedDatasets:
    """Returns the dataset or datasets that `data.path` names.

    Raises:
        UserError: there is none, or several do not fit together.
    """
    return JoinedDatasets.load(data_paths(data), data)


def data_paths(data: DataConfig) -> list[str]:
    """Returns the folders and addresses that `data.path` names.

    Raises:
        UserError: it is empty, or a folder on this machine is not there.
    """
    paths = data.path if isinstance(data.path, list) else [data.path]
    for path in paths:
        if not is_url(path) and not str(path).startswith("file://"):
            existing_folder(path, "data.path", "a dataset made by `contentv curate`")
    return paths


def check_reward_folders(root: TrainRoot) -> None:
    """Raises a UserError if the objective is a reward and its VAE or reward model is not there."""
    if root.stage.objective == "reward":
        existing_folder(root.vae.path, "vae.path", "the VAE the dataset was made with")
        existing_folder(root.reward.path, "reward.path", "a reward model's folder")


def choose_buckets(root: TrainRoot, info: JoinedDatasets) -> list[Bucket]:
    """Returns the buckets a stage trains on: `data.buckets`, or those `stage.buckets` describes, smallest first.

    Raises:
        UserError: the dataset has none of them.
    """
    there = sorted((Bucket.parse(name) for name in info.bucket_samples), key=lambda b: b.frames * b.height * b.width)
    if root.data.buckets:
        wanted = [Bucket.parse(name) for name in root.data.buckets]
        missing = [b.name for b in wanted if b not in there]
        if missing:
            raise UserError(
                f"the dataset has no bucket {', '.join(missing)}", where="data.buckets",
                remedy=f"it has: {', '.join(b.name for b in there)}",
            )  # fmt: skip
        return wanted
    video = [b for b in there if b.frames > 1]
    choices = {
        "image": [b for b in there if b.frames == 1],
        "lowest": video[:1],
        "highest": video[-1:],
        "video": video,
        "all": there,
    }
    chosen = choices[root.stage.buckets]
    if not chosen:
        raise UserError(
            f"the dataset has no clips for stage {root.stage.name} (stage.buckets={root.stage.buckets}; "
            f"it has: {', '.join(b.name for b in there) or 'nothing'})",
            where=f"data.path={root.data.path}",
            remedy="curate again with a fitting bucket, or name one with data.buckets=[...]",
        )
    return chosen


def clip_fps(joined: JoinedDatasets) -> float:
    """Returns the frame rate of the first video clip (0 when a dataset has none among its first thousand)."""
    video = [name for name in joined.bucket_samples if Bucket.parse(name).frames > 1]
    first = (meta for info in joined.infos for meta in itertools.islice(read_metas(info, video), 1000))
    return next((float(meta["fps"]) for meta in first if meta.get("kind") == "video"), 0.0)


def check_data_fits(model: MMDiTConfig, info: JoinedDatasets) -> None:
    """Refuses a dataset whose latents or text embeddings do not have the model's widths.

    Raises:
        UserError: a width differs; the message names both.
    """
    for key, ours, theirs, what in (
        ("model.in_channels", model.in_channels, info.vae.latent_channels, "latent channels"),
        ("model.joint_attention_dim", model.joint_attention_dim, info.text.token_width, "text token width"),
        ("model.pooled_projection_dim", model.pooled_projection_dim, info.text.pooled_width, "pooled text width"),
    ):
        if ours != theirs:
            raise UserError(
                f"the dataset's {what} is {theirs}, the model's is {ours}", where=f"data.path={info.url}",
                remedy=f"use the model= this dataset was made for ({key}={theirs}), or curate again",
            )  # fmt: skip
