"""What is read: the same global batches for any ranks, workers, micro-batches and interruptions, whatever is mixed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_factory import IMAGE, SMALL, TEXT, VAE, WIDE, build, fill, key, keys_of, null_text, source
from data_factory import writer as open_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from contentv.base.errors import UserError
from contentv.base.types import ReaderRank, StoredBatch, TextCond
from contentv.data import DatasetInfo, DatasetWriter, JoinedDatasets, TextInfo, VaeInfo

FILMS, STOCK = {SMALL: 26, WIDE: 11, IMAGE: 9}, {SMALL: 14, IMAGE: 5}
BATCH = 4
CHOICES: list[dict[str, Any]] = [
    {},
    {"bucket_weights": {SMALL.name: 1.0, WIDE.name: 2.0, IMAGE.name: 1.0}},
    {"image_ratio": 0.3},
    {"source_weights": {"films": 3.0, "stock": 1.0}},
    {"source_weights": {"films": 0.4, "stock": 0.6}, "image_ratio": 0.35, "source_max_epochs": {"films": 2}},
    {"source_max_epochs": {"films": 1, "stock": 2}},
]
MULTIPLES: list[dict[str, int]] = [{}, {IMAGE.name: 3, WIDE.name: 2}]


def keep(motion: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    return torch.maximum(motion, visual)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One dataset of two sources, and the same samples as two datasets."""
    folder = tmp_path_factory.mktemp("elastic")
    both, films, stock = folder / "both", build(folder / "films", FILMS), folder / "stock"
    for path, parts in ((both, (FILMS, STOCK)), (stock, (None, STOCK))):
        with open_writer(path, max_shard_bytes=20_000) as target:
            for name, first, counts in zip(("films", "stock"), (0, 500), parts, strict=True):
                for bucket, count in (counts or {}).items():
                    fill(target, count, bucket, first, name)
    return [both, films, stock]


def rows(step: list[StoredBatch]) -> list[tuple[str, int, str, int, float, float]]:
    """All that must not depend on the layout, sample by sample."""
    return [
        (
            name,
            int(batch.sample_index[i]),
            batch.bucket.name,
            batch.global_samples,
            float(latents),
            float(batch.visual[i]),
        )
        for batch in step
        for i, (name, latents) in enumerate(zip(batch.keys, batch.latents.float().sum((1, 2, 3, 4)), strict=True))
    ]


