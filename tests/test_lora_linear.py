"""The public op, forward and backward, in every backend, held to reference.lora_linear in fp64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DROPOUTS, backends, dtypes, fuzz, layouts, ranks, seeds, sizes
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_lora as fl
from fused_lora import _extension
from fused_lora.testing import assert_accurate, assert_near, converted, guarded, saved_bytes

NAMES = ("x", "weight", "lora_a", "lora_b", "bias", "gate")
SCALE = 1.3


def make(
    M=5,
    K=12,
    N=9,
    R=3,
    *,
    dtype=torch.float32,
    bias=True,
    gate=True,
    lead=None,
    layout="contiguous",
):
    """The six tensors of one call, in NaN guard bands."""
    put = functools.partial(guarded, dtype=dtype, device=DEVICE)
    return (
        put((*((M,) if lead is None else lead), K), layout),
        put((N, K), std=max(K, 1) ** -0.5),
        put((R, K), std=max(K, 1) ** -0.5),
        put((N, R)),
        put((N,)) if bias else None,
        guarded((R,), device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
        if gate
        else None,
    )


def leaves(tensors, needs=(True,) * 6):
    return tuple(
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    )


def run(fn, tensors, dy=None, **kwargs):
    """[y, gradient of every tensor that requires one] of fn(*tensors)."""
    x, weight, lora_a, lora_b, bias, gate = tensors
    y = fn(x, weight, lora_a, lora_b, bias, gate=gate, scale=SCALE, **kwargs)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if dy is None:
        dy = torch.ones_like(y)
    return [y, *torch.autograd.grad(y, wanted, dy)]


def check_against_fp64(tensors, dy, backend, **kwargs):
    def plain(*inputs):
        return run(fl.reference.lora_linear, inputs[:6], inputs[6], **kwargs)

    names = [
        "y",
        *(
            f"d{n}"
            for n, t in zip(NAMES, tensors, strict=True)
            if t is not None and t.requires_grad
        ),
    ]
    ours = run(fl.lora_linear, tensors, dy, backend=backend, **kwargs)
    assert_accurate(names, ours, plain, (*tensors, dy))


def incoming(kind, shape, dtype):
    """A gradient as autograd hands it over: of a sum (stride 0), a slice of a cat, a transpose."""
    put = functools.partial(guarded, dtype=dtype, device=DEVICE)
    if kind == "expanded":
        return put((1,) * len(shape)).expand(shape)
    if kind == "sliced":
        return put((*shape[:-1], shape[-1] + 5))[..., 2 : 2 + shape[-1]]
    return put(shape, kind)


@backends
@given(
    M=sizes, K=sizes, N=sizes, R=ranks, dtype=dtypes, layout=layouts,
    bias=st.booleans(), gate=st.booleans(),
    dy_kind=st.sampled_from(("contiguous", "expanded", "sliced", "transposed", "step2")),
    p=st.sampled_from((0.0, *DROPOUTS, 1.0)), seed=seeds,
)  # fmt: skip
@fuzz(60)
def test_any_shape(backend, M, K, N, R, dtype, layout, bias, gate, dy_kind, p, seed):
    tensors = leaves(make(M, K, N, R, dtype=dtype, bias=bias, gate=gate, layout=layout))
    dy = incoming(dy_kind, (M, N), dtype)
    check_against_fp64(tensors, dy, backend, dropout_p=p, seed=seed)


@backends
@given(
    M=sizes, first=st.integers(0, 40), K=sizes, more=st.integers(0, 30), R=ranks, dtype=dtypes,
    p=st.sampled_from(DROPOUTS), seed=seeds,
)  # fmt: skip
@fuzz(20)
def test_columns_of_a_wider_input(backend, M, first, K, more, R, dtype, p, seed):
    tensors = leaves(make(M, K, 33, R, dtype=dtype))
    dy = guarded((M, 33), dtype=dtype, device=DEVICE)
    columns = 8 * first, 8 * first + K + more
    drop = {"dropout_p": p, "seed": seed, "dropout_columns": columns}
    check_against_fp64(tensors, dy, backend, **drop)


@backends
def test_columns_sum_to_the_whole(backend):
    """Of integers, so that the sum over parts is exact: y = sum_i y_i, dA_i and dx_i are parts."""
    parts, K = (0, 24, 64, 80), 85
    x, weight, a, b = (
        torch.randint(-2, 3, shape, device=DEVICE).float().requires_grad_()
        for shape in ((20, K), (9, K), (3, K), (9, 3))
    )
    call = functools.partial(fl.lora_linear, scale=2.0, dropout_p=0.5, seed=11, backend=backend)
    y = call(x, weight, a, b)
    dy = torch.randint(-2, 3, y.shape, device=DEVICE).float()
    whole = torch.autograd.grad(y, (x, a, b), dy)
    found = []
    for first, last in itertools.pairwise((*parts, K)):
        here = tuple(t.detach()[:, first:last].requires_grad_() for t in (x, weight, a))
        y_i = call(*here, b, dropout_columns=(first, K))
        found.append((y_i, *torch.autograd.grad(y_i, (here[0], here[2], b), dy)))
        frozen = (t.detach() for t in (*here[1:], b))  # dx alone takes another way to the mask
        y_i = call(here[0], *frozen, dropout_columns=(first, K))
        assert torch.equal(torch.autograd.grad(y_i, here[0], dy)[0], found[-1][1])
    ys, dxs, das, dbs = zip(*found, strict=True)
    assert torch.equal(sum(ys), y) and torch.equal(sum(dbs), whole[2])
    assert torch.equal(torch.cat(dxs, 1), whole[0]) and torch.equal(torch.cat(das, 1), whole[1])


@backends
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 0), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "step2", "expanded"])
def test_leading_dimensions(backend, lead, layout):
    if not lead and layout != "contiguous":
        layout = "step2"
    tensors = leaves(make(lead=lead, layout=layout))
    dy = guarded((*lead, 9), device=DEVICE)
    check_against_fp64(tensors, dy, backend, dropout_p=0.3, seed=5)


@backends
@pytest.mark.parametrize("layout", ["transposed", "step2", "expanded", "misaligned"])
def test_strided_parameters(backend, layout):
    x, _, _, _, bias, gate = make(33, 40, 50, 7)
    weight, a, b = (
        guarded(s, layout, device=DEVICE, std=0.2) for s in ((50, 40), (7, 40), (50, 7))
    )
    tensors = leaves((x, weight, a, b, bias, gate))
    dy = guarded((33, 50), device=DEVICE)
    check_against_fp64(tensors, dy, backend, dropout_p=0.3, seed=5)


@backends
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=6))[1:], ids=str)
def test_only_the_gradients_asked_for(backend, needs, monkeypatch):
    """Any subset of gradients is the same as in the full set, and no other is computed."""
    dy = guarded((5, 9), device=DEVICE)
    tensors = make()
    everything = run(fl.lora_linear, leaves(tensors), dy, dropout_p=0.3, seed=5, backend=backend)
    some = run(fl.lora_linear, leaves(tensors, needs), dy, dropout_p=0.3, seed=5, backend=backend)
    expected = [everything[0], *itertools.compress(everything[1:], needs)]
    for name, got, want in zip(
        ("y", *itertools.compress(NAMES, needs)), some, expected, strict=True
    ):
        assert_near(name, got, want)
    x, weight, a, b, bias, gate = tensors
    h = torch.randn(5, 3, device=DEVICE)
    seed = torch.tensor([5], device=DEVICE)
    grads = torch.ops.fused_lora.lora_linear_backward(
        dy, x, weight, a, b, gate, h, seed, SCALE, 0.3, needs, backend
    )
    assert [g.numel() > 0 for g in grads] == list(needs)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias,gate", list(itertools.product((False, True), repeat=2)))
def test_gradcheck(p, bias, gate):
    tensors = leaves(make(dtype=torch.float64, bias=bias, gate=gate))
    present = [t for t in tensors if t is not None]

    def fn(*args):
        it = iter(args)
        x, w, a, b, bi, g = (None if t is None else next(it) for t in tensors)
        return fl.lora_linear(
            x, w, a, b, bi, scale=SCALE, gate=g, dropout_p=p, seed=7, backend="torch"
        )

    assert torch.autograd.gradcheck(fn, present)


@backends
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_masters(backend, p, dtype):
    """Adapters and gate in fp32 over a 16-bit base: products in x's dtype, gradients in fp32."""
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    tensors = make(33, 64, 40, 8, dtype=dtype)
    masters = leaves(
        tuple(
            t.float() if n in ("lora_a", "lora_b") else t
            for n, t in zip(NAMES, tensors, strict=True)
        )
    )
    dy = guarded((33, 40), dtype=dtype, device=DEVICE)
    check_against_fp64(masters, dy, backend, dropout_p=p, seed=3)
    grads = run(fl.lora_linear, masters, dy, backend=backend)[1:]
    assert [g.dtype for g in grads] == [
        dtype,
        dtype,
        torch.float32,
        torch.float32,
        dtype,
        torch.float32,
    ]


