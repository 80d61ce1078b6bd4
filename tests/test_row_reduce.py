"""P = drop(z)^T v and u = z w from one read, and what the backward makes of them, against fp64."""

import itertools

import fused_lora.triton_kernels.row_reduce as triton_row_reduce
import pytest
import torch
import triton
from cases import DROPOUTS, dtypes, fuzz, kernels, layouts, ranks, seeds, sizes
from conftest import DEVICE
from fused_lora.triton_kernels import configs
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


HALF, TF32 = torch.float16, torch.float32


@pytest.mark.skipif(DEVICE != "cpu", reason="the table of another GPU, under the interpreter")
@pytest.mark.parametrize(
    ("dtype", "R", "columns"),
    [(HALF, 33, 256), (HALF, 48, 512), (HALF, 64, 256), (HALF, 64, 512), (TF32, 64, 128)],
    ids=str,
)
def test_u_of_wide_ranks(dtype, R, columns):
    """The rows of compute capability 9.0, each on several blocks of rows and of columns."""
    kind = "half" if dtype == HALF else "tf32"
    (row,) = (
        row
        for row in configs.rows("row_reduce_u", 90, kind)
        if row["max_R"] >= R and row["BLOCK_C"] == columns
    )
    launched = {"BLOCK_M", "BLOCK_C", "num_warps", "num_stages"}
    config = {key: row[key] for key in launched} | {"BLOCK_R": 64, "ROWS": 128}
    dy, h, b = (guarded(s, dtype=dtype, device=DEVICE) for s in ((300, 600), (300, R), (600, R)))
    p, u = triton_row_reduce.row_reduce(dy, h, w=b, config=config)
    assert p.shape == (3, R, 600) and u.shape == (-(-600 // columns), 300, R)

    def plain(dy, h, b):
        return dy.t() @ h, dy @ b

    found = p.sum(0).t().to(dtype), u.sum(0).to(dtype)
    assert_accurate(("P", "u"), found, plain, (dy, h, b))


def test_a_row_with_u_is_of_the_fewest_bytes():
    """docs/kernels.md: 8 MR of u's planes a block of columns, 8 RC of P's a block of rows; of the
    tiles that make blocks for most multiprocessors."""
    R = 64
    for M, C in itertools.product((2048, 8192), (1024, 4096, 14336)):
        found = {}
        for columns in (256, 512):
            across = triton.cdiv(C, columns)
            rows = 64 * triton.cdiv(M, 64 * (128 // across))
            down = triton.cdiv(M, rows)
            found[columns] = down * across < 96, 8 * R * (M * across + C * down)
        row = configs.row_reduce(M, C, R, torch.bfloat16, 90, with_u=True)
        assert row["BLOCK_C"] == min(found, key=found.get), (M, C)
        blocks = triton.cdiv(M, row["ROWS"]) * triton.cdiv(C, row["BLOCK_C"])
        assert 96 <= blocks <= 128, (M, C)
    assert configs.row_reduce(8192, 4096, 65, torch.bfloat16, 90, with_u=True) == {}


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
