"""The text encoders against diffusers' SD3 pipeline, on tiny random models and real tokenizer files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.models.mmdit import MMDiTConfig
from contentv.models.text import Encoder, TextStack

Parity = Callable[[str, str, float, float], None]
PIPELINE = "diffusers StableDiffusion3Pipeline.encode_prompt"
CAPTIONS = ["a red square moves left", "", "blue"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_clip_tokenizer(folder: Path, max_length: int, pad: str) -> int:
    """Byte-level letters and a few merges, in the files that the published models come with."""
    merges = ["r e", "re d</w>", "l e", "b l"]
    pieces = [*LETTERS, "!", *(f"{x}</w>" for x in LETTERS), "!</w>", *(m.replace(" ", "") for m in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def write_clip(folder: Path, number: int, width: int, max_length: int = 77) -> None:
    suffix = "" if number == 1 else f"_{number}"
    pad = "<|endoftext|>" if number == 1 else "!"
    size = write_clip_tokenizer(folder / f"tokenizer{suffix}", max_length, pad)
    torch.manual_seed(number)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        projection_dim=width // 2,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")


def write_t5(folder: Path, width: int) -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((x, -4.0) for x in LETTERS), ("▁red", -3.0)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder / "tokenizer_3")
    torch.manual_seed(3)
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=40, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    write_clip(path, 1, 16)
    write_clip(path, 2, 24)
    write_t5(path, 48)
    return path


@pytest.fixture(scope="module")
def stack(folder: Path) -> TextStack:
    return TextStack.from_folder(folder)


def published_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            num_layers=1,
            num_attention_heads=1,
            attention_head_dim=16,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            pos_embed_max_size=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        text_encoder_3=T5EncoderModel.from_pretrained(folder / "text_encoder_3"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer_3=AutoTokenizer.from_pretrained(folder / "tokenizer_3"),
    )


def furthest(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).abs().max() / truth.double().abs().max())


@pytest.mark.parametrize("length", ["short", "too_long"])
def test_equals_the_published_pipeline(length: str, folder: Path, stack: TextStack, parity: Parity) -> None:
    captions = CAPTIONS if length == "short" else [" ".join(["red blue"] * 60), " ".join(["a"] * 300)]
    with torch.no_grad():
        tokens, negative, pooled, negative_pooled = published_pipeline(folder).encode_prompt(
            captions, None, None, device=torch.device("cpu"), do_classifier_free_guidance=True, max_sequence_length=256
        )
    text = stack.encode(captions)
    count = len(captions)
    assert text.tokens.shape == (count, 333, 48) == (count, stack.num_tokens, stack.token_width)
    assert text.pooled.shape == (count, 20) == (count, stack.pooled_width)
    parity(f"TextStack, tokens of {length} captions", PIPELINE, furthest(text.tokens, tokens), 0.0)
    parity(f"TextStack, pooled vector of {length} captions", PIPELINE, furthest(text.pooled, pooled), 0.0)
    empty = stack.encode([""] * count)
    parity("TextStack, tokens of the empty caption", f"{PIPELINE}, negative", furthest(empty.tokens, negative), 0.0)
    parity(
        "TextStack, pooled vector of the empty caption",
        f"{PIPELINE}, negative",
        furthest(empty.pooled, negative_pooled),
        0.0,
    )
    assert not torch.allclose(text.tokens[0], text.tokens[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bf16_equals_the_published_pipeline(dtype: torch.dtype, folder: Path, parity: Parity) -> None:
    pipeline = published_pipeline(folder)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        encoder.to(dtype)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, None, None, device=torch.device("cpu"), do_classifier_free_guidance=False, max_sequence_length=256
        )
    text = TextStack.from_folder(folder, dtype).encode(CAPTIONS)
    assert text.tokens.dtype == text.pooled.dtype == tokens.dtype == dtype
    parity("TextStack, tokens, bf16", PIPELINE, furthest(text.tokens, tokens), 0.0)
    parity("TextStack, pooled vector, bf16", PIPELINE, furthest(text.pooled, pooled), 0.0)


def test_the_layout_of_the_sequence_part_by_part(folder: Path, stack: TextStack) -> None:
    """What the published model was trained with, stated without the pipeline: each part from its encoder alone."""
    tokens = stack.encode(["red"]).tokens
    first, width = 0, 48
    for number, channels in ((1, 16), (2, 24)):
        suffix = "" if number == 1 else f"_{number}"
        model = CLIPTextModelWithProjection.from_pretrained(folder / f"text_encoder{suffix}")
        tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
        read = tokenizer(["red"], padding="max_length", max_length=77, return_tensors="pt")
        assert read.attention_mask.sum() == 3  # begin, red, end: all else is padding
        with torch.no_grad():
            states = model(read.input_ids, output_hidden_states=True).hidden_states
        part = tokens[:, :77, first : first + channels]
        assert len(states) == 4  # the embeddings and three layers: the second last is layer 2's
        assert torch.equal(part, states[2])
        assert not torch.allclose(part, states[3], atol=1e-3)
        assert part[0, 3:].abs().max() > 0  # padding has states of its own
        first += channels
    assert tokens[:, :77, first:width].abs().max() == 0  # zeros up to T5's width

    model = T5EncoderModel.from_pretrained(folder / "text_encoder_3")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_3")
    read = tokenizer(["red"], padding="max_length", max_length=256, return_tensors="pt")
    with torch.no_grad():
        free = model(read.input_ids)[0]
        masked = model(read.input_ids, attention_mask=read.attention_mask)[0]
    real = int(read.attention_mask.sum())
    assert torch.equal(tokens[:, 77:], free)
    # Without a mask padding is attended to: it changes the states of the real tokens, and is itself part of the text.
    assert not torch.allclose(free[:, :real], masked[:, :real], atol=1e-3)


# hidden size, projection, layers, heads, feed-forward, activation: of the encoders that SD3.5-Large comes with
CLIP_L = (768, 768, 12, 12, 3072, "quick_gelu")
CLIP_BIG_G = (1280, 1280, 32, 20, 5120, "gelu")


def test_the_published_encoders_give_333_tokens_of_4096_and_2048_pooled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextStack, "_take_fingerprint", lambda self, encoders: "")  # the meta device has no values
    encoders = []
    with torch.device("meta"):
        for (width, projection, layers, heads, hidden, activation), number in ((CLIP_L, ""), (CLIP_BIG_G, "_2")):
            config = CLIPTextConfig(
                hidden_size=width,
                projection_dim=projection,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=hidden,
                hidden_act=activation,
                eos_token_id=2,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer{number}")
            encoders.append(Encoder(CLIPTextModelWithProjection(config), tokenizer))
        config = T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        encoders.append(Encoder(T5EncoderModel(config), AutoTokenizer.from_pretrained(folder / "tokenizer_3")))
    millions = [sum(p.numel() for p in encoder.model.parameters()) / 1e6 for encoder in encoders]
    for found, published in zip(millions, (123.65, 694.66, 4762.3), strict=True):
        assert found == pytest.approx(published, abs=0.05)
    stack = TextStack(encoders[:2], encoders[2])
    assert (stack.num_tokens, stack.token_width, stack.pooled_width) == (333, 4096, 2048)
    text = stack.encode(["red", ""])
    assert text.tokens.shape == (2, 333, 4096)
    assert text.pooled.shape == (2, 2048)
    config = MMDiTConfig()
    assert (config.joint_attention_dim, config.pooled_projection_dim) == (4096, 2048)


def test_one_clip_without_t5(tmp_path: Path) -> None:
    write_clip(tmp_path, 1, 16, max_length=12)
    stack = TextStack.from_folder(tmp_path)
    assert (stack.num_tokens, stack.token_width, stack.pooled_width) == (12, 16, 8)
    text = stack.encode(["red"])
    assert text.tokens.shape == (1, 12, 16)
    wide = TextStack.from_folder(tmp_path, token_width=20).encode(["red"])
    assert torch.equal(wide.tokens[..., :16], text.tokens)
    assert wide.tokens[..., 16:].abs().max() == 0
    with pytest.raises(UserError, match="CLIP states of 16"):
        TextStack.from_folder(tmp_path, token_width=8)


def test_a_caption_does_not_depend_on_its_batch(stack: TextStack) -> None:
    together, alone = stack.encode(CAPTIONS), stack.encode(CAPTIONS[:1])
    assert torch.allclose(together.tokens[:1], alone.tokens, atol=1e-5)
    assert torch.allclose(together.pooled[:1], alone.pooled, atol=1e-5)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    yield found
    get_logger().removeHandler(handler)


def test_warns_with_the_text_that_no_encoder_reads(tmp_path: Path, stack: TextStack, messages: list[str]) -> None:
    write_clip(tmp_path, 1, 16, max_length=6)
    short = TextStack.from_folder(tmp_path)
    short.encode(["red red red red"])
    assert messages == []
    short.encode(["red red red red le bl"])
    assert messages == ['WARNING caption too long for the text encoders, not read: "le bl"']
    messages.clear()
    short.encode(["red " * 9] * 40)
    assert len(messages) == 19 + 1  # twenty shown in all, then one that says so
    short.encode(["red " * 9] * 40)
    assert len(messages) == 20
    messages.clear()
    stack.encode([" ".join(["red"] * 100)])  # too long for CLIP, T5 reads it
    assert [m for m in messages if m.startswith("WARNING")] == []
    stack.encode([" ".join(["red"] * 257)])
    assert len([m for m in messages if m.startswith("WARNING") and "not read" in m]) == 1


def test_fingerprint_tells_encoders_apart(folder: Path, stack: TextStack, tmp_path: Path) -> None:
    assert TextStack.from_folder(folder, torch.bfloat16).fingerprint == stack.fingerprint
    assert TextStack.from_folder(folder, max_t5_tokens=128).fingerprint != stack.fingerprint
    write_clip(tmp_path, 1, 16)
    one = TextStack.from_folder(tmp_path)
    again = TextStack.from_folder(tmp_path)
    assert one.fingerprint == again.fingerprint != stack.fingerprint
    vocabulary = json.loads((tmp_path / "tokenizer/vocab.json").read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    assert TextStack.from_folder(tmp_path).fingerprint != one.fingerprint


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text_encoder folder"):
        TextStack.from_folder(tmp_path)
    write_clip(tmp_path, 1, 16)
    (tmp_path / "text_encoder/model.safetensors").rename(tmp_path / "text_encoder/pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        TextStack.from_folder(tmp_path)


def test_t5_in_float16_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="float16"):
        TextStack.from_folder(folder, torch.float16)
