"""An adapter onto a base product made elsewhere, in every backend, held to reference.lora_add in
fp64."""

import functools
import itertools

import pytest
import torch
from cases import CUDA, DROPOUTS, backends, dtypes, fuzz, kernels, layouts, ranks, seeds
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from test_lora_linear import HERE, SCALE, Subclass, bytes_of
from torch.autograd import forward_ad

import fused_lora as fl
from fused_lora.ops import dispatch
from fused_lora.testing import assert_accurate, guarded, saved_bytes

NAMES = ("base_out", "x", "lora_a", "lora_b", "gate")


def make(M=5, K=12, N=9, R=3, *, dtype=torch.float32, gate=True, lead=None, layout="contiguous"):
    """The five tensors of one call, in NaN guard bands."""
    put = functools.partial(guarded, dtype=dtype, device=DEVICE)
    lead, wide = (M,) if lead is None else lead, torch.promote_types(dtype, torch.float32)
    return (
        put((*lead, N), layout),
        put((*lead, K), layout),
        put((R, K), std=max(K, 1) ** -0.5),
        put((N, R)),
        put((R,), dtype=wide) if gate else None,
    )


def leaves(tensors, needs=(True,) * 5):
    return tuple(
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    )


def wanted(tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def call(fn, tensors, **kwargs):
    *args, gate = tensors
    return fn(*args, gate=gate, **{"scale": SCALE, **kwargs})


def run(fn, tensors, dy, **kwargs):
    """[y, gradient of every tensor that requires one]."""
    y = call(fn, tensors, **kwargs)
    return [y, *torch.autograd.grad(y, wanted(tensors), dy)]


def check_against_fp64(tensors, dy, backend, **kwargs):
    def plain(*inputs):
        return run(fl.reference.lora_add, inputs[:5], inputs[5], **kwargs)

    names = ["y", *(n for n, t in zip(NAMES, tensors, strict=True) if t is not None)]
    ours = run(fl.lora_add, tensors, dy, backend=backend, **kwargs)
    assert_accurate(names, ours, plain, (*tensors, dy))


@backends
@given(
    M=st.sampled_from((0, 1, 7, 33, 65)), K=st.sampled_from((0, 1, 8, 33)),
    N=st.sampled_from((0, 1, 8, 33)), R=ranks, dtype=dtypes, layout=layouts, dy_layout=layouts,
    gate=st.booleans(), p=st.sampled_from((0.0, *DROPOUTS, 1.0)), seed=seeds,
)  # fmt: skip
@fuzz(12)
def test_any_shape(backend, M, K, N, R, dtype, layout, dy_layout, gate, p, seed):
    tensors = leaves(make(M, K, N, R, dtype=dtype, gate=gate, layout=layout))
    dy = guarded((M, N), dy_layout, dtype=dtype, device=DEVICE)
    check_against_fp64(tensors, dy, backend, dropout_p=p, seed=seed)


@backends
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_leading_dimensions(backend, lead, p):
    tensors = leaves(make(lead=lead))
    check_against_fp64(tensors, guarded((*lead, 9), device=DEVICE), backend, dropout_p=p, seed=5)


SUBSETS = list(itertools.product((False, True), repeat=5))[1:]
# For these the kernels have forms of their own.
FORMS = [tuple(map(bool, map(int, bits))) for bits in ("10000", "01000", "00100", "00010", "11101")]


@functools.cache
def every_gradient(backend):
    """(the tensors, dy, y and all gradients) of one call."""
    dy, tensors = guarded((5, 9), device=DEVICE), make()
    return tensors, dy, run(fl.lora_add, leaves(tensors), dy, **masked(backend))


def masked(backend):
    return {"dropout_p": 0.3, "seed": 5, "backend": backend}


@pytest.mark.parametrize(
    ("backend", "needs"),
    [
        *(("torch", needs) for needs in SUBSETS),
        *(("triton", needs) for needs in FORMS),
        *(pytest.param("cuda", needs, marks=CUDA.marks) for needs in FORMS),
    ],
    ids=str,
)
def test_only_the_gradients_asked_for(backend, needs, monkeypatch):
    """Any subset is the same as in the full set; for base_out alone nothing is computed."""
    tensors, dy, every = every_gradient(backend)
    options = masked(backend)
    some = run(fl.lora_add, leaves(tensors, needs), dy, **options)
    expected = [every[0], *itertools.compress(every[1:], needs)]
    for got, want in zip(some, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(every[1], dy)
    if not any(needs[1:]):
        monkeypatch.setattr("fused_lora.ops.lora_linear_group._backward", None)
        run(fl.lora_add, leaves(tensors, needs), dy, **options)


@pytest.mark.parametrize("gate,p", [(False, 0.0), (True, 0.3), (True, 1.0)])
def test_gradcheck(gate, p):
    tensors = leaves(make(M=3, K=6, dtype=torch.float64, gate=gate))

    def fn(*present):
        given = [*present, None][:5]
        return call(fl.lora_add, given, dropout_p=p, seed=7, backend="torch")

    assert torch.autograd.gradcheck(fn, wanted(tensors))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_masters(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    base, x, a, b, gate = make(33, 64, 40, 8, dtype=dtype)
    tensors = leaves((base, x, a.float(), b.float(), gate))
    dy = guarded((33, 40), dtype=dtype, device=DEVICE)
    check_against_fp64(tensors, dy, backend, dropout_p=0.5, seed=3)
    grads = run(fl.lora_add, tensors, dy, backend=backend)[1:]
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]


@backends
def test_the_mask_of_lora_linear(backend):
    """On F.linear it is lora_linear: the same mask forward and backward."""
    _, x, a, b, gate = leaves(make(33, 40, 50))
    weight = guarded((50, 40), device=DEVICE, std=0.2)
    options = {"gate": gate, "scale": SCALE, "dropout_p": 0.5, "seed": 11, "backend": backend}
    base = torch.nn.functional.linear(x, weight)
    results = []
    for y in (fl.lora_add(base, x, a, b, **options), fl.lora_linear(x, weight, a, b, **options)):
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), (x, a, b, gate), retain_graph=True)]
        )
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_base_out_is_added_before_the_rounding(backend, dtype):
    """1024 ulps of the adapter's part would be lost in a sum of two rounded parts."""
    one, eps = torch.ones(17, 1, dtype=dtype, device=DEVICE), torch.finfo(dtype).eps
    base = one.expand(17, 33)
    # base + 3/4 eps is nearer to 1 + eps; 1/2 and 1/4 eps added one by one round to nothing.
    a = torch.full((2, 1), 0.5, dtype=dtype, device=DEVICE)
    b = torch.tensor([[eps, eps / 2]], dtype=dtype, device=DEVICE).expand(33, 2)
    y = fl.lora_add(base, one, a, b, scale=1.0, backend=backend)
    assert torch.equal(y, base + eps)


