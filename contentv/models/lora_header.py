"""What a LoRA file says beside its tensors: peft's options, of which the ranks and alphas are the ones that count."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from contentv.base.errors import UserError
from contentv.models.lora_config import LoRA

PREFIX = "transformer."  # diffusers' name of the part of a pipeline that is adapted

# Options that mean something else than W + scale B A, unless they are off.
REFUSED = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "use_qalora", "use_bdlora", "trainable_token_indices",
    "target_parameters", "layer_replication", "alora_invocation_tokens", "arrow_config", "velora_config",
    "monteclora_config", "kasa_config",
)  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "eva")  # ways to start that leave the model's own weights as they are


def header_of(lora: LoRA) -> dict[str, Any]:
    """Returns a LoRA's options as peft names them, under diffusers' prefix; layers that differ stand in patterns."""
    usual, alphas = lora.config, {module: lora.alpha(module) for module in lora.ranks}
    options = {
        "r": usual.rank,
        "lora_alpha": _short(usual.alpha),
        "rank_pattern": {module: rank for module, rank in lora.ranks.items() if rank != usual.rank},
        "alpha_pattern": {module: _short(alpha) for module, alpha in alphas.items() if alpha != usual.alpha},
        "target_modules": sorted({_inside_block(module) for module in lora.ranks}),
    }
    return {PREFIX + key: value for key, value in options.items()}


def _inside_block(module: str) -> str:
    return re.sub(r"^transformer_blocks\.\d+\.", "", module)


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else value


def layer_scales(
    ranks: Mapping[str, int], header: Mapping[str, Any], alphas: Mapping[str, float], where: str
) -> dict[str, float]:
    """Returns module -> what B A is multiplied by.

    Args:
        ranks: module -> rank, from the tensors.
        header: peft's options, or empty.
        alphas: module -> alpha, where the file has it as tensors.
        where: for messages.

    Raises:
        UserError: the options are not those of plain LoRA, or contradict the tensors.
    """
    _check_plain(header, where)
    unknown = sorted(set(alphas) - set(ranks))
    if unknown:
        raise UserError(f'"{unknown[0]}.alpha" belongs to no layer', where=where, remedy="fetch the file again")
    found: dict[str, float] = {}
    for module, rank in ranks.items():
        said = _option(header, "r", "rank_pattern", module, float(rank), where)
        if said != rank:
            raise UserError(
                f"{module} has rank {rank}, and the header says {said:g}", where=where, remedy="fetch the file again"
            )
        alpha = _option(header, "lora_alpha", "alpha_pattern", module, alphas.get(module, float(rank)), where)
        if header and "lora_alpha" not in header and module not in alphas:
            raise UserError("the header has no lora_alpha", where=where, remedy="fetch the file again")
        if module in alphas and alphas[module] != alpha:
            raise UserError(
                f"{module} has alpha {alphas[module]:g}, and the header says {alpha:g}", where=where,
                remedy="fetch the file again",
            )  # fmt: skip
        if not (math.isfinite(alpha) and alpha > 0):
            raise UserError(f"alpha of {module} is {alpha}", where=where, remedy="fetch the file again")
        found[module] = alpha / (math.sqrt(rank) if header.get("use_rslora") else rank)
    return found


def _check_plain(header: Mapping[str, Any], where: str) -> None:
    wrong = [f"{key}={header[key]}" for key in REFUSED if header.get(key)]
    if header.get("bias", "none") != "none":
        wrong.append(f"bias={header['bias']}")
    if header.get("peft_type", "LORA") != "LORA":
        wrong.append(f"peft_type={header['peft_type']}")
    if header.get("init_lora_weights", True) not in PLAIN_STARTS:
        wrong.append(f"init_lora_weights={header['init_lora_weights']}")
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: not plain LoRA", where=where, remedy="merge it where it was trained"
        )  # fmt: skip


def _option(header: Mapping[str, Any], key: str, patterns: str, module: str, default: float, where: str) -> float:
    """Returns a layer's number: that of the first pattern that is the end of its name, or the usual one."""
    value = header.get(key, default)
    special_cases = header.get(patterns) or {}
    if not isinstance(special_cases, Mapping):
        raise UserError(f"{patterns} is no table", where=where, remedy="fetch the file again")
    for pattern, special in special_cases.items():
        # peft takes patterns as regular expressions; what is written in practice is a name, perhaps anchored.
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(f'"{pattern}" in {patterns} is no name of a layer', where=where, remedy="use names there")
        if module == name or module.endswith(f".{name}"):
            value = special
            break
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UserError(f"{key} of {module} is {value!r}, no number", where=where, remedy="fetch the file again")
    return float(value)
