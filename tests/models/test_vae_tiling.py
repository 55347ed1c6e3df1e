"""Decoding in tiles: no seams, memory of a tile; and what encoding and decoding hold, counted on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from torch.utils._python_dispatch import TorchDispatchMode

from contentv.base.errors import UserError
from contentv.models import vae as vae_module
from contentv.models import vae_tiles
from contentv.models.vae import VideoVAE
from contentv.models.vae_tiles import Span, TiledDecoder, tiles

CONFIGS: dict[str, dict[str, Any]] = {
    "wan 2.1": {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]},
    "two levels": {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True]},
    "wan 2.2": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "is_residual": True, "patch_size": 2,
                "in_channels": 12, "out_channels": 12},
}  # fmt: skip


def make_model(name: str) -> AutoencoderKLWan:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **CONFIGS[name], **statistics)


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive on the meta device, which stands for an accelerator.

    Nothing is computed there, so the count depends on shapes alone. Copies to the host are empty tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs["device"] == torch.device("cpu"):
            return torch.empty(args[0].shape, dtype=args[0].dtype)
        made = func(*args, **kwargs)
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def peak_bytes(act: Callable[[], Any]) -> int:
    with LiveBytes() as live:
        act()
    return live.peak


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> VideoVAE:
    """A VAE on the meta device; it has no values to take a fingerprint of.

    The middle block's attention is taken to be fused, as on accelerators: it holds no matrix of scores.
    """
    monkeypatch.setattr(vae_module, "fingerprint", lambda *_: "")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"):
        return VideoVAE(make_model("two levels"))


@pytest.mark.parametrize(
    ("name", "shape", "tile_px"),
    [
        ("wan 2.1", (1, 4, 3, 10, 13), 32),
        ("two levels", (2, 4, 3, 10, 27), 16),
        ("two levels", (1, 4, 3, 2, 23), 20),  # lower than a tile, and a last tile that is not the largest
        ("wan 2.2", (1, 4, 3, 9, 14), 32),
    ],
)
def test_tiles_leave_no_seams(parity: Any, name: str, shape: tuple[int, ...], tile_px: int) -> None:
    vae = VideoVAE(make_model(name))
    raw = latents(*shape)
    whole, tiled = vae.decode(raw), vae.decode(raw, tile_px)
    assert tiled.shape == whole.shape
    assert 0.1 < whole.std() < 0.8  # neither flat nor clamped everywhere
    error = float((tiled - whole).abs().max())
    parity(f"VAE decode in tiles of {tile_px} pixels, {name}", "untiled decode", error, 1e-5)
    groups = list(vae.decode_chunks(raw, tile_px))
    assert [g.shape[2] for g in groups] == [1] + [vae.temporal_factor] * (shape[2] - 1)
    assert torch.equal(torch.cat(groups, dim=2), tiled)


def test_without_the_halo_there_would_be_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VideoVAE(make_model("two levels"))
    raw = latents(1, 4, 2, 8, 16)
    whole = vae.decode(raw)
    blended = make_model("two levels")
    blended.spatial_compression_ratio = 4
    blended.enable_tiling(32, 32, 24, 24)
    assert (blended.decode(raw).sample - whole).abs().max() > 1e-2  # overlapping tiles, blended: an approximation
    assert (vae.decode(raw, 32) - whole).abs().max() < 1e-5
    monkeypatch.setattr(Span, "widened", lambda self, by, size: self)
    assert (vae.decode(raw, 32) - whole).abs().max() > 1e-2


def test_tiles_in_bf16_differ_by_rounding(parity: Any) -> None:
    vae = VideoVAE(make_model("two levels"))
    raw = latents(1, 4, 3, 14, 20)
    exact = vae.decode(raw)
    low = vae.to(torch.bfloat16)
    whole, tiled = low.decode(raw), low.decode(raw, 16)
    assert tiled.dtype == torch.bfloat16
    rounding = float((whole.float() - exact).abs().max())
    parity("VAE decode in tiles, bf16", "decode in fp32", float((tiled.float() - exact).abs().max()), 2 * rounding)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize(("start", "stop"), [(16, 20), (13, 14), (0, 5), (30, 34)])
def test_halo_is_what_the_gradient_reaches(name: str, start: int, stop: int) -> None:
    # In fp64 whatever a pixel depends on has a gradient other than 0.
    model = make_model(name).double().eval()
    tiled = TiledDecoder(model, 1)
    size, decoder = 34, model.decoder
    features = torch.randn(1, decoder.mid_block.dim, 1, 1, size, dtype=torch.float64, requires_grad=True)
    x = features
    for block in decoder.up_blocks:
        x = block(x, first_chunk=True)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    assert x.shape[-1] == size * tiled.scale
    output = Span(start, stop).finer(tiled.scale)
    (gradient,) = torch.autograd.grad(x[..., slice(*output)].sum(), features)
    reached = gradient.abs().amax(dim=(0, 1, 2, 3)).nonzero().flatten()
    assert tiled.spans(output, size)[0] == (int(reached[0]), int(reached[-1]) + 1)


def test_halos_of_the_published_decoder() -> None:
    with torch.device("meta"):
        tiled = TiledDecoder(AutoencoderKLWan(), 1)
    spans = tiled.spans(Span(800, 1056), 300)
    inner = [Span(100, 132).finer(scale) for scale in (1, 2, 4, 8, 8)]
    assert [i.start - s.start for i, s in zip(inner, spans, strict=True)] == [13, 12, 10, 7, 1]
    assert [s.stop - i.stop for i, s in zip(inner, spans, strict=True)] == [13, 12, 10, 7, 1]
    assert tiled.spans(Span(0, 2400), 300)[0] == Span(0, 300)


def test_memory_of_tiles_grows_neither_with_the_frame_nor_with_the_clip(on_device: VideoVAE) -> None:
    def peak(t: int, h: int, w: int, tile_px: int) -> int:
        raw = torch.empty(1, 4, t, h, w, device="meta")
        return peak_bytes(lambda: sum(g.numel() for g in on_device.decode_chunks(raw, tile_px)))

    latent_bytes = 4 * 4  # of four channels in fp32: the decoder's input is held as a whole
    untiled, tiled = peak(3, 36, 36, 0), peak(3, 36, 36, 48)
    assert peak(3, 36, 72, 0) > 1.9 * untiled
    assert tiled < 0.75 * untiled
    # All that grows is the input: not the up blocks' activations, nor their caches.
    assert peak(3, 36, 72, 48) - tiled == latent_bytes * 3 * 36 * 36
    assert peak(5, 36, 36, 48) - tiled == latent_bytes * 2 * 36 * 36
    assert peak(5, 36, 36, 0) - untiled == latent_bytes * 2 * 36 * 36
    assert peak(3, 36, 36, 72) > tiled


def test_memory_of_encoding_does_not_grow_with_the_clip(on_device: VideoVAE) -> None:
    def peak(frames: int, device: str) -> int:
        video = torch.empty(1, 3, frames, 32, 32, device=device)
        return peak_bytes(lambda: on_device.encode(video))

    # Two frames a latent frame; mean and log variance, of four channels each, in fp32. The video is not counted.
    moments_bytes = 2 * 4 * 4 * 8 * 8
    short = peak(17, "cpu")
    assert peak(33, "cpu") - short == moments_bytes * (33 - 17) // 2
    assert peak(33, "meta") <= peak(33, "cpu") + 4 * 3 * 33 * 32 * 32  # the video itself, if it lies there
    assert short < 2 * peak(5, "cpu")


@pytest.mark.parametrize(("size", "most"), [(10, 4), (12, 4), (3, 4), (90, 32), (5, 1)])
def test_tiles_cover_an_axis_evenly(size: int, most: int) -> None:
    spans = tiles(size, most)
    assert [x for span in spans for x in range(*span)] == list(range(size))
    lengths = {span.stop - span.start for span in spans}
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    assert len(spans) == -(-size // most)


@pytest.mark.parametrize(
    ("tile_px", "why"), [(-16, "less than the minimum of 16"), (12, "minimum of 16"), (30, "not a multiple of 4")]
)
def test_bad_tiles_are_refused_at_once(tile_px: int, why: str) -> None:
    vae = VideoVAE(make_model("two levels"))
    for act in (vae.decode, vae.decode_chunks, lambda _, px: vae.check_tile(px)):
        with pytest.raises(UserError, match=f"vae_tile_px: .*{why}"):
            act(latents(1, 4, 1, 4, 4), tile_px)
    vae.check_tile(0)
    vae.check_tile(16)


def test_decoders_that_mix_distant_pixels_are_refused() -> None:
    model = make_model("two levels")
    model.decoder.up_blocks[1].resnets.append(WanAttentionBlock(16))
    vae = VideoVAE(model)
    with pytest.raises(UserError, match=r"WanAttentionBlock \(1\.resnets\.2\)"):
        vae.decode_chunks(latents(1, 4, 1, 8, 8), 16)
    other = make_model("two levels")
    other.decoder.norm_out.channel_first = False
    with pytest.raises(UserError, match="WanRMS_norm"):
        VideoVAE(other).check_tile(16)
    assert vae_tiles.MIN_TILE_LATENTS * vae.spatial_factor == 16
