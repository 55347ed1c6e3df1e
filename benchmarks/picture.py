"""Draws docs/images/demo.png: prompts and frames of a finished demo's samples, every colour and direction once or more.

python benchmarks/picture.py --demo demo-out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from contentv.curation.video_io import read_video

ROWS, COLUMNS, FRAMES, SIDE, GAP, TEXT = 4, 2, 5, 80, 6, 22
SHOWN = (0, 5, 10, 15, 1, 6, 11, 12)  # prompts come in the order colour x direction: these show each of both twice


def main() -> None:
    """Writes the picture and prints its path. The samples are the first ones, not chosen by how they look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="folder of a finished demo")
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.png"))
    arguments = parser.parse_args()
    folder = arguments.demo / "samples" / "after"
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    width, height = FRAMES * (SIDE + 2) + GAP, SIDE + TEXT + GAP
    page = Image.new("RGB", (COLUMNS * width + GAP, ROWS * height + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for place, index in enumerate(SHOWN):
        left, top = GAP + place // ROWS * width, GAP + place % ROWS * height
        draw.text((left, top), prompts[index], fill="black", font=font)
        video = read_video(folder / f"{index:05d}.mp4").frames
        for column, frame in enumerate(np.linspace(0, len(video) - 1, FRAMES).round().astype(int)):
            picture = Image.fromarray(video[frame]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            page.paste(picture, (left + column * (SIDE + 2), top + TEXT - 2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(arguments.out, optimize=True)
    print(arguments.out)


if __name__ == "__main__":
    main()
