"""One adapter's numbers stay in its rows and gradients: with the CUDA C++ kernels NaN or infinity
in an adapter, or in its rows of x and dy, changes no bit of another's."""

import functools

import pytest
import torch
from cases import CUDA_REFUSES, slow
from conftest import DEVICE
from test_multi_lora_linear import make, slots_of

import fused_lora as fl
from fused_lora import reference
from fused_lora.ops.multi_lora_linear import Slots
from fused_lora.testing import guarded

pytestmark = pytest.mark.skipif(CUDA_REFUSES is not None, reason=str(CUDA_REFUSES))
RANKS, K, N = (3, 70, 17), 40, 72
SICK = 1  # of a rank with two K steps, of which the last is a part
NAMES = {"a": 3, "b": 4, "gate": 5, "scale": 7}
values = pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)


def ids_of(M: int, runs: bool = False) -> torch.Tensor:
    """[0, -1, 1] in three rows; else all adapters and none, in every 16 rows or in runs."""
    ids = torch.tensor([0, -1, 1]) if M == 3 else torch.arange(M) % 4 - 1
    return (ids.sort().values if runs else ids).to(DEVICE)


@functools.cache
def case(M: int, dtype: torch.dtype, runs: bool):
    """x ..., scale, dy and ids."""
    torch.manual_seed(M)
    tensors = [*make(M, K, N, RANKS, dtype=dtype), guarded((M, N), dtype=dtype, device=DEVICE)]
    return tensors, ids_of(M, runs)


def spoil(tensors, ids, what: str, value: float):
    """The same with `value` in two elements of an adapter, or of each of its rows."""
    tensors = [t if t is None else t.clone() for t in tensors]
    if what in ("x", "dy"):
        own = tensors[0 if what == "x" else 8]
        rows = (ids == SICK).nonzero()[:, 0]
        own[rows, 0] = own[rows, -1] = value
    elif what == "scale":
        tensors[7][SICK] = value
    else:
        own = tensors[NAMES[what]][SICK, : RANKS[SICK]]
        own[0].fill_(value) if own.ndim == 1 else own[:, 0].fill_(value)
        own[-1] = value
    return tensors


def step(tensors, ids, p: float):
    """({name: what rows have}, {name: what slots have}) of a step, and of what adds to y."""
    floats = [t.detach().requires_grad_() for t in tensors[:6]]
    slots = slots_of([*floats, *tensors[6:8]])
    options = {"backend": "cuda", "dropout_p": p, "seed": 3}
    y = fl.multi_lora_linear(floats[0], floats[1], slots, ids, floats[2], **options)
    wanted = [floats[i] for i in (0, 3, 4, 5)]
    dx, da, dbt, dgate = torch.autograd.grad(y, wanted, tensors[8])
    with torch.no_grad():
        few = fl.multi_lora_linear(floats[0], floats[1], slots, ids, floats[2], **options)
        part = torch.ones_like(y)
        fl.multi_lora_add_(part, floats[0].detach(), slots, ids, backend="cuda")
    rows = {"y": y.detach(), "dx": dx, "y without gradients": few, "y that is added to": part}
    return rows, {"da": da, "dbt": dbt, "dgate": dgate}


def hold_others(got, want, ids, sick=SICK):
    """Bit for bit, but for the rows and the slot of one adapter."""
    (rows, slots), (want_rows, want_slots) = got, want
    others = torch.arange(len(RANKS), device=ids.device) != sick
    for name, t in rows.items():
        assert torch.equal(t[ids != sick], want_rows[name][ids != sick]), name
    for name, t in slots.items():
        assert torch.equal(t[others], want_slots[name][others]), name


@functools.cache
def finite(M, dtype, runs, p):
    tensors, ids = case(M, dtype, runs)
    rows, slots = step(tensors, ids, p)
    assert all(t.isfinite().all() for t in (*rows.values(), *slots.values()))
    return rows, slots


@values
@pytest.mark.parametrize("what", ["a", "b", "gate", "scale", "x", "dy"])
@pytest.mark.parametrize("M, dtype, runs, p", [
    (3, torch.float16, False, 0.0), (3, torch.float32, False, 0.0), (65, torch.float16, False, 0.3),
    slow(65, torch.float16, True, 0.0), slow(70, torch.bfloat16, False, 0.0),
    slow(66, torch.float32, True, 0.3), slow(64, torch.bfloat16, True, 0.0),
])  # fmt: skip
def test_others_are_not_touched(M, dtype, runs, p, what, value):
    tensors, ids = case(M, dtype, runs)
    got = step(spoil(tensors, ids, what, value), ids, p)
    hold_others(got, finite(M, dtype, runs, p), ids)
    own = ids == SICK
    rows, slots = got
    assert not rows["dx" if what == "dy" else "y"][own].isfinite().all(1).any()
    assert not all(t[SICK].isfinite().all() for t in slots.values())