@backends
@pytest.mark.parametrize("p", DROPOUTS)
def test_one_mask_in_forward_da_and_dx(backend, p):
    """Identity adapters make each of the three show its mask: the reference's, bit for bit."""
    n, seed = 70, 11
    eye = torch.eye(n, device=DEVICE)
    zero = torch.zeros(n, n, device=DEVICE)
    keep = fl.reference.dropout_mask(torch.tensor([seed], device=DEVICE), n, n, p)
    call = functools.partial(fl.lora_linear, scale=1.0, dropout_p=p, seed=seed, backend=backend)

    x = torch.ones(n, n, device=DEVICE, requires_grad=True)
    a = eye.clone().requires_grad_()
    y = call(x, zero, a, eye)  # y = drop(x) and, with dy = 1, dA = drop(x)^T summed with dh = 1
    assert torch.equal(y != 0, keep)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)  # D ⊙ (1 · I)
    assert torch.equal(dx != 0, keep)
    (da,) = torch.autograd.grad(y, a, eye)  # dh = I, so dA = drop(x)
    assert torch.equal(da != 0, keep)
    both = torch.autograd.grad(call(x, zero, a, eye), (x, a), eye)
    assert torch.equal(both[1] != 0, keep) and torch.equal(both[0] != 0, keep & eye.bool())


