"""Reinforcement from a differentiable reward, back-propagated through the last solver steps.

A clip is generated from noise, its first frame decoded and scored, and the score's gradient flows back through decoder
and solver into the model. A causal video VAE decodes the first frame from the first latent frame alone, so scoring that
frame is exact and needs the memory of one image. The loss of a sample is

    reward_weight * (-reward, or relu(hinge_margin - reward))
    + kl_weight * mean over the grad steps and c, t, h, w of (velocity - reference velocity)^2
    + flow_weight * flow-matching loss on the batch's own clip

The squared velocity distance takes the place of a KL divergence to the reference model, which for two deterministic
flows does not exist. The reference velocity counts as a constant: no gradient flows through it.

What is known of ContentV's recipe: a frozen image reward, gradients through a differentiable sampler rather than policy
gradients, and decoding of the first frame only [reported, by readers of arXiv 2506.05343]. The form and weight of the
regulariser, the number of solver steps and of those that keep gradients, guidance, and the weights below are not in any
source we could open: they are defaults of ours [inferred]. Cutting the gradient at the model's input follows DRTune
(arXiv 2405.00760). First-frame rewards are cheap but drift: watch subject consistency and the amount of motion.
"""

from __future__ import annotations

import itertools
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contentv.base.errors import UserError
from contentv.base.rng import keyed_generator, keyed_normal
from contentv.base.types import Batch, LossOutput, TextCond, VelocityModel
from contentv.diffusion.flow import at_least_fp32, flow_loss
from contentv.diffusion.solver import VelocityFn, euler_sigmas, euler_step, guided
from contentv.objectives.flow import FlowMatching

GRAD_STEP_CHOICES = ("tail", "uniform", "random")


@runtime_checkable
class FrameDecoder(Protocol):
    """What is needed of a video VAE."""

    def denormalize(self, z: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]: ...

    def decode_first_frame(self, raw: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b rgb H W"]: ...


@runtime_checkable
class FrameReward(Protocol):
    """A score of frames (b 3 H W in -1..1) for captions, differentiable in the frames; higher is better."""

    def score(self, frames: Float[Tensor, "b rgb H W"], captions: list[str]) -> Float[Tensor, "b"]: ...


@dataclass
class RewardConfig:
    """Reinforcement from a reward: rollout, which steps learn, and the weights of the loss.

    Raises:
        UserError: a value is unknown or out of range.
    """

    path: str = field(default="", metadata={"help": "folder of the frozen reward model (transformers CLIP)"})
    steps: int = field(default=20, metadata={"help": "solver steps of a rollout; 1 or more"})
    grad_steps: int = field(
        default=1, metadata={"help": "solver steps that keep gradients, each one more forward's activations; 1..steps"}
    )
    grad_step_choice: str = field(
        default="tail",
        metadata={"help": "which steps keep gradients: tail = the last | uniform = evenly spread, ending at the last | "
                          "random = drawn anew each optimiser step"},
    )  # fmt: skip
    stop_input_gradient: bool = field(
        default=False,
        metadata={"help": "cut the gradient where latents enter the model, so that it only flows along the solver"},
    )
    shift: float = field(default=3.0, metadata={"help": "shift of the rollout's sigmas, as when sampling; above 0"})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "guidance of the rollout, 0 or more; 1 = off, others take a second pass"}
    )
    reward_weight: float = field(default=1.0, metadata={"help": "weight of the reward; 0 or more"})
    hinge_margin: float | None = field(
        default=None, metadata={"help": "null = maximise the reward; a number = only up to that reward"}
    )
    kl_weight: float = field(
        default=0.1, metadata={"help": "weight of the squared velocity distance to the reference model; 0 or more"}
    )
    flow_weight: float = field(
        default=0.0, metadata={"help": "weight of the flow-matching loss on the dataset's clips; 0 or more"}
    )

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, "use 1 or more")
        _require(1 <= self.grad_steps <= self.steps, "grad_steps", self.grad_steps, f"use 1..{self.steps} (steps)")
        choice, choices = self.grad_step_choice, GRAD_STEP_CHOICES
        _require(choice in choices, "grad_step_choice", choice, f"use {', '.join(choices)}")
        _require(self.shift > 0, "shift", self.shift, "use a number above 0")
        for key in ("guidance_scale", "reward_weight", "kl_weight", "flow_weight"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "use 0 or more")


