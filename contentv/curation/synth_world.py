"""The little world of the synthetic clips: what may appear in it, and how it is drawn.

Everything is measured in fractions of the frame's side, so one `ClipSpec` can be drawn at any size. A spec and a frame
number determine a picture: drawing is a pure function.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float32]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.11),
    "green": (0.09, 0.68, 0.17),
    "blue": (0.12, 0.24, 0.90),
    "yellow": (0.95, 0.84, 0.07),
}
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
STILL = "still"
SHAPES = ("circle", "square", "triangle")
SHADES: dict[str, float] = {"dark": 0.22, "grey": 0.48, "pale": 0.78}
VARIANTS = ("clean", "blurred", "noisy", "static", "jittery")

# A clip's speed is quoted for this many frames, the length of the longest training window of the demo.
WINDOW_FRAMES = 17


@dataclass(frozen=True)
class ClipSpec:
    """One scene: what is in it and how it moves.

    Lengths are fractions of the frame's side. `displacement` is how far the object goes in `WINDOW_FRAMES` frames
    (0 when it stands still), `pan` the background's shift per frame, `spin` the object's turn per frame in radians,
    `blur` the deviation of a Gaussian blur of the whole picture, besides that of the variant.
    """

    shape: str
    colour: str
    direction: str
    shade: str
    displacement: float
    start: tuple[float, float]
    radius: float
    pan: tuple[float, float]
    spin: float
    variant: str
    template: int
    seed: int
    blur: float = 0.0

    @property
    def is_still(self) -> bool:
        """Whether the object does not travel."""
        return self.direction == STILL

    def centre(self, frame: int) -> tuple[float, float]:
        """Returns the object's centre (x, y) in frame `frame`, before any jitter."""
        if self.is_still:
            return self.start
        dx, dy = DIRECTIONS[self.direction]
        travelled = self.displacement * frame / (WINDOW_FRAMES - 1)
        return self.start[0] + dx * travelled, self.start[1] + dy * travelled


def sample_spec(
    rng: np.random.Generator, *, variant: str = "clean", pan_share: float = 0.3, clip_frames: int = 24
) -> ClipSpec:
    """Returns a random scene whose object stays wholly in view for `clip_frames` frames.

    Args:
        rng: the source of all draws.
        variant: one of `VARIANTS`; "static" gives an object that stands still.
        pan_share: probability that the camera pans, in [0, 1].
        clip_frames: how long the object must stay in view, in frames.
    """
    radius = float(rng.uniform(0.13, 0.18))
    still = variant == "static"
    direction = STILL if still else str(rng.choice(list(DIRECTIONS)))
    room = 1.0 - 2.0 * (radius + 0.02)
    longest = min(0.55, room * (WINDOW_FRAMES - 1) / max(clip_frames - 1, WINDOW_FRAMES - 1))
    displacement = 0.0 if still else float(rng.uniform(min(0.32, longest), longest))
    path = displacement * (clip_frames - 1) / (WINDOW_FRAMES - 1)
    low = radius + 0.02
    start = [float(rng.uniform(low, 1.0 - low)) for _ in range(2)]
    if not still:
        dx, dy = DIRECTIONS[direction]
        axis = 0 if dx else 1
        along = float(rng.uniform(low, max(low, 1.0 - low - path)))
        start[axis] = along if dx + dy > 0 else 1.0 - along
    panning = not still and rng.random() < pan_share
    angle = float(rng.uniform(0.0, 2.0 * np.pi))
    pan_speed = float(rng.uniform(0.004, 0.012)) if panning else 0.0
    return ClipSpec(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        direction=direction,
        shade=str(rng.choice(list(SHADES))),
        displacement=displacement,
        start=(start[0], start[1]),
        radius=radius,
        pan=(pan_speed * float(np.cos(angle)), pan_speed * float(np.sin(angle))),
        spin=0.0 if still else float(rng.uniform(-0.04, 0.04)),
        variant=variant,
        template=int(rng.integers(1 << 16)),
        seed=int(rng.integers(1 << 31)),
    )


def render_clip(spec: ClipSpec, frames: int, size: int) -> Frames:
    """Returns the scene's frames.

    Args:
        spec: the scene.
        frames: number of frames, at least 1.
        size: height and width in pixels.

    Returns:
        uint8 RGB, shape (frames, size, size, 3).
    """
    rng = np.random.default_rng(spec.seed)
    backdrop = _backdrop(spec, rng)
    jitter = rng.normal(0.0, 0.03, (frames, 2)) if spec.variant == "jittery" else np.zeros((frames, 2))
    shake = rng.normal(0.0, 0.015, (frames, 2)) if spec.variant == "jittery" else np.zeros((frames, 2))
    phase = float(rng.uniform(0.0, 2.0 * np.pi))
    angle = float(rng.uniform(0.0, 2.0 * np.pi))
    pictures = []
    for frame in range(frames):
        offset = (spec.pan[0] * frame + shake[frame, 0], spec.pan[1] * frame + shake[frame, 1])
        picture = _crop(backdrop, offset, size)
        x, y = spec.centre(frame)
        centre = (x + jitter[frame, 0], y + jitter[frame, 1])
        _paint(picture, spec, centre, angle + spec.spin * frame, phase)
        pictures.append(picture)
    return _degrade(np.stack(pictures), spec, rng)


