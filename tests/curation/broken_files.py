"""Files as the world has them: all that can be wrong with a media file or its caption, and odd ones that are fine.

`make_broken(folder)` writes them and returns what must become of each: the rule of its reject, or `KEPT`.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tempfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

from contentv.curation.video_io import encode_jpg_bytes, encode_mp4_bytes

KEPT = "kept"


def picture_of(name: str, frames: int, height: int, width: int) -> np.ndarray:
    """Returns a clip (T H W 3) that looks like no other name's: coarse colours that drift."""
    rng = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogateescape")))
    coarse = rng.integers(20, 235, (6, 8, 3)).astype(np.uint8)
    large = cv2.resize(coarse, (width + frames, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([large[:, n : n + width] for n in range(frames)])


def make_broken(
    folder: str | Path, *, height: int = 48, width: int = 64, fps: int = 8, seconds: float = 4.0
) -> dict[str, str]:
    """Writes the files and returns {name below the folder: rule of its reject, or KEPT}.

    Args:
        folder: where to; made if it is not there.
        height, width: of the usable ones, even.
        fps: frames per second of the usable ones; in the one with a variable rate, the mean.
        seconds: how long they are.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    shape = (round(fps * seconds), height, width)

    def video(name: str) -> bytes:
        return encode_mp4_bytes(picture_of(name, *shape), fps)

    rules: dict[str, str] = {}

    def put(name: str, data: bytes, rule: str, caption: bytes | None = b"") -> None:
        (root / name).write_bytes(data)
        if caption is not None:
            (root / name).with_suffix(".txt").write_bytes(caption or f"what is in {len(rules)}".encode())
        rules[name] = rule

    for name, data in _unreadable(shape, fps).items():
        put(name, data, "unreadable")
    for name, data in _misshapen().items():
        put(name, data, "picture_size")
    put("one_frame.mp4", encode_mp4_bytes(picture_of("one_frame", 1, height, width), fps), "too_short")
    put("no_caption.mp4", video("no_caption"), "no_caption", None)
    put("blank_caption.mp4", video("blank_caption"), "no_caption", b"\n \n")
    put("latin1_caption.mp4", video("latin1_caption"), "bad_caption", "Straße".encode("latin-1"))
    put("long_caption.mp4", video("long_caption"), "bad_caption", b"a very long caption " * 100_000)
    put("torn_json.mp4", video("torn_json"), "bad_caption", None)
    (root / "torn_json.json").write_bytes(b'{"caption": "a')
    _special_files(root, rules)
    _tars(root, rules, video)

    put("wrong_container.mp4", _matroska(picture_of("wrong_container", *shape), fps), KEPT)  # the content tells
    put("variable_rate.mp4", variable_rate_mp4(picture_of("variable_rate", *shape), fps)[0], KEPT)
    put("rotated.mp4", rotated(encode_mp4_bytes(picture_of("rotated", shape[0], width, height), fps)), KEPT)
    put("latin1_title.mp4", _with_title(picture_of("latin1_title", *shape), fps), KEPT)
    (root / os.fsdecode(b"caf\xe9.mp4")).write_bytes(video("cafe"))
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("a name that is no UTF-8")
    rules["caf\\xe9.mp4"] = KEPT
    for name in ("line\nbreak \"quoted\" 'name'.mp4", "雪 ñ é.mp4", "100% #t=1,2 {x} $(y).mp4"):
        put(name, video(name), KEPT)
    return rules


def variable_rate_mp4(frames: np.ndarray, fps: int) -> tuple[bytes, list[float]]:
    """Returns an MP4 whose frames are unevenly spaced (half to one and a half times 1/fps), and their times."""
    steps = np.random.default_rng(0).uniform(0.5, 1.5, len(frames) - 1) * 1000 / fps
    stamps = [0, *np.cumsum(np.round(steps)).astype(int).tolist()]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, stamp in zip(frames, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue(), [stamp / 1000 for stamp in stamps]


def rotated(mp4: bytes, degrees: int = 90) -> bytes:
    """Returns an MP4 that is to be shown turned clockwise by 90, 180 or 270 degrees, as phones write it."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    values = (cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    matrix = mp4.index(b"tkhd") + 44  # the display matrix in the track header
    return mp4[:matrix] + struct.pack(">9i", *values) + mp4[matrix + 36 :]


def streamable_mp4(frames: np.ndarray, fps: int) -> bytes:
    """Returns an MP4 with its header first: cut off, it opens as if it were whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.mp4"
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()


def _unreadable(shape: tuple[int, int, int], fps: int) -> dict[str, bytes]:
    whole = encode_mp4_bytes(picture_of("whole", *shape), fps)
    noise = np.random.default_rng(1).integers(0, 255, (*shape, 3), dtype=np.uint8)
    noisy = encode_mp4_bytes(noise, fps)
    jpg = encode_jpg_bytes(picture_of("jpg", 1, *shape[1:])[0])
    png = io.BytesIO()
    Image.fromarray(noise[0]).save(png, "PNG")
    torn = bytearray(png.getvalue())
    torn[len(torn) // 2 : len(torn) // 2 + 64] = bytes(64)
    middle = len(noisy) // 2
    return {
        "truncated.mp4": streamable_mp4(noise, fps)[:middle],
        "headless.mp4": whole[: len(whole) * 7 // 10],
        "damaged_middle.mp4": noisy[:middle] + bytes(8000) + noisy[middle + 8000 :],
        "zero_bytes.mp4": b"",
        "zero_bytes.jpg": b"",
        "text.mp4": b"this is a text\n" * 50,
        "picture.mp4": jpg,
        "video.jpg": whole,
        "video.png": whole,
        "audio_only.mp4": _audio(),
        "corrupt.png": bytes(torn),
        "truncated.jpg": jpg[: len(jpg) // 3],
        "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        "file_list.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
    }


def _misshapen() -> dict[str, bytes]:
    narrow = np.zeros((8, 10, 10_000, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(narrow[0]).save(png, "PNG")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)  # a few bytes of file, 2.7 GB of pixels
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return {"narrow.mp4": encode_mp4_bytes(narrow, 8), "narrow.png": png.getvalue(), "bomb.png": bomb}


def _special_files(root: Path, rules: dict[str, str]) -> None:
    (root / "folder.mp4").mkdir()
    rules["folder.mp4"] = "unreadable"
    os.mkfifo(root / "pipe.mp4")
    (root / "pipe.txt").write_text("a pipe that nobody writes to")
    rules["pipe.mp4"] = "unreadable"
    for name, target, rule in (
        ("dangling.mp4", "nowhere.mp4", "no_file"),
        ("itself.mp4", "itself.mp4", "unreadable"),
        ("round_and_round", ".", "unreadable"),
        ("device.mp4", "/dev/zero", "unreadable"),
    ):
        (root / name).symlink_to(target)
        (root / name).with_suffix(".txt").write_text("a link")
        rules[name] = rule


def _tars(root: Path, rules: dict[str, str], video: object) -> None:
    data = io.BytesIO()
    members: dict[str, bytes] = {"a.mp4": video("tar a"), "a.txt": b"in a tar", "b.mp4": b"", "b.txt": b"empty"}  # type: ignore[operator]
    members |= {"c.mp4": video("tar c"), "c.txt": b"\xff\xfe bytes", "d.mp4": video("tar d")}  # type: ignore[operator]
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("evil.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (root / "members.tar").write_bytes(data.getvalue())
    rules |= {"members.tar/a.mp4": KEPT, "members.tar/b.mp4": "unreadable", "members.tar/c.mp4": "bad_caption"}
    rules["members.tar/d.mp4"] = "no_caption"
    (root / "torn.tar").write_bytes(data.getvalue()[:700])
    (root / "no.tar").write_bytes(b"no tar " * 200)
    rules |= {"torn.tar": "unreadable", "no.tar": "unreadable"}


def _audio() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _matroska(frames: np.ndarray, fps: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _with_title(frames: np.ndarray, fps: int) -> bytes:
    """Returns an MP4 whose title is not UTF-8, as older programs write it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        container.metadata["title"] = "Stra##e"
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue().replace(b"Stra##e", b"Stra\xdf\xdfe")
