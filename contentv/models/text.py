"""The text encoders of SD3: one or two CLIP text models and, optionally, T5, read from a diffusers folder.

A caption becomes a sequence (the CLIP models' second-last states side by side, padded with zeros to the width of T5,
then T5's states behind them) and one pooled vector (the CLIP models' projections side by side). With the published
encoders: 77 + 256 = 333 tokens of 4096, and 2048. Padding tokens are kept: the transformer attends to them too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from contentv.base.errors import UserError
from contentv.base.log import get_logger, log_once
from contentv.base.types import TextCond
from contentv.models.folders import fingerprint

# A bar for every encoder that is read would tear the training's own progress bar.
disable_progress_bar()

CLIP_FOLDERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
T5_FOLDERS = ("text_encoder_3", "tokenizer_3")
WARNINGS = 20  # cut captions shown before falling silent
PROBED_ELEMENTS = 4096  # values of each weight that the fingerprint reads: T5-XXL has 4.8 billion


class Encoder(NamedTuple):
    """A text model and the tokenizer that belongs to it."""

    model: Any
    tokenizer: Any


class TextStack(nn.Module):
    """Frozen text encoders that turn captions into what the transformer is conditioned on.

    Args:
        clips: one or two CLIP text models with projection.
        t5: the T5 encoder; None leaves its tokens out.
        max_t5_tokens: tokens that T5 reads; shorter captions are padded.
        token_width: channels to pad the tokens to when there is no T5; None takes the width of the CLIP states.

    Attributes:
        max_clip_tokens: tokens that the CLIP models read.
        token_width, pooled_width, num_tokens: shapes of the result: tokens (b, num_tokens, token_width), pooled
            (b, pooled_width).
        fingerprint: xxh128 over tokenizers, configs and 4096 values of every weight, as hexadecimal digits.

    Raises:
        UserError: no CLIP model, or widths that do not fit.
    """

    def __init__(
        self, clips: list[Encoder], t5: Encoder | None = None, max_t5_tokens: int = 256, token_width: int | None = None
    ) -> None:
        super().__init__()
        if not clips:
            raise UserError("no CLIP text encoder: the pooled vector comes from it", where="text encoders")
        self.clips = nn.ModuleList(encoder.model for encoder in clips)
        self.t5: Any = None if t5 is None else t5.model
        self.eval().requires_grad_(False)
        self.clip_tokenizers = [encoder.tokenizer for encoder in clips]
        self.t5_tokenizer = None if t5 is None else t5.tokenizer

        configs = [encoder.model.config for encoder in clips]
        self.max_clip_tokens = min(
            *(int(c.max_position_embeddings) for c in configs), int(clips[0].tokenizer.model_max_length)
        )
        self.max_t5_tokens = max_t5_tokens
        self.num_tokens = self.max_clip_tokens + (0 if t5 is None else max_t5_tokens)
        self.pooled_width = sum(int(c.projection_dim) for c in configs)
        clip_width = sum(int(c.hidden_size) for c in configs)
        wanted = clip_width if token_width is None else token_width
        self.token_width = wanted if t5 is None else int(t5.model.config.d_model)
        if self.token_width < clip_width or (token_width is not None and self.token_width != token_width):
            raise UserError(
                f"tokens of {self.token_width} channels (asked for: {token_width}), CLIP states of {clip_width}",
                where="text encoders",
                remedy="use encoders that belong together: T5 must be at least as wide as the CLIP models side by side",
            )
        self.fingerprint = self._take_fingerprint([*clips, *([] if t5 is None else [t5])])
        self._warnings_left = WARNINGS

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = torch.float32,
        *,
        max_t5_tokens: int = 256,
        token_width: int | None = None,
    ) -> TextStack:
        """Returns the encoders that `path` has, on the CPU: text_encoder, text_encoder_2 (CLIP), text_encoder_3 (T5).

        Args:
            path: a diffusers model folder; tokenizer, tokenizer_2, tokenizer_3 lie beside the encoders.
            dtype: to compute in; T5 overflows in float16. None leaves the weights as they are stored, and where: what
                is not read costs no memory.
            max_t5_tokens, token_width: see the class.

        Raises:
            UserError: an encoder is incomplete or damaged, there is none, or T5 is asked for in float16.
        """
        root = Path(path)
        clips = [
            _read_encoder(CLIPTextModelWithProjection, root / model, root / tokenizer)
            for model, tokenizer in CLIP_FOLDERS
            if (root / model).is_dir()
        ]
        if not clips:
            raise UserError(
                "no text_encoder folder",
                where=str(root),
                remedy="give the folder that holds text_encoder and tokenizer",
            )
        t5 = None
        if (root / T5_FOLDERS[0]).is_dir():
            if dtype == torch.float16:
                raise UserError("T5 overflows in float16", where=str(root), remedy="use bfloat16 or float32")
            t5 = _read_encoder(T5EncoderModel, root / T5_FOLDERS[0], root / T5_FOLDERS[1])
        stack = cls(clips, t5, max_t5_tokens, token_width)
        return stack if dtype is None else stack.to(dtype)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextCond:
        """Returns tokens (b, num_tokens, token_width) and pooled vectors (b, pooled_width), where the encoders are.

        What of a caption no encoder reads is logged as a warning.

        Args:
            captions: one or more; "" is the unconditional caption.

        Raises:
            ValueError: there are no captions.
        """
        if not captions:
            raise ValueError("no captions to encode")
        states, pooled = [], []
        for model, tokenizer in zip(self.clips, self.clip_tokenizers, strict=True):
            ids, cut = _tokenize(tokenizer, captions, self.max_clip_tokens)
            if tokenizer is self.clip_tokenizers[0]:
                self._report_clip_cuts(cut)
            out = model(ids.to(self._device), output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        tokens = torch.cat(states, dim=-1)
        tokens = functional.pad(tokens, (0, self.token_width - tokens.shape[-1]))
        if self.t5 is not None:
            ids, cut = _tokenize(self.t5_tokenizer, captions, self.max_t5_tokens)
            self._warn(cut)
            tokens = torch.cat([tokens, self.t5(ids.to(self._device))[0].to(tokens.dtype)], dim=1)
        return TextCond(tokens, torch.cat(pooled, dim=-1))

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _report_clip_cuts(self, cut: list[str]) -> None:
        if self.t5 is None:
            self._warn(cut)
        elif cut:
            log_once(f"the CLIP encoders read the first {self.max_clip_tokens} tokens of longer captions, T5 reads on")

    def _warn(self, cut: list[str]) -> None:
        for text in cut[: self._warnings_left]:
            get_logger().warning(f'caption too long for the text encoders, not read: "{text}"')
        if cut and 0 < self._warnings_left <= len(cut):
            get_logger().warning("further cut captions are not shown")
        self._warnings_left = max(0, self._warnings_left - len(cut))

    def _take_fingerprint(self, encoders: list[Encoder]) -> str:
        weights = [
            (f"{i}.{name}", tensor)
            for i, encoder in enumerate(encoders)
            for name, tensor in encoder.model.state_dict().items()
        ]
        about = {
            "tokens": [self.max_clip_tokens, self.num_tokens, self.token_width],
            "activations": [getattr(e.model.config, "hidden_act", None) for e in encoders],
            "layers": [e.model.config.num_hidden_layers for e in encoders],
            "heads": [e.model.config.num_attention_heads for e in encoders],
            "vocabularies": [sorted(e.tokenizer.get_vocab().items()) for e in encoders],
            "padding": [e.tokenizer.pad_token for e in encoders],
        }
        return fingerprint(about, weights, PROBED_ELEMENTS)


def _read_encoder(kind: Any, model_folder: Path, tokenizer_folder: Path) -> Encoder:
    try:
        model, report = kind.from_pretrained(
            model_folder, use_safetensors=True, local_files_only=True, dtype="auto", output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot be read ({error})",
            where=f"{model_folder}, {tokenizer_folder.name}",
            remedy="fetch both folders again, with safetensors weights",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing, such as {missing[0]}",
            where=str(model_folder),
            remedy="use a complete folder of one model",
        )
    return Encoder(model, tokenizer)


def _tokenize(tokenizer: Any, captions: list[str], limit: int) -> tuple[Tensor, list[str]]:
    """Returns ids (b, limit) and the texts that did not fit in."""
    ids = tokenizer(captions, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
    whole = tokenizer(captions, truncation=False, verbose=False).input_ids
    # The last token is the end mark, which takes the last place of a cut caption.
    return ids, [tokenizer.decode(row[limit - 1 : -1]) for row in whole if len(row) > limit]
