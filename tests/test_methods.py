"""The benchmark of the methods: what is counted, what is said of the numbers, and a small run."""

import json

import pytest
import torch

import fused_lora as fl

methods = pytest.importorskip("fused_lora.bench.methods")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a whole run at tiny sizes."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("methods")
    with fl.use_backend("torch"):
        assert methods.main(["--stage", "cpu-quick", "--out", str(folder), "--device", "cpu"]) == 0
    return json.loads((folder / "methods.json").read_text()), folder


@pytest.mark.slow
def test_every_method_is_run(results):
    found, folder = results
    plan = methods.STAGES["cpu-quick"]
    assert [(p["method"], p["steps"]) for p in found["points"]] == [
        ("LoRA", 18), ("LoRA", 18), ("SoRA", 18), ("SoRA, λ raised", 12), ("SoRA, λ raised", 18),
        ("AdaLoRA", 18),
    ]  # fmt: skip
    assert all(0 < p["bits"] < found["before"] for p in found["points"])
    lora = [p["kept"] for p in found["points"] if p["method"] == "LoRA"]
    assert lora[1] == 4 * lora[0]
    first, last = (p["kept"] for p in found["points"] if p["method"] == methods.RAISED)
    assert 0 < last < first
    (adalora,) = (p["kept"] for p in found["points"] if p["method"] == "AdaLoRA")
    layers = 14
    assert adalora <= 1.5 * lora[0] + layers  # the budget of rank 1 may lie in the wider layers
    assert set(found["seconds"]) == set(methods.CONTENDERS)
    assert all(len(s) == plan.rounds and min(s) > 0 for s in found["seconds"].values())
    assert (folder / "methods.md").read_text() == methods.markdown(found)
    assert (folder / "methods.png").stat().st_size > 10_000


def known(sora_bits=1.0, sora_ms=1.0, peft_ms=2.0):
    """LoRA of 100, 200 and 400 parameters has 1.2, 1.1 and 1.0 bits, its seeds 0.02 apart."""
    points = [
        {"method": method, "setting": setting, "kept": k, "bits": b + d, "steps": 9, "seed": seed}
        for seed, d in enumerate((-0.01, 0.01))
        for method, setting, k, b in (
            ("LoRA", "r = 1", 100, 1.2), ("LoRA", "r = 2", 200, 1.1), ("LoRA", "r = 4", 400, 1.0),
            ("SoRA", "λ = 1", 410, 1.0), ("SoRA", "λ = 2", 200, sora_bits),
        )
    ]  # fmt: skip
    seconds = {name: [1.0, 1.0] for name in methods.CONTENDERS}
    seconds |= {"SoRA": [sora_ms] * 2, "PEFT AdaLoRA": [peft_ms] * 2}
    return {"points": points, "seconds": seconds}


def test_a_measurement_that_was_cut_off_goes_on(tmp_path):
    path, plan, made = tmp_path / "out" / "notes.json", methods.STAGES["cpu-quick"], []

    def run(bits):
        made.append(bits)
        yield {"bits": bits}

    for _ in range(2):
        notes = methods.Notes(path, plan)
        assert notes.points("LoRA, seed 0", run(2.5)) == [{"bits": 2.5}]
    assert notes.points("LoRA, seed 1", run(3.5)) == [{"bits": 3.5}]
    assert made == [2.5, 3.5]
    with pytest.raises(ValueError, match="of another plan; remove it, or choose another --out"):
        methods.Notes(path, plan._replace(seeds=2))


def test_what_was_measured_is_merged_and_rendered(tmp_path):
    from fused_lora.bench import report

    plan = methods.STAGES["cpu-quick"]._asdict()
    whole = known() | {"op": "methods", "machine": report.machine(CPU), "model": "m", "plan": plan}
    for folder, before in (("old", 3.0), ("run", 2.0)):
        methods.save(whole | {"before": before}, tmp_path / folder)
    folders = [tmp_path / "old", tmp_path / "run"]
    (folder,) = report.merge(folders, tmp_path / "bench/results")
    assert json.loads((folder / "methods.json").read_text())["before"] == 2.0
    assert (folder / "methods.png").stat().st_size > 10_000
    text = report.sections(tmp_path / "bench/results")["docs/measured.md"]
    assert f"bench/results/{folder.name}/methods.md" in text and methods.TITLE in text
    assert text.count("| yes |") == 4


def test_parameters_between_two_ranks():
    lora = methods.curve(known(), "LoRA")
    assert lora.kept == [100, 200, 400] and lora.bits == pytest.approx([1.2, 1.1, 1.0])
    assert lora.apart == pytest.approx([0.02] * 3)
    assert methods.at_equal_parameters(lora, 100 * 2**0.5) == pytest.approx(1.15)
    assert methods.at_equal_parameters(lora, 99) is methods.at_equal_parameters(lora, 401) is None


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, [True, True, True, True]),
        ({"sora_bits": 1.11}, [True, False, True, True]),
        ({"sora_bits": 1.13}, [False, False, True, True]),
        ({"sora_ms": 1.04}, [True, True, False, True]),
        ({"peft_ms": 1.1}, [True, True, True, False]),
    ],
)
def test_claims_are_answered_by_the_numbers(changes, holds):
    found = methods.verdicts(known(**changes))
    assert [ok for _, _, ok in found] == holds
    assert found[0][0] == "SoRA at equal parameters is at least as good"
