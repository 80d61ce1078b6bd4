"""inject: which modules get an adapter and what is trained, held to PEFT where it is installed."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from conftest import DEVICE
from tiny_llama import tiny_llama
from torch.nn import Embedding, LayerNorm, Linear, Module, ModuleList

import fused_lora
from fused_lora import AdapterStore
from fused_lora.inject import LoRAConfig, inject, merge, unmerge
from fused_lora.nn import DePT, LoRAAdapter, LoRALinear, SoRALinear

D = 8


class Attention(Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = Linear(D, D), Linear(D, D), Linear(D, D)
        self.out_proj = Linear(D, D, bias=False)

    def forward(self, x):
        return self.out_proj(self.q_proj(x) * self.k_proj(x).sigmoid() + self.v_proj(x))


class Block(Module):
    def __init__(self):
        super().__init__()
        self.attn, self.norm = Attention(), LayerNorm(D)
        self.mlp = torch.nn.Sequential(Linear(D, 2 * D), torch.nn.ReLU(), Linear(2 * D, D))

    def forward(self, x):
        return x + self.mlp(self.norm(x + self.attn(x)))


class Model(Module):
    def __init__(self, blocks=3, tied_head=False):
        super().__init__()
        self.embed = Embedding(13, D)
        self.layers = ModuleList(Block() for _ in range(blocks))
        self.q_proj = Linear(D, D)
        self.lm_head = Linear(D, 13, bias=False)
        if tied_head:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.q_proj(x))


IDS = torch.arange(10, device=DEVICE).view(2, 5)


def build(**kwargs):
    torch.manual_seed(0)
    return Model(**kwargs).to(DEVICE)


def adapted(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# What gets an adapter


SELECTIONS = {
    "one name": {"target_modules": ["q_proj"]},
    "several names": {"target_modules": ("v_proj", "out_proj")},
    "a set": {"target_modules": {"k_proj", "q_proj"}},
    "a full name": {"target_modules": ["layers.1.attn.k_proj"]},
    "a suffix of two parts": {"target_modules": ["mlp.0", "attn.v_proj"]},
    "no part of a word": {"target_modules": ["proj", "k_proj"]},
    "a regex": {"target_modules": r".*\.[02]\..*(q|v)_proj"},
    "a regex is matched in full": {"target_modules": "q_proj"},
    "nothing": {"target_modules": ["porj"]},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    "all linear in capitals": {"target_modules": "All-Linear", "exclude_modules": ["lm_head"]},
    "excluded names": {
        "target_modules": ["q_proj", "mlp.2"],
        "exclude_modules": ["layers.0.mlp.2"],
    },
    "an excluded suffix": {"target_modules": r"layers.*_proj", "exclude_modules": ["attn.q_proj"]},
    "an excluding regex": {"target_modules": ["v_proj"], "exclude_modules": r"layers\.1\..*"},
    "saved modules": {"target_modules": "all-linear", "modules_to_save": ["lm_head", "layers.1"]},
    "saved, not adapted": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "a saved container": {"target_modules": ["q_proj"], "modules_to_save": ["attn"]},
    "ranks by name": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}},
    "ranks by suffix": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"attn.q_proj": 3}},
    "ranks by regex": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.[01]\.attn\.(q|v)_proj": 2, "v_proj": 5},
        "alpha_pattern": {"^q_proj": 3, r"layers\.2\..*": 7},
    },
    "ranks from the start": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"^q_proj": 2, "layers.0.attn.q_proj": 4},
        "alpha_pattern": {"0.attn.q_proj": 3},
        "use_rslora": True,
    },
}
BIASES = (
    {"bias": "none"},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"bias": "all", "modules_to_save": ["lm_head"]},
    {"bias": "lora_only", "modules_to_save": ["norm", "embed"]},
)


def as_in_peft(model, **config):
    """PEFT's {name: (r, scale)} and trainable parameters, in our words; None for no match."""
    peft = pytest.importorskip("peft")
    try:
        model = peft.get_peft_model(model, peft.LoraConfig(**config))
    except ValueError as error:
        assert "not found in the base model" in str(error)
        return None
    layers = {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    words = (
        ("base_model.model.", ""),
        ("base_layer.", ""),
        ("modules_to_save.default.", ""),
        ("lora_A.default.weight", "lora_a"),
        ("lora_B.default.weight", "lora_b"),
    )
    names = set()
    for name in trainable(model):
        for theirs, ours in words:
            name = name.replace(theirs, ours)
        names.add(name)
    return layers, names


def check_against_peft(make_model, **config):
    want = as_in_peft(make_model(), **config)
    model = make_model()
    if want is None:
        with pytest.raises(ValueError, match="matches no module"):
            inject(model, LoRAConfig(**config))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        inject(model, LoRAConfig(**config))
    assert {name: (m.r, m.scale) for name, m in adapted(model).items()} == want[0]
    assert trainable(model) == want[1]


@pytest.mark.parametrize("config", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_the_same_modules_as_in_peft(config):
    check_against_peft(build, **config)


@pytest.mark.parametrize("config", BIASES, ids=str)
def test_the_same_parameters_are_trained_as_in_peft(config):
    check_against_peft(build, target_modules=["q_proj", "mlp.0"], **config)


@pytest.mark.parametrize("tie", (False, True))
def test_all_linear_leaves_out_the_head_of_a_transformers_model_as_in_peft(tie):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tie)
    check_against_peft(lambda: transformers.LlamaForCausalLM(config), target_modules="all-linear")


def test_the_defaults_are_those_of_peft():
    peft = pytest.importorskip("peft")
    theirs = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}
    for f in dataclasses.fields(LoRAConfig):
        if f.name in ("gate", "gate_init", "adalora", "adalora_scaling", "target_modules"):
            continue
        want = theirs[f.name]
        if f.default is dataclasses.MISSING:
            assert f.default_factory() == want.default_factory(), f.name
        else:
            assert f.default == want.default, f.name


