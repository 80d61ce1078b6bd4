"""y_i += scale_j g_j ⊙ (x_i A_j^T) B_j^T, for a few rows with an adapter each: decoding.

The form of multi_shrink and multi_segment_gemm where a tile of rows would hold one row of each
adapter. Every row reads its own slot with plain multiply-adds: what counts are the bytes of the
slots, and rows that share an adapter find them in the L2 cache. h is an fp32 plane for each split
of K; the second kernel adds the planes in order. Ranks past rank_j are not read. Projections of the
same x (q, k and v) share both launches.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

# A block reads 16 KiB of A, or 8 KiB of B^T, in loads of 16 bytes: there is no reuse to tune for.
BLOCK_R, BLOCK_K, BLOCK_N, SPLITS = 16, 512, 256, 8


@triton.jit
def shrink_row(
    x_ptr,
    a_ptr,
    rank_ptr,
    table_ptr,
    ids_ptr,
    planes_ptr,
    stride_x,
    stride_a,
    M,
    K,
    R,
    span,
    pid_r,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A split of K and a block of ranks of one row, of one projection."""
    row, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(ids_ptr + row)
    known = slot >= 0
    slot = tl.load(table_ptr + slot.to(tl.int64), mask=known, other=0).to(tl.int64)
    rank = tl.load(rank_ptr + slot, mask=known, other=0)
    if pid_r * BLOCK_R < rank:
        offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < rank
        begin = tl.multiple_of(pid_k * span, BLOCK_K)
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
        out = planes_ptr + (pid_k * M + row) * R + offs_r
        tl.store(out, tl.sum(acc, axis=1), mask=mask_r)


@triton.jit(do_not_specialize=["M", "span", "num_r"])
def multi_gemv_shrink_kernel(
    x_ptr,  # [M, K]
    a_ptrs,  # a tuple, of every projection: [P, R_i, K]
    rank_ptrs,  # int32 [P] each
    table_ptrs,  # int32 [G] each
    ids_ptr,  # int32 [M]
    planes_ptrs,  # fp32 [splits of K, M, R_i] each
    stride_x,
    strides_a,
    M,
    K,
    Rs,
    num_r,  # blocks of ranks of a projection
    span,  # columns of K in a split, a multiple of BLOCK_K
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    projection, pid_r = tl.program_id(2) // num_r, tl.program_id(2) % num_r
    for i in tl.static_range(len(a_ptrs)):
        if projection == i:
            shrink_row(
                x_ptr, a_ptrs[i], rank_ptrs[i], table_ptrs[i], ids_ptr, planes_ptrs[i],
                stride_x, strides_a[i], M, K, Rs[i], span, pid_r, BLOCK_R, BLOCK_K,
            )  # fmt: skip


@triton.jit
def add_row(
    planes_ptr,
    v_ptr,
    rank_ptr,
    scale_ptr,
    gate_ptr,
    table_ptr,
    ids_ptr,
    y_ptr,
    stride_v,
    stride_y,
    S,
    M,
    N,
    R,
    pid_n,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns of one row, of one projection."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.load(ids_ptr + row).to(tl.int64)
    if j >= 0:
        slot = tl.load(table_ptr + j).to(tl.int64)
        rank = tl.load(rank_ptr + slot)
        scale = tl.load(scale_ptr + slot)
        offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
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


@triton.jit(do_not_specialize=["M", "S", "num_n"])
def multi_gemv_add_kernel(
    planes_ptrs,  # a tuple, of every projection: fp32 [S, M, R_i]
    v_ptrs,  # [P, R_i, N_i] each
    rank_ptrs,  # int32 [P]
    scale_ptrs,  # fp32 [P]
    gate_ptrs,  # fp32 [P, R_i], contiguous
    table_ptrs,  # int32 [G]
    ids_ptr,  # int32 [M]
    y_ptrs,  # [M, N_i] each
    strides_v,
    strides_y,
    S,
    M,
    Ns,
    Rs,
    num_n,  # blocks of columns of a projection, at most
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    projection, pid_n = tl.program_id(1) // num_n, tl.program_id(1) % num_n
    for i in tl.static_range(len(v_ptrs)):
        if (projection == i) & (pid_n * BLOCK_N < Ns[i]):
            add_row(
                planes_ptrs[i], v_ptrs[i], rank_ptrs[i], scale_ptrs[i], gate_ptrs[i],
                table_ptrs[i], ids_ptr, y_ptrs[i], strides_v[i], strides_y[i], S, M, Ns[i], Rs[i],
                pid_n, BLOCK_R, BLOCK_N,
            )  # fmt: skip


def multi_gemv_shrink(x, slots, a_slots, routing):
    """Of every projection fp32 planes [splits of K, M, R] of x_i A_j^T, unwritten past rank_j and
    in rows without adapter, for x [M, K] and lists of slots and of a_slots [P, R, K]: one launch.
    """
    (M, K), ranks = x.shape, [a.shape[1] for a in a_slots]
    span = max(1, triton.cdiv(triton.cdiv(K, BLOCK_K), SPLITS)) * BLOCK_K
    splits = max(1, triton.cdiv(K, span))
    new = torch.empty if K else torch.zeros  # a sum over nothing
    planes = [new(splits, M, R, dtype=torch.float32, device=x.device) for R in ranks]
    num_r = triton.cdiv(max(ranks), BLOCK_R)
    if M and K:
        launch(
            multi_gemv_shrink_kernel,
            (M, splits, len(slots) * num_r),
            x.device,
            x,
            tuple(a_slots),
            tuple(own.rank for own in slots),
            tuple(own.table for own in slots),
            routing.ids,
            tuple(planes),
            x.stride(),
            tuple(a.stride() for a in a_slots),
            M,
            K,
            tuple(ranks),
            num_r,
            span,
            BLOCK_R=BLOCK_R,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            maxnreg=168,  # ptxas left alone takes 128 on sm_100, and spills
        )
    return planes


def multi_gemv_add_(ys, planes, v_slots, slots, routing):
    """y [M, N] += scale_j g_j ⊙ (the sum of planes)_i V_j in place, for lists of projections, with
    v_slots [P, R, N] and y of any strides: one launch, summed in fp32, rounded once."""
    splits, M, _ = planes[0].shape
    num_n = triton.cdiv(max(y.shape[1] for y in ys), BLOCK_N)
    if M and num_n:
        launch(
            multi_gemv_add_kernel,
            (M, len(slots) * num_n),
            ys[0].device,
            tuple(planes),
            tuple(v_slots),
            tuple(own.rank for own in slots),
            tuple(own.scale for own in slots),
            tuple(own.gate for own in slots),
            tuple(own.table for own in slots),
            routing.ids,
            tuple(ys),
            tuple(v.stride() for v in v_slots),
            tuple(y.stride() for y in ys),
            splits,
            M,
            tuple(y.shape[1] for y in ys),
            tuple(part.shape[2] for part in planes),
            num_n,
            BLOCK_R=BLOCK_R,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            maxnreg=96,  # likewise 48 on sm_90
        )
