"""contentv: train text-to-video diffusion transformers by the ContentV recipe."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"

# `kernels/` is a source root, not a package (a package named `kernels` would shadow Hugging Face's). An installed
# copy finds `contentv_kernels` by itself; a bare checkout needs its folder on the path.
_KERNELS = Path(__file__).resolve().parent.parent / "kernels"
if importlib.util.find_spec("contentv_kernels") is None and (_KERNELS / "contentv_kernels").is_dir():
    sys.path.append(str(_KERNELS))
