"""Trains the demo's small CLIP: its tokenizer, and a text encoder that also tells directions apart.

The text tower is trained twice over: against first frames (contrastively) and against linear read-outs of every word
that matters, because no single frame says where an object is going. The reward model goes on from there with preference
pairs: a picture against the same picture made worse, and against one with another colour than the caption's.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from contentv.base.log import get_logger
from contentv.curation.synth_captions import caption_of, every_caption
from contentv.curation.synth_world import COLOURS, DIRECTIONS, SHADES, SHAPES, STILL, ClipSpec, render_clip, sample_spec

MAX_TOKENS = 24
WIDTH = 64
SIDE_PX = 64
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
START, END = "<|startoftext|>", "<|endoftext|>"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": (*DIRECTIONS, STILL, "unsaid"),
    "shade": (*SHADES, "unsaid"),
}


@dataclass
class TextTraining:
    """How the CLIP parts are trained: wall time of the two phases in minutes, learning rate, batch, seed."""

    contrast_minutes: float = 5.0
    preference_minutes: float = 5.0
    lr: float = 1e-3
    batch: int = 48
    scenes: int = 3000
    seed: int = 0


def new_tokenizer() -> CLIPTokenizer:
    """Returns a CLIP tokenizer whose byte-pair merges are learnt from the grammar's captions; it can spell any text."""
    plain = CLIPTokenizer()  # brings CLIP's own normalisation and splitting
    trainee = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainee.normalizer = plain.backend_tokenizer.normalizer
    trainee.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False, special_tokens=[])
    trainee.train_from_iterator(every_caption(), trainer)
    merges = [tuple(pair) for pair in json.loads(trainee.to_str())["model"]["merges"]]
    letters = sorted(_byte_letters())
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    words = list(dict.fromkeys([*vocabulary, START, END]))
    numbers = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=MAX_TOKENS)


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE has for bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns an untrained CLIP of two layers a tower, width 64."""
    tower = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }  # fmt: skip
    text = {
        **tower, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**tower, "image_size": SIDE_PX, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Returns token ids (n, MAX_TOKENS), padded and cut."""
    ids = tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return torch.as_tensor(ids)


def attributes_of(spec: ClipSpec, caption: str) -> dict[str, int]:
    """Returns the class number of each attribute as far as the caption says it."""
    words = set(caption.replace(",", " ").split())
    shade = spec.shade if spec.shade in words else "unsaid"
    direction = STILL if spec.is_still else spec.direction
    if direction not in words and not spec.is_still:
        direction = "unsaid"
    if spec.is_still and caption == caption_of(spec, picture=True):
        direction = "unsaid"
    said = {"colour": spec.colour, "shape": spec.shape, "direction": direction, "shade": shade}
    return {name: ATTRIBUTES[name].index(value) for name, value in said.items()}


def to_unit(pictures: list[np.ndarray]) -> Float[Tensor, "b 3 H W"]:
    """Returns uint8 pictures (H, W, 3) as one tensor in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def score(clip: CLIPModel, frames: Float[Tensor, "b 3 H W"], ids: Tensor) -> Float[Tensor, " b"]:
    """Returns logit_scale * cos(picture, caption) of each row."""
    picture, text = embed(clip, frames, ids)
    return clip.logit_scale.exp() * (picture * text).sum(-1)


def embed(clip: CLIPModel, frames: Float[Tensor, "b 3 H W"], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the unit embeddings of pictures in [-1, 1] and of captions."""
    if frames.shape[-1] != SIDE_PX:
        frames = F.interpolate(frames, (SIDE_PX, SIDE_PX), mode="bicubic", antialias=True, align_corners=False)
    pixels = ((frames + 1.0) / 2.0 - frames.new_tensor(MEAN).view(3, 1, 1)) / frames.new_tensor(STD).view(3, 1, 1)
    picture = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    text = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    return F.normalize(picture, dim=-1), F.normalize(text, dim=-1)


class ReadOut(nn.Module):
    """Linear probes of every attribute on the pooled vector and on the mean penultimate state; thrown away later."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in ATTRIBUTES.items()})
        self.token_heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, clip: CLIPModel, ids: Tensor, said: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the probes' cross entropy and the share of attributes that the pooled probes read right."""
        output = clip.text_model(input_ids=ids, output_hidden_states=True)
        pooled, states = clip.text_projection(output.pooler_output), output.hidden_states[-2].mean(1)
        loss, right = pooled.new_zeros(()), pooled.new_zeros(())
        for name, target in said.items():
            logits = self.heads[name](pooled)
            loss = loss + F.cross_entropy(logits, target) + F.cross_entropy(self.token_heads[name](states), target)
            right = right + (logits.argmax(-1) == target).float().mean() / len(said)
        return loss, right


