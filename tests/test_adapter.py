"""LoRAAdapter around layers that make their own product, held to reference.lora_add in fp64; and
what inject, save_adapter and the optimisers make of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch.nn import Parameter

import fused_lora as fl
from fused_lora.nn import LoRAAdapter, LoRALinear
from fused_lora.testing import assert_accurate, saved_bytes

M, K, N, R = 17, 24, 20, 4


class Dequantised(torch.autograd.Function):
    """x W^T + b, of a W that is made anew each time; its own backward, as in quantised layers."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantised(x.dtype), layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.dequantised(dy.dtype), None


class Int8Linear(torch.nn.Module):
    """A layer of another library: int8 weights, packed into another shape."""

    def __init__(self, in_features=K, out_features=N):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        packed = torch.randint(-128, 128, (in_features * out_features, 1), dtype=torch.int8)
        self.weight = Parameter(packed, requires_grad=False)
        self.bias = Parameter(torch.randn(out_features))

    def dequantised(self, dtype):
        return (self.weight.view(self.out_features, self.in_features) / 256).to(dtype)

    def forward(self, x):
        return Dequantised.apply(x, self)


class Linear4bit(Int8Linear, torch.nn.Linear):
    """To inject, a layer of bitsandbytes."""


Linear4bit.__module__ = "bitsandbytes.nn.modules"


