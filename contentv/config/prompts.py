"""What to sample: one prompt, or a file of prompts with their negative prompts, seeds and names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contentv.base.errors import UserError, nearest
from contentv.config.schema import SampleConfig

JSONL_KEYS = ("prompt", "negative_prompt", "seed", "name")
MAX_NAME_BYTES = 200  # file systems take 255, and a temporary file's name is longer


@dataclass(frozen=True)
class Prompt:
    """One video to make.

    Attributes:
        text: what it shows.
        negative: what guidance pushes away from.
        seed, index: the keys of its initial noise.
        name: its file's name, without a suffix.
    """

    text: str
    negative: str
    seed: int
    index: int
    name: str


def read_prompts(config: SampleConfig) -> list[Prompt]:
    """Returns the prompts of `prompt=`, or of the file `prompts=`: a line of text each, or a JSON object each.

    Raises:
        UserError: none or both are given, the file cannot be read or holds no prompt, or a line of it is broken.
    """
    if bool(config.prompt) == bool(config.prompts):
        raise UserError(
            "give one of prompt= and prompts=", where="contentv sample", remedy='prompt="a red circle" or prompts=FILE'
        )
    if config.prompt:
        return [_plain(config, config.prompt, 0)]
    path = Path(config.prompts)
    lines = [(number, line.strip()) for number, line in enumerate(_read(path).split("\n"), start=1)]
    filled = [(number, line) for number, line in lines if line]
    if not filled:
        raise UserError("the file holds no prompt", where=f"prompts={path}", remedy="write one prompt a line")
    if path.suffix.lower() == ".jsonl":
        prompts = [_parse(config, line, index, f"{path}, line {n}") for index, (n, line) in enumerate(filled)]
    else:
        prompts = [_plain(config, line, index) for index, (_, line) in enumerate(filled)]
    seen: dict[str, int] = {}
    for prompt, (number, _) in zip(prompts, filled, strict=True):
        # Some file systems do not tell upper case from lower.
        first = seen.setdefault(prompt.name.lower(), number)
        if first != number:
            raise UserError(
                f'two videos would be written to "{prompt.name}.mp4", see line {first}',
                where=f"{path}, line {number}", remedy="give each prompt a name of its own",
            )  # fmt: skip
    return prompts


def _read(path: Path) -> str:
    if not path.is_file():
        raise UserError(f'"{path}" is not a file', where="prompts", remedy="name a text file with one prompt a line")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error})", where=str(path), remedy="save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path), remedy="name another file") from None


def _plain(config: SampleConfig, text: str, index: int) -> Prompt:
    return Prompt(text, config.negative_prompt, config.seed, index, f"{index:05d}")


def _parse(config: SampleConfig, line: str, index: int, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", where=where, remedy='write {"prompt": "..."}') from None
    if not isinstance(row, dict):
        raise UserError("is not a JSON object", where=where, remedy='write {"prompt": "..."}')
    for key in row:
        if key not in JSONL_KEYS:
            remedy = nearest(key, JSONL_KEYS) or f"use {', '.join(JSONL_KEYS)}"
            raise UserError(f'unknown key "{key}"', where=where, remedy=remedy)
    seed = row.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise UserError(f"seed {json.dumps(seed)} is not a whole number", where=where, remedy="write it without quotes")
    return Prompt(
        _text(row, "prompt", None, where),
        _text(row, "negative_prompt", config.negative_prompt, where),
        config.seed if seed is None else seed,
        # A line with a seed of its own does not depend on its place in the file.
        index if seed is None else 0,
        _name(_text(row, "name", f"{index:05d}", where), where),
    )


def _text(row: dict[str, Any], key: str, default: str | None, where: str) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        found = "is missing" if value is None else f"{json.dumps(value)} is not a text"
        raise UserError(f"{key} {found}", where=where, remedy=f'write "{key}": "..."')
    return value


def _name(name: str, where: str) -> str:
    bad = not name or name.startswith(".") or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name)
    if bad or len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f'"{name}" cannot be the name of a file', where=where,
            remedy="use letters, digits, spaces, - and _; the suffix .mp4 is added",
        )  # fmt: skip
    return name
