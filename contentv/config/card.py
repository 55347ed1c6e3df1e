"""The model card of a converted folder: what it is, where it comes from, and whose licences bind it."""

from __future__ import annotations

from pathlib import Path

from contentv import __version__
from contentv.config.schema import ConvertConfig
from contentv.config.sources import Source, lineage
from contentv.models.pipeline_folder import CARD, MODEL_INDEX

LICENCE_LINES = """What follows is derived from what such models are known to be made of, not from the files themselves:

- A transformer that descends from Stable Diffusion 3 or 3.5, which ContentV-8B does, is a derivative of it and under
  the Stability AI Community License.
- The Wan 2.1 VAE is under Apache-2.0.
- Text encoders have licences of their own, see their model cards.

Licences, notices and model cards that lay beside the parts were copied along.
"""


def write_card(folder: Path, source: Source, config: ConvertConfig, shift: float) -> None:
    """Writes README.md into a converted folder.

    Args:
        folder: it already holds the parts.
        source: what was converted.
        config: how.
        shift: of the scheduler; 0 = there is none.
    """
    trained = source.manifest
    stages = [f"{stage} ({path.name})" for stage, path in lineage(source)]
    facts = [f"- weights: {source.what}, dtype {config.dtype}"]
    if len(stages) > 1:
        facts.append(f"- trained from, newest first: {', '.join(stages)}")
    if trained.stage == "sd3":
        facts.append("- not trained on video yet: these are an image model's weights, to start training from")
    if source.lora is not None:
        facts.append(f"- LoRA: {config.lora_mode}, scale {config.lora_scale:g}")
    if shift:
        facts.append(f"- timestep shift of the scheduler: {shift:g}")
    if trained.buckets:
        sizes = ", ".join(trained.buckets)
        facts.append(f"- trained on clips of (frames, height, width): {sizes}; {trained.fps:g} fps")
    kind = "pipeline" if (folder / MODEL_INDEX).is_file() else "transformer"
    parts = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-video\n---\n",
        f"# A text-to-video {kind} in ContentV's layout\n",
        f"Written by contentv {__version__}, `contentv convert`.\n",
        "\n".join(facts) + "\n",
        "## Licences\n",
        LICENCE_LINES,
    ]
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8")
