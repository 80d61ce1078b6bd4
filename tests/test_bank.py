"""AdapterBank: names, slots, capacity, training in place, and changes while batches run."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from cases import CUDA_REFUSES, backends
from conftest import DEVICE
from fused_lora.triton_kernels import configs

import fused_lora as fl
from fused_lora.testing import guarded

K, N, RANK = 12, 10, 8


def adapter(r, seed=0, gated=False):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=generator) for s in ((r, K), (N, r)))
    gate = torch.randn(r, generator=generator).to(DEVICE) if gated else None
    return a.to(DEVICE), b.to(DEVICE), gate


def bank_of(n=3, **options):
    return fl.AdapterBank(K, N, n, RANK, device=DEVICE, **options)


def served(bank, x, weight, ids, backend="torch"):
    return fl.multi_lora_linear(x, weight, bank, ids, backend=backend)


def alone(x, weight, held):
    a, b, gate, scale = held
    return fl.lora_linear(x, weight, a, b, gate=gate, scale=scale)


@pytest.fixture(autouse=True)
def of_kernels(request):
    """With the backend "cuda" the bank's own writes are kernels too."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    with fl.use_backend("cuda" if backend == "cuda" else None):
        yield


@pytest.fixture
def x():
    return torch.randn(6, K, device=DEVICE)


@pytest.fixture
def weight():
    return torch.randn(N, K, device=DEVICE)


