"""Work on many files in several processes, with results in order, and a crash that costs one file, not the run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

import cv2

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # tasks in flight for each worker: enough to keep it busy, few enough for the memory
EXECUTORS = ("local", "ray")


class WorkerCrashError(Exception):
    """The process that worked on a task died (a fault in the decoder, or out of memory)."""


@runtime_checkable
class Pool(Protocol):
    """Workers, on this machine or on many, that are there inside a `with` block.

    Each computes with one thread: that makes results equal however many workers there are.
    """

    @property
    def workers(self) -> int:
        """How many tasks are worked on at a time."""

    def __enter__(self) -> Pool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def map(
        self, function: Callable[[Any], Any], tasks: Iterable[Any], ahead: int = AHEAD
    ) -> Iterator[tuple[Any, Any]]:
        """Yields (task, function(task)) in the order of the tasks, or (task, WorkerCrashError) where the worker died.

        Several maps may be open at a time and feed each other: tasks are drawn as they are needed. What the function
        raises is raised here.

        Args:
            function: importable by name, like its arguments and results; one argument.
            tasks: drawn a few ahead of what was yielded.
            ahead: tasks in flight for each worker, 1 or more; more of them where results are small and tasks uneven.
        """
        ...


@runtime_checkable
class PoolSettings(Protocol):
    """What of a configuration chooses the workers."""

    @property
    def executor(self) -> str: ...

    @property
    def workers(self) -> int: ...

    @property
    def ray_address(self) -> str: ...

    @property
    def input(self) -> str: ...


def make_pool(config: PoolSettings) -> Pool:
    """Returns the workers that a configuration names: processes of this machine, or a Ray cluster's.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    if config.executor == "ray":
        from contentv.curation.ray_pool import RayPool

        ray_pool: Pool = RayPool(config.ray_address, config.workers, visible=[config.input])
        return ray_pool
    return WorkerPool(config.workers)


class WorkerPool:
    """Processes that are started afresh ("spawn"), each computing with one thread; see `Pool`.

    Args:
        workers: number of processes; 1 works in this process, where a crash is the whole run's.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        if self.workers > 1:
            self._pool = _start(self.workers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], ahead: int = AHEAD
    ) -> Iterator[tuple[Task, Result | WorkerCrashError]]:
        """Yields (task, function(task)) in the order of the tasks, see `Pool.map`."""
        if self._pool is None:
            for task in tasks:
                with one_thread():
                    result = function(task)
                yield task, result
            return
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        for task in tasks:
            waiting.append((task, self._submit(function, task)))
            if len(waiting) >= ahead * self.workers:
                first, future = waiting.popleft()
                outcome = _result(function, first, future)
                yield first, outcome
        while waiting:
            first, future = waiting.popleft()
            outcome = _result(function, first, future)
            yield first, outcome

    def _submit(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        if self._pool is None:
            raise RuntimeError("the pool is used outside its `with` block")
        try:
            return self._pool.submit(function, task)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = _start(self.workers)
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
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    """One thread; the main process alone answers signals; and a worker ends when the main process does.

    A process that is killed cannot end its workers, and these would wait for tasks for ever.
    """
    limit_threads()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def limit_threads() -> None:
    """Lets OpenCV and PyTorch compute with one thread in this process.

    OpenCV's optical flow depends on the number of threads, and so do PyTorch's sums.
    """
    cv2.setNumThreads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Computes with one thread inside the block, as workers do."""
    torch: Any = sys.modules.get("torch")
    before = (cv2.getNumThreads(), torch.get_num_threads() if torch else 1)
    limit_threads()
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        if torch:
            torch.set_num_threads(before[1])
