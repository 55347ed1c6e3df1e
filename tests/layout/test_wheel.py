"""A wheel holds the kernels, the configuration files and the demo's models, and works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("contentv-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys, contentv, contentv_kernels; from contentv.cli.main import main;"
        "from contentv.demo.run import ASSETS; assert str(ASSETS).startswith(sys.argv[1]), ASSETS;"
        "assert (ASSETS / 'vae' / 'config.json').is_file();"
        "assert contentv_kernels.__file__.startswith(sys.argv[1]), contentv_kernels.__file__;"
        "sys.exit(main(['train', '--cfg', 'model=contentv_8b', 'timestep=tqd']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "num_layers: 38" in done.stdout
