"""Work on many files in several processes, with results in order, and a crash that costs one file, not the run."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

import cv2

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # tasks in flight for each worker: enough to keep it busy, few enough for the memory


class WorkerCrashError(Exception):
    """The process that worked on a task died (a fault in the decoder, or out of memory)."""


class WorkerPool:
    """Processes that are started afresh ("spawn"), each computing with one thread.

    One thread everywhere also makes results equal: OpenCV's optical flow depends on the number of threads.

    Args:
        workers: number of processes; 1 works in this process, where a crash is the whole run's.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        if self._workers > 1:
            self._pool = _start(self._workers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, Result | WorkerCrashError]]:
        """Yields (task, function(task)) in the order of the tasks, or the error where the worker died.

        Several maps may be open at a time and feed each other: tasks are drawn as they are needed.

        Args:
            function: importable by name, like its arguments and results.
            tasks: drawn a few ahead of what was yielded.
        """
        if self._pool is None:
            for task in tasks:
                with _one_thread():
                    result = function(task)
                yield task, result
            return
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        for task in tasks:
            waiting.append((task, self._submit(function, task)))
            if len(waiting) >= AHEAD * self._workers:
                first, future = waiting.popleft()
                outcome = _result(function, first, future)
                yield first, outcome
        for first, future in waiting:
            outcome = _result(function, first, future)
            yield first, outcome

    def _submit(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        if self._pool is None:
            raise RuntimeError("the pool is used outside its `with` block")
        try:
            return self._pool.submit(function, task)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = _start(self._workers)
            return self._pool.submit(function, task)


def _result(function: Callable[[Task], Result], task: Task, future: Future[Result]) -> Result | WorkerCrashError:
    """Waits for a result; where some worker died, does the task again, alone, to see whether it is the cause."""
    try:
        return future.result()
    except BrokenProcessPool:
        with _start(1) as alone:
            try:
                return alone.submit(function, task).result()
            except BrokenProcessPool:
                return WorkerCrashError("the process that decoded it died")


def _start(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_limit_threads)


def _limit_threads() -> None:
    cv2.setNumThreads(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
