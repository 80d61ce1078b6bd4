"""multi_lora_linear and multi_lora_add_, in every backend, held to the reference in fp64."""

import functools
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import CUDA_REFUSES, DROPOUTS, DTYPES, backends, fuzz, layouts, seeds, slow
from conftest import DEVICE
from fused_lora.triton_kernels import configs
from hypothesis import given
from hypothesis import strategies as st

import fused_lora as fl
from fused_lora.ops import multi_lora_linear as module
from fused_lora.reference import AdapterSlots
from fused_lora.testing import assert_accurate, guarded, saved_bytes

RAGGED = (1, 3, 8, 16, 17, 64, 128)
NAMES = ("x", "weight", "bias", "a_slots", "bt_slots", "gate")


@pytest.fixture(autouse=True)
def tiles(request, monkeypatch):
    """Few rows too are multiplied in tiles, but for the tests of decoding."""
    if "decod" not in request.node.name:
        monkeypatch.setattr(configs, "DECODE_ROWS", 0)


def ids_of(kind: str, M: int, G: int, dtype=torch.int64) -> torch.Tensor:
    if kind == "equal":
        ids = torch.full((M,), G - 1)
    elif kind == "different":
        ids = torch.arange(M) % G
    elif kind == "none":
        ids = torch.full((M,), -1)
    elif kind == "zipf":
        ids = torch.multinomial(1 / torch.arange(1.0, G + 1) ** 1.5, max(M, 1), True)[:M]
    else:  # a quarter of the rows has no adapter
        ids = torch.randint(0, G, (M,)).where(torch.rand(M) > 0.25, -1)
    return ids.to(dtype).to(DEVICE)


KINDS = ("equal", "different", "none", "zipf", "some")


def make(M=7, K=12, N=9, ranks=(1, 3, 4), *, dtype=torch.float32, layout="contiguous", lead=None):
    """x, weight, bias, a_slots, bt_slots, gate, rank, scale; NaN around all of them."""
    G, R = len(ranks), max(ranks)
    put = functools.partial(guarded, dtype=dtype, device=DEVICE)
    wide = torch.promote_types(dtype, torch.float32)
    a_slots, bt_slots = put((G, R, K), std=max(K, 1) ** -0.5), put((G, R, N))
    return (
        put((*((M,) if lead is None else lead), K), layout),
        put((N, K), std=max(K, 1) ** -0.5),
        put((N,)),
        a_slots,
        bt_slots,
        guarded((G, R), device=DEVICE, dtype=wide),
        torch.tensor(ranks, dtype=torch.int32, device=DEVICE),
        torch.linspace(0.5, 2.0, G, dtype=wide, device=DEVICE),
    )


def slots_of(tensors) -> AdapterSlots:
    _, _, _, a_slots, bt_slots, gate, rank, scale = tensors
    return AdapterSlots(a_slots, bt_slots, rank, scale, gate)


def run(fn, tensors, ids, dy, **options):
    """[y, the gradients of the first six tensors]."""
    x, weight, bias = tensors[:3]
    y = fn(x, weight, slots_of(tensors), ids, bias, **options)
    return [y, *torch.autograd.grad(y, tensors[:6], dy)]


def leaves(tensors):
    return [*(t.detach().requires_grad_() for t in tensors[:6]), *tensors[6:]]


