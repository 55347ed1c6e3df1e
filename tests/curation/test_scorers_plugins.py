"""Scorers loaded from folders and packages, each against the published class or a plain calculation."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)

from contentv.base.errors import UserError
from contentv.curation.embed import ImageEmbedder
from contentv.curation.scorers import ScoringConfig, list_scorers, score_clip
from contentv.curation.scoring import video_align
from contentv.curation.scoring.aesthetic import Aesthetic
from contentv.curation.scoring.clip_tower import ClipTower
from contentv.curation.scoring.plugins import _load_class, _load_model
from contentv.curation.scoring.video_align import TOKENS, VideoAlign, fit_size, sample_places
from contentv.curation.scoring.view import ClipView

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
WIDTH = 12
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
TEXT = {**TOWER, "vocab_size": 30, "max_position_embeddings": 8}


@pytest.fixture(autouse=True)
def _no_models_between_tests() -> None:
    _load_model.cache_clear()
    _load_class.cache_clear()


def clip_of(frames: int = 5, height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3)).astype(np.uint8)


def preprocessor(folder: Path, **more: object) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, **more}))


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=WIDTH)).save_pretrained(
        tmp_path / "clip"
    )
    preprocessor(tmp_path / "clip")
    return tmp_path / "clip"


def head_layers(*widths: int) -> nn.Sequential:
    """LAION's layout: linear layers with dropout between all but the last two."""
    parts: list[nn.Module] = []
    for number, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        parts.append(nn.Linear(wide, narrow))
        if number < len(widths) - 3:
            parts.append(nn.Dropout(0.2))
    return nn.Sequential(*parts).eval()


def write_head(folder: Path, head: nn.Module, width: int = WIDTH, prefix: str = "layers.", **more: object) -> None:
    save_file(
        {prefix + name: value for name, value in head.state_dict().items()}, folder / "aesthetic_head.safetensors"
    )
    (folder / "aesthetic_head.json").write_text(json.dumps({"input_width": width, **more}))


