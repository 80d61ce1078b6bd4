"""Which adapter the rows of a layer have that the model calls with other shapes than its own."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import DEVICE
from served import added, adding, linear, ones, served
from tiny_llama import tiny_llama

import fused_lora as fl

UNKNOWN = "which rows of .* belong to which of the adapters is not known"
SQUARE = "sizes do not tell which of the two is the batch"
NAMES = {"alice": 1, "bob": 2}
BOTH = ["alice", "bob"]


class Model(torch.nn.Module):
    """x [B, L, K] -> [..., K], with the layer called as `how` says."""

    def __init__(self, how, lists=0):
        super().__init__()
        layer = linear()
        for _ in range(lists):
            layer = torch.nn.ModuleList([layer])
        self.layer, self.how, self.lists = layer, how, lists

    def forward(self, x):
        layer = self.layer
        for _ in range(self.lists):
            layer = layer[0]
        return self.how(layer, x)


def expert(layer, x):
    """As many tokens as there are sequences, from the last one."""
    rows = x.flatten(0, 1)
    rows = torch.cat([rows[: -x.shape[0]], layer(rows[-x.shape[0] :])])
    return rows.view(x.shape)


def all_tokens(layer, x):
    """An expert that all tokens choose, the last one first."""
    return layer(x.flatten(0, 1).flip(0)).flip(0).view(x.shape)


def length_first(layer, x):
    return layer(x.transpose(0, 1)).transpose(0, 1)


def flattened(layer, x):
    return layer(x.flatten(0, 1)).view(x.shape)


def flattened_length_first(layer, x):
    return layer(x.transpose(0, 1).flatten(0, 1)).view(x.transpose(0, 1).shape).transpose(0, 1)


def pooled(layer, x):
    return layer(x[:, 0])


@pytest.mark.parametrize("lists", [0, 1])
@pytest.mark.parametrize(
    "how", [expert, all_tokens, flattened, flattened_length_first, pooled], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_that_are_not_known_are_an_error(how, length, lists):
    model, store = served(Model(how, lists), names=NAMES)
    with store.route(BOTH), pytest.raises(ValueError, match=UNKNOWN):
        model(ones(2, length))
    tokens = store.ids(BOTH)[:, None].expand(2, length)
    with store.route(tokens), pytest.raises(ValueError, match=UNKNOWN):
        model(ones(2, length))
    for names in (["alice", "alice"], [None, None]):  # nothing to mix up
        with store.route(names):
            y = model(ones(2, length))
        assert set(y[..., -1].flatten().tolist()) <= {1.0, 1.0 + (names[0] is not None)}


@pytest.mark.parametrize("how, means", [(flattened, "token"), (pooled, "sequence")])
def test_rows_that_are_declared(how, means):
    model, store = served(Model(how, 1), names=NAMES, rows={"0": means})
    for length in (1, 2, 3):
        with store.route(BOTH):
            y = added(model(ones(2, length)))
        assert y == ([1, 2] if means == "sequence" else [[1] * length, [2] * length])
    ids = store.ids(["alice", "bob", None, "bob", "alice", None]).view(2, 3)
    if means == "token":
        with store.route(ids):
            assert added(model(ones(2, 3))) == [[1, 2, 0], [2, 1, 0]]
    with store.route(BOTH), pytest.raises(ValueError, match=UNKNOWN):
        store.layers["layer.0"](ones(5))


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"0": "row"}, r"rows\['0'\] must be 'sequence' or 'token', got 'row'"),
        ({"1": "token"}, "rows names '1', which is no layer of the store"),
    ],
)
def test_bad_rows(rows, message):
    model = torch.nn.Sequential(linear())
    with pytest.raises(ValueError, match=message):
        fl.AdapterStore(model, 2, 4, rows=rows)
    assert type(model[0]) is torch.nn.Linear and not model._forward_hooks


def test_length_first_is_no_batch_first():
    model, store = served(Model(length_first), names=NAMES)
    for length, message in ((2, SQUARE), (3, UNKNOWN), (2, SQUARE)):
        with store.route(BOTH), pytest.raises(ValueError, match=message):
            model(ones(2, length))
    model, store = served(torch.nn.Sequential(linear()), names=NAMES)
    with store.route(BOTH), pytest.raises(ValueError, match=r"2 sequences, .* shape \[3, 2\]"):
        model(ones(3, 2))
    with store.route(BOTH), pytest.raises(ValueError, match=SQUARE):
        model(ones(2, 2))


def test_batch_first_is_declared_or_seen():
    x = ones(2, 2)
    model, store = served(names=NAMES, batch_first=True)
    with store.route(BOTH):
        assert added(model(x)) == [[1, 1], [2, 2]]
    model, store = served(names=NAMES)
    with store.route(BOTH):
        with pytest.raises(ValueError, match=SQUARE):
            model(x)
        assert added(model(ones(2, 3))) == [[1] * 3, [2] * 3]
        assert added(model(x)) == [[1, 1], [2, 2]]
    with store.route(store.ids([*BOTH, None, "bob"]).view(2, 2)):
        assert added(model(x)) == [[1, 2], [0, 2]]


def test_one_sequence_tells_what_is_the_batch():
    for how, known in ((lambda layer, x: layer(x), True), (length_first, False)):
        model, store = served(Model(how), names=NAMES)
        with store.route(["bob"]):
            assert added(model(ones(1, 3))) == [[2] * 3]
        with store.route(BOTH):
            if known:
                assert added(model(ones(2, 2))) == [[1, 1], [2, 2]]
            else:
                with pytest.raises(ValueError, match=SQUARE):
                    model(ones(2, 2))


def test_a_row_a_sequence_is_what_the_model_is_called_with():
    model = torch.nn.Sequential(linear(), torch.nn.ReLU(), linear())
    model, store = served(model, names=NAMES)
    with store.route(BOTH):
        assert added(model(ones(2))) == [2, 4]
        for n in (1, 3, 4):
            with pytest.raises(ValueError, match=f"of 2 sequences, .* leading shape \\[{n}\\]"):
                model(ones(n))
    with store.route(torch.tensor(1, device=DEVICE)):
        assert added(model(ones(3))) == [4, 4, 4]


def test_a_part_that_is_called_alone_says_what_its_batch_is():
    inner = torch.nn.Sequential(linear())
    model, store = served(torch.nn.Sequential(inner, torch.nn.ReLU()), names=NAMES)
    with store.route(BOTH):
        assert added(inner(ones(2))) == [1, 2]
        assert added(model(ones(2))) == [1, 2]
        with pytest.raises(ValueError, match=UNKNOWN):
            inner[0](ones(2))  # a layer alone: whose rows these are nobody says
        assert added(inner[0](ones(2), store.ids(BOTH))) == [1, 2]


def test_an_error_in_a_call_does_not_outlive_it():
    model, store = served(Model(lambda layer, x: layer(x[..., :-1] if len(x) > 2 else x)))
    for name, value in NAMES.items():
        store.add(name, adding(value, store.layers))
    with store.route([*BOTH, "bob"]), pytest.raises(ValueError, match="weight must have shape"):
        model(ones(3, 4))
    with store.route(BOTH):
        assert added(model(ones(2, 3))) == [[1] * 3, [2] * 3]


def test_two_threads_in_one_route_have_calls_of_their_own():
    model, store = served(names=NAMES)
    barrier, seen = threading.Barrier(2), []

    def meet(*_):
        barrier.wait(60)

    store.layers["0"].register_forward_pre_hook(meet)

    def call(length):
        seen.append((length, added(model(ones(2, length)))))

    with store.route(BOTH):
        bound = store.bind(call)
        threads = [threading.Thread(target=bound, args=(n,)) for n in (3, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(seen) == [(n, [[1] * n, [2] * n]) for n in (3, 5)]


# Models of transformers.


def adapters_for(store, rank=2, seed=0):
    """{name: an adapter of every layer} for alice and bob, of random values."""
    found = {}
    for i, name in enumerate(BOTH):
        g = torch.Generator().manual_seed(seed + i)
        found[name] = {}
        for layer, module in store.layers.items():
            a = torch.randn(rank, module.in_features, generator=g) / 4
            b = torch.randn(module.out_features, rank, generator=g) / 4
            found[name][layer] = a.to(DEVICE), b.to(DEVICE), 1.0, None
    return found


def transformers_model(kind):
    """(model, what it is called with for two sequences)"""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = torch.randint(3, 64, (2, 7), device=DEVICE)
    if kind == "opt":
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32)
        )
    elif kind == "bert":
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**small, intermediate_size=48)
        )
    elif kind in ("t5", "bart"):
        sizes = {
            "t5": {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2},
            "bart": {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
        }[kind]
        config = getattr(transformers, {"t5": "T5Config", "bart": "BartConfig"}[kind])
        make = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}[kind]
        heads = {"t5": {"num_heads": 4, "decoder_start_token_id": 0}, "bart": {}}[kind]
        model = getattr(transformers, make)(config(**sizes, **heads))
        short = torch.randint(3, 64, (2, 4), device=DEVICE)
        return model.to(DEVICE).eval(), {"input_ids": ids, "decoder_input_ids": short}
    else:
        model = tiny_llama()
    return model.to(DEVICE).eval(), {"input_ids": ids}


def alone(model, adapter):
    """A copy of the base with one adapter, merged."""
    model = copy.deepcopy(model)
    for name, (a, b, scale, _) in adapter.items():
        model.get_submodule(name).weight.data += scale * b @ a
    return model


@pytest.mark.parametrize("kind", ["llama", "opt", "bert", "t5", "bart"])
@torch.no_grad()
def test_a_model_of_transformers(kind):
    base, batch = transformers_model(kind)
    model = copy.deepcopy(base)
    store = fl.AdapterStore(model, 3, 4)
    adapters = adapters_for(store)
    ones_alone = {name: alone(base, adapter) for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        store.add(name, adapter)
    want = torch.cat(
        [
            one(**{k: v[i : i + 1] for k, v in batch.items()}).logits
            for i, one in enumerate(ones_alone.values())
        ]
    )
    with store.route(BOTH):
        got = model(**batch).logits
        assert len(model(*batch.values()).logits if kind in ("llama", "bert") else got) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - base(**batch).logits).abs().amax(-1).min() > 1e-3
    if kind in ("llama", "opt"):
        with store.route(BOTH):
            last = model(**batch, logits_to_keep=1).logits
        torch.testing.assert_close(last, got[:, -1:], rtol=1e-4, atol=1e-4)


OPTIONS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "opt", "t5", "bart"])
@torch.no_grad()
def test_generation(kind, options):
    base, batch = transformers_model(kind)
    model = copy.deepcopy(base)
    store = fl.AdapterStore(model, 3, 4)
    adapters = adapters_for(store)
    for name, adapter in adapters.items():
        store.add(name, adapter)
    ids = batch["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    with store.route(BOTH):
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        again = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(got, again)
    n = options.get("num_return_sequences", 1)
    for i, (name, adapter) in enumerate(adapters.items()):
        row = ids[i : i + 1]
        want = alone(base, adapter).generate(row, attention_mask=torch.ones_like(row), **options)
        assert torch.equal(got[n * i : n * (i + 1)], want), name


def test_as_many_tokens_as_sequences():
    """A prompt of two tokens for two sequences: seen to be batch first in a call before, or not."""
    base, _ = transformers_model("llama")
    model = copy.deepcopy(base)
    store = fl.AdapterStore(model, 3, 4)
    adapters = adapters_for(store)
    for name, adapter in adapters.items():
        store.add(name, adapter)
    ids = torch.tensor([[5, 9], [7, 3]], device=DEVICE)
    with torch.no_grad(), store.route(BOTH):
        with pytest.raises(ValueError, match=SQUARE):
            model(ids)
        model(ids[:, :1])
        got = model(ids).logits
    for i, adapter in enumerate(adapters.values()):
        want = alone(base, adapter)(ids[i : i + 1]).logits
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_of_a_served_model_generates(copied):
    model, batch = transformers_model("llama")
    store = fl.AdapterStore(model, 3, 4)
    for name, adapter in adapters_for(store).items():
        store.add(name, adapter)
    other = copied(model)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with store.route(BOTH), fl.AdapterStore.of(other).route(BOTH):
        assert torch.equal(other.generate(**batch, **options), model.generate(**batch, **options))


def test_experts_of_a_model_of_transformers():
    """A list in a block's list is of experts; one that gets every token may get them unsorted."""
    model, batch = transformers_model("llama")
    for layer in model.model.layers:
        mlp = layer.mlp
        layer.mlp = Experts(mlp)
    store = fl.AdapterStore(model, 3, 4)
    for name, adapter in adapters_for(store).items():
        store.add(name, adapter)
    for ids in (batch["input_ids"], batch["input_ids"][:, :1]):
        with torch.no_grad(), store.route(BOTH), pytest.raises(ValueError, match=UNKNOWN):
            model(ids)
        with torch.no_grad(), store.route(["bob", "bob"]):
            model(ids)


