"""What the writer leaves on disk: the layout people are promised, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
import xxhash
from data_factory import IMAGE, SMALL, TEXT, VAE, WIDE, build, fill, key, meta, null_text, source, tensors, writer
from safetensors.torch import load, load_file, save

from contentv.base.errors import UserError
from contentv.base.types import Bucket, TextCond
from contentv.data import DatasetInfo, DatasetWriter, TextInfo, VaeInfo, read_metas, verify_dataset


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_sample_is_stored_as_the_interface_says(tmp_path: Path) -> None:
    with writer(tmp_path / "d") as target:
        target.add("clip-1", meta(4), **tensors(4), bucket=SMALL, media=b"an mp4")
    found = members(tmp_path / "d/shards/f5_h16_w16/000000.tar")
    assert set(found) == {"clip-1.json", "clip-1.safetensors", "clip-1.mp4"}
    assert json.loads(found["clip-1.json"]) == {
        **meta(4), "key": "clip-1", "motion_raw": None, "media_xxh128": xxhash.xxh128_hexdigest(b"an mp4"),
    }  # fmt: skip
    stored = load(found["clip-1.safetensors"])
    assert stored.keys() == tensors(4).keys()
    for name, tensor in tensors(4).items():
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], tensor)
    null = load_file(tmp_path / "d/null_text.safetensors")
    assert torch.equal(null["text_tokens"], null_text().tokens[0])
    assert torch.equal(null["text_pooled"], null_text().pooled[0])


def test_dataset_json_counts_and_checksums_are_true(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 23, IMAGE: 4})
    record = json.loads((path / "dataset.json").read_text())
    assert record["version"] == 1
    assert record["buckets"] == {
        "f1_h16_w16": {"samples": 4, "latent_shape": [2, 1, 2, 2]},
        "f5_h16_w16": {"samples": 23, "latent_shape": [2, 2, 2, 2]},
    }
    assert record["sources"] == {"films": {"samples": 27}}
    assert len(record["shards"]) > 2, "max_shard_bytes is to give several shards"
    for shard in record["shards"]:
        tar = path / "shards" / shard["name"]
        index = json.loads(tar.with_name(f"{tar.stem}.index.json").read_text())
        data = tar.read_bytes()
        assert (shard["bytes"], shard["xxh128"]) == (len(data), xxhash.xxh128_hexdigest(data))
        ends = [m["offset"] + m["size"] for s in index["samples"] for m in s["members"].values()]
        assert max(ends) <= 20_000
        assert shard["samples"] == len(index["samples"])
        for name, content in members(tar).items():
            stem, _, suffix = name.partition(".")
            place = next(s for s in index["samples"] if s["key"] == stem)["members"][suffix]
            assert data[place["offset"] : place["offset"] + place["size"]] == content
            assert place["xxh128"] == xxhash.xxh128_hexdigest(content)
    assert record["totals"]["samples"] == 27
    assert record["totals"]["bytes"] == sum(shard["bytes"] for shard in record["shards"])
    info = DatasetInfo.load(path)
    assert (info.vae, info.text, info.samples) == (VAE, TEXT, 27)
    assert info.to_dict() == record


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first = tree(build(tmp_path / "one", {SMALL: 9, WIDE: 3}))
    second = tree(build(tmp_path / "two", {SMALL: 9, WIDE: 3}))
    assert first == second
    with tarfile.open(tmp_path / "one/shards/f5_h16_w16/000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "contentv", 0o644)}


def test_nothing_unfinished_is_a_dataset(tmp_path: Path) -> None:
    path = tmp_path / "d"
    target = writer(path, max_shard_bytes=4_000)
    fill(target, 8)
    assert list(path.rglob("*.tar"))
    assert list(path.rglob("*.tar.tmp"))
    with pytest.raises(UserError, match=r"dataset\.json"):
        source(path)
    target.abandon()
    assert not list(path.rglob("*.tmp"))
    with pytest.raises(UserError, match=r"dataset\.json"):
        DatasetInfo.load(path)


def test_an_exception_leaves_the_dataset_as_it_was(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 5})
    before = tree(path)

    def fail_while_appending() -> None:
        with writer(path) as target:
            fill(target, 3, first=5)
            raise RuntimeError("the encoder failed")

    with pytest.raises(RuntimeError, match="the encoder failed"):
        fail_while_appending()
    assert tree(path) == before


def test_a_killed_writer_is_cleaned_up_after_and_its_shards_can_be_adopted(tmp_path: Path) -> None:
    path = tmp_path / "d"
    pid = os.fork()
    if pid == 0:  # a writer that dies without a chance to tidy up, one full shard and one half done
        target = writer(path, max_shard_bytes=5_000)
        fill(target, 3)
        os._exit(9 if list(path.rglob("*.tar")) and list(path.rglob("*.tmp")) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with writer(path) as target:
        assert not list(path.rglob("*.tmp"))
        assert target.adopt_shards() == ["f5_h16_w16/000000.tar"]
        assert [key(i) in target for i in range(3)] == [True, True, False]
        fill(target, 1, first=2)
    assert [m["key"] for m in read_metas(path)] == [key(i) for i in range(3)]
    assert verify_dataset(path) == []


def test_appending_adds_shards_and_keeps_the_old_ones(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 12})
    old = tree(path)
    with writer(path) as target:
        assert len(target) == 12
        assert key(3) in target
        fill(target, 4, first=12, source="shows")
        fill(target, 2, bucket=WIDE)
    new = tree(path)
    assert all(new[name] == data for name, data in old.items() if name.startswith("shards"))
    info = DatasetInfo.load(path)
    assert info.bucket_samples == {"f5_h16_w16": 16, "f1_h16_w32": 2}
    assert info.sources == {"films": 14, "shows": 4}
    assert {m["key"] for m in read_metas(path)} == {key(i) for i in range(16)} | {key(i, WIDE) for i in range(2)}
    assert set(json.loads((path / "quality.json").read_text())["sources"]) == {"films", "shows"}


def test_flush_makes_what_is_there_a_dataset_and_goes_on(tmp_path: Path) -> None:
    with writer(tmp_path / "d") as target:
        fill(target, 3)
        target.flush()
        assert DatasetInfo.load(tmp_path / "d").samples == 3
        fill(target, 2, first=3)
    assert DatasetInfo.load(tmp_path / "d").samples == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a b"}, "not usable"),
        ({"key": "../a"}, "not usable"),
        ({"key": "a.b"}, "not usable"),
        ({"key": "k" * 81}, "not usable"),
        ({"bucket": Bucket(4, 16, 16)}, "grid"),
        ({"bucket": Bucket(5, 16, 20)}, "grid"),
        ({"bucket": WIDE}, "latents is"),
        ({"latents": torch.zeros(2, 2, 2, 2, dtype=torch.float64)}, "latents is"),
        ({"latents": torch.full((2, 2, 2, 2), torch.nan)}, "finite"),
        ({"text_tokens": torch.zeros(4, 6)}, "text_tokens is"),
        ({"media": b"x", "media_suffix": "exe"}, "mp4 or jpg"),
        ({"meta": meta(0, caption=None)}, "caption"),
        ({"meta": meta(0, kind="gif")}, "kind"),
        ({"meta": meta(0, num_frames=0)}, "num_frames"),
        ({"meta": meta(0, fps=float("inf"))}, "fps"),
        ({"meta": meta(0, visual_raw="high")}, "visual_raw"),
        ({"meta": meta(0, colour="red")}, "unknown fields colour"),
        ({"meta": {"caption": "only this"}}, "missing required field"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    sample = {"key": "good", "meta": meta(0), **tensors(0), "bucket": SMALL, **change}
    with writer(tmp_path / "d") as target:
        fill(target, 1)
        with pytest.raises(UserError, match=message):
            target.add(**sample)
    assert [m["key"] for m in read_metas(tmp_path / "d")] == [key(0)]


def test_keys_are_unique_in_the_whole_dataset(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 2})
    with writer(path) as target:
        fill(target, 1, first=2)
        for taken in (1, 2):
            with pytest.raises(UserError, match="already in the dataset"):
                target.add(key(taken), meta(0), **tensors(0, WIDE), bucket=WIDE)


def test_other_encoders_other_null_text_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 2})
    other_vae = VaeInfo("another", VAE.latents_mean, VAE.latents_std, 2, 4, 8)
    other_text = TextInfo("another", 6, 5, 3)
    with pytest.raises(UserError, match="other VAE"):
        DatasetWriter(path, other_vae, TEXT, null_text())
    with pytest.raises(UserError, match="other text encoders"):
        DatasetWriter(path, VAE, other_text, null_text())
    with pytest.raises(UserError, match="null_text"):
        DatasetWriter(path, VAE, TEXT, TextCond(torch.zeros(1, 3, 7), torch.zeros(1, 5)))
    with writer(path), pytest.raises(UserError, match="another process"):
        writer(path)
    writer(path).close()  # the lock is gone, and closing without a change is fine


def test_no_samples_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sample was written"):
        writer(tmp_path / "d").close()
    assert not (tmp_path / "d/dataset.json").exists()


def test_a_full_disk_is_told_with_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = build(tmp_path / "d", {SMALL: 2})
    before = tree(path)

    def append_until_full() -> None:
        with writer(path) as target:
            fill(target, 1, first=2)
            monkeypatch.setattr(webdataset.TarWriter, "write", full)
            fill(target, 1, first=3)

    with pytest.raises(UserError, match=r"bytes needed, \d+ free"):
        append_until_full()
    assert tree(path) == before


READ_SECURELY = """
import glob, sys, webdataset
from webdataset.tariterators import tar_file_expander, group_by_keys
assert webdataset.utils.enforce_security
streams = [dict(url=path, stream=open(path, "rb")) for path in sorted(glob.glob(sys.argv[1]))]
for sample in group_by_keys(tar_file_expander(iter(streams))):
    print(sample["__key__"], len(sample["json"]), len(sample["safetensors"]), len(sample["mp4"]))