def test_names_by_hand():
    """What the comparison with PEFT covers, in short, where PEFT is not installed."""
    model = inject(build(), LoRAConfig(target_modules=["q_proj"], r=2, rank_pattern={"^q_proj": 3}))
    ranks = {name: m.r for name, m in adapted(model).items()}
    assert ranks == {"q_proj": 3} | {f"layers.{i}.attn.q_proj": 2 for i in range(3)}
    assert trainable(model) == {f"{name}.lora_{x}" for name in ranks for x in "ab"}
    model = inject(build(), LoRAConfig(target_modules="all-linear"))
    assert len(adapted(model)) == 3 * 6 + 1 and type(model.lm_head) is Linear
    config = LoRAConfig(target_modules=r"layers\.1\..*", exclude_modules=r".*(mlp.*|norm|attn)")
    assert set(adapted(inject(build(), config))) == {
        f"layers.1.attn.{x}_proj" for x in ("q", "k", "v", "out")
    }


def test_values_reach_the_layers():
    config = LoRAConfig(
        target_modules=["q_proj"], r=3, lora_alpha=5, lora_dropout=0.2, use_rslora=True, gate=True,
        gate_init="ones", init_lora_weights=False,
    )  # fmt: skip
    for layer in adapted(inject(build().eval(), config)).values():
        assert type(layer) is SoRALinear and not layer.training
        assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (3, 5, 0.2)
        assert layer.scale == 5 / 3**0.5 and (layer.gate == 1).all() and layer.lora_b.any()
    model = inject(build(), LoRAConfig(target_modules=["q_proj"], init_lora_weights="gaussian"))
    assert model.q_proj.init == "gaussian" and type(model.q_proj) is LoRALinear


def test_the_model_starts_unchanged_and_trains():
    model = build()
    want, weights = model(IDS), {id(p) for p in model.parameters()}
    assert inject(model, LoRAConfig(target_modules="all-linear", gate=True)) is model
    assert torch.equal(model(IDS), want)
    assert weights <= {id(p) for p in model.parameters()}
    model(IDS).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.endswith(("lora_a", "lora_b", "gate")), name


def test_the_config_is_kept_as_a_copy():
    config = LoRAConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    model = inject(build(), config)
    assert model.fused_lora_config == config
    config.rank_pattern["q_proj"] = 4
    assert model.fused_lora_config.rank_pattern == {"q_proj": 2}
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.fused_lora_config == model.fused_lora_config
    assert torch.equal(twin(IDS), model(IDS))


