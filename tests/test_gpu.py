"""What only a GPU can show: streams, graphs, memory, offsets past 2^31, bitwise repetition."""

import functools

import pytest
import torch
from cases import CUDA_REFUSES, backends
from conftest import DEVICE

import fused_lora as fl
from fused_lora.testing import assert_accurate, guarded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def layer(M=333, K=520, N=392, R=12, dtype=torch.bfloat16):
    put = functools.partial(guarded, dtype=dtype, device=DEVICE)
    shapes = ((M, K), (N, K), (R, K), (N, R), (N,))
    tensors = [put(s, std=s[-1] ** -0.5 if s == (N, K) else 1.0) for s in shapes]
    return [t.requires_grad_() for t in (*tensors, guarded((R,), device=DEVICE))]


def step(tensors, dy, fn=fl.lora_linear, **kwargs):
    *five, gate = tensors
    y = fn(*five, scale=0.5, gate=gate, **kwargs)
    return [y, *torch.autograd.grad(y, tensors, dy)]


@backends
@dtypes
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_250_repeats_are_one(backend, dtype, p):
    tensors = layer(dtype=dtype)
    dy = guarded((333, 392), dtype=dtype, device=DEVICE)
    first = step(tensors, dy, dropout_p=p, seed=3, backend=backend)
    for _ in range(250):
        again = step(tensors, dy, dropout_p=p, seed=3, backend=backend)
        assert all(torch.equal(u, v) for u, v in zip(again, first, strict=True))


@dtypes
@pytest.mark.parametrize(
    "M,N,K", [(1, 4096, 4096), (64, 1024, 4096), (2048, 4096, 4096), (2837, 14336, 4096)]
)
@pytest.mark.parametrize("R", [8, 16, 128])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_model_sizes(M, N, K, R, p, dtype, backend):
    if backend == "cuda" and CUDA_REFUSES:
        pytest.skip(CUDA_REFUSES)
    tensors = layer(M, K, N, R, dtype)
    dy = guarded((M, N), dtype=dtype, device=DEVICE)

    def plain(*inputs):
        return step(inputs[:6], inputs[6], fl.reference.lora_linear, dropout_p=p, seed=3)

    names = ("y", "dx", "dw", "da", "db", "dbias", "dg")
    ours = step(tensors, dy, dropout_p=p, seed=3, backend=backend)
    assert_accurate(names, ours, plain, (*tensors, dy))


@backends
def test_offsets_past_2_to_the_31(backend):
    """x and y of more than 2^31 elements each: the last rows are those of the rows alone."""
    M, K, N, R = 2**19 + 5, 4104, 4112, 8
    x = torch.empty(M, K, dtype=torch.bfloat16, device=DEVICE).normal_()
    _, weight, a, b, bias, gate = (t.detach() for t in layer(1, K, N, R))
    call = functools.partial(fl.lora_linear, scale=0.5, gate=gate, backend=backend)
    y = call(x, weight, a, b, bias)
    tail = call(x[-64:].clone(), weight, a, b, bias)
    assert M * N > 2**31 and M * K > 2**31
    torch.testing.assert_close(y[-64:], tail, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        y[:64], call(x[:64].clone(), weight, a, b, bias), rtol=2e-2, atol=2e-2
    )
    del y
    a.requires_grad_(), b.requires_grad_()
    rows = torch.zeros(M, 1, dtype=torch.bfloat16, device=DEVICE)
    rows[-64:] = 1  # only the last rows carry a gradient
    ours = torch.autograd.grad(call(x, weight, a, b, bias), (a, b), rows.expand(M, N))
    want = torch.autograd.grad(
        call(x[-64:].clone(), weight, a, b, bias), (a, b), rows[-64:].expand(64, N)
    )
    torch.testing.assert_close(ours, want, rtol=2e-2, atol=2e-1)