def check(tensors, ids, backend, **options):
    tensors = leaves(tensors)
    x, weight = tensors[:2]
    dy = guarded((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=DEVICE)

    def plain(*inputs):
        # assert_accurate also asks for squares and magnitudes: of the ranks too they are meant not.
        *floats, scale, dy = inputs
        return run(fl.reference.multi_lora_linear, [*floats, tensors[6], scale], ids, dy, **options)

    ours = run(fl.multi_lora_linear, tensors, ids, dy, backend=backend, **options)
    names = ["y", *(f"d{name}" for name in NAMES)]
    assert_accurate(names, ours, plain, [*tensors[:6], tensors[7], dy])


@backends
@given(
    M=st.sampled_from((0, 1, 2, 15, 16, 17, 33, 65, 130)),
    K=st.sampled_from((1, 7, 16, 33, 65, 129)),
    N=st.sampled_from((1, 7, 16, 33, 65)),
    ranks=st.lists(st.sampled_from((1, 2, 3, 8, 16, 17, 33)), min_size=1, max_size=6),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    layout=layouts,
    p=st.sampled_from((0.0, *DROPOUTS, 1.0)),
    seed=seeds,
    decode_rows=st.sampled_from((0, configs.DECODE_ROWS)),
)
@fuzz(40)
def test_any_shape(backend, M, K, N, ranks, kind, dtype, layout, p, seed, decode_rows):
    tensors = make(M, K, N, tuple(ranks), dtype=dtype, layout=layout)
    with mock.patch.object(configs, "DECODE_ROWS", decode_rows):
        check(tensors, ids_of(kind, M, len(ranks)), backend, dropout_p=p, seed=seed)


@backends
@pytest.mark.parametrize(
    "kind", [slow("equal"), slow("different"), slow("none"), "zipf", slow("some")]
)
@pytest.mark.parametrize("id_dtype", [torch.int64, slow(torch.int32)])
def test_ragged_ranks(backend, kind, id_dtype):
    check(make(70, 150, 50, RAGGED), ids_of(kind, 70, len(RAGGED), id_dtype), backend)


@backends
def test_64_adapters(backend):
    ranks = tuple(RAGGED[i % 5] for i in range(64))
    check(make(130, 33, 20, ranks), ids_of("some", 130, 64), backend, dropout_p=0.3, seed=3)


@pytest.mark.parametrize("kind", [*map(slow, ("equal", "different", "none", "zipf")), "some"])
def test_decoding(kind):
    """Few rows and many adapters: every row reads its own, over several splits of K."""
    assert configs.row_by_row(7, 7)
    ids = ids_of(kind, 7, 7)
    check(make(7, 600, 270, RAGGED), ids, "triton")


@pytest.mark.parametrize("dtype", [slow(torch.float32), *DTYPES[1:]], ids=str)
@pytest.mark.parametrize(
    "layout", [slow("contiguous"), "transposed", "step2", "expanded", "misaligned"]
)
def test_decoding_of_any_layout(dtype, layout):
    check(make(9, 129, 65, RAGGED, dtype=dtype, layout=layout), ids_of("some", 9, 7), "triton")


def test_which_rows_are_decoded_alone():
    """Up to 64, unless there are fewer adapters than tiles of 16 rows."""
    assert configs.row_by_row(64, 64) and configs.row_by_row(1, 1) and configs.row_by_row(64, 5)
    assert not configs.row_by_row(65, 64) and not configs.row_by_row(64, 4)


def test_a_decoded_row_does_not_depend_on_the_others():
    tensors = make(16, 40, 33, RAGGED)
    x, ids = tensors[0], ids_of("some", 16, 7)
    y = fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids, backend="triton")
    for others in (torch.full_like(ids, -1), torch.full_like(ids, 3), ids.flip(0)):
        mixed = torch.where(torch.arange(16, device=DEVICE) % 3 == 0, ids, others)
        again = fl.multi_lora_linear(x, tensors[1], slots_of(tensors), mixed, backend="triton")
        assert torch.equal(again[::3], y[::3])


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU no product is chosen by what is in a batch")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows, batched", [(26, {8, 3}), (40, {8, 3}), (5, set())])
def test_adapters_with_few_rows_are_multiplied_together(rows, batched, p):
    """Adapters of one rank in one product; those with many rows, and few adapters, each alone."""
    ranks = (8,) * 13 + (3,) * 13
    tensors = make(rows, 12, 9, ranks)
    ids = torch.cat([torch.arange(min(rows, 26)), torch.full((max(rows - 26, 0),), 7)])
    ids = ids[torch.randperm(rows)].where(torch.arange(rows) != 3, -1)
    slots = module.Slots(*slots_of(tensors), torch.arange(26, dtype=torch.int32))
    order = module._Sorted.of(slots, fl.AdapterRouting(ids, 26))
    assert {few.rank for few in order.batches} == batched
    together = sum(len(few.rows) for few in order.batches)
    assert together + sum(s.end - s.begin for s in order.alone) == int((ids >= 0).sum())
    if rows == 40:  # adapter 7 has too many rows to pad the others to
        assert {s.slot for s in order.alone} == {7}
    check(tensors, ids, "torch", dropout_p=p, seed=5)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU no product is chosen by what is in a batch")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("rank", [4, 6])
def test_one_batch_of_all_rows(rank, each, p):
    """Every adapter of a bank with as many rows: nothing is padded, and where 6 is the widest rank
    columns past a rank of 4 are zero."""
    tensors = list(make(9 * each, 12, 9, (6,) * 9))
    tensors[6] = torch.full((9,), rank, dtype=torch.int32)
    ids = torch.arange(9).repeat_interleave(each)[torch.randperm(9 * each)]
    slots = module.Slots(*slots_of(tensors), torch.arange(9, dtype=torch.int32))
    order = module._Sorted.of(slots, fl.AdapterRouting(ids, 9))
    assert order.one_batch(tensors[0])
    h = order.shrunk(order.take(tensors[0]), tensors[3])
    assert h.shape == (9 * each, 6) and bool((h[:, rank:] == 0).all())
    check(tensors, ids, "torch", dropout_p=p, seed=5)


