"""Launchers of the CUDA C++ kernels of csrc/: tensors in, tensors out, as those of triton_kernels.

csrc/ implements the ops that are declared here. They allocate nothing: every output and every
workspace is a tensor of torch's allocator, and so belongs to a CUDA graph that is being captured.
"""

import functools
import os
import warnings

import torch
from torch import Tensor

from fused_lora import _extension

# many: table, rank, scale, ids, order and offsets of the rows' adapters, or nothing for one.
_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    "shrink_cuda(Tensor x, Tensor a, Tensor? gate, Tensor[] many, Tensor? seed, float scale, "
    "float keep_scale, int threshold, int first_call, int row_calls, int tiles, int span, "
    "Tensor(a!)? h, Tensor(b!)? t, Tensor(c!)? planes) -> ()"
)
_library.define(
    "segment_gemm_cuda(Tensor[] lefts, Tensor[] rights, int gathered, Tensor[] many, "
    "Tensor? bias, Tensor? base, Tensor? bits, int masked, float keep_scale, Tensor(a!) y, "
    "int block_m) -> ()"
)
_library.define(
    "segment_gemm_sm90_cuda(Tensor[] lefts, Tensor[] rights, Tensor? bias, Tensor? base, "
    "Tensor? bits, int masked, float keep_scale, Tensor(a!) y, int block_m, int block_n, "
    "int waits_from) -> ()"
)
_library.define(
    "row_reduce_cuda(Tensor z, Tensor v, Tensor? w, Tensor[] many, Tensor? seed, int threshold, "
    "int first_call, int row_calls, Tensor(a!)? bits, int rows, Tensor(b!) planes, Tensor(c!)? u) "
    "-> ()"
)
_library.define(
    "sum_rows_cuda(Tensor planes, Tensor? gate, Tensor[] many, float scale, Tensor(a!)? h, "
    "Tensor(b!)? t) -> ()"
)
_library.define(
    "sum_columns_cuda(Tensor planes, int M, int rows, Tensor? gate, Tensor[] many, float scale, "
    "float plain_scale, bool scaled, Tensor? w, Tensor(a!) out, Tensor(b!)? dot) -> ()"
)
_library.define(
    "dropout_bits_cuda(Tensor seed, int threshold, int first_call, int row_calls, "
    "Tensor(a!) bits) -> ()"
)
_library.define(
    "decode_shrink_cuda(Tensor x, Tensor a, Tensor[] many, int span, Tensor(a!) planes) -> ()"
)
_library.define(
    "decode_cuda(Tensor x, Tensor? weight, Tensor v, Tensor? gate, Tensor[] many, float scale, "
    "Tensor planes, Tensor? bias, Tensor(a!) y, int span, Tensor(b!)? parts, "
    "Tensor(c!)? counters) -> ()"
)
_library.define(
    "write_slot_cuda_(Tensor(a!) a_slots, Tensor(b!) bt_slots, Tensor(c!) rank, Tensor(d!) scale, "
    "Tensor(e!) gate, int slot, Tensor lora_a, Tensor lora_b, Tensor? new_gate, float scale_value) "
    "-> ()"
)
_library.define("flip_cuda_(Tensor(a!) table, int id, int slot) -> ()")
_extension.load()
_ops = torch.ops.fused_lora

# The sizes that csrc/ is compiled with.
BLOCK_M = 64  # rows of a tile of shrink
BLOCK_C = 128  # columns of a block of row_reduce, and of sum_columns
BLOCK_N = 32  # columns of a block of decode
TILES = (128, 128), (64, 64), (16, 64)  # of segment_gemm; float32 has not the first
HOPPER_TILES = (128, 256), (128, 192), (256, 128)  # of its form for compute capability 9.0
MAX_SEGMENTS = 8
MAX_SIZE = 2**31 - 1024  # of an operand of that form
DECODE_ROWS = 64


def checked_form(form: str | None) -> str | None:
    if form not in (None, "", "sm90"):
        raise ValueError(f"FUSED_LORA_CUDA_GEMM must be 'sm90' or not set, got {form!r}")
    return form or None


