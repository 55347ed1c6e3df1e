"""`python -m contentv.config.figures` rewrites the tables of docs/model.md, made from the cost formulas.

A table stands between `<!-- NAME -->` and `<!-- end -->`; all else of the page is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf

import contentv
from contentv.base.types import Bucket, TokenCounts
from contentv.config.compose import config_dir
from contentv.models.cost import (
    RECOMPUTES,
    activation_bytes,
    activation_bytes_per_block,
    flops_per_step,
    parameter_count,
    weight_bytes,
)
from contentv.models.mmdit import MMDiTConfig, flops_per_forward

PAGE = Path(contentv.__file__).resolve().parent.parent / "docs" / "model.md"
TEXT_TOKENS = 333
CLIPS = (
    Bucket(1, 256, 256),
    Bucket(1, 512, 512),
    Bucket(1, 1024, 1024),
    Bucket(125, 240, 432),
    Bucket(29, 432, 768),
    Bucket(125, 432, 768),
)


def shape_of(name: str) -> MMDiTConfig:
    """Returns the model of a file of conf/model."""
    return OmegaConf.to_object(OmegaConf.merge(MMDiTConfig, OmegaConf.load(config_dir() / "model" / f"{name}.yaml")))  # type: ignore[return-value]


def tokens_of(clip: Bucket) -> TokenCounts:
    """Returns a clip's tokens with the published VAE (1/4 of the frames, 1/8 of the sides) and patches of 2."""
    return TokenCounts(((clip.frames - 1) // 4 + 1) * (clip.height // 16) * (clip.width // 16), TEXT_TOKENS)


def weights_table() -> str:
    """Returns the table of the models' weights."""
    lines = ["| `model=` | parameters | bf16 | fp32 | training state, 16 bytes each |", "|---|---|---|---|---|"]
    for name in ("contentv_8b", "small", "tiny"):
        config = shape_of(name)
        cells = [f"`{name}`", f"{parameter_count(config):,}"]
        cells += [in_gib(weight_bytes(config, dtype)) for dtype in (torch.bfloat16, torch.float32)]
        lines.append(_line([*cells, in_gib(16 * parameter_count(config))]))
    return "\n".join(lines)


def operations_table() -> str:
    """Returns the table of operations of the 8B model, per sample."""
    lines = [
        "| clip | video tokens | forward | of it attention | training step | recompute selective | recompute full |",
        "|---|---|---|---|---|---|---|",
    ]
    config = MMDiTConfig()
    for clip in CLIPS:
        tokens = tokens_of(clip)
        forward = flops_per_forward(config, tokens)
        attention = config.num_layers * 4 * sum(tokens) ** 2 * config.inner_dim
        steps = [f"{flops_per_step(config, tokens, recompute) / 1e15:.3f}" for recompute in RECOMPUTES]
        cells = [clip_name(clip), f"{tokens.video:,}", f"{forward / 1e15:.3f}", f"{attention / forward:.0%}", *steps]
        lines.append(_line(cells))
    return "\n".join(lines)


def memory_table() -> str:
    """Returns the table of bytes that the 8B model keeps for the backward pass, per sample, bf16."""
    lines = [
        "| clip | tokens | one layer | all, recompute none | selective | full |",
        "|---|---|---|---|---|---|",
    ]
    config = MMDiTConfig()
    for clip in CLIPS:
        tokens = tokens_of(clip)
        layer = activation_bytes_per_block(config, tokens, torch.bfloat16)
        whole = [in_gib(activation_bytes(config, tokens, torch.bfloat16, recompute)) for recompute in RECOMPUTES]
        lines.append(_line([clip_name(clip), f"{sum(tokens):,}", in_gib(layer), *whole]))
    return "\n".join(lines)


TABLES = {"weights": weights_table, "operations": operations_table, "memory": memory_table}


def filled(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """Returns a page with its tables made anew.

    Args:
        text: the page.
        tables: what makes each of its tables, by the name in its `<!-- NAME -->`.

    Raises:
        ValueError: a table has no place in the page.
    """
    for name, make in tables.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        if found is None:
            raise ValueError(f"the page has no place for the table <!-- {name} -->")
        text = f"{text[: found.start(1)]}{make()}\n{text[found.end(1) :]}"
    return text


def clip_name(clip: Bucket) -> str:
    """Returns what a reader calls a clip."""
    return f"{clip.height} x {clip.width}" + (" image" if clip.frames == 1 else f", {clip.frames} frames")


def in_gib(size_bytes: int) -> str:
    """Returns bytes in GiB, in three digits."""
    return f"{size_bytes / 2**30:.3g} GiB"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
