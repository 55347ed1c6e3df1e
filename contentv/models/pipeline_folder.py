"""A whole pipeline folder: what lies beside a transformer so that diffusers and ContentV's published code load it.

    model_index.json   the parts and their classes      vae/            a Wan VAE
    transformer/       see `models.io`                  text_encoder*/  tokenizer*/  CLIP, CLIP, T5: those there are
    scheduler/         Euler steps and the shift        LICENSE*, NOTICE*, README.md

Parts are copied byte for byte. Only what a loader reads is taken over: JSON, vocabularies and safetensors, never a
pickle. A folder is written under another name and gets its own when it is complete.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from contentv.base.errors import UserError
from contentv.base.lock import lock_folder
from contentv.base.log import log_once
from contentv.models.folders import PICKLES, WEIGHTS, read_json, weight_files, write_json
from contentv.models.io import IMAGE_CLASS
from contentv.models.stored import StoredTensors

MODEL_INDEX = "model_index.json"
PIPELINE_CLASS = "ContentVPipeline"
VAE_CLASS = "AutoencoderKLWan"
SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
SCHEDULER_CONFIG = "scheduler_config.json"
TEXT_WEIGHTS = "model.safetensors"  # transformers' name
# The published transformer is no class of diffusers and is always given when its pipeline is loaded. diffusers then
# checks it against the class named here, and its check fails on classes of other modules (tried with 0.42): the base
# class of the published one passes. [derived: the published model_index.json was not seen]
TRANSFORMER_BASE = ("diffusers", IMAGE_CLASS)
CLIP = ("CLIPTextModelWithProjection", "CLIPTokenizer")
# text encoder -> (its class, its tokenizer's class, its tokenizer)
ENCODERS = {
    "text_encoder": (*CLIP, "tokenizer"),
    "text_encoder_2": (*CLIP, "tokenizer_2"),
    "text_encoder_3": ("T5EncoderModel", "T5TokenizerFast", "tokenizer_3"),
}
VOCABULARIES = ("*.json", "*.txt", "*.model")
LICENCES = ("license", "licence", "notice", "copying", "readme")
CARD = "README.md"


def pipeline_root(folder: Path) -> Path:
    """Returns the pipeline folder that a transformer folder is a part of, or the folder itself."""
    return folder.parent if (folder.parent / MODEL_INDEX).is_file() else folder


def read_shift(root: Path) -> float:
    """Returns the timestep shift a pipeline folder was saved with; 0 when it is unknown or depends on the size.

    Raises:
        UserError: the scheduler's config is damaged.
    """
    path = root / "scheduler" / SCHEDULER_CONFIG
    if not path.is_file():
        return 0.0
    config = read_json(path)
    if config.get("use_dynamic_shifting"):
        return 0.0
    shift = config.get("shift", 0.0)
    if not isinstance(shift, (int, float)) or isinstance(shift, bool) or shift < 0:
        raise UserError(f'shift is "{shift}"', where=str(path), remedy="fetch the file again")
    return float(shift)


def vae_files(folder: Path) -> list[Path]:
    """Returns the files of a Wan VAE: its config and safetensors weights, opened once.

    Raises:
        UserError: it is another class, a pickle, or damaged.
    """
    return _model_files(folder, VAE_CLASS, WEIGHTS, "use the vae folder of ContentV or of Wan 2.1")


def text_files(root: Path) -> dict[str, list[Path]]:
    """Returns folder name -> files of the text encoders and tokenizers below a folder.

    Raises:
        UserError: there is none, one is of another class, a pickle, or damaged, or has no tokenizer.
    """
    found: dict[str, list[Path]] = {}
    for name, (model_class, _, tokenizer) in ENCODERS.items():
        if not (root / name).is_dir():
            continue
        found[name] = _model_files(root / name, model_class, TEXT_WEIGHTS, "use the text encoders of SD3 or ContentV")
        found[tokenizer] = sorted({p for kind in VOCABULARIES for p in (root / tokenizer).glob(kind)})
        if not found[tokenizer]:
            raise UserError(f"no {tokenizer} for {name}", where=str(root), remedy="fetch both folders again")
    if not found:
        raise UserError("no text_encoder folder", where=str(root), remedy="name the folder that holds text_encoder/")
    return found


def _model_files(folder: Path, model_class: str, weights: str, remedy: str) -> list[Path]:
    config = read_json(folder / "config.json")
    found = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if found != model_class:
        raise UserError(f'a model of class "{found}", not {model_class}', where=str(folder), remedy=remedy)
    stored = weight_files(folder, weights)
    StoredTensors(stored).close()  # says so when a file is cut short
    left_out = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if left_out:
        log_once(f"{folder}: {', '.join(left_out)} left out (pickles)")
    index = folder / f"{weights}.index.json"
    return [folder / "config.json", *([index] if stored[0].name != weights else []), *stored]


def copy_files(files: list[Path], folder: Path) -> None:
    """Copies files into a folder, which is made; links are followed (the Hugging Face cache is full of them)."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)


