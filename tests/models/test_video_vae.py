"""The video VAE on small random weights: causality, normalisation, shapes, folders, fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from contentv.base.errors import UserError
from contentv.base.types import Bucket
from contentv.models.vae import VideoVAE

WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_model(downsample: tuple[bool, ...] = (False, True, True), z_dim: int = 4) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 2, 4, 4][: len(downsample) + 1],
        num_res_blocks=1,
        temperal_downsample=list(downsample),
        latents_mean=[0.1 * i - 0.2 for i in range(z_dim)],
        latents_std=[1.0 + 0.5 * i for i in range(z_dim)],
    )


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return VideoVAE(make_model())


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_first_latent_frame_depends_on_the_first_frame_alone(vae: VideoVAE, video: torch.Tensor) -> None:
    raw = vae.encode(video)
    assert raw.shape == (2, *vae.latent_shape(Bucket(9, 16, 24))) == (2, 4, 3, 2, 3)
    # Equal to the last bits only: the final 1x1x1 convolution rounds by the number of frames it is given.
    assert torch.allclose(vae.encode(video[:, :, :1]), raw[:, :, :1], rtol=0, atol=1e-6)
    other = video.clone()
    other[:, :, 1:] = -video[:, :, 1:]
    assert torch.equal(vae.encode(other)[:, :, 0], raw[:, :, 0])
    assert not torch.allclose(vae.encode(other)[:, :, 1:], raw[:, :, 1:], atol=1e-3)


def test_first_frame_is_frame_0_of_the_whole_decode(vae: VideoVAE, video: torch.Tensor) -> None:
    raw = vae.encode(video)
    decoded = vae.decode(raw)
    assert decoded.shape == video.shape
    first = vae.decode_first_frame(raw)
    assert first.abs().max() < 1  # nothing is clamped here, so equality is exact
    assert torch.equal(first, decoded[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_the_whole_of_diffusers_bit_for_bit(parity: Any, dtype: torch.dtype) -> None:
    model = make_model((False, True))
    vae, kind = VideoVAE(model).to(dtype), str(dtype).removeprefix("torch.")
    video = torch.rand(1, 3, 33, 16, 12, generator=torch.Generator().manual_seed(5)).to(dtype) * 2 - 1
    posterior = model.encode(video).latent_dist
    raw = vae.encode(video)
    parity(f"VAE encode, mean, {kind}", "diffusers AutoencoderKLWan", gap(raw, posterior.mode()), 0)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = posterior.sample(seeds[1])
    parity(f"VAE encode, sample, {kind}", "diffusers AutoencoderKLWan", gap(vae.encode(video, seeds[0]), drawn), 0)
    whole = model.decode(raw).sample
    assert whole.shape == video.shape
    assert whole.dtype == raw.dtype == dtype
    parity(f"VAE decode, {kind}", "diffusers AutoencoderKLWan", gap(vae.decode(raw), whole), 0)
    groups = list(vae.decode_chunks(raw))
    assert [g.shape[2] for g in groups] == [1] + [2] * 16
    parity(f"VAE decode_chunks, {kind}", "decode", gap(torch.cat(groups, dim=2), whole), 0)
    # Nothing of one call is left for the next, also of one that was not finished.
    assert torch.equal(next(vae.decode_chunks(raw)), whole[:, :, :1])
    assert whole[:, :, 0].abs().max() < 1  # nothing is clamped there, so equality is exact
    parity(f"VAE first frame, {kind}", "frame 0 of decode", gap(vae.decode_first_frame(raw), whole[:, :, 0]), 0)
    assert torch.equal(next(vae.decode_chunks(raw[:, :, :1])), vae.decode_first_frame(raw[:, :, :1])[:, :, None])


@pytest.mark.parametrize("sizes", [[33], [3] * 11, [1, 4, 28], [2, 0, 30, 1]])
def test_long_clips_are_encoded_the_same_from_any_groups_of_frames(sizes: list[int]) -> None:
    vae = VideoVAE(make_model((False, True)))
    video = torch.rand(1, 3, 33, 8, 12, generator=torch.Generator().manual_seed(6)) * 2 - 1
    assert torch.equal(vae.encode_chunks(iter(video.split(sizes, dim=2))), vae.encode(video))


@pytest.mark.parametrize(("sizes", "frames"), [([4, 4], 8), ([], 0), ([1, 1], 2)])
def test_groups_of_too_few_frames_are_refused(vae: VideoVAE, sizes: list[int], frames: int) -> None:
    with pytest.raises(UserError, match=rf"cannot encode {frames} frames.*\n.*4k \+ 1"):
        vae.encode_chunks(torch.zeros(1, 3, size, 8, 8) for size in sizes)
    with pytest.raises(UserError, match="f1_h8_w8"):
        vae.encode_chunks([torch.zeros(1, 3, 5, 8, 9)])


def test_bf16_differs_by_its_rounding(parity: Any, vae: VideoVAE, video: torch.Tensor) -> None:
    low, raw = VideoVAE(make_model()).to(torch.bfloat16), vae.encode(video)
    scale = float(raw.abs().max())
    parity("VAE encode, bf16, of the largest latent", "the same in fp32", gap(low.encode(video), raw) / scale, 0.05)
    parity("VAE decode, bf16", "the same in fp32", gap(low.decode(raw), vae.decode(raw)), 0.1)


def test_first_frame_is_not_clamped_and_differentiable(vae: VideoVAE, video: torch.Tensor) -> None:
    raw = (vae.encode(video) * 200).requires_grad_()
    first = vae.decode_first_frame(raw)
    first.sum().backward()
    assert raw.grad is not None
    assert raw.grad[:, :, 0].abs().min() >= 0
    assert raw.grad[:, :, 0].abs().max() > 0
    assert raw.grad[:, :, 1:].abs().max() == 0
    assert all(p.grad is None for p in vae.parameters())
    # Against a finite difference (some of the VAE's layers compute in fp32 whatever their input).
    exact = VideoVAE(make_model()).to(torch.float64)
    point = raw.detach().double() / 200
    step = torch.zeros_like(point)
    step[0, 1, 0, 1, 1] = 1e-3
    difference = (exact.decode_first_frame(point + step) - exact.decode_first_frame(point - step)).sum() / 2e-3
    point.requires_grad_()
    (gradient,) = torch.autograd.grad(exact.decode_first_frame(point).sum(), point)
    assert abs(gradient[0, 1, 0, 1, 1] - difference) < 1e-3 * abs(difference)
    large = vae.decode_first_frame(torch.full((1, 4, 1, 2, 2), 1e4))
    clamped = vae.decode(torch.full((1, 4, 1, 2, 2), 1e4))[:, :, 0]
    assert torch.equal(large.clamp(-1, 1), clamped)


def test_mode_and_samples(vae: VideoVAE, video: torch.Tensor) -> None:
    one, again = (vae.encode(video, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, again)
    posterior = vae.model.encode(video).latent_dist
    assert torch.equal(vae.encode(video), posterior.mean)
    standard = (one - posterior.mean) / posterior.std
    assert 0.7 < standard.std() < 1.3


def test_normalisation_is_per_channel_and_inverted(vae: VideoVAE, video: torch.Tensor) -> None:
    raw = vae.encode(video)
    z = vae.normalize(raw)
    for i in range(4):
        expected = (raw[:, i].double() - (0.1 * i - 0.2)) / (1.0 + 0.5 * i)
        assert torch.allclose(z[:, i].double(), expected, atol=1e-6)
    assert torch.allclose(vae.denormalize(z), raw, atol=1e-6)
    assert vae.latents_std == (1.0, 1.5, 2.0, 2.5)


@pytest.mark.parametrize(
    ("downsample", "factors"), [((False, True), (2, 4)), ((False,), (1, 2)), ((True, True), (4, 4))]
)
def test_factors_follow_the_config(downsample: tuple[bool, ...], factors: tuple[int, int]) -> None:
    vae = VideoVAE(make_model(downsample))
    assert (vae.temporal_factor, vae.spatial_factor) == factors
    bucket = Bucket(5, 8, 16)
    raw = vae.encode(torch.zeros(1, 3, *bucket))
    assert tuple(raw.shape[1:]) == vae.latent_shape(bucket)
    assert vae.decode(raw).shape == (1, 3, 5, 8, 16)


def test_default_config_has_the_published_factors() -> None:
    with torch.device("meta"):
        model = AutoencoderKLWan()
    assert sum(p.numel() for p in model.parameters()) == 126_892_531
    assert next(iter(model.state_dict())) == "encoder.conv_in.weight"
    assert model.config.latents_mean[:2] == [-0.7571, -0.7089]


@pytest.mark.parametrize(
    ("bucket", "nearest"),
    [(Bucket(8, 16, 16), "f9_h16_w16"), (Bucket(1, 20, 3), "f1_h16_w8"), (Bucket(0, 8, 8), "f1_h")],
)
def test_shapes_that_do_not_fit_are_refused_with_the_nearest(vae: VideoVAE, bucket: Bucket, nearest: str) -> None:
    with pytest.raises(UserError, match=nearest):
        vae.latent_shape(bucket)


def test_encode_refuses_what_diffusers_would_cut(vae: VideoVAE) -> None:
    with pytest.raises(UserError, match="8 frames"):
        vae.encode(torch.zeros(1, 3, 8, 16, 16))


def test_folder_and_fingerprint(vae: VideoVAE, tmp_path: Path, video: torch.Tensor) -> None:
    vae.model.save_pretrained(tmp_path)
    read, low = VideoVAE.from_folder(tmp_path), VideoVAE.from_folder(tmp_path, torch.bfloat16)
    assert torch.equal(read.encode(video), vae.encode(video))
    assert not any(p.requires_grad for p in read.parameters())
    assert len(vae.fingerprint) == 32
    assert vae.fingerprint == read.fingerprint == low.fingerprint
    assert low.encode(video).dtype == torch.bfloat16

    state = load_file(tmp_path / WEIGHTS)
    last = max(state)
    state[last] = state[last].clone()
    state[last].view(-1)[-1] += 1e-6
    save_file(state, tmp_path / WEIGHTS)
    assert VideoVAE.from_folder(tmp_path).fingerprint != vae.fingerprint
    del state[last]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=last):
        VideoVAE.from_folder(tmp_path)


def test_fingerprint_sees_the_statistics(vae: VideoVAE) -> None:
    model = make_model()
    model.register_to_config(latents_mean=[0.0] * 4)
    assert VideoVAE(model).fingerprint != vae.fingerprint
    model.register_to_config(latents_std=[1.0] * 3)
    with pytest.raises(UserError, match="3 deviations"):
        VideoVAE(model)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        VideoVAE.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="AutoencoderKL"):
        VideoVAE.from_folder(tmp_path)


def test_a_vae_that_packs_patches_of_pixels_keeps_its_promises(video: torch.Tensor) -> None:
    model = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
        in_channels=12, out_channels=12, scale_factor_spatial=8, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    vae = VideoVAE(model)
    raw = vae.encode(video)
    assert (vae.spatial_factor, vae.temporal_factor) == (8, 4)
    assert raw.shape[1:] == vae.latent_shape(Bucket(9, 16, 24)) == (4, 3, 2, 3)
    assert torch.equal(vae.decode_first_frame(raw).clamp(-1, 1), vae.decode(raw)[:, :, 0])
