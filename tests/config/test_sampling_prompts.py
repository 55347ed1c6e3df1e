"""Prompts from the command line and from files, and every way in which a file of them can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contentv.base.errors import UserError
from contentv.config.prompts import Prompt, read_prompts
from contentv.config.schema import SampleConfig


def config(prompts: Path | str = "", prompt: str = "") -> SampleConfig:
    return SampleConfig(prompts=str(prompts), prompt=prompt, negative_prompt="blurred", seed=5)


def test_one_prompt() -> None:
    assert read_prompts(config(prompt="a cat")) == [Prompt("a cat", "blurred", 5, 0, "00000")]


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    # A mark of the byte order, Windows line ends, empty lines, and a separator that is no line end.
    path.write_bytes("\ufeffa cat\r\n\r\n  a d\u2028og \r\n".encode())
    assert read_prompts(config(path)) == [
        Prompt("a cat", "blurred", 5, 0, "00000"),
        Prompt("a d\u2028og", "blurred", 5, 1, "00001"),
    ]


def test_a_jsonl_line_may_have_its_own_negative_prompt_seed_and_name(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a cat"},
        {"prompt": "a dog", "negative_prompt": "dark", "seed": 9, "name": "my dog"},
        {"prompt": "", "negative_prompt": ""},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert read_prompts(config(path)) == [
        Prompt("a cat", "blurred", 5, 0, "00000"),
        Prompt("a dog", "dark", 9, 0, "my dog"),  # does not depend on its place in the file
        Prompt("", "", 5, 2, "00002"),
    ]


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "{broken", "line 2: is not JSON"),
        (GOOD + "\n[1]", "line 3: is not a JSON object"),
        (GOOD + '{"promt": "a"}', 'line 2: unknown key "promt"[^$]*did you mean "prompt"'),
        ('{"negative_prompt": "a"}', "line 1: prompt is missing"),
        ('{"prompt": 3}', "prompt 3 is not a text"),
        ('{"prompt": "a", "seed": "7"}', 'seed "7" is not a whole number'),
        ('{"prompt": "a", "seed": true}', "seed true is not a whole number"),
        ('{"prompt": "a", "name": "../x"}', "cannot be the name of a file"),
        ('{"prompt": "a", "name": ""}', "cannot be the name of a file"),
        ('{"prompt": "a", "name": ".x"}', "cannot be the name of a file"),
        ('{"prompt": "a", "name": "' + "x" * 300 + '"}', "cannot be the name of a file"),
        (
            GOOD + '{"prompt": "a", "name": "X"}\n{"prompt": "b", "name": "x"}',
            'line 3: two videos .* "x.mp4", see line 2',
        ),
        ('{"prompt": "a", "name": "00001"}\n' + GOOD, 'line 2: two videos .* "00001.mp4", see line 1'),
        ("\n  \n", "holds no prompt"),
    ],
)
def test_a_broken_file_is_refused_with_the_number_of_the_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(config(path))


def test_other_bad_input(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for values, message in (
        ({}, "one of prompt= and prompts="),
        ({"prompt": "a", "prompts": tmp_path / "latin.txt"}, "one of prompt= and prompts="),
        ({"prompts": tmp_path / "none.txt"}, "is not a file"),
        ({"prompts": tmp_path}, "is not a file"),
        ({"prompts": tmp_path / "latin.txt"}, "is not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(config(**values))
