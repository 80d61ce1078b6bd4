"""LoRALinear, SoRALinear and AdaLoRALinear: the layer, its life as a module, and merging."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch.nn import Linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_lora.nn import AdaLoRALinear, LoRALinear, SoRALinear
from fused_lora.nn import linear as of_one_adapter
from fused_lora.testing import assert_accurate

K, N, R = 24, 18, 5
all_three = pytest.mark.parametrize("cls", (LoRALinear, SoRALinear, AdaLoRALinear))
both = pytest.mark.parametrize("cls", (LoRALinear, SoRALinear))
halves = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
keep_bases = pytest.mark.parametrize("keep_base", ("none", "cpu", "device"))


def make(cls=LoRALinear, dtype=torch.float32, bias=True, k=K, n=N, **kwargs):
    linear = Linear(k, n, bias=bias, device=DEVICE, dtype=dtype)
    return cls.from_linear(linear, **{"r": R, "init": False, **kwargs})


def inputs(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape, device=DEVICE, dtype=dtype, requires_grad=grad)


def formula(layer, x):
    """y = x W0^T + b + scale ((x A^T) * g) B^T in the dtype of x, gradients by autograd."""
    weight, a, b = (t.to(x.dtype) for t in (layer.weight, layer.lora_a, layer.lora_b))
    gate = 1 if layer.gate is None else layer.gate.to(x.dtype)
    bias = 0 if layer.bias is None else layer.bias.to(x.dtype)
    return x @ weight.T + bias + layer.scale * ((x @ a.T) * gate) @ b.T


def trained(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def gradients(fn, layer, x, dy):
    y = fn(x)
    wanted = [x, *trained(layer).values()]
    return [y, *torch.autograd.grad(y, wanted, dy)]


# The layer


@both
@pytest.mark.parametrize("init", ("kaiming", True, "gaussian"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_starts_as_the_frozen_layer_bit_for_bit(cls, init, dtype):
    linear = Linear(K, N, device=DEVICE, dtype=dtype)
    x = inputs(7, K, dtype=dtype)
    want = linear(x)
    layer = cls.from_linear(linear, r=R, init=init, lora_dropout=0.3)
    assert layer.lora_a.any() and not layer.lora_b.any()
    for training in (True, False):
        assert torch.equal(layer.train(training)(x), want)


@all_three
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("lead", ((), (6,), (3, 2), (2, 3, 2), (0,), (2, 0)))
def test_output_and_gradients_in_fp64(cls, bias, lead):
    layer = make(cls, torch.float64, bias)
    x = inputs(*lead, K, dtype=torch.float64, grad=True)
    dy = inputs(*lead, N, dtype=torch.float64)
    ours, want = (
        gradients(layer, layer, x, dy),
        gradients(lambda x: formula(layer, x), layer, x, dy),
    )
    names = ("y", "x", *trained(layer))
    for name, got, expected in zip(names, ours, want, strict=True):
        # The gate is fp32 at every dtype, and so is its gradient.
        tolerance = 1e-6 if name == "gate" else 1e-12
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=name)


@all_three
@halves
@pytest.mark.parametrize("masters", (False, True))
def test_half_precision_with_and_without_fp32_masters(cls, dtype, masters):
    layer = make(cls, dtype, adapter_dtype=torch.float32 if masters else None)
    adapter = torch.float32 if masters else dtype
    assert layer.lora_a.dtype == layer.lora_b.dtype == adapter
    assert layer.gate is None or layer.gate.dtype == torch.float32
    x, dy = inputs(33, K, dtype=dtype, grad=True), inputs(33, N, dtype=dtype)

    def plain(x, dy, weight, bias, lora_a, lora_b, gate=None):
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        h = x @ a.T if gate is None else ((x @ a.T) * gate).to(x.dtype)
        y = F.linear(x, weight, bias) + layer.scale * (h @ b.T)
        wanted = [t for t in (x, lora_a, lora_b, gate) if t is not None]
        return [y, *torch.autograd.grad(y, wanted, dy)]

    ours = gradients(layer, layer, x, dy)
    names = ("y", "x", *trained(layer))
    assert_accurate(names, ours, plain, (x, dy, *layer.parameters()))
    assert ours[2].dtype == ours[3].dtype == adapter


@all_three
def test_frozen_parameters_get_no_gradient(cls):
    layer = make(cls)
    layer(inputs(4, K, grad=True)).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    gate = set() if cls is LoRALinear else {"gate"}
    assert set(trained(layer)) == {"lora_a", "lora_b"} | gate
    assert all(p.grad.any() for p in trained(layer).values())


@all_three
def test_from_linear_shares_the_parameters_and_keeps_the_mode(cls):
    linear = Linear(K, N, device=DEVICE).eval()
    weight, bias = linear.weight, linear.bias
    layer = cls.from_linear(linear, r=3)
    assert layer.weight is weight and layer.bias is bias and not layer.training
    assert not weight.requires_grad and not bias.requires_grad
    assert isinstance(layer, Linear) and type(layer) is cls
    assert (layer.in_features, layer.out_features) == (K, N)
    assert cls.from_linear(Linear(K, N, bias=False)).bias is None
    assert cls.from_linear(Linear(K, N)).training


@all_three
def test_constructor_is_that_of_linear(cls):
    layer = cls(K, N, False, DEVICE, torch.bfloat16, r=3, init=False)
    assert layer.bias is None and layer.weight.dtype == layer.lora_b.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    torch.manual_seed(3)
    plain = Linear(K, N)
    torch.manual_seed(3)
    assert torch.equal(cls(K, N).weight, plain.weight)


@all_three
def test_meta_device(cls):
    layer = cls.from_linear(Linear(K, N, device="meta", dtype=torch.bfloat16))
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.empty(3, K, device="meta", dtype=torch.bfloat16)).shape == (3, N)
    empty = layer.to_empty(device=DEVICE)
    assert {p.device.type for p in empty.parameters()} == {DEVICE}


def assert_drawn(layer):
    """The adapter is one that was just made."""
    zero = layer.gate if isinstance(layer, AdaLoRALinear) else layer.lora_b
    assert layer.lora_a.isfinite().all() and layer.lora_a.all() and not zero.any()
    assert layer.lora_b.isfinite().all()
    assert layer.gate is None or layer.gate.isfinite().all()


@all_three
@pytest.mark.parametrize("where", ("built", "moved", "moved while merged"))
def test_what_comes_from_the_meta_device_has_an_adapter(cls, where):
    if where == "built":
        with torch.device("meta"):
            layer = cls(K, N, r=R)
    else:
        layer = make(cls)
        layer.init = True
        if where == "moved while merged":
            layer.merge("cpu")
        layer = layer.to("meta")
    layer.to_empty(device=DEVICE)
    assert_drawn(layer)
    base = Linear(K, N, device=DEVICE)
    layer.load_state_dict(base.state_dict(), strict=False)
    x = inputs(3, K)
    assert torch.equal(layer(x), base(x)) and not layer.merged


@all_three
def test_reset_parameters_draws_what_is_trained_alone(cls):
    layer = make(cls)
    layer.init = True
    before = state(layer)
    layer.reset_parameters()
    assert_drawn(layer)
    assert not torch.equal(layer.lora_a, before["lora_a"])
    assert torch.equal(layer.weight, before["weight"]) and torch.equal(layer.bias, before["bias"])
    layer.merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before resetting"):
        layer.reset_parameters()


def test_scale():
    assert make(r=4, lora_alpha=6).scale == 1.5
    assert make(r=4, lora_alpha=6, use_rslora=True).scale == 3.0


def test_rank_above_the_size_of_the_weight():
    layer = make(r=4 * K)
    x = inputs(5, K)
    torch.testing.assert_close(layer(x), formula(layer, x))


def test_initialisation_and_reset():
    torch.manual_seed(0)
    layer = LoRALinear(1024, 8, r=64, init="gaussian", device=DEVICE)
    assert abs(layer.lora_a.std().item() * 64 - 1) < 0.05
    layer = LoRALinear(1024, 8, r=64, device=DEVICE)
    bound = 1 / math.sqrt(1024)
    assert 0.99 * bound < layer.lora_a.abs().max() <= bound
    assert abs(layer.lora_a.std().item() / (bound / math.sqrt(3)) - 1) < 0.05
    before = layer.lora_a.clone()
    torch.nn.init.ones_(layer.lora_b)
    layer.reset_lora_parameters()
    assert not torch.equal(layer.lora_a, before) and not layer.lora_b.any()


def test_gate_initialisation_and_reset():
    torch.manual_seed(0)
    layer = SoRALinear(8, 8, r=4096, device=DEVICE)
    assert layer.gate.shape == (4096,) and layer.gate.dtype == torch.float32
    # Six standard deviations.
    assert abs(layer.gate.mean().item()) < 6 / 64 and abs(layer.gate.std().item() - 1) < 6 / 90
    layer = SoRALinear(8, 8, r=16, device=DEVICE, gate_init="ones")
    assert (layer.gate == 1).all()
    torch.nn.init.zeros_(layer.gate)
    layer.reset_lora_parameters()
    assert (layer.gate == 1).all()


def test_dropout_acts_in_training_alone_and_on_the_adapter_alone():
    layer, x = make(lora_dropout=0.5), inputs(64, K)
    base = F.linear(x, layer.weight, layer.bias)
    layer.eval()
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    torch.nn.init.zeros_(layer.lora_b)
    assert torch.equal(layer(x), base)


def test_dropout_of_everything_is_the_base():
    layer, x = make(lora_dropout=1), inputs(9, K, grad=True)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    da, db = torch.autograd.grad(y.sum(), (layer.lora_a, layer.lora_b))
    assert not da.any() and not db.any()


def test_extra_repr():
    text = repr(make(lora_dropout=0.1, lora_alpha=10))
    assert text.startswith("LoRALinear(in_features=24, out_features=18, bias=True, r=5")
    assert "lora_alpha=10, scale=2, lora_dropout=0.1" in text
    layer = make()
    layer.merge()
    assert "dropout" not in repr(layer) and repr(layer).endswith(", merged)")


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    (
        (TypeError, {"r": True}, "r must be an int, got True of type bool"),
        (TypeError, {"r": 4.0}, "r must be an int, got 4.0"),
        (TypeError, {"r": "4"}, "r must be an int, got '4'"),
        (ValueError, {"r": 0}, "r must be at least 1, got 0"),
        (TypeError, {"lora_alpha": "16"}, "lora_alpha must be a number"),
        (ValueError, {"lora_alpha": math.inf}, "lora_alpha must be finite"),
        (ValueError, {"lora_alpha": 1e39}, r"lora_alpha must be finite in fp32, got 1e\+39"),
        (ValueError, {"lora_alpha": 10**400}, r"lora_alpha must be finite in fp32, got 100"),
        (ValueError, {"lora_dropout": 1.5}, r"lora_dropout must lie in \[0, 1\], got 1.5"),
        (ValueError, {"lora_dropout": -0.1}, "lora_dropout"),
        (ValueError, {"lora_dropout": math.nan}, "lora_dropout must be finite"),
        (ValueError, {"init": "pissa"}, "init must be one of True, False, 'kaiming', 'gaussian'"),
        (ValueError, {"init": 1}, "init must be one of"),
        (TypeError, {"adapter_dtype": torch.float16}, "adapter_dtype must be None, the weight's"),
    ),
)
def test_bad_arguments(error, arguments, words):
    linear = Linear(K, N, dtype=torch.bfloat16)
    for cls in (LoRALinear, SoRALinear):
        with pytest.raises(error, match=words):
            cls.from_linear(linear, **arguments)
        with pytest.raises(error, match=words):
            cls(K, N, dtype=torch.bfloat16, **arguments)
    assert linear.weight.requires_grad


def test_bad_gate_init():
    with pytest.raises(ValueError, match="gate_init must be one of 'normal', 'ones', got 'zeros'"):
        SoRALinear(K, N, gate_init="zeros")
    with pytest.raises(ValueError, match="gate_init"):
        SoRALinear.from_linear(Linear(K, N), gate_init=None)


class Linear4bit(Linear):
    pass


class Packed(torch.Tensor):
    pass


def _with(change):
    linear = Linear(4, 4)
    change(linear)
    return linear


REFUSED = {
    r"Linear4bit; only a plain torch\.nn\.Linear": lambda: Linear4bit(4, 4),
    "NonDynamicallyQuantizableLinear": lambda: torch.nn.MultiheadAttention(4, 2).out_proj,
    r"torch\.nn\.modules\.conv\.Conv2d": lambda: torch.nn.Conv2d(4, 4, 1),
    "is a fused_lora.nn.linear.LoRALinear": lambda: LoRALinear(4, 4),
    "ParametrizedLinear": lambda: torch.nn.utils.parametrizations.weight_norm(Linear(4, 4)),
    "weight must have dtype .*, got complex64": lambda: Linear(4, 4, dtype=torch.complex64),
    "weight must have dtype .*, got float8_e4m3fn": lambda: _with(
        lambda m: setattr(m, "weight", torch.nn.Parameter(m.weight.to(torch.float8_e4m3fn)))
    ),
    "weight is a Packed": lambda: _with(
        lambda m: setattr(m, "weight", torch.nn.Parameter(m.weight.detach().as_subclass(Packed)))
    ),
    r"weight is a Parameter of layout torch\.sparse_coo": lambda: _with(
        lambda m: setattr(m, "weight", torch.nn.Parameter(m.weight.detach().to_sparse()))
    ),
    "has hooks": lambda: _with(lambda m: m.register_forward_hook(lambda *args: None)),
    "has hooks or its own forward": lambda: _with(lambda m: setattr(m, "forward", lambda x: x)),
    "has a parameter 'extra'": lambda: _with(
        lambda m: m.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_only_plain_linears_are_taken(words):
    with pytest.raises(TypeError, match=words):
        LoRALinear.from_linear(REFUSED[words]())


# The life of a module


@all_three
def test_state_dict_keys_and_round_trip(cls):
    layer, other = make(cls), make(cls)
    keys = ["weight", "bias", "lora_a", "lora_b"] + ([] if cls is LoRALinear else ["gate"])
    assert list(layer.state_dict()) == keys
    other.load_state_dict(layer.state_dict())
    x = inputs(3, K)
    assert torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict(), assign=True)
    assert not other.weight.requires_grad and other.lora_a.requires_grad


def test_the_checkpoint_of_the_base_loads():
    linear, layer = Linear(K, N, device=DEVICE), make()
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert missing == ["lora_a", "lora_b"] and not unexpected
    assert torch.equal(layer.weight, linear.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(linear.state_dict())


@keep_bases
def test_state_dict_of_a_merged_layer(keep_base):
    layer, x = make(), inputs(3, K)
    layer.merge(keep_base)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert list(state) == ["weight", "bias", "lora_a", "lora_b"]
    linear = Linear(K, N, device=DEVICE)
    linear.load_state_dict(state, strict=False)
    assert torch.equal(linear(x), layer(x))
    with pytest.raises(RuntimeError, match="its adapter would count twice"):
        make().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"1 is merged; call unmerge\(\) before loading"):
        torch.nn.Sequential(Linear(3, 3), layer).load_state_dict(
            torch.nn.Sequential(Linear(3, 3), make()).state_dict()
        )
    layer.unmerge()
    make().load_state_dict(layer.state_dict())


@all_three
@keep_bases
@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_deepcopy_and_pickle_of_a_merged_layer(cls, keep_base, duplicate):
    layer, x = make(cls), inputs(3, K)
    before = layer.weight.clone()
    layer.merge(keep_base)
    twin = duplicate(layer)
    assert twin.merged and torch.equal(twin(x), layer(x))
    twin.unmerge()
    assert layer.merged and not twin.merged
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    if keep_base == "none":
        torch.testing.assert_close(twin.weight, before)
    else:
        assert torch.equal(twin.weight, before)


@pytest.mark.parametrize("convert", ("half", "bfloat16", "double", "to"))
def test_the_gate_stays_fp32(convert):
    layer = make(SoRALinear)
    layer(inputs(3, K)).sum().backward()
    gate, grad = layer.gate, layer.gate.grad.clone()
    values = gate.detach().clone()
    model = torch.nn.Sequential(layer)
    model.to(DEVICE, torch.float16) if convert == "to" else getattr(model, convert)()
    assert layer.weight.dtype == layer.lora_a.dtype == layer.lora_a.grad.dtype != torch.float32
    assert layer.gate is gate and gate.dtype == gate.grad.dtype == torch.float32
    assert torch.equal(gate, values) and torch.equal(gate.grad, grad)
    y = layer(inputs(3, K, dtype=layer.weight.dtype))
    assert y.dtype == layer.weight.dtype
    meta = layer.to("meta")
    assert meta.gate.device.type == "meta" and meta.gate.dtype == torch.float32


@pytest.mark.parametrize("keep_base", ("cpu", "device"))
def test_a_kept_base_follows_the_weight(keep_base):
    layer = make()
    want = layer.weight.detach().bfloat16()
    layer.merge(keep_base)
    layer.bfloat16()
    assert layer._base.dtype == torch.bfloat16
    gone = copy.deepcopy(layer).to("meta")
    assert gone._base.device.type == ("cpu" if keep_base == "cpu" else "meta")
    layer.unmerge()
    assert torch.equal(layer.weight, want)


@all_three
def test_activation_checkpointing_with_dropout(cls):
    layer, x = make(cls, lora_dropout=0.4), inputs(16, K, grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(11)
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained(layer).values()])])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@all_three
@pytest.mark.parametrize("p", (0.0, 0.3))
def test_compiles_without_a_graph_break(cls, p):
    torch.compiler.reset()
    layer, x = make(cls, lora_dropout=p), inputs(6, K, grad=True)
    dy = inputs(6, N)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        torch.manual_seed(2)
        results.append(gradients(call, layer, x, dy))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    layer.merge()
    torch.testing.assert_close(compiled(x), layer(x))


# Merging


def merged_in_fp64(layer):
    gate = torch.ones(layer.r) if layer.gate is None else layer.gate.detach().cpu()
    a, b = layer.lora_a.detach().cpu().double(), layer.lora_b.detach().cpu().double()
    return layer.weight.detach().cpu().double() + layer.scale * (b * gate.double()) @ a


def half_ulp(t):
    return torch.finfo(t.dtype).eps / 2 * t.detach().cpu().double().abs()


@all_three
@keep_bases
@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str
)
@pytest.mark.parametrize("masters", (False, True))
@pytest.mark.parametrize("block", (1, 100, 1 << 22))
def test_merge_rounds_once_and_unmerge_gives_back(
    cls, keep_base, dtype, masters, block, monkeypatch
):
    monkeypatch.setattr(of_one_adapter, "_MERGE_BLOCK", block)
    layer = make(cls, dtype, adapter_dtype=torch.float32 if masters else None).eval()
    weight, before, want = layer.weight, layer.weight.detach().clone(), merged_in_fp64(layer)
    # What the fp32 (fp64) sum may add to the one rounding.
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    slack = 8 * wide * merged_in_fp64(layer).abs().max()
    layer.merge(keep_base)
    assert layer.merged and layer.weight is weight and weight.dtype == dtype
    assert ((weight.cpu().double() - want).abs() <= 1.01 * half_ulp(weight) + slack).all()
    x = inputs(4, K, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))
    bound = half_ulp(weight)
    layer.unmerge()
    assert not layer.merged and layer.weight is weight and layer._base is None
    if keep_base == "none":
        back = (weight.cpu().double() - before.cpu().double()).abs()
        assert (back <= 1.01 * (bound + half_ulp(weight)) + 2 * slack).all()
    else:
        assert torch.equal(weight, before)


def test_the_adapter_survives_a_merge_in_bf16():
    """Deltas below the last place of a weight are lost one by one, but rounding is not biased."""
    layer = make(dtype=torch.bfloat16, k=256, n=256)
    torch.nn.init.normal_(layer.lora_b, std=0.01)
    x = inputs(64, 256, dtype=torch.bfloat16)
    want = formula(layer, x.double())
    before = (layer(x).double() - want).norm()
    layer.merge()
    assert (layer(x).double() - want).norm() < 2.5 * before


def test_how_many_bf16_weights_do_not_come_back():
    layer = make(dtype=torch.bfloat16, k=512, n=512, r=8)
    torch.nn.init.normal_(layer.lora_b, std=0.01)
    before = layer.weight.detach().clone()
    layer.merge()
    layer.unmerge()
    changed = (layer.weight != before).double().mean().item()
    assert 0 < changed < 0.4


@halves
def test_ten_merges_drift_no_further_than_one(dtype):
    layer = make(dtype=dtype)
    before = layer.weight.detach().cpu().double()
    layer.merge()
    bound = half_ulp(layer.weight)
    layer.unmerge()
    for _ in range(9):
        layer.merge()
        layer.unmerge()
    drift = (layer.weight.detach().cpu().double() - before).abs()
    assert (drift <= 2 * (bound + half_ulp(layer.weight))).all()


class LargestAllocation(TorchDispatchMode):
    """The bytes of the largest storage that an op makes, apart from the storages known before."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@halves
