"""P = drop(z)^T v, a sum over the M rows with a skinny result; u = z w from the same read of z.

    dA^T = drop(x)^T dh          z = x, v = dh; the mask is made again, and kept as bits for dx
    P = dy^T h, u = dy B         z = dy, v = h, w = B

A block owns `rows` rows x BLOCK_C columns of z and keeps its part of P in registers; parts of P and
u go to fp32 planes that are added in order.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import calls_of, expand_bits, keep_bits
from .launch import exact, launch
from .planes import sum_planes
from .shrink import shrink


@triton.jit(do_not_specialize=["M", "threshold", "first_call", "row_calls", "rows"])
def row_reduce_kernel(
    z_ptr,  # [M, C]
    v_ptr,  # [M, R]
    w_ptr,  # [C, R] or None
    seed_ptr,  # int64 [1], or None: no dropout
    bits_ptr,  # uint8 [M, ceil(C / 8)] or None
    p_ptr,  # fp32 [row blocks, R, C]
    u_ptr,  # fp32 [column blocks, M, R] where w is given
    stride_z,
    stride_v,
    stride_w,
    M,
    C,
    R,
    threshold,
    first_call,
    row_calls,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid, num_c = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    pid_rows, pid_c = (pid // num_c).to(tl.int64), (pid % num_c).to(tl.int64)
    pid_r = tl.program_id(1).to(tl.int64)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    if w_ptr is not None:
        w = tl.load(
            w_ptr + offs_c[:, None] * stride_w[0] + offs_r[None, :] * stride_w[1],
            mask=mask_c[:, None] & mask_r[None, :],
            other=0.0,
        )  # [BLOCK_C, BLOCK_R]
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        calls = tl.cdiv(C, 8)
        offs_call = pid_c * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)

    # P^T, because a masked z must be the RIGHT operand (see shrink).
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = pid_rows * rows
    last = tl.minimum(first + rows, M)
    tl.assume(first < last)  # as in shrink
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < M
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
            bits = keep_bits(seed, offs_m, first_call + offs_call, row_calls, threshold)
            if bits_ptr is not None and pid_r == 0:
                tl.store(
                    bits_ptr + offs_m[:, None] * calls + offs_call[None, :],
                    bits.to(tl.uint8),
                    mask=mask_m[:, None] & (offs_call < calls)[None, :],
                )
            z = tl.where(expand_bits(bits, BLOCK_M, BLOCK_C), z, 0.0)
        acc = tl.dot(tl.trans(v), z, acc, input_precision=INPUT_PRECISION)
        if w_ptr is not None:
            u = tl.dot(z, w, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_R]
            tl.store(
                u_ptr + (pid_c * M + offs_m[:, None]) * R + offs_r[None, :],
                u,
                mask=mask_m[:, None] & mask_r[None, :],
            )

    tl.store(
        p_ptr + (pid_rows * R + offs_r[:, None]) * C + offs_c[None, :],
        acc,
        mask=mask_r[:, None] & mask_c[None, :],
    )


def row_reduce(z, v, *, w=None, dropout=None, columns=None, bits=None, config=None):
    """fp32 planes of P^T [row blocks, R, C] and, where w is given, of u [column blocks, M, R].

    z [M, C], v [M, R], w [C, R], any strides. dropout is None or (seed int64 [1], threshold) and
    masks z; bits uint8 [M, ceil(C / 8)] then receives the mask. columns = (first, total) where z is
    a part of a wider input.
    """
    (M, C), R = z.shape, v.shape[1]
    sm = configs.capability(z.device)
    c = dict(config or configs.row_reduce(M, C, R, z.dtype, sm, with_u=w is not None))
    rows = c.pop("ROWS")
    seed, threshold = dropout or (None, 0)
    row_blocks, col_blocks = triton.cdiv(M, rows), triton.cdiv(C, c["BLOCK_C"])
    fp32 = {"dtype": torch.float32, "device": z.device}
    p = torch.empty(row_blocks, R, C, **fp32)
    u = None if w is None else torch.empty(col_blocks, M, R, **fp32)
    if p.numel():
        launch(
            row_reduce_kernel,
            (row_blocks * col_blocks, triton.cdiv(R, c["BLOCK_R"])),
            z.device,
            z,
            v,
            w,
            seed,
            bits,
            p,
            u,
            z.stride(),
            exact(v.stride()),
            None if w is None else exact(w.stride()),
            M,
            C,
            *exact((R,)),
            threshold,
            *calls_of(C, columns),
            rows,
            INPUT_PRECISION=configs.input_precision(z.dtype),
            **c,
        )
    return p, u


def row_reduce_dy(dy, b, h, *, scale, gate=None, need_dh=True, need_dgate=False, db_dtype=None):
    """(dh [M, R], dB [N, R], dg fp32 [R]) from ONE read of dy [M, N]; with P = dy^T h

        dh = scale * g ⊙ (dy B)     dB = scale * P diag(g)     dg_r = scale * sum_n B_nr P_nr

    The planes of u grow with R. Where they cost more than a second read of dy, dh is a shrink.
    """
    sm = configs.capability(dy.device)
    together = need_dh and configs.row_reduce(*dy.shape, h.shape[1], dy.dtype, sm, with_u=True)
    p, u = row_reduce(dy, h, w=b if together else None)
    dh = None
    if need_dh and u is None:
        dh, _ = shrink(dy, b.t(), scale=scale, gate=gate)
    elif need_dh:
        dh = torch.empty_like(h)
        sum_planes(u, scale=scale, gate=gate, t=dh)
    db = torch.empty(b.shape, dtype=db_dtype or b.dtype, device=b.device)
    dgate = sum_planes(p.transpose(1, 2), scale=scale, gate=gate, t=db, w=b if need_dgate else None)
    return dh, db, dgate


def row_reduce_x(x, dh, *, dropout=None, columns=None, bits=None, da_dtype=None):
    """dA [R, K] = dh^T drop(x); bits, where given, receives the mask.

    dropout is None or (seed int64 [1], threshold, keep_scale). columns = (first, total) where x is
    a part of a wider input.
    """
    seed, threshold, keep_scale = dropout or (None, 0, 1.0)
    p, _ = row_reduce(x, dh, dropout=dropout and (seed, threshold), columns=columns, bits=bits)
    da = torch.empty(dh.shape[1], x.shape[1], dtype=da_dtype or x.dtype, device=x.device)
    sum_planes(p.transpose(1, 2), plain_scale=keep_scale, h=da.t())
    return da
