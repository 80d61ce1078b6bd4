"""dept_embedding, forward and backward, in every backend, held to reference.dept_embedding."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, dtypes, fuzz, layouts
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

import fused_lora as fl
from fused_lora.testing import assert_accurate, guarded, saved_bytes

NAMES = ("weight", "prompt", "lora_a", "lora_b")
SCALE = 1.3
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
POSITIONS = ("none", "one row", "every row")


def make(
    lead=(3,),
    L=9,
    V=20,
    D=12,
    m=2,
    S=6,
    R=3,
    *,
    dtype=torch.float32,
    layout="contiguous",
    positions="none",
    ids_dtype=torch.int64,
):
    """(ids, positions, [weight, prompt, lora_a, lora_b]), the floating ones in NaN guard bands."""
    put = functools.partial(guarded, layout=layout, dtype=dtype, device=DEVICE)
    ids = torch.randint(V, (*lead, L), device=DEVICE).to(ids_dtype)
    shape = {"none": None, "one row": (L,), "every row": (*lead, L)}[positions]
    if shape is not None:  # some below 0, some past the last
        positions = torch.randint(-2, S + 3, shape, device=DEVICE)
    prompt = put((m, D)) if m else None
    return (
        ids,
        None if shape is None else positions,
        [put((V, D)), prompt, put((S, R)), put((R, D))],
    )


def leaves(tensors, needs=(True,) * 4):
    return [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]


def run(fn, ids, positions, tensors, dy=None, **kwargs):
    """[y, gradient of every tensor that requires one]."""
    y = fn(ids, *tensors, scale=SCALE, positions=positions, **kwargs)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    dy = torch.ones_like(y) if dy is None else dy
    return [y, *torch.autograd.grad(y, wanted, dy)]


def check_against_fp64(ids, positions, tensors, dy, backend):
    def plain(*inputs):
        return run(fl.reference.dept_embedding, ids, positions, inputs[:4], inputs[4])

    named = zip(NAMES, tensors, strict=True)
    names = ["y", *(f"d{n}" for n, t in named if t is not None and t.requires_grad)]
    ours = run(fl.dept_embedding, ids, positions, tensors, dy, backend=backend)
    assert_accurate(names, ours, plain, (*tensors, dy))


@backends
@given(
    N=st.integers(0, 4), L=st.sampled_from((0, 1, 2, 31, 33, 70)),
    D=st.sampled_from((1, 7, 64, 65, 130)), m=st.sampled_from((0, 1, 5, 33)),
    S=st.sampled_from((1, 2, 31, 40)), R=st.sampled_from((1, 3, 16, 17, 65)),
    V=st.sampled_from((1, 2, 20)), dtype=dtypes, layout=layouts, dy_layout=layouts,
    positions=st.sampled_from(POSITIONS),
    ids_dtype=st.sampled_from((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)),
)  # fmt: skip
@fuzz(20)
def test_any_shape(backend, N, L, D, m, S, R, V, dtype, layout, dy_layout, positions, ids_dtype):
    ids, positions, tensors = make(
        (N,), L, V, D, m, S, R,
        dtype=dtype, layout=layout, positions=positions, ids_dtype=ids_dtype,
    )  # fmt: skip
    dy = guarded((N, m + L, D), dy_layout, dtype=dtype, device=DEVICE)
    check_against_fp64(ids, positions, leaves(tensors), dy, backend)


@backends
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions(backend, lead, positions):
    ids, positions, tensors = make(lead, positions=positions)
    dy = guarded((*lead, 11, 12), device=DEVICE)
    check_against_fp64(ids, positions, leaves(tensors), dy, backend)


@backends
def test_strided_ids_and_positions(backend):
    ids, _, tensors = make((4,), 18)
    ids, at = ids[:, ::2], torch.arange(36, device=DEVICE).view(9, 4).t() % 8
    check_against_fp64(ids, at, leaves(tensors), guarded((4, 11, 12), device=DEVICE), backend)


@pytest.mark.parametrize("sequences", [1, 2, 5, 7])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_block_takes_several_sequences(sequences, positions):
    from fused_lora.triton_kernels.embedding import embedding

    ids, positions, (weight, prompt, a, b) = make((5,), 20, m=3, R=20, positions=positions)
    config = {"BLOCK_M": 16, "BLOCK_D": 16, "BLOCK_R": 16, "SEQUENCES": sequences}
    config |= {"num_warps": 4, "num_stages": 1}
    at = positions[None] if positions is not None and positions.ndim == 1 else positions
    options = {"scale": SCALE, "prompt": prompt, "positions": at}
    y = embedding(ids, weight, a, b, **options, config=config)
    want = fl.reference.dept_embedding(ids, weight, prompt, a, b, scale=SCALE, positions=positions)
    torch.testing.assert_close(y, want)


@backends
@pytest.mark.parametrize("positions", ["none", "every row"])
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4))[1:], ids=str)
def test_only_the_gradients_asked_for(backend, needs, positions):
    ids, positions, tensors = make(positions=positions)
    dy = guarded((3, 11, 12), device=DEVICE)
    everything = run(fl.dept_embedding, ids, positions, leaves(tensors), dy, backend=backend)
    some = run(fl.dept_embedding, ids, positions, leaves(tensors, needs), dy, backend=backend)
    expected = [everything[0], *itertools.compress(everything[1:], needs)]
    for got, want in zip(some, expected, strict=True):
        assert torch.equal(got, want)
    grads = torch.ops.fused_lora.dept_embedding_backward(
        dy, ids, *tensors, positions, SCALE, needs, backend
    )
    assert [g.numel() > 0 for g in grads] == list(needs)


@pytest.mark.parametrize("positions", POSITIONS)
def test_gradcheck(positions):
    ids, positions, tensors = make((2,), 5, 7, 4, dtype=torch.float64, positions=positions)

    def fn(*tensors):
        return fl.dept_embedding(ids, *tensors, scale=SCALE, positions=positions, backend="torch")

    assert torch.autograd.gradcheck(fn, leaves(tensors))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_masters(backend, dtype):
    """Prompt, A and B in fp32 over a 16-bit table: y in its dtype, gradients in theirs."""
    if backend == "triton" and dtype not in DTYPES:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    ids, _, tensors = make((3,), 40, D=64, S=33, R=8, dtype=dtype)
    masters = leaves([tensors[0], *(t.float() for t in tensors[1:])])
    check_against_fp64(
        ids, None, masters, guarded((3, 42, 64), dtype=dtype, device=DEVICE), backend
    )
    ours = run(fl.dept_embedding, ids, None, masters, backend=backend)
    assert [t.dtype for t in ours] == [dtype, dtype, *[torch.float32] * 3]


@backends
def test_a_cached_step_is_a_slice_of_the_whole(backend):
    ids, _, (weight, prompt, a, b) = make((3,), 9)
    whole = fl.dept_embedding(ids, weight, prompt, a, b, scale=SCALE, backend=backend)
    for p in range(9):
        at = torch.full((3, 1), p, device=DEVICE)
        step = fl.dept_embedding(
            ids[:, p : p + 1], weight, None, a, b, scale=SCALE, positions=at, backend=backend
        )
        torch.testing.assert_close(step, whole[:, 2 + p : 3 + p])


@backends
def test_left_padding(backend):
    """Counted from the first real token, a padded row has what the row alone has."""
    ids, _, (weight, prompt, a, b) = make((3,), 9)
    at = torch.arange(9, device=DEVICE) - torch.tensor([[0], [4], [8]], device=DEVICE)
    call = functools.partial(fl.dept_embedding, scale=SCALE, backend=backend)
    y = call(ids, weight, prompt, a, b, positions=at)
    for n, pads in enumerate((0, 4, 8)):
        alone = call(ids[n, pads:], weight, prompt, a, b)
        torch.testing.assert_close(y[n, 2 + pads :], alone[2:])
        assert torch.equal(y[n, 2 : 2 + pads], weight[ids[n, :pads]])  # nothing is added to pads


@backends
def test_a_zero_pair_and_no_prompt_is_the_embedding(backend):
    ids, _, (weight, _, a, b) = make()
    zero = torch.zeros_like(b)
    y = fl.dept_embedding(ids, weight, None, a, zero, backend=backend)
    assert torch.equal(y, F.embedding(ids, weight))
    empty = fl.dept_embedding(ids, weight, weight[:0], a, zero, backend=backend)
    assert torch.equal(y, empty)


@backends
@pytest.mark.parametrize("positions", POSITIONS)
def test_bitwise_repeatable_and_inputs_untouched(backend, positions):
    ids, positions, tensors = make((5,), 17, S=30, positions=positions)
    tensors, dy = leaves(tensors), guarded((5, 19, 12), device=DEVICE)
    before = [t.detach().clone() for t in (*tensors, dy)]
    runs = [run(fl.dept_embedding, ids, positions, tensors, dy, backend=backend) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(u, v) for u, v in zip(again, runs[0], strict=True))
    assert all(torch.equal(u, v) for u, v in zip((*tensors, dy), before, strict=True))


@backends
def test_a_position_has_the_sum_of_its_rows_in_their_order(backend):
    """In fp16 2048 and many halves: added in fp32 and rounded once, whatever the batch."""
    N = 100
    ids = torch.zeros(N, 1, dtype=torch.int64, device=DEVICE)
    weight, a = torch.zeros(1, 4, device=DEVICE).half(), torch.ones(1, 1, device=DEVICE).half()
    b = torch.zeros(1, 4, device=DEVICE).half().requires_grad_()
    dy = torch.full((N, 1, 4), 0.5, device=DEVICE).half()
    dy[0] = 2048  # 2048.5 is not an fp16 number: rounded at each step the sum would stay
    for positions in (None, torch.zeros(N, 1, dtype=torch.int64, device=DEVICE)):
        y = fl.dept_embedding(ids, weight, None, a, b, positions=positions, backend=backend)
        (db,) = torch.autograd.grad(y, b, dy)
        assert db[0, 0].item() == torch.tensor(2048 + 99 / 2).half().item()


def test_saved_bytes():
    """The inputs, and nothing of y's size."""
    ids, _, tensors = make((4,), 50, V=30, D=24, S=40)
    weight, prompt, a, b = leaves(tensors, (False, True, True, True))
    size, _ = saved_bytes(lambda: fl.dept_embedding(ids, weight, prompt, a, b))
    assert size == 8 * ids.numel() + 4 * sum(t.numel() for t in tensors)