@values
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("M", [3, 65])
def test_a_slot_of_rank_0_is_not_looked_at(M, dtype, value):
    """As that of an adapter which was removed is, whatever lies there."""
    tensors, ids = case(M, dtype, False)
    spoiled = tensors
    for what in NAMES:
        spoiled = spoil(spoiled, ids, what, value)
    spoiled[6] = tensors[6].clone()
    spoiled[6][SICK] = 0
    got = step(spoiled, ids, 0.0)
    hold_others(got, finite(M, dtype, False, 0.0), ids)
    rows, slots = got
    own = ids == SICK
    base = step(tensors, torch.full_like(ids, -1), 0.0)[0]
    for name in ("y", "dx", "y that is added to"):
        assert torch.equal(rows[name][own], base[name][own]), name
    assert not any(t[SICK].any() for t in slots.values())


@values
@pytest.mark.parametrize("M", [3, 65])
def test_an_adapter_without_rows_gets_no_gradient(M, value):
    tensors, _ = case(M, torch.float16, False)
    ids = torch.tensor([0, 2, -1], device=DEVICE).repeat(22)[:M]
    want = step(tensors, ids, 0.0)
    spoiled = tensors
    for what in NAMES:
        spoiled = spoil(spoiled, ids, what, value)
    got = step(spoiled, ids, 0.0)
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not any(t[SICK].any() for t in got[1].values())


@values
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("M", [slow(1), slow(16), 33, slow(130)])
def test_every_tile_of_the_product(M, block_m, masked, value):
    from fused_lora import cuda_kernels

    tensors, _ = case(M, torch.float16, False)
    ids = ids_of(M)
    routing = fl.AdapterRouting(ids, len(RANKS))
    t = guarded((M, max(RANKS)), dtype=torch.float16, device=DEVICE)
    bits = cuda_kernels.dropout_bits(
        torch.tensor([5], device=DEVICE), M, N, reference.dropout_threshold(0.3)
    )

    table = torch.arange(len(RANKS), dtype=torch.int32, device=DEVICE)

    def product(tensors, t):
        rest = t, tensors[4], Slots(*slots_of(tensors[:8]), table), routing
        mask = (bits, 2.0) if masked else None
        y = cuda_kernels.multi_segment_gemm(*tensors[:2], *rest, mask=mask, block_m=block_m)
        part = torch.ones_like(y)
        cuda_kernels.multi_segment_add_(part, *rest, block_m=block_m)
        return y, part

    want = product(tensors, t)
    spoiled = t.clone()
    spoiled[ids == SICK] = value
    for got in (product(spoil(tensors, ids, "b", value), t), product(tensors, spoiled)):
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine[ids != SICK], theirs[ids != SICK])
            assert not mine[ids == SICK].isfinite().all(1).any()


@values
@pytest.mark.parametrize("M, dtype, p", [
    (3, torch.float16, 0.0), (3, torch.float32, 0.3), slow(65, torch.float16, 0.3),
])  # fmt: skip
def test_a_row_is_not_touched_by_another(M, dtype, p, value):
    """Of one adapter, and of W0 alone."""
    tensors, ids = case(M, dtype, False)
    weight, a, bt, dy = tensors[1], tensors[3][2, :17], tensors[4][2, :17], tensors[8]

    def run(x, dy):
        x = x.detach().requires_grad_()
        options = {"scale": 0.5, "backend": "cuda"}
        y = fl.lora_linear(x, weight, a, bt.t(), dropout_p=p, seed=3, **options)
        (dx,) = torch.autograd.grad(y, x, dy)
        with torch.no_grad():
            few = fl.lora_linear(x, weight, a, bt.t(), **options)
        return y.detach(), dx, few

    want = run(tensors[0], dy)
    sick = ids == SICK
    spoiled = spoil(spoil(tensors, ids, "x", value), ids, "dy", value)
    for mine, theirs in zip(run(spoiled[0], spoiled[8]), want, strict=True):
        assert torch.equal(mine[~sick], theirs[~sick])
        assert not mine[sick].isfinite().all(1).any()
