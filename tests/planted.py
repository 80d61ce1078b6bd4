"""A sound kernel and variants of it with one fault each, for the checks of test_compiled.py."""

import functools

import torch
import triton
import triton.language as tl

SM = 90


@triton.jit
def matmul_kernel(
    x_ptr,  # [BLOCK_M, K]
    w_ptr,  # [BLOCK_N, K]
    y_ptr,  # fp32 [programs, BLOCK_N, BLOCK_M]
    stride,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr,
    NARROW: tl.constexpr,
):
    """y^T = w x^T. LEFT: of relu(x), a left operand that is made in registers. NARROW: a program's
    place in y is a 32-bit product."""
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride + offs_k[:, None]
    tl.assume(K > 0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs)
        w = tl.load(w_ptrs)
        if LEFT:
            x = tl.where(x > 0, x, 0.0)
        acc = tl.dot(x, w, acc)
        x_ptrs += tl.cast(BLOCK_K, tl.int64)
        w_ptrs += tl.cast(BLOCK_K, tl.int64)
    pid = tl.program_id(0) if NARROW else tl.program_id(0).to(tl.int64)
    y_ptrs = y_ptr + pid * stride + offs_n[:, None] * BLOCK_M + offs_m[None, :]
    tl.store(y_ptrs, tl.trans(acc))


def matmul(stride=4096, **faults):
    meta = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    meta |= {"LEFT": False, "NARROW": False, **faults}
    x = torch.empty(meta["BLOCK_M"], stride, dtype=torch.bfloat16, device="meta")
    w = torch.empty(meta["BLOCK_N"], stride, dtype=torch.bfloat16, device="meta")
    y = torch.empty(meta["BLOCK_N"], meta["BLOCK_M"], device="meta")
    matmul_kernel[(1,)](x, w, y, stride, 4096, **meta)


# An accumulator that does not fit into registers is spilled, and its products wait for each other.
TOO_WIDE = {"BLOCK_N": 256, "num_warps": 4}
LAUNCHES = {
    name: functools.partial(matmul, **fault)
    for name, fault in {
        "sound": {},
        "spills": TOO_WIDE,
        "shared memory": {"num_stages": 8},
        "unaligned rows": {"stride": 4097},
        "32-bit offsets": {"NARROW": True},
        "register on the left of wgmma": {"LEFT": True},
        "wgmma serialized": TOO_WIDE,
    }.items()
}
