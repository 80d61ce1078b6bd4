"""Without a GPU the Triton kernels run under Triton's interpreter, and the CUDA kernels emulated.

Both must be asked for before the kernels are imported.
"""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two test processes, and what they start, share two cores. torch and numpy read it once.
    for library in ("OMP", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import emulated
import pytest
import torch
from seeds import SEED

DEVICE = os.environ.get("FUSED_LORA_TEST_DEVICE") or (
    "cuda" if torch.cuda.is_available() else "cpu"
)
# What torch.compile has made with another torch, or for another CPU, does not run with this one.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(
        Path(__file__).parents[1]
        / f"build/inductor-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
    ),
)
# No table that this machine's user has made.
os.environ.setdefault("FUSED_LORA_TUNING", os.path.join(os.path.dirname(__file__), "no tuning"))
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    if "FUSED_LORA_EMULATED" not in os.environ and emulated.why_not() is None:
        os.environ["FUSED_LORA_EMULATED"] = str(emulated.build())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# "full" repeats what the quick run says at more sizes, faults and compiled forms.
EXTENT = os.environ.get("FUSED_LORA_EXTENT", "default")

# What computes nothing on the CPU that depends on its instruction set. All other files are marked
# numeric.
NOT_NUMERIC = {
    "test_bench", "test_bench_accelerate", "test_checkpoint_hostile", "test_cli",
    "test_compiled", "test_dispatch", "test_distributed", "test_dram", "test_extension",
    "test_gates", "test_gpu", "test_gpu_check", "test_hopper", "test_imports", "test_mutations",
    "test_names", "test_packaging", "test_routes", "test_schedule", "test_segment_gemm_sm90",
    "test_traffic",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config) -> None:
    if SEED:
        config.option.hypothesis_seed = SEED


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.path.stem not in NOT_NUMERIC:
            item.add_marker(pytest.mark.numeric)
    if EXTENT != "full":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: FUSED_LORA_EXTENT=full runs it"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so an element that no kernel wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
