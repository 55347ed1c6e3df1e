"""The keys people type to choose what is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.data.quality import MODES


@dataclass
class DataConfig:
    """Which dataset, which of its buckets, and how much damage to accept."""

    path: str = field(default="", metadata={"help": "folder with dataset.json"})
    buckets: list[str] = field(
        default_factory=list, metadata={"help": "names of the buckets to use, such as f17_h96_w96; empty: all"}
    )
    bucket_weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "relative probability of drawing each bucket at a step; empty: in proportion to its size"},
    )
    quality_mode: str = field(
        default="quantile", metadata={"help": "raw scores to [0, 1]: quantile (rank in the source), minmax or zsigmoid"}
    )
    quality_dropout: bool = field(
        default=False, metadata={"help": "TQD: keep a clip in an epoch with probability max(visual, motion)"}
    )
    prefetch: int = field(default=2, metadata={"help": "steps prepared ahead by a thread, >= 0; 0: read when asked"})
    max_bad_samples: int = field(default=10, metadata={"help": "damaged samples accepted in any case, >= 0"})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "damaged samples accepted as a fraction of the samples read, 0..1"}
    )

    def __post_init__(self) -> None:
        if self.quality_mode not in MODES:
            raise UserError(f'"{self.quality_mode}" is not one of {", ".join(MODES)}', where="data.quality_mode")
        for name in self.buckets:
            try:
                Bucket.parse(name)
            except ValueError as error:
                raise UserError(str(error), where="data.buckets", remedy="dataset.json lists the buckets") from None
        for name in ("prefetch", "max_bad_samples"):
            if getattr(self, name) < 0:
                raise UserError(f"{getattr(self, name)} is negative", where=f"data.{name}", remedy="use 0 or more")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise UserError(f"{self.max_bad_fraction} is not in 0..1", where="data.max_bad_fraction")
        if any(not (weight >= 0 and math.isfinite(weight)) for weight in self.bucket_weights.values()):
            raise UserError(f"{self.bucket_weights} has a negative weight", where="data.bucket_weights")
