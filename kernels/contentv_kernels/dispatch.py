"""Which implementation of an operation runs: asked for, forced, or the first that fits the tensor.

Precedence: the call's `impl=`, then `with force(op, name)`, then the operation's table, in order. An implementation
that is asked for and cannot run raises, saying why; only the table may pass one over, and what it took and what it
passed over is logged once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def usable_anywhere(device_type: str, dtype: torch.dtype) -> None:
    """Says that nothing stands in the way (None): the check of implementations that only need torch."""


@functools.cache
def _on_path(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def installed(module: str) -> bool:
    """Whether a top-level module can be imported, without importing it."""
    return module in sys.modules or _on_path(module)


@dataclass(frozen=True)
class Impl:
    """One implementation of an operation.

    `run` computes the operation and imports what it needs beyond torch only when called. `automatic` lists the device
    types on which the table may take it without being asked. `why_not` returns what keeps it from running on a device
    type and dtype, or None.
    """

    name: str
    run: Callable[..., Any]
    automatic: tuple[str, ...] = ()
    why_not: Callable[[str, torch.dtype], str | None] = usable_anywhere


class Choice(NamedTuple):
    """What `report` says about one operation: the implementation last chosen, for what, and how it was chosen."""

    impl: str
    device: str
    dtype: str
    by: str


_tables: dict[str, tuple[Impl, ...]] = {}
_functions: dict[tuple[str, str], Callable[..., Any]] = {}
# Module state and not a context variable: activation recompute calls the operation again from autograd's own threads,
# which do not inherit one. torch.compile guards on this dict, so a compiled function follows a later force().
_forced: dict[str, str] = {}
_chosen: dict[str, Choice] = {}
_logged: set[tuple[str, Choice]] = set()


def register(op: str, table: tuple[Impl, ...]) -> None:
    """Makes `table` the implementations of `op`, in the order in which automatic choice tries them."""
    _tables[op] = table
    _functions.update({(op, impl.name): impl.run for impl in table})


def available(op: str, device_type: str, dtype: torch.dtype) -> dict[str, str | None]:
    """Returns every implementation of `op` with None, or with what keeps it from running on the device and dtype."""
    return {impl.name: impl.why_not(device_type, dtype) for impl in _tables[op]}


@contextlib.contextmanager
def force(op: str, impl: str) -> Iterator[None]:
    """Makes `impl` the choice for every call of `op` without its own `impl=`, in all threads, until the block ends.

    Args:
        op: an operation, such as "attention".
        impl: one of its implementations, such as "math".

    Raises:
        ValueError: there is no such operation or implementation. Whether the implementation can run is known, and
            raised, when a tensor comes.
    """
    _find(op, impl)
    before = _forced.get(op)
    _forced[op] = impl
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


def report() -> dict[str, Choice]:
    """Returns the last choice made for each operation that has run in this process."""
    return dict(_chosen)


def select(op: str, impl: str | None, tensor: Tensor) -> Callable[..., Any]:
    """Returns the function that computes `op` for a tensor like `tensor`.

    Raises:
        ValueError: `impl` names no implementation of `op`.
        RuntimeError: the implementation asked for, or every one in the table, cannot run here; the message says why.
    """
    return _functions[op, _resolve(op, impl, _forced.get(op), tensor.device.type, tensor.dtype)]


def _find(op: str, name: str) -> Impl:
    if op not in _tables:
        raise ValueError(f'operation "{op}" is unknown; there are: {", ".join(sorted(_tables))}')
    for impl in _tables[op]:
        if impl.name == name:
            return impl
    known = ", ".join(impl.name for impl in _tables[op])
    raise ValueError(f'{op}: implementation "{name}" is unknown; there are: {known}')


def _resolve(op: str, asked: str | None, forced: str | None, device: str, dtype: torch.dtype) -> str:
    """Returns the name of the implementation to run; torch.compile calls this while tracing and keeps the answer."""
    name = asked or forced
    if name is None:
        impl, passed_over = _first_usable(op, device, dtype)
        by = f"automatic{passed_over}"
    else:
        impl, by = _find(op, name), "impl=" if asked else "force()"
        reason = impl.why_not(device, dtype)
        if reason is not None:
            raise RuntimeError(f'{op}: implementation "{name}" cannot run on {device} with {dtype}: {reason}')
    _note(op, Choice(impl.name, device, str(dtype).removeprefix("torch."), by))
    return impl.name


# What torch.compiler.assume_constant_result sets. Called here, it would import the compiler into every command: a
# second and more. tests/kernels compile through it, and fail should the name change.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _first_usable(op: str, device: str, dtype: torch.dtype) -> tuple[Impl, str]:
    reasons: list[str] = []
    for impl in _tables[op]:
        if device not in impl.automatic:
            continue
        reason = impl.why_not(device, dtype)
        if reason is None:
            return impl, "".join(f"; not {r}" for r in reasons)
        reasons.append(f"{impl.name} ({reason})")
    raise RuntimeError(f"{op}: no implementation runs on {device} with {dtype}: {'; '.join(reasons) or 'none listed'}")


def _note(op: str, choice: Choice) -> None:
    _chosen[op] = choice
    if (op, choice) not in _logged:
        _logged.add((op, choice))
        logging.getLogger("contentv").info("%s: %s on %s %s (%s)", op, *choice)