def clip_features(folder: Path, pictures: np.ndarray) -> torch.Tensor:
    """The published class on square pictures of its own size: no resizing comes in."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return image / image.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_the_aesthetic_score_is_the_heads_mean_over_pictures(clip_folder: Path, activation: str) -> None:
    head = head_layers(WIDTH, 10, 8, 6, 4, 1)
    assert [name for name, _ in head.named_parameters()][::2] == [f"{n}.weight" for n in (0, 2, 4, 6, 7)]
    write_head(clip_folder, head, activation=activation)
    clip = clip_of(3, 32, 32)
    values = clip_features(clip_folder, clip)
    linears = [part for part in head if isinstance(part, nn.Linear)]
    with torch.no_grad():
        for number, layer in enumerate(linears):
            values = layer(values.relu() if number and activation == "relu" else values)
    scores = score_clip(clip, 8.0, ScoringConfig(clip_aesthetic=str(clip_folder), visual="aesthetic"))
    assert scores.scores["aesthetic"] == pytest.approx(float(values.mean()), abs=1e-5)
    assert scores.visual_raw == scores.scores["aesthetic"]
    assert scores.motion_raw == score_clip(clip, 8.0).motion_raw  # of its own kind still


def test_a_linear_head_will_do_too(clip_folder: Path) -> None:
    head = nn.Linear(WIDTH, 1)
    write_head(clip_folder, head, prefix="")
    clip = clip_of(2, 32, 32)
    with torch.no_grad():
        expected = float(head(clip_features(clip_folder, clip)).mean())
    assert Aesthetic.from_folder(clip_folder, "cpu").score(ClipView(clip, 8.0)) == pytest.approx(expected, abs=1e-5)


def test_heads_that_do_not_fit_are_refused(clip_folder: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Aesthetic.from_folder(clip_folder, "cpu")
    write_head(clip_folder, head_layers(7, 5, 1), width=7)
    with pytest.raises(UserError, match=r"features of width 12, aesthetic_head\.json says 7, the head takes 7"):
        Aesthetic.from_folder(clip_folder, "cpu")
    write_head(clip_folder, head_layers(WIDTH, 5, 2))
    with pytest.raises(UserError, match="ends in one number"):
        Aesthetic.from_folder(clip_folder, "cpu")
    write_head(clip_folder, head_layers(WIDTH, 5, 1), activation="gelu")
    with pytest.raises(UserError, match="activation=gelu"):
        Aesthetic.from_folder(clip_folder, "cpu")
    (clip_folder / "aesthetic_head.safetensors").write_bytes(b"no tensors")
    (clip_folder / "aesthetic_head.json").write_text(json.dumps({"input_width": WIDTH}))
    with pytest.raises(UserError, match="unreadable"):
        Aesthetic.from_folder(clip_folder, "cpu")


def test_a_pickle_in_the_place_of_weights_is_not_read(clip_folder: Path) -> None:
    (clip_folder / "model.safetensors").unlink()
    torch.save({}, clip_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        ClipTower.from_folder(clip_folder, "cpu", "dedup.encoder")


def test_embeddings_are_unit_vectors_that_tell_clips_apart(clip_folder: Path) -> None:
    embedder = ImageEmbedder.from_folder(clip_folder)
    clip = clip_of(8, 32, 32)
    vector = embedder.embed(clip)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    features = clip_features(clip_folder, clip[[1, 3, 5, 7]]).mean(dim=0)
    np.testing.assert_allclose(vector, features / features.norm(), atol=1e-5)
    again, other = embedder.embed(clip[:, ::-1][:, ::-1]), embedder.embed(clip_of(8, 32, 32, seed=1))
    assert float(vector @ again) > 0.999 > float(vector @ other)
    assert embedder.embed(clip[:1]).shape == (WIDTH,)


def test_wide_pictures_lose_their_sides_or_are_squeezed(clip_folder: Path) -> None:
    wide = np.concatenate([clip_of(1, 32, 20), clip_of(1, 32, 32, seed=1), clip_of(1, 32, 20, seed=2)], axis=2)
    cropped = ClipTower.from_folder(clip_folder, "cpu", "key").features([wide[0], wide[0, :, 20:52]])
    np.testing.assert_allclose(cropped[0], cropped[1], atol=1e-5)
    preprocessor(clip_folder, do_center_crop=False)
    squeezed = ClipTower.from_folder(clip_folder, "cpu", "key").features([wide[0]])
    assert np.abs(squeezed[0] - cropped[0]).max() > 1e-3


def test_siglip_folders_embed_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path)
    clip = clip_of(1, 32, 32)
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=pixels).pooler_output[0]
    vector = ImageEmbedder.from_folder(tmp_path).embed(clip)
    np.testing.assert_allclose(vector, expected / expected.norm(), atol=1e-5)


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type is bert"):
        ImageEmbedder.from_folder(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        ImageEmbedder.from_folder(tmp_path / "none")


PROMPT = "\nsee <|VQ_reward|> END\nmove <|MQ_reward|> END\nTextual prompt - {text_prompt}\nfit <|TA_reward|> END\n"
WORDS = ["<unk>", "<|endoftext|>", "see", "move", "fit", "END", "system", "user", "assistant", "You", "are", "a",
         "helpful", "assistant.", "Textual", "prompt", "-", "cat", "dog"]  # fmt: skip
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]


@pytest.fixture(autouse=True)
def _small_frames_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_align, "_LEAST_PIXELS", 1)  # else every clip is enlarged to 336 x 336


def write_video_align(folder: Path, rows: int, special: tuple[str, ...] = TOKENS) -> Qwen2VLForConditionalGeneration:
    """A complete little model as the reward model's own saving leaves it, with a head of `rows` outputs."""
    torch.manual_seed(0)
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, *special]})
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("video_pad", "image_pad", "vision_start")}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
                       "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        video_token_id=ids["video_pad"], image_token_id=ids["image_pad"], vision_start_token_id=ids["vision_start"],
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["rm_head.weight"] = torch.randn(rows, 16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "prompt.txt").write_bytes(PROMPT.encode())
    told = {
        "data_config": {"fps": 2.0, "max_frame_pixels": 56 * 56, "sample_type": "uniform"},
        "inference_config": {
            "VQ_mean": 1.0,
            "VQ_std": 2.0,
            "MQ_mean": -0.5,
            "MQ_std": 4.0,
            "TA_mean": 0.2,
            "TA_std": 3,
        },
    }
    (folder / "model_config.json").write_text(json.dumps(told))
    return model


