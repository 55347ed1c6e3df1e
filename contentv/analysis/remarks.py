"""What a person should know before believing the curves: sentences, each with the numbers it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from contentv.analysis.advice import Advice
from contentv.analysis.similarity import Estimate, direction

SHARED_ERROR = 0.5  # a ceiling above it: halves of the golden clips agree on a large common step
MOSTLY_NOISE = 0.1  # a ceiling below it
UNEQUAL = 2.0  # times one kind of twin may be further from the golden clips than the other
NEAR = 0.1  # in sigma: the crossing and the base's median agree
EXPECTED = {"visual": "rises", "motion": "falls"}
NAMES = {"visual": "visually degraded", "motion": "motion-degraded"}


def remarks(
    rises: Mapping[str, Estimate], advice: Advice, distances: Mapping[str, float], bins: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns what the measurement says of TQD's premise, why it may not hold here, and what to do.

    Args:
        rises: of `visual` and `motion`: mean cosine above the base's median less that below.
        advice: the recommendation.
        distances: of `visual` and `motion`: distance of latents from the golden ones, as a part of their length.
        bins: as in gradients.json.
    """
    found = [_premise(name, rises[name]) for name in EXPECTED]
    if any(direction(rises[name]) != way for name, way in EXPECTED.items()):
        found += _reasons(bins, distances)
    found.append(_sides(advice, bins))
    found.append(_strength(advice))
    return found


def _premise(name: str, rise: Estimate) -> str:
    verdict = "as TQD expects" if direction(rise) == EXPECTED[name] else f"TQD expects that it {EXPECTED[name]}"
    words = "does not change clearly" if direction(rise) == "flat" else direction(rise)
    return (
        f"cos(golden, {NAMES[name]}) {words} with the noise level: {rise.value:+.3f} from below to above the base "
        f"law's median (95 % interval {rise.low:+.3f} to {rise.high:+.3f}); {verdict}."
    )


def _reasons(bins: Sequence[Mapping[str, Any]], distances: Mapping[str, float]) -> list[str]:
    found = []
    shared = [b for b in bins if b["ceiling"]["value"] is not None and b["ceiling"]["value"] > SHARED_ERROR]
    if shared:
        mass = sum(b["base_mass"] for b in shared)
        found.append(
            f"At {_where(shared)} even disjoint golden clips agree (ceiling above {SHARED_ERROR:g}): this checkpoint "
            "has a large error there that all clips share, and every twin points at it too, whatever is wrong with it. "
            f"The base law trains there with {mass:.1%} of its draws."
        )
    noisy = [b for b in bins if b["ceiling"]["value"] is None or b["ceiling"]["value"] < MOSTLY_NOISE]
    if noisy:
        found.append(
            f"At {_where(noisy)} the gradient of these clips is mostly noise (ceiling below {MOSTLY_NOISE:g}): raise "
            "clips= or draws=."
        )
    low, high = sorted(distances, key=lambda name: distances[name])
    if distances[high] > UNEQUAL * distances[low]:
        found.append(
            f"The twins are not degraded alike: latents of the {NAMES[high]} ones are {distances[high]:.2f} of their "
            f"length away from the golden ones, of the {NAMES[low]} ones {distances[low]:.2f}. Their order and the "
            "crossing depend on it; degrade as strongly as your data is (blur=, motion=, motion_factor=)."
        )
    return found


def _where(bins: Sequence[Mapping[str, Any]]) -> str:
    return "sigma " + ", ".join(f"{b['sigma_low']:.2f}-{b['sigma_high']:.2f}" for b in bins)


def _sides(advice: Advice, bins: Sequence[Mapping[str, Any]]) -> str:
    place = advice.crossing
    if math.isnan(place.value):
        gaps = [b["visual"]["cosine"]["value"] - b["motion"]["cosine"]["value"] for b in bins]
        better = "visually degraded" if sum(gaps) > 0 else "motion-degraded"
        return (
            "The curves do not cross from motion to visual as noise grows; over most noise levels the "
            f"{better} clips agree better with the golden ones. Timesteps alone cannot sort these clips."
        )
    sure = "" if math.isnan(place.low) else f" (95 % interval {place.low:.2f} to {place.high:.2f})"
    crossed = (
        f"Above sigma {place.value:.2f}{sure} visually degraded clips agree better with golden ones, below it "
        "motion-degraded ones. "
    )
    if abs(place.value - advice.median) <= NEAR:
        return f"{crossed}Quantile routing changes sides at the base law's median, {advice.median:.2f}: it fits."
    factor = place.value / (1 - place.value) / (advice.median / (1 - advice.median))
    return (
        f"{crossed}Quantile routing changes sides at the base law's median, {advice.median:.2f}. {factor:.2g} times "
        "its shift would have it there, but that moves the noise levels of all clips."
    )


def _strength(advice: Advice) -> str:
    gain = advice.gain
    if advice.kappa_max is None:
        return (
            f"Routing does not pay beyond the error of this measurement (best gain {gain.value:+.3f}, 95 % interval "
            f"{gain.low:+.3f} to {gain.high:+.3f}): train all clips by the base law."
        )
    return (
        f"kappa_max = {advice.kappa_max:g} is the first to try (leaving out groups of clips: {advice.kappa_low:g} to "
        f"{advice.kappa_high:g}); gain {gain.value:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}, in the "
        "log of effective golden draws. The criterion is ours and a run decides."
    )
