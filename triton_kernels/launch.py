"""Starting a kernel: on the tensor's device, on its current stream."""

import torch
import triton.language as tl


def launch(kernel, grid, device: torch.device, *args, **meta) -> None:
    """kernel[grid](*args, **meta) with `device` current.

    enable_fp_fusion is stated so that the numerics do not move with Triton's default for it.
    """
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*args, enable_fp_fusion=True, **meta)


def exact(sizes: tuple[int, ...]) -> tuple:
    """`sizes` with each that is an odd multiple of 8 and no larger than a rank made part of the kernel.

    Triton takes the alignment of an argument from its divisibility by 16 alone: the rows of a rank 8 would be read
    two bytes at a time.
    """
    return tuple(tl.constexpr(n) if n % 16 == 8 and n < 256 else n for n in sizes)
