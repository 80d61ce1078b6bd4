"""h = drop(x) A^T   and   t = scale * g ⊙ h.

x [M, K] is read once. K is split over blocks where M alone does not fill the device: each split
writes an fp32 plane [M, R] and the planes are added in order.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from . import configs
from .dropout import calls_of, expand_bits, keep_bits
from .launch import exact, launch
from .planes import scaled, sum_planes


@triton.jit(do_not_specialize=["M", "span", "threshold", "first_call", "row_calls"])
def shrink_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    gate_ptr,  # [R] or None
    seed_ptr,  # int64 [1], or None: no dropout
    h_ptr,  # [M, R] or None
    t_ptr,  # [M, R] or None
    planes_ptr,  # fp32 [splits of K, M, R] where there is more than one, else None
    stride_x,
    stride_a,
    M,
    K,
    R,
    span,  # columns of K in a split, a multiple of BLOCK_K
    scale,
    keep_scale,
    threshold,
    first_call,
    row_calls,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    pid_m = tl.program_id(0).to(tl.int64)
    pid_k = tl.program_id(1).to(tl.int64)
    pid_r = tl.program_id(2).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R

    first = tl.multiple_of(pid_k * span, BLOCK_K)
    columns = tl.minimum(span, K - first)
    tl.assume(columns > 0)  # a path around the loop makes ptxas serialize its wgmma
    offs_k = first + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_x[0] + offs_k[None, :] * stride_x[1]
    a_ptrs = a_ptr + offs_r[:, None] * stride_a[0] + offs_k[None, :] * stride_a[1]
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        offs_call = first_call + first // 8 + tl.arange(0, BLOCK_K // 8)

    # h^T = A drop(x)^T: the masked x is the RIGHT operand. ptxas before 13.3 can miscompile a
    # pipelined wgmma whose LEFT operand was computed in registers.
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for _ in range(0, columns, BLOCK_K):
        mask_k = offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
        if seed_ptr is not None:
            bits = keep_bits(seed, offs_m, offs_call, row_calls, threshold)
            x = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
            offs_call += BLOCK_K // 8
        acc = tl.dot(a, tl.trans(x), acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_x[1], tl.int64)
        a_ptrs += BLOCK_K * tl.cast(stride_a[1], tl.int64)
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
            t = scaled(h, gate_ptr, scale, offs_r, mask_r)
            tl.store(t_ptr + out, t.to(t_ptr.dtype.element_ty), mask=mask)


def shrink(x, a, *, scale=1.0, gate=None, dropout=None, columns=None, save_h=False, config=None):
    """(t [M, R], h [M, R] or None) in x's dtype, for x [M, K] and a [R, K] of any strides.

    dropout is None or (seed int64 [1], threshold, keep_scale): an element is kept iff its 16-bit
    lane reaches the threshold, and keep_scale multiplies h. columns = (first, total) where x is a
    part of a wider input.
    """
    (M, K), R = x.shape, a.shape[0]
    c = dict(config or configs.shrink(M, K, R, x.dtype, configs.capability(x.device)))
    steps = triton.cdiv(triton.cdiv(K, c["BLOCK_K"]), c.pop("SPLIT_K"))
    span = max(1, steps) * c["BLOCK_K"]
    split = triton.cdiv(K, span)
    seed, threshold, keep_scale = dropout or (None, 0, 1.0)
    new = torch.empty if K else torch.zeros  # a sum over nothing
    t = new(M, R, dtype=x.dtype, device=x.device)
    h = new(M, R, dtype=x.dtype, device=x.device) if save_h else None
    planes = torch.empty(split, M, R, dtype=torch.float32, device=x.device) if split > 1 else None
    if t.numel() and K:
        launch(
            shrink_kernel,
            (triton.cdiv(M, c["BLOCK_M"]), split, triton.cdiv(R, c["BLOCK_R"])),
            x.device,
            x,
            a,
            gate,
            seed,
            h,
            t,
            planes,
            x.stride(),
            exact(a.stride()),
            M,
            K,
            *exact((R,)),
            span,
            scale,
            keep_scale,
            threshold,
            *calls_of(K, columns),
            INPUT_PRECISION=configs.input_precision(x.dtype),
            OVERLAP=configs.overlaps(x.device),
            **c,
        )
    if planes is not None:
        sum_planes(planes, scale=scale, gate=gate, h=h, t=t)
    return t, h
