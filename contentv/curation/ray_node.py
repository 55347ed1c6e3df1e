"""What a machine of a Ray cluster has, and whether that is what this one has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import cv2
import numpy

import contentv
from contentv.base.errors import UserError
from contentv.curation.ray_address import KEY


@dataclass(frozen=True)
class NodeFacts:
    """One machine: the versions that decide what a worker computes, and the files it does not see.

    Args:
        versions: name of a package -> its version; of contentv a checksum of its sources as well.
        missing: of the paths that were asked for, those that are not there.
        error: why contentv cannot be imported; empty if it can.
    """

    versions: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    error: str = ""


def unfit_nodes(here: NodeFacts, found: Mapping[str, NodeFacts]) -> list[str]:
    """Returns what is wrong with the machines: one line a fault, empty if all are like this one."""
    faults = []
    for name, facts in found.items():
        if facts.error:
            faults.append(f"{name} cannot import contentv ({facts.error})")
            continue
        for package, version in here.versions.items():
            other = facts.versions.get(package, "none")
            if other != version:
                faults.append(f"{name} has {package} {other}, not {version}")
        faults += [f"{name} does not see {path}" for path in facts.missing]
    return faults


def unfit(faults: Sequence[str]) -> UserError:
    """Returns what to tell of machines with such faults."""
    return UserError(
        "machines of the Ray cluster cannot do this work: " + "; ".join(faults), where=KEY,
        remedy="install the same contentv on all of them, `pip install contentv[curation]`, and let them see the same "
        "files under the same paths",
    )  # fmt: skip


def facts_here(paths: Sequence[str]) -> NodeFacts:
    """Returns what the machine that this runs on has.

    Args:
        paths: files and folders that it should see.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    versions = {
        "contentv": f"{contentv.__version__} ({digest.hexdigest()[:8]})",
        "opencv": cv2.__version__, "av": av.__version__, "numpy": numpy.__version__,
    }  # fmt: skip
    return NodeFacts(versions, tuple(path for path in paths if not os.path.exists(path)))
