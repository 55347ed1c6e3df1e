"""The one module that knows device names: cuda, npu or cpu, and what follows from each."""

from __future__ import annotations

import importlib.util
import os

import torch

from contentv.base.errors import UserError

BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}


def available_types() -> list[str]:
    """Returns the device types this process can use, best first."""
    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if importlib.util.find_spec("torch_npu") is not None:
        import torch_npu  # noqa: F401  (registers torch.npu)

        if torch.npu.is_available():  # type: ignore[attr-defined]
            found.append("npu")
    return [*found, "cpu"]


def select(name: str = "auto") -> torch.device:
    """Returns this process's device: the local rank's accelerator, or the CPU.

    Args:
        name: auto, cuda, npu or cpu. `auto` takes the best available.

    Raises:
        UserError: the named device is unknown or not on this machine.
    """
    usable = available_types()
    kind = usable[0] if name == "auto" else name
    if kind not in BACKENDS:
        raise UserError(f'device "{name}" is unknown', where="device", remedy="use auto, cuda, npu or cpu")
    if kind not in usable:
        raise UserError(
            f'device "{name}" is not available on this machine (found: {", ".join(usable)})',
            where="device",
            remedy="use device=auto, or install the driver and a torch build for it (contentv doctor shows both)",
        )
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
    module(device).set_device(device)
    return device


def module(device: torch.device):  # type: ignore[no-untyped-def]
    """Returns torch.cuda, torch.npu or torch.cpu, which share the calls used here."""
    return getattr(torch, device.type)


def names(kind: str) -> list[str]:
    """Returns what the devices of a type call themselves; none for the CPU."""
    if kind == "cpu":
        return []
    of_kind = module(torch.device(kind))
    return [str(of_kind.get_device_name(index)) for index in range(of_kind.device_count())]


def backend(device: torch.device) -> str:
    """Returns the torch.distributed backend of a device: nccl, hccl or gloo."""
    return BACKENDS[device.type]


def synchronize(device: torch.device) -> None:
    """Waits for the device's queued work; nothing to wait for on the CPU."""
    if device.type != "cpu":
        module(device).synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory this process has held: device allocations, or resident memory on the CPU."""
    if device.type != "cpu":
        return int(module(device).max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Dense bf16 peak, FLOP/s, by a part of the device's name. NVIDIA's from its data sheets (H100, H200, A100, RTX 4090;
# the tensor cores of H800 and A800 are those of H100 and A100). For the 910B public statements go from 280 (a cloud
# vendor's page) over 320 (press) to 376 (half of a 910C's share of CloudMatrix-384's 289 PFLOP/s): the highest, which
# flatters no MFU. None for the CPU: its peak is no published constant, and an MFU against a guess would mean nothing.
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "4090": 165.2e12,
    "910B": 376e12,
}


def peak_flops(device: torch.device) -> float:
    """Returns the dense bf16 peak of one device in FLOP/s, or 0 when it is not known."""
    return 0.0 if device.type == "cpu" else peak_flops_of(str(module(device).get_device_name(device)))


def peak_flops_of(name: str) -> float:
    """Returns the dense bf16 peak of a device by its name, such as "NVIDIA H100 PCIe", or 0 when it is not known."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), 0.0)
