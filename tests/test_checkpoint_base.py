"""What PEFT saves of the base model beside an adapter, and LoRA of embeddings: there and back."""

import copy

import pytest
import torch
from conftest import DEVICE
from safetensors.torch import load_file, save_file
from test_save_adapter import assert_equal, peft_model

import fused_lora as fl
from fused_lora.checkpoint import read_adapter
from fused_lora.checkpoint.convert import convert_peft
from fused_lora.checkpoint.merging import merge_folder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 15, device=DEVICE).view(2, 7)
WEIGHTS = "adapter_model.safetensors"


def llama(seed=0, vocab=64, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(DEVICE, dtype)


def saved(path, base=None, save_embedding_layers="auto", **options):
    """PEFT's folder of an adapter that does something, and the model."""
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False} | options
    model = peft.get_peft_model(base or llama(), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.add_(torch.randn_like(p))
    model.save_pretrained(path, save_embedding_layers=save_embedding_layers)
    return model


HEAD = ["q_proj", "lm_head"]
PEFT = {
    "head": {"target_modules": HEAD},
    "head alone": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding alone": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": [*HEAD, "embed_tokens"], "use_rslora": True},
    "an expression": {"target_modules": ".*(lm_head|q_proj)"},
    "ranks": {"target_modules": [*HEAD, "embed_tokens"], "rank_pattern": {"embed_tokens": 2}},
    "alphas": {"target_modules": [*HEAD, "embed_tokens"], "alpha_pattern": {"embed_tokens": 2}},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": HEAD, "modules_to_save": ["embed_tokens"]},
    "biases": {"target_modules": HEAD, "bias": "all"},
    "asked for": {"target_modules": ["q_proj"], "save_embedding_layers": True},
    "asked for, whole head": {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "save_embedding_layers": True,
    },
}  # fmt: skip


TIED = "head", "both", "asked for", "whole head"


@pytest.mark.parametrize(
    "name, tied", [*((name, False) for name in PEFT), *((name, True) for name in TIED)]
)
def test_there_and_back(tmp_path, name, tied):
    """Into another base, which gets the folder's head and embedding, as PEFT loads them."""
    saved(tmp_path / "a", llama(tie_word_embeddings=tied), **PEFT[name])
    base = llama(1, tie_word_embeddings=tied)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    ours = fl.load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert_equal(ours, theirs, IDS)
    fl.save_adapter(ours, tmp_path / "b")
    for again in (fl.load_adapter, peft.PeftModel.from_pretrained if tied else peft_model):
        assert_equal(again(copy.deepcopy(base), tmp_path / "b"), theirs, IDS)
    with torch.no_grad():
        for own, p in ours.named_parameters():
            if p.requires_grad or "lora" in own:
                p.zero_()
    assert_equal(fl.load_adapter(ours, tmp_path / "a"), theirs, IDS)


