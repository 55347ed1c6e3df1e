"""The fastest layout that is legal and fits, what binds it, and why the layouts next to it lose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from contentv.base.errors import UserError
from contentv.base.types import TokenCounts
from contentv.config.planning.memory import Job, Layout, Memory, device_memory
from contentv.config.planning.options import GIB, ClusterConfig, LayoutWish
from contentv.config.planning.speed import Rollout, StepTime, step_time
from contentv.parallel.mesh import OFFLOADS, RECOMPUTES, ZERO_STAGES, check_layout, legal_layouts

MOST_MICRO_BATCH = 64
AS_FAST = 1.01  # layouts within 1 % are equally fast: the formulas are no better
ENOUGH_ROWS = 4096  # tokens of a micro-batch on a rank: with fewer, matrix products lose speed that is not modelled
FREE = 1.02  # a limit binds when without it the step would be at least 2 % faster
TALKING = 0.2  # share of the step from which communication is said to bind


@dataclass(frozen=True)
class Clip:
    """Clips of one shape: name, tokens, share of the steps, bytes of a decoded frame's activations (RLHF)."""

    name: str
    tokens: TokenCounts
    share: float = 1.0
    frame_bytes: int = 0


@dataclass(frozen=True)
class Problem:
    """Everything that is given: the search is over layouts alone."""

    cluster: ClusterConfig
    job: Job
    clips: tuple[Clip, ...]
    batch: int
    micro_batch: int = 0
    wish: LayoutWish = field(default_factory=LayoutWish)
    rollout: Rollout = Rollout()
    memory_factor: float = 1.0

    def only(self, clip: Clip) -> Problem:
        """Returns the same for clips of one shape."""
        return replace(self, clips=(replace(clip, share=1.0),))


@dataclass(frozen=True)
class Candidate:
    """A layout with what it costs: memory at the fullest clip shape, seconds of an average step."""

    layout: Layout
    dp: int
    accumulation: int
    memory: Memory
    times: tuple[StepTime, ...]
    seconds: float
    excess: int  # bytes over what a device has; 0 or less: it fits

    @property
    def fits(self) -> bool:
        """Whether a device (and with offload its host) has room for it."""
        return self.excess <= 0


def why_not(problem: Problem, layout: Layout) -> str:
    """Returns what keeps a layout from running with today's code, or nothing."""
    cluster, batch = problem.cluster, problem.batch
    try:
        check_layout(problem.job.model.num_attention_heads, cluster.world, layout.sp, layout.tp)
        layout.parallel()
    except UserError as error:
        return error.what
    dp = cluster.world // (layout.sp * layout.tp)
    if batch % dp:
        return f"a global batch of {batch} does not divide over {dp} data ranks"
    if batch // dp % layout.micro_batch:
        return f"{batch // dp} clips per rank do not divide into micro-batches of {layout.micro_batch}"
    if layout.sp > min(clip.tokens.video for clip in problem.clips):
        return f"more sequence ranks than tokens ({layout.sp})"
    if layout.recompute == "selective" and layout.zero_stage == 3:
        # torch's selective checkpoint counts the operators of a layer, and DeepSpeed's hooks add other ones the second
        # time: it raises in the first backward pass (tests/config/test_planning.py watches for that to change).
        return "selective recompute does not run under ZeRO-3 yet"
    if problem.job.trained and layout.tp > 1:
        return "tensor parallelism cannot train a part of the weights"
    return ""


