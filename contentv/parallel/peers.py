"""Processes that share a job in parts and only wait for each other: no collectives, no limit on how long a part takes.

They meet in torchrun's key-value store. A process that fails, or stops at a signal, says so there; one that dies
without a word is missed. The others then stop too, and say why.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from contentv.base.errors import StoppedBySignalError, UserError
from contentv.base.types import Peers

POLL_S = 0.2
BEAT_S = 5.0
MISSED_S = 90.0  # without a sign of life; a process that swaps or waits for a disk must not be taken for dead
JOIN_S = 300.0
_STOPPED = "stopped"


class PeerFailedError(RuntimeError):
    """Another process of the job failed; its own message says why."""


@contextmanager
def join_peers(stopping: Callable[[], bool] = lambda: False) -> Iterator[Peers]:
    """Gives this process's place among those that torchrun started; alone, it is a world of one.

    Leaving the block by an exception ends the waiting of the others.

    Args:
        stopping: whether a signal asks this process to stop; then it does not wait on.

    Raises:
        UserError: the other processes did not come within five minutes.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Peers()
        return
    try:
        store, rank, world = next(rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_S)))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the processes of this job do not find each other ({error})", where="torchrun",
            remedy="start it with torchrun, which sets MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE",
        ) from error  # fmt: skip
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    meeting = StoreMeeting(PrefixStore(f"contentv-peers-{attempt}", store), rank, world, stopping)
    with meeting:
        yield Peers(rank, world, meeting.wait)


class StoreMeeting:
    """Barriers over a key-value store.

    Args:
        store: shared by all.
        rank: of this process.
        world: how many there are.
        stopping: whether this process is to stop.
        missed_s: seconds without a sign of life after which a process counts as dead.
        beat_s: seconds between this one's signs of life.
    """

    def __init__(
        self, store: Any, rank: int, world: int, stopping: Callable[[], bool] = lambda: False,
        missed_s: float = MISSED_S, beat_s: float = BEAT_S,
    ) -> None:  # fmt: skip
        self._store, self._rank, self._world, self._stopping = store, rank, world, stopping
        self._missed_s, self._beat_s = missed_s, beat_s
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> StoreMeeting:
        self._store.set(f"alive/{self._rank}", "0")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._over.set()
        if error is not None and not isinstance(error, PeerFailedError):
            what = _STOPPED if isinstance(error, StoppedBySignalError) else f"{type(error).__name__}: {error}"
            self._try(lambda: self._store.set("failed", f"{self._rank}|{what}"))
        elif error is None:
            self._try(self._leave)

    def wait(self, what: str) -> None:
        """Waits until every process has come here.

        Args:
            what: the work before, the same on all, for messages.

        Raises:
            PeerFailedError: one of them failed or died.
            StoppedBySignalError: a signal asks to stop, here or there.
        """
        self._count += 1
        name = f"{self._count}/{what}"
        self._store.set(f"{name}/{self._rank}", "1")
        missing = [rank for rank in range(self._world) if rank != self._rank]
        seen: dict[int, tuple[bytes, float]] = {}
        try:
            while missing:
                missing = [rank for rank in missing if not self._store.check([f"{name}/{rank}"])]
                if missing:
                    self._check(missing, what, seen)
                    time.sleep(POLL_S)
        except (RuntimeError, OSError) as error:
            if isinstance(error, PeerFailedError):
                raise
            raise PeerFailedError(f"the process that the others meet at is gone ({error})") from error

    def _check(self, missing: list[int], what: str, seen: dict[int, tuple[bytes, float]]) -> None:
        if self._stopping():
            raise StoppedBySignalError(f"stopped by a signal while waiting for rank {missing[0]} ({what})")
        if self._store.check(["failed"]):
            rank, _, reason = self._store.get("failed").decode().partition("|")
            if reason == _STOPPED:
                raise StoppedBySignalError(f"rank {rank} was stopped by a signal; run the same command again to go on")
            raise PeerFailedError(f"rank {rank} failed while {what}: {reason}")
        now = time.monotonic()
        for rank in missing:
            beat = self._store.get(f"alive/{rank}") if self._store.check([f"alive/{rank}"]) else b""
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, now)
            elif now - seen[rank][1] > self._missed_s:
                raise PeerFailedError(f"nothing has been heard of rank {rank} for {self._missed_s:.0f} s ({what})")

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(self._beat_s):
            count += 1
            if not self._try(lambda count=count: self._store.set(f"alive/{self._rank}", str(count))):  # type: ignore[misc]
                return

    def _leave(self) -> None:
        """Where rank 0 holds the store, it must not leave before the others have read of the last barrier."""
        self._store.set(f"left/{self._rank}", "1")
        end = time.monotonic() + 10 * POLL_S
        others = [f"left/{rank}" for rank in range(self._world)]
        while self._rank == 0 and time.monotonic() < end and not self._store.check(others):
            time.sleep(POLL_S / 4)

    def _try(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except (RuntimeError, OSError):  # the store is gone, and with it everybody who could read this
            return False
        return True
