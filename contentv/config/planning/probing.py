"""`calibrate=true`: real training steps of small models of the family, through the engine, weighed, then timed.

One after the other, because on the CPU weighing needs an allocator that gives memory back, and that one is slow. It
comes first, because memory that was once kept is used again.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from contentv.base import device as devices
from contentv.base.types import Batch, Bucket, TextCond, TokenCounts
from contentv.config.planning.calibration import Calibrated, Calibration, Probe, Weighed, fit
from contentv.config.planning.layout import Job, Layout
from contentv.config.planning.link_rates import largest, measure_links
from contentv.config.planning.links import ulysses_bytes, zero_bytes
from contentv.config.planning.memory import device_memory, weights_per_rank
from contentv.config.planning.speed import UPDATE_BYTES, operations
from contentv.config.planning.weighing import peak_bytes, start_weighing, stop_weighing
from contentv.diffusion.timesteps import TimestepConfig, build_sampler
from contentv.engine.optim import OptimConfig
from contentv.engine.zero import ZeroEngine, build_engine
from contentv.models.io import initial_weights
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.models.positions import WIDTH_MULTIPLE
from contentv.objectives.flow import FlowMatching
from contentv.parallel.mesh import build_mesh, single_process_mesh

BUDGET_S, WEIGHED_SHARE = 60.0, 0.5
Measured = TypeVar("Measured")
REPEATS, REPEATED_S = 3, 2.0  # steps that are timed: at least so many, more while they take less than that


@dataclass(frozen=True)
class Shape:
    """A model of the family and the clips it is run on: latent frames x 2 side x 2 side, so frames x side^2 tokens."""

    layers: int
    heads: int
    frames: int
    side: int
    batch: int = 1
    recompute: str = "none"
    sp: int = 1
    zero_stage: int = 3

    @property
    def layout(self) -> Layout:
        """How it is run; data ranks are what sequence ranks leave."""
        return Layout(sp=self.sp, zero_stage=self.zero_stage, recompute=self.recompute, micro_batch=self.batch)

    def model(self, family: MMDiTConfig) -> MMDiTConfig:
        """Returns the model: the family's head size and text widths, fewer heads and layers."""
        return replace(family, num_layers=self.layers, num_attention_heads=self.heads)


@dataclass(frozen=True)
class Setting:
    """Where measurements are made, and of what kind of model.

    Attributes:
        family: the model whose head size and text widths are used.
        precision: bf16 or fp32.
        text: text tokens of a clip.
        device: this process's.
        rank, world: this process, and how many there are.
        overlap: share of the layers' time that ZeRO's communication hides behind.
    """

    family: MMDiTConfig
    precision: str
    text: int
    device: torch.device
    rank: int = 0
    world: int = 1
    overlap: float = 0.0

    def tokens(self, shape: Shape) -> TokenCounts:
        """Returns the tokens of a clip of this shape."""
        return TokenCounts(shape.frames * shape.side**2, self.text)


def shapes_of(setting: Setting) -> tuple[list[Shape], list[Shape]]:
    """Returns what is timed, cheapest first, and what is weighed.

    Few and many tokens are timed, so that dense work and attention can be told apart. At one shape that is weighed the
    optimiser's step needs most memory, at the others the backward pass. Of several processes every other shape's share
    a clip.
    """
    family, world = setting.family, setting.world
    if setting.device.type == "cpu":
        heads = [_heads(family, width) for width in (256, 512)]
        timed = [(1, 1, 8, 1), (2, 4, 8, 1), (2, 4, 8, 4), (1, 8, 16, 1), (4, 4, 16, 1)]
        weighed = [(1, 1, 8, 1), (2, 4, 8, 8), (4, 8, 8, 4)]
    else:
        heads = [_heads(family, 0), _heads(family, 0)]
        timed = [(2, 1, 16, 1), (2, 4, 32, 1), (2, 4, 32, 4), (1, 16, 32, 1), (4, 32, 32, 1)]
        weighed = [(2, 1, 16, 1), (2, 16, 32, 1), (4, 32, 32, 1)]
    return tuple(  # type: ignore[return-value]
        [
            Shape(layers, count, frames, side, batch, sp=world if index % 2 else 1)
            for index, (layers, frames, side, batch) in enumerate(sizes)
        ]
        for count, sizes in zip(heads, (timed, weighed), strict=True)
    )


