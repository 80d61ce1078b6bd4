"""Sums of partial results in a fixed order.

    h = plain_scale * sum_s planes[s]
    t = scale * gate * h
    dot_r = scale * sum_i w[i, r] h[i, r]

No result depends on which block came last.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import configs
from .launch import exact, launch


@triton.jit
def scaled(h, gate_ptr, scale, offs_r, mask_r):
    """scale * gate ⊙ h for a tile h [BLOCK, BLOCK_R]."""
    t = h * scale
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        t *= gate[None, :]
    return t


@triton.jit(do_not_specialize=["S"])
def sum_planes_kernel(
    planes_ptr,  # fp32 [S, I, R]
    gate_ptr,  # [R] or None
    w_ptr,  # [I, R] or None
    h_ptr,  # [I, R] or None
    t_ptr,  # [I, R] or None
    dot_ptr,  # fp32 [blocks of I, R] or None
    stride_planes,
    stride_w,
    stride_h,
    stride_t,
    S,
    I,  # noqa: E741
    R,
    plain_scale,
    scale,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    pid_i = tl.program_id(0).to(tl.int64)
    pid_r = tl.program_id(1).to(tl.int64)
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    mask = (offs_i < I)[:, None] & mask_r[None, :]

    plane = planes_ptr + offs_i[:, None] * stride_planes[1] + offs_r[None, :] * stride_planes[2]
    h = tl.zeros([BLOCK_I, BLOCK_R], tl.float32)
    for _ in range(S):
        h += tl.load(plane, mask=mask, other=0.0)
        plane += tl.cast(stride_planes[0], tl.int64)
    h *= plain_scale

    if h_ptr is not None:
        out = h_ptr + offs_i[:, None] * stride_h[0] + offs_r[None, :] * stride_h[1]
        tl.store(out, h.to(h_ptr.dtype.element_ty), mask=mask)
    if t_ptr is not None:
        out = t_ptr + offs_i[:, None] * stride_t[0] + offs_r[None, :] * stride_t[1]
        t = scaled(h, gate_ptr, scale, offs_r, mask_r)
        tl.store(out, t.to(t_ptr.dtype.element_ty), mask=mask)
    if dot_ptr is not None:
        w = tl.load(
            w_ptr + offs_i[:, None] * stride_w[0] + offs_r[None, :] * stride_w[1],
            mask=mask,
            other=0.0,
        )
        dot = scale * tl.sum(h * w.to(tl.float32), axis=0)
        tl.store(dot_ptr + pid_i * R + offs_r, dot, mask=mask_r)


BLOCK_I, BLOCK_R = 64, 16


def sum_planes(planes, *, plain_scale=1.0, scale=1.0, gate=None, w=None, h=None, t=None):
    """Write h and t where given; return dot fp32 [R] where w [I, R] is given, else None.

    planes fp32 [S, I, R], any strides; gate [R]; h, t [I, R].
    """
    S, I, R = planes.shape  # noqa: E741
    blocks = triton.cdiv(I, BLOCK_I)
    dots = None if w is None else planes.new_empty(blocks, R)
    if I and R:
        overlap = configs.overlaps(planes.device)
        launch(
            sum_planes_kernel,
            (blocks, triton.cdiv(R, BLOCK_R)),
            planes.device,
            planes,
            gate,
            w,
            h,
            t,
            dots,
            exact(planes.stride()),
            None if w is None else exact(w.stride()),
            None if h is None else exact(h.stride()),
            None if t is None else exact(t.stride()),
            S,
            I,
            *exact((R,)),
            plain_scale,
            scale,
            BLOCK_I=BLOCK_I,
            BLOCK_R=BLOCK_R,
            OVERLAP=overlap,
            overlap=overlap,
            num_warps=4,
        )
    return None if dots is None else dots.sum(0)