def test_no_second_weight_is_made(dtype, monkeypatch):
    monkeypatch.setattr(of_one_adapter, "_MERGE_BLOCK", 4096)
    layer = make(SoRALinear, dtype, k=128, n=1000, r=4)
    with LargestAllocation(*layer.parameters()) as mode:
        layer.merge()
        layer.swap(layer.lora_a.detach() + 1, layer.lora_b.detach() + 1)
        layer.unmerge()
    assert mode.largest <= max(4 * 4096, 4 * layer.lora_b.numel())


def test_merge_is_not_touched_by_autocast():
    layer = make()
    want = merged_in_fp64(layer)
    with torch.autocast(DEVICE, torch.bfloat16):
        layer.merge()
    torch.testing.assert_close(layer.weight.cpu().double(), want, rtol=1e-6, atol=1e-6)


def test_merging_inside_a_step_is_found_by_autograd():
    layer = make()
    y = layer(inputs(3, K, grad=True))
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@all_three
def test_wrong_states_raise_and_change_nothing(cls):
    layer = make(cls)
    weight = layer.weight.clone()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    with pytest.raises(ValueError, match="keep_base must be one of 'none', 'cpu', 'device', got 1"):
        layer.merge(1)
    assert torch.equal(layer.weight, weight) and not layer.merged
    layer.merge()
    weight = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"merged already; call unmerge\(\) first"):
        layer.merge("cpu")
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before resetting"):
        layer.reset_lora_parameters()
    assert torch.equal(layer.weight, weight) and layer._base is None


