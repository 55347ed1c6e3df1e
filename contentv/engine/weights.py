"""A model's weights on their way to where ZeRO keeps them: the model comes as shapes, the values by name.

The parallel plan is applied to parameters on the meta device, which cost nothing. Under ZeRO-3 a rank then takes memory
for its own partition alone, and reads from each stored weight the stretch that it keeps; under ZeRO-1 and 2, which hold
the whole model by definition, weights are read one at a time.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from contentv.engine.partition import Entry, Fragment, Partition
from contentv.parallel.collectives import equalize
from contentv.parallel.mesh import Mesh
from contentv.parallel.tensor import Split

Weights = Mapping[str, Any]  # name -> a tensor, or anything with a shape that is sliced like one
NAMES_SHOWN = 4


def take_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the values of a model's parameters by name; the parameters themselves move to the meta device."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    replace_parameters(model, lambda parameter: torch.empty_like(parameter, device="meta"))
    return values


def settle(model: nn.Module, weights: Weights | None, mesh: Mesh, device: torch.device) -> Weights:
    """Returns the values to fill a model with, the same on all ranks; the model is on the meta device afterwards.

    Args:
        model: on the meta device with `weights`; else the whole model, of which ranks take the first rank's values.
        weights: the whole parameters by name.
        mesh: this rank's place.
        device: where collectives want their tensors.

    Raises:
        ValueError: the weights are not those of the model.
    """
    if weights is None and mesh.world > 1:
        equalize(model.parameters(), device)
    own = take_weights(model)
    if weights is None:
        return own
    check_names(own, weights)
    return weights


def replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> None:
    """Puts a new parameter with the value `make(old)` in the place of every parameter, marks and freezing kept.

    Hooks on the old parameters are not.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # a parameter that two modules share stays shared
    for module in model.modules():
        for key, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if old not in made:
                made[old] = nn.Parameter(make(old), requires_grad=old.requires_grad)
                made[old].__dict__.update(old.__dict__)
            setattr(module, key, made[old])


def hollow(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of the parameter's shape on a real device that takes the memory of one element."""
    return torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)


def check_names(names: Collection[str], weights: Weights) -> None:
    """Refuses weights that are not those of a model with parameters of these names.

    Raises:
        ValueError: names are missing or unknown.
    """
    for problem, some in (("missing", set(names) - set(weights)), ("unknown", set(weights) - set(names))):
        if some:
            shown = ", ".join(sorted(some)[:NAMES_SHOWN])
            raise ValueError(f"the weights are not those of this model: {len(some)} {problem}, such as {shown}")


def in_file_order(weights: Weights, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yields (name, value), those without a file first, then file by file, so that each file is opened once.

    Every value is taken once: taking one may mean computing it.
    """
    by_file: dict[Any, list[tuple[str, Any]]] = {}
    for name in names:
        value = weights[name]
        path = getattr(value, "path", None)
        if path is None:
            yield name, value
        else:
            by_file.setdefault(path, []).append((name, value))
    for stored in by_file.values():
        yield from stored


def fill(weights: Weights, *targets: tuple[Partition, list[Tensor]]) -> None:
    """Copies this rank's stretches of the weights to their places, reading no more than those.

    Args:
        weights: the whole parameters by name.
        targets: each a partition and this rank's flat tensors of it.

    Raises:
        ValueError: a weight is of another shape.
    """
    places = {name: target for target in targets for name in target[0].by_name}
    for name, stored in in_file_order(weights, places):
        partition, flats = places[name]
        entry = partition.by_name[name]
        if tuple(stored.shape) != partition.whole_shape(entry):
            raise ValueError(f"{name} is {tuple(stored.shape)}, should be {partition.whole_shape(entry)}")
        partition.fill(entry, flats, stored)


def whole_places(
    parameters: Mapping[str, Tensor], splits: Mapping[str, Split], mesh: Mesh, device: torch.device
) -> tuple[Partition, list[Tensor]]:
    """Returns parameters that this rank holds whole (its tensor ranks' part of them) as a target of `fill`."""
    entries = [
        Entry(name, tuple(p.shape), splits.get(name), Fragment(i, 0, 0, p.numel()))
        for i, (name, p) in enumerate(parameters.items())
    ]
    return Partition(entries, mesh, device), [p.detach().view(-1) for p in parameters.values()]


def partitioned_places(
    parameters: Mapping[str, Any], splits: Mapping[str, Split], mesh: Mesh, device: torch.device
) -> tuple[Partition, list[Tensor]]:
    """Returns this rank's partitions of ZeRO-3 parameters that have no master weights as a target of `fill`."""
    entries = []
    for index, (name, parameter) in enumerate(parameters.items()):
        size, numel = parameter.ds_tensor.ds_numel, math.prod(parameter.ds_shape)
        start = min(mesh.zero_rank * size, numel)
        fragment = Fragment(index, 0, start, max(0, min(size, numel - start)))
        entries.append(Entry(name, tuple(parameter.ds_shape), splits.get(name), fragment))
    return Partition(entries, mesh, device), [parameter.ds_tensor for parameter in parameters.values()]


def give_back() -> None:
    """Gives host memory that was freed back to the system, where the C library can (glibc).

    The heap keeps what many middle-sized tensors leave behind, and large ones do not come to lie there.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