def _heads(family: MMDiTConfig, width: int) -> int:
    """Returns heads for about this width, at most the family's; 0 = the family's own."""
    heads = min(family.num_attention_heads, max(1, width // family.attention_head_dim)) if width else 0
    heads = heads or family.num_attention_heads
    while heads * family.attention_head_dim % WIDTH_MULTIPLE:
        heads += 1
    return heads


def calibrate(
    setting: Setting, *, timed: Sequence[Shape] = (), weighed: Sequence[Shape] = (), budget_s: float = BUDGET_S
) -> Calibration:
    """Returns the rates of this machine, measured in about `budget_s` seconds. Collective.

    Args:
        setting: where, and the model whose head size and text widths are used.
        timed, weighed: what is run; empty: `shapes_of`.
        budget_s: no further shape is begun when there may be no time for it; three are timed and one is weighed in any
            case.
    """
    device, begin = setting.device, time.perf_counter()
    usual = shapes_of(setting)
    # Libraries, thread pools and buffers of the system count on no side: a first engine comes and goes.
    weigh(setting, Shape(1, usual[1][0].heads, 1, 2))
    scales = _until(begin + WEIGHED_SHARE * budget_s, 1, weighed or usual[1], partial(weigh, setting), device)
    stop_weighing(device)
    links = measure_links(device, Job(setting.family, setting.precision).dtype)
    clock(setting, Shape(1, usual[0][0].heads, 1, 2), repeats=1)
    probes = _until(begin + budget_s, 3, timed or usual[0], partial(clock, setting), device)
    machine = platform.machine() if device.type == "cpu" else devices.module(device).get_device_name(device)
    return fit(
        Calibrated(device.type, machine, setting.precision, setting.world), probes, scales, links, setting.overlap
    )


def _until(
    end_s: float, least: int, shapes: Sequence[Shape], measure: Callable[[Shape], Measured], device: torch.device
) -> list[Measured]:
    """Returns measurements, `least` of them in any case, while there may be time for one as long as the longest."""
    found: list[Measured] = []
    longest = 0.0
    for shape in shapes:
        started = time.perf_counter()
        # All processes go on or none.
        if len(found) < least or largest([started + longest - end_s], device)[0] < 0:
            found.append(measure(shape))
            longest = max(longest, time.perf_counter() - started)
    return found


def clock(setting: Setting, shape: Shape, repeats: int = REPEATS) -> Probe:
    """Returns what the steps of one shape took (the shortest of them), and what the formulas count in them."""
    device, layout = setting.device, shape.layout
    model, tokens, dp = shape.model(setting.family), setting.tokens(shape), setting.world // shape.sp
    job = Job(model, setting.precision, True, device.type)
    counted, share = operations(job, layout, tokens), shape.batch / shape.sp
    engine, objective, batch = _build(setting, shape)
    # The first step makes buffers, and traces which weights are needed when.
    _step(engine, objective, batch, 0, setting)
    times: list[list[float]] = []
    while len(times) < repeats or (len(times) < 4 * repeats and sum(map(sum, times)) < REPEATED_S):
        times.append(largest(_step(engine, objective, batch, 1 + len(times), setting), device))
    engine.close()
    exchanged = shape.layers * ulysses_bytes(job, layout, tokens) * (layout.ulysses - 1) / layout.ulysses
    return Probe(
        _facts(shape, model, tokens) | {"processes": setting.world}, float(share * counted.dense),
        float(share * counted.attention), float(UPDATE_BYTES * weights_per_rank(model, 1) / setting.world),
        min(t[0] for t in times), min(t[1] for t in times), shape.layers,
        exchanged if device.type == "cpu" else exchanged / 2,  # accelerators: half of it behind the projections
        zero_bytes(job, layout, dp, 1)[0],
    )  # fmt: skip


def weigh(setting: Setting, shape: Shape) -> Weighed:
    """Returns the memory that two steps of one shape needed, and what the formulas say; 0 where nothing can tell."""
    device, model, tokens = setting.device, shape.model(setting.family), setting.tokens(shape)
    before = start_weighing(device)
    engine, objective, batch = _build(setting, shape)
    for step in range(2):
        _step(engine, objective, batch, step, setting)
    peak = peak_bytes(device)
    engine.close()
    memory = 0 if device.type == "cpu" else int(devices.module(device).mem_get_info(device)[1])
    job = Job(model, setting.precision, True, device.type, memory_bytes=memory)
    predicted = device_memory(job, shape.layout, setting.world // shape.sp, tokens).total
    measured = largest([float(max(0, peak - before) if peak else 0)], device)[0]
    return Weighed(_facts(shape, model, tokens) | {"processes": setting.world}, predicted, int(measured))


def _facts(shape: Shape, model: MMDiTConfig, tokens: TokenCounts) -> dict[str, Any]:
    counts = {"width": model.inner_dim, "video_tokens": tokens.video, "text_tokens": tokens.text}
    return asdict(shape) | counts


def _build(setting: Setting, shape: Shape) -> tuple[ZeroEngine, FlowMatching, Batch]:
    """Returns the engine as `contentv train` builds it, flow matching, and a batch of noise."""
    model, parallel, text = shape.model(setting.family), shape.layout.parallel(), setting.text
    with torch.device("meta"):
        empty = MMDiT(model)
    mesh = single_process_mesh() if setting.world == 1 else build_mesh(parallel, setting.world, setting.rank)
    engine = build_engine(
        empty, mesh, OptimConfig(), precision=setting.precision, parallel=parallel, micro_batch_size=shape.batch,
        max_steps=1000, device=setting.device, weights=initial_weights(model, 0).tensors,
    )  # fmt: skip
    b, side = shape.batch, shape.side * model.patch_size

    def caption(rows: int) -> TextCond:
        return TextCond(
            torch.randn(rows, text, model.joint_attention_dim), torch.randn(rows, model.pooled_projection_dim)
        )

    unscored = torch.full((b,), float("nan"))
    batch = Batch(
        [str(i) for i in range(b)], [""] * b, Bucket(shape.frames, side, side),
        torch.randn(b, model.in_channels, shape.frames, side, side), caption(b), unscored, unscored,
        torch.arange(b) + b * mesh.dp_rank, b * mesh.dp,
    ).to(setting.device)  # fmt: skip
    null = caption(1).to(setting.device)
    return engine, FlowMatching(build_sampler(TimestepConfig()), 0, null, 0.1), batch


def _step(engine: ZeroEngine, objective: FlowMatching, batch: Batch, step: int, setting: Setting) -> list[float]:
    """Runs one step and returns the seconds of its passes and of the optimiser."""
    marks = []
    for mark in _marks(setting):
        marks.append(mark)
        if len(marks) == 1:
            out = objective(engine.module, batch, step)
            engine.backward(out.loss_sum, batch.global_samples)
        elif len(marks) == 2:
            engine.step()
        else:
            break
    return [marks[1] - marks[0], marks[2] - marks[1]]


def _marks(setting: Setting) -> Iterator[float]:
    """Yields the time, over and over, once the device has done what it was given."""
    # On a CPU of one thread the process's own time: what others do on the machine is then not counted. Several
    # processes also wait for each other.
    alone = setting.device.type == "cpu" and torch.get_num_threads() == 1 and setting.world == 1
    clock = time.process_time if alone else time.perf_counter
    while True:
        devices.synchronize(setting.device)
        yield clock()
