"""The curation pipeline: files -> scenes -> clips -> scores and filters -> captions -> latents -> a dataset.

It works in phases over fixed chunks of the input and leaves a file for every chunk that a phase has done (see
`run_folder`). Ended anywhere, it goes on from there; what comes out does not depend on how many workers, processes or
interruptions there were.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from contentv.base.errors import UserError
from contentv.base.files import disk_errors
from contentv.base.lock import lock_folder
from contentv.base.types import Bucket, Peers
from contentv.curation.begin import begin_run, ordered, settings_of
from contentv.curation.caption_phase import write_captions
from contentv.curation.captioner import Captioner, build_captioner
from contentv.curation.config import CurateConfig
from contentv.curation.curate_report import CurateReport
from contentv.curation.decide_phase import decide
from contentv.curation.earlier_runs import EarlierRuns
from contentv.curation.encode import (
    CaptionEncoder,
    ChunkWriter,
    ClipEncoder,
    DatasetSink,
    LatentEncoder,
    check_buckets,
)
from contentv.curation.encode_phase import encode
from contentv.curation.inputs import open_inputs
from contentv.curation.job import Job
from contentv.curation.merge_phase import Counts, count_decided, decision_fingerprint, merge, write_rejects
from contentv.curation.progress import Reporter, Silent
from contentv.curation.run_folder import CURATION_FOLDER, ENCODE, REJECTS_FILE, list_runs
from contentv.curation.scan_phase import scan
from contentv.curation.summary import finish, save_times
from contentv.curation.timing import Stop, Timer
from contentv.curation.workers import make_pool

__all__ = [
    "CaptionEncoder", "ChunkWriter", "CurateConfig", "CurateReport", "DatasetSink", "LatentEncoder", "curate",
    "ordered",
]  # fmt: skip

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_LANES = 8  # batches encoded at a time on the CPU: each holds the VAE's activations


def curate(
    config: CurateConfig,
    vae: LatentEncoder,
    text: CaptionEncoder,
    sink: DatasetSink,
    *,
    peers: Peers | None = None,
    reporter: Reporter | None = None,
    device: torch.device | None = None,
    captioner: Captioner | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> CurateReport:
    """Makes a dataset of video and image files, or adds to one, and returns what was kept and rejected.

    Called again after an interruption, it goes on where it stopped; after a finished run, it adds what is new.

    Args:
        config: what to read and what to keep.
        vae: encodes clips.
        text: encodes captions.
        sink: takes the samples; what belongs to its dataset is written at the very end.
        peers: the processes that share the work, all called alike; None = this one alone.
        reporter: shows how far it is.
        device: of the VAE; None = that of its parameters.
        captioner: writes captions; None = as the configuration says.
        stopping: whether a signal asks to stop.

    Raises:
        UserError: the input is missing or has no media files, no file has a caption, a bucket does not fit the VAE,
            nothing was kept, or an unfinished run with other settings is there.
        StoppedBySignalError: `stopping` said so.
    """
    check_buckets([Bucket.parse(name) for name in config.buckets], vae)
    if not config.output:
        raise UserError("output is not set", where="output", remedy="name a folder for the dataset, output=DIR")
    peers, device = peers or Peers(), device or _device_of(vae)
    captioner = captioner or build_captioner(config.captioner, device)
    inputs = open_inputs(config, leave_out=config.output)
    output = Path(config.output)
    with ExitStack() as stack:
        if peers.rank == 0:
            with disk_errors(output.parent):
                (output / CURATION_FOLDER).mkdir(parents=True, exist_ok=True)
            lock = lock_folder(output / CURATION_FOLDER, "curating into this folder")
            stack.callback(os.close, lock)
            begin_run(config, inputs, settings_of(config, vae, text, captioner), sink)
        peers.barrier("planning")
        run = list_runs(output)[-1]
        pool = stack.enter_context(make_pool(config))
        job = Job(
            config, run, run.read_plan(), inputs, pool, peers, Stop(stopping), Timer(), reporter or Silent()
        )  # fmt: skip
        lanes = min(MAX_LANES, max(torch.get_num_threads(), config.workers))
        encoder = ClipEncoder(
            vae, text, dtype=DTYPES[config.precision], device=device, batch_size=config.batch_size,
            max_batch_pixels=config.max_batch_pixels, lanes=lanes,
        )  # fmt: skip
        stack.enter_context(encoder)
        return _phases(job, encoder, captioner, sink)


def _phases(job: Job, encoder: ClipEncoder, captioner: Captioner | None, sink: DatasetSink) -> CurateReport:
    started = time.perf_counter()
    earlier_runs = [run for run in list_runs(job.output) if run.number < job.run.number]
    earlier = EarlierRuns(earlier_runs, decision_fingerprint(job.plan.settings))
    is_first = job.peers.rank == 0
    try:
        scan(job, earlier)
        job.peers.barrier("scanning")
        if is_first and decide(job, earlier, sink) == 0 and sink.samples() == 0:
            write_rejects(job)
            raise _nothing_kept(job, count_decided(job))
        job.peers.barrier("deciding")
        write_captions(job, captioner)
        job.peers.barrier("captioning")
        encode(job, encoder, sink)
    finally:
        save_times(job, time.perf_counter() - started)
    job.peers.barrier("encoding")
    if is_first:
        counts = merge(job, sink)
        if sink.samples() == 0:
            raise _nothing_kept(job, counts)
        finish(job, counts, time.perf_counter() - started)
    job.peers.barrier("merging")
    summary = job.run.read_summary()
    return CurateReport(**{name: summary[name] for name in CurateReport.__dataclass_fields__})


def _nothing_kept(job: Job, counts: Counts) -> UserError:
    """Returns why no sample was kept. The run stays if other filters could use it, otherwise it is begun anew."""
    reasons = "; ".join(f"{count} x {counts.reasons[rule]}" for rule, count in counts.rules.most_common(3))
    where = f"input={job.config.input}"
    stays = counts.clips > 0 and not job.run.done(ENCODE)
    if not stays:
        job.run.remove()
    if counts.rules["no_caption"] == counts.rejected:
        return UserError(
            "no file has a caption that fits it", where=where,
            remedy=f"write captions to NAME.txt beside NAME.mp4, or set captioner.kind ({reasons})",
        )  # fmt: skip
    again = "; with other filters= or dedup= nothing need be decoded again" if stays else ""
    return UserError(
        "nothing was kept", where=where,
        remedy=f"see {job.output / REJECTS_FILE}; most often: {reasons}{again}",
    )  # fmt: skip


def _device_of(vae: object) -> torch.device:
    if isinstance(vae, nn.Module):
        for parameter in vae.parameters():
            return parameter.device
    return torch.device("cpu")
