"""lora_embedding, forward and backward, in every backend, held to reference.lora_embedding."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, dtypes, fuzz, layouts
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

import fused_lora as fl
from fused_lora.testing import assert_accurate, guarded, saved_bytes

NAMES = ("weight", "lora_a", "lora_b")
SCALE = 1.3
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def make(shape=(3, 9), V=20, D=12, R=3, *, dtype=torch.float32, layout="contiguous"):
    """(ids, [weight, lora_a, lora_b]) in NaN guard bands."""
    ids = torch.randint(V, shape, device=DEVICE)
    shapes = (V, D), (R, V), (D, R)
    return ids, [guarded(shape, layout, dtype=dtype, device=DEVICE) for shape in shapes]


def leaves(tensors, needs=(True,) * 3):
    return [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]


def run(fn, ids, tensors, dy=None, **kwargs):
    y = fn(ids, *tensors, scale=SCALE, **kwargs)
    dy = torch.ones_like(y) if dy is None else dy
    return [y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)]


def check_against_fp64(ids, tensors, dy, backend):
    def plain(*inputs):
        return run(fl.reference.lora_embedding, ids, inputs[:3], inputs[3])

    ours = run(fl.lora_embedding, ids, tensors, dy, backend=backend)
    assert_accurate(("y", "dweight", "da", "db"), ours, plain, (*tensors, dy))


@backends
@given(
    M=st.sampled_from((0, 1, 2, 31, 65, 130)), V=st.sampled_from((1, 2, 33)),
    D=st.sampled_from((1, 7, 64, 65, 130)), R=st.sampled_from((1, 3, 16, 17, 65)),
    dtype=dtypes, layout=layouts, dy_layout=layouts,
)  # fmt: skip
@fuzz(15)
def test_any_shape(backend, M, V, D, R, dtype, layout, dy_layout):
    ids, tensors = make((M,), V, D, R, dtype=dtype, layout=layout)
    dy = guarded((M, D), dy_layout, dtype=dtype, device=DEVICE)
    check_against_fp64(ids, leaves(tensors), dy, backend)


@backends
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.uint8])
def test_shapes_and_dtypes_of_ids(backend, shape, ids_dtype):
    ids, tensors = make(shape)
    dy = guarded((*shape, 12), device=DEVICE)
    check_against_fp64(ids.to(ids_dtype), leaves(tensors), dy, backend)


@backends
def test_it_is_the_merged_table(backend):
    ids, (weight, a, b) = make()
    merged = weight + SCALE * (b @ a).t()
    y = fl.lora_embedding(ids, weight, a, b, scale=SCALE, backend=backend)
    torch.testing.assert_close(y, F.embedding(ids, merged))


@backends
def test_words_that_are_not_there_have_no_gradient(backend):
    _, tensors = make()
    ids = torch.tensor([3, 3, 5], device=DEVICE)
    dw, da, _ = run(fl.lora_embedding, ids, leaves(tensors), backend=backend)[1:]
    present = torch.zeros(20, dtype=torch.bool, device=DEVICE)
    present[[3, 5]] = True
    assert torch.equal(dw.any(1), present) and torch.equal(da.any(0), present)


@backends
def test_the_padding_word_has_no_gradient(backend):
    """Its rows of the tables, that is: it is read like any other word, and B learns from it."""
    _, tensors = make()
    ids = torch.tensor([3, 3, 5, 0], device=DEVICE)
    dy = guarded((4, 12), device=DEVICE)
    ours, want = (
        run(fn, ids, leaves(tensors), dy, padding_idx=3, **options)
        for fn, options in (
            (fl.lora_embedding, {"backend": backend}),
            (fl.reference.lora_embedding, {}),
        )
    )
    for got, same in zip(ours, want, strict=True):
        torch.testing.assert_close(got, same)
    trained = run(fl.lora_embedding, ids, leaves(tensors), dy, backend=backend)
    assert not ours[1][3].any() and not ours[2][:, 3].any()
    assert trained[1][3].all() and trained[2][:, 3].all() and torch.equal(ours[3], trained[3])


@backends
def test_a_frequent_word_is_added_in_fp32(backend):
    """2048 and many halves: in fp16 each of them would be lost."""
    ids = torch.zeros(100, dtype=torch.int64, device=DEVICE)
    weight, b = torch.zeros(2, 1, device=DEVICE).half(), torch.ones(1, 1, device=DEVICE).half()
    a = torch.zeros(1, 2, device=DEVICE).half().requires_grad_()
    dy = torch.full((100, 1), 0.5, device=DEVICE).half()
    dy[0] = 2048
    y = fl.lora_embedding(ids, weight, a, b, scale=1.0, backend=backend)
    (da,) = torch.autograd.grad(y, a, dy)
    assert da.tolist() == [[torch.tensor(2048 + 99 / 2).half().item(), 0.0]]


@backends
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_only_the_gradients_asked_for(backend, needs):
    ids, tensors = make()
    dy = guarded((3, 9, 12), device=DEVICE)
    everything = run(fl.lora_embedding, ids, leaves(tensors), dy, backend=backend)
    some = run(fl.lora_embedding, ids, leaves(tensors, needs), dy, backend=backend)
    expected = [everything[0], *itertools.compress(everything[1:], needs)]
    for got, want in zip(some, expected, strict=True):
        torch.testing.assert_close(got, want)
    grads = torch.ops.fused_lora.lora_embedding_backward(
        dy, ids, *tensors, SCALE, -1, needs, backend
    )
    assert [g.numel() > 0 for g in grads] == list(needs)


def test_gradcheck():
    ids, tensors = make((4,), 5, 4, 2, dtype=torch.float64)
    fn = lambda *t: fl.lora_embedding(ids, *t, scale=SCALE, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(fn, leaves(tensors))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_masters(backend, dtype):
    if backend == "triton" and dtype not in DTYPES:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    ids, (weight, a, b) = make((33,), dtype=dtype)
    tensors = leaves([weight, a.float(), b.float()])
    check_against_fp64(ids, tensors, guarded((33, 12), dtype=dtype, device=DEVICE), backend)
    ours = run(fl.lora_embedding, ids, tensors, backend=backend)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]


@backends
def test_bitwise_repeatable_and_inputs_untouched(backend):
    ids, tensors = make((100,), 4)
    tensors, dy = leaves(tensors), guarded((100, 12), device=DEVICE)
    before = [t.detach().clone() for t in tensors]
    runs = [run(fl.lora_embedding, ids, tensors, dy, backend=backend) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(u, v) for u, v in zip(again, runs[0], strict=True))
    assert all(torch.equal(u, v) for u, v in zip(tensors, before, strict=True))


def test_saved_bytes():
    ids, tensors = make((50,))
    weight, a, b = leaves(tensors, (False, True, True))
    size, _ = saved_bytes(lambda: fl.lora_embedding(ids, weight, a, b, scale=1.0))
    assert size == 8 * 50 + 4 * (20 * 12 + 3 * 20 + 12 * 3)


@backends
def test_scale_tensor(backend):
    ids, tensors = make()
    weight, a, b = leaves(tensors)
    scale = torch.tensor(SCALE, device=DEVICE, requires_grad=True)
    dy = guarded((3, 9, 12), device=DEVICE)
    y = fl.lora_embedding(ids, weight, a, b, scale=scale, backend=backend)
    plain = fl.reference.lora_embedding(ids, weight, a, b, scale=scale)
    ours, want = (torch.autograd.grad(out, (scale, a, b), dy) for out in (y, plain))
    torch.testing.assert_close(ours, want)


def test_opcheck():
    ids, tensors = make()
    args = (ids, *tensors, SCALE, "torch")
    torch.library.opcheck(torch.ops.fused_lora.lora_embedding.default, args)
    dy = torch.randn(3, 9, 12, device=DEVICE)
    for needs in ([True] * 3, [False, True, False]):
        args = (dy, ids, *tensors, SCALE, 3, needs, "torch")
        torch.library.opcheck(torch.ops.fused_lora.lora_embedding_backward.default, args)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(fl.lora_embedding, backend="aot_eager", fullgraph=True, dynamic=True)
    for M in (5, 6):
        ids, tensors = make((M,))
        tensors, dy = leaves(tensors), guarded((M, 12), device=DEVICE)
        ours = run(compiled, ids, tensors, dy)
        eager = run(fl.lora_embedding, ids, tensors, dy)
        assert all(torch.equal(u, v) for u, v in zip(ours, eager, strict=True))


@backends
def test_autocast_leaves_it_alone(backend):
    ids, tensors = make()
    tensors = leaves(tensors)
    plain = run(fl.lora_embedding, ids, tensors, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = run(fl.lora_embedding, ids, tensors, backend=backend)
    assert all(torch.equal(u, v) for u, v in zip(ours, plain, strict=True))


def test_meta_tensors_go_through_the_fake():
    ids, tensors = make()
    y = fl.lora_embedding(*(t.to("meta") for t in (ids, *tensors)), scale=1.0, backend="triton")
    assert y.is_meta and y.shape == (3, 9, 12)


# Refusals


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host reads no ids")
@backends
@pytest.mark.parametrize("wrong", [-1, 20])
def test_an_id_out_of_range(backend, wrong):
    ids, tensors = make()
    ids[1, 2] = wrong
    with pytest.raises(IndexError):
        fl.lora_embedding(ids, *tensors, scale=1.0, backend=backend)


HERE = torch.empty(0, device=DEVICE).device
BAD = {
    "float ids": (
        {"ids": torch.zeros(3)},
        TypeError,
        "ids must have dtype int64, int32, int16, int8, uint8, got float32",
    ),
    "weight 1-d": (
        {"weight": torch.zeros(12)},
        ValueError,
        "weight must have shape [V, D], both at least 1, got [12]",
    ),
    "a transposed": (
        {"lora_a": torch.zeros(20, 3)},
        ValueError,
        "lora_a must have shape [R, V] = [any, 20], got [20, 3]",
    ),
    "rank 0": (
        {"lora_a": torch.zeros(0, 20), "lora_b": torch.zeros(12, 0)},
        ValueError,
        "lora_a has shape [0, 20]; the rank must be at least 1",
    ),
    "b transposed": (
        {"lora_b": torch.zeros(3, 12)},
        ValueError,
        "lora_b must have shape [D, R] = [12, 3], got [3, 12]",
    ),
    "adapter of another dtype": (
        {"lora_a": torch.zeros(3, 20).half()},
        TypeError,
        "lora_a must have dtype float32, got float16",
    ),
    "device": (
        {"lora_b": torch.zeros(12, 3, device="meta")},
        ValueError,
        f"lora_b is on meta but weight is on {HERE}; move one of them",
    ),
    "padding_idx of no word": (
        {"padding_idx": 20},
        ValueError,
        "padding_idx must lie in [0, 20), got 20",
    ),
    "padding_idx of another kind": (
        {"padding_idx": True},
        TypeError,
        "padding_idx must be an int or None, got bool",
    ),
    "scale inf": ({"scale": float("inf")}, ValueError, "scale must be finite in fp32, got inf"),
    "backend that has no kernel": (
        {"backend": "cuda"},
        RuntimeError,
        "backend 'cuda' cannot run: lora_embedding has no CUDA C++ kernel; use backend='triton' or "
        "'torch'",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case):
    change, error, message = BAD[case]
    ids, tensors = make()
    arguments = {"ids": ids, **dict(zip(NAMES, tensors, strict=True)), "scale": 1.0} | change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error) as raised:
        fl.lora_embedding(**arguments)
    assert str(raised.value).removeprefix("lora_embedding: ") == message


def test_why():
    ids, tensors = make()
    reasons = fl.why("lora_embedding", ids, *tensors, scale=2.0)
    assert next(iter(reasons)) == "torch" and "no CUDA C++ kernel" in reasons["cuda"]
