"""Makes the demo's small stand-in models from nothing: `python -m contentv.demo.make_assets --out DIR --part PART`.

Parts: `vae`, `text` (tokenizer, text encoder and the CLIP that the reward model starts from), `reward` and
`image_model` (both need `text`), `measure` (writes facts about what lies in DIR). The times are wall times on one CPU
core; `--speed 0.1` makes a rough set in a tenth of them. A part is trained for a time, not for a number of steps, so
two runs give models of the same quality, not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, SD3Transformer2DModel
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from contentv.base.errors import EXIT_USER_ERROR, UserError
from contentv.base.log import get_logger
from contentv.curation.synth_captions import prompt
from contentv.curation.synth_world import COLOURS
from contentv.demo.asset_image import (
    ImageTraining,
    draw_pictures,
    encode_captions,
    encode_pictures,
    sample_pictures,
    train_image_model,
    train_image_vae,
    write_image_model,
)
from contentv.demo.asset_measure import measure_vae
from contentv.demo.asset_reward import measure_reward, train_reward, write_reward
from contentv.demo.asset_text import TextTraining, train_text, write_text_encoder, write_tokenizer
from contentv.demo.asset_vae import VAETraining, train_vae
from contentv.demo.classifier import classify

ASSETS = Path(__file__).resolve().parent / "assets"
PARTS = ("vae", "text", "reward", "image_model", "measure")
MEASURE_SEED = 4711  # no training uses it


def make_vae(out: Path, speed: float) -> None:
    """Writes out/vae."""
    config = VAETraining()
    config.minutes *= speed
    train_vae(out / "vae", config)


def make_text(out: Path, speed: float) -> None:
    """Writes text_encoder and tokenizer into out/image_model and, for `make_reward` to go on from, out/reward."""
    config = TextTraining()
    config.contrast_minutes *= speed
    tokenizer, clip, facts = train_text(config)
    write_text_encoder(clip, out / "image_model" / "text_encoder")
    write_tokenizer(tokenizer, out / "image_model" / "tokenizer")
    write_reward(clip, tokenizer, out / "reward")
    get_logger().info(f"text: {facts}")


def make_reward(out: Path, speed: float) -> None:
    """Trains the CLIP in out/reward on preferences and writes it back."""
    config = TextTraining()
    config.preference_minutes *= speed
    clip, tokenizer = _read_reward(out)
    train_reward(clip.train(), tokenizer, config)
    write_reward(clip, tokenizer, out / "reward")


def make_image_model(out: Path, speed: float) -> None:
    """Completes out/image_model; its VAE, which the video model has no use for, goes to out/image_vae, not shipped."""
    config = ImageTraining()
    config.vae_minutes *= speed
    config.model_minutes *= speed
    pictures = draw_pictures(np.random.default_rng(config.seed), config.scenes)
    vae, _ = train_image_vae(pictures, config)
    encoder, tokenizer = _read_text(out)
    text, null = (encode_captions(encoder, tokenizer, captions) for captions in (pictures.captions, [""]))
    model, _ = train_image_model(encode_pictures(vae, pictures), text, null, config)
    write_image_model(out / "image_model", model, None)
    vae.half().save_pretrained(out / "image_vae")


def measure(out: Path, clips: int = 64) -> dict[str, Any]:
    """Returns facts about the models in `out`, measured on scenes that no training has seen."""
    torch.manual_seed(MEASURE_SEED)
    vae = AutoencoderKLWan.from_pretrained(_part(out, "vae"), torch_dtype=torch.float32).eval()
    clip, tokenizer = _read_reward(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and "image_vae" not in path.parts)
    facts: dict[str, Any] = {
        "command": f"{Path(sys.executable).name} -m contentv.demo.make_assets --part measure",
        "device": f"cpu, 1 thread, {platform.machine()}", "torch": torch.__version__, "clips": clips,
        "seed": MEASURE_SEED, "total_bytes": size, "vae": measure_vae(vae, MEASURE_SEED, clips),
        "reward": measure_reward(clip, tokenizer, MEASURE_SEED),
    }  # fmt: skip
    if (out / "image_vae").is_dir():
        facts["image_model"] = measure_image_model(out)
    return facts


def measure_image_model(out: Path) -> dict[str, float]:
    """Returns the share of 32 sampled pictures that show the prompted colour; needs the unshipped out/image_vae."""
    vae = AutoencoderKL.from_pretrained(_part(out, "image_vae"), torch_dtype=torch.float32).eval()
    folder = _part(out, "image_model/transformer")
    model = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    encoder, tokenizer = _read_text(out)
    colours = list(COLOURS) * 8
    shapes = ["circle", "square"] * 16
    prompts = [prompt(colour, shape, "left", "grey") for colour, shape in zip(colours, shapes, strict=True)]
    text, null = (encode_captions(encoder, tokenizer, captions) for captions in (prompts, [""]))
    pictures = sample_pictures(model, vae, text, null, MEASURE_SEED)
    frames = ((pictures + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    seen = [classify(frame[None]).colour for frame in frames]
    return {"colour": float(np.mean([a == b for a, b in zip(seen, colours, strict=True)])), "pictures": len(seen)}


def _part(out: Path, name: str) -> Path:
    if not (out / name).is_dir():
        raise UserError(f"{out / name} is missing", where="make_assets", remedy="make that part first, see --help")
    return out / name


def _read_text(out: Path) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    encoder = CLIPTextModelWithProjection.from_pretrained(_part(out, "image_model/text_encoder"), dtype=torch.float32)
    return encoder.eval(), CLIPTokenizer.from_pretrained(_part(out, "image_model/tokenizer"))


def _read_reward(out: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    folder = _part(out, "reward")
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """Runs one part; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m contentv.demo.make_assets", description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the models (default: the package's own)")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--speed", type=float, default=1.0, help="multiplies the training times")
    parser.add_argument("--json", type=Path, help="file for the facts of `measure`")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # at these widths more threads cost more than they give
    cv2.setNumThreads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.part == "measure":
            text = json.dumps(measure(args.out), indent=2)
            get_logger().info(text)
            if args.json:
                args.json.write_text(text + "\n", encoding="utf-8")
        else:
            {"vae": make_vae, "text": make_text, "reward": make_reward, "image_model": make_image_model}[args.part](
                args.out, args.speed
            )
    except UserError as error:
        get_logger().error(str(error))
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
