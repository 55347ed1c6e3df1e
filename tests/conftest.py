"""Test-wide set-up: shapes in annotations are checked at run time, and math is single-threaded."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# The jaxtyping hook breaks torch.compile(fullgraph=True), so compile tests run without it (CONTENTV_TYPECHECK=0).
if os.environ.get("CONTENTV_TYPECHECK", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook(["contentv", "contentv_kernels"], "beartype.beartype")

import torch

torch.set_num_threads(1)
