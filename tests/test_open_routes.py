"""Routes of an AdapterStore: what they keep in use, and where they are seen."""

import asyncio
import contextlib
import copy
import gc
import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEVICE
from served import K, added, adding, linear, ones, served
from torch.utils.checkpoint import checkpoint

import fused_lora as fl

ALL_IN_USE = "all slots are in use"
UNROUTED = (
    r"called without a route while one is open .* store\.bind\(function\).*store\.route\(None"
)


def in_thread(fn, *args):
    """What fn returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn, *args).result()


# What is in use.


def test_a_slot_in_use_is_not_given_away():
    model, store = served(names={"alice": 1, "bob": 2})

    def others():
        with store.route(["bob"]):
            pass
        store.add("carol", adding(4))  # bob was used last, and gives way: alice is in use

    with store.route(["alice"]):
        assert added(model(ones(1))) == [1]
        in_thread(others)
        assert added(model(ones(1))) == [1]
    assert set(store.names) == {"alice", "carol"}
    store.add("dora", adding(8))
    assert set(store.names) == {"carol", "dora"}


def test_add_says_that_all_slots_are_in_use():
    model, store = served(names={"alice": 1, "bob": 2})
    with store.route(["alice", "bob"]):
        for call in (
            lambda: store.add("carol", adding(4)),
            lambda: in_thread(lambda: store.add("carol", adding(4))),
            lambda: in_thread(lambda: store.add("carol", adding(4), timeout=0.01)),
        ):
            with pytest.raises(RuntimeError, match=f"{ALL_IN_USE}: open routes use 'alice', 'bob'"):
                call()
        assert added(model(ones(2))) == [1, 2] and set(store.names) == {"alice", "bob"}
    store.add("carol", adding(4))


def test_add_waits_for_a_route_to_end():
    model, store = served(max_adapters=1, names={"alice": 1})
    opened, end = threading.Event(), threading.Event()

    def request():
        with store.route(["alice"]):
            opened.set()
            end.wait(60)
            return added(model(ones(1)))

    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(request)
        assert opened.wait(60)
        adds = pool.submit(store.add, "bob", adding(2), timeout=60)
        with pytest.raises(RuntimeError, match=ALL_IN_USE):
            store.add("carol", adding(4))
        assert not adds.done()
        end.set()
        assert answer.result() == [1] and adds.result() == 0
    assert store.names == ["bob"]


def test_nobody_waits_for_the_own_route():
    _, store = served(max_adapters=2, names={"alice": 1, "bob": 2})
    store.pin("bob")
    start = time.monotonic()
    with store.route(["alice"]), pytest.raises(RuntimeError, match="wait for its own end"):
        store.add("carol", adding(4), timeout=600)
    with store.route(["alice", "bob"]), pytest.raises(RuntimeError, match="wait for its own end"):
        store.replace("alice", adding(4))
    assert time.monotonic() - start < 300


@pytest.mark.parametrize("kind", ["names", "ids", "tokens"])
def test_a_removed_name_serves_its_routes_to_their_end(kind):
    model, store = served(max_adapters=3, names={"alice": 1, "bob": 2})
    routed = {
        "names": ["alice", "bob"],
        "ids": store.ids(["alice", "bob"]),
        "tokens": store.ids(["alice", "bob"])[:, None].expand(2, 3),
    }[kind]
    x = ones(2, 3)
    with store.route(routed):
        with store.route(routed):
            store.remove("alice")
            assert store.names == ["bob"]
            with pytest.raises(ValueError, match="no adapter 'alice'"):
                store.ids(["alice"])
        assert store.add("carol", adding(4)) == 2
        assert store.add("alice", adding(8)) not in (0, 1) if DEVICE == "cuda" else True
        assert added(model(x)) == [[1] * 3, [2] * 3]
    for layer in store.layers.values():
        assert 0 in layer.bank.free_ids or "alice" in store.names
    with store.route(["bob", "carol"]):
        assert added(model(x)) == [[2] * 3, [4] * 3]


def test_remove_wipes_the_slot_when_its_last_route_ends():
    model, store = served(names={"alice": float("nan")})
    bank = store.layers["0"].bank
    with store.route(["alice"]):
        store.remove("alice")
        assert bank.bt_slots.isnan().any()
    assert not bank.bt_slots.isnan().any() and not bank.a_slots.any() and not bank.rank.any()
    assert (bank.gate == 1).all() and not bank.scale.any()
    with store.route(torch.tensor([0], device=DEVICE)):
        assert added(model(ones(1))) == [0]


def test_ids_that_no_adapter_has_are_in_use_too():
    model, store = served(names={})
    with store.route(torch.tensor([0, 1], device=DEVICE)), pytest.raises(RuntimeError):
        store.add("alice", adding(1))
    with store.route(torch.tensor([0, -1])):
        assert store.add("alice", adding(1)) == 1


def test_a_routing_uses_every_id_unless_names_are_given():
    model, store = served(names={"alice": 1, "bob": 2})
    routing = fl.AdapterRouting(store.ids(["alice", "alice"]), 2)
    with store.route(routing), pytest.raises(RuntimeError, match=ALL_IN_USE):
        store.add("carol", adding(4))
    with store.route(routing, uses=["alice"]):
        assert store.add("carol", adding(4)) == 1
        assert added(model(ones(2))) == [1, 1]
    with pytest.raises(TypeError, match="uses is for ids or an AdapterRouting"):
        store.route(["alice"], uses=["alice"]).__enter__()


def test_replace_leaves_open_routes_what_they_began_with():
    model, store = served(names={"alice": 1})
    with store.route(["alice"]):
        assert store.replace("alice", adding(4)) == 1
        assert added(model(ones(1))) == [1]
        with store.route(["alice"]):
            assert added(model(ones(1))) == [4]
        assert added(model(ones(1))) == [1]
    with store.route(["alice"]):
        assert added(model(ones(1))) == [4]
    assert store.replace("alice", adding(8)) == 1  # not in use: the id stays


def test_an_error_in_a_route_ends_it():
    model, store = served(max_adapters=1, names={"alice": 1})
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), store.route(["alice"]):
            raise error
        with pytest.raises(ValueError), store.route(["alice"]):
            model(torch.ones(1, K + 1, device=DEVICE))
    assert added(model(ones(1))) == [0]
    store.add("bob", adding(2))


def test_a_route_that_fails_to_open_holds_nothing():
    _, store = served(max_adapters=1, names={"alice": 1})
    block = store.route(["alice", "nobody"])
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        block.__enter__()
    block = store.route(["alice"])
    with block, pytest.raises(RuntimeError, match="open already"):
        block.__enter__()
    store.add("bob", adding(2))


# Where a route is seen.


def test_routes_are_of_their_thread():
    model, store = served(names={"alice": 1})

    def base():
        with store.route(None):
            return added(model(ones(2)))

    with store.route(["alice", "alice"]):
        with pytest.raises(RuntimeError, match=UNROUTED):
            in_thread(model, ones(2))
        assert in_thread(base) == [0, 0]
        with store.route(None):
            assert added(model(ones(2))) == [0, 0]
        assert added(model(ones(2))) == [1, 1]
    assert in_thread(lambda: added(model(ones(2)))) == [0, 0]


def test_bind_carries_the_route_past_its_end():
    model, store = served(max_adapters=1, names={"alice": 1})
    with store.route(["alice"]):
        bound = store.bind(model)
        assert added(in_thread(bound, ones(1))) == [1]
    base = store.bind(model)
    with pytest.raises(RuntimeError, match=ALL_IN_USE):
        store.add("bob", adding(2))
    with store.route([None]):
        assert added(bound(ones(1))) == [1] and added(base(ones(1))) == [0]
    assert added(in_thread(bound, ones(1))) == [1]
    del bound
    store.add("bob", adding(2))
    with store.route(["bob"]):
        assert added(in_thread(base, ones(1))) == [0]


def test_bind_of_what_is_no_plain_function():
    model, store = served(names={"alice": 1})

    async def answer():
        await asyncio.sleep(0)
        return added(model(ones(1)))

    def stream():
        yield model(ones(1))

    with store.route(["alice"]):
        bound = store.bind(answer)
        with pytest.raises(TypeError, match="got a generator function; open the route in it"):
            store.bind(stream)
        with pytest.raises(TypeError, match="takes a function, got a int"):
            store.bind(3)
    assert asyncio.run(bound()) == [1]


def test_tasks_have_routes_of_their_own():
    model, store = served(names={"alice": 1, "bob": 2})

    async def answer(name):
        with store.route([name]):
            for _ in range(3):
                await asyncio.sleep(0)
                seen = added(model(ones(1)))
        return seen

    async def late(gate):
        await gate.wait()
        return model(ones(1))

    async def main():
        assert await asyncio.gather(*map(answer, ("alice", "bob", None))) == [[1], [2], [0]]
        gate = asyncio.Event()
        with store.route(["alice"]):
            task = asyncio.create_task(late(gate))
            bound = asyncio.create_task(store.bind(late)(gate))
            await asyncio.sleep(0)
        gate.set()
        with pytest.raises(RuntimeError, match="the route that this task or thread began in has"):
            await task
        assert added(await bound) == [1]

    asyncio.run(main())


def test_a_generator_keeps_its_route_to_itself():
    model, store = served(max_adapters=3, names={"alice": 1, "bob": 2})

    def stream(name):
        with store.route([name]):
            while True:
                yield added(model(ones(1)))

    alice, bob = stream("alice"), stream("bob")
    for _ in range(2):
        assert next(alice) == [1] and next(bob) == [2]
    with pytest.raises(RuntimeError, match=UNROUTED):
        model(ones(1))  # neither is that of who reads the streams
    with store.route([None]):
        assert next(alice) == [1] and added(model(ones(1))) == [0]
    alice.close()  # the first to begin is the first to end
    assert next(bob) == [2]
    del bob
    gc.collect()
    assert added(model(ones(1))) == [0]
    store.add("carol", adding(4))
    store.add("dora", adding(8))

    @contextlib.contextmanager
    def own(name):
        with store.route([name]):
            yield

    with own("dora"), contextlib.ExitStack() as stack:
        assert added(model(ones(1))) == [8]
        stack.enter_context(store.route(["carol"]))
        assert added(model(ones(1))) == [4]


def test_an_async_generator_keeps_its_route_to_itself():
    model, store = served(names={"alice": 1, "bob": 2})

    async def stream(name):
        with store.route([name]):
            while True:
                await asyncio.sleep(0)
                yield added(model(ones(1)))

    async def main():
        alice, bob = stream("alice"), stream("bob")
        for _ in range(2):
            assert await anext(alice) == [1] and await anext(bob) == [2]
        with store.route(None):
            assert added(model(ones(1))) == [0]
        await alice.aclose()
        assert await anext(bob) == [2]
        await bob.aclose()
        assert added(model(ones(1))) == [0]

    asyncio.run(main())


# Checkpoints.


class Deep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(K, K), torch.nn.GELU(), torch.nn.Linear(K, K))
            for _ in range(3)
        )
        self.run = lambda block, x: block(x)

    def forward(self, x):
        for block in self.blocks:
            x = x + self.run(block, x)
        return x


def deep():
    torch.manual_seed(0)
    model = Deep().to(DEVICE)
    store = fl.AdapterStore(model, 2, 4)
    for name in ("alice", "bob"):
        store.add(
            name,
            {
                layer: (
                    torch.randn(2, K, device=DEVICE),
                    torch.randn(K, 2, device=DEVICE),
                    1.0,
                    None,
                )
                for layer in store.layers
            },
        )
    return model, store, torch.randn(3, 2, K, device=DEVICE)


@pytest.mark.parametrize("where", ["in the route", "after it", "in another one", "in a thread"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    "routed",
    [["alice", None, "bob"], ["alice"] * 3, None, "not at all"],
    ids=["mixed", "alice", "base", "unrouted"],
)
def test_a_recomputation_sees_the_route_of_its_forward(reentrant, where, routed):
    model, store, x = deep()

    def gradient(where):
        leaf = x.clone().requires_grad_()
        with contextlib.nullcontext() if routed == "not at all" else store.route(routed):
            loss = model(leaf).square().sum()
            if where == "in the route":
                loss.backward()
        if where == "after it":
            loss.backward()
        elif where == "in another one":
            with store.route(["bob", "alice", None]):
                loss.backward()
        elif where == "in a thread":
            in_thread(loss.backward)
        return leaf.grad

    want = gradient("in the route")
    model.run = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    assert torch.equal(gradient(where), want)
    # A checkpoint in another.
    model.run = lambda block, x: checkpoint(
        lambda x: checkpoint(block, x, use_reentrant=reentrant), x, use_reentrant=reentrant
    )
    assert torch.equal(gradient(where), want)


def test_checkpoints_of_others_are_as_before():
    """With a store in the process: of a function without a served layer, in a graph too."""
    deep()
    linear = torch.nn.Linear(K, K).to(DEVICE)
    x = torch.randn(3, K, device=DEVICE)

    def gradient(run):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        return leaf.grad

    want = gradient(linear)
    torch._dynamo.reset()
    for reentrant in (True, False):
        in_checkpoint = lambda x, r=reentrant: checkpoint(linear, x, use_reentrant=r)  # noqa: E731
        assert torch.equal(gradient(in_checkpoint), want)
    graph = torch.compile(in_checkpoint, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(graph), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_keeps_its_adapters_in_use(reentrant):
    model, store, x = deep()
    leaf = x.clone().requires_grad_()
    model.run = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    with store.route(["alice"] * 3):
        loss = model(leaf).square().sum()
    with store.route(["bob"] * 3):
        pass
    store.add("carol", {})
    assert set(store.names) == {"alice", "carol"}  # bob gave way
    store.remove("alice")
    with pytest.raises(RuntimeError, match=f"{ALL_IN_USE}: .*1 removed adapters"):
        store.pin("carol")
        store.add("dora", {})
    del loss
    gc.collect()
    store.add("dora", {})


def test_a_recomputation_that_knows_no_route_is_an_error():
    """That of a checkpoint which is not torch's."""
    model, store, x = deep()

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, fn, x):
            ctx.fn, ctx.x = fn, x
            with torch.no_grad():
                return fn(x)

        @staticmethod
        def backward(ctx, dy):
            x = ctx.x.detach().requires_grad_()
            with torch.enable_grad():
                ctx.fn(x).backward(dy)
            return None, x.grad

    def gradient(run):
        leaf = x.clone().requires_grad_()
        model.run = run
        with store.route(["alice", "bob", None]):
            loss = model(leaf).square().sum()
        loss.backward()
        return leaf.grad

    want = gradient(lambda block, x: block(x))
    with pytest.raises(RuntimeError, match=r"in a backward pass, .* store\.bind\(function\)"):
        gradient(lambda block, x: Again.apply(block, x))
    assert torch.equal(gradient(lambda block, x: Again.apply(store.bind(block), x)), want)


