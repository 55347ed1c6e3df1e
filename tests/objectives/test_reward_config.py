"""The configuration of reward back-propagation."""

from __future__ import annotations

from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from contentv.base.errors import UserError
from contentv.objectives.reward import RewardConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "reward.steps=0"),
        ({"steps": 4, "grad_steps": 5}, "reward.grad_steps=5 .*\n.*use 1..4"),
        ({"grad_steps": 0}, "reward.grad_steps=0"),
        ({"grad_step_choice": "last"}, "reward.grad_step_choice=last"),
        ({"shift": 0.0}, "reward.shift=0.0"),
        ({"guidance_scale": -1.0}, "reward.guidance_scale=-1.0"),
        ({"reward_weight": -1.0}, "reward.reward_weight=-1.0"),
        ({"kl_weight": -0.1}, "reward.kl_weight=-0.1"),
        ({"flow_weight": -0.1}, "reward.flow_weight=-0.1"),
    ],
)
def test_bad_values_are_the_users_to_fix(values, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(**values)


def test_is_a_structured_config_with_help():
    schema = OmegaConf.structured(RewardConfig)
    merged = OmegaConf.to_object(OmegaConf.merge(schema, {"steps": 8, "hinge_margin": 2, "shift": 5}))
    assert merged == RewardConfig(steps=8, hinge_margin=2.0, shift=5.0)
    assert all(f.metadata["help"] for f in fields(RewardConfig))
