"""h_i = drop(x_i) A_j^T   and   t_i = scale_j * g_j ⊙ h_i   with j = the adapter of row i.

The form of `shrink` for many adapters: a tile holds rows of one adapter, gathered from wherever
they stand in the batch. Rank rows past rank_j are not read; rows without adapter are not written.
How K is split does not depend on the batch, so a row's result does not depend on the other rows.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import expand_bits, keep_bits
from .launch import launch
from .segments import block_g, find_tile, max_tiles


@triton.jit
def scaled_of(h, slot, gate_ptr, scale_ptr, offs_r, mask, R):
    """scale_j * g_j ⊙ h for rows h [BLOCK, BLOCK_R] of the adapters `slot` [BLOCK]."""
    gate = tl.load(gate_ptr + slot[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
    return h * gate * tl.load(scale_ptr + slot)[:, None]


@triton.jit
def shrink_tile(
    x_ptr,
    a_ptr,
    rank_ptr,
    scale_ptr,
    gate_ptr,
    table_ptr,
    order_ptr,
    offsets_ptr,
    seed_ptr,
    h_ptr,
    t_ptr,
    planes_ptr,
    stride_x,
    stride_a,
    M,
    K,
    R,
    G,
    span,
    keep_scale,
    threshold,
    pid_r,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One tile of rows and ranks of one projection, or nothing where there is none."""
    slot, first, last = find_tile(tl.program_id(0), offsets_ptr, G, BLOCK_M, BLOCK_G)
    pid_k = tl.program_id(1).to(tl.int64)
    known = slot < G
    slot = tl.load(table_ptr + slot.to(tl.int64), mask=known, other=0).to(tl.int64)
    rank = tl.load(rank_ptr + slot, mask=known, other=0)
    if pid_r * BLOCK_R < rank:
        place = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = place < last
        offs_m = tl.load(order_ptr + place, mask=mask_m, other=0).to(tl.int64)
        offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < rank

        begin = tl.multiple_of(pid_k * span, BLOCK_K)
        columns = tl.minimum(span, K - begin)
        tl.assume(columns > 0)  # as in shrink
        offs_k = begin + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + offs_m[:, None] * stride_x[0] + offs_k[None, :] * stride_x[1]
        a_rows = a_ptr + slot * stride_a[0] + offs_r[:, None] * stride_a[1]
        a_ptrs = a_rows + offs_k[None, :] * stride_a[2]
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
            offs_call = begin // 8 + tl.arange(0, BLOCK_K // 8)

        # h^T = A drop(x)^T, with the masked x on the right (see shrink).
        acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        for _ in range(0, columns, BLOCK_K):
            mask_k = offs_k < K
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            if seed_ptr is not None:
                bits = keep_bits(seed, offs_m, offs_call, tl.cdiv(K, 8), threshold)
                x = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
                offs_call += BLOCK_K // 8
            acc = tl.dot(a, tl.trans(x), acc, input_precision=INPUT_PRECISION)
            x_ptrs += BLOCK_K * tl.cast(stride_x[1], tl.int64)
            a_ptrs += BLOCK_K * tl.cast(stride_a[2], tl.int64)
            offs_k += BLOCK_K

        h = tl.trans(acc) * keep_scale  # [BLOCK_M, BLOCK_R]
        out = offs_m[:, None] * R + offs_r[None, :]
        mask = mask_m[:, None] & mask_r[None, :]
        if planes_ptr is not None:
            tl.store(planes_ptr + pid_k * M * R + out, h, mask=mask)
        else:
            if h_ptr is not None:
                tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=mask)
            if t_ptr is not None:
                slots = tl.zeros([BLOCK_M], tl.int64) + slot
                t = scaled_of(h, slots, gate_ptr, scale_ptr, offs_r, mask, R)
                tl.store(t_ptr + out, t.to(t_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "span", "threshold", "num_r"])
