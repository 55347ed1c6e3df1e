"""Bytes of activations on one device: what the forward pass keeps, and what a layer's backward pass works with.

All of it in widths: a number per channel of the model and token of a sequence rank's micro-batch. A whole layer keeps
20 of them (contentv/models/cost.py); what of these lies by heads, what tensor ranks divide and what the exchanges of a
layer hold is counted here. How each number was found is written in docs/planning.md.
"""

from __future__ import annotations

from dataclasses import replace

from contentv.base.types import TokenCounts
from contentv.config.planning.layout import Job, Layout, head_padding, local_tokens, width_bytes
from contentv.engine.activation_offload import LEAVING_LAYERS
from contentv.models.cost import STATISTIC_BYTES, activation_bytes, activation_bytes_per_block

WORKING_WIDTHS = 3  # gradients of a layer's feed-forward over what it has freed by then
SPLIT_WIDTHS = 14  # of a layer's 20, those that tensor ranks hold a part of: heads and hidden layers
SEQUENCE_WIDTHS = 4  # and with sequence norms: input, projection, sum, output; what column layers read is gathered
QKV_WIDTHS, EXCHANGES = 3, 4  # an all-to-all of q, k, v: stacked, sent, received, joined
FREED_WIDTHS = 11  # what the layer has let go of when the exchange of its backward pass runs


def kept_activations(job: Job, layout: Layout, tokens: TokenCounts) -> int:
    """Returns the bytes that the forward pass of a micro-batch keeps for the backward pass, on the device or the host.

    Args:
        job: what is trained.
        layout: how.
        tokens: of a clip, before any split.
    """
    layers, ends = _kept(job, layout, tokens)
    return layers + ends


def offloaded_activations(job: Job, layout: Layout, tokens: TokenCounts) -> int:
    """Returns what of `kept_activations` waits in host memory: all layers' but those on their way."""
    if not layout.offload_activations:
        return 0
    layers, _ = _kept(job, layout, tokens)
    return layers * max(0, job.model.num_layers - LEAVING_LAYERS) // job.model.num_layers


def _kept(job: Job, layout: Layout, tokens: TokenCounts) -> tuple[int, int]:
    """Returns what all layers keep, and what is kept before and after them."""
    model, recompute, fused = job.model, layout.recompute, job.device == "cuda"
    local, width = local_tokens(tokens, layout), width_bytes(job, layout, tokens)
    # Under ZeRO-3 DeepSpeed's linear keeps its input as it lies: no copies where a larger batch would need them.
    clips, times = (1, layout.micro_batch) if layout.zero_stage == 3 else (layout.micro_batch, 1)
    kept = times * activation_bytes(model, local, job.dtype, recompute, batch=clips, fused_norms=fused)
    inner = times * model.num_layers * activation_bytes_per_block(
        model, local, job.dtype, recompute, batch=clips, fused_norms=fused
    )  # fmt: skip
    layer = _exchanged(job, layout, local, width) - _divided(job, layout, width) * (1 - 1 / layout.tp)
    # The last layer's text ends early, so that what is left for the ends may be below nothing.
    return inner + int(model.num_layers * layer), (kept - inner) // layout.token_unit


def _exchanged(job: Job, layout: Layout, local: TokenCounts, width: int) -> float:
    """Returns what a layer keeps beyond its count because it talks to other sequence ranks."""
    padding, extra = head_padding(job.model, layout), 0.0
    if layout.recompute == "none":
        extra = 4 * width * (padding - 1)  # q, k, v and the output lie by heads, padded ones among them
        if layout.sp > 1:
            # The output by heads is kept beside that by tokens; the CPU's attention copies k and v out of the received,
            # where a ring keeps what it received.
            extra += width * (3 if job.device == "cpu" and layout.ring == 1 else 1)
    elif layout.recompute == "selective":
        # Each place of a ring has an output of its own over the whole rank's queries.
        statistics = layout.micro_batch * sum(local) * job.model.num_attention_heads * STATISTIC_BYTES
        extra = width * (layout.ring * padding - 1) + statistics * (layout.ring - 1)
    return extra


def _divided(job: Job, layout: Layout, width: int) -> int:
    """Returns what of a layer's kept activations tensor ranks divide among them."""
    fused, size = job.device == "cuda", job.dtype.itemsize
    if layout.recompute != "none":
        return width * ((layout.recompute == "selective") + layout.sequence_norms)  # attention's output; layer's input
    divided = SPLIT_WIDTHS * width
    if not fused and job.model.qk_norm is not None:
        divided += 2 * (2 * STATISTIC_BYTES - size) * width // size  # the plain norm of q and k works in fp32
    if layout.sequence_norms:
        divided += SEQUENCE_WIDTHS * width + (0 if fused else 2 * width)  # and what plain modulations multiply
    return divided


def working_bytes(job: Job, layout: Layout, tokens: TokenCounts) -> int:
    """Returns what a layer's backward pass holds beside what was kept: gradients, or the buffers of an exchange."""
    width = width_bytes(job, layout, tokens)
    exchange = max(exchange_bytes(job, layout, tokens), ring_buffer_bytes(job, layout, tokens))
    working = max(WORKING_WIDTHS * width, exchange - FREED_WIDTHS * width // layout.tp)
    if layout.recompute == "none":
        return working
    # One layer is there as a whole; its input was kept.
    whole = replace(layout, recompute="none")
    block = layout.micro_batch * activation_bytes_per_block(
        job.model, local_tokens(tokens, layout), job.dtype, "none", batch=1, fused_norms=job.device == "cuda"
    )  # fmt: skip
    return working + block - int(_divided(job, whole, width) * (1 - 1 / layout.tp)) - width // layout.token_unit


def exchange_bytes(job: Job, layout: Layout, tokens: TokenCounts) -> int:
    """Returns the buffers of one all-to-all of q, k and v; 0 without Ulysses."""
    if layout.ulysses == 1:
        return 0
    width = width_bytes(job, layout, tokens) * head_padding(job.model, layout) / layout.tp
    return int(EXCHANGES * QKV_WIDTHS * width)


def ring_buffer_bytes(job: Job, layout: Layout, tokens: TokenCounts) -> int:
    """Returns what the ring's backward pass holds at once, the gradient of the output among it; 0 without a ring.

    Of widths: keys and values here and arriving 4 (2 at the last of two places), the gradients of a block 3, the
    output's 1; in at least fp32 the gradients of the queries 1, of the own block 2, of the block at work 2, of those
    that leave and arrive 4 (2 in a ring of two).
    """
    if layout.ring == 1:
        return 0
    width = width_bytes(job, layout, tokens) * head_padding(job.model, layout) / layout.tp
    narrow, wide = (6, 7) if layout.ring == 2 else (8, 9)
    return int(width * (narrow + wide * max(1, STATISTIC_BYTES // job.dtype.itemsize)))
