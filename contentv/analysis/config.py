"""The keys of the gradient analysis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from contentv.base.errors import UserError

VISUAL_OPERATORS = ("blur", "resample", "jpeg")
MOTION_OPERATORS = ("freeze", "slow", "hold")
PIXELS = ("auto", "media", "latents")
MAX_GROUPS = 12  # of which every half is looked at: 924 splits


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TwinConfig:
    """How golden clips are degraded, one property at a time.

    Raises:
        UserError: a value is unknown or out of range.
    """

    visual: str = _doc("blur", "what spoils the picture: blur | resample (smaller and back) | jpeg")
    blur: float = _doc(0.05, "visual=blur: deviation of the Gaussian in shorter frame sides; above 0..0.5")
    resample: int = _doc(4, "visual=resample: how many times smaller; 2 or more")
    jpeg_quality: int = _doc(5, "visual=jpeg: 1 (worst) .. 95")
    motion: str = _doc("slow", "what spoils the motion: freeze (the first frame stays) | slow (frames repeated) | "
                               "hold (frames left out, the others held: jerky at the old pace)")  # fmt: skip
    motion_factor: int = _doc(4, "motion=slow: how many times slower; motion=hold: frames shown as one; 2 or more")

    def __post_init__(self) -> None:
        _require(self.visual in VISUAL_OPERATORS, "visual", self.visual, f"use one of {', '.join(VISUAL_OPERATORS)}")
        _require(0 < self.blur <= 0.5, "blur", self.blur, "use a number above 0, at most 0.5")
        _require(self.resample >= 2, "resample", self.resample, "use 2 or more")
        _require(1 <= self.jpeg_quality <= 95, "jpeg_quality", self.jpeg_quality, "use 1..95")
        _require(self.motion in MOTION_OPERATORS, "motion", self.motion, f"use one of {', '.join(MOTION_OPERATORS)}")
        _require(self.motion_factor >= 2, "motion_factor", self.motion_factor, "use 2 or more")

    def describe(self) -> dict[str, str]:
        """Returns what is done to the visually degraded and the motion-degraded twins, in words."""
        visual = {
            "blur": f"Gaussian blur, deviation {self.blur:g} of the shorter side",
            "resample": f"shrunk {self.resample} times and enlarged again",
            "jpeg": f"every frame as JPEG of quality {self.jpeg_quality}",
        }
        motion = {
            "freeze": "the first frame in place of all",
            "slow": f"played {self.motion_factor} times slower",
            "hold": f"every {self.motion_factor} frames shown as their first",
        }
        return {"visual": visual[self.visual], "motion": motion[self.motion]}


@dataclass
class GradientConfig(TwinConfig):
    """How gradients are compared.

    Raises:
        UserError: a value is unknown or out of range.
    """

    clips: int = _doc(64, "golden clips, rounded down to a multiple of `groups`; single clips are mostly noise: use 64 "
                          "or more")  # fmt: skip
    golden: float = _doc(0.8, "least rank of both scores that makes a clip golden; 0..1")
    bins: int = _doc(10, "equal intervals of sigma; 3 or more")
    draws: int = _doc(1, "draws of sigma and noise for each clip and bin; 1 or more")
    groups: int = _doc(
        8, "groups of clips: halves of them give the ceiling, leaving one out the intervals; even, 4..12"
    )
    blocks: int = _doc(0, "gradients of the last so many layers and the output, to save memory; 0 = of all weights")
    max_values: int = _doc(1 << 24, "gradient entries kept of each group, the same share of every weight, drawn at "
                                    "random; 0 = all. Memory: 3 x groups x 4 bytes each")  # fmt: skip
    micro_batch_size: int = _doc(8, "clips per forward; 1 or more")
    pixels: str = _doc("auto", "what is degraded: media (the clips stored by `curate keep_media=true`) | latents "
                               "(decoded by the VAE) | auto (media where every chosen clip has it)")  # fmt: skip
    seed: int = _doc(0, "decides which golden clips, their noise levels and noise")

    def __post_init__(self) -> None:
        super().__post_init__()
        even = self.groups % 2 == 0 and 4 <= self.groups <= MAX_GROUPS
        _require(even, "groups", self.groups, f"use an even number in 4..{MAX_GROUPS}")
        _require(self.clips >= self.groups, "clips", self.clips, f"use at least groups={self.groups}")
        _require(0 <= self.golden < 1, "golden", self.golden, "use a rank from 0 to below 1")
        _require(self.bins >= 3, "bins", self.bins, "use 3 or more")
        _require(self.draws >= 1, "draws", self.draws, "use 1 or more")
        _require(self.blocks >= 0, "blocks", self.blocks, "use 1 or more, or 0 for all weights")
        _require(self.max_values >= 0, "max_values", self.max_values, "use 1 or more, or 0 for all entries")
        _require(self.micro_batch_size >= 1, "micro_batch_size", self.micro_batch_size, "use 1 or more")
        _require(self.pixels in PIXELS, "pixels", self.pixels, f"use one of {', '.join(PIXELS)}")


def _require(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise UserError(f"{key}={value} is not possible", where=key, remedy=remedy)
