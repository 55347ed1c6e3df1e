"""Whether scores mean something: on synthetic clips of known blur, speed and cuts; and what each scorer costs.

    python benchmarks/score_meaning.py                # 40 clips a question, 256 px
    python benchmarks/score_meaning.py --clips 6 --size 96 --out DIR

Clips are those of `contentv synth`, written as H.264 and read back. Truth is the JSON beside each, not our scores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from measure import RESULTS, append_rows, provenance, spread

from contentv.curation.scenes import find_scenes
from contentv.curation.scorers import SCORERS, ScoringConfig, score_clip
from contentv.curation.scoring.view import ClipView
from contentv.curation.synth import SynthConfig, synthesize, write_mp4
from contentv.curation.synth_world import DIRECTIONS

FPS = 8
ADDED = ("focus", "blockiness", "text_area")  # scorers that the first version did not have
LIGHTS = ("none", "pan", "flash", "long flash", "fade in", "fade out", "fade from white")
Row = dict[str, Any]


def main() -> None:
    """Asks every question and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=40, help="for each question")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each scorer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*meaning(Path(folder), args.clips, args.size), *cuts(Path(folder), args.clips, args.size)]
    rows += costs(args.size, args.repeats)
    device = torch.device("cpu")
    origin = provenance(device)
    path = append_rows([origin | row for row in rows], "score_meaning", device, args.out)
    for row in rows:
        print(json.dumps(row))
    print(os.path.relpath(path))


def meaning(folder: Path, clips: int, size: int) -> list[Row]:
    """Returns rank correlations of scores with what is known of the clips."""
    alone = {"size_px": size, "joined_share": 0.0, "variants": {"clean": 1.0}, "fps": FPS}
    blurred = scored(folder / "blur", clips, SynthConfig(**alone, pan_share=0.3, blur_max=0.03))
    paced = scored(folder / "pace", clips, SynthConfig(**alone, pan_share=0.0, slowest=0.05))
    panned = scored(folder / "pan", clips, SynthConfig(**alone, pan_share=1.0, slowest=0.05))
    questions = {
        "visual_raw with sharpness": (blurred, lambda truth: -truth["blur"], "visual_raw"),
        "focus with sharpness": (blurred, lambda truth: -truth["blur"], "focus"),
        "Laplacian variance with sharpness": (blurred, lambda truth: -truth["blur"], "sharpness"),
        "motion_raw with speed": (paced, lambda truth: truth["speed"], "motion_raw"),
        "foreground_motion with speed": (paced, lambda truth: truth["speed"], "foreground_motion"),
        "camera_motion with the pan's speed": (panned, pan_speed, "camera_motion"),
        "foreground_motion with speed against the ground": (panned, relative_speed, "foreground_motion"),
        "foreground_motion with the pan's speed": (panned, pan_speed, "foreground_motion"),
        "speed against the ground with the pan's speed (truth)": (panned, pan_speed, relative_speed),
    }
    rows = []
    for name, (pairs, truth_of, score_of) in questions.items():
        known = [truth_of(truth) for truth, _ in pairs]
        found = [score_of(truth) if callable(score_of) else scores[score_of] for truth, scores in pairs]
        rows.append(
            {"measure": "spearman", "of": name, "value": spearman(known, found), "clips": clips, "size_px": size}
        )
    return rows


def scored(folder: Path, clips: int, config: SynthConfig) -> list[tuple[Row, Row]]:
    """Returns (truth, scores) of new clips."""
    pairs = []
    for path in synthesize(folder, clips, 7, config):
        truth = json.loads(path.with_suffix(".json").read_text())["scenes"][0]
        result = score_clip(read(path), FPS, ScoringConfig(skip=["text_area", "blockiness"]))
        pairs.append((truth, {"visual_raw": result.visual_raw, "motion_raw": result.motion_raw, **result.scores}))
    return pairs


def pan_speed(truth: Row) -> float:
    """Returns the speed of the camera."""
    return float(np.hypot(*truth["pan"]))


def relative_speed(truth: Row) -> float:
    """Returns the object's speed against the ground, which moves against the camera."""
    return float(np.hypot(*(truth["speed"] * np.array(DIRECTIONS[truth["direction"]]) + np.array(truth["pan"]))))