@backends
def test_p_one_is_the_base_layer(backend):
    tensors = leaves(make(33, 40, 50, 4))
    y, dx, dw, da, db, dbias, dgate = run(fl.lora_linear, tensors, dropout_p=1.0, backend=backend)
    base = fl.lora_linear(
        *tensors[:3], torch.zeros_like(tensors[3]), tensors[4], scale=1.0, backend=backend
    )
    assert torch.equal(y, base)
    assert not da.any() and not db.any() and not dgate.any()


@backends
def test_dropped_values_do_not_leak(backend):
    """A dropped element is masked, not multiplied by zero: an infinity there stays out of dA."""
    x, weight, a, b, bias, gate = make(64, 64, 9)
    seed = torch.tensor([4], device=DEVICE)
    keep = fl.reference.dropout_mask(seed, 64, 64, 0.5)
    x = torch.where(keep, x, float("inf"))
    a = a.detach().requires_grad_()
    y = fl.lora_linear(x, weight, a, b, scale=1.0, dropout_p=0.5, seed=seed, backend=backend)
    (da,) = torch.autograd.grad(y, a, torch.ones(64, 9, device=DEVICE))
    assert torch.isfinite(da).all()


@backends
def test_seed(backend):
    tensors = make(33, 40)
    call = functools.partial(run, fl.lora_linear, leaves(tensors), dropout_p=0.5, backend=backend)
    torch.manual_seed(1)
    first, second = call()[0], call()[0]
    torch.manual_seed(1)
    assert torch.equal(call()[0], first)
    assert not torch.equal(first, second)
    as_int, as_tensor = call(seed=-3)[0], call(seed=torch.tensor(-3, device=DEVICE))[0]
    assert torch.equal(as_int, as_tensor) and not torch.equal(as_int, first)
    evaluated, base = (
        call(training=False)[0],
        run(fl.lora_linear, leaves(tensors), backend=backend)[0],
    )
    assert torch.equal(evaluated, base)


