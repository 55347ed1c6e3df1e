"""What clips are scored by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from contentv.base.errors import UserError, nearest
from contentv.curation.scoring.names import CLASSICAL_MOTION, CLASSICAL_VISUAL, SCORER_NAMES


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ScoringConfig:
    """Which scores a clip gets, and which of them are its visual and its motion score."""

    skip: list[str] = field(
        default_factory=list,
        metadata={"help": "scorers that are left out, such as [text_area]; contentv curate --scorers lists them"},
    )
    visual: str = _doc("classical", "what becomes visual_raw: classical (focus, noise, exposure, contrast), or a "
                                    "score's name: aesthetic, vq, a plug-in's, given_<name>")  # fmt: skip
    motion: str = _doc("classical", "what becomes motion_raw: classical (optical flow), or a score's name: mq, a "
                                    "plug-in's, given_<name>")  # fmt: skip
    pictures: int = _doc(8, "frames of a clip that are looked at for picture faults, evenly spaced; 1 or more")
    clip_aesthetic: str = _doc("", "folder of a CLIP vision model with an aesthetic head: gives the score aesthetic")
    video_align: str = _doc("", "folder of a VideoAlign (VideoReward) model in safetensors: gives the scores vq and mq")
    ocr: str = _doc("", "ONNX file of a DB text detector: gives the score text_area_ocr, 0..1")
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "installed.module:Class of further scorers; their code runs, name only what you trust"},
    )
    device: str = _doc("cpu", "where plug-in models run: cpu, cuda, cuda:1, ...; every worker holds its own copy")

    def __post_init__(self) -> None:
        for name in self.skip:
            if name not in SCORER_NAMES:
                remedy = f"{nearest(name, SCORER_NAMES)} see contentv curate --scorers".strip()
                raise UserError(f'there is no scorer "{name}"', where="scoring.skip", remedy=remedy)
        for key, parts in (("visual", CLASSICAL_VISUAL), ("motion", CLASSICAL_MOTION)):
            choice = getattr(self, key)
            if not choice:
                raise UserError("is empty", where=f"scoring.{key}", remedy="use classical or the name of a score")
            needed = sorted(set(self.skip) & (set(parts) if choice == "classical" else {choice}))
            if needed:
                raise UserError(
                    f"{', '.join(needed)} cannot be left out: scoring.{key}={choice} is made of it",
                    where="scoring.skip", remedy=f"keep it, or choose another scoring.{key}",
                )  # fmt: skip
        for key, source, names in (
            ("visual", "clip_aesthetic", ("aesthetic",)), ("visual", "video_align", ("vq",)),
            ("motion", "video_align", ("mq",)),
        ):  # fmt: skip
            if getattr(self, key) in names and not getattr(self, source):
                raise UserError(
                    f"{getattr(self, key)} needs scoring.{source}", where=f"scoring.{key}",
                    remedy=f"set scoring.{source}=DIR",
                )  # fmt: skip
        if self.pictures < 1:
            raise UserError(f"{self.pictures} is not possible", where="scoring.pictures", remedy="use 1 or more")
        for path in self.plugins:
            module, _, name = path.partition(":")
            if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
                raise UserError(
                    f'"{path}" names no class', where="scoring.plugins", remedy="write installed.module:Class"
                )
