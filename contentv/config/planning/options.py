"""The keys of `contentv plan`: the cluster, what is fixed of the layout, how much is to be trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.parallel.mesh import OFFLOADS, RECOMPUTES, ZERO_STAGES

DEVICE_KINDS = ("cuda", "npu", "cpu")
TAGS = ("measured", "published", "assumed")
GIB = 2**30


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _require(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise UserError(f"{key}={value} is not possible", where=key, remedy=remedy)


@dataclass
class ClusterConfig:
    """The machines. Bandwidths are of one device and one direction, in 1e9 bytes a second."""

    name: str = _doc("", "what the tables call it")
    device: str = _doc("cuda", "cuda | npu | cpu: decides which kernels and which engine settings are counted with")
    nodes: int = _doc(1, "machines, >= 1")
    devices_per_node: int = _doc(8, "devices of a machine, >= 1; with cpu: processes")
    memory_gib: float = _doc(80.0, "memory of one device in GiB (2**30 bytes), > 0")
    context_gib: float = _doc(1.5, "of it taken by the driver and the buffers of collectives, >= 0")
    reserve: float = _doc(0.08, "of it left free for fragmentation and kernels' scratch memory, 0..1")
    peak_tflops: float = _doc(989.4, "dense bf16 peak of one device in 1e12 operations a second, > 0")
    peak_tflops_fp32: float = _doc(67.0, "the same in fp32, > 0")
    dense_efficiency: float = _doc(0.5, "share of the peak that everything but attention reaches, above 0, to 1")
    attention_efficiency: float = _doc(0.3, "share of the peak that attention reaches, above 0, to 1")
    rates: str = _doc("assumed", "where the two come from: measured | published | assumed")
    overhead_ms: float = _doc(0.0, "time of a layer and micro-batch that depends on no size, in milliseconds, >= 0")
    memory_gb_s: float = _doc(3350.0, "bandwidth of the device's memory, > 0")
    intra_gb_s: float = _doc(450.0, "to the devices of the same machine, > 0")
    exchange_gb_s: float | None = _doc(None, "the same where each sends to all (Ulysses), > 0; null = as intra_gb_s")
    inter_gb_s: float = _doc(50.0, "to other machines, > 0")
    link_efficiency: float = _doc(0.7, "share of those two that collectives reach (assumed), above 0, to 1")
    overlap: float = _doc(0.8, "share of the layers' time that ZeRO's communication can hide behind (assumed), 0..1")
    host_memory_gib: float = _doc(1024.0, "host memory of a machine, for offload, in GiB, >= 0")
    host_link_gb_s: float = _doc(25.0, "between a device and its host, > 0")
    host_memory_gb_s: float = _doc(200.0, "bandwidth of a machine's host memory, shared by its devices, > 0")
    price_per_device_hour: float | None = _doc(None, "price of a device for an hour, in any currency; null = no costs")
    note: str = _doc("", "printed under the plan")

    def __post_init__(self) -> None:
        _require(self.device in DEVICE_KINDS, "cluster.device", self.device, f"use one of {', '.join(DEVICE_KINDS)}")
        _require(self.rates in TAGS, "cluster.rates", self.rates, f"use one of {', '.join(TAGS)}")
        for key in ("nodes", "devices_per_node"):
            _require(getattr(self, key) >= 1, f"cluster.{key}", getattr(self, key), "use 1 or more")
        for key in ("memory_gib", "peak_tflops", "peak_tflops_fp32", "memory_gb_s", "intra_gb_s", "inter_gb_s",
                    "host_link_gb_s", "host_memory_gb_s"):  # fmt: skip
            _require(getattr(self, key) > 0, f"cluster.{key}", getattr(self, key), "use a positive number")
        for key in ("dense_efficiency", "attention_efficiency", "link_efficiency"):
            _require(0 < getattr(self, key) <= 1, f"cluster.{key}", getattr(self, key), "use a share above 0, up to 1")
        for key in ("reserve", "overlap"):
            _require(0 <= getattr(self, key) <= 1, f"cluster.{key}", getattr(self, key), "use a share between 0 and 1")
        for key in ("context_gib", "host_memory_gib", "overhead_ms"):
            _require(getattr(self, key) >= 0, f"cluster.{key}", getattr(self, key), "use 0 or more")
        exchange = self.exchange_gb_s
        _require(exchange is None or exchange > 0, "cluster.exchange_gb_s", exchange, "use a positive number, or null")
        price = self.price_per_device_hour
        _require(price is None or price >= 0, "cluster.price_per_device_hour", price, "use 0 or more, or null")

    @property
    def world(self) -> int:
        """All devices."""
        return self.nodes * self.devices_per_node

    def peak_flops(self, precision: str) -> float:
        """Returns the peak of one device, operations a second, in bf16 or fp32."""
        return 1e12 * (self.peak_tflops if precision == "bf16" else self.peak_tflops_fp32)

    @property
    def exchange_bandwidth(self) -> float:
        """What an all-to-all inside a machine has, in 1e9 bytes a second."""
        return self.intra_gb_s if self.exchange_gb_s is None else self.exchange_gb_s

    @property
    def usable_bytes(self) -> int:
        """What a device has for training: all but the context and the reserve."""
        return int((self.memory_gib * (1 - self.reserve) - self.context_gib) * GIB)


@dataclass
class LayoutWish:
    """What of the layout is given; everything left null is searched for. The keys are those of `contentv train`."""

    sp: int | None = _doc(None, "ranks that share one sample's tokens (Ulysses); null = the best")
    tp: int | None = _doc(None, "ranks that share every layer's weights; null = the best")
    zero_stage: int | None = _doc(None, "1 | 2 | 3; null = the best")
    offload: str | None = _doc(None, "none | optimizer | all; null = the best")
    recompute: str | None = _doc(None, "none | selective | full; null = the best")
    ring: int | None = _doc(None, "places of the ring among the sp ranks; null = the best")
    sequence_norms: bool | None = _doc(None, "tensor ranks share the tokens between the layers; null = where it helps")
    offload_activations: bool | None = _doc(
        None, "what recomputed layers keep waits in host memory; null = where it helps"
    )
    hpz: int | None = _doc(None, "neighbours with a second copy of the weights (ZeRO-3); null = where it helps")

    def __post_init__(self) -> None:
        for key in ("sp", "tp", "ring", "hpz"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"parallel.{key}", value, "use 1 or more, or null for the best")
        for key, allowed in (("zero_stage", ZERO_STAGES), ("offload", OFFLOADS), ("recompute", RECOMPUTES)):
            value = getattr(self, key)
            names = ", ".join(str(a) for a in allowed)
            _require(value is None or value in allowed, f"parallel.{key}", value, f"use one of {names}, or null")


@dataclass
class PlannedTraining:
    """How much is trained, in the keys of `contentv train`."""

    precision: str = _doc("bf16", "bf16 (fp32 master weights) | fp32")
    global_batch_size: int = _doc(256, "clips per optimiser step over all ranks, >= 1 (ContentV's is not published)")
    micro_batch_size: int = _doc(0, "clips per forward on a rank; 0 = the best")
    max_steps: int = _doc(1000, "optimiser steps of the stage, >= 1")

    def __post_init__(self) -> None:
        _require(self.precision in ("bf16", "fp32"), "train.precision", self.precision, "use bf16 or fp32")
        for key, low in (("global_batch_size", 1), ("micro_batch_size", 0), ("max_steps", 1)):
            _require(getattr(self, key) >= low, f"train.{key}", getattr(self, key), f"use {low} or more")


@dataclass
class PlanConfig:
    """What is planned: clip shapes, how much of them, and what is written where."""

    buckets: list[str] = field(
        default_factory=list,
        metadata={"help": "clip shapes such as f125_h432_w768; empty: those of data=, or the usual ones of the stage"},
    )
    bucket_shares: list[float] = field(
        default_factory=list,
        metadata={"help": "share of the steps on each of buckets=, in their order; empty: equal, or as in data="},
    )
    data: str = _doc("", "dataset folder: its buckets, their sizes and its text tokens are planned for")
    clips: int = _doc(0, "clips that are to be seen, for days and cost; 0 = train.max_steps x train.global_batch_size")
    days: float = _doc(28.0, "also say what the cluster does in this many days, > 0")
    text_tokens: int = _doc(333, "text tokens of a clip, >= 1 (77 of CLIP and 256 of T5)")
    calibrate: bool = _doc(
        False, "measure real training steps on this machine for about a minute, and write calibration="
    )
    calibration: str = _doc("", "file of a calibration: read, or with calibrate=true written (plan-calibration.json)")
    out: str = _doc("", "also write the plan to this file, such as plan.json")

    def __post_init__(self) -> None:
        for name in self.buckets:
            try:
                Bucket.parse(name)
            except ValueError as error:
                raise UserError(str(error), where="buckets", remedy="write it as f125_h432_w768") from None
        _require(self.days > 0, "days", self.days, "use a positive number")
        _require(self.clips >= 0, "clips", self.clips, "use 0 or more")
        _require(self.text_tokens >= 1, "text_tokens", self.text_tokens, "use 1 or more")
        shares = self.bucket_shares
        possible = all(math.isfinite(share) and share >= 0 for share in shares) and (not shares or sum(shares) > 0)
        _require(possible, "bucket_shares", shares, "use numbers of 0 or more, one of them above")
        _require(len(shares) in (0, len(self.buckets)), "bucket_shares", shares, "give one share for each of buckets=")