@settings(max_examples=15, deadline=None)
@given(
    choice=st.sampled_from(CHOICES), multiples=st.sampled_from(MULTIPLES), kept=st.booleans(), seed=st.integers(0, 3),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])), workers=st.sampled_from([0, 1, 3]),
    prefetch=st.sampled_from([0, 2]), stop=st.integers(0, 14), joined=st.booleans(),
)  # fmt: skip
def test_layouts_and_interruptions_do_not_show(
    datasets: list[Path], choice: dict[str, Any], multiples: dict[str, int], kept: bool, seed: int,
    worlds: tuple[int, int], workers: int, prefetch: int, stop: int, joined: bool,
) -> None:  # fmt: skip
    path: Any = datasets[1:] if joined else datasets[0]
    common = {"global_batch_size": BATCH, "seed": seed, "batch_multiples": multiples, **choice}
    common["keep_probability"] = keep if kept else None
    whole = [rows(step) for step, _ in zip(source(path, micro_batch_size=BATCH, **common), range(16), strict=False)]
    assert [row[1] for step in whole for row in step] == list(range(sum(map(len, whole)))), "an index is used once"
    state: dict[str, Any] | None = None
    at = 0
    for world, until in zip(worlds, (min(stop, len(whole)), len(whole)), strict=True):
        ranks = [
            source(path, reader=ReaderRank(r, world), micro_batch_size=1, workers=workers, prefetch=prefetch, **common)
            for r in range(world)
        ]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for expected in whole[at:until]:
            steps = [next(rank) for rank in ranks]
            assert [row for step in steps for row in rows(step)] == expected
            assert {len(step) for step in steps} == {BATCH // world}, "as many micro-batches for every bucket"
        at = until
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        assert all(other == states[0] for other in states)
        assert len(json.dumps(states[0])) < 8_000
        state = states[0]
        if len(whole) < 16 and until == len(whole):
            for rank in ranks:
                with pytest.raises(StopIteration):
                    next(rank)
        for rank in ranks:
            rank.close()


@pytest.mark.parametrize("choice", CHOICES[:4], ids=str)
def test_streams_see_every_sample_before_any_twice(datasets: list[Path], choice: dict[str, Any]) -> None:
    stream = source(datasets[0], micro_batch_size=1, **choice)
    seen: Counter[str] = Counter()
    for _ in range(90):
        seen.update(k for batch in next(stream) for k in batch.keys)
    for name, first, counts in (("films", 0, FILMS), ("stock", 500, STOCK)):
        for bucket, count in counts.items():
            times = [seen[key(first + i, bucket)] for i in range(count)]
            assert max(times) - min(times) <= 1, f"{name} {bucket.name}"
    assert min(seen.values()) >= 1


def test_two_datasets_are_one(datasets: list[Path]) -> None:
    both, films, stock = datasets
    joined = JoinedDatasets.load([films, stock])
    assert joined.bucket_samples == DatasetInfo.load(both).bucket_samples
    assert keys_of(source(both), 30) == keys_of(source([films, stock]), 30)
    assert keys_of(source([stock, films]), 30) != keys_of(source([films, stock]), 30)
    with pytest.raises(UserError, match="dataset was"):
        source([stock, films]).load_state_dict(source([films, stock]).state_dict())


def test_sources_of_equal_names_are_one_source(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a", {SMALL: 8}), tmp_path / "b"
    with open_writer(b) as target:
        fill(target, 4, first=100)
        fill(target, 12, first=200, source="stock")
    stream = source([a, b], source_weights={"films": 1.0, "stock": 1.0})
    seen = Counter(int(k[-4:]) // 100 for step in keys_of(stream, 12) for k in step)
    assert seen == {0: 16, 1: 8, 2: 24}, "films: 8 of one folder and 4 of the other, each twice"


def test_datasets_that_do_not_fit_are_refused_with_both_names(tmp_path: Path) -> None:
    build(tmp_path / "a", {SMALL: 4})
    others: dict[str, tuple[VaeInfo, TextInfo, TextCond]] = {
        "other VAE": (VaeInfo("another", VAE.latents_mean, VAE.latents_std, 2, 4, 8), TEXT, null_text()),
        "other text encoders": (VAE, TextInfo("another", 6, 5, 3), null_text()),
        "different encodings": (VAE, TEXT, TextCond(torch.zeros(1, 3, 6), torch.zeros(1, 5))),
    }
    for message, (vae, text, null) in others.items():
        path = tmp_path / message.replace(" ", "-")
        with DatasetWriter(path, vae, text, null) as target:
            fill(target, 4, first=50)
        with pytest.raises(UserError, match=message) as caught:
            source([tmp_path / "a", path])
        assert str(tmp_path / "a") in caught.value.what
        assert str(path) in caught.value.what
    with pytest.raises(UserError, match="listed twice"):
        source([tmp_path / "a", tmp_path / "a"])


def test_a_damaged_sample_is_replaced_alike_everywhere(tmp_path: Path) -> None:
    path = build(tmp_path / "d", {SMALL: 12})
    intact = keys_of(source(path), 6)
    shard = next((path / "shards" / SMALL.name).glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1  # in the first member of the shard
    shard.write_bytes(data)
    whole = keys_of(source(path), 6)
    assert whole != intact
    ranks = [source(path, reader=ReaderRank(r, 2), workers=r, prefetch=r) for r in range(2)]
    assert [a + b for a, b in zip(*(keys_of(rank, 6) for rank in ranks), strict=True)] == whole
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_weights": {"films": 1.0}}, "name each of films, stock"),
        ({"source_weights": {"films": 1.0, "stok": 1.0}}, 'did you mean "stock"'),
        ({"source_max_epochs": {"film": 1}}, 'did you mean "films"'),
        ({"source_max_epochs": {"films": 0}}, "below 1"),
        ({"source_weights": {"films": 0.0, "stock": 0.0}}, "no samples are left"),
        ({"source_weights": {"films": 1.0, "stock": -1.0}}, "not negative"),
        ({"image_ratio": 0.5, "buckets": [SMALL.name]}, "videos alone"),
        ({"image_ratio": 0.5, "buckets": [IMAGE.name]}, "images alone"),
        ({"batch_multiples": {SMALL.name: 0}}, "1 or more"),
        ({"workers": -1}, "out of range"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(datasets: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(datasets[0], **options)


def test_a_weight_of_0_leaves_a_source_out(datasets: list[Path]) -> None:
    stream = source(datasets[0], source_weights={"films": 0.0, "stock": 1.0})
    assert {k.rpartition("-")[2][:2] for step in keys_of(stream, 20) for k in step} == {"05"}


def test_changed_choices_are_named_when_resuming(datasets: list[Path]) -> None:
    state = source(datasets[0], source_weights={"films": 1.0, "stock": 1.0}).state_dict()
    for options, message in (
        ({"source_weights": {"films": 2.0, "stock": 1.0}}, "source_weights was"),
        ({"source_weights": {"films": 1.0, "stock": 1.0}, "source_max_epochs": {"films": 3}}, "source_max_epochs was"),
        ({"source_weights": {"films": 1.0, "stock": 1.0}, "image_ratio": 0.2}, "image_ratio was 0.0, is 0.2"),
        ({"source_weights": {"films": 1.0, "stock": 1.0}, "batch_multiples": {WIDE.name: 2}}, "batch_multiples was"),
    ):
        with pytest.raises(UserError, match=message):
            source(datasets[0], **options).load_state_dict(state)


def test_stored_dtypes_meet_in_one_batch_without_loss(tmp_path: Path) -> None:
    """Samples of bf16, fp16 and fp32 in one micro-batch come to the same numbers as each alone."""
    from data_factory import meta, tensors

    with open_writer(tmp_path / "d") as target:
        for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)):
            target.add(key(i), meta(i), **tensors(i, SMALL, dtype), bucket=SMALL)
    (read,) = next(source(tmp_path / "d", micro_batch_size=4))
    batch = read.to(torch.device("cpu"))
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (VAE.latents_mean, VAE.latents_std))
    for row, name in enumerate(batch.keys):
        i = int(name[-4:])
        dtype = (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)[i]
        stored = tensors(i, SMALL, dtype)
        assert torch.equal(batch.latents[row], (stored["latents"].float() - mean) / std)
        assert torch.equal(batch.text.tokens[row], stored["text_tokens"].float())
