"""Text laid over the picture: subtitles, captions, watermarks."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt

from contentv.curation.scoring.view import ClipView

_STROKE_PX = 9  # thicker things are no strokes (of a short side of 256 px)
_CONTRAST = 36  # grey levels between a stroke and what is around it
_LINE_PX = (6, 40)  # height of a line of text
_LEAST_ASPECT = 1.8  # width over height of a line
_FILL = (0.12, 0.75)  # of a line's box that is strokes
_LEAST_CROSSINGS = 1.1  # strokes that a level cut through a line meets, per line height
_MOST_SPREAD = 0.3  # of the strokes' grey levels, against their contrast: overlaid text has one colour
_LEAST_STEADY = 0.7  # of a line's strokes that stand still; of noise, chance lets fewer

Mask = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, width, height


class TextArea:
    """The share of the picture under lines of overlaid text, mean over the pictures.

    Strokes are thin things lighter (or darker) than all around them that stand still from one picture to the next,
    found by a morphological top-hat. Strokes side by side are joined to lines, and a line counts as text if it is of
    one colour, wide, evenly filled and crossed by many strokes. That finds level lines of alphabets and ideographs
    whose height is about 2.5 to 15 % of the short side. It does not find larger, slanted, faint, upright, or moving
    text, and a picket fence in front of a still camera may pass for a line. In single pictures nothing can be
    asked to stand still: signs in the scene count as well.
    """

    name = "text_area"
    meaning = "share of the picture under lines of overlaid text, such as subtitles"
    range = "0 none .. 1; two subtitle lines about 0.1"
    unit = ""
    kind = "text"
    needs_time = False

    def score(self, clip: ClipView) -> float:
        """Returns the share."""
        planes = [gray.astype(np.uint8) for gray in clip.grays]
        covered = [np.zeros(plane.shape, bool) for plane in planes]
        for inverted in (False, True):
            grays = [cv2.bitwise_not(plane).astype(np.uint8) for plane in planes] if inverted else planes
            strokes = [_strokes(gray) for gray in grays]
            for number, gray in enumerate(grays):
                # The next picture; the last one has only the one before it.
                other = number + 1 if number + 1 < len(grays) else max(0, number - 1)
                for left, top, width, height in _lines(gray, strokes[number], strokes[other]):
                    covered[number][top : top + height, left : left + width] = True
        return float(np.mean([picture.mean() for picture in covered]))


def _strokes(gray: Mask) -> Mask:
    """Returns 255 where a thin thing is lighter than what is around it."""
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (_STROKE_PX, _STROKE_PX))
    hat = cv2.morphologyEx(gray, cv2.MORPH_TOPHAT, kernel)
    return cv2.threshold(hat, _CONTRAST, 255, cv2.THRESH_BINARY)[1].astype(np.uint8, copy=False)


def _lines(gray: Mask, here: Mask, there: Mask) -> Iterator[Box]:
    """Yields the boxes of what looks like lines of text, lighter than the ground.

    Args:
        gray: the picture.
        here: its strokes.
        there: those of a picture at another time.

    A dark outline makes the ground between letters look like strokes too. So strokes are first gathered to regions,
    those of a region that do not have its colour are left out, and the rest is gathered to lines.
    """
    strokes = cv2.bitwise_and(here, there).astype(np.uint8, copy=False)
    ridge = cv2.dilate(gray, np.ones((5, 5), np.uint8))
    for left, top, width, height in _regions(strokes):
        inside = slice(top, top + height), slice(left, left + width)
        levels = ridge[inside][strokes[inside] > 0]
        colour, ground = float(np.percentile(levels, 90)), float(np.median(gray[inside][strokes[inside] == 0]))
        least = colour - _MOST_SPREAD * max(0.0, colour - ground)
        coloured = ridge[inside] >= least
        kept = np.where(coloured, strokes[inside], 0).astype(np.uint8)
        for x, y, line_width, line_height in _regions(kept):
            line = slice(y, y + line_height), slice(x, x + line_width)
            before = np.count_nonzero(here[inside][line][coloured[line]])
            if _is_line(kept[line] > 0) and np.count_nonzero(kept[line]) >= _LEAST_STEADY * before:
                yield left + x, top + y, line_width, line_height


def _regions(strokes: Mask) -> Iterator[Box]:
    """Yields the boxes of strokes side by side."""
    joined = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_RECT, (11, 3)))
    _, _, boxes, _ = cv2.connectedComponentsWithStats(joined, connectivity=4)
    for left, top, width, height, area in boxes[1:].tolist():
        if height >= _LINE_PX[0] and width >= _LEAST_ASPECT * _LINE_PX[0] and area >= 0.3 * width * height:
            yield left, top, width, height


def _is_line(strokes: npt.NDArray[np.bool_]) -> bool:
    height, width = strokes.shape
    if height > _LINE_PX[1] or width < _LEAST_ASPECT * height or not _FILL[0] <= float(strokes.mean()) <= _FILL[1]:
        return False
    starts = np.diff(strokes.astype(np.int8), axis=1) == 1
    middle = starts[height // 4 : height - height // 4]
    return float(middle.sum(axis=1).mean()) * height / width >= _LEAST_CROSSINGS
