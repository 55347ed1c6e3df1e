"""The configuration of the noise levels, and the keyed draw of a batch."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from contentv.base.errors import UserError
from contentv.base.rng import keyed_generators
from contentv.diffusion.timesteps import (
    TQD,
    Beta,
    Discrete,
    LogitNormal,
    Mode,
    TimestepConfig,
    Uniform,
    build_sampler,
    draw,
)

NONE = torch.full((5,), math.nan)
MOTION, VISUAL = torch.tensor([0.9, 0.1, 0.5, 1.0, 0.0]), torch.tensor([0.2, 0.8, 0.5, 0.0, 1.0])


def generators(indices=range(5)):
    return keyed_generators(7, 3, list(indices), "sigma")


def test_each_kind_is_built():
    assert build_sampler(TimestepConfig()) == LogitNormal(0.0, 1.0, 1.0)
    assert build_sampler(TimestepConfig(mean=0.5, std=2.0, shift=3.0)) == LogitNormal(0.5, 2.0, 3.0)
    assert build_sampler(TimestepConfig(kind="uniform", shift=5.0)) == Uniform(5.0)
    assert build_sampler(TimestepConfig(kind="mode", mode_scale=0.8, shift=2.0)) == Mode(0.8, 2.0)
    assert build_sampler(TimestepConfig(kind="beta", alpha=2.0, beta=3.0, shift=2.0)) == Beta(2.0, 3.0, 2.0)
    assert build_sampler(TimestepConfig(kind="uniform", levels=1000)) == Discrete(Uniform(), 1000)
    routed = build_sampler(TimestepConfig(kind="tqd", base="beta", levels=100, missing="refuse"))
    assert isinstance(routed, TQD)
    assert (routed.base, routed.missing) == (Discrete(Beta(), 100), "refuse")


def test_tqd_is_shifted_once_in_either_mode():
    quantile = build_sampler(TimestepConfig(kind="tqd", base="mode", shift=3.0, kappa_max=12.0, floor=0.1))
    assert isinstance(quantile, TQD)
    assert (quantile.base, quantile.shift) == (Mode(1.29, 3.0), 1.0)
    assert (quantile.kappa_base, quantile.kappa_max, quantile.floor, quantile.mode) == (2.0, 12.0, 0.1, "quantile")
    direct = build_sampler(TimestepConfig(kind="tqd", base="uniform", shift=3.0, tqd_mode="direct"))
    assert isinstance(direct, TQD)
    assert (direct.base, direct.shift, direct.mode) == (Uniform(3.0), 3.0, "direct")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "logitnormal"}, 'timestep.kind="logitnormal" is unknown; did you mean "logit_normal"'),
        ({"kind": "tqd", "base": "tqd"}, 'timestep.base="tqd" is unknown'),
        ({"kind": "tqd", "tqd_mode": "rank"}, "mode must be quantile or direct, got rank"),
        ({"kind": "tqd", "kappa_base": 9.0}, "kappa_max must be at least kappa_base=9.0, got 8.0"),
        ({"kind": "tqd", "kappa_base": 0.0}, "kappa_base must be above 0, got 0.0"),
        ({"kind": "beta", "alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"levels": 1}, "levels must be 2 or more, got 1"),
        ({"levels": -5}, "levels must be 0 or more, got -5"),
        ({"kind": "tqd", "tqd_mode": "direct", "levels": 10}, "levels must be 0 in tqd_mode=direct"),
        ({"kind": "tqd", "missing": "skip"}, "missing must be base or refuse, got skip"),
        ({"loss_weight": "minsnr"}, 'timestep.loss_weight="minsnr" is unknown; did you mean "min_snr"'),
        ({"loss_weight": "min_snr", "snr_gamma": 0.0}, "snr_gamma must be above 0, got 0.0"),
        ({"shift": 0.0}, "shift must be above 0, got 0.0"),
        ({"std": -1.0}, "std must be above 0, got -1.0"),
        ({"kind": "mode", "mode_scale": 3.0}, "scale must be in -1..1.7519, got 3.0"),
    ],
)
def test_bad_values_are_the_users_to_fix(values, message):
    with pytest.raises(UserError) as caught:
        TimestepConfig(**values)
    assert message in str(caught.value)
    assert caught.value.where.startswith("timestep")


def test_is_a_structured_config_with_help():
    schema = OmegaConf.structured(TimestepConfig)
    merged = OmegaConf.to_object(OmegaConf.merge(schema, {"kind": "tqd", "shift": 3}))
    assert merged == TimestepConfig(kind="tqd", shift=3.0)
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(schema, {"kapa_max": 3})
    assert all(f.metadata["help"] for f in fields(TimestepConfig))


@pytest.mark.parametrize("kind", ["logit_normal", "uniform", "mode"])
def test_plain_samplers_never_look_at_the_scores(kind):
    sampler = build_sampler(TimestepConfig(kind=kind, shift=3.0))
    plain = torch.cat([sampler.sample(1, g) for g in generators()])
    assert torch.equal(draw(sampler, MOTION, VISUAL, generators()), plain)
    assert torch.equal(draw(sampler, NONE, NONE, generators()), plain)


@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["quantile", "direct"])
def test_tqd_without_scores_is_the_base_bit_for_bit(mode, floor):
    config = TimestepConfig(kind="tqd", base="logit_normal", shift=3.0, tqd_mode=mode, floor=floor)
    base = draw(build_sampler(TimestepConfig(shift=3.0)), NONE, NONE, generators())
    assert torch.equal(draw(build_sampler(config), NONE, NONE, generators()), base)
    half = torch.where(torch.arange(5) % 2 == 0, MOTION, NONE)
    mixed = draw(build_sampler(config), half, VISUAL, generators())
    assert torch.equal(mixed[1::2], base[1::2])
    assert torch.equal(mixed[::2], draw(build_sampler(config), MOTION, VISUAL, generators())[::2])


def test_each_draw_belongs_to_its_sample_alone():
    tqd = build_sampler(TimestepConfig(kind="tqd"))
    together = draw(tqd, MOTION, VISUAL, generators())
    assert together.dtype == torch.float32
    order = [3, 0, 4]
    assert torch.equal(draw(tqd, MOTION[order], VISUAL[order], generators(order)), together[order])


@pytest.mark.parametrize("wrong", [(MOTION[:4], VISUAL), (MOTION, VISUAL[:4]), (MOTION[:, None], VISUAL)])
def test_lengths_must_agree(wrong):
    with pytest.raises(ValueError, match=r"one entry per generator, \(5,\)"):
        draw(LogitNormal(), *wrong, generators())
