"""LoRA layers in the model, and merging them into weights: against plain formulas, to the bit where that can be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contentv.base.errors import UserError
from contentv.models.io import TransformerSource, checked_source, load_whole, open_transformer, write_transformer
from contentv.models.lora import (
    LoRA,
    LoRAConfig,
    adapted_layers,
    adapted_weights,
    add_lora,
    base_name,
    lora_initial,
    lora_name,
    lora_names,
    merge_live,
    merged,
    unmerge_live,
    unmerged,
)
from contentv.models.lora_config import BLOCK_LINEARS
from contentv.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=12, pooled_projection_dim=10
)
LORA = LoRAConfig(rank=3, alpha=5.0, targets=["attn.to_q", "to_out.0", "add_v_proj", "net.2", "norm1.linear"])
Parity = Callable[[str, str, float, float], None]


def make_model(dtype: torch.dtype = torch.float32) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model.to(dtype)


def make_inputs(t: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 16, t, 4, 6, generator=g), torch.tensor([40.0, 900.0]), torch.randn(2, 5, 12, generator=g),
        torch.randn(2, 10, generator=g),
    )  # fmt: skip


def train_a_little(model: nn.Module) -> dict[str, Tensor]:
    """Gives the LoRA values as after training, and returns them by our names."""
    g = torch.Generator().manual_seed(2)
    out = {}
    for name, parameter in model.named_parameters():
        if name in lora_names(model):
            with torch.no_grad():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
            out[lora_name(name)] = parameter.detach().clone()
    return out


def make_lora(config: LoRAConfig = LORA) -> LoRA:
    model = make_model()
    add_lora(model, config, 0)
    tensors = train_a_little(model)
    ranks = dict.fromkeys(adapted_layers(config, CONFIG), config.rank)
    return LoRA(tensors, ranks, dict.fromkeys(ranks, config.scale))


def source_of(model: MMDiT) -> TransformerSource:
    return checked_source(CONFIG, model.state_dict(), "a model")


def test_a_new_lora_changes_nothing_and_trains_alone() -> None:
    model, inputs = make_model(), make_inputs()
    expected, before = model(*inputs), {name: p.clone() for name, p in model.state_dict().items()}
    random_state = torch.get_rng_state()
    add_lora(model, LORA, seed=4)
    assert torch.equal(torch.get_rng_state(), random_state)
    out = model(*inputs)
    assert torch.equal(out, expected)

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora_names(model))
    assert {base_name(n): p for n, p in model.named_parameters() if n not in trained}.keys() == before.keys()
    # By hand: in the last block there is neither a text output nor a text feed-forward.
    in_both = ["attn.to_q", "attn.to_out.0", "attn.add_v_proj", "ff.net.2", "norm1.linear"]
    layers = {f"transformer_blocks.{n}.{layer}" for n in (0, 1) for layer in in_both} | {
        "transformer_blocks.0.ff_context.net.2"
    }
    assert set(lora_names(model).values()) == {f"{m}.lora_{x}.weight" for m in layers for x in "AB"}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    out.square().mean().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    optimizer.step()
    assert (model(*inputs) - expected).abs().max() > 1e-4
    assert all(torch.equal(p, before[base_name(n)]) for n, p in model.named_parameters() if n not in trained)


def test_adapted_forward_is_the_formula() -> None:
    model = make_model()
    add_lora(model, LORA, 0)
    tensors = train_a_little(model)
    layer, name = model.transformer_blocks[0].attn.to_q, "transformer_blocks.0.attn.to_q"
    x = torch.randn(2, 7, 32)
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    base = layer.base_layer
    expected = x @ base.weight.T + base.bias + (5.0 / 3.0) * (x @ a.T @ b.T)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_layers_are_those_of_the_model_and_config_is_checked() -> None:
    model = make_model()
    blocks = {
        name.split(".", 2)[2] for name, m in model.named_modules() if isinstance(m, nn.Linear) and "_blocks." in name
    }
    assert blocks == set(BLOCK_LINEARS)
    assert LoRAConfig(targets=["to_q", "attn.to_q"]).layers == ["attn.to_q"]
    assert LoRAConfig(targets=["net.2"]).layers == ["ff.net.2", "ff_context.net.2"]
    assert LoRAConfig(rank=4).scale == 1.0
    assert LoRAConfig(rank=4, alpha=8.0).scale == 2.0
    for options, said in (
        ({"rank": -1}, r"lora\.rank: -1"), ({"alpha": -2.0}, r"lora\.alpha: -2"), ({"targets": []}, r"lora\.targets"),
        ({"alpha": float("nan")}, r"lora\.alpha: nan"), ({"targets": ["attn.to_qq"]}, 'did you mean "attn.to_q"'),
        ({"targets": ["o_q"]}, '"o_q" is no linear layer'), ({"targets": ["context_embedder"]}, "no linear layer"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            LoRAConfig(**options)
    with pytest.raises(UserError, match=r"lora\.rank: rank 33 on transformer_blocks\.0\.attn\.to_q of 32 x 32"):
        add_lora(model, LoRAConfig(rank=33), 0)
    with pytest.raises(ValueError, match="rank 0"):
        add_lora(model, LoRAConfig(), 0)
    add_lora(model, LORA, 0)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, LORA, 0)


def test_initial_values_depend_on_name_and_seed_alone() -> None:
    model = make_model()
    add_lora(model, LORA, 7)
    live = {lora_name(n): p for n, p in model.named_parameters() if n in lora_names(model)}
    initial = lora_initial(LORA, CONFIG, 7)
    assert list(initial) == list(live)
    assert all(torch.equal(initial[name], live[name]) for name in live)
    fewer, other = lora_initial(LoRAConfig(3, targets=["net.2"]), CONFIG, 7), lora_initial(LORA, CONFIG, 8)
    name = "transformer_blocks.1.ff.net.2.lora_A.weight"
    assert torch.equal(fewer[name], initial[name])
    assert not torch.equal(other[name], initial[name])
    a = initial[name]
    assert a.shape == (3, 128)
    bound = 1 / 128**0.5
    assert 0.9 * bound < a.abs().max() <= bound
    assert not torch.equal(a, initial[name.replace("blocks.1", "blocks.0")])
    assert initial[name.replace("lora_A", "lora_B")].abs().max() == 0


def test_a_meta_model_is_filled_by_its_own_names() -> None:
    here = make_model()
    source = source_of(make_model())
    add_lora(here, LORA, 3)
    with torch.device("meta"):
        model = MMDiT(CONFIG)
    add_lora(model, LORA, 3)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    weights = adapted_weights(source, LORA, 3)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    model.load_state_dict(dict(weights), assign=True)
    assert torch.equal(model(*make_inputs()), here(*make_inputs()))


def test_full_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig())
    add_lora(model, LoRAConfig(rank=64), 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 38 * 4 * 64 * (2432 + 2432)
    assert sum(p.numel() for p in model.parameters()) - trained == 8_056_627_520


def test_each_parameter_is_read_only_in_its_own_modules_forward() -> None:
    """As of the model without a LoRA: what a partitioned optimiser needs. peft's own forward does not keep to it."""
    model, inputs = make_model(), make_inputs()
    add_lora(model, LORA, 0)
    train_a_little(model)
    with torch.no_grad():
        expected = model(*inputs)
    modules = {m: dict(m._parameters) for m in model.modules() if any(p is not None for p in m._parameters.values())}

    def gather(module: nn.Module, _: object) -> None:
        module._parameters.update(modules[module])

    def free(module: nn.Module, *_: object) -> None:
        for key, parameter in modules[module].items():
            module._parameters[key] = None if parameter is None else nn.Parameter(torch.empty(0))

    for module in modules:
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(free)
        free(module)
    reads: list[str] = []
    names = {m: name for name, m in model.named_modules()}

    class Watched(nn.Linear):
        def __getattr__(self, key: str) -> object:
            if key == "weight" and self._parameters["weight"].numel() == 0:
                reads.append(names[self])
            return super().__getattr__(key)

    for module in modules:
        if type(module) is nn.Linear:
            module.__class__ = Watched
    with torch.no_grad():
        assert torch.equal(model(*inputs), expected)
    assert reads == []


