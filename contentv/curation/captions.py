"""Captions beside media files: NAME.txt or NAME.json.

NAME.txt holds one line for the whole file, or one line a scene in order. NAME.json holds {"caption": "..."} or
{"scenes": [{"caption": "...", "start_s": 0.0, "end_s": 2.5}, ...]}; where scenes have times, a scene found in the file
takes the caption it shares most time with, otherwise their order counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_SIDECAR_BYTES = 1 << 20


class CaptionError(Exception):
    """No caption can be told for a clip; the message says why."""


@dataclass(frozen=True)
class SceneCaption:
    """A caption and, where known, the seconds of the file it is about."""

    text: str
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class Captions:
    """The captions of one media file."""

    scenes: tuple[SceneCaption, ...]
    for_all: bool  # one caption for every scene

    def of_scene(self, scene: int, scenes: int, start_s: float, end_s: float) -> str:
        """Returns the caption of a scene that was found in the file.

        Args:
            scene: its number, from 0.
            scenes: how many were found.
            start_s: where it begins, in seconds.
            end_s: where it ends.

        Raises:
            CaptionError: the captions are of another number of scenes, or this scene's is empty.
        """
        if self.for_all or len(self.scenes) == scenes == 1:
            return _filled(self.scenes[0].text)
        if all(s.start_s is not None and s.end_s is not None for s in self.scenes):
            shared = [_overlap(s, start_s, end_s) for s in self.scenes]
            best = max(range(len(shared)), key=shared.__getitem__)
            if shared[best] <= 0:
                raise CaptionError(f"no caption for {start_s:.2f} to {end_s:.2f} s")
            return _filled(self.scenes[best].text)
        if len(self.scenes) != scenes:
            raise CaptionError(f"{len(self.scenes)} captions for {scenes} scenes")
        return _filled(self.scenes[scene].text)


def parse_captions(text: bytes | None, record: bytes | None) -> Captions:
    """Returns the captions of a file's sidecars; NAME.txt goes before NAME.json.

    Args:
        text: content of NAME.txt, None if there is none.
        record: content of NAME.json, likewise.

    Raises:
        CaptionError: there is no caption, or the sidecar cannot be read.
    """
    if text is not None:
        lines = [line.strip() for line in _decoded(text, "txt").splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            return Captions(tuple(SceneCaption(line) for line in lines), for_all=len(lines) == 1)
    if record is not None:
        found = _from_record(record)
        if found is not None:
            return found
    raise CaptionError("no caption (NAME.txt or NAME.json beside the file)")


def _from_record(record: bytes) -> Captions | None:
    try:
        content = json.loads(_decoded(record, "json"))
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"the caption file is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CaptionError("the caption file holds no JSON object")
    scenes = content.get("scenes")
    if isinstance(scenes, list) and scenes and all(isinstance(s, dict) and "caption" in s for s in scenes):
        return Captions(tuple(_scene(s) for s in scenes), for_all=False)
    caption = content.get("caption")
    return Captions((SceneCaption(caption.strip()),), for_all=True) if isinstance(caption, str) else None


def _scene(scene: dict[str, Any]) -> SceneCaption:
    if not isinstance(scene["caption"], str):
        raise CaptionError("a scene's caption is not text")
    start_s, end_s = _seconds(scene.get("start_s")), _seconds(scene.get("end_s"))
    if start_s is None or end_s is None:
        return SceneCaption(scene["caption"].strip())
    return SceneCaption(scene["caption"].strip(), start_s, end_s)


def _seconds(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    return float(value) if is_number else None  # type: ignore[arg-type]


def _overlap(scene: SceneCaption, start_s: float, end_s: float) -> float:
    return min(end_s, scene.end_s or 0.0) - max(start_s, scene.start_s or 0.0)


def _decoded(data: bytes, kind: str) -> str:
    if len(data) > MAX_SIDECAR_BYTES:
        raise CaptionError(f"the caption file (.{kind}) has {len(data)} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError(f"the caption file (.{kind}) is not UTF-8 ({error})") from error


def _filled(text: str) -> str:
    if not text:
        raise CaptionError("the caption is empty")
    return text