class Int4Tensor(torch.Tensor):
    """To inject, a weight of torchao. Only F.linear sees through it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


Int4Tensor.__module__ = "torchao.quantization.quantize_.workflows"


class Half(torch.nn.Module):
    """A layer without a backward."""

    in_features, out_features = K, N

    def forward(self, x):
        with torch.no_grad():
            return torch.ones(*x.shape[:-1], N, dtype=x.dtype, device=x.device)


def make(dtype=torch.float32, base=None, **options):
    """With an A, a B and a gate that are none of them zero."""
    base = Int8Linear() if base is None else base
    layer = LoRAAdapter(base, r=R, init=False, **options).to(DEVICE, dtype)
    return layer


def trained(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def results(fn, x, parameters, dy):
    y = fn(x)
    return [y, *torch.autograd.grad(y, [x, *parameters], dy)]


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("lead", [(M,), (2, 3, 5), (), (0,)], ids=str)
def test_output_and_gradients_in_fp64(dtype, gate, p, lead):
    layer = make(dtype, gate=gate, lora_dropout=p)
    x = torch.randn(*lead, K, dtype=dtype, device=DEVICE).requires_grad_()
    dy = torch.randn(*lead, N, dtype=dtype, device=DEVICE)
    torch.manual_seed(3)
    ours = results(layer, x, trained(layer), dy)
    torch.manual_seed(3)
    seed = fl.reference.draw_seed(x.device) if p else None

    def plain(x, weight, bias, a, b, *rest):
        *g, dy = rest

        def fn(x):
            base = F.linear(x, weight, bias)
            options = {"gate": g[0] if g else None, "dropout_p": p, "seed": seed}
            return fl.reference.lora_add(base, x, a, b, scale=layer.scale, **options)

        return results(fn, x, [a, b, *g], dy)

    names = ["y", "dx", "da", "db", *(["dgate"] if gate else [])]
    base = layer.base_layer
    weights = base.dequantised(dtype), base.bias.to(dtype)
    assert_accurate(names, ours, plain, (x, *weights, *trained(layer), dy))


def test_the_mask_is_that_of_lora_linear():
    linear = torch.nn.Linear(K, N).to(DEVICE)
    ours, same = (
        kind(copy.deepcopy(linear), r=R, init=False, lora_dropout=0.5)
        for kind in (LoRAAdapter, LoRALinear.from_linear)
    )
    same.load_state_dict({k.removeprefix("base_layer."): t for k, t in ours.state_dict().items()})
    x = torch.randn(M, K, device=DEVICE)
    found = []
    for layer in (ours, same):
        x = x.detach().requires_grad_()
        torch.manual_seed(5)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_a, layer.lora_b))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.eval()(x), ours(x)) and not torch.equal(found[0][0], ours(x))


def test_the_start_is_the_base_bit_for_bit():
    x = torch.randn(M, K, device=DEVICE)
    for init in (True, "kaiming", "gaussian"):
        layer = LoRAAdapter(Int8Linear().to(DEVICE), r=R, init=init, gate=True)
        assert torch.equal(layer(x), layer.base_layer(x))
        assert layer.lora_a.abs().sum() > 0 and layer.gate.abs().sum() > 0
    assert torch.equal(LoRAAdapter(Int8Linear(), gate=True, gate_init="ones").gate, torch.ones(8))
    assert make(lora_alpha=6, use_rslora=True).scale == 6 / R**0.5


def test_hooks_of_the_base_run():
    layer, x = make(), torch.randn(M, K, device=DEVICE)
    before = layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(layer(x), before + 1)


def test_what_is_trained():
    """The base is frozen; the adapter alone is stepped."""
    layer, x = make(gate=True), torch.randn(M, K, device=DEVICE)
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert names == {"lora_a", "lora_b", "gate"}
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in trained(layer)) and layer.bias.grad is None


def test_a_base_without_a_gradient():
    layer, x = make(base=Half()), torch.randn(M, K, device=DEVICE)
    layer(x).sum().backward()  # of A and B alone
    assert layer.lora_a.grad is not None
    words = (
        f"the input requires a gradient, and {Half.__module__}.Half gives none of it; the gradient "
        f"of the adapter alone would be wrong"
    )
    with pytest.raises(RuntimeError) as raised:
        layer(x.requires_grad_())
    assert str(raised.value) == words
    with torch.no_grad():
        layer(x)


class Biased(Half):
    """A layer whose product has a backward or not, and whose bias is trained."""

    def __init__(self, through):
        super().__init__()
        self.linear, self.through = torch.nn.Linear(K, N), through
        self.bias = Parameter(torch.zeros(N))

    def forward(self, x):
        return self.linear(x if self.through else x.detach()).relu() + self.bias


def test_a_trained_bias_does_not_hide_that_there_is_no_gradient():
    leaf = torch.randn(M, K, device=DEVICE, requires_grad=True)
    for x in (leaf, leaf.tanh(), leaf.view(1, M, K)):
        for through in (True, False):
            layer = make(base=Biased(through))
            layer.bias.requires_grad_()
            layer(x.detach()).sum().backward()  # of A, B and the bias alone
            assert layer.bias.grad is not None
            if through:
                layer(x).sum().backward(retain_graph=True)
                continue
            with pytest.raises(RuntimeError, match="Biased gives none of it"):
                layer(x)


def test_nothing_of_the_size_of_the_weight_is_made():
    """All that forward and backward allocate is less than W0; x, A, B, the gate, h and the seed
    are kept."""

    class Borrowed(torch.nn.Module):
        in_features = out_features = 512

        def forward(self, x):
            return x * 2

    rows, n, r = 5, 512, 3
    layer = LoRAAdapter(Borrowed(), r=r, lora_dropout=0.3, gate=True, init=False).to(DEVICE)
    x = torch.randn(rows, n, device=DEVICE, requires_grad=True)
    size, _ = saved_bytes(lambda: layer(x))
    assert size == 4 * (rows * n + 2 * r * n + r + rows * r) + 8
    layer(x).sum().backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(x).sum().backward()
    own = [max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in profile.events()]
    assert 4 * rows * n < sum(size for size in own if size > 0) < 4 * n * n


def test_autocast_and_compile():
    layer, x = make(gate=True), torch.randn(M, K, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = layer(x)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert y.dtype == torch.float16 and dx.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=1e-2, atol=0.1)

    layer = make(base=torch.nn.Linear(K, N), lora_dropout=0.3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for fn in (layer, compiled):
        torch.manual_seed(1)
        found.append(results(fn, x, trained(layer), torch.ones(M, N, device=DEVICE)))
    assert all(torch.equal(u, v) for u, v in zip(*found, strict=True))


# What it is


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.float16)])
def test_the_gate_stays_fp32(move):
    layer = make(gate=True)
    layer.gate.grad = torch.full_like(layer.gate, 1 / 3)
    with torch.no_grad():
        layer.gate.fill_(1 / 3)
    assert move(layer) is layer
    assert layer.lora_a.dtype == layer.lora_b.dtype == layer.bias.dtype == torch.float16
    assert layer.weight.dtype == torch.int8
    for t in (layer.gate, layer.gate.grad):
        assert torch.equal(t, torch.full((R,), 1 / 3, device=DEVICE))


def test_dtypes_and_devices_of_the_adapter():
    assert LoRAAdapter(torch.nn.Linear(3, 2, dtype=torch.bfloat16)).lora_a.dtype == torch.bfloat16
    assert make().lora_b.dtype == torch.float32
    assert LoRAAdapter(Int8Linear(), adapter_dtype=torch.float16).lora_b.dtype == torch.float16
    assert LoRAAdapter(torch.nn.Linear(3, 2, device="meta")).lora_a.is_meta
    masters = LoRAAdapter(Int8Linear(), r=R, init=False)
    y = masters(torch.randn(M, K, dtype=torch.float16))
    assert y.dtype == torch.float16


def test_state_dict():
    """The names are PEFT's for the base, and the values come back."""
    layer = make(gate=True)
    keys = ["lora_a", "lora_b", "gate", "base_layer.weight", "base_layer.bias"]
    assert list(layer.state_dict()) == keys
    other = make(gate=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(M, K, device=DEVICE)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_swap():
    layer, x = make(gate=True, lora_alpha=8), torch.randn(M, K, device=DEVICE)
    a, b, gate = torch.randn(2, K), torch.randn(N, 2), torch.randn(2)
    old = layer.lora_a
    layer.swap(a, b, gate=gate)
    assert (layer.r, layer.scale) == (2, 4.0) and layer.lora_a is not old
    want = layer.base_layer(x) + 4 * ((x @ a.to(x).t()) * gate.to(x)) @ b.to(x).t()
    torch.testing.assert_close(layer(x), want)
    old = layer.lora_a
    layer.swap(a, b, scale=3.0)
    assert (layer.lora_alpha, layer.scale) == (6.0, 3.0) and layer.lora_a is old
    assert torch.equal(layer.gate, torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match=r"LoRAAdapter.swap: lora_b must have shape \[N, R\]"):
        layer.swap(a, b.t())


def test_merging_is_refused():
    model = torch.nn.Sequential(LoRALinear(N, K), make())
    words = (
        f"'1' is a LoRAAdapter around a {Int8Linear.__module__}.Int8Linear, which alone knows how "
        f"its weight is written; only a LoRALinear can be merged"
    )
    for refused in (fl.merge, fl.unmerge):
        with pytest.raises(NotImplementedError) as raised:
            refused(model)
        assert str(raised.value) == words and not model[0].merged
    with pytest.raises(NotImplementedError) as raised:
        model[1].merge()
    assert str(raised.value) == words.replace("'1'", "this layer")


def test_repr():
    layer = make(lora_alpha=8, lora_dropout=0.25)
    text = "in_features=24, out_features=20, r=4, lora_alpha=8, scale=2, lora_dropout=0.25"
    assert layer.extra_repr() == text


THIS = Int8Linear.__module__
BAD = {
    "no module": (
        [torch.ones(3)],
        {},
        TypeError,
        "base_module must be a torch.nn.Module, got Tensor",
    ),
    "convolution": (
        [torch.nn.Conv1d(3, 4, 1), 3, 4],
        {},
        TypeError,
        "base_module is a torch.nn.modules.conv.Conv1d; a layer that maps [..., K] to [..., N] is "
        "wanted, and a convolution does not",
    ),
    "adapted": (
        [LoRALinear(3, 4)],
        {},
        TypeError,
        "base_module is a fused_lora.nn.linear.LoRALinear, which has an adapter already",
    ),
    "adapted by this": (
        [LoRAAdapter(torch.nn.Linear(3, 4))],
        {},
        TypeError,
        "base_module is a fused_lora.nn.adapter.LoRAAdapter, which has an adapter already",
    ),
    "no features": (
        [torch.nn.Identity()],
        {},
        TypeError,
        "base_module is a torch.nn.modules.linear.Identity without in_features; pass in_features, "
        "if it maps [..., K] to [..., N]",
    ),
    "one of the features": (
        [torch.nn.Identity(), 3],
        {},
        TypeError,
        "base_module is a torch.nn.modules.linear.Identity without out_features; pass "
        "out_features, if it maps [..., K] to [..., N]",
    ),
    "other features": (
        [Int8Linear(), K, 7],
        {},
        ValueError,
        "out_features is 7, yet base_module.out_features is 20",
    ),
    "features": (
        [torch.nn.Identity(), 3.0, 3],
        {},
        TypeError,
        "in_features must be an int, got 3.0 of type float",
    ),
    "no in feature": (
        [torch.nn.Identity(), 0, 3],
        {},
        ValueError,
        "in_features must be at least 1, got 0",
    ),
    "r": ([Int8Linear()], {"r": 0}, ValueError, "r must be at least 1, got 0"),
    "alpha": (
        [Int8Linear()],
        {"lora_alpha": "8"},
        TypeError,
        "lora_alpha must be a number, got '8' of type str",
    ),
    "p": (
        [Int8Linear()],
        {"lora_dropout": 2},
        ValueError,
        "lora_dropout must lie in [0, 1], got 2",
    ),
    "init": (
        [Int8Linear()],
        {"init": "xavier"},
        ValueError,
        "init must be one of True, False, 'kaiming', 'gaussian', got 'xavier'",
    ),
    "gate": ([Int8Linear()], {"gate": 1}, ValueError, "gate must be one of True, False, got 1"),
    "gate_init": (
        [Int8Linear()],
        {"gate_init": "zeros"},
        ValueError,
        "gate_init must be one of 'normal', 'ones', got 'zeros'",
    ),
    "adapter_dtype": (
        [Int8Linear()],
        {"adapter_dtype": torch.int8},
        TypeError,
        "adapter_dtype must be None, float32, bfloat16, float16, float64, got int8",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case):
    args, options, error, message = BAD[case]
    before = isinstance(args[0], Int8Linear) and args[0].bias.requires_grad
    with pytest.raises(error) as raised:
        LoRAAdapter(*args, **options)
    assert str(raised.value) == message
    assert before == (isinstance(args[0], Int8Linear) and args[0].bias.requires_grad)


def test_a_base_of_another_shape_or_dtype():
    x = torch.randn(M, 3, device=DEVICE)
    layer = LoRAAdapter(torch.nn.Identity(), 3, 4).to(DEVICE)
    with pytest.raises(
        ValueError, match=r"lora_b must have shape \[N, R\] = \[3, 8\], got \[4, 8\]"
    ):
        layer(x)
    layer = LoRAAdapter(torch.nn.Flatten(0), 3, 3).to(DEVICE)
    with pytest.raises(ValueError, match="base_out must have shape"):
        layer(x)
    layer = LoRAAdapter(torch.nn.Identity(), 3, 3).to(DEVICE)
    layer.base_layer.register_forward_hook(lambda module, args, out: out.half())
    with pytest.raises(TypeError, match="base_out must have x's dtype float32, got float16"):
        layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, out: (out, None))
    with pytest.raises(TypeError, match=r"base_out must be a torch\.Tensor, got tuple"):
        layer(x.requires_grad_())


# In a model


class Model(torch.nn.Module):
    """A quantised layer, one of torchao's weights, and a plain one."""

    def __init__(self):
        super().__init__()
        self.q, self.v, self.o = Linear4bit(K, K), torch.nn.Linear(K, K), torch.nn.Linear(K, N)
        quantised = Int4Tensor(self.v.weight.detach())
        self.v.weight = Parameter(quantised, requires_grad=False)

    def forward(self, x):
        return self.o(self.v(self.q(x)).tanh())


def build(config=None):
    torch.manual_seed(1)
    model = Model().to(DEVICE)
    if config is None:
        return model
    config = fl.LoRAConfig(**{"target_modules": "all-linear", "init_lora_weights": False} | config)
    return fl.inject(model, config)


def test_inject():
    x = torch.randn(M, K, device=DEVICE)
    model = build(
        {"r": 3, "rank_pattern": {"v": 2}, "lora_dropout": 0.5, "init_lora_weights": True}
    )
    assert [type(m) for m in (model.q, model.v, model.o)] == [LoRAAdapter, LoRAAdapter, LoRALinear]
    assert (model.q.r, model.v.r, model.q.lora_dropout) == (3, 2, 0.5)
    assert torch.equal(model(x), build()(x))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{layer}.{part}" for layer in "qvo" for part in ("lora_a", "lora_b")}
    with pytest.raises(RuntimeError, match="model has adapters already"):
        fl.inject(model, fl.LoRAConfig(target_modules=["o"]))

    x.requires_grad_()
    model = build({"gate": True, "bias": "lora_only"})
    model(x).square().sum().backward()
    assert model.q.gate is not None and model.v.gate.grad is not None and x.grad is not None
    assert model.v.bias is model.v.base_layer.bias and model.v.bias.grad is not None


def test_inject_refuses():
    model = build()
    before = {name: id(p) for name, p in model.named_parameters()}
    config = fl.LoRAConfig(target_modules=["q"], adalora=True)
    with pytest.raises(TypeError) as raised:
        fl.inject(model, config)
    assert str(raised.value) == (
        "target module 'q' is a bitsandbytes.nn.modules.Linear4bit, quantised; adalora is for "
        "plain torch.nn.Linear"
    )
    with pytest.raises(TypeError, match="adapter_dtype must be None, float32"):
        fl.inject(model, fl.LoRAConfig(target_modules=["q"]), adapter_dtype=torch.int8)
    with pytest.raises(TypeError, match=r"model is itself a linear layer.*; use LoRAAdapter"):
        fl.inject(model.q, fl.LoRAConfig(target_modules="all-linear"))
    with pytest.raises(TypeError, match=r"target module 'q' is a .*Int8Linear; only a plain"):
        fl.inject(torch.nn.ModuleDict({"q": Int8Linear()}), fl.LoRAConfig(target_modules=["q"]))
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_optimisers_find_it():
    model = build({"r": R, "gate": True})
    assert list(fl.optim.named_gates(model)) == ["q", "v", "o"]
    groups = {g["name"]: g["params"] for g in fl.optim.lora_plus_groups(model, lr=1e-3)}
    assert [len(groups[name]) for name in ("A", "B")] == [3, 3] and "1-d" not in groups
    with torch.no_grad():
        model.q.gate[1:] = 0
    assert fl.optim.kept_parameters(model) == (2 * K + 1) * (1 + R) + (K + N + 1) * R
    assert fl.optim.GateLog(model).record(0)["kept"] == {"q": 1, "v": R, "o": R}
    with pytest.raises(TypeError, match=r"'q' is a fused_lora\.nn\.adapter\.LoRAAdapter; only"):
        fl.optim.prune(model)
    assert model.o.r == R


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "rank_pattern": {"v": 5}, "bias": "lora_only"},
        {"r": 3, "bias": "all", "use_rslora": True},
        {"r": 3, "gate": True},
    ],
    ids=["ranks", "biases", "gates"],
)
def test_there_and_back(options, tmp_path):
    """Into a model without adapters, and into one that has them."""
    model, x = build(options), torch.randn(M, K, device=DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    fl.save_adapter(model, tmp_path)
    for other in (build(), build(options)):
        fl.load_adapter(other, tmp_path)
        assert type(other.q) is type(other.v) is LoRAAdapter
        assert torch.equal(other(x), model(x))
    if options.get("gate"):
        fl.save_adapter(model, tmp_path, fold_gate=True)
        folded = fl.load_adapter(build(), tmp_path)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-3)