_BACKDROP_SIDE = 3.0  # the backdrop is this many frames wide, so that a pan never runs off it
_BACKDROP_PX = 144  # coarse on purpose: the finest texture has 8 cells a frame, and most of a clip's cost is here


def _backdrop(spec: ClipSpec, rng: np.random.Generator) -> Plane:
    """Returns a soft texture (px, px, 3) around the spec's shade: a gradient, two octaves of noise and a faint tint."""
    px = _BACKDROP_PX
    grid = np.linspace(-1.0, 1.0, px, dtype=np.float32)
    slope = rng.normal(0.0, 0.08, 2)
    plane = np.float32(slope[0]) * grid[None, :] + np.float32(slope[1]) * grid[:, None]
    for cells, strength in ((9, 0.05), (24, 0.03)):
        coarse = rng.normal(0.0, strength, (cells, cells)).astype(np.float32)
        plane = plane + cv2.resize(coarse, (px, px), interpolation=cv2.INTER_CUBIC)
    tint = rng.normal(0.0, 0.012, 3).astype(np.float32)
    return np.clip(np.float32(SHADES[spec.shade]) + plane[..., None] + tint, 0.03, 0.97).astype(np.float32)


def _crop(backdrop: Plane, offset: tuple[float, float], size: int) -> Plane:
    """Returns the (size, size, 3) view of the backdrop whose middle is moved by `offset`."""
    scale = _BACKDROP_PX / _BACKDROP_SIDE / size
    corner = (_BACKDROP_SIDE - 1.0) / 2.0 * _BACKDROP_PX / _BACKDROP_SIDE
    unit = _BACKDROP_PX / _BACKDROP_SIDE
    shift = 0.5 * scale - 0.5
    matrix = np.array(
        [[scale, 0.0, corner + offset[0] * unit + shift], [0.0, scale, corner + offset[1] * unit + shift]], np.float32
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    view = cv2.warpAffine(backdrop, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(view, np.float32)


def _distance(shape: str, u: Plane, v: Plane, radius: float) -> Plane:
    """Returns the signed distance to the shape's edge, negative inside; (u, v) are turned object coordinates."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.88 * radius)
    half = np.float32(0.5 * 1.15 * radius)
    slanted = np.float32(np.sqrt(0.75))
    return np.maximum(v - half, np.maximum(slanted * u - 0.5 * v - half, -slanted * u - 0.5 * v - half))


def _paint(picture: Plane, spec: ClipSpec, centre: tuple[float, float], angle: float, phase: float) -> None:
    """Draws the object, striped in two tones of its colour, into `picture` in place with a one-pixel soft edge."""
    size = picture.shape[0]
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = grid[None, :] - np.float32(centre[0]), grid[:, None] - np.float32(centre[1])
    turn = (
        0.35 * np.sin(angle) if spec.shape != "circle" else angle
    )  # squares and triangles only rock: they stay readable
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = cos * x + sin * y, cos * y - sin * x
    cover = np.clip(0.5 - _distance(spec.shape, u, v, spec.radius) * size, 0.0, 1.0)[..., None]
    stripes = 0.9 + 0.1 * np.sin(np.float32(2.0 * np.pi / (0.9 * spec.radius)) * u + np.float32(phase))
    body = np.asarray(COLOURS[spec.colour], np.float32) * stripes[..., None]
    picture += cover * (body - picture)


def _degrade(pictures: Plane, spec: ClipSpec, rng: np.random.Generator) -> Frames:
    """Applies the spec's blur and the variant's picture fault and rounds to uint8."""
    if spec.blur > 0:
        sigma = pictures.shape[1] * spec.blur
        pictures = np.stack([cv2.GaussianBlur(picture, (0, 0), sigma) for picture in pictures])
    if spec.variant == "blurred":
        sigma = pictures.shape[1] * float(rng.uniform(0.02, 0.035))
        pictures = np.stack([cv2.GaussianBlur(picture, (0, 0), sigma) for picture in pictures])
    elif spec.variant == "noisy":
        noise = rng.standard_normal(pictures.shape, dtype=np.float32)
        pictures = pictures + np.float32(rng.uniform(0.06, 0.12)) * noise
    rounded: Frames = np.clip(np.rint(pictures * 255.0), 0, 255).astype(np.uint8)
    return rounded
