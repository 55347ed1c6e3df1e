"""Blockiness: the square grid that strong compression leaves, at its own size or resized."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from contentv.curation.scoring.view import ClipView, Plane

_PICTURES = 4  # of a clip, evenly spaced: what moves is averaged away, the grid stays
_WINDOW_PX = 640  # middle of larger pictures; the grid is everywhere
_LEAST_PX = 48  # below, a grid has too few lines to be told from chance
_BLOCK_PX = 8
_PERIODS_PX = (4.0, 24.0)  # 8 px blocks shrunk to half .. 16 px blocks enlarged by half
_CAP = 32.0  # grey levels; a stronger step is an edge of a thing, whatever the coder did
_LEVEL = 0.5  # grey levels a step must be large against
_CHANCE = 3.0  # standard errors of a line's strength that chance reaches in the search over periods

Profile = npt.NDArray[np.float64]


class Blockiness:
    """How much stronger steps between neighbouring pixels are on a regular square grid than off it.

    The step across each column of pixels is compared with the steps on both sides of it, summed over rows and pictures:
    (step - sides) / (step + sides). A coder's blocks make that large at every 8th or 16th column, and row. All periods
    from 4 to 24 px and all offsets are tried, so cropped and resized pictures count too; patterns that resizing itself
    leaves repeat within the period and are taken off. Edges of things cancel, unless they form a square lattice of such
    a period themselves and stand still (a chequered wall): that looks like a coder's grid.
    """

    name = "blockiness"
    meaning = "compression: steps on a square grid (JPEG, MPEG, H.264) beyond those off it"
    range = "0 none; 0.1 visible; 0.7 ruined"
    unit = ""
    kind = "visual"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the strength of the strongest grid, 0 for pictures smaller than 48 px."""
        pictures = clip.pictures
        places = np.linspace(0, len(pictures) - 1, min(_PICTURES, len(pictures))).round().astype(int)
        grays = [_middle(cv2.cvtColor(pictures[place], cv2.COLOR_RGB2GRAY)) for place in places]
        if min(grays[0].shape) < _LEAST_PX:
            return 0.0
        profiles = [_step_profile(grays, axis) for axis in (0, 1)]
        native = min(_native_strength(profile) for profile in profiles)
        length = min(len(profile) for profile in profiles)
        rows, columns = (_resized_strengths(profile[:length]) for profile in profiles)
        return max(0.0, native, float(np.minimum(rows, columns).max()))


def _middle(gray: npt.NDArray[np.uint8]) -> Plane:
    top, left = (max(0, size - _WINDOW_PX) // 2 for size in gray.shape)
    return gray[top : top + _WINDOW_PX, left : left + _WINDOW_PX].astype(np.float32)


def _step_profile(grays: list[Plane], axis: int) -> Profile:
    """Returns, for every step between rows (axis 0) or columns (1), how it compares with its neighbours, -1..1."""
    steps = np.zeros(grays[0].shape[axis] - 1)
    for gray in grays:
        low, high = (gray[:-1], gray[1:]) if axis == 0 else (gray[:, :-1], gray[:, 1:])
        step = cv2.threshold(cv2.absdiff(high, low), _CAP, 0, cv2.THRESH_TRUNC)[1]
        steps += cv2.reduce(step, 1 - axis, cv2.REDUCE_AVG).ravel() / len(grays)
    sides = (steps[:-2] + steps[2:]) / 2
    profile: Profile = (steps[1:-1] - sides) / (steps[1:-1] + sides + _LEVEL)
    return np.minimum(profile, np.quantile(profile, 0.97))  # a single strong edge is no grid


def _native_strength(profile: Profile) -> float:
    """Returns how far steps of period 8 stand out of those half a period away, less what chance gives.

    Filters against blocks (H.264's) turn one strong step into a pattern about it; half a period away is what they leave
    alone. Patterns of period 2 and 4, which resizing leaves, are the same there.
    """
    means = np.array([profile[phase::_BLOCK_PX].mean() for phase in range(_BLOCK_PX)])
    contrast = float(np.max(means - np.roll(means, _BLOCK_PX // 2)))
    return contrast - _CHANCE * _spread(profile) * math.sqrt(2 * _BLOCK_PX / len(profile))


def _resized_strengths(profile: Profile) -> Profile:
    """Returns for every period how far the strongest line stands out of all others, less what chance gives."""
    search = _search(len(profile))
    bins = len(search.count[0])
    totals = np.bincount(search.cells, np.tile(profile, len(search.periods)), minlength=search.count.size)
    means = np.where(search.count > 0, totals.reshape(-1, bins) / np.maximum(search.count, 1), -np.inf)
    best = means.argmax(axis=1)
    # Lines between pixels, and periods not quite met, spill into the neighbours.
    distance = (np.arange(bins) - best[:, None]) % search.used[:, None]
    apart = (distance > 1) & (distance < search.used[:, None] - 1)
    others = np.where(apart, means, -np.inf).max(axis=1)
    chance = _CHANCE * _spread(profile) * np.sqrt(search.periods / len(profile))
    strengths: Profile = means.max(axis=1) - others - chance
    return strengths


def _spread(profile: Profile) -> float:
    """Returns the deviation of a profile's values, by the median, which lines of a grid hardly move."""
    return 1.4826 * float(np.median(np.abs(profile - np.median(profile))))


@dataclass(frozen=True)
class _Search:
    """Which cell (period, phase) every place of a profile falls into, for all periods at once."""

    periods: Profile
    used: npt.NDArray[np.int64]  # phases of a period, each about a pixel wide
    cells: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]


@functools.lru_cache(maxsize=8)
def _search(length: int) -> _Search:
    least, most = _PERIODS_PX
    steps = math.ceil(length * math.log(most / least))  # so close that lines drift by less than half a pixel
    periods = np.unique(np.append(np.geomspace(least, most, steps), np.arange(least, most + 1)))
    used = periods.astype(np.int64)
    bins = int(used.max())
    phase = (np.arange(length)[None] * (used / periods)[:, None]).astype(np.int64) % used[:, None]
    cells = (phase + bins * np.arange(len(periods))[:, None]).ravel()
    count = np.bincount(cells, minlength=bins * len(periods)).reshape(-1, bins)
    return _Search(periods, used, cells, count)
