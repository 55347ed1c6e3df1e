"""Files to frames and back, and every way in which a file can be wrong."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from broken_files import picture_of, rotated, variable_rate_mp4
from PIL import Image

from contentv.curation import video_io
from contentv.curation.video_io import (
    DecodeError,
    encode_jpg_bytes,
    encode_mp4_bytes,
    open_video,
    read_image,
    read_video,
    write_mp4,
)


def gradient_clip(frames: int = 8, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth picture whose red grows over time: what H.264 keeps almost exactly."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    clip = np.zeros((frames, height, width, 3), np.float32)
    clip[..., 0] = 40 + 20 * np.arange(frames)[:, None, None]
    clip[..., 1] = 60 + x * 2
    clip[..., 2] = 60 + y * 3
    return clip.astype(np.uint8)


def test_frames_survive_mp4(tmp_path: Path) -> None:
    clip = gradient_clip()
    write_mp4(clip, tmp_path / "a.mp4", 12.5)
    video = read_video(tmp_path / "a.mp4")
    assert video.frames.shape == clip.shape
    assert video.fps == 12.5
    assert np.abs(video.frames.astype(int) - clip).mean() < 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]  # nothing temporary is left
    with open(tmp_path / "a.mp4", "rb") as file, open_video(file, "a") as opened:
        assert opened.stream.codec_context.name == "h264"
        assert opened.stream.codec_context.pix_fmt == "yuv420p"


def test_encoding_is_reproducible_and_checks_its_input() -> None:
    clip = gradient_clip()
    assert len({encode_mp4_bytes(clip, 24) for _ in range(20)}) == 1
    for bad, fps in ((clip[:, :31], 24), (clip[:0], 24), (clip, 0)):
        with pytest.raises(ValueError, match="cannot encode"):
            encode_mp4_bytes(bad, fps)


def test_a_clip_may_come_part_by_part_and_is_never_whole_in_memory(tmp_path: Path) -> None:
    clip = gradient_clip()
    taken: list[int] = []

    def parts() -> Iterator[np.ndarray]:
        for start, stop in ((0, 1), (1, 5), (5, 8)):
            taken.append(stop)
            yield clip[start:stop]

    source = parts()
    assert encode_mp4_bytes(source, 24) == encode_mp4_bytes(clip, 24)
    assert taken == [1, 5, 8]
    write_mp4(parts(), tmp_path / "a.mp4", 24)
    assert (tmp_path / "a.mp4").read_bytes() == encode_mp4_bytes(clip, 24)
    with pytest.raises(ValueError, match="cannot encode 0 frames"):
        encode_mp4_bytes(iter(()), 24)
    with pytest.raises(ValueError, match=r"cannot encode frames of \(16, 48\) after 32 x 48"):
        encode_mp4_bytes(iter([clip, clip[:, :16]]), 24)

    def breaks() -> Iterator[np.ndarray]:
        yield clip
        raise RuntimeError("decoder")

    with pytest.raises(RuntimeError, match="decoder"):
        write_mp4(breaks(), tmp_path / "b.mp4", 24)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_mp4(gradient_clip()[:, :31], tmp_path / "a.mp4", 24)
    assert list(tmp_path.iterdir()) == []


def test_the_rotation_that_phones_write_is_applied(tmp_path: Path) -> None:
    clip = gradient_clip(4)
    data = encode_mp4_bytes(clip, 24)

    def fixed(*values: int) -> bytes:
        return b"".join(value.to_bytes(4, "big", signed=True) for value in values)

    matrix = data.index(b"tkhd") + 44  # the display matrix in the track header
    turned = data[:matrix] + fixed(0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30) + data[matrix + 36 :]
    (tmp_path / "a.mp4").write_bytes(turned)
    frames = read_video(tmp_path / "a.mp4").frames
    expected = np.rot90(clip, -1, axes=(1, 2))  # a quarter turn clockwise
    assert frames.shape == expected.shape
    assert np.abs(frames.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_pictures_are_turned_upright(degrees: int, tmp_path: Path) -> None:
    clip = gradient_clip(3)
    (tmp_path / "a.mp4").write_bytes(rotated(encode_mp4_bytes(clip, 24), degrees))
    frames = read_video(tmp_path / "a.mp4").frames
    expected = np.rot90(clip, -degrees // 90, axes=(1, 2))  # clockwise
    assert frames.shape == expected.shape
    assert np.abs(frames.astype(int) - expected).mean() < 3
    with open(tmp_path / "a.mp4", "rb") as file, open_video(file, "a") as video:
        assert [picture.size for picture in video.pictures()] == [expected.shape[1:3]] * 3


def test_frames_at_uneven_times_keep_them(tmp_path: Path) -> None:
    clip = gradient_clip(10)
    data, times_s = variable_rate_mp4(clip, 8)
    assert len({round(step, 3) for step in np.diff(times_s)}) > 5
    with open_video(io.BytesIO(data), "a") as video:
        found = [(float(picture.pts * video.stream.time_base), picture.to_rgb()) for picture in video.pictures()]
    np.testing.assert_allclose([time_s for time_s, _ in found], times_s, atol=1e-3)
    for picture, expected in zip((pixels for _, pixels in found), clip, strict=True):
        assert np.abs(picture.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(("height", "width"), [(10, 10_000), (400, 16), (16, 162)])
def test_strips_are_no_pictures(height: int, width: int, tmp_path: Path) -> None:
    clip = np.zeros((2, height, width, 3), np.uint8)
    write_mp4(clip, tmp_path / "a.mp4", 8)
    Image.fromarray(clip[0]).save(tmp_path / "a.png")
    for name in ("a.mp4", "a.png"):
        with pytest.raises(DecodeError, match=rf"{width} x {height} pixels is too narrow .* 10 times") as caught:
            read_video(tmp_path / name)
        assert caught.value.rule == "picture_size"
    write_mp4(np.zeros((2, 16, 160, 3), np.uint8), tmp_path / "b.mp4", 8)
    assert read_video(tmp_path / "b.mp4").frames.shape == (2, 16, 160, 3)


def test_what_a_video_may_demand_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_mp4_bytes(gradient_clip(), 24)

    def read() -> int:
        with open_video(io.BytesIO(data), "a") as video:
            return sum(1 for _ in video.pictures())

    assert read() == 8
    monkeypatch.setattr(video_io, "MAX_FRAMES", 7)
    with pytest.raises(DecodeError, match="more than 7 frames") as caught:
        read()
    assert caught.value.rule == "too_long"
    monkeypatch.undo()
    monkeypatch.setattr(video_io, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(DecodeError, match="48 x 32 pixels is too large") as caught:
        read()
    assert caught.value.rule == "picture_size"


def test_the_stream_counts_and_not_what_the_header_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample entry says 32 x 16, the stream inside has more pixels."""
    data = encode_mp4_bytes(np.zeros((2, 512, 512, 3), np.uint8), 24)
    small = data.replace(struct.pack(">HH", 512, 512), struct.pack(">HH", 32, 16))  # of the sample entry
    assert small != data
    monkeypatch.setattr(video_io, "MAX_PIXELS", 256 * 256)
    with pytest.raises(DecodeError, match="too large"), open_video(io.BytesIO(small), "a") as video:
        list(video.pictures())


