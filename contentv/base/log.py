"""Logging: rank 0 speaks, choices are reported once, and the console is rich's."""

from __future__ import annotations

import functools
import logging
import os

from rich.console import Console
from rich.logging import RichHandler

console = Console(stderr=True)


def is_main_process() -> bool:
    """Whether this process is rank 0 (or not part of a distributed job)."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def get_logger() -> logging.Logger:
    """Returns the project's logger: INFO on rank 0, errors alone elsewhere, to stderr."""
    logger = logging.getLogger("contentv")
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    if not logger.handlers:
        logger.addHandler(RichHandler(console=console, show_path=False, rich_tracebacks=False))
        logger.propagate = False
    return logger


@functools.cache
def log_once(message: str) -> None:
    """Logs a choice (kernel, attention, dtype, decoder) the first time it is made."""
    get_logger().info(message)