# The form of segment_gemm: None is the one for compute capability 8.0 and later. "sm90" has yet to
# run on a GPU, and is taken where it is asked for.
FORM = checked_form(os.environ.get("FUSED_LORA_CUDA_GEMM"))

# Predictions, to be replaced by what a GPU measures.
BLOCKS_PER_SM = 2
MULTI_ROWS = 512  # rows of an adapter in a block of row_reduce
LARGEST_R_OF_U = 16  # above it the planes of u cost more than a second read of dy


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # of the emulated device
    return torch.cuda.get_device_properties(device).multi_processor_count


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _block_k(dtype: torch.dtype) -> int:
    return 128 // dtype.itemsize


def _many(slots, routing) -> list[Tensor]:
    return [slots.table, slots.rank, slots.scale, routing.ids, routing.order, routing.offsets]


def _gate(gate: Tensor | None) -> Tensor | None:
    return None if gate is None else gate.float().contiguous()


def _dropout(dropout) -> tuple[Tensor | None, int, float]:
    if dropout is None:
        return None, 0, 1.0
    seed, threshold, *scale = dropout
    return seed.reshape(1), threshold, *(scale or (1.0,))


def _calls(K: int, columns: tuple[int, int] | None) -> tuple[int, int]:
    """(the first call of a row of the input, calls in a row of the whole of which it is columns)"""
    first, total = columns or (0, K)
    return first // 8, _divide_up(total, 8)


def _max_tiles(M: int, G: int, block: int) -> int:
    """The most tiles that M rows of G adapters can make: each adapter may end in a part of one."""
    return min(M, _divide_up(M, block) + min(G, M))


