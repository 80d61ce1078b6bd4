"""Projections that share x, forward and backward, in every backend, held to
reference.lora_linear_group in fp64."""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import DROPOUTS, backends, dtypes, fuzz, layouts, seeds
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from test_lora_linear import HERE, Subclass, bytes_of
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_lora as fl
from fused_lora.ops import dispatch
from fused_lora.testing import assert_accurate, assert_near, guarded, saved_bytes

KINDS = "weight", "lora_a", "lora_b", "bias", "gate"
SCALES = (1.3, 0.7, 1.3, 2.0, 0.5, 1.0, 0.25, 3.0, 1.5)


class Projection(NamedTuple):
    """What one has; R None: no adapter."""

    N: int
    R: int | None
    bias: bool = True
    gate: bool = False


# Every mixture; q, k and v without gates, at one rank.
MIXED = (Projection(9, 3, gate=True), Projection(5, None), Projection(7, 2, bias=False))
QKV = (Projection(16, 8), Projection(8, 8), Projection(8, 8))


def make(projections=MIXED, M=5, K=12, *, dtype=torch.float32, lead=None, layout="contiguous"):
    """x, and the weight, lora_a, lora_b, bias and gate of each; in NaN guard bands."""
    put = functools.partial(guarded, dtype=dtype, device=DEVICE)
    wide = torch.promote_types(dtype, torch.float32)
    std = max(K, 1) ** -0.5
    x = put((*((M,) if lead is None else lead), K), layout)
    weights = [put((p.N, K), std=std) for p in projections]
    lora_as = [None if p.R is None else put((p.R, K), std=std) for p in projections]
    lora_bs = [None if p.R is None else put((p.N, p.R)) for p in projections]
    biases = [put((p.N,)) if p.bias else None for p in projections]
    gates = [put((p.R,), dtype=wide) if p.R and p.gate else None for p in projections]
    return [x, *weights, *lora_as, *lora_bs, *biases, *gates]


def leaves(tensors, needs=None):
    needs = [True] * len(tensors) if needs is None else needs
    return [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]


