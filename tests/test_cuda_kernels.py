"""The CUDA C++ kernels beyond what the ops' own tests ask of every backend: each tile and split,
the decoding forms, bfloat16, and bits that do not depend on who comes first."""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from cases import CUDA_REFUSES, DROPOUTS, fuzz, layouts, seeds, slow
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from test_multi_lora_linear import KINDS, RAGGED, ids_of, make, slots_of

import fused_lora as fl
from fused_lora import reference
from fused_lora.ops.multi_lora_linear import Slots
from fused_lora.testing import assert_accurate, guarded

pytestmark = pytest.mark.skipif(CUDA_REFUSES is not None, reason=str(CUDA_REFUSES))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = DTYPES[1:]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def kernels():
    from fused_lora import cuda_kernels

    return cuda_kernels


def put(shape, layout="contiguous", dtype=torch.float32, std=1.0):
    return guarded(shape, layout, dtype=dtype, device=DEVICE, std=std)


def product(x, w):
    return (x @ w.t(),)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (70, 130), (130, 257)], ids=str)
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_every_tile(kernels, shape, block_m, dtype):
    if block_m == 128 and dtype == torch.float32:
        pytest.skip("float32 has tiles of 16 and 64 rows")
    (M, N), K, R = shape, 100, 9
    operands = [put(s, dtype=dtype) for s in ((M, K), (N, K), (M, R), (N, R), (N,))]
    x, w, t, b, bias = operands
    y = kernels.segment_gemm([(x, w), (t, b)], bias=bias, block_m=block_m)
    assert_accurate("y", (y,), lambda x, w, t, b, c: (x @ w.t() + t @ b.t() + c,), operands)
    dy = put((M, N), dtype=dtype)
    dx = kernels.segment_gemm([(dy, w.t()), (t, put((R, K), dtype=dtype).t())], block_m=block_m)
    assert dx.shape == (M, K) and not dx.isnan().any()


@pytest.mark.parametrize("op", ["segment_gemm", "shrink", "row_reduce"])
@pytest.mark.parametrize("sizes", itertools.product((8, 9, 64), (16, 24, 65)), ids=str)
@pytest.mark.parametrize("kinds", itertools.product(("contiguous", "transposed", "misaligned"),
                                                    repeat=2), ids="-".join)  # fmt: skip
def test_every_way_to_read(kernels, op, sizes, kinds):
    """Rows in chunks of 16 bytes, columns in chunks, elements; chunks that end within a row."""
    (K, N), M = sizes, 33
    left, right = put((M, K), kinds[0], torch.float16), put((N, K), kinds[1], torch.float16)
    if op == "segment_gemm":
        assert_accurate("y", (kernels.segment_gemm([(left, right)]),), product, (left, right))
    elif op == "shrink":
        assert_accurate("t", (kernels.shrink(left, right)[0],), product, (left, right))
    else:
        v = put((N, M), kinds[1], torch.float16).t()
        assert_accurate("p", (kernels.row_reduce_x(left, v),), lambda x, v: (v.t() @ x,), (left, v))


@dtypes
@pytest.mark.parametrize("p", [None, 0.3])
@pytest.mark.parametrize("R", [3, 16, 40])
def test_splits_of_a_long_k(kernels, R, p, dtype):
    x, a = put((5, 3000), dtype=dtype), put((R, 3000), dtype=dtype, std=0.05)
    gate, keep, dropout, keep_scale = put((R,)), None, None, 1.0
    if p:
        seed = torch.tensor([11], device=DEVICE)
        keep, keep_scale = reference.dropout_mask(seed, 5, 3000, p), reference.dropout_scale(p)
        dropout = seed, reference.dropout_threshold(p), keep_scale

    def plain(x, a, gate):
        h = keep_scale * ((x if keep is None else torch.where(keep, x, 0)) @ a.t())
        return (0.7 * h * gate).to(x.dtype), h

    outputs = kernels.shrink(x, a, scale=0.7, gate=gate, dropout=dropout, save_h=True)
    assert_accurate("th", outputs, plain, (x, a, gate))


