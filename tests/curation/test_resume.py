"""Killed anywhere, a curation goes on: the dataset is that of a run without kills, to the byte, on any layout."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from curation_process import config_of, curate_folder, tree
from toy_encoders import ListSink, ToyText, ToyVAE
from toy_media import make_world, put

from contentv.base.errors import StoppedBySignalError, UserError
from contentv.base.lock import lock_folder
from contentv.curation.curate import curate
from contentv.data import DatasetInfo, read_metas, verify_dataset

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files in three chunks: good ones, a copy, one without a caption, one that is no video."""
    folder = tmp_path_factory.mktemp("films")
    for n in range(4):
        put(folder / "web" / f"{n}.mp4", make_world(n, 18 + n), f"world {n}")
    put(folder / "copy.mp4", (folder / "web" / "0.mp4").read_bytes(), "a copy")
    put(folder / "mute.mp4", make_world(9))
    put(folder / "broken.mp4", b"no video at all", "broken")
    return folder


@pytest.fixture(scope="module")
def truth(films: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The dataset of one process that nothing disturbs."""
    output = tmp_path_factory.mktemp("truth") / "d"
    report = curate_folder(films, output)
    assert (report.files, report.clips, report.kept, report.rejected) == (7, 4, 8, 3)
    assert report.rules == {"duplicate:bytes": 1, "no_caption": 1, "unreadable": 1}
    assert verify_dataset(output) == []
    return tree(output)


def process(source: Path, output: Path, *, point: int | None = None, **changes: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "curation_process.py"), str(source), str(output), json.dumps(changes)]
    paths = [str(ROOT), str(ROOT / "kernels"), str(HERE)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *([] if point is None else [str(point)])], env=env, start_new_session=True)


def test_two_workers_make_the_same_dataset(films: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    curate_folder(films, tmp_path / "d", workers=2)
    assert tree(tmp_path / "d") == truth


def test_killed_at_any_file_it_goes_on(
    films: Path, truth: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file appears by a renaming: the run is ended before or after each of some, again and again."""
    replace = os.replace
    rng = random.Random(4)
    left = rng.randrange(1, 9)

    def deadly(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            if left % 2:
                replace(source, target)
            raise KilledError
        replace(source, target)

    monkeypatch.setattr(os, "replace", deadly)
    output = tmp_path / "d"
    kills = 0
    while True:
        try:
            curate_folder(films, output)
            break
        except KilledError:
            kills += 1
            # More files each time: a run that may write three at most would never have a chunk's pair.
            left = rng.randrange(2, 7 + kills)
    assert kills >= 4
    assert tree(output) == truth
    rows = [json.loads(line) for line in (output / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert sorted(row["file"] for row in rows if row["rule"] != "duplicate:bytes") == ["broken.mp4", "mute.mp4"]
    assert len({meta["key"] for meta in read_metas(output)}) == DatasetInfo.load(output).samples == 8


def kill_until_done(films: Path, output: Path, points: list[int], **changes: Any) -> int:
    kills = 0
    for point in points:
        code = process(films, output, point=point, **changes).wait(300)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL
        kills += 1
    assert process(films, output, **changes).wait(300) == 0
    return kills


@pytest.mark.slow
def test_many_real_kills(films: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    rng = random.Random(0)
    assert kill_until_done(films, tmp_path / "d", [rng.randrange(1, 20) for _ in range(14)], workers=2) >= 3
    assert tree(tmp_path / "d") == truth


def test_workers_end_with_a_killed_process_and_it_goes_on(films: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    running = process(films, tmp_path / "d", workers=2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "d" / "curation" / "run-0001" / "scan").is_dir():
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait(60)

    def group() -> list[str]:
        found = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(running.pid)], capture_output=True, text=True)
        return [line for line in found.stdout.splitlines() if "Z" not in line]

    while group():
        assert time.monotonic() < deadline, group()
        time.sleep(0.1)
    curate_folder(films, tmp_path / "d")
    assert tree(tmp_path / "d") == truth


def test_what_a_killed_process_had_begun_is_removed(
    films: Path, truth: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "d"
    interrupted(films, output, monkeypatch, renamings=14)
    (output / "thumbnails").mkdir(exist_ok=True)
    for place in (".", "thumbnails", "curation/run-0001", "curation/run-0001/scan", "shards/f9_h32_w32"):
        (output / place / ".begun.abc.tmp").write_bytes(b"half a fi")
    curate_folder(films, output)
    assert tree(output) == truth


def test_a_signal_stops_it_and_it_goes_on(films: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    config, sink = config_of(films, tmp_path / "toy"), ListSink()
    asked = iter([False] * 6 + [True] * 1000)
    with pytest.raises(StoppedBySignalError, match="same command"):
        curate(config, ToyVAE(), ToyText(), sink, stopping=lambda: next(asked))
    assert not sink.published
    assert curate(config, ToyVAE(), ToyText(), sink).kept == 8
    whole = ListSink()
    curate(config_of(films, tmp_path / "whole"), ToyVAE(), ToyText(), whole)
    assert [sample["key"] for sample in sink.samples_there] == [sample["key"] for sample in whole.samples_there]


def test_sigterm_ends_with_75(films: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    running = process(films, tmp_path / "d")
    while not (tmp_path / "d" / "curation" / "run-0001" / "scan" / "000000.jsonl").is_file():
        assert running.poll() is None
        time.sleep(0.02)
    running.terminate()
    assert running.wait(120) == 75
    curate_folder(films, tmp_path / "d")
    assert tree(tmp_path / "d") == truth


def test_files_that_come_later_are_added(films: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "d"
    shutil.copytree(films, source)
    curate_folder(source, output)
    before = {name: data for name, data in tree(output).items() if name.startswith("shards/")}
    first = {meta["key"] for meta in read_metas(output)}

    put(source / "new.mp4", make_world(20), "new")
    put(source / "again.mp4", (source / "web" / "1.mp4").read_bytes(), "the bytes of web/1.mp4")
    put(source / "smaller.mp4", make_world(2, 20)[:, ::2, ::2].repeat(2, 1).repeat(2, 2), "web/2.mp4, coarser")
    (source / "mute.txt").write_text("not mute any more")
    report = curate_folder(source, output)
    assert (report.files, report.skipped, report.kept, report.run) == (10, 6, 4, "run-0002")
    assert {k: v for k, v in tree(output).items() if k in before} == before
    metas = list(read_metas(output))
    assert len(metas) == len({meta["key"] for meta in metas}) == 12
    assert first <= {meta["key"] for meta in metas}
    assert {meta["caption"] for meta in metas if meta["key"] not in first} == {"new", "not mute any more"}
    rows = [json.loads(line) for line in (output / "rejects.jsonl").read_text("utf-8").splitlines()]
    by_file = {row["file"]: row for row in rows if row["rule"] != "duplicate:bytes"}
    assert by_file.keys() == {"broken.mp4", "smaller.mp4"}
    assert len(rows) == 3, "each rejected file once, whatever run rejected it"
    assert by_file["smaller.mp4"]["rule"] == "duplicate:near"
    assert by_file["smaller.mp4"]["reason"].startswith("looks like web/2.mp4 (scene 0, clip 0)")
    assert verify_dataset(output) == []

    nothing = curate_folder(source, output)
    assert (nothing.kept, nothing.run, DatasetInfo.load(output).samples) == (0, "run-0003", 12)


def interrupted(films: Path, output: Path, monkeypatch: pytest.MonkeyPatch, renamings: int = 6) -> None:
    replace, left = os.replace, renamings

    def deadly(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", deadly)
        with pytest.raises(KilledError):
            curate_folder(films, output)


def test_other_settings_are_refused_while_a_run_is_unfinished(
    films: Path, truth: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "d"
    interrupted(films, output, monkeypatch)
    with pytest.raises(UserError, match=r"(?s)min_clip_s was 1\.0, is 1\.5.*restart=true"):
        curate_folder(films, output, min_clip_s=1.5)
    with pytest.raises(UserError, match="of other files: input was"):
        curate_folder(films / "web", output)
    # What nothing has been made with yet may change.
    report = curate_folder(films, output, dedup={"exact": False, "near": False})
    assert (report.kept, report.rules) == (10, {"no_caption": 1, "unreadable": 1})


def test_restart_throws_the_unfinished_run_away(
    films: Path, truth: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "d"
    curate_folder(films, output, min_clip_s=1.5)
    shutil.rmtree(output)
    interrupted(films, output, monkeypatch, renamings=14)
    curate_folder(films, output, min_clip_s=1.5, restart=True)
    curate_folder(films, tmp_path / "other", min_clip_s=1.5)
    assert tree(output) == tree(tmp_path / "other")
    curate_folder(films, output, min_clip_s=1.5, restart=True)
    assert DatasetInfo.load(output).samples == 8, "a finished run is never thrown away"


def test_captions_written_after_a_failure_are_found(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "d"
    put(source / "a.mp4", make_world(1))
    with pytest.raises(UserError, match="no file has a caption"):
        curate_folder(source, output)
    (source / "a.txt").write_text("now there is one")
    assert curate_folder(source, output).kept == 2


def test_other_filters_after_a_run_that_kept_nothing(films: Path, tmp_path: Path) -> None:
    from contentv.curation.filters import FilterConfig

    with pytest.raises(UserError, match=r"(?s)nothing was kept.*nothing need be decoded again"):
        curate_folder(films, tmp_path / "d", filters=FilterConfig(min_visual=1.0))
    scans = {path: path.stat().st_mtime_ns for path in (tmp_path / "d" / "curation").rglob("scan/*.jsonl")}
    assert len(scans) == 3
    assert curate_folder(films, tmp_path / "d", filters=FilterConfig(min_visual=0.0)).kept == 8
    assert {path: path.stat().st_mtime_ns for path in scans} == scans


def test_two_curations_do_not_share_a_folder(films: Path, tmp_path: Path) -> None:
    (tmp_path / "d" / "curation").mkdir(parents=True)
    held = lock_folder(tmp_path / "d" / "curation", "testing")
    try:
        with pytest.raises(UserError, match="another process is curating"):
            curate(config_of(films, tmp_path / "d"), ToyVAE(), ToyText(), ListSink())
    finally:
        os.close(held)


def test_a_full_disk_is_told_and_mended(
    films: Path, truth: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = os.replace, 5

    def full(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"no space left on the disk \(\d+ bytes needed, \d+ free\)"):
            curate_folder(films, tmp_path / "d")
    curate_folder(films, tmp_path / "d")
    assert tree(tmp_path / "d") == truth


def test_a_file_that_changes_between_the_phases_is_rejected(films: Path, tmp_path: Path, monkeypatch: Any) -> None:
    source, output = tmp_path / "in", tmp_path / "d"
    shutil.copytree(films, source)
    interrupted(source, output, monkeypatch, renamings=12)
    (source / "web" / "3.mp4").unlink()
    report = curate_folder(source, output)
    assert report.kept in (6, 8)  # its chunk may have been encoded before
    gone = [row for row in (output / "rejects.jsonl").read_text().splitlines() if "web/3.mp4" in row]
    assert len(gone) == (report.kept == 6)
