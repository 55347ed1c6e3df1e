"""Video and image files to frames and back.

Files come from anywhere, so they are opened as plain bytes by a fixed list of containers: playlists and other formats
that make the decoder open further files or addresses are refused. Whatever is wrong with a file is a `DecodeError`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from contentv.base.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 1 << 26  # of one frame; larger ones are a mistake or an attack on the memory
MAX_ASPECT = 10  # longer side over shorter; what is narrower is a strip, no picture
MAX_FRAMES = 1 << 22  # of one file, two days at 24 fps: a small file may claim to have billions
CRF = 16  # x264's quality: no loss that one can see
MediaFile = io.BytesIO | io.BufferedReader
Frames = UInt8[np.ndarray, "T H W 3"]
# Pillow's parsers trust lengths and tags that a damaged file gets wrong.
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError,
                 struct.error, zlib.error)  # fmt: skip
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"


class DecodeError(Exception):
    """A file that is not a usable video or image.

    Args:
        file: its path or name.
        reason: what is wrong with it, for people.
        rule: the same for programs: `unreadable`, `no_file`, `picture_size`, `bad_row` (of a manifest), `bad_caption`.
    """

    def __init__(self, file: str, reason: str, rule: str = "unreadable") -> None:
        self.file = file
        self.reason = reason
        self.rule = rule
        super().__init__(f"{file}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (DecodeError, (self.file, self.reason, self.rule))  # workers send it to another process


@dataclass(frozen=True)
class Video:
    """A decoded clip."""

    frames: UInt8[np.ndarray, "T H W 3"]  # RGB
    fps: float


@dataclass(frozen=True)
class Picture:
    """One decoded frame of an open video; its pixels are converted on demand."""

    frame: Any  # av.VideoFrame
    aspect: float  # width of a pixel over its height
    reformatter: Any  # av's, shared by the frames of a video: making one costs more than using it

    @property
    def pts(self) -> int | None:
        """When the frame is shown, in the stream's time base."""
        return None if self.frame.pts is None else int(self.frame.pts)

    @property
    def is_corrupt(self) -> bool:
        """Whether the decoder had to make parts of the frame up."""
        return bool(self.frame.is_corrupt)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright picture with square pixels."""
        height, width = self.frame.height, max(1, round(self.frame.width * self.aspect))
        return (width, height) if self.frame.rotation // 90 % 2 else (height, width)

    def to_rgb(self, short_side_px: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the upright picture with square pixels, shrunk (roughly) to a short side if one is given."""
        height, width = self.frame.height, max(1, round(self.frame.width * self.aspect))
        scale = min(1.0, (short_side_px or min(height, width)) / min(height, width))
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        converted = self.reformatter.reformat(
            self.frame, width=width, height=height, format="rgb24", interpolation="AREA" if scale < 1 else "BILINEAR"
        )
        pixels: np.ndarray = converted.to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, self.frame.rotation // 90))


@dataclass
class OpenVideo:
    """A video file whose frames can be read in order, from the start or from a point in time."""

    name: str
    container: Any
    stream: Any
    packets: int = 0  # with data, since the start or the last `seek`

    @property
    def rate(self) -> Fraction | None:
        """Frames per second as the container gives it."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return Fraction(rate) if rate else None

    def seek(self, pts: int) -> None:
        """Goes to the last key frame at or before `pts`."""
        with self._errors():
            self.container.seek(pts, stream=self.stream, backward=True)
        self.packets = 0

    def pictures(self) -> Iterator[Picture]:
        """Yields the frames in the order they are shown.

        Raises:
            DecodeError: the file is damaged.
        """
        aspect = float(self.stream.sample_aspect_ratio or 1)
        aspect = aspect if 0.1 < aspect < 10 else 1.0
        reformatter = VideoReformatter()
        pieces = 0
        with self._errors():
            for packet in self.container.demux(self.stream):
                self.packets += packet.size > 0
                pieces += 1
                if pieces > MAX_FRAMES:
                    raise DecodeError(self.name, f"more than {MAX_FRAMES} frames", "too_long")
                for frame in packet.decode():
                    require_picture_size(self.name, frame.height, max(1, round(frame.width * aspect)))
                    yield Picture(frame, aspect, reformatter)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            raise DecodeError(self.name, f"damaged or cut short ({_words(error)})") from error


@contextlib.contextmanager
def open_video(source: MediaFile, name: str, threads: int = 1) -> Iterator[OpenVideo]:
    """Gives the first video stream of a file.

    Args:
        source: the file's bytes, seekable.
        name: what to call it in messages.
        threads: decoder threads; 0 = the decoder's choice.

    Raises:
        DecodeError: not a video.
    """
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": ""}
    try:
        container = av.open(source, container_options=options, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(name, f"not a video ({_words(error)})") from error
    with container:
        # Songs have their cover as a video stream of one picture.
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            raise DecodeError(name, "there is no video stream in the file that can be decoded")
        stream = streams[0]
        context = stream.codec_context
        require_picture_size(name, context.height or 1, context.width or 1, pixels_only=True)
        context.thread_count = threads
        context.options = {"max_pixels": str(MAX_PIXELS)}  # the stream may turn out larger than its header says
        yield OpenVideo(name, container, stream)


def read_video(path: str | Path) -> Video:
    """Returns all frames of a video file, or the single one of an image file (at 1 fps).

    Raises:
        DecodeError: not a video or image, damaged, cut short, or without frames.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            return Video(read_image(file, str(path))[None], 1.0)
        with open_video(file, str(path), threads=0) as video:
            frames: list[np.ndarray] = []
            for picture in video.pictures():
                if picture.is_corrupt:
                    raise DecodeError(str(path), f"frame {len(frames)} is damaged")
                frames.append(picture.to_rgb())
            require_complete(video, len(frames))
            return Video(np.stack(frames), float(video.rate or 24))


