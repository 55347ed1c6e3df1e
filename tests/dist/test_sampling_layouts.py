"""Sampling on 1, 2 and 4 processes gives the same videos, and a process that fails does not leave others waiting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import launch
from contentv.base.errors import UserError
from contentv.config import sampling
from contentv.config.prompts import read_prompts
from contentv.config.sampling import build_sampler, encode_prompts, sample_to_files
from contentv.config.sampling_inputs import open_inputs
from contentv.config.schema import SampleConfig, TextConfig, VAEConfig
from contentv.curation.video_io import read_video
from contentv.models.io import write_transformer
from contentv.models.mmdit import MMDiT, MMDiTConfig
from contentv.parallel.collectives import start
from contentv.parallel.mesh import ParallelConfig, build_mesh, single_process_mesh

ASSETS = Path(__file__).resolve().parents[2] / "contentv" / "demo" / "assets"
# Three heads and 3 x 3 patches: neither divides by 2 or 4.
MODEL = MMDiTConfig(
    num_layers=2, num_attention_heads=3, attention_head_dim=16, joint_attention_dim=64, pooled_projection_dim=64
)
PROMPTS = ["a red circle moving left", "a blue square", "green"]

pytestmark = pytest.mark.dist


def config(folder: str, out: str, **values: Any) -> SampleConfig:
    return SampleConfig(
        checkpoint=f"{folder}/model", prompts=f"{folder}/prompts.txt", out=f"{folder}/{out}", frames=5, height=48,
        width=48, steps=3, shift=3.0, guidance_scale=3.0, device="cpu", vae=VAEConfig(path=str(ASSETS / "vae")),
        text=TextConfig(path=str(ASSETS / "image_model")), **values,
    )  # fmt: skip


def latents(settings: SampleConfig, mesh: Any) -> torch.Tensor:
    inputs, prompts = open_inputs(settings), read_prompts(settings)
    texts = encode_prompts(inputs, ["", *(p.text for p in prompts)], toy.CPU, torch.float32)
    return build_sampler(inputs, settings, toy.CPU, mesh).latents(prompts, texts)


def layouts(folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Runs in every process: the files that this rank wrote and its latents, for each layout."""
    rank, world = start(toy.CPU, timeout_s=120.0)
    sampling.stop = lambda: None  # the next layout goes on with the same processes
    found = {}
    for name, values in cases.items():
        written = sample_to_files(config(folder, f"{world} {name}", **values))
        settings = config(folder, "unused", **values)
        z = latents(settings, build_mesh(ParallelConfig(sp=settings.sp, ring=settings.ring), world, rank))
        found[name] = {"written": [path.name for path in written], "latents": z.flatten().tolist()}
    try:
        sample_to_files(config(folder, "damaged"))
    except UserError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampling")
    torch.manual_seed(0)
    write_transformer(MMDiT(MODEL).state_dict(), path / "model", MODEL)
    (path / "damaged").mkdir()
    (path / "damaged" / "samples.json").write_text("{")
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> torch.Tensor:
    for batch_size in (1, 2):
        written = sample_to_files(config(str(folder), f"1 batch {batch_size}", batch_size=batch_size))
        assert [path.name for path in written] == ["00000.mp4", "00001.mp4", "00002.mp4"]
    return latents(config(str(folder), "unused"), single_process_mesh())


def check(folder: Path, nproc: int, cases: dict[str, dict[str, Any]], alone: torch.Tensor) -> list[dict[str, Any]]:
    results = launch.run(__file__, "layouts", nproc, timeout_s=400.0, folder=str(folder), cases=cases)
    for name, values in cases.items():
        out, single = folder / f"{nproc} {name}", folder / f"1 batch {values.get('batch_size', 1)}"
        assert sorted(path.name for path in out.iterdir()) == ["00000.mp4", "00001.mp4", "00002.mp4", "samples.json"]
        assert (out / "samples.json").read_bytes() == (single / "samples.json").read_bytes()
        for file in sorted(single.glob("*.mp4")):
            if values.get("sp", 1) == 1:
                assert (out / file.name).read_bytes() == file.read_bytes(), (name, file.name)
            else:
                difference = read_video(out / file.name).frames.astype(int) - read_video(file).frames
                # The codec is lossy: a byte that rounding changes by 1 becomes a few, here and there.
                assert abs(difference).max() <= 8
                assert abs(difference).mean() <= 0.05
        for result in results:
            z = torch.tensor(result[name]["latents"]).view(alone.shape)
            assert float((z - alone).abs().max()) <= 1e-5 * float(alone.abs().max())
    # Rank 0 alone looks at the folder; what it says is said by all.
    assert all("samples.json: is damaged" in result["refused"] for result in results)
    return results


def test_two_processes(folder: Path, alone: torch.Tensor) -> None:
    cases = {"dp": {}, "dp batches": {"batch_size": 2}, "sp": {"sp": 2}, "sp batches": {"sp": 2, "batch_size": 2},
             "ring": {"sp": 2, "ring": 2}}  # fmt: skip
    results = check(folder, 2, cases, alone)
    # Every process has work.
    assert [r["dp"]["written"] for r in results] == [["00000.mp4", "00002.mp4"], ["00001.mp4"]]
    assert [r["dp batches"]["written"] for r in results] == [["00000.mp4", "00001.mp4"], ["00002.mp4"]]
    assert [r["sp batches"]["written"] for r in results] == [["00000.mp4", "00002.mp4"], ["00001.mp4"]]


def test_four_processes_and_fewer_prompts(folder: Path, alone: torch.Tensor) -> None:
    results = check(folder, 4, {"dp": {}, "dp sp": {"sp": 2}, "sp": {"sp": 4}, "sp ring": {"sp": 4, "ring": 2}}, alone)
    assert [r["dp"]["written"] for r in results] == [["00000.mp4"], ["00001.mp4"], ["00002.mp4"], []]
    assert sorted(name for r in results for name in r["dp sp"]["written"]) == ["00000.mp4", "00001.mp4", "00002.mp4"]


def fails(folder: str, to: str) -> None:
    """Runs in both processes: rank 1 fails in decoding its video, and rank 0 waits for it in the next batch."""
    if sampling.os.environ["RANK"] == "1":

        def burn(frames: Any, path: Path, fps: float) -> None:
            raise RuntimeError("the disk is on fire")

        sampling.write_mp4 = burn
    sample_to_files(config(folder, to, sp=2, batch_size=2))


@pytest.mark.parametrize(("sp", "ring"), [(2, 4), (4, 3), (1, 2), (2, 0)])
def test_a_ring_divides_the_processes_of_a_video(sp: int, ring: int) -> None:
    with pytest.raises(UserError, match=f"use a divisor of sp={sp}"):
        SampleConfig(sp=sp, ring=ring)


def test_a_process_that_fails_ends_the_others(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"ended with code 1(?s:.)*the disk is on fire"):
        launch.run(__file__, "fails", 2, timeout_s=400.0, folder=str(folder), to="failed")
    assert not [p.name for p in (folder / "failed").iterdir() if p.name.endswith(".tmp")]
    assert json.loads((folder / "failed" / "samples.json").read_text())["files"]
    # What rank 0 wrote is whole, and the job goes on from there.
    before = {p.name for p in (folder / "failed").glob("*.mp4")}
    written = sample_to_files(config(str(folder), "failed"))
    assert before | {p.name for p in written} == {"00000.mp4", "00001.mp4", "00002.mp4"}
    assert not before & {p.name for p in written}