@backends
def test_each_name_is_served_with_its_adapter(x, weight, backend):
    bank, held = bank_of(), {}
    for i, (name, r) in enumerate((("french", 3), ("code", 8), ("law", 1))):
        a, b, gate = adapter(r, i, gated=i % 2 == 1)
        assert bank.add(name, a, b, scale=1.0 + i, gate=gate) == i == bank.index(name)
        held[i] = a, b, gate, 1.0 + i
    assert bank.names == ["french", "code", "law"] and len(bank) == 3 and "law" in bank
    ids = torch.tensor([2, 0, -1, 1, 0, 2], device=DEVICE)
    y = served(bank, x, weight, ids, backend)
    for i, j in enumerate(ids.tolist()):
        want = x[i] @ weight.t() if j < 0 else alone(x[i], weight, held[j])
        assert torch.allclose(y[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decode_rows", [0, 64], ids=["tiles", "decode"])
@backends
def test_a_thousand_changes(weight, backend, decode_rows, monkeypatch):
    """Against a dictionary of what the bank should hold."""
    monkeypatch.setattr(configs, "DECODE_ROWS", decode_rows)
    random = torch.Generator().manual_seed(1)
    bank, held, ids = bank_of(4), {}, {}

    def draw(n):
        return int(torch.randint(n, (), generator=random))

    x = torch.randn(5, K, device=DEVICE)
    for step in range(1000):
        name = f"adapter {draw(6)}"
        what = ("add", "replace", "remove")[draw(3)]
        a, b, gate = adapter(1 + draw(RANK), step, gated=bool(draw(2)))
        new = {"scale": 0.5 + draw(4), "gate": gate}
        possible = (name in held) != (what == "add") and (what != "add" or len(held) < 4)
        if not possible:
            with pytest.raises(ValueError, match=r"already|slots are taken|there is no adapter"):
                bank.remove(name) if what == "remove" else getattr(bank, what)(name, a, b, **new)
        elif what == "remove":
            bank.remove(name)
            del held[name]
        else:
            index = getattr(bank, what)(name, a, b, **new)
            assert what == "add" or index == ids[name]
            held[name], ids[name] = (a, b, gate, new["scale"]), index
        assert set(bank.names) == set(held)
        assert len({bank.index(n) for n in held}) == len(held)
        if step % 50 == 0:
            by_id = {bank.index(n): h for n, h in held.items()}
            rows = torch.tensor([0, 1, 2, 3, -1], device=DEVICE)
            y = served(bank, x, weight, rows, backend)
            for i, j in enumerate(rows.tolist()):
                # An id that no name has gives the base.
                want = alone(x[i], weight, by_id[j]) if j in by_id else x[i] @ weight.t()
                assert torch.allclose(y[i], want, rtol=1e-4, atol=1e-3), (step, j)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_a_copy_is_a_bank_of_its_own(x, weight, how):
    bank = bank_of()
    a, b, _ = adapter(4)
    index = bank.add("french", a, b, scale=2.0, trainable=True)
    twin, ids = how(bank), torch.full((len(x),), index, device=DEVICE)
    want = served(bank, x, weight, ids, "torch")
    assert torch.equal(served(twin, x, weight, ids, "torch"), want)
    with torch.no_grad():
        twin.parameters("french")[0].mul_(2)
    changed = served(twin, x, weight, ids, "torch")
    assert not torch.equal(changed, want)
    assert torch.equal(served(bank, x, weight, ids, "torch"), want)
    twin.add("german", *adapter(2)[:2], scale=1.0)
    assert twin.names == ["french", "german"] and bank.names == ["french"]


def test_a_removed_name_gives_the_base(x, weight):
    bank = bank_of()
    a, b, _ = adapter(4)
    index = bank.add("french", a, b, scale=2.0)
    bank.remove("french")
    ids = torch.full((6,), index, device=DEVICE)
    assert torch.equal(served(bank, x, weight, ids), served(bank, x, weight, ids * 0 - 1))


@pytest.mark.parametrize("taken", ["clear", "remove"])
@backends
def test_nothing_is_left_in_the_slot_of_an_id(backend, taken):
    bank, new = bank_of(), bank_of()
    index = bank.add("french", *(t.fill_(float("nan")) for t in adapter(4)[:2]), scale=2.0,
                     gate=torch.full((4,), float("inf"), device=DEVICE))  # fmt: skip
    getattr(bank, taken)("french")
    slot = int(bank.table[index])
    for name in ("a_slots", "bt_slots", "rank", "scale", "gate"):
        assert torch.equal(getattr(bank, name)[slot], getattr(new, name)[slot]), name


@backends
def test_replace_leaves_the_old_slot_as_it_was(backend):
    """A batch that was enqueued before reads the old adapter to its end."""
    bank = bank_of()
    a, b, _ = adapter(4)
    index = bank.add("french", a, b, scale=2.0)
    slot = int(bank.table[index])
    bank.replace("french", *adapter(8, 1)[:2], scale=1.0)
    assert int(bank.table[index]) != slot
    assert torch.equal(bank.a_slots[slot, :4], a) and int(bank.rank[slot]) == 4
    assert bank.a_slots.untyped_storage().nbytes() == 4 * RANK * K * 4


@backends
def test_remove_wipes_the_slot(x, weight, backend):
    """What was in it, NaN and inf, is nowhere; others serve as before."""
    bank = bank_of()
    a, b, gate = adapter(4, gated=True)
    bank.add("kept", *adapter(3, 1)[:2], scale=1.0)
    for change in (bank.remove, bank.clear):
        a[0, 0], b[0, 0], gate[0] = float("nan"), float("inf"), float("nan")
        index = bank.add("broken", a, b, scale=2.0, gate=gate)
        change("broken")
        slot = int(bank.table[index])
        for name, value in (
            ("a_slots", 0),
            ("bt_slots", 0),
            ("gate", 1),
            ("scale", 0),
            ("rank", 0),
        ):
            assert (getattr(bank, name)[slot] == value).all(), name
    ids = torch.tensor([0, 1, 0, -1, 1, 0], device=DEVICE)
    y, base = served(bank, x, weight, ids), served(bank, x, weight, ids * 0 - 1)
    assert torch.equal(y[[1, 3, 4]], base[[1, 3, 4]])


def test_an_id_of_choice():
    bank = bank_of(3)
    assert bank.free_ids == [0, 1, 2]
    assert bank.add("a", *adapter(2)[:2], scale=1.0, index=1) == 1
    assert bank.reserve("b") == 0 and bank.free_ids == [2]
    with pytest.raises(ValueError, match=r"index 1 is not free; \[2\] are"):
        bank.add("c", *adapter(2)[:2], scale=1.0, index=1)
    assert bank.names == ["a", "b"]
    assert bank.retire("a") == 1 and bank.names == ["b"] and bank.free_ids == [2]
    bank.free(1)
    assert bank.free_ids == [2, 1]


def test_names_and_leaves_are_whole_beside_changes():
    """What is read while another thread adds and removes is of one moment: index, names, and the
    leaves, which lie in the slots that are named beside them."""
    bank = bank_of(8)
    a, b, _ = adapter(2)
    stop, wrong = threading.Event(), []

    def change():
        while not stop.is_set():
            for i in range(8):
                bank.add(f"adapter {i}", a, b, scale=1.0, trainable=True)
            for i in range(8):
                bank.remove(f"adapter {i}")

    def read():
        try:
            for _ in range(3000):
                places, leaves = bank.leaves()
                assert len(leaves) == 3 * len(places)
                for (slot, rank), leaf in zip(places, leaves[::3], strict=True):
                    assert leaf.data_ptr() == bank.a_slots[slot].data_ptr() and rank == 2
                with pytest.raises(ValueError, match="there is no adapter 'x'"):
                    bank.index("x")
                assert len(bank.names) <= 8
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=change), *(threading.Thread(target=read) for _ in range(2))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join()
    finally:
        stop.set()
        threads[0].join()
        sys.setswitchinterval(interval)
    assert not wrong


def test_gradients_reach_the_adapter_that_was_served(x, weight, monkeypatch):
    """Another takes the slot between the look at the leaves and the product, if it may."""
    bank = bank_of(1)
    bank.add("first", *adapter(2)[:2], scale=1.0, trainable=True)
    first = bank.parameters("first")
    leaves, changed = bank.leaves, threading.Event()

    def swap():
        with bank.lock:
            bank.remove("first")
            bank.add("second", *adapter(2, 5)[:2], scale=1.0, trainable=True)
        changed.set()

    def leaves_and_swap():
        found = leaves()
        threading.Thread(target=swap).start()
        changed.wait(0.5)  # the swap waits for the end of the product
        return found

    monkeypatch.setattr(bank, "leaves", leaves_and_swap)
    ids = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    y = served(bank, x, weight, ids)
    assert changed.wait(60)
    a, b, _ = adapter(2)
    want = fl.lora_linear(x, weight, a, b, scale=1.0)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert all(p.grad is None for p in first)


def test_to_empty_loses_no_adapter_unseen():
    bank = bank_of()
    layer = fl.nn.MultiLoRALinear(K, N, max_adapters=2, max_rank=RANK, device=DEVICE)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight, before)  # the base's, which no one draws anew
    layer.bank.add("a", *adapter(2)[:2], scale=1.0)
    with pytest.raises(RuntimeError, match=r"to_empty would lose the values of adapters \['a'\]"):
        layer.to_empty(device=DEVICE)
    assert torch.equal(layer.weight, before)
    layer.bank.remove("a")
    layer.bank.a_slots.fill_(3)
    layer.to_empty(device=DEVICE)
    for name in ("a_slots", "bt_slots", "rank", "scale", "gate", "table"):
        assert torch.equal(getattr(layer.bank, name)[:2], getattr(bank, name)[:2]), name