def require_complete(video: OpenVideo, frames: int) -> None:
    """Passes over a video that was read to its end and had all that its header promised.

    Raises:
        DecodeError: it had no frame, or fewer pieces than promised.
    """
    promised = video.stream.frames  # 0 when the container does not say
    if video.packets < promised:
        raise DecodeError(video.name, f"cut short: {video.packets} of {promised} frames are there")
    if frames == 0:
        raise DecodeError(video.name, "there are no frames in the file")


def read_image(source: MediaFile, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image file's upright RGB pixels; transparent parts become black.

    Raises:
        DecodeError: not an image, damaged, or too large.
    """
    try:
        with Image.open(source, formats=("JPEG", "PNG", "WEBP")) as image:
            require_picture_size(name, image.height, image.width)
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright.convert("RGBA"))
            return np.array(upright.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise DecodeError(name, f"an image that is too large ({error})", "picture_size") from error
    except _IMAGE_ERRORS as error:
        told = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DecodeError(name, f"not an image, or damaged ({told})") from error


def require_picture_size(name: str, height: int, width: int, *, pixels_only: bool = False) -> None:
    """Passes over pictures of a usable size.

    Raises:
        DecodeError: more than `MAX_PIXELS` pixels, or one side more than `MAX_ASPECT` times the other.
    """
    if height * width > MAX_PIXELS:
        raise DecodeError(name, f"a picture of {width} x {height} pixels is too large", "picture_size")
    if not pixels_only and max(height, width) > MAX_ASPECT * min(height, width):
        reason = f"a picture of {width} x {height} pixels is too narrow (its sides may differ by {MAX_ASPECT} times)"
        raise DecodeError(name, reason, "picture_size")


def encode_mp4_bytes(frames: Frames | Iterator[Frames], fps: float | int, crf: int = CRF) -> bytes:
    """Returns an MP4 file (H.264, yuv420p) of the frames; the same bytes every time.

    Args:
        frames: RGB, at least one; height and width even. An iterator gives a clip part by part, and each part is
            encoded before the next is asked for: the clip need never be whole in memory.
        fps: frames per second, positive.
        crf: x264's constant quality, 0 (lossless) to 51.

    Raises:
        ValueError: no frames, odd sides, parts of different sizes, or fps not positive.
        UserError: the decoder library was built without libx264.
    """
    if "libx264" not in av.codecs_available:
        raise UserError(
            "this build of PyAV has no libx264", where="av", remedy="install its wheel: pip install --only-binary av av"
        )
    parts = iter([frames]) if isinstance(frames, np.ndarray) else frames
    first = next(parts, None)
    count, height, width = (0, 0, 0) if first is None else first.shape[:3]
    if first is None or count == 0 or height % 2 or width % 2 or fps <= 0:
        raise ValueError(f"cannot encode {count} frames of {height} x {width} at {fps} fps as yuv420p")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # x264's bytes depend on the number of threads
        # Its macroblock tree reads stray memory below 128 px, so that the bytes would differ from call to call.
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
        for part in itertools.chain([first], parts):
            if part.shape[1:3] != (height, width):
                raise ValueError(f"cannot encode frames of {part.shape[1:3]} after {height} x {width}")
            for pixels in part:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_mp4(
    frames: Frames | Iterator[Frames], path: str | os.PathLike[str], fps: float | int, crf: int = CRF
) -> None:
    """Writes an MP4 file, whole or not at all; see `encode_mp4_bytes`."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(encode_mp4_bytes(frames, fps, crf))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def encode_jpg_bytes(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Returns a JPEG file of RGB pixels (quality 95)."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
    if not ok:
        raise RuntimeError(f"OpenCV could not encode {pixels.shape} as JPEG")
    return bytes(data)


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
