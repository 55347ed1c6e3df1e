"""The flow-matching objective of every stage but the last: predict the velocity of a noised clip."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contentv.base.errors import UserError
from contentv.base.rng import keyed_generators, keyed_normal, keyed_uniform
from contentv.base.types import Batch, LossOutput, TextCond, VelocityModel
from contentv.diffusion.flow import add_noise, flow_loss, timestep_of, velocity_target
from contentv.diffusion.noise_levels import quality_tallies
from contentv.diffusion.timesteps import TQD, SigmaSampler, SigmaWeight, draw

SIGMA_BINS = 4


class FlowMatching:
    """Mean squared velocity error of each clip at a noise level of its own, summed over the clips.

    Every draw is keyed by (seed, step, the clip's place in the run's order, stream), with the streams "sigma", "noise"
    and "text_dropout": a clip gets the same ones on every layout and after every restart.

    Args:
        sampler: distribution of sigma, from `build_sampler`.
        seed: the run's seed.
        null_text: the encoded empty caption, one row, with as many tokens as the captions of the batches.
        text_dropout: probability of training a clip with `null_text` for its caption, 0..1, so that the model can be
            guided. It hides all text encoders at once.
        weight: factor of a clip's loss at its noise level, from `build_weight`; None = 1.

    Raises:
        UserError: text_dropout is outside 0..1.
    """

    def __init__(
        self,
        sampler: SigmaSampler | TQD,
        seed: int,
        null_text: TextCond,
        text_dropout: float | int = 0.1,
        weight: SigmaWeight | None = None,
    ) -> None:
        if not 0 <= text_dropout <= 1:
            raise UserError(f"{text_dropout} is not a probability", where="text.dropout", remedy="use 0..1")
        self.sampler = sampler
        self.seed = seed
        self.null_text = null_text
        self.text_dropout = text_dropout
        self.weight = weight

    def __call__(self, model: VelocityModel, batch: Batch, step: int) -> LossOutput:
        """Returns the sum over the batch's clips of their mean squared velocity errors (mean over c, t, h, w), fp32.

        Each error is multiplied by the weight of its noise level and by the batch's own weight of the clip, if there
        are any. The metrics are sums over the clips of the errors without weights: loss, sigma_mean, and for each
        quarter of the sigma range loss_sigma_q1_sum .. q4 with the number of clips in it, loss_sigma_q1_count .. q4;
        with weights also weighted_loss. The tallies are those of `quality_tallies`.

        Args:
            model: predicts the velocity; its input has the dtype of the batch's latents.
            batch: latents and text on the model's device.
            step: optimiser step, a key of the draws.

        Raises:
            ValueError: a score is outside 0..1, or null_text has another number of tokens than the captions.
        """
        latents, index, device = batch.latents, batch.sample_index, batch.latents.device
        generators = keyed_generators(self.seed, step, index, "sigma")
        sigma = draw(self.sampler, batch.motion, batch.visual, generators).to(device)
        noise = keyed_normal(latents.shape[1:], self.seed, step, index, "noise").to(device)
        text = self._drop_captions(batch, step)
        noisy_latents = add_noise(latents, noise, sigma).to(latents.dtype)
        velocity = model(noisy_latents, timestep_of(sigma), text.tokens, text.pooled)
        per_sample = flow_loss(velocity, velocity_target(latents, noise))
        errors = per_sample.detach()
        metrics = sigma_metrics(errors, sigma)
        for weight in (None if self.weight is None else self.weight(sigma), batch.loss_weight):
            if weight is not None:
                per_sample = per_sample * weight.to(per_sample)
                metrics["weighted_loss"] = per_sample.detach().sum()
        tallies = quality_tallies(errors, sigma, batch.motion, batch.visual)
        return LossOutput(per_sample.sum(), len(batch), metrics, tallies)

    def _drop_captions(self, batch: Batch, step: int) -> TextCond:
        if self.text_dropout == 0:
            return batch.text
        draws = keyed_uniform(self.seed, step, batch.sample_index, "text_dropout")
        dropped = (draws < self.text_dropout).to(batch.latents.device)
        return replace_rows(batch.text, dropped, self.null_text)


def replace_rows(text: TextCond, rows: Bool[Tensor, "b"], null_text: TextCond) -> TextCond:
    """Returns `text` with the marked rows replaced by the single row of `null_text`.

    Raises:
        ValueError: the two differ in tokens per caption or in width.
    """
    null = null_text.to(text.tokens.device, text.tokens.dtype)
    if null.tokens.shape[1:] != text.tokens.shape[1:] or null.pooled.shape[1:] != text.pooled.shape[1:]:
        raise ValueError(
            f"the empty caption is encoded as {tuple(null.tokens.shape[1:])} tokens and {tuple(null.pooled.shape[1:])} "
            f"pooled, the batch's captions as {tuple(text.tokens.shape[1:])} and {tuple(text.pooled.shape[1:])}; "
            "both must come from the same text encoders"
        )
    return TextCond(
        torch.where(rows[:, None, None], null.tokens, text.tokens),
        torch.where(rows[:, None], null.pooled.to(text.pooled.dtype), text.pooled),
    )


def sigma_metrics(per_sample: Float[Tensor, "b"], sigma: Float[Tensor, "b"]) -> dict[str, Tensor]:
    """Returns sums of the loss and of sigma, over all clips and (with counts) per quarter of the sigma range.

    Nothing here waits for the device.
    """
    metrics = {"loss": per_sample.sum(), "sigma_mean": sigma.sum()}
    quarter = (sigma * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
    for i in range(SIGMA_BINS):
        inside = (quarter == i).to(per_sample.dtype)
        metrics[f"loss_sigma_q{i + 1}_sum"] = (per_sample * inside).sum()
        metrics[f"loss_sigma_q{i + 1}_count"] = inside.sum()
    return metrics