def _span(columns: int, blocks: int, step: int, least: int, device: torch.device) -> int:
    """Columns of a split, a multiple of `step`, for `blocks` times the splits to fill the device;
    `least` columns at least."""
    wanted = max(1, BLOCKS_PER_SM * _multiprocessors(device) // max(1, blocks))
    span = max(_divide_up(columns, wanted), min(least, columns), 1)
    return _divide_up(span, step) * step


def _start_shrink(x, a, gate, many, dropout, scale, tiles, h, t, columns=None):
    """Fill h and t, whichever are given."""
    (M, K), R, step = x.shape, a.shape[-2], _block_k(x.dtype)
    seed, threshold, keep_scale = _dropout(dropout)
    span = _span(K, tiles * _divide_up(R, 64), step, 4 * step, x.device)
    split = _divide_up(K, span)
    planes = x.new_empty(split, M, R, dtype=torch.float32) if split > 1 else None
    if not (M and K):
        return
    _ops.shrink_cuda(
        x, a, gate, many, seed, scale, keep_scale, threshold, *_calls(K, columns), tiles, span, h,
        t, planes,
    )  # fmt: skip
    if planes is not None:
        _ops.sum_rows_cuda(planes, gate, many, scale, h, t)


def shrink(x, a, *, scale=1.0, gate=None, dropout=None, columns=None, save_h=False):
    """(t [M, R], h [M, R] or None) in x's dtype, for x [M, K] and a [R, K] of any strides.

    dropout is None or (seed int64 [1], threshold, keep_scale): an element is kept iff its 16-bit
    lane reaches the threshold, and keep_scale multiplies h. columns = (first, total) where x is a
    part of a wider input.
    """
    (M, K), R = x.shape, a.shape[0]
    new = x.new_empty if K else x.new_zeros  # a sum over nothing
    t, h = new(M, R), new(M, R) if save_h else None
    _start_shrink(x, a, _gate(gate), [], dropout, scale, _divide_up(M, BLOCK_M), h, t, columns)
    return t, h


def multi_shrink(x, slots, a_slots, routing, *, dropout=None, save_h=False):
    """(t [M, R], h [M, R] or None) for x [M, K] and a_slots [P, R, K]: each row with the adapter
    that routing gives it; zero past its rank and in rows without one."""
    M, R = x.shape[0], a_slots.shape[1]
    t, h = x.new_zeros(M, R), x.new_zeros(M, R) if save_h else None
    tiles = _max_tiles(M, slots.table.shape[0], BLOCK_M)
    many = _many(slots, routing)
    _start_shrink(x, a_slots, slots.gate, many, dropout, 1.0, tiles, h, t)
    return t, h


def tile(M: int, N: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of segment_gemm's tile: the largest with which the tiles fill the device."""
    for block_m, block_n in TILES[dtype == torch.float32 : 2]:
        if _divide_up(M, block_m) * _divide_up(N, block_n) >= _multiprocessors(device):
            return block_m
    return 64 if M > 16 else 16


def segment_gemm(segments, *, base=None, bias=None, mask=None, block_m=None, early=0):
    """y [M, N] = base + bias + sum of L R^T over the pairs (L [M, K_i], R [N, K_i]), in order.

    mask is None or (bits uint8 [M, ceil(N / 8)], keep_scale, n <= 8): after the first n segments
    the accumulator is multiplied by keep * keep_scale. base [M, N], of any strides, is not written.

    A launch takes 8 segments. The segments past them are further launches, each onto the result of
    the one before, which is rounded between them.

    block_m are the rows of a tile, or "sm90": then, or where FORM is that, it is
    hopper_segment_gemm wherever that can run. Where it cannot, a warning says why. early: how many
    of the segments were complete, as bias was, before the kernel launched last began; the
    other form begins when that one has ended, and need not know.
    """
    if (block_m or FORM) == "sm90":
        if (reason := hopper_refuses(segments)) is None:
            return hopper_segment_gemm(segments, base=base, bias=bias, mask=mask, early=early)
        warnings.warn(f"segment_gemm: the form 'sm90' is not taken: {reason}", stacklevel=2)
        block_m = None
    y = _new_sum(segments)
    for lefts, rights, *others in _by_launch(segments, bias, base, mask, y):
        _start_segments(lefts, rights, -1, [], *others, y, block_m)
    return y


def _new_sum(segments) -> Tensor:
    left, right = segments[0]
    return left.new_empty(left.shape[0], right.shape[0])


def _by_launch(segments, bias, base, mask, y):
    """lefts, rights, bias, base and mask of each launch of segment_gemm."""
    for first in range(0, len(segments), MAX_SEGMENTS):
        lefts, rights = zip(*segments[first : first + MAX_SEGMENTS], strict=True)
        yield lefts, rights, bias, base, mask
        bias, base, mask = None, y, None


def _start_segments(lefts, rights, gathered, many, bias, base, mask, y, block_m):
    bits, keep_scale, masked = mask or (None, 1.0, 0)
    bias = None if bias is None else bias.contiguous()
    block_m = block_m or tile(*y.shape, y.dtype, y.device)
    _ops.segment_gemm_cuda(
        lefts, rights, gathered, many, bias, base, bits, masked, keep_scale, y, block_m
    )


def _by_tma(t: Tensor) -> bool:
    """Whether TMA can address the rows of a matrix: contiguous, aligned, not overlapping."""
    (rows, cols), (row, col) = t.shape, t.stride()
    aligned = rows <= 1 or (row * t.itemsize % 16 == 0 and cols <= row < 2**39)
    fits = aligned and max(rows, cols) <= MAX_SIZE
    return fits and (cols <= 1 or col == 1) and t.data_ptr() % 16 == 0


def hopper_refuses(segments) -> str | None:
    """None where hopper_segment_gemm runs, else the sentence why not."""
    x = segments[0][0]
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the Hopper kernel multiplies float16 and bfloat16, got {x.dtype}"
    if x.device.type == "cuda" and (got := torch.cuda.get_device_capability(x.device)) != (9, 0):
        return f"the Hopper kernel needs compute capability 9.0, {x.device} has {got[0]}.{got[1]}"
    if (size := max(x.shape[0], segments[0][1].shape[0])) > MAX_SIZE:
        return f"the Hopper kernel counts rows and columns up to {MAX_SIZE}, got {size}"
    for i, (left, right) in enumerate(segments):
        for name, t, fits in (
            ("left", left, _by_tma(left)),
            ("right", right, _by_tma(right) or _by_tma(right.t())),
        ):
            if t.shape[1] and not fits:
                which = "rows" if name == "left" else "rows, or the columns,"
                return (
                    f"TMA needs the {which} of an operand contiguous, apart by multiples of 16 "
                    f"bytes, and its data on 16 bytes; the {name} operand of segment {i} has shape "
                    f"{tuple(t.shape)}, strides {tuple(t.stride())}, and its data begins "
                    f"{t.data_ptr() % 16} bytes off"
                )
    return None


def hopper_tile(M: int, N: int, device: torch.device) -> tuple[int, int]:
    """The tile of hopper_segment_gemm: with the fewest waves, and of those the least padding. A
    prediction, to be replaced by what a GPU measures."""
    processors = _multiprocessors(device)

    def cost(tile):
        block_m, block_n = tile
        wide = block_n >= block_m
        rows, cols = block_m * (1 + wide), block_n * (2 - wide)  # of two blocks
        clusters = _divide_up(M, rows) * _divide_up(N, cols)
        return _divide_up(clusters, max(1, processors // 2)) * block_m * block_n

    return min(HOPPER_TILES, key=cost)


def hopper_segment_gemm(segments, *, base=None, bias=None, mask=None, tile=None, early=0):
    """segment_gemm by the kernel for compute capability 9.0 (csrc/segment_gemm_sm90.cuh), which has
    yet to run on a GPU and is never chosen by itself; ValueError with hopper_refuses' sentence.

    tile is one of HOPPER_TILES. Where early is not 0 the kernel begins before the one ahead of it
    in the stream has ended, waits for that one behind the first `early` segments, and writes y
    after that. With a mask, whose bits it would not wait for, nothing is early.
    """
    if (reason := hopper_refuses(segments)) is not None:
        raise ValueError(reason)
    y = _new_sum(segments)
    block_m, block_n = tile or hopper_tile(*y.shape, y.device)
    bias = None if bias is None else bias.contiguous()
    early = 0 if mask else early
    for lefts, rights, added, onto, dropped in _by_launch(segments, bias, base, mask, y):
        bits, keep_scale, masked = dropped or (None, 1.0, 0)
        _ops.segment_gemm_sm90_cuda(
            lefts, rights, added, onto, bits, masked, keep_scale, y, block_m, block_n,
            early or len(lefts),
        )  # fmt: skip
        early = 0
    return y


def multi_segment_gemm(
    x, weight, t, v_slots, slots, routing, *, bias=None, mask=None, block_m=None
):
    """y [M, N] = bias + x W^T + t_i V_j, for x [M, K], weight [N, K], t [M, R], v_slots [P, R, N].

    mask is None or (bits uint8 [M, ceil(N / 8)], keep_scale): then the adapters' part is multiplied
    by keep * keep_scale.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    many = _many(slots, routing)
    if mask is None:
        _start_segments([x, t], [weight, v_slots], 1, many, bias, None, None, y, block_m)
    else:
        mask = (*mask, 1)
        _start_segments([t, x], [v_slots, weight], 0, many, bias, None, mask, y, block_m)
    return y


def multi_segment_add_(y, t, v_slots, slots, routing, *, block_m=None):
    """y [M, N] += t_i V_j in place, summed in fp32 and rounded once; y of any strides."""
    _start_segments([t], [v_slots], 0, _many(slots, routing), None, y, None, y, block_m)


def _start_row_reduce(z, v, w, many, dropout, bits, rows, tiles, columns=None):
    """fp32 planes of P^T [tiles, R, C] and, where w is given, of u [column blocks, M, R]."""
    (M, C), R = z.shape, v.shape[1]
    seed, threshold, _ = _dropout(dropout)
    planes = z.new_empty(tiles, R, C, dtype=torch.float32)
    u = w if w is None else z.new_empty(_divide_up(C, BLOCK_C), M, R, dtype=torch.float32)
    calls = _calls(C, columns)
    _ops.row_reduce_cuda(z, v, w, many, seed, threshold, *calls, bits, rows, planes, u)
    return planes, u


def _rows_of_a_block(M: int, C: int, device: torch.device) -> int:
    return _span(M, _divide_up(C, BLOCK_C), 64, 256, device)


def row_reduce_dy(dy, b, h, *, scale, gate=None, need_dh=True, need_dgate=False, db_dtype=None):
    """(dh [M, R], dB [N, R], dg fp32 [R]) from ONE read of dy [M, N]; with P = dy^T h

        dh = scale * g ⊙ (dy B)     dB = scale * P diag(g)     dg_r = scale * sum_n B_nr P_nr

    The planes of u = dy B grow with R. Where they cost more than a second read of dy, dh is a
    shrink.
    """
    (M, N), R = dy.shape, h.shape[1]
    gate, rows = _gate(gate), _rows_of_a_block(M, N, dy.device)
    together = need_dh and R <= LARGEST_R_OF_U
    w = b if together else None
    planes, u = _start_row_reduce(dy, h, w, [], None, None, rows, _divide_up(M, rows))
    dh = None
    if together:
        dh = h.new_empty(M, R) if N else h.new_zeros(M, R)
        _ops.sum_rows_cuda(u, gate, [], scale, None, dh)
    elif need_dh:
        dh, _ = shrink(dy, b.t(), scale=scale, gate=gate)
    db = torch.empty(b.shape, dtype=db_dtype or b.dtype, device=b.device)
    blocks = _divide_up(N, BLOCK_C)
    dot = planes.new_empty(blocks, 1, R) if need_dgate else None
    _ops.sum_columns_cuda(
        planes, M, rows, gate, [], scale, 1.0, True, b.t()[None] if need_dgate else None,
        db.t()[None], dot,
    )  # fmt: skip
    return dh, db, None if dot is None else dot.sum((0, 1))


def row_reduce_x(x, dh, *, dropout=None, columns=None, bits=None, da_dtype=None):
    """dA [R, K] = dh^T drop(x); bits, where given, receives the mask.

    dropout is None or (seed int64 [1], threshold, keep_scale). columns = (first, total) where x is
    a part of a wider input.
    """
    (M, K), R = x.shape, dh.shape[1]
    rows = _rows_of_a_block(M, K, x.device)
    planes, _ = _start_row_reduce(
        x, dh, None, [], dropout, bits, rows, _divide_up(M, rows), columns
    )
    da = torch.empty(R, K, dtype=da_dtype or x.dtype, device=x.device)
    keep_scale = _dropout(dropout)[2]
    _ops.sum_columns_cuda(
        planes, M, rows, None, [], 1.0, keep_scale, False, None, da[None], None
    )  # fmt: skip
    return da


def multi_row_reduce(z, v, slots, routing, out, *, scaled=False, w=None, dropout=None):
    """Write out [P, R, C]: P_j = sum over the rows i of adapter j of v_i^T drop(z)_i, or where
    scaled scale_j g_j ⊙ P_j, into the slot of each id; the slots that no id has are left alone.

    Where w [P, R, C] is given return dg fp32 [P, R] = scale_j <w_jr, P_jr>, else None. dropout is
    None or (seed int64 [1], threshold, keep_scale) and masks z.
    """
    (M, C), (P, R), many = z.shape, out.shape[:2], _many(slots, routing)
    tiles = _max_tiles(M, slots.table.shape[0], MULTI_ROWS)
    planes, _ = _start_row_reduce(z, v, None, many, dropout, None, MULTI_ROWS, tiles)
    dot = None if w is None else planes.new_zeros(_divide_up(C, BLOCK_C), P, R)
    _ops.sum_columns_cuda(
        planes, M, MULTI_ROWS, slots.gate, many, 1.0, _dropout(dropout)[2], scaled, w, out, dot
    )
    return None if dot is None else dot.sum(0)


def dropout_bits(
    seed: Tensor, M: int, K: int, threshold: int, columns: tuple[int, int] | None = None
) -> Tensor:
    """The mask of an [M, K] input as bits: uint8 [M, ceil(K / 8)], bit k % 8 of byte k // 8.

    columns = (first, total) where it is a part of a wider input.
    """
    bits = torch.empty(M, _divide_up(K, 8), dtype=torch.uint8, device=seed.device)
    _ops.dropout_bits_cuda(seed.reshape(1), threshold, *_calls(K, columns), bits)
    return bits


def decodes(M: int, dtype: torch.dtype) -> bool:
    """Whether decode takes a batch of M rows with its base product."""
    return M <= DECODE_ROWS and dtype.itemsize == 2


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _zeroed_counters(blocks: int, device: torch.device) -> Tensor:
    """Counters at zero, where every kernel leaves them. Calls on one stream follow each other and
    share them; a graph that is being captured has its own.
    """
    if device.type != "cuda":
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters or _counters[key].shape[0] < blocks:
        _counters[key] = torch.zeros(max(blocks, 4096), dtype=torch.int32, device=device)
    return _counters[key]


def _decode(ys, x, weight, bias, projections, splits_at=None):
    """Each y [M, N] = or += its part; projections: (a, v, gate, many, scale) of each."""
    M, K = x.shape
    span_r = max(256, _divide_up(_divide_up(K, 8), 256) * 256)
    found = []
    for y, (a, v, gate, many, scale) in zip(ys, projections, strict=True):
        R, N = a.shape[-2], y.shape[1]
        new = x.new_empty if K else x.new_zeros  # a sum over nothing
        planes = new(max(1, _divide_up(K, span_r)), M, R, dtype=torch.float32)
        if M and K:
            _ops.decode_shrink_cuda(x, a, many, span_r, planes)
        span, parts, counters = 0, None, None
        if weight is not None:
            blocks = _divide_up(N, BLOCK_N)
            span = splits_at or _span(K, blocks, 128, 512, x.device)
            if (splits := _divide_up(K, span)) > 1:
                parts = x.new_empty(splits, M, N, dtype=torch.float32)
                counters = _zeroed_counters(blocks, x.device)
        _ops.decode_cuda(x, weight, v, gate, many, scale, planes, bias, y, span, parts, counters)
        found.append(planes)
    return found


def decode(x, weight, a, b, bias=None, *, scale=1.0, gate=None, splits_at=None):
    """y [M, N] = bias + x W0^T + scale * ((x A^T) * g) B^T for x [M <= 64, K] in two launches."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    _decode([y], x, weight, bias, [(a, b.t(), _gate(gate), [], scale)], splits_at)
    return y


def multi_decode(x, weight, slots, routing, bias=None, *, save_h=False):
    """(y [M, N], h [M, R] or None) of multi_lora_linear without dropout, or None where `decodes`
    does not hold."""
    if not decodes(x.shape[0], x.dtype):
        return None
    y, many = x.new_empty(x.shape[0], weight.shape[0]), _many(slots, routing)
    bias = None if bias is None else bias.contiguous()
    of_bank = slots.a_slots, slots.bt_slots, slots.gate, many, 1.0
    (planes,) = _decode([y], x, weight, bias, [of_bank])
    if not save_h:
        return y, None
    h = x.new_zeros(x.shape[0], planes.shape[2])
    _ops.sum_rows_cuda(planes, slots.gate, many, 1.0, h, None)
    return y, h


def write_slot_(slots, slot: int, lora_a, lora_b, scale: float, gate=None) -> None:
    """Write an adapter (lora_a [r, K], lora_b [N, r], gate [r]) into a slot, all of it, in one
    launch."""
    dtype = slots.a_slots.dtype
    _ops.write_slot_cuda_(
        slots.a_slots, slots.bt_slots, slots.rank, slots.scale, slots.gate, slot,
        lora_a.to(dtype), lora_b.to(dtype), _gate(gate), scale,
    )  # fmt: skip
    # Autograd does not see what a kernel writes, and must refuse a backward that saved the slots.
    torch.autograd.graph.increment_version([slots.a_slots, slots.bt_slots, slots.gate])


def flip_(table: Tensor, index: int, slot: int) -> None:
    """table[index] = slot, on the stream."""
    _ops.flip_cuda_(table, index, slot)


def multi_add_(ys, x, slots, routing):
    """y [M, N] += scale_j g_j ⊙ (x_i A_j^T) B_j^T in place, for lists of y of any strides and of
    slots."""
    if x.shape[0] <= DECODE_ROWS:
        banks = [(own.a_slots, own.bt_slots, own.gate, _many(own, routing), 1.0) for own in slots]
        _decode(ys, x, None, None, banks)
        return
    for y, own in zip(ys, slots, strict=True):
        t, _ = multi_shrink(x, own, own.a_slots, routing)
        multi_segment_add_(y, t, own.bt_slots, own, routing)
