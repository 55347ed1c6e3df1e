"""Ring attention and Ulysses x ring by themselves, against one process: values, gradients, and the bytes sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from counting import Traffic, attention_formula, kept_bytes, model_formula, zero3_formula
from test_seams import CASES, forward_backward, softmax_attention
from torch import Tensor

import launch
from contentv.base.types import TokenCounts
from contentv.engine import zero
from contentv.engine.parallelize import parallelize
from contentv.parallel import ring
from contentv.parallel.collectives import start
from contentv.parallel.mesh import ParallelConfig, build_mesh
from contentv.parallel.ring import ring_attention
from contentv.parallel.ulysses import Ulysses

# Tokens of each of four ranks: even, uneven, a rank without any, one rank with all of them.
LENGTHS = [(5, 5, 5, 5), (7, 1, 4, 3), (3, 0, 6, 2), (0, 0, 9, 0)]
LAYOUTS = {"ulysses 4": (4, 1), "ring 2 x ulysses 2": (4, 2), "ring 4": (4, 4), "dp 2 x ring 2": (2, 2)}
# 333 text tokens and 38 heads divide by neither 2 nor 4
BYTES = TokenCounts(video=45, text=333)
HEADS, HEAD_DIM, SAMPLES = 38, 4, 2
LIMITS = ("stage3_max_live_parameters", "stage3_max_reuse_distance")  # 1e9 each, unless given
LATENTS, TEXT, MODEL_TOKENS = (4, 4, 16, 22), 37, TokenCounts(video=4 * 8 * 11, text=37)
MODEL = {"num_attention_heads": HEADS, "attention_head_dim": 8}
MODEL_LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {}, "ulysses 4": {"sp": 4}, "ulysses 4, overlapped": {"sp": 4, "exchange": "overlapped"},
    "ring 2 x ulysses 2": {"sp": 4, "ring": 2}, "ring 4": {"sp": 4, "ring": 4},
    "sp 2 x tp 2": {"sp": 2, "tp": 2}, "tp 4": {"tp": 4},
    "tp 4, sequence norms": {"tp": 4, "sequence_norms": True},
    "sp 2 x tp 2, sequence norms": {"sp": 2, "tp": 2, "sequence_norms": True},
    "ring 2 x tp 2, sequence norms": {"sp": 2, "ring": 2, "tp": 2, "sequence_norms": True},
}  # fmt: skip


def qkv(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(lengths) + lengths[0])
    return [torch.randn(2, sum(lengths), 3, 8, generator=g, dtype=torch.float64).to(dtype) for _ in range(4)]


def plain(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = softmax_attention(q, k, v, TokenCounts(q.shape[1], 0))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def in_a_ring(tensors: list[Tensor], lengths: tuple[int, ...], group: Any) -> list[Tensor]:
    """Returns the output and the gradients of q, k and v, of this rank's tokens."""
    rank = dist.get_rank(group)
    first = sum(lengths[:rank])
    q, k, v, grad = (x[:, first : first + lengths[rank]].clone() for x in tensors)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = ring_attention(q, k, v, lengths, group)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def largest_error(lengths: tuple[int, ...], group: Any) -> float:
    tensors, rank = qkv(lengths), dist.get_rank(group)
    first = sum(lengths[:rank])
    want = [x[:, first : first + lengths[rank]] for x in plain(*tensors)]
    got = in_a_ring(tensors, lengths, group)
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(got, want, strict=True))


def halves_error(lengths: tuple[int, ...], group: Any) -> list[list[float]]:
    """Returns (ring's, one process's) squared bf16 error against fp64, of the output and each gradient."""
    half = qkv(lengths, torch.bfloat16)
    truth, alone = plain(*(x.double() for x in half)), plain(*half)
    rank = dist.get_rank(group)
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    errors = []
    for got, one, true in zip(in_a_ring(half, lengths, group), alone, truth, strict=True):
        both = torch.stack([(got.double() - true[:, own]).square().sum(), (one.double() - true).square().sum()])
        dist.all_reduce(both[:1], group=group)
        errors.append(both.tolist())
    return errors


def mutants(group: Any) -> dict[str, float]:
    """What must be seen, or the comparison proves nothing."""
    found = {}
    lengths = LENGTHS[1]
    merge, ring._merge = (
        ring._merge,
        lambda out, lse, part, part_lse: ((out + part) / 2, torch.logaddexp(lse, part_lse)),
    )
    found["parts averaged without their weights"] = largest_error(lengths, group)
    ring._merge = merge
    arrive, count = ring._Passing.arrive, [0]

    def forgets(self: Any) -> Tensor:
        block = arrive(self)
        count[0] += 1
        return torch.zeros_like(block) if count[0] == 9 else block  # the last: gradients that come home

    ring._Passing.arrive = forgets  # type: ignore[method-assign]
    found["gradients of one's own keys from the other ranks lost"] = largest_error(lengths, group)
    ring._Passing.arrive = arrive  # type: ignore[method-assign]
    return found


