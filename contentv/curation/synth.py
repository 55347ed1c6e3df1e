"""Procedural captioned clips with the truth beside each: the data of the demo, and of tests.

Each clip is one to three scenes of `synth_world`, joined by hard cuts and written as H.264. Beside `NAME.mp4` lie
`NAME.txt` (one caption a scene, in order) and `NAME.json` (what is really there). A clip's frames before encoding
depend on (seed, clip index) alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from contentv.base.errors import UserError
from contentv.curation.synth_captions import caption_of
from contentv.curation.synth_world import STILL, VARIANTS, ClipSpec, Frames, render_clip, sample_spec

__all__ = ["ClipSpec", "SynthConfig", "caption_of", "render_clip", "sample_spec", "synthesize"]


def _default_variants() -> dict[str, float]:
    return {"clean": 0.72, "blurred": 0.08, "noisy": 0.06, "static": 0.06, "jittery": 0.08}


@dataclass
class SynthConfig:
    """What `synthesize` writes."""

    clips: int = field(default=64, metadata={"help": "number of MP4 files, at least 0"})
    images: int = field(default=0, metadata={"help": "number of PNG stills with captions, at least 0"})
    seed: int = field(default=0, metadata={"help": "decides every frame"})
    size_px: int = field(default=128, metadata={"help": "height and width in pixels, even, 32..1024"})
    fps: int = field(default=8, metadata={"help": "frames per second, 1..60"})
    scene_frames: int = field(
        default=20, metadata={"help": "fewest frames of a scene, at least 2; a scene has up to 4 more"}
    )
    joined_share: float = field(
        default=0.2, metadata={"help": "share of clips made of 2 or 3 scenes with hard cuts, 0..1"}
    )
    pan_share: float = field(default=0.3, metadata={"help": "share of moving scenes in which the camera pans, 0..1"})
    variants: dict[str, float] = field(
        default_factory=_default_variants, metadata={"help": f"weight of each variant: {', '.join(VARIANTS)}"}
    )
    blur_max: float = field(
        default=0.0, metadata={"help": "each scene is blurred by a sigma drawn from 0 to this, in frame sides, 0..0.1"}
    )
    slowest: float = field(
        default=1.0, metadata={"help": "each object's speed is multiplied by a number drawn from this to 1, above 0..1"}
    )
    crf: int = field(default=14, metadata={"help": "H.264 quality, 0 (lossless) .. 51"})

    def __post_init__(self) -> None:
        _check(self.clips >= 0, "clips", self.clips, "0 or more")
        _check(self.images >= 0, "images", self.images, "0 or more")
        _check(
            32 <= self.size_px <= 1024 and self.size_px % 2 == 0, "size_px", self.size_px, "an even number in 32..1024"
        )
        _check(1 <= self.fps <= 60, "fps", self.fps, "1..60")
        _check(self.scene_frames >= 2, "scene_frames", self.scene_frames, "2 or more")
        _check(0.0 <= self.joined_share <= 1.0, "joined_share", self.joined_share, "0..1")
        _check(0.0 <= self.pan_share <= 1.0, "pan_share", self.pan_share, "0..1")
        _check(0.0 <= self.blur_max <= 0.1, "blur_max", self.blur_max, "0..0.1")
        _check(0.0 < self.slowest <= 1.0, "slowest", self.slowest, "more than 0, at most 1")
        _check(0 <= self.crf <= 51, "crf", self.crf, "0..51")
        unknown = sorted(set(self.variants) - set(VARIANTS))
        _check(not unknown, "variants", ", ".join(unknown), f"names among {', '.join(VARIANTS)}")
        weights = list(self.variants.values())
        _check(
            min(weights, default=0.0) >= 0.0 and sum(weights) > 0.0,
            "variants",
            self.variants,
            "weights >= 0, not all 0",
        )


def _check(good: bool, key: str, value: object, legal: str) -> None:
    if not good:
        raise UserError(f"synth.{key}={value} is out of range", where=f"synth.{key}", remedy=f"give {legal}")


@dataclass(frozen=True)
class Scene:
    """A spec and how many frames of it are shown."""

    spec: ClipSpec
    frames: int


def sample_scenes(config: SynthConfig, index: int) -> list[Scene]:
    """Returns the scenes of clip `index`; they depend on (config, index) alone."""
    rng = np.random.default_rng([config.seed, index, 1])
    more = np.random.default_rng([config.seed, index, 3])  # of its own, so that older draws stay as they are
    names = sorted(config.variants)
    weights = np.array([config.variants[name] for name in names], np.float64)
    count = int(rng.integers(2, 4)) if rng.random() < config.joined_share else 1
    scenes: list[Scene] = []
    while len(scenes) < count:
        frames = config.scene_frames + int(rng.integers(0, 5))
        variant = str(rng.choice(names, p=weights / weights.sum()))
        spec = sample_spec(rng, variant=variant, pan_share=config.pan_share, clip_frames=frames)
        if scenes and scenes[-1].spec.shade == spec.shade:
            continue  # a cut between two equal backdrops would hardly be one
        blur, pace = float(more.uniform(0.0, config.blur_max)), float(more.uniform(config.slowest, 1.0))
        spec = dataclasses.replace(spec, blur=blur, displacement=spec.displacement * pace)
        scenes.append(Scene(spec, frames))
    return scenes


def render_scenes(scenes: list[Scene], size: int) -> Frames:
    """Returns the joined scenes' frames, uint8 RGB (frames, size, size, 3)."""
    return np.concatenate([render_clip(scene.spec, scene.frames, size) for scene in scenes])


