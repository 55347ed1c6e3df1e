"""What a stage consumed and produced, and whether a predecessor fits a stage.

Every run folder holds `stage.json`: the stage's name, the model's geometry, the VAE and the text encoders its latents
and embeddings come from, the shift it was trained with, and the weights it exports. The next stage reads it and
refuses to start when a part does not fit, instead of training on noise for a week.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contentv.base.errors import UserError

MANIFEST = "stage.json"
OBJECTIVES = ("flow", "reward")
BUCKET_CHOICES = ("image", "lowest", "highest", "video", "all")


@dataclass
class StageConfig:
    """A phase of the training plan."""

    name: str = field(default="lowres_video", metadata={"help": "image | lowres_video | highres_video | sft | rlhf"})
    objective: str = field(default="flow", metadata={"help": "flow (flow matching) | reward (RLHF)"})
    buckets: str = field(
        default="lowest",
        metadata={"help": "when data.buckets is empty: image (1 frame) | lowest | highest (by tokens) | video | all"},
    )
    accepts: list[str] = field(
        default_factory=list,
        metadata={"help": "what `init` may be: stage names, `diffusers` (a video model's folder), `sd3`, `none`"},
    )
    reinit_io: bool = field(
        default=False,
        metadata={"help": "starting from an image model: begin its patch embedding and output layer anew (our option)"},
    )
    same_vae: bool = field(default=True, metadata={"help": "the predecessor must have been trained on this VAE"})
    same_shift: bool = field(default=False, metadata={"help": "the predecessor must have been trained with this shift"})

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("stage.objective", self.objective, OBJECTIVES),
            ("stage.buckets", self.buckets, BUCKET_CHOICES),
        ):
            if value not in allowed:
                raise UserError(f"{key}={value} is unknown", where=key, remedy=f"use one of {', '.join(allowed)}")


@dataclass
class StageManifest:
    """The facts about a run that its successors and samplers depend on. `sd3` and `none` are stages, too."""

    stage: str
    geometry: dict[str, Any]  # MMDiTConfig as a dict
    vae_fingerprint: str = ""  # empty: unknown (a folder that was not made here)
    text_fingerprint: str = ""
    shift: float = 0.0  # 0: unknown
    buckets: list[str] = field(default_factory=list)
    fps: float = 0.0
    steps: int = 0
    config_hash: str = ""
    consumed: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)  # ema|raw -> folder, relative to the run
    lora: dict[str, Any] = field(default_factory=dict)  # base (its folder), rank, alpha, where `weights` are a LoRA
    vae_path: str = ""
    text_path: str = ""

    def write(self, folder: Path) -> None:
        """Writes `stage.json` into a run folder, whole or not at all."""
        temporary = folder / f"{MANIFEST}.tmp"
        with temporary.open("w", encoding="utf-8") as out:
            json.dump(asdict(self), out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> StageManifest:
        """Returns the manifest of a finished run.

        Raises:
            UserError: the run has none, or it is damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(
                "this run has not finished (it has no stage.json)", where=str(folder),
                remedy="run its stage to the end, or name another init=",
            )  # fmt: skip
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"stage.json is damaged ({error})", where=str(path), remedy="run the stage again") from None


def check_predecessor(config: StageConfig, current: StageManifest, before: StageManifest, where: str) -> None:
    """Refuses a predecessor whose stage, geometry, VAE, text encoder or shift do not fit the stage that starts.

    Args:
        config: the stage that starts.
        current: its facts: geometry, fingerprints of its dataset, shift.
        before: the predecessor's facts; empty fields are unknown and not compared.
        where: the predecessor's folder, for the message.

    Raises:
        UserError: something differs; the message names what, both values and the remedy.
    """
    if config.accepts and before.stage not in config.accepts:
        raise UserError(
            f'stage {config.name} cannot start from "{before.stage}"', where=f"init={where}",
            remedy=f"start it from one of: {', '.join(config.accepts)}",
        )  # fmt: skip
    if before.stage == "none":
        return
    ignored = () if config.same_vae else ("in_channels", "out_channels")
    for key, value in before.geometry.items():
        if key not in ignored and current.geometry.get(key, value) != value:
            raise UserError(
                f"the model's {key} is {current.geometry[key]} here and {value} in the predecessor",
                where=f"init={where}",
                remedy=f"use model.{key}={value}, or the model= the predecessor was trained with",
            )
    pairs = [("text encoder", current.text_fingerprint, before.text_fingerprint, "curate again with the text.path= of")]
    if config.same_vae:
        pairs.append(("VAE", current.vae_fingerprint, before.vae_fingerprint, "curate again with the vae.path= of"))
    for what, ours, theirs, remedy in pairs:
        if ours and theirs and ours != theirs:
            raise UserError(
                f"the dataset was made with another {what} ({ours}) than the predecessor was trained on ({theirs})",
                where=f"init={where}", remedy=f"{remedy} the predecessor, or start from a model of this {what}",
            )  # fmt: skip
    if config.same_shift and before.shift and abs(current.shift - before.shift) > 1e-6:
        raise UserError(
            f"stage {config.name} uses shift {current.shift:g}, its predecessor was trained with {before.shift:g}",
            where=f"init={where}", remedy=f"use timestep.shift={before.shift:g}",
        )  # fmt: skip
