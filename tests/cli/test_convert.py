"""`contentv convert` as it is typed: the key `from`, messages, exit codes, what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from contentv.cli.main import main
from contentv.config.compose import load_config

ASSETS = Path(__file__).resolve().parents[2] / "contentv" / "demo" / "assets"
IMAGE = ASSETS / "image_model"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["convert", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_key_is_from_wherever_a_person_sees_it(run) -> None:
    _, out, _ = run("--help")
    assert "\n  from (" in out
    assert "source" not in out
    _, out, _ = run("--cfg", "from=some/folder", "layout=transformer")
    assert out.startswith("from: some/folder\nto: ''\nlayout: transformer\n")
    assert "source" not in out
    assert load_config("convert", ["from=some/folder"]).source == "some/folder"
    code, _, err = run("source=x")
    assert code == 2
    assert 'did you mean "from"?' in err
    code, _, err = run("from=[1,2]")
    assert code == 2
    assert "key from" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["to is not set"]),
        (("to=x",), ["from is not set"]),
        (("from=/nowhere", "to=x"), ["/nowhere", "from"]),
        (("from=.", "to=/elsewhere"), ["from", "holds no transformer"]),
        (("layout=torch",), ["layout=torch", "diffusers, transformer"]),
        (("weights=best",), ["weights=best"]),
        (("dtype=int8",), ["dtype=int8", "bf16"]),
        (("lora_mode=fuse",), ["lora_mode=fuse", "unmerge"]),
        (("shift=-1",), ["shift=-1"]),
        (("max_shard_gb=0",), ["max_shard_gb=0"]),
        ((f"from={IMAGE}", "to=x"), ["vae.path", "layout=transformer"]),
        ((f"from={ASSETS / 'reward'}", "to=x"), ["class", "SD3Transformer3DModel"]),
        ((f"from={IMAGE}", "to=x", "layout=transformer", f"lora={IMAGE}"), ["pytorch_lora_weights.safetensors"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(run, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "what to do" in err
    for word in words:
        assert word in err
    assert not any(tmp_path.iterdir())


def test_it_says_what_it_wrote(run, tmp_path) -> None:
    to = tmp_path / "to"
    code, _, err = run(f"from={IMAGE}", f"to={to}", f"vae.path={ASSETS / 'vae'}")
    assert code == 0
    lines = err.strip().splitlines()
    assert lines[-1] == str(to)
    assert "scheduler, text_encoder, tokenizer, transformer, vae" in lines[-2]
    code, _, err = run(f"from={IMAGE}", f"to={to}", f"vae.path={ASSETS / 'vae'}")
    assert code == 2
    assert "overwrite=true" in err
