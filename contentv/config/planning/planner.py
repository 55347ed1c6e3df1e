"""From the keys to the plan: clip shapes, the search for each and for all, and what a run of it takes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contentv.base.errors import UserError
from contentv.base.types import Bucket, TokenCounts
from contentv.config.planning.advice import neighbours, remedies, what_binds
from contentv.config.planning.calibration import Calibration
from contentv.config.planning.layout import Job
from contentv.config.planning.links import Passes
from contentv.config.planning.options import GIB, ClusterConfig
from contentv.config.planning.search import Candidate, Clip, Problem, best
from contentv.data import DatasetInfo
from contentv.models.cost import parameter_count
from contentv.models.lora_config import adapted_layers

if TYPE_CHECKING:
    from contentv.config.schema import PlanRoot

# Shapes a stage is planned for when neither buckets= nor data= is given. Only 432 x 768 with 125 frames is published.
USUAL_BUCKETS = {
    "image": ["f1_h256_w256", "f1_h512_w512"],
    "lowest": ["f29_h240_w432", "f125_h240_w432"],
    "highest": ["f125_h432_w768"],
    "video": ["f29_h240_w432", "f125_h240_w432", "f125_h432_w768"],
    "all": ["f1_h512_w512", "f29_h240_w432", "f125_h240_w432", "f125_h432_w768"],
}
VAE_FRAMES, VAE_PIXELS = 4, 8  # the published VAE's compression
VAE_BYTES = 4 * 126_892_531  # its weights in fp32, as the pipeline holds them
REWARD_BYTES = 4 * 986_109_441  # CLIP ViT-H/14 in fp32, the backbone of MPS
FRAME_BYTES_PER_PIXEL = 25_400  # kept while its decoder decodes one frame in fp32: counted on the meta device
DAY_S = 86_400


def tokens_of(bucket: Bucket, patch: int, text: int) -> TokenCounts:
    """Returns a clip's tokens with the published VAE.

    Raises:
        UserError: the shape does not divide.
    """
    unit = VAE_PIXELS * patch
    if (bucket.frames - 1) % VAE_FRAMES or bucket.height % unit or bucket.width % unit:
        raise UserError(
            f"{bucket.name}: frames must be 4k+1, height and width multiples of {unit}", where="buckets",
            remedy=f"use f{(bucket.frames - 1) // VAE_FRAMES * VAE_FRAMES + 1}_h{max(1, bucket.height // unit) * unit}"
                   f"_w{max(1, bucket.width // unit) * unit}",
        )  # fmt: skip
    frames = (bucket.frames - 1) // VAE_FRAMES + 1
    return TokenCounts(frames * (bucket.height // unit) * (bucket.width // unit), text)


def clips_of(root: PlanRoot) -> tuple[Clip, ...]:
    """Returns the shapes to plan for, largest first, with their shares of the steps.

    Raises:
        UserError: a shape is not possible, or the dataset has none of those asked for.
    """
    patch, found = root.model.patch_size, {}
    names = root.buckets or USUAL_BUCKETS[root.stage.buckets]
    if root.data:
        info = DatasetInfo.load(root.data)
        there = info.bucket_samples
        missing = [name for name in root.buckets if name not in there]
        if missing:
            raise UserError(
                f"the dataset has no {', '.join(missing)}", where="buckets", remedy=f"it has {', '.join(there)}"
            )
        for name in root.buckets or there:
            _, t, h, w = info.latent_shape(name)
            found[name] = (TokenCounts(t * (h // patch) * (w // patch), info.text.num_tokens), float(there[name]))
    else:
        found = {name: (tokens_of(Bucket.parse(name), patch, root.text_tokens), 1.0) for name in names}
    shares = {name: share for name, (_, share) in found.items()}
    if root.bucket_shares:
        shares = dict(zip(root.buckets, root.bucket_shares, strict=True))
    rlhf = root.stage.objective == "reward"
    clips = [Clip(name, tokens, shares[name], _frame_bytes(name) if rlhf else 0) for name, (tokens, _) in found.items()]
    return tuple(sorted(clips, key=lambda clip: -clip.tokens.video))


def _frame_bytes(name: str) -> int:
    bucket = Bucket.parse(name)
    return FRAME_BYTES_PER_PIXEL * bucket.height * bucket.width


def job_of(root: PlanRoot) -> tuple[Job, Passes]:
    """Returns what is trained, and the model's passes: RLHF's rollout has more than one."""
    trained = 0
    if root.lora.rank:
        layers = adapted_layers(root.lora, root.model)
        trained = root.lora.rank * sum(a + b for a, b in layers.values())
    cluster = root.cluster
    memory = 0 if cluster.device == "cpu" else int(cluster.memory_gib * GIB)
    job = Job(
        root.model, root.train.precision, root.optim.ema_decay > 0, cluster.device, trained, memory_bytes=memory
    )  # fmt: skip
    if root.stage.objective != "reward":
        return job, Passes()
    reward = root.reward
    branches = 1 if reward.guidance_scale == 1 else 2
    graded = branches * reward.grad_steps + (1 if reward.flow_weight > 0 else 0)
    forward = branches * (reward.steps - reward.grad_steps + (reward.grad_steps if reward.kl_weight > 0 else 0))
    job = replace(
        job, resident_bytes=VAE_BYTES + REWARD_BYTES, reference=reward.kl_weight > 0 and not trained, graded=graded
    )
    return job, Passes(forward, graded)


def problem_of(root: PlanRoot) -> tuple[Problem, Calibration | None]:
    """Returns everything that is given, at measured rates where there is a calibration."""
    job, passes = job_of(root)
    cluster, factor, calibration = root.cluster, 1.0, None
    if root.calibration:
        calibration = Calibration.read(Path(root.calibration))
        cluster, factor = calibration.applied(cluster, root.train.precision), calibration.memory_factor
    problem = Problem(
        cluster, job, clips_of(root), root.train.global_batch_size, root.train.micro_batch_size, root.parallel,
        passes, factor,
    )  # fmt: skip
    return problem, calibration


def make_plan(root: PlanRoot) -> dict[str, Any]:
    """Returns the plan as JSON holds it: the best layout of each clip shape and of all together, and what a run takes.

    Raises:
        UserError: no layout is legal, or a key does not fit.
    """
    problem, calibration = problem_of(root)
    cluster = problem.cluster
    answer: dict[str, Any] = {
        "version": 1, "cluster": asdict(cluster), "devices": cluster.world, "stage": root.stage.name,
        "parameters": parameter_count(root.model), "precision": root.train.precision,
        "global_batch_size": root.train.global_batch_size, "rates": cluster.rates,
        "calibration": root.calibration if calibration is not None else None,
        "buckets": [_verdict(problem.only(clip)) for clip in problem.clips],
    }  # fmt: skip
    answer["overall"] = _verdict(problem) if len(problem.clips) > 1 else answer["buckets"][0]
    answer["run"] = _run(root, cluster, answer["overall"])
    return answer


def _verdict(problem: Problem) -> dict[str, Any]:
    """Returns the best layout for the problem's clips, or what is lacking."""
    chosen, unlimited, smallest = best(problem)
    names = [clip.name for clip in problem.clips]
    head: dict[str, Any] = {
        "buckets": names, "tokens": [sum(clip.tokens) for clip in problem.clips],
        "usable_bytes": problem.cluster.usable_bytes,
    }  # fmt: skip
    assert smallest is not None
    assert unlimited is not None
    if chosen is None:
        lacks = {"lacks_bytes": smallest.excess, "nearest": _facts(problem, smallest)}
        return {**head, "fits": False, **lacks, "remedies": remedies(problem, smallest)}
    return {
        **head, "fits": True, **_facts(problem, chosen), "binds": what_binds(problem, chosen, unlimited),
        "neighbours": neighbours(problem, chosen),
    }  # fmt: skip


