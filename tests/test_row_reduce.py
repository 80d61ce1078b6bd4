"""P = drop(z)^T v and u = z w from one read, and what the backward makes of them, against fp64."""

import itertools

import pytest
import torch
import triton
from cases import DROPOUTS, dtypes, fuzz, kernels, layouts, ranks, seeds, sizes
from conftest import DEVICE
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.row_reduce import row_reduce
from hypothesis import assume, given
from hypothesis import strategies as st

from fused_lora import reference
from fused_lora.ops import dispatch
from fused_lora.testing import assert_accurate, guarded

SCALE = 0.6
# The terms of a sum over rows that are all the same one: every rounding goes the same way, and is
# not bounded as those of different terms are.
ALL_ALIKE = "expanded", "expanded"


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
    assume(kinds[:2] != ALL_ALIKE)
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
    assume(kinds != ALL_ALIKE)
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


HALF, TF32 = torch.float16, torch.float32


@pytest.mark.skipif(DEVICE != "cpu", reason="the table of another GPU, under the interpreter")
@pytest.mark.parametrize(
    ("dtype", "R", "columns"),
    [(HALF, 33, 256), (HALF, 48, 512), (HALF, 64, 512), (HALF, 100, 256), (TF32, 64, 128)],
    ids=str,
)
def test_u_of_wide_ranks(dtype, R, columns):
    """The rows of compute capability 9.0, each on several blocks of rows and of columns."""
    kind = "half" if dtype == HALF else "tf32"
    rows = configs.rows("row_reduce_u", 90, kind)
    row = next(row for row in rows if row["max_R"] >= R and row["BLOCK_C"] == columns)
    launched = {"BLOCK_M", "BLOCK_C", "num_warps", "num_stages"}
    config = {key: row[key] for key in launched}
    config |= {"BLOCK_R": configs.block_of(R, 128), "ROWS": 128}
    dy, h, b = (guarded(s, dtype=dtype, device=DEVICE) for s in ((300, 600), (300, R), (600, R)))
    p, u = row_reduce(dy, h, w=b, config=config)
    assert p.shape == (3, R, 600) and u.shape == (-(-600 // columns), 300, R)

    def plain(dy, h, b):
        return dy.t() @ h, dy @ b

    found = p.sum(0).t().to(dtype), u.sum(0).to(dtype)
    assert_accurate(("P", "u"), found, plain, (dy, h, b))


def test_dy_is_read_once_where_that_is_fewer_bytes():
    """docs/kernels.md: the planes of u and P against a second dy, P's planes and shrink's own."""
    found = {}

    def once(M, C, R, columns):
        across = triton.cdiv(C, columns)
        down = triton.cdiv(M, 64 * triton.cdiv(M, 64 * (128 // across)))
        return 2 * M * C + 8 * R * (M * across + C * down), down * across

    def twice(M, C, R):
        down = triton.cdiv(M, configs.row_reduce(M, C, R, torch.bfloat16, 90)["ROWS"])
        split = configs.shrink(M, C, R, torch.bfloat16, 90)["SPLIT_K"]
        return 4 * M * C + 8 * R * (C * down + M * split * (split > 1))

    for R, M, C in itertools.product((16, 32, 64, 128), (2048, 8192), (1024, 4096, 14336)):
        row = configs.row_reduce(M, C, R, torch.bfloat16, 90, with_u=True)
        if R == 128:
            assert bool(row) == (once(M, C, R, 256)[0] < twice(M, C, R)), (R, M, C)
        if row:
            bytes_moved, blocks = once(M, C, R, row["BLOCK_C"])
            assert blocks == triton.cdiv(M, row["ROWS"]) * triton.cdiv(C, row["BLOCK_C"])
            assert 96 <= blocks <= 128 and bytes_moved < twice(M, C, R), (R, M, C)
            other, others = once(M, C, R, 768 - row["BLOCK_C"])
            assert R != 64 or bytes_moved < other or others < 96, (R, M, C)
        found[R, M, C] = row.get("BLOCK_C")
    assert [found[64, M, 4096] for M in (2048, 8192)] == [256, 512]


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
