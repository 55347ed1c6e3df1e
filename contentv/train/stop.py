"""Signals to a flag: a run that is told to stop saves at the next step boundary."""

from __future__ import annotations

from contentv.base.stop import StopSignal

__all__ = ["StopSignal"]
