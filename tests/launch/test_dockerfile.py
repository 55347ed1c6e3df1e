"""The Dockerfile without an engine: its stages, arguments and copied files exist and belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Returns (keyword, rest) of every instruction, continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Returns name -> (base, instructions) of every stage; "" holds what stands before the first."""
    found, name = {"": ("", [])}, ""
    for keyword, rest in instructions():
        if keyword == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            assert name not in found
            found[name] = (base, [])
        else:
            found[name][1].append((keyword, rest))
    return found


def test_only_known_instructions():
    known = {"ARG", "FROM", "COPY", "RUN", "WORKDIR", "ENV", "CMD", "ENTRYPOINT"}
    assert {keyword for keyword, _ in instructions()} <= known


def test_a_target_for_each_kind_of_machine():
    assert {"cpu", "cuda", "npu"} <= set(stages())


def test_bases_are_arguments_with_defaults_or_earlier_stages():
    defaults = {rest.partition("=")[0]: rest.partition("=")[2] for keyword, rest in stages()[""][1] if keyword == "ARG"}
    seen = {"scratch"}
    for name, (base, _) in stages().items():
        if not name:
            continue
        argument = re.fullmatch(r"\$\{(\w+)\}", base)
        assert base in seen if argument is None else defaults[argument[1]].count(":") == 1, name
        seen.add(name)


def test_copies_come_from_the_checkout_or_an_earlier_stage():
    seen: set[str] = set()
    for name, (_, body) in stages().items():
        for keyword, rest in body:
            if keyword != "COPY":
                continue
            option = re.match(r"--from=(\S+) ", rest)
            if option is not None:
                assert option[1] in seen, rest
            else:
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists(), source
        seen.add(name)


def test_everything_copied_is_sent_to_the_engine_and_nothing_else_is():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for keyword, rest in stages()["source"][1] if keyword == "COPY" for source in rest.split()[:-1]}
    assert "*" in ignore
    assert sent == copied


@pytest.mark.parametrize("name", ["cpu", "cuda", "npu"])
def test_targets_install_this_checkout_under_constraints(name):
    body = stages()[name][1]
    installs = [rest for keyword, rest in body if keyword == "RUN" and "pip install" in rest]
    assert any(re.search(r'--constraint \S+ "\.\[', rest) for rest in installs)
    assert ("COPY", "--from=source /src /opt/contentv") in body


def test_arguments_are_declared_where_they_are_used():
    for name, (_, body) in stages().items():
        declared = {rest.partition("=")[0] for keyword, rest in body if keyword == "ARG"}
        used = {
            variable
            for keyword, rest in body
            if keyword in ("RUN", "ENV")
            for variable in re.findall(r"\$\{?([A-Z][A-Z_]+)", rest)
        }
        assert used - {"PATH"} <= declared, name