def plain_lora(x, weight, a, b, bias, gate):
    t = 0.7 * (x @ a.t())
    t = (t if gate is None else t * gate).to(x.dtype)
    return (x @ weight.t() + t @ b.t() + (0 if bias is None else bias),)


@given(
    M=st.integers(1, 64), K=st.sampled_from((1, 8, 33, 256, 520)), N=st.sampled_from((1, 31, 65)),
    R=st.sampled_from((1, 8, 17, 64)), dtype=st.sampled_from(HALF),
    kinds=st.tuples(layouts, layouts), bias=st.booleans(), gate=st.booleans(),
    splits_at=st.sampled_from((None, 128)),
)  # fmt: skip
@fuzz(40)
def test_decode(M, K, N, R, dtype, kinds, bias, gate, splits_at):
    from fused_lora.cuda_kernels import decode

    x, weight = put((M, K), kinds[0], dtype), put((N, K), kinds[1], dtype, K**-0.5)
    a, b = put((R, K), dtype=dtype, std=K**-0.5), put((N, R), dtype=dtype)
    bias, gate = put((N,), dtype=dtype) if bias else None, put((R,)) if gate else None
    y = decode(x, weight, a, b, bias, scale=0.7, gate=gate, splits_at=splits_at)
    assert_accurate("y", (y,), plain_lora, (x, weight, a, b, bias, gate))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("M", [1, 16, 17, 32, 33, 64])
def test_decoding_is_chosen_for_few_rows(kernels, monkeypatch, M, dtype):
    x, weight, a, b = (put(s, dtype=dtype) for s in ((M, 40), (33, 40), (4, 40), (33, 4)))
    calls = []
    decode = kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda *a, **k: calls.append(M) or decode(*a, **k))
    fl.lora_linear(x, weight, a, b, scale=0.7, backend="cuda")
    assert calls == [M]
    fl.lora_linear(x.repeat(65, 1), weight, a, b, scale=0.7, backend="cuda")
    fl.lora_linear(x, weight, a, b, scale=0.7, dropout_p=0.5, backend="cuda")
    fl.lora_linear(x, weight, a, b.clone().requires_grad_(), scale=0.7, backend="cuda")
    assert calls == [M]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M, dtype", [(9, torch.bfloat16), (64, torch.float16), (9, torch.float32)])
def test_decoding_of_many_adapters(kind, M, dtype):
    tensors = make(M, 300, 70, RAGGED, dtype=dtype)
    ids = ids_of(kind, M, len(RAGGED))

    def plain(x, weight, bias, *rest):
        bank = slots_of([x, weight, bias, *rest[:3], tensors[6], rest[3]])
        return (reference.multi_lora_linear(x, weight, bank, ids, bias),)

    y = fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids, tensors[2], backend="cuda")
    assert_accurate("y", (y,), plain, (*tensors[:6], tensors[7]))
    base, part = torch.zeros_like(y), put((M, 200), dtype=dtype)
    before = part.clone()
    fl.multi_lora_add_(base, tensors[0], slots_of(tensors), ids, backend="cuda")
    fl.multi_lora_add_(part, tensors[0], slots_of(tensors), ids, out_offset=100, backend="cuda")
    added = part[:, 100:170]
    for others in (slice(0, 100), slice(170, None)):
        assert torch.equal(part[:, others], before[:, others])

    def plain_add(y, x, *rest):
        zero = torch.zeros(70, x.shape[1], dtype=x.dtype, device=x.device)
        bank = slots_of([x, zero, None, *rest[:3], tensors[6], rest[3]])
        return (y + reference.multi_lora_linear(x, zero, bank, ids),)

    inputs = before[:, 100:170], tensors[0], *tensors[3:6], tensors[7]
    assert_accurate("y", (added,), plain_add, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.bfloat16), slow(torch.float32)])
