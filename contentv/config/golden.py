"""The golden clips of a dataset and their degraded twins, as latents."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from contentv.analysis.config import GradientConfig
from contentv.analysis.twins import make_twins
from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.base.rng import keyed_generator
from contentv.base.types import Bucket, TextCond
from contentv.config.sampling import to_uint8
from contentv.curation.video_io import DecodeError, open_video
from contentv.data import DataConfig, JoinedDatasets, Normaliser
from contentv.data.joined import JoinedStore
from contentv.data.quarantine import Quarantine
from contentv.data.sample import BadSampleError
from contentv.models.vae import VideoVAE

Frames = UInt8[np.ndarray, "T H W 3"]


@dataclass(frozen=True)
class GoldenClips:
    """Some golden clips of one bucket, and the scores of all its clips.

    Attributes:
        store: reads them.
        bucket: theirs.
        numbers: of the clips in the bucket.
        motion, visual: scores in 0..1 of every clip of the bucket that has both.
        found: golden clips there are in the bucket.
    """

    store: JoinedStore
    bucket: Bucket
    numbers: list[int]
    motion: Float[Tensor, " m"]
    visual: Float[Tensor, " m"]
    found: int


def choose_golden(
    joined: JoinedDatasets, data: DataConfig, trained: Sequence[str], config: GradientConfig
) -> GoldenClips:
    """Returns golden clips drawn from the bucket of videos that has the most of them.

    Args:
        joined: the dataset.
        data: `data.buckets` names the buckets to choose from.
        trained: buckets that the checkpoint was trained on; looked at first where `data.buckets` is empty.
        config: what is golden, and how many clips.

    Raises:
        UserError: there is no bucket of videos, or none with `config.groups` golden clips.
    """
    videos = [name for name in joined.bucket_samples if Bucket.parse(name).frames > 1]
    wanted = data.buckets or [name for name in trained if name in videos] or videos
    names = [name for name in wanted if name in videos]
    if not names:
        raise UserError(
            f"no bucket of videos among {', '.join(wanted or joined.bucket_samples) or 'none'}", where="data.buckets",
            remedy=f"the dataset has: {', '.join(videos) or 'images alone, which have no motion'}",
        )  # fmt: skip
    normalisers = [Normaliser.load(info.storage, data.quality_mode, data.quality_scope) for info in joined.infos]
    quarantine = Quarantine(max_samples=data.max_bad_samples, max_fraction=data.max_bad_fraction)
    store = JoinedStore(joined, names, quarantine, normalisers)
    best: tuple[str, np.ndarray, Tensor, Tensor] | None = None
    for name in names:
        everything = np.arange(store.size(name), dtype=np.int64)
        motion, visual = store.rows(name, ["source", "scores"]).scores(everything)
        golden = everything[(torch.minimum(motion, visual) >= config.golden).numpy()]  # NaN compares as False
        if best is None or len(golden) > len(best[1]):
            best = (name, golden, motion, visual)
    assert best is not None  # names is not empty
    return _draw(store, *best, config)


def _draw(
    store: JoinedStore, name: str, golden: np.ndarray, motion: Tensor, visual: Tensor, config: GradientConfig
) -> GoldenClips:
    scored = ~(motion.isnan() | visual.isnan())
    if len(golden) < config.groups:
        best = torch.minimum(motion[scored], visual[scored]).sort(descending=True).values
        enough = f"golden={float(best[config.groups - 1]):.2f} would do" if len(best) >= config.groups else "score it"
        raise UserError(
            f"{len(golden)} of {len(motion)} clips of {name} have both ranks at {config.golden:g} or above "
            f"({int(scored.sum())} have both scores), and {config.groups} groups need one each", where="golden",
            remedy=f"lower golden= ({enough}), or use a dataset with more clips",
        )  # fmt: skip
    count = min(config.clips, len(golden)) // config.groups * config.groups
    if count < config.clips:
        get_logger().warning("%d golden clips instead of clips=%d: %s has %d", count, config.clips, name, len(golden))
    order = torch.randperm(len(golden), generator=keyed_generator(config.seed, 0, 0, "golden_clips"))
    numbers = [int(golden[i]) for i in order[:count]]
    return GoldenClips(store, Bucket.parse(name), numbers, motion[scored], visual[scored], len(golden))


@dataclass(frozen=True)
class EncodedTwins:
    """Latents (n c t h w) in model space of the clips and of each of their twins, and the clips' captions.

    `pixels` says what was degraded: media or latents (decoded by the VAE).
    """

    latents: dict[str, Tensor]
    text: TextCond
    pixels: str


@torch.no_grad()
def encode_twins(clips: GoldenClips, vae: VideoVAE, config: GradientConfig) -> EncodedTwins:
    """Returns the clips and their twins, all through the VAE alike: golden ones are encoded anew, too.

    Raises:
        UserError: pixels=media and a clip has none stored, or of another size than its bucket.
    """
    bucket, device = clips.bucket.name, next(vae.parameters()).device
    media = [None if config.pixels == "latents" else _stored(clips, number) for number in clips.numbers]
    missing = sum(frames is None for frames in media)
    if config.pixels == "media" and missing:
        raise UserError(
            f"{missing} of {len(media)} golden clips of {bucket} have no stored media of the bucket's size",
            where="pixels", remedy="use pixels=latents, or curate again with keep_media=true",
        )  # fmt: skip
    pixels = "latents" if missing else "media"
    get_logger().info("twins are made of %s", "the stored clips" if pixels == "media" else "clips decoded by the VAE")
    encoded: dict[str, list[Tensor]] = {}
    tokens, pooled = [], []
    for number, frames in zip(clips.numbers, media, strict=True):
        sample, _, _ = clips.store.read(bucket, number)
        tokens.append(sample.text_tokens.float())
        pooled.append(sample.text_pooled.float())
        if frames is None or pixels == "latents":
            frames = to_uint8(vae.decode(sample.latents[None].to(device))[0])
        for name, twin in make_twins(frames, config).items():
            video = torch.from_numpy(twin).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            encoded.setdefault(name, []).append(vae.normalize(vae.encode(video.to(vae.dtype)).float()).cpu())
    text = TextCond(torch.stack(tokens), torch.stack(pooled))
    return EncodedTwins({name: torch.cat(rows) for name, rows in encoded.items()}, text, pixels)


def _stored(clips: GoldenClips, number: int) -> Frames | None:
    """Returns the frames of a clip's stored media, None if there are none of the bucket's shape."""
    try:
        found = clips.store.media(clips.bucket.name, number)
        if found is None or found[0] != "mp4":
            return None
        with open_video(io.BytesIO(found[1]), f"clip {number}") as video:
            frames = np.stack([picture.to_rgb() for picture in video.pictures()])
    except (BadSampleError, DecodeError) as error:
        get_logger().warning("the stored clip %d of %s cannot be used: %s", number, clips.bucket.name, error)
        return None
    return frames if frames.shape == (*clips.bucket, 3) else None
