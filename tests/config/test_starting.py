"""What a stage starts from: LoRAs that do not go with the rest are refused, old runs keep their digests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from contentv.base.errors import UserError
from contentv.config.graph import config_hash
from contentv.config.inputs import Weights, resolve_weights
from contentv.config.schema import TrainRoot
from contentv.config.starting import lora_facts, model_of_shapes
from contentv.models.lora_config import LoRAConfig
from contentv.models.mmdit import MMDiTConfig
from contentv.parallel.mesh import ParallelConfig
from contentv.train.manifest import StageConfig, StageManifest

RANK_4 = LoRAConfig(rank=4)
TRAINED = Weights(Path("weights"), StageManifest("sft", {}))


def test_facts_of_a_stage() -> None:
    assert lora_facts(TrainRoot(), TRAINED) == {}
    facts = lora_facts(TrainRoot(lora=RANK_4), TRAINED)
    assert facts == {"base": str(Path.cwd() / "weights"), "rank": 4, "alpha": 4.0}


@pytest.mark.parametrize(
    ("root", "weights", "where"),
    [
        (TrainRoot(lora=RANK_4, parallel=ParallelConfig(tp=2)), TRAINED, "parallel.tp"),
        (TrainRoot(lora=RANK_4), Weights(None, StageManifest("none", {})), "init"),
        (TrainRoot(lora=RANK_4, init="run"), replace(TRAINED, lora=Path("lora")), "init=run"),
        (TrainRoot(lora=RANK_4, stage=StageConfig(reinit_io=True)), TRAINED, "stage.reinit_io"),
    ],
)
def test_what_does_not_go_with_a_lora(root: TrainRoot, weights: Weights, where: str) -> None:
    with pytest.raises(UserError) as error:
        lora_facts(root, weights)
    assert error.value.where == where


def test_digests() -> None:
    whole = config_hash(TrainRoot())
    assert config_hash(TrainRoot(lora=LoRAConfig(rank=0, alpha=3.0))) == whole
    assert len({whole, config_hash(TrainRoot(lora=RANK_4)), config_hash(TrainRoot(lora=LoRAConfig(rank=8)))}) == 3


def test_the_model_of_shapes() -> None:
    tiny = MMDiTConfig(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=8, pooled_projection_dim=8
    )
    whole, part = model_of_shapes(TrainRoot(model=tiny)), model_of_shapes(TrainRoot(model=tiny, lora=RANK_4))
    assert all(p.is_meta and p.requires_grad for p in whole.parameters())
    assert all(p.is_meta for p in part.parameters())
    assert sum(p.requires_grad for p in part.parameters()) == 2 * 4 * 2  # A and B of four layers in two blocks


def test_the_weights_of_a_run_that_trained_a_lora(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    run.mkdir()
    manifest = StageManifest(
        "sft", {}, weights={"ema": "export/ema"}, lora={"base": str(base), "rank": 4, "alpha": 4.0}
    )
    manifest.write(run)
    assert resolve_weights(str(run), "ema") == Weights(base, manifest, run / "export" / "ema")
    base.rmdir()
    with pytest.raises(UserError, match="base"):
        resolve_weights(str(run), "ema")
