"""Visual and motion quality by VideoAlign's reward model: Qwen2-VL that was trained on people's preferences.

What is public, and kept here: three tokens in the prompt whose last hidden states give the three rewards, sampling at 2
frames per second, the size of the frames, positions that count tokens one by one (the published reward model does not
compute Qwen2-VL's positions in space and time), and the means and deviations that rewards are brought to. Scores of
clips sampled otherwise differ by much more than their meaning allows.

Sources: Liu et al. 2025, "Improving Video Generation with Human Feedback"; the inference code published with it. What
is ours: a single picture gets vq as a video of two equal frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from contentv.base.errors import UserError
from contentv.curation.scoring.model_folder import (
    load_model,
    read_json,
    read_tensors,
    require_folder,
    resized,
    tensor_names,
    three_numbers,
)
from contentv.curation.scoring.view import ClipView

DIMENSIONS = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
HEAD = "rm_head.weight"
_PROMPT = "prompt.txt"
_STATISTICS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}  # mean, deviation
_FPS = 2.0
_LEAST_FRAMES = 4
_MOST_FRAMES = 768
_LEAST_PIXELS = 128 * 28 * 28
_MOST_PIXELS = 448 * 448
# Qwen2-VL's chat format, with its default system message.
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{video}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Sampling:
    """How a clip becomes the model's input; `statistics` are (mean, deviation) of each reward."""

    fps: float
    max_pixels: int
    statistics: Mapping[str, tuple[float, float]]


class VideoAlign:
    """Scores vq, mq, and with a caption ta: rewards less their mean, over their deviation."""

    name = "video_align"
    meaning = "visual (vq) and motion quality (mq), and agreement with the caption (ta), by Qwen2-VL"
    range = "about -3 .. 3"
    unit = "standard deviations of VideoAlign's training set"
    kind = "plug-in"
    needs_time = False

    def __init__(self, model: Any, head: Tensor, tokenizer: Any, prompt: str, pixels: tuple[Tensor, Tensor],
                 sampling: Sampling) -> None:  # fmt: skip
        self._model, self._head, self._tokenizer, self._prompt = model, head, tokenizer, prompt
        self._mean, self._std = pixels
        self._sampling = sampling

    @classmethod
    def from_folder(cls, path: str | Path, device: str) -> VideoAlign:
        """Returns the scorer stored in a folder.

        Args:
            path: a Qwen2VLForConditionalGeneration in safetensors with LoRA merged; rm_head.weight among its tensors or
                in rm_head.safetensors; its tokenizer with the three reward tokens; preprocessor_config.json;
                prompt.txt, the published prompt with {text_prompt} in it; model_config.json (optional), as published.
            device: where it runs; bf16 on an accelerator as published, fp32 on the CPU.

        Raises:
            UserError: something is missing or does not fit together.
        """
        folder = require_folder(path, "scoring.video_align", "a VideoAlign model")
        prompt = _read_prompt(folder / _PROMPT)
        pixels_file = folder / "preprocessor_config.json"
        pixels = read_json(pixels_file)
        mean, std = (three_numbers(pixels, name, pixels_file) for name in ("image_mean", "image_std"))
        tokenizer = _read_tokenizer(folder)
        whole = load_model(transformers.Qwen2VLForConditionalGeneration, folder)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model = whole.model.to(device, dtype)
        head = _read_head(folder, model.config.text_config.hidden_size).to(device, dtype)
        return cls(model, head, tokenizer, prompt, (mean, std), _read_sampling(folder))

    @torch.inference_mode()
    def score(self, clip: ClipView) -> Mapping[str, float]:
        """Returns vq; mq for clips of two frames or more; ta where there is a caption."""
        pixels, grid = self._patches(clip)
        merge = self._model.config.vision_config.spatial_merge_size
        video = "<|video_pad|>" * (math.prod(grid) // merge**2)
        text = self._prompt.replace("{text_prompt}", _plain(clip.caption))
        ids = self._tokenizer(_CHAT.format(video=video, text=text), return_tensors="pt").input_ids.to(self._head.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        hidden = self._model(
            input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids),
            pixel_values_videos=pixels.to(self._head), video_grid_thw=torch.tensor([grid], device=ids.device),
            use_cache=False,
        ).last_hidden_state[0]  # fmt: skip
        rewards = self._rewards(ids[0], hidden)
        scores = {"vq": rewards["VQ"]}
        if len(clip.frames) > 1:
            scores["mq"] = rewards["MQ"]
        if clip.caption:
            scores["ta"] = rewards["TA"]
        return scores

    def _rewards(self, ids: Int[Tensor, "s"], hidden: Float[Tensor, "s d"]) -> dict[str, float]:
        rewards = {}
        for number, (name, token) in enumerate(zip(DIMENSIONS, TOKENS, strict=True)):
            place = int((ids == self._tokenizer.convert_tokens_to_ids(token)).nonzero()[0])
            row = self._head[number if len(self._head) > 1 else 0]
            mean, deviation = self._sampling.statistics[name]
            rewards[name] = (float(hidden[place] @ row) - mean) / deviation
        return rewards

    def _patches(self, clip: ClipView) -> tuple[Float[Tensor, "n p"], tuple[int, int, int]]:
        """Returns the video as Qwen2-VL's patches, and their numbers along time, height and width."""
        vision = self._model.config.vision_config
        patch, merge, depth = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        places = sample_places(len(clip.frames), clip.fps, self._sampling.fps)
        size = clip.frames.shape[1:3]
        height, width = fit_size(size[0], size[1], patch * merge, self._sampling.max_pixels)
        frames = [(resized(clip.frames[place], height, width) - self._mean) / self._std for place in places]
        frames += [frames[-1]] * (-len(frames) % depth)
        t, h, w = len(frames) // depth, height // patch, width // patch
        split = torch.stack(frames).reshape(t, depth, 3, h // merge, merge, patch, w // merge, merge, patch)
        patches = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * depth * patch * patch)
        return patches, (t, h, w)


def sample_places(frames: int, fps: float, sample_fps: float) -> list[int]:
    """Returns which frames are looked at: `sample_fps` a second, an even number, at least 4, evenly spread.

    Source: the published video reader (sample type "uniform").
    """
    most = min(_MOST_FRAMES, frames) // 2 * 2
    wanted = min(max(frames / fps * sample_fps, _LEAST_FRAMES), most)
    count = max(1, min(2 * round(wanted / 2), frames))
    places: list[int] = torch.linspace(0, frames - 1, count).round().long().tolist()
    return places


def fit_size(height: int, width: int, factor: int, max_pixels: int) -> tuple[int, int]:
    """Returns the nearest height and width in multiples of `factor` with a number of pixels the model is used to.

    Source: Qwen2-VL's preprocessing.
    """
    fitted = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(fitted) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(fitted) < _LEAST_PIXELS:
        grow = math.sqrt(_LEAST_PIXELS / (height * width))
        fitted = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return fitted[0], fitted[1]


def _plain(caption: str) -> str:
    # What looks like a special token would be read as one, and there must be one of each.
    return caption.replace("<|", "< |")


def _read_prompt(file: Path) -> str:
    try:
        prompt = file.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(
            "no such file", where=str(file),
            remedy="save VideoAlign's prompt with special tokens there, {text_prompt} left in it",
        ) from error  # fmt: skip
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error})", where=str(file), remedy="save it as UTF-8") from error
    wrong = [part for part in (*TOKENS, "{text_prompt}") if prompt.count(part) != 1]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)} not there exactly once", where=str(file), remedy="use the published prompt"
        )
    return prompt


