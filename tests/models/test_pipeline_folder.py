"""Pipeline folders: written whole or not at all, parts recognised by their files, pickles never taken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from contentv.base.errors import UserError
from contentv.base.lock import lock_folder
from contentv.models.pipeline_folder import (
    copy_licences,
    read_shift,
    text_files,
    vae_files,
    whole_folder,
    write_model_index,
    write_scheduler,
)

ASSETS = Path(__file__).resolve().parents[2] / "contentv" / "demo" / "assets"


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    to = tmp_path / "deep" / "model"
    with whole_folder(to) as folder:
        (folder / "config.json").write_text("{}")
        assert not to.exists()
    assert tree(tmp_path) == ["deep", "deep/model", "deep/model/config.json"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    expected = UserError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with whole_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("{}")
            raise error

    with pytest.raises(expected):
        fail()
    assert tree(tmp_path) == []


def test_what_a_killed_conversion_left_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "old").write_text("x")
    descriptor = lock_folder(tmp_path / "model.partial", "at work")
    with pytest.raises(UserError, match="another process"), whole_folder(tmp_path / "model"):
        pass
    os.close(descriptor)
    with whole_folder(tmp_path / "model") as folder:
        assert tree(folder) == []
    assert tree(tmp_path) == ["model"]


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_model(tmp_path: Path) -> None:
    to = tmp_path / "model"
    to.mkdir()
    with whole_folder(to) as folder:  # an empty one is free
        (folder / "config.json").write_text("1")
    with pytest.raises(UserError, match="overwrite=true"), whole_folder(to):
        pass
    with pytest.raises(ValueError, match="late"), whole_folder(to, overwrite=True):
        raise ValueError("late")
    assert (to / "config.json").read_text() == "1"
    with whole_folder(to, overwrite=True) as folder:
        (folder / "config.json").write_text("2")
    assert tree(tmp_path) == ["model", "model/config.json"]
    assert (to / "config.json").read_text() == "2"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no model folder"), whole_folder(tmp_path / "home", overwrite=True):
        pass
    assert tree(tmp_path / "home") == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"), whole_folder(to / "config.json", overwrite=True):
        pass


def test_absent_encoders_are_null_in_the_index(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    write_model_index(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ContentVPipeline"
    assert index["text_encoder"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["text_encoder_3"] == index["tokenizer_2"] == [None, None]
    (tmp_path / "text_encoder_3").mkdir()
    write_model_index(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_3"] == ["transformers", "T5EncoderModel"]
    assert index["tokenizer_3"] == ["transformers", "T5TokenizerFast"]


def test_the_shift_is_read_back_unless_it_moves_with_the_size(tmp_path: Path) -> None:
    assert read_shift(tmp_path) == 0
    write_scheduler(tmp_path, 4.5)
    assert read_shift(tmp_path) == 4.5
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_dynamic_shifting": True}))
    assert read_shift(tmp_path) == 0
    path.write_text(json.dumps({**config, "shift": "three"}))
    with pytest.raises(UserError, match="three"):
        read_shift(tmp_path)


def test_only_what_a_loader_reads_is_taken(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "vae", tmp_path / "vae")
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "run.py"):
        (tmp_path / "vae" / name).write_bytes(b"x")
    assert [p.name for p in vae_files(tmp_path / "vae")] == ["config.json", "diffusion_pytorch_model.safetensors"]
    found = text_files(ASSETS / "image_model")
    assert list(found) == ["text_encoder", "tokenizer"]
    assert [p.name for p in found["text_encoder"]] == ["config.json", "model.safetensors"]
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {p.name for p in found["tokenizer"]}


def test_wrong_parts_are_refused(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "vae", tmp_path / "vae")
    shutil.copytree(ASSETS / "image_model", tmp_path / "text")
    with pytest.raises(UserError, match=r"SD3Transformer2DModel.*not AutoencoderKLWan"):
        vae_files(tmp_path / "text" / "transformer")
    with pytest.raises(UserError, match="no text_encoder"):
        text_files(tmp_path / "vae")

    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="damaged"):
        vae_files(tmp_path / "vae")
    for name in ("diffusion_pytorch_model.bin", "vae.ckpt"):
        weights.unlink(missing_ok=True)
        (tmp_path / "vae" / name).write_bytes(whole)
        with pytest.raises(UserError, match=f"{name}.*pickle") as caught:
            vae_files(tmp_path / "vae")
        assert "safetensors" in caught.value.remedy

    (tmp_path / "text" / "text_encoder_3").mkdir()
    shutil.copy(tmp_path / "text" / "text_encoder" / "config.json", tmp_path / "text" / "text_encoder_3")
    with pytest.raises(UserError, match="T5EncoderModel"):
        text_files(tmp_path / "text")
    shutil.rmtree(tmp_path / "text" / "text_encoder_3")
    shutil.rmtree(tmp_path / "text" / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer"):
        text_files(tmp_path / "text")


def test_licences_travel_and_none_is_lost_to_another_of_its_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("LICENSE.md", "README.md", "Notice", "license_checker.py", "weights.bin"):
            (tmp_path / name / file).write_text(f"{name} {file}")
    to = tmp_path / "to"
    assert copy_licences(tmp_path / "one", to) == ["LICENSE.md", "Notice", "README-one.md"]
    assert copy_licences(tmp_path / "two", to) == ["LICENSE-two.md", "Notice-two", "README-two.md"]
    assert (to / "LICENSE-two.md").read_text() == "two LICENSE.md"
    assert tree(to) == ["LICENSE-two.md", "LICENSE.md", "Notice", "Notice-two", "README-one.md", "README-two.md"]
    assert copy_licences(tmp_path / "absent", to) == []
    again = tmp_path / "again"  # and once more
    assert set(copy_licences(to, again)) == set(tree(to))
