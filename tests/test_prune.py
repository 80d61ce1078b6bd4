"""Pruning: what is cut, what is kept, and that the model computes what it did."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from seeds import set_fixed_seed
from torch.nn import Linear

import fused_lora as fl
from fused_lora.nn import AdaLoRALinear, LoRALinear, SoRALinear
from fused_lora.optim import SoRA, kept_parameters, named_gates, prune
from fused_lora.testing import assert_accurate

K, N, R = 40, 30, 8


def gated(gate=(0.5, 0, -2, 0, 0, 1e-3, 3, 0), dtype=torch.float32, k=K, n=N, **kwargs):
    linear = Linear(k, n, device=DEVICE, dtype=dtype)
    layer = SoRALinear.from_linear(linear, r=len(gate), init=False, **kwargs)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor(gate))
    return layer


def model(**kwargs):
    """Layers of rank 4, of rank 0, and one of two names."""
    layers = torch.nn.ModuleDict(
        {
            "q": gated(**kwargs),
            "down": gated((0.0,) * R, **kwargs),
            "head": Linear(N, 4, device=DEVICE, dtype=kwargs.get("dtype", torch.float32)),
        }
    )
    layers["again"] = layers["q"]
    return layers


def formula(scale):
    def plain(x, dy, weight, bias, lora_a, lora_b, gate):
        h = (x @ lora_a.to(x.dtype).T) * gate.to(x.dtype)
        y = F.linear(x, weight, bias) + scale * (h.to(x.dtype) @ lora_b.to(x.dtype).T)
        return [y, *torch.autograd.grad(y, [x], dy)]

    return plain


@pytest.mark.parametrize("keep_gates", (False, True))
@pytest.mark.parametrize("masters", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_output_and_dx_are_what_they_were(dtype, masters, keep_gates):
    layer = gated(
        dtype=dtype, lora_alpha=3, use_rslora=True,
        adapter_dtype=torch.float32 if masters and dtype != torch.float64 else None,
    )  # fmt: skip
    before = copy.deepcopy(layer)
    x = torch.randn(65, K, device=DEVICE, dtype=dtype, requires_grad=True)
    dy = torch.randn(65, N, device=DEVICE, dtype=dtype)
    report = prune(layer, keep_gates=keep_gates)
    assert [(r.before, r.after) for r in report.layers] == [(8, 4)]
    y = layer(x)
    ours = [y, *torch.autograd.grad(y, [x], dy)]
    inputs = [t.detach() for t in (before.weight, before.bias, before.lora_a, before.lora_b)]
    assert_accurate(
        ("y", "dx"), ours, formula(before.scale), (x, dy, *inputs, before.gate.detach())
    )


def test_what_is_cut_and_folded():
    layer = gated(lora_alpha=3)
    a, b = layer.lora_a.detach().clone(), layer.lora_b.detach().clone()
    prune(layer)
    kept = [0, 2, 5, 6]
    gate = torch.tensor([0.5, -2, 1e-3, 3], device=DEVICE)
    assert type(layer) is LoRALinear and layer.gate is None and not hasattr(layer, "gate_init")
    assert torch.equal(layer.lora_a, a[kept]) and torch.equal(layer.lora_b, b[:, kept] * gate)
    assert layer.r == 4 and layer.scale == 3 / 8 and not layer.use_rslora
    assert layer.lora_alpha / layer.r == layer.scale and layer.lora_alpha == 1.5
    assert layer.lora_b.is_contiguous() and layer.lora_b.is_leaf and layer.lora_b.grad is None
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a", "lora_b"]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_fold_is_made_in_fp32_and_rounded_once(dtype):
    layer = gated((1 / 3, 0, 0.1), dtype)
    b, gate = layer.lora_b.detach().double(), layer.gate.detach().double()
    want = (b[:, [0, 2]] * gate[[0, 2]]).to(dtype)
    prune(layer)
    assert layer.lora_b.dtype == dtype and torch.equal(layer.lora_b, want)


@pytest.mark.parametrize("use_rslora", (False, True))
def test_the_scale_is_that_of_the_rank_before(use_rslora):
    layer = gated(lora_alpha=7, use_rslora=use_rslora)
    scale = layer.scale
    prune(layer, keep_gates=True)
    assert type(layer) is SoRALinear and layer.scale == scale and layer.r == 4
    assert layer.lora_alpha / layer.r == pytest.approx(scale, rel=1e-15) and not layer.use_rslora
    # swap() to another adapter of that rank finds the same scale by the layer's own rule.
    layer.swap(layer.lora_a.detach(), layer.lora_b.detach())
    assert layer.scale == pytest.approx(scale, rel=1e-15)


def test_a_layer_without_gates_is_the_frozen_linear_alone():
    layer = gated((0.0, 0.0, 0.0), lora_dropout=0.5)
    weight, bias = layer.weight, layer.bias
    plain = Linear(K, N, device=DEVICE)
    prune(layer)
    assert type(layer) is Linear and layer.weight is weight and layer.bias is bias
    assert set(vars(layer)) == set(vars(plain)) and repr(layer) == repr(plain)
    assert not weight.requires_grad
    x = torch.randn(5, K, device=DEVICE)
    assert torch.equal(layer(x), F.linear(x, weight, bias))
    assert list(layer.state_dict()) == ["weight", "bias"]
    LoRALinear.from_linear(layer)  # and may be adapted anew


@pytest.mark.parametrize("keep_gates", (False, True))
def test_places_hooks_modes_and_requires_grad_stay(keep_gates):
    layers = model()
    q, down = layers["q"], layers["down"]
    seen = []
    handle = q.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    down.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    q.eval()
    q.lora_a.requires_grad_(False)
    q.bias.requires_grad_(True)
    q.own = "mark"
    prune(layers, keep_gates=keep_gates)
    assert layers["q"] is layers["again"] is q and layers["down"] is down
    assert not q.training and down.training and q.own == "mark"
    assert not q.lora_a.requires_grad and q.lora_b.requires_grad and q.bias.requires_grad
    assert not q.weight.requires_grad and (not keep_gates or q.gate.requires_grad)
    x = torch.randn(3, K, device=DEVICE)
    q(x)
    down(x)
    assert seen == [SoRALinear if keep_gates else LoRALinear, Linear]
    handle.remove()
    q(x)
    assert len(seen) == 2


@pytest.mark.parametrize("keep_gates", (False, True))
@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_deepcopy_and_pickle(duplicate, keep_gates):
    layers = model()
    prune(layers, keep_gates=keep_gates)
    twin, x = duplicate(layers), torch.randn(3, K, device=DEVICE)
    for name, layer in layers.items():
        assert type(twin[name]) is type(layer)
        if layer.in_features == K:
            assert torch.equal(twin[name](x), layer(x))


def test_counts_and_the_report():
    layers = model()
    assert list(named_gates(layers)) == ["q", "down"]
    assert kept_parameters(layers) == 4 * (K + N + 1)
    report = prune(layers)
    assert [(r.name, r.before, r.after) for r in report.layers] == [("q", 8, 4), ("down", 8, 0)]
    assert report.parameters("before") == 16 * (K + N + 1)
    assert report.parameters("after") == kept_parameters(layers) == 4 * (K + N)
    assert str(report).splitlines() == [
        "4 of 16 ranks kept in 2 layers, 280 of 1,136 parameters",
        "  q        8 -> 4",
        "  down     8 -> 0",
    ]
    left = prune(model(), keep_gates=True)
    assert left.parameters("after") == 4 * (K + N + 1)
    assert kept_parameters(Linear(3, 3)) == 0 and named_gates(Linear(3, 3)) == {}
    trained = sum(p.numel() for n, p in layers.named_parameters() if "lora" in n)
    assert kept_parameters(layers) == trained


@pytest.mark.parametrize("keep_gates", (False, True))
def test_the_config_describes_what_is_left(keep_gates):
    """A fresh base that inject adapts by it takes the state_dict and computes the same."""
    torch.manual_seed(3)
    base = torch.nn.Sequential(
        Linear(K, K),
        torch.nn.Sequential(Linear(K, K), Linear(K, K)),
        Linear(K, K),
    ).to(DEVICE)
    fresh = copy.deepcopy(base)
    config = fl.LoRAConfig(
        r=6, lora_alpha=5, target_modules=r"0|1\.\d", use_rslora=True, gate=True,
        init_lora_weights=False, rank_pattern={"1.0": 3}, alpha_pattern={"1.1": 2},
    )  # fmt: skip
    fl.inject(base, config)
    with torch.no_grad():
        for i, gate in enumerate(named_gates(base).values()):
            gate[i + 1 :] = 0
        base[1][0].gate.zero_()
    prune(base, keep_gates=keep_gates)
    assert [type(m) for m in base[1]] == [Linear, SoRALinear if keep_gates else LoRALinear]
    left = base.fused_lora_config
    assert left.gate is keep_gates and config.gate and config.rank_pattern == {"1.0": 3}
    fl.inject(fresh, left)
    fresh.load_state_dict(base.state_dict())
    x = torch.randn(9, K, device=DEVICE)
    assert torch.equal(fresh(x), base(x))
    with torch.no_grad():
        for layer in base.modules():
            if isinstance(layer, SoRALinear):
                layer.gate.zero_()
    if keep_gates:
        prune(base)
        assert not hasattr(base, "fused_lora_config")


def test_pruning_and_merging_give_the_same_weight():
    layer = gated()
    twin = copy.deepcopy(layer)
    prune(layer)
    layer.merge()
    twin.merge()
    torch.testing.assert_close(layer.weight, twin.weight)


def test_training_goes_on_between_phases():
    """Gates that are kept are trained on, the new Parameters by a new optimizer."""
    set_fixed_seed(0)
    base = Linear(16, 12, device=DEVICE)
    delta = torch.randn(12, 2, device=DEVICE) @ torch.randn(2, 16, device=DEVICE) / 4
    x = torch.randn(256, 16, device=DEVICE)
    target = F.linear(x, base.weight + delta, base.bias).detach()
    layer = SoRALinear.from_linear(base, r=8, lora_alpha=8)
    saved = io.BytesIO()
    for phase, sparsity in enumerate((0.4, 0.8)):
        rest = torch.optim.AdamW([layer.lora_a, layer.lora_b], lr=0.02)
        optimizer = SoRA(rest, [layer.gate], lr=0.02, sparsity=sparsity)
        for _ in range(250):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().sum(-1).mean()
            loss.backward()
            optimizer.step()
        before = layer(x)
        rank = layer.r
        prune(layer, keep_gates=phase == 0)
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
        assert 2 <= layer.r < (rank if phase == 0 else rank + 1)
    assert layer.r <= 3 and loss < 0.1
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    other = LoRALinear(16, 12, r=layer.r, lora_alpha=layer.lora_alpha, device=DEVICE)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("scaling", ("plain", "peft"))
def test_adalora_becomes_lora_of_the_ranks_that_its_budget_left(scaling, tmp_path):
    """Ranks that differ, and none; loaded into a fresh model it computes the same."""

    def bare():
        torch.manual_seed(2)
        return torch.nn.Sequential(Linear(K, N), Linear(N, 9), Linear(9, 7)).to(DEVICE)

    config = fl.LoRAConfig(
        r=4, lora_alpha=3, target_modules=["0", "1", "2"], adalora=True, adalora_scaling=scaling,
        init_lora_weights=False,
    )  # fmt: skip
    layers = fl.inject(bare(), config)
    with torch.no_grad():
        for layer, closed in zip(layers, ([1], [0, 1, 2, 3], []), strict=True):
            layer.gate[closed] = 0
    x = torch.randn(5, K, device=DEVICE)
    want, exact = layers(x), copy.deepcopy(layers).double()(x.double())
    kept = kept_parameters(layers)
    with pytest.raises(ValueError, match="keep_gates is for SoRA, and '0' is an AdaLoRALinear"):
        prune(layers, keep_gates=True)
    report = prune(layers)
    assert [(r.before, r.after) for r in report.layers] == [(4, 3), (4, 0), (4, 4)]
    assert [type(m) for m in layers] == [LoRALinear, Linear, LoRALinear]
    assert kept == report.parameters("after") + 3 + 4  # a lambda for each rank
    assert not any(hasattr(m, "scaling") for m in layers)
    assert (layers(x) - exact).norm() <= 2 * (want - exact).norm() + 1e-6 * exact.norm()
    fl.save_adapter(layers, tmp_path)
    assert torch.equal(fl.load_adapter(bare(), tmp_path)(x), layers(x))


def test_nothing_is_left_of_adalora_at_rank_zero():
    layer = AdaLoRALinear(K, N, r=2, device=DEVICE)  # lambdas start at zero
    plain = vars(Linear(K, N))
    prune(layer)
    assert type(layer) is Linear and set(vars(layer)) == set(plain)


class Subclass(SoRALinear):
    pass


def _with(change, dtype=torch.float32):
    layers = model(dtype=dtype)
    change(layers)
    return layers


def _set(tensor, value):
    with torch.no_grad():
        tensor[0] = value


REFUSED = {
    "model must be a torch.nn.Module, got list": (TypeError, lambda: [gated()]),
    "model has no SoRALinear": (ValueError, lambda: LoRALinear(4, 4)),
    "'down' is merged; call unmerge": (RuntimeError, lambda: _with(lambda m: m["down"].merge())),
    r"'down' is a test_prune\.Subclass; only a plain SoRALinear or AdaLoRALinear": (
        TypeError,
        lambda: _with(lambda m: m.update({"down": Subclass(K, N)})),
    ),
    r"prune: down\.gate has values that are not finite": (
        ValueError,
        lambda: _with(lambda m: _set(m["down"].gate, math.nan)),
    ),
    r"prune: q\.gate has values that are not finite": (
        ValueError,
        lambda: _with(lambda m: _set(m["q"].gate, math.inf)),
    ),
    r"prune: q\.lora_b times its gate leaves the range of float16; keep fp32 masters": (
        ValueError,
        lambda: _with(lambda m: _set(m["q"].gate, 1e6), torch.float16),
    ),
    r"prune: down\.lora_a is on the meta device": (
        ValueError,
        lambda: _with(lambda m: m["down"].to("meta")),
    ),
    "keep_gates must be one of True, False, got 'yes'": (ValueError, model),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_change_nothing(words):
    error, build = REFUSED[words]
    layers = build()
    modules = list(layers.modules()) if isinstance(layers, torch.nn.Module) else []
    before = [(type(m), dict(vars(m)), dict(m._parameters)) for m in modules]
    with pytest.raises(error, match=words):
        prune(layers, keep_gates="yes" if words.startswith("keep_gates") else False)
    for m, (kind, attributes, parameters) in zip(modules, before, strict=True):
        assert type(m) is kind and vars(m) == attributes
        assert all(m._parameters[n] is p for n, p in parameters.items())
