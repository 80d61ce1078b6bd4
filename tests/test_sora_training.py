"""Training with gates: the same trajectory on every backend and on two processes, and gates that
come back."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import two_processes
from cases import CUDA
from conftest import DEVICE

import fused_lora as fl
from fused_lora.nn import SoRALinear
from fused_lora.optim import SoRA

SCALE = 1.5
FORMS = {
    "paper": {"sparsity": 0.3},
    "adam": {"sparsity": 1.2, "gate_step": "adam"},
    "fixed": {"xi": 2e-2, "threshold": "fixed", "gate_step": "adam"},
}


def start(M, K, N, R, dtype):
    """x, target, and (weight, bias, A, B, gate) of two layers; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator)).to(DEVICE, dtype)

    def layer(K, N):
        std = K**-0.5
        weights = draw(N, K, std=std), draw(N)
        return *weights, draw(R, K, std=std), draw(N, R, std=0.3), draw(R)

    return draw(M, K), draw(M, N), layer(K, N), layer(N, N)


def trajectory(lora_linear, form, steps, sizes, dtype=torch.float32, clip=1.0, **options):
    """(losses, trained parameters at the end), in fp64: two gated layers, AdamW and SoRA."""
    x, target, *layers = start(*sizes, dtype)
    for layer in layers:
        for t in layer[2:]:
            t.requires_grad_()
    rest, gates = [t for w in layers for t in w[2:4]], [w[4] for w in layers]
    optimizer = SoRA(torch.optim.AdamW(rest, lr=0.01), gates, lr=0.02, **FORMS[form])
    losses = []
    for step in range(steps):
        h = x
        for i, (weight, bias, a, b, gate) in enumerate(layers):
            seed = {"dropout_p": 0.1, "seed": 2 * step + i}
            h = lora_linear(h, weight, a, b, bias, scale=SCALE, gate=gate, **seed, **options)
            h = torch.tanh(h) if i == 0 else h
        loss = (h - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest + gates, clip)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double(), torch.cat([t.detach().flatten() for t in rest + gates])


def check_trajectory(backend, form, steps, sizes):
    """At most 4 times as far from the fp64 run as the reference in fp32 is, at any step.

    The true soft threshold and a clipped step enlarge no difference, so the two fp32 runs stay
    apart by what their roundings add up to. 4, as each of them is one sample of that.
    """
    true = trajectory(fl.reference.lora_linear, form, steps, sizes, torch.float64)
    plain = trajectory(fl.reference.lora_linear, form, steps, sizes)
    ours = trajectory(fl.lora_linear, form, steps, sizes, backend=backend)
    for name, got, same, want in zip(("losses", "parameters"), ours, plain, true, strict=True):
        floor = torch.finfo(torch.float32).eps * want.norm()
        error, theirs = (got - want).norm(), (same - want).norm()
        assert error <= 4 * theirs + floor, f"{name}: {error:.2e}, the reference has {theirs:.2e}"
    return true


@pytest.mark.parametrize("form", FORMS)
def test_50_steps_are_those_of_the_reference(form):
    sizes = 64, 48, 40, 8
    losses, parameters = check_trajectory("torch", form, 50, sizes)
    assert losses[-1] < 0.95 * losses[0]
    gates = parameters[-16:]
    assert 0 < (gates == 0).sum() < 16, gates


@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_the_kernels_train_alike(backend):
    check_trajectory(backend, "paper", 50 if DEVICE == "cuda" else 4, (17, 20, 12, 5))


@pytest.mark.parametrize("backend", ["torch", "triton", CUDA])
@pytest.mark.parametrize("form", FORMS)
def test_gates_at_zero_come_back(form, backend):
    """The target wants all gates at 1, half of them start at 0: they get the gradient that the
    equation says, and leave zero; those of which B is zero get none, and stay."""
    torch.manual_seed(1)
    layer = SoRALinear(12, 10, r=6, lora_alpha=6, init=False, gate_init="ones", device=DEVICE)
    with torch.no_grad():
        layer.lora_b[:, 5] = 0
    x = torch.randn(32, 12, device=DEVICE)
    target = layer(x).detach()
    with torch.no_grad():
        layer.gate[3:] = 0
    fixed = layer.lora_a.requires_grad_(False), layer.lora_b.requires_grad_(False)
    head = torch.nn.Parameter(torch.zeros(1, device=DEVICE))
    strength = {"xi": 1e-4} if form == "fixed" else {"sparsity": 0.0005}
    options = {**FORMS[form], **strength}
    lr = 5.0 if form == "paper" else 0.05
    optimizer = SoRA(torch.optim.SGD([head], lr=lr), [layer.gate], lr=lr, **options)
    with fl.use_backend(backend):
        for step in range(6):
            optimizer.zero_grad()
            y = layer(x)
            dy = 2 * (y - target).detach() / y.numel()
            (y - target).square().mean().backward()
            u, h = layer.scale * dy @ fixed[1], x @ fixed[0].T
            torch.testing.assert_close(layer.gate.grad, (u * h).sum(0), rtol=1e-4, atol=1e-7)
            optimizer.step()
            if step == 0:
                assert (layer.gate[3:5] > 0).all()
    assert not layer.gate[5].any()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("many", (False, True))
def test_gradients_at_closed_gates_in_fp64(many, p):
    """By finite differences: a gate at exactly zero has the gradient of its neighbourhood."""
    tensors = [torch.randn(s, dtype=torch.float64, device=DEVICE) for s in ((6, 5), (4, 5), (4,))]
    a, b, gate = (torch.randn(s, dtype=torch.float64, device=DEVICE) for s in ((3, 5), (4, 3), 3))
    gate[1:] = 0
    ids = torch.tensor([0, -1, 0, 0, -1, 0], device=DEVICE)

    def fn(x, weight, bias, a, b, gate):
        if not many:
            return fl.lora_linear(
                x, weight, a, b, bias, scale=SCALE, gate=gate, dropout_p=p, seed=3, backend="torch"
            )
        rank, scale = torch.full_like(ids[:1], 3).int(), torch.full_like(gate[:1], SCALE)
        slots = fl.reference.AdapterSlots(a[None], b.t()[None], rank, scale, gate[None])
        return fl.multi_lora_linear(x, weight, slots, ids, bias, dropout_p=p, seed=3)

    inputs = [t.requires_grad_() for t in (*tensors, a, b, gate)]
    assert torch.autograd.gradcheck(fn, inputs)
    (dgate,) = torch.autograd.grad(fn(*inputs).sum(), gate)
    assert dgate.all()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_train_as_one(tmp_path: Path):
    torch.multiprocessing.spawn(two_processes.one_of_two, (str(tmp_path),), nprocs=2)
    trained = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*trained)
    alone = two_processes.alone()
    torch.testing.assert_close(trained[0], alone, rtol=1e-4, atol=1e-5)
    assert 0 < (alone[-8:] == 0).sum() < 8
