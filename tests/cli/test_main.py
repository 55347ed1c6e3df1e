"""What a person sees who types the commands: help, configuration, one message per mistake, the right exit code."""

from __future__ import annotations

import json

import pytest

from contentv.base.errors import StoppedBySignalError, UserError
from contentv.cli import main as cli
from contentv.cli.main import COMMANDS, main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_usage_lists_every_command(run) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        code, out, _ = run(*arguments)
        assert code == 0
        assert all(command in out for command in COMMANDS)
    assert run("--version")[1].startswith("contentv ")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_and_a_resolved_configuration(run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"contentv {command}" in out
    code, out, _ = run(command, "--cfg")
    assert code == 0
    assert out.strip()


def test_cfg_shows_the_overrides(run) -> None:
    code, out, _ = run("train", "--cfg", "model=contentv_8b", "optim.lr=3e-5")
    assert code == 0
    assert "num_layers: 38" in out
    assert "lr: 3.0e-05" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), ['"trian"', '"train"']),
        (("train", "model=tny"), ["tny", "tiny"]),
        (("train",), ["data.path is not set"]),
        (("train", "data.path=/nowhere"), ["/nowhere", "data.path"]),
        (("sample", "checkpoint=/nowhere", "prompt=x"), ["/nowhere", "checkpoint"]),
        (("sample", "checkpoint=.", "prompt=x", "prompts=y"), ["one of prompt= and prompts="]),
        (("curate",), ["input is not set"]),
        (("report",), ["path is not set"]),
        (("report", "path=/"), ["holds no run"]),
        (("synth", "clips=-1"), ["clips=-1"]),
        (("demo", "prompts=1"), ["prompts=1"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(run, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert not any(path.is_file() and path.name != "status.json" for path in tmp_path.rglob("*"))


def test_other_ends_have_their_own_codes(run, monkeypatch) -> None:
    def raising(error: BaseException):
        def fail(command: str, arguments: list[str]) -> int:
            raise error

        return fail

    for error, code in (
        (UserError("x"), 2),
        (StoppedBySignalError("x"), 75),
        (KeyboardInterrupt(), 1),
        (ValueError(), 1),
    ):
        monkeypatch.setattr(cli, "_run", raising(error))
        assert run("train")[0] == code


def test_one_rank_speaks_for_all_and_a_lone_failure_is_still_told(run, monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    code, _, err = run("train", "modle=tiny")
    assert code == 2
    assert waited == [cli.RANK_0_SPEAKS_S]
    assert "rank 3" in err


def test_doctor_knows_this_machine(run) -> None:
    code, out, _ = run("doctor", "json=true")
    assert code == 0
    found = json.loads(out)
    assert found["devices"][-1] == "cpu"
    assert found["libraries"]["torch"]
    assert found["kernels"]["attention"]["sdpa"] is None
    assert "cuda" in found["devices"] or "CUDA" in found["kernels"]["attention"]["flash_attn"]
    code, out, _ = run("doctor")
    assert code == 0
    assert "contentv[" in out
