"""The benchmark of DePT: what is compared, what is said of the numbers, and a small run."""

import json

import pytest
import torch

import fused_lora as fl

pytest.importorskip("transformers")
from fused_lora.bench import dept

CPU = torch.device("cpu")
PLAN = dept.STAGES["quick"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dept")
    with fl.use_backend("torch"):
        assert dept.main(["--stage", "quick", "--out", str(folder), "--device", "cpu"]) == 0
    assert (folder / "dept.md").read_text().startswith("# dept")
    return json.loads((folder / "dept.json").read_text())


def test_a_small_run(result):
    names = set(result["parameters"])
    assert names == {"soft prompt", "soft prompt again", "DePT, m = 8, r = 8",
                     "DePT, m = 8, as published"}  # fmt: skip
    assert result["parameters"]["soft prompt"] == 20 * 64
    assert result["parameters"]["DePT, m = 8, r = 8"] == 8 * 64 + 8 * (24 + 64)
    for what in ("step", "inference"):
        assert set(result[what]) == names
        assert all(len(s) == PLAN.rounds and min(s) > 0 for s in result[what].values())
    assert result["memory"]["DePT, m = 8, r = 8"] < result["memory"]["soft prompt"]


def test_ours_computes_what_the_published_form_does():
    _, found = dept.with_embeddings(PLAN, CPU)
    ids = dept.Batch.of(PLAN, CPU).ids
    ours, published = list(found.values())[-2:]
    with torch.no_grad():
        ours.lora_b.normal_()
        torch.testing.assert_close(ours(ids), published(ids))


def test_claims_are_answered_by_the_numbers():
    def known(step, kept):
        name = "DePT, m = 8, r = 8"
        times = {"soft prompt": [1.0, 2.0], name: [step, 2 * step]}
        memory = {"soft prompt": 100, name: kept}
        return {"parameters": memory, "memory": memory, "step": times, "inference": times}

    assert [ok for _, _, ok in dept.verdicts(known(0.79, 79))] == [True] * 3
    assert [ok for _, _, ok in dept.verdicts(known(0.81, 79))] == [False, False, True]
    assert [ok for _, _, ok in dept.verdicts(known(0.79, 81))] == [True, True, False]
