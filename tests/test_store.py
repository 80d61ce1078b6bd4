"""AdapterStore and MultiLoRALinear: a whole model with many adapters, beside PEFT's mixed batch."""

import copy
import random
import threading

import pytest
import torch
from conftest import DEVICE, SEED
from tiny_llama import tiny_llama

import fused_lora as fl
from fused_lora.checkpoint import AdapterWeights
from fused_lora.nn import LoRALinear, MultiLoRALinear

K, N = 12, 9


def weights(r=3, K=K, N=N, scale=0.5, gate=None, std=1.0):
    a, b = (torch.randn(r, K, device=DEVICE) * std, torch.randn(N, r, device=DEVICE) * std)
    return AdapterWeights(a, b, scale, gate)


def layer(**options) -> MultiLoRALinear:
    options = {"max_adapters": 4, "max_rank": 8, **options}
    return MultiLoRALinear(K, N, device=DEVICE, **options)


def mlp() -> torch.nn.Sequential:
    linear = torch.nn.Linear
    return torch.nn.Sequential(linear(K, 16), torch.nn.GELU(), linear(16, N)).to(DEVICE)


def adapter(r=3) -> dict[str, AdapterWeights]:
    return {"0": weights(r, K, 16), "2": weights(r + 1, 16, N)}


# The layer.


def test_layer_is_the_op():
    tested = layer()
    for name in "ab":
        tested.bank.add(name, *weights()[:2], scale=0.5)
    x, ids = torch.randn(5, K, device=DEVICE), torch.tensor([0, 1, -1, 1, 0], device=DEVICE)
    want = fl.multi_lora_linear(x, tested.weight, tested.bank, ids, tested.bias)
    assert torch.equal(tested(x, ids), want)
    assert torch.equal(tested(x, fl.AdapterRouting(ids, 4)), want)
    assert torch.equal(tested(x), torch.nn.functional.linear(x, tested.weight, tested.bias))
    assert isinstance(tested, torch.nn.Linear) and "adapters=2" in repr(tested)
    assert set(tested.state_dict()) == {"weight", "bias"}
    assert not any(p.requires_grad for p in tested.parameters())


def test_from_linear_shares_and_freezes():
    linear = torch.nn.Linear(K, N, bias=False).eval()
    made = MultiLoRALinear.from_linear(linear, 2, 4)
    assert made.weight is linear.weight and made.bias is None and not made.training
    assert not linear.weight.requires_grad
    with pytest.raises(TypeError, match=r"only a plain torch\.nn\.Linear can be adapted"):
        MultiLoRALinear.from_linear(made, 2, 4)
    with pytest.raises(TypeError, match=r"adapter_dtype must be None, torch\.float32 or"):
        MultiLoRALinear.from_linear(linear, 2, 4, adapter_dtype=torch.float16)
    with pytest.raises(ValueError, match="lora_dropout must lie in"):
        layer(lora_dropout=1.5)
    with pytest.raises(ValueError, match="max_rank must be an int of at least 1, got 0"):
        layer(max_rank=0)


def test_dropout_is_for_training_and_seeded():
    tested = layer(lora_dropout=0.5)
    tested.bank.add("a", *weights()[:2], scale=1.0)
    x, ids = torch.randn(40, K, device=DEVICE), torch.zeros(40, dtype=torch.int64, device=DEVICE)
    torch.manual_seed(3)
    first, other = tested(x, ids), tested(x, ids)
    torch.manual_seed(3)
    assert torch.equal(tested(x, ids), first) and not torch.equal(first, other)
    tested.eval()
    assert torch.equal(tested(x, ids), tested(x, ids))


def test_adapters_follow_the_layer_and_stay_trainable():
    tested = layer()
    tested.bank.add("a", *weights()[:2], scale=0.5, trainable=True)
    leaves = tested.bank.parameters("a")
    optimizer = torch.optim.SGD(leaves[:2], lr=0.1)
    before = [p.detach().clone() for p in leaves]
    tested.double()
    assert tested.bank.a_slots.dtype == torch.float64 and tested.bank.gate.dtype == torch.float32
    assert all(p is q for p, q in zip(leaves, tested.bank.parameters("a"), strict=True))
    tested.float()
    assert all(torch.equal(p, q) for p, q in zip(leaves, before, strict=True))
    x, ids = torch.randn(5, K, device=DEVICE), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    y = tested(x, ids)
    y.square().sum().backward()
    optimizer.step()
    assert not torch.equal(tested(x, ids), y)  # what the optimizer wrote is what the slots hold


# The store.


