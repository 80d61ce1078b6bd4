"""dora_linear, forward and backward, in every backend, held to fp64; its norms to PEFT's."""

import itertools

import pytest
import torch
from cases import backends, dtypes, fuzz, layouts
from conftest import DEVICE
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lora as fl
from fused_lora.ops import dora_linear as op
from fused_lora.testing import assert_accurate, guarded, saved_bytes

NAMES = ("x", "weight", "lora_a", "lora_b", "magnitude", "bias")
SCALE = 1.3


def make(shape=(5,), N=6, K=10, R=3, *, dtype=torch.float32, layout="contiguous"):
    """[x, weight, lora_a, lora_b, magnitude, bias] in NaN guard bands."""
    sizes = (*shape, K), (N, K), (R, K), (N, R)
    tensors = [guarded(size, layout, dtype=dtype, device=DEVICE) for size in sizes]
    return [*tensors, *(guarded((N,), dtype=dtype, device=DEVICE) for _ in range(2))]


def leaves(tensors, needs=(True,) * 6):
    return [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]


def grads_of(y, tensors, dy):
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy)]


def true_norms(weight, a, b, scale=SCALE):
    rows = weight.detach().double() + float(scale) * (b.detach().double() @ a.detach().double())
    return torch.linalg.vector_norm(rows, dim=1)


def check_against_fp64(tensors, dy, backend):
    """The norms are constants: what is held to fp64 is the sum of products that they scale, with
    c = m / norm for an input, whose gradient is norm times that of m."""
    x, weight, a, b, magnitude, bias = tensors
    norms = true_norms(weight, a, b)
    factor = (magnitude.detach() / norms).float().requires_grad_()

    def plain(x, weight, a, b, factor, bias, dy):
        y = factor * fl.reference.lora_linear(x, weight, a, b, scale=SCALE)
        y = (y if bias is None else y + bias).to(x.dtype)
        return grads_of(y, (x, weight, a, b, factor, bias), dy)

    y = fl.dora_linear(*tensors, scale=SCALE, backend=backend)
    ours = grads_of(y, tensors, dy)
    assert ours[5].dtype == magnitude.dtype
    ours[5] = (ours[5] * norms).float()
    names = ["y", *(f"d{name}" for name in NAMES)][: len(ours)]
    assert_accurate(names, ours, plain, (x, weight, a, b, factor, bias, dy))


@backends
@given(
    M=st.sampled_from((0, 1, 2, 31, 65)), N=st.sampled_from((1, 7, 64, 65)),
    K=st.sampled_from((1, 8, 33, 130)), R=st.sampled_from((1, 3, 16, 17)),
    dtype=dtypes, layout=layouts, dy_layout=layouts, biased=st.booleans(),
)  # fmt: skip
@fuzz(12)
def test_any_shape(backend, M, N, K, R, dtype, layout, dy_layout, biased):
    tensors = make((M,), N, K, R, dtype=dtype, layout=layout)
    rows = tensors[1].double().norm(dim=1)
    assume(bool((true_norms(*tensors[1:4]) > 0.3 * rows).all()))  # where B A undoes one see below
    tensors[4] = tensors[4].float()  # as PEFT holds it; gradients of 16 bits are rounded once more
    if not biased:
        tensors[5] = None
    dy = guarded((M, N), dy_layout, dtype=dtype, device=DEVICE)
    check_against_fp64(leaves(tensors), dy, backend)


@backends
@pytest.mark.parametrize("shape", [(), (2, 3), (2, 0, 4)], ids=str)
def test_leading_dimensions(backend, shape):
    check_against_fp64(leaves(make(shape)), guarded((*shape, 6), device=DEVICE), backend)


@backends
def test_fp32_masters(backend):
    dtype = torch.float16
    x, weight, a, b, magnitude, bias = make((33,), dtype=dtype)
    tensors = leaves([x, weight, a.float(), b.float(), magnitude.float(), bias])
    check_against_fp64(tensors, guarded((33, 6), dtype=dtype, device=DEVICE), backend)
    y = fl.dora_linear(*tensors, scale=SCALE, backend=backend)
    ours = grads_of(y, tensors, torch.ones_like(y))
    assert [t.dtype for t in ours] == [dtype] * 3 + [torch.float32] * 3 + [dtype]


def test_it_is_the_reference():
    tensors = leaves(make(dtype=torch.float64))
    ours, plain = (
        grads_of(fn(*tensors, scale=SCALE), tensors, torch.ones(5, 6, device=DEVICE).double())
        for fn in (fl.dora_linear, fl.reference.dora_linear)
    )
    for got, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, want)


def test_a_magnitude_of_the_norms_is_lora():
    x, weight, a, b, _, bias = make(dtype=torch.float64)
    norms = true_norms(weight, a, b)
    y = fl.dora_linear(x, weight, a, b, norms, bias, scale=SCALE)
    torch.testing.assert_close(y, fl.lora_linear(x, weight, a, b, bias, scale=SCALE))


