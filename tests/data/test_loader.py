"""What ranks are handed: the same order on every layout and after every restart, with the right contents."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_factory import IMAGE, SMALL, TEXT, VAE, WIDE, build, fill, key, keys_of, meta, null_text, source, tensors
from data_factory import writer as open_writer

from contentv.base.errors import UserError
from contentv.base.types import BatchSource, ReaderRank
from contentv.data import DataConfig, DatasetInfo, Normaliser, read_metas, refit_quality
from contentv.data.readahead import ReadAhead


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("data") / "d", {SMALL: 26, WIDE: 11, IMAGE: 3})


def test_a_batch_holds_what_was_stored(dataset: Path) -> None:
    stream = source(dataset, micro_batch_size=4)
    assert isinstance(stream, BatchSource)
    normaliser = Normaliser.load(dataset)
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (VAE.latents_mean, VAE.latents_std))
    for step in range(8):
        (read,) = next(stream)
        assert {read.latents.dtype, read.text.tokens.dtype, read.text.pooled.dtype} == {torch.bfloat16}, "as stored"
        batch = read.to(torch.device("cpu"))
        assert batch.global_samples == 4
        assert batch.sample_index.tolist() == [4 * step + place for place in range(4)]
        for row, name in enumerate(batch.keys):
            i = int(name[-4:])
            stored = tensors(i, batch.bucket)
            assert name == key(i, batch.bucket)
            assert batch.captions[row] == meta(i)["caption"]
            assert torch.equal(batch.latents[row], (stored["latents"].float() - mean) / std)
            assert torch.equal(batch.text.tokens[row], stored["text_tokens"].float())
            assert torch.equal(batch.text.pooled[row], stored["text_pooled"].float())
            assert batch.visual[row].item() == pytest.approx(normaliser.apply("films", "visual_raw", float(i % 7)))
            assert math.isnan(batch.motion[row]) == (i % 5 == 4)
        dtypes = {batch.latents.dtype, batch.text.tokens.dtype, batch.motion.dtype, batch.visual.dtype}
        assert dtypes == {torch.float32}
    assert torch.equal(stream.null_text.tokens, null_text().tokens)
    assert torch.equal(stream.null_text.pooled, null_text().pooled)


def test_the_order_is_a_function_of_the_seed(dataset: Path) -> None:
    first = keys_of(source(dataset), 25)
    assert keys_of(source(dataset), 25) == first
    assert keys_of(source(dataset, prefetch=3), 25) == first
    assert keys_of(source(dataset, micro_batch_size=1), 25) == first
    assert keys_of(source(dataset, seed=4), 25) != first


@pytest.mark.parametrize("options", [{}, {"bucket_weights": {SMALL.name: 1.0, WIDE.name: 2.0, IMAGE.name: 1.0}}])
def test_every_number_of_ranks_delivers_the_same_global_batches(dataset: Path, options: dict[str, Any]) -> None:
    single = [next(stream) for stream in [source(dataset, micro_batch_size=4, **options)] for _ in range(14)]
    for world in (1, 2, 4):
        ranks = [source(dataset, reader=ReaderRank(r, world), micro_batch_size=1, **options) for r in range(world)]
        for whole in single:
            parts = [next(rank) for rank in ranks]
            assert [len(part) for part in parts] == [4 // world] * world
            micro = [batch for part in parts for batch in part]
            assert {batch.bucket for batch in micro} == {whole[0].bucket}, "one bucket on all ranks"
            assert [batch.keys[0] for batch in micro] == whole[0].keys
            assert torch.cat([batch.sample_index for batch in micro]).equal(whole[0].sample_index)
            assert torch.cat([batch.latents for batch in micro]).equal(whole[0].latents)
        states = [rank.state_dict() for rank in ranks]
        assert all(state == states[0] for state in states), "a checkpoint of any rank serves all"


def test_each_sample_is_seen_once_an_epoch(dataset: Path) -> None:
    seen = Counter(k for step in keys_of(source(dataset, buckets=[SMALL.name]), 13) for k in step)  # 2 epochs of 26
    assert seen == {key(i): 2 for i in range(26)}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 10, 19])
def test_resuming_is_exact_also_on_another_layout(dataset: Path, stop: int, prefetch: int) -> None:
    straight = keys_of(source(dataset), 30)
    first = source(dataset, prefetch=prefetch)
    assert keys_of(first, stop) == straight[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert state["step"] == stop
    halves = [source(dataset, prefetch=prefetch, reader=ReaderRank(rank, 2)) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
        assert half.state_dict() == state
    found = [a + b for a, b in zip(*(keys_of(half, 30 - stop) for half in halves), strict=True)]
    assert found == straight[stop:]
    for half in halves:
        half.close()


def test_a_source_can_be_moved_and_closed_in_the_middle(dataset: Path) -> None:
    straight = keys_of(source(dataset), 8)
    stream = source(dataset, prefetch=2)
    keys_of(stream, 3)
    state = stream.state_dict()
    assert keys_of(stream, 3) == straight[3:6]
    stream.close()
    assert keys_of(stream, 2) == straight[6:8], "closing forgets what was read ahead, not the place"
    stream.load_state_dict(state)
    assert keys_of(stream, 3) == straight[3:6]
    stream.close()


def test_resuming_reads_no_shard(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = source(dataset)
    keys_of(stream, 40)
    state = stream.state_dict()
    fresh = source(dataset)
    monkeypatch.setattr("contentv.data.shards.ShardReader.read", lambda *_: pytest.fail("data was read"))
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert len(json.dumps(state)) < 700


def test_a_state_of_another_run_is_refused_with_the_difference(dataset: Path, tmp_path: Path) -> None:
    state = source(dataset).state_dict()
    other = build(tmp_path / "d", {SMALL: 26, WIDE: 11, IMAGE: 4})
    cases: list[tuple[Any, str]] = [
        (source(dataset, seed=9), "seed was 3, is 9"),
        (source(dataset, global_batch_size=8), "global_batch_size was 4, is 8"),
        (source(other), "dataset was"),
        (source(dataset, buckets=[SMALL.name]), "buckets was"),
        (source(dataset, keep_probability=lambda motion, visual: motion), "keep was None"),
    ]
    for stream, message in cases:
        with pytest.raises(UserError, match=message):
            stream.load_state_dict(state)
    with pytest.raises(UserError, match="version"):
        source(dataset).load_state_dict({"step": 3})


def test_keep_probability_gets_normalised_scores_and_thins_the_epoch(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 60})
    asked: list[torch.Tensor] = []

    def keep(motion: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        asked.extend([motion, visual])
        return (visual > 0.5).float()

    stream = source(path, keep_probability=keep)
    seen = Counter(k for step in keys_of(stream, 19) for k in step)  # 2 epochs of 38
    assert len(asked[0]) == len(asked[1]) == 48, "the 12 clips without a motion score are not asked about"
    assert 0.0 <= float(torch.stack(asked).min()) <= float(torch.stack(asked).max()) <= 1.0
    normaliser = Normaliser.load(path)
    wanted = {key(i) for i in range(60) if i % 5 == 4 or normaliser.apply("films", "visual_raw", float(i % 7)) > 0.5}
    assert seen == dict.fromkeys(wanted, 2)
    resumed = source(path, keep_probability=keep)
    resumed.load_state_dict(stream.state_dict())
    assert keys_of(resumed, 5) == keys_of(stream, 5)
    with pytest.raises(UserError, match="outside"):
        source(path, keep_probability=lambda motion, visual: motion + 2.0)
    with pytest.raises(UserError, match="no samples"):
        source(build(tmp_path / "e", {SMALL: 4}), keep_probability=lambda motion, visual: motion * 0.0)


def test_fewer_samples_than_a_batch_go_on_over_epochs(tmp_path: Path) -> None:
    stream = source(build(tmp_path / "d", {SMALL: 3}), global_batch_size=8)
    seen = Counter(k for step in keys_of(stream, 3) for k in step)
    assert seen == {key(i): 8 for i in range(3)}


def test_appending_changes_the_dataset_for_new_runs_only(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 6})
    running = source(path)
    straight = keys_of(source(path), 9)
    assert keys_of(running, 3) == straight[:3]
    with open_writer(path) as target:
        fill(target, 4, first=6)
    assert keys_of(running, 6) == straight[3:]
    assert {k for step in keys_of(source(path), 5) for k in step} == {key(i) for i in range(10)}


def test_a_refit_changes_scores_but_not_the_order(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 8})
    record = json.loads((path / "quality.json").read_text())
    record["sources"]["films"]["visual_raw"]["knots"] = [0.0] * 50 + [1000.0] * 51
    before = keys_of(source(path), 4)
    (path / "quality.json").write_text(json.dumps(record))
    assert float(next(source(path))[0].visual.max()) < 0.6
    refit_quality(path)
    assert keys_of(source(path), 4) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 6, "reader": ReaderRank(0, 4)}, "not a multiple"),
        ({"global_batch_size": 4, "micro_batch_size": 3}, "not a multiple"),
        ({"global_batch_size": 0}, "out of range"),
        ({"reader": ReaderRank(2, 2)}, "out of range"),
        ({"prefetch": -1}, "out of range"),
        ({"buckets": ["f5_h16_w61"]}, 'did you mean "f5_h16_w16"'),
        ({"bucket_weights": {SMALL.name: 1.0}}, "must be finite"),
        ({"bucket_weights": {SMALL.name: -1.0, WIDE.name: 1.0, IMAGE.name: 1.0}}, "not negative"),
        ({"buckets": [WIDE.name], "bucket_weights": {WIDE.name: 0.0}}, "all bucket weights are 0"),
        ({"quality_mode": "rank"}, "rank"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(dataset: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(dataset, **options)


def test_weights_choose_buckets_and_zero_leaves_one_out(dataset: Path) -> None:
    weights = {SMALL.name: 0.0, WIDE.name: 3.0, IMAGE.name: 1.0}
    stream = source(dataset, bucket_weights=weights)
    names = Counter(next(stream)[0].bucket.name for _ in range(60))
    assert set(names) == {WIDE.name, IMAGE.name}
    assert 30 <= names[WIDE.name] <= 58


@pytest.mark.parametrize("missing", ["dataset.json", "quality.json", "null_text.safetensors", "a shard"])
def test_a_missing_file_is_named_when_opening(tmp_path: Path, missing: str) -> None:
    path = build(tmp_path / "d", {SMALL: 4})
    name = "shards/f5_h16_w16/000000.tar" if missing == "a shard" else missing
    (path / name).unlink()
    with pytest.raises(UserError, match=Path(name).name.replace(".", r"\.")) as caught:
        source(path)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', "version 2"),
        ("{", "", "JSON"),
        ('"f5_h16_w16/000000.tar"', '"../../000000.tar"', "shard name"),
        ('"f5_h16_w16/000000.tar"', '"/etc/passwd"', "shard name"),
        ('"samples": 4,\n   "bytes"', '"samples": 5,\n   "bytes"', "sums"),
        ('"latent_channels": 2', '"latent_channels": 16', "latent_channels"),
        ('"temporal_factor": 4', '"temporal_factor": 2', "latent shape"),
        ('"text": {', '"words": {', "text"),
    ],
)
def test_a_dataset_json_that_cannot_be_right_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = build(tmp_path / "d", {SMALL: 4})
    text = (path / "dataset.json").read_text()
    assert old in text
    (path / "dataset.json").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        source(path)


def test_metas_are_all_there_in_order(dataset: Path) -> None:
    metas = list(read_metas(dataset))
    expected = [key(i, bucket) for bucket, count in ((SMALL, 26), (WIDE, 11), (IMAGE, 3)) for i in range(count)]
    assert sorted(m["key"] for m in metas) == sorted(expected)
    assert Counter(m["bucket"] for m in metas) == DatasetInfo.load(dataset).bucket_samples
    assert DatasetInfo.load(dataset).text == TEXT


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "contentv-readahead"]


def test_read_ahead_is_bounded_and_ends_when_closed_or_forgotten(dataset: Path) -> None:
    made: list[int] = []
    ahead = ReadAhead(lambda: made.append(len(made)) or len(made), depth=2)
    assert [ahead.get(), ahead.get()] == [1, 2]
    time.sleep(0.3)
    assert len(made) <= 2 + 2 + 1, "two delivered, two ready, one waiting for room"
    ahead.close()
    stream = source(dataset, prefetch=2)
    next(stream)
    assert len(read_ahead_threads()) == 1
    del stream
    assert read_ahead_threads() == [], "a forgotten source takes its thread with it"


def test_an_exception_in_read_ahead_reaches_the_consumer() -> None:
    items = iter([1, 2])

    def produce() -> int:
        try:
            return next(items)
        except StopIteration:
            raise UserError("the disk is gone") from None

    ahead = ReadAhead(produce, depth=4)
    assert [ahead.get(), ahead.get()] == [1, 2]
    for _ in range(2):
        with pytest.raises(UserError, match="the disk is gone"):
            ahead.get()
    ahead.close()


def test_config_refuses_what_cannot_work() -> None:
    assert DataConfig().prefetch == 2
    for bad in ({"quality_mode": "rank"}, {"prefetch": -1}, {"max_bad_fraction": 1.5}, {"bucket_weights": {"b": -1.0}}):
        with pytest.raises(UserError, match=f"data.{next(iter(bad))}"):
            DataConfig(**bad)  # type: ignore[arg-type]
