"""Hydra overrides to a checked dataclass: unknown keys, wrong types and impossible values end as one clear message."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import contentv
from contentv.base.errors import UserError, nearest
from contentv.config.schema import ROOTS

# What other frameworks call our keys: refused, with our name.
ALIASES = {
    "ulysses_size": "parallel.sp", "sp_size": "parallel.sp", "context_parallel_size": "parallel.sp",
    "tp_size": "parallel.tp", "tensor_parallel_size": "parallel.tp", "zero_stage": "parallel.zero_stage",
    "gradient_checkpointing": "parallel.recompute", "activation_checkpointing": "parallel.recompute",
    "flow_shift": "timestep.shift", "shift": "timestep.shift", "timestep_sampling": "timestep",
    "weighting_scheme": "timestep", "logit_mean": "timestep.mean", "logit_std": "timestep.std",
    "resume_from_checkpoint": "train.resume", "max_train_steps": "train.max_steps", "max_steps": "train.max_steps",
    "train_batch_size": "train.global_batch_size", "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size", "gradient_accumulation_steps": "train.micro_batch_size",
    "checkpointing_steps": "train.checkpoint_every", "save_interval": "train.checkpoint_every",
    "mixed_precision": "train.precision", "learning_rate": "optim.lr", "lr": "optim.lr", "seed": "train.seed",
    "max_grad_norm": "optim.grad_clip", "lr_warmup_steps": "optim.warmup_steps", "cfg_dropout": "text.dropout",
    "report_to": "logger", "output_dir": "out", "num_frames": "frames", "pretrained_model_name_or_path": "init",
    "data_path": "data.path", "dataset_path": "data.path", "source": "from", "merge": "lora_mode",
}  # fmt: skip

OVERRIDE_LISTS = ("pipeline.overrides", "pipeline.extra", "overrides")  # keys whose value is a list of key=value


def config_dir() -> Path:
    """Returns the folder of YAML groups: the checkout's `conf/`, or the installed copy."""
    checkout = Path(contentv.__file__).resolve().parent.parent / "conf"
    if (checkout / "train.yaml").is_file():
        return checkout
    installed = Path(contentv.__file__).resolve().parent / "_conf"
    if not (installed / "train.yaml").is_file():
        raise UserError("the configuration files are missing", where=str(installed), remedy="reinstall contentv")
    return installed


def groups(command: str) -> dict[str, list[str]]:
    """Returns the choices of every group of a command, such as {"model": ["contentv_8b", "small", "tiny"]}."""
    names = {"train": ("model", "stage", "timestep", "parallel", "optim", "reward"), "pipeline": ("pipeline",),
             "plan": ("cluster", "model", "stage", "optim", "reward")}  # fmt: skip
    found = {g: sorted(p.stem for p in (config_dir() / g).glob("*.yaml")) for g in names.get(command, ())}
    return {group: choices for group, choices in found.items() if choices}


