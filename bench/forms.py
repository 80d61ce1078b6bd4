"""Triton kernels with the structure of peers' kernels, for the contenders of `baselines`.

They share no code with the kernels that they are measured against: those change, these stay.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.launch import launch
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit(do_not_specialize=["M"])
def extended_gemm_kernel(
    s_ptr,  # [M, R]
    v_ptr,  # [N, R]
    keep_ptr,  # uint8 [M, N], contiguous, or None
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    y_ptr,  # [M, N], contiguous
    stride_s,
    stride_v,
    stride_x,
    stride_w,
    M,
    N,
    K,
    R,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """y = keep ⊙ scale s v^T + x w^T: the accumulator starts as the adapter's product."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    pid_m, pid_n = tl.swizzle2d(pid // num_n, pid % num_n, num_m, num_n, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = first + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        s = tl.load(
            s_ptr + offs_m[:, None] * stride_s[0] + offs_r[None, :] * stride_s[1],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        v = tl.load(
            v_ptr + offs_n[None, :] * stride_v[0] + offs_r[:, None] * stride_v[1],
            mask=mask_r[:, None] & mask_n[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s, v, acc, input_precision=INPUT_PRECISION)
    acc *= scale
    out = offs_m[:, None] * N + offs_n[None, :]
    inside = mask_m[:, None] & mask_n[None, :]
    if keep_ptr is not None:
        acc = tl.where(tl.load(keep_ptr + out, mask=inside, other=0) != 0, acc, 0.0)

    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_x[0] + offs_k[None, :] * stride_x[1]
    w_ptrs = w_ptr + offs_n[None, :] * stride_w[0] + offs_k[:, None] * stride_w[1]
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_x[1], tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_w[1], tl.int64)
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=inside)


# Of LoRAFusion's published tiles the ones for H100, and for A100; those of fp32 are chosen here.
HOPPER = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
HOPPER_DX = {**HOPPER, "num_stages": 3}
AMPERE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}
TF32 = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
FP32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}


def gemm_tiles(M: int, dtype: torch.dtype, device: torch.device, dx: bool) -> dict:
    family, kind = configs.family(configs.capability(device)), configs.kind(dtype)
    if family == "interpreter":
        row = INTERPRETED
    elif kind == "half":
        row = AMPERE if family == "mma" else HOPPER_DX if dx else HOPPER
    else:
        row = {"tf32": TF32, "fp32": FP32}[kind]
    return row | {"BLOCK_M": configs.block_of(M, row["BLOCK_M"])}


def extended_gemm(s, v, x, w, scale, keep=None):
    """y [M, N] of x [M, K], w [N, K], s [M, R], v [N, R]; keep bool [M, N] goes with dx."""
    (M, K), N, R = x.shape, w.shape[0], s.shape[1]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    tiles = gemm_tiles(M, x.dtype, x.device, dx=w.stride(1) != 1)
    launch(
        extended_gemm_kernel,
        (triton.cdiv(M, tiles["BLOCK_M"]) * triton.cdiv(N, tiles["BLOCK_N"]),),
        x.device,
        s,
        v,
        None if keep is None else keep.view(torch.uint8),
        x,
        w,
        y,
        s.stride(),
        v.stride(),
        x.stride(),
        w.stride(),
        M,
        N,
        K,
        R,
        scale,
        BLOCK_R=configs.block_of(R, 64),
        GROUP_M=8,
        INPUT_PRECISION=configs.input_precision(x.dtype),
        **tiles,
    )
    return y


