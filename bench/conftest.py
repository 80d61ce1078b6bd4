"""`pytest bench [--out DIR]` measures, prints a table and saves it.

FUSED_LORA_BENCH=quick takes a few small cases. A CPU runs two threads, or OMP_NUM_THREADS.
"""

import os
from pathlib import Path

import pytest
import torch
from fused_lora.bench.measure import DEVICE
from fused_lora.bench.report import Report, machine

MEASURED = pytest.StashKey[dict]()


def pytest_addoption(parser):
    default = Path(__file__).parent / "out"
    parser.addoption("--out", type=Path, default=default, help="folder for the results")


def pytest_configure(config):
    config.stash[MEASURED] = {}
    # pytest-benchmark's own table is of whole rounds; the report has each contender.
    config.option.benchmark_quiet = True
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture
def record(request):
    """record(op, case result, {contender: why it is missing}) adds to the report of the op."""

    def add(op, result, missing):
        found = request.config.stash[MEASURED].setdefault(op.name, {"cases": [], "missing": {}})
        found["cases"].append(result)
        found["missing"] |= missing

    return add


def pytest_terminal_summary(config):
    for op, found in config.stash[MEASURED].items():
        report = Report({"op": op, "machine": machine(DEVICE), "unmeasured": {}, **found})
        report.print()
        report.save(config.getoption("--out"))
