"""y = bias + sum_i L_i R_i^T for compute capability 9.0: persistent, by TMA and wgmma, in Gluon.

    forward   (x, W0), (t, B)            dx   (dy, W0^T), (dh, A^T)
    masked dx (dh, A^T), D ⊙ ., (dy, W0^T)    with D = keep * keep_scale, on the output side

The twin of segment_gemm.py. A block has three partitions. The producer, one warp, fills a ring of
STAGES pairs of tiles by TMA; two consumers, a warpgroup each, multiply from the ring, and each
holds half of the rows of the fp32 accumulator. They do not wait for each other, so one multiplies
while the other waits or writes its part of y.

The steps of all segments of all tiles of a block are one sequence, and step `it` lives in slot
it % STAGES of the ring. full[slot] completes when both of its tiles have arrived, empty[slot] when
both consumers have read them.

TMA fills with zeros what lies beyond an operand and leaves out what lies beyond y: no size needs a
mask. A rank is one more step, of which 16, 32 or all 64 columns are multiplied.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from . import configs
from .launch import launch
from .segment_gemm import swizzle2d

# Triton launches no tuple of descriptors: the kernel has an argument for each operand of so many.
MAX_SEGMENTS = 6
# Segments of so many columns, adapters, are copied where TMA cannot read them as they lie.
NARROW = 256
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
CONSUMERS = gl.constexpr(2)
# Three warpgroups (the producer's has one warp at work) share 504 registers a thread.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
# Triton 3.8 renamed the copies, and 3.9 has the new names only.
if hasattr(tma, "async_load"):
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global


@triton.jit
def slot_of(it, STAGES: tl.constexpr):
    """(place in the ring, parity of its use) of step `it`."""
    return it % STAGES, it // STAGES & 1


@triton.constexpr_function
def mma_layout(block_n):
    """A warpgroup's accumulator [rows, block_n]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])


