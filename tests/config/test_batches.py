"""How batches are cut: token budgets, micro-batches, several datasets, and what changes a run's digest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentv.base.errors import UserError
from contentv.config.build import batch_multiples, micro_batch_size
from contentv.config.compose import load_config
from contentv.config.graph import config_hash
from contentv.config.inputs import open_data
from contentv.train.loop import LoopConfig


@given(
    budget=st.integers(0, 10**7), batch=st.integers(1, 512),
    tokens=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 50_000), min_size=1),
)  # fmt: skip
def test_a_token_budget_is_kept_and_used(budget: int, batch: int, tokens: dict[str, int]) -> None:
    found = batch_multiples(LoopConfig(global_batch_size=batch, global_tokens=budget), tokens)
    for name, count in tokens.items():
        assert found[name] >= 1
        if budget:
            assert found[name] == 1 or found[name] * batch * count <= budget
            assert (found[name] + 1) * batch * count > budget, "one more would not fit"
        else:
            assert found[name] == 1


@pytest.mark.parametrize(
    ("max_tokens", "expected"), [(0, 16), (100, 1), (1_000, 1), (2_000, 2), (7_999, 4), (8_000, 8), (10**9, 16)]
)
def test_the_micro_batch_leaves_room_for_the_largest_of_all_buckets(max_tokens: int, expected: int) -> None:
    """`tokens` is a clip's times its bucket's factor: 1000 = 10 images of 100 tokens, or a video of 1000."""
    root = load_config("train", [f"train.max_tokens={max_tokens}", "train.global_batch_size=32"])
    assert micro_batch_size(root, 2, 1_000) == expected


def test_the_keys_of_mixing_are_typed_and_checked() -> None:
    root = load_config(
        "train", ["data.path=[a,b]", "data.source_weights={films: 2, stock: 0.5}", "data.source_max_epochs.films=3",
                  "data.image_ratio=0.25", "data.workers=2", "train.global_tokens=100000"],
    )  # fmt: skip
    assert root.data.path == ["a", "b"]
    assert root.data.source_weights == {"films": 2.0, "stock": 0.5}
    assert root.data.source_max_epochs == {"films": 3}
    assert (root.data.image_ratio, root.train.global_tokens) == (0.25, 100_000)
    for wrong, key in (
        ("data.source_weights={films: -1}", "data.source_weights"), ("data.image_ratio=1", "data.image_ratio"),
        ("data.source_max_epochs={films: 0}", "data.source_max_epochs"), ("data.path=[]", "data.path"),
        ("data.path=[a,[b]]", "data.path"), ("data.workers=-1", "data.workers"),
        ("train.global_tokens=-1", "train.global_tokens"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=key):
            load_config("train", [wrong])


def test_later_keys_leave_the_digest_of_earlier_runs_alone() -> None:
    base = ["data.path=a"]
    digest = config_hash(load_config("train", base))
    assert digest == "32ab7d0f4c8950d4"  # as before `timestep` and `data` got their later keys (7c1e176)
    for same in ("data.workers=3", "data.cache_dir=/tmp/c", "data.retries=2", "train.global_tokens=0",
                 "timestep.levels=0", "data.quality_scope=source"):  # fmt: skip
        assert config_hash(load_config("train", [*base, same])) == digest
    for other in ("data.image_ratio=0.1", "data.source_weights={a: 1}", "train.global_tokens=9", "data.path=[a]",
                  "timestep.levels=100", "data.quality_weight=true", "timestep.missing=refuse"):  # fmt: skip
        assert config_hash(load_config("train", [*base, other])) != digest


def test_the_folders_of_data_path_are_looked_for(tmp_path: Path) -> None:
    root = load_config("train", [f"data.path=[{tmp_path},{tmp_path / 'nowhere'}]"])
    with pytest.raises(UserError, match="nowhere"):
        open_data(root.data)
