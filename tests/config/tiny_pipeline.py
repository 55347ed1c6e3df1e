"""A pipeline folder that samples in a moment: a random transformer with the demo's VAE and text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from contentv.config.schema import SampleConfig, TextConfig, VAEConfig
from contentv.models.io import write_transformer
from contentv.models.mmdit import MMDiT, MMDiTConfig

ASSETS = Path(__file__).resolve().parents[2] / "contentv" / "demo" / "assets"
CONFIG = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=64, pooled_projection_dim=64
)


def random_model(config: MMDiTConfig = CONFIG, seed: int = 0) -> MMDiT:
    """A model whose output depends on everything: no weight is zero."""
    torch.manual_seed(seed)
    return MMDiT(config).requires_grad_(False).eval()  # torch's own initialisation


def write_pipeline(folder: Path, seed: int = 0, shift: float = 3.0) -> Path:
    """Writes transformer/ and scheduler/; the rest comes from the demo."""
    write_transformer(random_model(seed=seed).state_dict(), folder / "transformer", CONFIG)
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def sample_config(folder: Path, out: Path | str = "unused.mp4", **values: Any) -> SampleConfig:
    """A sampling job of five frames of 32 x 32 pixels in two steps."""
    settings: dict[str, Any] = {"frames": 5, "height": 32, "width": 32, "steps": 2, "device": "cpu", **values}
    return SampleConfig(
        checkpoint=str(folder), out=str(out), vae=VAEConfig(path=str(ASSETS / "vae")),
        text=TextConfig(path=str(ASSETS / "image_model")), **settings,
    )  # fmt: skip


def arguments(config: SampleConfig) -> list[str]:
    """The command line of a configuration."""
    keys = ("checkpoint", "out", "frames", "height", "width", "steps", "device")
    return [
        *(f"{key}={getattr(config, key)}" for key in keys), f"vae.path={config.vae.path}",
        f"text.path={config.text.path}",
    ]  # fmt: skip
