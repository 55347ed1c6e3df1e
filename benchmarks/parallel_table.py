"""The tables of docs/parallelism.md: layouts, bytes and memory from formulas, parity from rows that tests measured.

python benchmarks/parallel_table.py                   # write the page's tables (`make docs`)
python benchmarks/parallel_table.py --measure quick   # first run the layouts of `make test`; append the rows
python benchmarks/parallel_table.py --measure slow    # the others: 8 processes, real stages
python benchmarks/parallel_table.py --measure all     # both

Rows are kept test by test. Run again on the same commit, it measures what is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, ROOT, append_rows, provenance
from parity import read, shown

from contentv.base.types import Bucket, TokenCounts
from contentv.config.figures import filled, in_gib, tokens_of
from contentv.models.cost import RECOMPUTES, activation_bytes, weight_bytes
from contentv.models.mmdit import MMDiTConfig
from contentv.parallel.traffic import (
    all_reduce_bytes,
    all_to_all_bytes,
    head_counts,
    head_overhead,
    ring_bytes,
    sequence_norms_bytes,
)
from contentv.parallel.ulysses import padded_part

PAGE = ROOT / "docs" / "parallelism.md"
STAGES = "tests/dist/test_stage_layouts.py"
TESTS = (
    "tests/dist/test_layouts.py", "tests/dist/test_zero_options.py", STAGES, "tests/dist/test_exact.py",
    "tests/dist/test_ring.py",
)  # fmt: skip
PROCESSES = re.compile(r"(\d+) process(?:es)?, ")
MODELS = ("tiny", "small")  # that tests of stages are run for, one by one
FAMILIES = {  # what rows are summed up under, by what they say of themselves
    "training, from losses to weights: models with 6, 19 and 38 heads, all ZeRO options": r"[^`]*\d+ steps?, fp32$",
    "a stage of `tiny`, by command": "`tiny`, stage (?!rlhf)",
    "a stage of `small`, by command": "`small`, stage (?!rlhf)",
    "stage rlhf of either, by command": ".*stage rlhf",
    "RLHF's loss and gradients, fp64": "rlhf's loss.*fp64$",
    "attention forward and backward, fp64": ".*attention.*fp64$",
    "bytes handed to collectives, off the formula by": "bytes a rank hands",
}
MARKERS = {"quick": "not slow", "slow": "slow", "all": "slow or not slow"}
CLIP, DTYPE = Bucket(125, 432, 768), torch.bfloat16
ULYSSES, TENSOR = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
LAYOUTS = (  # sp, ring, tp
    (1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (8, 2, 1), (8, 8, 1), (16, 1, 1), (16, 2, 1), (32, 4, 1),
    (1, 1, 2), (4, 1, 2), (1, 1, 4), (2, 1, 4), (1, 1, 8),
)  # fmt: skip


def heads_table() -> str:
    """Returns heads of the busiest rank and the work that padding and uneven parts add, for 38 heads."""
    heads = MMDiTConfig().num_attention_heads
    lines = [_line([r"tp \ ulysses", *(str(u) for u in ULYSSES)]), _line(["---"] * (len(ULYSSES) + 1))]
    for tp in TENSOR:
        busiest = head_counts(heads, tp)[0]
        cells = [f"{padded_part(busiest, u)}, {head_overhead(heads, u, tp) - 1:+.0%}" for u in ULYSSES]
        lines.append(_line([f"{tp} ({_counted(head_counts(heads, tp))})", *cells]))
    return "\n".join(lines)


def _counted(counts: list[int]) -> str:
    return " + ".join(f"{counts.count(n)} x {n}" for n in sorted(set(counts), reverse=True))


def traffic_table() -> str:
    """Returns the GiB that a rank hands to each collective in a step of one clip of the 8B model, bf16."""
    config, tokens = MMDiTConfig(), tokens_of(CLIP)
    lines = [
        "| sp | of it ring x ulysses | tp | all-to-all | ring | all-reduce | or with sequence norms: gathers, scatters "
        "| ZeRO-3 weights and gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sp, ring, tp in LAYOUTS:
        shape = (head_counts(config.num_attention_heads, tp)[0], config.attention_head_dim, sp, ring, DTYPE.itemsize)
        parts = (
            all_to_all_bytes(tokens, *shape), ring_bytes(tokens, *shape),
            all_reduce_bytes(tokens, config.inner_dim, sp, tp, DTYPE.itemsize),
            2 * sequence_norms_bytes(tokens, config.inner_dim, sp, tp, DTYPE.itemsize),
        )  # fmt: skip
        cells = [in_gib(config.num_layers * n) if n else "-" for n in parts]
        lines.append(_line([str(sp), f"{ring} x {sp // ring}", str(tp), *cells, in_gib(_zero3_bytes(config, tp))]))
    return "\n".join(lines)


def _zero3_bytes(config: MMDiTConfig, tp: int) -> int:
    """Three times a tensor rank's weights; those that tensor ranks split are 24 D^2 of a layer's 36 D^2."""
    d, layers = config.inner_dim, config.num_layers
    split = (24 * layers - 9) * d * d * DTYPE.itemsize  # the last layer's text has no output and no feed-forward
    return 3 * int(weight_bytes(config, DTYPE) - split * (1 - 1 / tp))


def memory_table() -> str:
    """Returns the GiB of activations that a rank keeps of one clip of the 8B model, bf16, by sequence degree."""
    config, tokens = MMDiTConfig(), tokens_of(CLIP)
    lines = ["| sp | tokens of a rank | recompute none | selective | full |", "|---|---|---|---|---|"]
    for sp in (1, 2, 4, 8, 16, 32):
        local = TokenCounts(*(padded_part(n, sp) for n in tokens))
        kept = [activation_bytes(config, local, DTYPE, recompute) for recompute in RECOMPUTES]
        lines.append(_line([str(sp), f"{sum(local):,}", *(in_gib(n) for n in kept)]))
    return "\n".join(lines)


def parity_table() -> str:
    """Returns what the newest run of every test measured, by the number of processes."""
    rows = newest_rows()
    if not rows:
        return "No rows yet: run `python benchmarks/parallel_table.py --measure all`."
    lines = ["| processes | what | against | error | at most | commit |", "|---|---|---|---|---|---|"]
    for row in rows:
        count, what = _processes(row["what"])
        cells = (count, what, row["against"], shown(row["error"]), shown(row["bound"]), f"`{_short(row['commit'])}`")
        lines.append(_line([str(cell) for cell in cells]))
    return "\n".join(lines)


def summary_table() -> str:
    """Returns how many comparisons there are of each family and number of processes, and the worst error of each."""
    rows = newest_rows()
    counts = sorted({_processes(row["what"])[0] for row in rows})
    head = ["what", *(f"{n} process{'es' * (n > 1)}" for n in counts), "at most"]
    lines = [_line(head), _line(["---"] * len(head))]
    for family, pattern in FAMILIES.items():
        found: dict[int, list[dict[str, Any]]] = {n: [] for n in counts}
        for row in rows:
            count, what = _processes(row["what"])
            if re.match(pattern, what):
                found[count].append(row)
        bounds = {shown(row["bound"]) for of_count in found.values() for row in of_count}
        lines.append(_line([family, *(_worst(found[n]) for n in counts), ", ".join(sorted(bounds))]))
    return "\n".join(lines)


def _worst(rows: list[dict[str, Any]]) -> str:
    return f"{len(rows)}: {shown(max(row['error'] for row in rows))}" if rows else "-"


def newest_rows() -> list[dict[str, Any]]:
    """Returns the newest row of every comparison that is about layouts, in the order of the tests.

    Of several in one run, one for each rank, it is the worst.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(all_rows(), key=lambda row: (row["date"], row["error"])):
        if row["test"].startswith(TESTS) and PROCESSES.match(row["what"]):  # older rows do not say how many
            found.pop(row["what"], None)
            found[row["what"]] = row

    def place(row: dict[str, Any]) -> tuple[int, int]:
        return TESTS.index(row["test"].split("::")[0]), _processes(row["what"])[0]

    return sorted(found.values(), key=place)


