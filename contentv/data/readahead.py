"""Threads that read: some at once, and one that prepares the next items while the current one is used."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.1


class Threads:
    """Threads that run one function for many numbers.

    Args:
        count: at least 1.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="contentv-read")

    def each(self, function: Callable[[int], T], count: int) -> Iterator[tuple[int, T]]:
        """Yields (i, the function's result) for every i below `count`, as soon as it is there.

        Raises:
            Exception: what the function has raised for the smallest i, after all threads have come to rest.
        """
        done: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()

        def run(places: range) -> None:
            for i in places:
                try:
                    done.put((i, function(i), None))
                except BaseException as error:  # handed to the consumer, whatever it is
                    done.put((i, None, error))

        futures = [self._executor.submit(run, range(first, count, self.count)) for first in range(self.count)]
        failures: dict[int, BaseException] = {}
        try:
            for _ in range(count):
                i, result, error = done.get()
                if error is None:
                    yield i, result  # type: ignore[misc]
                else:
                    failures[i] = error
        finally:
            wait(futures)
        if failures:
            raise failures[min(failures)]

    def close(self) -> None:
        """Ends the threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class ReadAhead(Generic[T]):
    """Calls `produce` over and over in a background thread and hands its results out in order.

    Args:
        produce: makes the next item; an exception of it is raised by the `get` that would have returned the item.
        depth: how many items may lie ready, at least 1.
    """

    def __init__(self, produce: Callable[[], T], depth: int) -> None:
        self._produce = produce
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="contentv-readahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._offer((self._produce(), None))
        except BaseException as error:  # handed to the consumer, whatever it is
            self._offer((None, error))

    def _offer(self, result: tuple[T | None, BaseException | None]) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(result, timeout=_POLL_S)
                return

    def get(self) -> T:
        """Returns the next item, waiting for it; after a failure every call raises it again."""
        if self._failure is None:
            item, self._failure = self._ready.get()
            if self._failure is None:
                return item  # type: ignore[return-value]
        raise self._failure

    def close(self) -> None:
        """Ends the thread and waits for it; items that lie ready are forgotten."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
