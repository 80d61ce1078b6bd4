"""Phases of sparsity: their values, and what begins anew with each."""

import math

import pytest
import torch
from test_optim import fill_gradients, make, parameters, saved_and_loaded

from fused_lora.optim import SoRA, SparsitySchedule, sparsity_values


@pytest.mark.parametrize(
    ("kind", "want"),
    (
        ("linear", [1.0, 1.75, 2.5, 3.25, 4.0]),
        ("log_linear", [math.log(math.e + i / 4 * (math.e**4 - math.e)) for i in range(5)]),
        ("exp_linear", [4 ** (i / 4) for i in range(5)]),
    ),
)
def test_spacings(kind, want):
    assert sparsity_values(1, 4, 5, kind) == pytest.approx(want, rel=1e-15)
    assert sparsity_values(4, 1, 5, kind) == pytest.approx(want[::-1], rel=1e-15)
    assert sparsity_values(1, 4, 1, kind) == [4.0] and sparsity_values(1, 4, 2, kind) == [1, 4]


def test_the_published_schedule():
    """xi from 0 to 7e-4 in 7 steps; values far below 1 are linear by either name."""
    linear = sparsity_values(0, 7e-4, 7)
    assert linear == pytest.approx([i / 6 * 7e-4 for i in range(7)], abs=1e-18)
    assert sparsity_values(0, 7e-4, 7, "log_linear") == pytest.approx(linear, rel=1e-3)
    assert sparsity_values(2000.0, 3000.0, 3, "log_linear")[1] == pytest.approx(3000 - math.log(2))


@pytest.mark.parametrize(
    ("error", "change", "words"),
    (
        (TypeError, {"phases": 2.0}, "phases must be an int, got 2.0"),
        (ValueError, {"phases": 0}, "phases must be at least 1, got 0"),
        (
            ValueError,
            {"kind": "cosine"},
            "kind must be one of 'linear', 'log_linear', 'exp_linear'",
        ),
        (ValueError, {"start": -1}, "start must be at least 0, got -1"),
        (ValueError, {"end": math.inf}, "end must be finite in fp32, got inf"),
        (
            ValueError,
            {"start": 0, "kind": "exp_linear"},
            "start must be above 0 with kind='exp_linear', got 0",
        ),
        (TypeError, {"optimizer": torch.optim.SGD}, "optimizer must be a SoRA, got type"),
        (ValueError, {"restart_lr": None}, "restart_lr must be one of True, False, got None"),
    ),
)
def test_bad_schedules(error, change, words):
    values = {"optimizer": make(parameters(1), parameters(2)), "start": 1, "end": 2, "phases": 3}
    with pytest.raises(error, match=words):
        SparsitySchedule(**{**values, **change})


@pytest.mark.parametrize("threshold", ("lr", "fixed"))
def test_phases_raise_the_sparsity_and_begin_again_with_the_rate(threshold):
    name = "sparsity" if threshold == "lr" else "xi"
    rest, gates = parameters(3), parameters(4)
    inner = torch.optim.SGD(rest, lr=0.5)
    optimizer = SoRA(inner, gates, lr=0.2, threshold=threshold, **{name: 9.0})
    schedule = SparsitySchedule(optimizer, 0.1, 0.3, 3)
    for phase, value in enumerate(schedule):
        assert value == optimizer.gate_groups[0][name] == schedule.values[phase]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0, 1 - step / 4))
        rates = []
        for _ in range(4):
            rates.append([g["lr"] for g in optimizer.param_groups])
            fill_gradients(rest + gates, 0)
            optimizer.step()
            scheduler.step()
        want = [[0.5 * f, 0.2 * f] for f in (1, 0.75, 0.5, 0.25)]
        assert rates == [pytest.approx(w) for w in want]
        assert [g["lr"] for g in optimizer.param_groups] == [0, 0]
    assert phase == 2 and schedule.values == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(RuntimeError, match="all 3 phases have begun"):
        schedule.step()


def test_a_schedule_may_leave_the_rates_and_resumes():
    optimizer = make(parameters(3), parameters(4))
    schedule = SparsitySchedule(optimizer, 1, 3, 3, restart_lr=False)
    optimizer.gate_groups[0]["lr"] = 0.025
    schedule.step()
    assert optimizer.gate_groups[0]["lr"] == 0.025
    state = saved_and_loaded(schedule.state_dict())
    other = SparsitySchedule(optimizer, 5, 6, 2)
    other.load_state_dict(state)
    assert list(other) == [2.0, 3.0] and optimizer.gate_groups[0]["lr"] == 0.1
    more = SoRA(torch.optim.SGD(parameters(1), lr=1.0), [{"params": p} for p in parameters(1, 2)],
                lr=1.0, sparsity=1.0)  # fmt: skip
    with pytest.raises(ValueError, match="rates of 2 parameter groups, the optimizer has 3"):
        SparsitySchedule(more, 1, 2, 2).load_state_dict(state)


def test_the_rate_that_a_warm_up_hides_is_found():
    optimizer = make(parameters(3), parameters(4))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.gate_groups[0]["lr"] == 0
    SparsitySchedule(optimizer, 1, 2, 2).step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]
