"""Copies are found and others are not; the search finds what comparing everything with everything finds."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_media import make_scene, make_world

from contentv.base.errors import UserError
from contentv.curation.look import spread_places
from contentv.curation.near_duplicates import (
    MAX_COLOUR_STEPS,
    DedupConfig,
    EmbeddingIndex,
    HashIndex,
    NearDuplicates,
    as_array,
    from_array,
    hamming,
)
from contentv.curation.perceptual_hash import ClipHash, hash_clip
from contentv.curation.scenes import find_scenes
from contentv.curation.synth import synthesize
from contentv.curation.video_io import encode_mp4_bytes, open_video, read_video

Frames = np.ndarray


def look(frames: Frames) -> ClipHash:
    return hash_clip([frames[place] for place in spread_places(len(frames))])


def encoded(frames: Frames, crf: int) -> Frames:
    with open_video(io.BytesIO(encode_mp4_bytes(frames, 8, crf)), "clip") as video:
        return np.stack([picture.to_rgb() for picture in video.pictures()])


def scaled(frames: Frames, height: int, width: int) -> Frames:
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])


ALTERATIONS: dict[str, Callable[[Frames], Frames]] = {
    "encoded at crf 32": lambda f: encoded(f, 32),
    "half the size, crf 28": lambda f: encoded(scaled(f, f.shape[1] // 2, f.shape[2] // 2), 28),
    "another aspect ratio": lambda f: scaled(f, f.shape[1] * 3 // 4, f.shape[2]),
    "brighter": lambda f: np.clip(f.astype(int) + 18, 0, 255).astype(np.uint8),
    "2 % cut off": lambda f: np.ascontiguousarray(f[:, 1:-1, 1:-1]),
    "every second frame": lambda f: f[::2],
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Frames]:
    """Scenes of `contentv synth`: one small thing over a plain ground, which look much more alike than films do."""
    folder = tmp_path_factory.mktemp("synth")
    synthesize(folder, 24, 0)
    found = []
    for path in sorted(folder.glob("*.mp4")):
        video = read_video(path)
        spans = find_scenes(video.frames, video.fps)
        found.extend(video.frames[start:end] for start, end in spans if end - start >= 12)
    return found


def test_different_clips_are_no_copies(scenes: list[Frames]) -> None:
    """Precision 1 on every pair: nothing of the demo's data set is lost."""
    index = NearDuplicates(DedupConfig())
    for n, scene in enumerate(scenes):
        clip = look(scene)
        assert index.find(clip, None, n) is None
        index.add(clip, None, n, str(n))
    assert len(scenes) >= 24


@pytest.mark.parametrize("name", ALTERATIONS)
def test_copies_are_found(name: str, scenes: list[Frames]) -> None:
    """Recall at least 0.95 for each alteration, and each is taken for the clip it is a copy of."""
    index = NearDuplicates(DedupConfig())
    for n, scene in enumerate(scenes):
        index.add(look(scene), None, n, f"clip {n}.")
    found = [index.find(look(ALTERATIONS[name](scene)), None, -1) for scene in scenes]
    right = [sentence is not None and f"clip {n}. " in sentence for n, sentence in enumerate(found)]
    assert np.mean(right) >= 0.95
    assert sum(sentence is not None for sentence in found) == sum(right)


def test_colours_tell_equal_shapes_apart() -> None:
    red, blue = look(make_scene("red")), look(make_scene("blue"))
    assert hamming(np.array([red.frames], np.uint64), np.array(blue.frames, np.uint64))[0] <= 8 * 6
    index = NearDuplicates(DedupConfig())
    index.add(red, None, 0, "red")
    assert index.find(red, None, 1) is not None
    assert index.find(blue, None, 1) is None


def test_flat_clips_are_compared_with_none() -> None:
    rng = np.random.default_rng(0)
    flat = [np.clip(rng.normal(level, 1, (16, 48, 64, 3)), 0, 255).astype(np.uint8) for level in (16, 16, 40)]
    index = NearDuplicates(DedupConfig())
    for n, frames in enumerate(flat):
        clip = look(frames)
        assert clip.detail == 0
        assert index.find(clip, None, n) is None
        index.add(clip, None, n, str(n))


def test_clips_of_one_file_are_not_compared() -> None:
    clip = look(make_world(3))
    index = NearDuplicates(DedupConfig())
    index.add(clip, None, 7, "first")
    assert index.find(clip, None, 7) is None
    assert index.find(clip, None, 8) == "looks like first (0.0 of 64 bits differ)"
    off = NearDuplicates(DedupConfig(near=False))
    off.add(clip, None, 7, "first")
    assert off.find(clip, None, 8) is None


@settings(max_examples=40, deadline=None)
@given(
    frames=st.sampled_from([1, 2, 8]), most=st.sampled_from([0.0, 2.0, 3.5, 4.0, 6.0, 9.0]), seed=st.integers(0, 999)
)
def test_the_search_is_exact(frames: int, most: float, seed: int) -> None:
    """Against comparing with every clip in turn; clips lie around a few centres, at all distances up to the bound."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 1 << 63, (3, frames)).astype(np.uint64)
    index = HashIndex(frames, most)
    added: list[ClipHash] = []
    for n in range(40):
        bits = np.unpackbits(centres[rng.integers(3)][:, None].view(np.uint8), axis=1)
        wrong = rng.choice(bits.size, min(bits.size, int(rng.integers(0, int(most * frames) + 3))), replace=False)
        bits.reshape(-1)[wrong] ^= 1
        words = np.packbits(bits, axis=1).view(np.uint64).reshape(-1)
        colours = tuple(int(c) for c in rng.integers(100, 100 + MAX_COLOUR_STEPS + 4, 18))
        clip = ClipHash(tuple(int(word) for word in words), colours, 1.0)
        expected = None
        for m, other in enumerate(added):
            differing = sum(bin(a ^ b).count("1") for a, b in zip(clip.frames, other.frames, strict=True))
            steps = max(abs(a - b) for a, b in zip(clip.colours, other.colours, strict=True))
            if differing <= most * frames and steps <= MAX_COLOUR_STEPS:
                expected = (m, differing / frames)
                break
        assert index.find(clip, file=-1) == expected
        index.add(clip, file=n, label=n)
        added.append(clip)


def test_embeddings_are_compared_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contentv.curation.near_duplicates.BLOCK_CLIPS", 7)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = EmbeddingIndex(0.9)
    for n, vector in enumerate(vectors):
        cosines = [float(vector.astype(float) @ other.astype(float)) for other in vectors[:n]]
        first = next((m for m, cosine in enumerate(cosines) if cosine >= 0.9), None)
        found = index.find(vector, file=-1)
        assert (None if found is None else found[0]) == first
        index.add(vector, file=n, label=n)
    clips = NearDuplicates(DedupConfig(encoder="an/encoder", min_similarity=0.9))
    clips.add(look(make_world(0)), vectors[0], 0, "one")
    assert clips.find(look(make_world(1)), vectors[0], 1) == "looks like one (similarity 1.000)"


def test_hashes_survive_being_stored(tmp_path: Path) -> None:
    clips = [look(make_world(1)), hash_clip([make_world(2)[0]])]
    assert [ClipHash.from_row(clip.to_row()) for clip in clips] == clips
    for clip, back in zip(clips, from_array(as_array(clips)), strict=True):
        assert (clip.frames, clip.colours) == (back.frames, back.colours)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"max_distance": 17.0}, {"max_distance": -1.0}, {"min_similarity": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            DedupConfig(**wrong)
