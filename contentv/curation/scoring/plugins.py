"""Scorers that are loaded on demand: models in local folders, and classes of installed packages.

Models are data: JSON, safetensors and ONNX, read without running anything in them. `scoring.plugins` does run code,
that of a class which the user names by hand; it must belong to an installed distribution, so that a file that lies in
the working or a data folder is never taken for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contentv.base.errors import UserError
from contentv.curation.scoring.config import ScoringConfig
from contentv.curation.scoring.scorer import KINDS, Scorer, ScorerInfo


@dataclass(frozen=True)
class ModelPlugin:
    """A kind of model that a key of `ScoringConfig` gives the place of; `infos` are the scores that come of it."""

    key: str
    load: Callable[[str, str], Scorer]  # (path, device)
    infos: tuple[ScorerInfo, ...]


def _aesthetic(path: str, device: str) -> Scorer:
    from contentv.curation.scoring.aesthetic import Aesthetic

    return Aesthetic.from_folder(path, device)


def _video_align(path: str, device: str) -> Scorer:
    from contentv.curation.scoring.video_align import VideoAlign

    return VideoAlign.from_folder(path, device)


def _ocr(path: str, device: str) -> Scorer:
    from contentv.curation.scoring.ocr import OcrTextArea

    return OcrTextArea.from_file(path)


def _info(name: str, meaning: str, range_: str, needs: str, unit: str = "") -> ScorerInfo:
    return ScorerInfo(name, meaning, range_, unit, "plug-in", needs, available=False)


_SIGMA = "standard deviations of VideoAlign's training set"
MODEL_PLUGINS = (
    ModelPlugin("clip_aesthetic", _aesthetic, (
        _info("aesthetic", "how much people like the pictures: a head on CLIP features",
              "about 1 .. 10 for LAION's heads", "scoring.clip_aesthetic=DIR"),
    )),
    ModelPlugin("video_align", _video_align, (
        _info("vq", "visual quality by VideoAlign (Qwen2-VL)", "about -3 .. 3", "scoring.video_align=DIR", _SIGMA),
        _info("mq", "motion quality by VideoAlign (Qwen2-VL)", "about -3 .. 3",
              "scoring.video_align=DIR, 2 frames", _SIGMA),
        _info("ta", "how well clip and caption agree, by VideoAlign (Qwen2-VL)", "about -3 .. 3",
              "scoring.video_align=DIR, a caption", _SIGMA),
    )),
    ModelPlugin("ocr", _ocr, (
        _info("text_area_ocr", "share of the picture under text of any kind, by a text detector", "0 none .. 1",
              "scoring.ocr=FILE.onnx"),
    )),
)  # fmt: skip


def load_plugins(config: ScoringConfig) -> list[Scorer]:
    """Returns the plug-in scorers that the configuration names, each loaded once per process.

    Raises:
        UserError: one cannot be loaded.
    """
    models = [
        _load_model(plugin.key, getattr(config, plugin.key), config.device)
        for plugin in MODEL_PLUGINS
        if getattr(config, plugin.key)
    ]
    return models + [_load_class(path) for path in config.plugins]


def plugin_infos(config: ScoringConfig) -> list[ScorerInfo]:
    """Returns a line for every plug-in; model ones are available if what the configuration names is there."""
    infos = []
    for plugin in MODEL_PLUGINS:
        path = getattr(config, plugin.key)
        there = bool(path) and Path(path).exists()
        infos += [ScorerInfo(**{**vars(info), "available": there}) for info in plugin.infos]
    for path in config.plugins:
        scorer = _load_class(path)
        infos.append(
            ScorerInfo(
                scorer.name, scorer.meaning, scorer.range, scorer.unit, scorer.kind, f"scoring.plugins=[{path}]", True
            )
        )
    return infos


@functools.lru_cache(maxsize=8)
def _load_model(key: str, path: str, device: str) -> Scorer:
    return next(plugin for plugin in MODEL_PLUGINS if plugin.key == key).load(path, device)


@functools.lru_cache(maxsize=32)
def _load_class(path: str) -> Scorer:
    module_name, _, class_name = path.partition(":")
    if module_name.partition(".")[0] not in importlib.metadata.packages_distributions():
        raise UserError(
            f"{module_name} belongs to no installed package", where="scoring.plugins",
            remedy="install the package that holds it (pip install ...)",
        )  # fmt: skip
    try:
        made: Any = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be made ({error})", where="scoring.plugins",
            remedy="name a class of the installed package that needs no arguments",
        ) from error  # fmt: skip
    if not isinstance(made, Scorer) or made.kind not in KINDS:
        raise UserError(
            f"{path} is no scorer", where="scoring.plugins",
            remedy=f"give it name, meaning, range, unit, kind ({', '.join(KINDS)}), needs_time and score(clip)",
        )  # fmt: skip
    return made
