"""Phase 2, DECIDE: one process reads what all have found and says which clips are kept."""

from __future__ import annotations

from contentv.curation.decide import Decider, FileDecision
from contentv.curation.earlier_runs import EarlierRuns
from contentv.curation.encode import DatasetSink
from contentv.curation.job import Job
from contentv.curation.run_folder import DECIDE
from contentv.curation.scan_phase import read_embeddings


def decide(job: Job, earlier: EarlierRuns, sink: DatasetSink) -> int:
    """Decides about all chunks, anew, and returns how many clips are kept.

    Args:
        job: the run; every chunk has been scanned.
        earlier: what runs before it have kept.
        sink: knows the samples that the dataset has from elsewhere.
    """
    with (
        job.timer.phase(DECIDE) as clock,
        job.reporter.phase(DECIDE, len(job.chunks), 0, "clips") as advance,
    ):
        decider = Decider(job.config.filters, job.config.dedup, earlier, sink.taken)
        kept = 0
        for chunk in job.chunks:
            decisions = decider.decide(job.records(chunk), read_embeddings(job, chunk))
            rows = [decision.to_row() for decision in decisions]
            job.run.write(DECIDE, chunk, rows)
            clips = sum(decision.clips for decision in decisions)
            kept += sum(len(decision.keep) for decision in decisions)
            clock.items += clips
            advance(1, clips)
            job.stop.check(at_once=True)
    return kept


def read_decisions(job: Job, chunk: int) -> list[FileDecision]:
    """Returns what was decided about a chunk's files, in order."""
    return [FileDecision.from_row(row) for row in job.run.read(DECIDE, chunk)]
