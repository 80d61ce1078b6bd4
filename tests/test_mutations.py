"""The suite is tested: each fault planted in a copy of the package must fail the test that is named beside it."""

from pathlib import Path

import pytest
from conftest import DEVICE
from mutations import CAUGHT, PASSED, Fault, copy_package, run_tests

import fused_lora
import fused_lora.triton_kernels

PACKAGE = Path(fused_lora.__file__).parent
KERNELS = Path(fused_lora.triton_kernels.__file__).parent

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="faults that read or write outside of a tensor stay in the interpreter"
)

DROPOUT = "triton_kernels/dropout.py"
PLANES = "triton_kernels/planes.py"
SHRINK = "triton_kernels/shrink.py"
GEMM = "triton_kernels/segment_gemm.py"
REDUCE = "triton_kernels/row_reduce.py"
OP = "ops/lora_linear.py"
CHECKS = "ops/validation.py"
REFERENCE = "reference.py"
THRESHOLD = "ops/soft_threshold.py"

# test_lora_linear.py
ROWS = "test_lora_linear.py::test_leading_dimensions[contiguous-(7,)-{}]"  # bias, gate, p = 0.3
MASKS = "test_lora_linear.py::test_one_mask_in_forward_da_and_dx[0.5-{}]"
SUBSETS = "test_lora_linear.py::test_only_the_gradients_asked_for[{}-{}]"
MASTERS = "test_lora_linear.py::test_fp32_masters[dtype0-0.0-{}]"  # float16, gate, p = 0

FAULTS = {}