def _read_tokenizer(folder: Path) -> Any:
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"its tokenizer cannot be read ({error})", where=str(folder), remedy="complete the folder"
        ) from error
    for token in (*TOKENS, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"):
        if tokenizer.tokenize(token) != [token]:
            raise UserError(
                f"its tokenizer does not know {token}", where=str(folder),
                remedy="save the tokenizer that the reward model was trained with",
            )  # fmt: skip
    return tokenizer


def _read_head(folder: Path, width: int) -> Tensor:
    names = {file: tensor_names(file) for file in sorted(folder.glob("*.safetensors"))}
    apart = sorted(name for held in names.values() for name in held if "lora_" in name)
    if apart:
        raise UserError(
            f"holds LoRA tensors apart from the weights, such as {apart[0]}", where=str(folder),
            remedy="merge them into the weights and save the folder again",
        )  # fmt: skip
    found = [read_tensors(file, (HEAD,))[HEAD] for file, held in names.items() if HEAD in held]
    if len(found) != 1:
        raise UserError(
            f"{HEAD} is there {len(found)} times", where=str(folder), remedy="keep it in one safetensors file"
        )
    if found[0].ndim != 2 or found[0].shape[0] not in (1, len(DIMENSIONS)) or found[0].shape[1] != width:
        raise UserError(
            f"{HEAD} has shape {list(found[0].shape)}, the model is {width} wide", where=str(folder),
            remedy="use the head that belongs to the model",
        )  # fmt: skip
    return found[0]


def _read_sampling(folder: Path) -> Sampling:
    file = folder / "model_config.json"
    told = read_json(file) if file.exists() else {}
    data, norms = told.get("data_config", {}), told.get("inference_config") or {}
    try:
        statistics = {
            name: (float(norms.get(f"{name}_mean", mean)), float(norms.get(f"{name}_std", deviation)))
            for name, (mean, deviation) in _STATISTICS.items()
        }
        sampling = Sampling(float(data.get("fps", _FPS)), int(data.get("max_frame_pixels", _MOST_PIXELS)), statistics)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"not as published ({error})", where=str(file), remedy="fetch the file again") from error
    if sampling.fps <= 0 or sampling.max_pixels <= 0 or min(std for _, std in statistics.values()) <= 0:
        raise UserError("holds numbers that are not positive", where=str(file), remedy="fetch the file again")
    if data.get("sample_type", "uniform") != "uniform":
        raise UserError(f"sample_type={data['sample_type']}", where=str(file), remedy="only uniform is known")
    return sampling