def test_rows_have_their_own_adapters():
    model, adapters = mlp(), {name: adapter(r) for name, r in (("a", 2), ("b", 5))}
    del adapters["b"]["2"]  # an adapter may lack a layer
    alone = {}
    for name, found in adapters.items():
        one = copy.deepcopy(model)
        for module, own in found.items():
            linear = one.get_submodule(module)
            with torch.no_grad():
                linear.weight += own.scale * own.lora_b @ own.lora_a
        alone[name] = one
    alone[None] = copy.deepcopy(model)
    store = fl.AdapterStore(model, 3, 8)
    for name, found in adapters.items():
        store.add(name, found)
    x = torch.randn(5, K, device=DEVICE)
    names = ["b", None, "a", "a", "b"]
    want = torch.stack([alone[name](row) for name, row in zip(names, x, strict=True)])
    with store.route(names) as routing:
        got = model(x)
        again = model(x[:, None].expand(5, 3, K))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, want[:, None].expand(5, 3, N), rtol=1e-4, atol=1e-4)
    assert routing.ids.tolist() == [1, -1, 0, 0, 1]
    assert torch.equal(model(x), alone[None](x))  # outside of the block
    with store.route(torch.tensor([[0, 1, -1]] * 5, device=DEVICE)):
        tokens = model(x[:, None].expand(5, 3, K))
    for i, name in enumerate(("a", "b", None)):
        torch.testing.assert_close(tokens[:, i], alone[name](x), rtol=1e-4, atol=1e-4)


def test_the_least_recently_used_gives_way_and_the_pinned_stays():
    store = fl.AdapterStore(mlp(), 3, 8)
    store.add("a", adapter(), pin=True)
    store.add("b", adapter())
    store.add("c", adapter())
    with store.route(["b"]):
        pass
    index = store.index("c")
    assert store.add("d", adapter()) == index
    assert set(store.names) == {"a", "b", "d"} and "c" not in store and len(store) == 3
    store.pin("b")
    store.pin("d")
    with pytest.raises(ValueError, match="all 3 adapters are pinned; unpin or remove one"):
        store.add("e", adapter())
    store.unpin("a")
    store.add("e", adapter())
    assert set(store.names) == {"b", "d", "e"}


def test_ids_agree_in_every_layer_and_removed_rows_get_the_base():
    model = mlp()
    base = copy.deepcopy(model)
    store = fl.AdapterStore(model, 3, 8)
    store.add("a", {"2": weights(3, 16, N)})
    store.add("b", adapter())
    for found in store.layers.values():
        assert {name: found.bank.index(name) for name in store.names} == {"a": 0, "b": 1}
    x = torch.randn(4, K, device=DEVICE)
    ids = store.ids(["a", "b", "a", None])
    store.remove("a")
    with store.route(ids):
        y = model(x)
    want = base(x)
    assert torch.equal(y[[0, 2, 3]], want[[0, 2, 3]]) and not torch.equal(y[1], want[1])
    with pytest.raises(ValueError, match="there is no adapter 'a'; there are 'b'"):
        store.ids(["a"])


def test_replace_keeps_the_id():
    model = mlp()
    store, x = fl.AdapterStore(model, 2, 8), torch.randn(3, K, device=DEVICE)
    index = store.add("a", adapter())
    with store.route(["a"] * 3):
        first = model(x)
    second = adapter(5)
    assert store.replace("a", second) == index
    other = mlp()
    other.load_state_dict(model.state_dict())
    plain = fl.AdapterStore(other, 2, 8)
    plain.add("a", second)
    with store.route(["a"] * 3), plain.route(["a"] * 3):
        assert torch.equal(model(x), other(x)) and not torch.equal(model(x), first)
    store.replace("a", {})
    with store.route(["a"] * 3):
        assert torch.equal(model(x), other(x))  # no layer is left


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.add("a", adapter()), ValueError, "there is an adapter 'a' already"),
        (lambda s: s.add("b", {"7": weights()}), ValueError, "the model has no layer '7'"),
        (
            lambda s: s.add("b", {"0": weights(9, K, 16)}),
            ValueError,
            "0: .* rank 9; the bank takes 1",
        ),
        (lambda s: s.add("b", {"0": weights(3, K, 17)}), ValueError, r"0: .*lora_b.*\[16, 3\]"),
        (lambda s: s.add("b", [1]), TypeError, "adapter must be a mapping"),
        (lambda s: s.remove("b"), ValueError, "there is no adapter 'b'"),
        (lambda s: s.pin("b"), ValueError, "there is no adapter 'b'"),
        (lambda s: s.replace("b", adapter()), ValueError, "there is no adapter 'b'"),
        (lambda s: s.ids("a"), TypeError, "names must be a list, got the str 'a'"),
        (lambda s: s.route(torch.tensor([5])).__enter__(), IndexError, r"must lie in \[-1, 2\)"),
        (lambda s: s.load("b", "nowhere"), FileNotFoundError, "nowhere has no adapter_config.json"),
    ],
)
def test_bad_input_changes_nothing(call, error, message):
    store = fl.AdapterStore(mlp(), 2, 8)
    store.add("a", adapter())
    banks = [found.bank for found in store.layers.values()]
    before = [t.clone() for bank in banks for t in (bank.a_slots, bank.rank, bank.table)]
    if error is IndexError and DEVICE == "cuda":
        pytest.skip("a GPU is not waited for")
    with pytest.raises(error, match=message):
        call(store)
    after = [t for bank in banks for t in (bank.a_slots, bank.rank, bank.table)]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert store.names == ["a"] and all(bank.names == ["a"] for bank in banks)


