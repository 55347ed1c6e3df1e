"""The runs of the study. Fixed by pilots on other seeds before the first of them was started; see README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tqd_study.settings import Condition, Recipe, Run
from tqd_study.sprites import World

RECIPE = Recipe()
SEEDS = (0, 1, 2, 3, 4)
SWEEP_SEEDS = SEEDS[:3]
CONTROL_SEEDS = SEEDS[:2]
IMPERFECT = ("blurred", "static")

MAIN = {
    "golden": Condition(("golden",)),
    "golden tqd": Condition(("golden",), "tqd", drop=True),
    "mixed": Condition(IMPERFECT),
    "mixed tqd": Condition(IMPERFECT, "tqd", drop=True),
    "mixed levels only": Condition(IMPERFECT, "tqd"),
    "mixed drop only": Condition(IMPERFECT, drop=True),
    "mixed reversed": Condition(IMPERFECT, "tqd", swap=True, drop=True),
}
CONTROLS = {"blurred alone": Condition(("blurred",)), "static alone": Condition(("static",))}
KAPPAS = (2.0, 4.0, 16.0, 32.0, 128.0)  # 8 is that of the main group
DETAILS = (0.6, 1.2)  # beside the recipe's own
NEITHER = {
    "with neither": Condition((*IMPERFECT, "neither")),
    "with neither drop only": Condition((*IMPERFECT, "neither"), drop=True),
    "with neither tqd": Condition((*IMPERFECT, "neither"), "tqd", drop=True),
}
LONGER_STEPS = 2 * RECIPE.steps
WIDER_HEADS = 2 * RECIPE.heads
ADDED = ("golden wider", "mixed tqd wider")  # after the results: see README.md

# The larger version, for one GPU: 192 tokens in place of 24, four times the width, ten times the clips seen.
LARGE = Recipe(
    world=World(rows=8, columns=32, frames=12), clips=16_384, steps=4000, warmup_steps=200, batch=64, lr=1e-3,
    layers=6, heads=6, head_dim=64, samples=512,
)  # fmt: skip


def kappa_name(kappa: float) -> str:
    """Returns the name of the imperfect clips' TQD at a kappa_max."""
    return "mixed tqd" if kappa == MAIN["mixed tqd"].kappa_max else f"mixed tqd kappa_max={kappa:g}"


def detail_name(condition: str, detail: float) -> str:
    """Returns the name of a condition in a world with another amplitude of detail."""
    return condition if detail == RECIPE.world.detail else f"{condition} detail={detail:g}"


def runs(size: str = "small") -> dict[str, list[Run]]:
    """Returns the runs of every condition by name, in the order in which they are made: what matters most first.

    Args:
        size: one of SIZES; the large one has the main conditions and the sweep over kappa_max.
    """
    return SIZES[size]()


def _large_runs() -> dict[str, list[Run]]:
    routed = MAIN["mixed tqd"]
    found = {name: _over(SWEEP_SEEDS, condition, LARGE, gradients=name == "mixed") for name, condition in MAIN.items()}
    return found | {kappa_name(kappa): _over(SWEEP_SEEDS, replace(routed, kappa_max=kappa), LARGE) for kappa in KAPPAS}


def _small_runs() -> dict[str, list[Run]]:
    routed = MAIN["mixed tqd"]
    found = {name: _over(SEEDS, condition, gradients=name == "mixed") for name, condition in MAIN.items()}
    found |= {name: _over(CONTROL_SEEDS, condition) for name, condition in CONTROLS.items()}
    found |= {kappa_name(kappa): _over(SWEEP_SEEDS, replace(routed, kappa_max=kappa)) for kappa in KAPPAS}
    for detail in DETAILS:
        recipe = replace(RECIPE, world=replace(RECIPE.world, detail=detail))
        for name in ("golden", "mixed", "mixed tqd"):
            found[detail_name(name, detail)] = _over(SWEEP_SEEDS, MAIN[name], recipe)
    found |= {name: _over(SWEEP_SEEDS, condition) for name, condition in NEITHER.items()}
    found["mixed tqd minmax"] = _over(SWEEP_SEEDS, replace(routed, scale="minmax"))
    for name in ("golden", "mixed tqd"):
        found[f"{name} longer"] = _over(SWEEP_SEEDS, MAIN[name], replace(RECIPE, steps=LONGER_STEPS))
    for name in ("golden", "mixed tqd"):
        found[f"{name} wider"] = _over(SWEEP_SEEDS, MAIN[name], replace(RECIPE, heads=WIDER_HEADS))
    return found


def in_turn(by_name: Mapping[str, list[Run]]) -> list[tuple[str, Run]]:
    """Returns all runs seed by seed, so that a study cut short has whole seeds of the first conditions."""
    ranked = [(place, run.seed, name, run) for place, name in enumerate(by_name) for run in by_name[name]]
    main = len(MAIN)
    ranked.sort(key=lambda entry: (entry[0] >= main, entry[1], entry[0]))
    return [(name, run) for _, _, name, run in ranked]


def _over(seeds: tuple[int, ...], condition: Condition, recipe: Recipe = RECIPE, gradients: bool = False) -> list[Run]:
    return [Run(recipe, condition, seed, gradients) for seed in seeds]


SIZES = {"small": _small_runs, "large": _large_runs}