def naive_patches(frames: np.ndarray) -> torch.Tensor:
    """Qwen2-VL's patches: pairs of frames, 2 x 2 neighbours of 14 px together, colours before time before pixels."""
    pixels = (frames / 255 - np.array(MEAN)) / np.array(STD)
    rows = []
    for t in range(0, len(frames), 2):
        for y in range(0, frames.shape[1], 28):
            for x in range(0, frames.shape[2], 28):
                for dy in (0, 14):
                    for dx in (0, 14):
                        cell = pixels[t : t + 2, y + dy : y + dy + 14, x + dx : x + dx + 14]
                        rows.append(cell.transpose(3, 0, 1, 2).ravel())
    return torch.tensor(np.stack(rows), dtype=torch.float32)


@pytest.mark.parametrize("rows", [1, 3])
def test_video_align_reads_the_three_tokens(tmp_path: Path, rows: int) -> None:
    model = write_video_align(tmp_path, rows)
    head = load_file(tmp_path / "model.safetensors")["rm_head.weight"]
    clip = clip_of(16, 56, 56)  # 2 s at 8 fps: four frames, of the size the model takes
    scorer = VideoAlign.from_folder(tmp_path, "cpu")
    scores = scorer.score(ClipView(clip, 8.0, caption="cat"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = (
        "<|im_start|> system You are a helpful assistant. <|im_end|> <|im_start|> user <|vision_start|>"
        + "<|video_pad|>" * (2 * 2 * 2) + "<|vision_end|>" + PROMPT.format(text_prompt="cat")
        + "<|im_end|> <|im_start|> assistant"
    )  # fmt: skip
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = model(
            input_ids=ids, pixel_values_videos=naive_patches(clip[[0, 5, 10, 15]]),
            video_grid_thw=torch.tensor([[2, 4, 4]]), position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            output_hidden_states=True,
        ).hidden_states[-1][0]  # fmt: skip
    for number, (name, token, mean, deviation) in enumerate(
        zip(("vq", "mq", "ta"), TOKENS, (1.0, -0.5, 0.2), (2.0, 4.0, 3.0), strict=True)
    ):
        place = ids[0].tolist().index(tokenizer.convert_tokens_to_ids(token))
        reward = float(hidden[place] @ head[min(number, rows - 1)])
        assert scores[name] == pytest.approx((reward - mean) / deviation, abs=1e-4)


def test_the_caption_moves_only_the_agreement_with_it(tmp_path: Path) -> None:
    """Later tokens do not reach earlier ones, so vq and mq belong to the clip alone."""
    write_video_align(tmp_path, 3)
    config = ScoringConfig(video_align=str(tmp_path), visual="vq", motion="mq")
    clip = clip_of(16, 56, 56)
    cat, dog, none = (score_clip(clip, 8.0, config, caption) for caption in ("cat", "dog <|VQ_reward|>", ""))
    assert cat.visual_raw == pytest.approx(dog.visual_raw, abs=1e-5) == cat.scores["vq"]
    assert cat.motion_raw == pytest.approx(none.motion_raw, abs=1e-5)
    assert abs(cat.scores["ta"] - dog.scores["ta"]) > 1e-4
    assert "ta" not in none.scores
    still = score_clip(clip[:1], 8.0, config)
    assert still.motion_raw is None
    assert "mq" not in still.scores
    assert np.isfinite(still.visual_raw)


def test_video_align_needs_its_tokens_head_and_prompt(tmp_path: Path) -> None:
    write_video_align(tmp_path / "tokens", 3, special=TOKENS[:2])
    with pytest.raises(UserError, match=r"does not know <\|TA_reward\|>"):
        VideoAlign.from_folder(tmp_path / "tokens", "cpu")
    folder = tmp_path / "whole"
    write_video_align(folder, 2)
    with pytest.raises(UserError, match=r"rm_head\.weight has shape \[2, 16\]"):
        VideoAlign.from_folder(folder, "cpu")
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("rm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"rm_head\.weight is there 0 times"):
        VideoAlign.from_folder(folder, "cpu")
    save_file({"rm_head.weight": head[:1]}, folder / "rm_head.safetensors")
    VideoAlign.from_folder(folder, "cpu")  # a file of its own will do
    (folder / "prompt.txt").write_text("rate <|VQ_reward|> and <|MQ_reward|>")
    with pytest.raises(UserError, match="not there exactly once"):
        VideoAlign.from_folder(folder, "cpu")


def test_lora_tensors_beside_the_weights_are_not_passed_over(tmp_path: Path) -> None:
    write_video_align(tmp_path, 3)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(2, 16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="merge them"):
        VideoAlign.from_folder(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("frames", "fps", "count"),
    [(48, 8.0, 12), (144, 24.0, 12), (125, 24.0, 10), (24, 24.0, 4), (3, 24.0, 2), (2, 24.0, 2), (1, 24.0, 1)],
)
def test_two_frames_a_second_are_looked_at(frames: int, fps: float, count: int) -> None:
    places = sample_places(frames, fps, 2.0)
    assert len(places) == count
    assert places[0] == 0
    assert places[-1] == frames - 1
    assert len(set(places)) == count


def test_sizes_are_those_the_backbone_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the published rule, written out for these cases."""
    monkeypatch.undo()
    assert fit_size(448, 448, 28, 448 * 448) == (448, 448)
    assert fit_size(480, 854, 28, 448 * 448) == (308, 588)  # 480 and 854 over 1.42914, down to multiples of 28
    assert fit_size(256, 256, 28, 448 * 448) == (336, 336)  # enlarged to 128 x 28 x 28 pixels


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str) -> None:
    """What pip leaves of a package with one module."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text(f"{name}\n")
    monkeypatch.syspath_prepend(str(folder))


PLUGIN = """
class Width:
    name, meaning, range, unit, kind, needs_time = "width", "pixels across", "1 ..", "px", "plug-in", False
    def score(self, clip):
        return clip.frames.shape[2]
class Twice(Width):
    def score(self, clip):
        return {"width": 1.0, "sharpness": 2.0}
class Nothing:
    pass
"""


def test_classes_of_installed_packages_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, PLUGIN, "contentv_test_widths")
    config = ScoringConfig(plugins=["contentv_test_widths:Width"], visual="width")
    scores = score_clip(clip_of(2), 8.0, config)
    assert scores.scores["width"] == scores.visual_raw == 56.0
    assert [info.name for info in list_scorers(config) if info.available][-1] == "width"
    with pytest.raises(UserError, match='two scorers give "sharpness"'):
        score_clip(clip_of(2), 8.0, ScoringConfig(plugins=["contentv_test_widths:Twice"]))
    with pytest.raises(UserError, match="is no scorer"):
        score_clip(clip_of(2), 8.0, ScoringConfig(plugins=["contentv_test_widths:Nothing"]))
    with pytest.raises(UserError, match="cannot be made"):
        score_clip(clip_of(2), 8.0, ScoringConfig(plugins=["contentv_test_widths:Missing"]))


def test_a_module_that_only_lies_about_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "contentv_test_stray.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{PLUGIN}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="belongs to no installed package"):
        score_clip(clip_of(2), 8.0, ScoringConfig(plugins=["contentv_test_stray:Width"]))
    assert not (tmp_path / "ran").exists()
    assert "contentv_test_stray" not in sys.modules
