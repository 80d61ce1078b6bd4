"""Every launcher that the ops call, under the names that the CUDA C++ kernels have too."""

import torch.nn.functional as F

from . import configs
from .dropout import dropout_bits
from .multi_gemv import multi_gemv_add_, multi_gemv_shrink
from .multi_row_reduce import multi_row_reduce
from .multi_segment_gemm import multi_segment_add_, multi_segment_gemm
from .multi_shrink import multi_shrink, multi_shrink_group, sum_rows
from .routes import segment_gemm
from .row_reduce import row_reduce_dy, row_reduce_x
from .shrink import shrink

__all__ = [
    "dropout_bits",
    "multi_add_",
    "multi_decode",
    "multi_row_reduce",
    "multi_segment_gemm",
    "multi_shrink",
    "row_reduce_dy",
    "row_reduce_x",
    "segment_gemm",
    "shrink",
]


def multi_decode(x, weight, slots, routing, bias=None, *, save_h=False):
    """(y [M, N], h [M, R] or None) of multi_lora_linear without dropout, row by row, or None where
    the rows are not few enough for that."""
    if not configs.row_by_row(x.shape[0], slots.table.shape[0]):
        return None
    planes = multi_gemv_shrink(x, [slots], [slots.a_slots], routing)
    y = F.linear(x, weight, bias)
    multi_gemv_add_([y], planes, [slots.bt_slots], [slots], routing)
    if not save_h:
        return y, None
    h = x.new_zeros(x.shape[0], planes[0].shape[2])
    sum_rows(planes[0], slots, routing, h=h)
    return y, h


def multi_add_(ys, x, slots, routing):
    """y [M, N] += scale_j g_j ⊙ (x_i A_j^T) B_j^T in place, for lists of y of any strides and of
    slots, with one launch of the product with A."""
    a_slots, bt_slots = [own.a_slots for own in slots], [own.bt_slots for own in slots]
    if configs.row_by_row(x.shape[0], slots[0].table.shape[0]):
        planes = multi_gemv_shrink(x, slots, a_slots, routing)
        multi_gemv_add_(ys, planes, bt_slots, slots, routing)
    else:
        ts, _ = multi_shrink_group(x, slots, a_slots, routing)
        for y, t, bt, own in zip(ys, ts, bt_slots, slots, strict=True):
            multi_segment_add_(y, t, bt, own, routing)
