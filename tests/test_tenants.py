"""One adapter's NaN and infinities stay in its rows and its gradients, bit for bit."""

import pytest
import torch
from cases import slow
from conftest import DEVICE
from fused_lora.triton_kernels import configs
from test_multi_lora_linear import leaves, make, run, slots_of

import fused_lora as fl
from fused_lora.ops import multi_lora_linear as module
from fused_lora.testing import guarded

RANKS = 3, 17, 4
BAD = 1  # the adapter with numbers that are not finite
# Rows in tiles of several adapters, and so few that each reads its own.
BATCHES = {"tile": 40, "decode": 6}
VALUES = {"nan": float("nan"), "inf": float("inf")}
SLOTS = {"A": 3, "B": 4, "gate": 5}

values = pytest.mark.parametrize("value", ["nan", slow("inf")])
batches = pytest.mark.parametrize("batch", BATCHES)


@pytest.fixture(params=["torch", "gpu-torch", "triton"])
def backend(request, monkeypatch) -> str:
    """ "gpu-torch" is what the torch backend does where the host does not look at the ids."""
    if request.param == "gpu-torch":
        monkeypatch.setattr(module, "_on_host", lambda x: False)
    return request.param.removeprefix("gpu-")


def ids_of(batch: str, monkeypatch) -> torch.Tensor:
    M = BATCHES[batch]
    monkeypatch.setattr(configs, "DECODE_ROWS", 64 if batch == "decode" else 0)
    return torch.tensor([0, -1, BAD, 2, BAD, 0] * 7, device=DEVICE)[:M]


def break_slot(tensors, where: str, value: str) -> None:
    """One number of the adapter BAD, and one that only its own ranks and columns have."""
    tensors[SLOTS[where]][BAD].view(-1)[5] = VALUES[value]


def equal_but(rows, got, want) -> bool:
    """Whether all but these rows, or slots, are the same, and finite."""
    others = ~rows
    return torch.equal(got[others], want[others]) and bool(got[others].isfinite().all())


def check_others(ids, got, want) -> None:
    """[y, dx, ..., dA, dB, dg] of other rows and adapters than BAD's."""
    for name, k in (("y", 0), ("dx", 1)):
        assert equal_but(ids == BAD, got[k], want[k]), name
    bad = torch.arange(len(RANKS), device=DEVICE) == BAD
    for name, k in (("dA", 4), ("dB", 5), ("dg", 6)):
        assert equal_but(bad, got[k], want[k]), name


@batches
@pytest.mark.parametrize("where", [*SLOTS, "x", "dy"])
@pytest.mark.parametrize("value, p", [("nan", 0.0), ("inf", 0.0), ("nan", 0.3), slow("inf", 0.3)])
def test_other_rows_and_adapters_are_the_same(backend, batch, where, value, p, monkeypatch):
    ids = ids_of(batch, monkeypatch)
    tensors = leaves(make(len(ids), 40, 33, RANKS))
    dy = guarded((len(ids), 33), device=DEVICE)
    want = run(fl.multi_lora_linear, tensors, ids, dy, backend=backend, dropout_p=p, seed=4)
    broken = leaves([t.clone() for t in tensors])
    with torch.no_grad():
        if where in SLOTS:
            break_slot(broken, where, value)
        elif where == "x":
            broken[0][ids == BAD, 7:9] = VALUES[value]
        else:
            dy = dy.clone()
            dy[ids == BAD, 7] = VALUES[value]
    got = run(fl.multi_lora_linear, broken, ids, dy, backend=backend, dropout_p=p, seed=4)
    check_others(ids, got, want)
    # Nor does what is broken pass for a result.
    own = [got[0][ids == BAD], got[1][ids == BAD], got[4][BAD], got[5][BAD], got[6][BAD]]
    touched = {"A": (0, 1), "B": (0, 1, 2), "gate": (0, 1, 2), "x": (0, 2, 3), "dy": (1, 2, 3)}
    for k in touched[where]:
        assert p > 0 or not own[k].isfinite().all(), k


@values
@pytest.mark.parametrize("where", ["x", "dy"])
def test_a_row_without_adapter_reaches_no_gradient(backend, where, value, monkeypatch):
    ids = ids_of("tile", monkeypatch)
    tensors = leaves(make(len(ids), 40, 33, RANKS))
    dy = guarded((len(ids), 33), device=DEVICE)
    want = run(fl.multi_lora_linear, tensors, ids, dy, backend=backend)
    broken = leaves([t.clone() for t in tensors])
    dy = dy.clone()
    with torch.no_grad():
        (broken[0] if where == "x" else dy)[ids < 0, 7] = VALUES[value]
    got = run(fl.multi_lora_linear, broken, ids, dy, backend=backend)
    for k in (0, 1):
        assert equal_but(ids < 0, got[k], want[k])
    assert all(torch.equal(got[k], want[k]) for k in (4, 5, 6))


