"""Our sampler against diffusers' Stable Diffusion 3 pipeline and scheduler: same weights, prompts and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_pipeline import ASSETS
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from contentv.config.prompts import Prompt
from contentv.config.sampling import Sampler, Texts, build_sampler, encode_prompts
from contentv.config.sampling_inputs import open_inputs
from contentv.config.schema import SampleConfig, VAEConfig
from contentv.diffusion.solver import euler_sigmas
from contentv.models.io import write_transformer
from contentv.models.mmdit import MMDiTConfig
from contentv.parallel.mesh import single_process_mesh

STEPS, SHIFT, GUIDANCE, SIDE_PX = 6, 3.0, 6.0, 64
CPU = torch.device("cpu")
CONFIG = MMDiTConfig(
    num_layers=3, num_attention_heads=4, attention_head_dim=16, joint_attention_dim=48, pooled_projection_dim=20
)
PROMPTS = [
    Prompt("a red square moves left", "overexposed, low quality", 4, 0, "a"),
    Prompt("blue", "bad hands", 4, 1, "b"),
]
Parity = Callable[[str, str, float, float], None]


def make_clip(folder: Path, suffix: str, width: int, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "image_model" / "tokenizer")
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, projection_dim=width // 2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")


def make_t5(folder: Path, width: int) -> None:
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,"]
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer_3")
    torch.manual_seed(3)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")


@dataclass(frozen=True)
class Pair:
    """The same pipeline twice."""

    theirs: StableDiffusion3Pipeline
    folder: Path

    def ours(self, frames: int = 1, **values: object) -> tuple[Sampler, Texts]:
        """Our sampler of one resolution, and the prompts' encodings."""
        config = SampleConfig(
            checkpoint=str(self.folder), frames=frames, height=SIDE_PX, width=SIDE_PX, steps=STEPS, device="cpu",
            guidance_scale=GUIDANCE, vae=VAEConfig(path=str(ASSETS / "vae")), **values,
        )  # fmt: skip
        inputs = open_inputs(config)
        assert inputs.shift == SHIFT  # from the scheduler's folder
        captions = [caption for prompt in PROMPTS for caption in (prompt.text, prompt.negative)]
        texts = encode_prompts(inputs, captions, CPU, torch.float32)
        return build_sampler(inputs, config, CPU, single_process_mesh()), texts


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("parity")
    make_clip(folder, "", 16, 1)
    make_clip(folder, "_2", 24, 2)
    make_t5(folder, CONFIG.joint_attention_dim)
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE_PX // 8, pos_embed_max_size=12, num_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_attention_heads, attention_head_dim=CONFIG.attention_head_dim,
        in_channels=16, out_channels=16, joint_attention_dim=CONFIG.joint_attention_dim,
        caption_projection_dim=CONFIG.inner_dim, pooled_projection_dim=CONFIG.pooled_projection_dim,
        qk_norm="rms_norm",
    )  # fmt: skip
    state = {name: value for name, value in transformer.state_dict().items() if name != "pos_embed.pos_embed"}
    write_transformer(state, folder / "transformer", CONFIG)
    parts = {
        f"text_encoder{s}": (T5EncoderModel if s == "_3" else CLIPTextModelWithProjection).from_pretrained(
            folder / f"text_encoder{s}"
        )
        for s in ("", "_2", "_3")
    }
    tokenizers = {f"tokenizer{s}": AutoTokenizer.from_pretrained(folder / f"tokenizer{s}") for s in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    theirs = StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=scheduler, vae=None, **parts, **tokenizers
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    return Pair(theirs, folder)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("guidance", ["two_pass", "batched"])
def test_one_frame_equals_diffusers_pipeline(pair: Pair, guidance: str, parity: Parity) -> None:
    sampler, texts = pair.ours(guidance=guidance)
    side = SIDE_PX // 8 // CONFIG.patch_size
    table = pair.theirs.transformer.pos_embed.cropped_pos_embed(SIDE_PX // 8, SIDE_PX // 8)[0]
    assert table.shape[0] == side * side
    sampler.model.positions = lambda t, h, w, dim: table
    expected = pair.theirs(
        prompt=[p.text for p in PROMPTS], negative_prompt=[p.negative for p in PROMPTS], guidance_scale=GUIDANCE,
        height=SIDE_PX, width=SIDE_PX, num_inference_steps=STEPS, sigmas=np.linspace(1, 0, STEPS + 1)[:-1].tolist(),
        latents=sampler.noise(PROMPTS)[:, :, 0], output_type="latent", return_dict=False,
    )[0][:, :, None]  # fmt: skip
    found = sampler.latents(PROMPTS, texts)
    what = f"sampled latents, one frame, {STEPS} steps, {guidance.replace('_', ' ')} guidance, fp32"
    parity(what, "diffusers StableDiffusion3Pipeline", relative(found, expected), 1e-5)


def test_several_frames_equal_a_loop_over_diffusers_scheduler(pair: Pair, parity: Parity) -> None:
    """The published video pipeline's loop: two passes a step, its sigmas, the scheduler's steps."""
    sampler, texts = pair.ours(frames=9)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pair.folder / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, STEPS + 1)[:-1])
    x = sampler.noise(PROMPTS)
    assert x.shape[2] == 3
    with torch.no_grad():
        for t in scheduler.timesteps:
            v, u = (
                sampler.model(x, t.expand(2), torch.cat([y.tokens for y in rows]), torch.cat([y.pooled for y in rows]))
                for rows in ([texts[p.text] for p in PROMPTS], [texts[p.negative] for p in PROMPTS])
            )
            x = scheduler.step(u + GUIDANCE * (v - u), t, x, return_dict=False)[0]
    error = relative(sampler.latents(PROMPTS, texts), x)
    what = f"sampled latents, 3 latent frames, {STEPS} steps, guidance, fp32"
    parity(what, "diffusers FlowMatchEulerDiscreteScheduler", error, 1e-5)


def test_which_schedule_it_is() -> None:
    """The published pipeline passes sigmas; without them diffusers takes others, which `sample` does not use."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(50)
    ours = euler_sigmas(50, SHIFT)
    assert float((scheduler.sigmas - ours).abs().max()) > 1e-3
    # Those end at the shifted 1/1000 and are shifted once more.
    low = SHIFT * 0.001 / (1 + (SHIFT - 1) * 0.001)
    even = torch.linspace(1, low, 50, dtype=torch.float64)
    expected = SHIFT * even / (1 + (SHIFT - 1) * even)
    assert float((scheduler.sigmas[:-1] - expected).abs().max()) < 1e-6
