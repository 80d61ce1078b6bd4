"""y = base + bias + sum_i L_i R_i^T, every segment into one fp32 accumulator, rounded once.

    forward   (x, W0), (t, B)            dx   (dy, W0^T), (dh, A^T)
    masked dx (dh, A^T), D ⊙ ., (dy, W0^T)    with D = keep * keep_scale, on the output side
    onto a base that was made elsewhere   base + (t, B)

A segment is a pair L [M, K_i], R [N, K_i] of any strides: W0^T is W0 read as it lies.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import expand_bits
from .launch import exact, launch


@triton.jit
def swizzle2d(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tiles in columns of GROUP_M rows, so that neighbours in time share operands in L2."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * num_n)
    rows = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * num_n)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def accumulate(
    acc,
    lhs_ptr,
    rhs_ptr,
    stride_lhs,
    stride_rhs,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    K,
    ALIGN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """acc + L R^T over the K columns of one segment."""
    end = tl.multiple_of(tl.cast(K, tl.int64), ALIGN_K)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    lhs_ptrs = lhs_ptr + offs_m[:, None] * stride_lhs[0] + offs_k[None, :] * stride_lhs[1]
    rhs_ptrs = rhs_ptr + offs_n[None, :] * stride_rhs[0] + offs_k[:, None] * stride_rhs[1]
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < end - k
        lhs = tl.load(lhs_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        rhs = tl.load(rhs_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(lhs, rhs, acc, input_precision=INPUT_PRECISION)
        lhs_ptrs += BLOCK_K * tl.cast(stride_lhs[1], tl.int64)
        rhs_ptrs += BLOCK_K * tl.cast(stride_rhs[1], tl.int64)
    return acc


@triton.jit(do_not_specialize=["M"])
def segment_gemm_kernel(
    lhs_ptrs,  # a tuple: [M, K_i] each
    rhs_ptrs,  # a tuple: [N, K_i] each
    bias_ptr,  # [N] or None
    bits_ptr,  # uint8 [M, ceil(N / 8)] or None
    base_ptr,  # [M, N] or None
    y_ptr,  # [M, N], contiguous
    strides_lhs,
    strides_rhs,
    stride_base,
    M,
    N,
    Ks,
    keep_scale,
    ALIGN_KS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_KS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid_m, pid_n = swizzle2d(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(len(lhs_ptrs)):
        acc = accumulate(
            acc,
            lhs_ptrs[i],
            rhs_ptrs[i],
            strides_lhs[i],
            strides_rhs[i],
            offs_m,
            offs_n,
            mask_m,
            mask_n,
            Ks[i],
            ALIGN_KS[i],
            BLOCK_KS[i],
            INPUT_PRECISION,
        )
        if i + 1 == MASKED:
            num_bytes = tl.cdiv(N, 8)
            offs_byte = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            bits = tl.load(
                bits_ptr + offs_m[:, None] * num_bytes + offs_byte[None, :],
                mask=mask_m[:, None] & (offs_byte < num_bytes)[None, :],
                other=0,
            ).to(tl.int32)
            acc = tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), acc * keep_scale, 0.0)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if base_ptr is not None:
        base = base_ptr + offs_m[:, None] * stride_base[0] + offs_n[None, :] * stride_base[1]
        acc += tl.load(base, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def segment_gemm(segments, *, base=None, bias=None, mask=None, config=None):
    """y [M, N] = base + bias + sum of L R^T over the pairs (L [M, K_i], R [N, K_i]), in order.

    mask is None or (bits uint8 [M, ceil(N / 8)], keep_scale, n): after the first n segments the
    accumulator is multiplied by keep * keep_scale. base [M, N], of any strides, is not written.
    """
    lhs, rhs = zip(*segments, strict=True)
    M, N = lhs[0].shape[0], rhs[0].shape[0]
    x = lhs[0]
    choose = configs.segment_gemm if base is None else configs.segment_add
    c = dict(config or choose(M, N, x.dtype, configs.capability(x.device)))
    block_k = c.pop("BLOCK_K")
    bits, keep_scale, masked = mask or (None, 1.0, 0)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if y.numel():
        launch(
            segment_gemm_kernel,
            (triton.cdiv(M, c["BLOCK_M"]) * triton.cdiv(N, c["BLOCK_N"]),),
            x.device,
            lhs,
            rhs,
            bias,
            bits,
            base,
            y,
            tuple(exact(t.stride()) for t in lhs),
            tuple(exact(t.stride()) for t in rhs),
            None if base is None else base.stride(),
            M,
            N,
            tuple(t.shape[1] for t in lhs),
            keep_scale,
            ALIGN_KS=tuple(8 if t.shape[1] % 8 == 0 else 1 for t in lhs),
            MASKED=masked,
            # A rank is one K step, no wider than it needs to be.
            BLOCK_KS=tuple(configs.block_of(t.shape[1], block_k) for t in lhs),
            INPUT_PRECISION=configs.input_precision(x.dtype),
            **c,
        )
    return y
