"""Starting a kernel: on the tensor's device, on its current stream."""

import torch


def launch(kernel, grid, device: torch.device, *args, **meta) -> None:
    """kernel[grid](*args, **meta) with `device` current.

    enable_fp_fusion is stated so that the numerics do not move with Triton's default for it.
    """
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*args, enable_fp_fusion=True, **meta)