def all_rows() -> list[dict[str, Any]]:
    """Returns the rows of all comparisons ever kept."""
    return [row for path in sorted(RESULTS.glob("*_par*.jsonl")) for row in read(path)]


def _processes(what: str) -> tuple[int, str]:
    """Returns the number of processes and the rest of a row's `what`."""
    found = PROCESSES.match(what)
    assert found is not None
    return int(found[1]), what[found.end() :]


def _short(commit: str) -> str:
    return commit[:7] + ("+changes" if commit.endswith("+changes") else "")


TABLES = {"heads": heads_table, "traffic": traffic_table, "memory": memory_table, "parity summary": summary_table,
          "parity": parity_table}  # fmt: skip


def measure(which: str) -> None:
    """Runs the tests of layouts and keeps their rows; those that this commit has rows of are not run again.

    Args:
        which: quick, slow or all.

    Raises:
        SystemExit: a test failed; what was measured before is kept.
    """
    device = torch.device("cpu")
    origin = provenance(device)
    clean = not str(origin["commit"]).endswith("+changes")
    done = {row["test"] for row in all_rows() if clean and row["commit"] == origin["commit"]}
    for name, tests in units(which).items():
        if done.issuperset(tests):
            print(f"{name}: there already")
            continue
        print(f"{name}: {len(tests)} tests", flush=True)
        append_rows([provenance(device) | row for row in measured(tests)], "parallel", device)


def units(which: str) -> dict[str, list[str]]:
    """Returns the tests that compare something, in groups that are best run together: they share their processes."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *TESTS, "--parity-out", os.devnull]
    listed = subprocess.run([*command, "-m", MARKERS[which]], cwd=ROOT, capture_output=True, text=True, check=False)
    found: dict[str, list[str]] = {}
    for test in (line for line in listed.stdout.splitlines() if line.startswith(TESTS)):
        file, _, rest = test.partition("::")
        model = next((f" of {name}" for name in MODELS if name in rest), "") if file == STAGES else ""
        found.setdefault(file + model, []).append(test)
    if not found:
        raise SystemExit(f"no tests were found:\n{listed.stdout}{listed.stderr}")
    return found


def measured(tests: list[str]) -> list[dict[str, Any]]:
    """Returns what the tests measured now.

    Raises:
        SystemExit: a test failed, or measured nothing: no rows are kept of any of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", *tests, "--parity-out", str(out)]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        if code != 0 or not out.is_file():
            raise SystemExit(f"the tests ended with {code}: their rows are not kept")
        return read(out)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measures, if asked to, and writes the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=list(MARKERS), help="run these tests of layouts and keep their rows")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
