"""What a stage will train at which noise level: told before its first step, and left in the run's folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from contentv.base.errors import UserError
from contentv.base.files import to_json, write_atomic
from contentv.base.log import get_logger, is_main_process
from contentv.config.schema import TrainRoot
from contentv.data import DatasetSource
from contentv.data.census import ScoreCensus
from contentv.diffusion.noise_levels import NoiseLevels, noise_levels, starved
from contentv.diffusion.timesteps import build_sampler
from contentv.train.noise_watch import NoiseWatch, warn_starved

NOISE_FILE = "noise_levels.json"
OUTSIDE = 0.01  # share of clips beyond what quality.json was fitted to that is worth a warning


def watch_noise(root: TrainRoot, source: DatasetSource, out: Path) -> NoiseWatch | None:
    """Returns what completes the run's rows, after telling which noise levels it trains; None if it draws none.

    Raises:
        UserError: clips lack scores and timestep.missing=refuse.
    """
    if root.stage.objective == "reward" and root.reward.flow_weight == 0:
        return None
    keeping = root.data.quality_dropout or root.data.quality_weight
    census = source.census() if keeping or root.timestep.kind == "tqd" else ScoreCensus()
    try:
        levels = noise_levels(build_sampler(root.timestep), census.motion, census.visual, keeping=keeping)
    except ValueError as error:
        raise UserError(
            f"{error}", where=f"data.path={root.data.path}", remedy="score all clips, or use timestep.missing=base"
        ) from None
    if is_main_process():
        _tell(levels, census.outside)
        write_atomic(out / NOISE_FILE, to_json({**asdict(levels), "keeping": keeping}))
    return NoiseWatch(levels, dropout=root.data.quality_dropout, weight=root.data.quality_weight)


def _tell(levels: NoiseLevels, outside: int) -> None:
    log = get_logger()
    log.info("%s", levels.describe())
    if levels.clips and levels.unscored == levels.clips:
        log.warning("none of the clips has both scores, so they change nothing: curate with scorers to have them")
    if outside > OUTSIDE * levels.clips:
        log.warning(
            "%d of %d clips have scores beyond all that quality.json was fitted to: contentv index path=DIR refit=true",
            outside, levels.clips,
        )  # fmt: skip
    if bins := starved(levels.base, levels.trained):
        warn_starved(bins)
