"""P = drop(z)^T v and u = z w from one read, and what the backward makes of them, against fp64."""

import torch
from cases import DROPOUTS, dtypes, fuzz, kernels, layouts, ranks, seeds, sizes
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from fused_lora import reference
from fused_lora.ops import dispatch
from fused_lora.testing import assert_accurate, guarded

SCALE = 0.6


@kernels
@given(
    M=sizes,
    N=sizes,
    R=ranks,
    dtype=dtypes,
    kinds=st.tuples(layouts, layouts, layouts),
    gated=st.booleans(),
    need_dh=st.booleans(),
    need_dgate=st.booleans(),
)
@fuzz(60)
def test_dy(kernels, M, N, R, dtype, kinds, gated, need_dh, need_dgate):
    dy, h, b = (
        guarded(s, k, dtype=dtype, device=DEVICE)
        for s, k in zip(((M, N), (M, R), (N, R)), kinds, strict=True)
    )
    gate = guarded((R,), device=DEVICE) if gated else None

    def plain(dy, h, b, gate):
        p = dy.t() @ h
        dh, db = SCALE * (dy @ b), SCALE * p
        if gate is not None:
            dh, db = dh * gate, db * gate
        dgate = SCALE * (b * p).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        return dh.to(dy.dtype), db.to(dy.dtype), dgate

    dh, db, dgate = dispatch.kernels(kernels).row_reduce_dy(
        dy, b, h, scale=SCALE, gate=gate, need_dh=need_dh, need_dgate=need_dgate
    )
    assert (dh is not None) == need_dh and (dgate is not None) == need_dgate
    assert_accurate(("dh", "db", "dgate"), (dh, db, dgate), plain, (dy, h, b, gate))


def product(x, dh):
    return (dh.t() @ x,)


@kernels
@given(
    M=sizes,
    K=sizes,
    R=ranks,
    dtype=dtypes,
    kinds=st.tuples(layouts, layouts),
    seed=seeds,
    p=st.sampled_from((None, *DROPOUTS)),
)
@fuzz(60)
def test_x(kernels, M, K, R, dtype, kinds, seed, p):
    x, dh = (
        guarded(s, k, dtype=dtype, device=DEVICE)
        for s, k in zip(((M, K), (M, R)), kinds, strict=True)
    )
    keep, keep_scale, dropout, bits = (
        torch.ones(M, K, dtype=torch.bool, device=DEVICE),
        1.0,
        None,
        None,
    )
    if p is not None:
        seed, threshold = torch.tensor([seed], device=DEVICE), reference.dropout_threshold(p)
        keep, keep_scale = reference.dropout_mask(seed, M, K, p), reference.dropout_scale(p)
        dropout = (seed, threshold, keep_scale)
        bits = torch.empty(M, (K + 7) // 8, dtype=torch.uint8, device=DEVICE)

    def plain(x, dh):
        return (dh.t() @ torch.where(keep, x, 0) * keep_scale,)

    own = dispatch.kernels(kernels)
    da = own.row_reduce_x(x, dh, dropout=dropout, bits=bits)
    assert_accurate(("da",), (da,), plain, (x, dh))
    if bits is not None:
        assert torch.equal(bits, own.dropout_bits(seed, M, K, threshold))


@kernels
def test_long_columns_are_added_in_planes(kernels):
    """More rows than one block owns: the planes of several row blocks make one sum."""
    x, dh = guarded((1000, 40), device=DEVICE), guarded((1000, 5), device=DEVICE)
    da = dispatch.kernels(kernels).row_reduce_x(x, dh)
    assert_accurate(("da",), (da,), product, (x, dh))


@kernels
def test_master_gradients_are_rounded_once(kernels):
    """A 16-bit product whose gradient is asked for in fp32 comes from the fp32 planes."""
    x = guarded((64, 32), dtype=torch.float16, device=DEVICE)
    dh = guarded((64, 3), dtype=torch.float16, device=DEVICE)
    da = dispatch.kernels(kernels).row_reduce_x(x, dh, da_dtype=torch.float32)
    assert_accurate(("da",), (da,), product, (x.float(), dh.float()))
