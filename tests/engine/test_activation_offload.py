"""Activations in host memory: what stays on the device, that nothing changes, and streams that really run late."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import toy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contentv.base.types import TokenCounts
from contentv.engine import activation_offload
from contentv.engine.activation_offload import LEAVING_LAYERS, ActivationOffload, HostLayer
from contentv.engine.parallelize import parallelize
from contentv.models.cost import activation_bytes, activation_bytes_per_block
from contentv.models.mmdit import MMDiT
from contentv.parallel.mesh import single_process_mesh

TOKENS = TokenCounts(45, 7)  # of toy.LATENTS: 3 x 3 x 5 patches; and its text


def parted(recompute: str, offload: bool) -> MMDiT:
    model = toy.make_model(num_layers=5)
    parallelize(model, single_process_mesh(), recompute=recompute, offload_activations=offload)
    return model


def gradients(model: MMDiT, passes: int = 1) -> dict[str, Tensor]:
    loss = toy.loss_sum(model, toy.make_batch(0))
    for left in reversed(range(passes)):
        loss.backward(retain_graph=left > 0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Alive(TorchDispatchMode):
    """Every storage that an operation made or read and that is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor):
                self.seen[x.untyped_storage()._cdata] = weakref.ref(x.untyped_storage())
        return out

    def bytes_without(self, tensors: list[Tensor]) -> int:
        out = {x.untyped_storage()._cdata for x in tensors}
        storages = [(key, ref()) for key, ref in self.seen.items()]
        return sum(s.nbytes() for key, s in storages if s is not None and key not in out)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_between_the_passes_no_layer_keeps_anything_on_the_device(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host: list[Tensor] = []
    pack = HostLayer.pack

    def seen(self: HostLayer, tensor: Tensor) -> Any:
        place = pack(self, tensor)
        on_host.append(self._host[-1][0])
        return place

    monkeypatch.setattr(HostLayer, "pack", seen)
    model = parted(recompute, offload=True)
    inputs = {k: v[:1] for k, v in toy.make_batch(0).items() if k != "target"}
    copies = {k: v.clone() for k, v in inputs.items()}
    with Alive() as alive:
        out = model(**copies)
    config, size = model.config, torch.float32
    positions = [axis for axes in model.positions._axes.values() for axis in axes]
    kept = alive.bytes_without([*model.parameters(), *positions, copies["timestep"], out, *on_host])
    layers = config.num_layers * activation_bytes_per_block(config, TOKENS, size, recompute)
    everything = activation_bytes(config, TOKENS, size, recompute, fused_norms=False)
    assert kept == everything - layers
    condition = config.num_layers * config.inner_dim * size.itemsize  # one copy a layer
    assert sum(x.untyped_storage().nbytes() for x in on_host) == layers + condition


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_gradients_are_the_same_bits(recompute: str) -> None:
    want, got = gradients(parted(recompute, offload=False), 2), gradients(parted(recompute, offload=True), 2)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


class LateStreams:
    """Streams of a device whose copies happen when somebody waits for them, and never before."""

    def __init__(self) -> None:
        self.queue: list[Any] = []
        self.done = self.most_waiting = 0

    def Stream(self) -> LateStreams:
        return self

    def current_stream(self) -> LateStreams:
        return self

    @contextlib.contextmanager
    def stream(self, side: Any) -> Iterator[None]:
        with _Later(self):
            yield

    def record_event(self) -> int:
        return len(self.queue)

    def wait_event(self, event: int) -> None:
        while self.done < event:
            self.queue[self.done]()
            self.done += 1

    def wait_stream(self, other: Any) -> None:
        self.most_waiting = max(self.most_waiting, len(self.queue) - self.done)


class _Later(TorchFunctionMode):
    def __init__(self, streams: LateStreams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.copy_:
            return func(*args, **(kwargs or {}))
        # Whoever asks for a copy keeps both tensors alive until it has ended: nobody else does.
        ends = [weakref.ref(x) for x in args[:2]]

        def copy() -> None:
            to, source = (end() for end in ends)
            assert to is not None
            assert source is not None
            to.detach().copy_(source.detach())

        self.streams.queue.append(copy)
        return args[0]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_no_tensor_is_used_before_its_copy_has_ended(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = gradients(parted(recompute, offload=False))
    empty_like, streams = torch.empty_like, LateStreams()

    def unwritten(x: Tensor, *, device: Any, pin_memory: bool = False) -> Tensor:
        return empty_like(x).fill_(float("nan"))

    made = ActivationOffload.__init__

    def on_an_accelerator(self: ActivationOffload, device: torch.device) -> None:
        made(self, device)
        self.streams = self.side = streams

    monkeypatch.setattr(activation_offload.torch, "empty_like", unwritten)
    monkeypatch.setattr(ActivationOffload, "__init__", on_an_accelerator)
    model = parted(recompute, offload=True)
    got = gradients(model)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    tensors = 3 if recompute == "full" else 5  # video, text, condition; attention's output and its log-sum-exp
    assert len(streams.queue) == 2 * 5 * tensors  # there and back
    assert streams.most_waiting <= LEAVING_LAYERS * tensors
