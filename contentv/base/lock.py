"""One writer per folder: an advisory lock on the folder itself, given back when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from contentv.base.errors import UserError
from contentv.base.log import get_logger


def lock_folder(folder: Path, what: str) -> int:
    """Returns a descriptor of the folder that holds its only writer's lock until it is closed.

    Args:
        folder: it exists.
        what: what another process is doing that holds the lock, for the message.

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"another process is {what}", where=str(folder), remedy="wait for it or end it, or write elsewhere"
        ) from error
    except OSError as error:
        get_logger().warning(f"{folder}: this disk has no locks ({error}); run one writer at a time")
    return descriptor