# Copies.


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_a_store_of_its_own(copied):
    model, store = served(max_adapters=3, names={"alice": 1, "bob": 2})
    with store.route(["alice", "bob"]):
        store.remove("bob")
        other = copied(model)
        with pytest.raises(
            RuntimeError, match=r"is a copy, .*AdapterStore\.of\(model\) is its own"
        ):
            other(ones(2))
    mine = fl.AdapterStore.of(other)
    assert mine is not store and fl.AdapterStore.of(model) is store and mine.names == ["alice"]
    mine.replace("alice", adding(8))
    mine.add("carol", adding(4))
    mine.add("dora", adding(16))
    with mine.route(["alice", "carol", "dora"]):
        assert added(other(ones(3))) == [8, 4, 16]
    with store.route(["alice"]):
        assert added(model(ones(1))) == [1]
    both, one = copied((model, store))
    assert fl.AdapterStore.of(both) is one
    with pytest.raises(ValueError, match="no layer that a store serves"):
        fl.AdapterStore.of(linear())


def test_a_model_is_saved_whole(tmp_path):
    model, store = served(names={"alice": 1})
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with fl.AdapterStore.of(again).route(["alice"]):
        assert added(again(ones(1))) == [1]


# Threads.


def stress(seconds: float, rounds: int) -> None:
    """8 threads route, add, remove and replace; every row is that of its adapter, whole.

    Adapter v adds v in each of two layers in which 0 and v have nothing in common with a mixture.
    """
    names = [f"n{i}" for i in range(6)]
    model = torch.nn.Sequential(linear(), linear())
    _, store = served(model, max_adapters=3)
    versions = dict.fromkeys(names, 0)
    wrong: list = []
    guard = threading.Lock()
    end = time.monotonic() + seconds

    def value(i, version):
        return float((i + 1) + 16 * version)

    def weights(i, version):
        return adding(value(i, version), ["0"]) | adding(1024 * value(i, version), ["1"])

    def serve(seed):
        rng = random.Random(seed)
        for _ in range(rounds):
            if time.monotonic() > end:
                return
            i = rng.randrange(len(names))
            name, action = names[i], rng.choice(("route", "route", "route", "put", "remove"))
            try:
                if action == "put":
                    with guard:
                        versions[name] = (versions[name] + 1) % 8
                        version = versions[name]
                    if name in store:
                        store.replace(name, weights(i, version), timeout=0.2)
                    else:
                        store.add(name, weights(i, version), timeout=0.2)
                elif action == "remove":
                    store.remove(name)
                else:
                    batch = [rng.choice((name, None)) for _ in range(3)]
                    with store.route(batch):
                        seen = [added(model(ones(3))) for _ in range(2)]
                    check(batch, i, *seen)
            except (ValueError, RuntimeError) as error:
                known = "no adapter", "adapter '", "slots are in use"
                if not any(word in str(error) for word in known):
                    wrong.append(error)

    def check(batch, i, first, again):
        wholes = {value(i, version) * 1024 + value(i, version) for version in range(8)}
        rows = {y for name, y in zip(batch, first, strict=True) if name is not None}
        base = {y for name, y in zip(batch, first, strict=True) if name is None}
        if first != again or len(rows) > 1 or not rows <= wholes or not base <= {0}:
            wrong.append((batch, i, first, again))

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert not store._retired and not any(store._in_use) and not store._open


def test_threads_get_no_other_adapter():
    stress(seconds=60, rounds=120)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_threads_get_no_other_adapter_for_long():
    stress(seconds=90, rounds=10**9)
