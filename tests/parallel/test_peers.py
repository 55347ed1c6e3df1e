"""Processes that wait for each other in a key-value store, and what a failure of one does to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore

from contentv.base.errors import StoppedBySignalError
from contentv.parallel.peers import PeerFailedError, StoreMeeting


def together(*ranks: Callable[[StoreMeeting], None], **settings: Any) -> list[BaseException | None]:
    """Runs each rank in a thread and returns what each of them raised."""
    store = HashStore()
    raised: list[BaseException | None] = [None] * len(ranks)

    def run(rank: int) -> None:
        try:
            with StoreMeeting(store, rank, len(ranks), **settings) as meeting:
                ranks[rank](meeting)
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def test_nobody_passes_before_all_have_come() -> None:
    order: list[str] = []

    def rank(name: str, wait_s: float) -> Callable[[StoreMeeting], None]:
        def work(meeting: StoreMeeting) -> None:
            for step in range(3):
                time.sleep(wait_s)
                order.append(f"before {step}")
                meeting.wait("working")
                order.append(f"after {step}")
                meeting.wait("checking")

        return work

    assert together(rank("a", 0.0), rank("b", 0.05), rank("c", 0.02)) == [None] * 3
    expected = [f"{when} {step}" for step in range(3) for when in ("before", "after") for _ in range(3)]
    assert order == expected


def test_a_failure_is_told_to_the_others() -> None:
    def fails(meeting: StoreMeeting) -> None:
        raise ValueError("the disk is full")

    raised = together(lambda meeting: meeting.wait("scanning"), fails)
    assert isinstance(raised[0], PeerFailedError)
    assert str(raised[0]) == "rank 1 failed while scanning: ValueError: the disk is full"


def test_a_stop_is_a_stop_for_all() -> None:
    def stops(meeting: StoreMeeting) -> None:
        raise StoppedBySignalError("a signal")

    raised = together(lambda meeting: meeting.wait("scanning"), stops)
    assert isinstance(raised[0], StoppedBySignalError)


def test_a_process_that_dies_without_a_word_is_missed() -> None:
    def dies(meeting: StoreMeeting) -> None:
        meeting._over.set()
        time.sleep(3)

    raised = together(lambda meeting: meeting.wait("encoding"), dies, missed_s=0.5, beat_s=0.05)
    assert isinstance(raised[0], PeerFailedError)
    assert "nothing has been heard of rank 1" in str(raised[0])


def test_a_signal_ends_the_waiting() -> None:
    store = HashStore()
    with (
        pytest.raises(StoppedBySignalError, match="waiting for rank 1"),
        StoreMeeting(store, 0, 2, stopping=lambda: True) as meeting,
    ):
        meeting.wait("scanning")