def wanted(tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def names(tensors):
    n = (len(tensors) - 1) // 5
    spelled = ["x", *(f"{kind} {i}" for kind in KINDS for i in range(n))]
    return [s for s, t in zip(spelled, tensors, strict=True) if t is not None and t.requires_grad]


def call(fn, tensors, **kwargs):
    x, n = tensors[0], (len(tensors) - 1) // 5
    weights, lora_as, lora_bs, biases, gates = (
        list(tensors[1 + k * n : 1 + (k + 1) * n]) for k in range(5)
    )
    kwargs = {"scales": SCALES[:n], **kwargs}
    return fn(x, weights, lora_as, lora_bs, biases, gates=gates, **kwargs)


def run(fn, tensors, dys, **kwargs):
    """Every y, then the gradient of every tensor that requires one."""
    ys = call(fn, tensors, **kwargs)
    return [*ys, *torch.autograd.grad(ys, wanted(tensors), dys)]


def incoming(tensors, layout="contiguous"):
    n, lead = (len(tensors) - 1) // 5, tensors[0].shape[:-1]
    return [
        guarded((*lead, w.shape[0]), layout, dtype=w.dtype, device=DEVICE)
        for w in tensors[1 : 1 + n]
    ]


def check_against_fp64(tensors, dys, backend, **kwargs):
    def plain(*inputs):
        return run(fl.reference.lora_linear_group, inputs[: len(tensors)], inputs[-n:], **kwargs)

    n = len(dys)
    ours = run(fl.lora_linear_group, tensors, dys, backend=backend, **kwargs)
    labels = [*(f"y {i}" for i in range(n)), *(f"d {name}" for name in names(tensors))]
    assert_accurate(labels, ours, plain, (*tensors, *dys))


some = st.builds(
    Projection,
    st.sampled_from((0, 1, 7, 33)),
    st.sampled_from((None, 1, 3, 8, 16)),
    st.booleans(),
    st.booleans(),
)


@backends
@given(
    projections=st.lists(some, min_size=1, max_size=4),
    M=st.sampled_from((0, 1, 7, 33)), K=st.sampled_from((0, 1, 8, 33)),
    dtype=dtypes, layout=layouts, dy_layout=layouts,
    p=st.sampled_from((0.0, *DROPOUTS, 1.0)), seed=seeds,
)  # fmt: skip
@fuzz(12)
def test_any_group(backend, projections, M, K, dtype, layout, dy_layout, p, seed):
    tensors = leaves(make(projections, M, K, dtype=dtype, layout=layout))
    check_against_fp64(tensors, incoming(tensors, dy_layout), backend, dropout_p=p, seed=seed)


@backends
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_leading_dimensions(backend, lead, p):
    tensors = leaves(make(lead=lead))
    check_against_fp64(tensors, incoming(tensors), backend, dropout_p=p, seed=5)


@backends
def test_strided_parameters(backend):
    x, *rest = make(QKV, 33, 40)
    kinds = itertools.cycle(("transposed", "step2", "misaligned", "expanded"))
    rest = [
        t if t is None or t.ndim == 1 else guarded(t.shape, next(kinds), device=DEVICE, std=0.2)
        for t in rest
    ]
    tensors = leaves([x, *rest])
    check_against_fp64(tensors, incoming(tensors, "step2"), backend, dropout_p=0.3, seed=5)


@backends
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_has_fp32_masters(backend, p, dtype):
    """Gradients of each in its own dtype."""
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    tensors = make(QKV, 33, 64, dtype=dtype)
    tensors[4], tensors[7] = tensors[4].float(), tensors[7].float()
    tensors = leaves(tensors)
    check_against_fp64(tensors, incoming(tensors), backend, dropout_p=p, seed=3)
    grads = run(fl.lora_linear_group, tensors, incoming(tensors), backend=backend)[3:]
    assert [g.dtype for g in grads] == [t.dtype for t in wanted(tensors)]


SUBSETS = {
    "x": {"x"},
    "one weight": {"weight 1"},
    "one lora_a": {"lora_a 2"},
    "one lora_b": {"lora_b 0"},
    "one bias": {"bias 1"},
    "gate": {"gate 0"},
    "x and one lora_a": {"x", "lora_a 2"},
    "adapters": {"lora_a 0", "lora_a 2", "lora_b 0", "lora_b 2", "gate 0"},
    "x and adapters": {"x", "lora_a 0", "lora_a 2", "lora_b 0", "lora_b 2"},
    "of different ones": {"lora_a 0", "lora_b 2", "bias 1", "weight 2"},
}


@functools.cache
def every_gradient(backend, p):
    """(the tensors, every dy, {name: gradient}) of one call."""
    tensors = make()
    every, dys = leaves(tensors), incoming(tensors)
    results = run(fl.lora_linear_group, every, dys, dropout_p=p, seed=5, backend=backend)
    return tensors, dys, dict(zip(names(every), results[3:], strict=True))


# Without dx p changes no launch, only an argument.
@backends
@pytest.mark.parametrize(
    ("case", "p"),
    [
        *((case, 0.3) for case in SUBSETS),
        *((c, 0.0) for c, names in SUBSETS.items() if "x" in names),
    ],
)
def test_only_the_gradients_asked_for(backend, case, p):
    """Any subset of gradients is the same as in the full set, and no other is computed."""
    subset = SUBSETS[case]
    tensors, dys, want = every_gradient(backend, p)
    spelled = ["x", *(f"{kind} {i}" for kind in KINDS for i in range(3))]
    some = leaves(tensors, [name in subset for name in spelled])
    options = {"dropout_p": p, "seed": 5, "backend": backend}
    ys = call(fl.lora_linear_group, some, **options)
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    got = torch.autograd.grad([y for y, _ in pairs], wanted(some), [dy for _, dy in pairs])
    for name, grad in zip(names(some), got, strict=True):
        assert_near(name, grad, want[name])

    x, weights, lora_as, lora_bs, gates = (
        tensors[0],
        *(tensors[1 + 3 * k : 4 + 3 * k] for k in (0, 1, 2, 4)),
    )
    hs = [None if a is None else torch.randn(5, a.shape[0], device=DEVICE) for a in lora_as]
    seed = torch.tensor([5], device=DEVICE) if p else None
    grads = torch.ops.fused_lora.lora_linear_group_backward(
        dys, x, weights, lora_as, lora_bs, gates, hs, seed, SCALES[:3], p,
        [name in subset for name in spelled], backend,
    )  # fmt: skip
    dx, dws, da, dbs, dbiases, dgates = grads
    assert bool(dx.numel()) == ("x" in subset)
    ranks = [lora_as[i].shape[0] for i in range(3) if f"lora_a {i}" in subset]
    assert da.shape == ((sum(ranks), 12) if ranks else (0,))
    for kind, made in (("weight", dws), ("lora_b", dbs), ("bias", dbiases), ("gate", dgates)):
        assert [bool(g.numel()) for g in made] == [f"{kind} {i}" in subset for i in range(3)]


@backends
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_outputs_that_nothing_came_from(backend, used):
    """They cost nothing: their gradients are None, and x's has no part of them."""
    tensors = leaves(make())
    dys = incoming(tensors)
    options = {"dropout_p": 0.3, "seed": 5}
    ours = call(fl.lora_linear_group, tensors, backend=backend, **options)
    want = call(fl.reference.lora_linear_group, tensors, **options)
    pick = functools.partial(
        torch.autograd.grad, inputs=wanted(tensors), grad_outputs=[dys[i] for i in used],
        allow_unused=True,
    )  # fmt: skip
    for name, got, wish in zip(
        names(tensors), pick([ours[i] for i in used]), pick([want[i] for i in used]), strict=True
    ):
        assert (got is None) == (wish is None), name
        if got is not None:
            assert_near(name, got, wish)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    tensors = leaves(make(M=3, K=6, dtype=torch.float64))

    def fn(*present):
        it = iter(present)
        given = [None if t is None else next(it) for t in tensors]
        return tuple(call(fl.lora_linear_group, given, dropout_p=p, seed=7, backend="torch"))

    assert torch.autograd.gradcheck(fn, wanted(tensors), fast_mode=True)


@backends
def test_one_mask_for_the_group(backend):
    """That of lora_linear, in the forward, dA and dx of each: identity adapters show it."""
    n, p, seed = 36, 0.5, 11
    eye, zero = torch.eye(n, device=DEVICE), torch.zeros(n, n, device=DEVICE)
    keep = fl.reference.dropout_mask(torch.tensor([seed], device=DEVICE), n, n, p)
    x = torch.ones(n, n, device=DEVICE, requires_grad=True)
    a, b = (eye.clone().requires_grad_() for _ in range(2))
    options = {"scales": (1.0, 1.0), "dropout_p": p, "seed": seed, "backend": backend}
    ys = fl.lora_linear_group(x, [zero, zero], [a, b], [eye, eye], **options)
    assert all(torch.equal(y != 0, keep) for y in ys)
    dx, da, db = torch.autograd.grad(ys, (x, a, b), (eye, torch.ones_like(eye)))
    assert torch.equal(dx != 0, keep)  # D ⊙ (I + 1)
    assert torch.equal(da != 0, keep)  # dh = I, so dA = drop(x)
    assert torch.equal(db[0] != 0, keep.any(0))


@backends
def test_the_same_as_one_by_one(backend):
    tensors = leaves(make(QKV, 33, 40))
    options = {"dropout_p": 0.3, "seed": 5, "backend": backend}
    ours = call(fl.lora_linear_group, tensors, **options)
    x, (weights, lora_as, lora_bs, biases) = (
        tensors[0],
        (tensors[1 + 3 * k : 4 + 3 * k] for k in range(4)),
    )
    alone = zip(weights, lora_as, lora_bs, biases, SCALES, strict=False)
    want = [fl.lora_linear(x, *own, scale=scale, **options) for *own, scale in alone]
    for i, (y, alone) in enumerate(zip(ours, want, strict=True)):
        assert_near(f"y {i}", y, alone)


@backends
def test_more_projections_than_a_launch_has_segments(backend):
    tensors = leaves(make([Projection(n, 3) for n in range(8, 17)], 17, 20))
    for p in (0.0, 0.3):
        check_against_fp64(tensors, incoming(tensors), backend, dropout_p=p, seed=5)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_launches(backend, monkeypatch):
    """One product with A, one dA and one dx for all; x is in none of the others but the base's."""
    if reason := {"triton": dispatch.triton_refuses, "cuda": dispatch.cuda_refuses}[backend](
        torch.empty(0, device=DEVICE)
    ):
        pytest.skip(reason)
    kernels, calls = dispatch.kernels(backend), []

    def count(name, fn):
        def counted(*args, **kwargs):
            calls.append(name)
            return fn(*args, **kwargs)

        return counted

    launchers = "shrink", "segment_gemm", "row_reduce_dy", "row_reduce_x", "dropout_bits"
    for name in launchers:
        monkeypatch.setattr(kernels, name, count(name, getattr(kernels, name)))
    frozen = [True, *[False] * 3, *[True] * 6, *[False] * 6]
    for p in (0.0, 0.3):
        tensors = leaves(make(QKV), frozen)
        ys = call(fl.lora_linear_group, tensors, dropout_p=p, backend=backend)
        assert sorted(calls) == ["segment_gemm"] * 3 + ["shrink"]
        calls.clear()
        torch.autograd.grad(ys, wanted(tensors), incoming(tensors))
        assert sorted(calls) == ["row_reduce_dy"] * 3 + ["row_reduce_x", "segment_gemm"]
        calls.clear()


@backends
def test_few_rows_without_gradients(backend):
    """Decoding has a form of its own in CUDA."""
    for dtype in (torch.float16, torch.float32):
        tensors = make(M=3, K=70, dtype=dtype)
        ours = call(fl.lora_linear_group, tensors, backend=backend)

        def plain(*inputs):
            return call(fl.reference.lora_linear_group, inputs)

        assert_accurate(["y 0", "y 1", "y 2"], ours, plain, tensors)


@backends
def test_bitwise_repeatable_and_inputs_untouched(backend):
    tensors = leaves(make(MIXED, 65, 30))
    dys = incoming(tensors)
    present = [*wanted(tensors), *dys]
    before = [t.detach().clone() for t in present]
    options = {"dropout_p": 0.3, "seed": 1, "backend": backend}
    first, again = (run(fl.lora_linear_group, tensors, dys, **options) for _ in range(2))
    assert all(torch.equal(u, v) for u, v in zip(first, again, strict=True))
    assert all(torch.equal(u, v) for u, v in zip(present, before, strict=True))


@backends
def test_scale_tensors(backend):
    """A 0-d tensor scales as the same float does and has a gradient, with a gate and without."""
    tensors = leaves(make())
    scales = [torch.tensor(s, device=DEVICE, requires_grad=True) for s in (1.3, 9.0, 0.4)]
    dys = incoming(tensors)

    def run_with(fn, *inputs):
        scales, tensors, dys = inputs[:3], inputs[3:-3], inputs[-3:]
        ys = call(fn, tensors, scales=scales)
        asked = scales[0], scales[2], *wanted(tensors)
        return [*ys, *torch.autograd.grad(ys, asked, dys)]

    inputs = *scales, *tensors, *dys
    ours = run_with(functools.partial(fl.lora_linear_group, backend=backend), *inputs)
    labels = "y 0", "y 1", "y 2", "scale 0", "scale 2", *names(tensors)
    assert_accurate(
        labels, ours, functools.partial(run_with, fl.reference.lora_linear_group), inputs
    )


def test_seed():
    tensors = make(QKV, 33, 40)
    draw = functools.partial(call, fl.lora_linear_group, tensors, dropout_p=0.5)
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert all(torch.equal(u, v) for u, v in zip(draw(), first, strict=True))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(draw(seed=-3)[1], draw(seed=torch.tensor(-3, device=DEVICE))[1])
    assert torch.equal(draw(training=False)[0], call(fl.lora_linear_group, tensors)[0])


def test_saved_bytes():
    """x once, the parameters, h of all adapters and the seed: no stack of the A, no mask."""
    M, K = 64, 96
    frozen = [True, *[False] * 3, *[True] * 6, *[False] * 3, *[True] * 3]
    tensors = leaves(make(MIXED, M, K), frozen)
    parameters = sum(t.numel() for t in (*tensors[1:10], *tensors[13:]) if t is not None)
    for p, seed_bytes in ((0.0, 0), (0.1, 8)):
        size, _ = saved_bytes(functools.partial(call, fl.lora_linear_group, tensors, dropout_p=p))
        assert size == 4 * (M * K + parameters + M * (3 + 2)) + seed_bytes


# Integration with torch


@pytest.mark.parametrize(
    ("projections", "p"), [(MIXED, 0.3), (QKV, 0.0), ([Projection(4, None)], 0.0)]
)
def test_opcheck(projections, p):
    n = len(projections)
    tensors = make(projections, lead=(2, 3))
    x, kinds = tensors[0], [tensors[1 + n * k : 1 + n * (k + 1)] for k in range(5)]
    weights, lora_as, lora_bs, biases, gates = kinds
    seed, scales = torch.tensor([1], device=DEVICE) if p else None, SCALES[:n]
    forward = torch.ops.fused_lora.lora_linear_group.default
    backward = torch.ops.fused_lora.lora_linear_group_backward.default
    # Of opcheck's, the one that compiles takes most of the time.
    cheap = "test_schema", "test_autograd_registration", "test_faketensor"
    checks = (*cheap, "test_aot_dispatch_dynamic") if p else cheap
    for save_h, tests in ((False, cheap), (any(a is not None for a in lora_as), checks)):
        args = (x, *kinds, seed, scales, p, save_h, "torch")
        torch.library.opcheck(forward, args, test_utils=tests)
    ranks = [a.shape[0] for a in lora_as if a is not None]
    parts = iter(forward(*args)[1].split(ranks, 1) if ranks else ())
    hs = [None if a is None else next(parts) for a in lora_as]
    dys = [dy.contiguous() for dy in incoming(tensors)]
    has = [True, *(t is not None for t in tensors[1:])]
    for needs, tests in ((has, checks), ([False] * (5 * n + 1), cheap)):
        args = (dys, x, weights, lora_as, lora_bs, gates, hs, seed, scales, p, needs, "torch")
        torch.library.opcheck(backward, args, test_utils=tests)
    without = (dys, x, [None] * n, *args[3:10], [True, *[False] * n, *has[1 + n :]], "torch")
    if ranks:
        torch.library.opcheck(backward, without, test_utils=cheap)


def test_compiles_without_a_graph_break():
    compiled = torch.compile(fl.lora_linear_group, backend="aot_eager", fullgraph=True)
    for M in (5, 9):
        tensors = leaves(make(M=M))
        torch._dynamo.mark_dynamic(tensors[0], 0)
        dys = incoming(tensors)
        ours = run(compiled, tensors, dys, dropout_p=0.3, seed=3)
        eager = run(fl.lora_linear_group, tensors, dys, dropout_p=0.3, seed=3)
        assert all(torch.equal(u, v) for u, v in zip(ours, eager, strict=True))


def test_export():
    tensors = make(QKV)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return call(fl.lora_linear_group, [x, *tensors[1:]])

    shapes = ({0: torch.export.Dim("M")},)
    program = torch.export.export(Layer(), (tensors[0],), dynamic_shapes=shapes)
    assert "fused_lora.lora_linear_group.default" in program.graph_module.code
    again = make(QKV, 17)[0]
    for u, v in zip(program.module()(again), Layer()(again), strict=True):
        assert torch.equal(u, v)


def test_checkpoint_recomputes_the_same_mask():
    tensors = leaves(make())

    def fn(x):
        ys = call(fl.lora_linear_group, [x, *tensors[1:]], dropout_p=0.5)
        return torch.cat(ys, -1).tanh()

    torch.manual_seed(3)
    want = torch.autograd.grad(fn(tensors[0]).sum(), wanted(tensors))
    torch.manual_seed(3)
    checkpoint(fn, tensors[0], use_reentrant=False).sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(wanted(tensors), want, strict=True))


