"""Signals to a flag: work that is told to stop ends at the next place from where it can go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class StopSignal:
    """Turns SIGTERM, SIGUSR1, SIGHUP and SIGINT into a flag while it is entered; a second SIGINT interrupts at once.

    One within another hears what the outer one has heard, and tells it what came meanwhile. Under `nohup`, SIGHUP stays
    ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self.forward: Callable[[int], None] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        outer = self._outer()
        if outer is not None:
            self.received = outer.received
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outer = self._outer()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if outer is not None:
            outer.received = outer.received or self.received

    def _outer(self) -> StopSignal | None:
        """Returns the one that was entered when this one was."""
        owner = getattr(self._before.get(signal.SIGTERM), "__self__", None)
        return owner if isinstance(owner, StopSignal) else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.received = number
        if self.forward is not None:
            self.forward(number)