@backends
@pytest.mark.parametrize("lead", [(2, 3), (2, 0), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("given", ["token", "sequence"])
def test_leading_dimensions(backend, lead, given):
    tensors = make(lead=lead)
    shape = lead if given == "token" else lead[:1]
    ids = torch.randint(-1, 3, shape, device=DEVICE)
    check(tensors, ids, backend, dropout_p=0.3, seed=5)


@backends
def test_each_row_against_a_loop(backend):
    """Row by row in fp64, with the adapter's own matrices."""
    tensors = [t.double() if t.is_floating_point() else t for t in make(40, 24, 18, (1, 5, 16))]
    x, weight, bias, a, bt, gate, rank, scale = tensors
    ids = ids_of("some", 40, 3)
    single = [t.float() if t.is_floating_point() else t for t in tensors]
    y = fl.multi_lora_linear(*single[:2], slots_of(single), ids, single[2], backend=backend)
    for i, j in enumerate(ids.tolist()):
        row = x[i] @ weight.t() + bias
        if j >= 0:
            r = int(rank[j])
            row = row + scale[j] * ((x[i] @ a[j, :r].t()) * gate[j, :r]) @ bt[j, :r]
        assert torch.allclose(y[i].double(), row, rtol=1e-4, atol=1e-4)


@backends
def test_gradients_are_those_of_each_adapter_alone(backend):
    tensors = leaves(make(60, 24, 18, (2, 8, 5)))
    x, weight, bias = tensors[:3]
    ids = ids_of("some", 60, 3)
    dy = guarded((60, 18), device=DEVICE)
    _, dx, _, _, da, dbt, dgate = run(
        fl.multi_lora_linear, tensors, ids, dy, backend=backend, dropout_p=0.3, seed=9
    )
    for j, r in enumerate((2, 8, 5)):
        rows = torch.where(ids == j, 1.0, 0.0)[:, None]
        a, bt, gate = (t[j, :r].detach().requires_grad_() for t in tensors[3:6])
        y = fl.lora_linear(
            x, weight, a, bt.t(), bias, gate=gate, scale=float(tensors[7][j]), dropout_p=0.3,
            seed=9, backend=backend,
        )  # fmt: skip
        alone = torch.autograd.grad(y, (x, a, bt, gate), dy * rows)
        own = ids == j
        for got, want in zip((dx[own], da[j, :r], dbt[j, :r], dgate[j, :r]),
                             (alone[0][own], *alone[1:]), strict=True):  # fmt: skip
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        assert not da[j, r:].any() and not dbt[j, r:].any() and not dgate[j, r:].any()


@backends
def test_an_adapter_without_rows_gets_zero_gradients(backend):
    tensors = leaves(make(20, ranks=(4, 4, 4)))
    ids = torch.tensor([0, 2, -1, 2] * 5, device=DEVICE)
    dy = guarded((20, 9), device=DEVICE)
    *_, da, dbt, dgate = run(fl.multi_lora_linear, tensors, ids, dy, backend=backend)
    for gradient in (da, dbt, dgate):
        assert not gradient[1].any() and gradient[0].any() and gradient[2].any()


@backends
def test_rank_rows_past_the_rank_are_not_read(backend):
    tensors = list(make(30, ranks=(2, 7)))
    ids = ids_of("some", 30, 2)
    expected = fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids, backend=backend)
    for i in (3, 4, 5):
        tensors[i] = tensors[i].clone()
        tensors[i][0, 2:] = float("nan")
    if backend == "torch" and DEVICE == "cuda":
        pytest.skip("on a GPU the torch backend multiplies whole slots: they must be finite")
    y = fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids, backend=backend)
    assert torch.equal(y, expected)


def test_decoding_reads_no_rank_past_the_rank():
    tensors, ids = list(make(9, ranks=(2, 7))), ids_of("some", 9, 2)
    expected = fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids, backend="triton")
    for i in (3, 4, 5):
        tensors[i] = tensors[i].clone()
        tensors[i][0, 2:] = float("nan")
    y = fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids, backend="triton")
    assert torch.equal(y, expected)


@backends
@pytest.mark.parametrize("K", [20, 200])
def test_h_is_that_of_each_row_and_zero_elsewhere(backend, K):
    x, weight, _, a, bt, gate, rank, scale = make(50, K, ranks=(2, 7, 4))
    routing = fl.AdapterRouting(ids_of("some", 50, 3), 3)
    slots = (a, bt, rank, scale, gate.contiguous(), torch.arange(3, device=DEVICE).int())
    route = routing.ids, routing.order, routing.offsets
    _, h = torch.ops.fused_lora.multi_lora_linear(
        x, weight, *slots, *route, None, None, 0.0, True, backend
    )
    for i, j in enumerate(routing.ids.tolist()):
        r = int(rank[j]) if j >= 0 else 0
        assert torch.allclose(h[i, :r], x[i] @ a[j, :r].t(), rtol=1e-4, atol=1e-4)
        assert not h[i, r:].any()


