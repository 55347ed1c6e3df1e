"""What a dataset left out: counts by rule, examples with their scores, pictures, and copies beside what they copy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contentv.report import page
from contentv.report.charts import bar_chart
from contentv.report.dataset_pictures import Pictures, Thumbnail
from contentv.report.dataset_stats import MAX_TEXT
from contentv.report.markup import Html, join, number, short, tag

REJECTS_FILE = "rejects.jsonl"
NO_RULE = "not recorded"
NEAR_COPY = "duplicate:near"
MAX_RULES = 500  # rules and, where none is recorded, reasons that are told apart
MAX_SHOWN = 60
MAX_EXAMPLES = 3
MAX_SCORES = 6
MAX_STRIPS = 12
MAX_LINE = 1 << 20
SHOWN = 6
OTHERS = "others"
_COPY = re.compile(r"looks like (?P<file>.*) \(scene (?P<scene>\d+), clip (?P<clip>\d+)\) \(", re.DOTALL)


@dataclass
class Group:
    """The rejections of one rule: how many, the first of them, and the range of the score that the rule is about."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    low: float = math.inf
    high: float = -math.inf


@dataclass
class Rejects:
    """All rejections by rule (older ones have none: by their reason without its numbers), and damaged lines."""

    groups: dict[tuple[str, str], Group] = field(default_factory=dict)  # (rule, reason if there is no rule)
    copies: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(group.count for group in self.groups.values())

    def add(self, row: dict[str, Any]) -> None:
        """Counts a line's."""
        named = isinstance(row.get("rule"), str)
        name = (str(row["rule"]), "") if named else (NO_RULE, re.sub(r"[0-9.]+", "…", row["reason"])[:MAX_TEXT])
        if name not in self.groups and len(self.groups) >= MAX_RULES:
            name = (OTHERS, "")
        group = self.groups.setdefault(name, Group())
        group.count += 1
        score = _scores(row).get(name[0].partition(":")[2])
        if score is not None:
            group.low, group.high = min(group.low, score), max(group.high, score)
        if len(group.examples) < MAX_EXAMPLES:
            group.examples.append(row)
        if name[0] == NEAR_COPY and len(self.copies) < MAX_RULES:
            self.copies.append(row)


def read_rejects(path: Path) -> Rejects:
    """Returns the rejections of a file; lines that say nothing are counted as damaged."""
    found = Rejects()
    with open(path, encoding="utf-8", errors="replace") as file:
        while line := file.readline(MAX_LINE):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and isinstance(row.get("reason"), str):
                found.add(row)
            else:
                found.damaged += 1
    return found


def rejects_section(folder: Path, pictures: Pictures) -> Html:
    """Returns the section about what was left out."""
    title, path = "Rejected clips", folder / REJECTS_FILE
    if not path.is_file():
        why = "there is no rejects.jsonl: nothing is known of rejected clips"
        return page.section(title, tag("p", why, class_="empty"))
    found = read_rejects(path)
    lead = f"{found.damaged:,} lines of rejects.jsonl cannot be read and are left out." if found.damaged else ""
    if not found.count:
        return page.section(title, tag("p", "no clip was rejected", class_="empty"), lead=lead)
    order = sorted(found.groups.items(), key=lambda item: (-item[1].count, item[0]))
    bars = {reason or rule: float(group.count) for (rule, reason), group in order[:20]}
    by = "rule" if any(rule not in (NO_RULE, OTHERS) for rule, _ in found.groups) else "reason"
    parts = [
        page.charts(bar_chart(f"{found.count:,} rejected, by {by}", bars)),
        _table(order[:MAX_SHOWN], found.count),
        *_copies(found, pictures),
        *_strips([rule for (rule, _), _ in order], pictures),
    ]
    if len(order) > MAX_SHOWN:
        parts.append(tag("p", f"{len(order) - MAX_SHOWN:,} rarer reasons are not shown.", class_="note"))
    return page.section(title, *parts, lead=lead)


def _table(order: list[tuple[tuple[str, str], Group]], total: int) -> Html:
    rows = []
    for (rule, _), group in order:
        about = rule.partition(":")[2]
        span = f"{about} {short(group.low)} to {short(group.high)}" if group.low <= group.high else ""
        name = tag("span", rule[:60], class_="rule")
        rows.append([name, group.count, f"{group.count / total:.1%}", span, _examples(group)])
    return page.table(["rule", "count", "share", "scores", "examples"], rows)


def _examples(group: Group) -> Html:
    return join([tag("div", _name(row), tag("div", _told(row), class_="note")) for row in group.examples])


def _name(row: Mapping[str, Any]) -> str:
    place = [f"{name} {row[name]}" for name in ("scene", "clip") if isinstance(row.get(name), int)]
    where = f" ({', '.join(place)})" if place else ""
    return f"{str(row.get('file', ''))[:MAX_TEXT]}{where}: {row['reason'][:MAX_TEXT]}"


def _told(row: Mapping[str, Any]) -> str:
    scores = _scores(row)
    first = str(row.get("rule", "")).partition(":")[2]
    names = sorted(scores, key=lambda name: (name != first, name not in ("visual_raw", "motion_raw")))
    return ", ".join(f"{name[:40]} {number(scores[name])}" for name in names[:MAX_SCORES])


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    scores = row.get("scores")
    if not isinstance(scores, dict):
        return {}
    usable = {str(k): v for k, v in scores.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: float(value) for name, value in usable.items() if math.isfinite(value)}


def _strips(rules: list[str], pictures: Pictures) -> list[Html]:
    parts: list[Html] = []
    for rule in dict.fromkeys(rules):
        strip = pictures.thumbnails(pictures.of_rule(rule), SHOWN) if len(parts) < 2 * MAX_STRIPS else None
        if strip is not None and rule != NEAR_COPY:
            parts += [tag("h3", f"Left out by {rule}"), strip]
    return parts


def _copies(found: Rejects, pictures: Pictures) -> list[Html]:
    """Near-duplicates beside the clips they are copies of, where both have a thumbnail."""
    pairs: list[Html] = []
    left_out = {(row.file, row.scene, row.clip): row for row in pictures.of_rule(NEAR_COPY)}
    for row in found.copies:
        match = _COPY.match(row["reason"])
        copy = left_out.get((str(row.get("file")), row.get("scene"), row.get("clip")))
        if match is None or copy is None or len(pairs) == SHOWN:
            continue
        first = pictures.of_place(match["file"], int(match["scene"]), int(match["clip"]))
        if first is not None:
            pair = _pair(first, copy, row["reason"], pictures)
            pairs += [] if pair is None else [pair]
    if not pairs:
        return []
    heading = tag("h3", "Near-duplicates: the clip that was kept, and the copy that was left out")
    return [heading, tag("div", *pairs, class_="videos pairs")]


def _pair(first: Thumbnail, copy: Thumbnail, reason: str, pictures: Pictures) -> Html | None:
    kept, left_out = pictures.of_row(first), pictures.of_row(copy)
    if kept is None or left_out is None:
        return None
    sides = [
        tag("div", tag("p", title, class_="note"), picture, tag("div", row.file[:MAX_TEXT], class_="prompt"))
        for title, picture, row in (("kept", kept, first), ("left out", left_out, copy))
    ]
    told = tag("div", reason[:MAX_TEXT], class_="note")
    return tag("div", tag("div", *sides, class_="pair"), told, class_="panel sample")