def test_a_model_without_a_layer_for_it_is_unchanged():
    model = mlp()
    with pytest.raises(ValueError, match="matches no module"):
        fl.AdapterStore(model, 2, 8, target_modules=["q_proj"])
    model = torch.nn.Sequential(LoRALinear(K, N))
    with pytest.raises(TypeError, match=r"module '0' is a fused_lora\.nn\.linear\.LoRALinear"):
        fl.AdapterStore(model, 2, 8, target_modules=["0"])
    assert type(model[0]) is LoRALinear


def test_500_changes_against_a_dictionary():
    """The store does what a dict of adapters with an order of use does."""
    rng, model = random.Random(SEED), mlp()
    store, known = fl.AdapterStore(model, 4, 4), {}
    x = torch.randn(2, K, device=DEVICE)
    pool = {name: {"2": weights(rng.randint(1, 4), 16, N)} for name in "abcdefgh"}
    for _ in range(500):
        name = rng.choice("abcdefgh")
        action = rng.choice(("add", "remove", "replace", "route", "route"))
        if action == "add" and name not in known:
            if len(known) == 4:
                del known[next(iter(known))]
            known[name] = pool[name]
            store.add(name, pool[name])
        elif action == "remove" and name in known:
            del known[name]
            store.remove(name)
        elif action == "replace" and name in known:
            known[name] = pool[name] = {"2": weights(rng.randint(1, 4), 16, N)}
            store.replace(name, pool[name])
        elif action == "route" and name in known:
            known[name] = known.pop(name)
            with store.route([name, None]):
                y = model(x)
            own, hidden = known[name]["2"], model[1](model[0](x))
            delta = own.scale * hidden[0] @ own.lora_a.t() @ own.lora_b.t()
            want = model[2](hidden)
            want[0] += delta
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        assert sorted(store.names) == sorted(known)


