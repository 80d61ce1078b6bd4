"""y = bias + sum_i L_i R_i^T, with the mask after the leading segments, against fp64."""

import itertools

import pytest
import torch
from cases import DROPOUTS, dtypes, fuzz, kernels, layouts, ranks, seeds, sizes
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from fused_lora import reference
from fused_lora.ops import dispatch
from fused_lora.testing import assert_accurate, guarded


def check(kernels, segments, *, bias=None, mask=None, keep=None, **config):
    keep_scale, masked = mask[1:] if mask else (1.0, 0)

    def plain(bias, *operands):
        y = 0
        for i, (lhs, rhs) in enumerate(zip(operands[::2], operands[1::2], strict=True)):
            y = y + lhs @ rhs.t()
            if i + 1 == masked:
                y = torch.where(keep, y * keep_scale, 0)
        return (y if bias is None else y + bias,)

    y = dispatch.kernels(kernels).segment_gemm(segments, bias=bias, mask=mask, **config)
    assert_accurate("y", (y,), plain, (bias, *itertools.chain(*segments)))


@kernels
@given(
    M=sizes,
    N=sizes,
    K=sizes,
    R=ranks,
    dtype=dtypes,
    bias=st.booleans(),
    kinds=st.tuples(layouts, layouts, layouts, layouts),
)
@fuzz(60)
def test_two_segments(kernels, M, N, K, R, dtype, bias, kinds):
    shapes = ((M, K), (N, K), (M, R), (N, R))
    x, w, t, b = (
        guarded(s, k, dtype=dtype, device=DEVICE) for s, k in zip(shapes, kinds, strict=True)
    )
    bias = guarded((N,), dtype=dtype, device=DEVICE) if bias else None
    check(kernels, [(x, w), (t, b)], bias=bias)


@kernels
@given(M=sizes, N=sizes, K=sizes, R=ranks, dtype=dtypes, seed=seeds, p=st.sampled_from(DROPOUTS))
@fuzz(40)
def test_masked_first_segment(kernels, M, N, K, R, dtype, seed, p):
    dh, a = guarded((M, R), dtype=dtype, device=DEVICE), guarded((R, N), dtype=dtype, device=DEVICE)
    dy, w = guarded((M, K), dtype=dtype, device=DEVICE), guarded((K, N), dtype=dtype, device=DEVICE)
    seed = torch.tensor([seed], device=DEVICE)
    bits = dispatch.kernels(kernels).dropout_bits(seed, M, N, reference.dropout_threshold(p))
    keep = reference.dropout_mask(seed, M, N, p)
    mask = (bits, reference.dropout_scale(p), 1)
    check(kernels, [(dh, a.t()), (dy, w.t())], mask=mask, keep=keep)


@kernels
@pytest.mark.parametrize("n", [1, 3, 6])
def test_any_number_of_segments(kernels, n):
    segments = [
        (guarded((33, K), device=DEVICE), guarded((65, K), device=DEVICE))
        for K in (70, 3, 16, 129, 1, 64)[:n]
    ]
    check(kernels, segments)


@pytest.mark.parametrize("group_m", [1, 2, 8])
def test_every_tile_is_written_once(group_m):
    """Tiles are permuted for L2; one taken twice leaves another out, which stays NaN."""
    x, w = guarded((150, 20), device=DEVICE), guarded((170, 20), device=DEVICE)
    config = {
        "BLOCK_M": 16,
        "BLOCK_N": 32,
        "BLOCK_K": 32,
        "GROUP_M": group_m,
        "num_warps": 4,
        "num_stages": 1,
    }
    check("triton", [(x, w)], config=config)