@dataclass(frozen=True)
class Sheet:
    """Scenes: one frame of each, the same in a wrong colour, token ids, and what pictures show and captions say."""

    frames: Float[Tensor, "b 3 H W"]
    recoloured: Float[Tensor, "b 3 H W"]
    ids: Int[Tensor, "b l"]
    shown: dict[str, Tensor]
    said: dict[str, Tensor]

    def pick(self, rng: np.random.Generator, n: int) -> Sheet:
        """Returns `n` random rows."""
        rows = torch.from_numpy(rng.integers(0, len(self.frames), n))
        shown, said = ({name: values[rows] for name, values in table.items()} for table in (self.shown, self.said))
        return Sheet(self.frames[rows], self.recoloured[rows], self.ids[rows], shown, said)


def draw_sheet(rng: np.random.Generator, tokenizer: CLIPTokenizer, n: int) -> Sheet:
    """Returns `n` fresh scenes with any of their frames: most moving, the rest standing or mere pictures."""
    pictures, others, captions, said, shown = [], [], [], [], []
    for _ in range(n):
        kind = rng.random()
        spec = sample_spec(rng, variant="static" if kind < 0.12 else "clean")
        caption = caption_of(spec, picture=kind > 0.85)
        spec_then = dataclasses.replace(spec, start=spec.centre(int(rng.integers(0, 17))))
        other = str(rng.choice([colour for colour in COLOURS if colour != spec.colour]))
        pictures.append(render_clip(spec_then, 1, SIDE_PX)[0])
        others.append(render_clip(dataclasses.replace(spec_then, colour=other), 1, SIDE_PX)[0])
        captions.append(caption)
        said.append(attributes_of(spec, caption))
        shown.append({name: ATTRIBUTES[name].index(getattr(spec, name)) for name in ("colour", "shape", "shade")})
    tables = [{name: torch.tensor([row[name] for row in rows]) for name in rows[0]} for rows in (shown, said)]
    return Sheet(to_unit(pictures), to_unit(others), tokenize(tokenizer, captions), *tables)


def agreement(sheet: Sheet) -> Bool[Tensor, "b b"]:
    """Returns whether caption j is true of picture i: rows are pictures."""
    fits = torch.ones(len(sheet.frames), len(sheet.frames), dtype=torch.bool)
    for name, values in sheet.shown.items():
        said = sheet.said[name][None, :]
        unsaid = (
            said == ATTRIBUTES[name].index("unsaid") if "unsaid" in ATTRIBUTES[name] else torch.zeros_like(said).bool()
        )
        fits &= (values[:, None] == said) | unsaid
    return fits


def contrastive_loss(clip: CLIPModel, sheet: Sheet) -> tuple[Tensor, Tensor]:
    """Returns the loss with several true captions per picture, and how often the best caption is a true one."""
    picture, text = embed(clip, sheet.frames, sheet.ids)
    logits = clip.logit_scale.exp() * picture @ text.T
    fits = agreement(sheet)
    loss = logits.new_zeros(())
    for table, true in ((logits, fits), (logits.T, fits.T)):
        among = table.masked_fill(~true, float("-inf")).logsumexp(1)
        loss = loss + (table.logsumexp(1) - among).mean()
    right = fits.gather(1, logits.argmax(1, keepdim=True)).float().mean()
    return loss, right


def train_text(config: TextTraining) -> tuple[CLIPTokenizer, CLIPModel, dict[str, float]]:
    """Trains both towers on captions and frames; returns the tokenizer, the CLIP and the accuracies reached."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    tokenizer = new_tokenizer()
    clip, probes = new_clip(tokenizer), ReadOut()
    parameters = [*clip.parameters(), *probes.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    scenes = draw_sheet(rng, tokenizer, config.scenes)
    started, step, facts = time.monotonic(), 0, {"probe_accuracy": 0.0, "contrastive_accuracy": 0.0}
    while (share := (time.monotonic() - started) / 60.0 / config.contrast_minutes) < 1.0:
        set_rate(optimizer, config.lr * min(1.0, (step + 1) / 50) * (1.02 - share))
        sheet = scenes.pick(rng, config.batch)
        contrast, right = contrastive_loss(clip, sheet)
        reading, read = probes(clip, sheet.ids, sheet.said)
        descend(optimizer, contrast + 0.5 * reading, parameters)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=float(np.log(30.0)))
        step += 1
        facts = {
            "probe_accuracy": 0.95 * facts["probe_accuracy"] + 0.05 * float(read),
            "contrastive_accuracy": 0.95 * facts["contrastive_accuracy"] + 0.05 * float(right),
        }
        if step % 50 == 0:
            get_logger().info(f"text step {step} share {share:.2f} {facts}")
    return tokenizer, clip, {**facts, "steps": float(step)}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """Takes one optimiser step with gradients clipped at norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the tokenizer with vocab.json and merges.txt beside tokenizer.json, as published folders have."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def write_text_encoder(clip: CLIPModel, folder: Path) -> None:
    """Writes the text tower as a CLIPTextModelWithProjection in fp16."""
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    encoder.half().save_pretrained(folder)
