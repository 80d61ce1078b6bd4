"""segment_gemm for compute capability 9.0 against fp64. On a CPU the kernel runs on an emulated
machine that has TMA, wgmma, mbarriers and clusters (emulator/hopper.h)."""

import ctypes
import os
from typing import NamedTuple

import emulated
import pytest
import torch
from cases import CUDA_REFUSES, fuzz, slow
from conftest import DEVICE
from fused_lora.bench import hopper_cuda
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_kernels import Watch, emulated_only

import fused_lora as fl
from fused_lora import reference
from fused_lora.testing import assert_accurate, guarded


def refuses() -> str | None:
    if CUDA_REFUSES is not None:
        return str(CUDA_REFUSES)
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        return "the Hopper kernel needs compute capability 9.0"
    return None


pytestmark = pytest.mark.skipif(refuses() is not None, reason=str(refuses()))
HALF = (torch.float16, torch.bfloat16)
TILES = (128, 256), (128, 192), (256, 128)
tiles = pytest.mark.parametrize("tile", TILES, ids=str)


@pytest.fixture
def kernels():
    from fused_lora import cuda_kernels

    assert cuda_kernels.HOPPER_TILES == TILES
    return cuda_kernels


def put(rows, cols, dtype=torch.bfloat16, std=1.0, turned=False):
    """A matrix whose rows, or columns where it is turned, are on 16 bytes, with NaN around them."""
    if turned:
        return put(cols, rows, dtype, std).t()
    wide = guarded((rows, -(-cols // 8) * 8), dtype=dtype, device=DEVICE, std=std)
    wide[:, cols:] = float("nan")
    return wide[:, :cols]


def run(kernels, segments, **options):
    """hopper_segment_gemm; what the emulated machine finds wrong is the kernel's failure."""
    try:
        return kernels.hopper_segment_gemm(segments, **options)
    except RuntimeError as error:
        if "emulator: " in str(error):
            pytest.fail(str(error))
        raise


def check(kernels, M, N, widths, tile, turned=(), dtype=torch.bfloat16, bias=False):
    segments = [
        (put(M, K, dtype), put(N, K, dtype, K**-0.5, turned=i in turned))
        for i, K in enumerate(widths)
    ]
    bias = guarded((N,), dtype=dtype, device=DEVICE) if bias else None
    y = run(kernels, segments, bias=bias, tile=tile)

    def plain(bias, *operands):
        pairs = zip(operands[::2], operands[1::2], strict=True)
        y = sum(left @ right.t() for left, right in pairs)
        return (y if bias is None else y + bias,)

    assert_accurate("y", (y,), plain, (bias, *(t for pair in segments for t in pair)))


@tiles
@pytest.mark.parametrize("dtype", [slow(torch.float16), torch.bfloat16])
@pytest.mark.parametrize("turned", [(), (0, 1)], ids=["forward", "dx"])
def test_linear_and_adapter(kernels, tile, dtype, turned):
    """One tile of the cluster is cut at both edges, and each block has several."""
    check(kernels, 3 * tile[0] + 9, 2 * tile[1] + 40, (200, 24), tile, turned, dtype)


@tiles
@pytest.mark.parametrize(
    "M, N, widths",
    [(1, 1, (1,)), (1, 8, (64, 1)), (63, 65, (65, 7)), (129, 257, (15, 17)), (2, 300, (640, 3))],
    ids=str,
)
def test_odd_shapes(kernels, tile, M, N, widths):
    check(kernels, M, N, widths, tile, bias=True)
    check(kernels, M, N, widths, tile, turned=(0, 1), bias=True)


@given(
    M=st.integers(1, 400), N=st.integers(1, 400), tile=st.sampled_from(TILES), bias=st.booleans(),
    widths=st.lists(st.integers(1, 200), min_size=1, max_size=4), dtype=st.sampled_from(HALF),
    turned=st.sets(st.integers(0, 3)),
)  # fmt: skip
@fuzz(12)
def test_any_segments(M, N, tile, bias, widths, dtype, turned):
    from fused_lora import cuda_kernels

    check(cuda_kernels, M, N, widths, tile, turned, dtype, bias)


@tiles
def test_many_steps_go_around_the_ring(kernels, tile):
    check(kernels, 40, 264, (1500, 16), tile)
    check(kernels, 40, 264, (1500, 16), tile, turned=(0, 1))


def test_eight_segments(kernels):
    """dx of three projections and a gate: base and adapter of each, into one accumulator."""
    check(kernels, 70, 130, (72, 8) * 4, (128, 192), turned=range(8))


@tiles
@pytest.mark.parametrize("M, N", [(70, 40), (150, 333)])
def test_masked_dx(kernels, tile, M, N):
    """D ⊙ (dh A) + dy W0, with the mask after the first segment."""
    K, R, p = 100, 9, 0.3
    dh, dy = put(M, R), put(M, K)
    a, weight = put(N, R, turned=True), put(N, K, std=K**-0.5, turned=True)
    keep = torch.rand(M, N, device=DEVICE) >= p
    scale = reference.dropout_scale(p)
    bits = torch.zeros(M, -(-N // 8) * 8, dtype=torch.int32, device=DEVICE)
    bits[:, :N] = keep
    powers = 2 ** torch.arange(8, dtype=torch.int32, device=DEVICE)
    bits = (bits.view(M, -1, 8) * powers).sum(2).to(torch.uint8)

    def plain(dh, a, dy, weight):
        return (torch.where(keep, dh @ a.t(), 0) * scale + dy @ weight.t(),)

    segments = [(dh, a), (dy, weight)]
    dx = run(kernels, segments, mask=(bits, scale, 1), tile=tile)
    assert_accurate(("dx",), (dx,), plain, (dh, a, dy, weight))


@pytest.mark.parametrize("M, N, K", [(0, 8, 8), (8, 0, 8), (8, 8, 0)], ids=str)
def test_nothing_to_add_up(kernels, M, N, K):
    x, weight = (torch.randn(s, dtype=torch.float16, device=DEVICE) for s in ((M, K), (N, K)))
    bias = torch.randn(N, dtype=torch.float16, device=DEVICE)
    y = kernels.hopper_segment_gemm([(x, weight)], bias=bias)
    assert torch.equal(y, bias.expand(M, N))


def test_a_base_of_any_strides_and_nine_segments(kernels):
    """Two launches, the second onto the first one's result; the mask is the first one's."""
    for M, N, turned in ((70, 136, False), (65, 77, True)):
        base = put(M, N, turned=turned)
        before, bits = base.clone(), torch.randint(256, (M, -(-N // 8)), dtype=torch.uint8)
        bits = bits.to(DEVICE)
        keep = ((bits[:, :, None] >> torch.arange(8, device=DEVICE)) & 1).bool()
        keep = keep.reshape(M, -1)[:, :N]
        segments = [(put(M, k), put(N, k, std=k**-0.5)) for k in (72, 8, 8, 8, 8, 8, 8, 8, 24)]

        def plain(base, *operands, keep=keep):
            pairs = zip(operands[::2], operands[1::2], strict=True)
            y = torch.zeros_like(base)
            for i, (left, right) in enumerate(pairs):
                y = y + left @ right.t()
                if i == 1:
                    y = torch.where(keep, 2.0 * y, 0)
            return (y + base,)

        y = run(kernels, segments, base=base, mask=(bits, 2.0, 2))
        assert_accurate("y", (y,), plain, (base, *(t for pair in segments for t in pair)))
        assert torch.equal(base, before)


def test_is_taken_where_it_is_asked_for_alone(kernels, monkeypatch):
    x, weight, t, b = put(70, 136), put(72, 136), put(70, 16), put(72, 16)
    segments, taken = [(x, weight), (t, b)], []
    own = kernels.hopper_segment_gemm
    monkeypatch.setattr(
        kernels, "hopper_segment_gemm", lambda *a, **k: taken.append(k) or own(*a, **k)
    )
    portable = kernels.segment_gemm(segments)
    assert kernels.FORM is None and not taken
    asked = kernels.segment_gemm(segments, block_m="sm90", early=1)
    assert taken.pop()["early"] == 1
    assert torch.equal(asked, own(segments)) and (asked - portable).abs().max() < 0.1
    monkeypatch.setattr(kernels, "FORM", kernels.checked_form("sm90"))
    assert torch.equal(kernels.segment_gemm(segments), asked) and taken.pop()
    a, weight = put(16, 136), put(72, 136).requires_grad_()
    y = fl.lora_linear(x.requires_grad_(), weight, a, b, scale=0.5, backend="cuda")
    y.backward(put(70, 72))
    assert [options["early"] for options in taken] == [1, 1]
    assert kernels.checked_form("") is None
    with pytest.raises(ValueError, match="FUSED_LORA_CUDA_GEMM must be 'sm90' or not set, got 's'"):
        kernels.checked_form("s")


def test_bits_do_not_depend_on_the_order_of_events(kernels):
    operands = put(300, 200), put(400, 200, turned=True), put(300, 16), put(400, 16)
    segments = [operands[:2], operands[2:]]
    first = kernels.hopper_segment_gemm(segments)
    for _ in range(3 if DEVICE == "cpu" else 250):
        assert torch.equal(first, kernels.hopper_segment_gemm(segments))


def ones(*shape):
    return torch.ones(shape, dtype=torch.float16, device=DEVICE)


REFUSED = {
    "the Hopper kernel multiplies float16 and bfloat16, got torch.float32": lambda: (
        [(ones(4, 8).float(), ones(4, 8).float())]
    ),
    "the left operand of segment 0 has shape (4, 9), strides (9, 1)": lambda: (
        [(ones(4, 9), ones(4, 9))]
    ),
    "the right operand of segment 1 has shape (9, 9), strides (9, 1)": lambda: (
        [(ones(4, 8), ones(9, 8)), (put(4, 9, torch.float16), ones(9, 9))]
    ),
    "strides (1, 8)": lambda: [(ones(8, 8).t(), ones(8, 8))],
    "its data begins 2 bytes off": lambda: [(ones(65)[1:].view(8, 8), ones(8, 8))],
    "strides (0, 1)": lambda: [(ones(8).expand(4, 8), ones(8, 8))],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_says_what_it_refuses(kernels, sentence):
    segments = REFUSED[sentence]()
    reason = kernels.hopper_refuses(segments)
    assert sentence in reason
    with pytest.raises(ValueError) as raised:
        kernels.hopper_segment_gemm(segments)
    assert str(raised.value) == reason
    with pytest.warns(UserWarning, match="the form 'sm90' is not taken: ") as warned:
        y = kernels.segment_gemm(segments, block_m="sm90")
    assert str(warned[0].message).endswith(reason)
    assert torch.equal(y, kernels.segment_gemm(segments)) and y.any()


class Sized(NamedTuple):
    """What hopper_refuses looks at of a matrix that no memory holds."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    dtype: torch.dtype = torch.float16
    device: torch.device = torch.device("cpu")
    itemsize: int = 2

    def stride(self):
        return self.strides

    def data_ptr(self):
        return 0

    def t(self):
        return Sized(self.shape[::-1], self.strides[::-1])


def test_coordinates_have_32_bits(kernels):
    """A tile that begins past the end of a matrix has coordinates too."""
    largest, narrow = kernels.MAX_SIZE, Sized((8, 8), (8, 1))
    long = Sized((largest, 8), (8, 1))
    assert kernels.hopper_refuses([(long, narrow)]) is None
    longer, wide = Sized((largest + 1, 8), (8, 1)), Sized((8, largest + 1), (largest + 1025, 1))
    assert f"up to {largest}, got {largest + 1}" in kernels.hopper_refuses([(longer, narrow)])
    assert "the left operand of segment 0" in kernels.hopper_refuses([(wide, wide)])


BAD = {
    "there must be as many": lambda t: ([t], [], 128, 256),
    "an operand must be a matrix": lambda t: ([t], [t[None]], 128, 256),
    "there are no tiles of 64x64": lambda t: ([t], [t], 64, 64),
    "the dtype must be float16 or bfloat16": lambda t: ([t.float()], [t.float()], 128, 256),
    "the rows of a left operand must be": lambda t: ([t.t()], [t], 128, 256),
    "the rows or the columns of a right": lambda t: ([t[:, :4]], [t[:, ::2]], 128, 256),
}


@pytest.mark.parametrize("message", BAD)
def test_the_binding_refuses(kernels, message):
    lefts, rights, block_m, block_n = BAD[message](torch.zeros(8, 8, device=DEVICE).half())
    y = torch.zeros(8, 8, dtype=lefts[0].dtype, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"segment_gemm_sm90: {message}"):
        torch.ops.fused_lora.segment_gemm_sm90_cuda(
            lefts, rights, None, None, None, 0, 1.0, y, block_m, block_n, 1
        )


@emulated_only
def test_two_blocks_share_what_both_need(kernels):
    """A cluster reads each byte of both operands once, by its rows and as it lies."""
    for tile, (M, N) in {(128, 256): (256, 256), (256, 128): (256, 256)}.items():
        for turned in (False, True):
            x, weight = put(M, 128), put(N, 128, turned=turned)
            for operand in (x, weight):
                with Watch(operand if operand.stride(1) == 1 else operand.t()) as watch:
                    kernels.hopper_segment_gemm([(x, weight)], tile=tile)
                assert watch.times == 1 and watch.bank_conflicts == 0


@emulated_only
def test_sums_are_exact_on_grids_of_any_size(tmp_path):
    found = emulated.run_program("hopper_sums", emulated.CSRC, tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr


class Late:
    """Of the emulated device: what the kernel ahead is still writing when the next one begins."""

    def __init__(self, t: torch.Tensor):
        self.library = ctypes.CDLL(os.environ["FUSED_LORA_EMULATED"])
        self.ends = t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize

    def __enter__(self):
        self.library.emulator_late(*map(ctypes.c_void_p, self.ends))

    def __exit__(self, *error):
        self.library.emulator_late(None, None)


@emulated_only
@tiles
def test_the_adapter_is_waited_for(kernels, tile):
    x, weight, t, b = put(300, 136), put(400, 136), put(300, 16), put(400, 16)
    segments = [(x, weight), (t, b)]
    want = kernels.hopper_segment_gemm(segments, tile=tile)
    with Late(t):
        assert torch.equal(run(kernels, segments, tile=tile, early=1), want)
        with pytest.raises(RuntimeError, match="read before it has ended"):
            kernels.hopper_segment_gemm(segments[::-1], tile=tile, early=1)
        bits = torch.full((300, 50), 255, dtype=torch.uint8)
        masked = run(kernels, segments[::-1], tile=tile, early=1, mask=(bits, 1.0, 2))
        assert (masked.float() - want.float()).abs().max() < 0.1


@pytest.mark.skipif(DEVICE != "cuda", reason="grids overlap on a GPU alone")
def test_overlaps_the_shrink_ahead_of_it(kernels):
    x, weight, a, b = (put(*s) for s in ((4096, 4096), (4096, 4096), (16, 4096), (4096, 16)))
    want = kernels.hopper_segment_gemm([(x, weight), (kernels.shrink(x, a)[0], b)])
    for _ in range(200):
        t, _ = kernels.shrink(x, a)
        y = kernels.hopper_segment_gemm([(x, weight), (t, b)], early=1)
        assert torch.equal(y, want)


def test_the_benchmark_finds_what_is_wrong(kernels, monkeypatch):
    cases = hopper_cuda.SMALL[:1] + hopper_cuda.SMALL[4:5] + hopper_cuda.SMALL[6:7]
    assert {case.form for case in cases} == set(hopper_cuda.FORMS)
    device = torch.device(DEVICE)
    found = hopper_cuda.numerics(cases, device, 1)
    assert len(found) == 9 and not any(row["why"] for row in found), found
    own = kernels.hopper_segment_gemm
    monkeypatch.setattr(kernels, "hopper_segment_gemm", lambda *a, **k: own(*a, **k) * 1.25)
    assert all("AssertionError" in row["why"] for row in hopper_cuda.numerics(cases, device, 0))


def test_the_benchmark_times_every_contender(monkeypatch):
    monkeypatch.setattr(hopper_cuda, "ROUNDS", 2)
    seconds = iter(range(1, 1000))
    found = hopper_cuda.times(
        hopper_cuda.SMALL[:1], torch.device(DEVICE), lambda work: work() is None or next(seconds)
    )
    assert len(found[0]["us"]) == 11 and "forward M=1 64x64 r=8" in hopper_cuda.table(found)


@pytest.mark.skipif(DEVICE != "cpu", reason="where there is no GPU")
def test_the_benchmark_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        hopper_cuda.main([])
    assert "torch sees no CUDA device" in capsys.readouterr().err
