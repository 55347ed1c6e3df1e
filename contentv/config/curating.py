"""`contentv curate`: joins the curation pipeline with the VAE, the text encoders and the shard writer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contentv.base import device as devices
from contentv.base.errors import UserError
from contentv.base.log import console, is_main_process
from contentv.base.stop import StopSignal
from contentv.config.inputs import existing_folder
from contentv.config.schema import CurateRoot
from contentv.curation.curate import CurateReport, curate
from contentv.curation.progress import Bars, Silent, bucket_table
from contentv.data import DatasetWriter, ShardInfo, ShardSetWriter, TextInfo, VaeInfo
from contentv.data.dataset import SHARDS_FOLDER
from contentv.data.shard_set import CURATION_SHARD
from contentv.models.text import TextStack
from contentv.models.vae import VideoVAE
from contentv.parallel.peers import join_peers


def vae_info(vae: VideoVAE) -> VaeInfo:
    """Returns what dataset.json records of a VAE."""
    return VaeInfo(
        fingerprint=vae.fingerprint,
        latents_mean=vae.latents_mean,
        latents_std=vae.latents_std,
        latent_channels=vae.latent_channels,
        temporal_factor=vae.temporal_factor,
        spatial_factor=vae.spatial_factor,
    )


def text_info(text: TextStack) -> TextInfo:
    """Returns what dataset.json records of the text encoders."""
    return TextInfo(
        fingerprint=text.fingerprint,
        token_width=text.token_width,
        pooled_width=text.pooled_width,
        num_tokens=text.num_tokens,
    )


class ShardChunk:
    """The shards of one chunk, as curation knows them."""

    def __init__(self, writer: ShardSetWriter) -> None:
        self.add = writer.add
        self.abort = writer.abort
        self._writer = writer

    def finish(self) -> list[dict[str, Any]]:
        """Completes the shards and returns their records as plain values."""
        return [asdict(shard) for shard in self._writer.finish()]


class ShardSink:
    """A dataset folder as curation knows it.

    Args:
        root: the dataset's folder.
        vae: makes the latents.
        text: makes the captions' vectors.
        writer: of the dataset; None in processes that write shards only.
    """

    def __init__(self, root: Path, vae: VaeInfo, text: TextInfo, writer: DatasetWriter | None) -> None:
        self._root, self._vae, self._text, self._dataset = root, vae, text, writer
        self._elsewhere: set[str] | None = None

    @property
    def _writer(self) -> DatasetWriter:
        if self._dataset is None:
            raise RuntimeError("rank 0 alone has the dataset")
        return self._dataset

    def chunk(self, prefix: str) -> ShardChunk:
        """Returns a writer of a chunk's shards."""
        return ShardChunk(ShardSetWriter(self._root, self._vae, self._text, prefix))

    def taken(self, key: str) -> bool:
        """Whether the dataset has a sample of this key that no curation run wrote."""
        if self._elsewhere is None:
            self._elsewhere = self._writer.keys_of(lambda shard: not CURATION_SHARD.fullmatch(_file(shard)))
        return key in self._elsewhere

    def samples(self) -> int:
        """Returns how many samples the dataset has."""
        return self._writer.info.samples

    def publish(self, records: Iterable[dict[str, Any]]) -> None:
        """Takes finished shards into the dataset and writes dataset.json and quality.json, if there is any sample."""
        self._writer.add_shards(ShardInfo(**record) for record in records)
        if self._writer.info.samples:
            self._writer.flush()

    def discard(self, prefix: str) -> None:
        """Removes shards that belong to no dataset.

        Raises:
            UserError: they belong to this one.
        """
        if any(_file(shard).startswith(prefix) for shard in self._writer.info.shards):
            raise UserError(
                "the unfinished run's samples are part of the dataset already", where=str(self._root),
                remedy="let it finish: run the same command without restart=true",
            )  # fmt: skip
        for path in self._root.glob(f"{SHARDS_FOLDER}/*/{prefix}*"):
            path.unlink(missing_ok=True)


def curate_dataset(root: CurateRoot) -> CurateReport:
    """Runs the curation a configuration describes and returns its report.

    Under torchrun every process has a part of it; rank 0 makes the dataset of the parts and speaks.

    Raises:
        UserError: an input, the VAE or the text encoders are missing, or a bucket does not fit the VAE.
        StoppedBySignalError: a signal came; the same call goes on.
    """
    if not root.input:
        raise UserError("input is not set", where="input", remedy="name a folder of media files or a manifest, input=")
    if not root.output:
        raise UserError("output is not set", where="output", remedy="name a folder for the dataset, output=DIR")
    vae_path = existing_folder(root.vae.path, "vae.path", "the folder of an AutoencoderKLWan")
    text_path = existing_folder(root.text.path, "text.path", "the folder of the text encoders")
    device = devices.select(root.device)
    with StopSignal() as stop, join_peers(lambda: stop.received != 0) as peers, ExitStack() as stack:
        vae = VideoVAE.from_folder(vae_path).to(device)
        text = TextStack.from_folder(text_path).to(device)
        writer = None
        if peers.rank == 0:
            console.print(bucket_table(root))
            writer = DatasetWriter(Path(root.output), vae_info(vae), text_info(text), text.encode([""]))
            stack.callback(writer.abandon)
        sink = ShardSink(Path(root.output), vae_info(vae), text_info(text), writer)
        reporter = Bars(console) if is_main_process() else Silent()
        return curate(
            root, vae, text, sink, peers=peers, reporter=reporter, device=device, stopping=lambda: stop.received != 0
        )


def _file(shard: ShardInfo) -> str:
    return shard.name.partition("/")[2]
