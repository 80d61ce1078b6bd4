"""Without a GPU the Triton kernels run under Triton's interpreter, and the CUDA kernels emulated.

Both must be asked for before the kernels are imported.
"""

import os

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
# No table that this machine's user has made.
os.environ.setdefault("FUSED_LORA_TUNING", os.path.join(os.path.dirname(__file__), "no tuning"))
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    if "FUSED_LORA_EMULATED" not in os.environ and emulated.why_not() is None:
        os.environ["FUSED_LORA_EMULATED"] = str(emulated.build())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# "full" repeats what the quick run says at more sizes, faults and compiled forms.
EXTENT = os.environ.get("FUSED_LORA_EXTENT", "default")

# What computes on the CPU with torch's own kernels, whose sums depend on the instruction set.
NUMERIC = {
    "test_adalora", "test_adapter", "test_bank", "test_baselines", "test_bench_dept",
    "test_checkpoint", "test_checkpoint_adalora", "test_convert", "test_cuda_kernels", "test_demo",
    "test_dept_embedding", "test_docs", "test_dora_linear", "test_dropout", "test_examples",
    "test_inject", "test_lora_add", "test_lora_embedding", "test_lora_linear",
    "test_lora_linear_group", "test_lora_plus", "test_methods", "test_multi_lora_linear", "test_nn",
    "test_nn_embedding", "test_optim", "test_pages", "test_peft", "test_peft_groups", "test_prune",
    "test_quantised", "test_reference", "test_regressions", "test_row_reduce", "test_save_adapter",
    "test_segment_gemm", "test_shrink", "test_soft_threshold", "test_sora_training", "test_step",
    "test_store", "test_torch", "test_transformers",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config) -> None:
    if SEED:
        config.option.hypothesis_seed = SEED


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.path.stem in NUMERIC:
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
