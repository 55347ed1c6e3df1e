"""What binds a layout, why the layouts next to it lose, and what would help where none fits: each tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from contentv.config.planning.layout import Layout
from contentv.config.planning.options import GIB, LayoutWish
from contentv.config.planning.search import Candidate, Problem, best, evaluate, node_ranks, why_not
from contentv.parallel.mesh import OFFLOADS, RECOMPUTES, ZERO_STAGES

FREE = 1.02  # a limit binds when without it the step would be at least 2 % faster
TALKING = 0.2  # share of the step from which communication is said to bind


def what_binds(problem: Problem, chosen: Candidate, unlimited: Candidate) -> str:
    """Returns what the chosen layout is limited by, in words."""
    if unlimited.seconds * FREE < chosen.seconds:
        gain = chosen.seconds / unlimited.seconds - 1
        lacking = unlimited.excess / GIB
        faster = f"with {lacking:.1f} GiB more a device, a step would be {gain:.0%} faster"
        return f"memory: {faster} ({unlimited.layout.words()})"
    total = sum(time.total for time in chosen.times)
    talking = sum(time.communication for time in chosen.times) / total
    if talking >= TALKING:
        return f"communication: {talking:.0%} of the step waits for other devices"
    updating = sum(time.parts["optimiser"] for time in chosen.times) / total
    if updating >= TALKING:
        return f"the optimiser: {updating:.0%} of the step"
    tokens = max(problem.clips, key=lambda clip: clip.tokens.video).tokens
    scores = 4 * sum(tokens) * problem.job.model.inner_dim / (24 * problem.job.model.inner_dim**2)
    return f"compute: attention is {scores / (1 + scores):.0%} of the layers' operations"


def neighbours(problem: Problem, chosen: Candidate) -> list[dict[str, str]]:
    """Returns why each layout that differs in one key loses: illegal, too large, or slower by how much."""
    here = chosen.layout
    rows = []
    for name, there in _steps(problem, here):
        if there.offload != "none" and problem.cluster.device == "cpu":
            continue
        reason = why_not(problem, there)
        if not reason:
            other = evaluate(problem, there)
            if not other.fits:
                reason = f"lacks {_lacking(problem, other)}"
            else:
                change = other.seconds / chosen.seconds - 1
                free = (chosen.memory.total - other.memory.total) / GIB
                reason = f"{change:+.0%} time, {-free:+.1f} GiB"
        rows.append({"change": name, "verdict": reason})
    return rows


def _lacking(problem: Problem, candidate: Candidate) -> str:
    """Returns how much is lacking, and where."""
    on_device = int(problem.memory_factor * candidate.memory.total) > problem.cluster.usable_bytes
    return f"{candidate.excess / GIB:.1f} GiB " + ("a device" if on_device else "of host memory for each device")


def _steps(problem: Problem, here: Layout) -> Iterator[tuple[str, Layout]]:
    for key in ("sp", "tp", "micro_batch", *(("ring",) if here.sp > 1 else ())):
        value = getattr(here, key)
        for other in sorted({value // 2, value * 2} - {0, value}):
            there = replace(here, **{key: other})
            # What the other degree has no use for goes with it.
            there = replace(there, ring=math.gcd(there.ring, there.sp)) if key == "sp" else there
            yield f"{key}={other}", replace(there, sequence_norms=there.sequence_norms and there.tp > 1)
    for stage in ZERO_STAGES:
        if stage != here.zero_stage:
            offload = "optimizer" if here.offload == "all" and stage != 3 else here.offload
            yield f"zero_stage={stage}", replace(here, zero_stage=stage, offload=offload, hpz=1)
    for recompute in RECOMPUTES:
        if recompute != here.recompute:
            moved = here.offload_activations and recompute != "none"
            yield f"recompute={recompute}", replace(here, recompute=recompute, offload_activations=moved)
    for offload in OFFLOADS:
        if offload != here.offload:
            yield f"offload={offload}", replace(here, offload=offload)
    if here.recompute != "none" and problem.cluster.device != "cpu":
        moved = not here.offload_activations
        yield f"offload_activations={str(moved).lower()}", replace(here, offload_activations=moved)
    if here.tp > 1:
        shared = not here.sequence_norms
        yield f"sequence_norms={str(shared).lower()}", replace(here, sequence_norms=shared)
    near = node_ranks(problem.cluster, here) if here.hpz == 1 else 1
    if near != here.hpz and here.zero_stage == 3:
        yield f"hpz={near}", replace(here, hpz=near)


def remedies(problem: Problem, smallest: Candidate) -> list[str]:
    """Returns what would make a stage fit that does not, most helpful first, each tried."""
    found = []
    free = replace(problem, wish=LayoutWish(), micro_batch=0)
    if problem.wish != LayoutWish() or problem.micro_batch:
        other, _, _ = best(free)
        if other is not None:
            found.append(f"leave parallel.* and train.micro_batch_size to the plan: {other.layout.words()} fits")
    for times in (2, 4, 8, 16, 32):
        more = replace(problem.cluster, nodes=problem.cluster.nodes * times)
        if problem.batch % more.world == 0:
            other, _, _ = best(replace(free, cluster=more))
            if other is not None:
                found.append(f"{more.world} devices instead of {problem.cluster.world}: {other.layout.words()}")
                break
    largest = max(smallest.memory.parts, key=lambda name: smallest.memory.parts[name])
    size = smallest.memory.parts[largest] / GIB
    found.append(f"the largest part is: {largest}, {size:.1f} GiB; {KNOBS.get(largest, 'a smaller model')}")
    if problem.job.ema:
        other, _, _ = best(replace(free, job=replace(problem.job, ema=False)))
        if other is not None:
            found.append("without a moving average of the weights it fits: optim.ema_decay=0")
    return found


KNOBS = {
    "activations kept": "fewer frames or pixels in the bucket, or more devices for sequence parallelism",
    "working set of a layer": "fewer frames or pixels in the bucket, or more devices for sequence parallelism",
    "weights": "more devices under parallel.zero_stage=3, or parallel.offload=all",
    "gradients": "more devices under parallel.zero_stage=3",
    "master weights fp32": "parallel.offload=optimizer, or more devices",
    "Adam moments fp32": "parallel.offload=optimizer, more devices, or lora.rank=64",
    "moving average fp32": "optim.ema_decay=0, or parallel.offload=optimizer",
    "optimiser's temporary tensors": "parallel.offload=optimizer, more devices, or lora.rank=64",
    "frozen models": "reward.kl_weight=0 drops the reference of RLHF",
    "gathered weights": "more memory: whole layers have to fit",
    "gradient buckets": "more memory: a bucket is a large layer's gradient",
    "second copy of the weights": "parallel.hpz=1",
}