def _require(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise UserError(f"reward.{key}={value} is not possible", where=f"reward.{key}", remedy=remedy)


class RewardObjective:
    """The loss of a batch's captions under a reward; the batch's latents give the shape (and the flow loss).

    The rollout's noise is keyed by (seed, step, the sample's place in the run's order), stream "rollout_noise".

    Args:
        vae: decodes first frames; frozen here if it is a torch module.
        reward_model: scores frames; frozen here if it is a torch module.
        reference: the model to stay near; needed when kl_weight is above 0, never trained.
        config: the choices above.
        seed: the run's seed.
        flow: the flow-matching objective; needed when flow_weight is above 0.
        null_text: the encoded empty caption, one row; needed when guidance_scale is not 1.

    Raises:
        UserError: a part that the configuration needs is missing.
    """

    def __init__(
        self,
        vae: FrameDecoder,
        reward_model: FrameReward,
        reference: VelocityModel | None,
        config: RewardConfig,
        seed: int,
        flow: FlowMatching | None = None,
        null_text: TextCond | None = None,
    ) -> None:
        for key, off, part, name in (
            ("kl_weight", 0, reference, "the reference model"),
            ("flow_weight", 0, flow, "the flow-matching objective"),
            ("guidance_scale", 1, null_text, "the encoded empty caption"),
        ):
            value = getattr(config, key)
            _require(value == off or part is not None, key, value, f"use {off}, or give {name}, which is missing")
        for judge in (vae, reward_model):
            if isinstance(judge, nn.Module):
                judge.requires_grad_(False)
        self.vae = vae
        self.reward_model = reward_model
        self.reference = reference if config.kl_weight > 0 else None
        self.config = config
        self.seed = seed
        self.flow = flow if config.flow_weight > 0 else None
        self.null_text = null_text
        self.sigmas = euler_sigmas(config.steps, config.shift)

    def __call__(self, model: VelocityModel, batch: Batch, step: int) -> LossOutput:
        """Returns the sum of the samples' losses, fp32; the metrics are sums of reward, kl and the flow loss's metrics.

        Args:
            model: the velocity model being trained; its input has the dtype of the batch's latents.
            batch: text on the model's device; one clip is generated per row.
            step: optimiser step, a key of the draws.
        """
        config = self.config
        latents, kl = self._rollout(model, batch, step)
        reward = self._score(latents, batch.captions)
        if config.hinge_margin is None:
            reward_loss = -reward
        else:
            reward_loss = torch.relu(config.hinge_margin - reward)
        loss_sum = (config.reward_weight * reward_loss + config.kl_weight * kl).sum()
        metrics = {"reward": reward.detach().sum(), "kl": kl.detach().sum()}
        tallies: dict[str, Tensor] = {}
        if self.flow is not None:
            flow = self.flow(model, batch, step)
            loss_sum = loss_sum + config.flow_weight * flow.loss_sum
            metrics |= {f"flow_{name}": value for name, value in flow.metrics.items()}
            tallies = flow.tallies
        return LossOutput(loss_sum, len(batch), metrics, tallies)

    def grad_step_indices(self, step: int) -> frozenset[int]:
        """Returns which solver steps (0 = the first, at pure noise) keep gradients in optimiser step `step`.

        They are the same for all samples and processes.
        """
        steps, count = self.config.steps, self.config.grad_steps
        if self.config.grad_step_choice == "uniform":
            return frozenset(steps * (i + 1) // count - 1 for i in range(count))
        if self.config.grad_step_choice == "random":
            order = torch.randperm(steps, generator=keyed_generator(self.seed, step, 0, "grad_steps"))
            return frozenset(order[:count].tolist())
        return frozenset(range(steps - count, steps))

    def _rollout(
        self, model: VelocityModel, batch: Batch, step: int
    ) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b"]]:
        """Generates one clip per caption; also each one's squared distance to the reference, mean over grad steps."""
        device, dtype = batch.latents.device, batch.latents.dtype
        noise = keyed_normal(batch.latents.shape[1:], self.seed, step, batch.sample_index, "rollout_noise")
        start = noise.to(device, dtype)
        policy = self._guided(model, batch.text)
        reference = None if self.reference is None else self._guided(self.reference, batch.text)
        return self._solve(policy, reference, start, self.grad_step_indices(step))

    def _solve(
        self, policy: VelocityFn, reference: VelocityFn | None, noise: Float[Tensor, "b c t h w"], graded: Set[int]
    ) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b"]]:
        latents = at_least_fp32(noise)
        kl = torch.zeros(len(noise), device=noise.device)
        for i, (sigma, sigma_next) in enumerate(itertools.pairwise(self.sigmas.to(noise.device))):
            entering = latents.to(noise.dtype)
            if i not in graded:
                with torch.no_grad():
                    velocity = policy(entering, sigma)
            else:
                entering = entering.detach() if self.config.stop_input_gradient else entering
                velocity = policy(entering, sigma)
                if reference is not None:
                    with torch.no_grad():
                        anchor = reference(entering, sigma)
                    kl = kl + flow_loss(velocity, anchor) / len(graded)
            # The state's own path is never cut: an early grad step reaches the frame along it, whatever follows.
            latents = euler_step(latents, velocity, sigma, sigma_next)
        return latents, kl

    def _guided(self, model: VelocityModel, text: TextCond) -> VelocityFn:
        if self.config.guidance_scale == 1 or self.null_text is None:
            return guided(model, text)
        null_text = self.null_text.to(text.tokens.device, text.tokens.dtype)
        return guided(model, text, null_text, self.config.guidance_scale)

    def _score(self, latents: Float[Tensor, "b c t h w"], captions: list[str]) -> Float[Tensor, "b"]:
        raw = self.vae.denormalize(latents[:, :, :1])
        frames = self.vae.decode_first_frame(raw).clamp(-1, 1)  # the decoder may overshoot what a picture can show
        return at_least_fp32(self.reward_model.score(frames, captions))
