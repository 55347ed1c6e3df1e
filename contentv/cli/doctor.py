"""`contentv doctor`: devices, libraries, chosen kernels, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import contentv
from contentv.base import device as devices
from contentv.config.schema import DoctorConfig

REQUIRED = ("torch", "deepspeed", "diffusers", "transformers", "safetensors", "webdataset", "hydra-core", "av",
            "opencv-python-headless", "scenedetect-headless", "scipy")  # fmt: skip
OPTIONAL = {
    "wandb": ("wandb", "pip install 'contentv[wandb]'"),
    "tensorboard": ("tensorboard", "pip install 'contentv[tensorboard]'"),
    "triton": ("triton", "pip install 'contentv[gpu]' (NVIDIA GPUs)"),
    "flash-attn": ("flash_attn", "built from source in the Dockerfile's cuda target (NVIDIA GPUs)"),
    "apex (NVIDIA)": ("apex.normalization", "built in the Dockerfile's cuda target; PyPI's apex is another project"),
    "torch_npu": ("torch_npu", "pip install 'contentv[npu]' on a machine with CANN; not run on hardware so far"),
    "ray": ("ray", "pip install 'contentv[curation]' (curation on several machines)"),
}  # fmt: skip

NPU = "not run on hardware: written against torch_npu's published interface and tested with a double of it"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def facts() -> dict[str, Any]:
    """Returns everything doctor shows, as plain values."""
    import contentv_kernels
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    types = devices.available_types()
    return {
        "contentv": contentv.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(".").free,
        "devices": types,
        "device_names": devices.names(types[0]),
        "backend": devices.BACKENDS[types[0]],
        "libraries": {name: _version(name) for name in REQUIRED},
        "optional": {name: _importable(module) for name, (module, _) in OPTIONAL.items()},
        "kernels": {
            op: contentv_kernels.available(op, types[0], torch.float32 if types[0] == "cpu" else torch.bfloat16)
            for op in ("attention", "attention_part", "modulated_layer_norm", "rms_norm")
        },
        "launchers": [name for name in ("torchrun", "sbatch", "docker", "kubectl") if shutil.which(name)],
        "npu": NPU,
        "ffmpeg_codecs": _has_h264(),
    }


def _has_h264() -> bool:
    import av

    return "libx264" in av.codecs_available


def run(config: DoctorConfig, overrides: Sequence[str]) -> None:
    """Prints the facts as a table, or as JSON."""
    found = facts()
    if config.json:
        sys.stdout.write(json.dumps(found, indent=1, default=str) + "\n")
        return
    table = Table(title=f"contentv {found['contentv']}", show_header=False)
    for name in ("python", "platform", "cpu_cores", "devices", "device_names", "backend"):
        table.add_row(name, ", ".join(found[name]) if isinstance(found[name], list) else str(found[name]))
    table.add_row("launchers", ", ".join(found["launchers"]) or "none: torchrun comes with torch")
    table.add_row("Ascend NPUs", found["npu"])
    table.add_row(
        "memory", f"{found['memory_bytes'] / 2**30:.1f} GiB, disk free {found['disk_free_bytes'] / 2**30:.0f} GiB"
    )
    table.add_row("H.264 encoder", "yes" if found["ffmpeg_codecs"] else "no: pip install --force-reinstall av")
    for name, version in found["libraries"].items():
        table.add_row(name, version or "missing: pip install contentv")
    for name, there in found["optional"].items():
        table.add_row(f"{name} (optional)", "found" if there else escape(f"not found: {OPTIONAL[name][1]}"))
    for op, choices in found["kernels"].items():
        rows = [f"{name}: {'usable' if why is None else why}" for name, why in choices.items()]
        table.add_row(f"kernel {op}", "\n".join(rows))
    Console().print(table)