@pytest.mark.parametrize("p", [slow(0.0), 0.3])
@pytest.mark.parametrize("M", [9, slow(70)])
def test_bits_do_not_depend_on_the_order_of_blocks(dtype, p, M):
    """Blocks and threads of the emulated device go in a random order; those of a GPU in any."""
    tensors = make(M, 700, 70, (3, 16, 33), dtype=dtype)
    x, weight, bias = (t.requires_grad_() for t in tensors[:3])
    dy, ids = put((M, 70), dtype=dtype), ids_of("some", M, 3)
    a, b = tensors[3][2].clone(), tensors[4][2].t().clone()

    def step():
        y = fl.multi_lora_linear(x, weight, slots_of(tensors), ids, bias, dropout_p=p, seed=5,
                                 backend="cuda")  # fmt: skip
        z = fl.lora_linear(x, weight, a, b, bias, scale=0.5, dropout_p=p, seed=5, backend="cuda")
        with torch.no_grad():
            few = fl.lora_linear(x, weight, a, b, bias, scale=0.5, backend="cuda")
        grads = *torch.autograd.grad(y, (x, weight), dy), *torch.autograd.grad(z, x, dy)
        return [y, z, few, *grads]

    first = step()
    for _ in range(3 if DEVICE == "cpu" else 250):
        assert all(torch.equal(u, v) for u, v in zip(first, step(), strict=True))


@dtypes
def test_a_row_does_not_depend_on_the_others(dtype):
    tensors = make(40, 130, 33, RAGGED, dtype=dtype)
    ids = ids_of("some", 40, 7)

    def rows(ids, M):
        x = tensors[0][:M]
        y = fl.multi_lora_linear(x, tensors[1], slots_of(tensors), ids[:M], dropout_p=0.3, seed=2,
                                 backend="cuda")  # fmt: skip
        few = fl.multi_lora_linear(x, tensors[1], slots_of(tensors), ids[:M], backend="cuda")
        return y, few

    want = rows(ids, 40)
    for others in (torch.full_like(ids, -1), torch.full_like(ids, 3), ids.flip(0)):
        mixed = torch.where(torch.arange(40, device=DEVICE) % 3 == 0, ids, others)
        for got, expected in zip(rows(mixed, 40), want, strict=True):
            assert torch.equal(got[::3], expected[::3])


def test_counters_are_left_at_zero(kernels, monkeypatch):
    made = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(kernels, "_zeroed_counters", lambda blocks, device: made)
    x, weight, a, b = (
        put(s, dtype=torch.float16) for s in ((3, 900), (70, 900), (4, 900), (70, 4))
    )
    first = kernels.decode(x, weight, a, b, splits_at=128)
    assert not made.any()
    assert torch.equal(kernels.decode(x, weight, a, b, splits_at=128), first)


@given(seed=seeds, p=st.sampled_from(DROPOUTS))
@fuzz(10)
def test_the_backward_drops_what_the_forward_dropped(seed, p):
    """dA from ones counts the kept elements of each column, and its bits are the mask."""
    from fused_lora.cuda_kernels import row_reduce_x

    seed = torch.tensor([seed], device=DEVICE)
    bits = torch.empty(77, 5, dtype=torch.uint8, device=DEVICE)
    x, dh = torch.ones(77, 35, device=DEVICE), torch.ones(77, 1, device=DEVICE)
    dropout = seed, reference.dropout_threshold(p), 1.0
    da = row_reduce_x(x, dh, dropout=dropout, bits=bits)
    keep = reference.dropout_mask(seed, 77, 35, p)
    assert torch.equal(da[0], keep.sum(0).float())


