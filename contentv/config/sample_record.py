"""`samples.json`: with what every video of a folder was made. It lets an interrupted job go on, and no other.

It is written before the first video, and every video appears whole under its name: a file that is there and recorded
is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contentv.base.errors import UserError
from contentv.config.prompts import Prompt
from contentv.models.folders import write_json

RECORD = "samples.json"
VERSION = 1
SHOWN = 4


def output_files(out: str, prompts: list[Prompt]) -> tuple[list[Path], Path]:
    """Returns where each prompt's video goes, and where the record of them goes.

    Args:
        out: an .mp4 file for one prompt, or a folder.
        prompts: what is sampled.

    Raises:
        UserError: several prompts for one file.
    """
    if not out:
        raise UserError("out is not set", where="out", remedy="use out=FILE.mp4 or out=DIR")
    path = Path(out)
    if path.suffix.lower() != ".mp4":
        return [path / f"{prompt.name}.mp4" for prompt in prompts], path / RECORD
    if len(prompts) > 1:
        raise UserError(f"{len(prompts)} prompts need a folder", where=f"out={out}", remedy="use out=DIR")
    return [path], path.with_name(f"{path.name}.json")


def open_record(
    files: list[Path], record: Path, prompts: list[Prompt], settings: Mapping[str, Any], *, overwrite: bool
) -> list[int]:
    """Writes the record and returns the places of the prompts whose videos are not there yet.

    Args:
        files: one a prompt.
        record: where the record is or will be.
        prompts: what is sampled.
        settings: what else the videos depend on, JSON-compatible.
        overwrite: removes what is there, instead of keeping what fits and refusing what does not.

    Raises:
        UserError: a video that is there was made from another prompt or with other settings, or nothing is known of
            it; the record is damaged; the folder cannot be written.
    """
    entries = {file.name: entry(prompt) for file, prompt in zip(files, prompts, strict=True)}
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        before = {} if overwrite else _read(record)
        present = {file.name for file in files if file.exists()}
        if overwrite:
            # Gone before the new record appears: a video of the old settings must not pass for one of the new.
            for file in files:
                file.unlink(missing_ok=True)
            present = set()
        _check(before, entries, present, settings, record)
        recorded = before.get("files", {}) if before.get("settings") == settings else {}
        whole = {"version": VERSION, "settings": dict(settings), "files": {**recorded, **entries}}
        write_json(whole, record)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror or error})", where=str(record.parent),
            remedy="free space, or choose another out=",
        ) from None  # fmt: skip
    return [place for place, file in enumerate(files) if file.name not in present]


def entry(prompt: Prompt) -> dict[str, Any]:
    """Returns what the record says of one video."""
    values = asdict(prompt)
    return {
        "prompt": values["text"], "negative_prompt": values["negative"], "seed": values["seed"],
        "index": values["index"],
    }  # fmt: skip


def _read(record: Path) -> dict[str, Any]:
    if not record.is_file():
        return {}
    try:
        value = json.loads(record.read_text(encoding="utf-8"))
        if isinstance(value, dict) and all(isinstance(value.get(key), dict) for key in ("settings", "files")):
            return value
        problem = "holds something else"
    except ValueError as error:
        problem = str(error)
    raise UserError(
        f"is damaged ({problem})", where=str(record), remedy="overwrite=true samples anew, or choose another out="
    )


def _check(
    before: dict[str, Any], entries: dict[str, Any], present: set[str], settings: Mapping[str, Any], record: Path
) -> None:
    made = before.get("files", {})
    there = sorted(name for name in {*present, *made} if (record.parent / name).exists())
    if not there:
        return
    remedy = "choose another out=, or overwrite=true to sample them anew"
    unknown = sorted(present - set(made))
    if unknown:
        raise UserError(
            f"{_some(unknown)}: there already, and nothing is known of how it was made",
            where=str(record.parent), remedy=remedy,
        )  # fmt: skip
    old = before["settings"]
    differ = [
        f"{key} was {old.get(key)}, is {settings.get(key)}"
        for key in [*settings, *(k for k in old if k not in settings)]
        if old.get(key) != settings.get(key)
    ]
    if differ:
        raise UserError(
            f"the videos that are there were made with other settings: {_some(differ)}",
            where=str(record), remedy=remedy,
        )  # fmt: skip
    for name in sorted(present):
        for key, value in entries[name].items():
            if made[name].get(key) != value:
                raise UserError(
                    f'{name} was made with {key} "{made[name].get(key)}", not "{value}"',
                    where=str(record), remedy=remedy,
                )  # fmt: skip


def _some(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{', '.join(items[:SHOWN])}{more}"
