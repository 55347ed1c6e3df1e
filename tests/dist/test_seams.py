"""Ulysses' seams and the collectives by themselves, against one process: values and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from torch import Tensor
from torch.nn import functional

import launch
from contentv.base.types import TokenCounts
from contentv.models.layers import begun
from contentv.parallel.collectives import any_of, gather_json, start
from contentv.parallel.overlap import OverlappedUlysses
from contentv.parallel.ulysses import Ulysses, padded_part

# (video tokens, text tokens, heads): divisible, odd, fewer tokens or heads than ranks, no text at all
CASES = [(8, 4, 4), (9, 7, 6), (5, 3, 1), (3, 1, 5), (6, 0, 3)]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, tokens: TokenCounts) -> Tensor:
    """The formula, head by head."""
    assert q.shape[1] == sum(tokens)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def project_and_attend(video: Tensor, text: Tensor, weight: Tensor, heads: int, attend: Any, n: int, m: int) -> Tensor:
    """A layer's attention with seams: q, k, v from both streams, joint attention, the video part of its output."""
    joint = torch.cat([video, text], dim=1)
    q, k, v = functional.linear(joint, weight).unflatten(2, (3, heads, -1)).unbind(2)
    v, k, q = (begun(attend, x) for x in (v, k, q))
    return attend(q, k, v, TokenCounts(n, m)).flatten(2)[:, : video.shape[1]]


def inputs(n: int, m: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n * 100 + m * 10 + heads)
    width, dh = 8, 4
    draw = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in
            ((2, n, width), (2, m, width), (3 * heads * dh, width), (2, n, heads * dh))]  # fmt: skip
    return draw[0], draw[1], draw[2], draw[3]


def forward_backward(n: int, m: int, heads: int, seams: Ulysses | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (output, gradient of the video tokens, gradient of the weight), of this rank's tokens with seams."""
    video, text, weight, target = inputs(n, m, heads)
    video.requires_grad_()
    weight.requires_grad_()
    if seams is None:
        out = project_and_attend(video, text, weight, heads, softmax_attention, n, m)
    else:
        local = seams.split_tokens(video), seams.split_tokens(text)
        out = seams.merge_tokens(project_and_attend(*local, weight, heads, seams.attend, n, m), n)
    (out - target).square().sum().backward()
    assert video.grad is not None
    assert weight.grad is not None
    return out.detach(), video.grad, weight.grad


def ranks() -> dict[str, Any]:
    """Runs in every process: largest errors of each case."""
    rank, world = start(toy.CPU, timeout_s=60.0)
    group = dist.new_group(list(range(world)))
    errors = {}
    for (n, m, heads), kind, unit in itertools.product(CASES, (Ulysses, OverlappedUlysses), (1, 2)):
        want = forward_backward(n, m, heads, None)
        seams = kind(group, softmax_attention, unit=unit)
        out, video_grad, weight_grad = forward_backward(n, m, heads, seams)
        dist.all_reduce(video_grad, group=group)  # each rank has its own tokens' part, and zeros elsewhere
        dist.all_reduce(weight_grad, group=group)
        got = (out, video_grad, weight_grad)
        name = f"{n} {m} {heads} {kind.__name__} {unit}"
        errors[name] = max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))
    texts = gather_json(["k" * (rank + 1), {"rank": rank, "ß": None}], None, toy.CPU)
    return {"errors": errors, "texts": texts, "any": [any_of(rank == world - 1, toy.CPU), any_of(False, toy.CPU)]}


@pytest.mark.dist
def test_seams_are_exact_for_uneven_heads_and_tokens() -> None:
    results = launch.run(__file__, "ranks", 3, timeout_s=120.0)
    for result in results:
        assert len(result["errors"]) == 4 * len(CASES)
        assert max(result["errors"].values()) < 1e-12
        assert result["texts"] == [["k" * (r + 1), {"rank": r, "ß": None}] for r in range(3)]
        assert result["any"] == [True, False]


def test_padded_part() -> None:
    assert [padded_part(n, 4) for n in (0, 1, 4, 5, 38)] == [0, 1, 1, 2, 10]
    assert [padded_part(n, 4, 2) for n in (0, 1, 4, 8, 9, 38)] == [0, 2, 2, 2, 4, 10]
