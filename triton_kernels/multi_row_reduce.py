"""P_j = sum over the rows i of adapter j of v_i^T drop(z)_i, each [R, C]; and what is made of it.

    dA_j = P_j                              z = x, v = dh
    dB_j^T = scale_j g_j ⊙ P_j, dg_j        z = dy, v = h

A block owns one adapter's rows, ROWS of them at most, and BLOCK_C columns of z. Its part of P goes
to an fp32 plane of its own, and an adapter's planes are added in order: no result depends on the
other adapters of the batch, and an adapter without rows gets zeros.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import expand_bits, keep_bits
from .launch import launch
from .segments import block_g, find_tile, max_tiles, tiles_before


@triton.jit(do_not_specialize=["M", "threshold", "rows"])
def multi_row_reduce_kernel(
    z_ptr,  # [M, C]
    v_ptr,  # [M, R]
    rank_ptr,  # int32 [P]
    table_ptr,  # int32 [G]
    order_ptr,  # int32 [M]
    offsets_ptr,  # int32 [G + 1]
    seed_ptr,  # int64 [1], or None: no dropout
    p_ptr,  # fp32 [tiles, R, C]
    stride_z,
    stride_v,
    M,
    C,
    R,
    G,
    threshold,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    tile, pid_c = tl.program_id(0) // num_c, tl.program_id(0) % num_c
    slot, first, last = find_tile(tile, offsets_ptr, G, rows, BLOCK_G)
    if slot >= G:
        return
    rank = tl.load(rank_ptr + tl.load(table_ptr + slot.to(tl.int64)).to(tl.int64))
    pid_r = tl.program_id(1)
    if pid_r * BLOCK_R >= rank:
        return
    offs_c = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_c, mask_r = offs_c < C, offs_r < rank
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        calls = tl.cdiv(C, 8)
        offs_call = pid_c * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)

    # P_j, with a masked z on the right (see row_reduce).
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    last = tl.minimum(first + rows, last)
    tl.assume(first < last)  # as in shrink
    for m in range(first, last, BLOCK_M):
        place = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = place < last
        offs_m = tl.load(order_ptr + place, mask=mask_m, other=0).to(tl.int64)
        z = tl.load(
            z_ptr + offs_m[:, None] * stride_z[0] + offs_c[None, :] * stride_z[1],
            mask=mask_m[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_C]
        v = tl.load(
            v_ptr + offs_m[:, None] * stride_v[0] + offs_r[None, :] * stride_v[1],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        if seed_ptr is not None:
            bits = keep_bits(seed, offs_m, offs_call, calls, threshold)
            z = tl.where(expand_bits(bits, BLOCK_M, BLOCK_C), z, 0.0)
        acc = tl.dot(tl.trans(v), z, acc, input_precision=INPUT_PRECISION)
    out = (tile.to(tl.int64) * R + offs_r[:, None]) * C + offs_c[None, :]
    tl.store(p_ptr + out, acc, mask=mask_r[:, None] & mask_c[None, :])


@triton.jit(do_not_specialize=["rows"])
def sum_tiles_kernel(
    p_ptr,  # fp32 [tiles, R, C]
    w_ptr,  # [P, R, C] or None
    rank_ptr,
    scale_ptr,  # fp32 [P] or None: plain_scale alone
    gate_ptr,  # fp32 [P, R] or None
    table_ptr,
    offsets_ptr,
    out_ptr,  # [P, R, C]
    dot_ptr,  # fp32 [blocks of C, P, R] or None
    stride_w,
    C,
    R,
    P,
    G,
    rows,
    plain_scale,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out_j = scale_j g_j ⊙ P_j, the sum of its planes; dot_jr = scale_j <w_jr, P_jr>."""
    pid_c, index = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(table_ptr + index).to(tl.int64)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(rank_ptr + slot)
    inside = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    before, tiles = tiles_before(index, offsets_ptr, G, rows, BLOCK_G)
    mask_r = (offs_r < rank) & (tiles > 0)
    live = inside & mask_r[:, None]
    plane = p_ptr + (before.to(tl.int64) * R + offs_r[:, None]) * C + offs_c[None, :]
    p = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for _ in range(tiles):
        p += tl.load(plane, mask=live, other=0.0)
        plane += tl.cast(R, tl.int64) * C
    p *= plain_scale
    if scale_ptr is not None:
        p = tl.where(live, p * tl.load(scale_ptr + slot), 0.0)  # zero, whatever the scale
    if dot_ptr is not None:
        w_slot = w_ptr + slot * stride_w[0]
        w_ptrs = w_slot + offs_r[:, None] * stride_w[1] + offs_c[None, :] * stride_w[2]
        w = tl.load(w_ptrs, mask=live, other=0.0)
        dot = tl.sum(p * w.to(tl.float32), axis=1)
        tl.store(dot_ptr + (pid_c * P + slot) * R + offs_r, dot, mask=offs_r < R)
    if gate_ptr is not None:
        p *= tl.load(gate_ptr + slot * R + offs_r, mask=mask_r, other=0.0)[:, None]
    out = out_ptr + (slot * R + offs_r[:, None]) * C + offs_c[None, :]
    tl.store(out, p.to(out_ptr.dtype.element_ty), mask=inside)


def multi_row_reduce(z, v, slots, routing, out, *, scaled=False, w=None, dropout=None, config=None):
    """Write out [P, R, C], contiguous: P_j, or where scaled scale_j g_j ⊙ P_j, into the slot of
    each id; the slots that no id has are left alone.

    z [M, C] and v [M, R] of any strides. Where w [P, R, C] is given return dg fp32 [P, R] =
    scale_j <w_jr, P_jr>, else None. dropout is None or (seed int64 [1], threshold, keep_scale) and
    masks z.
    """
    (M, C), (P, R), G = z.shape, out.shape[:2], slots.table.shape[0]
    c = dict(config or configs.multi_row_reduce(R, z.dtype, configs.capability(z.device)))
    rows = c.pop("ROWS")
    seed, threshold, keep_scale = dropout or (None, 0, 1.0)
    tiles = max_tiles(M, G, rows)
    p = torch.empty(tiles, R, C, dtype=torch.float32, device=z.device)
    if p.numel():
        launch(
            multi_row_reduce_kernel,
            (tiles * triton.cdiv(C, c["BLOCK_C"]), triton.cdiv(R, c["BLOCK_R"])),
            z.device,
            z,
            v,
            slots.rank,
            slots.table,
            routing.order,
            routing.offsets,
            seed,
            p,
            z.stride(),
            v.stride(),
            M,
            C,
            R,
            G,
            threshold,
            rows,
            BLOCK_G=block_g(G),
            INPUT_PRECISION=configs.input_precision(z.dtype),
            **c,
        )
    block_r, block_c = 16, 128
    blocks = triton.cdiv(C, block_c)
    dots = None if w is None else p.new_zeros(blocks, P, R)
    if out.numel():
        launch(
            sum_tiles_kernel,
            (blocks, G, triton.cdiv(R, block_r)),
            z.device,
            p,
            w,
            slots.rank,
            slots.scale if scaled else None,
            slots.gate if scaled else None,
            slots.table,
            routing.offsets,
            out,
            dots,
            None if w is None else w.stride(),
            C,
            R,
            P,
            G,
            rows,
            keep_scale,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            BLOCK_G=block_g(G),
            num_warps=4,
        )
    return None if dots is None else dots.sum(0)
