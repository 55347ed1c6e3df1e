"""`contentv analyze gradients` from a dataset and a checkpoint to its page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import ASSETS, CONFIG, write_pipeline

import launch
from contentv.analysis.config import TwinConfig
from contentv.base.errors import UserError
from contentv.base.types import Bucket, TextCond
from contentv.cli.main import main
from contentv.config.compose import load_config
from contentv.config.golden import choose_golden, encode_twins
from contentv.config.inputs import open_data
from contentv.curation.synth_world import render_clip, sample_spec
from contentv.curation.video_io import encode_mp4_bytes
from contentv.data import DatasetWriter, TextInfo, VaeInfo
from contentv.models.vae import VideoVAE

BUCKET = Bucket(5, 32, 32)
GOLDEN = range(12, 20)  # clips of the dataset whose ranks are both high
TINY = ("clips=8", "groups=4", "bins=3", "device=cpu", "golden=0.55")


def build(folder: Path, *, media: bool = False, stills: bool = False) -> Path:
    """Twenty clips of the small world: scores rise together with the number, so the last ones are golden."""
    vae = VideoVAE.from_folder(ASSETS / "vae")
    about = VaeInfo(
        vae.fingerprint, vae.latents_mean, vae.latents_std, vae.latent_channels, vae.temporal_factor, vae.spatial_factor
    )
    text = TextInfo("text", CONFIG.joint_attention_dim, CONFIG.pooled_projection_dim, 6)
    null = TextCond(torch.zeros(1, 6, text.token_width), torch.zeros(1, text.pooled_width))
    bucket = Bucket(1, 32, 32) if stills else BUCKET
    with DatasetWriter(folder, about, text, null) as writer:
        for i in range(20):
            g = torch.Generator().manual_seed(i)
            frames = render_clip(sample_spec(np.random.default_rng(i)), bucket.frames, bucket.height)
            video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            writer.add(
                f"clip-{i:03d}",
                {"caption": f"clip {i}", "source": "world", "kind": "image" if stills else "video",
                 "num_frames": bucket.frames, "height_px": 32, "width_px": 32, "fps": 8.0, "start_s": 0.0,
                 "duration_s": 0.6, "visual_raw": float(i), "motion_raw": float(2 * i)},
                latents=vae.encode(video)[0], text_tokens=torch.randn(6, text.token_width, generator=g),
                text_pooled=torch.randn(text.pooled_width, generator=g), bucket=bucket,
                media=encode_mp4_bytes(frames, 8.0, crf=0) if media else None,
            )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("golden") / "dataset", media=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("golden") / "model")


def arguments(dataset: Path, checkpoint: Path, out: Path, *more: str) -> list[str]:
    return ["analyze", "gradients", f"checkpoint={checkpoint}", f"data.path={dataset}", f"vae.path={ASSETS / 'vae'}",
            f"out={out}", *TINY, *more]  # fmt: skip


def test_the_command_writes_curves_a_recommendation_and_a_page(dataset, checkpoint, tmp_path, capsys) -> None:
    assert main(arguments(dataset, checkpoint, tmp_path)) == 0
    result = json.loads((tmp_path / "gradients.json").read_text())
    assert [(b["sigma_low"], b["sigma_high"]) for b in result["bins"]] == [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    assert sum(b["base_mass"] for b in result["bins"]) == pytest.approx(1.0, abs=1e-6)
    for b in result["bins"]:
        for kind in ("visual", "motion"):
            cosine = b[kind]["cosine"]
            assert -1 <= cosine["value"] <= 1
            assert cosine["low"] <= cosine["value"] <= cosine["high"]
    assert result["clips"] == 8
    assert result["golden_clips_found"] == 9
    assert result["scored_clips"] == 20
    assert result["pixels"] == "media"
    assert result["base"] == "LogitNormal(mean=0.0, std=1.0, shift=3.0)"  # the checkpoint's shift
    assert result["recommendation"]["base_median"] == pytest.approx(0.75, abs=1e-4)
    assert all(distance > 0.05 for distance in result["latent_distance"].values())
    page = (tmp_path / "report.html").read_text()
    for words in ("recommended kappa_max", "Agreement with golden clips", "Gaussian blur", "played 4 times slower"):
        assert words in page
    said = capsys.readouterr().err
    assert all(text in said.replace("\n", " ") for text in result["remarks"])


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_share_the_bins_and_find_the_same(dataset, checkpoint, tmp_path) -> None:
    assert main(arguments(dataset, checkpoint, tmp_path / "one")) == 0
    together = launch.run(
        __file__, "analyze", nproc=2, arguments=arguments(dataset, checkpoint, tmp_path / "two"),
        env={"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert together == [0, 0]
    one, two = (json.loads((tmp_path / name / "gradients.json").read_text()) for name in ("one", "two"))
    assert one == two


def analyze(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.parametrize("pixels", ["media", "latents"])
def test_golden_clips_are_encoded_like_their_twins(dataset: Path, pixels: str) -> None:
    config = load_config(
        "analyze", [f"data.path={dataset}", *TINY, f"pixels={pixels}", "visual=jpeg", "jpeg_quality=95"]
    )
    joined = open_data(config.data)
    clips = choose_golden(joined, config.data, [], config)
    assert set(clips.numbers) <= set(range(11, 20))
    vae = VideoVAE.from_folder(ASSETS / "vae")
    found = encode_twins(clips, vae, config)
    assert found.pixels == pixels
    for place, number in enumerate(clips.numbers):
        sample, motion, visual = clips.store.read(clips.bucket.name, number)
        assert min(motion, visual) >= 0.55
        torch.testing.assert_close(found.text.pooled[place], sample.text_pooled.float())
        stored = vae.normalize(sample.latents[None].float())[0]
        again = found.latents["golden"][place]
        # A lossless clip is encoded to the stored latents, a decoded one nearly so.
        assert float((again - stored).norm() / stored.norm()) < (0.1 if pixels == "media" else 0.6)
    lengths = {name: float((x - found.latents["golden"]).norm()) for name, x in found.latents.items()}
    assert (
        lengths["golden"] == 0 < lengths["visual"] < lengths["motion"]
    )  # hardly compressed, against four times slower


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("golden=0.99",), ["of 20 clips of f5_h32_w32", "golden=0.8", "would do"]),
        (("data.buckets=[f9_h32_w32]",), ["no bucket of videos among f9_h32_w32", "f5_h32_w32"]),
        (("checkpoint=/nowhere",), ["/nowhere"]),
        (("vae.path=/nowhere",), ["/nowhere"]),
        (("groups=5",), ["groups=5"]),
        (("base=tqd",), ["base", "tqd"]),
        (("shift=-1",), ["shift=-1"]),
        (("analysis=losses",), ["analysis=losses"]),
    ],
)
def test_mistakes_are_one_message(dataset, checkpoint, tmp_path, capsys, more, words) -> None:
    assert main(arguments(dataset, checkpoint, tmp_path / "out", *more)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    assert all(word in said for word in words)
    assert not (tmp_path / "out").exists()


def test_there_must_be_something_to_degrade(tmp_path: Path, checkpoint: Path, capsys) -> None:
    stills = build(tmp_path / "stills", stills=True)
    assert main(arguments(stills, checkpoint, tmp_path / "out")) == 2
    assert "no bucket of videos" in capsys.readouterr().err
    bare = build(tmp_path / "bare")
    config = load_config("analyze", [f"data.path={bare}", *TINY, "pixels=media"])
    clips = choose_golden(open_data(config.data), config.data, [], config)
    with pytest.raises(UserError, match="8 of 8 golden clips"):
        encode_twins(clips, VideoVAE.from_folder(ASSETS / "vae"), config)


def test_another_vae_is_refused(dataset: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    record = dataset / "dataset.json"
    text = record.read_text()
    fingerprint = json.loads(text)["vae"]["fingerprint"]
    copy = tmp_path / "dataset"
    copy.mkdir()
    for path in dataset.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "dataset.json").unlink()
    (copy / "dataset.json").write_text(text.replace(fingerprint, "0" * 32))
    assert main(arguments(copy, checkpoint, tmp_path / "out")) == 2
    assert "this VAE" in capsys.readouterr().err


def test_twins_are_described_in_words() -> None:
    assert TwinConfig(visual="resample", motion="hold").describe() == {
        "visual": "shrunk 4 times and enlarged again", "motion": "every 4 frames shown as their first",
    }  # fmt: skip
