"""Which tile a kernel runs with: rows of tuning/default.json, and the closed forms for what follows from sizes.

A row is chosen by the GPU's family, the element size and the bucket of M or R; any size on any GPU finds one.
"""

import functools
import json
from pathlib import Path

import torch
import triton

# The family of the newest entry that is not newer than the GPU. "compact" is sm_80's programming model with
# 99 KiB of shared memory.
FAMILIES = {
    0: "interpreter",
    80: "ampere",
    86: "compact",
    87: "ampere",
    89: "compact",
    90: "hopper",
    100: "blackwell",
    120: "compact",
}
SHARED_MEMORY = {"ampere": 163, "compact": 99, "hopper": 227, "blackwell": 227}  # KiB a block
MAX_BLOCK_R = {"half": 128, "fp32": 64}
# What a split is sized for. It is a constant and not the device's own count, so that the order of every sum, and
# with it every bit of the result, is the same on every GPU of a family.
BLOCKS_WANTED = 256


@functools.cache
def table() -> dict:
    return json.loads((Path(__file__).parent / "tuning" / "default.json").read_text())


@functools.cache
def _cuda_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """10 * major + minor, and 0 where Triton interprets on the CPU."""
    return _cuda_capability(device.index or 0) if device.type == "cuda" else 0


def family(sm: int) -> str:
    return FAMILIES[max(known for known in FAMILIES if known <= sm)]


def kind(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "half"


def input_precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's TF32 setting; 16-bit ones have no choice."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def block_of(size: int, cap: int) -> int:
    """The smallest power of two that holds `size`, from 16 (tl.dot's least) to `cap`."""
    return max(16, min(cap, triton.next_power_of_2(size)))


def _row(op: str, dtype: torch.dtype, sm: int, **sizes: int) -> dict:
    """The first row whose bounds hold all sizes, without its bounds."""
    for row in table()[op][family(sm)][kind(dtype)]:
        if all(size <= row.get(f"max_{name}", size) for name, size in sizes.items()):
            return {key: value for key, value in row.items() if not key.startswith("max_")}
    raise LookupError(f"tuning/default.json has no row for {op} on sm_{sm} with {sizes}")


@functools.lru_cache(maxsize=4096)
def segment_gemm(M: int, N: int, dtype: torch.dtype, sm: int) -> dict:
    return _row("segment_gemm", dtype, sm, M=M)


@functools.lru_cache(maxsize=4096)
def row_reduce(M: int, C: int, R: int, dtype: torch.dtype, sm: int) -> dict:
    row = _row("row_reduce", dtype, sm, R=R)
    return row | {"BLOCK_R": block_of(R, MAX_BLOCK_R[kind(dtype)])}


@functools.lru_cache(maxsize=4096)
def shrink(M: int, K: int, R: int, dtype: torch.dtype, sm: int) -> dict:
    """K is split until there are BLOCKS_WANTED blocks, but no split is shorter than one K step."""
    row = _row("shrink", dtype, sm, R=R)
    block_r = block_of(R, MAX_BLOCK_R[kind(dtype)])
    blocks = triton.cdiv(M, row["BLOCK_M"]) * triton.cdiv(R, block_r)
    steps = triton.cdiv(K, row["BLOCK_K"])
    split = max(1, min(BLOCKS_WANTED // max(1, blocks), steps))
    return row | {"BLOCK_R": block_r, "SPLIT_K": split}
