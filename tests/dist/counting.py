"""Bytes handed to torch.distributed, and the closed formulas that they must equal: written apart from the code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contentv.base.types import TokenCounts
from contentv.models.mmdit import MMDiTConfig
from contentv.parallel.mesh import Mesh

GATHERS = ("all_gather_into_tensor", "all_gather_single")
SCATTERS = ("reduce_scatter_tensor", "reduce_scatter_single")
NAMES = {**dict.fromkeys(GATHERS, "all_gather"), **dict.fromkeys(SCATTERS, "reduce_scatter")}


class Traffic:
    """Counts, from now on, the bytes that this process hands to each collective, own share included.

    Of an all-to-all, an all-reduce and a send: the tensor given. Of an all-gather: what it yields. Of a reduce-scatter:
    what is summed.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        sizes: dict[str, Callable[..., Tensor]] = {
            "all_to_all_single": lambda out, x: x, "all_reduce": lambda x: x,
            **dict.fromkeys(GATHERS, lambda out, x: out), **dict.fromkeys(SCATTERS, lambda out, x: x),
        }  # fmt: skip
        for name, given in sizes.items():
            if hasattr(dist, name):
                self._wrap(name, given)
        batch, send = dist.batch_isend_irecv, dist.isend

        def batched(operations: list[dist.P2POp]) -> Any:
            for operation in operations:
                if operation.op is send:
                    self._count("isend", operation.tensor)
            return batch(operations)

        dist.batch_isend_irecv = batched

    def _wrap(self, name: str, given: Callable[..., Tensor]) -> None:
        function = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(name, given(*[x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]))
            return function(*args, **kwargs)

        setattr(dist, name, counted)

    def _count(self, name: str, tensor: Tensor) -> None:
        self.bytes[NAMES.get(name, name)] += tensor.numel() * tensor.element_size()


def kept_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Returns the bytes of all storages that autograd keeps of a forward pass, parameters apart, and the loss."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = loss()
    return sum(storage.nbytes() for storage in storages.values()), value


def part_size(n: int, sp: int, unit: int = 1) -> int:
    """Tokens of a sequence rank: n padded to divide by sp x unit."""
    return unit * math.ceil(n / (sp * unit))


def block_lengths(tokens: TokenCounts, sp: int, ring: int, unit: int = 1) -> list[int]:
    """Tokens of each place of the ring: every stream is cut into sp parts of equal size, the last ones short."""
    lengths = []
    for place in range(ring):
        count = 0
        for n in tokens:
            part = part_size(n, sp, unit)
            count += sum(1 for token in range(n) if token // part // (sp // ring) == place)
        lengths.append(count)
    return lengths


def ulysses_bytes(samples: int, local_tokens: int, width: int, dtype: torch.dtype) -> int:
    """8 b (S / P) D e: q, k, v and the output, forward and backward; D with padded heads."""
    return 8 * samples * local_tokens * width * dtype.itemsize


def ring_bytes(samples: int, lengths: list[int], place: int, width: int, dtype: torch.dtype) -> int:
    """Keys and values of all blocks but the next place's, twice; gradients of all but one's own, in at least fp32."""
    total, following = sum(lengths), lengths[(place + 1) % len(lengths)]
    travelling = 2 * 2 * (total - following) * dtype.itemsize
    gradients = 2 * (total - lengths[place]) * max(dtype.itemsize, 4)
    return samples * width * (travelling + gradients)


def attention_formula(
    tokens: TokenCounts, shape: tuple[int, int, int], sp: int, ring: int, sp_rank: int, dtype: torch.dtype,
    unit: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Bytes of one layer's attention; `shape` is (samples, heads, channels of a head)."""
    samples, heads, head_dim = shape
    ulysses, expected = sp // ring, {}
    width = -(-heads // ulysses) * ulysses * head_dim
    if ulysses > 1:
        expected["all_to_all_single"] = ulysses_bytes(
            samples, sum(part_size(n, sp, unit) for n in tokens), width, dtype
        )
    if ring > 1:
        lengths = block_lengths(tokens, sp, ring, unit)
        expected["isend"] = ring_bytes(samples, lengths, sp_rank // ulysses, width // ulysses, dtype)
    return expected


def model_formula(config: MMDiTConfig, tokens: TokenCounts, samples: int, mesh: Mesh) -> dict[str, int]:
    """Bytes of a forward and backward pass in fp32, ZeRO apart."""
    e, layers, width = 4, config.num_layers, config.inner_dim
    heads = config.num_attention_heads // mesh.tp + (mesh.tp_rank < config.num_attention_heads % mesh.tp)
    shape = (samples, heads, config.attention_head_dim)
    unit = mesh.tp if mesh.sequence_norms else 1
    attention = attention_formula(tokens, shape, mesh.sp, mesh.ring, mesh.sp_rank, torch.float32, unit)
    expected = Counter({name: layers * n for name, n in attention.items()})
    local = TokenCounts(*(part_size(n, mesh.sp, unit) for n in tokens))
    patch = config.patch_size**2
    output = samples * local.video * patch * config.out_channels * e
    if mesh.sp > 1:  # the output is put together, once
        expected["all_gather"] += mesh.sp * output
    if mesh.tp > 1:
        # A layer and stream: outputs of attention and feed-forward, gradients of their inputs. The last layer's text
        # ends at the attention: its input alone. Then the gradients of four norms.
        halves = samples * (2 * layers * local.video + (2 * layers - 2) * local.text) * width * e  # outputs
        halves_in = halves + samples * local.text * width * e  # inputs
        norms = 4 * layers * config.attention_head_dim * e
        expected["all_reduce"] += norms
        if not mesh.sequence_norms:
            expected["all_reduce"] += halves + halves_in
        else:
            # Inputs are gathered and their gradients scattered, outputs scattered and their gradients gathered.
            expected["all_gather"] += halves + halves_in + output
            expected["reduce_scatter"] += halves + halves_in
            expected["all_reduce"] += replicated_gradients(config, samples) * e
    return dict(expected)


def replicated_gradients(config: MMDiTConfig, samples: int) -> int:
    """Numbers that tensor ranks with a part of the tokens sum in a backward pass, norms of heads apart."""
    d, patch = config.inner_dim, config.patch_size**2
    modulations = 12 * config.num_layers - 4 + 2  # vectors a clip; two of the last text's norm, two of the last norm
    biases = 4 * config.num_layers - 2  # of attention's output and the feed-forward's, of each stream
    inputs = (patch * config.in_channels + 1) * d + (config.joint_attention_dim + 1) * d
    return samples * modulations * d + biases * d + inputs + (d + 1) * patch * config.out_channels


def zero3_formula(
    shapes: list[tuple[int, ...]], ranks: int, dtype: torch.dtype, gathers: int
) -> dict[str, int]:  # fmt: skip
    """Bytes of a step of one micro-batch: weights gathered, gradients scattered, and three scalars.

    Weights are gathered for the forward and again for the backward pass; those of a model below 1e9 once for both. The
    scalars are the loss, the gradient norm and whether all is finite.
    """
    padded = sum(-(-math.prod(shape) // ranks) * ranks for shape in shapes)
    return {
        "all_gather": gathers * padded * dtype.itemsize, "reduce_scatter": padded * dtype.itemsize, "all_reduce": 3 * 4,
    }  # fmt: skip
