"""Errors a user can cause, and the exit codes they end with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # stopped by a signal after saving; running again goes on (sysexits' EX_TEMPFAIL)


class UserError(Exception):
    """Something the user can fix; printed as one message without a traceback, exit code 2.

    Args:
        what: what is wrong, with the offending value in it.
        where: the file, key or command it concerns.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        place = f"{where}: " if where else ""
        fix = f"\n  what to do: {remedy}" if remedy else ""
        super().__init__(f"{place}{what}{fix}")


class StoppedBySignalError(Exception):
    """The run saved its state after a signal and can be continued by running the same command again; exit code 75."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `did you mean "x"?` for the known name closest to `name`, or the empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'did you mean "{found[0]}"?' if found else ""