def unholdable(layer, value):
    """Let scale * B diag(g) A have a value at [1, 2] that the weight cannot hold."""
    with torch.no_grad():
        layer.lora_a[0].zero_()
        layer.lora_a[0, 2], layer.lora_b[1, 0] = 1, value / layer.scale
        if layer.gate is not None:
            layer.gate[0] = 1
    return layer


def state(layer):
    return {name: t.detach().clone() for name, t in layer.state_dict().items()}


def assert_unchanged(layer, before):
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@all_three
@keep_bases
@pytest.mark.parametrize(
    ("dtype", "value"),
    (
        (torch.float16, 1e5),
        (torch.float32, math.nan),
        (torch.bfloat16, -math.inf),
        (torch.float64, math.nan),
    ),
    ids=str,
)
@pytest.mark.parametrize("block", (1, 1 << 22))
def test_what_a_weight_cannot_hold_is_not_merged(cls, keep_base, dtype, value, block, monkeypatch):
    monkeypatch.setattr(of_one_adapter, "_MERGE_BLOCK", block)
    layer = unholdable(make(cls, dtype, adapter_dtype=torch.float32), value)
    weight = layer.weight.clone()
    words = f"this layer: weight would have values that {dtype} cannot hold"
    with pytest.raises(ValueError, match=words):
        layer.merge(keep_base)
    assert torch.equal(layer.weight, weight) and not layer.merged and layer._base is None


