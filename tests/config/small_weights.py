"""Folders to convert, small and of the real classes: an image model of diffusers, runs, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from contentv.base.log import get_logger
from contentv.config.schema import ConvertConfig, TextConfig, VAEConfig
from contentv.engine import checkpoint_files as files
from contentv.models.io import write_transformer
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.models.text import TextStack
from contentv.models.vae import VideoVAE
from contentv.train.manifest import StageManifest

ASSETS = Path(__file__).resolve().parents[2] / "contentv" / "demo" / "assets"
IMAGE, VAE = ASSETS / "image_model", ASSETS / "vae"
# The widths of the demo's text encoder, so that a whole pipeline fits together.
SHAPE = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=64, pooled_projection_dim=64
)


def image_model(
    folder: Path, dtype: torch.dtype = torch.float32, shard: str = "10GB", **changes: Any
) -> dict[str, Tensor]:
    """Saves an SD3-class transformer by diffusers and returns its weights, without the position table."""
    torch.manual_seed(1)
    options = {
        "sample_size": 8, "pos_embed_max_size": 6, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
        "joint_attention_dim": 64, "caption_projection_dim": 32, "pooled_projection_dim": 64, "qk_norm": "rms_norm",
        **changes,
    }  # fmt: skip
    model = SD3Transformer2DModel(**options).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    state: dict[str, Tensor] = model.state_dict()
    del state["pos_embed.pos_embed"]
    return state


def random_state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(MMDiT(SHAPE).state_dict())


def write_run(out: Path, **facts: Any) -> dict[str, dict[str, Tensor]]:
    """Writes the parts of a run folder that others read and returns its weights, {"ema": ..., "raw": ...}."""
    out.mkdir(parents=True)
    config = {
        "model": asdict(SHAPE), "stage": {"name": "sft"}, "timestep": {"shift": 5.0}, "vae": {"path": str(VAE)},
        "text": {"path": str(IMAGE)}, "init": str(IMAGE), "data": {"path": ""},
    }  # fmt: skip
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    states = {"ema": random_state(2), "raw": random_state(3)}
    for which, state in states.items():
        write_transformer(state, out / "export" / which, SHAPE)
    known = {
        "vae_fingerprint": VideoVAE.from_folder(VAE).fingerprint, "shift": 5.0, "steps": 7, "fps": 8.0,
        "text_fingerprint": TextStack.from_folder(IMAGE).fingerprint, "buckets": ["f9_h64_w64"],
        "vae_path": str(VAE), "text_path": str(IMAGE), "weights": {w: f"export/{w}" for w in states},
        "consumed": {"init": str(IMAGE), "init_stage": "sd3"}, **facts,
    }  # fmt: skip
    StageManifest("sft", asdict(SHAPE), **known).write(out)
    return states


def write_checkpoint(folder: Path, states: dict[str, dict[str, Tensor]], **extra: Any) -> None:
    """Writes a checkpoint of a run's weights as if two ranks had shared them; it has no optimiser state."""
    partial, step = files.partial_folder(folder), int(folder.name.rpartition("-")[2])
    partial.mkdir(parents=True)
    facts: dict[str, dict[str, Any]] = {n: {"shape": list(t.shape), "files": {}} for n, t in states["raw"].items()}
    written: dict[str, Any] = {}
    for kind, state in (("param", states["raw"]), ("ema", states["ema"])):
        for rank in range(2):
            writer = files.ChunkWriter(partial, kind, rank, chunk_bytes=50_000)
            for name in sorted(state)[rank::2]:
                writer.add(name, state[name])
            writer.flush()
            written |= writer.files
            for name, file in writer.where.items():
                facts[name]["files"][kind] = file
    numbers = {"version": files.VERSION, "step": step, "optimizer_step": step, "ema_updates": step}
    files.commit(folder, {**numbers, "extra": extra, "files": written, "tensors": facts}, keep=0)


def job(
    source: Path | str, to: Path | str, *, vae: Path | str = "", text: Path | str = "", **values: Any
) -> ConvertConfig:
    """A conversion."""
    return ConvertConfig(
        source=str(source), to=str(to), vae=VAEConfig(path=str(vae)), text=TextConfig(path=str(text)), **values
    )


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a transformer folder."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def bits(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    """What a bit-exact comparison compares."""
    return {n: (t.dtype, t.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for n, t in state.items()}


def warnings_of(call: Any) -> Iterable[str]:
    """What a call logs."""
    import logging

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    try:
        call()
    finally:
        get_logger().removeHandler(handler)
    return heard
