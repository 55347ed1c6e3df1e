"""torch's scaled_dot_product_attention; on CUDA with its kernels in our order of preference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Left alone, torch usually takes its flash-attn 2 kernel although cuDNN's is faster on Hopper.
CUDA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns attention by torch's fastest kernel that takes these tensors: (b, s, heads, dh)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu":
        # Its kernel reads a head's keys and values over and over: one after the other they pay for the copy. The
        # result is laid out like q, which therefore stays as it is.
        k, v = k.contiguous(), v.contiguous()
    if q.device.type != "cuda":
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(CUDA_ORDER, set_priority=True):
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)
