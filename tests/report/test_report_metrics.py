"""Reading metrics.jsonl and config.yaml: order, repeats, nulls, and errors that name file and line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from contentv.base.errors import UserError
from contentv.report.metrics import read_config, read_metrics
from contentv.report.run import data_wait_share


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_stages_keep_their_order_and_later_lines_win(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"stage": "image", "step": 1, "loss": 4.0}',
        '{"stage": "image", "step": 2, "loss": 3.0}',
        '{"stage": "sft", "step": 1, "loss": 1.0, "eval_loss": 0.9}',
        "",
        '{"stage": "image", "step": 2, "loss": 2.5}',
        '{"stage": "image", "step": 3, "loss": null, "note": "text is allowed"}',
    )
    image, sft = read_metrics(path)
    assert (image.stage, image.repeated) == ("image", 1)
    steps, losses = image.column("loss")
    assert steps == [1.0, 2.0, 3.0]
    assert losses[:2] == [4.0, 2.5]
    assert math.isnan(losses[2])
    assert image.finite("loss") == [4.0, 2.5]
    assert image.column("eval_loss") == ([], [])
    assert sft.column("eval_loss") == ([1.0], [0.9])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "loss"', "not JSON"),
        ("[1, 2]", "not an object"),
        ('{"loss": 1.0}', '"step" is None'),
        ('{"step": true}', '"step" is True'),
        ('{"step": 2, "loss": "low"}', "\"loss\" is 'low'"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, '{"step": 1, "loss": 1.0}', line)
    with pytest.raises(UserError) as caught:
        read_metrics(path)
    assert message in str(caught.value)
    assert caught.value.where == f"{path}:2"


def test_data_wait_share(tmp_path: Path) -> None:
    path = write(
        tmp_path, '{"step": 1, "step_s": 2.0, "data_wait_s": 0.5}', '{"step": 2, "step_s": 2.0}', '{"step": 3}'
    )
    (stage,) = read_metrics(path)
    shares = data_wait_share(stage)
    assert shares[0] == 0.25
    assert all(math.isnan(s) for s in shares[1:])


def test_config_is_flat_and_hides_credentials(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "a:\n  b: 1\n  c: {}\n  e: null\nwandb:\n  API_KEY: s3cret\ntoken_width: 64\nname: x: y\n".replace(
            "x: y", "x y"
        )
    )
    assert read_config(path) == {
        "a.b": "1", "a.c": "{}", "a.e": "", "wandb.API_KEY": "(hidden)", "token_width": "64", "name": "x y",
    }  # fmt: skip
    assert read_config(tmp_path / "other.yaml") is None


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "!!python/object/apply:os.system ['true']"])
def test_config_that_is_not_a_plain_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_config(path)
