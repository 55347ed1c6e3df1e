"""The output of NVIDIA's cosmos-curate as inputs: the folder of its split stage, and the tars of its sharding stage.

Split: clips/<uuid>.mp4 with metas/v0/<uuid>.json. Shards: resolution_*/aspect_ratio_*/<length>/video/<part>/<n>.tar
with members <uuid>.mp4, and metas/<part>/<n>.tar beside with <uuid>.json, as of the split stage; <length>
is frames_0_255 in its documentation and duration_5_10 in later versions. Its text embeddings (t5_xxl) are pickles and
never opened. Captions are those of its windows; an enhanced one goes before others.

Source: documentation and source of cosmos-curate (github.com/nvidia-cosmos/cosmos-curate), for facts; no code is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from contentv.curation.captions import (
    MAX_SIDECAR_BYTES,
    CaptionError,
    SceneCaption,
    caption_in,
    checked_caption,
    parse_record,
    seconds,
)
from contentv.curation.media import DEFAULT_SOURCE, Extent, MediaItem, given_scores, no_file, read_bytes
from contentv.curation.tars import list_members
from contentv.curation.video_io import VIDEO_SUFFIXES, DecodeError

SCORES = ("motion_score.global_mean", "motion_score.per_patch_min_256", "aesthetic_score")
_SHARD = re.compile(
    r"(?P<before>(?:.*/)?aspect_ratio_[^/]+/[^/]+)/(?P<kind>video|metas|t5_xxl)/(?P<after>part_[^/]+/[^/]+\.tar)"
)


def is_split(root: Path) -> bool:
    """Whether a folder is the output of the split stage."""
    return (root / "clips").is_dir() and _metas(root) is not None


def _metas(root: Path) -> Path | None:
    """Returns the folder with the newest version of the clips' records, None if there is none."""
    versions = [path for path in (root / "metas").glob("v*") if path.is_dir() and path.name[1:].isdigit()]
    return max(versions, key=lambda path: int(path.name[1:]), default=None)


def is_shard(name: str) -> bool:
    """Whether a path below the input is a tar of the sharding stage."""
    return _SHARD.fullmatch(name) is not None


def unit_names(names: list[str]) -> list[str]:
    """Returns what of the paths below the input is media: clips, and tars with videos."""
    shards = [name for name in names if (match := _SHARD.fullmatch(name)) and match["kind"] == "video"]
    clips = [name for name in names if name.startswith("clips/") and name.lower().endswith(VIDEO_SUFFIXES)]
    return shards + clips


def cosmos_items(root: Path, name: str) -> Iterator[MediaItem | DecodeError]:
    """Yields the clips of a unit: of a clip's file one, of a tar all.

    Args:
        root: the input folder.
        name: of the unit, see `unit_names`.
    """
    match = _SHARD.fullmatch(name)
    if match is None:
        folder = _metas(root)
        record = None if folder is None else folder / f"{PurePosixPath(name).stem}.json"
        yield _clip(name, str(root / name), None, record, None)
        return
    videos, damage = list_members(name, str(root / name))
    metas_name = f"{match['before']}/metas/{match['after']}"
    metas, metas_damage = list_members(metas_name, str(root / metas_name))
    records = {PurePosixPath(member).stem: found.extent for member, found in metas.items() if member.endswith(".json")}
    for member in videos.values():
        if PurePosixPath(member.name).suffix.lower() in VIDEO_SUFFIXES:
            extent = records.get(PurePosixPath(member.name).stem)
            record_path = None if extent is None else root / metas_name
            yield _clip(f"{name}/{member.name}", str(root / name), member.extent, record_path, extent)
    yield from (error for error in (damage, metas_damage) if error is not None)


def read_windows(record: Mapping[str, Any]) -> tuple[SceneCaption, ...]:
    """Returns the captions of a clip's windows, with times where the frame rate and the frames are given.

    Raises:
        CaptionError: one of them cannot be used.
    """
    windows = record.get("windows")
    # Windows count the frames of the clip; its own rate is missing where the clip was not looked into.
    rate = seconds(record.get("framerate")) or seconds(record.get("framerate_source"))
    found: list[SceneCaption] = []
    for window in windows if isinstance(windows, list) else []:
        caption = _window_caption(window) if isinstance(window, dict) else None
        if caption is None:
            continue
        first, last = seconds(window.get("start_frame")), seconds(window.get("end_frame"))
        if rate and rate > 0 and first is not None and last is not None:
            found.append(SceneCaption(caption, first / rate, last / rate))
        else:
            found.append(SceneCaption(caption))
    if not found:
        plain = _window_caption(record)
        return () if plain is None else (SceneCaption(plain),)
    return tuple(found)


def _window_caption(window: Mapping[str, Any]) -> str | None:
    """Returns an enhanced caption, else any, else a plain one."""
    names = [name for name in window if name.endswith("_caption") and isinstance(window[name], str)]
    for name in sorted(names, key=lambda name: (not name.endswith("_enhanced_caption"), name)):
        caption = checked_caption(window[name], empty=True)
        if caption:
            return caption
    return caption_in(window)


def _clip(
    name: str, path: str, extent: Extent | None, record_path: Path | None, record_extent: Extent | None
) -> MediaItem | DecodeError:
    record: dict[str, Any] = {}
    try:
        if record_path is not None:
            record = parse_record(read_bytes(record_path, record_extent, MAX_SIDECAR_BYTES + 1))
        scenes, scores = read_windows(record), given_scores(record, SCORES)
    except FileNotFoundError:
        scenes, scores = (), {}
    except CaptionError as error:
        return DecodeError(name, str(error), "bad_caption")
    except OSError as error:
        return no_file(name, error)
    return MediaItem(name, path, DEFAULT_SOURCE, extent, scenes=scenes, given_scores=scores)
