"""Text area by a learned detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from contentv.base.errors import UserError
from contentv.curation.scoring.view import ClipView, Plane

_PICTURES = 4
_SIDE_PX = 736  # longer side of the network's input; both sides become multiples of 32
_MEAN_BGR = (122.67891434, 116.66876762, 104.00698793)
_TEXT_PIXEL = 0.3
_TEXT_REGION = 0.5
_LEAST_REGION_PX = 12
_GROWTH = 2.0


class OcrTextArea:
    """The share of the picture under text of any kind, in the scene or laid over it, mean over a few pictures.

    The detector is a DB network in an ONNX file, as OpenCV's model zoo has them: BGR in, one map of probabilities out.
    A pixel is text from 0.3 on, a region if its mean is 0.5 or more. The networks are trained to mark the inner part
    of a line only; a region's upright or slanted box is grown by 2 x area / girth on every side to undo that. Input
    scaling, thresholds and growth are those of OpenCV's published examples.

    Source: Liao et al., "Real-time Scene Text Detection with Differentiable Binarization", 2020.
    """

    name = "text_area_ocr"
    meaning = "share of the picture under text of any kind, by a text detector"
    range = "0 none .. 1"
    unit = ""
    kind = "plug-in"
    needs_time = False

    def __init__(self, network: Any) -> None:
        self._network = network

    @classmethod
    def from_file(cls, path: str | Path) -> OcrTextArea:
        """Returns the scorer with the detector of an ONNX file.

        Raises:
            UserError: the file is missing, or OpenCV cannot read it.
        """
        file = Path(path)
        if not file.is_file():
            raise UserError(f"{file} is no file", where="scoring.ocr", remedy="name an ONNX file of a DB text detector")
        try:
            network: Any = cv2.dnn.readNetFromONNX(str(file))
        except cv2.error as error:
            raise UserError(
                f"OpenCV cannot read it ({error.err})", where=str(file), remedy="use a DB text detector in ONNX"
            ) from error
        return cls(network)

    def score(self, clip: ClipView) -> float:
        """Returns the mean over the pictures.

        Raises:
            UserError: the network gives something else than one map of the picture.
        """
        pictures = clip.pictures
        places = np.linspace(0, len(pictures) - 1, min(_PICTURES, len(pictures))).round().astype(int)
        return float(np.mean([_covered(self._probabilities(pictures[place])).mean() for place in places]))

    def _probabilities(self, picture: npt.NDArray[np.uint8]) -> Plane:
        height, width = picture.shape[:2]
        scale = _SIDE_PX / max(height, width) / 32
        size = (32 * max(1, round(width * scale)), 32 * max(1, round(height * scale)))
        bgr = np.ascontiguousarray(picture[..., ::-1])
        try:
            self._network.setInput(cv2.dnn.blobFromImage(bgr, 1 / 255, size, _MEAN_BGR))
            output = np.asarray(self._network.forward(), np.float32)
        except cv2.error as error:
            raise UserError(
                f"the network does not take pictures ({error.err})",
                where="scoring.ocr",
                remedy="use a DB text detector",
            ) from error
        if output.size != size[0] * size[1] or float(output.min()) < 0 or float(output.max()) > 1:
            raise UserError(
                f"the network gives {list(output.shape)} for a picture of {size[1]} x {size[0]}, or no probabilities",
                where="scoring.ocr", remedy="use a DB text detector",
            )  # fmt: skip
        return output.reshape(size[1], size[0])


def _covered(probabilities: Plane) -> npt.NDArray[np.uint8]:
    """Returns 1 where a region of text lies."""
    covered = np.zeros(probabilities.shape, np.uint8)
    marked = (probabilities > _TEXT_PIXEL).astype(np.uint8)
    outlines, _ = cv2.findContours(marked, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for outline in outlines:
        inside = np.zeros_like(covered)
        cv2.drawContours(inside, [outline], -1, 1, thickness=-1)
        if int(inside.sum()) < _LEAST_REGION_PX or float(probabilities[inside > 0].mean()) < _TEXT_REGION:
            continue
        centre, (width, height), angle = cv2.minAreaRect(outline)
        width, height = width + 1, height + 1  # from the middles of the outermost pixels to their edges
        growth = _GROWTH * width * height / (2 * (width + height))
        box = cv2.boxPoints((centre, (width + 2 * growth, height + 2 * growth), angle))
        cv2.fillPoly(covered, [np.rint(box).astype(np.int32)], 1)
    return covered
