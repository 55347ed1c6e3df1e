"""Every key is known and typed; whatever a user mistypes ends as one message that says what to type instead."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from contentv.base.errors import UserError
from contentv.config.compose import config_dir, groups, keys, load_config
from contentv.config.document import keys_page
from contentv.config.graph import build_graph, check_inputs, config_hash, launcher_of
from contentv.config.schema import ROOTS, PipelineConfig, StageNode

ROOT = Path(__file__).parents[2]


def message(command: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(command, list(overrides))
    return str(error.value)


@pytest.mark.parametrize("command", sorted(ROOTS))
def test_every_command_composes_and_documents_every_key(command: str) -> None:
    load_config(command, [])
    missing = [key for key, field, _ in keys(ROOTS[command]) if not field.metadata.get("help")]
    # the fields of a pipeline's nodes are documented in the YAML files
    assert not [key for key in missing if key not in ("pipeline.stages",)]


@pytest.mark.parametrize("group", sorted(groups("train")))
def test_every_choice_of_every_group_composes(group: str) -> None:
    for choice in groups("train")[group]:
        load_config("train", [f"{group}={choice}"])


@pytest.mark.parametrize("name", groups("pipeline")["pipeline"])
def test_every_pipeline_composes_into_a_graph(name: str, tmp_path) -> None:
    config = load_config("pipeline", [f"pipeline={name}"]).pipeline
    runs = build_graph(config, tmp_path)
    assert next(run.name for run in runs) == "image"
    assert f"init={tmp_path / 'image'}" in runs[1].overrides


def test_the_8b_preset_is_contentv() -> None:
    model = load_config("train", ["model=contentv_8b"]).model
    assert (model.num_layers, model.num_attention_heads, model.inner_dim) == (38, 38, 2432)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle=tiny", ['unknown key "modle"', '"model"']),
        ("model=tny", ["there is no model=tny", "tiny"]),
        ("ulysses_size=2", ['did you mean "parallel.sp"']),
        ("flow_shift=3", ['did you mean "timestep.shift"']),
        ("resume_from_checkpoint=x", ['did you mean "train.resume"']),
        ("train.max_step=3", ['did you mean "train.max_steps"']),
        ("train.max_steps=many", ["max_steps", "many"]),
        ("train.max_steps=0", ["train.max_steps=0", "1 or more"]),
        ("optim.lr=-1", ["optim.lr"]),
        ("text.dropout=2", ["text.dropout=2", "between 0 and 1"]),
        ("data.buckets=[9x64x64]", ["f17_h96_w96"]),
        ("logger=tb", ["logger=tb", "tensorboard"]),
        ("+train.new=1", ["change the set of keys"]),
        ("tiny", ["key=value"]),
    ],
)
def test_a_mistake_is_explained(override: str, words: list[str]) -> None:
    text = message("train", override)
    for word in words:
        assert word in text


def test_the_hash_sees_what_is_computed_and_not_where() -> None:
    base = load_config("train", ["data.path=a"])
    assert config_hash(base) == config_hash(load_config("train", ["data.path=a", "out=elsewhere", "logger=wandb"]))
    assert config_hash(base) != config_hash(load_config("train", ["data.path=a", "optim.lr=3e-4"]))


def test_a_stage_without_predecessor_starts_from_the_pipelines_weights(tmp_path) -> None:
    stages = [StageNode("a", "image"), StageNode("b", "lowres_video", init="a")]
    first, second = build_graph(PipelineConfig(stages=stages, init="sd35"), tmp_path)
    assert "init=sd35" in first.overrides
    assert "init=sd35" not in second.overrides


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "no stages"),
        ([StageNode("a", "image"), StageNode("a", "image")], "stands twice"),
        ([StageNode("a", "image", init="b")], 'starts from "b"'),
        ([StageNode("a", "imge")], "there is no stage=imge"),
        ([StageNode("a", "image", overrides=["train.max_steps=0"])], "train.max_steps=0"),
    ],
)
def test_a_wrong_graph_is_refused_before_anything_starts(stages: list[StageNode], words: str, tmp_path) -> None:
    with pytest.raises(UserError, match=words):
        build_graph(PipelineConfig(stages=stages), tmp_path)


def test_what_is_added_to_a_pipelines_overrides_wins_over_them_and_not_over_the_stages(tmp_path) -> None:
    stages = [StageNode("a", "image", overrides=["train.max_steps=3"])]
    config = PipelineConfig(
        stages=stages, overrides=["model=tiny", "optim.lr=1"], extra=["optim.lr=2", "train.max_steps=9"]
    )
    root = load_config("train", list(build_graph(config, tmp_path)[0].overrides))
    assert (root.model.num_layers, root.optim.lr, root.train.max_steps) == (4, 2, 3)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[]", []),
        ("[model=tiny]", ["model=tiny"]),
        (
            "[model=tiny,data.path=/a b/c, optim.betas=[0.9,0.95]]",
            ["model=tiny", "data.path=/a b/c", "optim.betas=[0.9,0.95]"],
        ),
        ('["out=a,b[",x=1]', ["out=a,b[", "x=1"]),
        ("[data.bucket_weights={a:1,b:2},x=1]", ["data.bucket_weights={a:1,b:2}", "x=1"]),
        ("[\"model=tiny\",'data.path=s3://b/k']", ["model=tiny", "data.path=s3://b/k"]),
        ("[data.path=it's]", ["data.path=it's"]),
    ],
)
def test_overrides_within_overrides_are_typed_as_they_are_meant(typed: str, meant: list[str]) -> None:
    assert load_config("pipeline", [f"pipeline.extra={typed}"]).pipeline.extra == meant
    assert load_config("demo", [f"overrides={typed}"]).overrides == meant


def test_what_readme_and_comments_tell_to_type_is_read() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("conf/*.yaml"), *ROOT.glob("conf/pipeline/*.yaml")]
    text = "\n".join(page.read_text() for page in pages)
    found = re.findall(r"'(pipeline\.(?:extra|overrides)=\[.*?\])'", text)
    assert len(found) >= 5
    for line in found:
        config = load_config("pipeline", [line]).pipeline
        assert "data.path" in " ".join(config.overrides + config.extra)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["data.path=nowhere"], ["stage image, data.path", '"nowhere" is not a folder', "pipeline.extra=["]),
        (["data.path=DATA", "reward.path=nowhere"], ["stage rlhf, reward.path", '"nowhere" is not a folder']),
        (["data.path=DATA", "vae.path=nowhere"], ["stage rlhf, vae.path"]),
    ],
)
def test_what_the_last_stage_will_read_is_looked_for_before_the_first(extra, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("pipeline", ["pipeline=demo"]).pipeline
    config.extra = [word.replace("DATA", str(tmp_path)) for word in extra]
    runs = build_graph(config, tmp_path / "out")
    with pytest.raises(UserError) as caught:
        check_inputs(runs)
    assert all(word in str(caught.value) for word in words)


def test_a_stage_that_is_done_needs_nothing_any_more(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = build_graph(load_config("pipeline", ["pipeline=demo"]).pipeline, tmp_path)[:1]
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "stage.json").write_text("{}")
    check_inputs(runs)


def test_the_yaml_files_are_found_in_the_checkout() -> None:
    assert (config_dir() / "train.yaml").is_file()


def test_the_page_of_keys_is_what_the_code_says() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")
    assert page == keys_page(), "run `make docs`"


def test_names_of_the_users_own_can_be_given_to_mappings() -> None:
    config = load_config("train", ["data.path=x", "data.source_weights={synth:3,a/b:1}", "data.source_max_epochs.a=2"])
    assert config.data.source_weights == {"synth": 3.0, "a/b": 1.0}
    assert config.data.source_max_epochs == {"a": 2}
    assert load_config("synth", ["variants.clean=0.5"]).variants["clean"] == 0.5
    with pytest.raises(UserError, match=r"data\.source_weights"):
        load_config("train", ["data.source_weights={synth:much}"])


def test_a_pipeline_started_once_per_rank_runs_its_stages_in_these_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, told = PipelineConfig(nproc=4), PipelineConfig(launcher="torchrun --nproc-per-node 8")
    assert launcher_of(alone)[-2:] == ["--nproc-per-node", "4"]
    assert launcher_of(told) == ["torchrun", "--nproc-per-node", "8"]
    monkeypatch.setenv("RANK", "0")
    assert launcher_of(alone) == [sys.executable]
    with pytest.raises(UserError, match=r"pipeline\.launcher"):
        launcher_of(told)