@kernels
def test_a_base_of_any_strides(kernels):
    """segment_gemm onto a base that it does not write, with bias, mask and many segments."""
    for layout in ("contiguous", "transposed", "step2", "expanded", "misaligned"):
        base = guarded((33, 70), layout, device=DEVICE)
        before = base.clone()
        pairs = [
            (guarded((33, k), device=DEVICE), guarded((70, k), device=DEVICE)) for k in (5, 40)
        ]
        bias, seed = guarded((70,), device=DEVICE), torch.tensor([3], device=DEVICE)
        keep = fl.reference.dropout_mask(seed, 33, 70, 0.5)
        launchers = dispatch.kernels(kernels)
        mask = (launchers.dropout_bits(seed, 33, 70, 2**15), 2.0, 1)

        def plain(base, bias, left, right, *rest, keep=keep):
            y = torch.where(keep, 2.0 * left @ right.t(), 0)
            return (base + bias + y + rest[0] @ rest[1].t(),)

        y = launchers.segment_gemm(pairs, base=base, bias=bias, mask=mask)
        assert_accurate("y", (y,), plain, (base, bias, *itertools.chain(*pairs)))
        assert torch.equal(base, before)


@backends
def test_bitwise_repeatable_and_inputs_untouched(backend):
    tensors, dy = leaves(make(65, 30, 40, 7)), guarded((65, 40), device=DEVICE)
    before = [t.detach().clone() for t in (*tensors, dy)]
    options = {"dropout_p": 0.3, "seed": 1, "backend": backend}
    first, again = (run(fl.lora_add, tensors, dy, **options) for _ in range(2))
    assert all(torch.equal(u, v) for u, v in zip(first, again, strict=True))
    assert all(torch.equal(u, v) for u, v in zip((*tensors, dy), before, strict=True))
    assert first[0].untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr()


