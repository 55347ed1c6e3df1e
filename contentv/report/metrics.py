"""Reading what a run wrote while it trained: metrics.jsonl, and the resolved configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from contentv.base.errors import UserError

NUMERIC_KEYS = frozenset(("loss", "grad_norm", "lr", "step_s", "data_wait_s", "tokens_per_s", "samples_seen", "mfu"))


@dataclass(frozen=True)
class StageMetrics:
    """What was logged for one stage.

    Args:
        stage: the stage's name, "" where a line names none.
        rows: the numbers of each logged step, rising by step; NaN where a line says null.
        repeated: how many lines were replaced by a later line of the same step.
    """

    stage: str
    rows: list[dict[str, float]]
    repeated: int

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Returns the steps at which a key was logged, and its values there."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in found], [value for _, value in found]

    def finite(self, key: str) -> list[float]:
        """Returns the finite values of a key, in order; empty where it was never logged."""
        return [value for value in self.column(key)[1] if math.isfinite(value)]

    def names(self) -> list[str]:
        """Returns every key that was ever logged, in the order of appearance."""
        return list({key: None for row in self.rows for key in row})


def read_metrics(path: Path) -> list[StageMetrics]:
    """Returns the metrics of each stage in a file, in the order the stages first appear; empty without a file.

    Raises:
        UserError: a line is not an object with a whole-numbered `step`, or a known metric is not a number.
    """
    stages: dict[str, dict[int, dict[str, float]]] = {}
    lines: dict[str, int] = {}
    for where, row in read_jsonl(path):
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise UserError(f'"step" is {step!r}, not a whole number', where=where)
        stage = str(row.get("stage") or "")
        stages.setdefault(stage, {})[step] = _numbers(row, where)
        lines[stage] = lines.get(stage, 0) + 1
    return [_in_order(stage, rows, lines[stage]) for stage, rows in stages.items()]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) for each line that is not blank; nothing when there is no file.

    Raises:
        UserError: a line is not a JSON object.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for count, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{count}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"the line is not JSON ({error.msg}): {line.strip()[:80]!r}",
                    where=where,
                    remedy="delete the line; a process killed while writing leaves its last line unfinished",
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"the line holds a {type(row).__name__}, not an object", where=where)
            yield where, row


def read_config(path: Path) -> dict[str, str] | None:
    """Returns a resolved configuration as dotted keys and their values as text, or None when there is no file.

    Values of keys that look like credentials are replaced.

    Raises:
        UserError: the file is not YAML, or not a mapping.
    """
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"not readable as YAML: {error}", where=str(path)) from error
    if not isinstance(tree, dict):
        raise UserError(f"holds a {type(tree).__name__}, not a mapping", where=str(path))
    return dict(_flatten(tree, ""))


def _flatten(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{name}.")
        elif str(key).lower().endswith(("api_key", "apikey", "secret", "password", "access_token", "auth_token")):
            yield name, "(hidden)"
        else:
            yield name, "" if value is None else json.dumps(value, default=str).strip('"')


def _numbers(row: dict[str, Any], where: str) -> dict[str, float]:
    found = {}
    for key, value in row.items():
        if value is None:
            found[key] = math.nan  # how a writer of strict JSON says that a number was not finite
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = float(value)
        elif key in NUMERIC_KEYS:
            raise UserError(f'"{key}" is {value!r}, not a number', where=where)
    return found


def _in_order(stage: str, rows: dict[int, dict[str, float]], num_lines: int) -> StageMetrics:
    return StageMetrics(stage, [rows[step] for step in sorted(rows)], repeated=num_lines - len(rows))