@pytest.mark.parametrize("masters", (False, True))
def test_adapter_dtype(masters):
    dtype = torch.float32 if masters else None
    model = inject(build().bfloat16(), LoRAConfig(target_modules=["q_proj"]), adapter_dtype=dtype)
    want = torch.float32 if masters else torch.bfloat16
    assert {m.lora_a.dtype for m in adapted(model).values()} == {want}
    assert model(IDS).dtype == torch.bfloat16


# Modules to save


def test_modules_to_save_are_copies_of_their_own():
    model = build(tied_head=True)
    assert model.lm_head.weight is model.embed.weight
    embed, want = model.embed.weight, model(IDS)
    inject(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "0.norm"]))
    assert torch.equal(model(IDS), want)
    assert model.embed.weight is embed and model.lm_head.weight is not embed
    assert not embed.requires_grad and model.lm_head.weight.requires_grad
    assert model.layers[0].norm.bias.requires_grad
    assert not model.layers[1].norm.bias.requires_grad
    assert "lm_head.weight" in model.state_dict()


def test_a_saved_module_inside_a_saved_module_is_copied_with_it():
    model = build()
    config = LoRAConfig(target_modules=["q_proj"], modules_to_save=["layers.1", "attn"])
    inject(model, config)
    assert set(adapted(model)) == {"q_proj"}
    want = {n for n, _ in model.named_parameters() if n.startswith("layers.1.") or ".attn." in n}
    assert trainable(model) == want | {"q_proj.lora_a", "q_proj.lora_b"}


# Modules that occur more than once


def test_a_shared_module_is_replaced_everywhere():
    model = build()
    model.layers[2] = model.layers[0]
    model.extra = model.q_proj
    inject(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    assert model.extra is model.q_proj and isinstance(model.extra, LoRALinear)
    assert model.layers[2] is model.layers[0]
    assert isinstance(model.layers[2].attn.q_proj, LoRALinear)
    assert set(adapted(model)) == {"q_proj", "layers.0.attn.q_proj", "layers.1.attn.q_proj"}
    assert "extra.lora_a" in model.state_dict()


def test_a_shared_module_is_found_by_its_second_name_and_excluded_by_any():
    model = build()
    model.extra = model.q_proj
    inject(model, LoRAConfig(target_modules=["extra"], rank_pattern={"extra": 2}))
    assert model.q_proj is model.extra and model.q_proj.r == 2
    model = build()
    model.extra = model.q_proj
    ranks = {"q_proj": 3, "extra": 2}
    with pytest.warns(UserWarning, match="rank_pattern: 'extra' matches no module"):
        inject(model, LoRAConfig(target_modules=["q_proj", "extra"], rank_pattern=ranks))
    assert model.q_proj is model.extra and model.q_proj.r == 3
    model = build()
    model.extra = model.q_proj
    inject(model, LoRAConfig(target_modules=["q_proj"], exclude_modules=["extra"]))
    assert type(model.q_proj) is Linear


def test_a_tied_head_can_be_adapted_but_not_merged():
    model = build(tied_head=True)
    inject(model, LoRAConfig(target_modules=["lm_head", "q_proj"]))
    assert model.lm_head.weight is model.embed.weight
    with pytest.raises(ValueError, match=r"embed\.weight and lm_head\.weight are one tied weight"):
        merge(model)
    assert not any(m.merged for m in adapted(model).values())


def test_the_fused_path_of_a_transformer_layer_does_not_pass_the_adapter_by():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device=DEVICE)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 3, 8, device=DEVICE)
    with torch.no_grad():
        before = model(x)
        config = LoRAConfig(target_modules=["linear1", "linear2"], init_lora_weights=False)
        inject(model, config)
        after = model(x)
    torch.testing.assert_close(after, model(x))
    assert not torch.allclose(after, before)


# What is refused


