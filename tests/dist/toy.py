"""The model, the data and the plain single-process training that every layout is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from contentv.engine.optim import OptimConfig, lr_at
from contentv.engine.zero import ZeroEngine, build_engine
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.collectives import start
from contentv.parallel.mesh import Mesh, ParallelConfig, build_mesh

CPU = torch.device("cpu")
# 6 heads: divisible by 2, not by 4. 45 video and 7 text tokens: odd, so both are padded.
SHAPE = {
    "num_layers": 2, "num_attention_heads": 6, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "joint_attention_dim": 24, "pooled_projection_dim": 20,
}  # fmt: skip
LATENTS, TEXT_TOKENS, SAMPLES = (4, 3, 6, 10), 7, 4


def make_model(seed: int = 0, **changes: Any) -> MMDiT:
    """Returns an MMDiT whose every weight is random, so that every weight has a gradient."""
    model = MMDiT(MMDiTConfig(**{**SHAPE, **changes}))
    generator = torch.Generator().manual_seed(seed)
    scale = 0.08 * (96 / model.config.inner_dim) ** 0.5  # wider models would blow activations up
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "attn.norm_" in name:
                parameter.add_(2.5)  # so that attention is far from uniform and its weights matter
    return model


def make_batch(step: int, latents: tuple[int, ...] = LATENTS) -> dict[str, Tensor]:
    """Returns the global batch of a step."""
    g = torch.Generator().manual_seed(1000 + step)
    return {
        "noisy_latents": torch.randn(SAMPLES, *latents, generator=g),
        "timestep": 1000 * torch.rand(SAMPLES, generator=g),
        "text_tokens": torch.randn(SAMPLES, TEXT_TOKENS, SHAPE["joint_attention_dim"], generator=g),
        "text_pooled": torch.randn(SAMPLES, SHAPE["pooled_projection_dim"], generator=g),
        "target": torch.randn(SAMPLES, *latents, generator=g),
    }


def loss_sum(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Returns the sum over the samples of the mean squared error."""
    inputs = {k: v for k, v in batch.items() if k != "target"}
    return (model(**inputs).float() - batch["target"]).square().mean(dim=(1, 2, 3, 4)).sum()


def rows(batch: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {k: v[first:last] for k, v in batch.items()}


def optim_config(**changes: Any) -> OptimConfig:
    """Returns settings under which the clipping bites in some steps and the schedule moves."""
    settings: dict[str, Any] = {
        "lr": 3e-3, "weight_decay": 0.05, "grad_clip": 0.35, "warmup_steps": 3, "schedule": "cosine", "ema_decay": 0.9,
    }  # fmt: skip
    return OptimConfig(**{**settings, **changes})


def train_plainly(
    model: nn.Module, steps: int, config: OptimConfig, max_steps: int, loss: Any = loss_sum,
    after_step: Callable[[int], None] | None = None,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Trains on whole batches with torch alone and returns (loss, gradient norm before clipping) of every step."""
    adamw = torch.optim.AdamW(
        model.parameters(), betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay
    )
    losses, norms = [], []
    for step in range(steps):
        adamw.param_groups[0]["lr"] = lr_at(step, config, max_steps)
        value = loss(model, make_batch(step)) / SAMPLES
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
        adamw.step()
        adamw.zero_grad()
        losses.append(value.item())
        norms.append(norm.item())
        if after_step is not None:
            after_step(step + 1)
    return losses, norms


def make_mesh(parallel: ParallelConfig) -> Mesh:
    rank, world = start(CPU, timeout_s=120.0)
    return build_mesh(parallel, world, rank, heads=SHAPE["num_attention_heads"])


def make_engine(
    parallel: ParallelConfig, *, precision: str = "fp32", max_steps: int = 10, model: nn.Module | None = None,
    config: OptimConfig | None = None, persist_below: int = 0, **more: Any,
) -> ZeroEngine:  # fmt: skip
    """Returns an engine over all processes; no weight is kept whole, so that all of ZeRO-3 is at work."""
    return build_engine(
        model if model is not None else make_model(), make_mesh(parallel), config or optim_config(),
        precision=precision, parallel=parallel, max_steps=max_steps, device=CPU, persist_below=persist_below,
        **more,
    )  # fmt: skip


def train(
    engine: ZeroEngine, steps: int, *, micro_batches: int = 1, first: int | None = None, loss: Any = loss_sum
) -> tuple[list[float], list[float]]:
    """Trains on this rank's part of every batch and returns (global loss, gradient norm) of every step."""
    losses, norms = [], []
    begin = engine.step_count if first is None else first
    each = SAMPLES // engine.mesh.dp
    for step in range(begin, begin + steps):
        own = rows(make_batch(step), engine.mesh.dp_rank * each, (engine.mesh.dp_rank + 1) * each)
        total = torch.zeros(1)
        for part in range(micro_batches):
            size = each // micro_batches
            value = loss(engine.module, rows(own, part * size, (part + 1) * size))
            engine.backward(value, SAMPLES)
            total += value.detach()
        stats = engine.step()
        losses.append(engine.sum_over_data_ranks(total).item() / SAMPLES)
        norms.append(stats.grad_norm)
    return losses, norms
