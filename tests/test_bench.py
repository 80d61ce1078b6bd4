"""The benchmarks' own arithmetic, their gate and their report."""

import json

import pytest
import torch
from conftest import DEVICE
from fused_lora.bench.measure import Interleaved, Spread, gate
from fused_lora.bench.registry import DIRECTIONS, LinearCase
from fused_lora.bench.registry import LORA_LINEAR as OP
from fused_lora.bench.report import Report, machine, rows
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich")
CPU = torch.device("cpu")
CASE = LinearCase(6, 10, 14, R=3)
PRESENT = {name: OP.contenders[name] for name in ("linear", "naive", "naive again", "torch")}


def call(case, contender="naive"):
    """(forward, the tensors that want a gradient) of one contender."""
    tensors = OP.tensors(case, CPU)
    return OP.contenders[contender].build(case, *tensors), [t for t in tensors if t.requires_grad]


def test_flops_are_those_that_torch_counts():
    forward, leaves = call(CASE)
    with FlopCounterMode(display=False) as counter:
        y = forward()
    assert counter.get_total_flops() == OP.flops(CASE, "forward")
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert counter.get_total_flops() == OP.flops(CASE, "backward")
    assert OP.flops(CASE, "both") == OP.flops(CASE, "forward") + OP.flops(CASE, "backward")


def test_bytes_of_one_case():
    x, weight, a, b, y, h = 6 * 14, 10 * 14, 3 * 14, 10 * 3, 6 * 10, 6 * 3
    assert OP.bytes(CASE, "forward") == 4 * (x + weight + a + b + y + h)
    assert OP.bytes(CASE, "backward") == 4 * (y + x + weight + a + b + h + x + a + b)
    half = CASE._replace(dtype=torch.bfloat16)
    assert 2 * OP.bytes(half, "both") == OP.bytes(CASE, "both")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["naive", "peft", "torch"])
def test_every_contender_passes_the_gate(name, p):
    contender = OP.contenders[name]
    if reason := contender.unavailable(CPU):
        pytest.skip(reason)
    case = CASE._replace(p=p)
    gate(OP, case, contender, OP.tensors(case, CPU))


def wrong_scale(case, x, weight, a, b):
    return lambda: OP.truth(case, x, weight, a, 1.001 * b)


def no_gradient_of_b(case, x, weight, a, b):
    return lambda: OP.truth(case, x, weight, a, b.detach()) + 0 * b.sum()


def no_dropout(case, x, weight, a, b):
    return lambda: OP.truth(case, x, weight, a, b)


def other_mask(case, x, weight, a, b):
    def forward():
        torch.rand(1)
        return OP.contenders["naive"].build(case, x, weight, a, b)()

    return forward


@pytest.mark.parametrize(
    ("build", "p"),
    [(wrong_scale, 0.0), (no_gradient_of_b, 0.0), (no_dropout, 0.5), (other_mask, 0.5)],
)
def test_the_gate_refuses(build, p):
    case = CASE._replace(p=p)
    wrong = OP.contenders["naive"]._replace(build=build)
    with pytest.raises(AssertionError, match=r"output|gradient"):
        gate(OP, case, wrong, OP.tensors(case, CPU))


def test_a_wrong_contender_is_not_timed():
    wrong = {"naive": OP.contenders["naive"]._replace(build=wrong_scale)}
    with pytest.raises(AssertionError, match="output"):
        Interleaved(OP, CASE, {"linear": OP.contenders["linear"], **wrong}, CPU)


def test_the_same_function_twice_is_within_its_spread():
    case = LinearCase(64, 128, 128)
    measured = Interleaved(OP, case, PRESENT, CPU)
    for _ in range(60):
        measured.round()
    for direction in DIRECTIONS:
        times, again = (Spread.of(measured.seconds(n, direction)) for n in ("naive", "naive again"))
        assert again.p20 <= times.p80 and times.p20 <= again.p80
        assert len(measured.seconds("naive", direction)) == 60


def test_report(tmp_path, capsys):
    measured = Interleaved(OP, CASE, PRESENT, CPU)
    for _ in range(3):
        measured.round()
    missing = {"peft": "not installed", "triton": "no GPU"}
    # Times that are known: ours takes twice as long as naive, and then half as long.
    for seconds in measured.rounds:
        for direction in DIRECTIONS:
            seconds["naive"][direction] = seconds["naive again"][direction] = 2e-3
            seconds["torch"][direction] = 4e-3 if direction == "forward" else 1e-3
    report = Report(OP, rows(OP, CASE, measured), machine(CPU), missing)
    assert report.noise == 0
    assert [report.slower(row, "torch") for row in report.rows] == [True, False, False]
    report.save(tmp_path)
    report.print()
    saved = json.loads((tmp_path / "lora_linear.json").read_text())
    assert saved["rows"][0]["contenders"]["torch"]["ms"] == {"p20": 4.0, "p50": 4.0, "p80": 4.0}
    assert saved["missing"] == missing
    for text in (capsys.readouterr().out, (tmp_path / "lora_linear.md").read_text()):
        assert text.count("SLOWER") == 1 and "2.00 SLOWER" in text and "0.50" in text
        assert "slower by more than the noise in 1 of 3 rows" in text
        assert "triton was not measured: no GPU" in text


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_events_on_a_gpu():
    device = torch.device("cuda")
    present = PRESENT | {"triton": OP.contenders["triton"]}
    measured = Interleaved(OP, LinearCase(64, 256, 256, dtype=torch.bfloat16), present, device)
    measured.round()
    assert all(0 < measured.rounds[0][name]["both"] < 60 for name in present)