@backends
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_autocast(backend, x_dtype):
    """The results have autocast's dtype, gradients have their tensor's, the gate stays fp32."""
    tensors = make(MIXED, 33, 40)
    tensors[0] = tensors[0].to(x_dtype)
    tensors = leaves(tensors)
    dys = [dy.half() for dy in incoming(tensors)]
    with torch.autocast(DEVICE, dtype=torch.float16):
        ours = run(fl.lora_linear_group, tensors, dys, backend=backend)
        plain = F.linear(tensors[0], tensors[1])
    assert {y.dtype for y in ours[:3]} == {plain.dtype} == {torch.float16}
    assert [g.dtype for g in ours[3:]] == [t.dtype for t in wanted(tensors)]
    cast = [t if t is None or t.shape == (3,) else t.to(torch.float16) for t in tensors]
    cast = leaves(cast)
    rounded = [t.to(like.dtype) for t, like in zip(ours, (*dys, *wanted(cast)), strict=True)]
    assert_accurate(
        ("y 0", "y 1", "y 2", *names(tensors)),
        rounded,
        lambda *t: run(fl.reference.lora_linear_group, t[:-3], t[-3:]),
        (*cast, *dys),
    )


def test_meta_tensors_go_through_the_fake():
    tensors = [None if t is None else t.to("meta") for t in make()]
    ys = call(fl.lora_linear_group, leaves(tensors), backend="triton")
    assert all(y.is_meta for y in ys) and [y.shape for y in ys] == [(5, 9), (5, 5), (5, 7)]


