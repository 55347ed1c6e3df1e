"""The fastest layout that is legal and fits: all plain ones are weighed, and of the rest those that can be better."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from contentv.base.errors import UserError
from contentv.base.types import TokenCounts
from contentv.config.planning.layout import Job, Layout, head_padding
from contentv.config.planning.links import Passes
from contentv.config.planning.memory import Memory, device_memory
from contentv.config.planning.options import GIB, ClusterConfig, LayoutWish
from contentv.config.planning.speed import StepTime, step_time
from contentv.parallel.mesh import OFFLOADS, RECOMPUTES, ZERO_STAGES, check_layout, legal_layouts

MOST_MICRO_BATCH = 64
AS_FAST = 1.03  # layouts within 3 % are equally fast: the formulas are no better
ENOUGH_ROWS = 4096  # tokens of a micro-batch on a rank: with fewer, matrix products lose speed that is not modelled


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
    passes: Passes = Passes()
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
        check_layout(problem.job.model.num_attention_heads, cluster.world, layout.sp, layout.tp, layout.ring)
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
    if dp * layout.sp % layout.hpz:
        return f"{layout.hpz} neighbours do not divide {dp * layout.sp} ranks (dp {dp} x sp {layout.sp})"
    if problem.job.trained and layout.tp > 1:
        return "tensor parallelism cannot train a part of the weights"
    return ""


def layouts(problem: Problem) -> Iterator[Layout]:
    """Yields every legal layout that the wish allows; what costs time to save memory is off unless it is wished."""
    wish, world = problem.wish, problem.cluster.world
    for sp, tp in legal_layouts(problem.job.model.num_attention_heads, world):
        if wish.sp not in (None, sp) or wish.tp not in (None, tp) or problem.batch % (world // (sp * tp)):
            continue
        if tp > problem.cluster.devices_per_node and wish.tp is None:
            continue  # legal, but its all-reduces cannot be hidden: never over the network
        local = problem.batch // (world // (sp * tp))
        micros = [m for m in range(1, min(local, MOST_MICRO_BATCH) + 1) if local % m == 0]
        if problem.micro_batch:
            micros = [problem.micro_batch]
        for ring, stage, recompute, micro in itertools.product(
            _rings(problem, sp, tp),
            (wish.zero_stage,) if wish.zero_stage else ZERO_STAGES,
            (wish.recompute,) if wish.recompute else RECOMPUTES,
            micros,
        ):
            layout = Layout(
                sp, tp, stage, wish.offload or "none", recompute, micro, ring, bool(wish.sequence_norms),
                bool(wish.offload_activations), wish.hpz or 1,
            )  # fmt: skip
            if not why_not(problem, layout):
                yield layout


def _rings(problem: Problem, sp: int, tp: int) -> list[int]:
    """Returns no ring, the smallest that pads the fewest heads, and the smallest whose places lie in one machine."""
    if problem.wish.ring is not None:
        return [problem.wish.ring]
    rings = [ring for ring in range(1, sp + 1) if sp % ring == 0]
    fewest = min(rings, key=lambda ring: (head_padding(problem.job.model, Layout(sp, tp, ring=ring)), ring))
    inside = next((ring for ring in rings if sp // ring * tp <= problem.cluster.devices_per_node), sp)
    return sorted({1, fewest, inside})


def relieved(problem: Problem, here: Layout) -> Iterator[Layout]:
    """Yields a layout with one more means of saving memory, each of which costs time: a set of them comes up once."""
    wish = problem.wish
    if wish.sequence_norms is None and here.tp > 1 and not here.sequence_norms:
        yield replace(here, sequence_norms=True)  # which costs nothing: all others build on it
        return
    if problem.cluster.device == "cpu":
        return  # its memory is the host's
    moved = here.offload_activations or here.offload != "none"
    if wish.offload_activations is None and here.recompute != "none" and not moved:
        yield replace(here, offload_activations=True)
    if wish.offload is None and here.offload == "none":
        yield replace(here, offload="optimizer")
    elif wish.offload is None and here.offload == "optimizer" and here.zero_stage == 3:
        yield replace(here, offload="all")


def hastened(problem: Problem, candidate: Candidate) -> Iterator[Layout]:
    """Yields a layout whose weights come from the same machine in the backward pass, where they are waited for."""
    here, near = candidate.layout, node_ranks(problem.cluster, candidate.layout)
    waits = any(time.parts["ZeRO, not hidden"] > 0 for time in candidate.times)
    if problem.wish.hpz is None and here.hpz == 1 < near and here.zero_stage == 3 and waits:
        layout = replace(here, hpz=near)
        if not why_not(problem, layout):
            yield layout


def node_ranks(cluster: ClusterConfig, layout: Layout) -> int:
    """Returns how many of the ranks that ZeRO divides weights over lie in one machine of several; else 1."""
    return max(1, cluster.devices_per_node // layout.tp) if cluster.nodes > 1 else 1


def evaluate(problem: Problem, layout: Layout) -> Candidate:
    """Returns what a legal layout costs."""
    cluster, job = problem.cluster, problem.job
    dp = cluster.world // (layout.sp * layout.tp)
    accumulation = problem.batch // (dp * layout.micro_batch)
    memories, times = [], []
    for clip in problem.clips:
        own = replace(job, frame_bytes=clip.frame_bytes)
        memories.append(device_memory(own, layout, dp, clip.tokens, accumulation))
        times.append(step_time(cluster, job, layout, dp, clip.tokens, accumulation, problem.passes))
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
    plain = [evaluate(problem, layout) for layout in layouts(problem)]
    if not plain:
        raise UserError(
            _nothing_legal(problem), where="parallel.*, train.global_batch_size, train.micro_batch_size",
            remedy="leave some of the parallel.* keys out, or choose a batch that divides",
        )  # fmt: skip
    plain += [evaluate(problem, layout) for candidate in plain for layout in hastened(problem, candidate)]
    waiting = [(candidate.seconds, index, candidate) for index, candidate in enumerate(plain)]
    heapq.heapify(waiting)
    found, limit, index = [], math.inf, len(waiting)
    while waiting:  # the fastest first: a means of saving memory makes none faster, so slower ones need none
        seconds, _, candidate = heapq.heappop(waiting)
        found.append(candidate)
        if candidate.fits:
            limit = min(limit, AS_FAST * seconds)
        elif seconds <= limit:
            for other in (evaluate(problem, layout) for layout in relieved(problem, candidate.layout)):
                index += 1
                heapq.heappush(waiting, (other.seconds, index, other))
    fitting = [candidate for candidate in found if candidate.fits]
    smallest = min(found, key=lambda c: (c.excess, c.seconds))
    return (_choose(problem, fitting) if fitting else None), _choose(problem, found), smallest


def _nothing_legal(problem: Problem) -> str:
    wish = problem.wish
    layout = Layout(
        wish.sp or 1, wish.tp or 1, wish.zero_stage or 3, wish.offload or "none", wish.recompute or "full",
        problem.micro_batch or 1, wish.ring or 1, bool(wish.sequence_norms), bool(wish.offload_activations),
        wish.hpz or 1,
    )  # fmt: skip
    return why_not(problem, layout) or "no layout is possible with these keys"


def _choose(problem: Problem, found: Sequence[Candidate]) -> Candidate:
    """Returns the simplest of the fastest: matrices not too small, fewer ranks to a clip, no offload, less memory."""
    limit = AS_FAST * min(c.seconds for c in found)
    fast = [c for c in found if c.seconds <= limit]
    smallest = min(sum(clip.tokens) for clip in problem.clips)

    def order(c: Candidate) -> tuple[float | int, ...]:
        rows = min(ENOUGH_ROWS, c.layout.micro_batch * smallest // c.layout.sp)
        here = c.layout
        moved = OFFLOADS.index(here.offload) + here.offload_activations
        return -rows, here.sp * here.tp, here.ring, moved, here.hpz, c.memory.total, c.seconds

    return min(fast, key=order)
