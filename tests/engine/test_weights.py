"""Weights on their way into partitions: order of reading, what is refused, what is not read at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from contentv.engine.weights import check_names, hollow, in_file_order, replace_parameters, take_weights
from contentv.models.mmdit import MMDiT
from contentv.parallel.mesh import ParallelConfig


class Stored:
    def __init__(self, path: str) -> None:
        self.path = Path(path)


class Counting(Mapping[str, Any]):
    """A mapping that remembers which values were taken."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_by_name, self.taken = dict(values), []

    def __getitem__(self, name: str) -> Any:
        self.taken.append(name)
        return self.values_by_name[name]

    def __contains__(self, name: object) -> bool:  # a Mapping's own would take the value
        return name in self.values_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


def shapes_alone() -> MMDiT:
    with torch.device("meta"):
        return MMDiT(toy.make_model().config)


def test_each_file_is_visited_once_and_each_value_taken_once() -> None:
    weights = Counting({"a": Stored("2"), "b": Stored("1"), "c": torch.zeros(1), "d": Stored("2"), "e": Stored("1")})
    assert [name for name, _ in in_file_order(weights, weights)] == ["c", "a", "d", "b", "e"]
    assert sorted(weights.taken) == ["a", "b", "c", "d", "e"]


def test_wrong_names_are_refused() -> None:
    check_names(["a", "b"], {"b": 0, "a": 0})
    with pytest.raises(ValueError, match="1 missing, such as b"):
        check_names(["a", "b"], {"a": 0})
    with pytest.raises(ValueError, match="1 unknown, such as c"):
        check_names(["a"], {"a": 0, "c": 0})


def test_a_wrong_shape_is_refused() -> None:
    weights = {name: p.detach() for name, p in toy.make_model().named_parameters()}
    weights["proj_out.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"proj_out\.bias is \(3,\), should be \(16,\)"):
        toy.make_engine(ParallelConfig(), model=shapes_alone(), weights=weights)


def test_shared_parameters_stay_shared_and_frozen_ones_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[1].bias.mark = 7  # type: ignore[attr-defined]
    values = take_weights(model)
    assert all(p.is_meta for p in model.parameters())
    assert set(values) == {"0.weight", "0.bias", "1.bias"}
    replace_parameters(model, lambda p: hollow(p, torch.float32, toy.CPU))
    assert model[0].weight is model[1].weight
    assert [p.requires_grad for p in model.parameters()] == [True, False, True]
    assert model[1].bias.mark == 7
    assert model[0].weight.shape == (2, 2)
    assert model[0].weight.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("stage", [1, 3])
def test_before_a_checkpoint_the_trained_weights_are_not_read(stage: int, tmp_path: Path) -> None:
    first = toy.make_engine(ParallelConfig(zero_stage=stage), precision="bf16")
    toy.train(first, 2)
    first.save(tmp_path / "step-00000002", {})
    want = toy.train(first, 2)
    first.close()
    model = shapes_alone()
    model.proj_out.requires_grad_(False)
    weights = Counting({name: p.detach() for name, p in toy.make_model().named_parameters()})
    part = toy.make_engine(ParallelConfig(zero_stage=stage), model=model, weights=weights, load_follows=True)
    assert set(weights.taken) == {"proj_out.weight", "proj_out.bias"}
    part.close()
    weights.taken.clear()
    again = toy.make_engine(
        ParallelConfig(zero_stage=stage), model=shapes_alone(), weights=weights, load_follows=True, precision="bf16"
    )
    again.load(tmp_path / "step-00000002")
    assert toy.train(again, 2) == want
    assert not weights.taken
    again.close()
