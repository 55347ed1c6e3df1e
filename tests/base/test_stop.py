"""StopSignal: a flag instead of an end, nested ones share it, children are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from contentv.base.stop import StopSignal


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_becomes_a_flag_and_the_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) == before


def test_one_within_another_hears_what_came_before_and_tells_what_came_meanwhile() -> None:
    with StopSignal() as outer:
        with StopSignal() as inner:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert inner.received == signal.SIGUSR1
        assert outer.received == signal.SIGUSR1
        with StopSignal() as later:
            assert later.received == signal.SIGUSR1


def test_nohup_is_respected_and_usr1_is_heard_though_it_was_ignored() -> None:
    program = (
        "import os, signal\n"
        "from contentv.base.stop import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP); assert stop.received == 0\n"
        "    os.kill(os.getpid(), signal.SIGUSR1); assert stop.received == signal.SIGUSR1\n"
    )
    command = ["bash", "-c", 'trap "" HUP USR1; exec "$@"', "bash", sys.executable, "-c", program]
    subprocess.run(command, check=True)


def test_a_second_interrupt_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