@backends
def test_scale_tensor(backend):
    ids, _, tensors = make()
    weight, prompt, a, b = leaves(tensors)
    scale = torch.tensor(SCALE, device=DEVICE, requires_grad=True)
    call = functools.partial(fl.dept_embedding, ids, weight, prompt, a, b, backend=backend)
    plain = functools.partial(fl.reference.dept_embedding, ids, weight, prompt, a, b)
    torch.testing.assert_close(call(scale=scale), call(scale=SCALE))
    dy = guarded((3, 11, 12), device=DEVICE)
    ours = torch.autograd.grad(call(scale=scale), (scale, a, b), dy)
    torch.testing.assert_close(ours, torch.autograd.grad(plain(scale=scale), (scale, a, b), dy))


# Integration with torch


@pytest.mark.parametrize(
    "positions, m, dtype",
    [("none", 2, torch.float32), ("every row", 0, torch.bfloat16), ("one row", 2, torch.float64)],
)
def test_opcheck(positions, m, dtype):
    ids, positions, tensors = make((2, 3), m=m, positions=positions, dtype=dtype)
    forward = torch.ops.fused_lora.dept_embedding.default
    args = (ids, *tensors, positions, SCALE, "torch")
    torch.library.opcheck(forward, args)
    dy = torch.randn_like(forward(*args))
    for needs in ([True, m > 0, True, True], [False, False, True, False], [False] * 4):
        args = (dy, ids, *tensors, positions, SCALE, needs, "torch")
        torch.library.opcheck(torch.ops.fused_lora.dept_embedding_backward.default, args)


