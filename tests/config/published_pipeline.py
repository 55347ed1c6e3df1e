"""A pipeline folder of the published widths, and stand-ins for the published classes, written from their description.

The transformer takes six arguments and sets the rest itself; the pipeline has nine parts, a Wan VAE among them, and no
image encoder. Its modules can be called what the published ones are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from contentv.models.mmdit import MMDiTConfig

SHAPE = MMDiTConfig(num_layers=2, num_attention_heads=2, attention_head_dim=16)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ARGUMENTS = ("in_channels", "out_channels", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim")


class SD3Transformer3DModel(SD3Transformer2DModel):
    """diffusers' class without a table of positions, of the published widths."""

    def __init__(
        self, in_channels: int = 16, out_channels: int = 16, patch_size: int = 2, num_layers: int = 38,
        num_attention_heads: int = 38, attention_head_dim: int = 64,
    ) -> None:  # fmt: skip
        width = num_attention_heads * attention_head_dim
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, patch_size=patch_size, num_layers=num_layers,
            num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim,
            caption_projection_dim=width, pos_embed_max_size=192, qk_norm="rms_norm",
        )  # fmt: skip
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)


class ContentVPipeline(StableDiffusion3Pipeline):
    """The parts and how they are given; sampling is not stood in for."""

    def __init__(
        self, transformer: SD3Transformer3DModel, scheduler: FlowMatchEulerDiscreteScheduler, vae: AutoencoderKLWan,
        text_encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection, tokenizer_2: CLIPTokenizer, text_encoder_3: T5EncoderModel,
        tokenizer_3: T5TokenizerFast,
    ) -> None:  # fmt: skip
        parts = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.register_modules(**parts)
        self.tokenizer_max_length = self.tokenizer.model_max_length


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the stand-ins importable under the published names."""
    for name, kind in (("contentv_transformer", SD3Transformer3DModel), ("contentv_pipeline", ContentVPipeline)):
        module: Any = ModuleType(name)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)


def write_encoders(folder: Path) -> None:
    """Writes two CLIP models and T5 of the published output widths, tiny inside, the tokenizers beside them."""
    for suffix, projection in (("", 768), ("_2", 1280)):
        pieces = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = folder / f"tokenizer{suffix}"
        tokenizer.mkdir(parents=True)
        (tokenizer / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
        (tokenizer / "merges.txt").write_text("#version: 0.2\n")
        config = {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        }  # fmt: skip
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
        torch.manual_seed(projection)
        clip = CLIPTextConfig(
            vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=projection, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1,
        )  # fmt: skip
        CLIPTextModelWithProjection(clip).save_pretrained(folder / f"text_encoder{suffix}")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((x, -4.0) for x in LETTERS)]
    T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer_3")
    t5 = T5Config(vocab_size=len(words), d_model=4096, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(t5).to(torch.bfloat16).save_pretrained(folder / "text_encoder_3", max_shard_size="200KB")
