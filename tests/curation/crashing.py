"""Work for processes that die; apart, because they import the module it is in."""

from __future__ import annotations

import os


def square_unless_three(number: int) -> int:
    """Returns the square; three is deadly."""
    if number == 3:
        os._exit(1)
    return number * number
