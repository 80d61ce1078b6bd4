"""Embeddings with an adapter, and whole models behind DePT."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama

import fused_lora as fl
from fused_lora import files
from fused_lora.nn import DePT, DePTEmbedding, LoRAEmbedding, dept_rank
from fused_lora.nn import dept as nn_dept
from fused_lora.testing import assert_near

V, D, m, S, R = 64, 32, 3, 10, 4


def words(**options):
    return torch.nn.Embedding(V, D, device=DEVICE, **options)


def ids(*shape):
    return torch.randint(1, V, shape, device=DEVICE)


# The modules


@pytest.mark.parametrize("m,S,r", [(40, 256, 45), (60, 256, 30), (80, 256, 15), (60, 512, 24)])
def test_the_ranks_of_the_paper(m, S, r):
    """Of T5-base, in place of a prompt of 100 rows."""
    assert dept_rank(100, S, 768, m) == r
    assert m * 768 + (S + 768) * r <= 76800 < m * 768 + (S + 768) * (r + 1)


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ((100, 256, 768, 100), ValueError, "prompt_length 100 of 100 leaves 0 parameters, and a "),
        ((100, 256, 768, -1), ValueError, "prompt_length must be at least 1, got -1"),
        ((100, 256, 7.5, 1), TypeError, "dim must be an int, got 7.5"),
    ],
)
def test_no_rank(arguments, error, message):
    with pytest.raises(error, match=message):
        dept_rank(*arguments)


def test_dept_embedding_shares_and_freezes_the_words():
    base = words(padding_idx=0)
    layer = DePTEmbedding.from_embedding(base, m, S, R)
    assert layer.weight is base.weight and not layer.weight.requires_grad
    trained = {n: tuple(p.shape) for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"prompt": (m, D), "lora_a": (S, R), "lora_b": (R, D)}
    assert layer.padding_idx == 0 and layer.scale == 8 / math.sqrt(R)
    some = ids(2, 12)
    y = layer(some)
    assert torch.equal(y[:, m:], base(some))  # B is zero
    assert torch.equal(y[0, :m], layer.prompt) and layer.lora_a.any()
    assert torch.equal(layer(some, with_prompt=False), base(some))
    y.sum().backward()
    assert base.weight.grad is None and layer.lora_b.grad.any() and layer.prompt.grad.any()


@pytest.mark.parametrize("options", [{"use_rslora": False}, {"init": "gaussian"}, {"init": False}])
def test_dept_options(options):
    layer = DePTEmbedding(V, D, prompt_length=m, max_length=S, r=R, **options)
    assert layer.scale == (8 / R if "use_rslora" in options else 4.0)
    assert bool(layer.lora_b.any()) == (options.get("init") is False)
    some = ids(5).cpu()
    want = fl.reference.dept_embedding(
        some, layer.weight, layer.prompt, layer.lora_a, layer.lora_b, scale=layer.scale
    )
    torch.testing.assert_close(layer(some), want)


def test_prompts_that_are_words():
    base = words()
    layer = DePTEmbedding.from_embedding(base, 5, S, R, prompt_init=[7, 3])
    assert torch.equal(layer.prompt, base.weight[[7, 3, 7, 3, 7]])
    drawn = DePTEmbedding.from_embedding(base, 5, S, R).prompt
    assert all((base.weight == row).all(1).any() for row in drawn)
    random = DePTEmbedding.from_embedding(base, 5, S, R, prompt_init="random").prompt
    assert not any((base.weight == row).all(1).any() for row in random)
    none = DePTEmbedding.from_embedding(base, 0, S, R)
    assert none.prompt is None and none(ids(2, 4)).shape == (2, 4, D)


def test_masters():
    layer = DePTEmbedding.from_embedding(words().half(), m, S, R, adapter_dtype=torch.float32)
    y = layer(ids(2, 4))
    y.float().sum().backward()
    assert y.dtype == torch.float16 and layer.prompt.grad.dtype == torch.float32
    token = LoRAEmbedding.from_embedding(words().half(), R, adapter_dtype=torch.float32)
    token(ids(4)).float().sum().backward()
    assert token.lora_a.grad.dtype == torch.float32


def test_lora_embedding_is_pefts():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(words(padding_idx=2))
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights=False),
    ).base_model.model[0]
    ours = LoRAEmbedding.from_embedding(model[0], R, lora_alpha=6)
    assert not ours.lora_a.any() and ours.lora_b.any()
    some = ids(2, 9)
    some[0, 0] = 2
    assert torch.equal(ours(some), model[0](some))
    with torch.no_grad():
        ours.lora_a.copy_(theirs.lora_embedding_A["default"])
        ours.lora_b.copy_(theirs.lora_embedding_B["default"])
    torch.testing.assert_close(ours(some), theirs(some))
    for layer in (ours, theirs):
        layer(some).square().sum().backward()
    assert_near("dA", ours.lora_a.grad, theirs.lora_embedding_A["default"].grad)
    assert not ours.lora_a.grad[:, 2].any()
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


class Scaled(torch.nn.Embedding):
    pass


@pytest.mark.parametrize("make", [LoRAEmbedding.from_embedding,
                                  lambda e: DePTEmbedding.from_embedding(e, m, S, R)])  # fmt: skip
@pytest.mark.parametrize(
    "base,message",
    [
        (torch.nn.Linear(2, 2), "embedding is a torch.nn.modules.linear.Linear; only a plain"),
        (Scaled(4, 2), "Scaled; only a plain torch.nn.Embedding can be adapted"),
        (torch.nn.Embedding(4, 2, max_norm=1.0), "embedding has max_norm=1.0, which an adapted"),
        (torch.nn.Embedding(4, 2, sparse=True), "embedding has sparse=True, which an adapted"),
    ],
)
def test_other_embeddings_are_refused(make, base, message):
    with pytest.raises(TypeError, match=message):
        make(base)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"max_length": 2.0}, TypeError, "max_length must be an int, got 2.0 of type float"),
        ({"prompt_length": -1}, ValueError, "prompt_length must be at least 1, got -1"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number, got '8' of type str"),
        ({"init": "zeros"}, ValueError, "init must be one of 'kaiming', 'gaussian', False, got 'z"),
        ({"prompt_init": "text"}, ValueError, "prompt_init must be one of 'random', 'vocab', got"),
        ({"prompt_init": [1, V]}, ValueError, r"prompt_init must have ids in \[0, 64\), got"),
        ({"prompt_init": [0.5]}, ValueError, "or the ids of words, got a float32 tensor of shape"),
        ({"adapter_dtype": torch.float16}, TypeError, "adapter_dtype must be None, the weight's"),
    ],
)
def test_bad_options(change, error, message):
    options = {"prompt_length": m, "max_length": S, "r": R} | change
    with pytest.raises(error, match=message):
        DePTEmbedding.from_embedding(words(), **options)


# Whole models


def tiny(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        return tiny_llama().eval()
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=V, d_model=D, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).to(DEVICE).eval()
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
        initializer_range=0.2,  # of its own 0.02 its inputs hardly matter
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).to(DEVICE).eval()


def dept(kind, **options):
    model = DePT(tiny(kind), m, S, R, init=False, **options)
    with torch.no_grad():
        model.embedding.lora_b.mul_(0.3)
    return model.eval()


def by_hand(model, some):
    own = model.embedding
    return fl.reference.dept_embedding(
        some, own.weight, own.prompt, own.lora_a, own.lora_b, scale=own.scale
    )


EXTRA = {"llama": {}, "bert": {}, "t5": {"decoder_input_ids": torch.tensor([[0, 5], [0, 9]])}}


def extra(kind, N=2):
    return {k: v.to(DEVICE)[:N] for k, v in EXTRA[kind].items()}


@pytest.mark.parametrize("kind", EXTRA)
def test_a_model_is_the_base_of_the_embeddings_by_hand(kind):
    model, some = dept(kind), ids(2, 12)  # longer than max_length
    want = model.model(inputs_embeds=by_hand(model, some), **extra(kind)).logits
    for mask in (None, torch.ones_like(some)):
        torch.testing.assert_close(model(some, mask, **extra(kind)).logits, want)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "embedding.prompt",
        "embedding.lora_a",
        "embedding.lora_b",
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", EXTRA)
def test_padding_changes_nothing(kind, side):
    model, row = dept(kind), ids(1, 6)
    pads = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
    parts = (pads, row) if side == "left" else (row, pads)
    padded, mask = torch.cat(parts, 1), torch.cat([(t != 0).long() for t in parts], 1)
    alone = model(row, **extra(kind, 1)).logits
    batch = model(padded, mask, **extra(kind, 1)).logits
    if kind == "llama":
        assert batch.shape[1] == m + 10
        batch = batch[:, m:][mask.bool()][None]
        alone = alone[:, m:]
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)
    if side == "right":
        model.padding_side = "right"
        again = model(padded, mask, **extra(kind, 1)).logits
        again = again[:, m:][mask.bool()][None] if kind == "llama" else again
        torch.testing.assert_close(again, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", None])
def test_generation_with_a_cache_is_that_without(side):
    """Greedy, past max_length and in a padded batch: what whole forwards choose, token by token."""
    model, rows = dept("llama"), [ids(1, 4), ids(1, 7)]
    padded = torch.zeros(2, 7, dtype=torch.int64, device=DEVICE)
    padded[0, 3:], padded[1] = rows[0], rows[1]
    new = model.generate(padded, (padded != 0).long(), max_new_tokens=6, do_sample=False,
                         eos_token_id=None)  # fmt: skip
    for n, row in enumerate(rows):
        for _ in range(6):
            choice = model(row).logits[:, -1].argmax(-1, keepdim=True)
            row = torch.cat((row, choice), 1)
        assert torch.equal(new[n], row[0, -6:])


def test_beams_have_positions_too():
    model, row = dept("llama"), ids(2, 4)
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    new = model.generate(row, **options)
    whole = model(torch.cat((row, new), 1)).logits[:, m + 3 : -1].log_softmax(-1)
    greedy = model.generate(row, **options | {"num_beams": 1})
    at_greedy = model(torch.cat((row, greedy), 1)).logits[:, m + 3 : -1].log_softmax(-1)

    def score(logits, chosen):
        return logits.gather(-1, chosen[..., None]).sum((1, 2))

    assert (score(whole, new) >= score(at_greedy, greedy) - 1e-4).all()


def test_steps_with_a_cache_by_hand():
    model, some = dept("llama").requires_grad_(False), ids(2, 9)
    whole = model(some).logits
    first = model(some[:, :5], use_cache=True)
    name = "past_key_values"
    cache = getattr(first, name, None)
    cache, name = (cache, name) if cache is not None else (first.cache, "cache")
    for mask in (None, torch.ones_like(some)):
        step = model(some[:, 5:], mask, use_cache=True, **{name: copy.deepcopy(cache)}).logits
        torch.testing.assert_close(step, whole[:, m + 5 :], rtol=1e-4, atol=1e-5)


def test_t5_generates_from_its_encoder():
    model, some = dept("t5"), ids(2, 8)
    new = model.generate(some, max_new_tokens=4, do_sample=False, eos_token_id=None)
    out = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    for _ in range(4):
        logits = model(some, decoder_input_ids=out).logits
        out = torch.cat((out, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(new, out)


@pytest.mark.parametrize("kind", EXTRA)
def test_training_lowers_the_loss(kind):
    model, some = dept(kind), ids(4, 8)
    labels = torch.tensor([0, 1, 0, 1], device=DEVICE) if kind == "bert" else some.clone()
    groups = fl.optim.dept_groups(model, prompt_lr=0.1, pair_lr=1e-2)
    optimizer, losses = torch.optim.AdamW(groups), []
    before = [p.clone() for p in model.model.parameters()]
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(some, torch.ones_like(some), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = list(model.model.parameters())
    assert all(torch.equal(u, v) for u, v in zip(before, after, strict=True))


def test_labels_of_a_causal_model_skip_the_prompt():
    """The last row of the prompt predicts the first token, and no row predicts the prompt."""
    model, some = dept("llama"), ids(2, 8)
    out = model(some, labels=some)
    logits = out.logits[:, m - 1 : -1].flatten(0, 1)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, some.flatten()))


def test_position_ids_and_token_types_grow():
    model, some = dept("bert"), ids(2, 6)
    at = torch.arange(6, device=DEVICE).expand(2, 6)
    kinds = torch.tensor([0, 0, 0, 1, 1, 1], device=DEVICE).expand(2, 6)
    seen = {}
    model.model.bert.register_forward_pre_hook(lambda mod, a, kw: seen.update(kw), with_kwargs=True)
    model(some, position_ids=at, token_type_ids=kinds)
    assert seen["position_ids"].tolist() == [[*range(m + 6)]] * 2
    assert seen["token_type_ids"].tolist() == [[0] * (m + 3) + [1] * 3] * 2


@pytest.mark.parametrize("first", ["inject", "dept"])
def test_beside_lora(first):
    """Both on one model, in either order: both are trained, nothing else is."""
    base = tiny("llama")
    config = fl.LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    if first == "inject":
        model = DePT(fl.inject(base, config), m, S, R)
    else:
        model = DePT(base, m, S, R)
        fl.inject(model.model, config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 + 2 * 2
    assert all(n.startswith("embedding.") or ".lora_" in n for n in trained)
    some = ids(2, 8)
    model(some, labels=some).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="lr must be given: 4 other parameters are trained"):
        fl.optim.dept_groups(model, prompt_lr=0.3, pair_lr=1e-3)
    groups = fl.optim.dept_groups(model, prompt_lr=0.3, pair_lr=1e-3, lr=1e-4, weight_decay=0.1)
    found = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
    assert found == [(1, 0.3, 0.1), (2, 1e-3, 0.1), (4, 1e-4, 0.1)]


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"prompt_lr": 0.0}, ValueError, "prompt_lr must be above 0, got 0.0"),
        ({"pair_lr": "1"}, TypeError, "pair_lr must be a number, got '1' of type str"),
        ({"module": torch.nn.Linear(2, 2)}, ValueError, "module has no DePTEmbedding that is tr"),
    ],
)
def test_bad_groups(change, error, message):
    options = {"module": DePTEmbedding.from_embedding(words(), m, S, R)} | change
    with pytest.raises(error, match=message):
        fl.optim.dept_groups(**{"prompt_lr": 0.3, "pair_lr": 1e-3} | options)


# Folders


def test_saved_and_loaded(tmp_path):
    source, some = dept("llama"), ids(2, 8)
    source.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "DEPT", "prompt_length": m, "max_length": S, "r": R, "lora_alpha": 8,
        "use_rslora": True,
    }  # fmt: skip
    want = source(some).logits
    made = DePT.from_folder(tiny("llama"), tmp_path)
    assert torch.equal(made(some).logits, want)
    other = DePT(tiny("llama"), m, S, R, lora_alpha=1)  # another task, which starts from here
    assert not torch.equal(other(some).logits, want)
    other.load(tmp_path)
    assert torch.equal(other(some).logits, want)
    peft = pytest.importorskip("peft")
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)


def spoil(folder, what):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    if what == "kind":
        config["peft_type"] = "LORA"
    elif what == "field":
        config["inference_mode"] = True
    elif what == "rank":
        config["r"] = 0
    elif what == "length":
        config["max_length"] = 11
    elif what == "tensor":
        del tensors["lora_b"]
    elif what == "shape":
        tensors["prompt"] = tensors["prompt"][:, :-1].contiguous()
    elif what == "nan":
        tensors["lora_a"][0, 0] = float("nan")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    if what == "file":
        (folder / "adapter_model.safetensors").unlink()
    elif what == "garbage":
        (folder / "adapter_model.safetensors").write_bytes(b"pickle")
    elif what == "twice":
        text = json.dumps(config).replace('"r"', '"max_length": 9, "r"')
        (folder / "adapter_config.json").write_text(text)
    elif what == "link":
        (folder / "adapter_config.json").rename(folder.parent / "elsewhere.json")
        (folder / "adapter_config.json").symlink_to(folder.parent / "elsewhere.json")


@pytest.mark.parametrize(
    "what,error,message",
    [
        ("kind", ValueError, "peft_type must be 'DEPT'"),
        ("field", ValueError, "fields missing or unknown: inference_mode"),
        ("rank", ValueError, "r must be at least 1, got 0"),
        ("length", ValueError, r"lora_a must have shape \[11, 4\], got \[10, 4\]"),
        ("tensor", ValueError, "tensors missing or unknown: lora_b"),
        ("shape", ValueError, r"prompt must have shape \[3, 32\], got \[3, 31\]"),
        ("nan", ValueError, "lora_a has values that are not finite numbers"),
        ("file", FileNotFoundError, "has no adapter_model.safetensors"),
        ("garbage", ValueError, "a header of [0-9]+ bytes; at most 16777216 are read"),
        ("twice", ValueError, "the key 'max_length' occurs twice"),
        ("link", ValueError, "adapter_config.json leads out of its folder"),
    ],
)
def test_a_spoilt_folder_changes_nothing(tmp_path, what, error, message):
    model = dept("llama")
    model.save(tmp_path)
    spoil(tmp_path, what)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        model.load(tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_save_is_one_step(tmp_path, monkeypatch):
    """One that fails leaves what was there, one that is cut short is read whole, and so is one that
    comes while the folder is read: never the config of one with the tensors of another."""
    first, second = (
        DePT(tiny("llama"), m, S, R, lora_alpha=alpha, prompt_init="random") for alpha in (1, 2)
    )
    first.save(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("safetensors.torch.save_file", full)
        second.save(tmp_path)
    assert DePT.from_folder(tiny("llama"), tmp_path).embedding.lora_alpha == 1
    with monkeypatch.context() as patch:
        patch.setattr("fused_lora.files.finish", lambda folder: None)
        second.save(tmp_path)
    assert DePT.from_folder(tiny("llama"), tmp_path).embedding.lora_alpha == 2
    for place, name in ((files, "read_json"), (nn_dept, "Header")):
        real, left = getattr(place, name), []

        def and_a_save(*args, real=real, left=left, **options):
            if left:
                left.pop()
                second.save(tmp_path)
            found = real(*args, **options)
            if left:
                left.pop()
                second.save(tmp_path)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(place, name, and_a_save)
            for saves in (1, 2):
                first.save(tmp_path)
                left[:] = [None] * saves
                made = DePT.from_folder(tiny("llama"), tmp_path).embedding
                of = first if made.lora_alpha == 1 else second
                assert torch.equal(made.prompt, of.embedding.prompt) and not left
            left[:] = [None] * 1000
            with pytest.raises(RuntimeError, match="was saved while it was read; read it again"):
                first.load(tmp_path)


def test_what_the_wrapper_refuses():
    with pytest.raises(TypeError, match="model must have get_input_embeddings"):
        DePT(torch.nn.Linear(2, 2), m, S, R)
    with pytest.raises(ValueError, match="padding_side must be one of 'left', 'right', None"):
        DePT(tiny("llama"), m, S, R, padding_side="top")
    model = dept("llama")
    with pytest.raises(TypeError, match="DePT makes inputs_embeds itself; pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, D))
    with pytest.raises(ValueError, match=r"input_ids must have shape \[N, L\], got \[5\]"):
        model(ids(5))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[N, L\], got \[2\]"):
        model(ids(2, 5), ids(2))