@backends
def test_rank_rows_past_the_rank_are_zero(backend):
    bank = bank_of(1)
    bank.add("wide", *adapter(8)[:2], scale=1.0)
    bank.remove("wide")
    bank.add("narrow", *adapter(2)[:2], scale=1.0)
    bank.replace("narrow", *adapter(8)[:2], scale=1.0)
    bank.replace("narrow", *adapter(3)[:2], scale=1.0)
    slot = int(bank.table[0])
    assert not bank.a_slots[slot, 3:].any() and not bank.bt_slots[slot, 3:].any()


@backends
def test_several_adapters_train_in_one_batch_as_they_would_alone(weight, backend):
    bank, alone = bank_of(), []
    for i, r in enumerate((2, 8)):
        a, b, gate = adapter(r, i, gated=i == 1)
        bank.add(f"adapter {i}", a, b, scale=0.5, gate=gate, trainable=True)
        alone.append([t.clone().requires_grad_() for t in (a, b, gate) if t is not None])
    bank.add("served only", *adapter(3, 7)[:2], scale=1.0)
    trained = [p for i in (0, 1) for p in bank.parameters(f"adapter {i}") if p.requires_grad]
    assert len(trained) == 5
    frozen = bank.a_slots[int(bank.table[2])].clone()
    optimizers = [torch.optim.AdamW(ts, lr=1e-2) for ts in (trained, alone[0], alone[1])]
    for step in range(4):
        torch.manual_seed(step)
        x, target = torch.randn(9, K, device=DEVICE), torch.randn(9, N, device=DEVICE)
        ids = torch.tensor([0, 1, 2, -1, 1, 0, 1, 1, 0], device=DEVICE)
        for optimizer in optimizers:
            optimizer.zero_grad()
        y = served(bank, x, weight, ids, backend)
        (y - target).square()[ids < 2].sum().backward()
        for i, ts in enumerate(alone):
            rows = ids == i
            gate = ts[2] if len(ts) == 3 else None
            y = fl.lora_linear(x[rows], weight, ts[0], ts[1], gate=gate, scale=0.5, backend=backend)
            (y - target[rows]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(trained, [*alone[0], *alone[1]], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    # What the optimiser did is what is served, and nothing else moved.
    assert trained[0].data_ptr() == bank.a_slots[0].data_ptr()
    assert torch.equal(bank.a_slots[0, :2], trained[0])
    assert torch.equal(bank.a_slots[int(bank.table[2])], frozen)


def test_replace_of_a_trainable_adapter_keeps_its_parameters():
    bank = bank_of()
    a, b, _ = adapter(4)
    bank.add("french", a, b, scale=1.0, trainable=True)
    lora_a, lora_b, gate = bank.parameters("french")
    assert lora_a.is_leaf and lora_b.shape == (N, 4) and not gate.requires_grad
    new_a, new_b, _ = adapter(4, 9)
    bank.replace("french", new_a, new_b, scale=3.0)
    assert torch.equal(lora_a, new_a) and torch.equal(lora_b, new_b)
    with pytest.raises(ValueError, match=r"trainable with rank 4.* got \[5, 12\]"):
        bank.replace("french", *adapter(5)[:2], scale=1.0)


def test_changes_while_batches_run(weight):
    """Every row of a batch shows one of the two adapters that take turns, whole."""
    bank = bank_of(2)
    held = [(*adapter(r, r)[:2], None, float(r)) for r in (3, 8)]
    bank.add("french", *held[0][:2], scale=held[0][3])
    x, ids = torch.randn(6, K, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    expected = [alone(x, weight, h) for h in held]
    stop = threading.Event()

    def change():
        turn = 0
        while not stop.is_set():
            turn = 1 - turn
            a, b, _, scale = held[turn]
            bank.replace("french", a, b, scale=scale)

    thread = threading.Thread(target=change)
    thread.start()
    seen = set()
    try:
        for _ in range(400):
            y = served(bank, x, weight, ids)
            found = [torch.allclose(y, want, rtol=1e-4, atol=1e-3) for want in expected]
            assert any(found)
            seen.add(found.index(True))
    finally:
        stop.set()
        thread.join()
    assert seen == {0, 1}


def test_half_precision_and_masters():
    bank = bank_of(dtype=torch.bfloat16)
    a, b, _ = adapter(4)
    bank.add("french", a, b, scale=1.0)
    assert torch.equal(bank.a_slots[0, :4], a.bfloat16())
    x, weight = (torch.randn(*s, device=DEVICE).bfloat16() for s in ((5, K), (N, K)))
    ids = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    assert served(bank, x, weight, ids).dtype == torch.bfloat16
    masters = bank_of()
    masters.add("french", a, b, scale=1.0, trainable=True)
    served(masters, x, weight, ids).sum().backward()
    assert masters.parameters("french")[0].grad.dtype == torch.float32


BAD = {
    "rank": (lambda b: b.add("x", *adapter(9)[:2], scale=1.0), "rank 9; the bank takes 1 to .* 8"),
    "lora_a": (
        lambda b: b.add("x", torch.zeros(2, 5), torch.zeros(N, 2), scale=1.0),
        r"lora_a must have shape \[r, K\] = \[any, 12\], got \[2, 5\]",
    ),
    "lora_b": (
        lambda b: b.add("x", torch.zeros(2, K), torch.zeros(2, N), scale=1.0),
        r"lora_b must have shape \[N, r\] = \[10, 2\], got \[2, 10\]",
    ),
    "gate": (
        lambda b: b.add("x", *adapter(2)[:2], scale=1.0, gate=torch.ones(3)),
        r"gate must have shape \[r\] = \[2\], got \[3\]",
    ),
    "scale": (lambda b: b.add("x", *adapter(2)[:2], scale=float("nan")), "scale must be finite"),
    "taken": (lambda b: b.add("a", *adapter(2)[:2], scale=1.0), "there is an adapter 'a' already"),
    "full": (lambda b: b.add("x", *adapter(2)[:2], scale=1.0), "all 2 slots are taken"),
    "unknown": (lambda b: b.index("x"), "there is no adapter 'x'; there are 'a', 'b'"),
    "not trained": (lambda b: b.parameters("a"), "'a' was added without trainable=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    bank = bank_of(2)
    for name in ("a", "b"):
        bank.add(name, *adapter(2)[:2], scale=1.0)
    before = [t.clone() for t in (bank.a_slots, bank.bt_slots, bank.rank, bank.table)]
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(bank)
    after = bank.a_slots, bank.bt_slots, bank.rank, bank.table
    assert all(torch.equal(u, v) for u, v in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, N, 1, 1), ValueError, "in_features must be an int of at least 1, got 0"),
        ((K, N, 1.0, 1), ValueError, "max_adapters must be an int of at least 1, got 1.0"),
        ((K, N, 1, 1, torch.float64), TypeError, "dtype must be float32, bfloat16, float16"),
    ],
)
def test_bad_sizes(arguments, error, message):
    with pytest.raises(error, match=message):
        fl.AdapterBank(*arguments)


@pytest.mark.skipif(CUDA_REFUSES is not None, reason=str(CUDA_REFUSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "step2", "expanded"])
def test_kernels_write_a_slot_as_torch_does(dtype, layout):
    a, b = (guarded(s, layout, device=DEVICE) for s in ((5, K), (N, 5)))
    gate = guarded((5,), device=DEVICE)
    banks = []
    for backend in ("torch", "cuda"):
        with fl.use_backend(backend):
            bank = bank_of(2, dtype=dtype)
            bank.add("kept", *adapter(RANK)[:2], scale=1.0)
            bank.add("french", *adapter(RANK, 1)[:2], scale=1.0)
            version = bank.a_slots._version
            bank.replace("french", a, b, scale=0.75, gate=gate)
            assert bank.a_slots._version > version
            banks.append(bank)
    for name in ("a_slots", "bt_slots", "rank", "scale", "gate", "table"):
        mine, theirs = (getattr(bank, name) for bank in banks)
        assert torch.equal(mine, theirs), name