def layouts(problem: Problem) -> Iterator[Layout]:
    """Yields every legal layout that the wish allows."""
    wish, world = problem.wish, problem.cluster.world
    offloads = OFFLOADS if problem.cluster.device != "cpu" else ("none",)
    for sp, tp in legal_layouts(problem.job.model.num_attention_heads, world):
        if wish.sp not in (None, sp) or wish.tp not in (None, tp) or problem.batch % (world // (sp * tp)):
            continue
        if tp > problem.cluster.devices_per_node and wish.tp is None:
            continue  # legal, but its all-reduces cannot be hidden: never over the network
        local = problem.batch // (world // (sp * tp))
        micros = [m for m in range(1, min(local, MOST_MICRO_BATCH) + 1) if local % m == 0]
        if problem.micro_batch:
            micros = [problem.micro_batch]
        for stage, offload, recompute, micro in itertools.product(
            (wish.zero_stage,) if wish.zero_stage else ZERO_STAGES,
            (wish.offload,) if wish.offload else offloads,
            (wish.recompute,) if wish.recompute else RECOMPUTES,
            micros,
        ):
            layout = Layout(sp, tp, stage, offload, recompute, micro)
            if (offload != "all" or stage == 3) and not why_not(problem, layout):
                yield layout


def evaluate(problem: Problem, layout: Layout) -> Candidate:
    """Returns what a legal layout costs."""
    cluster, job = problem.cluster, problem.job
    dp = cluster.world // (layout.sp * layout.tp)
    accumulation = problem.batch // (dp * layout.micro_batch)
    memories, times = [], []
    for clip in problem.clips:
        own = replace(job, frame_bytes=clip.frame_bytes)
        memories.append(device_memory(own, layout, dp, clip.tokens, accumulation))
        times.append(step_time(cluster, job, layout, dp, clip.tokens, accumulation, problem.rollout))
    memory = max(memories, key=lambda m: m.total)
    shares = sum(clip.share for clip in problem.clips)
    seconds = sum(clip.share * time.total for clip, time in zip(problem.clips, times, strict=True)) / shares
    return Candidate(
        layout, dp, accumulation, memory, tuple(times), seconds, excess_bytes(cluster, memory, problem.memory_factor)
    )


def excess_bytes(cluster: ClusterConfig, memory: Memory, factor: float = 1.0) -> int:
    """Returns the bytes that a device, or its share of the host, lacks; negative: what stays free."""
    if cluster.device == "cpu":
        return int(factor * (memory.total + memory.host)) - cluster.usable_bytes
    host = memory.host - int(cluster.host_memory_gib * GIB) // cluster.devices_per_node
    device = int(factor * memory.total) - cluster.usable_bytes
    return max(device, host) if memory.host else device


def best(problem: Problem) -> tuple[Candidate | None, Candidate | None, Candidate | None]:
    """Returns the best candidate that fits, the fastest were memory no limit, and the one that lacks least memory.

    Raises:
        UserError: no layout is legal.
    """
    found = [evaluate(problem, layout) for layout in layouts(problem)]
    if not found:
        raise UserError(
            _nothing_legal(problem), where="parallel.*, train.global_batch_size, train.micro_batch_size",
            remedy="leave some of the parallel.* keys out, or choose a batch that divides",
        )  # fmt: skip
    fitting = [candidate for candidate in found if candidate.fits]
    smallest = min(found, key=lambda c: (c.excess, c.seconds))
    return (_choose(problem, fitting) if fitting else None), _choose(problem, found), smallest


def _nothing_legal(problem: Problem) -> str:
    wish = problem.wish
    layout = Layout(
        wish.sp or 1, wish.tp or 1, wish.zero_stage or 3, wish.offload or "none", wish.recompute or "full",
        problem.micro_batch or 1,
    )  # fmt: skip
    return why_not(problem, layout) or "no layout is possible with these keys"


def _choose(problem: Problem, found: Sequence[Candidate]) -> Candidate:
    """Returns the simplest of the fastest: matrices not too small, fewer ranks to a clip, no offload, less memory."""
    limit = AS_FAST * min(c.seconds for c in found)
    fast = [c for c in found if c.seconds <= limit]
    smallest = min(sum(clip.tokens) for clip in problem.clips)

    def order(c: Candidate) -> tuple[float | int, ...]:
        rows = min(ENOUGH_ROWS, c.layout.micro_batch * smallest // c.layout.sp)
        return -rows, c.layout.sp * c.layout.tp, OFFLOADS.index(c.layout.offload), c.memory.total, c.seconds

    return min(fast, key=order)


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
    for name, there in _steps(here):
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


def _steps(here: Layout) -> Iterator[tuple[str, Layout]]:
    for key in ("sp", "tp", "micro_batch"):
        value = getattr(here, key)
        for other in sorted({value // 2, value * 2} - {0, value}):
            yield f"{key}={other}", replace(here, **{key: other})
    for stage in ZERO_STAGES:
        if stage != here.zero_stage:
            offload = "optimizer" if here.offload == "all" and stage != 3 else here.offload
            yield f"zero_stage={stage}", replace(here, zero_stage=stage, offload=offload)
    for recompute in RECOMPUTES:
        if recompute != here.recompute:
            yield f"recompute={recompute}", replace(here, recompute=recompute)
    for offload in OFFLOADS:
        if offload != here.offload:
            yield f"offload={offload}", replace(here, offload=offload)


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
    "gathered weights": "more memory: DeepSpeed keeps up to 1e9 weights whole",
    "gradient buckets": "more memory: buckets are 5e7 weights",
}
