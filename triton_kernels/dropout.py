"""The dropout mask: Philox4x32-7, key = seed, counter = m * ceil(K / 8) + k // 8.

An input that is columns first .. first + K of a wider one, of `total` columns, takes that one's
mask: counter = m * ceil(total / 8) + (first + k) // 8, with first a multiple of 8.

One Philox call serves the 8 elements (m, 8c .. 8c + 7), 16 bits each. Its answer is handled as a
byte of keep bits, bit l for element 8c + l: the kernels that need the mask expand bytes, those that
hand it on store them.
"""

import torch
import triton
import triton.language as tl

from .launch import launch


@triton.jit
def keep_bits(seed, offs_m, offs_call, calls, threshold):
    """Keep bits of the groups of 8 (offs_m, offs_call): int32 [len(offs_m), len(offs_call)]."""
    counter = offs_m[:, None].to(tl.int64) * calls + offs_call[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero, 7)
    t = threshold.to(tl.uint32)
    bits = ((w0 & 0xFFFF) >= t).to(tl.int32) | ((w0 >> 16) >= t).to(tl.int32) << 1
    bits |= ((w1 & 0xFFFF) >= t).to(tl.int32) << 2 | ((w1 >> 16) >= t).to(tl.int32) << 3
    bits |= ((w2 & 0xFFFF) >= t).to(tl.int32) << 4 | ((w2 >> 16) >= t).to(tl.int32) << 5
    bits |= ((w3 & 0xFFFF) >= t).to(tl.int32) << 6 | ((w3 >> 16) >= t).to(tl.int32) << 7
    return bits


@triton.jit
def expand_bits(bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K // 8] bytes of keep bits -> bool [BLOCK_M, BLOCK_K]."""
    lanes = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(lanes, [BLOCK_M, BLOCK_K]) != 0


@triton.jit(do_not_specialize=["M", "threshold", "first_call", "row_calls"])
def dropout_bits_kernel(
    seed_ptr,
    bits_ptr,  # uint8 [M, calls]
    M,
    calls,
    threshold,
    first_call,
    row_calls,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid_m = tl.program_id(0).to(tl.int64)
    pid_c = tl.program_id(1).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    bits = keep_bits(tl.load(seed_ptr), offs_m, first_call + offs_c, row_calls, threshold)
    mask = (offs_m < M)[:, None] & (offs_c < calls)[None, :]
    tl.store(bits_ptr + offs_m[:, None] * calls + offs_c[None, :], bits.to(tl.uint8), mask=mask)


def calls_of(K: int, columns: tuple[int, int] | None) -> tuple[int, int]:
    """(the first call of a row of the input, calls in a row of the whole of which it is columns)"""
    first, total = columns or (0, K)
    return first // 8, triton.cdiv(total, 8)


def dropout_bits(
    seed: torch.Tensor, M: int, K: int, threshold: int, columns: tuple[int, int] | None = None
) -> torch.Tensor:
    """The mask of an [M, K] input as bits: uint8 [M, ceil(K / 8)], bit k % 8 of byte k // 8.

    columns = (first, total) where it is a part of a wider input.
    """
    calls = triton.cdiv(K, 8)
    bits = torch.empty(M, calls, dtype=torch.uint8, device=seed.device)
    if bits.numel():
        grid = (triton.cdiv(M, 16), triton.cdiv(calls, 128))
        args = (seed, bits, M, calls, threshold, *calls_of(K, columns))
        launch(dropout_bits_kernel, grid, seed.device, *args, BLOCK_M=16, BLOCK_C=128, num_warps=4)
    return bits
