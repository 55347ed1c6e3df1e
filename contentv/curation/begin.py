"""How a run begins: a new one is planned, or an unfinished one is gone on with, if it is the same."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

from contentv.base.errors import UserError
from contentv.base.files import disk_errors
from contentv.base.log import get_logger
from contentv.curation.captioner import Captioner
from contentv.curation.config import CurateConfig
from contentv.curation.encode import CaptionEncoder, DatasetSink, LatentEncoder
from contentv.curation.inputs import Inputs
from contentv.curation.run_folder import (
    CAPTION,
    CURATION_FOLDER,
    DECIDE,
    ENCODE,
    SCAN,
    THUMBNAILS_FOLDER,
    Plan,
    RunFolder,
    Settings,
    differences,
    list_runs,
    next_run,
)

# Keys that change nothing but the time it takes, and those that say where things are.
_FREE = ("input", "output", "restart", "workers", "executor", "ray_address")
_DECIDING = ("filters", "dedup")
_ENCODING = ("precision", "batch_size", "max_batch_pixels", "keep_media")
TOLD = 6  # differing settings that are named


def settings_of(
    config: CurateConfig, vae: LatentEncoder, text: CaptionEncoder, captioner: Captioner | None
) -> Settings:
    """Returns everything that a run's result depends on, but its input, by the phase from which on it counts."""
    settings: Settings = {SCAN: {}, DECIDE: {}, CAPTION: {}, ENCODE: {}}
    for entry in dataclasses.fields(CurateConfig):
        name, value = entry.name, getattr(config, entry.name)
        if name in _FREE:
            continue
        phases = {**dict.fromkeys(_DECIDING, DECIDE), **dict.fromkeys(_ENCODING, ENCODE), "captioner": CAPTION}
        settings[phases.get(name, SCAN)].update(_flat(name, value))
    # These decide what the scan looks at.
    settings[SCAN]["dedup.encoder"] = settings[DECIDE].pop("dedup.encoder")
    for key in ("captioner.kind", "captioner.when"):
        settings[SCAN][key] = settings[CAPTION].pop(key)
    # Speed and failures of the captioner are no settings of its captions; its fingerprint says what is.
    settings[CAPTION] = {"captioner": captioner.fingerprint if captioner is not None else "none"}
    settings[ENCODE].update({"vae": vae.fingerprint, "text": text.fingerprint})
    plain: Settings = json.loads(json.dumps(settings))
    return plain


def _flat(name: str, value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        entries = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return {key: found for inner, v in entries.items() for key, found in _flat(f"{name}.{inner}", v).items()}
    return {name: value}


def begin_run(config: CurateConfig, inputs: Inputs, settings: Settings, sink: DatasetSink) -> RunFolder:
    """Returns the folder of the run that is to be done, with its plan.

    Args:
        config: what is to be curated.
        inputs: its files.
        settings: see `settings_of`.
        sink: forgets what an unfinished run has written, if it is thrown away.

    Raises:
        UserError: an unfinished run has other settings or another input, or cannot be thrown away.
    """
    output = Path(config.output)
    with disk_errors(output.parent):
        (output / CURATION_FOLDER).mkdir(parents=True, exist_ok=True)
    runs = list_runs(output)
    _remove_leftovers(output, runs)
    unfinished = runs[-1] if runs and not runs[-1].is_finished else None
    if unfinished is not None and config.restart:
        sink.discard(f"{unfinished.prefix}-")
        _remove_thumbnails(output, unfinished)
        unfinished.remove()
        runs, unfinished = runs[:-1], None
    if unfinished is not None:
        _go_on(unfinished, config, inputs, settings)
        return unfinished
    run = next_run(output, runs)
    names = ordered(inputs.units, config)
    size = config.chunk_size
    chunks = [names[first : first + size] for first in range(0, len(names), size)]
    run.write_plan(Plan(_place(config.input), settings, chunks))
    return run


def ordered(names: list[str], config: CurateConfig) -> list[str]:
    """Returns the units in the order they are taken: as they are, or drawn from the seed by their names."""
    if not config.shuffle:
        return names
    return sorted(names, key=lambda name: hashlib.blake2b(f"{config.seed}/{name}".encode()).digest())


def _go_on(run: RunFolder, config: CurateConfig, inputs: Inputs, settings: Settings) -> None:
    """Passes over an unfinished run that is the same; settings that nothing done so far depends on may differ."""
    plan = run.read_plan()
    there, planned = set(inputs.units), {unit for chunk in plan.chunks for unit in chunk}
    if plan.input != _place(config.input) and not planned <= there:
        raise UserError(
            f"an unfinished curation is there, of other files: input was {plan.input}", where=str(run.path),
            remedy="finish it with its own input=, or throw it away with restart=true",
        )  # fmt: skip
    differing = differences(plan.settings, settings)
    still_free = [phase for phase in (DECIDE, CAPTION, ENCODE) if not run.done(CAPTION) and not run.done(ENCODE)]
    if run.done(CAPTION) and not run.done(ENCODE):
        still_free = [ENCODE]
    refused = [text for phase, texts in differing.items() if phase not in still_free for text in texts]
    if refused:
        more = f" and {len(refused) - TOLD} more" if len(refused) > TOLD else ""
        raise UserError(
            f"an unfinished curation is there, with other settings: {'; '.join(refused[:TOLD])}{more}",
            where=str(run.path),
            remedy="finish it with the settings it was begun with, or throw it away with restart=true",
        )
    changed = [text for texts in differing.values() for text in texts]
    if changed:
        get_logger().info(f"{run.name} goes on with other settings, which nothing depends on yet: {'; '.join(changed)}")
        run.write_plan(Plan(plan.input, settings, plan.chunks))
    added = len(there - planned)
    if added:
        get_logger().info(f"{added} inputs are new since {run.name} was planned; run again when it is done to add them")


def _remove_leftovers(output: Path, runs: list[RunFolder]) -> None:
    """Removes files that a killed process had begun; the lock says that none is at it."""
    places = [output.glob(".*.tmp"), output.glob(f"{THUMBNAILS_FOLDER}/.*.tmp")]
    places += [run.path.glob(pattern) for run in runs[-1:] for pattern in (".*.tmp", "*/.*.tmp")]
    for path in itertools.chain.from_iterable(places):
        path.unlink(missing_ok=True)


def _remove_thumbnails(output: Path, run: RunFolder) -> None:
    for path in output.glob(f"{THUMBNAILS_FOLDER}/{run.prefix}-*.jpg"):
        path.unlink(missing_ok=True)


def _place(path: str) -> str:
    return os.path.realpath(path)