class Watch:
    """Of the emulated device: how many bytes of a tensor the calls within read."""

    def __init__(self, t: torch.Tensor):
        self.library = ctypes.CDLL(os.environ["FUSED_LORA_EMULATED"])
        self.library.emulator_bytes_read.restype = ctypes.c_uint64
        self.library.emulator_bank_conflicts.restype = ctypes.c_uint64
        self.first, self.size = t.data_ptr(), t.numel() * t.itemsize

    def __enter__(self):
        first = ctypes.c_void_p(self.first)
        self.library.emulator_watch(first, ctypes.c_void_p(self.first + self.size))
        return self

    def __exit__(self, *error):
        pass

    @property
    def bytes(self) -> int:
        return self.library.emulator_bytes_read()

    @property
    def times(self) -> float:
        return self.bytes / self.size

    @property
    def bank_conflicts(self) -> int:
        return self.library.emulator_bank_conflicts()


emulated_only = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU ncu counts")


@emulated_only
@dtypes
def test_large_operands_are_read_once(kernels, dtype):
    """By shrink, by row_reduce, which makes two products of one read, and by decode at any M."""
    M, K, N, R = 200, 640, 384, 16
    x, dy, h = (put(s, dtype=dtype) for s in ((M, K), (M, N), (M, R)))
    a, b = put((R, K), dtype=dtype), put((N, R), dtype=dtype)
    weight = put((N, K), dtype=dtype)
    with Watch(x) as watch:
        kernels.shrink(x, a, save_h=True)
    assert watch.times == 1
    with Watch(dy) as watch:
        kernels.row_reduce_dy(dy, b, h, scale=1.0, need_dgate=True)
    assert watch.times == 1
    with Watch(x) as watch:
        kernels.row_reduce_x(x, h)
    assert watch.times == 1
    with Watch(weight) as watch:
        kernels.segment_gemm([(x[:64], weight), (h[:64], b)], block_m=64)
    assert watch.times == 1
    if dtype != torch.float32:
        for rows in (1, 17, 64):
            with Watch(weight) as watch:
                kernels.decode(x[:rows], weight, a, b)
            assert watch.times == 1