@backends
def test_scale_tensor(backend):
    tensors, dy = leaves(make()), guarded((5, 9), device=DEVICE)
    scale = torch.tensor(SCALE, device=DEVICE, requires_grad=True)

    def run_with(fn, scale, *inputs):
        y = call(fn, inputs[:5], scale=scale)
        return [y, *torch.autograd.grad(y, (scale, *inputs[:5]), inputs[5])]

    inputs = scale, *tensors, dy
    ours = run_with(functools.partial(fl.lora_add, backend=backend), *inputs)
    plain = functools.partial(run_with, fl.reference.lora_add)
    assert_accurate(("y", "scale", *NAMES), ours, plain, inputs)


def test_saved_bytes():
    """x, the adapters, h and the seed: neither base_out nor a mask."""
    M, K, N, R = 64, 96, 80, 8
    tensors = leaves(make(M, K, N, R))
    for p, seed_bytes in ((0.0, 0), (0.1, 8)):
        size, _ = saved_bytes(functools.partial(call, fl.lora_add, tensors, dropout_p=p))
        assert size == 4 * (M * K + R * K + N * R + R + M * R) + seed_bytes


# Integration with torch

# Of opcheck's, the one that compiles takes most of the time.
CHEAP = "test_schema", "test_autograd_registration", "test_faketensor"
CHECKS = *CHEAP, "test_aot_dispatch_dynamic"


@pytest.mark.parametrize(
    "p, gate, dtype", [(0.3, True, torch.float32), (0.0, False, torch.bfloat16)]
)
def test_opcheck(p, gate, dtype):
    base, x, a, b, gate = make(gate=gate, lead=(2, 3), dtype=dtype)
    seed = torch.tensor([1], device=DEVICE) if p else None
    for save_h, tests in ((False, CHEAP), (True, CHECKS)):
        args = (base, x, a, b, gate, seed, SCALE, p, save_h, "torch")
        torch.library.opcheck(torch.ops.fused_lora.lora_add.default, args, test_utils=tests)
    h, dy = torch.ops.fused_lora.lora_add(*args)[1], torch.randn_like(base)
    needs = [True, False, True, True, False, gate is not None]
    backward = torch.ops.fused_lora.lora_linear_group_backward.default
    args = ([dy], x, [None], [a], [b], [gate], [h], seed, [SCALE], p, needs, "torch")
    torch.library.opcheck(backward, args, test_utils=CHECKS if p else CHEAP)


def test_compiles_without_a_graph_break():
    compiled = torch.compile(fl.lora_add, backend="aot_eager", fullgraph=True)
    for M in (5, 9):
        tensors, dy = leaves(make(M)), guarded((M, 9), device=DEVICE)
        for t in tensors[:2]:
            torch._dynamo.mark_dynamic(t, 0)
        ours = run(compiled, tensors, dy, dropout_p=0.3, seed=3)
        eager = run(fl.lora_add, tensors, dy, dropout_p=0.3, seed=3)
        assert all(torch.equal(u, v) for u, v in zip(ours, eager, strict=True))


@backends
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16])
def test_autocast(backend, base_dtype):
    """The result has autocast's dtype, gradients have their tensor's."""
    tensors = make(33, 40, 50, 8)
    tensors = leaves((tensors[0].to(base_dtype), *tensors[1:]))
    dy = guarded((33, 50), dtype=torch.float16, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.float16):
        ours = run(fl.lora_add, tensors, dy, backend=backend)
    assert [t.dtype for t in ours] == [torch.float16, *(t.dtype for t in tensors)]
    cast = leaves(t.half() if t.ndim > 1 else t for t in tensors)
    rounded = [t.to(like.dtype) for t, like in zip(ours, (dy, *cast), strict=True)]
    assert_accurate(
        ("y", *NAMES), rounded, lambda *t: run(fl.reference.lora_add, t[:5], t[5]), (*cast, dy)
    )


def test_meta_tensors_go_through_the_fake():
    tensors = leaves(t.to("meta") for t in make())
    y = call(fl.lora_add, tensors, backend="triton")
    assert y.is_meta and y.shape == (5, 9)