@backends
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_graph_replays_equal_eager(backend, p):
    """Forward and backward are captured once; 100 replays on new inputs give what eager gives."""
    tensors = layer()
    x = tensors[0]
    dy = guarded((333, 392), dtype=x.dtype, device=DEVICE)
    seed = torch.tensor([1], device=DEVICE)
    run = functools.partial(step, tensors, dy, dropout_p=p, seed=seed, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for i in range(100):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            seed.fill_(i)
        graph.replay()
        assert all(torch.equal(u, v) for u, v in zip(captured, run(), strict=True))


def decoder(M=16, K=4096, N=4096, R=16, G=8):
    """A call that decodes M rows, each with its own adapter, and one with the adapter of all."""
    x, weight, a, b, *_ = (t.detach() for t in layer(M, K, N, R))
    bank = fl.AdapterBank(K, N, G, R, dtype=x.dtype, device=DEVICE)
    for j in range(G):
        bank.add(f"adapter {j}", a * (j + 1) / K, b, scale=0.5)
    routing = fl.AdapterRouting(torch.arange(M, device=DEVICE) % (G + 1) - 1, G)

    def call(backend):
        one = fl.lora_linear(x, weight, a, b, scale=0.5, backend=backend)
        return one, fl.multi_lora_linear(x, weight, bank, routing, backend=backend)

    return x, call


@backends
@pytest.mark.parametrize("M", [1, 16, 64])
@torch.no_grad()
def test_decoding_is_repeatable_and_captured(backend, M):
    """Also on two streams at once, whose counters must not be the same."""
    x, call = decoder(M)
    first = call(backend)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(125):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(call(backend))
        torch.cuda.synchronize()
        for again in found:
            assert all(torch.equal(u, v) for u, v in zip(again, first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(backend)
    for _ in range(100):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(u, v) for u, v in zip(captured, call(backend), strict=True))


def test_captured_dropout_draws_a_new_mask_at_every_replay():
    x, weight, a, b, *_ = layer()
    call = functools.partial(fl.lora_linear, x, weight, a, b, scale=1.0, dropout_p=0.5)
    with torch.no_grad():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


@backends
def test_current_stream(backend):
    """Work queued behind a sleep on a side stream is seen by the op, which runs on that stream."""
    tensors = layer()
    dy = guarded((333, 392), dtype=torch.bfloat16, device=DEVICE)
    fresh = [torch.randn_like(tensors[0]) for _ in range(100)]
    side = torch.cuda.Stream()
    for value in fresh:
        want = None
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000)
            with torch.no_grad():
                tensors[0].copy_(value)
            got = step(tensors, dy, backend=backend)
        side.synchronize()
        with torch.no_grad():
            tensors[0].copy_(value)
        want = step(tensors, dy, backend=backend)
        torch.cuda.synchronize()
        assert all(torch.equal(u, v) for u, v in zip(got, want, strict=True))


@backends
def test_a_thousand_steps_do_not_grow(backend):
    tensors = layer()
    dy = guarded((333, 392), dtype=torch.bfloat16, device=DEVICE)
    for _ in range(3):
        step(tensors, dy, dropout_p=0.1, backend=backend)
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        step(tensors, dy, dropout_p=0.1, backend=backend)
    assert torch.cuda.memory_allocated() == before


@backends
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_host_synchronisation(backend, p):
    tensors = layer()
    dy = guarded((333, 392), dtype=torch.bfloat16, device=DEVICE)
    step(tensors, dy, dropout_p=p, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors, dy, dropout_p=p, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)
@backends
def test_runs_on_the_tensors_device(backend):
    tensors = [t.detach().to("cuda:1").requires_grad_() for t in layer()]
    dy = torch.randn(333, 392, dtype=torch.bfloat16, device="cuda:1")
    ours = step(tensors, dy, backend=backend)
    want = step(
        [t.detach().to("cuda:0").requires_grad_() for t in tensors],
        dy.to("cuda:0"),
        backend=backend,
    )
    assert all(torch.equal(u.cpu(), v.cpu()) for u, v in zip(ours, want, strict=True))
