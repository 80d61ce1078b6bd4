"""t = scale * g ⊙ (drop(x) A^T) and h, against fp64."""

import pytest
import torch
from cases import DROPOUTS, dtypes, fuzz, kernels, layouts, ranks, seeds, sizes
from conftest import DEVICE
from fused_lora.triton_kernels.shrink import shrink
from hypothesis import given
from hypothesis import strategies as st

from fused_lora import reference
from fused_lora.ops import dispatch
from fused_lora.testing import assert_accurate, guarded

SCALE = 1.7


def plain(x, a, gate, keep, keep_scale):
    if keep is not None:
        x = torch.where(keep, x, 0)
    h = keep_scale * (x @ a.t())
    t = SCALE * (h if gate is None else h * gate)
    return t.to(x.dtype), h


@kernels
@given(
    M=sizes,
    K=sizes,
    R=ranks,
    dtype=dtypes,
    x_layout=layouts,
    a_layout=layouts,
    gated=st.booleans(),
    seed=seeds,
    p=st.sampled_from((None, *DROPOUTS)),
)
@fuzz(60)
def test_shrink(kernels, M, K, R, dtype, x_layout, a_layout, gated, seed, p):
    shrink = dispatch.kernels(kernels).shrink
    x = guarded((M, K), x_layout, dtype=dtype, device=DEVICE)
    a = guarded((R, K), a_layout, dtype=dtype, device=DEVICE)
    gate = guarded((R,), device=DEVICE) if gated else None
    dropout, keep, keep_scale = None, None, 1.0
    if p is not None:
        seed = torch.tensor([seed], device=DEVICE)
        keep, keep_scale = reference.dropout_mask(seed, M, K, p), reference.dropout_scale(p)
        dropout = (seed, reference.dropout_threshold(p), keep_scale)

    t, h = shrink(x, a, scale=SCALE, gate=gate, dropout=dropout, save_h=True)
    t_only, none = shrink(x, a, scale=SCALE, gate=gate, dropout=dropout)

    assert none is None and torch.equal(t, t_only)
    assert_accurate("th", (t, h), lambda *xag: plain(*xag, keep, keep_scale), (x, a, gate))


def product(x, a):
    return (x @ a.t(),)


@pytest.mark.parametrize("split", [1, 2, 3, 8])
@pytest.mark.parametrize("K", [1, 63, 64, 65, 200, 513])
def test_every_split_covers_k_once(split, K):
    """Splits past the last K step write zeros; the sum does not depend on how many there are."""
    x = guarded((5, K), device=DEVICE, dtype=torch.float32)
    a = guarded((3, K), device=DEVICE, dtype=torch.float32)
    config = {
        "BLOCK_M": 16,
        "BLOCK_K": 64,
        "BLOCK_R": 16,
        "SPLIT_K": split,
        "num_warps": 4,
        "num_stages": 1,
    }
    t, h = shrink(x, a, save_h=True, config=config)
    assert_accurate("t", (t,), product, (x, a))
    assert torch.equal(t, h)


@kernels
@pytest.mark.parametrize("R", [65, 128, 129, 200, 256])
def test_large_ranks(kernels, R):
    shrink = dispatch.kernels(kernels).shrink
    x, a = guarded((33, 70), device=DEVICE), guarded((R, 70), device=DEVICE)
    t, _ = shrink(x, a)
    assert_accurate("t", (t,), product, (x, a))