@pytest.mark.parametrize(
    ("error", "fields", "words"),
    (
        (TypeError, {"r": "8"}, "r must be an int, got '8' of type str"),
        (TypeError, {"r": True}, "r must be an int"),
        (ValueError, {"r": 0}, "r must be at least 1, got 0"),
        (TypeError, {"lora_alpha": None}, "lora_alpha must be a number"),
        (ValueError, {"lora_alpha": float("nan")}, "lora_alpha must be finite"),
        (ValueError, {"lora_alpha": 1e39}, "lora_alpha must be finite in fp32"),
        (ValueError, {"alpha_pattern": {"q": -1e39}}, "must be finite in fp32"),
        (ValueError, {"lora_dropout": 2}, r"lora_dropout must lie in \[0, 1\], got 2"),
        (ValueError, {"use_rslora": 1}, "use_rslora must be one of True, False, got 1"),
        (ValueError, {"gate": "yes"}, "gate must be one of True, False, got 'yes'"),
        (ValueError, {"gate_init": "zeros"}, "gate_init must be one of 'normal', 'ones'"),
        (ValueError, {"bias": "some"}, "bias must be one of 'none', 'all', 'lora_only'"),
        (ValueError, {"init_lora_weights": "pissa"}, "init_lora_weights must be one of"),
        (TypeError, {"target_modules": None}, "target_modules must be a list of names or a str"),
        (ValueError, {"target_modules": []}, "target_modules is empty"),
        (ValueError, {"target_modules": "(q"}, r"target_modules '\(q' is not a regular expression"),
        (TypeError, {"target_modules": ["q", 3]}, r"target_modules\[1\] must be a str, got 3"),
        (TypeError, {"exclude_modules": 3}, "exclude_modules must be a list of names or a str"),
        (ValueError, {"exclude_modules": "*"}, "exclude_modules .* is not a regular expression"),
        (TypeError, {"modules_to_save": "head"}, "modules_to_save must be a list of names"),
        (TypeError, {"modules_to_save": [None]}, r"modules_to_save\[0\] must be a str"),
        (TypeError, {"rank_pattern": ["q"]}, "rank_pattern must be a dict, got list"),
        (TypeError, {"rank_pattern": {"q": 2.5}}, r"rank_pattern\['q'\] must be an int, got 2.5"),
        (ValueError, {"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be at least 1"),
        (TypeError, {"rank_pattern": {3: 2}}, "rank_pattern key must be a str, got 3"),
        (ValueError, {"alpha_pattern": {"(": 2}}, r"alpha_pattern key '\(' is not a regular expr"),
        (TypeError, {"alpha_pattern": {"q": "2"}}, r"alpha_pattern\['q'\] must be a number"),
    ),
)  # fmt: skip
def test_bad_configs(error, fields, words):
    with pytest.raises(error, match=words):
        LoRAConfig(**{"target_modules": ["q_proj"], **fields})


def test_target_modules_must_be_given():
    with pytest.raises(TypeError, match="target_modules"):
        LoRAConfig(r=8)


def untouched(model, config, error, words, **kwargs):
    """inject raises, and the model is as it was."""
    before = {name: (m, type(m)) for name, m in model.named_modules()}
    trained = trainable(model)
    with pytest.raises(error, match=words):
        inject(model, config, **kwargs)
    assert {name: (m, type(m)) for name, m in model.named_modules()} == before
    assert trainable(model) == trained and not hasattr(model, "fused_lora_config")


class Quantised(Linear):
    pass


def test_refusals_change_nothing():
    names = LoRAConfig(target_modules=["q_porj"])
    untouched(build(), names, ValueError, r"\['q_porj'\] matches no module .*nearest: q_proj")
    words = r"regular expression of the whole name; for a suffix: \['k_proj'\]\); nearest: k_proj"
    untouched(build(), LoRAConfig(target_modules="k_proj"), ValueError, words)
    nothing = LoRAConfig(target_modules="all-linear", exclude_modules=".*")
    untouched(build(), nothing, ValueError, "matches no module that is not excluded")
    untouched(torch.nn.ReLU(), nothing, ValueError, "nearest: none, the model has no nn.Linear")
    missing = LoRAConfig(target_modules=["q_proj"], modules_to_save=["im_head"])
    untouched(build(), missing, ValueError, "modules_to_save: 'im_head' matches .*nearest: lm_head")
    words = r"target module 'layers.0.attn' is a .*Attention; only a plain torch\.nn\.Linear"
    untouched(build(), LoRAConfig(target_modules=["attn"]), TypeError, words)
    model = build()
    model.layers[1].attn.v_proj = Quantised(D, D)
    words = r"target module 'layers\.1\.attn\.v_proj' is a .*Quantised"
    untouched(model, LoRAConfig(target_modules="all-linear"), TypeError, words)
    config = LoRAConfig(target_modules=["q_proj"])
    words = "adapter_dtype must be None, torch.float32 or the weight's dtype, got torch.float16"
    untouched(build(), config, TypeError, words, adapter_dtype=torch.float16)
    untouched(Linear(D, D), config, TypeError, "model is itself a linear layer")
    untouched(build(), {"r": 8}, TypeError, "config must be a LoRAConfig, got dict")
    with pytest.raises(TypeError, match="got list"):
        inject([], config)


def test_a_model_is_injected_once():
    model = inject(build(), LoRAConfig(target_modules=["q_proj"]))
    layer = model.q_proj
    with pytest.raises(RuntimeError, match="model has adapters already"):
        inject(model, LoRAConfig(target_modules=["v_proj"]))
    assert model.q_proj is layer and type(model.layers[0].attn.v_proj) is Linear


@pytest.mark.parametrize(
    ("fields", "words"),
    (
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules: 'v_porj' .*nearest: v_proj"),
        ({"exclude_modules": ["emped"]}, "exclude_modules: 'emped' matches no module"),
        ({"rank_pattern": {"v_proj": 2}}, "rank_pattern: 'v_proj' matches no module"),
        ({"alpha_pattern": {"layer.0.*": 2}}, r"alpha_pattern: 'layer\.0\.\*' matches no module"),
    ),
)
def test_what_meets_no_module_is_a_warning(fields, words):
    with pytest.warns(UserWarning, match=words) as caught:
        inject(build(), LoRAConfig(**{"target_modules": ["q_proj"], **fields}))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_good_config_is_silent():
    config = LoRAConfig(
        target_modules=["q_proj"], exclude_modules=["0.attn.q_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"1.attn.q_proj": 4}, modules_to_save=["lm_head"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(build(), config)


# Other libraries' models


@pytest.mark.parametrize("tie", (False, True))
@pytest.mark.parametrize("again", ("as it is", "copied", "pickled"))
def test_a_resize_does_not_lose_the_adapter_of_the_head(tie, again):
    pytest.importorskip("transformers")
    model = tiny_llama(tie_word_embeddings=tie)
    inject(model, LoRAConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    model = {
        "as it is": lambda model: model,
        "copied": copy.deepcopy,
        "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    }[again](model)
    head, want = model.lm_head, model(IDS).logits
    for arguments in ({"new_num_tokens": 70}, {"pad_to_multiple_of": 48}, {"new_num_tokens": 60}):
        with pytest.raises(RuntimeError, match="would lose the adapter of the output head"):
            model.resize_token_embeddings(**arguments)
    model.resize_token_embeddings()
    model.resize_token_embeddings(60, pad_to_multiple_of=8)
    assert model.lm_head is head and torch.equal(model(IDS).logits, want)


def test_a_resize_does_not_lose_the_bank_of_the_head():
    pytest.importorskip("transformers")
    model = tiny_llama()
    AdapterStore(model, 2, 4, target_modules=["lm_head"])
    with pytest.raises(RuntimeError, match=r"output head, a fused_lora\.nn\.multi\.MultiLoRALin"):
        model.resize_token_embeddings(70)


def test_a_resize_of_a_plain_head_is_that_of_transformers():
    pytest.importorskip("transformers")
    model = inject(tiny_llama(), LoRAConfig(target_modules="all-linear"))
    model.resize_token_embeddings(70)
    assert model(IDS).logits.shape[-1] == 70


def test_a_model_of_peft_keeps_its_adapters():
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    whole = peft.get_peft_model(tiny_llama(), config)
    layer = whole.base_model.model.model.layers[0].self_attn.q_proj
    inner = peft.inject_adapter_in_model(config, tiny_llama())
    saved = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ).base_model.model.lm_head
    every = LoRAConfig(target_modules="all-linear")
    for given in (whole, whole.base_model, inner, torch.nn.Sequential(layer)):
        trained = [name for name, p in given.named_parameters() if p.requires_grad]
        for refused in (
            lambda given=given: inject(given, every),
            lambda given=given: AdapterStore(given, 2, 4),
        ):
            with pytest.raises(TypeError, match=r"has adapters of PEFT: .* is a peft"):
                refused()
        assert trained == [name for name, p in given.named_parameters() if p.requires_grad]
    with pytest.raises(TypeError, match="base_module has adapters of PEFT: it is a peft"):
        LoRAAdapter(layer)
    with pytest.raises(TypeError, match="base_module has adapters of PEFT: it is a peft"):
        LoRAAdapter(saved, 32, 64)
    with pytest.raises(TypeError, match=r"model has adapters of PEFT: '.*q_proj' in it is a peft"):
        DePT(inner, 2, 8, 2)


# Merging


@pytest.mark.parametrize("keep_base", ("none", "cpu", "device"))
def test_merge_and_unmerge(keep_base):
    model = inject(build(), LoRAConfig(target_modules="all-linear", init_lora_weights=False))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    want = model(IDS)
    merge(model, keep_base)
    assert all(m.merged for m in adapted(model).values())
    torch.testing.assert_close(model(IDS), want)
    unmerge(model)
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name])
        assert keep_base == "none" or torch.equal(t, before[name])


def test_merging_is_all_or_nothing():
    with pytest.raises(ValueError, match="model has no LoRALinear"):
        merge(build())
    with pytest.raises(ValueError, match="model has no LoRALinear"):
        unmerge(build())
    model = inject(build(), LoRAConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(RuntimeError, match=r"4 of 4 layers are not merged: 'layers\.0\.attn"):
        unmerge(model)
    with pytest.raises(ValueError, match="keep_base must be one of"):
        merge(model, "gpu")
    model.q_proj.merge()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="1 of 4 layers are merged already: 'q_proj'"):
        merge(model)
    with pytest.raises(RuntimeError, match="3 of 4 layers are not merged"):
        unmerge(model)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("keep_base", ("none", "cpu", "device"))
@pytest.mark.parametrize(("dtype", "value"), ((torch.float16, 6e4), (torch.float32, torch.nan)))
def test_a_model_is_merged_whole_or_not_at_all(keep_base, dtype, value, tmp_path):
    """The last layer has a value that cannot be merged: no layer before it is written."""
    model = build().to(dtype)
    inject(
        model,
        LoRAConfig(target_modules="all-linear", init_lora_weights=False),
        adapter_dtype=torch.float32,
    )
    name, last = list(adapted(model).items())[-1]
    before = {k: t.clone() for k, t in model.state_dict().items()}
    good = last.lora_b.detach().clone()
    words = f"{name}'?: weight would have values that {dtype} cannot hold"
    with torch.no_grad():
        last.lora_b.fill_(value)
        last.lora_a.fill_(1)
    with pytest.raises(ValueError, match=words):
        merge(model, keep_base)
    assert not any(m.merged for m in adapted(model).values())
    for k, t in model.state_dict().items():
        assert "lora" in k or torch.equal(t, before[k])

    last.lora_b.data.copy_(good)
    merge(model, keep_base)
    merged = {k: t.clone() for k, t in model.state_dict().items()}
    last.lora_b.data.fill_(value)
    if keep_base == "none":
        with pytest.raises(ValueError, match=words):
            unmerge(model)
        assert all(m.merged for m in adapted(model).values())
        for k, t in model.state_dict().items():
            assert "lora_b" in k or torch.equal(t, merged[k])
    else:
        unmerge(model)  # what was there is put back, whatever the adapter is
        assert all(torch.equal(m.weight, before[f"{n}.weight"]) for n, m in adapted(model).items())


@pytest.mark.parametrize("keep_base", ("none", "cpu"))
def test_a_merged_model_is_swapped_whole_or_not_at_all(keep_base, tmp_path):
    pytest.importorskip("safetensors")
    model = inject(build(), LoRAConfig(target_modules="all-linear", init_lora_weights=False))
    list(adapted(model).values())[-1].lora_b.data.fill_(1e6)
    fused_lora.save_adapter(model, tmp_path)
    model = inject(
        build().half(),
        LoRAConfig(target_modules="all-linear", init_lora_weights=False),
        adapter_dtype=torch.float32,
    )
    merge(model, keep_base)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"values that torch\.float16 cannot hold"):
        fused_lora.swap_adapter(model, tmp_path)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_shared_module_is_merged_once():
    model = build()
    model.extra = model.q_proj
    inject(model, LoRAConfig(target_modules=["q_proj"], init_lora_weights=False))
    want = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), want)
