"""What a rank hands to the collectives of one layer, forward and backward, as formulas: bytes, own share included.

With S tokens of a clip (video and text padded to divide by sp each), width D = heads dh of this tensor rank (its heads
padded to divide by the Ulysses degree U), b clips and e bytes of a number:

    all-to-all    8 b (S / sp) D e                 q, k, v and the output, there and back; none where U = 1
    ring          2 b (S - next) (D / U) 2 e       keys and values of all blocks but the next place's, in both passes
                + 2 b (S - own) (D / U) max(e, 4)  their gradients, in at least fp32
    all-reduce    4 b (S / sp) D e                 outputs of attention and feed-forward, gradients of their inputs;
                                                   D of the whole model; none where tp = 1
    instead, with sequence norms, twice            a gather of inputs and of outputs' gradients, a reduce-scatter of
                  4 b (S / sp) D e                 outputs and of inputs' gradients

A ring of t ranks moves 2 (t - 1) / t of what an all-reduce is handed, and (t - 1) / t of the other two: with sequence
norms tensor ranks send as much, and S is padded to divide by sp x tp.

The tests count the same where torch.distributed is called, and the two are equal to the byte.
"""

from __future__ import annotations

from contentv.base.types import TokenCounts
from contentv.parallel.ulysses import block_counts, padded_part

GRADIENT_BYTES = 4  # gradients of keys and values are summed on their way in at least fp32


def head_counts(heads: int, tp: int) -> list[int]:
    """Returns the attention heads of every tensor rank: whole ones, as evenly as they go, the first with more.

    Args:
        heads: of the model.
        tp: tensor ranks, at most the heads.
    """
    return [heads // tp + (rank < heads % tp) for rank in range(tp)]


def head_overhead(heads: int, ulysses: int, tp: int) -> float:
    """Returns the attention work of the busiest rank over an equal share of it: 38 heads over 4 ranks are 10 / 9.5.

    Args:
        heads: of the model.
        ulysses: ranks that exchange heads.
        tp: tensor ranks.
    """
    return padded_part(head_counts(heads, tp)[0], ulysses) * ulysses * tp / heads


def all_to_all_bytes(
    tokens: TokenCounts, heads: int, head_dim: int, sp: int, ring: int, itemsize: int, unit: int = 1
) -> int:
    """Returns the bytes of a layer's all-to-alls for one clip.

    Args:
        tokens: of the whole clip.
        heads: of this tensor rank.
        head_dim: channels of a head.
        sp, ring: the degrees.
        itemsize: bytes of a number.
        unit: what the tokens of a sequence rank are a multiple of: tp with sequence norms.
    """
    ulysses = sp // ring
    if ulysses == 1:
        return 0
    local = sum(padded_part(n, sp, unit) for n in tokens)
    return 8 * local * padded_part(heads, ulysses) * ulysses * head_dim * itemsize


def ring_bytes(
    tokens: TokenCounts, heads: int, head_dim: int, sp: int, ring: int, itemsize: int, place: int = 0, unit: int = 1
) -> int:
    """Returns the bytes that a rank sends round the ring for a layer of one clip.

    Args:
        tokens, heads, head_dim, sp, ring, itemsize, unit: as for `all_to_all_bytes`.
        place: this rank's in the ring.
    """
    if ring == 1:
        return 0
    lengths = [sum(counts) for counts in block_counts(tokens, sp, ring, unit)]
    width = padded_part(heads, sp // ring) * head_dim
    travelling = 2 * 2 * (sum(lengths) - lengths[(place + 1) % ring]) * itemsize
    gradients = 2 * (sum(lengths) - lengths[place]) * max(itemsize, GRADIENT_BYTES)
    return width * (travelling + gradients)


def all_reduce_bytes(tokens: TokenCounts, width: int, sp: int, tp: int, itemsize: int) -> int:
    """Returns the bytes of the all-reduces of a layer whose text goes on, for one clip; a ring sends 2 (tp - 1) / tp.

    Args:
        tokens: of the whole clip.
        width: of the whole model.
        sp, tp: the degrees.
        itemsize: bytes of a number.
    """
    return 0 if tp == 1 else 4 * sum(padded_part(n, sp) for n in tokens) * width * itemsize


def sequence_norms_bytes(tokens: TokenCounts, width: int, sp: int, tp: int, itemsize: int) -> int:
    """Returns the bytes of a layer's all-gathers for one clip with sequence norms; its reduce-scatters have as many.

    Of each a ring sends (tp - 1) / tp. What the tensor ranks sum beside them has the size of weights and clips, not of
    tokens: the gradients of modulations, of the row layers' biases, and of the embeddings and the output layer.

    Args:
        tokens, width, sp, tp, itemsize: as for `all_reduce_bytes`.
    """
    return 0 if tp == 1 else 4 * sum(padded_part(n, sp, tp) for n in tokens) * width * itemsize
