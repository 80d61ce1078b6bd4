"""The benchmark of accelerate: its gate, what is said of the numbers, and a small run."""

import json

import pytest
import torch

import fused_lora as fl

pytest.importorskip("transformers")
pytest.importorskip("peft")
from fused_lora.bench import accelerate

CPU = torch.device("cpu")
QUICK = ["--stage", "cpu-quick", "--seconds", "0", "--device", "cpu"]


def test_a_whole_run_at_tiny_sizes(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert accelerate.main([*QUICK, "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "accelerate.json").read_text())
    assert [row["label"] for row in found["rows"]] == [
        str(case) for case in accelerate.STAGES["cpu-quick"]
    ]
    for row in found["rows"]:
        assert set(row["seconds"]) == {
            "PEFT", "PEFT again", "accelerated", "accelerated again",
        } and not row["refused"]  # fmt: skip
        assert all(len(s) == accelerate.ROUNDS[0] and min(s) > 0 for s in row["seconds"].values())
    text = (tmp_path / "accelerate.md").read_text()
    assert text == accelerate.markdown(found) and text.strip() in capsys.readouterr().out
    assert text.count("\n| ") == 1 + len(found["rows"]) + 4  # and the answers


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    right = fl.lora_linear

    def wrong(x, weight, a, b, *args, **options):
        return right(x, weight, a, b, *args, **options | {"scale": 1.01 * options["scale"]})

    monkeypatch.setattr("fused_lora.integrations.peft.lora_linear", wrong)
    case = accelerate.STAGES["cpu-quick"][0]
    row = accelerate.Contest(case, CPU).measure(0.0)
    assert row["refused"].startswith("its gradients differ from fp64 by")
    assert set(row["seconds"]) == {"PEFT", "PEFT again"}
    results = {"op": accelerate.NAME, "machine": {}, "rows": [row]}
    assert row["refused"] in accelerate.markdown(results)
    assert accelerate.verdicts(results) == [("it runs", "every row is refused", False)]


def known(*ratios, again=1.02):
    """Rows in which PEFT takes a second."""
    return [
        {
            "label": f"row {i}",
            "options": "LoRA",
            "precision": "fp32",
            "refused": None,
            "seconds": {
                "PEFT": [1.0, 2.0],
                "PEFT again": [again, 2 * again],
                "accelerated": [r, 2 * r],
            },
        }
        for i, r in enumerate(ratios)
    ]


@pytest.mark.parametrize(
    "ratios, holds",
    [
        ((0.9, 0.95, 1.01), [True, True]),
        ((0.9, 0.95, 1.03), [False, True]),
        ((1.01,), [True, False]),
    ],
)
def test_claims_are_answered_by_the_numbers(ratios, holds):
    rows = known(*ratios)
    results = {"op": accelerate.NAME, "machine": {}, "rows": rows}
    assert accelerate.noise(rows) == pytest.approx(0.02)
    assert [ok for *_, ok in accelerate.verdicts(results)] == holds
    assert accelerate.markdown(results).count("SLOWER") == (not holds[0])
