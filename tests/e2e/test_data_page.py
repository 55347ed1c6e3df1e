"""Every command of "Try it" in docs/data.md, in order, and then: is every file accounted for, once."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from contentv.cli.main import main
from contentv.data import read_metas, verify_dataset

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "data.md"
BIN = Path(sys.executable).parent
TAIL = ("--object-store-memory=100000000", "--block")  # small, and ended with the process that the test started


def try_it() -> list[tuple[str, str]]:
    """Returns the (language, text) of every block of the section."""
    page = PAGE.read_text(encoding="utf-8")
    section = page.split("\n## Try it\n")[1].split("\n## ")[0]
    return re.findall(r"^```(bash|python)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


class Runner:
    """Runs the blocks of a page in a folder that looks like a checkout.

    Args:
        folder: where to.
        replaced: texts of the page and what stands for them, to make it smaller.

    Attributes:
        here: whether `contentv` commands run in this process.
    """

    def __init__(self, folder: Path, replaced: dict[str, str]) -> None:
        self.folder, self.replaced, self.here = folder, replaced, False
        self.commands: list[list[str]] = []
        self.names: dict[str, Any] = {}  # of the Python blocks
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        self.nodes: list[subprocess.Popen[bytes]] = []
        for name in ("contentv", "tests"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, kind: str, text: str) -> None:
        """Runs one block."""
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), self.names)
            return
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            self.commands.append(words)
            if words[0] == "export":
                self.env.update([words[1].split("=", 1)])
            elif words[:2] == ["ray", "start"]:
                self._start_node(words)
            elif words[:2] == ["ray", "stop"]:
                self.stop_nodes()
            else:
                self._call(words)

    def _call(self, words: list[str]) -> None:
        if words[0] == "contentv" and self.here:
            assert main(words[1:]) == 0, words
            return
        if words[0] == "contentv":
            words = [sys.executable, "-m", *words]
        done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"

    def _start_node(self, words: list[str]) -> None:
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("wb") as file:
            node = subprocess.Popen(
                [str(BIN / "ray"), *words[1:], *TAIL], cwd=self.folder, env=self.env, stdout=file, stderr=file
            )
        self.nodes.append(node)
        deadline = time.monotonic() + 120
        while b"will now block" not in log.read_bytes():
            assert node.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.2)

    def stop_nodes(self) -> None:
        """Ends the nodes that were started here, the head last; `ray stop` would end everybody's."""
        while self.nodes:
            node = self.nodes.pop()
            node.send_signal(signal.SIGTERM)
            try:
                node.wait(60)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = Runner(tmp_path, {"6399": str(free.getsockname()[1])})
    yield found
    found.stop_nodes()


def samples_of_files(dataset: Path) -> dict[str, list[str]]:
    """Returns the keys of all samples, by the checksum of the file they come from, their last part."""
    found: dict[str, list[str]] = {}
    for meta in read_metas(dataset):
        found.setdefault(meta["key"].rpartition("-")[2], []).append(meta["key"])
    return found


def checksum(folder: Path, name: str) -> str:
    """Returns what a key ends in: the file's name and bytes."""
    return xxhash.xxh64_hexdigest(f"{name}\0{xxhash.xxh128_hexdigest((folder / name).read_bytes())}".encode())


def check_all_accounted_for(folder: Path) -> None:
    """Passes if each file of the inputs gave samples or rejects, no sample is there twice, and every byte is sound."""
    videos, dataset = folder / "outputs" / "data" / "videos", folder / "outputs" / "data" / "set"
    keys = [meta["key"] for meta in read_metas(dataset)]
    assert len(keys) == len(set(keys)) == json.loads((dataset / "dataset.json").read_text())["totals"]["samples"]
    of_file = samples_of_files(dataset)
    rejects = [json.loads(line) for line in (dataset / "rejects.jsonl").read_text().splitlines()]
    rejected = Counter(reject["file"] for reject in rejects)
    names = [f"{part}/{path.name}" for part in ("synth", "more") for path in sorted((videos / part).glob("*.mp4"))]
    without = [name for name in names if checksum(videos, name) not in of_file and not rejected[name]]
    assert not without, "neither samples nor rejects"
    assert sum(checksum(videos, name) in of_file for name in names) >= 0.9 * len(names)
    runs = [json.loads((dataset / "curation" / f"run-000{n}" / "summary.json").read_text()) for n in (1, 2)]
    assert sum(run["kept"] for run in runs) == len(keys)
    assert max(run["rejected"] for run in runs) <= len(rejects) <= sum(run["rejected"] for run in runs)
    assert len({tuple(reject[name] for name in ("file", "scene", "clip", "reason")) for reject in rejects}) == len(
        rejects
    )
    assert runs[1]["skipped"] >= len(list((videos / "synth").glob("*.mp4")))
    assert verify_dataset(dataset) == []


def check_rules(folder: Path, rules: dict[str, str]) -> None:
    """Passes if every broken file was refused by its rule, once, in the first run; and none in the second."""
    dataset = folder / "outputs" / "data" / "set"
    rejects = [json.loads(line) for line in (dataset / "rejects.jsonl").read_text().splitlines()]
    broken = Counter((r["file"].partition("/")[2], r["rule"]) for r in rejects if r["file"].startswith("broken/"))
    assert broken == Counter((name, rule) for name, rule in rules.items() if rule != "kept")
    assert {"unreadable", "too_short", "picture_size", "bad_caption", "no_caption"} <= set(rules.values())


def test_the_page_works_on_a_few_clips(runner: Runner, tmp_path: Path) -> None:
    """The blocks up to training and Ray, which the next test has."""
    runner.replaced |= {"clips=200": "clips=14", "clips=20 ": "clips=3 ", "workers=2": "workers=1"}
    runner.here = True
    blocks = [(kind, text) for kind, text in try_it() if "contentv train" not in text and "ray start" not in text]
    for kind, text in blocks:
        runner.run(kind, text)
    assert [words[1] for words in runner.commands] == [
        "synth", "curate", "curate", "report", "synth", "curate", "curate", "index",
    ]  # fmt: skip
    check_rules(tmp_path, runner.names["rules"])
    check_all_accounted_for(tmp_path)
    assert (tmp_path / "outputs" / "data" / "set" / "report.html").stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.dist
def test_every_command_of_the_page_on_data_works(runner: Runner, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `curation` is not installed")
    for kind, text in try_it():
        runner.run(kind, text)
    assert len(runner.commands) >= 15
    check_rules(tmp_path, runner.names["rules"])
    check_all_accounted_for(tmp_path)
    data = tmp_path / "outputs" / "data"
    by_ray = json.loads((data / "by_ray" / "curation" / "run-0001" / "summary.json").read_text())
    assert by_ray["workers"] == 2
    picked = [meta for meta in read_metas(data / "picked")]
    assert {(meta["source"], meta["caption"]) for meta in picked} == {("picked", "a shape that moves")}
    assert len(picked) >= 18
    ledger = [json.loads(line)["ids"] for line in (data / "run" / "ledger.jsonl").read_text().splitlines()]
    trained = [key for step in ledger for key in step]
    assert len(trained) == 4 * 8
    assert sum("-f1_h48_w48-" in key for key in trained) == 8
