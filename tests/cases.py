"""Backends, sizes, layouts and dtypes that the kernel tests draw from."""

import pytest
import torch
from conftest import DEVICE, EXTENT, SEED
from hypothesis import HealthCheck, register_random, settings
from hypothesis import strategies as st

from fused_lora.ops import dispatch
from fused_lora.testing import LAYOUTS

SIZES = (0, 1, 2, 3, 7, 16, 17, 31, 33, 64, 65, 127, 129, 257)
RANKS = (1, 2, 3, 4, 7, 8, 16, 17, 32, 64)
CUDA_REFUSES = dispatch.cuda_refuses(torch.empty(0, device=DEVICE))
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(bool(CUDA_REFUSES), reason=str(CUDA_REFUSES)))
backends = pytest.mark.parametrize("backend", ["torch", "triton", CUDA])
# The launchers of the one and of the other, which have the same names.
kernels = pytest.mark.parametrize("kernels", ["triton", CUDA])
# Triton's interpreter multiplies bfloat16 bit patterns.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
DROPOUTS = (0.1, 0.3, 0.5)


def slow(*values):
    """A case of parametrize that the quick run leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


sizes = st.sampled_from(SIZES)
ranks = st.sampled_from(RANKS)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(-(2**63), 2**63 - 1)


class TorchRandom:
    """torch's generator, for hypothesis to seed, so that a failing case fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference
register_random(TORCH_RANDOM)


def fuzz(examples: int):
    """Random cases; a failing one is printed with the line that reproduces it. So many on a CPU in
    the full extent, and ten times as many on a GPU; in the quick run a quarter, the same for the
    same FUSED_LORA_TEST_SEED."""
    quick = EXTENT != "full" and DEVICE == "cpu"
    times = 10 if DEVICE == "cuda" else 1 / 4 if quick else 1
    return settings(
        max_examples=round(times * examples),
        deadline=None,
        print_blob=True,
        derandomize=quick and not SEED,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.differing_executors,
        ],
    )
