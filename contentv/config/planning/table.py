"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from contentv.config.planning.options import GIB

SHORTEST_S = 3600.0


def render(plan: dict[str, Any]) -> RenderableType:
    """Returns the tables of a plan that `make_plan` made."""
    verdicts = list(plan["buckets"])
    if plan["overall"] is not plan["buckets"][0]:
        verdicts.append(plan["overall"])
    parts: list[RenderableType] = [_layouts(plan, verdicts)]
    for verdict in verdicts:
        parts.append(_memory(verdict))
        parts += [Text.from_markup(line) for line in _sentences(verdict)]
    parts += [Text.from_markup(line) for line in _ending(plan)]
    return Group(*parts)


def _title(verdict: dict[str, Any]) -> str:
    names = verdict["buckets"]
    return str(names[0]) if len(names) == 1 else f"one layout for all {len(names)} buckets"


def _layouts(plan: dict[str, Any], verdicts: list[dict[str, Any]]) -> Table:
    cluster = plan["cluster"]
    table = Table(
        title=f"{plan['stage']}, {plan['parameters'] / 1e9:.3g} B parameters, {plan['precision']}, "
        f"on {plan['devices']} x {cluster['name']} ({cluster['memory_gib']:g} GiB each), "
        f"batch {plan['global_batch_size']}",
    )
    for name in ("bucket", "tokens", "layout", "micro-batch", "recompute", "GiB / usable", "step", "MFU", "clips/s",
                 "tokens/s"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("bucket", "layout", "recompute") else "right")
    for verdict in verdicts:
        tokens = "" if len(verdict["tokens"]) > 1 else f"{verdict['tokens'][0]:,}"
        facts = verdict if verdict["fits"] else verdict["nearest"]
        layout = facts["layout"]
        memory = f"{facts['memory']['total_bytes'] / GIB:.1f} / {verdict['usable_bytes'] / GIB:.1f}"
        table.add_row(
            _title(verdict), tokens,
            _words(layout),
            f"{layout['micro_batch']} x {layout['accumulation']}", layout["recompute"],
            memory if verdict["fits"] else f"[red]{memory}[/]", duration(facts["step_s"]),
            "-" if facts["mfu"] is None else f"{facts['mfu']:.1%}", f"{facts['clips_per_s']:.3g}",
            f"{facts['tokens_per_s']:,.0f}",
        )  # fmt: skip
    return table


def _words(layout: dict[str, Any]) -> str:
    """Returns a layout in words, such as `dp 8 x sp 4 (ring 2) x tp 1, ZeRO-3, offload optimizer`."""
    ring = f" (ring {layout['ring']})" if layout["ring"] > 1 else ""
    norms = " (sequence norms)" if layout["sequence_norms"] else ""
    words = [f"dp {layout['dp']} x sp {layout['sp']}{ring} x tp {layout['tp']}{norms}", f"ZeRO-{layout['zero_stage']}"]
    words += [f"hpz {layout['hpz']}"] if layout["hpz"] > 1 else []
    moved = [layout["offload"]] if layout["offload"] != "none" else []
    moved += ["activations"] if layout["offload_activations"] else []
    return ", ".join([*words, *([f"offload {' and '.join(moved)}"] if moved else [])])


def _memory(verdict: dict[str, Any]) -> Table:
    facts = verdict if verdict["fits"] else verdict["nearest"]
    memory = facts["memory"]
    table = Table(
        title=f"{_title(verdict)}: GiB of a device, at the moment of most ({memory['moment']})", show_header=False
    )
    for name, size in memory["parts_bytes"].items():
        table.add_row(name, f"{size / GIB:.2f}")
    if memory["factor"] != 1:
        table.add_row("measured over predicted", f"x {memory['factor']:.2f}")
    table.add_section()
    table.add_row("together", f"{memory['total_bytes'] / GIB:.2f}")
    if memory["host_bytes"]:
        table.add_row("and in host memory", f"{memory['host_bytes'] / GIB:.2f}")
    return table


def _sentences(verdict: dict[str, Any]) -> Iterator[str]:
    if not verdict["fits"]:
        yield f"[red]does not fit:[/] every legal layout lacks {verdict['lacks_bytes'] / GIB:.1f} GiB or more a device"
        for remedy in verdict["remedies"]:
            yield f"  what would help: {escape(remedy)}"
        return
    spent = sorted(verdict["step_parts_s"].items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {value / verdict['step_s']:.0%}" for name, value in spent if value > 0)
    yield f"what binds: {escape(verdict['binds'])}"
    yield f"the step: {shares}"
    yield f"to train so: {escape(verdict['overrides'])}"
    for row in verdict["neighbours"]:
        yield f"  {row['change']}: {escape(row['verdict'])}"


def _ending(plan: dict[str, Any]) -> Iterator[str]:
    cluster, run = plan["cluster"], plan["run"]
    if run is not None:
        cost = "" if run["cost"] is None else f", cost {run['cost']:,.0f}"
        yield (
            f"\nthe stage: {run['steps']:,} steps, {run['clips']:,} clips: {duration(run['days'] * 86_400)}, "
            f"{run['device_hours']:,.0f} device-hours{cost}"
        )
        there = run["in_days"]
        cost = "" if there["cost"] is None else f", cost {there['cost']:,.0f}"
        yield (
            f"in {there['days']:g} days ({there['device_hours']:,.0f} device-hours{cost}): {there['steps']:,} steps, "
            f"{there['clips']:,} clips, {there['model_flops']:.2e} operations of the model"
        )
    yield f"rates: {plan['rates']}" + (f" ({plan['calibration']})" if plan["calibration"] else "")
    if cluster["note"]:
        yield escape(cluster["note"])


def duration(seconds: float) -> str:
    """Returns a length of time in the unit that fits it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < SHORTEST_S:
        return f"{seconds:.3g} s"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 86_400:.3g} days"
