"""The training engine: DeepSpeed's ZeRO 1, 2 or 3 over a parallelized model. The one module that imports deepspeed.

What DeepSpeed is told and what is ours:
  - To DeepSpeed, sequence ranks are data ranks, and nothing it sees mentions sequences: told of them, it scales
    gradients differently from stage to stage. It averages gradients over the dp x sp ranks, always.
  - The scale is ours: losses arrive as sums, and `backward` multiplies by (dp x sp) / (samples of the global batch).
    Each sequence rank contributes the gradient of its own tokens, so the average times dp x sp is the whole gradient.
  - The optimiser is torch's AdamW, its learning rate set by us before each step. `step` ends the accumulation: any
    number of micro-batches may come before it.
  - Checkpoints and the moving average are ours, over DeepSpeed's fp32 master partitions; its own are pickles.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contentv.base.types import VelocityModel
from contentv.engine import checkpoint
from contentv.engine.checkpoint_files import newest_complete
from contentv.engine.ema import MovingAverage
from contentv.engine.optim import OptimConfig, lr_at
from contentv.engine.parallelize import parallelize
from contentv.engine.partition import Entry, Partition, fragments_of
from contentv.engine.plans import MMDIT_PLAN
from contentv.engine.zero_config import PERSIST_BELOW, Ranks, deepspeed_config
from contentv.parallel.collectives import any_of, gather_json, start, sum_over
from contentv.parallel.mesh import Mesh, ParallelConfig, build_mesh
from contentv.parallel.tensor import TensorPlan

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEPRECATED = ("all_gather_into_tensor", "reduce_scatter_tensor")


@dataclass(frozen=True)
class StepStats:
    """What an optimiser step did. A skipped step changed no weight: its gradient (norm inf) was not finite."""

    grad_norm: float
    lr: float
    skipped: bool


def import_deepspeed(device: torch.device) -> Any:
    """Returns the deepspeed module, told which accelerator it runs on and to keep quiet."""
    os.environ["DS_ACCELERATOR"] = device.type
    for name in DEPRECATED:  # names of torch that DeepSpeed still uses: one line per collective otherwise
        warnings.filterwarnings("ignore", message=f"`torch.distributed.{name}` is deprecated", category=FutureWarning)
    import deepspeed

    # On the CPU it would compile a C++ all-reduce at start-up, for a minute, that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def build_engine(
    model: nn.Module,
    mesh: Mesh,
    optim: OptimConfig,
    *,
    precision: str,
    parallel: ParallelConfig,
    micro_batch_size: int = 1,
    accumulation_steps: int = 1,
    max_steps: int,
    device: torch.device,
    compile: bool = False,
    plan: TensorPlan = MMDIT_PLAN,
    persist_below: int = PERSIST_BELOW,
) -> ZeroEngine:
    """Returns the engine that trains `model`, which it takes over: parallelized, partitioned and moved to `device`.

    Args:
        model: the whole model in fp32, the same on every rank (ranks take the first rank's weights in any case).
        mesh: this rank's place.
        optim: AdamW, schedule, clipping, moving average.
        precision: fp32, or bf16 for the weights and activations; the optimiser's master weights are fp32 in any case.
        parallel: ZeRO stage, offload, recompute.
        micro_batch_size: samples of a forward pass on this rank; only reported to DeepSpeed.
        accumulation_steps: micro-batches before a step; any number works, this is the usual one.
        max_steps: steps of the run, for the schedule.
        device: this rank's device.
        compile: compile each block.
        plan: how tensor ranks split the model.
        persist_below: weights of fewer elements are not partitioned by ZeRO-3.

    Raises:
        ValueError: the precision is unknown, or some weights are frozen.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision={precision} is none of {', '.join(DTYPES)}")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        raise ValueError(f"the engine trains all weights, but {len(frozen)} are frozen, such as {frozen[0]}")
    mesh = with_groups(mesh, device)
    split_dims = parallelize(model, mesh, recompute=parallel.recompute, compile=compile, device=device, plan=plan)
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for parameter, name in names.items()}
    adamw = torch.optim.AdamW(
        list(names), lr=lr_at(0, optim, max_steps), betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
        weight_decay=optim.weight_decay,
    )  # fmt: skip
    # bf16: DeepSpeed rounds the weights before it makes the master weights of them; these are the unrounded ones.
    exact = {name: parameter.detach() for parameter, name in names.items()} if precision == "bf16" else {}
    config = deepspeed_config(
        parallel, precision, device, sum(p.numel() for p in names), grad_clip=optim.grad_clip,
        micro_batch_size=micro_batch_size, persist_below=persist_below,
    )  # fmt: skip
    deepspeed = import_deepspeed(device)
    inner, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config, mpu=Ranks(mesh))
    fragments, masters = fragments_of(inner.optimizer, names.__getitem__, mesh.zero_rank)
    entries = [Entry(n, shapes[n], split_dims.get(n), fragments[n]) for n in shapes]
    partition = Partition(entries, mesh, device)
    for name, value in exact.items():
        partition.set_local(partition.by_name[name], masters, value)
    return ZeroEngine(inner, adamw, partition, masters, optim, max_steps, parallel, precision)


