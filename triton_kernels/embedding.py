"""y = [prompt ; E[ids] + scale * A[positions] B], gathered, added and concatenated in one pass; and
sums of the rows of a segment, which every gradient is made of.

    DePT             positions 0 .. L-1, or given; prompt rows in front
    LoRA by token    positions = ids, A [V, R] = lora_a^T, no prompt

A position that is not in [0, S) adds nothing. An id that is not in [0, V) gives a row of NaN: the
host does not read ids, and such a row must not pass for a result.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import exact, launch


@triton.jit
def low_rank(
    positions,  # [BLOCK_M]
    mask_m,
    offs_d,
    a_ptr,
    b_ptr,
    stride_a,
    stride_b,
    S,
    D,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A[positions] B, zero in the rows whose position is outside of [0, S)."""
    mask_m = mask_m & (positions >= 0) & (positions < S)
    mask_d = offs_d < D
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        a = tl.load(
            a_ptr + positions[:, None] * stride_a[0] + offs_r[None, :] * stride_a[1],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        b = tl.load(
            b_ptr + offs_r[:, None] * stride_b[0] + offs_d[None, :] * stride_b[1],
            mask=mask_r[:, None] & mask_d[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_D]
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "L", "m", "sequences"])
def embedding_kernel(
    ids_ptr,  # [N, L]
    w_ptr,  # [V, D]
    prompt_ptr,  # [m, D] or None
    a_ptr,  # [S, R]
    b_ptr,  # [R, D]
    positions_ptr,  # [N, L], or None: 0 .. L-1
    y_ptr,  # [N, m + L, D]
    stride_ids,
    stride_w,
    stride_prompt,
    stride_a,
    stride_b,
    stride_positions,
    N,
    L,
    m,
    V,
    S,
    D,
    R,
    scale,
    sequences,  # of a block
    SHARED: tl.constexpr,  # every sequence has the same positions
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    T = tl.cast(m, tl.int64) + L
    num_d = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    offs_t = pid // num_d * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_l = offs_t - m
    mask_t, mask_l, mask_d = offs_t < T, (offs_l >= 0) & (offs_l < L), offs_d < D

    # What every sequence of the block adds: the prompt, and A B where the positions are shared.
    shared = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SHARED:
        positions = offs_l
        if positions_ptr is not None:
            positions = tl.load(
                positions_ptr + offs_l * stride_positions[1], mask=mask_l, other=-1
            ).to(tl.int64)
        shared = scale * low_rank(
            positions, mask_l, offs_d, a_ptr, b_ptr, stride_a, stride_b, S, D, R,
            BLOCK_M, BLOCK_D, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
    if prompt_ptr is not None:
        shared += tl.load(
            prompt_ptr + offs_t[:, None] * stride_prompt[0] + offs_d[None, :] * stride_prompt[1],
            mask=(offs_t < m)[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float32)

    first = tl.program_id(1).to(tl.int64) * sequences
    for n in range(first, tl.minimum(first + sequences, N)):
        n = tl.cast(n, tl.int64)
        ids = tl.load(
            ids_ptr + n * stride_ids[0] + offs_l * stride_ids[1], mask=mask_l, other=0
        ).to(tl.int64)
        known = (ids >= 0) & (ids < V)
        e = tl.load(
            w_ptr + ids[:, None] * stride_w[0] + offs_d[None, :] * stride_w[1],
            mask=(mask_l & known)[:, None] & mask_d[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_D]
        y = shared + e.to(tl.float32)
        if not SHARED:
            positions = tl.load(
                positions_ptr + n * stride_positions[0] + offs_l * stride_positions[1],
                mask=mask_l,
                other=-1,
            ).to(tl.int64)
            y += scale * low_rank(
                positions, mask_l, offs_d, a_ptr, b_ptr, stride_a, stride_b, S, D, R,
                BLOCK_M, BLOCK_D, BLOCK_R, INPUT_PRECISION,
            )  # fmt: skip
        y = tl.where((known | (offs_t < m))[:, None], y, float("nan"))
        tl.store(
            y_ptr + (n * T + offs_t[:, None]) * D + offs_d[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=mask_t[:, None] & mask_d[None, :],
        )


def embedding(ids, weight, a, b, *, scale, prompt=None, positions=None, config=None):
    """y [N, m + L, D] in weight's dtype = [prompt ; E[ids] + scale * A[positions] B].

    ids [N, L], weight [V, D], a [S, R], b [R, D], prompt [m, D] or None, positions [N, L], or [1,
    L] of all sequences, or None: 0 .. L-1. Any strides.
    """
    (N, L), (V, D), (S, R) = ids.shape, weight.shape, a.shape
    m = 0 if prompt is None else prompt.shape[0]
    sm = configs.capability(weight.device)
    c = dict(config or configs.embedding(N, m + L, D, R, weight.dtype, sm))
    sequences = c.pop("SEQUENCES")
    y = torch.empty(N, m + L, D, dtype=weight.dtype, device=weight.device)
    if y.numel():
        launch(
            embedding_kernel,
            (
                triton.cdiv(m + L, c["BLOCK_M"]) * triton.cdiv(D, c["BLOCK_D"]),
                triton.cdiv(N, sequences),
            ),
            weight.device,
            ids,
            weight,
            prompt,
            a,
            b,
            positions,
            y,
            ids.stride(),
            weight.stride(),
            None if prompt is None else prompt.stride(),
            exact(a.stride()),
            exact(b.stride()),
            None if positions is None else positions.stride(),
            N,
            L,
            m,
            V,
            S,
            D,
            *exact((R,)),
            scale,
            sequences,
            SHARED=positions is None or positions.shape[0] == 1,
            INPUT_PRECISION=configs.input_precision(weight.dtype),
            **c,
        )
    return y


@triton.jit(do_not_specialize=["N", "T"])
def sum_segments_kernel(
    z_ptr,  # [N, T, D]
    order_ptr,  # [N T], rows n T + t sorted by segment, or None: segment t has row t of every n
    offsets_ptr,  # [segments + 1] or None
    out_ptr,  # [segments, D]
    stride_z,
    stride_out,
    N,
    T,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    first, last = tl.cast(0, tl.int64), tl.cast(N, tl.int64)
    if offsets_ptr is not None:
        first, last = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + (segment + 1))
    acc = tl.zeros([BLOCK_D], tl.float32)
    for i in range(first, last, BLOCK_M):
        item = i + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = item < last
        if order_ptr is None:
            row = item * stride_z[0] + segment * stride_z[1]
        else:
            place = tl.load(order_ptr + item, mask=mask_m, other=0)
            row = place // T * stride_z[0] + place % T * stride_z[1]
        z = tl.load(
            z_ptr + row[:, None] + offs_d[None, :] * stride_z[2],
            mask=mask_m[:, None] & mask_d[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_D]
        acc += tl.sum(z.to(tl.float32), axis=0)
    tl.store(
        out_ptr + segment * stride_out[0] + offs_d * stride_out[1],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_d,
    )


BLOCK_M, MAX_BLOCK_D = 16, 512


def sum_segments(z, out, keys=None):
    """out [segments, D] of any strides: row s is the fp32 sum, in the order of the rows, of those
    rows of z [N, T, D] whose key is s; rounded once. Returns out.

    keys are integers [N, T], of which those outside of [0, segments) belong to no segment. Without
    keys row t of every n is of segment t. Ids are sorted on the device: the host reads nothing.
    """
    (N, T, D), segments = z.shape, out.shape[0]
    order = offsets = None
    if keys is not None:
        found, order = keys.flatten().long().sort(stable=True)
        bounds = torch.arange(segments + 1, device=found.device)
        offsets = torch.searchsorted(found, bounds)
    if out.numel():
        block_d = configs.block_of(D, MAX_BLOCK_D)
        launch(
            sum_segments_kernel,
            (segments, triton.cdiv(D, block_d)),
            z.device,
            z,
            order,
            offsets,
            out,
            z.stride(),
            exact(out.stride()),
            N,
            T,
            D,
            BLOCK_M=BLOCK_M,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out
