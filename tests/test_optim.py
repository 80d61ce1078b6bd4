"""SoRA: the proximal step of the gates beside any optimizer of the rest."""

import copy
import io
import math

import pytest
import torch
from conftest import DEVICE
from torch.nn import Linear, Parameter

from fused_lora.nn import SoRALinear
from fused_lora.ops.soft_threshold import soft_threshold_
from fused_lora.optim import SoRA
from fused_lora.optim import soft_threshold_ as exported


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
    saved = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], saved)
    saved.seek(0)
    state, schedule = torch.load(saved, weights_only=True)
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
        (ValueError, {"sparsity": math.inf}, "sparsity must be finite"),
        (TypeError, {"sparsity": True}, "sparsity must be a number"),
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
    with pytest.raises(error, match=words):
        SoRA(values.pop("optimizer"), values.pop("gates"), **values)


def test_training_cuts_the_ranks_that_are_not_needed():
    """A target of rank 2 over the frozen layer: of 8 gates 6 end at exactly zero."""
    torch.manual_seed(0)
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