def spearman(a: list[float], b: list[float]) -> float:
    """Returns the rank correlation; equal values share their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return round(float(np.corrcoef(ranks(a), ranks(b))[0, 1]), 4)


def cuts(folder: Path, clips: int, size: int) -> list[Row]:
    """Returns precision, recall and F1 of cuts between joined scenes, exact to the frame."""
    rows = []
    counts: dict[str, dict[str, np.ndarray]] = {}
    for light in LIGHTS:
        config = SynthConfig(size_px=size, joined_share=1.0, pan_share=1.0 if light == "pan" else 0.3, fps=FPS)
        for path in synthesize(folder / f"cuts {light}", clips, 7, config):
            truth = set(json.loads(path.with_suffix(".json").read_text())["cuts"])
            write_mp4(path, lit(read(path), light), FPS)
            frames = read(path)
            for detector in ("content", "adaptive"):
                found = {start for start, _ in find_scenes(frames, FPS, detector)} - {0}
                hits = np.array([len(found & truth), len(found - truth), len(truth - found)])
                of_detector = counts.setdefault(detector, {})
                of_detector[light] = of_detector.get(light, 0) + hits
                of_detector["all"] = of_detector.get("all", 0) + hits
    for detector, by_light in counts.items():
        for light, (hit, false, missed) in by_light.items():
            told = {"hits": int(hit), "false": int(false), "missed": int(missed)}
            score = round(2 * hit / max(1, 2 * hit + false + missed), 4)
            rows.append({"measure": "cut_f1", "of": detector, "light": light, "value": score, **told, "size_px": size})
    return rows


def lit(frames: np.ndarray, light: str) -> np.ndarray:
    """Returns the frames with a flash or a fade of a second, or as they are."""
    gains = np.ones(len(frames))
    white = np.zeros(len(frames))
    if light == "flash":
        white[FPS] = 0.8
    elif light == "long flash":
        white[FPS : FPS + 2] = 0.8
    elif light == "fade in":
        gains[:FPS] = np.arange(FPS) / FPS
    elif light == "fade out":
        gains[-FPS:] = np.arange(FPS)[::-1] / FPS
    elif light == "fade from white":
        white[:FPS] = 1 - np.arange(FPS) / FPS
    bright = frames * gains[:, None, None, None] * (1 - white[:, None, None, None]) + 255 * white[:, None, None, None]
    return np.rint(bright).astype(np.uint8)


def costs(size: int, repeats: int) -> list[Row]:
    """Returns milliseconds per clip of 5 s at 24 fps: of what scorers share, of each besides that, and of all."""
    with tempfile.TemporaryDirectory() as folder:
        config = SynthConfig(size_px=size, joined_share=0.0, variants={"clean": 1.0}, fps=24, scene_frames=120)
        frames = read(synthesize(Path(folder), 1, 7, config)[0])[:120]
    shared = {name: lambda view, name=name: getattr(view, name) for name in ("grays", "thumbnails", "motion")}
    calls = {f"shared {name}": call for name, call in shared.items()}
    calls |= {name: scorer.score for name, scorer in SCORERS.items()}
    times: dict[str, list[float]] = {name: [] for name in (*calls, "all", f"all but {', '.join(ADDED)}")}
    for _ in range(repeats):
        view = ClipView(frames, 24.0)
        for name, call in calls.items():
            times[name].append(seconds(lambda call=call, view=view: call(view)))
        times["all"].append(seconds(lambda: score_clip(frames, 24.0)))
        added = sum(times[name][-1] for name in ADDED)
        times[f"all but {', '.join(ADDED)}"].append(times["all"][-1] - added)
    shape = {"frames": len(frames), "size_px": size, "threads": 1}
    return [{"measure": "cost", "of": name, **spread(values), **shape} for name, values in times.items()]


def seconds(call: Any) -> float:
    """Returns what a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def read(path: Path) -> np.ndarray:
    """Returns the frames of a file, RGB."""
    with av.open(str(path)) as container:
        return np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)])


if __name__ == "__main__":
    main()