def test_what_comes_near_the_largest_value_is_merged():
    layer = unholdable(make(dtype=torch.float16, adapter_dtype=torch.float32), 6e4)
    want = merged_in_fp64(layer)
    layer.merge()
    assert layer.weight[1, 2] > 5.9e4
    torch.testing.assert_close(layer.weight.cpu().double(), want, rtol=1e-3, atol=1e-6)


@all_three
def test_unmerge_does_not_spoil_a_weight(cls):
    layer = make(cls, torch.float16)
    layer.merge()
    before = state(unholdable(layer, math.nan))
    with pytest.raises(ValueError, match=r"weight would have values that torch\.float16"):
        layer.unmerge()
    assert layer.merged and torch.equal(layer.weight, before["weight"])


@all_three
@keep_bases
@pytest.mark.parametrize("value", (math.nan, 1e5))
def test_a_swap_does_not_spoil_a_merged_weight(cls, keep_base, value):
    layer = make(cls, torch.float16)
    layer.merge(keep_base)
    before, scale, alpha = state(layer), layer.scale, layer.lora_alpha
    a, b = adapter(R + 1, torch.float16)
    a[:, 2], b[1] = 1, value
    with pytest.raises(ValueError, match="this layer: weight would have values that"):
        layer.swap(a, b, scale=3.0)
    assert_unchanged(layer, before)
    assert layer.merged and (layer.scale, layer.lora_alpha, layer.r) == (scale, alpha, R)


