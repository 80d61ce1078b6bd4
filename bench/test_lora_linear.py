"""lora_linear beside what it replaces; the cases and the contenders are the registry's."""

import os

import pytest
from fused_lora.bench.measure import DEVICE, MODES, Cuda, Interleaved
from fused_lora.bench.registry import LORA_LINEAR as OP
from fused_lora.bench.report import case_result

STAGES = {"cpu": "cpu", "cuda": "training"}
QUICK = {"cpu": "cpu-quick", "cuda": "quick"}
STAGE = OP.stages[(QUICK if os.environ.get("FUSED_LORA_BENCH") == "quick" else STAGES)[DEVICE.type]]


@pytest.fixture(scope="module")
def graphs():
    return Cuda() if "cold" in MODES[DEVICE.type] else None


@pytest.mark.parametrize("case", STAGE.cases, ids=str)
def test_lora_linear(case, benchmark, record, graphs):
    wanted = {name: OP.contenders[name] for name in STAGE.contenders or OP.contenders}
    reasons = {name: c.unavailable(DEVICE, case) for name, c in wanted.items()}
    missing = {name: reason for name, reason in reasons.items() if reason}
    present = {name: c for name, c in wanted.items() if name not in missing}
    measured = Interleaved(OP, case, present, DEVICE, STAGE.directions, graphs)
    benchmark.pedantic(measured.round, rounds=measured.plan())
    measured.check_floors()
    result = case_result(OP, case, measured)
    benchmark.extra_info["times"] = result["times"]
    record(OP, result, missing)