def keys(root: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yields (dotted key as users type it, field, default) of every leaf key of a root configuration."""
    instance = root()
    for f in dataclasses.fields(root):
        value = getattr(instance, f.name)
        if dataclasses.is_dataclass(value):
            yield from keys(type(value), f"{prefix}{_typed(f)}.")
        else:
            yield f"{prefix}{_typed(f)}", f, value


def _typed(field: dataclasses.Field[Any]) -> str:
    # `from` is what users type and no name a Python field can have: such fields carry the key in their metadata.
    return str(field.metadata.get("key", field.name))


def _renamed(command: str) -> dict[str, str]:
    """Returns key -> field name of a command's top-level keys that cannot be called what users type."""
    return {_typed(f): f.name for f in dataclasses.fields(ROOTS[command]) if _typed(f) != f.name}


def as_yaml(command: str, config: DictConfig) -> str:
    """Returns a composed configuration as text, in the keys that users type."""
    typed = {field: key for key, field in _renamed(command).items()}
    if not typed:
        return OmegaConf.to_yaml(config)
    values: Any = OmegaConf.to_container(config)
    return OmegaConf.to_yaml(OmegaConf.create({typed.get(key, key): value for key, value in values.items()}))


def _register() -> None:
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(name=f"{name}_schema", node=root)


def compose_config(command: str, overrides: list[str]) -> DictConfig:
    """Returns the composed configuration of a command, typed by its schema.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or a group has no such choice.
    """
    for item in overrides:
        _check_override(command, item)
    renamed = _renamed(command)
    split = [item.partition("=") for item in overrides]
    overrides = [f"{_opened(command, key)}{renamed.get(key, key)}={_quoted(key, value)}" for key, _, value in split]
    _register()
    GlobalHydra.instance().clear()
    yaml = config_dir() / f"{command}.yaml"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            return compose(command if yaml.is_file() else f"{command}_schema", overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(command, overrides, error) from None


def load_config(command: str, overrides: list[str]) -> Any:
    """Returns the command's root dataclass, range checks done."""
    return to_object(compose_config(command, overrides))


def to_object(config: DictConfig) -> Any:
    """Returns the dataclass of a composed configuration; the checks of every `__post_init__` run here."""
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(_first_line(error), where="configuration", remedy="see --help for the keys") from None


def _check_override(command: str, item: str) -> None:
    key, sign, _ = item.partition("=")
    if not sign:
        raise UserError(
            f'"{item}" is not of the form key=value', where=f"contentv {command}", remedy="see --help for the keys"
        )
    if item.startswith(("+", "~")):
        raise UserError(
            f'"{item}" would change the set of keys', where=f"contentv {command}", remedy="use key=value alone"
        )
    known = {k for k, _, _ in keys(ROOTS[command])}
    choices = groups(command)
    if key in known or key in choices or any(known_key.startswith(f"{key}.") for known_key in known):
        value = item.partition("=")[2]
        if key in choices and value not in choices[key]:
            # A part of a name, such as "910b", is not near the whole by its letters.
            whole = next((choice for choice in choices[key] if value and value.lower() in choice), value)
            hint = nearest(whole, choices[key])
            raise UserError(
                f"there is no {key}={value}", where=f"contentv {command}",
                remedy=f"{hint} The choices are: {', '.join(choices[key])}".strip(),
            )  # fmt: skip
        return
    if _opened(command, key):
        return
    alias = ALIASES.get(key.rpartition(".")[2])
    hint = f'did you mean "{alias}"?' if alias in {*known, *choices} else nearest(key, [*known, *choices])
    remedy = hint or f"`contentv {command} --help` lists the keys"
    raise UserError(f'unknown key "{key}"', where=f"contentv {command}", remedy=remedy)


def _quoted(key: str, value: str) -> str:
    """Returns a list of overrides as Hydra reads it: each quoted, since its grammar has no bare `=` within a list."""
    if key not in OVERRIDE_LISTS or not (value.startswith("[") and value.endswith("]")):
        return value
    entries, depth, quote = [""], 0, ""
    for letter in value[1:-1]:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not entries[-1].strip():  # an entry that is quoted already, commas and all
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0 and not quote:
            entries.append("")
        else:
            entries[-1] += letter
    stripped = [entry.strip() for entry in entries if entry.strip()]
    quoted = [entry if entry[0] in "'\"" else "'" + entry.replace("'", r"\'") + "'" for entry in stripped]
    return f"[{','.join(quoted)}]"


def _opened(command: str, key: str) -> str:
    """Returns what Hydra wants before a key that lies in a mapping: there the names are the user's own."""
    mappings = [known for known, _, default in keys(ROOTS[command]) if isinstance(default, dict)]
    return "++" if any(key == known or key.startswith(f"{known}.") for known in mappings) else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _explain(command: str, overrides: list[str], error: BaseException) -> UserError:
    cause: BaseException = error.__cause__ or error
    text = re.sub(r"\s+", " ", _first_line(cause))
    key = getattr(cause, "full_key", None) or next((o.partition("=")[0] for o in overrides if o in str(error)), "")
    key = next((typed for typed, field in _renamed(command).items() if field == key), key)
    where = f"contentv {command}" + (f", key {key}" if key else "")
    return UserError(text, where=where, remedy=f"`contentv {command} --help` lists keys, types and defaults")