def test_gradcheck():
    x, weight, a, b, magnitude, bias = leaves(make((4,), dtype=torch.float64))

    def scaled(x, weight, a, b, factor, bias):
        args = x, weight, a, b, bias.detach(), None, None, SCALE, 0.0, None
        return op._run(args, factor, bias, "torch")

    assert torch.autograd.gradcheck(scaled, (x, weight, a, b, magnitude, bias))

    def public(x, magnitude, bias):  # what the norms do not depend on
        return fl.dora_linear(x, weight, a, b, magnitude, bias, scale=SCALE)

    assert torch.autograd.gradcheck(public, (x, magnitude, bias))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=6))[1::5], ids=str)
def test_only_the_gradients_asked_for(needs):
    tensors, dy = make(), guarded((5, 6), device=DEVICE)
    everything, some = leaves(tensors), leaves(tensors, needs)
    want = grads_of(fl.dora_linear(*everything, scale=SCALE), everything, dy)
    got = grads_of(fl.dora_linear(*some, scale=SCALE), some, dy)
    expected = [want[0], *itertools.compress(want[1:], needs)]
    assert all(torch.equal(u, v) for u, v in zip(got, expected, strict=True))


# The norms.


def of_peft(weight, a, b, scale):
    """As a forward of PEFT has them: in the adapters' dtype."""
    dora = pytest.importorskip("peft.tuners.lora.dora")
    layer = dora.DoraLinearLayer(fan_in_fan_out=False)
    return layer.get_weight_norm(weight.to(a.dtype), b @ a, scale)


def by_terms(weight, a, b, scale):
    """The sum of three terms, of which none is as large as B A."""
    cross = ((weight @ a.t()) * b).sum(1)
    return (weight.square().sum(1) + 2 * scale * cross
            + scale**2 * ((b @ (a @ a.t())) * b).sum(1)).clamp(min=0).sqrt()  # fmt: skip


