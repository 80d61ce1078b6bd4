"""`pytest bench [--out DIR]`: runs the cases, prints the tables and saves them as JSON and Markdown.

FUSED_LORA_BENCH=quick runs a few small cases. On a CPU two threads are used.
"""

from pathlib import Path

import pytest
import torch

from bench.report import Report, machine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    default = Path(__file__).parent / "out"
    parser.addoption("--out", type=Path, default=default, help="folder of the results")


def pytest_configure(config):
    config.stash[RUNS] = {}
    # pytest-benchmark's own table is of whole rounds; the report has each contender.
    config.option.benchmark_quiet = True
    torch.set_num_threads(2)


@pytest.fixture
def record(request):
    """record(op, rows, missing): add rows of an operation to the report."""

    def add(op, rows, missing):
        request.config.stash[RUNS].setdefault(op.name, (op, [], missing))[1].extend(rows)

    return add


def pytest_terminal_summary(config):
    for op, rows, missing in config.stash[RUNS].values():
        report = Report(op, rows, machine(DEVICE), missing)
        report.print()
        report.save(config.getoption("--out"))
