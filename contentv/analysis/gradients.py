"""Gradients of golden clips and of their degraded twins, bin by bin of the noise level, as inner products.

A gradient of billions of entries is compared with others and never looked at itself. So what is kept of each bin is the
matrix of inner products between the gradients of all groups of clips of all twins, for each part of the model. Every
cosine, ceiling and interval follows from it (`similarity`).

The three twins of a clip get the same noise level and noise, and a clip the same noise in every bin: what differs
between two gradients is the degradation, and what differs between two bins the noise level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from contentv.analysis.config import GradientConfig
from contentv.base.log import get_logger
from contentv.base.rng import keyed_generator, keyed_normal, keyed_uniform
from contentv.base.types import TextCond
from contentv.diffusion.flow import add_noise, flow_loss, timestep_of, velocity_target
from contentv.diffusion.samplers import to_sigma

LAYERS = "transformer_blocks"
OUTPUT = ("norm_out", "proj_out")
_CHUNK = 1 << 20  # columns of which fp64 copies are made at a time


@dataclass(frozen=True)
class BinGradients:
    """What the gradients of one interval of sigma are like.

    Attributes:
        low, high: the interval.
        grams: part of the model -> inner products (twins x groups, twins x groups), fp64, rows twin after twin.
        losses: mean loss (twins, groups).
    """

    low: float
    high: float
    grams: dict[str, NDArray[np.float64]]
    losses: NDArray[np.float64]

    @property
    def gram(self) -> NDArray[np.float64]:
        """The inner products of whole gradients."""
        return np.sum(list(self.grams.values()), axis=0)


def part_of(name: str) -> str:
    """Returns the part of the model that a weight belongs to: `layer N`, `input` or `output`."""
    first, _, rest = name.partition(".")
    if first == LAYERS:
        return f"layer {rest.partition('.')[0]}"
    return "output" if first in OUTPUT else "input"


class GradientTap:
    """Takes the gradients of a model's weights, or the same random share of each of them.

    Inner products over a share of the entries are right on average: each entry is scaled by the root of how many it
    stands for.

    Args:
        model: all weights that are not looked at are frozen, so that no graph is built below them.
        blocks: the last so many layers and the output; 0 = all weights.
        max_values: entries kept, at most about so many; 0 = all.
        seed: of the choice of entries.
    """

    def __init__(self, model: nn.Module, blocks: int = 0, max_values: int = 0, seed: int = 0) -> None:
        layers = len(getattr(model, LAYERS, ()))
        wanted = {"output", *(f"layer {i}" for i in range(max(0, layers - blocks), layers))}
        named = [(name, p) for name, p in model.named_parameters() if not blocks or part_of(name) in wanted]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        total = sum(parameter.numel() for _, parameter in named)
        share = 1.0 if not max_values else min(1.0, max_values / total)
        self._taken: list[tuple[nn.Parameter, Tensor | None, float, slice]] = []
        self.columns: dict[str, list[slice]] = {}  # of each part
        self.values = 0
        for name, parameter in named:
            parameter.requires_grad_(True)
            chosen = _choose(parameter, share, seed, name)
            count = parameter.numel() if chosen is None else len(chosen)
            place = slice(self.values, self.values + count)
            self._taken.append((parameter, chosen, (parameter.numel() / count) ** 0.5, place))
            self.columns.setdefault(part_of(name), []).append(place)
            self.values = place.stop
        self.weights = total

    def take(self, row: Float[Tensor, " values"]) -> None:
        """Adds the gradients of the weights to a row, and clears them."""
        for parameter, chosen, scale, place in self._taken:
            if parameter.grad is None:  # the last layer's text half has no part in the output
                continue
            found = parameter.grad.flatten()
            row[place].add_(found if chosen is None else found[chosen], alpha=scale)
            parameter.grad = None

    def grams(self, rows: Float[Tensor, "rows values"]) -> dict[str, NDArray[np.float64]]:
        """Returns the rows' inner products for each part, fp64."""
        found: dict[str, NDArray[np.float64]] = {}
        for part, places in self.columns.items():
            total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
            for place in places:
                for start in range(place.start, place.stop, _CHUNK):
                    wide = rows[:, start : min(start + _CHUNK, place.stop)].double()
                    total += wide @ wide.T
            found[part] = total.cpu().numpy()
        return found