@triton.jit(do_not_specialize=["M"])
def ds_db_kernel(
    dy_ptr,  # [M, N]
    s_ptr,  # [M, R]
    b_ptr,  # [N, R]
    ds_ptr,  # fp32 [M, R], contiguous, zeroed
    db_ptr,  # fp32 [N, R], contiguous, zeroed
    stride_dy,
    stride_s,
    stride_b,
    M,
    N,
    R,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """ds += scale dy b and db += scale dy^T s: a tile of dy is read once, both sums are atomic."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    mask_s, mask_b = mask_m[:, None] & mask_r[None, :], mask_n[:, None] & mask_r[None, :]
    dy = tl.load(
        dy_ptr + offs_m[:, None] * stride_dy[0] + offs_n[None, :] * stride_dy[1],
        mask=mask_m[:, None] & mask_n[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_N]
    s = tl.load(
        s_ptr + offs_m[:, None] * stride_s[0] + offs_r[None, :] * stride_s[1],
        mask=mask_s,
        other=0.0,
    )  # [BLOCK_M, BLOCK_R]
    b = tl.load(
        b_ptr + offs_n[:, None] * stride_b[0] + offs_r[None, :] * stride_b[1],
        mask=mask_b,
        other=0.0,
    )  # [BLOCK_N, BLOCK_R]
    ds = tl.dot(dy, b, input_precision=INPUT_PRECISION) * scale
    db = tl.dot(tl.trans(dy), s, input_precision=INPUT_PRECISION) * scale
    # Relaxed: no value is asked back, so it is the cheaper of the two forms of an atomic.
    tl.atomic_add(ds_ptr + offs_m[:, None] * R + offs_r[None, :], ds, mask=mask_s, sem="relaxed")
    tl.atomic_add(db_ptr + offs_n[:, None] * R + offs_r[None, :], db, mask=mask_b, sem="relaxed")


def ds_db(dy, s, b, scale):
    """(scale dy b [M, R], scale dy^T s [N, R]) in dy's dtype."""
    (M, N), R = dy.shape, s.shape[1]
    ds = torch.zeros(M, R, dtype=torch.float32, device=dy.device)
    db = torch.zeros(N, R, dtype=torch.float32, device=dy.device)
    known = configs.capability(dy.device)
    # An fp32 product without tensor cores takes its operands in registers.
    side = 32 if not known else 64 if configs.kind(dy.dtype) == "fp32" else 128
    block_m, block_r = configs.block_of(M, side), configs.block_of(R, 64)
    launch(
        ds_db_kernel,
        (triton.cdiv(M, block_m), triton.cdiv(N, side), triton.cdiv(R, block_r)),
        dy.device,
        dy,
        s,
        b,
        ds,
        db,
        dy.stride(),
        s.stride(),
        b.stride(),
        M,
        N,
        R,
        scale,
        BLOCK_M=block_m,
        BLOCK_N=side,
        BLOCK_R=block_r,
        INPUT_PRECISION=configs.input_precision(dy.dtype),
        num_warps=8,
    )
    return ds.to(dy.dtype), db.to(dy.dtype)


class LoraFusionForm(torch.autograd.Function):
    """y [M, N] of x [M, K], weight [N, K], a [R, K], b [N, R]; no gradient of weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float):
        kept, keep = torch.native_dropout(x, p, True) if p else (x, None)
        s = kept @ a.t()
        ctx.save_for_backward(kept, keep, weight, a, b, s)
        ctx.scale, ctx.p = scale, p
        return extended_gemm(s, b, x, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept, keep, weight, a, b, s = ctx.saved_tensors
        ds, db = ds_db(dy, s, b, ctx.scale)
        da = ds.t() @ kept
        dx = extended_gemm(ds, a.t(), dy, weight.t(), 1 / (1 - ctx.p), keep)
        return dx, None, da, db, None, None


@triton.jit(do_not_specialize=["M"])
def split_shrink_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    h_ptr,  # fp32 [M, R], contiguous, zeroed
    stride_x,
    stride_a,
    M,
    K,
    R,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """h += scale x a^T: a split takes every SPLIT_K-th block of K and adds its sum atomically."""
    split = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    offs_k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_x[0] + offs_k[None, :] * stride_x[1]
    a_ptrs = a_ptr + offs_r[None, :] * stride_a[0] + offs_k[:, None] * stride_a[1]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for _ in range(0, K, BLOCK_K * SPLIT_K):
        mask_k = offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, a, acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K * SPLIT_K * tl.cast(stride_x[1], tl.int64)
        a_ptrs += BLOCK_K * SPLIT_K * tl.cast(stride_a[1], tl.int64)
        offs_k += BLOCK_K * SPLIT_K
    h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.atomic_add(h_ptrs, acc * scale, mask=mask_m[:, None] & mask_r[None, :], sem="relaxed")


@triton.jit(do_not_specialize=["M"])
def expand_kernel(
    h_ptr,  # fp32 [M, R], contiguous
    b_ptr,  # [N, R]
    y_ptr,  # [M, N], contiguous
    stride_b,
    M,
    N,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """y += h b^T, with h rounded to b's dtype."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One stage: ptxas before 13.3 can miscompile a pipelined wgmma whose left operand is computed.
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = first + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        h = tl.load(
            h_ptr + offs_m[:, None] * R + offs_r[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        b = tl.load(
            b_ptr + offs_n[None, :] * stride_b[0] + offs_r[:, None] * stride_b[1],
            mask=mask_r[:, None] & mask_n[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(h.to(b.dtype), b, acc, input_precision=INPUT_PRECISION)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def bgmv_form(x, weight, a, b, scale):
    """y [M, N], without gradients."""
    (M, K), N, R = x.shape, weight.shape[0], a.shape[0]
    y = F.linear(x, weight)
    h = torch.zeros(M, R, dtype=torch.float32, device=x.device)
    block_k, split_k = (256, 64) if M < 128 else (32, 8)
    block_k = configs.block_of(K, block_k * 2 // x.dtype.itemsize)
    split_k = min(split_k, triton.cdiv(K, block_k))
    block_m = configs.block_of(M, 32)
    precision = configs.input_precision(x.dtype)
    launch(
        split_shrink_kernel,
        (split_k, triton.cdiv(M, block_m), triton.cdiv(R, 16)),
        x.device,
        x,
        a,
        h,
        x.stride(),
        a.stride(),
        M,
        K,
        R,
        scale,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=16,
        SPLIT_K=split_k,
        INPUT_PRECISION=precision,
        num_warps=4,
        num_stages=2,
    )
    block_m = configs.block_of(M, 64)
    launch(
        expand_kernel,
        (triton.cdiv(M, block_m), triton.cdiv(N, 128)),
        x.device,
        h,
        b,
        y,
        b.stride(),
        M,
        N,
        R,
        BLOCK_M=block_m,
        BLOCK_N=128,
        BLOCK_R=configs.block_of(R, 32),
        INPUT_PRECISION=precision,
        num_warps=4,
    )
    return y


@triton.jit(do_not_specialize=["M"])
def gather_shrink_kernel(
    x_ptr,  # [M, K], contiguous
    a_ptr,  # [G, R, K], contiguous
    ids_ptr,  # int32 [M]
    h_ptr,  # fp32 [M, R], contiguous, zeroed
    M,
    K,
    R,
    scale,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """h_i += scale A_j x_i; a split takes every SPLIT_K-th block of K, and adds atomically."""
    split, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    a_slot = a_ptr + tl.load(ids_ptr + row).to(tl.int64) * R * K
    offs_k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_R], tl.float32)
    for _ in range(0, K, BLOCK_K * SPLIT_K):
        mask_k = offs_k < K
        x = tl.load(x_ptr + row * K + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        a = tl.load(
            a_slot + offs_r[:, None] * K + offs_k[None, :],
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_K]
        acc += tl.sum(a.to(tl.float32) * x[None, :], axis=1)
        offs_k += BLOCK_K * SPLIT_K
    tl.atomic_add(h_ptr + row * R + offs_r, acc * scale, mask=mask_r, sem="relaxed")


@triton.jit(do_not_specialize=["M"])
def gather_expand_kernel(
    h_ptr,  # fp32 [M, R], contiguous
    b_ptr,  # [G, N, R], contiguous
    ids_ptr,  # int32 [M]
    y_ptr,  # [M, N], contiguous
    M,
    N,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y_i += B_j h_i."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_n, mask_r = offs_n < N, offs_r < R
    b_slot = b_ptr + tl.load(ids_ptr + row).to(tl.int64) * N * R
    h = tl.load(h_ptr + row * R + offs_r, mask=mask_r, other=0.0)
    b = tl.load(
        b_slot + offs_n[:, None] * R + offs_r[None, :],
        mask=mask_n[:, None] & mask_r[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_R]
    y = tl.load(y_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y += tl.sum(b.to(tl.float32) * h[None, :], axis=1)
    tl.store(y_ptr + row * N + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask_n)


def multi_bgmv_form(x, weight, a, b, ids, scale):
    """y [M, N] for a [G, R, K] and b [G, N, R], without gradients."""
    (M, K), N, R = x.shape, weight.shape[0], a.shape[1]
    y = F.linear(x, weight)
    h = torch.zeros(M, R, dtype=torch.float32, device=x.device)
    block_k = configs.block_of(K, 512)
    split_k = min(8, triton.cdiv(K, block_k))
    grid = split_k, M, triton.cdiv(R, 16)
    launch(
        gather_shrink_kernel, grid, x.device, x, a, ids, h, M, K, R, scale,
        BLOCK_K=block_k, BLOCK_R=16, SPLIT_K=split_k, num_warps=4,
    )  # fmt: skip
    block_r = triton.next_power_of_2(R)
    block_n = max(16, 8192 // max(16, block_r))
    launch(
        gather_expand_kernel, (M, triton.cdiv(N, block_n)), x.device, h, b, ids, y, M, N, R,
        BLOCK_N=block_n, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip
    return y
