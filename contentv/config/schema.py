"""The root configurations: every key a user can type, composed from the dataclasses of the components."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from contentv.analysis.config import GradientConfig
from contentv.base.errors import UserError
from contentv.config.planning.options import ClusterConfig, LayoutWish, PlanConfig, PlannedTraining
from contentv.curation.curate import CurateConfig
from contentv.curation.synth import SynthConfig
from contentv.data import DataConfig
from contentv.diffusion.timesteps import TimestepConfig
from contentv.engine.optim import OptimConfig
from contentv.models.lora import LoRAConfig
from contentv.models.mmdit import MMDiTConfig
from contentv.objectives.reward import RewardConfig
from contentv.parallel.mesh import ParallelConfig
from contentv.train.loop import LoopConfig
from contentv.train.manifest import StageConfig

LOGGERS = ("jsonl", "wandb", "tensorboard")
DEVICES = ("auto", "cuda", "npu", "cpu")
MODES = ("offline", "online", "disabled")
LAYOUTS = ("diffusers", "transformer")
DTYPES = ("keep", "fp32", "bf16", "fp16")
LORA_MODES = ("merge", "apart", "unmerge")
PRECISIONS = ("fp32", "bf16")
GUIDANCES = ("two_pass", "batched")
ANALYSES = ("gradients",)


def doc(default: Any, text: str, key: str = "") -> Any:
    """Returns a dataclass field with a default, a help line (meaning, unit, range) and the key, if it is another."""
    metadata = {"help": text, **({"key": key} if key else {})}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(ok: bool, key: str, value: object, remedy: str) -> None:
    """Raises a UserError naming the key and its value unless `ok`."""
    if not ok:
        raise UserError(f"{key}={value} is not possible", where=key, remedy=remedy)


@dataclass
class TextConfig:
    """The frozen text encoders and how captions are used."""

    path: str = doc("", "folder with text_encoder*/ and tokenizer*/ (transformers); needed to curate and to sample")
    dropout: float = doc(0.1, "probability of training a clip without its caption, for guidance; 0..1")

    def __post_init__(self) -> None:
        require(0 <= self.dropout <= 1, "text.dropout", self.dropout, "use a probability between 0 and 1")


@dataclass
class VAEConfig:
    """The frozen video VAE."""

    path: str = doc("", "folder of a diffusers AutoencoderKLWan; needed to curate, to sample and for RLHF")


@dataclass
class WandbConfig:
    """Weights & Biases."""

    project: str = doc("contentv", "project name")
    mode: str = doc("offline", "offline | online | disabled; offline runs can be synced later")

    def __post_init__(self) -> None:
        require(self.mode in MODES, "wandb.mode", self.mode, f"use one of {', '.join(MODES)}")


@dataclass
class TrainRoot:
    """`contentv train`: one stage."""

    model: MMDiTConfig = field(default_factory=MMDiTConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    timestep: TimestepConfig = field(default_factory=TimestepConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    init: str = doc("none", "weights to start from: a diffusers folder (SD3, SD3.5, ContentV), a run folder, or none")
    init_weights: str = doc("ema", "ema | raw: which weights of a run folder to start from")
    logger: str = doc("jsonl", "jsonl | wandb | tensorboard; metrics.jsonl is always written")
    device: str = doc("auto", "auto | cuda | npu | cpu")
    out: str = doc("outputs/run", "run folder")

    def __post_init__(self) -> None:
        require(self.logger in LOGGERS, "logger", self.logger, f"use one of {', '.join(LOGGERS)}")
        require(self.device in DEVICES, "device", self.device, f"use one of {', '.join(DEVICES)}")
        require(self.init_weights in ("ema", "raw"), "init_weights", self.init_weights, "use ema or raw")
        require(bool(self.out), "out", '""', "name a folder for the run, out=DIR")


@dataclass
class StageNode:
    """One stage of a pipeline: its name, the stage it runs, its predecessor, and its own overrides."""

    name: str = ""
    stage: str = ""
    init: str = doc("", "name of the stage whose weights it starts from; empty = the `init=` of its overrides")
    overrides: list[str] = field(default_factory=list)


@dataclass
class PipelineConfig:
    """The stage graph and how each stage is launched."""

    launcher: str = doc("", "command put before `-m contentv train ...`, such as `torchrun --nproc-per-node 8`; "
                            "empty = torchrun with `nproc` processes on this machine")  # fmt: skip
    nproc: int = doc(1, "processes on this machine when no launcher is given; 1 or more")
    init: str = doc("", "what stages without a predecessor start from: an SD3-class or video model's folder, or a run")
    overrides: list[str] = doc([], "overrides of every stage")
    extra: list[str] = doc([], "more overrides of every stage, after those of `overrides` and before the stage's own: "
                               "what you add to a pipeline that has some, such as [data.path=DIR]")  # fmt: skip
    stages: list[StageNode] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.nproc >= 1, "pipeline.nproc", self.nproc, "use 1 or more")


@dataclass
class PipelineRoot:
    """`contentv pipeline`: the stages one after another."""

    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    out: str = doc("outputs/pipeline", "folder of the whole pipeline; one run folder per stage inside")


@dataclass
class SampleConfig:
    """`contentv sample`: prompts to videos."""

    checkpoint: str = doc("", "run folder, checkpoint (RUN/checkpoints/step-*), pipeline folder or transformer folder")
    weights: str = doc("ema", "ema | raw: which weights of a run or checkpoint")
    lora: str = doc("", "folder or file of pytorch_lora_weights.safetensors to merge into the weights; empty = none")
    lora_scale: float = doc(1.0, "weight of the LoRA; 0 = without it, 1 = as trained")
    prompt: str = doc("", "one prompt")
    prompts: str = doc("", "file of prompts: text with one a line, or .jsonl with objects of prompt and, if wanted, "
                           "negative_prompt, seed, name")  # fmt: skip
    negative_prompt: str = doc("", "what guidance pushes away from; a .jsonl line may have its own")
    out: str = doc("sample.mp4", "an .mp4 file for one prompt, a folder for many")
    overwrite: bool = doc(False, "sample anew what is there; otherwise an interrupted job goes on, and files of other "
                                 "prompts or settings are refused")  # fmt: skip
    frames: int = doc(0, "frames, 4k+1; 0 = the largest bucket the checkpoint was trained on")
    height: int = doc(0, "pixels, a multiple of 16; 0 = as frames")
    width: int = doc(0, "pixels, a multiple of 16; 0 = as frames")
    fps: float = doc(0.0, "frames per second of the written file; 0 = as the training clips")
    steps: int = doc(50, "solver steps; 1 or more")
    guidance_scale: float = doc(6.0, "classifier-free guidance; 1 = off")
    guidance: str = doc("two_pass", "two_pass | batched: both branches in one pass of twice the batch; faster where "
                                    "one pass does not fill the device; equal up to rounding")  # fmt: skip
    shift: float = doc(0.0, "timestep shift; 0 = the shift the checkpoint was trained with")
    seed: int = doc(0, "seed of the initial noise; prompt i of a file uses i (from 0) as a second key")
    batch_size: int = doc(1, "videos sampled at once; 1 or more. A file does not depend on the number of processes; "
                             "it depends on this key by rounding")  # fmt: skip
    sp: int = doc(1, "processes that share one video's tokens (Ulysses); divides the processes; the rest share prompts")
    ring: int = doc(1, "places of the ring among the sp processes of a video, a divisor of sp; 1 = no ring")
    device: str = doc("auto", "auto | cuda | npu | cpu")
    precision: str = doc("fp32", "fp32 | bf16: the transformer's")
    vae_precision: str = doc("fp32", "fp32 | bf16: the VAE's")
    vae_tile_px: int = doc(0, "longest side in pixels of the tiles the VAE decodes, for frames too large for the "
                              "device; 0 = whole frames")  # fmt: skip
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "use 1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")
        require(self.shift >= 0, "shift", self.shift, "use a positive number, or 0 for the trained shift")
        require(self.weights in ("ema", "raw"), "weights", self.weights, "use ema or raw")
        require(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "use 0 or more; 1 = off")
        require(self.guidance in GUIDANCES, "guidance", self.guidance, f"use one of {', '.join(GUIDANCES)}")
        require(self.sp >= 1, "sp", self.sp, "use 1 or more")
        require(self.ring >= 1 and self.sp % self.ring == 0, "ring", self.ring, f"use a divisor of sp={self.sp}")
        require(self.fps >= 0, "fps", self.fps, "use a positive number, or 0 for that of the training clips")
        require(self.vae_tile_px >= 0, "vae_tile_px", self.vae_tile_px, "use a positive number, or 0 for whole frames")
        for key in ("precision", "vae_precision"):
            require(getattr(self, key) in PRECISIONS, key, getattr(self, key), f"use one of {', '.join(PRECISIONS)}")
        for key in ("frames", "height", "width"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "use 1 or more, or 0 for the trained size")


@dataclass
class ConvertConfig:
    """`contentv convert`: weights of one kind of folder to another."""

    source: str = doc("", "what to convert: a folder of SD3, SD3.5 or ContentV (the pipeline or its transformer), a "
                          "run, or a checkpoint inside a run", key="from")  # fmt: skip
    to: str = doc("", "folder to write; it appears whole or not at all")
    layout: str = doc("diffusers", "diffusers (a whole pipeline folder) | transformer (its transformer folder alone)")
    weights: str = doc("ema", "ema | raw: which weights of a run or checkpoint")
    dtype: str = doc("keep", "keep | fp32 | bf16 | fp16: of the transformer's weights; keep = as stored, to the bit")
    lora: str = doc("", "folder or file of a LoRA (pytorch_lora_weights.safetensors); runs that trained one bring it")
    lora_scale: float = doc(1.0, "factor of the LoRA's part; 1 = as trained")
    lora_mode: str = doc("merge", "merge (into the weights) | apart (beside them, in lora/) | unmerge (out of them)")
    shift: float = doc(0.0, "timestep shift for the scheduler; 0 = the one the weights were trained with")
    max_shard_gb: float = doc(5.0, "most gigabytes (1e9 bytes) of weights in one file")
    overwrite: bool = doc(False, "replace the model folder that `to` already is")
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        require(self.layout in LAYOUTS, "layout", self.layout, f"use one of {', '.join(LAYOUTS)}")
        require(self.weights in ("ema", "raw"), "weights", self.weights, "use ema or raw")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"use one of {', '.join(DTYPES)}")
        require(self.lora_mode in LORA_MODES, "lora_mode", self.lora_mode, f"use one of {', '.join(LORA_MODES)}")
        require(self.shift >= 0, "shift", self.shift, "use a positive number, or 0 for the trained shift")
        require(self.max_shard_gb > 0, "max_shard_gb", self.max_shard_gb, "use a positive number")


@dataclass
class CurateRoot(CurateConfig):
    """`contentv curate`: video and image files with captions to a dataset of shards."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    device: str = doc("auto", "auto | cuda | npu | cpu")