@backends
def test_bitwise_repeatable_and_inputs_untouched(backend):
    tensors = leaves(make(65, 130, 70, 7))
    dy = guarded((65, 70), device=DEVICE)
    before = [t.detach().clone() for t in (*tensors, dy)]
    runs = [
        run(fl.lora_linear, tensors, dy, dropout_p=0.3, seed=1, backend=backend) for _ in range(3)
    ]
    for again in runs[1:]:
        assert all(torch.equal(u, v) for u, v in zip(again, runs[0], strict=True))
    assert all(torch.equal(u, v) for u, v in zip((*tensors, dy), before, strict=True))
    y = fl.lora_linear(*tensors[:5], gate=tensors[5], scale=SCALE, backend=backend)
    twice = [torch.autograd.grad(y, tensors, dy, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(u, v) for u, v in zip(*twice, strict=True))


@backends
def test_scale_tensor(backend):
    """A 0-d tensor scales as the same float does and has a gradient."""
    tensors = leaves(make())
    dy = guarded((5, 9), device=DEVICE)
    scale = torch.tensor(SCALE, device=DEVICE, requires_grad=True)
    x, weight, a, b, bias, gate = tensors

    def run_with(fn, scale, x, weight, a, b, bias, dy, gate=None):
        y = fn(x, weight, a, b, bias, gate=gate, scale=scale)
        return [y, *torch.autograd.grad(y, (scale, a, b), dy)]

    for gates in ((gate,), ()):
        inputs = scale, x, weight, a, b, bias, dy, *gates
        fn = functools.partial(fl.lora_linear, backend=backend)
        with_float, with_tensor = (
            fn(x, weight, a, b, bias, gate=next(iter(gates), None), scale=s) for s in (SCALE, scale)
        )
        assert_near("y", with_tensor, with_float)
        ours = run_with(fn, *inputs)
        plain = functools.partial(run_with, fl.reference.lora_linear)
        assert_accurate(("y", "scale", "a", "b"), ours, plain, inputs)


def test_saved_bytes():
    """x, the parameters, h and the seed: no mask, no dropped copy, no y."""
    M, K, N, R = 64, 96, 80, 8
    x, weight, a, b, bias, gate = leaves(make(M, K, N, R), (True, False, True, True, False, True))
    call = functools.partial(fl.lora_linear, x, weight, a, b, bias, gate=gate, scale=SCALE)
    for p, seed_bytes in ((0.0, 0), (0.1, 8)):
        size, _ = saved_bytes(functools.partial(call, dropout_p=p))
        assert size == 4 * (M * K + N * K + R * K + N * R + R + M * R) + seed_bytes


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saves_no_more_than_peft(p):
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(96, 80))
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=p, target_modules=["0"])
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    x = torch.randn(64, 96, requires_grad=True)
    a, b = theirs.lora_A.default.weight, theirs.lora_B.default.weight
    base = theirs.base_layer
    own, _ = saved_bytes(
        lambda: fl.lora_linear(x, base.weight, a, b, base.bias, scale=2.0, dropout_p=p)
    )
    peft_size, _ = saved_bytes(lambda: theirs(x))
    assert own <= peft_size


# Integration with torch


