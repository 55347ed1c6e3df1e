"""The CLIP reward against transformers' own CLIP pipeline, and its gradient in the frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from contentv.base.errors import UserError
from contentv.models.reward import CLIPReward

SIZE = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    pieces = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = {"vocab.json": json.dumps({p: i for i, p in enumerate(pieces)}), "merges.txt": "#version: 0.2\n"}
    tokenizer["tokenizer_config.json"] = json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 10})
    for name, text in tokenizer.items():
        (path / name).write_text(text)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(pieces), "max_position_embeddings": 10, **ids},
        vision_config={**small, "image_size": SIZE, "patch_size": 4},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reward(folder: Path) -> CLIPReward:
    return CLIPReward.from_folder(folder)


def smooth_frames(height: int, width: int, b: int = 2) -> torch.Tensor:
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 5, width)[None]
    planes = [torch.sin(x + k + i) * torch.cos(y * (1 + k)) for i in range(b) for k in range(3)]
    return torch.stack(planes).view(b, 3, height, width)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (SIZE, SIZE), (33, 41)])
def test_preprocessing_is_the_models_own(folder: Path, reward: CLIPReward, height: int, width: int) -> None:
    frames = smooth_frames(height, width)
    levels = ((frames + 1) * 127.5).round().to(torch.uint8)
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in levels]
    expected = CLIPImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    # The image processor rounds to 8 bits twice; a unit of normalised pixels is about 67 levels.
    assert (reward.preprocess(frames) - expected).abs().max() < 2.5 / 255 / 0.26


def test_score_is_transformers_logit(folder: Path, reward: CLIPReward) -> None:
    frames, captions = smooth_frames(SIZE, SIZE, b=3), ["red ball", "a", "blue"]
    batch = CLIPTokenizer.from_pretrained(folder)(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = CLIPModel.from_pretrained(folder)(pixel_values=reward.preprocess(frames), **batch).logits_per_image
        score = reward.score(frames, captions)
    assert score.shape == (3,)
    assert torch.allclose(score, logits.diagonal(), atol=1e-5)
    assert score.std() > 0


def test_gradient_reaches_the_frames_and_points_uphill(reward: CLIPReward) -> None:
    frames = (0.5 * smooth_frames(24, 40)).requires_grad_()
    score = reward.score(frames, ["red", "blue"])
    score.sum().backward()
    assert frames.grad is not None
    assert (frames.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in reward.parameters())
    step = 1e-3 * frames.grad / frames.grad.norm()
    with torch.no_grad():
        gained = reward.score(frames + step, ["red", "blue"]).sum() - score.sum()
    assert abs(gained - (step * frames.grad).sum()) < 0.1 * (step * frames.grad).sum()


def test_gradient_stops_where_pixels_saturate(reward: CLIPReward) -> None:
    frames = torch.full((1, 3, SIZE, SIZE), 1.5, requires_grad=True)
    reward.score(frames, ["red"]).sum().backward()
    assert frames.grad is not None
    assert frames.grad.abs().max() == 0


def test_frames_and_captions_must_match(reward: CLIPReward) -> None:
    with pytest.raises(ValueError, match="2 frames but 1 captions"):
        reward.score(smooth_frames(SIZE, SIZE), ["red"])


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        CLIPReward.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5]}')
    with pytest.raises(UserError, match="image_mean"):
        CLIPReward.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    with pytest.raises(UserError, match="cannot be read"):
        CLIPReward.from_folder(tmp_path)
