"""Starting a kernel: on the tensor's device, on its current stream."""

import torch
import triton.language as tl


def launch(kernel, grid, device: torch.device, *args, overlap: bool = False, **meta) -> None:
    """kernel[grid](*args, **meta) with `device` current.

    enable_fp_fusion is stated so that the numerics do not move with Triton's default for it. With
    overlap the kernel may begin before the one launched last has ended, and has to wait for it
    itself (programmatic dependent launch).
    """
    if overlap:
        meta["launch_pdl"] = True
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*args, enable_fp_fusion=True, **meta)


def exact(sizes: tuple[int, ...]) -> tuple:
    """Ranks, and strides that may be ranks: an odd multiple of 8 becomes a part of the kernel.

    Of an argument Triton learns only whether 16 divides it: rows of 8 elements would be read one by
    one.
    """
    return tuple(tl.constexpr(n) if n % 16 == 8 and n < 256 else n for n in sizes)