@backends
def test_a_slot_of_rank_zero_gives_the_base(backend):
    tensors = list(make(9, ranks=(2, 3)))
    tensors[6] = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    ids = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    check(tensors, ids, backend)
    y = fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids, backend=backend)
    none = fl.multi_lora_linear(*tensors[:2], slots_of(tensors), ids - 1, backend=backend)
    assert torch.equal(y, none)


def test_a_row_does_not_depend_on_the_others():
    """The batch around a row may change in everything but its number of rows."""
    tensors = leaves(make(70, 200, 50, (1, 8, 17)))
    x, weight, bias = tensors[:3]
    ids = ids_of("some", 70, 3)
    call = functools.partial(run, fl.multi_lora_linear, backend="triton", dropout_p=0.0)
    dy = guarded((70, 50), device=DEVICE)
    one = call(tensors, ids, dy)
    kept = torch.arange(70, device=DEVICE) % 3 == 0
    other_x = torch.where(kept[:, None], x, torch.randn_like(x)).detach().requires_grad_()
    other_ids = torch.where(kept, ids, ids_of("zipf", 70, 3))
    two = call([other_x, *tensors[1:]], other_ids, dy)
    assert torch.equal(one[0][kept], two[0][kept])
    assert torch.equal(one[1][kept], two[1][kept])
    # The gradients of an adapter that keeps all of its rows, in their order.
    same = torch.where(ids == 1, 1, torch.where(ids == 0, -1, 0))
    three = call(tensors, same, dy)
    assert all(torch.equal(one[k][1], three[k][1]) for k in (4, 5, 6))


