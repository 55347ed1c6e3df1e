"""Captions beside media files: NAME.txt or NAME.json.

NAME.txt holds one line for the whole file, or one line a scene in order. NAME.json holds {"caption": "..."} (or another
of `CAPTION_NAMES`) or {"scenes": [{"caption": "...", "start_s": 0.0, "end_s": 2.5}, ...]}; where scenes have times, a
scene found in the file takes the caption it shares most time with, otherwise their order counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SIDECAR_BYTES = 1 << 20
MAX_CAPTION_CHARS = 1 << 15
CAPTION_NAMES = ("caption", "cap", "text", "prompt")  # what other tools call it; the first that is there counts


class CaptionError(Exception):
    """No caption can be told for a clip; the message says why.

    Args:
        reason: for people.
        rule: `no_caption`: there is none, a captioner may write one; `bad_caption`: there is one that cannot be used;
            `captioner`: the captioner failed.
    """

    def __init__(self, reason: str, rule: str = "no_caption") -> None:
        self.rule = rule
        super().__init__(reason)


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
            raise CaptionError(f"{len(self.scenes)} captions for {scenes} scenes", "bad_caption")
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
        lines = [checked_caption(line, empty=True) for line in _decoded(text, "txt").splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            return Captions(tuple(SceneCaption(line) for line in lines), for_all=len(lines) == 1)
    if record is not None:
        found = _from_record(record)
        if found is not None:
            return found
    raise CaptionError("no caption (NAME.txt or NAME.json beside the file)")


def checked_caption(text: object, *, empty: bool = False) -> str:
    """Returns a caption without blanks around it.

    Args:
        text: what stands where a caption should be.
        empty: whether it may be empty.

    Raises:
        CaptionError: it is no text, no Unicode, too long, or empty.
    """
    if not isinstance(text, str):
        raise CaptionError(f"the caption is not text but {type(text).__name__}", "bad_caption")
    if len(text) > MAX_CAPTION_CHARS:
        raise CaptionError(f"the caption has {len(text)} characters, more than {MAX_CAPTION_CHARS}", "bad_caption")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise CaptionError("the caption is not UTF-8", "bad_caption")
    return text.strip() if empty else _filled(text.strip())


def caption_in(record: Mapping[str, Any], names: Sequence[str] = CAPTION_NAMES) -> str | None:
    """Returns the caption in a record under the first of the names that is there and not null or empty.

    Raises:
        CaptionError: what is there cannot be used.
    """
    for name in names:
        if record.get(name) not in (None, ""):
            return checked_caption(record[name], empty=True) or None
    return None


def parse_record(data: bytes) -> dict[str, Any]:
    """Returns the JSON object in a sidecar.

    Raises:
        CaptionError: it is too large, not UTF-8, or no JSON object.
    """
    try:
        content = json.loads(_decoded(data, "json"))
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"the caption file is not JSON ({error})", "bad_caption") from error
    if not isinstance(content, dict):
        raise CaptionError("the caption file holds no JSON object", "bad_caption")
    return content


def _from_record(record: bytes) -> Captions | None:
    content = parse_record(record)
    scenes = content.get("scenes")
    if isinstance(scenes, list) and scenes and all(isinstance(s, dict) and "caption" in s for s in scenes):
        return Captions(tuple(_scene(s) for s in scenes), for_all=False)
    caption = caption_in(content)
    return None if caption is None else Captions((SceneCaption(caption),), for_all=True)


def _scene(scene: dict[str, Any]) -> SceneCaption:
    caption = checked_caption(scene["caption"], empty=True)
    start_s, end_s = seconds(scene.get("start_s")), seconds(scene.get("end_s"))
    if start_s is None or end_s is None:
        return SceneCaption(caption)
    return SceneCaption(caption, start_s, end_s)


def seconds(value: object) -> float | None:
    """Returns a JSON number as a time, None if it is no number or absurd."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    return float(value) if is_number else None  # type: ignore[arg-type]


def _overlap(scene: SceneCaption, start_s: float, end_s: float) -> float:
    return min(end_s, scene.end_s or 0.0) - max(start_s, scene.start_s or 0.0)


def _decoded(data: bytes, kind: str) -> str:
    if len(data) > MAX_SIDECAR_BYTES:
        raise CaptionError(f"the caption file (.{kind}) has more than {MAX_SIDECAR_BYTES} bytes", "bad_caption")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError(f"the caption file (.{kind}) is not UTF-8 ({error})", "bad_caption") from error


def _filled(text: str) -> str:
    if not text:
        raise CaptionError("the caption is empty")
    return text