def test_changes_while_batches_run():
    """Every row is that of one adapter whole, the old or the new, in each layer."""
    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False)).to(DEVICE)
    store = fl.AdapterStore(model, 2, 8)
    versions = [{"0": weights(r, K, N)} for r in (2, 5, 8)]
    store.add("a", versions[0])
    x = torch.randn(1, K, device=DEVICE)
    wants = []
    for version in versions:
        store.replace("a", version)
        with store.route(["a"]):
            wants.append(model(x))
    stop, wrong = threading.Event(), []

    def serve():
        while not stop.is_set():
            with store.route(["a"]):
                y = model(x)
            if not any(torch.allclose(y, want, rtol=1e-5, atol=1e-5) for want in wants):
                wrong.append(y)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(300):
        store.replace("a", versions[i % 3])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def compiled_and_eager(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", **options), model


def test_a_served_model_compiles_with_a_break_at_each_layer():
    model = mlp()
    store, x = fl.AdapterStore(model, 2, 8), torch.randn(3, K, device=DEVICE)
    for name in "ab":
        store.add(name, adapter())
    compiled, _ = compiled_and_eager(model)
    for names in (["a", None, "b"], ["b", "b", "a"], ["a"] * 3, None):
        with store.route(names):
            assert torch.equal(compiled(x), model(x))
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("routed", [["a", None, "a"], None], ids=str)
def test_what_must_be_one_graph_is_refused(routed):
    model = mlp()
    store, x = fl.AdapterStore(model, 2, 8), torch.randn(3, K, device=DEVICE)
    store.add("a", adapter())
    whole, _ = compiled_and_eager(model, fullgraph=True)
    words = "compile without fullgraph, or give the layer adapter_ids"
    with store.route(routed):
        with pytest.raises(Exception, match=words):
            whole(x)
        for strict in (False, True):
            with pytest.raises(Exception, match=words):
                torch.export.export(model, (x,), strict=strict)
    layer, ids = store.layers["0"], torch.tensor([0, -1, 0], device=DEVICE)
    whole, _ = compiled_and_eager(layer, fullgraph=True)
    assert torch.equal(whole(x, ids), layer(x, ids))


def test_layers_of_compiled_blocks_have_their_own_names():
    model = torch.nn.ModuleDict({"block": torch.nn.Sequential(torch.nn.Linear(K, N))}).to(DEVICE)
    model["block"] = torch.compile(model["block"], backend="eager")
    store = fl.AdapterStore(model, 2, 8)
    assert list(store.layers) == ["block.0"]
    store.add("a", {"block.0": weights()})
    x = torch.randn(2, K, device=DEVICE)
    with store.route(["a", None]):
        y = model["block"](x)
    want = model["block"](x)
    assert torch.equal(y[1], want[1]) and not torch.equal(y[0], want[0])


def test_inputs_that_are_changed_in_place_in_inference_mode():
    model = mlp()
    store, x = fl.AdapterStore(model, 2, 8), torch.randn(2, 3, K, device=DEVICE)
    for name in "ab":
        store.add(name, adapter())
    with store.route(["a", "b"]):
        with torch.inference_mode():
            mine = x.clone()
            first = model(mine)
            mine.mul_(2)
            second = model(mine)
        leaf = x.clone().requires_grad_()
        y = model(leaf)  # what was kept in inference mode is good for a gradient
        y.sum().backward()
        assert torch.equal(first, y.detach()) and torch.equal(second, model(2 * x))


# Beside PEFT, on a transformers Llama.


@pytest.fixture(scope="module")
def llama_and_folders(tmp_path_factory):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = tiny_llama().eval()
    configs = {
        "small": peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
        "rs": peft.LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
        "mixed": peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "down_proj"],
            rank_pattern={"k_proj": 7},
            alpha_pattern={"layers.1.self_attn.q_proj": 3},
        ),
    }
    for found in configs.values():
        found.init_lora_weights = False
    wrapped = None
    for name, found in configs.items():
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model), found, adapter_name=name)
        else:
            wrapped.add_adapter(name, found)
    folder = tmp_path_factory.mktemp("adapters")
    wrapped.save_pretrained(folder)
    return model, wrapped.eval(), {name: folder / name for name in configs}


def test_logits_are_those_of_pefts_mixed_batch(llama_and_folders):
    base, wrapped, folders = llama_and_folders
    model = copy.deepcopy(base)
    store = fl.AdapterStore(model, 4, 16)
    for name, folder in folders.items():
        store.load(name, folder)
    tokens = torch.randint(1, 64, (5, 11), device=DEVICE)
    names = ["rs", "small", None, "mixed", "rs"]
    with torch.no_grad():
        theirs = wrapped(
            input_ids=tokens, adapter_names=[name or "__base__" for name in names]
        ).logits
        with store.route(names):
            ours = model(input_ids=tokens).logits
        plain = model(input_ids=tokens).logits
        assert torch.equal(plain, base(input_ids=tokens).logits)
        true = (
            copy.deepcopy(wrapped)
            .double()(input_ids=tokens, adapter_names=[name or "__base__" for name in names])
            .logits
        )
    error, of_theirs = (ours - true).norm(), (theirs - true).norm()
    assert error <= 2 * of_theirs + 1e-6 * true.norm()
    assert (ours - plain).abs().amax(dim=(1, 2))[[0, 1, 3, 4]].min() > 1e-3


def test_generation_with_a_cache_is_that_of_each_adapter_alone(llama_and_folders):
    base, wrapped, folders = llama_and_folders
    model = copy.deepcopy(base)
    store = fl.AdapterStore(model, 4, 16)
    for name, folder in folders.items():
        store.load(name, folder)
    tokens = torch.randint(1, 64, (3, 5), device=DEVICE)
    names = ["mixed", "rs", "small"]
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    options["attention_mask"] = torch.ones_like(tokens)
    with store.route(names):
        ours = model.generate(tokens, **options)
    for i, name in enumerate(names):
        wrapped.set_adapter(name)
        alone = options | {"attention_mask": options["attention_mask"][:1]}
        assert torch.equal(ours[i : i + 1], wrapped.generate(input_ids=tokens[i : i + 1], **alone))