@pytest.mark.parametrize("dynamic,positions", [(True, "none"), (False, "every row")])
def test_compiles_without_a_graph_break(dynamic, positions):
    torch._dynamo.reset()
    compiled = torch.compile(
        fl.dept_embedding, backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for L in (5, 6):
        ids, at, tensors = make(L=L, positions=positions)
        tensors, dy = leaves(tensors), guarded((3, 2 + L, 12), device=DEVICE)
        ours = run(compiled, ids, at, tensors, dy)
        eager = run(fl.dept_embedding, ids, at, tensors, dy)
        assert all(torch.equal(u, v) for u, v in zip(ours, eager, strict=True))


@backends
def test_autocast_leaves_it_alone(backend):
    """As F.embedding and sums: y in the table's dtype, and the same y and gradients."""
    ids, _, tensors = make((3,), 40, D=64, S=33, R=8)
    tensors = leaves(tensors)
    plain = run(fl.dept_embedding, ids, None, tensors, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = run(fl.dept_embedding, ids, None, tensors, backend=backend)
    assert all(torch.equal(u, v) for u, v in zip(ours, plain, strict=True))


def test_meta_tensors_go_through_the_fake():
    ids, _, tensors = make()
    moved = [t.to("meta") for t in (ids, *tensors)]
    y = fl.dept_embedding(*moved, backend="triton")
    assert y.is_meta and y.shape == (3, 11, 12)


def test_no_grad_skips_autograd():
    ids, _, tensors = make()
    with torch.no_grad():
        assert fl.dept_embedding(ids, *leaves(tensors)).grad_fn is None


# Refusals


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host reads no ids")
@backends
@pytest.mark.parametrize("wrong", [-1, 20])
def test_an_id_out_of_range(backend, wrong):
    ids, _, tensors = make()
    ids[1, 2] = wrong
    with pytest.raises(IndexError):
        fl.dept_embedding(ids, *tensors, backend=backend)


def test_the_kernel_makes_a_row_of_an_unknown_id_nan():
    """Of every column, and of no other row; what lies around the table is not read."""
    from fused_lora.triton_kernels.embedding import embedding

    ids, _, (weight, prompt, a, b) = make(D=70)
    good = embedding(ids, weight, a, b, scale=SCALE, prompt=prompt)
    assert torch.isfinite(good).all()
    ids[0, 3], ids[2, 0] = 20, -1
    y = embedding(ids, weight, a, b, scale=SCALE, prompt=prompt)
    wrong = torch.zeros(3, 11, 70, dtype=torch.bool, device=DEVICE)
    wrong[0, 5] = wrong[2, 2] = True
    assert torch.equal(y.isnan(), wrong) and torch.equal(y[~wrong], good[~wrong])


def test_forward_mode_and_double_backward_are_refused():
    ids, _, tensors = make()
    weight, prompt, a, b = leaves(tensors)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a.detach(), torch.ones_like(a))
        with pytest.raises(NotImplementedError, match="lora_a carries a forward-mode tangent"):
            fl.dept_embedding(ids, weight, prompt, dual, b)
    y = fl.dept_embedding(ids, weight, prompt, a, b)
    (da,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        da.sum().backward()


HERE = torch.empty(0, device=DEVICE).device
FLOATS, WHOLE = "float32, bfloat16, float16, float64", "int64, int32, int16, int8, uint8"
# What is changed in a good call, the error, and its message without the leading "dept_embedding: ".
BAD = {
    "list": ({"ids": [1]}, TypeError, "ids must be a torch.Tensor, got list"),
    "float ids": (
        {"ids": torch.zeros(3, 9)},
        TypeError,
        f"ids must have dtype {WHOLE}, got float32",
    ),
    "bool ids": (
        {"ids": torch.zeros(3, 9).bool()},
        TypeError,
        f"ids must have dtype {WHOLE}, got bool",
    ),
    "0-d ids": (
        {"ids": torch.tensor(1)},
        ValueError,
        "ids must have shape [..., L], got a 0-d tensor",
    ),
    "weight 1-d": (
        {"weight": torch.zeros(12)},
        ValueError,
        "weight must have shape [V, D], both at least 1, got [12]",
    ),
    "empty weight": (
        {"weight": torch.zeros(0, 12)},
        ValueError,
        "weight must have shape [V, D], both at least 1, got [0, 12]",
    ),
    "integer weight": (
        {"weight": torch.zeros(20, 12).long()},
        TypeError,
        f"weight must have dtype {FLOATS}, got int64",
    ),
    "prompt width": (
        {"prompt": torch.zeros(2, 11)},
        ValueError,
        "prompt must have shape [m, D] = [any, 12], got [2, 11]",
    ),
    "rank 0": (
        {"lora_a": torch.zeros(6, 0), "lora_b": torch.zeros(0, 12)},
        ValueError,
        "lora_a must have shape [S, R], both at least 1, got [6, 0]",
    ),
    "a 1-d": (
        {"lora_a": torch.zeros(6)},
        ValueError,
        "lora_a must have shape [S, R], both at least 1, got [6]",
    ),
    "a against b": (
        {"lora_b": torch.zeros(4, 12)},
        ValueError,
        "lora_b must have shape [R, D] = [3, 12], got [4, 12]",
    ),
    "b transposed": (
        {"lora_b": torch.zeros(12, 3)},
        ValueError,
        "lora_b must have shape [R, D] = [3, 12], got [12, 3]",
    ),
    "adapter of another dtype": (
        {"lora_a": torch.zeros(6, 3).half()},
        TypeError,
        "lora_a must have dtype float32, got float16",
    ),
    "prompt of another dtype": (
        {"prompt": torch.zeros(2, 12).double()},
        TypeError,
        "prompt must have dtype float32, got float64",
    ),
    "device": (
        {"lora_a": torch.zeros(6, 3, device="meta")},
        ValueError,
        f"lora_a is on meta but weight is on {HERE}; move one of them",
    ),
    "ids elsewhere": (
        {"ids": torch.zeros(3, 9, device="meta").long()},
        ValueError,
        f"ids is on meta but weight is on {HERE}; move one of them",
    ),
    "float positions": (
        {"positions": torch.zeros(9)},
        TypeError,
        f"positions must have dtype {WHOLE}, got float32",
    ),
    "positions length": (
        {"positions": torch.zeros(8).long()},
        ValueError,
        "positions must have ids' shape [3, 9] or [L] = [9], got [8]",
    ),
    "positions of another batch": (
        {"positions": torch.zeros(2, 9).long()},
        ValueError,
        "positions must have ids' shape [3, 9] or [L] = [9], got [2, 9]",
    ),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must be finite in fp32, got nan"),
    "scale string": ({"scale": "2"}, TypeError, "scale must be a float or a 0-d tensor, got str"),
    "sparse": (
        {"weight": torch.zeros(20, 12).to_sparse()},
        NotImplementedError,
        "weight has layout torch.sparse_coo; dense (strided) tensors are supported",
    ),
    "backend": (
        {"backend": "cudnn"},
        ValueError,
        "backend must be one of cuda, triton, torch or None, got 'cudnn'",
    ),
    "backend that has no kernel": (
        {"backend": "cuda"},
        RuntimeError,
        "backend 'cuda' cannot run: dept_embedding has no CUDA C++ kernel; use backend='triton' or "
        "'torch'",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case):
    change, error, message = BAD[case]
    ids, _, tensors = make()
    arguments = {"ids": ids, **dict(zip(NAMES, tensors, strict=True))} | change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error) as raised:
        fl.dept_embedding(**arguments)
    assert str(raised.value).removeprefix("dept_embedding: ") == message


def test_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ids, _, tensors = make()
    reasons = fl.why("dept_embedding", ids, *tensors, scale=2.0)
    assert next(iter(reasons)) == "torch" and reasons["torch"] is None
    assert "no CUDA C++ kernel" in reasons["cuda"]
    if DEVICE == "cpu":
        assert reasons["triton"] == "weight is on cpu; the Triton kernels run on CUDA devices"
    with pytest.raises(ValueError, match="lora_b must have shape"):
        fl.why("dept_embedding", ids, *tensors[:3], tensors[3].t())
