"""What a transformer costs to hold and to train, as formulas: bytes of weights and activations, operations of a step.

Activations are what the backward pass needs from the forward pass, tensor by tensor. Per token of a stream, in units
of the model's width D:

    input of the layer 1, first norm 1, queries and keys before their norm 2, queries, keys and values 3,
    attention output 1, its projection 1, sum 1, second norm 1, feed-forward's hidden layer before and after GELU 4 + 4,
    its output 1                                                                                                 = 20

In the last layer the text ends at the attention: 8. Statistics of norms and attention are a few bytes per token and
head. The tests count the same on the model itself, and the two agree to the byte.
"""

from __future__ import annotations

import torch

from contentv.base.types import TokenCounts
from contentv.models.layers import TIME_CHANNELS
from contentv.models.mmdit import MMDiTConfig, flops_per_forward

STREAM_WIDTHS = 20  # see above: widths kept per token by a whole layer
LAST_TEXT_WIDTHS = 8  # and of the last layer's text
STATISTIC_BYTES = 4  # norms and attention keep theirs in fp32
RECOMPUTES = ("none", "selective", "full")


def parameter_count(config: MMDiTConfig) -> int:
    """Returns the number of weights: 8,056,627,520 with the default configuration."""
    d, patch = config.inner_dim, config.patch_size**2
    norms = 4 * config.attention_head_dim if config.qk_norm is not None else 0
    # Per stream: modulation 6 D (D + 1), attention 4 D (D + 1), feed-forward 8 D^2 + 5 D.
    layer = 2 * (18 * d * d + 15 * d) + norms
    last_text = (4 + 1 + 8) * d * d + (4 + 1 + 5) * d  # modulation 2 D instead of 6 D, no output, no feed-forward
    condition = (TIME_CHANNELS + config.pooled_projection_dim + 2) * d + 2 * d * (d + 1)
    ends = (patch * config.in_channels + 1) * d + (config.joint_attention_dim + 1) * d
    output = 2 * d * (d + 1) + (d + 1) * patch * config.out_channels
    return config.num_layers * layer - last_text + condition + ends + output


def weight_bytes(config: MMDiTConfig, dtype: torch.dtype) -> int:
    """Returns the bytes of one copy of the weights.

    Args:
        config: the model's shape.
        dtype: of the copy.
    """
    return parameter_count(config) * dtype.itemsize


def activation_bytes_per_block(
    config: MMDiTConfig,
    tokens: TokenCounts,
    dtype: torch.dtype,
    recompute: str = "none",
    *,
    batch: int = 1,
    last: bool = False,
    fused_norms: bool = True,
) -> int:
    """Returns the bytes that one layer keeps between its forward and its backward pass, its inputs included.

    With sequence parallelism, give each process's share of the tokens.

    Args:
        config: the model's shape.
        tokens: video and text tokens of a sample.
        dtype: that the layer computes in.
        recompute: none, selective (the attention's output is kept beside the layer's input) or full (the input alone).
        batch: samples of a micro-batch.
        last: the last layer, whose text ends at the attention.
        fused_norms: norms keep their input and statistics alone, as the kernels on CUDA do; false: torch's plain
            operations, on the CPU and on Ascend.

    Raises:
        ValueError: there is no such `recompute`.
    """
    if recompute not in RECOMPUTES:
        raise ValueError(f"recompute={recompute} is none of {RECOMPUTES}")
    d, s, size = config.inner_dim, tokens.video + tokens.text, dtype.itemsize
    attention = s * d * size + s * config.num_attention_heads * STATISTIC_BYTES  # its output, its log-sum-exp
    if recompute != "none":
        return batch * (s * d * size + (attention if recompute == "selective" else 0))
    widths = STREAM_WIDTHS * tokens.video + (LAST_TEXT_WIDTHS if last else STREAM_WIDTHS) * tokens.text
    # A projection that follows the attention reads its stream's part of the joint output; of a larger batch, a copy.
    if batch > 1:
        widths += tokens.video + (0 if last else tokens.text)
    kept = widths * d * size + s * config.num_attention_heads * STATISTIC_BYTES
    kept += (8 if last else 12) * d * size  # both streams' modulations
    return batch * (kept + _norm_bytes(config, tokens, size, last, fused_norms))


