"""The benchmark of a training step: the gate, what is timed, and the report of it."""

import csv
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from fused_lora.bench import report, step

import fused_lora as fl

CPU = torch.device("cpu")
CASE = step.STAGES["cpu-quick"][0]


@pytest.fixture(scope="module")
def results():
    return step.measure([CASE], CPU, rounds=3, only=["torch"])


def test_the_contenders_have_the_same_adapters():
    peft, ours = (step.adapters(make(CASE, CPU)) for make in (step.with_peft, step.with_ours))
    assert {name: t.shape for name, t in peft.items()} == {n: t.shape for n, t in ours.items()}
    # Seven linear layers of each decoder layer, and not the head.
    assert len(ours) == 2 * 7 * CASE.layers
    assert all(t.requires_grad and t.dtype == torch.float32 for t in ours.values())


def test_all_compute_the_same_gradients(results):
    (case,) = results["cases"]
    assert set(case["errors"]) == {"PEFT", "PEFT again", "torch"}
    assert all(0 < error < 1e-5 for error in case["errors"].values())
    assert case["trained"] == sum(
        t.numel() for t in step.adapters(step.with_ours(CASE, CPU)).values()
    )


def test_what_is_timed(results):
    (case,) = results["cases"]
    for modes in case["times"].values():
        entry = modes["eager"]["step"]
        assert len(entry["all"]) == 3 and 0 < entry["p20"] <= entry["p50"] <= entry["p80"]
    assert case["times"]["PEFT"]["eager"]["step"]["over"] == {"PEFT": 1}
    # At least the base products forward and for dx: 2 flops a weight and token each.
    weights = CASE.layers * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 64
    assert case["flops"]["step"] > 4 * weights * CASE.tokens
    assert case["tokens"] == 24
    assert set(results["missing"]) <= {"triton", "cuda"}


def test_a_wrong_gradient_is_not_timed(monkeypatch, tmp_path, capsys):
    right = fl.lora_linear

    def wrong(x, weight, a, b, *args, **options):
        return right(x, weight, a, b, *args, **options | {"scale": 1.01 * options["scale"]})

    monkeypatch.setattr("fused_lora.nn.linear.lora_linear", wrong)
    arguments = ["--stage", "cpu-quick", "--only", "torch", "--rounds", "2", "--device", "cpu"]
    threads = torch.get_num_threads()
    assert step.main([*arguments, "--out", str(tmp_path)]) == 1
    torch.set_num_threads(threads)
    assert "REFUSED torch (tiny model" in capsys.readouterr().err
    (case,) = json.loads((tmp_path / "training_step-cpu-quick.json").read_text())["cases"]
    assert set(case["times"]) == {"PEFT", "PEFT again"}
    assert case["refused"]["torch"].startswith("its gradients differ from fp64 by")


def test_one_that_cannot_run_does_not_stop_the_others(monkeypatch):
    def breaks(case, device):
        raise RuntimeError("no kernel\nfor this")

    broken = step.Contender(breaks)
    monkeypatch.setitem(step.CONTENDERS, "torch", broken)
    (case,) = step.measure([CASE], CPU, rounds=2, only=["torch"])["cases"]
    assert case["refused"] == {"torch": "RuntimeError: no kernel"}
    assert set(case["times"]) == {"PEFT", "PEFT again"}


def test_the_gate():
    assert step.gate(2e-3, 1e-3, torch.float32) is None
    for wrong in (2.1e-3, float("nan")):
        assert "differ from fp64" in step.gate(wrong, 1e-3, torch.float32)


def test_report(results, tmp_path, capsys):
    found = json.loads(json.dumps(results))
    entry = found["cases"][0]["times"]["torch"]["eager"]["step"]
    entry |= {"p20": 0.04, "p50": 0.048, "p80": 0.05, "over": {"PEFT": 4.0}}
    found["cases"][0]["memory"]["torch"]["peak"] = 3_000_000_000
    made = step.StepReport(found)
    made.print()
    made.save(tmp_path, "some")
    for text in (capsys.readouterr().out, (tmp_path / "training_step-some.md").read_text()):
        assert "0.25 SLOWER" in text and "500" in text and "3.00" in text
    with open(tmp_path / "training_step-some.csv") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert float(rows["torch"]["tokens/s"]) == 500
    assert rows["torch"]["over PEFT"] == "4.0"
    assert (tmp_path / "training_step-some.png").read_bytes().startswith(b"\x89PNG")
    (folder,) = report.merge([tmp_path], tmp_path / "results")
    (merged,) = report.committed(tmp_path / "results")
    assert merged[0] == folder / "training_step"
    assert merged[1].markdown().count("SLOWER") == 1
    section = report.sections(tmp_path / "results")["docs/measured.md"]
    assert "training_step on" in section and "step, p = 0: 4.00" in section


def test_time_may_run_out():
    left = step.measure([CASE], CPU, rounds=2, seconds=0)
    assert not left["cases"] and list(left["unmeasured"]) == [str(CASE)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "nobody"], "no contender nobody"),
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["--stage", "none"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        step.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_every_stage_is_a_llama():
    for case in (case for cases in step.STAGES.values() for case in cases):
        assert case.hidden % case.heads == 0 and case.heads % case.kv_heads == 0
        assert case.tokens >= 24