def multi_shrink_kernel(
    x_ptr,  # [M, K]
    a_ptrs,  # a tuple, of every projection: [P, R_i, K]
    rank_ptrs,  # int32 [P] each
    scale_ptrs,  # fp32 [P]
    gate_ptrs,  # fp32 [P, R_i], contiguous
    table_ptrs,  # int32 [G]
    order_ptr,  # int32 [M]
    offsets_ptr,  # int32 [G + 1]
    seed_ptr,  # int64 [1], or None: no dropout
    h_ptrs,  # [M, R_i] each, or None
    t_ptrs,  # [M, R_i] each, or None
    planes_ptrs,  # fp32 [splits of K, M, R_i] where there is more than one, else None
    stride_x,
    strides_a,
    M,
    K,
    Rs,
    G,
    num_r,  # blocks of ranks of a projection
    span,  # columns of K in a split, a multiple of BLOCK_K
    keep_scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    projection, pid_r = tl.program_id(2) // num_r, tl.program_id(2) % num_r
    for i in tl.static_range(len(a_ptrs)):
        if projection == i:
            shrink_tile(
                x_ptr, a_ptrs[i], rank_ptrs[i], scale_ptrs[i], gate_ptrs[i], table_ptrs[i],
                order_ptr, offsets_ptr, seed_ptr,
                None if h_ptrs is None else h_ptrs[i],
                None if t_ptrs is None else t_ptrs[i],
                None if planes_ptrs is None else planes_ptrs[i],
                stride_x, strides_a[i], M, K, Rs[i], G, span, keep_scale, threshold, pid_r,
                BLOCK_M, BLOCK_K, BLOCK_R, BLOCK_G, INPUT_PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["S", "M"])
def sum_rows_kernel(
    planes_ptr,  # fp32 [S, M, R]
    ids_ptr,  # int32 [M]
    rank_ptr,
    scale_ptr,
    gate_ptr,
    table_ptr,
    h_ptr,
    t_ptr,
    S,
    M,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h and t of multi_shrink from the planes of its splits, added in order."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1).to(tl.int64)
    known = ids >= 0
    slot = tl.load(table_ptr + tl.where(known, ids, 0)).to(tl.int64)
    rank = tl.where(known, tl.load(rank_ptr + slot), 0)
    mask = offs_r[None, :] < rank[:, None]
    out = offs_m[:, None] * R + offs_r[None, :]
    plane = planes_ptr + out
    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for _ in range(S):
        h += tl.load(plane, mask=mask, other=0.0)
        plane += tl.cast(M, tl.int64) * R
    if h_ptr is not None:
        tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=mask)
    if t_ptr is not None:
        t = scaled_of(h, slot, gate_ptr, scale_ptr, offs_r, mask, R)
        tl.store(t_ptr + out, t.to(t_ptr.dtype.element_ty), mask=mask)


def sum_rows(planes, slots, routing, *, h=None, t=None):
    """Write h and t [M, R], where given, from planes [S, M, R]; not past a row's rank."""
    split, M, R = planes.shape
    if M:
        launch(
            sum_rows_kernel,
            (triton.cdiv(M, 32), triton.cdiv(R, 32)),
            planes.device,
            planes,
            routing.ids,
            slots.rank,
            slots.scale,
            slots.gate,
            slots.table,
            h,
            t,
            split,
            M,
            R,
            BLOCK_M=32,
            BLOCK_R=32,
            num_warps=4,
        )


def multi_shrink(x, slots, a_slots, routing, *, dropout=None, save_h=False, config=None):
    """(t [M, R], h [M, R] or None) in x's dtype, for x [M, K] and a_slots [P, R, K] of any strides.

    slots has rank int32 [P], scale fp32 [P], gate fp32 [P, R] and table int32 [G]; routing has ids,
    order and offsets.
    Columns past a row's rank, and rows without adapter, are unwritten in t and zero in h. dropout
    as in shrink.
    """
    ts, hs = multi_shrink_group(
        x, [slots], [a_slots], routing, dropout=dropout, save_h=save_h, config=config
    )
    return ts[0], hs[0]


def multi_shrink_group(x, slots, a_slots, routing, *, dropout=None, save_h=False, config=None):
    """Lists of t and h for the slots of several projections of one x: one launch."""
    (M, K), G = x.shape, slots[0].table.shape[0]
    ranks = [a.shape[1] for a in a_slots]
    sm = configs.capability(x.device)
    c = dict(config or configs.multi_shrink(K, max(ranks), x.dtype, sm))
    steps = triton.cdiv(triton.cdiv(K, c["BLOCK_K"]), c.pop("SPLIT_K"))
    span = max(1, steps) * c["BLOCK_K"]
    split = triton.cdiv(K, span)
    seed, threshold, keep_scale = dropout or (None, 0, 1.0)
    new = torch.empty if K else torch.zeros  # a sum over nothing
    like = {"dtype": x.dtype, "device": x.device}
    ts = [new(M, R, **like) for R in ranks]
    hs = [torch.zeros(M, R, **like) if save_h else None for R in ranks]
    parts = ranks if split > 1 else []
    planes = [torch.empty(split, M, R, dtype=torch.float32, device=x.device) for R in parts]
    tiles, num_r = max_tiles(M, G, c["BLOCK_M"]), triton.cdiv(max(ranks), c["BLOCK_R"])
    if tiles and K:
        launch(
            multi_shrink_kernel,
            (tiles, split, len(slots) * num_r),
            x.device,
            x,
            tuple(a_slots),
            tuple(own.rank for own in slots),
            tuple(own.scale for own in slots),
            tuple(own.gate for own in slots),
            tuple(own.table for own in slots),
            routing.order,
            routing.offsets,
            seed,
            tuple(hs) if save_h and split == 1 else None,
            tuple(ts) if split == 1 else None,
            tuple(planes) if split > 1 else None,
            x.stride(),
            tuple(a.stride() for a in a_slots),
            M,
            K,
            tuple(ranks),
            G,
            num_r,
            span,
            keep_scale,
            threshold,
            BLOCK_G=block_g(G),
            INPUT_PRECISION=configs.input_precision(x.dtype),
            **c,
        )
    if split > 1:
        for own, part, h, t in zip(slots, planes, hs, ts, strict=True):
            sum_rows(part, own, routing, h=h, t=t)
    return ts, hs
