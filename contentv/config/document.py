"""`python -m contentv.config.document` prints docs/keys.md, made from the configuration dataclasses."""

from __future__ import annotations

import sys
from typing import Any

from contentv.config.compose import keys
from contentv.config.schema import ROOTS

INTRODUCTION = """# Every key

Generated from the code by `make docs`: the defaults of the dataclasses, which the files in `conf/` may change for a
stage or a model. `contentv COMMAND --cfg ...` prints what a command would really use.
"""


def keys_page() -> str:
    """Returns the page: one table a command, in the order of the commands."""
    parts = [INTRODUCTION]
    for command, root in ROOTS.items():
        parts.append(f"## `contentv {command}`\n\n| key | default | meaning |\n|---|---|---|")
        for key, field, default in keys(root):
            parts.append(f"| `{key}` | {_shown(default)} | {_cell(field.metadata.get('help', ''))} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value in ("", [], {}):
        return "empty"
    return _cell(str(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(keys_page())