"""


def test_webdataset_reads_the_shards_securely_and_in_its_usual_way(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with writer(path, max_shard_bytes=20_000) as target:
        fill(target, 12, media=True)
    pattern = str(path / "shards/*/*.tar")
    done = subprocess.run(
        [sys.executable, "-c", READ_SECURELY, pattern],
        env={**os.environ, "WDS_SECURE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    stored = {n: d for tar in sorted(path.glob("shards/*/*.tar")) for n, d in members(tar).items()}
    expected = [
        f"{key(i)} {len(stored[key(i) + '.json'])} {len(stored[key(i) + '.safetensors'])} {700 + i}" for i in range(12)
    ]
    assert done.stdout.split("\n")[:-1] == expected
    urls = sorted(str(p) for p in path.glob("shards/*/*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    assert [s["__key__"] for s in samples] == [key(i) for i in range(12)]
    assert samples[3]["json"]["caption"] == meta(3)["caption"]


def test_shards_of_plain_webdataset_can_be_adopted_and_trained_on(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 4})
    tar = path / "shards" / SMALL.name / "others.tar"
    with webdataset.TarWriter(str(tar)) as foreign:
        for i in range(4):
            record = {**meta(i, "theirs", motion_raw=1.0), "key": f"folder/their-{i}"}
            data = save(tensors(i, dtype=torch.float16))
            foreign.write({"__key__": record["key"], "json": record, "safetensors": data, "pkl": b"\x80"})
    with writer(path) as target:
        assert target.adopt_shards() == [f"{SMALL.name}/others.tar"]
        assert target.adopt_shards() == []
    assert verify_dataset(path) == []
    stream = source(path)
    seen = {k for _ in range(2) for batch in next(stream) for k in batch.keys}
    assert seen == {key(i) for i in range(4)} | {f"folder/their-{i}" for i in range(4)}


def test_adoption_refuses_damage_and_duplicates(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 4})
    tar = path / "shards" / SMALL.name / "000000.tar"
    copy = tar.with_name("copy.tar")
    copy.write_bytes(tar.read_bytes())
    with pytest.raises(UserError, match="twice"), writer(path) as target:
        target.adopt_shards()
    copy.write_bytes(tar.read_bytes()[:-10_240])
    with pytest.raises(UserError, match="cut short"), writer(path) as target:
        target.adopt_shards()
    (path / "shards/odd").mkdir()
    copy.rename(path / "shards/odd/copy.tar")
    with pytest.raises(UserError, match="odd"), writer(path) as target:
        target.adopt_shards()
