"""The keys people type to choose what is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.data.quality import MODES, SCOPES
from contentv.data.storage import StorageConfig


@dataclass
class DataConfig(StorageConfig):
    """Which dataset, which of its buckets, and how much damage to accept."""

    path: Any = field(
        default="",
        metadata={
            "help": "folder or URL (https, s3, gs, ...) with dataset.json; or a list of them, [A,B], read as one "
            "dataset: made with the same encoders, sources of equal names are one source"
        },
    )
    buckets: list[str] = field(
        default_factory=list, metadata={"help": "names of the buckets to use, such as f17_h96_w96; empty: all"}
    )
    bucket_weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "relative probability of drawing each bucket at a step; empty: in proportion to its size"},
    )
    image_ratio: float = field(
        default=0.0,
        metadata={
            "help": "share of the samples that come from one-frame buckets, 0..1, for training on images and videos "
            "at once; exact to within a batch; 0: in proportion to the data"
        },
    )
    source_weights: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "relative share of the samples of each source, mixed within every batch; 0 leaves a source out; "
            "empty: in proportion to the data"
        },
    )
    source_max_epochs: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "most times a source is seen in full, >= 1; then it drops out and the others share what it had; "
            "when all have, the stage ends; sources not named: no limit"
        },
    )
    quality_mode: str = field(
        default="quantile", metadata={"help": "raw scores to [0, 1]: quantile (rank), minmax or zsigmoid"}
    )
    quality_scope: str = field(
        default="source",
        metadata={"help": "among which clips a raw score is judged: source (its own) or corpus (the whole dataset)"},
    )
    quality_dropout: bool = field(
        default=False, metadata={"help": "TQD: keep a clip in an epoch with probability max(visual, motion)"}
    )
    quality_weight: bool = field(
        default=False,
        metadata={"help": "TQD, instead of quality_dropout: keep all clips and weigh each one's loss by "
                          "max(visual, motion), over its mean in the global batch"},
    )  # fmt: skip
    prefetch: int = field(default=2, metadata={"help": "steps prepared ahead by a thread, >= 0; 0: read when asked"})
    workers: int = field(
        default=0, metadata={"help": "threads that read samples at once, >= 0; 0: one after another; more help where "
                             "data.path is far away or on many disks"}
    )  # fmt: skip
    max_bad_samples: int = field(default=10, metadata={"help": "damaged samples accepted in any case, >= 0"})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "damaged samples accepted as a fraction of the samples read, 0..1"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quality_mode not in MODES:
            raise UserError(f'"{self.quality_mode}" is not one of {", ".join(MODES)}', where="data.quality_mode")
        if self.quality_scope not in SCOPES:
            raise UserError(f'"{self.quality_scope}" is not one of {", ".join(SCOPES)}', where="data.quality_scope")
        if self.quality_dropout and self.quality_weight:
            raise UserError(
                "data.quality_dropout and data.quality_weight are two forms of one thing, and both are on",
                where="data.quality_weight", remedy="switch one of them off",
            )  # fmt: skip
        for name in self.buckets:
            try:
                Bucket.parse(name)
            except ValueError as error:
                raise UserError(str(error), where="data.buckets", remedy="dataset.json lists the buckets") from None
        if not isinstance(self.path, str) and not (
            isinstance(self.path, list) and self.path and all(isinstance(path, str) for path in self.path)
        ):
            raise UserError(f"{self.path!r} is no folder, URL or list of them", where="data.path")
        for name in ("prefetch", "workers", "max_bad_samples"):
            if getattr(self, name) < 0:
                raise UserError(f"{getattr(self, name)} is negative", where=f"data.{name}", remedy="use 0 or more")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise UserError(f"{self.max_bad_fraction} is not in 0..1", where="data.max_bad_fraction")
        if any(not (weight >= 0 and math.isfinite(weight)) for weight in self.bucket_weights.values()):
            raise UserError(f"{self.bucket_weights} has a negative weight", where="data.bucket_weights")
        if any(not (weight >= 0 and math.isfinite(weight)) for weight in self.source_weights.values()):
            raise UserError(f"{self.source_weights} has a negative weight", where="data.source_weights")
        if any(cap < 1 for cap in self.source_max_epochs.values()):
            raise UserError(f"{self.source_max_epochs} has a budget below 1", where="data.source_max_epochs")
        if not 0.0 <= self.image_ratio < 1.0:
            raise UserError(
                f"{self.image_ratio} is not a share from 0 to below 1", where="data.image_ratio",
                remedy="use data.buckets for images alone",
            )  # fmt: skip
