"""Fused operations behind plain functions: chosen by where the tensor lives, importable with torch alone."""

from __future__ import annotations

from contentv_kernels.attention import attention
from contentv_kernels.attention_part import attention_part, attention_part_backward
from contentv_kernels.dispatch import available, force, report
from contentv_kernels.modulated_layer_norm import modulated_layer_norm
from contentv_kernels.rms_norm import rms_norm

__all__ = [
    "attention",
    "attention_part",
    "attention_part_backward",
    "available",
    "force",
    "modulated_layer_norm",
    "report",
    "rms_norm",
]
