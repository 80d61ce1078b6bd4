"""Each kernel moves the bytes that docs/kernels.md says, and its large operand once."""

import functools

import pytest
import torch
import triton
from conftest import DEVICE
from fused_lora.bench import registry
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.multi_gemv import multi_gemv_add_, multi_gemv_shrink
from fused_lora.triton_kernels.multi_row_reduce import multi_row_reduce
from fused_lora.triton_kernels.multi_segment_gemm import multi_segment_add_, multi_segment_gemm
from fused_lora.triton_kernels.multi_shrink import multi_shrink
from fused_lora.triton_kernels.planes import BLOCK_I, BLOCK_R, sum_planes
from fused_lora.triton_kernels.row_reduce import row_reduce, row_reduce_dy
from fused_lora.triton_kernels.segment_gemm import segment_gemm
from fused_lora.triton_kernels.shrink import shrink
from traffic import counted

import fused_lora as fl
from fused_lora.ops.routing import AdapterRouting
from fused_lora.reference import AdapterSlots

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="Triton's interpreter counts the bytes")

M, N, K, R = 100, 72, 136, 12
E = 2  # bytes of a float16
CONFIG = {"num_warps": 4, "num_stages": 2}
DROPOUT = torch.tensor([5]), 6554, 1.1


def draw(*shape, dtype=torch.float16):
    return torch.randn(*shape).to(dtype)


def blocks(size, block):
    return triton.cdiv(size, block)


def all_bytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def stored_once(traffic, kernel, *tensors):
    for t in tensors:
        assert traffic.stored(t, kernel) == traffic.touched("store", t, kernel) == all_bytes(t)