def write_scheduler(folder: Path, shift: float) -> None:
    """Writes the scheduler: Euler steps on noise levels moved by `shift`, the same at every size."""
    config = {
        "_class_name": SCHEDULER_CLASS, "_diffusers_version": _diffusers(), "num_train_timesteps": 1000,
        "shift": shift, "use_dynamic_shifting": False,
    }  # fmt: skip
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(config, folder / "scheduler" / SCHEDULER_CONFIG)


def write_model_index(folder: Path) -> None:
    """Writes model_index.json for the parts that lie in a folder; text encoders that do not are null."""
    index: dict[str, Any] = {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": _diffusers(),
        "scheduler": ["diffusers", SCHEDULER_CLASS],
        "transformer": list(TRANSFORMER_BASE),
        "vae": ["diffusers", VAE_CLASS],
    }
    for name, (model_class, tokenizer_class, tokenizer) in ENCODERS.items():
        there = (folder / name).is_dir()
        index[name] = ["transformers", model_class] if there else [None, None]
        index[tokenizer] = ["transformers", tokenizer_class] if there else [None, None]
    write_json(index, folder / MODEL_INDEX)


def _diffusers() -> str:
    return importlib.metadata.version("diffusers")


def copy_licences(source: Path, folder: Path) -> list[str]:
    """Copies the licences, notices and model cards of a folder and returns their new names.

    The source folder's name joins a name that is taken, and the model card's: the new folder has a card of its own.
    """
    copied = []
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if not path.is_file() or not path.name.lower().startswith(LICENCES) or path.suffix not in ("", ".md", ".txt"):
            continue
        taken = path.name == CARD or (folder / path.name).exists()
        name = f"{path.stem}-{source.resolve().name}{path.suffix}" if taken else path.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        copied.append(name)
    return copied


@contextmanager
def whole_folder(to: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write into; it becomes `to` at the end, or vanishes when something fails.

    Args:
        to: absent or empty, or, with `overwrite`, a model folder, which is replaced.

    Raises:
        UserError: `to` is none of these, or the disk cannot be written.
    """
    to = Path(os.path.abspath(to))
    check_target(to, overwrite=overwrite)
    partial, old = to.with_name(f"{to.name}.partial"), to.with_name(f"{to.name}.old")
    lock = -1
    try:
        if partial.is_dir():  # left by a conversion that was killed, unless one is at work
            os.close(lock_folder(partial, "writing this folder"))
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        lock = lock_folder(partial, "writing this folder")
        yield partial
        _sync(partial)
        if to.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(to, old)
        os.rename(partial, to)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot be written ({error})", where=str(to), remedy="free space on the disk, or name another folder"
        ) from error
    finally:
        if lock >= 0:
            os.close(lock)
            shutil.rmtree(partial, ignore_errors=True)


def check_target(to: Path, *, overwrite: bool = False) -> None:
    """Refuses a target that `whole_folder` would.

    Raises:
        UserError: it is there already, or no model folder when it may be replaced.
    """
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not to.is_dir():
        raise UserError("is a file", where=f"to={to}", remedy="name a folder that does not exist yet")
    if not overwrite:
        raise UserError("is there already", where=f"to={to}", remedy="name another folder, or add overwrite=true")
    if not any((to / name).is_file() for name in (MODEL_INDEX, "config.json")):
        raise UserError(
            f"is no model folder ({MODEL_INDEX} or config.json is missing), and would be deleted", where=f"to={to}",
            remedy="name another folder",
        )  # fmt: skip


def _sync(folder: Path) -> None:
    """Waits until the disk has everything below a folder, so that a power cut cannot leave a hollow one."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