def test_recomputed_activations_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = make_model()
        add_lora(model, LORA, 0)
        train_a_little(model)
        if recompute:
            for block in model.transformer_blocks:
                run = block.forward
                block.forward = lambda *args, run=run: checkpoint(run, *args, use_reentrant=False)
        model(*make_inputs()).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    # Of the last layer's text queries nothing is read; LORA has none of them.
    assert all(g.abs().max() > 0 for g in grads[0])


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_bf16_weights_compute_in_bf16(lora_dtype: torch.dtype) -> None:
    exact_model, model = make_model(), make_model(torch.bfloat16)
    for m in (exact_model, model):
        add_lora(m, LORA, 0)
        train_a_little(m)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if lora_dtype == torch.bfloat16:
        model.to(torch.bfloat16)
    with torch.no_grad():
        exact = exact_model(*make_inputs())
        plain = make_model(torch.bfloat16)(*make_inputs()) - make_model()(*make_inputs())
    out = model(*make_inputs())
    assert model.transformer_blocks[0].attn.to_q(torch.randn(1, 2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (out - exact).square().mean().sqrt() <= 2 * plain.square().mean().sqrt()
    out.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {lora_dtype}


def test_merged_weights_give_the_adapters_output(parity: Parity) -> None:
    model = make_model()
    source = source_of(make_model())
    add_lora(model, LORA, 0)
    train_a_little(model)
    lora = make_lora()
    with torch.no_grad():
        adapted, base = model(*make_inputs()), make_model()(*make_inputs())
        out = load_whole(merged(source, lora))(*make_inputs())
        merge_live(model)
        live = model(*make_inputs())
        none = load_whole(merged(source, lora, scale=0.0))(*make_inputs())
    size = adapted.abs().max()
    assert (adapted - base).abs().max() > 0.1 * size
    parity("LoRA merged, forward, fp32", "peft's adapters", float((out - adapted).abs().max() / size), 1e-6)
    assert torch.equal(live, out)
    assert torch.equal(none, base)


def test_merging_is_the_formula_rounded_once_and_lazy() -> None:
    model, lora = make_model(), make_lora()
    source, reads = source_of(model), []

    class Counting(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> Tensor:
            reads.append(name)
            return super().__getitem__(name)

    lora = LoRA(Counting(lora.tensors), lora.ranks, lora.scales)
    lazy = merged(source, lora, 0.7).tensors
    reads.clear()
    assert list(lazy) == list(source.tensors)
    name, module = "transformer_blocks.1.ff.net.2.weight", "transformer_blocks.1.ff.net.2"
    assert (lazy[name].shape, lazy[name].dtype, reads) == (torch.Size([32, 128]), torch.float32, [])
    w, a, b = (t.double() for t in (source.tensors[name], *(lora.tensors[f"{module}.lora_{x}.weight"] for x in "AB")))
    exact = w.clone()
    for k in range(3):
        exact += 0.7 * 5 / 3 * b[:, k : k + 1] * a[k : k + 1]
    whole = lazy[name].read()
    assert (whole.double() - exact).abs().max() <= 2**-24 * exact.abs().max()
    reads.clear()
    assert torch.equal(lazy[name][3:9], whole[3:9])
    assert torch.equal(lazy[name][0:4, 8:16], whole[0:4, 8:16])
    assert len(reads) == 2  # A and B, once for both slices
    other = "transformer_blocks.1.ff.net.0.proj.weight"
    assert torch.equal(lazy[other][2:5], source.tensors[other][2:5])
    assert len(reads) == 2
    low = merged(source, lora, dtype=torch.bfloat16).tensors
    assert {t.read().dtype for t in low.values()} == {t.dtype for t in low.values()} == {torch.bfloat16}
    assert low[name].read().equal(merged(source, lora, dtype=torch.float64).tensors[name].read().to(torch.bfloat16))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
def test_unmerging_a_merged_folder(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    """All that fp32 can hold comes back: see the docstring of `unmerged`."""
    model, lora = make_model(dtype), make_lora()
    with torch.no_grad():  # weights over many magnitudes, and zeros: the hard cases
        weight = model.transformer_blocks[0].attn.to_q.weight
        weight *= 2.0 ** torch.randint(-22, 3, weight.shape).to(dtype)
        weight[0, :8] = 0
    source = source_of(model)
    write_transformer(
        ((n, t.read()) for n, t in merged(source, lora).tensors.items()), tmp_path, CONFIG, dtype=torch.float32
    )
    stored = open_transformer(tmp_path)
    back, back_fp32 = unmerged(stored, lora, dtype=torch.float64).tensors, unmerged(stored, lora).tensors
    seen = {"to the bit": 0, "too small": 0}
    for name, base in source.tensors.items():
        w, m, exact = base.double(), stored.tensors[name].read().double(), back[name].read()
        assert torch.all((exact - w).abs() <= 2.0**-24 * m.abs() * (1 + 1e-6)), name
        fp32 = back_fp32[name].read().double()
        assert torch.all((fp32 - w).abs() <= 2.0**-24 * (m.abs() + fp32.abs()) * (1 + 1e-6)), name
        same = exact.to(dtype) == base
        if name.removesuffix(".weight") not in lora.ranks:
            assert same.all(), name
        elif dtype != torch.float32:
            held = w.abs() >= 2.0 ** (bits - 22) * m.abs()
            assert same[held].all(), name
            seen["to the bit"] += int(held.sum())
            seen["too small"] += int((~same).sum())
    if dtype == torch.bfloat16:
        assert seen["to the bit"] > 20_000
        assert seen["too small"] > 8  # the zeros at least: the statement is no stronger than it can be


def test_ordinary_bf16_weights_come_back_to_the_bit() -> None:
    model = make_model(torch.bfloat16)
    lora = make_lora()
    with torch.no_grad():  # none is 2^14 times smaller than what is added to it
        for parameter in model.parameters():
            parameter.copy_(torch.where(parameter.abs() < 1e-3, 1e-3, parameter))
    source = source_of(model)
    back = unmerged(merged(source, lora), lora, dtype=torch.bfloat16).tensors
    assert all(torch.equal(back[name].read(), source.tensors[name]) for name in source.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_model_unmerges_to_the_bit(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    add_lora(model, LORA, 0)
    train_a_little(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = model(*make_inputs())
    for _ in range(2):
        merge_live(model)
        merge_live(model)  # once is enough
        assert not torch.equal(model.get_parameter("transformer_blocks.0.attn.to_q.base_layer.weight"),
                               before["transformer_blocks.0.attn.to_q.base_layer.weight"])  # fmt: skip
        unmerge_live(model)
        unmerge_live(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(*make_inputs()), out)


def test_loras_of_other_models_are_named() -> None:
    lora = make_lora()
    wide = MMDiTConfig(2, 4, 16, joint_attention_dim=12, pooled_projection_dim=10)
    with pytest.raises(
        UserError, match=r"transformer_blocks\.0\.norm1\.linear as 192 x 32, and the model has 384 x 64"
    ):
        merged(checked_source(wide, MMDiT(wide).state_dict(), "a wide model"), lora)
    one = MMDiTConfig(1, 2, 16, joint_attention_dim=12, pooled_projection_dim=10)
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.ff_context\.net\.2 and 5 more, no linear"):
        merged(checked_source(one, MMDiT(one).state_dict(), "a short model"), lora)
    odd = LoRA({"pos_embed.proj.lora_A.weight": torch.ones(1, 4), "pos_embed.proj.lora_B.weight": torch.ones(4, 1)},
               {"pos_embed.proj": 1}, {"pos_embed.proj": 1.0})  # fmt: skip
    with pytest.raises(UserError, match=r"pos_embed\.proj, no linear layer"):
        merged(source_of(make_model()), odd)
    bad = dict(lora.tensors)
    bad["transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.full((32, 3), float("nan"))
    broken = merged(source_of(make_model()), LoRA(bad, lora.ranks, lora.scales)).tensors
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.attn\.to_q merged .* not finite"):
        broken["transformer_blocks.0.attn.to_q.weight"].read()


def test_the_configuration_does_not_load_peft() -> None:
    code = "import sys, contentv.models.lora; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
