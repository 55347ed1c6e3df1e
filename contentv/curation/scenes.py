"""Scenes: where a video is cut, and how long scenes become clips."""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector

DETECTORS = ("content", "adaptive", "none")
DEFAULT_THRESHOLDS = {"content": 27.0, "adaptive": 3.0, "none": 0.0}
MIN_SCENE_S = 0.25  # cuts closer than this are one: a flash, not two scenes
DETECTION_SIDE_PX = 144  # short side of the pictures that are compared
_THUMBNAIL_PX = 32
_KEPT_S = 10.0  # a detector tells of a cut within this time
_LIGHT_LEVELS = 8.0  # change of mean luma from frame to frame that may be a flash or a fade
_SAME = 0.6  # correlation of pictures, from which on they show the same
_BLANK_LEVELS = 3.0  # deviation of luma below which a picture shows nothing

Thumbnail = npt.NDArray[np.float32]


class SceneFinder:
    """Finds hard cuts in frames that are fed one after another, so that no video need fit in memory.

    The detectors of PySceneDetect go by how much neighbouring frames differ, so flashes and fades look like cuts to
    them. What they report where the light changes is kept only if the pictures before and after differ in more than
    their light.

    Args:
        fps: frames per second of the video.
        detector: `content` compares neighbouring frames in HSV, `adaptive` against a rolling mean (for fast camera
            motion), `none` takes the video for one scene.
        threshold: of the detector; None = its default (content 27, adaptive 3). Lower finds more cuts.
    """

    def __init__(self, fps: float, detector: str = "content", threshold: float | None = None) -> None:
        self._fps = fps
        self._cuts: list[int] = []
        self._open: list[int] = []  # reported cuts, not yet checked
        self._frames = 0
        self._reach = round(MIN_SCENE_S * fps) + 1
        self._thumbnails: collections.deque[Thumbnail] = collections.deque(maxlen=max(8, round(_KEPT_S * fps)))
        level = DEFAULT_THRESHOLDS[detector] if threshold is None else threshold
        length = max(1, round(MIN_SCENE_S * fps))
        self._detector: Any = None
        if detector == "content":
            self._detector = ContentDetector(threshold=level, min_scene_len=length)
        elif detector == "adaptive":
            self._detector = AdaptiveDetector(adaptive_threshold=level, min_scene_len=length)

    @property
    def wants_pixels(self) -> bool:
        """Whether the frames' pixels are looked at."""
        return self._detector is not None

    def add(self, frame: UInt8[np.ndarray, "H W 3"] | None) -> None:
        """Takes the next frame (RGB); None will do where pixels are not wanted."""
        if self._detector is not None:
            if frame is None:
                raise ValueError("this detector needs the frames' pixels")
            scale = min(1.0, DETECTION_SIDE_PX / min(frame.shape[:2]))
            if scale < 1:
                frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            bgr = np.ascontiguousarray(frame[:, :, ::-1])
            self._thumbnails.append(_thumbnail(bgr))
            self._note(self._detector.process_frame(FrameTimecode(self._frames, self._fps), bgr))
        self._frames += 1
        self._check(up_to=self._frames - self._reach)

    def finish(self) -> list[tuple[int, int]]:
        """Returns the scenes as [start, end) frame numbers, in order and without gaps; none if there were no frames."""
        if self._frames == 0:
            return []
        if self._detector is not None:
            self._note(self._detector.post_process(FrameTimecode(self._frames - 1, self._fps)))
            self._check(up_to=self._frames)
        inner = sorted({cut for cut in self._cuts if 0 < cut < self._frames})
        edges = [0, *inner, self._frames]
        return list(itertools.pairwise(edges))

    def _note(self, cuts: list[FrameTimecode]) -> None:
        self._open.extend(cut.frame_num for cut in cuts)

    def _check(self, up_to: int) -> None:
        """Decides about the reported cuts before frame `up_to`, after which enough frames are known."""
        ripe = [cut for cut in self._open if cut < up_to]
        self._open = [cut for cut in self._open if cut >= up_to]
        self._cuts.extend(cut for cut in ripe if not self._is_light(cut))

    def _is_light(self, cut: int) -> bool:
        """Returns whether only the light changes at a cut; False where the frames are no longer kept."""
        first = self._frames - len(self._thumbnails)
        low, high = max(0, cut - self._reach), min(self._frames, cut + self._reach)
        if low < first or cut == 0:
            return False
        near = list(itertools.islice(self._thumbnails, low - first, high - first))
        if max(abs(float(a.mean() - b.mean())) for a, b in itertools.pairwise(near)) < _LIGHT_LEVELS:
            return False
        before, after = near[: cut - low], near[cut - low :]
        # Out of a moment of black at the very start, or into one at the very end: a fade, not a scene.
        if (low == 0 and _are_blank(before)) or (high == self._frames and _are_blank(after)):
            return True
        return max(_correlation(a, b) for a in before for b in after) > _SAME


def _thumbnail(bgr: npt.NDArray[np.uint8]) -> Thumbnail:
    gray = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    size = (_THUMBNAIL_PX, _THUMBNAIL_PX)
    return cv2.resize(gray, size, interpolation=cv2.INTER_AREA).astype(np.float32)


def _are_blank(thumbnails: list[Thumbnail]) -> bool:
    return all(float(thumbnail.std()) < _BLANK_LEVELS for thumbnail in thumbnails)


def _correlation(a: Thumbnail, b: Thumbnail) -> float:
    """Returns the correlation of two pictures, which their brightness and contrast do not change; 0 for blank ones."""
    deviations = float(a.std()), float(b.std())
    if min(deviations) < _BLANK_LEVELS:
        return 0.0
    return float(((a - a.mean()) * (b - b.mean())).mean()) / (deviations[0] * deviations[1])


def find_scenes(
    frames: UInt8[np.ndarray, "T H W 3"], fps: float | int, detector: str = "content", threshold: float | None = None
) -> list[tuple[int, int]]:
    """Returns the scenes of a video in memory as [start, end) frame numbers; see `SceneFinder`."""
    finder = SceneFinder(float(fps), detector, threshold)
    for frame in frames:
        finder.add(frame)
    return finder.finish()


def cut_scene(start: int, end: int, fps: float, min_s: float, max_s: float) -> list[tuple[int, int]]:
    """Returns the clips of a scene as [start, end) frame numbers.

    Clips of `max_s` are taken from the scene's start on, since a bucket takes the first frames of a clip; what is left
    becomes a clip too if it lasts `min_s`, and is dropped otherwise.

    Args:
        start: the scene's first frame.
        end: the frame after its last.
        fps: frames per second.
        min_s: shortest clip in seconds, 0 or more.
        max_s: longest clip in seconds.
    """
    slack = 1e-6
    shortest = max(1, math.ceil(min_s * fps - slack))
    longest = max(1, math.floor(max_s * fps + slack))
    clips = [(first, min(first + longest, end)) for first in range(start, end, longest)]
    return [(first, last) for first, last in clips if last - first >= shortest]
