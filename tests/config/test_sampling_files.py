"""`contentv sample` from a pipeline folder to MP4 files: going on, refusing, and what may not change a video."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import CONFIG, arguments, random_model, sample_config, write_pipeline

from contentv.base.errors import UserError
from contentv.cli.main import main
from contentv.config import sampling
from contentv.config.prompts import Prompt
from contentv.config.sampling import build_sampler, encode_prompts, sample_to_files, to_uint8
from contentv.config.sampling_inputs import DTYPES, open_inputs
from contentv.config.schema import SampleConfig
from contentv.curation.video_io import read_video
from contentv.models.io import write_transformer
from contentv.models.lora_config import LoRAConfig
from contentv.models.lora_files import write_lora
from contentv.parallel.mesh import single_process_mesh

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square moving up", "a green triangle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def prompt_file(path: Path, prompts: list[str] = PROMPTS) -> str:
    path.write_text("\n".join(prompts))
    return str(path)


def latents(config: SampleConfig, prompts: list[Prompt]) -> torch.Tensor:
    inputs = open_inputs(config)
    captions = [caption for p in prompts for caption in (p.text, p.negative)]
    texts = encode_prompts(inputs, captions, CPU, DTYPES[config.precision])
    return build_sampler(inputs, config, CPU, single_process_mesh()).latents(prompts, texts)


def prompts_of(texts: list[str] = PROMPTS, negative: str = "", seed: int = 0) -> list[Prompt]:
    return [Prompt(text, negative, seed, index, f"{index:05d}") for index, text in enumerate(texts)]


def test_the_file_holds_the_decoded_latents(folder: Path, tmp_path: Path) -> None:
    config = sample_config(folder, tmp_path / "deep" / "a.mp4", prompt=PROMPTS[0], fps=8.0, seed=3)
    assert sample_to_files(config) == [tmp_path / "deep" / "a.mp4"]
    inputs = open_inputs(config)
    assert (inputs.shift, inputs.fps) == (3.0, 8.0)
    found = read_video(tmp_path / "deep" / "a.mp4")
    assert found.fps == 8.0
    with torch.no_grad():
        z = latents(config, prompts_of(PROMPTS[:1], seed=3))
        expected = to_uint8(inputs.vae.decode(inputs.vae.denormalize(z))[0])
    assert found.frames.shape == expected.shape == (5, 32, 32, 3)
    # H.264 halves the colours' resolution: noise does not survive it whole, the brightness does.
    assert np.abs(found.frames.mean(axis=3) - expected.mean(axis=3)).mean() < 8
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"a.mp4", "a.mp4.json"}


def test_a_video_is_decoded_part_by_part_with_or_without_tiles(folder: Path) -> None:
    config = sample_config(folder, frames=9, width=64)
    inputs = open_inputs(config)
    sampler = build_sampler(inputs, config, CPU, single_process_mesh())
    z = sampler.noise(prompts_of(PROMPTS[:1]))
    parts = list(sampler.frames(z))
    assert len(parts) > 2
    assert sum(len(part) for part in parts) == 9
    tiled = np.concatenate(list(replace(sampler, config=replace(config, vae_tile_px=32)).frames(z)))
    assert np.abs(np.concatenate(parts).astype(int) - tiled).max() <= 1


def test_an_interrupted_job_goes_on_and_its_files_are_the_same(folder: Path, tmp_path: Path) -> None:
    config = sample_config(folder, tmp_path / "out", prompts=prompt_file(tmp_path / "p.txt"), batch_size=2)
    files = sample_to_files(config)
    assert [f.name for f in files] == ["00000.mp4", "00001.mp4", "00002.mp4"]
    whole = {f: f.read_bytes() for f in files}
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["files"]["00001.mp4"] == {
        "prompt": PROMPTS[1], "negative_prompt": "", "seed": 0, "index": 1,
    }  # fmt: skip
    assert record["settings"]["steps"] == 2
    times = {f: f.stat().st_mtime_ns for f in files}
    files[1].unlink()  # one of a batch of two
    assert sample_to_files(config) == [files[1]]
    assert {f: f.read_bytes() for f in files} == whole
    assert [f.stat().st_mtime_ns == times[f] for f in files] == [True, False, True]
    assert sample_to_files(config) == []
    # More prompts may follow; what is there stays.
    more = replace(config, prompts=prompt_file(tmp_path / "p.txt", [*PROMPTS, "more"]))
    assert [f.name for f in sample_to_files(more)] == ["00003.mp4"]


def test_files_of_other_prompts_or_settings_are_refused_and_kept(folder: Path, tmp_path: Path) -> None:
    config = sample_config(folder, tmp_path / "a.mp4", prompt=PROMPTS[0])
    (first,) = sample_to_files(config)
    data, record = first.read_bytes(), tmp_path / "a.mp4.json"
    for other, message in (
        (replace(config, prompt="another"), f'prompt "{PROMPTS[0]}", not "another"'),
        (replace(config, seed=1), 'seed "0", not "1"'),
        (replace(config, steps=3), "steps was 2, is 3"),
        (replace(config, guidance_scale=2.0), "guidance_scale was 6.0, is 2.0"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            sample_to_files(other)
        assert "overwrite=true" in caught.value.remedy
        assert first.read_bytes() == data
    # The same to rounding: these are no other settings.
    assert sample_to_files(replace(config, batch_size=4, guidance="batched", vae_tile_px=32)) == []
    record.write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        sample_to_files(config)
    record.unlink()
    with pytest.raises(UserError, match="nothing is known of how it was made"):
        sample_to_files(config)
    assert sample_to_files(replace(config, seed=1, overwrite=True)) == [first]
    assert first.read_bytes() != data
    assert json.loads(record.read_text())["files"]["a.mp4"]["seed"] == 1
    # Other weights in the same place are other settings.
    other = write_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="weights was"):
        sample_to_files(replace(config, seed=1, checkpoint=str(other)))


def test_a_job_stopped_while_overwriting_leaves_no_old_video(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sample_config(folder, tmp_path / "out", prompts=prompt_file(tmp_path / "p.txt"))
    sample_to_files(config)
    write, done = sampling.write_mp4, []

    def fails_later(frames, path, fps):  # type: ignore[no-untyped-def]
        done.append(path)
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        write(frames, path, fps)

    monkeypatch.setattr(sampling, "write_mp4", fails_later)
    new = replace(config, seed=1, overwrite=True)
    with pytest.raises(UserError, match="No space left"):
        sample_to_files(new)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"samples.json", "00000.mp4"}
    monkeypatch.undo()
    assert len(sample_to_files(replace(new, overwrite=False))) == 2


def test_batches_change_a_video_by_rounding_only(folder: Path) -> None:
    config, prompts = sample_config(folder, steps=4), prompts_of(negative="dark")
    together = latents(config, prompts)
    alone = torch.cat([latents(config, [prompt]) for prompt in prompts])
    both = latents(replace(config, guidance="batched"), prompts)
    scale = float(alone.abs().max())
    assert float((together - alone).abs().max()) < 1e-5 * scale
    assert float((both - alone).abs().max()) < 1e-5 * scale
    # The comparison can fail: prompts, seeds, places and negative prompts all matter.
    for other in (
        prompts_of(["x", *PROMPTS[1:]], "dark"), prompts_of(negative="dark", seed=1), prompts_of(negative="bright"),
        [replace(prompts[0], index=1), *prompts[1:]],
    ):  # fmt: skip
        assert float((latents(config, other)[:1] - alone[:1]).abs().max()) > 1e-2 * scale


def test_without_guidance_there_is_one_pass_and_no_negative_prompt(folder: Path) -> None:
    config = sample_config(folder, guidance_scale=1.0)
    assert torch.equal(latents(config, prompts_of(negative="dark")), latents(config, prompts_of(negative="bright")))


def test_the_weights_are_taken_in_the_asked_precision(folder: Path) -> None:
    config = sample_config(folder, precision="bf16", vae_precision="bf16")
    inputs = open_inputs(config)
    sampler = build_sampler(inputs, config, CPU, single_process_mesh())
    assert {p.dtype for p in sampler.model.parameters()} == {torch.bfloat16}
    assert sampler.vae.dtype == torch.bfloat16
    z = latents(config, prompts_of())
    exact = latents(replace(config, precision="fp32"), prompts_of())
    assert z.dtype == torch.float32
    assert 0 < float((z - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_a_lora_is_merged(folder: Path, tmp_path: Path) -> None:
    lora, scale = LoRAConfig(rank=2, alpha=4.0, targets=["attn.to_q"]), 0.5
    generator = torch.Generator().manual_seed(0)
    module = [f"transformer_blocks.{i}.attn.to_q" for i in range(2)]
    parts = {m: (torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)) for m in module}
    stream = {f"{m}.lora_A.weight": a for m, (a, _) in parts.items()}
    write_lora(stream | {f"{m}.lora_B.weight": b for m, (_, b) in parts.items()}, tmp_path / "lora", lora)
    state = random_model().state_dict()
    for m, (a, b) in parts.items():
        state[f"{m}.weight"] = state[f"{m}.weight"] + scale * 4.0 / 2 * b @ a
    changed = tmp_path / "changed"
    write_transformer(state, changed, CONFIG)
    config = sample_config(folder, lora=str(tmp_path / "lora"), lora_scale=scale)
    expected = latents(sample_config(changed, shift=3.0), prompts_of())
    plain = latents(sample_config(folder), prompts_of())
    found = latents(config, prompts_of())
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((found - plain).abs().max()) > 1e-2
    assert torch.equal(latents(replace(config, lora_scale=0.0), prompts_of()), plain)
    assert open_inputs(config).settings(config) != open_inputs(sample_config(folder)).settings(sample_config(folder))


def test_an_image_model_is_refused(tmp_path: Path) -> None:
    write_transformer(random_model().state_dict(), tmp_path, CONFIG)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(UserError, match="image model"):
        open_inputs(sample_config(tmp_path, shift=3.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["prompt=x", "frames=6"], "frames=6 is not of the form 4k+1"),
        (["prompt=x", "width=40"], "width=40 is not a multiple of 16"),
        (["prompt=x", "sp=3"], "1 processes do not divide into groups of sp=3"),
        (["prompt=x", "sp=0"], "sp=0 is not possible"),
        (["prompt=x", "guidance=both"], "guidance=both is not possible"),
        (["prompt=x", "vae_precision=fp16"], "vae_precision=fp16 is not possible"),
        (["prompt=x", "weights=best"], "weights=best is not possible"),
        (["prompt=x", "lora=nowhere"], "nowhere"),
        (["prompt=x", "vae_tile_px=20"], "20"),
        (["prompts=nowhere.txt"], "is not a file"),
        (["prompt=x", "prompts=y"], "one of prompt= and prompts="),
        (["prompt=x", "checkpoint=nowhere"], "is not a folder"),
        (["prompt=x", "checkpoint="], "checkpoint is not set"),
        (["prompt=x", "vae.path=nowhere"], "vae.path"),
        (["prompt=x", "out="], "out is not set"),
    ],
)
def test_bad_input_ends_with_2_and_writes_nothing(
    changes: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "a.mp4"
    given = {change.partition("=")[0] for change in changes}
    base = [a for a in arguments(sample_config(folder, out)) if a.partition("=")[0] not in given]
    assert main(["sample", *base, *changes]) == 2
    assert message in capsys.readouterr().err
    assert not out.parent.exists()


def test_many_prompts_need_a_folder_and_the_shift_must_be_known(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 prompts need a folder"):
        sample_to_files(sample_config(folder, tmp_path / "a.mp4", prompts=prompt_file(tmp_path / "p.txt")))
    with pytest.raises(UserError, match=r"shift .* is unknown"):
        open_inputs(sample_config(folder / "transformer"))
    with pytest.raises(UserError, match=r"text\.path is not set"):
        open_inputs(replace(sample_config(folder), text=type(sample_config(folder).text)()))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        sample_to_files(sample_config(folder, file / "a.mp4", prompt="x"))
