"""Weights wherever they lie: folders of SD3, SD3.5 and ContentV, runs, checkpoints, with a LoRA or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from contentv.base.errors import UserError
from contentv.config.inputs import existing_folder, resolve_weights
from contentv.data import DatasetInfo
from contentv.engine import checkpoint_files as checkpoints
from contentv.models.io import TransformerSource, checked_source, open_transformer
from contentv.models.lora_config import A, LoRA, lora_name
from contentv.models.lora_files import read_lora
from contentv.models.mmdit import MMDiTConfig
from contentv.models.pipeline_folder import pipeline_root, read_shift
from contentv.train.manifest import MANIFEST, StageManifest

RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Source:
    """Weights and what is known of them.

    Attributes:
        weights: the transformer's; none has been read yet.
        manifest: how they were made; empty fields are unknown.
        root: the run or pipeline folder they belong to.
        what: for people.
        lora: a LoRA that was trained on them and is not in them.
    """

    weights: TransformerSource
    manifest: StageManifest
    root: Path
    what: str
    lora: LoRA | None = None


def open_source(path: str, which: str, key: str = "from") -> Source:
    """Returns the weights behind a pipeline folder, a transformer folder, a run folder or a checkpoint folder.

    Args:
        path: the folder, as the user typed it.
        which: ema or raw, for runs and checkpoints.
        key: the configuration key, for messages.

    Raises:
        UserError: the folder is none of these, or its weights are not those of one model.
    """
    folder = existing_folder(path, key, "a folder of SD3, SD3.5 or ContentV, a run, or a checkpoint")
    if (folder / checkpoints.MANIFEST).is_file() or folder.resolve().parent.name == "checkpoints":
        return _open_checkpoint(folder, which)
    if (folder / MANIFEST).is_file():
        return _open_run(folder, which, key)
    if (folder / RUN_CONFIG).is_file() or (folder / "checkpoints").is_dir():
        raise _unfinished(folder, key)
    folder = folder.resolve()
    found = resolve_weights(str(folder), which, key)
    assert found.folder is not None  # that is `init=none` alone
    root = pipeline_root(folder)
    manifest = replace(found.manifest, shift=read_shift(root))
    kind = "image model" if manifest.stage == "sd3" else "video model"
    return Source(open_transformer(found.folder), manifest, root, f"{kind} {root.name}")


def _unfinished(folder: Path, key: str) -> UserError:
    newest = checkpoints.newest_complete(folder / "checkpoints")
    if newest is None:
        return UserError(
            "this run has not finished and has no complete checkpoint", where=f"{key}={folder}",
            remedy="run its stage to the end",
        )  # fmt: skip
    return UserError(
        f"this run has not finished; its newest complete checkpoint is {newest.name}", where=f"{key}={folder}",
        remedy=f"run its stage to the end, or take the checkpoint: {key}={newest}",
    )  # fmt: skip


def _open_run(folder: Path, which: str, key: str) -> Source:
    manifest = StageManifest.read(folder)
    if which not in manifest.weights:
        raise UserError(
            f"this run has no {which} weights", where=f"{key}={folder}",
            remedy=f"use weights={next(iter(manifest.weights), 'raw')}",
        )  # fmt: skip
    exported, what = folder / manifest.weights[which], f"stage {manifest.stage}, {manifest.steps} steps, {which}"
    if not manifest.lora:
        return Source(open_transformer(exported), manifest, folder, what)
    return Source(_base(manifest.lora, exported), manifest, folder, f"{what} (LoRA)", read_lora(exported))


def _open_checkpoint(folder: Path, which: str) -> Source:
    run = folder.resolve().parent.parent
    stored = checkpoints.open_weights(folder, ema=which == "ema")
    config = _run_config(run)
    saved = checkpoints.read_manifest(folder)
    manifest = replace(_manifest(run, config), steps=int(saved["step"]))
    what = f"stage {manifest.stage}, checkpoint of step {manifest.steps}, {which}"
    facts = saved["extra"].get("lora")
    if not facts:
        return Source(checked_source(_model(run, config), stored, str(folder)), manifest, run, what)
    tensors = {lora_name(name): tensor for name, tensor in stored.items()}
    modules = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    rank, scale = int(facts["rank"]), float(facts["alpha"]) / int(facts["rank"])
    lora = LoRA(tensors, dict.fromkeys(modules, rank), dict.fromkeys(modules, scale), str(folder))
    return Source(_base(facts, folder), manifest, run, f"{what} (LoRA)", lora)


def _base(lora: dict[str, Any], where: Path) -> TransformerSource:
    """Returns the weights that a run trained its LoRA on."""
    base = Path(str(lora.get("base", "")))
    if not base.is_dir():
        raise UserError(
            f'the weights that this LoRA was trained on are no longer in "{base}"', where=str(where),
            remedy="bring that folder back",
        )  # fmt: skip
    return open_transformer(base)


def _run_config(run: Path) -> dict[str, Any]:
    path = run / RUN_CONFIG
    if not path.is_file():
        raise UserError(
            "a checkpoint does not say what model it is of: the config.yaml of its run does, and is missing",
            where=str(path), remedy="name the checkpoint inside its run's folder, from=RUN/checkpoints/step-...",
        )  # fmt: skip
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"unreadable ({error})", where=str(path), remedy="restore the file") from error
    if not isinstance(values, dict):
        raise UserError("is no configuration of a run", where=str(path), remedy="restore the file")
    return values


def _model(run: Path, config: dict[str, Any]) -> MMDiTConfig:
    try:
        return MMDiTConfig(**config["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"describes no model ({error})", where=str(run / RUN_CONFIG), remedy="restore it") from None


def _manifest(run: Path, config: dict[str, Any]) -> StageManifest:
    """Returns what a run would write on finishing, as far as its configuration tells."""
    if (run / MANIFEST).is_file():
        return StageManifest.read(run)

    def value(group: str, key: str, default: Any) -> Any:
        return (config.get(group) or {}).get(key, default)

    dataset = Path(value("data", "path", ""))
    info = DatasetInfo.load(dataset) if value("data", "path", "") and dataset.is_dir() else None
    return StageManifest(
        stage=value("stage", "name", "unknown"),
        geometry=dict(config.get("model") or {}),
        vae_fingerprint=info.vae.fingerprint if info else "",
        text_fingerprint=info.text.fingerprint if info else "",
        shift=float(value("timestep", "shift", 0.0)),
        consumed={"init": str(config.get("init", ""))},
        vae_path=str(value("vae", "path", "")),
        text_path=str(value("text", "path", "")),
    )


def lineage(source: Source) -> Iterator[tuple[str, Path]]:
    """Yields (what, folder) of a source and of everything it was trained from, as far as the folders still exist."""
    manifest, folder = source.manifest, source.root
    seen: set[Path] = set()
    while folder not in seen:
        yield manifest.stage, folder
        seen.add(folder)
        before = manifest.consumed.get("init", "")
        folder = Path(before).resolve()
        if not before or not folder.is_dir():
            return
        if (folder / MANIFEST).is_file():
            manifest = StageManifest.read(folder)
        else:
            folder = pipeline_root(folder)
            manifest = StageManifest(manifest.consumed.get("init_stage", "model"), {})