def _facts(problem: Problem, candidate: Candidate) -> dict[str, Any]:
    """Returns a candidate's layout, memory and speed."""
    cluster, seconds = problem.cluster, candidate.seconds
    shares = [clip.share for clip in problem.clips]

    def average(value: Any) -> float:
        return sum(s * value(t) for s, t in zip(shares, candidate.times, strict=True)) / sum(shares)

    def part(name: str) -> float:
        return average(lambda time: time.parts[name])

    tokens = sum(s * sum(clip.tokens) for s, clip in zip(shares, problem.clips, strict=True)) / sum(shares)
    flops = average(lambda time: time.model_flops)
    clips = candidate.times[0].clips
    return {
        "layout": {"dp": candidate.dp, **asdict(candidate.layout), "accumulation": candidate.accumulation},
        "overrides": candidate.layout.words(),
        "memory": {
            "parts_bytes": {name: size for name, size in candidate.memory.parts.items() if size},
            "total_bytes": int(problem.memory_factor * candidate.memory.total), "moment": candidate.memory.moment,
            "factor": problem.memory_factor, "host_bytes": candidate.memory.host,
            "all_to_all_bytes": candidate.memory.exchange,
        },
        "step_s": seconds,
        "step_parts_s": {name: part(name) for name in candidate.times[0].parts},
        "mfu": None if cluster.device == "cpu" else flops / (seconds * cluster.world * cluster.peak_flops(
            problem.job.precision)),
        "model_flops_per_step": flops, "clips_per_s": clips / seconds, "tokens_per_s": clips * tokens / seconds,
    }  # fmt: skip


def _run(root: PlanRoot, cluster: ClusterConfig, overall: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what the stage takes, and what the cluster does in `days`; None when nothing fits."""
    if not overall["fits"]:
        return None
    batch, seconds = root.train.global_batch_size, overall["step_s"]
    steps = -(-root.clips // batch) if root.clips else root.train.max_steps
    hours = steps * seconds * cluster.world / 3600
    price = cluster.price_per_device_hour
    length = root.days * DAY_S
    return {
        "steps": steps, "clips": steps * batch, "days": steps * seconds / DAY_S, "device_hours": hours,
        "cost": None if price is None else price * hours,
        "in_days": {
            "days": root.days, "device_hours": root.days * 24 * cluster.world, "steps": int(length / seconds),
            "clips": int(length * overall["clips_per_s"]),
            "model_flops": length / seconds * overall["model_flops_per_step"],
            "cost": None if price is None else price * root.days * 24 * cluster.world,
        },
    }  # fmt: skip