@backends
def test_bitwise_repeatable_and_inputs_untouched(backend):
    tensors = leaves(make(70, 200, 50, (1, 8, 17)))
    ids, dy = ids_of("zipf", 70, 3), guarded((70, 50), device=DEVICE)
    before = [t.detach().clone() for t in tensors]
    call = functools.partial(
        run, fl.multi_lora_linear, tensors, ids, dy, backend=backend, dropout_p=0.3, seed=1
    )
    first = call()
    for _ in range(2):
        assert all(torch.equal(u, v) for u, v in zip(first, call(), strict=True))
    assert all(torch.equal(u, v) for u, v in zip(before, tensors, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_form_without_a_host_look_is_the_same(p, monkeypatch):
    """What the torch backend does on a GPU, run here: every slot as one wide adapter."""
    tensors = leaves(make(40, 24, 18, (2, 8, 5)))
    for t in tensors[3:6]:
        for j, r in enumerate((2, 8, 5)):
            t.data[j, r:] = 0
    ids, dy = ids_of("some", 40, 3), guarded((40, 18), device=DEVICE)
    call = functools.partial(
        run, fl.multi_lora_linear, tensors, ids, dy, backend="torch", dropout_p=p, seed=1
    )
    expected = call()
    monkeypatch.setattr(module, "_Sorted", None)
    monkeypatch.setattr(module, "_on_host", lambda x: False)
    for got, want in zip(call(), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@backends
def test_masters_and_autocast(backend):
    if DEVICE == "cpu" and backend == "triton":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    tensors = leaves(make(20, 24, 18, (2, 8)))
    ids, dy = ids_of("some", 20, 2), guarded((20, 18), dtype=torch.bfloat16, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = run(fl.multi_lora_linear, tensors, ids, dy, backend=backend)
    assert under[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in under[1:])
    half = [t.bfloat16() if i < 3 else t for i, t in enumerate(tensors)]
    masters = run(fl.multi_lora_linear, half, ids, dy, backend=backend)
    assert all(torch.equal(u, v.to(u.dtype)) for u, v in zip(under, masters, strict=True))


def test_saved_for_the_backward():
    tensors = leaves(make(64, 48, 40, (4, 4)))
    routing = fl.AdapterRouting(ids_of("zipf", 64, 2), 2)
    x, weight, bias = tensors[:3]
    slots = slots_of(tensors)
    _, kept = saved_bytes(
        lambda: fl.multi_lora_linear(x, weight, slots, routing, bias, dropout_p=0.5, seed=1)
    )
    inputs = {t.data_ptr() for t in (*tensors, routing.ids, routing.order, routing.offsets)}
    extra = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in inputs)
    assert extra == [(1,), (2,), (64, 4)]  # the seed, the table of slots and h


def test_gradcheck():
    tensors = [
        t.double().requires_grad_() if t.is_floating_point() and i < 6 else t
        for i, t in enumerate(make(6, 5, 4, (1, 3)))
    ]
    tensors[7] = tensors[7].double()
    ids = torch.tensor([0, 1, -1, 1, 1, 0], device=DEVICE)

    def fn(*floats):
        slots = slots_of([*floats, *tensors[6:]])
        return fl.multi_lora_linear(*floats[:2], slots, ids, floats[2], dropout_p=0.3, seed=2)

    assert torch.autograd.gradcheck(fn, tensors[:6])


@backends
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(backend, p):
    x, weight, bias, a, bt, gate, rank, scale = make(20, ranks=(2, 4))
    routing = fl.AdapterRouting(ids_of("some", 20, 2), 2)
    route = routing.ids, routing.order, routing.offsets
    seed = torch.tensor([3], device=DEVICE) if p else None
    table = torch.arange(2, dtype=torch.int32, device=DEVICE)
    slots = (a, bt, rank, scale, gate.contiguous(), table)
    ops = torch.ops.fused_lora
    torch.library.opcheck(
        ops.multi_lora_linear, (x, weight, *slots, *route, bias, seed, p, True, backend)
    )
    h = ops.multi_lora_linear(x, weight, *slots, *route, bias, seed, p, True, backend)[1]
    dy = guarded((20, 9), device=DEVICE)
    needs = [True] * 6
    torch.library.opcheck(
        ops.multi_lora_linear_backward,
        (dy, x, weight, *slots, *route, h, seed, p, needs, backend),
    )
    y = guarded((20, 18), device=DEVICE)
    torch.library.opcheck(ops.multi_lora_add_, (y, x, [*slots, *slots], *route, [0, 9], backend))


@backends
def test_compiles_without_a_graph_break(backend):
    tensors = leaves(make(20, ranks=(2, 4)))
    ids, dy = ids_of("some", 20, 2), guarded((20, 9), device=DEVICE)

    def fn(ids, *tensors):
        x, weight, bias = tensors[:3]
        y = fl.multi_lora_linear(
            x, weight, slots_of(tensors), ids, bias, dropout_p=0.3, seed=7, backend=backend
        )
        return y

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    y, expected = compiled(ids, *tensors), fn(ids, *tensors)
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y, tensors[:6], dy)
    want = torch.autograd.grad(expected, tensors[:6], dy)
    assert all(torch.equal(u, v) for u, v in zip(got, want, strict=True))


@backends
def test_adding_compiles_without_a_graph_break(backend):
    """Also onto the columns of a list of banks that share x."""
    x, _, _, a, bt, gate, rank, scale = make(20, ranks=(2, 4))
    slots, N = AdapterSlots(a, bt, rank, scale, gate), bt.shape[2]
    ids, base = ids_of("some", 20, 2), guarded((20, 2 * N), device=DEVICE)

    def fn(y, x, ids):
        fl.multi_lora_add_(y, x, slots, ids, out_offset=N, backend=backend)
        return fl.multi_lora_add_(y, x, [slots, slots], ids, out_offset=[0, N], backend=backend)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got, want = compiled(base.clone(), x, ids), fn(base.clone(), x, ids)
    assert torch.equal(got, want) and not torch.equal(got, base)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, offset", [(33, 0), (33, 5), (70, 5)])
def test_add(backend, dtype, M, offset):
    x, _, _, a, bt, gate, rank, scale = make(M, 40, 50, (1, 8, 17), dtype=dtype)
    slots = AdapterSlots(a, bt, rank, scale, gate)
    ids = ids_of("some", M, 3)
    base = guarded((M, 60), dtype=dtype, device=DEVICE)
    y = base.clone()
    returned = fl.multi_lora_add_(y, x, slots, ids, out_offset=offset, backend=backend)
    assert returned is y
    assert torch.equal(y[:, :offset], base[:, :offset])
    assert torch.equal(y[:, offset + 50 :], base[:, offset + 50 :])
    assert torch.equal(y[ids < 0], base[ids < 0])

    def plain(base, x, a, bt, gate, scale):
        slots = AdapterSlots(a, bt, rank, scale, gate)
        return [fl.reference.multi_lora_add_(base.clone(), x, slots, ids, out_offset=offset)]

    assert_accurate(["y"], [y], plain, [base, x, a, bt, gate, scale])


@backends
def test_add_to_three_projections_of_one_output(backend):
    """q, k and v packed, one routing."""
    x, *_ = make(2, 24, lead=(2, 5))
    y = guarded((2, 5, 40), device=DEVICE)
    expected = y.clone()
    routing = fl.AdapterRouting(torch.tensor([1, 0], device=DEVICE), 2)
    for offset, width in ((0, 16), (16, 12), (28, 12)):
        _, _, _, a, bt, gate, rank, scale = make(2, 24, width, (2, 4))
        slots = AdapterSlots(a, bt, rank, scale, gate)
        fl.multi_lora_add_(y, x, slots, routing, out_offset=offset, backend=backend)
        ids = torch.tensor([[1] * 5, [0] * 5], device=DEVICE)
        fl.reference.multi_lora_add_(expected, x, slots, ids, out_offset=offset)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("K", [40, 600])
@pytest.mark.parametrize("decode_rows", [0, 64], ids=["tiles", "decode"])
@backends
def test_projections_of_one_x_in_one_call(backend, decode_rows, K, monkeypatch):
    """q, k and v in one call are, to the bit, three calls; of different widths and ranks."""
    monkeypatch.setattr(configs, "DECODE_ROWS", decode_rows)
    x, *_ = make(9, K)
    banks, offsets = [], (12, 0, 300)
    for width, ranks in ((270, (2, 4, 1)), (12, (1, 33, 16)), (40, (7, 3, 20))):
        _, _, _, a, bt, gate, rank, scale = make(9, K, width, ranks)
        banks.append(AdapterSlots(a, bt, rank, scale, gate))
    y = guarded((9, 345), device=DEVICE)
    expected, routing = y.clone(), fl.AdapterRouting(ids_of("some", 9, 3), 3)
    for bank, offset in zip(banks, offsets, strict=True):
        fl.multi_lora_add_(expected, x, bank, routing, out_offset=offset, backend=backend)
    fl.multi_lora_add_(y, x, banks, routing, out_offset=offsets, backend=backend)
    assert torch.equal(y, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted under the interpreter")
@pytest.mark.parametrize("rows", [9, 80])
def test_projections_share_the_launch_of_the_product_with_a(rows, monkeypatch):
    from traffic import counted

    monkeypatch.setattr(configs, "DECODE_ROWS", 64)
    x, _, _, a, bt, gate, rank, scale = make(rows, 40, 30, (2, 4, 1, 3, 5, 1))
    bank = AdapterSlots(a, bt, rank, scale, gate)
    y, ids = torch.zeros(rows, 90), ids_of("some", rows, 6)
    with counted() as traffic:
        fl.multi_lora_add_(y, x, [bank] * 3, ids, out_offset=[0, 30, 60], backend="triton")
    launches = {kernel: len(found) for kernel, found in traffic.arguments.items()}
    if rows == 9:
        assert launches == {"multi_gemv_shrink_kernel": 1, "multi_gemv_add_kernel": 1}
    else:
        assert launches["multi_shrink_kernel"] == 1
        assert launches["multi_segment_gemm_kernel"] == 3


def good():
    x, weight, bias, a, bt, gate, rank, scale = make(4)
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    return {
        "x": x, "weight": weight, "bias": bias, "adapter_ids": ids,
        "bank": AdapterSlots(a, bt, rank, scale, gate),
    }  # fmt: skip


def slot(name, change):
    return {"bank": lambda bank: bank._replace(**{name: change(getattr(bank, name))})}


BAD = {
    "ids float": ({"adapter_ids": torch.Tensor.float}, TypeError, "adapter_ids must have dtype"),
    "ids list": ({"adapter_ids": list}, TypeError, "adapter_ids must be a torch.Tensor"),
    "ids shape": ({"adapter_ids": lambda t: t[:3]}, ValueError, r"leading shape of x, \[4\]"),
    "ids high": ({"adapter_ids": lambda t: t + 3}, IndexError, r"lie in \[-1, 3\), got \[3\]"),
    "ids low": ({"adapter_ids": lambda t: t - 2}, IndexError, r"got \[-2\]"),
    "routed for other slots": (
        {"adapter_ids": lambda t: fl.AdapterRouting(t, 5)},
        ValueError,
        "routed for 5 adapters, the bank has 3",
    ),
    "bank": ({"bank": lambda bank: None}, TypeError, "bank must be an AdapterBank"),
    "bank width": (slot("bt_slots", lambda t: t[..., 1:]), ValueError, "bank.bt_slots must have"),
    "bank in": (slot("a_slots", lambda t: t[..., 1:]), ValueError, "bank.a_slots must have shape"),
    "bank rank": (slot("rank", lambda t: t[1:]), ValueError, r"bank.rank must .* \[G\] = \[3\]"),
    "bank rank dtype": (slot("rank", torch.Tensor.long), TypeError, "must have dtype int32"),
    "bank gate": (slot("gate", lambda t: t[:, 1:]), ValueError, "bank.gate must have shape"),
    "bank dtype": (slot("a_slots", torch.Tensor.half), TypeError, "must have dtype float32"),
    "weight": ({"weight": lambda t: t[:, 1:]}, ValueError, r"weight must have shape \[N, K\]"),
    "bias": ({"bias": lambda t: t[1:]}, ValueError, "bias must have shape"),
    "bias dtype": ({"bias": torch.Tensor.half}, TypeError, "bias must have x's dtype float32"),
    "p": ({"dropout_p": 1.5}, ValueError, "dropout_p must lie in"),
    "seed": ({"seed": 0.5}, TypeError, "seed must be an int"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend must be one of cuda, triton, torch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, error, message = BAD[case]
    arguments = good()
    if DEVICE == "cuda" and error is IndexError:
        pytest.skip("a GPU gives such rows the base")
    for name, change in changed.items():
        arguments[name] = change(arguments[name]) if name in arguments else change
    with pytest.raises(error, match=message):
        fl.multi_lora_linear(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"out_offset": 3}, ValueError, "at least 12"),
        ({"out_offset": -1}, ValueError, "at least 8"),
        ({"out_offset": 0.0}, TypeError, "out_offset must be an int"),
        ({"y": torch.zeros(4, 9).half()}, TypeError, "y must have x's dtype"),
        ({"y": torch.zeros(4, 9, requires_grad=True)}, RuntimeError, "has no gradients"),
        ({"y": torch.zeros(3, 9)}, ValueError, "y must have shape"),
        ({"out_offset": [0]}, TypeError, "out_offset must be an int, got list"),
        ({"bank": []}, ValueError, "a list that is not empty"),
        ({"bank": "twice"}, ValueError, "out_offset must be a list of 2 offsets"),
        ({"bank": "twice", "out_offset": [0]}, ValueError, "a list of 2 offsets"),
        ({"bank": "twice", "out_offset": [0, 0]}, ValueError, r"overlap: \[\(0, 9\), \(0, 9\)\]"),
        ({"bank": "twice", "out_offset": [0, 9]}, ValueError, "at least 18"),
        ({"bank": "other", "out_offset": [0, 9]}, ValueError, r"as many ids, got \[3, 2\]"),
    ],
    ids=str,
)
def test_bad_input_of_add(changed, error, message):
    arguments = {k: v for k, v in good().items() if k in ("x", "bank", "adapter_ids")}
    arguments["y"] = torch.zeros(4, 9)
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v
                 for k, v in {**arguments, **changed}.items()}  # fmt: skip
    if getattr(changed.get("y"), "requires_grad", False):
        arguments["y"] = changed["y"].detach().to(DEVICE).requires_grad_()
    if isinstance(arguments["bank"], str):
        own, fewer = good()["bank"], [t[:2] for t in good()["bank"]]
        arguments["bank"] = [own, own if arguments["bank"] == "twice" else AdapterSlots(*fewer)]
        if arguments.get("out_offset") == [0, 9] and len(arguments["bank"][1].rank) == 2:
            arguments["y"] = torch.zeros(4, 18, device=DEVICE)
    before = arguments["y"].detach().clone()
    with pytest.raises(error, match=message):
        fl.multi_lora_add_(**arguments)
    assert torch.equal(before, arguments["y"])


def test_meta_tensors():
    x, weight, bias, a, bt, gate, rank, scale = (t.to("meta") for t in make(4))
    slots = AdapterSlots(a, bt, rank, scale, gate)
    ids = torch.empty(4, dtype=torch.int64, device="meta")
    assert fl.multi_lora_linear(x, weight, slots, ids, bias).shape == (4, 9)


def test_why():
    arguments = good()
    bias = arguments.pop("bias")
    reasons = fl.why("multi_lora_linear", **arguments, bias=bias)
    assert next(iter(reasons)) == "torch" and reasons["torch"] is None
    assert reasons["cuda"] == CUDA_REFUSES


@given(st.lists(st.integers(-1, 9), max_size=40), st.sampled_from((torch.int32, torch.int64)))
@fuzz(60)
def test_routing(ids, dtype):
    routing = fl.AdapterRouting(torch.tensor(ids, dtype=dtype, device=DEVICE), 10)
    order, offsets = routing.order.tolist(), routing.offsets.tolist()
    for j in range(10):
        assert order[offsets[j] : offsets[j + 1]] == [i for i, id in enumerate(ids) if id == j]
    assert order[offsets[10] :] == [i for i, id in enumerate(ids) if id == -1]
    assert routing.ids.tolist() == ids


def test_routing_is_updated_in_place():
    routing = fl.AdapterRouting(torch.tensor([0, 1, -1, 1], device=DEVICE), 2)
    kept = routing.ids, routing.order, routing.offsets
    routing.update(torch.tensor([1, -1, 0, 0], device=DEVICE))
    assert kept[0].tolist() == [1, -1, 0, 0] and kept[1].tolist() == [2, 3, 0, 1]
    assert kept[2].tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match=r"must have shape \[4\]"):
        routing.update(torch.zeros(3, dtype=torch.int64, device=DEVICE))


