"""Checkpoints of every layout convert to the weights that were trained, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml
from safetensors.torch import load_file, save_file

import launch
from contentv.parallel.mesh import ParallelConfig

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_zero3": {},
    "sp2_zero1": {"sp": 2, "zero_stage": 1},
    "tp2_zero2": {"tp": 2, "zero_stage": 2},
}
MODEL = {**toy.SHAPE, "patch_size": 2, "qk_norm": "rms_norm"}


def write_checkpoints(root: str) -> bool:
    """Runs in both processes: trains under every layout and saves, with the truth beside."""
    for name, layout in LAYOUTS.items():
        engine = toy.make_engine(ParallelConfig(**layout))
        toy.train(engine, 2)
        engine.save(Path(root) / name / "checkpoints" / "step-00000002", {}, chunk_bytes=100_000)
        truth = {which: dict(engine.state_tensors(ema=which == "ema")) for which in ("ema", "raw")}
        if engine.mesh.rank == 0:
            config = {"model": MODEL, "stage": {"name": name}, "init": "none"}
            (Path(root) / name / "config.yaml").write_text(yaml.safe_dump(config))
            for which, state in truth.items():
                save_file(state, Path(root) / name / f"{which}.safetensors")
        engine.close()
    return True


@pytest.mark.dist
def test_a_checkpoint_of_any_layout_converts(tmp_path: Path) -> None:
    from contentv.config.converting import convert  # not where the processes that are started import it, too
    from contentv.config.schema import ConvertConfig

    assert launch.run(__file__, "write_checkpoints", 2, root=str(tmp_path)) == [True, True]
    for name in LAYOUTS:
        checkpoint = tmp_path / name / "checkpoints" / "step-00000002"
        assert len({path.name.split("-")[1] for path in checkpoint.glob("param-*")}) == 2  # both ranks wrote
        for which in ("ema", "raw"):
            to = tmp_path / f"{name}-{which}"
            convert(ConvertConfig(source=str(checkpoint), to=str(to), layout="transformer", weights=which))
            truth = load_file(tmp_path / name / f"{which}.safetensors")
            found = load_file(to / "diffusion_pytorch_model.safetensors")
            assert found.keys() == truth.keys()
            assert all(torch.equal(found[n], t) and found[n].dtype == torch.float32 for n, t in truth.items())