def test_a_vocabulary_of_another_size(tmp_path):
    """PEFT saves embeddings and head of a model that was resized, and nobody else has the rows."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    base.resize_token_embeddings(70)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        theirs = saved(tmp_path / "a", base, target_modules=["q_proj"])
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "a" / WEIGHTS)
    ours = fl.load_adapter(llama(3, vocab=70), tmp_path / "a")
    assert torch.equal(ours.lm_head.weight, theirs.base_model.model.lm_head.weight)
    fl.save_adapter(ours, tmp_path / "b")
    back = fl.load_adapter(llama(4, vocab=70), tmp_path / "b")
    assert torch.equal(back.model.embed_tokens.weight, ours.model.embed_tokens.weight)
    small = llama()
    before = {k: t.clone() for k, t in small.state_dict().items()}
    words = r"weight has shape \[70, 32\]; the model's has \[64, 32\]: give it the vocabulary"
    with pytest.raises(ValueError, match=words):
        fl.load_adapter(small, tmp_path / "a")
    assert all(torch.equal(t, before[k]) for k, t in small.state_dict().items())


def test_a_store_compares(tmp_path):
    """All adapters have one base: one that was trained on another is refused."""
    theirs = saved(tmp_path / "a", target_modules=HEAD)
    targets = {"target_modules": HEAD}
    for model in (llama(), llama(dtype=torch.bfloat16)):
        store = fl.AdapterStore(model, 2, 4, **targets)
        store.load("a", tmp_path / "a")
        with store.route(["a", "a"]):
            got = model(input_ids=IDS).logits
        want = theirs.to(got.dtype)(input_ids=IDS).logits
        bound = 1e-4 if got.dtype == torch.float32 else 0.1
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)
        theirs.float()
    store = fl.AdapterStore(llama(1), 2, 4, **targets)
    for call in (
        lambda: store.load("a", tmp_path / "a"),
        lambda: read_adapter(tmp_path / "a", llama(1)),
    ):
        with pytest.raises(ValueError, match=r"holds lm_head\.weight of the base model, and"):
            call()
    assert len(store) == 0 and set(read_adapter(tmp_path / "a")) == {
        "lm_head", "model.layers.0.self_attn.q_proj",
    }  # fmt: skip
    saved(tmp_path / "b", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(NotImplementedError, match=r"model\.embed_tokens is an embedding, whose"):
        store.load("b", tmp_path / "b")


def test_a_swap_compares(tmp_path):
    """With the model's weight, or with the W0 that a merge kept."""
    theirs = saved(tmp_path / "a", target_modules=[*HEAD, "embed_tokens"], r=5)
    saved(tmp_path / "other", llama(1), target_modules=[*HEAD, "embed_tokens"])
    fl.save_adapter(fl.load_adapter(llama(), tmp_path / "other"), tmp_path / "b")
    model = fl.load_adapter(llama(), tmp_path / "a")
    want = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match="of the base model, and the model's has other values"):
        fl.swap_adapter(model, tmp_path / "other")
    saved(tmp_path / "c", target_modules=[*HEAD, "embed_tokens"], r=2)
    fl.swap_adapter(model, tmp_path / "c")
    assert model.model.embed_tokens.r == 2
    fl.swap_adapter(model, tmp_path / "a")
    torch.testing.assert_close(model(input_ids=IDS).logits, want)
    assert_equal(model, theirs, IDS)
    fl.merge(model, keep_base="cpu")
    fl.swap_adapter(model, tmp_path / "c")
    fl.save_adapter(model, tmp_path / "d")
    assert torch.equal(
        load_file(tmp_path / "d" / WEIGHTS)["base_model.model.lm_head.base_layer.weight"],
        llama().lm_head.weight.cpu(),
    )
    fl.unmerge(model)
    fl.merge(model)
    for call in (fl.swap_adapter, lambda model, path: fl.save_adapter(model, tmp_path / "e")):
        with pytest.raises(RuntimeError, match=r"merged.* call fl\.unmerge"):
            call(model, tmp_path / "a")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT)
def test_convert_keeps_all(tmp_path, options):
    saved(tmp_path / "a", **options)
    convert_peft(tmp_path / "a", tmp_path / "b")
    ours, other = (load_file(tmp_path / n / WEIGHTS) for n in "ab")
    twice = {k for k in ours if ".original_module." in k or ".modules_to_save." in k}
    assert ours.keys() - twice == other.keys()
    assert all(torch.equal(t, ours[k]) for k, t in other.items())