@batches
@values
@pytest.mark.parametrize("where", SLOTS)
def test_an_adapter_without_rows_reaches_nothing(backend, batch, where, value, monkeypatch):
    """Nor does one of rank 0: its rows have the base."""
    ids = ids_of(batch, monkeypatch)
    finite = leaves(make(len(ids), 40, 33, RANKS))
    dy = guarded((len(ids), 33), device=DEVICE)
    broken = leaves([t.clone() for t in finite])
    with torch.no_grad():
        break_slot(broken, where, value)
    elsewhere = torch.where(ids == BAD, -1, ids)
    bad = torch.arange(len(RANKS), device=DEVICE) == BAD
    base = run(fl.multi_lora_linear, finite, elsewhere, dy, backend=backend)[0]
    for rank, of_rows in ((RANKS[BAD], elsewhere), (0, ids), (0, elsewhere)):
        cases = []
        for tensors in (finite, broken):
            tensors = [*tensors]
            tensors[6] = torch.where(bad, rank, tensors[6]).int()
            if rank == 0 and tensors[3] is broken[3]:
                tensors[7] = tensors[7].masked_fill(bad, VALUES[value])
            cases.append(run(fl.multi_lora_linear, tensors, of_rows, dy, backend=backend))
        want, got = cases
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert torch.equal(got[0][ids == BAD], base[ids == BAD])
        for k in (4, 5, 6):
            assert equal_but(bad, got[k], want[k])
            assert not got[k][BAD].any()


@batches
@values
@pytest.mark.parametrize("where", [*SLOTS, "x", "removed"])
def test_adding_to_other_rows_is_the_same(backend, batch, where, value, monkeypatch):
    ids = ids_of(batch, monkeypatch)
    tensors = make(len(ids), 40, 33, RANKS)
    base = guarded((len(ids), 70), device=DEVICE)
    banks = [slots_of(tensors)] * 2

    def added(x, banks):
        return fl.multi_lora_add_(base.clone(), x, banks, ids, out_offset=[1, 35], backend=backend)

    want = added(tensors[0], banks)
    broken = [t.clone() for t in tensors]
    if where == "x":
        broken[0][ids == BAD, 7] = VALUES[value]
    else:
        break_slot(broken, "B" if where == "removed" else where, value)
    if where == "removed":
        broken[6][BAD] = 0
    got = added(broken[0], [slots_of(broken), banks[1]])
    assert equal_but(ids == BAD, got, want)
    if where == "removed":
        assert torch.equal(got[ids == BAD, :35], base[ids == BAD, :35])
    else:
        assert not got[ids == BAD, :35].isfinite().all()


def test_what_is_broken_shows_in_every_row_that_the_reference_has(backend, monkeypatch):
    """No number that the definition makes NaN or infinite is finite."""
    ids = ids_of("tile", monkeypatch)
    for where in SLOTS:
        tensors = make(len(ids), 40, 33, RANKS)
        break_slot(tensors, where, "nan")
        call = tensors[0], tensors[1], slots_of(tensors), ids
        y, defined = (
            fl.multi_lora_linear(*call, backend=backend),
            fl.reference.multi_lora_linear(*call),
        )
        assert not bool((y.isfinite() & ~defined.isfinite()).any())


@pytest.mark.parametrize("take_away", ["remove", "clear"])
def test_a_bank_wipes_the_slot_of_an_adapter_that_is_taken_away(take_away):
    bank = fl.AdapterBank(6, 5, max_adapters=2, max_rank=3, device=DEVICE)
    for name in ("kept", "gone"):
        a, b, gate = (guarded(shape, device=DEVICE) for shape in ((3, 6), (5, 3), (3,)))
        if name == "gone":
            a[0, 0] = b[0, 0] = gate[0] = float("nan")
        bank.add(name, a, b, gate=gate, scale=2.0)
    index = bank.index("gone")
    before = [t[bank.table[bank.index("kept")]].clone() for t in (bank.a_slots, bank.bt_slots)]
    getattr(bank, take_away)("gone")
    slot = int(bank.table[index])
    assert not bank.a_slots[slot].any() and not bank.bt_slots[slot].any()
    assert not bank.rank[slot] and not bank.scale[slot] and bool((bank.gate[slot] == 1).all())
    kept = int(bank.table[bank.index("kept")])
    assert torch.equal(bank.a_slots[kept], before[0])
    assert torch.equal(bank.bt_slots[kept], before[1])
