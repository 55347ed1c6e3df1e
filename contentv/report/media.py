"""Videos inside the page: H.264 files as they are, with their first frame as the poster."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import av

from contentv.report.markup import Html, size, tag

MAX_VIDEO_BYTES = 4 * 1024 * 1024
MAX_PAGE_BYTES = 24 * 1024 * 1024


def inline_video(path: Path, label: str) -> Html:
    """Returns a looping, muted video element that holds the file's bytes, or a note that says why it cannot.

    Args:
        path: an MP4 file. Browsers play H.264; of other codecs the first frame is shown.
        label: what the video shows, for screen readers.
    """
    if not path.is_file():
        return _note(f"{path.name}: the file is not there")
    num_bytes = path.stat().st_size
    if num_bytes > MAX_VIDEO_BYTES:
        return _note(f"{path.name}: {size(num_bytes)}, too large to put into the page")
    try:
        codec, poster = _first_frame(path)
    except (av.FFmpegError, ValueError) as error:
        return _note(f"{path.name}: not a readable video ({error})")
    if codec != "h264":
        still = tag("img", src=poster, alt=label)
        return tag("div", still, tag("p", f"{path.name} is {codec}; browsers play h264", class_="note"))
    source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    playing = {"autoplay": True, "loop": True, "muted": True, "playsinline": True}
    return tag("video", src=source, poster=poster, aria_label=label, **playing)


def _first_frame(path: Path) -> tuple[str, str]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        frame = next(container.decode(video=0), None)
        if frame is None:
            raise ValueError("it has no frames")
        codec = container.streams.video[0].codec_context.name
    image = frame.to_image()
    image.thumbnail((320, 320))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return codec, "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _note(text: str) -> Html:
    return tag("p", text, class_="empty")
