"""Kernels with one fault each, which the checks of test_compiled.py must find."""

import functools

import torch
import triton
import triton.language as tl

SM = 90


def empty(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@triton.jit
def narrow_offset_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * stride + offs.to(tl.int64))
    tl.store(y_ptr + offs.to(tl.int64), x)


@triton.jit
def masked_left_kernel(
    x_ptr, w_ptr, y_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, KEEP: tl.constexpr
):
    """y = f(x) w^T: f is computed in registers, and its result is the left operand."""
    offs = tl.arange(0, BLOCK).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + offs[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + offs[None, :] * K + offs_k[:, None]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(0, K, BLOCK_K):
        x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        if not KEEP:
            x = tl.where(x > 0, x, 0.0)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


LAUNCHES = {}
