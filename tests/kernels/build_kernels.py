"""Builds the layer norm's Triton kernels for an H100/H200 at the 8B's width and prints what ptxas says, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from contentv_kernels.modulated_layer_norm import triton as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDTH = 2432
FP32_POINTERS = ("mean_ptr", "rstd_ptr", "partial_ptr")


def build(kernel) -> dict:
    options = kernels._shape(16, WIDTH)
    warps = options.pop("num_warps")
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in options:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FP32_POINTERS else "*bf16"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name.endswith(("_ptr", "_stride")) or name == "d"
    }
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in options.items()}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    return {"name": kernel.__name__, "warps": warps, "atomics": len(re.findall(r"\b(atom|red)\.", ptx)),
            "vector_loads": len(re.findall(r"ld\.global\S*\.v[24]\.b32", ptx)), **assemble(ptx)}  # fmt: skip


def assemble(ptx: str) -> dict[str, int]:
    assembler = sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))[-1]  # the newest of them
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        log = subprocess.run(
            [assembler, "-v", "-arch=sm_90a", path, "-o", Path(folder, "kernel.cubin")],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return {"registers": registers, "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))}


print(json.dumps([build(kernels._forward_kernel), build(kernels._backward_kernel)]))
