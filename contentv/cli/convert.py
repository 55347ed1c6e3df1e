"""`contentv convert`: weights of one kind of folder to another."""

from __future__ import annotations

from collections.abc import Sequence

from contentv.base.log import console
from contentv.config.converting import convert
from contentv.config.schema import ConvertConfig


def run(config: ConvertConfig, overrides: Sequence[str]) -> None:
    """Converts and prints where the result is."""
    folder = convert(config)
    files = [path for path in folder.rglob("*") if path.is_file()]
    parts = sorted(path.name for path in folder.iterdir() if path.is_dir()) or ["transformer"]
    size = sum(path.stat().st_size for path in files) / 1e6
    console.print(f"{', '.join(parts)}: {size:.1f} MB in {len(files)} files", highlight=False)
    console.print(str(folder), highlight=False, soft_wrap=True)
