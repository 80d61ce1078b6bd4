"""lora_linear against what it replaces: cases and contenders are bench/registry.py's."""

import os

import pytest

from bench.conftest import DEVICE
from bench.measure import Interleaved
from bench.registry import LORA_LINEAR
from bench.report import rows

CASES = LORA_LINEAR.cases[
    DEVICE.type + (" quick" if os.environ.get("FUSED_LORA_BENCH") == "quick" else "")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear(case, benchmark, record):
    reasons = {name: c.unavailable(DEVICE) for name, c in LORA_LINEAR.contenders.items()}
    missing = {name: why for name, why in reasons.items() if why}
    present = {name: c for name, c in LORA_LINEAR.contenders.items() if name not in missing}
    measured = Interleaved(LORA_LINEAR, case, present, DEVICE)
    benchmark.pedantic(measured.round, rounds=measured.planned())
    result = rows(LORA_LINEAR, case, measured)
    benchmark.extra_info["rows"] = result
    record(LORA_LINEAR, result, missing)