def _choose(parameter: nn.Parameter, share: float, seed: int, name: str) -> Tensor | None:
    if share >= 1.0:
        return None
    count = max(1, round(share * parameter.numel()))
    # With replacement: as right on average, and no list of all entries of a large weight is shuffled.
    generator = keyed_generator(seed, 0, 0, f"gradient_entries/{name}")
    return torch.randint(parameter.numel(), (count,), generator=generator).sort().values.to(parameter.device)


def sigma_bins(bins: int) -> list[tuple[float, float]]:
    """Returns `bins` equal intervals of [0, 1]."""
    return [(i / bins, (i + 1) / bins) for i in range(bins)]


def measure_gradients(
    model: Any,
    twins: Mapping[str, Float[Tensor, "n c t h w"]],
    text: TextCond,
    config: GradientConfig,
    bins: Sequence[tuple[float, float]] | None = None,
    tap: GradientTap | None = None,
) -> list[BinGradients]:
    """Returns the inner products of the gradients of the flow-matching loss, for each bin of sigma.

    Args:
        model: a velocity model; when this returns, those of its weights that were not looked at are frozen.
        twins: name -> latents in model space of the same clips, the golden ones first; their number is a multiple of
            config.groups.
        text: the captions of the clips, the same for all twins.
        config: bins, draws, groups, and which weights.
        bins: intervals of sigma to look at; None = all `config.bins` of them.
        tap: of the model; None = as the configuration says.

    Raises:
        ValueError: the twins differ in shape, or do not divide into the groups.
    """
    latents = list(twins.values())
    clips = len(latents[0])
    if any(x.shape != latents[0].shape for x in latents) or clips % config.groups:
        shapes = {name: tuple(x.shape) for name, x in twins.items()}
        raise ValueError(f"twins must have one shape, and clips divide into {config.groups} groups, got {shapes}")
    tap = tap or GradientTap(model, config.blocks, config.max_values, config.seed)
    device = next(model.parameters()).device
    rows = torch.zeros(len(latents) * config.groups, tap.values, device=device)
    found = []
    for low, high in sigma_bins(config.bins) if bins is None else bins:
        rows.zero_()
        losses = torch.zeros(len(rows), device=device)
        for row in range(len(rows)):
            twin, group = divmod(row, config.groups)
            for part in _pieces(clips, group, config):
                for draw in range(config.draws):
                    loss = _loss(model, latents[twin][part], text[part], part, draw, (low, high), config.seed)
                    loss = loss / (config.draws * (clips // config.groups))
                    loss.backward()
                    tap.take(rows[row])
                    losses[row] += loss.detach()
        shaped = losses.double().cpu().numpy().reshape(len(latents), config.groups)
        found.append(BinGradients(low, high, tap.grams(rows), shaped))
        means = ", ".join(f"{name} {loss:.3g}" for name, loss in zip(twins, shaped.mean(axis=1), strict=True))
        get_logger().info("sigma %.2f to %.2f: loss %s", low, high, means)
    return found


def _pieces(clips: int, group: int, config: GradientConfig) -> list[slice]:
    size = clips // config.groups
    step, end = config.micro_batch_size, (group + 1) * size
    return [slice(start, min(start + step, end)) for start in range(group * size, end, step)]


def _loss(
    model: Any, latents: Tensor, text: TextCond, part: slice, draw: int, interval: tuple[float, float], seed: int
) -> Tensor:
    """Returns the sum of some clips' losses; `part` are their places, the keys of their draws."""
    device, indices = next(model.parameters()).device, range(part.start, part.stop)
    clean, text = latents.to(device), text.to(device)
    place = keyed_uniform(seed, draw, indices, "gradient_sigma").double()
    sigma = to_sigma(interval[0] + (interval[1] - interval[0]) * place).to(device)
    noise = keyed_normal(clean.shape[1:], seed, draw, indices, "gradient_noise").to(device)
    velocity = model(add_noise(clean, noise, sigma), timestep_of(sigma), text.tokens, text.pooled)
    return flow_loss(velocity, velocity_target(clean, noise)).sum()
