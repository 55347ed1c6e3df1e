"""A thread that prepares the next items while the current one is used."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.1


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
