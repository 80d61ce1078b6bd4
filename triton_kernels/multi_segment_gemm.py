"""y_i = bias + x_i W^T + t_i V_j   with j = the adapter of row i, in one fp32 accumulator.

    forward   x, W0, t, V = B^T slots          dx   dy, W0^T, dh, V = A slots
    masked dx: the adapters first, then D ⊙ acc, then dy W0^T (see segment_gemm)

Tiles are those of the base product, whatever rows they hold: the last segment walks over the
adapters that are present in the tile, each with the rows that are not its own at zero. The base
product does not grow with the number of adapters. Without a base the sum starts from y itself.

Zero times NaN is NaN: what is not finite in V_j stays out of that product, and the rows of adapter
j alone become NaN in the columns of the tile.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import expand_bits
from .launch import launch
from .segment_gemm import accumulate, swizzle2d

BROKEN = tl.constexpr(-2)  # in place of an id


@triton.jit
def accumulate_adapters(
    acc,
    t_ptr,
    v_ptr,
    rank_ptr,
    table_ptr,
    stride_t,
    stride_v,
    offs_m,
    offs_n,
    ids,
    mask_n,
    G,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """acc + t_i V_j over the adapters j among `ids` [BLOCK_M], in ascending order; NaN in the rows
    of an adapter of which an element of V_j in these columns is not finite."""
    slot = tl.min(tl.where(ids >= 0, ids, G), axis=0).to(tl.int64)
    while slot < G:
        place = tl.load(table_ptr + slot).to(tl.int64)
        rank = tl.load(rank_ptr + place)
        v_slot = v_ptr + place * stride_v[0]
        own = ids == slot
        broken = 0
        for first in tl.range(0, rank, BLOCK_R, num_stages=1):
            offs_r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
            mask_r = offs_r < rank
            t_ptrs = t_ptr + offs_m[:, None] * stride_t[0] + offs_r[None, :] * stride_t[1]
            v_ptrs = v_slot + offs_r[:, None] * stride_v[1] + offs_n[None, :] * stride_v[2]
            t = tl.load(t_ptrs, mask=own[:, None] & mask_r[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            finite = tl.abs(v.to(tl.float32)) < float("inf")
            broken |= tl.max(tl.where(finite, 0, 1))
            v = tl.where(finite, v, 0.0)
            acc = tl.dot(t, v, acc, input_precision=INPUT_PRECISION)
        ids = tl.where(own, tl.where(broken != 0, BROKEN, ids), ids)  # which is done with them
        slot = tl.min(tl.where(ids > slot, ids, G), axis=0).to(tl.int64)
    return tl.where((ids == BROKEN)[:, None], float("nan"), acc)


@triton.jit(do_not_specialize=["M"])
def multi_segment_gemm_kernel(
    x_ptr,  # [M, K], or None: y + t_i V_j
    w_ptr,  # [N, K], or None
    t_ptr,  # [M, R]
    v_ptr,  # [P, R, N]
    rank_ptr,  # int32 [P]
    table_ptr,  # int32 [G]
    ids_ptr,  # int32 [M]
    bias_ptr,  # [N] or None
    bits_ptr,  # uint8 [M, ceil(N / 8)] or None: then the adapters come first
    y_ptr,  # [M, N]
    stride_x,
    stride_w,
    stride_t,
    stride_v,
    stride_y,
    M,
    N,
    K,
    G,
    keep_scale,
    ALIGN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid_m, pid_n = swizzle2d(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=-1)

    mask = mask_m[:, None] & mask_n[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_y[0] + offs_n[None, :] * stride_y[1]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bits_ptr is not None:
        acc = accumulate_adapters(
            acc, t_ptr, v_ptr, rank_ptr, table_ptr, stride_t, stride_v, offs_m, offs_n, ids,
            mask_n, G, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
        num_bytes = tl.cdiv(N, 8)
        offs_byte = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        bits = tl.load(
            bits_ptr + offs_m[:, None] * num_bytes + offs_byte[None, :],
            mask=mask_m[:, None] & (offs_byte < num_bytes)[None, :],
            other=0,
        ).to(tl.int32)
        acc = tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), acc * keep_scale, 0.0)
    if x_ptr is not None:
        acc = accumulate(
            acc, x_ptr, w_ptr, stride_x, stride_w, offs_m, offs_n, mask_m, mask_n, K,
            ALIGN_K, BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip
    else:
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    if bits_ptr is None:
        acc = accumulate_adapters(
            acc, t_ptr, v_ptr, rank_ptr, table_ptr, stride_t, stride_v, offs_m, offs_n, ids,
            mask_n, G, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def multi_segment_gemm(x, weight, t, v_slots, slots, routing, *, bias=None, mask=None, config=None):
    """y [M, N] = bias + x W^T + t_i V_j, for x [M, K], weight [N, K], t [M, R], v_slots [P, R, N].

    slots has rank int32 [P] and table int32 [G]; routing has ids. mask is None or (bits uint8
    [M, ceil(N / 8)], keep_scale): then the adapters' part is multiplied by keep * keep_scale.
    """
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _start(y, x, weight, t, v_slots, slots, routing, bias, mask, config)
    return y


def multi_segment_add_(y, t, v_slots, slots, routing, *, config=None):
    """y [M, N] += t_i V_j in place, summed in fp32 and rounded once; y of any strides."""
    _start(y, None, None, t, v_slots, slots, routing, None, None, config)


def _start(y, x, weight, t, v_slots, slots, routing, bias, mask, config):
    (M, N), R, G = y.shape, v_slots.shape[1], slots.table.shape[0]
    K = 0 if x is None else x.shape[1]
    sm = configs.capability(y.device)
    choose = configs.segment_add if x is None else configs.segment_gemm
    c = dict(config or choose(M, N, y.dtype, sm))
    # Steps of ranks are steps of K, but hold 1024 elements of V, or its loads would be narrow.
    block_r = max(configs.block_of(R, min(32, c["BLOCK_K"])), 1024 // c["BLOCK_N"])
    c["BLOCK_K"] = configs.block_of(K, c["BLOCK_K"])
    bits, keep_scale = mask or (None, 1.0)
    if y.numel():
        launch(
            multi_segment_gemm_kernel,
            (triton.cdiv(M, c["BLOCK_M"]) * triton.cdiv(N, c["BLOCK_N"]),),
            y.device,
            x,
            weight,
            t,
            v_slots,
            slots.rank,
            slots.table,
            routing.ids,
            bias,
            bits,
            y,
            None if x is None else x.stride(),
            None if x is None else weight.stride(),
            t.stride(),
            v_slots.stride(),
            y.stride(),
            M,
            N,
            K,
            G,
            keep_scale,
            ALIGN_K=8 if K % 8 == 0 else 1,
            BLOCK_R=block_r,
            INPUT_PRECISION=configs.input_precision(y.dtype),
            **c,
        )
