"""SoRA: the proximal step of the gates beside any optimizer of the rest."""

import copy
import io
import math

import pytest
import torch
from cases import CUDA
from conftest import DEVICE
from seeds import set_fixed_seed
from torch.nn import Linear, Parameter

from fused_lora.nn import SoRALinear
from fused_lora.ops.soft_threshold import soft_threshold_
from fused_lora.optim import SoRA, gate_l1
from fused_lora.optim import soft_threshold_ as exported

PUBLISHED = {"gate_step": "adam", "threshold": "fixed", "official_compat": True}
# Every form: which step, where xi comes from, which threshold.
forms = pytest.mark.parametrize(
    "form",
    (
        {"sparsity": 0.5},
        {"xi": 0.05, "threshold": "fixed"},
        {"sparsity": 0.5, "gate_step": "adam"},
        {"xi": 0.05, **PUBLISHED},
    ),
    ids=lambda f: f.get("gate_step", "sgd") + "-" + f.get("threshold", "lr"),
)


def prox(v, xi):
    """The closed form: the minimiser over g of xi |g| + (g - v)^2 / 2."""
    return torch.sign(v) * torch.clamp(v.abs() - xi, min=0)


def parameters(*sizes):
    return [Parameter(torch.randn(n, device=DEVICE)) for n in sizes]


def fill_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def make(rest, gates, lr=0.1, sparsity=0.5, inner=torch.optim.AdamW):
    return SoRA(inner(rest, lr=lr), gates, lr=lr, sparsity=sparsity)


def saved_and_loaded(state):
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=True)


def test_the_same_soft_threshold():
    assert exported is soft_threshold_


def test_the_step_of_the_gates_is_the_closed_form():
    rest, gates = parameters(5), parameters(7, 1, 300)
    optimizer = make(rest, gates, lr=0.3, sparsity=0.8)
    for step in range(4):
        fill_gradients(rest + gates, step)
        want = [prox(g.detach() - 0.3 * g.grad, 0.3 * 0.8) for g in gates]
        optimizer.step()
        for gate, expected in zip(gates, want, strict=True):
            torch.testing.assert_close(gate.detach(), expected)
            assert torch.equal(gate == 0, expected == 0)
    assert 0 < torch.cat(gates).count_nonzero() < 308


@pytest.mark.parametrize("inner", (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad))
def test_the_rest_trains_as_without_it(inner):
    rest, gates = parameters(5, 6), parameters(3)
    alone = copy.deepcopy(rest)
    optimizer, plain = make(rest, gates, inner=inner), inner(alone, lr=0.1)
    for step in range(5):
        fill_gradients(rest + gates, step)
        for p, q in zip(rest, alone, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(rest, alone, strict=True))


def test_a_gate_at_zero_comes_back_where_its_gradient_exceeds_the_sparsity():
    gate = Parameter(torch.zeros(4, device=DEVICE))
    optimizer = make(parameters(1), [gate], lr=0.1, sparsity=2)
    gate.grad = torch.tensor([5.0, -5.0, 2.0, -1.9], device=DEVICE)
    optimizer.step()
    torch.testing.assert_close(gate.detach().cpu(), torch.tensor([-0.3, 0.3, 0.0, 0.0]))
    assert not gate[2:].any()


def test_no_sparsity_is_plain_descent():
    gates = parameters(9)
    optimizer = make(parameters(1), gates, sparsity=0)
    fill_gradients(gates, 0)
    want = gates[0].detach() - 0.1 * gates[0].grad
    optimizer.step()
    torch.testing.assert_close(gates[0].detach(), want)


def test_a_gate_without_a_gradient_is_left_alone():
    rest, gates = parameters(2), parameters(4, 5)
    optimizer = make(rest, gates)
    before = gates[0].detach().clone()
    fill_gradients(rest + gates[1:], 0)
    optimizer.step()
    assert torch.equal(gates[0], before) and not torch.equal(gates[1], before)
    optimizer.zero_grad()
    optimizer.step()


def test_zero_grad_and_param_groups_reach_everything():
    rest, gates = parameters(2, 3), parameters(4, 5)
    optimizer = make(rest, gates)
    fill_gradients(rest + gates, 0)
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is q for p, q in zip(everything, rest + gates, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in rest + gates)
    assert [set(g) >= {"sparsity"} for g in optimizer.param_groups] == [False, True]


