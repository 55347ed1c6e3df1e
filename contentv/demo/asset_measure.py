"""Measures the demo's VAE: fidelity, whether the classifier still reads its output, and how its latents are spread."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from contentv.curation.synth_world import render_clip, sample_spec
from contentv.demo.classifier import classify


def _to_bytes(video: Tensor) -> np.ndarray:
    """Returns (T, H, W, 3) uint8 of one (3, T, H, W) video in [-1, 1]."""
    return ((video.clamp(-1, 1) + 1.0) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, seed: int, clips: int = 32) -> dict[str, float | list[float]]:
    """Returns facts about round trips of clean clips at both video shapes.

    Returns:
        Per shape: PSNR in dB, shares of colours and directions read right after the round trip, and the same with
        noise of 0.2 standard deviations in the latents; then the smallest and largest standard deviation of the
        normalised channels, the largest correlation between two, and the correlation of neighbours in space.
    """
    rng = np.random.default_rng(seed)
    config = vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    facts: dict[str, float | list[float]] = {}
    rows = []
    neighbours: list[float] = []
    for name, frames, side in (("f17_h96_w96", 17, 96), ("f9_h64_w64", 9, 64)):
        psnr, hits = [], np.zeros(4)
        for _ in range(clips):
            spec = sample_spec(rng)
            picture = render_clip(spec, frames, side)
            video = torch.from_numpy(picture).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
            latents = vae.encode(video).latent_dist.mode()
            unit = (latents - mean) / std
            rows.append(unit[0].flatten(1))
            a, b = unit[..., 1:].flatten(), unit[..., :-1].flatten()
            neighbours.append(float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()))
            again = _to_bytes(vae.decode(latents).sample[0])
            rough = _to_bytes(vae.decode((unit + 0.2 * torch.randn(unit.shape)) * std + mean).sample[0])
            psnr.append(-10 * np.log10(max(1e-9, np.square((again.astype(float) - picture) / 255).mean())))
            for offset, clip in ((0, again), (2, rough)):
                colour, direction, _ = classify(clip)
                hits[offset] += colour == spec.colour
                hits[offset + 1] += direction == spec.direction
        facts[f"{name}.psnr_db"] = round(float(np.mean(psnr)), 2)
        for key, hit in zip(("colour", "direction", "colour_noisy", "direction_noisy"), hits, strict=True):
            facts[f"{name}.{key}"] = round(hit / clips, 4)
    every = torch.cat(rows, 1)
    correlation = torch.corrcoef(every) - torch.eye(len(every))
    facts["unit_std_min"], facts["unit_std_max"] = (round(float(v), 3) for v in torch.aminmax(every.std(1)))
    facts["largest_correlation"] = round(float(correlation.abs().max()), 3)
    facts["neighbour_correlation"] = round(float(np.mean(neighbours)), 3)
    return facts
