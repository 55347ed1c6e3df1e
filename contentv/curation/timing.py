"""How long phases take, and how busy their workers are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from contentv.base.errors import StoppedBySignalError
from contentv.curation.workers import AHEAD, Pool, WorkerCrashError

STOP_GRACE_S = 15.0  # after a signal, for the chunks under way; schedulers kill after 30 s


@dataclass
class PhaseTime:
    """What a phase did in this process.

    Attributes:
        seconds: on the clock.
        items: files or clips.
        cpu_s: computing time of this process.
        worker_cpu_s: computing time of the tasks that workers did.
    """

    seconds: float = 0.0
    items: int = 0
    cpu_s: float = 0.0
    worker_cpu_s: float = 0.0

    def to_row(self) -> dict[str, Any]:
        """Returns its JSON form."""
        return {
            "seconds": round(self.seconds, 3), "items": self.items, "cpu_s": round(self.cpu_s, 3),
            "worker_cpu_s": round(self.worker_cpu_s, 3),
        }  # fmt: skip


class Stop:
    """Whether to stop, asked of a flag; what is under way may end within a time of grace.

    Args:
        requested: whether a signal came.
        grace_s: seconds from then on.
    """

    def __init__(self, requested: Callable[[], bool] = lambda: False, grace_s: float = STOP_GRACE_S) -> None:
        self._requested, self._grace_s = requested, grace_s
        self._since: float | None = None

    @property
    def requested(self) -> bool:
        """Whether nothing new shall be begun."""
        if self._since is None and self._requested():
            self._since = time.monotonic()
        return self._since is not None

    def check(self, *, at_once: bool = False) -> None:
        """Passes unless it is time to stop.

        Args:
            at_once: nothing is under way that the time of grace would save.

        Raises:
            StoppedBySignalError: it is.
        """
        if self.requested and self._since is not None and (at_once or time.monotonic() - self._since > self._grace_s):
            raise StoppedBySignalError("curation stopped by a signal; run the same command again to go on")


@dataclass(frozen=True)
class ChunkTask:
    """A task and the chunk it belongs to; without one, the chunk's end."""

    chunk: int
    task: Any = None


@dataclass(frozen=True)
class Outcome:
    """What came of a task, or (`task` None) that a chunk has no more of them."""

    chunk: int
    task: Any = None
    result: Any = None


def chunk_tasks(chunks: Iterable[tuple[int, Iterable[Any]]], stop: Stop) -> Iterator[ChunkTask]:
    """Yields the tasks of chunks, (number, tasks) each, and the end of each; no further chunk once a stop is asked."""
    for chunk, inside in chunks:
        if stop.requested:
            return
        for task in inside:
            yield ChunkTask(chunk, task)
        yield ChunkTask(chunk)


def map_tasks(
    pool: Pool,
    function: Callable[[Any], Any],
    tasks: Iterable[ChunkTask],
    clock: PhaseTime,
    stop: Stop,
    ahead: int = AHEAD,
) -> Iterator[Outcome]:
    """Yields the results of chunks' tasks in order, and each chunk's end; workers go on across the ends.

    Args:
        pool: works.
        function: importable by name, of one task.
        tasks: see `chunk_tasks`.
        clock: gets the workers' computing time.
        stop: see `Stop`.
        ahead: see `Pool.map`.

    Raises:
        StoppedBySignalError: the time of grace is over.
    """
    for task, result in pool.map(partial(timed, function), tasks, ahead):
        stop.check()
        if isinstance(result, WorkerCrashError):
            yield Outcome(task.chunk, task.task, result)
        else:
            clock.worker_cpu_s += result[1]
            yield Outcome(task.chunk, task.task, result[0])


def timed(function: Callable[[Any], Any], task: ChunkTask) -> tuple[Any, float]:
    """Returns a function's result (None at a chunk's end) and this process's computing seconds since the last call.

    The first call also tells what starting the process took, so that nothing a worker does is left out.
    """
    result = None if task.task is None else function(task.task)
    before, _SPENT[0] = _SPENT[0], time.process_time()
    return result, _SPENT[0] - before


_SPENT = [0.0]


@dataclass
class Timer:
    """Times the phases of a run."""

    phases: dict[str, PhaseTime] = field(default_factory=dict)

    def phase(self, name: str) -> _Running:
        """Returns a block whose time is a phase's, giving its `PhaseTime`."""
        return _Running(self.phases.setdefault(name, PhaseTime()))


class _Running:
    def __init__(self, time_of: PhaseTime) -> None:
        self._time = time_of
        self._started = (0.0, 0.0)

    def __enter__(self) -> PhaseTime:
        self._started = (time.perf_counter(), time.process_time())
        return self._time

    def __exit__(self, *_: object) -> None:
        self._time.seconds += time.perf_counter() - self._started[0]
        self._time.cpu_s += time.process_time() - self._started[1]
