"""Checkpoints on disk: every damage is found and named, and no failure of a save costs an earlier checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from contentv.base.errors import UserError
from contentv.engine import checkpoint_files as files
from contentv.engine.zero import ZeroEngine
from contentv.parallel.mesh import ParallelConfig


@pytest.fixture(scope="module")
def engine() -> Iterator[ZeroEngine]:
    made = toy.make_engine(ParallelConfig())
    toy.train(made, 2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def saved(engine: ZeroEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several files per kind."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000002"
    engine.save(folder, {"cursor": 7}, chunk_bytes=200_000)
    return folder


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """Two checkpoints, the newer a copy of the older: damage one and the other is left."""
    shutil.copytree(saved, tmp_path / "step-00000001")
    shutil.copytree(saved, tmp_path / "step-00000002")
    return tmp_path


def test_what_is_on_the_disk(engine: ZeroEngine, saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert (manifest["version"], manifest["step"], manifest["optimizer_step"]) == (1, 2, 2)
    assert manifest["extra"] == {"cursor": 7}
    assert {p.name for p in saved.iterdir()} == {"manifest.json", *manifest["files"]}
    assert len([f for f in manifest["files"] if f.startswith("param-")]) > 1
    assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors"}
    assert (saved.parent / "latest").read_text() == "step-00000002\n"
    assert not files.partial_folder(saved).exists()
    raw, ema = dict(files.read_weights(saved)), dict(files.read_weights(saved, ema=True))
    for got, want in ((raw, engine.state_tensors()), (ema, engine.state_tensors(ema=True))):
        assert all(torch.equal(got[n], v) for n, v in want)
    assert raw.keys() == ema.keys()


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "grow", "empty"])
@pytest.mark.parametrize("kind", ["param", "exp_avg", "exp_avg_sq", "ema"])
def test_damage_is_found_named_and_passed_over(engine: ZeroEngine, root: Path, damage: str, kind: str) -> None:
    victim = sorted((root / "step-00000002").glob(f"{kind}-*"))[-1]
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    replaced = {"truncate": data[:-1], "grow": data + b"\0", "empty": b"", "flip": data}
    victim.unlink() if damage == "delete" else victim.write_bytes(replaced[damage])
    before = dict(engine.state_tensors())
    with pytest.raises(UserError, match=victim.name):
        engine.load(root / "step-00000002")
    assert all(torch.equal(before[n], v) for n, v in engine.state_tensors())
    assert files.newest_complete(root) == root / "step-00000001"
    assert engine.newest_checkpoint(root) == root / "step-00000001"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"version": 99}'])
def test_manifest_missing_or_unreadable(engine: ZeroEngine, root: Path, content: bytes | None) -> None:
    path = root / "step-00000002" / "manifest.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="manifest"):
        engine.load(root / "step-00000002")
    assert files.newest_complete(root) == root / "step-00000001"


def test_a_file_outside_the_folder_is_not_read(root: Path) -> None:
    folder = root / "step-00000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    file = sorted(manifest["files"])[0]
    shutil.copy(folder / file, root / "outside")
    manifest["files"]["../outside"] = manifest["files"].pop(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert files.newest_complete(root) == root / "step-00000001"


def test_nothing_complete(tmp_path: Path) -> None:
    (tmp_path / "step-00000003.tmp").mkdir()
    (tmp_path / "latest").write_text("")
    assert files.newest_complete(tmp_path) is None
    assert files.newest_complete(tmp_path / "nowhere") is None


def test_another_model_is_refused(saved: Path) -> None:
    other = toy.make_engine(ParallelConfig(), model=toy.make_model(num_layers=3))
    with pytest.raises(UserError, match=r"another model.*parameters missing, such as transformer_blocks"):
        other.load(saved)
    other.close()
    wide = toy.make_engine(ParallelConfig(), model=toy.make_model(pooled_projection_dim=12))
    with pytest.raises(UserError, match=r"is \[96, 20\] in it, should be \[96, 12\]"):
        wide.load(saved)
    wide.close()


def test_without_a_moving_average(tmp_path: Path, saved: Path) -> None:
    plain = toy.make_engine(ParallelConfig(), config=toy.optim_config(ema_decay=0.0), model=toy.make_model(3))
    plain.load(saved)  # one that has it is fine
    plain.save(tmp_path / "step-00000002", {})
    with pytest.raises(UserError, match="no moving average"):
        next(files.read_weights(tmp_path / "step-00000002", ema=True))
    plain.close()
    averaging = toy.make_engine(ParallelConfig(), model=toy.make_model(4))
    averaging.load(tmp_path / "step-00000002")
    weights = dict(averaging.state_tensors())
    assert all(torch.equal(weights[n], v) for n, v in averaging.state_tensors(ema=True))
    averaging.close()


def test_saved_before_the_first_step(tmp_path: Path) -> None:
    first = toy.make_engine(ParallelConfig(zero_stage=1))
    first.save(tmp_path / "step-00000000", {})
    want = toy.train(first, 2)
    first.close()
    second = toy.make_engine(ParallelConfig(zero_stage=1), model=toy.make_model(8))
    second.load(tmp_path / "step-00000000")
    assert toy.train(second, 2) == want
    second.close()


def test_bf16_master_weights_survive(tmp_path: Path) -> None:
    curves = []
    for stage in (3, 1):  # two kinds of optimiser in DeepSpeed
        first = toy.make_engine(ParallelConfig(zero_stage=stage), precision="bf16")
        toy.train(first, 2)
        first.save(tmp_path / f"{stage}", {})
        want = toy.train(first, 2)
        first.close()
        again = toy.make_engine(ParallelConfig(zero_stage=stage), precision="bf16", model=toy.make_model(8))
        again.load(tmp_path / f"{stage}")
        assert toy.train(again, 2) == want
        again.close()
        other = toy.make_engine(ParallelConfig(zero_stage=4 - stage), precision="bf16", model=toy.make_model(9))
        other.load(tmp_path / f"{stage}")
        curves.append((toy.train(other, 2), want))
        other.close()
    for got, want in curves:
        assert got[0] == pytest.approx(want[0], rel=1e-3)


def test_old_checkpoints_go_the_newest_stay(engine: ZeroEngine, tmp_path: Path) -> None:
    for name in ("step-00000009", "step-00000010", "step-00000100"):
        engine.save(tmp_path / name, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000100"]


@pytest.mark.parametrize("fails_at", range(1, 12))
def test_a_crash_anywhere_in_a_save_leaves_a_complete_checkpoint(
    fails_at: int, engine: ZeroEngine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the disk may be the last: here one of them ends the process, as SIGKILL would."""
    calls = 0

    class Killed(BaseException):
        pass

    def dying(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise Killed
            return real(*args, **kwargs)

        return call

    for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (files.shutil, "rmtree")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    with contextlib.suppress(Killed):
        engine.save(root / "step-00000002", {"new": True})  # replaces one of the same name: the hardest case
    monkeypatch.undo()
    newest = files.newest_complete(root)
    assert newest is not None
    assert newest.name in ("step-00000002", "step-00000002.old")
    if calls < fails_at:
        assert engine.load(newest) == {"new": True}
    engine.save(root / "step-00000002", {"again": True})  # what the crash left behind is in nobody's way
    assert engine.load(root / "step-00000002") == {"again": True}
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_a_full_disk_is_reported_and_costs_nothing(
    engine: ZeroEngine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"needs \d+ bytes, 1000 bytes are free"):
        engine.save(root / "step-00000003", {})
    monkeypatch.undo()

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_durably", full)
    with pytest.raises(UserError, match="No space left on device"):
        engine.save(root / "step-00000003", {})
    monkeypatch.undo()
    assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002"]
    assert files.newest_complete(root) == root / "step-00000002"
    engine.save(root / "step-00000003", {})
    assert files.newest_complete(root) == root / "step-00000003"