@pytest.mark.parametrize("left", [1.0, 1e-3], ids=["random", "B A undoes W0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masters", [False, True])
def test_norms_err_no_more_than_twice_what_pefts_do(dtype, masters, left):
    N, K, R = 129, 257, 8
    a, b = torch.randn(R, K, device=DEVICE), torch.randn(N, R, device=DEVICE)
    weight = left * torch.randn(N, K, device=DEVICE) - (left < 1) * SCALE * (b @ a)
    weight = weight.to(dtype)
    if not masters:
        a, b = a.to(dtype), b.to(dtype)
    true = true_norms(weight, a, b)
    ours, theirs = op.row_norms(weight, a, b, SCALE), of_peft(weight, a, b, SCALE)
    assert ours.dtype == torch.float32

    def error(norms):
        return ((norms.double() - true) / true).norm() / N**0.5

    bound = 2 * error(theirs) + torch.finfo(torch.float32).eps
    assert error(ours) <= bound
    if left < 1 and dtype == torch.float32:  # why they are not computed so
        assert error(by_terms(weight, a, b, SCALE)) > 20 * bound


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_of_zeros_is_scaled_by_one(backend, dtype):
    """It has no direction; and B must learn one."""
    tensors = make((4,), dtype=dtype)
    with torch.no_grad():
        tensors[1][2] = tensors[3][2] = tensors[4][2] = 0
    tensors = leaves(tensors)
    x, weight, a, b, magnitude, bias = tensors
    dy = torch.ones(4, 6, device=DEVICE, dtype=dtype)
    y, *grads = grads_of(fl.dora_linear(*tensors, scale=SCALE, backend=backend), tensors, dy)
    want = grads_of(fl.lora_linear(x, weight, a, b, bias, scale=SCALE), [weight, b, bias], dy)
    for got, plain in zip((y[:, 2], grads[1][2], grads[3][2], grads[5][2]),
                          (want[0][:, 2], want[1][2], want[2][2], want[3][2]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(got, plain)
    assert all(t.isfinite().all() for t in grads) and grads[4][2] == 0 and grads[3][2].all()


def test_the_reference_is_finite_where_a_row_is_zero():
    tensors = make(dtype=torch.float64)
    with torch.no_grad():
        tensors[1][2] = tensors[3][2] = 0
    found = [
        grads_of(fn(*ts, scale=SCALE), ts, torch.ones(5, 6, device=DEVICE).double())
        for fn in (fl.dora_linear, fl.reference.dora_linear)
        for ts in [leaves(tensors)]
    ]
    for got, want in zip(*found, strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_the_start_is_the_frozen_layer_to_the_bit(dtype, biased):
    """With B = 0 and a magnitude of the norms; long enough that a bias that is added last would
    round otherwise than one that the product begins with."""
    x, weight, a, b, _, bias = make((7,), 48, 1031, dtype=dtype)
    bias = bias if biased else None
    magnitude = torch.linalg.norm(weight, dim=1)
    for needs in (False, True):
        own = magnitude.clone().requires_grad_(needs)
        y = fl.dora_linear(x, weight, a, torch.zeros_like(b), own, bias, scale=SCALE)
        assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


class Largest(TorchDispatchMode):
    """The most elements that anything has which is made within."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor) and t._base is None:
                self.elements = max(self.elements, t.numel())
        return out


def test_b_a_is_never_whole(monkeypatch):
    tensors = make((2,), N=64, K=32)
    whole = op.row_norms(*tensors[1:4], SCALE)
    monkeypatch.setattr(op, "TILE", 5 * 32)
    torch.testing.assert_close(op.row_norms(*tensors[1:4], SCALE), whole)
    tensors = leaves(tensors, (True, False, True, True, True, False))
    with Largest() as largest:
        y = fl.dora_linear(*tensors, scale=SCALE)
        grads_of(y, tensors, torch.ones_like(y))
    assert 0 < largest.elements <= 64 * 5 < 64 * 32


def test_saved_bytes():
    x, weight, a, b, magnitude, bias = leaves(make((50,)), (True, False, True, True, True, False))
    base = 50 * 10 + 6 * 10 + 3 * 10 + 6 * 3 + 50 * 3  # lora_linear's: x, the weights, h
    size, _ = saved_bytes(lambda: fl.dora_linear(x, weight, a, b, magnitude, bias, scale=1.0))
    # The product, the bias, the factor, the norms, and which of them are zero.
    assert size == 4 * (base + 50 * 6 + 6 + 6 + 6) + 6
    magnitude = magnitude.detach()
    size, _ = saved_bytes(lambda: fl.dora_linear(x, weight, a, b, magnitude, bias, scale=1.0))
    assert size == 4 * (base + 6)


# The calls around it.


def test_scale_tensor():
    tensors, dy = leaves(make()), guarded((5, 6), device=DEVICE)
    scale = torch.tensor(SCALE, device=DEVICE)
    ours, want = (grads_of(fl.dora_linear(*tensors, scale=s), tensors, dy) for s in (scale, SCALE))
    for u, v in zip(ours, want, strict=True):
        torch.testing.assert_close(u, v)


def test_autocast():
    tensors = leaves(make((33,)))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = fl.dora_linear(*tensors, scale=SCALE)
    x, weight, a, b, magnitude, bias = tensors
    assert y.dtype == torch.bfloat16
    z = fl.lora_linear(x.bfloat16(), weight.bfloat16(), a, b, bias.bfloat16(), scale=SCALE)
    factor = magnitude / op.row_norms(weight, a, b, SCALE)  # of what was not rounded
    want = torch.addcmul((1 - factor) * bias.bfloat16(), factor, z)
    assert torch.equal(y, want.bfloat16())
    assert all(g.dtype == torch.float32 for g in grads_of(y, tensors, torch.ones_like(y))[1:])


def test_inputs_are_untouched_and_nothing_is_kept_without_gradients():
    tensors = make()
    before = [t.clone() for t in tensors]
    first = fl.dora_linear(*tensors, scale=SCALE)
    assert torch.equal(first, fl.dora_linear(*tensors, scale=SCALE)) and first.grad_fn is None
    assert all(torch.equal(u, v) for u, v in zip(tensors, before, strict=True))


@backends
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    compiled = torch.compile(fl.dora_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for M in (5, 6):
        tensors, dy = leaves(make((M,))), guarded((M, 6), device=DEVICE)
        options = {"scale": SCALE, "backend": backend}
        ours = grads_of(compiled(*tensors, **options), tensors, dy)
        eager = grads_of(fl.dora_linear(*tensors, **options), tensors, dy)
        for u, v in zip(ours, eager, strict=True):
            torch.testing.assert_close(u, v)


def test_meta_tensors():
    y = fl.dora_linear(*(t.to("meta") for t in make((3, 4))), scale=1.0)
    assert y.is_meta and y.shape == (3, 4, 6)


HERE = torch.empty(0, device=DEVICE).device
BAD = {
    "magnitude of another size": (
        {"magnitude": torch.ones(5)},
        ValueError,
        "magnitude must have shape [N] = [6], got [5]",
    ),
    "magnitude is no tensor": (
        {"magnitude": 1.0},
        TypeError,
        "magnitude must be a torch.Tensor, got float",
    ),
    "magnitude elsewhere": (
        {"magnitude": torch.ones(6, device="meta")},
        ValueError,
        f"magnitude is on meta but x is on {HERE}; move one of them",
    ),
    "a transposed": (
        {"lora_a": torch.zeros(10, 3)},
        ValueError,
        "lora_a must have shape [R, K] = [any, 10], got [10, 3]",
    ),
    "bias": ({"bias": torch.zeros(5)}, ValueError, "bias must have shape [N] = [6], got [5]"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must be finite in fp32, got nan"),
    "fp64 on Triton": (
        {
            **dict(zip(NAMES, make(dtype=torch.float64), strict=True)),
            "backend": "triton",
        },
        RuntimeError,
        "backend 'triton' cannot run: the Triton kernels accumulate in fp32 and take no float64; "
        "backend='torch' does",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case):
    change, error, message = BAD[case]
    arguments = {**dict(zip(NAMES, make(), strict=True)), "scale": 1.0} | change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error) as raised:
        fl.dora_linear(**arguments)
    assert str(raised.value).removeprefix("dora_linear: ") == message


def test_why():
    reasons = fl.why("dora_linear", *make(), scale=2.0)
    assert next(iter(reasons)) == "torch" and reasons["torch"] is None