def with_groups(mesh: Mesh, device: torch.device) -> Mesh:
    """Returns the mesh, with process groups of one rank each where a single process has none yet."""
    if mesh.zero_group is not None:
        return mesh
    if mesh.world != 1:
        raise ValueError(f"a mesh of {mesh.describe()} needs its process groups: make it with build_mesh")
    start(device)
    return build_mesh(ParallelConfig(), 1, 0)


class ZeroEngine:
    """A model in training on this rank; made by `build_engine`.

    Attributes:
        module: the model as a callable, (noisy latents, timestep, text tokens, pooled text) -> velocity, whole on every
            rank. It may be called several times before one `backward`, and under torch.no_grad.
        step_count: calls of `step` so far, skipped ones included.
        skipped_count: those among them that changed nothing, because a gradient was not finite.
    """

    def __init__(
        self, inner: Any, adamw: torch.optim.AdamW, partition: Partition, masters: list[Tensor], optim: OptimConfig,
        max_steps: int, parallel: ParallelConfig, precision: str,
    ) -> None:  # fmt: skip
        self._inner, self._adamw, self._partition, self._masters = inner, adamw, partition, masters
        self._optim, self._max_steps, self._parallel, self._precision = optim, max_steps, parallel, precision
        self.module: VelocityModel = inner
        self.mesh, self.device = partition.mesh, partition.device
        self.step_count = 0
        self.skipped_count = 0
        for flat in masters:
            self._adam_state(flat)
        self.ema = MovingAverage(masters, optim.ema_decay) if optim.ema_decay > 0 else None

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model."""
        return self._partition.numel()

    def backward(self, loss_sum: Tensor, global_samples: int) -> None:
        """Adds the gradients of one micro-batch.

        Args:
            loss_sum: the loss summed over this rank's micro-batch; the same on all sp x tp ranks of a sample.
            global_samples: samples of the whole optimiser step, over all ranks and micro-batches: the divisor.
        """
        self._inner.backward(loss_sum * (self.mesh.zero / global_samples), scale_wrt_gas=False)
        optimizer = self._inner.optimizer
        while optimizer._backward_active_depth > 0:  # it counts one per forward, and leaves all but one open
            optimizer.exit_backward()

    def step(self) -> StepStats:
        """Clips the gradients, applies AdamW and the moving average, and returns what happened."""
        lr = lr_at(self.step_count, self._optim, self._max_steps)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._inner.step()
        skipped = not self._inner.was_step_applied()
        self.step_count += 1
        self.skipped_count += int(skipped)
        if self.ema is not None and not skipped:
            self.ema.update()
        return StepStats(float(self._inner.get_global_grad_norm()), lr, skipped)

    # ---- whole tensors, checkpoints -------------------------------------------------------------------------------

    def state_tensors(self, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, whole fp32 tensor on the CPU), one parameter at a time, on every rank. Collective.

        Args:
            ema: the moving average instead of the weights themselves.

        Raises:
            ValueError: no moving average is kept.
        """
        if ema and self.ema is None:
            raise ValueError("no moving average is kept: optim.ema_decay is 0")
        flats = self.ema.averages if ema and self.ema is not None else self._masters
        for entry in self._partition.entries:
            value = self._partition.gather(entry, flats)
            assert value is not None
            yield entry.name, value.cpu()

    def save(self, folder: Path | str, extra: dict[str, Any], *, keep: int = 0, chunk_bytes: int = 1 << 30) -> None:
        """Writes the whole training state to `folder`, loadable on any layout. Collective; see `checkpoint.save`."""
        counters = checkpoint.Counters(
            self.step_count, self.step_count - self.skipped_count, self.ema.updates if self.ema is not None else 0
        )
        checkpoint.save(
            self._partition, self._state(), counters, Path(folder), extra, keep=keep, chunk_bytes=chunk_bytes
        )

    def load(self, folder: Path | str) -> dict[str, Any]:
        """Restores the training state saved in `folder` by any layout and returns its extra. Collective.

        Raises:
            UserError: the checkpoint is damaged (the file is named) or of another model.
        """
        counters, extra, kinds = checkpoint.load(self._partition, self._state(), Path(folder))
        self.step_count = counters.step
        self.skipped_count = counters.step - counters.optimizer_step
        for flat in self._masters:
            self._adam_state(flat)["step"].fill_(counters.optimizer_step)
        if self.ema is not None:
            self.ema.updates = counters.ema_updates
            if "ema" not in kinds:
                self.ema.restart()
        self._weights_from_masters()
        return extra

    def newest_checkpoint(self, root: Path | str) -> Path | None:
        """Returns the newest undamaged checkpoint in `root`, the same on every rank. Collective."""
        found = newest_complete(root) if self.mesh.rank == 0 else None
        name = gather_json(str(found) if found else "", None, self.device)[0]
        return Path(name) if name else None

    def _state(self) -> checkpoint.State:
        states = [self._adam_state(flat) for flat in self._masters]
        state: checkpoint.State = {
            "param": self._masters,
            "exp_avg": [s["exp_avg"] for s in states],
            "exp_avg_sq": [s["exp_avg_sq"] for s in states],
        }
        return state if self.ema is None else {**state, "ema": self.ema.averages}

    def _adam_state(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns AdamW's state of a flat tensor, made now if no step was made yet (as AdamW itself would)."""
        state: dict[str, Tensor] = self._adamw.state[flat]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(flat, requires_grad=False)
        return state

    @torch.no_grad()
    def _weights_from_masters(self) -> None:
        """Makes the weights that the model computes with those of the master partitions."""
        optimizer = self._inner.optimizer
        if self._parallel.zero_stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(self._masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    # ---- what the training loop asks of the ranks -----------------------------------------------------------------

    def sum_over_data_ranks(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over the ranks with different samples, on the CPU. Collective."""
        return sum_over(values, self.mesh.dp_group, self.device)

    def any_rank(self, flag: bool) -> bool:
        """Returns whether `flag` is set on any rank. Collective."""
        return any_of(flag, self.device)

    def gather_keys(self, keys: list[str]) -> list[str]:
        """Returns the keys of all data ranks' samples, rank after rank. Collective."""
        return [key for of_rank in gather_json(keys, self.mesh.dp_group, self.device) for key in of_rank]

    def frozen(self, model: nn.Module) -> VelocityModel:
        """Returns another whole model as a frozen reference over this engine's ranks; see `frozen_model`."""
        return frozen_model(model, self.mesh, self._parallel, self._precision, self.device)

    def close(self) -> None:
        """Unhooks DeepSpeed from the model; the engine cannot be used afterwards."""
        self._inner.destroy()


class FrozenModel:
    """A model that is only evaluated; its output has no gradient."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @torch.no_grad()
    def __call__(self, noisy_latents: Tensor, timestep: Tensor, text_tokens: Tensor, text_pooled: Tensor) -> Tensor:
        out: Tensor = self._run(noisy_latents, timestep, text_tokens, text_pooled)
        return out


def frozen_model(
    model: nn.Module,
    mesh: Mesh,
    parallel: ParallelConfig,
    precision: str,
    device: torch.device,
    *,
    plan: TensorPlan = MMDIT_PLAN,
    persist_below: int = PERSIST_BELOW,
) -> VelocityModel:
    """Returns `model` as a frozen reference, such as RLHF's: split like the trained model, partitioned under ZeRO-3.

    Every rank must call it equally often, like the trained model.

    Args:
        model: the whole model; it is taken over.
        mesh, parallel, precision, device: those of the engine.
        plan: how tensor ranks split the model.
        persist_below: weights of fewer elements are not partitioned.
    """
    mesh = with_groups(mesh, device)
    parallelize(model, mesh, device=device, plan=plan)
    model.requires_grad_(False).eval()
    if parallel.zero_stage < 3:
        return FrozenModel(model.to(device, DTYPES[precision]))
    settings = dataclasses.replace(parallel, offload="all" if parallel.offload == "all" else "none")
    numel = sum(p.numel() for p in model.parameters())
    config = deepspeed_config(settings, precision, device, numel, persist_below=persist_below)
    config["zero_optimization"].pop("offload_optimizer", None)
    inner, *_ = import_deepspeed(device).initialize(model=model, config=config, mpu=Ranks(mesh))
    return FrozenModel(inner)
