"""Activations in host memory between the forward and the backward pass: what recomputed layers keep.

On an accelerator copies run on a stream of their own, beside the computation. At most two layers' tensors are on their
way out at once: the computation waits for older ones, so that their memory is free at a known place. On the way back,
a layer's tensors are asked for when the layer after it begins.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from contentv.base.device import module

LEAVING_LAYERS = 2  # copied out at once: the last one's while the next is computed


class ActivationOffload:
    """Where the layers of one model keep their tensors; each call of a layer gets a `HostLayer`.

    Args:
        device: where the model runs; on the CPU the tensors are copied all the same, which shows that nothing is lost.
    """

    def __init__(self, device: torch.device) -> None:
        self.streams: Any = module(device) if device.type != "cpu" else None
        self.side: Any = self.streams.Stream() if self.streams is not None else None
        self._leaving: deque[HostLayer] = deque()
        self._last: weakref.ref[HostLayer] | None = None

    def layer(self) -> HostLayer:
        """Returns the place of what the next call of a layer keeps."""
        self.settle(LEAVING_LAYERS - 1)
        layer = HostLayer(self, self._last() if self._last is not None else None)
        self._last = weakref.ref(layer)
        if self.streams is not None:
            self._leaving.append(layer)
        return layer

    def settle(self, leaving: int = 0) -> None:
        """Lets the computation wait until no more than so many layers are on their way out, and frees the others'."""
        while len(self._leaving) > leaving:
            self._leaving.popleft().has_left()


class HostTensor:
    """A tensor in host memory that a layer's repetition gets back on the device."""

    def __init__(self, layer: HostLayer, index: int) -> None:
        self._layer, self._index = layer, index

    def get(self) -> Tensor:
        """Returns the tensor on the device."""
        return self._layer.get(self._index)


class HostLayer:
    """The tensors that one call of a layer keeps, in host memory."""

    def __init__(self, offload: ActivationOffload, before: HostLayer | None) -> None:
        self._offload = offload
        self._before = weakref.ref(before) if before is not None else None
        self._host: list[tuple[Tensor, torch.device]] = []
        self._out: list[tuple[Tensor, Any]] = []  # device tensor, event: still on their way to the host
        self._back: dict[int, tuple[Tensor, Any]] = {}  # on their way back
        self._asked = False

    def hooks(self) -> AbstractContextManager[None]:
        """Returns a context in which what autograd saves is kept here."""
        return saved_tensors_hooks(self.pack, HostTensor.get)

    def pack(self, tensor: Tensor) -> HostTensor:
        """Returns the tensor's place in host memory; the copy has begun."""
        tensor, streams, side = tensor.detach(), self._offload.streams, self._offload.side
        if streams is None:
            self._host.append((tensor.clone(), tensor.device))
            return HostTensor(self, len(self._host) - 1)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        side.wait_stream(streams.current_stream())
        with streams.stream(side):
            host.copy_(tensor, non_blocking=True)
            self._out.append((tensor, side.record_event()))  # the tensor must live until the copy has ended
        self._host.append((host, tensor.device))
        return HostTensor(self, len(self._host) - 1)

    def has_left(self) -> None:
        """Lets the computation wait for the copies to the host, and lets go of the tensors on the device."""
        if self._out:
            self._offload.streams.current_stream().wait_event(self._out[-1][1])  # the stream's copies end in order
        self._out.clear()

    def get(self, index: int) -> Tensor:
        """Returns a tensor on the device; asks for this layer's others, and for those of the layer before."""
        self._offload.settle()
        self.ask()
        before = self._before() if self._before is not None else None
        if before is not None:
            before.ask()
        if index not in self._back:  # taken before: a second backward pass
            self._back[index] = self._fetched(index)
        tensor, event = self._back.pop(index)
        if event is not None:
            self._offload.streams.current_stream().wait_event(event)
        return tensor

    def ask(self) -> None:
        """Begins to copy all tensors back, once."""
        if not self._asked:
            self._asked = True
            self._back = {index: self._fetched(index) for index in range(len(self._host))}

    def _fetched(self, index: int) -> tuple[Tensor, Any]:
        (host, device), streams, side = self._host[index], self._offload.streams, self._offload.side
        if streams is None:
            return host, None
        tensor = torch.empty_like(host, device=device)  # of the computation's memory, which then waits for the copy
        side.wait_stream(streams.current_stream())
        with streams.stream(side):
            tensor.copy_(host, non_blocking=True)
            return tensor, side.record_event()

    def __del__(self) -> None:
        if self._back and self._offload.streams is not None:  # never taken: their memory must not be used again yet
            self._offload.streams.current_stream().wait_stream(self._offload.side)