@dataclass
class SynthRoot(SynthConfig):
    """`contentv synth`: procedural captioned clips."""

    out: str = doc("outputs/synth", "folder to write into")


@dataclass
class DemoConfig:
    """`contentv demo`: the whole product on this machine."""

    out: str = doc("demo-out", "folder of the demo")
    clips: int = doc(480, "synthetic source clips; 16 or more")
    nproc: int = doc(2, "torchrun processes; 2 shows sequence parallelism")
    prompts: int = doc(96, "prompts sampled for the measurement; 16 or more")
    seed: int = doc(0, "seed of everything")
    sample_steps: int = doc(20, "solver steps of the samples")
    guidance_scale: float = doc(4.0, "classifier-free guidance of the samples")
    pipeline: str = doc("demo", "name of the stage graph in conf/pipeline")
    overrides: list[str] = doc([], "training overrides for every stage, such as [train.seed=1]")

    def __post_init__(self) -> None:
        require(self.clips >= 16, "clips", self.clips, "use 16 or more")
        require(self.prompts >= 16, "prompts", self.prompts, "use 16 or more")
        require(self.nproc >= 1, "nproc", self.nproc, "use 1 or more")


@dataclass
class ReportConfig:
    """`contentv report`: one HTML page about a run, a dataset or a demo."""

    path: str = doc("", "run folder, dataset folder or demo folder")
    global_batch_size: int = doc(32, "of a dataset: clips of an optimiser step, for the steps in an epoch; 1 or more")
    timestep: TimestepConfig = field(
        default_factory=lambda: TimestepConfig(kind="tqd"),
        metadata={"help": "of a dataset: the noise levels it is shown with; kind stays tqd"},
    )

    def __post_init__(self) -> None:
        require(self.global_batch_size >= 1, "global_batch_size", self.global_batch_size, "use 1 or more")
        require(self.timestep.kind == "tqd", "timestep.kind", self.timestep.kind, "use tqd, over timestep.base")
        require(self.timestep.levels == 0, "timestep.levels", self.timestep.levels, "use 0: the page draws densities")


