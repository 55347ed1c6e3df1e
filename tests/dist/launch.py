"""Runs a function of a test file in N gloo processes under torchrun, and returns what each rank returned.

    results = launch.run(__file__, "layouts", nproc=2, steps=10)   # layouts(steps=10) in two processes

The function is called with JSON-compatible keyword arguments and returns something JSON can hold.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 40


def run(file: str | Path, function: str, nproc: int, *, timeout_s: float = 600.0, env: dict[str, str] | None = None,
        **kwargs: Any) -> list[Any]:  # fmt: skip
    """Returns each rank's return value; an AssertionError with every failed rank's last lines if any rank failed."""
    with tempfile.TemporaryDirectory(prefix="contentv-dist-") as folder:
        out = Path(folder)
        process = start(file, function, nproc, out, env=env, **kwargs)
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
        results = [out / f"{rank}.json" for rank in range(nproc)]
        if code != 0 or not all(r.exists() for r in results):
            reason = f"did not end in {timeout_s:.0f} s" if code is None else f"ended with code {code}"
            raise AssertionError(f"{function} on {nproc} processes {reason}\n{tails(out)}")
        return [json.loads(r.read_text()) for r in results]


def start(file: str | Path, function: str, nproc: int, out: Path, *, env: dict[str, str] | None = None,
          **kwargs: Any) -> subprocess.Popen[bytes]:  # fmt: skip
    """Starts the processes in a session of their own and returns torchrun's; results and logs appear in `out`."""
    (out / "kwargs.json").write_text(json.dumps(kwargs))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
        "--redirects=3", f"--log-dir={out / 'logs'}",
        str(Path(__file__).resolve()), str(Path(file).resolve()), function, str(out),
    ]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    settings = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p), **(env or {}),
    }  # fmt: skip
    with open(out / "torchrun.log", "wb") as log:
        return subprocess.Popen(
            command, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the processes started by `start` if they still run: torchrun passes SIGTERM on to its workers."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)  # torchrun gives its workers 30 s
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def tails(out: Path) -> str:
    """Returns the last lines of every rank's output."""
    text = []
    for log in [*sorted((out / "logs").rglob("std*.log")), out / "torchrun.log"]:
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []
        if lines:
            text.append(f"--- {log.relative_to(out)}\n" + "\n".join(lines))
    return "\n".join(text)


def child(file: str, function: str, out: str) -> None:
    """Runs in every process: imports the test file, calls the function, writes its result."""
    # The test file's own folder comes first, as under pytest; the shapes in annotations are checked, as there.
    sys.path.insert(0, str(Path(file).parent))
    sys.path.insert(0, str(Path(__file__).parent))
    if os.environ.get("CONTENTV_TYPECHECK", "1") == "1":
        from jaxtyping import install_import_hook

        install_import_hook(["contentv", "contentv_kernels"], "beartype.beartype")
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("dist_child", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dist_child"] = module
    spec.loader.exec_module(module)
    kwargs = json.loads((Path(out) / "kwargs.json").read_text())
    result = getattr(module, function)(**kwargs)
    partial = Path(out) / f"{os.environ['RANK']}.json.tmp"
    partial.write_text(json.dumps(result))
    partial.rename(Path(out) / f"{os.environ['RANK']}.json")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    child(*sys.argv[1:4])
