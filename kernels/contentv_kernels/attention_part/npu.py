"""Ascend's fused attention with its softmax statistics; written against torch_npu's interface, not yet run on a device.

The operator keeps a row's largest score and the sum of exponentials below it, each eight times over. Its gradient needs
only that largest + log(sum) is the log-sum-exp: given over all keys, it yields the gradients over all keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contentv_kernels.attention.npu import EVERY_TOKEN, why_not

__all__ = ["backward", "forward", "why_not"]
COPIES = 8


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention and log-sum-exp by torch_npu.npu_fusion_attention."""
    import torch_npu

    out, largest, total, *_ = torch_npu.npu_fusion_attention(
        q, k, v, head_num=q.shape[2], input_layout="BSND", scale=q.shape[-1] ** -0.5, pre_tockens=EVERY_TOKEN,
        next_tockens=EVERY_TOKEN, keep_prob=1.0,
    )  # fmt: skip
    return out, (largest + total.log())[..., 0]


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by torch_npu.npu_fusion_attention_grad."""
    import torch_npu

    largest = lse[..., None].expand(*lse.shape, COPIES).contiguous()
    grads = torch_npu.npu_fusion_attention_grad(
        q, k, v, grad.contiguous(), q.shape[2], "BSND", softmax_max=largest, softmax_sum=torch.ones_like(largest),
        attention_in=out, scale_value=q.shape[-1] ** -0.5, pre_tockens=EVERY_TOKEN, next_tockens=EVERY_TOKEN,
        keep_prob=1.0,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]
