"""lora_linear beside what it replaces; the cases and the contenders are the registry's."""

import os

import pytest
from fused_lora.bench.measure import DEVICE, Interleaved
from fused_lora.bench.registry import LORA_LINEAR as OP
from fused_lora.bench.report import rows

QUICK = " quick" if os.environ.get("FUSED_LORA_BENCH") == "quick" else ""


@pytest.mark.parametrize("case", OP.cases[DEVICE.type + QUICK], ids=str)
def test_lora_linear(case, benchmark, record):
    reasons = {name: contender.unavailable(DEVICE) for name, contender in OP.contenders.items()}
    missing = {name: reason for name, reason in reasons.items() if reason}
    present = {name: c for name, c in OP.contenders.items() if name not in missing}
    measured = Interleaved(OP, case, present, DEVICE)
    benchmark.pedantic(measured.round, rounds=measured.plan())
    benchmark.extra_info["rows"] = rows(OP, case, measured)
    record(OP, benchmark.extra_info["rows"], missing)