def _norm_bytes(config: MMDiTConfig, tokens: TokenCounts, size: int, last: bool, fused: bool) -> int:
    """Returns what a layer's norms keep of one sample beside their inputs and outputs."""
    d, s = config.inner_dim, tokens.video + tokens.text
    normed = 2 * tokens.video + (1 if last else 2) * tokens.text  # tokens that a modulated norm reads
    kept = normed * 2 * STATISTIC_BYTES
    if not fused:
        # What the modulation multiplies, and 1 + scale; the last text's scale and shift themselves are then not kept.
        kept += normed * d * size + (1 if last else 4) * d * size
    if config.qk_norm is None:
        # Without their norm, queries and keys before and after it are the same numbers, kept once.
        return kept - 2 * s * d * size
    kept += 2 * s * config.num_attention_heads * STATISTIC_BYTES
    if not fused:
        # The plain operations work in fp32: they keep the input, as a copy where it has another dtype, and the result.
        kept += 2 * s * d * (2 * STATISTIC_BYTES - size)
    return kept


def activation_bytes(
    config: MMDiTConfig,
    tokens: TokenCounts,
    dtype: torch.dtype,
    recompute: str = "none",
    *,
    batch: int = 1,
    fused_norms: bool = True,
) -> int:
    """Returns the bytes that a forward pass of the whole model keeps for the backward pass.

    With recompute, the backward pass adds what one layer keeps without, for one layer at a time.

    Args:
        config, tokens, dtype, recompute, batch, fused_norms: as in `activation_bytes_per_block`.
    """
    d, size = config.inner_dim, dtype.itemsize
    blocks = [
        activation_bytes_per_block(
            config, tokens, dtype, recompute, batch=batch, last=last, fused_norms=fused_norms
        )
        for last in (False, True)
    ]  # fmt: skip
    inputs = tokens.video * config.patch_size**2 * config.in_channels + tokens.text * config.joint_attention_dim
    # Both condition MLPs keep their input and their hidden layer before and after SiLU; then the sum and its SiLU.
    condition = TIME_CHANNELS + config.pooled_projection_dim + 6 * d
    output = (2 * tokens.video + 2) * d * size + 2 * tokens.video * STATISTIC_BYTES  # the last norm's input and output
    if not fused_norms:
        output += (tokens.video + 1 - 2) * d * size  # 1 + scale instead of scale and shift
    ends = batch * ((inputs + condition) * size + output)
    return (config.num_layers - 1) * blocks[0] + blocks[1] + ends


def flops_per_step(config: MMDiTConfig, tokens: TokenCounts, recompute: str = "none") -> int:
    """Returns the operations of one sample's forward and backward pass, matrix products at 2 per multiply-add.

    A backward pass is twice the forward pass, but for the gradients of the model's inputs, which nobody reads. The
    scores that a fused attention computes once more in its own backward pass are not counted.

    Args:
        config: the model's shape.
        tokens: video and text tokens of the sample.
        recompute: none, selective or full; selective does all of the layers again but the attention.

    Raises:
        ValueError: there is no such `recompute`.
    """
    if recompute not in RECOMPUTES:
        raise ValueError(f"recompute={recompute} is none of {RECOMPUTES}")
    d, s = config.inner_dim, tokens.video + tokens.text
    forward = flops_per_forward(config, tokens)
    patch = config.patch_size**2
    unread = tokens.video * patch * config.in_channels + tokens.text * config.joint_attention_dim
    unread += TIME_CHANNELS + config.pooled_projection_dim
    again = 0
    if recompute != "none":
        ends = tokens.video * patch * (config.in_channels + config.out_channels)
        ends += tokens.text * config.joint_attention_dim
        ends += TIME_CHANNELS + config.pooled_projection_dim + 2 * d + 2 * d  # the condition, the last modulation
        again = forward - 2 * d * ends
    if recompute == "selective":
        again -= config.num_layers * 4 * s * s * d
    return 3 * forward - 2 * d * unread + again