def test_the_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture_of("x", 1, 32, 32)[0], format="rgb24")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(DecodeError, match="no video stream"):
        read_video(path)


BROKEN = {
    "cut-off tail": (lambda data: data[: int(len(data) * 0.7)], "cut short|damaged|not a video"),
    "damaged middle": (lambda data: data[: len(data) // 2] + bytes(8000) + data[len(data) // 2 + 8000 :], "damaged"),
    "no video": (lambda data: b"this is a text\n" * 50, "not a video"),
    "empty": (lambda data: b"", "not a video"),
    "playlist": (lambda data: b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "not a video"),
    "list of files": (lambda data: b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_video_names_the_file_and_the_reason(fault: str, tmp_path: Path) -> None:
    breaks, reason = BROKEN[fault]
    noise = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)  # large packets
    path = tmp_path / "bad.mp4"
    path.write_bytes(breaks(encode_mp4_bytes(noise, 24)))
    with pytest.raises(DecodeError, match=reason) as caught:
        read_video(path)
    assert caught.value.file == str(path)
    assert caught.value.reason in str(caught.value)


def test_a_streamable_video_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    """With its header first, such a file opens as if it were whole; its end is missing."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for pixels in np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    for share in (0.3, 0.6, 0.9, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DecodeError, match=r"cut short|damaged"):
            read_video(path)


def test_a_file_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DecodeError, match="no video stream"):
        read_video(path)


def test_images(tmp_path: Path) -> None:
    picture = gradient_clip(1)[0]
    (tmp_path / "a.jpg").write_bytes(encode_jpg_bytes(picture))
    assert np.abs(read_video(tmp_path / "a.jpg").frames[0].astype(int) - picture).mean() < 3
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_video(tmp_path / "a.png").frames[0], picture)
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_video(tmp_path / "gray.png").frames[0], gray[..., None].repeat(3, axis=2))
    clear = np.dstack([picture, np.where(np.arange(48) < 24, 255, 0)[None].repeat(32, 0)]).astype(np.uint8)
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    read = read_video(tmp_path / "clear.png").frames[0]
    np.testing.assert_array_equal(read[:, :24], picture[:, :24])
    assert read[:, 24:].max() == 0


@pytest.mark.parametrize("data", [b"", b"no image", encode_jpg_bytes(gradient_clip(1)[0])[:200]])
def test_a_broken_image(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not an image") as caught:
        read_image(io.BytesIO(data), "x.jpg")
    assert caught.value.file == "x.jpg"


def test_an_image_that_would_fill_the_memory() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 9000, 9000, 1, 0, 0, 0, 0)  # a few bytes of file, 243 MB of pixels
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    with pytest.raises(DecodeError, match="9000 x 9000 pixels is too large"):
        read_image(io.BytesIO(png), "bomb.png")
