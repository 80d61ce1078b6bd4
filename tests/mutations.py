"""One test, run against a copy of the package in which a fault has been planted.

Every run is a process of its own, forked from a server that has loaded torch and Triton but nothing
of fused_lora.
"""

import gc
import multiprocessing
import os
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

import pytest
import ranks
from hypothesis import Phase, settings

PASSED, CAUGHT = "passed", "an assertion failed"
_TESTS = Path(__file__).parent
_TIMEOUT = 240  # seconds
_server = multiprocessing.get_context("forkserver")
# torch loads its inductor, for 2 seconds, when deterministic algorithms are asked for.
_server.set_forkserver_preload(
    [*ranks.PRELOAD, "torch._inductor", "torch.utils.checkpoint", "triton", "pytest", "hypothesis"]
)


class Fault(NamedTuple):
    """`old`, which `file` holds exactly once, becomes `new`; then an assertion of `test` fails."""

    file: str
    old: str
    new: str
    test: str


def copy_package(package: Path, kernels: Path, to: Path, fault: Fault | None = None) -> Path:
    """Lay the sources out as they are installed, with the fault in them."""
    shutil.copytree(
        package, to / "fused_lora", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copytree(
        kernels,
        to / "fused_lora" / "triton_kernels",
        ignore=shutil.ignore_patterns("__pycache__"),
        dirs_exist_ok=True,
    )
    if fault is not None:
        plant(fault, to / "fused_lora" / fault.file)
    return to


def plant(fault: Fault, path: Path, *, write: bool = True) -> None:
    source = path.read_text()
    assert source.count(fault.old) == 1, (
        f"{fault.file} holds {source.count(fault.old)} times, not once, what a fault replaces: "
        f"{fault.old!r}"
    )
    if write:
        path.write_text(source.replace(fault.old, fault.new))


class _Outcomes(dict):
    """A pytest plugin: {test: what became of it}."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.skipped:
            self.setdefault(report.nodeid, report.outcome)

    def pytest_exception_interact(self, node, call) -> None:
        kinds = AssertionError, pytest.fail.Exception
        by_assertion = call.when == "call" and isinstance(call.excinfo.value, kinds)
        self[node.nodeid] = CAUGHT if by_assertion else f"{call.when}: {call.excinfo.exconly()}"


def _run_tests(source: Path, tests: list[str], sender, environment: dict[str, str]) -> None:
    # A fault may need a case that the quick run leaves out.
    os.environ.update(environment, FUSED_LORA_EXTENT="full")
    gc.freeze()  # what the server loaded outlives this process
    log = os.open(source / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.pop("PYTEST_ADDOPTS", None)
    # Before the finder of an editable install, which knows fused_lora as well.
    sys.path.insert(0, str(source))
    sys.meta_path.insert(0, PathFinder)
    # The first failure is enough, and the same cases are drawn in every run.
    settings.register_profile(
        "faults",
        database=None,
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
    )
    settings.load_profile("faults")
    outcomes = _Outcomes()
    options = "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-W", "ignore"
    pytest.main([*options, *(str(_TESTS / test) for test in tests)], plugins=[outcomes])
    files = {m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "fused_lora"}
    strangers = sorted(f for f in files if not Path(f).is_relative_to(source))
    assert files and not strangers, f"imported from elsewhere: {strangers}"
    sys.stdout.flush()
    sender.send(dict(outcomes))


def run_tests(source: Path, tests: list[str], **environment: str) -> tuple[list[str], str]:
    """(what became of each test, the end of what they printed), with the package from `source`."""
    receiver, sender = _server.Pipe(duplex=False)
    process = _server.Process(target=_run_tests, args=(source, tests, sender, environment))
    process.start()
    sender.close()
    try:
        outcomes = receiver.recv() if receiver.poll(_TIMEOUT) else {"": f"ran past {_TIMEOUT} s"}
    except EOFError:
        outcomes = {"": "the process died"}
    process.kill()
    return list(outcomes.values()), (source / "log").read_text(errors="replace")[-6000:]
