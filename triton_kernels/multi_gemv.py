"""y_i += scale_j g_j ⊙ (x_i A_j^T) B_j^T, for a few rows with an adapter each: decoding.

The form of multi_shrink and multi_segment_gemm where a tile of rows would hold one row of each
adapter. Every row reads its own slot with plain multiply-adds: what counts are the bytes of the
slots, and rows that share an adapter find them in the L2 cache. h is an fp32 plane for each split
of K; the second kernel adds the planes in order. Ranks past rank_j are not read.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

# A block reads 16 KiB of A, or 8 KiB of B^T, in loads of 16 bytes: there is no reuse to tune for.
BLOCK_R, BLOCK_K, BLOCK_N, SPLITS = 16, 512, 256, 8


@triton.jit(do_not_specialize=["M", "span"])
def multi_gemv_shrink_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [P, R, K]
    rank_ptr,  # int32 [P]
    table_ptr,  # int32 [G]
    ids_ptr,  # int32 [M]
    planes_ptr,  # fp32 [splits of K, M, R]
    stride_x,
    stride_a,
    M,
    K,
    R,
    span,  # columns of K in a split, a multiple of BLOCK_K
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, pid_k, pid_r = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(ids_ptr + row)
    if slot < 0:
        return
    slot = tl.load(table_ptr + slot.to(tl.int64)).to(tl.int64)
    rank = tl.load(rank_ptr + slot)
    if pid_r * BLOCK_R >= rank:
        return
    offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_r = offs_r < rank
    begin = tl.multiple_of(pid_k.to(tl.int64) * span, BLOCK_K)
    offs_k = begin + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row * stride_x[0] + offs_k * stride_x[1]
    a_rows = a_ptr + slot * stride_a[0] + offs_r[:, None] * stride_a[1]
    a_ptrs = a_rows + offs_k[None, :] * stride_a[2]
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for _ in range(0, tl.minimum(span, K - begin), BLOCK_K):
        mask_k = offs_k < K
        x = tl.load(x_ptrs, mask=mask_k, other=0.0).to(tl.float32)
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        acc += a.to(tl.float32) * x[None, :]
        x_ptrs += BLOCK_K * tl.cast(stride_x[1], tl.int64)
        a_ptrs += BLOCK_K * tl.cast(stride_a[2], tl.int64)
        offs_k += BLOCK_K
    out = planes_ptr + (pid_k.to(tl.int64) * M + row) * R + offs_r
    tl.store(out, tl.sum(acc, axis=1), mask=mask_r)


@triton.jit(do_not_specialize=["M", "S"])
def multi_gemv_add_kernel(
    planes_ptr,  # fp32 [S, M, R]
    v_ptr,  # [P, R, N]
    rank_ptr,  # int32 [P]
    scale_ptr,  # fp32 [P]
    gate_ptr,  # fp32 [P, R], contiguous
    table_ptr,  # int32 [G]
    ids_ptr,  # int32 [M]
    y_ptr,  # [M, N]
    stride_v,
    stride_y,
    S,
    M,
    N,
    R,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, pid_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(ids_ptr + row)
    if slot < 0:
        return
    slot = tl.load(table_ptr + slot.to(tl.int64)).to(tl.int64)
    rank = tl.load(rank_ptr + slot)
    scale = tl.load(scale_ptr + slot)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y_ptrs = y_ptr + row * stride_y[0] + offs_n * stride_y[1]
    acc = tl.load(y_ptrs, mask=mask_n, other=0.0).to(tl.float32)
    for first in range(0, rank, BLOCK_R):
        offs_r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < rank
        plane = planes_ptr + row * R + offs_r
        t = tl.zeros([BLOCK_R], tl.float32)
        for _ in range(S):
            t += tl.load(plane, mask=mask_r, other=0.0)
            plane += tl.cast(M, tl.int64) * R
        t *= scale * tl.load(gate_ptr + slot * R + offs_r, mask=mask_r, other=0.0)
        v_rows = v_ptr + slot * stride_v[0] + offs_r[:, None] * stride_v[1]
        v_ptrs = v_rows + offs_n[None, :] * stride_v[2]
        v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc += tl.sum(t[:, None] * v.to(tl.float32), axis=0)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n)


def multi_gemv_shrink(x, slots, a_slots, routing):
    """fp32 planes [splits of K, M, R] of x_i A_j^T, unwritten past rank_j and in rows without
    adapter, for x [M, K] and a_slots [P, R, K] of any strides."""
    (M, K), R = x.shape, a_slots.shape[1]
    span = max(1, triton.cdiv(triton.cdiv(K, BLOCK_K), SPLITS)) * BLOCK_K
    splits = max(1, triton.cdiv(K, span))
    new = torch.empty if K else torch.zeros  # a sum over nothing
    planes = new(splits, M, R, dtype=torch.float32, device=x.device)
    if M and K:
        launch(
            multi_gemv_shrink_kernel,
            (M, splits, triton.cdiv(R, BLOCK_R)),
            x.device,
            x,
            a_slots,
            slots.rank,
            slots.table,
            routing.ids,
            planes,
            x.stride(),
            a_slots.stride(),
            M,
            K,
            R,
            span,
            BLOCK_R=BLOCK_R,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            maxnreg=168,  # ptxas left alone takes 128 on sm_100, and spills
        )
    return planes


def multi_gemv_add_(y, planes, v_slots, slots, routing):
    """y [M, N] += scale_j g_j ⊙ (the sum of planes)_i V_j in place, summed in fp32, rounded once.

    v_slots [P, R, N]; y of any strides.
    """
    (splits, M, R), N = planes.shape, y.shape[1]
    if y.numel():
        launch(
            multi_gemv_add_kernel,
            (M, triton.cdiv(N, BLOCK_N)),
            y.device,
            planes,
            v_slots,
            slots.rank,
            slots.scale,
            slots.gate,
            slots.table,
            routing.ids,
            y,
            v_slots.stride(),
            y.stride(),
            splits,
            M,
            N,
            R,
            BLOCK_R=BLOCK_R,
            BLOCK_N=BLOCK_N,
            num_warps=4,
        )