SAMPLES = [
    {"p": p, "gate": gate, "bias": bias, "dtype": dtype}
    for p, gate, bias, dtype in [
        (0.0, False, False, torch.float32),
        (0.0, True, True, torch.float32),
        (0.3, True, True, torch.float32),
        (0.3, False, True, torch.bfloat16),
        (0.0, True, False, torch.float64),
    ]
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_opcheck(sample):
    x, weight, a, b, bias, gate = make(
        dtype=sample["dtype"], gate=sample["gate"], bias=sample["bias"], lead=(2, 3)
    )
    seed = torch.tensor([1], device=DEVICE) if sample["p"] else None
    p = sample["p"]
    forward = torch.ops.fused_lora.lora_linear.default
    backward = torch.ops.fused_lora.lora_linear_backward.default
    for save_h, columns in ((False, (16, 40)), (True, None)):
        args = (x, weight, a, b, bias, gate, seed, SCALE, p, save_h, "torch", columns)
        torch.library.opcheck(forward, args)
    h, dy = forward(*args)[1], torch.randn(2, 3, 9, dtype=x.dtype, device=DEVICE)
    for needs in (
        [True] * 5 + [gate is not None],
        [True, False, True, True, False, False],
        [False] * 6,
    ):
        args = (dy, x, weight, a, b, gate, h, seed, SCALE, p, needs, "torch")
        torch.library.opcheck(backward, args)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(p, dynamic):
    compiled = torch.compile(fl.lora_linear, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for M in (5, 6, 9):
        tensors = leaves(make(M))
        dy = guarded((M, 9), device=DEVICE)
        ours = run(compiled, tensors, dy, dropout_p=p, seed=3)
        eager = run(fl.lora_linear, tensors, dy, dropout_p=p, seed=3)
        assert all(torch.equal(u, v) for u, v in zip(ours, eager, strict=True))


def test_compiles_with_inductor_and_draws_seeds():
    """The default compiler, dropout with no seed given: masks differ from call to call."""
    x, weight, a, b, bias, gate = leaves(make(64, 64, 9))

    @torch.compile(fullgraph=True)
    def fn(x):
        return fl.lora_linear(
            x.sin(), weight, a, b, bias, scale=SCALE, gate=gate, dropout_p=0.5
        ).cos()

    first, second = fn(x), fn(x)
    assert not torch.equal(first, second)
    grads = torch.autograd.grad(first.sum(), (x, a, b, gate))
    assert all(torch.isfinite(g).all() and g.any() for g in grads)


def test_recompiles_at_most_once_over_many_m():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(fl.lora_linear, backend=count, fullgraph=True)
    x, weight, a, b, bias, gate = make()
    for M in range(2, 12):
        compiled(guarded((M, 12), device=DEVICE), weight, a, b, bias, scale=SCALE)
    assert count.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    tensors = make()

    class Layer(torch.nn.Module):
        def forward(self, x, weight, a, b, bias, gate):
            return fl.lora_linear(x, weight, a, b, bias, scale=SCALE, gate=gate)

    program = torch.export.export(
        Layer(), tensors, dynamic_shapes=({0: torch.export.Dim("M")},) + ({},) * 5, strict=strict
    )
    assert "fused_lora.lora_linear.default" in program.graph_module.code
    again = make(17)
    assert torch.equal(program.module()(*again), Layer()(*again))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant):
    tensors = leaves(make())
    x, weight, a, b, bias, gate = tensors

    def fn(x):
        return fl.lora_linear(x, weight, a, b, bias, scale=SCALE, gate=gate, dropout_p=0.5).tanh()

    torch.manual_seed(3)
    want = torch.autograd.grad(fn(x).sum(), tensors)
    torch.manual_seed(3)
    y = checkpoint(fn, x, use_reentrant=reentrant)
    y.sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(tensors, want, strict=True))