def seams(sp: int, places: int) -> Ulysses:
    mesh = build_mesh(ParallelConfig(sp=sp, ring=places), dist.get_world_size(), dist.get_rank())
    assert mesh.sp_group is not None
    return Ulysses(mesh.sp_group, softmax_attention, mesh.ulysses_group, mesh.ring_group)


def seam_errors(of: Ulysses) -> dict[str, float]:
    errors = {}
    for n, m, heads in CASES:
        want = forward_backward(n, m, heads, None)
        out, video_grad, weight_grad = forward_backward(n, m, heads, of)
        dist.all_reduce(video_grad, group=of.group)
        dist.all_reduce(weight_grad, group=of.group)
        got = (out, video_grad, weight_grad)
        errors[f"{n} {m} {heads}"] = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)
        )
    return errors


def sent(of: Ulysses, dtype: torch.dtype, traffic: Traffic) -> dict[str, int]:
    """Returns the bytes that this rank hands to each collective in one attention, forward and backward."""
    local = sum(-(-n // of.parts) for n in BYTES)
    q, k, v = (torch.randn(SAMPLES, local, HEADS, HEAD_DIM, dtype=dtype).requires_grad_() for _ in range(3))
    traffic.bytes.clear()
    out = of.attend(q, k, v, BYTES)
    out.backward(torch.randn_like(out))
    return dict(traffic.bytes)


def model_counts(traffic: Traffic) -> dict[str, Any]:
    """Returns, for each layout of a model with 38 heads, what it keeps for its backward pass and the bytes it sends."""
    batch = toy.rows(toy.make_batch(0, LATENTS), 0, SAMPLES)
    batch["text_tokens"] = torch.randn(SAMPLES, TEXT, toy.SHAPE["joint_attention_dim"])
    found = {}
    for name, degrees in MODEL_LAYOUTS.items():
        model = toy.make_model(**MODEL)
        mesh = build_mesh(ParallelConfig(**degrees), dist.get_world_size(), dist.get_rank(), heads=HEADS)
        parallelize(model, mesh)
        traffic.bytes.clear()
        kept, loss = kept_bytes(model, lambda m=model: toy.loss_sum(m, batch))
        loss.backward()
        formula = model_formula(model.config, MODEL_TOKENS, SAMPLES, mesh)
        found[name] = {"kept": kept, "bytes": dict(traffic.bytes), "formula": formula}
    return found


def zero3_counts(traffic: Traffic) -> dict[str, Any]:
    """Returns the bytes of a step of ZeRO-3 over all ranks: of a small model, and as if it were above the limits."""
    shapes = [tuple(p.shape) for p in toy.make_model().parameters()]
    ours, found = zero.deepspeed_config, {}
    for name, limits in (("small", {}), ("large", dict.fromkeys(LIMITS, 0))):

        def limited(*args: Any, limits: dict[str, int] = limits, **kwargs: Any) -> dict[str, Any]:
            config = ours(*args, **kwargs)
            config["zero_optimization"].update(limits)
            return config

        zero.deepspeed_config = limited
        engine = toy.make_engine(ParallelConfig(zero_stage=3))
        toy.train(engine, 1)
        traffic.bytes.clear()
        toy.train(engine, 1)
        gathers = 1 if name == "small" else 2
        formula = zero3_formula(shapes, engine.mesh.zero, torch.float32, gathers)
        found[name] = {"bytes": dict(traffic.bytes), "formula": formula}
        engine.close()
    zero.deepspeed_config = ours
    return found


def held_shares() -> dict[str, float]:
    """Returns what a rank of ZeRO-3 holds of weights and optimiser states, of what one rank alone would: 16 bytes each.

    In fp32 those are the weights, AdamW's own copy of them and its two moments.
    """
    found = {}
    for name, settings in (("all split", {"persist_below": 0}), ("vectors whole", {"persist_below": None})):
        engine = toy.make_engine(ParallelConfig(zero_stage=3), model=toy.make_model(**MODEL), **settings)
        toy.train(engine, 1)
        parameters = list(engine.module.parameters())
        tensors = [*parameters, *(p.ds_tensor for p in parameters), *engine._masters]
        for state in engine._adamw.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        found[name] = sum(storages.values()) / (16 * engine.num_parameters)
        engine.close()
    return found


def ranks() -> dict[str, Any]:
    """Runs in every process."""
    traffic = Traffic()  # before DeepSpeed starts, which keeps torch's functions
    _rank, world = start(toy.CPU, timeout_s=60.0)
    group = dist.new_group(list(range(world)))
    report: dict[str, Any] = {
        "ring": [largest_error(lengths, group) for lengths in LENGTHS],
        "halves": halves_error((33, 1, 40, 26), group),
        "mutants": mutants(group),
        "seams": {}, "bytes": {}, "formula": {},
    }  # fmt: skip
    for name, (sp, places) in LAYOUTS.items():
        of = seams(sp, places)
        report["seams"][name] = seam_errors(of)
        for dtype in (torch.float32, torch.bfloat16):
            report["bytes"][f"{name} {dtype}"] = sent(of, dtype, traffic)
            shape = (SAMPLES, HEADS, HEAD_DIM)
            report["formula"][f"{name} {dtype}"] = attention_formula(BYTES, shape, sp, places, of.part, dtype)
    report["model"] = model_counts(traffic)
    report["zero3"] = zero3_counts(traffic)
    report["held"] = held_shares()
    return report


@pytest.fixture(scope="module")
def on_four() -> list[dict[str, Any]]:
    return launch.run(__file__, "ranks", 4, timeout_s=180.0)


@pytest.mark.dist
def test_a_ring_is_exact_for_uneven_lengths(on_four: Any, parity: Any) -> None:
    assert all(len(result["ring"]) == len(LENGTHS) for result in on_four)
    worst = max(max(result["ring"]) for result in on_four)
    parity("4 processes, ring attention, uneven lengths, forward and backward, fp64", "plain attention", worst, 1e-12)


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ulysses_times_ring_is_exact_for_uneven_heads_and_tokens(on_four: Any, layout: str, parity: Any) -> None:
    assert all(len(result["seams"][layout]) == len(CASES) for result in on_four)
    worst = max(max(result["seams"][layout].values()) for result in on_four)
    parity(
        f"4 processes, a layer's attention, {layout}, uneven, forward and backward, fp64",
        "plain attention",
        worst,
        1e-12,
    )


@pytest.mark.dist
def test_a_ring_in_bf16_is_as_accurate_as_one_process(on_four: Any) -> None:
    for ours, reference in on_four[0]["halves"]:
        assert ours**0.5 <= 2 * reference**0.5


@pytest.mark.dist
def test_mistakes_are_seen(on_four: Any) -> None:
    for name in on_four[0]["mutants"]:
        assert max(result["mutants"][name] for result in on_four) > 1e-3, name


@pytest.mark.dist
def test_bytes_sent_are_the_formulas(on_four: Any) -> None:
    for result in on_four:
        assert len(result["bytes"]) == 2 * len(LAYOUTS)
        assert result["bytes"] == result["formula"]


@pytest.mark.dist
@pytest.mark.parametrize("layout", MODEL_LAYOUTS)
def test_bytes_of_a_step_are_the_formulas(on_four: Any, layout: str, parity: Any) -> None:
    for result in on_four:
        compare(f"bytes a rank hands to collectives, {layout}", result["model"][layout], parity)


def compare(what: str, found: dict[str, dict[str, int]], parity: Any) -> None:
    """Holds the bytes of each collective against the formula: exact integers."""
    assert found["bytes"].keys() == found["formula"].keys()
    differences = [abs(found["bytes"][name] - n) for name, n in found["formula"].items()]
    parity(f"4 processes, {what}", "closed formula", max(differences, default=0), 0)


@pytest.mark.dist
@pytest.mark.parametrize("size", ["small", "large"])
def test_bytes_of_zero3_are_the_formula(on_four: Any, size: str, parity: Any) -> None:
    for result in on_four:
        compare(f"bytes a rank hands to collectives, ZeRO-3, {size} model", result["zero3"][size], parity)


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ulysses 4", "ring 2 x ulysses 2", "ring 4"])
def test_four_sequence_ranks_keep_at_most_three_tenths_each(on_four: Any, layout: str, parity: Any) -> None:
    share = max(result["model"][layout]["kept"] / result["model"]["one"]["kept"] for result in on_four)
    parity(
        f"4 processes, activation bytes a rank keeps, {layout}, 38 heads", "one rank's bytes: the share", share, 0.30
    )


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["all split", "vectors whole"])
def test_four_zero3_ranks_hold_a_quarter_each(on_four: Any, kind: str, parity: Any) -> None:
    share = max(result["held"][kind] for result in on_four)
    assert share >= 0.25  # it counts all that is there
    parity(
        f"4 processes, bytes of weights and optimiser a rank holds, ZeRO-3, {kind}",
        "one rank's: the share",
        share,
        0.27,
    )


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layout", "most"), [("tp 4", 0.56), ("tp 4, sequence norms", 0.41), ("sp 2 x tp 2, sequence norms", 0.30)]
)
def test_tensor_ranks_keep_less_with_sequence_norms(on_four: Any, layout: str, most: float, parity: Any) -> None:
    share = max(result["model"][layout]["kept"] / result["model"]["one"]["kept"] for result in on_four)
    parity(
        f"4 processes, activation bytes a rank keeps, {layout}, 38 heads", "one rank's bytes: the share", share, most
    )