class Experts(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp])

    def forward(self, x):
        return self.experts[0](x.flatten(0, 1).flip(0)).flip(0).view(x.shape)


def test_images_beside_text_belong_to_no_sequence():
    """As many images as sequences, both of the first one."""
    base, batch = transformers_model("llama")

    class Seeing(type(base)):
        def __init__(self, config):
            super().__init__(config)
            self.vision = linear()

        def forward(self, input_ids, pixel_values=None, **kwargs):
            seen = 0 if pixel_values is None else self.vision(pixel_values).sum()
            out = super().forward(input_ids, **kwargs)
            out.logits = out.logits + seen
            return out

    model = Seeing(base.config).to(DEVICE).eval()
    store = fl.AdapterStore(model, 3, 4)
    for name, adapter in adapters_for(store).items():
        store.add(name, adapter)
    with torch.no_grad(), store.route(BOTH):
        model(**batch)
        with pytest.raises(ValueError, match=r"which rows of 'vision'"):
            model(**batch, pixel_values=ones(2, 3))


def test_streaming_from_a_thread():
    transformers = pytest.importorskip("transformers")
    base, batch = transformers_model("llama")
    model = copy.deepcopy(base)
    store = fl.AdapterStore(model, 3, 4)
    adapters = adapters_for(store)
    for name, adapter in adapters.items():
        store.add(name, adapter)
    ids = batch["input_ids"][:1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)

    class Characters:
        def decode(self, tokens, **_):
            return "".join(chr(48 + t) + " " for t in tokens)

    def stream(generate):
        streamer = transformers.TextIteratorStreamer(Characters(), skip_prompt=True, timeout=60)
        thread = threading.Thread(
            target=generate, args=(ids,), kwargs={"streamer": streamer, **options}
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    with store.route(["bob"]):
        got = stream(store.bind(model.generate))
    assert got == stream(alone(base, adapters["bob"]).generate)
    assert got != stream(base.generate)