@backends
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, x_dtype, adapter_dtype, autocast_dtype):
    """The result has autocast's dtype, gradients have their tensor's, the gate stays fp32."""
    if backend == "triton" and DEVICE == "cpu" and autocast_dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    tensors = make(33, 40, 50, 8)
    as_dtype = (x_dtype, torch.float32, adapter_dtype, adapter_dtype, torch.float32, torch.float32)
    tensors = leaves(tuple(t.to(d) for t, d in zip(tensors, as_dtype, strict=True)))
    dy = guarded((33, 50), dtype=autocast_dtype, device=DEVICE)
    with torch.autocast(DEVICE, dtype=autocast_dtype):
        plain = F.linear(tensors[0], tensors[1], tensors[4])
        y = fl.lora_linear(*tensors[:5], gate=tensors[5], scale=SCALE, backend=backend)
        assert y.dtype == plain.dtype == autocast_dtype
        ours = run(fl.lora_linear, tensors, dy, backend=backend)
    assert [g.dtype for g in ours[1:]] == list(as_dtype)
    cast = converted(tensors, lambda t: t.to(autocast_dtype) if t.shape != (8,) else t)
    rounded = [t.to(like.dtype) for t, like in zip(ours, (dy, *cast), strict=True)]
    assert_accurate(
        ("y", *NAMES), rounded, lambda *t: run(fl.reference.lora_linear, t[:6], t[6]), (*cast, dy)
    )