def test_a_wide_routing_is_updated_too():
    routing = fl.AdapterRouting(torch.tensor([0, 1], device=DEVICE), 2)
    x = torch.empty(2, 3, 8, device=DEVICE)
    wide = routing.rows_of(x)
    assert wide.ids.tolist() == [0, 0, 0, 1, 1, 1] and routing.rows_of(x) is wide
    routing.update(torch.tensor([1, 0], device=DEVICE))
    assert wide.ids.tolist() == [1, 1, 1, 0, 0, 0]
    assert wide.order.tolist() == [3, 4, 5, 0, 1, 2] and wide.offsets.tolist() == [0, 3, 6]


def test_a_routing_keeps_the_rows_of_few_shapes():
    """Of 400 lengths in turn, in two threads, each with its own rows; the same of one shape."""
    routing = fl.AdapterRouting(torch.tensor([1, -1, 0], device=DEVICE), 2)

    def serve(lengths):
        for length in lengths:
            wide = routing.rows_of(torch.empty(3, length, 8, device=DEVICE))
            assert wide.ids.tolist() == [1] * length + [-1] * length + [0] * length
            assert wide.offsets.tolist() == [0, length, 2 * length]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(serve, (range(1, 401), range(400, 0, -1))))
    gc.collect()
    kept = [r for r in gc.get_objects() if type(r) is fl.AdapterRouting and len(r.shape) == 2]
    assert len(kept) <= 16
    routing.update(torch.tensor([0, 0, 1], device=DEVICE))
    for length in (1, 3, 400):
        wide = routing.rows_of(torch.empty(3, length, 8, device=DEVICE))
        assert wide.ids.tolist() == [0] * 2 * length + [1] * length


