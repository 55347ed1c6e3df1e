"""The device module: what each kind of device means; an NPU by a double of torch_npu, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from contentv.base import device as devices
from contentv.base.errors import UserError

ROOT = Path(__file__).parents[2]

# What torch_npu does when it is imported, as far as we look at it: it names torch's private-use device, puts a module
# under torch.npu, and registers the backend hccl. Every call is recorded.
NPU = """
import importlib.machinery, json, os, sys, types
import torch
import torch.distributed as dist

calls = []
def record(name, result=None):
    return lambda *args, **kwargs: (calls.append([name, *map(str, args)]), result)[1]

torch.utils.rename_privateuse1_backend("npu")
npu = types.ModuleType("torch.npu")
npu.is_available = record("is_available", True)
npu.set_device = record("set_device")
npu.synchronize = record("synchronize")
npu.max_memory_allocated = record("max_memory_allocated", 123)
npu.get_device_name = record("get_device_name", "Ascend910B2")
npu.device_count = record("device_count", 2)
torch._register_device_module("npu", npu)
torch_npu = types.ModuleType("torch_npu")
torch_npu.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
sys.modules["torch_npu"] = torch_npu
dist.init_process_group = lambda backend, **kwargs: calls.append(["init", backend, kwargs["device_id"]])
dist.is_initialized = lambda: False
dist.get_rank = dist.get_world_size = lambda: 0

os.environ |= dict(LOCAL_RANK="3", RANK="3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="4")
from contentv.base import device as devices
from contentv.parallel.collectives import start

device = devices.select("auto")
devices.synchronize(device)
start(device)
print(json.dumps({
    "types": devices.available_types(), "names": devices.names("npu"),
    "device": str(device), "backend": devices.backend(device),
    "peak": devices.peak_flops(device), "memory": devices.peak_memory_bytes(device), "calls": calls,
}))
"""


def test_an_npu_is_chosen_and_everything_follows_from_it() -> None:
    done = subprocess.run([sys.executable, "-c", NPU], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    calls = found.pop("calls")
    assert found == {
        "types": ["npu", "cpu"], "names": ["Ascend910B2"] * 2, "device": "npu:3", "backend": "hccl", "peak": 376e12,
        "memory": 123,
    }  # fmt: skip
    assert [call for call in calls if call[0] in ("set_device", "synchronize", "init")] == [
        ["set_device", "npu:3"], ["synchronize", "npu:3"], ["init", "hccl", None],
    ]  # fmt: skip


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(UserError, match='"npu" is not available on this machine'):
        devices.select("npu")
    with pytest.raises(UserError, match='"tpu" is unknown'):
        devices.select("tpu")
    assert devices.select("cpu") == torch.device("cpu")
    assert devices.peak_flops(torch.device("cpu")) == 0.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Ascend910B3", 376e12),
        ("NVIDIA Tesla T4", 0.0),
    ],
)
def test_peaks_by_the_names_that_devices_give_themselves(name: str, peak: float) -> None:
    assert devices.peak_flops_of(name) == peak


def test_clusters_have_the_peaks_of_the_table() -> None:
    for path in sorted((ROOT / "conf" / "cluster").glob("*.yaml")):
        cluster = yaml.safe_load(path.read_text())
        if cluster["device"] != "cpu":
            assert devices.peak_flops_of(cluster["name"]) == cluster["peak_tflops"] * 1e12, path.name