@triton.constexpr_function
def words_layout(rows, block_n):
    """mma_layout as [rows, block_n // 32, 32]: a thread has the words of its rows, all of them."""
    words = [[0, 1 << i, 0] for i in range((block_n // 32).bit_length() - 1)]
    more = [[64 << i, 0, 0] for i in range((rows // 64).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], *words, *more],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[rows, block_n // 32, 32],
    )


@gluon.jit
def load_step(lhs, rhs, first_m, first_n, first_k, it, ring, TURNED: gl.constexpr):
    """Step `it` into its slot, as soon as the consumers have read what was there."""
    lhs_ring, rhs_ring, full, empty = ring
    slot, parity = slot_of(it, full.shape[0])
    mbarrier.wait(empty.index(slot), parity ^ 1)
    mbarrier.expect(full.index(slot), lhs.block_type.nbytes + rhs.block_type.nbytes)
    async_load(lhs, [first_m, first_k], full.index(slot), lhs_ring.index(slot))
    at = [first_k, first_n] if TURNED else [first_n, first_k]
    async_load(rhs, at, full.index(slot), rhs_ring.index(slot))


@gluon.jit
def producer(
    lhs,
    rhs,
    sizes,
    ring,
    EARLY: gl.constexpr,
    TURNED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    M, N, Ks, tiles = sizes
    it = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        pid_m, pid_n = swizzle2d(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        for i in gl.static_range(len(Ks)):
            if i == EARLY:
                gdc_wait()
            for k in range(0, Ks[i], BLOCK_K):
                load_step(lhs[i], rhs[i], pid_m * BLOCK_M, pid_n * BLOCK_N, k, it, ring, TURNED)
                it += 1


@gluon.jit
def multiply_step(acc, it, ring, CONSUMER: gl.constexpr, WIDTH: gl.constexpr, TURNED: gl.constexpr):
    """acc + the first WIDTH columns of step `it`, whose slot is then free for the producer."""
    lhs_ring, rhs_ring, full, empty = ring
    slot, parity = slot_of(it, full.shape[0])
    mbarrier.wait(full.index(slot), parity)
    lhs = lhs_ring.index(slot).slice(CONSUMER * acc.shape[0], acc.shape[0], dim=0)
    rhs = rhs_ring.index(slot) if TURNED else rhs_ring.index(slot).permute((1, 0))
    acc = warpgroup_mma(lhs.slice(0, WIDTH, dim=1), rhs.slice(0, WIDTH, dim=0), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(slot))
    return acc


@gluon.jit
def multiply_steps(
    acc,
    steps,
    it,
    ring,
    CONSUMER: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TAIL: gl.constexpr,
    TURNED: gl.constexpr,
):
    """acc + a segment's steps from `it` on, the last of which is TAIL columns wide."""
    # Out of the loop, in which a branch would cost waits between the products.
    PEELED: gl.constexpr = TAIL < BLOCK_K
    for k in range(steps - PEELED):
        acc = multiply_step(acc, it + k, ring, CONSUMER, BLOCK_K, TURNED)
    if PEELED:
        acc = multiply_step(acc, it + steps - 1, ring, CONSUMER, TAIL, TURNED)
    return acc


@gluon.jit
def mask_tile(acc, bits_ptr, keep_scale, first_m, first_n, M, N):
    """D ⊙ acc, from keep bits in words [M, N / 32]."""
    parent: gl.constexpr = words_layout(acc.shape[0], acc.shape[1])
    layout: gl.constexpr = gl.SliceLayout(2, parent)
    words: gl.constexpr = acc.shape[1] // 32
    offs_m = first_m + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    offs_w = first_n // 32 + gl.arange(0, words, gl.SliceLayout(0, layout))
    bits = gl.load(
        bits_ptr + offs_m[:, None].to(gl.int64) * (N // 32) + offs_w[None, :],
        mask=(offs_m < M)[:, None] & (offs_w < N // 32)[None, :],
        other=0,
    )
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, parent)))
    keep = (bits[:, :, None] >> lane[None, None, :]) & 1
    keep = gl.convert_layout(keep.reshape(acc.shape), acc.type.layout, assert_trivial=True)
    return gl.where(keep != 0, acc * keep_scale, 0.0)


@gluon.jit
def consumer(
    into,
    sizes,
    ring,
    CONSUMER: gl.constexpr,
    MASKED: gl.constexpr,
    TAILS: gl.constexpr,
    TURNED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    bias_ptr, bits_ptr, y, keep_scale, y_tiles = into
    M, N, Ks, tiles = sizes
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    layout: gl.constexpr = mma_layout(BLOCK_N)
    y_tile = y_tiles.index(CONSUMER)
    it = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        pid_m, pid_n = swizzle2d(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m, first_n = pid_m * BLOCK_M + CONSUMER * ROWS, pid_n * BLOCK_N
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        for i in gl.static_range(len(Ks)):
            steps = gl.cdiv(Ks[i], BLOCK_K)
            acc = multiply_steps(acc, steps, it, ring, CONSUMER, BLOCK_K, TAILS[i], TURNED)
            it += steps
            if i + 1 == MASKED:
                acc = mask_tile(acc, bits_ptr, keep_scale, first_m, first_n, M, N)

        if bias_ptr is not None:
            offs_n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            acc += bias.to(gl.float32)[None, :]
        tma.store_wait(0)  # until the tile before has left y_tile
        y_tile.store(acc.to(y.dtype))
        fence_async_shared()
        async_store(y, [first_m, first_n], y_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def segment_gemm_hopper_kernel(
    lhs0, lhs1, lhs2, lhs3, lhs4, lhs5,  # descriptors of [M, K_i], None after the last segment
    rhs0, rhs1, rhs2, rhs3, rhs4, rhs5,  # of [N, K_i], or of [K_i, N] where TURNED
    bias_ptr,  # [N] or None
    bits_ptr,  # int32 [M, N / 32] or None
    y,  # a descriptor of [M, N]
    M,
    N,
    Ks,
    keep_scale,
    EARLY: gl.constexpr,
    MASKED: gl.constexpr,
    TAILS: gl.constexpr,
    TURNED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    lhs = (lhs0, lhs1, lhs2, lhs3, lhs4, lhs5)
    rhs = (rhs0, rhs1, rhs2, rhs3, rhs4, rhs5)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    box: gl.constexpr = rhs0.block_type.shape
    ring = (
        gl.allocate_shared_memory(lhs0.dtype, [STAGES, BLOCK_M, BLOCK_K], lhs0.layout),
        gl.allocate_shared_memory(rhs0.dtype, [STAGES, box[0], box[1]], rhs0.layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    y_tiles = gl.allocate_shared_memory(
        y.dtype, [CONSUMERS, BLOCK_M // CONSUMERS, BLOCK_N], y.layout
    )
    for slot in gl.static_range(STAGES):
        mbarrier.init(ring[2].index(slot), 1)
        mbarrier.init(ring[3].index(slot), CONSUMERS)
    fence_async_shared()
    into = (bias_ptr, bits_ptr, y, keep_scale, y_tiles)
    sizes = (M, N, Ks, tiles)
    gl.warp_specialize(
        [
            (
                consumer,
                (into, sizes, ring, 0, MASKED, TAILS, TURNED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M),
            ),
            (
                consumer,
                (into, sizes, ring, 1, MASKED, TAILS, TURNED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M),
            ),
            (
                producer,
                (lhs, rhs, sizes, ring, EARLY, TURNED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def _operands(segments) -> tuple[bool, list[tuple[torch.Tensor, torch.Tensor]]]:
    """(whether R of the widest segment lies along N, all (L, R), or (L, R^T) if it does)."""
    _, widest = max(segments, key=lambda pair: pair[0].shape[1])
    turned = widest.stride(1) != 1
    return turned, [(lhs, rhs.t() if turned else rhs) for lhs, rhs in segments]


def _tail(K: int, block_k: int) -> int:
    """How many columns of the last step are multiplied."""
    return configs.block_of(K % block_k or block_k, block_k)


def _misplaced(name: str, t: torch.Tensor) -> str | None:
    """None where TMA can read or write the matrix t, which lies along its rows."""
    if t.stride(1) != 1:
        return f"{name} has strides {t.stride()}, and TMA needs elements side by side"
    if t.shape[0] > 1 and (t.stride(0) * t.itemsize % 16 or t.stride(0) < t.shape[1]):
        return f"{name} has rows {t.stride(0)} elements apart, and TMA needs a multiple of 16 bytes"
    if t.data_ptr() % 16:
        return f"{name} does not begin at a multiple of 16 bytes, which TMA needs"
    return None


def _readable(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it in rows that TMA can read."""
    if _misplaced("t", t) is None:
        return t
    return t.new_empty(t.shape[0], 8 * triton.cdiv(t.shape[1], 8))[:, : t.shape[1]].copy_(t)


def refuses(segments, *, mask=None) -> str | None:
    """None where the kernel can run on these arguments of segment_gemm, else why not."""
    lhs, rhs = zip(*segments, strict=True)
    x, (M, N) = lhs[0], (lhs[0].shape[0], rhs[0].shape[0])
    if configs.capability(x.device) != 90:
        return f"the Gluon kernel is made for compute capability 9.0, and x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the Gluon kernel takes bfloat16 and float16, not {x.dtype}"
    if len(segments) > MAX_SEGMENTS:
        return f"the Gluon kernel takes {MAX_SEGMENTS} segments at most, not {len(segments)}"
    if not all(t.numel() for t in lhs + rhs):
        return "an operand is empty, and TMA needs something to read"
    if max(M, N, *(t.shape[1] for t in lhs)) >= 2**31 - 256:
        return "a size is beyond the 32-bit coordinates of TMA"
    if N % 8:
        return f"y has rows {N} elements apart, and TMA needs a multiple of 16 bytes"
    if mask is not None and N % 32:
        return f"the mask of {N} columns is not made of whole 32-bit words"
    for i, (left, right) in enumerate(_operands(segments)[1]):
        for side, t in ("left", left), ("right", right):
            why = _misplaced(f"the {side} operand of segment {i}", t)
            if why is not None and left.shape[1] > NARROW:
                return why
    return None


def _descriptor(t: torch.Tensor, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(box, DTYPES[t.dtype])
    # Of a single row the distance to the next means nothing, and may be anything.
    stride = t.stride(0) if t.shape[0] > 1 else 8 * triton.cdiv(t.shape[1], 8)
    return TensorDescriptor(t, list(t.shape), [stride, 1], box, layout)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return configs.MULTIPROCESSORS  # compiling for a GPU that is not there
    return torch.cuda.get_device_properties(device).multi_processor_count


def segment_gemm(segments, *, bias=None, mask=None, config=None, early=0):
    """y [M, N] = bias + sum of L R^T over the pairs (L [M, K_i], R [N, K_i]), in their order.

    mask is None or (bits uint8 [M, ceil(N / 8)], keep_scale, n): after the first n segments the
    accumulator is multiplied by keep * keep_scale.

    The first `early` segments, and bias, are read before the kernel that was launched last has
    ended: what they hold must have been complete before it began. A narrow operand that TMA cannot
    read, as that of a rank that is no multiple of 8, is copied first.

    Raises RuntimeError with the reason where the kernel cannot run (see `refuses`).
    """
    if (why := refuses(segments, mask=mask)) is not None:
        raise RuntimeError(f"segment_gemm: {why}")
    most = 1 if mask else len(segments)  # the bits are not waited for
    if not 0 <= early < most:
        raise ValueError(f"early must be at least 0 and less than {most}, got {early}")
    lhs, rhs = zip(*segments, strict=True)
    x, (M, N) = lhs[0], (lhs[0].shape[0], rhs[0].shape[0])
    processors = _multiprocessors(x.device)
    c = config or configs.segment_gemm_hopper(M, N, processors)
    block_m, block_n, block_k = c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"]
    turned, placed = _operands(segments)
    operands = [(_readable(left), _readable(right)) for left, right in placed]
    pairs = zip(itertools.chain(*operands), itertools.chain(*placed), strict=True)
    if any(new is not old for new, old in pairs):
        early = 0  # the copy was launched last, and may be of an early segment
    bits, keep_scale, masked = mask or (None, 1.0, 0)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    absent = [None] * (MAX_SEGMENTS - len(segments))
    launch(
        segment_gemm_hopper_kernel,
        (min(triton.cdiv(M, block_m) * triton.cdiv(N, block_n), processors),),
        x.device,
        *[_descriptor(left, [block_m, block_k]) for left, _ in operands],
        *absent,
        *[
            _descriptor(right, [block_k, block_n] if turned else [block_n, block_k])
            for _, right in operands
        ],
        *absent,
        bias,
        None if bits is None else bits.view(torch.int32),
        _descriptor(y, [block_m // CONSUMERS.value, block_n]),
        M,
        N,
        tuple(t.shape[1] for t in lhs),
        keep_scale,
        EARLY=early,
        MASKED=masked,
        TAILS=tuple(_tail(t.shape[1], block_k) for t in lhs),
        TURNED=turned,
        num_warps=4,
        overlap=early > 0,
        **c,
    )
    return y