@dataclass
class AnalyzeRoot(GradientConfig):
    """`contentv analyze gradients`: which noise levels imperfect clips are good for, on a checkpoint."""

    analysis: str = doc("gradients", "what is analysed: gradients; `contentv analyze gradients` says the same")
    checkpoint: str = doc("", "run folder, checkpoint (RUN/checkpoints/step-*) or transformer folder")
    weights: str = doc("ema", "ema | raw: which weights of a run or checkpoint")
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    base: str = doc("logit_normal", "base of the TQD law that is recommended: logit_normal | uniform | mode | beta")
    shift: float = doc(0.0, "shift of that base; 0 = the shift the checkpoint was trained with, 1 where unknown")
    kappa_base: float = doc(2.0, "concentration of that law for equal scores; above 0")
    precision: str = doc("fp32", "fp32 | bf16: the transformer's; gradients are added up in fp32")
    device: str = doc("auto", "auto | cuda | npu | cpu")
    out: str = doc("outputs/gradients", "folder of gradients.json and report.html")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.analysis in ANALYSES, "analysis", self.analysis, f"use one of {', '.join(ANALYSES)}")
        require(self.weights in ("ema", "raw"), "weights", self.weights, "use ema or raw")
        require(self.shift >= 0, "shift", self.shift, "use a positive number, or 0 for the trained shift")
        require(self.precision in PRECISIONS, "precision", self.precision, f"use one of {', '.join(PRECISIONS)}")
        require(bool(self.out), "out", '""', "name a folder, out=DIR")
        TimestepConfig(kind="tqd", base=self.base, kappa_base=self.kappa_base, kappa_max=max(8.0, self.kappa_base))


