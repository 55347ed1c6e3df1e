"""What is said about a synthetic scene: a small grammar of captions, and every caption it can form."""

from __future__ import annotations

from contentv.curation.synth_world import COLOURS, DIRECTIONS, SHADES, SHAPES, STILL, ClipSpec

MOVING = (
    "a {colour} {shape} moving {direction} over a {shade} background",
    "a {colour} {shape} moves {direction} on a {shade} background",
    "a {colour} {shape} sliding {direction}",
    "on a {shade} background, a {colour} {shape} is going {direction}",
    "video of a {colour} {shape} that travels {direction}, {shade} background",
)
STANDING = (
    "a {colour} {shape} standing still over a {shade} background",
    "a {colour} {shape} that does not move on a {shade} background",
    "a motionless {colour} {shape}",
    "on a {shade} background, a {colour} {shape} is resting",
    "video of a {colour} {shape} at rest, {shade} background",
)
PICTURED = (
    "a {colour} {shape} over a {shade} background",
    "a picture of a {colour} {shape} on a {shade} background",
    "a {colour} {shape}",
    "on a {shade} background, a {colour} {shape}",
    "photo of a {colour} {shape}, {shade} background",
)


def caption_of(spec: ClipSpec, *, picture: bool = False) -> str:
    """Returns the scene's caption; of its first frame alone, without a word on motion, when `picture`."""
    templates = PICTURED if picture else STANDING if spec.is_still else MOVING
    return templates[spec.template % len(templates)].format(
        colour=spec.colour, shape=spec.shape, direction=spec.direction, shade=spec.shade
    )


def prompt(colour: str, shape: str, direction: str, shade: str) -> str:
    """Returns the plainest caption of a moving (or standing) object, for prompts and tests."""
    templates = STANDING if direction == STILL else MOVING
    return templates[0].format(colour=colour, shape=shape, direction=direction, shade=shade)


def every_caption() -> list[str]:
    """Returns all captions of the grammar, in a fixed order and without repeats."""
    captions = []
    for colour in COLOURS:
        for shape in SHAPES:
            for shade in SHADES:
                words = {"colour": colour, "shape": shape, "shade": shade}
                captions += [t.format(**words, direction=direction) for t in MOVING for direction in DIRECTIONS]
                captions += [t.format(**words) for t in STANDING + PICTURED]
    return list(dict.fromkeys(captions))
