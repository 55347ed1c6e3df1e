"""The Dockerfile's cpu target without an engine: its steps, one by one, in a clean Debian (debootstrap and chroot).

What stands for the base image python:3.11-slim-bookworm is Debian bookworm with its own Python 3.11; everything after
`FROM` is executed as written. Packages come from this machine's mirrors: its PIP_* settings are passed on.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_dockerfile import stages

ROOT = Path(__file__).parents[2]
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
STEP_S = 3600


def why_not() -> str:
    """Returns what keeps a clean root from being made here, or nothing."""
    if os.geteuid() != 0:
        return "chroot needs root"
    missing = [name for name in ("debootstrap", "unshare", "chroot") if shutil.which(name) is None]
    return f"apt-get install {' '.join(missing)}" if missing else ""


pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.skipif(bool(why_not()), reason=why_not())]


class CleanRoot:
    """A root file system in which the instructions of a stage are carried out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.folder = "/"
        packages = "--include=python3,python3-pip,ca-certificates"
        run(["debootstrap", "--variant=minbase", packages, "bookworm", str(path), MIRROR], f"no Debian from {MIRROR}")
        for name in ("python", "pip"):  # the base image has them under these names, and lets pip install
            (path / "usr/local/bin" / name).symlink_to(f"/usr/bin/{name}3")
        next((path / "usr/lib").glob("python3*/EXTERNALLY-MANAGED")).unlink()
        for name in ("hosts", "resolv.conf"):  # an engine writes these
            shutil.copy(f"/etc/{name}", path / "etc" / name)
        shutil.copy(CERTIFICATES, path / "etc/ssl/certs/ca-certificates.crt")
        (path / "wheels").mkdir()

    def carry_out(self, name: str) -> None:
        """Carries out the instructions of a stage."""
        for keyword, rest in stages()[name][1]:
            getattr(self, f"_{keyword.lower()}")(rest)

    def run(self, command: str) -> str:
        """Returns what a shell command in the clean root prints."""
        wheels = next((w for w in os.environ.get("PIP_FIND_LINKS", "").split() if Path(w).is_dir()), "")
        pip = {"PIP_CERT": str(CERTIFICATES)}
        if wheels:  # in place of an index that this machine may not reach
            pip |= {"PIP_FIND_LINKS": "/wheels", "PIP_EXTRA_INDEX_URL": "https://pypi.org/simple", "PIP_RETRIES": "1"}
        mounts = [f"mount -t proc proc {self.path}/proc", f"mount --rbind /dev {self.path}/dev"]
        mounts += [f"mount --bind {wheels} {self.path}/wheels"] if wheels else []
        inside = f"cd {shlex.quote(self.folder)} && {command}"
        outside = " && ".join([*mounts, f"exec chroot {self.path} /bin/sh -c {shlex.quote(inside)}"])
        return run(["unshare", "--mount", "--pid", "--fork", "sh", "-c", outside], command, pip | self.env)

    def _run(self, command: str) -> None:
        self.run(command)

    def _env(self, rest: str) -> None:
        for word in shlex.split(rest):
            name, _, value = word.partition("=")
            self.env[name] = re.sub(r"\$\{?(\w+)\}?", lambda match: self.env.get(match[1], ""), value)

    def _workdir(self, folder: str) -> None:
        self.folder = folder
        (self.path / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _cmd(self, rest: str) -> None:
        self.command = shlex.join(json.loads(rest))

    def _copy(self, rest: str) -> None:
        """Copies from the stage `source`, whose own copies come from the checkout."""
        option, start, target = rest.split()
        assert option == "--from=source"
        ignored = shutil.ignore_patterns("__pycache__")
        for _, copied in stages()["source"][1]:
            *sources, folder = copied.split()
            place = self.path / target.lstrip("/") / Path(folder).relative_to(start)
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=ignored)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)


def run(command: list[str], what: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=STEP_S, check=False)
    assert done.returncode == 0, f"{what}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def image() -> Iterator[CleanRoot]:
    folder = Path(tempfile.mkdtemp(prefix="image."))
    try:
        root = CleanRoot(folder / "root")
        root.carry_out("cpu")
        yield root
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_targets_command_says_what_is_there(image: CleanRoot) -> None:
    assert image.command == "contentv doctor"
    found = json.loads(image.run(f"{image.command} json=true"))
    assert found["devices"] == ["cpu"]
    assert found["python"].startswith("3.11.")
    assert all(found["libraries"].values())
    assert found["optional"]["wandb"]
    assert found["optional"]["tensorboard"]
    assert found["libraries"]["torch"].split("+")[0] == "2.13.0"


def test_nothing_of_the_checkout_is_needed_at_run_time(image: CleanRoot) -> None:
    place = image.run("cd / && python -c 'import contentv, contentv_kernels; print(contentv.__file__)'").strip()
    assert "/dist-packages/" in place or "/site-packages/" in place
    assert "num_layers: 38" in image.run("cd / && contentv train --cfg model=contentv_8b")


def test_launchers_are_on_the_path_and_two_processes_train(image: CleanRoot) -> None:
    image.run("contentv synth out=/tmp/videos clips=4 seed=1")
    assets = image.run("python -c 'from contentv.demo.run import ASSETS; print(ASSETS)'").strip()
    image.run(
        f"contentv curate input=/tmp/videos output=/tmp/data 'buckets=[f1_h32_w32]' vae.path={assets}/vae"
        f" text.path={assets}/image_model min_clip_s=1.0 max_clip_s=6"
    )
    image.run(
        f"local.sh 2 train stage=image model=tiny train.precision=fp32 data.path=/tmp/data init={assets}/image_model"
        " out=/tmp/run train.max_steps=2 train.global_batch_size=2 optim.warmup_steps=1 optim.ema_decay=0.9"
    )
    assert (image.path / "tmp/run/stage.json").is_file()
