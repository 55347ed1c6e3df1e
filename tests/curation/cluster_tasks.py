"""Work for the machines of a cluster; apart, because they import the module it is in."""

from __future__ import annotations

import os
import time
from pathlib import Path

import cv2
import numpy as np

from contentv.base.errors import UserError


def node() -> str:
    """Returns the machine of the cluster that this runs on, "" outside of one."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def place_of(number: int) -> tuple[int, str, str, int]:
    """Returns the number, the machine, the working folder and OpenCV's threads, after a moment."""
    time.sleep(0.2)
    return number, node(), os.getcwd(), cv2.getNumThreads()


def flow_of(seed: int) -> np.ndarray:
    """Returns an optical flow, large enough to travel by shared memory; it depends on OpenCV's number of threads."""
    rng = np.random.default_rng(seed)
    first = cv2.GaussianBlur(rng.integers(0, 255, (240, 320), dtype=np.uint8), (0, 0), 4.0)
    second = np.roll(first, 2, axis=1)
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(first, second, None)
    return np.asarray(flow)


def logged(task: tuple[str, int]) -> int:
    """Returns ten times the number; writes down where and by which process it was begun, and when it is done."""
    folder, number = task
    with (Path(folder) / f"{number}.begun").open("a") as file:
        file.write(f"{node()} {os.getpid()}\n")
    time.sleep(0.7)
    (Path(folder) / f"{number}.done").touch()
    return 10 * number


def dies_once(mark: str) -> str:
    """Returns "done"; dies before that when called for the first time."""
    if not Path(mark).exists():
        Path(mark).touch()
        os._exit(1)
    return "done"


def refuses(number: int) -> int:
    """Raises what a user can fix."""
    raise UserError(f"{number} is too many", where="here", remedy="take fewer")