def truth_of(scenes: list[Scene], fps: int, size: int) -> dict[str, Any]:
    """Returns the ground truth of a clip: its scenes and captions; `cuts` are where a new scene begins."""
    rows: list[dict[str, Any]] = []
    first = 0
    for scene in scenes:
        spec = scene.spec
        rows.append(
            {
                "caption": caption_of(spec), "shape": spec.shape, "colour": spec.colour, "direction": spec.direction,
                "shade": spec.shade, "variant": spec.variant, "speed": round(spec.displacement / 16, 5),
                "radius": round(spec.radius, 4), "blur": round(spec.blur, 5),
                "pan": [round(value, 5) for value in spec.pan],
                "start_frame": first, "num_frames": scene.frames,
            }
        )  # fmt: skip
        first += scene.frames
    caption = " ".join(row["caption"] + "." for row in rows) if len(rows) > 1 else rows[0]["caption"]
    lead = {key: rows[0][key] for key in ("shape", "colour", "direction", "shade", "variant", "speed")}
    return {
        "kind": "video", "caption": caption,
        **lead, "fps": fps, "height_px": size, "width_px": size, "num_frames": first,
        "cuts": [row["start_frame"] for row in rows[1:]], "scenes": rows,
    }  # fmt: skip


def write_mp4(path: Path, frames: Frames, fps: int, crf: int = 14) -> None:
    """Writes frames (T, H, W, 3) uint8 RGB as an H.264 file, yuv420p."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf), "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _write_beside(stem: Path, captions: list[str], truth: dict[str, Any]) -> None:
    stem.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")


def _write_image(out: Path, config: SynthConfig, index: int) -> Path:
    rng = np.random.default_rng([config.seed, index, 2])
    spec = sample_spec(rng)
    path = out / f"image-{index:05d}.png"
    cv2.imwrite(str(path), render_clip(spec, 1, config.size_px)[0][..., ::-1])
    caption = caption_of(spec, picture=True)
    truth = {
        "kind": "image", "caption": caption, "shape": spec.shape, "colour": spec.colour, "direction": STILL,
        "shade": spec.shade, "variant": spec.variant, "height_px": config.size_px, "width_px": config.size_px,
        "num_frames": 1,
    }  # fmt: skip
    _write_beside(path.with_suffix(""), [caption], truth)
    return path


def synthesize(out: Path, clips: int, seed: int, config: SynthConfig | None = None) -> list[Path]:
    """Writes clips (and stills) with their captions and truth; returns the paths of the media files.

    Args:
        out: folder to write into; made when missing. Files `clip-NNNNN.mp4|txt|json`, `image-NNNNN.png|txt|json`.
        clips: number of MP4 files; goes before `config.clips`.
        seed: decides every frame; goes before `config.seed`.
        config: everything else.

    Raises:
        UserError: a value is out of range, or `out` is a file.
    """
    values = {**vars(config or SynthConfig()), "clips": clips, "seed": seed}
    config = SynthConfig(**values)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", where="out", remedy="name a folder")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index in range(config.clips):
        scenes = sample_scenes(config, index)
        path = out / f"clip-{index:05d}.mp4"
        write_mp4(path, render_scenes(scenes, config.size_px), config.fps, config.crf)
        captions = [caption_of(scene.spec) for scene in scenes]
        _write_beside(path.with_suffix(""), captions, truth_of(scenes, config.fps, config.size_px))
        written.append(path)
    written += [_write_image(out, config, index) for index in range(config.images)]
    return written