@emulated_only
@pytest.mark.parametrize("kind", ["different", "equal", "none"])
def test_slots_are_read_up_to_their_ranks(kind):
    """Decoding reads a row's own slot and no more, and tiles the adapters that are present."""
    for M in (7, 80):
        tensors = make(M, 512, 64, RAGGED, dtype=torch.float16)
        ids, ranks = ids_of(kind, M, 7), torch.tensor(RAGGED)
        with Watch(tensors[3]) as watch:
            fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids, backend="cuda")
        rows = torch.bincount(ids[ids >= 0], minlength=7)
        reads = rows if M <= 64 else -(-rows // 64)
        want = (reads * ranks * 512 * 2).sum().item()
        assert watch.bytes == want


@emulated_only
def test_t_of_a_row_is_read_for_its_own_adapter(kernels):
    """However many adapters a tile has, and none of what lies past a rank."""
    M, N, ranks = 70, 64, (8, 72, 16)
    tensors = make(M, 40, N, ranks, dtype=torch.float16)
    ids = ids_of("some", M, 3)
    t = torch.randn(M, 72, dtype=torch.float16)
    slots = Slots(*slots_of(tensors), torch.arange(3, dtype=torch.int32))
    with Watch(t) as watch:
        kernels.multi_segment_gemm(
            *tensors[:2], t, slots.bt_slots, slots, fl.AdapterRouting(ids, 3), block_m=64
        )
    assert watch.bytes == 2 * torch.tensor(ranks)[ids[ids >= 0]].sum().item()


@emulated_only
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_two_rows_of_an_ldmatrix_share_a_bank(dtype):
    tensors = [put(s, dtype=dtype) for s in ((70, 200), (130, 200), (17, 200), (130, 17))]
    tensors = [t.requires_grad_() for t in tensors]
    with Watch(tensors[0]) as watch:
        for p in (0.0, 0.3):
            y = fl.lora_linear(*tensors, scale=0.5, dropout_p=p, backend="cuda")
            torch.autograd.grad(y, tensors, torch.ones_like(y))
        few = [tensors[0], tensors[1], tensors[2][:8], tensors[3][:, :8]]
        y = fl.lora_linear(*few, scale=0.5, backend="cuda")
        torch.autograd.grad(y, few, torch.ones_like(y))
    assert watch.bank_conflicts == 0 and watch.times > 0


BAD = {
    "shrink: span must be a multiple": lambda ops, t: ops.shrink_cuda(
        t, t, None, [], None, 1.0, 1.0, 0, 0, 1, 1, 7, None, None, None
    ),
    "segment_gemm: there must be as many": lambda ops, t: ops.segment_gemm_cuda(
        [t], [], -1, [], None, None, None, 0, 1.0, t, 64
    ),
    "segment_gemm: there are no tiles of 32": lambda ops, t: ops.segment_gemm_cuda(
        [t], [t], -1, [], None, None, None, 0, 1.0, torch.empty(4, 4, device=DEVICE), 32
    ),
    "segment_gemm: a right operand has another": lambda ops, t: ops.segment_gemm_cuda(
        [t], [t.half()], -1, [], None, None, None, 0, 1.0, torch.empty(4, 4, device=DEVICE), 64
    ),
    "row_reduce: rows, w or u": lambda ops, t: ops.row_reduce_cuda(
        t, t, t, [], None, 0, 0, 1, None, 64, torch.empty(1, 8, 8, device=DEVICE), None
    ),
    "row_reduce: planes are of other rows": lambda ops, t: ops.row_reduce_cuda(
        t, t, None, [], None, 0, 0, 1, None, 64, torch.empty(2, 8, 8, device=DEVICE), None
    ),
    "sum_rows: neither h nor t": lambda ops, t: ops.sum_rows_cuda(
        t[None], None, [], 1.0, None, None
    ),
    "sum_columns: rows, w or dot": lambda ops, t: ops.sum_columns_cuda(
        t[None], 4, 0, None, [], 1.0, 1.0, False, None, t[None], None
    ),
    "decode: at most 64 rows, got 65": lambda ops, t: ops.decode_cuda(
        t.new_empty(65, 8), None, t, None, [], 1.0, t[None], None, t.new_empty(65, 8), 0, None, None
    ),
    "decode: the base product is for float16": lambda ops, t: ops.decode_cuda(
        t, t.new_empty(8, 8), t.new_empty(2, 8), None, [], 1.0, t.new_empty(1, 4, 2), None,
        t.new_empty(4, 8), 32, None, None,
    ),
    "decode_shrink: span must be": lambda ops, t: ops.decode_shrink_cuda(t, t, [], 8, t[None]),
    "dropout_bits: bits has another dtype": lambda ops, t: ops.dropout_bits_cuda(
        torch.zeros(1, dtype=torch.int64, device=DEVICE), 3, 0, 1, t
    ),
    "the dtype must be float32": lambda ops, t: ops.shrink_cuda(
        t.double(), t.double(), None, [], None, 1.0, 1.0, 0, 0, 1, 1, 32, None, None, None
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bindings_refuse(message):
    with pytest.raises(RuntimeError, match=message):
        BAD[message](torch.ops.fused_lora, torch.zeros(4, 8, device=DEVICE))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU compute-sanitizer looks")
def test_no_sanitizer_complains():
    """The kernels' host code and device code under AddressSanitizer and UBSan, on every path."""
    library = emulated.build(flags=emulated.SANITIZE)
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    code = (Path(__file__).parent / "emulator" / "every_kernel.py").read_text()
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "LD_PRELOAD": ":".join(r.stdout.strip() for r in runtime),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "FUSED_LORA_EMULATED": str(library),
            "PYTHONPATH": str(Path(fl.__file__).parent.parent),
        },
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    assert found.stdout.strip() == "all kernels ran"
