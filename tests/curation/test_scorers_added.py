"""Focus, blockiness, text area, the text detector, filters and settings: truth is how each clip was made."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from contentv.base.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from contentv.cli.main import main
from contentv.curation.filters import FilterConfig, broken_bounds
from contentv.curation.scorers import SCORERS, ScoringConfig, list_scorers, score_clip
from contentv.curation.scoring.names import CLASSICAL_MOTION, CLASSICAL_VISUAL, SCORER_NAMES
from contentv.curation.scoring.ocr import OcrTextArea
from contentv.curation.scoring.scorer import KINDS
from contentv.curation.scoring.view import ClipScores, ClipView
from contentv.curation.synth import write_mp4
from contentv.curation.synth_world import render_clip, sample_spec
from tests.curation.test_scorers import blurred, make_clip, noisy, texture
from tests.curation.test_synth import read_frames


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    cv2.setNumThreads(1)


def measured(name: str, clip: np.ndarray) -> float:
    value = SCORERS[name].score(ClipView(clip, 8.0))
    assert isinstance(value, float)
    return value


def moving(height: int, width: int, seed: int = 0, frames: int = 8) -> np.ndarray:
    """A window that moves over a textured ground."""
    ground = texture(2 * max(height, width), seed)
    clip = []
    for n in range(frames):
        view = np.array([[1, 0, width / 3 + 2.3 * n], [0, 1, height / 3 + 0.7 * n]], np.float32)
        clip.append(cv2.warpAffine(ground, view, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
    return np.clip(np.rint(np.stack(clip)), 0, 255).astype(np.uint8)


def resized(clip: np.ndarray, scale: float) -> np.ndarray:
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, None, fx=scale, fy=scale, interpolation=method) for frame in clip])


def jpeg(clip: np.ndarray, quality: int) -> np.ndarray:
    coded = [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for frame in clip]
    return np.stack([cv2.imdecode(frame, cv2.IMREAD_COLOR) for frame in coded])


def h264(clip: np.ndarray, crf: int, folder: Path) -> np.ndarray:
    write_mp4(folder / "clip.mp4", clip, 24, crf)
    return read_frames(folder / "clip.mp4")


# focus


@pytest.mark.parametrize("contrast", [1.0, 0.3])
def test_focus_falls_with_blur_and_not_with_contrast(contrast: float) -> None:
    def scene(sigma: float) -> float:
        clip = make_clip(256, frames=2)
        faint = (128 + contrast * (clip.astype(float) - 128)).astype(np.uint8)
        return measured("focus", blurred(faint, sigma) if sigma else faint)

    levels = [scene(sigma) for sigma in (0, 0.5, 1, 2, 4, 8)]
    assert all(more > 1.05 * less for more, less in itertools.pairwise(levels))
    assert levels[0] == pytest.approx(measured("focus", make_clip(256, frames=2)), rel=0.1)


def test_focus_measures_the_blur_of_an_edge() -> None:
    """1 / (1 + (blur / 1.2 px)^2), as `Focus` states."""
    for blur in (2.0, 4.0, 8.0):
        step = np.full((256, 256, 3), 50, np.float32)
        step[:, 128:] = 250
        step = cv2.GaussianBlur(step, (0, 0), blur)[None].round().astype(np.uint8)
        assert measured("focus", step) == pytest.approx(1 / (1 + (blur / 1.2) ** 2), rel=0.15)


def test_noise_and_black_bars_do_not_bring_focus() -> None:
    soft = blurred(make_clip(256, frames=2), 3.0)
    assert measured("focus", noisy(soft, 10)) < 1.5 * measured("focus", soft)
    boxed = soft.copy()
    boxed[:, :40] = boxed[:, -40:] = boxed[:, :, :20] = 0
    assert measured("focus", boxed) < 1.5 * measured("focus", soft)
    assert measured("black_border", boxed) == pytest.approx(1 - 176 * 236 / 256**2, abs=0.01)
    for level in (0, 128, 255):
        assert measured("focus", np.full((2, 64, 64, 3), level, np.uint8)) == 0


# blockiness


@pytest.mark.parametrize("size", [(256, 448), (128, 128)])
def test_blockiness_rises_as_jpeg_quality_falls(size: tuple[int, int]) -> None:
    clip = moving(*size)
    levels = [measured("blockiness", clip)] + [measured("blockiness", jpeg(clip, q)) for q in (80, 50, 30, 15, 5)]
    assert levels[0] < 0.05  # the texture's own cells form a lattice, which shows a little in the small picture
    assert all(more > 1.1 * less for less, more in itertools.pairwise(levels))
    cut = jpeg(clip, 30)[:, 3:, 5:]  # the grid begins anywhere
    assert measured("blockiness", cut) == pytest.approx(levels[3], rel=0.15)


def test_blockiness_rises_with_the_quantiser_of_h264(tmp_path: Path) -> None:
    clip = moving(256, 448)
    levels = [measured("blockiness", h264(clip, crf, tmp_path)) for crf in (14, 36, 39, 42)]
    assert levels[0] < 0.02
    assert levels[1] < levels[2] < levels[3]
    assert measured("blockiness", h264(clip, 51, tmp_path)) > 0.1


@pytest.mark.parametrize("scale", [0.6, 0.75, 4 / 3, 1.5, 2])
def test_resized_blocks_are_found_and_resizing_itself_is_none(scale: float) -> None:
    clip = moving(256, 448)
    plain, coded = (measured("blockiness", resized(frames, scale)) for frames in (clip, jpeg(clip, 15)))
    assert plain < 0.05
    assert coded > max(0.06, 3 * plain)


def test_texture_noise_and_lines_are_no_blocks() -> None:
    assert measured("blockiness", noisy(moving(128, 128), 20)) < 0.02
    lines = moving(256, 256)
    lines[:, :, 100:104] = lines[:, 60:63] = 250
    assert measured("blockiness", lines) < 0.02
    for level in (0, 99, 255):
        assert measured("blockiness", np.full((2, 64, 64, 3), level, np.uint8)) == 0
    assert measured("blockiness", jpeg(moving(40, 90), 5)) == 0  # too small to tell


# text


def subtitled(clip: np.ndarray, lines: list[str], size: float = 0.055, colour: tuple[int, int, int] = (255, 255, 255),
              outline: bool = True) -> tuple[np.ndarray, float]:  # fmt: skip
    """The clip with lines of text at its foot, and the share of the picture under the lines' boxes."""
    height, width = clip.shape[1:3]
    font = ImageFont.load_default(int(size * height))
    covered = np.zeros((height, width), bool)
    frames = []
    for frame in clip:
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        for number, line in enumerate(lines):
            left, top, right, bottom = (int(x) for x in draw.textbbox((0, 0), line, font=font))
            x, y = (width - right) // 2, int(0.97 * height - (len(lines) - number) * 1.35 * size * height)
            edge = max(1, height // 200) if outline else 0
            draw.text((x, y), line, font=font, fill=colour, stroke_width=edge, stroke_fill=(0, 0, 0))
            covered[y + top : y + bottom, x + left : x + right] = True
        frames.append(np.asarray(image))
    return np.stack(frames), float(covered.mean())


LINES = ["Where did you see the lazy dog?", "I do not know, said the fox."]


@pytest.mark.parametrize("size", [(256, 448), (432, 768)])
@pytest.mark.parametrize(
    "style",
    [{}, {"outline": False}, {"colour": (250, 220, 40)}, {"colour": (10, 10, 10), "outline": False}, {"size": 0.09}],
)
def test_text_area_is_the_area_of_subtitles(size: tuple[int, int], style: dict[str, object]) -> None:
    clip = moving(*size)
    assert measured("text_area", clip) < 0.002
    for lines in (LINES[:1], LINES):
        with_text, share = subtitled(clip, lines, **style)  # type: ignore[arg-type]
        assert 0.7 * share < measured("text_area", with_text) < 1.7 * share


def test_text_is_found_in_single_pictures_and_after_coding(tmp_path: Path) -> None:
    clip, share = subtitled(moving(256, 448), LINES)
    assert measured("text_area", clip[:1]) > 0.7 * share
    assert measured("text_area", h264(clip, 30, tmp_path)) > 0.7 * share


def test_text_that_is_there_half_the_time_counts_half() -> None:
    clip = moving(256, 448)
    with_text, _ = subtitled(clip, LINES)
    whole, half = measured("text_area", with_text), measured("text_area", np.concatenate([with_text[:4], clip[4:]]))
    assert half == pytest.approx(whole / 2, rel=0.3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scenes_without_text_have_none(seed: int) -> None:
    for variant in ("clean", "noisy", "jittery", "static"):
        for side in (96, 256):
            spec = sample_spec(np.random.default_rng(seed), variant=variant)
            assert measured("text_area", render_clip(spec, 8, side)) < 0.005
    static = np.repeat(moving(256, 256, seed)[:1], 4, axis=0)
    y, x = np.mgrid[0:256, 0:256]
    chequered = np.repeat(np.where((x // 8 + y // 8) % 2, 220, 20).astype(np.uint8)[None, ..., None], 3, axis=3)
    assert max(measured("text_area", static), measured("text_area", np.repeat(chequered, 4, axis=0))) < 0.003


# The text detector: a network of one multiplication that takes white for text, written by hand as ONNX.


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def entry(key: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(key << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(key << 3 | 2) + varint(len(raw)) + raw


def white_is_text(path: Path, outputs: int = 1) -> Path:
    """sigmoid(6 x (sum of colours) - 4), per pixel."""

    def tensor(name: str, value: np.ndarray) -> bytes:
        dims = b"".join(entry(1, size) for size in value.shape)
        return dims + entry(2, 1) + entry(8, name) + entry(9, value.astype("<f4").tobytes())

    def port(name: str, channels: int) -> bytes:
        dims = entry(1, entry(1, 1)) + entry(1, entry(1, channels)) + entry(1, entry(2, "h")) + entry(1, entry(2, "w"))
        return entry(1, name) + entry(2, entry(1, entry(1, 1) + entry(2, dims)))

    def node(kind: str, inputs: str, output: str) -> bytes:
        return b"".join(entry(1, name) for name in inputs) + entry(2, output) + entry(4, kind)

    graph = entry(1, node("Conv", "xab", "y")) + entry(1, node("Sigmoid", "y", "p")) + entry(2, "white")
    graph += entry(5, tensor("a", np.full((outputs, 3, 1, 1), 6.0))) + entry(5, tensor("b", np.full(outputs, -4.0)))
    graph += entry(11, port("x", 3)) + entry(12, port("p", outputs))
    path.write_bytes(entry(1, 7) + entry(7, graph) + entry(8, entry(1, "") + entry(2, 13)))
    return path


def test_regions_of_the_text_detector_are_grown_and_counted(tmp_path: Path) -> None:
    clip = np.zeros((3, 192, 256, 3), np.uint8)
    clip[:, 80:110, 40:200] = 255
    file = str(white_is_text(tmp_path / "white.onnx"))
    found = score_clip(clip, 8.0, ScoringConfig(ocr=file)).scores["text_area_ocr"]
    growth = 2 * 30 * 160 / (2 * (30 + 160))
    assert found == pytest.approx((30 + 2 * growth) * (160 + 2 * growth) / (192 * 256), rel=0.05)
    assert score_clip(np.zeros_like(clip), 8.0, ScoringConfig(ocr=file)).scores["text_area_ocr"] == 0


def test_what_is_no_text_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        OcrTextArea.from_file(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x00no network")
    with pytest.raises(UserError, match="cannot read it"):
        OcrTextArea.from_file(tmp_path / "broken.onnx")
    two = OcrTextArea.from_file(white_is_text(tmp_path / "two.onnx", outputs=2))
    with pytest.raises(UserError, match=r"gives \[1, 2, "):
        two.score(ClipView(np.zeros((1, 64, 64, 3), np.uint8), 8.0))


# Settings and filters


def test_scorers_left_out_cost_nothing_and_leave_the_rest_as_it_is() -> None:
    clip = make_clip(frames=4)
    names = ["text_area", "blockiness", "sharpness", "brightness", "black_border", "freeze_ratio"]
    all_of_them, some = score_clip(clip, 8.0), score_clip(clip, 8.0, ScoringConfig(skip=names))
    assert set(all_of_them.scores) - set(some.scores) == set(names)
    assert (some.visual_raw, some.motion_raw) == (all_of_them.visual_raw, all_of_them.motion_raw)


def test_given_scores_are_kept_and_may_be_the_visual_or_motion_score() -> None:
    clip = make_clip(frames=4)
    config = ScoringConfig(visual="given_beauty", motion="given_pace", skip=[*CLASSICAL_VISUAL, *CLASSICAL_MOTION])
    scores = score_clip(clip, 8.0, config, given={"beauty": 5.5, "pace": 2.0})
    assert (scores.visual_raw, scores.motion_raw) == (5.5, 2.0)
    assert scores.scores["given_beauty"] == 5.5
    assert np.isnan(score_clip(clip, 8.0, config).visual_raw)  # rejected as not finite, not guessed
    with pytest.raises(UserError, match='no scorer gives "beuty"'):
        score_clip(clip, 8.0, ScoringConfig(visual="beuty"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skip": ["sharpnes"]}, 'no scorer "sharpnes"'),
        ({"skip": ["noise"]}, "noise cannot be left out"),
        ({"skip": ["flicker"]}, "flicker cannot be left out"),
        ({"visual": "aesthetic"}, "aesthetic needs scoring.clip_aesthetic"),
        ({"motion": "mq"}, "mq needs scoring.video_align"),
        ({"pictures": 0}, "not possible"),
        ({"plugins": ["os.system"]}, "names no class"),
        ({"visual": ""}, "is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScoringConfig(**values)  # type: ignore[arg-type]


def test_every_scorer_says_what_it_is() -> None:
    assert tuple(SCORERS) == SCORER_NAMES
    infos = list_scorers()
    assert {"aesthetic", "vq", "mq", "ta", "text_area_ocr", *SCORER_NAMES} == {info.name for info in infos}
    for info in infos:
        assert info.meaning
        assert info.range
        assert info.kind in KINDS
        assert info.available == (info.name in SCORERS)
    assert not list_scorers(ScoringConfig(skip=["text_area"]))[SCORER_NAMES.index("text_area")].available


def test_the_command_lists_the_scorers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["curate", "--scorers"]) == EXIT_OK
    told = capsys.readouterr().out
    assert all(info.name in told for info in list_scorers())
    assert main(["curate", "--scorers", "scoring.skip=[nothing]"]) == EXIT_USER_ERROR


def test_bounds_hold_for_any_score_and_have_stable_rules() -> None:
    scores = ClipScores(0.5, None, {"text_area": 0.2, "blockiness": 0.3, "aesthetic": 4.0, "given_x": float("nan")})
    config = FilterConfig(
        max_text_area=0.1, max_blockiness=0.5, min_motion=0.9,
        bounds={"aesthetic": [4.5, None], "mq": [0.0, None], "given_x": [None, 1.0], "visual": [0.1, 0.4]},
    )  # fmt: skip
    told = {(broken.rule, broken.reason) for broken in broken_bounds(config, scores)}
    assert told == {
        ("filter:text_area", "text_area 0.2 > max_text_area 0.1"),
        ("filter:aesthetic", "aesthetic 4 < min_aesthetic 4.5"),
        ("filter:given_x", "given_x nan > max_given_x 1"),
        ("filter:visual", "visual 0.5 > max_visual 0.4"),
    }  # a clip that has no score, as a picture has no motion, breaks no bound on it
    for bad in ({"a": [1.0]}, {"a": [2.0, 1.0]}):
        with pytest.raises(UserError, match=r"filters\.bounds"):
            FilterConfig(bounds=bad)  # type: ignore[arg-type]