def test_groups_of_gates_have_their_own_values():
    rest, gates = parameters(2), parameters(4, 5)
    groups = [{"params": gates[:1], "sparsity": 0.0}, {"params": gates[1:], "lr": 0.01}]
    optimizer = SoRA(torch.optim.SGD(rest, lr=1.0), groups, lr=0.1, sparsity=0.5)
    assert set(groups[0]) == {"params", "sparsity"}
    assert [g["params"] for g in optimizer.state_dict()["param_groups"]] == [[0], [1], [2]]
    fill_gradients(rest + gates, 0)
    want = [gates[0].detach() - 0.1 * gates[0].grad]
    want += [prox(gates[1].detach() - 0.01 * gates[1].grad, 0.005)]
    optimizer.step()
    for gate, expected in zip(gates, want, strict=True):
        torch.testing.assert_close(gate.detach(), expected)


def test_a_schedule_reaches_both_learning_rates_and_the_threshold():
    rest, gates = parameters(2), parameters(50)
    optimizer = SoRA(torch.optim.AdamW(rest, lr=1.0), gates, lr=0.2, sparsity=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        rates = [g["lr"] for g in optimizer.param_groups]
        assert rates == [0.5**step, 0.2 * 0.5**step]
        assert optimizer.optimizer.param_groups[0]["lr"] == 0.5**step
        fill_gradients(rest + gates, step)
        want = prox(gates[0].detach() - rates[1] * gates[0].grad, rates[1] * 0.5)
        optimizer.step()
        torch.testing.assert_close(gates[0].detach(), want)
        scheduler.step()


def test_a_raised_sparsity_counts_from_the_next_step():
    gates = parameters(20)
    optimizer = make(parameters(1), gates)
    optimizer.param_groups[-1]["sparsity"] = 1000.0
    fill_gradients(gates, 0)
    optimizer.step()
    assert not gates[0].any()


def test_a_grad_scaler_skips_both_or_neither():
    rest, gates = parameters(3), parameters(4)
    optimizer = make(rest, gates)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    scaler.scale(torch.zeros((), device=DEVICE))
    for poisoned in (rest[0], gates[0]):
        fill_gradients(rest + gates, 1)
        poisoned.grad[1] = math.inf
        before = [p.detach().clone() for p in rest + gates]
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(rest + gates, before, strict=True))
    fill_gradients(rest + gates, 2)
    scale = scaler.get_scale()
    want = prox(gates[0].detach() - 0.1 * gates[0].grad / scale, 0.05)
    before = rest[0].detach().clone()
    scaler.step(optimizer)
    torch.testing.assert_close(gates[0].detach(), want)
    assert not torch.equal(rest[0], before)


def test_a_closure_is_called_once_and_its_loss_returned():
    rest, gates = parameters(3), parameters(4)
    optimizer = make(rest, gates, inner=torch.optim.SGD, sparsity=0.0)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in rest + gates)
        loss.backward()
        return loss

    want = sum(p.detach().square().sum() for p in rest + gates)
    assert torch.equal(optimizer.step(closure), want) and len(calls) == 1
    after = sum(p.detach().square().sum() for p in rest + gates)
    torch.testing.assert_close(after, 0.64 * want)


def test_state_dict_round_trip_resumes_exactly():
    rest, gates = parameters(3), parameters(40)
    optimizer = make(rest, gates)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(rest, gates, optimizer, scheduler, steps):
        for step in steps:
            fill_gradients(rest + gates, step)
            optimizer.step()
            scheduler.step()

    train(rest, gates, optimizer, scheduler, range(3))
    optimizer.param_groups[-1]["sparsity"] = 0.7
    state, schedule = saved_and_loaded([optimizer.state_dict(), scheduler.state_dict()])
    assert [g["params"] for g in state["param_groups"]] == [[0], [1]]

    rest2, gates2 = copy.deepcopy(rest), copy.deepcopy(gates)
    other = make(rest2, gates2, lr=9.0, sparsity=9.0)
    scheduler2 = torch.optim.lr_scheduler.ExponentialLR(other, 0.9)
    other.load_state_dict(state)
    scheduler2.load_state_dict(schedule)
    assert other.param_groups[-1]["params"][0] is gates2[0]
    assert other.param_groups[-1]["sparsity"] == 0.7
    train(rest, gates, optimizer, scheduler, range(3, 6))
    train(rest2, gates2, other, scheduler2, range(3, 6))
    assert torch.equal(rest[0], rest2[0]) and torch.equal(gates[0], gates2[0])