# Swapping


def adapter(r, dtype=torch.float32, n=N, k=K):
    return inputs(r, k, dtype=dtype), inputs(n, r, dtype=dtype)


@all_three
@pytest.mark.parametrize("rank", (R, R + 3, 1))
def test_swap_takes_the_other_adapter(cls, rank):
    layer, x = make(cls, lora_alpha=10), inputs(6, K)
    lora_a, lora_b = adapter(rank)
    old = layer.lora_a
    layer.swap(lora_a, lora_b)
    assert (layer.lora_a is old) == (rank == R)
    assert layer.r == rank and layer.scale == 10 / rank
    assert layer.lora_a.requires_grad and layer.lora_b.shape == (N, rank)
    # A gate that is not given is one.
    want = F.linear(x, layer.weight, layer.bias) + layer.scale * (x @ lora_a.T) @ lora_b.T
    torch.testing.assert_close(layer(x), want)
    layer.swap(lora_a, lora_b, scale=0.25)
    assert layer.scale == 0.25 and layer.lora_alpha == pytest.approx(0.25 * rank)
    lora_a.zero_()
    assert layer.lora_a.any()


def test_swap_of_a_gate():
    layer, x = make(SoRALinear), inputs(6, K)
    lora_a, lora_b = adapter(R)
    gate, old = torch.randn(R, dtype=torch.bfloat16), layer.gate
    layer.swap(lora_a, lora_b, scale=2, gate=gate)
    assert layer.gate is old and torch.equal(old.cpu(), gate.float())
    delta = 2 * ((x @ lora_a.T) * gate.to(x)) @ lora_b.T
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + delta)
    with pytest.raises(ValueError, match="this layer has no gate"):
        make().swap(lora_a, lora_b, gate=gate)