@pytest.mark.parametrize("rank", [5, 12, 40])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["p=0", "dropout"])
def test_shrink(split, dropout, rank):
    """e (MK ⌈R/BLOCK_R⌉ + RK ⌈M/BLOCK_M⌉ + 2MR), and the planes once each way."""
    x, a, gate = draw(M, K), draw(rank, K), draw(rank, dtype=torch.float32)
    config = CONFIG | {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_R": 16, "SPLIT_K": split}
    with counted() as traffic:
        t, h = shrink(x, a, scale=0.5, gate=gate, dropout=dropout, save_h=True, config=config)
    kernel, over_r = "shrink_kernel", blocks(rank, 16)
    assert traffic.touched("load", x, kernel) == all_bytes(x)
    assert traffic.loaded(x, kernel) == E * M * K * over_r
    assert traffic.loaded(a, kernel) == E * rank * K * blocks(M, 32)
    if split == 1:
        stored_once(traffic, kernel, t, h)
        adapters = E * rank * K * blocks(M, 32) + 4 * rank * blocks(M, 32)
        seed = 8 * blocks(M, 32) * over_r if dropout else 0
        assert traffic.total(kernel) == E * (M * K * over_r + 2 * M * rank) + adapters + seed
    else:
        planes = traffic.argument(kernel, "planes_ptr")
        assert planes.shape == (split, M, rank)
        stored_once(traffic, kernel, planes)
        assert traffic.loaded(planes, "sum_planes_kernel") == all_bytes(planes)
        stored_once(traffic, "sum_planes_kernel", t, h)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_segment_gemm(masked):
    """e (MK ⌈N/BLOCK_N⌉ + NK ⌈M/BLOCK_M⌉) a segment, y written once and never read."""
    lhs, rhs = [draw(M, K), draw(M, R)], [draw(N, K), draw(N, R)]
    bias = draw(N)
    config = CONFIG | {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP_M": 2}
    bits = torch.full((M, N // 8), 0b10110101, dtype=torch.uint8)
    mask = (bits, 1.1, 1) if masked else None
    with counted() as traffic:
        y = segment_gemm(list(zip(lhs, rhs, strict=True)), bias=bias, mask=mask, config=config)
    for left, right in zip(lhs, rhs, strict=True):
        assert traffic.loaded(left) == all_bytes(left) * blocks(N, 16)
        assert traffic.loaded(right) == all_bytes(right) * blocks(M, 32)
    assert traffic.loaded(bias) == all_bytes(bias) * blocks(M, 32)
    assert traffic.loaded(bits) == masked * all_bytes(bits)
    assert traffic.loaded(y) == 0
    stored_once(traffic, "segment_gemm_kernel", y)


@pytest.mark.parametrize("rank", [5, 12, 40])
@pytest.mark.parametrize("with_u", [False, True], ids=["P", "P and u"])
def test_row_reduce(with_u, rank):
    """e (MC ⌈R/BLOCK_R⌉ + MR ⌈C/BLOCK_C⌉) and the planes; with u also e CR ⌈M/ROWS⌉."""
    z, v, w = draw(M, N), draw(M, rank), draw(N, rank)
    config = CONFIG | {"BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_R": 16, "ROWS": 64}
    with counted() as traffic:
        p, u = row_reduce(z, v, w=w if with_u else None, config=config)
    kernel, over_r = "row_reduce_kernel", blocks(rank, 16)
    assert traffic.touched("load", z) == all_bytes(z)
    assert traffic.loaded(z) == all_bytes(z) * over_r
    assert traffic.loaded(v) == all_bytes(v) * blocks(N, 32)
    assert traffic.loaded(w) == with_u * all_bytes(w) * blocks(M, 64)
    assert p.shape == (blocks(M, 64), rank, N)
    stored_once(traffic, kernel, p)
    if with_u:
        assert u.shape == (blocks(N, 32), M, rank)
        stored_once(traffic, kernel, u)


@pytest.mark.parametrize(("rank", "reads"), [(16, 1), (64, 1), (128, 1), (129, 4)])
def test_dy_is_read_once_up_to_rank_128(monkeypatch, rank, reads):
    """By the table of compute capability 9.0, for a small dy; above, twice for each 128 ranks."""
    monkeypatch.setattr(configs, "capability", lambda device: 90)
    dy, h, b = draw(M, N), draw(M, rank), draw(N, rank)
    with counted() as traffic:
        row_reduce_dy(dy, b, h, scale=1.0)
    assert traffic.loaded(dy) == reads * all_bytes(dy)


def test_row_reduce_writes_the_mask_once():
    x, dh = draw(M, K), draw(M, 40)
    bits = torch.zeros(M, K // 8, dtype=torch.uint8)
    config = CONFIG | {"BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_R": 16, "ROWS": 64}
    with counted() as traffic:
        row_reduce(x, dh, dropout=DROPOUT[:2], bits=bits, config=config)
    stored_once(traffic, "row_reduce_kernel", bits)


def test_sum_planes():
    """4 S I R of planes, e I R of each of w, h and t, 4 R ⌈I/BLOCK_I⌉ of dot."""
    S, I = 5, 130  # noqa: E741
    planes, w = draw(S, I, R, dtype=torch.float32), draw(I, R)
    h, t, gate = torch.empty(I, R), torch.empty(I, R), draw(R, dtype=torch.float32)
    with counted() as traffic:
        sum_planes(planes, scale=2.0, gate=gate, w=w, h=h, t=t)
    kernel = "sum_planes_kernel"
    assert traffic.loaded(planes) == all_bytes(planes)
    assert traffic.loaded(w) == all_bytes(w)
    stored_once(traffic, kernel, h, t)
    programs = blocks(I, BLOCK_I), blocks(R, BLOCK_R)
    small = all_bytes(gate) * programs[0] + 4 * R * programs[0]
    assert traffic.total(kernel) == all_bytes(planes, w, h, t) + small


# Many adapters: ids of 100 rows, some without; slot 3 has no rows and slot 2 rank 0.
RANKS = torch.tensor([12, 5, 0, 9], dtype=torch.int32)


@functools.cache
def batch():
    ids = (torch.arange(M) * 7) % 4 - 1
    slots = AdapterSlots(draw(4, 16, K), draw(4, 16, N), RANKS, torch.ones(4), torch.ones(4, 16))
    table = torch.arange(4, dtype=torch.int32)
    routing = AdapterRouting(ids, 4)
    rows = [int((ids == j).sum()) for j in range(4)]
    return Slots(*slots, table), routing, rows


class Slots(AdapterSlots):
    """AdapterSlots with the table of an AdapterBank."""

    def __new__(cls, *fields):
        made = super().__new__(cls, *fields[:5])
        made.table = fields[5]
        return made


@pytest.mark.parametrize("split", [1, 3])
def test_multi_shrink_reads_no_padding(split):
    """The rows of adapters once; of A the live ranks, once for each tile of their rows."""
    slots, routing, rows = batch()
    x = draw(M, K)
    config = CONFIG | {"BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_R": 16, "SPLIT_K": split}
    with counted() as traffic:
        t, h = multi_shrink(x, slots, slots.a_slots, routing, save_h=True, config=config)
    live = [n if rank else 0 for n, rank in zip(rows, RANKS.tolist(), strict=True)]
    assert traffic.loaded(x) == E * K * sum(live)
    for j, rank in enumerate(RANKS.tolist()):
        tiles = blocks(rows[j], 16)
        assert traffic.loaded(slots.a_slots[j, :rank]) == E * rank * K * tiles
        assert traffic.loaded(slots.a_slots[j, rank:]) == 0
    written = E * sum(n * rank for n, rank in zip(rows, RANKS.tolist(), strict=True))
    for out in (t, h):
        assert traffic.stored(out) == traffic.touched("store", out) == written
    if split > 1:
        (planes,) = traffic.argument("multi_shrink_kernel", "planes_ptrs")
        assert traffic.loaded(planes) == traffic.stored(planes) == 4 * split * written // E


@pytest.mark.parametrize("add", [False, True], ids=["y", "y +="])
def test_multi_segment_gemm_reads_no_padding(add):
    """The base product's bytes, and of each adapter in a tile its live ranks."""
    slots, routing, rows = batch()
    x, w, t = draw(M, K), draw(N, K), draw(M, 16)
    config = CONFIG | {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 2}
    with counted() as traffic:
        if add:
            y = draw(M, N)
            multi_segment_add_(y, t, slots.bt_slots, slots, routing, config=config)
        else:
            y = multi_segment_gemm(x, w, t, slots.bt_slots, slots, routing, config=config)
    over_n = blocks(N, 64)
    assert traffic.loaded(x) == (not add) * all_bytes(x) * over_n
    assert traffic.loaded(w) == (not add) * all_bytes(w) * blocks(M, 32)
    assert traffic.loaded(y) == add * all_bytes(y)
    stored_once(traffic, "multi_segment_gemm_kernel", y)
    ids = routing.ids.split(32)
    for j, rank in enumerate(RANKS.tolist()):
        tiles = sum(bool((of_tile == j).any()) for of_tile in ids)
        assert traffic.loaded(slots.bt_slots[j, :rank]) == E * rank * N * tiles
        assert traffic.loaded(slots.bt_slots[j, rank:]) == 0
    used = sum(n * rank for n, rank in zip(rows, RANKS.tolist(), strict=True))
    assert traffic.loaded(t) == E * used * over_n


def test_multi_row_reduce_reads_no_padding():
    """The rows of adapters once, of v the live ranks, and every element of the result written."""
    slots, routing, rows = batch()
    z, v, out = draw(M, N), draw(M, 16), torch.empty(4, 16, N)
    config = CONFIG | {"BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_R": 16, "ROWS": 32}
    with counted() as traffic:
        multi_row_reduce(z, v, slots, routing, out, config=config)
    ranks = RANKS.tolist()
    assert traffic.loaded(z) == E * N * sum(n for n, r in zip(rows, ranks, strict=True) if r)
    used = sum(n * rank for n, rank in zip(rows, ranks, strict=True))
    assert traffic.loaded(v) == E * used * blocks(N, 32)
    stored_once(traffic, "sum_tiles_kernel", out)
    planes = traffic.argument("multi_row_reduce_kernel", "p_ptr")
    live = 4 * N * sum(blocks(n, 32) * rank for n, rank in zip(rows, ranks, strict=True))
    assert traffic.loaded(planes, "sum_tiles_kernel") == live
    assert traffic.stored(planes, "multi_row_reduce_kernel") == live


def test_multi_gemv_reads_no_padding():
    """Of each row its x once for each block of ranks, and of its slot the live ranks once."""
    slots, routing, rows = batch()
    x, y = draw(M, K), draw(M, N)
    with counted() as traffic:
        (planes,) = multi_gemv_shrink(x, [slots], [slots.a_slots], routing)
        multi_gemv_add_([y], [planes], [slots.bt_slots], [slots], routing)
    ranks = RANKS.tolist()
    present = sum(n for n, rank in zip(rows, ranks, strict=True) if rank)
    assert traffic.loaded(x) == E * K * present
    used = sum(n * rank for n, rank in zip(rows, ranks, strict=True))
    assert traffic.stored(planes) == traffic.loaded(planes) == 4 * used
    for j, rank in enumerate(ranks):
        for of_slot, width in ((slots.a_slots[j], K), (slots.bt_slots[j], N)):
            assert traffic.loaded(of_slot[:rank]) == E * rank * width * rows[j]
            assert traffic.loaded(of_slot[rank:]) == 0
    with_adapter = sum(rows)
    assert traffic.loaded(y) == traffic.stored(y) == E * N * with_adapter


# The formula of the benchmarks is what an op touches, each byte once.


def linear(case, p):
    x, weight, a, b = registry.linear_tensors(case, torch.device("cpu"))
    options = {"scale": 0.5, "dropout_p": p, "seed": 3, "backend": "triton"}
    with counted() as forward:
        y = fl.lora_linear(x, weight, a, b, **options)
    with counted() as backward:
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, a, b), dy)
    return (x, weight, a, b), y, dy, grads, forward, backward


@pytest.mark.parametrize("shape", [(100, 72, 136, 12), (257, 33, 64, 17), (3, 129, 65, 4)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_of_lora_linear_are_those_that_it_touches(shape, p):
    case = registry.LinearCase(*shape, p=p, dtype=torch.float16)
    inputs, y, dy, (dx, da, db), forward, backward = linear(case, p)
    h = forward.argument("shrink_kernel", "h_ptr")
    read = sum(forward.touched("load", t) for t in inputs)
    written = sum(forward.touched("store", t) for t in (y, h))
    assert read + written == registry.linear_bytes(case, "forward")
    read = sum(backward.touched("load", t) for t in (*inputs, dy, h))
    written = sum(backward.touched("store", t) for t in (dx, da, db))
    assert read + written == registry.linear_bytes(case, "backward")


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_of_lora_add_are_those_that_it_touches(p):
    case = registry.LinearCase(100, 72, 136, 12, p, torch.float16)
    x, base, a, b = registry.add_tensors(case, torch.device("cpu"))
    options = {"scale": 0.5, "dropout_p": p, "seed": 3, "backend": "triton"}
    with counted() as forward:
        y = fl.lora_add(base, x, a, b, **options)
    with counted() as backward:
        dy = torch.randn_like(y)
        dbase, *grads = torch.autograd.grad(y, (base, x, a, b), dy)
    h = forward.argument("shrink_kernel", "h_ptr")
    read = sum(forward.touched("load", t) for t in (x, base, a, b))
    written = sum(forward.touched("store", t) for t in (y, h))
    assert read + written == registry.add_bytes(case, "forward")
    assert forward.loaded(base) == all_bytes(base)
    stored_once(forward, "segment_gemm_kernel", y)
    read = sum(backward.touched("load", t) for t in (x, a, b, dy, h))
    written = sum(backward.touched("store", t) for t in grads)
    assert read + written == registry.add_bytes(case, "backward")
    assert dbase is dy and backward.touched("store", dy) == 0


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_of_lora_linear_group_are_those_that_it_touches(p):
    """x is read once for all adapters, forward and backward, and dx written once."""
    case = registry.GroupCase(100, 130, 136, (72, 33, 25), 12, p, torch.float16)
    x, *tensors = registry.group_tensors(case, torch.device("cpu"))
    weights, lora_as, lora_bs = tensors[:3], tensors[3:6], tensors[6:]
    options = {"scales": [0.5] * 3, "dropout_p": p, "seed": 3, "backend": "triton"}
    with counted() as forward:
        ys = fl.lora_linear_group(x, weights, lora_as, lora_bs, **options)
    with counted() as backward:
        dys = [torch.randn_like(y) for y in ys]
        dx, *_ = torch.autograd.grad(ys, (x, *lora_as, *lora_bs), dys)
    a, h = (forward.argument("shrink_kernel", name) for name in ("a_ptr", "h_ptr"))
    assert a.shape == (36, 136) and h.shape == (100, 36)
    assert forward.loaded(x, "shrink_kernel") == all_bytes(x)
    read = sum(forward.touched("load", t) for t in (x, a, *weights, *lora_bs))
    written = sum(forward.touched("store", t) for t in (*ys, h))
    assert read + written == registry.group_bytes(case, "forward")
    assert backward.loaded(x, "row_reduce_kernel") == all_bytes(x)
    assert len(backward.arguments["segment_gemm_kernel"]) == 1
    stored_once(backward, "segment_gemm_kernel", dx)
    # dA, of all adapters together, and A beside it are 2 R K; dB is as B, which is read.
    (a,) = {t for t in backward.argument("segment_gemm_kernel", "rhs_ptrs") if t.shape == (136, 36)}
    read = sum(backward.touched("load", t) for t in (x, a, h, *weights, *lora_bs, *dys))
    written = backward.touched("store", dx) + all_bytes(a) + sum(map(all_bytes, lora_bs))
    assert read + written == registry.group_bytes(case, "backward")


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_large_operands_of_a_training_step(p):
    """x is read by shrink, the base product and dA; dy by the row reduction and dx."""
    case = registry.LinearCase(100, 72, 136, 12, p, torch.float16)
    (x, *_), _, dy, (dx, *_), forward, backward = linear(case, p)
    assert forward.loaded(x, "shrink_kernel") == all_bytes(x)
    kernels = {name for name in backward.arguments if backward.loaded(dy, name)}
    assert kernels == {"row_reduce_kernel", "segment_gemm_kernel"}
    assert backward.loaded(dy, "row_reduce_kernel") == all_bytes(dy)
    assert {name for name in backward.arguments if backward.loaded(x, name)} == {
        "row_reduce_kernel"
    }
    assert backward.loaded(x) == all_bytes(x)
    stored_once(backward, "segment_gemm_kernel", dx)
    assert backward.loaded(dx) == 0


def test_dropout_costs_the_backward_a_bit_an_element_each_way():
    case = registry.LinearCase(100, 72, 136, 12, 0.1, torch.float16)
    backward = linear(case, 0.1)[-1]
    bits = backward.argument("row_reduce_kernel", "bits_ptr")
    assert all_bytes(bits) == 100 * 136 // 8
    stored_once(backward, "row_reduce_kernel", bits)
    assert backward.loaded(bits, "segment_gemm_kernel") == all_bytes(bits)


@pytest.mark.parametrize("rows", [65, 67, 130])
def test_bytes_of_multi_lora_linear_are_those_that_it_touches(rows):
    case = registry.MultiCase(rows, 72, 136, 12, G=4, dtype=torch.float16)
    x, weight, a, bt = registry.multi_tensors(case, torch.device("cpu"))
    gate, ranks = torch.ones(4, 12), torch.full((4,), 12, dtype=torch.int32)
    slots = AdapterSlots(a, bt, ranks, torch.ones(4), gate)
    with counted() as forward:
        y = fl.multi_lora_linear(x, weight, slots, case.ids(), backend="triton")
    with counted() as backward:
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, a, bt), dy)
    read = sum(forward.touched("load", t) for t in (x, weight, a, bt))
    h = E * rows * 12
    assert read + forward.touched("store", y) + h == registry.multi_bytes(case, "forward")
    read = sum(backward.touched("load", t) for t in (x, weight, a, bt, dy))
    written = sum(backward.touched("store", t) for t in grads)
    assert read + written + h == registry.multi_bytes(case, "backward")


def test_the_counter_counts():
    """A load of one element twice is two loads of one byte range; a masked one is none."""
    z, v = torch.ones(4, 8), torch.ones(4, 2)
    config = CONFIG | {"BLOCK_M": 16, "BLOCK_C": 16, "BLOCK_R": 16, "ROWS": 16}
    with counted() as traffic:
        row_reduce(z[:2], v[:2], config=config)
        row_reduce(z[:2], v[:2], config=config)
    assert traffic.loaded(z) == 2 * 4 * 16 and traffic.touched("load", z) == 4 * 16
    assert traffic.loaded(z[2:]) == 0
    assert len(traffic.arguments["row_reduce_kernel"]) == 2
    before = traffic.total("row_reduce_kernel")
    row_reduce(z, v, config=config)
    assert traffic.total("row_reduce_kernel") == before
