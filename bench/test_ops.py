"""Every op of the registry beside what it replaces, under pytest-benchmark."""

import os

import pytest
from fused_lora.bench.measure import DEVICE, MODES, Cuda, Interleaved
from fused_lora.bench.registry import OPS
from fused_lora.bench.report import case_result

STAGES = {"cpu": "cpu", "cuda": "training"}
QUICK = {"cpu": "cpu-quick", "cuda": "quick"}
STAGE = (QUICK if os.environ.get("FUSED_LORA_BENCH") == "quick" else STAGES)[DEVICE.type]
CASES = [(op, case) for op in OPS.values() if STAGE in op.stages for case in op.stages[STAGE].cases]


@pytest.fixture(scope="module")
def graphs():
    return Cuda() if "cold" in MODES[DEVICE.type] else None


@pytest.mark.parametrize(("op", "case"), CASES, ids=lambda v: getattr(v, "name", None) or str(v))
def test_op(op, case, benchmark, record, graphs):
    stage = op.stages[STAGE]
    wanted = {name: op.contenders[name] for name in stage.contenders or op.contenders}
    reasons = {name: c.unavailable(DEVICE, case) for name, c in wanted.items()}
    missing = {name: reason for name, reason in reasons.items() if reason}
    present = {name: c for name, c in wanted.items() if name not in missing}
    measured = Interleaved(op, case, present, DEVICE, stage.directions, graphs)
    benchmark.pedantic(measured.round, rounds=measured.plan())
    measured.check_floors()
    result = case_result(op, case, measured)
    benchmark.extra_info["times"] = result["times"]
    record(op, result, missing)
    assert not measured.refused, measured.refused