def test_one_op_a_call():
    """Forward and backward are one registered op each."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called = []
    tensors = leaves(make())
    with Log():
        run(fl.lora_linear_group, tensors, incoming(tensors))
    assert [name for name in called if name.startswith("fused_lora")] == [
        "fused_lora.lora_linear_group.default",
        "fused_lora.lora_linear_group_backward.default",
    ]


def test_no_grad_skips_autograd():
    tensors = leaves(make())
    with torch.no_grad():
        ys = call(fl.lora_linear_group, tensors)
    assert all(y.grad_fn is None and not y.requires_grad for y in ys)
    with torch.inference_mode():
        again = call(fl.lora_linear_group, tensors)
    assert all(torch.equal(u, v) for u, v in zip(again, ys, strict=True))


def test_why():
    tensors = make()
    assert call(functools.partial(fl.why, "lora_linear_group"), tensors)["torch"] is None
    with pytest.raises(ValueError, match="lora_as must have an entry for each"):
        fl.why("lora_linear_group", tensors[0], tensors[1:4], [], [], scales=[])


# Refusals


def test_forward_mode_is_refused():
    tensors = make()
    with forward_ad.dual_level():
        tensors[0] = forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match="x carries a forward-mode tangent"):
            call(fl.lora_linear_group, tensors)


def test_double_backward_is_refused():
    tensors = leaves(make())
    ys = call(fl.lora_linear_group, tensors)
    (dx,) = torch.autograd.grad(ys[0].square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def zeros(*shape, **options):
    return torch.zeros(*shape, device=DEVICE, **options)


# What is changed in a good call: {argument: {place: value}}, or {argument: value} for all of it.
BAD = {
    "a tensor for a list": (
        {"weights": zeros(3, 9, 12)},
        TypeError,
        "weights must be a list, got Tensor",
    ),
    "no list": ({"scales": 1.0}, TypeError, "scales must be a list, got float"),
    "no projection": (
        {"weights": [], "lora_as": [], "lora_bs": [], "scales": [], "biases": None, "gates": None},
        ValueError,
        "weights is empty; there must be at least one projection",
    ),
    "too few adapters": (
        {"lora_as": []},
        ValueError,
        "lora_as must have an entry for each of the 3 weights, got 0",
    ),
    "too few gates": (
        {"gates": [None]},
        ValueError,
        "gates must have an entry for each of the 3 weights, got 1",
    ),
    "no weight": (
        {"weights": {1: None}},
        TypeError,
        "weights[1] must be a torch.Tensor, got NoneType",
    ),
    "half an adapter": (
        {"lora_as": {2: None}},
        ValueError,
        "projection 2 has lora_bs[2], but no whole adapter; lora_as[2] and lora_bs[2] must both be "
        "tensors, or both None and gates[2] too",
    ),
    "a gate alone": (
        {"gates": {1: zeros(3)}},
        ValueError,
        "projection 1 has gates[1], but no whole adapter; lora_as[1] and lora_bs[1] must both be "
        "tensors, or both None and gates[1] too",
    ),
    "0-d x": (
        {"x": torch.tensor(1.0, device=DEVICE)},
        ValueError,
        "x must have shape [..., K], got a 0-d tensor",
    ),
    "in features": (
        {"weights": {1: zeros(5, 11)}},
        ValueError,
        "weights[1] must have shape [N, K] = [any, 12], got [5, 11]",
    ),
    "a columns": (
        {"lora_as": {2: zeros(2, 11)}},
        ValueError,
        "lora_as[2] must have shape [R, K] = [any, 12], got [2, 11]",
    ),
    "a against b": (
        {"lora_bs": {2: zeros(7, 4)}},
        ValueError,
        "lora_bs[2] must have shape [N, R] = [7, 2], got [7, 4]",
    ),
    "rank 0": (
        {"lora_as": {2: zeros(0, 12)}, "lora_bs": {2: zeros(7, 0)}},
        ValueError,
        "lora_as[2] has shape [0, 12]; the rank must be at least 1",
    ),
    "bias length": (
        {"biases": {0: zeros(8)}},
        ValueError,
        "biases[0] must have shape [N] = [9], got [8]",
    ),
    "gate length": (
        {"gates": {0: zeros(4)}},
        ValueError,
        "gates[0] must have shape [R] = [3], got [4]",
    ),
    "weight of another dtype": (
        {"weights": {2: zeros(7, 12).half()}},
        TypeError,
        "weights[2] must have x's dtype float32, got float16",
    ),
    "adapter of another dtype": (
        {"lora_as": {0: zeros(3, 12).half()}},
        TypeError,
        "lora_as[0] must have dtype float32, got float16",
    ),
    "gate of another dtype": (
        {"gates": {0: zeros(3).double()}},
        TypeError,
        "gates[0] must have dtype float32, got float64",
    ),
    "device": (
        {"lora_bs": {0: torch.zeros(9, 3, device="meta")}},
        ValueError,
        f"lora_bs[0] is on meta but x is on {HERE}; move one of them",
    ),
    "subclass": (
        {"weights": {1: zeros(5, 12).as_subclass(Subclass)}},
        NotImplementedError,
        "weights[1] is a Subclass; tensor subclasses are not supported, pass a plain torch.Tensor",
    ),
    "scale nan": (
        {"scales": {2: float("nan")}},
        ValueError,
        "scales[2] must be finite in fp32, got nan",
    ),
    "scale string": (
        {"scales": {0: "2"}},
        TypeError,
        "scales[0] must be a float or a 0-d tensor, got str",
    ),
    "p": ({"dropout_p": 1.5}, ValueError, "dropout_p must lie in [0, 1], got 1.5"),
    "seed": ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
    "backend": (
        {"backend": "cudnn"},
        ValueError,
        "backend must be one of cuda, triton, torch or None, got 'cudnn'",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case):
    change, error, message = BAD[case]
    tensors = make()
    lists = "weights", "lora_as", "lora_bs", "biases", "gates"
    arguments = {"x": tensors[0], "scales": [1.0, None, 2.0]}
    arguments |= {name: tensors[1 + 3 * k : 4 + 3 * k] for k, name in enumerate(lists)}
    for name, value in change.items():
        if isinstance(value, dict):
            for place, one in value.items():
                arguments[name][place] = one
        else:
            arguments[name] = value
    before = [bytes_of(t) for t in tensors if t is not None]
    with pytest.raises(error) as raised:
        fl.lora_linear_group(**arguments)
    assert str(raised.value).removeprefix("lora_linear_group: ") == message
    assert [bytes_of(t) for t in tensors if t is not None] == before