def test_into_peft(tmp_path):
    """The same names and values as PEFT's layers have, quantised or not."""
    peft = pytest.importorskip("peft")
    model, x = build({"r": 3, "bias": "lora_only"}), torch.randn(M, K, device=DEVICE)
    with torch.no_grad():
        model.q.bias.normal_()
    fl.save_adapter(model, tmp_path)
    plain = build()
    for name in ("q", "v"):
        quantised = getattr(plain, name)
        linear = torch.nn.Linear(K, K).to(DEVICE)
        known = isinstance(quantised, Linear4bit)
        weight = quantised.dequantised(torch.float32) if known else quantised.weight
        linear.weight.data.copy_(weight.as_subclass(torch.Tensor))
        linear.bias.data.copy_(quantised.bias)
        setattr(plain, name, linear)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, tmp_path)(x), model(x))


def test_what_is_not_loaded(tmp_path):
    of_q = {"target_modules": ["q"], "r": 3}
    model = build(of_q)
    fl.save_adapter(model, tmp_path)
    smaller = build(of_q | {"r": 2})
    with pytest.raises(
        ValueError, match=r"lora_a of q has shape \[3, 24\]; the model's has \[2, 24\]"
    ):
        fl.load_adapter(smaller, tmp_path)
    fl.save_adapter(build(of_q | {"gate": True}), tmp_path)
    with pytest.raises(ValueError, match="has a gate for q, which is a LoRAAdapter; fold"):
        fl.load_adapter(model, tmp_path)
    with pytest.raises(TypeError, match="model is itself an adapted layer"):
        fl.save_adapter(model.q, tmp_path)
