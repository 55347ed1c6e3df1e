"""The training engine: DeepSpeed's ZeRO 1, 2 or 3 over a parallelized model.

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

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contentv.base.device import module as device_module
from contentv.base.errors import UserError
from contentv.base.types import VelocityModel
from contentv.engine import checkpoint
from contentv.engine.ema import MovingAverage
from contentv.engine.optim import OptimConfig, lr_at
from contentv.engine.parallelize import parallelize
from contentv.engine.partition import Entry, Partition, fragments_of
from contentv.engine.partitioner import forget_second_copies, initialize, make_room, with_groups
from contentv.engine.plans import MMDIT_PLAN
from contentv.engine.weights import Weights, fill, partitioned_places, settle, whole_places
from contentv.engine.zero_config import deepspeed_config, weight_sizes
from contentv.parallel.collectives import any_of, gather_json, sum_over
from contentv.parallel.mesh import Mesh, ParallelConfig
from contentv.parallel.tensor import TensorPlan, sum_partial_gradients

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepStats:
    """What an optimiser step did. A skipped step changed no weight: its gradient (norm inf) was not finite."""

    grad_norm: float
    lr: float
    skipped: bool


def dtype_of(precision: str) -> torch.dtype:
    """Returns the dtype that weights and activations have.

    Raises:
        ValueError: the precision is unknown.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision={precision} is none of {', '.join(DTYPES)}")
    return DTYPES[precision]


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
    weights: Weights | None = None,
    load_follows: bool = False,
    plan: TensorPlan = MMDIT_PLAN,
    persist_below: int | None = None,
) -> ZeroEngine:
    """Returns the engine that trains `model`, which it takes over: parallelized, partitioned and on `device`.

    Parameters that do not require gradients are frozen: they have no part in the optimiser, the moving average and the
    checkpoints, and are partitioned under ZeRO-3 like all others.

    Args:
        model: the model, on the meta device with `weights`; else the whole model in fp32 (ranks take the first rank's).
        mesh: this rank's place.
        optim: AdamW, schedule, clipping, moving average.
        precision: fp32, or bf16 for the weights and activations; the optimiser's master weights are fp32 in any case.
        parallel: ZeRO stage, hpZ, offload, recompute, compile.
        micro_batch_size: samples of a forward pass on this rank; only reported to DeepSpeed.
        accumulation_steps: micro-batches before a step; any number works, this is the usual one.
        max_steps: steps of the run, for the schedule.
        device: this rank's device.
        weights: the whole parameters by name, the same on every rank: tensors, or anything sliced like one.
        load_follows: a checkpoint is loaded next: of the weights, only the frozen ones are read.
        plan: how tensor ranks split the model.
        persist_below: weights of fewer elements are not partitioned by ZeRO-3; None = the vectors are not.

    Raises:
        ValueError: the precision is unknown, nothing is to be trained, or the weights are not those of the model.
        UserError: a part is to be trained with tensor parallelism, or `parallel.hpz` does not divide the ranks.
    """
    mesh = with_groups(mesh, device)
    weights, trained = settle(model, weights, mesh, device), _trained(model, mesh)
    splits = parallelize(
        model, mesh, recompute=parallel.recompute, offload_activations=parallel.offload_activations,
        compile=parallel.compile, device=device, plan=plan,
    )  # fmt: skip
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    config = deepspeed_config(
        parallel, precision, device, sizes := weight_sizes(shapes, trained), grad_clip=optim.grad_clip,
        micro_batch_size=micro_batch_size, memory_bytes=memory_bytes(device), persist_below=persist_below,
    )  # fmt: skip
    make_room(model, mesh, parallel, dtype_of(precision), device, config)
    sum_partial_gradients(model, plan, mesh)  # the parameters are new ones
    parameters = dict(model.named_parameters())
    frozen = {name: parameter for name, parameter in parameters.items() if name not in trained}
    if parallel.zero_stage < 3:  # before DeepSpeed makes the master weights of them
        fill(weights, whole_places(frozen if load_follows else parameters, splits, mesh, device))
    adamw = torch.optim.AdamW(
        [parameters[name] for name in trained], lr=lr_at(0, optim, max_steps), betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps, weight_decay=optim.weight_decay,
    )  # fmt: skip
    inner = initialize(model, mesh, parallel, config, device, adamw)
    name_of = {parameter: name for name, parameter in parameters.items()}.__getitem__
    fragments, masters = fragments_of(inner.optimizer, name_of, mesh.zero_rank)
    partition = Partition([Entry(n, shapes[n], splits.get(n), fragments[n]) for n in trained], mesh, device)
    targets = [(partition, masters)] if not load_follows else []
    if parallel.zero_stage == 3:
        targets.append(partitioned_places(frozen, splits, mesh, device))
    if parallel.zero_stage == 3 or precision == "bf16":  # bf16: DeepSpeed's master weights are of the rounded ones
        fill(weights, *targets)
    engine = ZeroEngine(inner, adamw, partition, masters, optim, max_steps, parallel, sizes.total - sizes.trained)
    if parallel.zero_stage == 3:
        engine.weights_from_masters()
    return engine


def memory_bytes(device: torch.device) -> int:
    """Returns the memory of an accelerator; 0 on the CPU, whose memory all processes share."""
    return 0 if device.type == "cpu" else int(device_module(device).mem_get_info(device)[1])


def _trained(model: nn.Module, mesh: Mesh) -> list[str]:
    """Returns the names of the parameters to train."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if not any(required.values()):
        raise ValueError("all weights are frozen: there is nothing to train")
    if mesh.tp > 1 and not all(required.values()):
        raise UserError(
            "tensor parallelism cannot train a part of the weights", where="parallel.tp",
            remedy="use parallel.tp=1, and parallel.sp= for more ranks per clip",
        )  # fmt: skip
    return [name for name, wanted in required.items() if wanted]


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
        max_steps: int, parallel: ParallelConfig, frozen: int,
    ) -> None:  # fmt: skip
        self._inner, self._adamw, self._partition, self._masters = inner, adamw, partition, masters
        self._optim, self._max_steps, self._parallel, self._frozen = optim, max_steps, parallel, frozen
        self.module: VelocityModel = inner
        self.mesh, self.device = partition.mesh, partition.device
        self.step_count = 0
        self.skipped_count = 0
        for flat in masters:
            self._adam_state(flat)
        self.ema = MovingAverage(masters, optim.ema_decay) if optim.ema_decay > 0 else None

    @property
    def num_parameters(self) -> int:
        """Weights in training, over all ranks."""
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
            self._partition, self._state(), counters, Path(folder), extra, frozen=self._frozen, keep=keep,
            chunk_bytes=chunk_bytes,
        )  # fmt: skip

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
        self.weights_from_masters()
        return extra

    def newest_checkpoint(self, root: Path | str) -> Path | None:
        """Returns the newest undamaged checkpoint in `root`, the same on every rank. Collective."""
        return checkpoint.newest(root, self.mesh.rank, self.device)

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
    def weights_from_masters(self) -> None:
        """Makes the weights that the model computes with those of the master partitions. Collective."""
        optimizer = self._inner.optimizer
        if self._parallel.zero_stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(self._masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        forget_second_copies(self._inner.module)
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

    def close(self) -> None:
        """Unhooks DeepSpeed from the model; the engine cannot be used afterwards."""
        self._inner.destroy()
