import math

import pytest
import torch
from cases import CUDA, CUDA_REFUSES
from conftest import DEVICE

import fused_lora as fl
from fused_lora import _extension
from fused_lora.ops.soft_threshold import soft_threshold_

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Around a warp, a block, and the 65536 elements of a chunk of the kernel.
SIZES = (0, 1, 31, 64, 127, 128, 129, 1000, 65535, 65536, 65537, 200001)

on_a_gpu = pytest.mark.skipif(
    DEVICE != "cuda" or CUDA_REFUSES is not None, reason="needs a GPU and the extension"
)


@pytest.fixture(params=["torch", CUDA])
def backend(request) -> str:
    return request.param


def closed_form(gate: torch.Tensor, xi: float) -> torch.Tensor:
    """The three cases as the paper writes them, in at least fp32, rounded once."""
    v = gate.detach().to(torch.promote_types(gate.dtype, torch.float32))
    edge = torch.tensor(xi, dtype=v.dtype, device=v.device)
    out = torch.where(v > edge, v - edge, torch.where(v < -edge, v + edge, 0 * v))
    return out.to(gate.dtype)


def published(gate: torch.Tensor, xi: float) -> torch.Tensor:
    """The three masks of the published code, one after the other, in at least fp32."""
    p = gate.detach().to(torch.promote_types(gate.dtype, torch.float32), copy=True)
    p[p > xi] -= xi
    p[p < -xi] += xi
    p[p.abs() < xi] = 0.0
    return p.to(gate.dtype)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def edges(dtype: torch.dtype, xi: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(v, T_xi(v)) at and beside +-xi, and where floating point is special; xi is a power of 2."""
    eps, inf, nan = torch.finfo(dtype).eps * xi, math.inf, math.nan
    v = [xi, xi + eps, xi - eps, -xi, -xi - eps, -xi + eps, 0.0, -0.0, 1.0, -1.0, inf, -inf, nan]
    want = [0, eps, 0, 0, -eps, 0, 0, 0, 1 - xi, xi - 1, inf, -inf, nan]
    return torch.tensor(v, dtype=dtype), torch.tensor(want, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("xi", [0.0, 0.1, 0.5, 1e-8, 7.0])
def test_closed_form(dtype, xi, device, backend):
    gates = [torch.randn(n, device=device).to(dtype) for n in SIZES]
    want = [closed_form(g, xi) for g in gates]
    assert soft_threshold_(gates, xi, backend=backend) is gates
    for got, expected in zip(gates, want, strict=True):
        same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges(dtype, device, backend):
    v, want = edges(dtype, 0.25)
    same(soft_threshold_(v.to(device), 0.25, backend=backend), want.to(device))


def test_minimises_the_penalised_distance(device, backend):
    """T_xi(v) = argmin_g xi |g| + 1/2 (g - v)^2, by search over a fine grid."""
    v = torch.linspace(-1, 1, 41, device=device, dtype=torch.float64)
    grid = torch.linspace(-1, 1, 4001, device=device, dtype=torch.float64)
    cost = 0.3 * grid.abs() + 0.5 * (grid - v[:, None]) ** 2
    got = soft_threshold_(v.clone(), 0.3, backend=backend)
    assert (got - grid[cost.argmin(1)]).abs().max() <= 2 / 4000


@pytest.mark.parametrize("xi", [0.3, 1e-3])
def test_a_hundred_thousand_values_against_fp64(xi, device, backend):
    """Within a rounding of the minimiser sign(v) max(|v| - xi, 0) in fp64, and zero where it is."""
    v = torch.randn(100_000, device=device)
    v[::7] *= xi  # many near the edges
    edge = torch.tensor(xi).double().item()  # as the gates have it: in fp32
    want = v.double().sign() * (v.double().abs() - edge).clamp(min=0)
    got = soft_threshold_(v.clone(), xi, backend=backend).double()
    assert ((got - want).abs() <= torch.finfo(torch.float32).eps / 2 * want.abs()).all()
    assert torch.equal(got == 0, want == 0) and 100 < (got == 0).sum() < 99_900


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("xi", [0.0, 0.1, 0.5, 1e-8, 7.0])
def test_official_compat_is_the_published_code(dtype, xi, device, backend):
    gates = [torch.randn(n, device=device).to(dtype) for n in (*SIZES, 100_000)]
    want = [published(g, xi) for g in gates]
    soft_threshold_(gates, xi, official_compat=True, backend=backend)
    for got, expected in zip(gates, want, strict=True):
        same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_official_compat(dtype, device, backend):
    """Zero below 2 xi, but for |v| = xi, which stays; NaN and infinities stay."""
    xi, eps, inf, nan = 0.25, torch.finfo(dtype).eps / 4, math.inf, math.nan
    v = [xi, -xi, xi + eps, xi - eps, -xi - eps, 0.0, -0.0, 2 * xi, 2 * xi - eps, -2 * xi]
    want = [xi, -xi, 0, 0, 0, 0, 0, xi, 0, -xi]
    v, want = (torch.tensor([*t, inf, -inf, nan], dtype=dtype) for t in (v, want))
    same(published(v, xi), want)
    got = soft_threshold_(v.to(device), xi, official_compat=True, backend=backend)
    same(got, want.to(device))


def test_mixed_dtypes_shapes_and_strides(device, backend):
    base = torch.randn(40, 6, device=device)
    gates = (
        torch.randn(3, 5, device=device),
        torch.randn(7, device=device, dtype=torch.float16),
        torch.randn((), device=device, dtype=torch.float64),
        base[:, 2],
        base[::3, 4],
        torch.randn(4, 9, device=device).t(),
        torch.randn(0, 4, device=device),
        torch.nn.Parameter(torch.randn(8, device=device)),
    )
    before = base.clone()
    want = [closed_form(g, 0.4) for g in gates]
    assert soft_threshold_(gates, 0.4, backend=backend) is gates
    for got, expected in zip(gates, want, strict=True):
        same(got.detach(), expected)
    untouched = torch.ones_like(base, dtype=torch.bool)
    untouched[:, 2] = untouched[::3, 4] = False
    same(base[untouched], before[untouched])


@pytest.mark.parametrize("count", [0, 1, 253, 254, 255, 600])
def test_many_gates(count, device, backend):
    gates = [torch.randn(i % 70, device=device) for i in range(count)]
    want = [closed_form(g, 0.2) for g in gates]
    for got, expected in zip(soft_threshold_(gates, 0.2, backend=backend), want, strict=True):
        same(got, expected)


def test_autograd_sees_that_a_saved_gate_has_changed(device, backend):
    gate = torch.nn.Parameter(torch.randn(8, device=device))
    loss = (gate * gate).sum()
    soft_threshold_(gate, 0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_history_is_recorded(device, backend):
    gate = torch.nn.Parameter(torch.randn(8, device=device))
    soft_threshold_(gate, 0.1, backend=backend)
    assert gate.is_leaf and gate.requires_grad and gate.grad_fn is None
    with torch.inference_mode():
        inner = torch.ones(4, device=device)
        same(soft_threshold_(inner, 0.25, backend=backend), torch.full_like(inner, 0.75))


def test_meta_tensors():
    gate = torch.empty(8, device="meta")
    assert soft_threshold_(gate, 0.1) is gate


def test_opcheck(device):
    op = torch.ops.fused_lora.soft_threshold_.default
    for sizes in ((4,), (3, 0, 5)):
        gates = [torch.randn(n, device=device) for n in sizes]
        torch.library.opcheck(op, (gates, 0.3, False, "torch"))
    halves = [torch.randn(6, device=device).to(dtype) for dtype in DTYPES]
    for official_compat in (False, True):
        torch.library.opcheck(op, (halves, 0.3, official_compat, "torch"))


@pytest.mark.parametrize("official_compat", [False, True])
def test_compiles_whole(official_compat, device):
    def step(gates, x, xi):
        soft_threshold_(gates, xi, official_compat=official_compat)
        return sum((g * x[: g.numel()]).sum() for g in gates)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for xi in (0.1, 0.2, 0.3):
        gates = [torch.nn.Parameter(torch.randn(n, device=device)) for n in (5, 8)]
        gates.append(torch.randn(10, 4, device=device)[:, 1])
        x = torch.randn(10, device=device)
        want = [(published if official_compat else closed_form)(g, xi) for g in gates]
        out = compiled(gates, x, xi)
        for got, expected in zip(gates, want, strict=True):
            same(got.detach(), expected)
        torch.testing.assert_close(out, sum((g * x[: g.numel()]).sum() for g in want))


TENSOR = "soft_threshold_: gates must be a torch.Tensor or a sequence of them, got "
DTYPE = "soft_threshold_: {} must have dtype float32, bfloat16, float16, float64, got {}"
XI = "soft_threshold_: xi must be "


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (3, TypeError, TENSOR + "int"),
        ("gate", TypeError, TENSOR + "str"),
        (iter([]), TypeError, TENSOR + "list_iterator"),
        ([None], TypeError, "soft_threshold_: gates[1] must be a torch.Tensor, got NoneType"),
        ([torch.arange(3)], TypeError, DTYPE.format("gates[1]", "int64")),
        ([torch.ones(2, dtype=torch.complex64)], TypeError, DTYPE.format("gates[1]", "complex64")),
        (torch.arange(3), TypeError, DTYPE.format("gates", "int64")),
        (
            [torch.ones(1).expand(4)],
            ValueError,
            "soft_threshold_: gates[1] is expanded (shape [4], strides [0]), so its elements share "
            "memory; pass what it was expanded from",
        ),
    ],
)
def test_bad_gates_write_nothing(bad, error, message):
    good = torch.ones(4)
    with pytest.raises(error) as raised:
        soft_threshold_([good, *bad] if isinstance(bad, list) else bad, 0.5)
    assert str(raised.value) == message
    same(good, torch.ones(4))


def test_the_same_gate_twice_writes_nothing():
    gate = torch.ones(4)
    with pytest.raises(ValueError, match="gates holds the same tensor twice; pass each gate once"):
        soft_threshold_([gate, torch.ones(2), gate], 0.5)
    same(gate, torch.ones(4))


@pytest.mark.parametrize(
    "xi, error, message",
    [
        (-0.1, ValueError, XI + "at least 0 and finite in fp32, got -0.1"),
        (math.nan, ValueError, XI + "at least 0 and finite in fp32, got nan"),
        (math.inf, ValueError, XI + "at least 0 and finite in fp32, got inf"),
        (1e39, ValueError, XI + "at least 0 and finite in fp32, got 1e+39"),
        ("0.1", TypeError, XI + "a float, got str"),
        (True, TypeError, XI + "a float, got bool"),
        (torch.tensor(0.1), TypeError, XI + "a float, got Tensor"),
    ],
)
def test_bad_xi_writes_nothing(xi, error, message):
    gate = torch.ones(4)
    with pytest.raises(error) as raised:
        soft_threshold_(gate, xi)
    assert str(raised.value) == message
    same(gate, torch.ones(4))


def test_bad_official_compat_writes_nothing():
    gate = torch.ones(4)
    with pytest.raises(TypeError) as raised:
        soft_threshold_(gate, 0.5, official_compat=1)
    assert str(raised.value) == "soft_threshold_: official_compat must be a bool, got int"
    same(gate, torch.ones(4))


def test_backends_that_cannot_run_say_why(monkeypatch):
    monkeypatch.setattr(_extension, "emulates", lambda: False)
    gate = torch.ones(4)
    reasons = fl.why("soft_threshold_", gate, 0.1)
    assert list(reasons.items()) == [
        ("torch", None),
        ("cuda", "gates are on cpu; the CUDA kernel runs on CUDA devices"),
        ("triton", "soft_threshold_ has no Triton kernel; use backend='cuda' or 'torch'"),
    ]
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError) as raised:
            soft_threshold_(gate, 0.1, backend=name)
        message = f"soft_threshold_: backend {name!r} cannot run: {reasons[name]}"
        assert str(raised.value) == message
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, torch or None"):
        soft_threshold_(gate, 0.1, backend="cpu")
    same(gate, torch.ones(4))


@pytest.mark.gpu
@on_a_gpu
def test_graph_replays_the_kernel_on_new_values(device):
    gates = [torch.randn(n, device=device) for n in (5, 64, 70000) for _ in range(100)]
    soft_threshold_(gates, 0.2, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        soft_threshold_(gates, 0.2, backend="cuda")
    for _ in range(3):
        for gate in gates:
            gate.normal_()
        want = [closed_form(g, 0.2) for g in gates]
        graph.replay()
        for got, expected in zip(gates, want, strict=True):
            same(got, expected)


@pytest.mark.gpu
@on_a_gpu
def test_runs_on_the_current_stream(device):
    gate = torch.zeros(64, device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        gate.fill_(1.0)
        soft_threshold_(gate, 0.25, backend="cuda")
    side.synchronize()
    same(gate, torch.full_like(gate, 0.75))


@pytest.mark.gpu
@on_a_gpu
def test_one_launch_for_a_model_of_gates(device):
    gates = [torch.randn(64, device=device) for _ in range(224)]
    soft_threshold_(gates, 0.1, backend="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        soft_threshold_(gates, 0.1, backend="cuda")
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "soft_threshold_kernel" in e.name]
    assert len(kernels) == 1