@dataclass
class IndexConfig:
    """`contentv index`: a dataset's indexes put in order."""

    path: str = doc("", "dataset folder; a URL with verify=true")
    adopt: bool = doc(False, "take in tars below shards/<bucket>/ that dataset.json does not list, all samples checked")
    refit: bool = doc(False, "fit quality.json again to the raw scores in the shards")
    verify: bool = doc(False, "read every byte and list what is wrong; exit code 2 if anything is")


@dataclass
class PlanRoot(PlanConfig):
    """`contentv plan`: what a stage takes on a cluster, before it is launched."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: MMDiTConfig = field(default_factory=MMDiTConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    parallel: LayoutWish = field(default_factory=LayoutWish)
    train: PlannedTraining = field(default_factory=PlannedTraining)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class DoctorConfig:
    """`contentv doctor`: what this machine has."""

    json: bool = doc(False, "print one JSON object instead of a table")


ROOTS: dict[str, type] = {
    "train": TrainRoot,
    "pipeline": PipelineRoot,
    "sample": SampleConfig,
    "convert": ConvertConfig,
    "curate": CurateRoot,
    "synth": SynthRoot,
    "demo": DemoConfig,
    "analyze": AnalyzeRoot,
    "index": IndexConfig,
    "plan": PlanRoot,
    "report": ReportConfig,
    "doctor": DoctorConfig,
}