def test_a_state_of_other_sizes_is_refused_and_loads_nothing():
    optimizer = make(parameters(3), parameters(4, 5))
    other = make(parameters(3), parameters(4), sparsity=0.7)
    with pytest.raises(ValueError, match=r"groups of sizes \[1, 1\], this optimizer has \[1, 2\]"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[-1]["sparsity"] == 0.5


def test_deepcopy_keeps_the_inner_optimizer():
    rest, gates = parameters(3), parameters(4)
    optimizer = make(rest, gates)
    fill_gradients(rest + gates, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert [len(g["params"]) for g in twin.param_groups] == [1, 1]
    fill_gradients([p for g in twin.param_groups for p in g["params"]], 1)
    twin.step()
    assert not torch.equal(twin.param_groups[1]["params"][0], gates[0])


def test_a_group_of_gates_is_added():
    gates, more = parameters(4), parameters(5)
    optimizer = make(parameters(1), gates)
    optimizer.add_param_group({"params": more[0], "sparsity": 3.0})
    assert [g.get("sparsity") for g in optimizer.param_groups] == [None, 0.5, 3.0]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": gates})


@pytest.mark.parametrize(
    ("error", "change", "words"),
    (
        (TypeError, {"optimizer": "adamw"}, "optimizer must be a torch.optim.Optimizer, got str"),
        (ValueError, {"gates": []}, "gates is empty"),
        (TypeError, {"gates": torch.ones(2)}, r"got one tensor; pass \[gate\]"),
        (TypeError, {"gates": [1.0]}, "can only optimize Tensors"),
        (ValueError, {"gates": "shared"}, r"gates\[0\] of shape \[3\] is also in optimizer"),
        (ValueError, {"gates": "twice"}, "gates holds the same tensor twice"),
        (TypeError, {"lr": None}, "lr must be a number, got None"),
        (TypeError, {"lr": torch.tensor(0.1)}, "lr must be a number"),
        (ValueError, {"lr": -0.1}, "lr must be at least 0, got -0.1"),
        (ValueError, {"sparsity": -1}, "sparsity must be at least 0, got -1"),
        (ValueError, {"sparsity": math.inf}, "sparsity must be finite in fp32"),
        (TypeError, {"sparsity": True}, "sparsity must be a number"),
        (TypeError, {"sparsity": None}, "sparsity must be a number, got None"),
        (ValueError, {"xi": 0.1}, "xi is given, but threshold='lr' takes sparsity"),
        (
            ValueError,
            {"threshold": "fixed", "xi": 0.1},
            "sparsity is given, but threshold='fixed' takes xi",
        ),
        (TypeError, {"threshold": "fixed", "sparsity": None}, "xi must be a number, got None"),
        (
            ValueError,
            {"threshold": "fixed", "sparsity": None, "xi": math.nan},
            "xi must be finite in fp32, got nan",
        ),
        (
            ValueError,
            {"threshold": "fixed", "sparsity": None, "xi": math.inf},
            "xi must be finite in fp32, got inf",
        ),
        (ValueError, {"threshold": "eta"}, "threshold must be one of 'lr', 'fixed', got 'eta'"),
        (ValueError, {"gate_step": "adamw"}, "gate_step must be one of 'sgd', 'adam', got 'adamw'"),
        (ValueError, {"official_compat": 1}, "official_compat must be one of True, False, got 1"),
        (ValueError, {"backend": "cpu"}, "backend must be one of cuda, triton, torch or None"),
        (TypeError, {"gate_step": "adam", "betas": 0.9}, "betas must be two numbers, got 0.9"),
        (
            ValueError,
            {"gate_step": "adam", "betas": (0.9, 1.0)},
            r"betas\[1\] must lie in \[0, 1\), got 1.0",
        ),
        (ValueError, {"gate_step": "adam", "eps": -1}, "eps must be at least 0, got -1"),
        (
            ValueError,
            {"gates": "decayed"},
            "a group of gates has no 'weight_decay'; it may have params, initial_lr, lr, sparsity",
        ),
    ),
)
def test_bad_arguments(error, change, words):
    rest, gates = parameters(3), parameters(4)
    values = {"optimizer": torch.optim.SGD(rest, lr=0.1), "gates": gates, "lr": 0.1, "sparsity": 1}
    values.update(change)
    if values["gates"] == "shared":
        values["gates"] = rest
    elif values["gates"] == "twice":
        values["gates"] = gates * 2
    elif values["gates"] == "decayed":
        values["gates"] = [{"params": gates, "weight_decay": 0.1}]
    with pytest.raises(error, match=words):
        SoRA(values.pop("optimizer"), values.pop("gates"), **values)


@pytest.mark.parametrize("backend", ["torch", CUDA])
@pytest.mark.parametrize("official_compat", (False, True))
@pytest.mark.parametrize("threshold", ("lr", "fixed"))
def test_adam_and_then_the_threshold(threshold, official_compat, backend):
    """The step of torch.optim.Adam, then T_xi; with official_compat what the published masks do."""
    rest, gates = parameters(5), parameters(7, 1, 300)
    twins = copy.deepcopy(gates)
    strength = {"sparsity": 0.8} if threshold == "lr" else {"xi": 0.04}
    options = {"betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = SoRA(
        torch.optim.AdamW(rest, lr=0.05), gates, lr=0.05, gate_step="adam", threshold=threshold,
        official_compat=official_compat, backend=backend, **strength, **options,
    )  # fmt: skip
    adam = torch.optim.Adam(twins, lr=0.05, **options)
    xi = torch.tensor(0.05 * 0.8 if threshold == "lr" else 0.04, device=DEVICE)
    for step in range(6):
        fill_gradients(rest + gates, step)
        for gate, twin in zip(gates, twins, strict=True):
            twin.grad = gate.grad.clone()
        adam.step()
        for p in twins:
            p = p.detach()
            if official_compat:
                p[p > xi] -= xi
                p[p < -xi] += xi
                p[p.abs() < xi] = 0
            else:
                p.copy_(prox(p, xi))
        optimizer.step()
        for gate, twin in zip(gates, twins, strict=True):
            torch.testing.assert_close(gate, twin)
            assert torch.equal(gate == 0, twin == 0)
    assert 0 < torch.cat(gates).count_nonzero() < 308


def published_step(gate, state, step, lr, xi, betas=(0.9, 0.999), eps=1e-8):
    """The published code's optimiser of one gate, in the words of its algorithm."""
    m, v = state
    m.mul_(betas[0]).add_(gate.grad, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(gate.grad, gate.grad, value=1 - betas[1])
    size = lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    gate.sub_(size * m / (v.sqrt() + eps))
    gate[gate > xi] -= xi
    gate[gate < -xi] += xi
    gate[gate.abs() < xi] = 0


def test_the_trajectory_of_the_published_code():
    """50 steps; in fp64, where only the place of eps is left to differ."""
    gate = Parameter(torch.randn(200, dtype=torch.float64, device=DEVICE))
    twin, state = gate.detach().clone(), (torch.zeros_like(gate), torch.zeros_like(gate))
    state = tuple(t.detach() for t in state)
    optimizer = SoRA(torch.optim.SGD(parameters(1), lr=0.1), [gate], lr=0.02, xi=0.005, **PUBLISHED)
    for step in range(1, 51):
        fill_gradients([gate], step)
        twin.grad = gate.grad.clone()
        published_step(twin, state, step, 0.02, 0.005)
        optimizer.step()
    # The two places of eps are a factor of sqrt(1 - 0.999) apart at most: steps differ by lr * eps
    # * 32 / |grad|, and what a step began the next one carries.
    assert (gate - twin).abs().max() < 50 * 0.02 * 1e-8 * 32 / 1e-2
    assert torch.equal(gate == 0, twin == 0) and 10 < (gate == 0).sum() < 190


@forms
def test_no_step_reads_a_tensor_on_the_host(form):
    """Meta tensors have no values: .item(), bool(tensor) and .tolist() of one raise."""
    rest, gates = (
        [Parameter(torch.randn(n, device="meta")) for n in sizes] for sizes in ((3, 4), (5, 6))
    )
    optimizer = SoRA(torch.optim.SGD(rest, lr=0.1), gates, lr=0.1, **form)
    for p in rest + gates:
        p.grad = torch.empty_like(p)
    optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@forms
def test_no_step_waits_for_the_gpu(form):
    rest, gates = parameters(3, 4), parameters(5, 6)
    optimizer = SoRA(torch.optim.AdamW(rest, lr=0.1), gates, lr=0.1, **form)
    fill_gradients(rest + gates, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@forms
def test_a_grad_scaler_skips_all_forms_and_a_fused_inner_step(form):
    rest, gates = parameters(3), parameters(4)
    optimizer = SoRA(torch.optim.AdamW(rest, lr=0.1, fused=True), gates, lr=0.1, **form)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    scaler.scale(torch.zeros((), device=DEVICE))
    fill_gradients(rest + gates, 0)
    gates[0].grad[2] = math.nan
    before = [p.detach().clone() for p in rest + gates]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(rest + gates, before, strict=True))
    assert not optimizer.state and scaler.get_scale() == 4.0
    # The gradients are 4 times as large, and the step is that of the gradients themselves.
    twins = copy.deepcopy(rest + gates)
    alone = SoRA(torch.optim.AdamW(twins[:1], lr=0.1), twins[1:], lr=0.1, **form)
    fill_gradients(twins, 1)
    for p, q in zip(rest + gates, twins, strict=True):
        p.grad = 4 * q.grad
    scaler.step(optimizer)
    alone.step()
    for p, q in zip(rest + gates, twins, strict=True):
        torch.testing.assert_close(p, q)


@forms
def test_clipping_and_accumulation_reach_the_gates(form):
    """Gradients of two halves of a batch, clipped as one vector with those of the rest."""
    torch.manual_seed(0)
    layer = SoRALinear(6, 5, r=4, init=False, device=DEVICE)
    twin = copy.deepcopy(layer)
    x = torch.randn(8, 6, device=DEVICE)
    results = []
    for model, batches in ((layer, x.split(4)), (twin, [x])):
        rest = [model.lora_a, model.lora_b]
        optimizer = SoRA(torch.optim.SGD(rest, lr=0.1), [model.gate], lr=0.1, **form)
        for _ in range(3):
            optimizer.zero_grad()
            for batch in batches:
                model(batch).square().sum().backward()
            everything = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(everything, 0.1)
            assert norm > 0.1
            after = torch.stack([p.grad.norm() for p in everything]).norm()
            torch.testing.assert_close(after, torch.full_like(after, 0.1), rtol=1e-4, atol=0)
            optimizer.step()
        results.append([p.detach() for p in everything])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@forms
def test_the_state_of_every_form_resumes_exactly(form):
    """Onto an optimizer that already has another state, through a file of weights alone."""
    rest, gates = parameters(3), parameters(4, 50)
    optimizer = SoRA(torch.optim.AdamW(rest, lr=0.1), gates, lr=0.1, **form)
    for step in range(3):
        fill_gradients(rest + gates, step)
        optimizer.step()
    state = saved_and_loaded(optimizer.state_dict())
    steps = [float(s["step"]) for s in state["state"].values()]
    assert steps == [3.0] * (3 if form.get("gate_step") == "adam" else 1)
    assert set(optimizer.state) == {*rest, *(gates if len(steps) == 3 else ())}

    twins = copy.deepcopy(rest + gates)
    other = SoRA(torch.optim.AdamW(twins[:1], lr=7.0), twins[1:], lr=7.0, **form)
    before = [p.detach().clone() for p in twins]
    fill_gradients(twins, 9)
    other.step()
    with torch.no_grad():
        torch._foreach_copy_(twins, before)
    other.load_state_dict(state)
    for step in range(3, 6):
        for params, either in ((rest + gates, optimizer), (twins, other)):
            fill_gradients(params, step)
            either.step()
    assert all(torch.equal(p, q) for p, q in zip(rest + gates, twins, strict=True))
    for one, two in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {**one, "params": None} == {**two, "params": None}


def test_a_state_of_another_form_is_refused_and_loads_nothing():
    gates = parameters(4)
    sgd, adam, fixed = (
        SoRA(torch.optim.SGD(parameters(3), lr=0.1), gates, lr=0.1, **form)
        for form in (
            {"sparsity": 1.0},
            {"sparsity": 2.0, "gate_step": "adam"},
            {"xi": 3.0, "threshold": "fixed"},
        )
    )
    with pytest.raises(ValueError, match="gates of gate_step='adam', this optimizer has 'sgd'"):
        sgd.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="gates of gate_step='sgd', this optimizer has 'adam'"):
        adam.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match="gates without 'sparsity', which threshold='lr' of this"):
        sgd.load_state_dict(fixed.state_dict())
    assert sgd.gate_groups[0]["sparsity"] == 1.0 and adam.gate_groups[0]["sparsity"] == 2.0


def test_a_state_with_the_lr_and_sparsity_of_the_gates_alone_loads():
    rest, gates = parameters(3), parameters(4)
    optimizer = make(rest, gates)
    state = optimizer.state_dict()
    state["param_groups"][-1] = {"lr": 0.3, "sparsity": 2.0, "params": [1]}
    optimizer.load_state_dict(state)
    fill_gradients(gates, 0)
    want = prox(gates[0].detach() - 0.3 * gates[0].grad, 0.6)
    optimizer.step()
    torch.testing.assert_close(gates[0].detach(), want)


def test_a_bad_value_of_a_group_is_found_before_anything_is_written():
    rest, gates = parameters(3), parameters(4)
    optimizer = make(rest, gates)
    fill_gradients(rest + gates, 0)
    before = [p.detach().clone() for p in rest + gates]
    for name, value, words in (
        ("sparsity", math.nan, "sparsity must be finite in fp32"),
        ("lr", -1.0, "lr must be at least 0, got -1.0"),
        ("sparsity", 1e300, r"sparsity must be finite in fp32, got 1e\+300"),
    ):
        group = optimizer.gate_groups[0]
        good, group[name] = group[name], value
        with pytest.raises(ValueError, match=words):
            optimizer.step()
        group[name] = good
    assert all(torch.equal(p, q) for p, q in zip(rest + gates, before, strict=True))


@forms
def test_a_gate_that_is_not_finite_does_not_become_a_number(form):
    gate = Parameter(torch.tensor([math.inf, -math.inf, math.nan, 1.0], device=DEVICE))
    optimizer = SoRA(torch.optim.SGD(parameters(1), lr=0.1), [gate], lr=0.1, **form)
    gate.grad = torch.full_like(gate, 0.1)
    optimizer.step()
    assert torch.isfinite(gate).tolist() == [False, False, False, True]


def test_views_are_not_assigned_to():
    optimizer = make(parameters(3), parameters(4))
    for name in ("param_groups", "state"):
        with pytest.raises(AttributeError, match=f"{name} is a view"):
            setattr(optimizer, name, {"a": 1})


def test_gate_l1_and_its_gradient():
    gates = [Parameter(torch.tensor(v, device=DEVICE)) for v in ([1.0, -2.0, 0.0], [[4.0], [0.5]])]
    loss = 10 * gate_l1(gates)
    assert loss.item() == 10 * 7.5 / 5
    loss.backward()
    assert gates[0].grad.tolist() == [2.0, -2.0, 0.0] and gates[1].grad.tolist() == [[2.0], [2.0]]
    doubles = [g.detach().double().requires_grad_() for g in gates[1:]]
    assert torch.autograd.gradcheck(lambda g: gate_l1([g]), doubles)
    with pytest.raises(TypeError, match=r"gates must be a sequence of tensors, got one tensor"):
        gate_l1(gates[0])
    with pytest.raises(ValueError, match="gates is empty"):
        gate_l1([])


def test_training_cuts_the_ranks_that_are_not_needed():
    """A target of rank 2 over the frozen layer: of 8 gates 6 end at exactly zero."""
    set_fixed_seed(0)
    base = Linear(16, 12, device=DEVICE)
    delta = (torch.randn(12, 2) @ torch.randn(2, 16) / 4).to(DEVICE)
    x = torch.randn(256, 16, device=DEVICE)
    target = torch.nn.functional.linear(x, base.weight + delta, base.bias).detach()
    layer = SoRALinear.from_linear(base, r=8, lora_alpha=8)
    rest = torch.optim.AdamW([layer.lora_a, layer.lora_b], lr=0.01, weight_decay=0.1)
    optimizer = SoRA(rest, [layer.gate], lr=0.01, sparsity=0.8)
    losses = []
    for _ in range(600):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert layer.gate.count_nonzero().item() == 2, layer.gate
    assert losses[-1] < 0.01 * losses[0], losses[-1]