@pytest.mark.parametrize("seed", [0, 1], ids=["the same base", "another base"])
def test_merge_of_a_folder(tmp_path, seed):
    """The folder's head takes the place of the model's, and the adapters are added to it."""
    targets = [*HEAD, "embed_tokens"]
    theirs = saved(tmp_path / "a", llama(seed), target_modules=targets)
    llama(seed).save_pretrained(tmp_path / "model")
    if seed:
        path = tmp_path / "model" / "model.safetensors"
        found = load_file(path)
        found["lm_head.weight"] = torch.randn_like(found["lm_head.weight"])
        save_file(found, path, metadata={"format": "pt"})
    told = merge_folder(tmp_path / "model", tmp_path / "a", tmp_path / "out")
    assert (told["merged"], told["replaced"]) == (3, seed)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(DEVICE)
    torch.testing.assert_close(
        loaded(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-3, atol=1e-4
    )


def test_merge_of_tied_weights_that_stay_as_they_are(tmp_path):
    """A head and an embedding that are in the folder, and in no way changed by it."""
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "model")
    saved(tmp_path / "a", base, target_modules=["q_proj"], save_embedding_layers=True)
    told = merge_folder(tmp_path / "model", tmp_path / "a", tmp_path / "out")
    assert (told["merged"], told["replaced"]) == (1, 0)
    path = tmp_path / "a" / WEIGHTS
    found = load_file(path)
    found["base_model.model.lm_head.weight"] += 1
    save_file(found, path)
    with pytest.raises(ValueError, match="merging would change both, or be lost"):
        merge_folder(tmp_path / "model", tmp_path / "a", tmp_path / "out2")


REFUSED = {
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True is not supported"),
    "dora": ({"use_dora": True}, "use_dora=True is not supported"),
}


@pytest.mark.parametrize("options, words", REFUSED.values(), ids=REFUSED)
def test_what_else_peft_puts_there_is_refused_by_name(tmp_path, options, words):
    saved(tmp_path / "a", target_modules=HEAD, **options)
    model = llama()
    for call in (
        lambda: fl.load_adapter(model, tmp_path / "a"),
        lambda: read_adapter(tmp_path / "a"),
        lambda: convert_peft(tmp_path / "a", tmp_path / "b"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            call()
    assert not (tmp_path / "b").exists() and not hasattr(model, "fused_lora_config")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_base_of_another_dtype(tmp_path, dtype):
    """It is rounded to the model's, and the adapter stays as it is."""
    saved(tmp_path / "a", target_modules=[*HEAD, "embed_tokens"])
    model = fl.load_adapter(llama(1, dtype=dtype), tmp_path / "a")
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight.to(dtype))
    assert model.model.embed_tokens.lora_a.dtype == torch.float32
    found = load_file(tmp_path / "a" / WEIGHTS)
    found["base_model.model.lm_head.base_layer.weight"][0, 0] = 3.4e38
    save_file(found, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match=rf"lm_head\.weight has values that {dtype} cannot hold"):
        fl.load_adapter(llama(1, dtype=dtype), tmp_path / "a")


def test_adalora_has_its_head_beside_it_too(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1, target_modules=HEAD,
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path / "a")
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in load_file(tmp_path / "a" / WEIGHTS)
    base = llama()
    with torch.no_grad():
        base.lm_head.weight.zero_()
    ours = fl.load_adapter(base, tmp_path / "a")
    assert_equal(ours, theirs, IDS)
    fl.save_adapter(ours, tmp_path / "b")
    assert key in load_file(tmp_path / "b" / WEIGHTS)


def test_an_embedding_that_does_not_fit_changes_nothing(tmp_path):
    saved(tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    without = fl.inject(llama(), fl.LoRAConfig(r=3, target_modules=["q_proj"]))
    sparse = llama()
    sparse.model.embed_tokens.max_norm = 1.0
    cases = (
        (without, ValueError, r"adapted embeddings of the folder, \['model.embed_tokens'\], are n"),
        (sparse, TypeError, "has max_norm=1.0, which an adapted embedding has not"),
    )
    for model, error, words in cases:
        before = {k: t.clone() for k, t in model.state_dict().items()}
        with pytest.raises(error, match=words):
            fl.load_adapter(model, tmp_path / "a")
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert type(sparse.model.embed_tokens) is torch.nn.Embedding