@pytest.mark.parametrize("num_adapters", [0, -1, 2.0, True])
def test_routing_of_no_adapters(num_adapters):
    ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="num_adapters must be an int of at least 1"):
        fl.AdapterRouting(ids, num_adapters)
    assert fl.AdapterRouting(ids, num_adapters=2).num_adapters == 2


def test_one_routing_serves_layers_of_other_shapes():
    ids = torch.tensor([2, -1, 0], device=DEVICE)
    routing = fl.AdapterRouting(ids, 3)
    for lead, K, N in (((3,), 12, 9), ((3, 4), 9, 12)):
        tensors = make(lead=lead, K=K, N=N)
        slots = slots_of(tensors)
        y = fl.multi_lora_linear(*tensors[:2], slots, routing)
        assert torch.equal(y, fl.multi_lora_linear(*tensors[:2], slots, ids))


@pytest.mark.parametrize("rank", [1, 2])
def test_one_adapter_is_lora_linear(rank):
    x, weight, bias, a, bt, gate, *_ = make(30, ranks=(rank,))
    slots = AdapterSlots(a, bt, torch.tensor([rank], dtype=torch.int32), torch.tensor([1.5]), gate)
    if DEVICE == "cuda":
        slots = AdapterSlots(*(t.cuda() for t in slots))
    ids = torch.zeros(30, dtype=torch.int64, device=DEVICE)
    y = fl.multi_lora_linear(x, weight, slots, ids, bias, dropout_p=0.3, seed=4)
    one = fl.lora_linear(
        x, weight, a[0], bt[0].t(), bias, gate=gate[0], scale=1.5, dropout_p=0.3, seed=4
    )
    assert torch.allclose(y, one, rtol=1e-4, atol=1e-4)
    base = F.linear(x, weight, bias)
    assert not torch.allclose(y, base, rtol=1e-2, atol=1e-2)


def test_kinds_of_ids_are_what_they_say():
    for kind, dtype in itertools.product(KINDS, (torch.int32, torch.int64)):
        ids = ids_of(kind, 200, 8, dtype)
        assert ids.dtype == dtype and ids.shape == (200,) and ids.min() >= -1 and ids.max() < 8
    assert 20 < int((ids_of("some", 200, 8) < 0).sum()) < 80


@backends
@pytest.mark.parametrize("M", [3, 70])
def test_autograd_sees_that_y_was_written(backend, M):
    tensors = make(M, 12, 9, RAGGED)
    ids = ids_of("some", M, 7)
    y = torch.randn(M, 9, device=DEVICE, requires_grad=True).exp()  # which saves its result
    fl.multi_lora_add_(y.detach(), tensors[0], slots_of(tensors), ids, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        z = torch.zeros(M, 9, device=DEVICE)
        assert fl.multi_lora_add_(z, tensors[0], slots_of(tensors), ids, backend=backend) is z
