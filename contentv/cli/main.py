"""`contentv COMMAND key=value ...`: every command, its help, and how each kind of failure ends."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from contentv import __version__
from contentv.base.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    StoppedBySignalError,
    UserError,
    nearest,
)
from contentv.base.stop import StopSignal

COMMANDS = {
    "demo": "the whole product on this machine: MP4 files -> shards -> four stages -> sampled videos -> report",
    "synth": "write procedural captioned video clips with ground truth",
    "curate": "video and image files with captions -> scenes -> scores -> latents -> shards",
    "index": "make missing indexes of a dataset, take in others' shards, check every byte",
    "train": "run one stage of training",
    "pipeline": "run the stages one after another; run again, it goes on where it stopped",
    "sample": "prompts -> videos",
    "convert": "weights of SD3, SD3.5, ContentV or a run -> a folder that diffusers and the published pipeline read",
    "analyze": "gradients: which noise levels imperfect clips are good for, on a checkpoint of yours",
    "plan": "memory per device, speed, days and cost of a stage on a cluster, before it is launched",
    "report": "one HTML page about a run, a dataset or a demo",
    "doctor": "what this machine has and what is missing",
}


RANK_0_SPEAKS_S = 3.0
STOPPABLE = ("train", "pipeline", "curate")  # these save when they are told to stop


def usage() -> str:
    """Returns the list of commands."""
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        f"contentv {__version__}\n\nusage: contentv COMMAND key=value ...\n\n{rows}\n\n"
        "contentv COMMAND --help   the command's keys, defaults and units\n"
        "contentv COMMAND --cfg    print the resolved configuration and stop\n"
        "distributed: torchrun --nproc-per-node 8 -m contentv train ...\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 the user can fix it, 75 stopped after saving, 1 otherwise."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return EXIT_OK
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"contentv {__version__}\n")
        return EXIT_OK
    _quiet_libraries()
    try:
        return _run(arguments[0], arguments[1:])
    except UserError as error:
        return _end(EXIT_USER_ERROR, f"contentv: {error}")
    except StoppedBySignalError as error:
        return _end(EXIT_STOPPED, f"contentv: {error}")
    except KeyboardInterrupt:
        return _end(EXIT_FAILED, "contentv: interrupted")
    except Exception:  # the one place where an unforeseen failure is shown: with its traceback, as exit code 1
        traceback.print_exc()
        return EXIT_FAILED


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise UserError(f'there is no command "{command}"', remedy=nearest(command, COMMANDS) or "see contentv --help")
    if "-h" in arguments or "--help" in arguments:
        from contentv.cli.help import help_text

        sys.stdout.write(help_text(command, COMMANDS[command]))
        return EXIT_OK
    if command == "curate" and "--scorers" in arguments:
        from contentv.cli.scorers import print_scorers

        print_scorers([a for a in arguments if a != "--scorers"])
        return EXIT_OK
    if command == "analyze" and arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        arguments = [f"analysis={arguments[0]}", *arguments[1:]]  # `contentv analyze gradients key=value ...`
    show = "--cfg" in arguments
    overrides = [a for a in arguments if a not in ("--cfg", "job")]
    if show:
        from contentv.config.compose import as_yaml, compose_config, to_object

        config = compose_config(command, overrides)
        to_object(config)  # the range checks
        sys.stdout.write(as_yaml(command, config))
        return EXIT_OK
    # A signal that comes while libraries and weights are loaded counts as well.
    with StopSignal() if command in STOPPABLE else nullcontext():
        from contentv.config.compose import load_config

        module: Any = importlib.import_module(f"contentv.cli.{command}")
        module.run(load_config(command, overrides), overrides)
    return EXIT_OK


def _quiet_libraries() -> None:
    # Nothing is ever downloaded at run time, and libraries must not print over the progress bar.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _end(code: int, message: str) -> int:
    # One message for the job, not one per process: when all ranks fail alike rank 0 speaks. torchrun ends the others as
    # soon as one of them exits, so they wait; whoever is still alive after that failed alone and must say why.
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(RANK_0_SPEAKS_S)
        message = f"rank {rank}: {message}"
    sys.stderr.write(f"{message}\n")
    return code
