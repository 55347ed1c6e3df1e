"""`contentv index`: what it makes, takes in, finds and refuses, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import save

from contentv.base.types import Bucket, TextCond
from contentv.cli.main import main
from contentv.data import DatasetInfo, DatasetWriter, TextInfo, VaeInfo, open_dataset, read_metas, verify_dataset

VAE = VaeInfo("vae", (0.0, 0.0), (1.0, 1.0), 2, 4, 8)
TEXT = TextInfo("text", 6, 5, 3)
BUCKET = Bucket(5, 16, 16)
FOLDER = f"shards/{BUCKET.name}"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> tuple[int, str]:
        code = main(("index", *arguments))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def meta(name: str, **changes: object) -> dict[str, object]:
    return {
        "key": name, "caption": "a red ball", "source": "films", "kind": "video", "num_frames": 5, "height_px": 16,
        "width_px": 16, "fps": 8.0, "start_s": 0.0, "duration_s": 0.625, "visual_raw": 1.0, "motion_raw": 2.0,
        "scores": {}, "media_xxh128": None, **changes,
    }  # fmt: skip


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"latents": (2, 2, 2, 2), "text_tokens": (3, 6), "text_pooled": (5,)}
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    null = TextCond(torch.zeros(1, 3, 6, dtype=torch.bfloat16), torch.ones(1, 5, dtype=torch.bfloat16))
    with DatasetWriter(tmp_path / "d", VAE, TEXT, null, max_shard_bytes=8_000) as writer:
        for i in range(6):
            fields = {k: v for k, v in meta("").items() if k not in ("key", "media_xxh128")}
            writer.add(f"ours-{i}", fields, **tensors(i), bucket=BUCKET)
    return tmp_path / "d"


def foreign(path: Path, samples: dict[str, dict[str, object]]) -> None:
    """Writes a tar as plain webdataset does."""
    with webdataset.TarWriter(str(path)) as tar:
        for name, members in samples.items():
            tar.write({"__key__": name, **members})


def keys(path: Path) -> list[str]:
    return [m["key"] for m in read_metas(path)]


def test_missing_and_unsound_indexes_are_made_again(run, dataset: Path) -> None:
    indexes = sorted(dataset.glob("shards/*/*.index.json"))
    assert len(indexes) > 1
    written = [index.read_bytes() for index in indexes]
    indexes[0].unlink()
    indexes[1].write_bytes(written[1].replace(b"ours", b"hers"))
    code, said = run(f"path={dataset}")
    assert code == 0
    assert said.count("index made") == 2
    assert [index.read_bytes() for index in indexes] == written
    assert "index made" not in run(f"path={dataset}")[1]


def test_others_tars_are_taken_in_after_all_samples_were_checked(run, dataset: Path) -> None:
    bad = tensors(9)
    bad["latents"] = bad["latents"] / 0.0
    foreign(
        dataset / FOLDER / "theirs.tar",
        {
            "their-0": {"json": meta("their-0", source="shows"), "safetensors": save(tensors(10))},
            "their-1": {"json": meta("their-1"), "safetensors": save(bad)},
            "their-2": {
                "json": meta("their-2"),
                "safetensors": save({**tensors(1), "latents": torch.zeros(2, 2, 2, 3)}),
            },
            "their-3": {"json": {"caption": "and no more"}, "safetensors": save(tensors(11))},
            "their-4": {"json": meta("another"), "safetensors": save(tensors(12))},
            "their-5": {"json": meta("their-5"), "safetensors": b"not tensors"},
            "their-6": {"json": meta("their-6"), "safetensors": save(tensors(13)), "pth": b"\x80\x04"},
            "their-7": {"json": meta("their-7")},
        },
    )
    null_text = (dataset / "null_text.safetensors").read_bytes()
    code, said = run(f"path={dataset}")
    assert code == 0
    assert "adopt=true" in said
    assert len(keys(dataset)) == 6
    code, said = run(f"path={dataset}", "adopt=true")
    assert code == 0
    assert f"adopted: {BUCKET.name}/theirs.tar" in said
    for number, reason in ((1, "not finite"), (2, "latents is"), (3, "missing"), (4, "another sample"), (5, "header")):
        line = next(line for line in said.splitlines() if line.startswith("left out") and f"their-{number}" in line)
        assert reason in line
    assert "their-6.pth" in said
    assert keys(dataset) == [f"ours-{i}" for i in range(6)] + ["their-0", "their-6"]
    assert (dataset / "null_text.safetensors").read_bytes() == null_text
    assert verify_dataset(dataset) == []
    assert set(json.loads((dataset / "quality.json").read_text())["sources"]) == {"films", "shows"}
    (dataset / FOLDER / "theirs.index.json").unlink()
    assert run(f"path={dataset}", "verify=true")[0] == 0, "the index is made again without the samples left out"
    assert len(keys(dataset)) == 8
    stream = open_dataset(dataset, global_batch_size=8, micro_batch_size=8, prefetch=0)
    assert {k for batch in next(stream) for k in batch.keys} == set(keys(dataset))


def test_a_tar_without_a_usable_sample_is_not_taken_in(run, dataset: Path) -> None:
    foreign(dataset / FOLDER / "theirs.tar", {"x": {"json": {}, "safetensors": b""}})
    before = (dataset / "dataset.json").read_bytes()
    code, said = run(f"path={dataset}", "adopt=true")
    assert code == 0
    assert "left out" in said
    assert (dataset / "dataset.json").read_bytes() == before


def test_verify_reads_every_byte_and_ends_with_2(run, dataset: Path) -> None:
    code, said = run(f"path={dataset}", "verify=true")
    assert (code, "every byte read" in said) == (0, True)
    tars = sorted((dataset / FOLDER).glob("*.tar"))
    data = bytearray(tars[0].read_bytes())
    data[600] ^= 1
    tars[0].write_bytes(data)
    data = bytearray(tars[1].read_bytes())
    data[10] ^= 1  # in a header: no sample is hurt, and yet it is told
    tars[1].write_bytes(data)
    code, said = run(f"path={dataset}", "verify=true")
    assert code == 2
    assert "ours-0" in said
    assert f"fault: {BUCKET.name}/{tars[1].name}: the tar is not what was written" in said
    assert "3 faults" in said
    tars[1].unlink()
    code, said = run(f"path={dataset}", "verify=true")
    assert code == 2
    assert "the tar is missing" in said


def test_an_index_cannot_be_made_for_a_tar_that_was_altered(run, dataset: Path) -> None:
    tar = sorted((dataset / FOLDER).glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-2000])
    index = tar.with_name(f"{tar.stem}.index.json")
    index.unlink()
    code, said = run(f"path={dataset}")
    assert code == 2
    assert tar.name in said
    assert not index.exists()


def test_quality_is_fitted_again(run, dataset: Path) -> None:
    quality = (dataset / "quality.json").read_bytes()
    (dataset / "quality.json").unlink()
    assert run(f"path={dataset}", "refit=true")[0] == 0
    assert (dataset / "quality.json").read_bytes() == quality


@pytest.mark.parametrize("damage", ["cut", "bucket", "twice"])
def test_what_cannot_be_adopted_is_refused_and_nothing_changes(run, dataset: Path, damage: str) -> None:
    folder = dataset / ("shards/odd" if damage == "bucket" else FOLDER)
    folder.mkdir(exist_ok=True)
    name = "ours-1" if damage == "twice" else "new"
    foreign(folder / "theirs.tar", {name: {"json": meta(name), "safetensors": save(tensors(1))}})
    if damage == "cut":
        (folder / "theirs.tar").write_bytes((folder / "theirs.tar").read_bytes()[:1500])
    before = (dataset / "dataset.json").read_bytes()
    code, said = run(f"path={dataset}", "adopt=true")
    assert code == 2
    assert {"cut": "cut short", "bucket": "odd", "twice": "twice"}[damage] in said
    assert (dataset / "dataset.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((), "path is not set"), (("path=/nowhere",), "dataset.json"), (("path=x", "adpt=true"), "adopt")],
)
def test_mistakes_are_one_message(run, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], word: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = run(*arguments)
    assert code == 2
    assert word in said
    assert "Traceback" not in said


def test_a_url_can_be_verified_and_not_changed(run, dataset: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/index/d", recursive=True)
    try:
        assert run("path=memory://index/d", "verify=true")[0] == 0
        code, said = run("path=memory://index/d", "adopt=true")
        assert code == 2
        assert "folder of this machine" in said
    finally:
        memory.rm("/index", recursive=True)


READ = """
import sys, json, webdataset
from safetensors.torch import load
found = webdataset.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False)
for s in found:
    print(s["__key__"], json.loads(s["json"])["key"], tuple(load(s["safetensors"])["latents"].shape))
"""


def test_webdataset_reads_what_was_adopted_and_ours(dataset: Path, run) -> None:
    foreign(dataset / FOLDER / "theirs.tar", {"a/b": {"json": meta("a/b"), "safetensors": save(tensors(3))}})
    assert run(f"path={dataset}", "adopt=true")[0] == 0
    tars = [str(DatasetInfo.load(dataset).shard_path(s)) for s in DatasetInfo.load(dataset).shards]
    done = subprocess.run([sys.executable, "-c", READ, *tars], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{k} {k} (2, 2, 2, 2)" for k in [*(f"ours-{i}" for i in range(6)), "a/b"]]
