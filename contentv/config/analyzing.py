"""`contentv analyze gradients`: a checkpoint, a dataset and its VAE to cosines, a recommendation, and remarks.

Under torchrun the processes share the bins, and each holds the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from contentv.analysis.advice import MOTION, VISUAL, Advice, advise
from contentv.analysis.gradients import BinGradients, GradientTap, measure_gradients, sigma_bins
from contentv.analysis.remarks import remarks
from contentv.analysis.similarity import Grams, direction, trend
from contentv.base import device as devices
from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.config.golden import EncodedTwins, GoldenClips, choose_golden, encode_twins
from contentv.config.inputs import check_data_fits, check_fingerprint, existing_folder, open_data
from contentv.config.sampling_inputs import DTYPES
from contentv.config.schema import AnalyzeRoot
from contentv.config.sources import Source, open_source
from contentv.diffusion.samplers import SigmaSampler
from contentv.diffusion.timesteps import TQD, TimestepConfig, build_sampler
from contentv.models.io import load_whole
from contentv.models.lora_merge import merged
from contentv.models.mmdit import MMDiT
from contentv.models.vae import VideoVAE
from contentv.parallel.collectives import gather_json, start, stop

JSON_VERSION = 1


def analyze_gradients(config: AnalyzeRoot) -> dict[str, Any]:
    """Returns the content of gradients.json: settings, curves with intervals, and the recommendation.

    Raises:
        UserError: a part is missing or does not fit the others, there are too few golden clips, or the device's memory
            is too small.
    """
    source = open_source(config.checkpoint, config.weights, "checkpoint")
    if source.manifest.stage == "sd3":
        raise UserError("this is an image model, which has no motion to lose", where="checkpoint",
                        remedy="train a video model from it, and name that run")  # fmt: skip
    joined = open_data(config.data)
    check_data_fits(source.weights.config, joined)
    folder = existing_folder(config.vae.path or source.manifest.vae_path, "vae.path", "the VAE of the dataset")
    clips = choose_golden(joined, config.data, source.manifest.buckets, config)
    device, world = devices.select(config.device), int(os.environ.get("WORLD_SIZE", "1"))
    rank = start(device)[0] if world > 1 else 0
    vae = VideoVAE.from_folder(folder).to(device)
    check_fingerprint("VAE", vae.fingerprint, joined.vae.fingerprint, "vae.path")
    get_logger().info("%d golden clips of %s and their twins go through the VAE", len(clips.numbers), clips.bucket.name)
    twins = encode_twins(clips, vae, config)
    del vae
    model = _model(source, config, device)
    tap = GradientTap(model, config.blocks, config.max_values, config.seed)
    found = _measure(model, tap, twins, config, sigma_bins(config.bins)[rank::world], device)
    stop()
    about = {
        "checkpoint": config.checkpoint, "what": source.what, "weights": config.weights, "precision": config.precision,
        "weights_compared": tap.weights, "gradient_entries_kept": tap.values,
    }  # fmt: skip
    return {"model": about, **conclude(config, clips, twins, found, base_law(config, source.manifest.shift))}


def base_law(config: AnalyzeRoot, trained_shift: float) -> SigmaSampler:
    """Returns the base of the TQD law that is recommended, with the shift asked for or trained with."""
    shift = config.shift or trained_shift or 1.0
    law = build_sampler(TimestepConfig(kind=config.base, shift=shift))
    assert not isinstance(law, TQD)  # AnalyzeRoot refuses it
    return law


def _model(source: Source, config: AnalyzeRoot, device: torch.device) -> MMDiT:
    weights = source.weights if source.lora is None else merged(source.weights, source.lora, 1.0)
    return load_whole(weights, DTYPES[config.precision]).to(device).eval()


def _measure(
    model: MMDiT, tap: GradientTap, twins: EncodedTwins, config: AnalyzeRoot, bins: list[tuple[float, float]],
    device: torch.device,
) -> list[BinGradients]:  # fmt: skip
    """Returns the bins of all processes, in order, on every one of them; each measures some."""
    try:
        found = measure_gradients(model, twins.latents, twins.text, config, bins, tap)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device's memory is too small ({str(error).splitlines()[0]})", where=f"device={device.type}",
            remedy="use blocks=4 (the last layers alone), micro_batch_size=1, precision=bf16, a bucket of fewer tokens "
            "or a smaller max_values",
        ) from None  # fmt: skip
    rows = [[b.low, b.high, {part: gram.tolist() for part, gram in b.grams.items()}, b.losses.tolist()] for b in found]
    every = sorted((row for rank_rows in gather_json(rows, None, device) for row in rank_rows), key=lambda row: row[0])
    return [
        BinGradients(low, high, {part: np.array(gram) for part, gram in grams.items()}, np.array(losses))
        for low, high, grams, losses in every
    ]


def conclude(
    config: AnalyzeRoot, clips: GoldenClips, twins: EncodedTwins, found: Sequence[BinGradients], base: SigmaSampler
) -> dict[str, Any]:
    """Returns curves, directions and the recommendation of a measurement, JSON-compatible."""
    grams = [Grams(b.gram, config.groups) for b in found]
    edges = torch.tensor([[b.low, b.high] for b in found], dtype=torch.float64)
    ranks = base.log_tails(edges)[0].exp()
    below = (ranks.clamp(max=0.5)[:, 1] - ranks.clamp(max=0.5)[:, 0]).tolist()
    above = (ranks.clamp(min=0.5)[:, 1] - ranks.clamp(min=0.5)[:, 0]).tolist()
    rises = {
        name: trend(grams, lambda gram, twin=twin: gram.cosine(twin), below, above)  # type: ignore[misc]
        for name, twin in (("visual", VISUAL), ("motion", MOTION))
    }
    centres = [(b.low + b.high) / 2 for b in found]
    advice = advise(grams, centres, clips.motion, clips.visual, base, config.kappa_base)
    distances = {name: _distance(twins.latents, name) for name in ("visual", "motion")}
    bins = [_bin(b, gram, low + high) for b, gram, low, high in zip(found, grams, below, above, strict=True)]
    return {
        "version": JSON_VERSION,
        "clips": len(clips.numbers), "golden_clips_found": clips.found, "scored_clips": len(clips.motion),
        "bucket": clips.bucket.name, "pixels": twins.pixels, "twins": config.describe(),
        "latent_distance": distances, "golden": config.golden, "groups": config.groups, "draws": config.draws,
        "seed": config.seed, "base": repr(base), "kappa_base": config.kappa_base,
        "bins": bins,
        "trend": {name: {**rise.to_dict(), "direction": direction(rise)} for name, rise in rises.items()},
        "recommendation": _recommendation(advice),
        "remarks": remarks(rises, advice, distances, bins),
    }  # fmt: skip


def _distance(latents: dict[str, torch.Tensor], name: str) -> float:
    golden = latents["golden"]
    return float((latents[name] - golden).norm() / golden.norm())


def _bin(b: BinGradients, gram: Grams, base_mass: float) -> dict[str, Any]:
    golden, *losses = b.losses.mean(axis=1).tolist()
    row: dict[str, Any] = {
        "sigma_low": b.low, "sigma_high": b.high, "base_mass": base_mass,
        "ceiling": gram.jackknife(Grams.ceiling).to_dict(),
        "loss": {"golden": golden, "visual": losses[0], "motion": losses[1]},
        "gradient_norm": dict(zip(("golden", "visual", "motion"), gram.of_means().diagonal() ** 0.5, strict=True)),
    }  # fmt: skip
    for name, twin in (("visual", VISUAL), ("motion", MOTION)):
        row[name] = {
            "cosine": gram.jackknife(lambda g, twin=twin: g.cosine(twin)).to_dict(),  # type: ignore[misc]
            "corrected": gram.jackknife(lambda g, twin=twin: g.corrected(twin)).to_dict(),  # type: ignore[misc]
            "distance": gram.jackknife(lambda g, twin=twin: g.distance(twin)).to_dict(),  # type: ignore[misc]
            "cosine_by_part": {
                part: _or_none(Grams(inner, gram.groups).cosine(twin)) for part, inner in b.grams.items()
            },
        }
    return row


def _or_none(value: float) -> float | None:
    return None if value != value else value


def _recommendation(advice: Advice) -> dict[str, Any]:
    return {
        "kappa_max": advice.kappa_max, "kappa_range": [advice.kappa_low, advice.kappa_high], "pays": advice.pays,
        "gain": advice.gain.to_dict(), "gains": [[kappa, gain] for kappa, gain in advice.gains.items()],
        "crossing": advice.crossing.to_dict(), "base_median": advice.median,
    }  # fmt: skip