def test_autocast_leaves_float64_alone():
    tensors = make(dtype=torch.float64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = run(fl.lora_linear, leaves(tensors))[0]
    assert y.dtype == torch.float64


def test_meta_tensors_go_through_the_fake():
    x, weight, a, b, bias, gate = (t.to("meta") for t in make(R=5000, K=8))
    y = fl.lora_linear(x, weight, a, b, bias, scale=1.0, gate=gate, backend="triton")
    assert y.is_meta and y.shape == (5, 9)


def test_one_op_a_call():
    """Forward and backward are one registered op each."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called = []
    tensors = leaves(make(), (True, False, True, True, False, True))
    dy = guarded((5, 9), device=DEVICE)
    with Log():
        run(fl.lora_linear, tensors, dy)
    ours = [name for name in called if name.startswith("fused_lora")]
    assert ours == ["fused_lora.lora_linear.default", "fused_lora.lora_linear_backward.default"]


def test_no_grad_skips_autograd():
    tensors = leaves(make())
    x, weight, a, b, bias, gate = tensors
    with torch.no_grad():
        y = fl.lora_linear(x, weight, a, b, bias, scale=SCALE, gate=gate)
    assert y.grad_fn is None and not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(fl.lora_linear(x, weight, a, b, bias, scale=SCALE, gate=gate), y)


# Refusals


def test_forward_mode_is_refused():
    x, weight, a, b, _, _ = make()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="x carries a forward-mode tangent"):
            fl.lora_linear(dual, weight, a, b, scale=1.0)
        with pytest.raises(NotImplementedError, match="lora_a carries a forward-mode tangent"):
            fl.lora_linear(x, weight, forward_ad.make_dual(a, a), b, scale=1.0)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda t: fl.lora_linear(t, weight, a, b, scale=1.0), (x,), (x,))


def test_double_backward_is_refused():
    tensors = leaves(make())
    y = fl.lora_linear(*tensors[:5], scale=1.0)
    (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class Subclass(torch.Tensor):
    pass


HERE = torch.empty(0, device=DEVICE).device
FLOATS = "float32, bfloat16, float16, float64"
DOUBLE = {
    "x": torch.zeros(5, 12).double(),
    "weight": torch.zeros(9, 12).double(),
    "lora_a": torch.zeros(3, 12).double(),
    "lora_b": torch.zeros(9, 3).double(),
    "bias": torch.zeros(9).double(),
    "gate": torch.zeros(3).double(),
}
# What is changed in a good call, the error, and its message without the leading "lora_linear: ".
BAD = {
    "list": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "no weight": ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    "0-d x": (
        {"x": torch.tensor(1.0)},
        ValueError,
        "x must have shape [..., K], got a 0-d tensor",
    ),
    "in features": (
        {"x": torch.zeros(5, 11)},
        ValueError,
        "weight must have shape [N, K] = [any, 11], got [9, 12]",
    ),
    "weight 1-d": (
        {"weight": torch.zeros(12)},
        ValueError,
        "weight must have shape [N, K] = [any, 12], got [12]",
    ),
    "a columns": (
        {"lora_a": torch.zeros(3, 11)},
        ValueError,
        "lora_a must have shape [R, K] = [any, 12], got [3, 11]",
    ),
    "a against b": (
        {"lora_b": torch.zeros(9, 4)},
        ValueError,
        "lora_b must have shape [N, R] = [9, 3], got [9, 4]",
    ),
    "b transposed": (
        {"lora_b": torch.zeros(3, 9)},
        ValueError,
        "lora_b must have shape [N, R] = [9, 3], got [3, 9]",
    ),
    "rank 0": (
        {"lora_a": torch.zeros(0, 12), "lora_b": torch.zeros(9, 0)},
        ValueError,
        "lora_a has shape [0, 12]; the rank must be at least 1",
    ),
    "bias length": (
        {"bias": torch.zeros(8)},
        ValueError,
        "bias must have shape [N] = [9], got [8]",
    ),
    "gate length": (
        {"gate": torch.zeros(4)},
        ValueError,
        "gate must have shape [R] = [3], got [4]",
    ),
    "integer x": (
        {"x": torch.zeros(5, 12).long()},
        TypeError,
        f"x must have dtype {FLOATS}, got int64",
    ),
    "complex x": (
        {"x": torch.zeros(5, 12).cfloat()},
        TypeError,
        f"x must have dtype {FLOATS}, got complex64",
    ),
    "fp8 weight": (
        {"weight": torch.zeros(9, 12).to(torch.float8_e4m3fn)},
        TypeError,
        f"weight must have dtype {FLOATS}, got float8_e4m3fn",
    ),
    "weight of another dtype": (
        {"weight": torch.zeros(9, 12).half()},
        TypeError,
        "weight must have x's dtype float32, got float16",
    ),
    "bias of another dtype": (
        {"bias": torch.zeros(9).double()},
        TypeError,
        "bias must have x's dtype float32, got float64",
    ),
    "adapter of another dtype": (
        {"lora_a": torch.zeros(3, 12).half()},
        TypeError,
        "lora_a must have dtype float32, got float16",
    ),
    "gate of another dtype": (
        {"gate": torch.zeros(3).double()},
        TypeError,
        "gate must have dtype float32, got float64",
    ),
    "device": (
        {"weight": torch.zeros(9, 12, device="meta")},
        ValueError,
        f"weight is on meta but x is on {HERE}; move one of them",
    ),
    "sparse": (
        {"weight": torch.zeros(9, 12).to_sparse()},
        NotImplementedError,
        "weight has layout torch.sparse_coo; dense (strided) tensors are supported",
    ),
    "subclass": (
        {"x": torch.zeros(5, 12).as_subclass(Subclass)},
        NotImplementedError,
        "x is a Subclass; tensor subclasses are not supported, pass a plain torch.Tensor",
    ),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must be finite in fp32, got nan"),
    "scale inf": ({"scale": float("inf")}, ValueError, "scale must be finite in fp32, got inf"),
    "scale string": ({"scale": "2"}, TypeError, "scale must be a float or a 0-d tensor, got str"),
    "scale vector": (
        {"scale": torch.ones(2)},
        ValueError,
        "scale must be a float or a 0-d floating tensor, got a float32 tensor of shape [2]",
    ),
    "p negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must lie in [0, 1], got -0.1"),
    "p above one": ({"dropout_p": 1.5}, ValueError, "dropout_p must lie in [0, 1], got 1.5"),
    "p nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p must lie in [0, 1], got nan"),
    "p string": ({"dropout_p": "0"}, TypeError, "dropout_p must be a float, got str"),
    "seed float": (
        {"seed": 1.5},
        TypeError,
        "seed must be an int or an int64 tensor, got float",
    ),
    "seed dtype": ({"seed": torch.ones(1)}, TypeError, "seed must have dtype int64, got float32"),
    "seed size": (
        {"seed": torch.ones(2).long()},
        ValueError,
        "seed must have one element, got shape [2]",
    ),
    "seed range": (
        {"seed": 2**63},
        ValueError,
        "seed must fit in int64, got 9223372036854775808",
    ),
    "columns of one": (
        {"dropout_columns": 8},
        TypeError,
        "dropout_columns must be two ints (first, total), got 8",
    ),
    "columns of floats": (
        {"dropout_columns": (8.0, 20)},
        TypeError,
        "dropout_columns must be two ints (first, total), got (8.0, 20)",
    ),
    "columns from 4 on": (
        {"dropout_columns": (4, 20)},
        ValueError,
        "dropout_columns begins at 4; a multiple of 8 is wanted, as one call of the generator "
        "serves 8 columns",
    ),
    "columns past the end": (
        {"dropout_columns": (8, 19)},
        ValueError,
        "dropout_columns is (8, 19), but x has 12 columns, which end at 20",
    ),
    "backend": (
        {"backend": "cudnn"},
        ValueError,
        "backend must be one of cuda, triton, torch or None, got 'cudnn'",
    ),
    "float64 in cuda": (
        DOUBLE | {"backend": "cuda"},
        RuntimeError,
        "backend 'cuda' cannot run: "
        + (
            _extension.why_missing()
            or "the CUDA kernels accumulate in fp32 and take no float64; backend='torch' does"
        ),
    ),
    "float64 in triton": (
        DOUBLE | {"backend": "triton"},
        RuntimeError,
        "backend 'triton' cannot run: the Triton kernels accumulate in fp32 and take no float64; "
        "backend='torch' does",
    ),
}


def bytes_of(t: torch.Tensor) -> bytes:
    return t.to_dense().contiguous().cpu().view(torch.uint8).numpy().tobytes() if t.ndim else b""


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case):
    change, error, message = BAD[case]
    arguments = dict(zip(NAMES, make(), strict=True)) | {"scale": 1.0} | change
    for name, value in arguments.items():
        if type(value) is torch.Tensor and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    given_tensors = [v for v in arguments.values() if type(v) is torch.Tensor and not v.is_meta]
    before = [bytes_of(t) for t in given_tensors]
    with pytest.raises(error) as raised:
        fl.lora_linear(**arguments)
    assert str(raised.value).removeprefix("lora_linear: ") == message
    assert [bytes_of(t) for t in given_tensors] == before


def test_why_checks_the_arguments_too():
    x, weight, a, b, _, _ = make()
    with pytest.raises(ValueError, match="lora_b must have shape"):
        fl.why("lora_linear", x, weight, a, b.t(), scale=1.0)


@backends
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
def test_the_output_may_be_changed_in_place(backend, shape):
    """As a model may those of its layers; it is not a view, which a Function's may not."""
    x, weight, a, b = (
        torch.randn(s, device=DEVICE, requires_grad=True)
        for s in ((*shape, 8), (6, 8), (2, 8), (6, 2))
    )
    for call in (
        lambda: fl.lora_linear(x, weight, a, b, scale=1.0, backend=backend),
        lambda: fl.lora_linear_group(x, [weight], [a], [b], scales=[1.0], backend=backend)[0],
        lambda: fl.lora_add(x @ weight.t(), x, a, b, scale=1.0, backend=backend),
    ):
        plain = torch.autograd.grad((call() * 3).sum(), (x, a, b))
        changed = torch.autograd.grad(call().mul_(3).sum(), (x, a, b))
        assert all(torch.equal(u, v) for u, v in zip(plain, changed, strict=True))


def test_a_weight_that_no_gradient_needs_is_not_saved():
    """Under autocast it is a copy that would live until the backward."""
    x, weight, a, b = (torch.randn(s, device=DEVICE) for s in ((5, 64), (64, 64), (2, 64), (64, 2)))
    a.requires_grad_(), b.requires_grad_()
    for call in (
        lambda x: fl.lora_linear(x, weight, a, b, scale=1.0),
        lambda x: fl.lora_linear_group(x, [weight], [a], [b], scales=[1.0]),
    ):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            needed = saved_bytes(lambda call=call: call(x.detach().requires_grad_()))[0]
            assert needed - saved_bytes(lambda call=call: call(x))[0] == 2 * 64 * 64
