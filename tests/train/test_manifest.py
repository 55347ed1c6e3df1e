"""A stage refuses a predecessor that does not fit, and says what differs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from contentv.base.errors import UserError
from contentv.train.manifest import StageConfig, StageManifest, check_predecessor

NOW = StageManifest("rlhf", {"num_layers": 4, "in_channels": 16}, "vae-a", "text-a", shift=3.0)
BEFORE = replace(NOW, stage="highres_video")
RLHF = StageConfig("rlhf", "reward", "highest", ["highres_video", "sft"], same_vae=True, same_shift=True)


def test_a_fitting_predecessor_is_accepted() -> None:
    check_predecessor(RLHF, NOW, BEFORE, "runs/high")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage": "image"}, ["image", "highres_video", "sft"]),
        ({"geometry": {"num_layers": 5, "in_channels": 16}}, ["num_layers", "4", "5"]),
        ({"geometry": {"num_layers": 4, "in_channels": 4}}, ["in_channels"]),
        ({"vae_fingerprint": "vae-b"}, ["VAE", "vae-a", "vae-b"]),
        ({"text_fingerprint": "text-b"}, ["text encoder", "text-b"]),
        ({"shift": 1.0}, ["shift", "timestep.shift=1"]),
    ],
)
def test_what_differs_is_named(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_predecessor(RLHF, NOW, replace(BEFORE, **change), "runs/high")
    for word in [*words, "runs/high"]:
        assert word in str(error.value)


def test_the_image_stage_may_change_the_vae_but_not_the_width() -> None:
    image = StageConfig("image", "flow", "image", ["sd3"], same_vae=False)
    sd3 = StageManifest("sd3", {"num_layers": 4, "in_channels": 4}, "vae-b", shift=1.0)
    check_predecessor(image, NOW, sd3, "sd3")
    with pytest.raises(UserError, match="num_layers"):
        check_predecessor(image, NOW, replace(sd3, geometry={"num_layers": 2}), "sd3")


def test_the_manifest_survives_the_disk_and_damage_is_named(tmp_path) -> None:
    NOW.write(tmp_path)
    assert StageManifest.read(tmp_path) == NOW
    (tmp_path / "stage.json").write_text('{"stage": ')
    with pytest.raises(UserError, match="damaged"):
        StageManifest.read(tmp_path)
    (tmp_path / "stage.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        StageManifest.read(tmp_path)