def test_no_grad_skips_autograd():
    tensors = leaves(make())
    with torch.no_grad():
        y = call(fl.lora_add, tensors)
    assert y.grad_fn is None and not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(call(fl.lora_add, tensors), y)


def test_why():
    tensors = make()
    assert call(functools.partial(fl.why, "lora_add"), tensors)["torch"] is None
    with pytest.raises(ValueError, match="lora_b must have shape"):
        fl.why("lora_add", *tensors[:3], tensors[3].t(), scale=1.0)


# Refusals


def test_forward_mode_is_refused():
    base, x, a, b, _ = make()
    with forward_ad.dual_level():
        base = forward_ad.make_dual(base, torch.ones_like(base))
        with pytest.raises(NotImplementedError, match="base_out carries a forward-mode tangent"):
            fl.lora_add(base, x, a, b, scale=1.0)


def test_double_backward_is_refused():
    tensors = leaves(make())
    y = call(fl.lora_add, tensors)
    (dx,) = torch.autograd.grad(y.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def zeros(*shape, **options):
    return torch.zeros(*shape, device=DEVICE, **options)


BAD = {
    "a tuple": (
        {"base_out": (zeros(5, 9), None)},
        TypeError,
        "base_out must be a torch.Tensor, got tuple",
    ),
    "integer base": (
        {"base_out": zeros(5, 9).int()},
        TypeError,
        "base_out must have dtype float32, bfloat16, float16, float64, got int32",
    ),
    "base of another dtype": (
        {"base_out": zeros(5, 9).half()},
        TypeError,
        "base_out must have x's dtype float32, got float16",
    ),
    "rows": (
        {"base_out": zeros(4, 9)},
        ValueError,
        "base_out must have shape [..., N] = [5, any], got [4, 9]",
    ),
    "leading dimensions": (
        {"base_out": zeros(5, 1, 9)},
        ValueError,
        "base_out must have shape [..., N] = [5, any], got [5, 1, 9]",
    ),
    "out features": (
        {"base_out": zeros(5, 8)},
        ValueError,
        "lora_b must have shape [N, R] = [8, 3], got [9, 3]",
    ),
    "base device": (
        {"base_out": torch.zeros(5, 9, device="meta")},
        ValueError,
        f"base_out is on meta but x is on {HERE}; move one of them",
    ),
    "subclass": (
        {"base_out": zeros(5, 9).as_subclass(Subclass)},
        NotImplementedError,
        "base_out is a Subclass; tensor subclasses are not supported, pass a plain torch.Tensor",
    ),
    "0-d": (
        {"x": torch.tensor(1.0, device=DEVICE)},
        ValueError,
        "x must have shape [..., K], got a 0-d tensor",
    ),
    "a columns": (
        {"lora_a": zeros(3, 11)},
        ValueError,
        "lora_a must have shape [R, K] = [any, 12], got [3, 11]",
    ),
    "rank 0": (
        {"lora_a": zeros(0, 12), "lora_b": zeros(9, 0)},
        ValueError,
        "lora_a has shape [0, 12]; the rank must be at least 1",
    ),
    "gate length": (
        {"gate": zeros(4)},
        ValueError,
        "gate must have shape [R] = [3], got [4]",
    ),
    "adapter of another dtype": (
        {"lora_b": zeros(9, 3).half()},
        TypeError,
        "lora_b must have dtype float32, got float16",
    ),
    "scale": ({"scale": float("inf")}, ValueError, "scale must be finite in fp32, got inf"),
    "p": ({"dropout_p": -0.1}, ValueError, "dropout_p must lie in [0, 1], got -0.1"),
    "seed": ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
    "float64 in triton": (
        {name: t.double() for name, t in zip(NAMES, make(), strict=True)} | {"backend": "triton"},
        RuntimeError,
        "backend 'triton' cannot run: the Triton kernels accumulate in fp32 and take no float64; "
        "backend='torch' does",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case):
    change, error, message = BAD[case]
    tensors = dict(zip(NAMES, make(), strict=True))
    before = [bytes_of(t) for t in tensors.values()]
    with pytest.raises(error) as raised:
        fl.lora_add(**(tensors | {"scale": 1.0} | change))
    assert str(raised.value).removeprefix("lora_add: ") == message
    assert [bytes_of(t) for t in tensors.values()] == before
