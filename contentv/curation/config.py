"""What `curate` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from contentv.base.errors import UserError, nearest
from contentv.base.types import Bucket
from contentv.curation.captioner import CaptionerConfig
from contentv.curation.filters import FilterConfig
from contentv.curation.manifests import ManifestConfig
from contentv.curation.near_duplicates import DedupConfig
from contentv.curation.scenes import DETECTORS
from contentv.curation.scoring.config import ScoringConfig
from contentv.curation.workers import EXECUTORS

PRECISIONS = ("bf16", "fp32")
ASPECTS = ("nearest", "every")
FRAMES = ("every", "longest")


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CurateConfig:
    """Video and image files to a dataset of latents."""

    input: str = _doc("", "folder of video and image files or WebDataset tars, captions in NAME.txt or NAME.json; its "
                          "first sub-folders name the sources")  # fmt: skip
    output: str = _doc("", "folder of the dataset; rejects.jsonl there lists what was left out and why")
    buckets: list[str] = field(
        default_factory=lambda: ["f1_h432_w768", "f125_h432_w768"],
        metadata={"help": "shapes to make, f<frames>_h<height>_w<width> in pixels; see aspect and frames"},
    )
    aspect: str = _doc("nearest", "nearest | every: of the buckets of equal frames and like area that it fills, a clip "
                                  "goes to the one nearest in aspect ratio, or to every one")  # fmt: skip
    frames: str = _doc("every", "every | longest: a video clip goes to every number of frames it fills, or to the "
                                "largest of them; single frames are images_from_video's")  # fmt: skip
    min_clip_s: float = _doc(3.0, "shortest clip in seconds; shorter scenes are left out; 0 or more")
    max_clip_s: float = _doc(6.0, "longest clip in seconds; longer scenes give several clips; at least min_clip_s")
    fps: float | None = _doc(None, "frames per second the clips are sampled at; null = each video's own")
    scene_detector: str = _doc("adaptive", "content | adaptive | none: how cuts are found")
    scene_threshold: float | None = _doc(None, "of the detector, lower = more cuts; null = content 27, adaptive 3")
    manifest: ManifestConfig = field(default_factory=ManifestConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    allow_upscale: bool = _doc(False, "let sources smaller than a bucket be enlarged to it")
    max_crop: float | None = _doc(None, "largest share of the picture that a bucket may crop away, 0..1; null = any")
    images_from_video: bool = _doc(True, "buckets of one frame also take the middle frame of each clip")
    keep_media: bool = _doc(False, "store the cropped clip itself (mp4, jpg) beside its latents")
    precision: str = _doc("bf16", "bf16 | fp32: of the stored latents and text vectors")
    executor: str = _doc("local", "local | ray: where workers run, on this machine or on a Ray cluster")
    ray_address: str = _doc("", "address of the Ray cluster; empty = the one this machine belongs to")
    workers: int = _doc(1, "processes that decode and score, of each rank; 1 or more")
    chunk_size: int = _doc(64, "inputs (files, tars) that are finished together: shards end with their chunk, and a "
                               "kill costs the chunks under way; 1 or more")  # fmt: skip
    restart: bool = _doc(False, "throw away an unfinished run into the same output and begin it again")
    batch_size: int = _doc(8, "most clips in one call of the VAE; 1 or more")
    max_batch_pixels: int = _doc(1 << 26, "most pixels (frames x height x width x clips) in one call of the VAE, if "
                                          "more than one clip")  # fmt: skip
    shuffle: bool = _doc(True, "take the files in an order drawn from the seed, so that shards mix sources")
    seed: int = _doc(0, "decides that order")

    def __post_init__(self) -> None:
        _require(len(self.buckets) > 0, "buckets", self.buckets, "name at least one, such as [f1_h432_w768]")
        _require(len(set(self.buckets)) == len(self.buckets), "buckets", self.buckets, "name each bucket once")
        for name in self.buckets:
            try:
                bucket = Bucket.parse(name)
            except ValueError as error:
                raise UserError(str(error), where="buckets") from None
            _require(min(bucket) > 0, "buckets", name, "use positive numbers")
            even = not self.keep_media or bucket.frames == 1 or (bucket.height % 2 == 0 and bucket.width % 2 == 0)
            _require(even, "buckets", name, "H.264 needs an even height and width; change it, or keep_media=false")
        _require(self.min_clip_s >= 0, "min_clip_s", self.min_clip_s, "use 0 or more")
        _require(self.max_clip_s > 0, "max_clip_s", self.max_clip_s, "use a positive number")
        _require(self.max_clip_s >= self.min_clip_s, "max_clip_s", self.max_clip_s, f"use {self.min_clip_s} or more")
        _require(self.fps is None or self.fps > 0, "fps", self.fps, "use a positive number, or null")
        _choice("scene_detector", self.scene_detector, DETECTORS)
        _require(self.scene_threshold is None or self.scene_threshold > 0, "scene_threshold", self.scene_threshold,
                 "use a positive number, or null")  # fmt: skip
        _require(self.max_crop is None or 0 <= self.max_crop <= 1, "max_crop", self.max_crop, "use 0..1, or null")
        _choice("precision", self.precision, PRECISIONS)
        _choice("aspect", self.aspect, ASPECTS)
        _choice("frames", self.frames, FRAMES)
        _choice("executor", self.executor, EXECUTORS)
        for name in ("workers", "chunk_size", "batch_size", "max_batch_pixels"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")


def _require(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise UserError(f"{key}={value} is not possible", where=key, remedy=remedy)


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    guess = nearest(value, known)
    _require(value in known, key, value, f"use one of {', '.join(known)}{f'; {guess}' if guess else ''}")