@all_three
@pytest.mark.parametrize("rank", (R, R + 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@keep_bases
def test_swap_while_merged(cls, rank, dtype, keep_base):
    layer = make(cls, dtype)
    before = layer.weight.detach().clone()
    layer.merge(keep_base)
    error = half_ulp(layer.weight)
    layer.swap(*adapter(rank, dtype), scale=0.7)
    assert layer.merged
    twin = make(cls, dtype)
    twin.weight.copy_(before)
    twin.swap(layer.lora_a, layer.lora_b, scale=0.7)
    want = merged_in_fp64(twin)
    slack = 8 * torch.finfo(torch.float32).eps * (want.abs().max() + error.max())
    if keep_base != "none":
        error = 0
    found = (layer.weight.cpu().double() - want).abs()
    assert (found <= 1.01 * (error + half_ulp(layer.weight)) + 4 * slack).all()
    layer.unmerge()
    if keep_base != "none":
        assert torch.equal(layer.weight, before)


def test_many_swaps_on_a_kept_base_do_not_drift():
    layer = make(dtype=torch.bfloat16)
    before = layer.weight.detach().clone()
    layer.merge("device")
    for _ in range(20):
        layer.swap(*adapter(R, torch.bfloat16))
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("error", "change", "words"),
    (
        (ValueError, {"lora_a": torch.ones(R, K + 1)}, r"lora_a must have shape \[R, K\]"),
        (ValueError, {"lora_a": torch.ones(R + 1, K)}, r"lora_b must have shape \[N, R\]"),
        (ValueError, {"lora_a": torch.ones(0, K)}, "the rank must be at least 1"),
        (ValueError, {"lora_b": torch.ones(R, N)}, r"= \[18, 5\], got \[5, 18\]"),
        (TypeError, {"lora_a": torch.ones(R, K).int()}, "lora_a must have dtype"),
        (TypeError, {"lora_b": [[1.0]]}, "lora_b must be a torch.Tensor, got list"),
        (ValueError, {"gate": torch.ones(R + 1)}, r"gate must have shape \[R\]"),
        (TypeError, {"scale": "2"}, "scale must be a number"),
        (ValueError, {"scale": math.nan}, "scale must be finite"),
        (ValueError, {"scale": 1e39}, r"scale must be finite in fp32, got 1e\+39"),
    ),
)
def test_a_bad_swap_changes_nothing(error, change, words):
    layer = make(SoRALinear)
    layer.merge()
    before = copy.deepcopy(layer.state_dict())
    lora_a, lora_b = adapter(R)
    arguments = {"lora_a": lora_a, "lora_b": lora_b, **change}
    with pytest.raises(error, match=words):
        layer.swap(**arguments)
    assert layer.merged and all(torch.equal(t, before[k]) for k, t in layer.state_dict().items())
