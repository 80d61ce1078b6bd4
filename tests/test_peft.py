"""fl.accelerate: a PEFT model on these kernels is, but for rounding, the PEFT model."""

import copy
import importlib
import itertools
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from cases import slow
from conftest import DEVICE
from peft_models import (
    DTYPES,
    EMBEDDING,
    LINEAR,
    OPTIONS,
    assert_close,
    assert_same,
    batches_of,
    config,
    equal,
    model_of,
    outputs,
    peft,
    saved_storages,
    tokens,
    trained_peak,
    truth,
)
from tiny_llama import tiny_llama
from tiny_models import FAMILIES

import fused_lora as fl
from fused_lora.integrations.peft import accelerated_classes
from fused_lora.testing import nudge_

# The quick run takes one family where the others tell it nothing new.
families = pytest.mark.parametrize("family", ["llama", *map(slow, list(FAMILIES)[1:])])
ROUTES = {"dora": "dora_linear"}


@pytest.mark.parametrize("dtypes", ["fp32", *map(slow, list(DTYPES)[1:])])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, options, dtypes):
    model = model_of(config(**OPTIONS[options]), family=family, **DTYPES[dtypes])
    report = assert_same(model, batches_of(family, model.dtype))
    layers = len(report.layers)
    assert len(report.fused) == layers > 1 and not report.fallbacks
    route = ROUTES.get(options, "lora_linear")
    assert {layer.route for layer in report.layers} == {route}
    assert repr(report) == f"{layers} of {layers} LoRA layers run fused\n  {layers} by {route}"


@pytest.mark.parametrize("options", OPTIONS)
def test_sixteen_bits(options):
    model = model_of(config(**OPTIONS[options]), dtype=torch.bfloat16)
    assert not assert_same(model, batches_of("llama", model.dtype)).fallbacks


def test_nothing_is_dropped_in_evaluation():
    model = model_of(config(lora_dropout=0.5)).eval()
    assert not assert_same(model, batches_of("llama")).fallbacks


@pytest.mark.parametrize("options", OPTIONS)
def test_autocast(options):
    """Against fp64 at most twice PEFT's error, with bf16's ulp."""
    model, batches = model_of(config(**OPTIONS[options])), batches_of("llama")
    truths = truth(model, batches, torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        theirs = outputs(model, batches)
        report = fl.accelerate(model)
        ours = outputs(model, batches)
    assert_close(ours, theirs, truths, torch.bfloat16)
    assert not report.fallbacks


@pytest.mark.parametrize("dtypes", ["bf16, fp32 adapters", slow("fp32"), slow("bf16")])
@pytest.mark.parametrize("others", [(), ({"r": 9}, {"use_rslora": True})], ids=["one", "three"])
@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.embedding])
def test_embeddings(family, others, dtypes):
    found = FAMILIES[family]
    names = [found.projection, found.embedding]
    configs = [config(target_modules=names, **options) for options in ({}, *others)]
    model = model_of(*configs, family=family, **DTYPES[dtypes])
    model.base_model.set_adapter([f"a{i}" for i in range(len(configs))])
    report = assert_same(model, batches_of(family, model.dtype))
    assert {layer.route for layer in report.layers} == {"lora_linear", "lora_embedding"}
    assert not report.fallbacks and len(report.fused) == len(report.layers)
    assert any(isinstance(m, EMBEDDING) for m in model.modules())


def test_the_padding_word_has_no_gradient():
    model = model_of(config(target_modules=["embed_tokens"]))
    fl.accelerate(model)
    ids = tokens()
    ids[:, 0] = 0  # pad_token_id
    model(input_ids=ids).logits.square().mean().backward()
    (grad,) = [p.grad for n, p in model.named_parameters() if "lora_embedding_A" in n]
    assert not grad[:, 0].any() and grad[:, ids[0, 1]].all()


def spied(monkeypatch, *names) -> list[str]:
    """The ops of these names that accelerate's layers call, as they call them."""
    calls = []
    for name in names:
        right = getattr(fl, name)

        def spy(*args, _name=name, _right=right, **options):
            calls.append(_name)
            return _right(*args, **options)

        monkeypatch.setattr(f"fused_lora.integrations.peft.{name}", spy)
    return calls


def test_the_fused_path_is_taken(monkeypatch):
    calls = spied(monkeypatch, "lora_linear", "dora_linear", "lora_embedding")
    model = model_of(config(), config(use_dora=True), config(target_modules=["embed_tokens"]))
    fl.accelerate(model)
    for name, op, count in (
        ("a0", "lora_linear", 2 * 7),
        ("a1", "dora_linear", 2 * 7),
        ("a2", "lora_embedding", 1),
    ):
        model.set_adapter(name)
        calls.clear()
        model(input_ids=tokens())
        assert calls == [op] * count


def test_several_active_adapters_are_summed():
    model = model_of(
        config(r=3), config(r=8, lora_alpha=2, lora_bias=True), config(target_modules=["q_proj"])
    )
    model.base_model.set_adapter(["a0", "a1", "a2"])
    assert not assert_same(model, batches_of("llama")).fallbacks


def test_mixed_batches():
    """Layers that an adapter lacks, ranks and scales that differ, rows of the base."""
    model = model_of(
        config(r=3), config(r=9, use_rslora=True), config(target_modules=["q_proj", "down_proj"])
    ).eval()
    names = ["a1", "__base__", "a2", "a0", "a1"]
    report = assert_same(model, batches_of("llama", rows=5), adapter_names=names)
    assert not report.fallbacks
    ids = tokens(5)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for i, name in enumerate(names):
            if name != "__base__":
                model.base_model.set_adapter(name)
                alone = model(input_ids=ids[i : i + 1]).logits
                torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@families
def test_mixed_batches_of_every_family(family):
    model = model_of(config(r=3), config(r=9, lora_alpha=1), family=family).eval()
    names = ["a1", "__base__", "a0"]
    assert not assert_same(model, batches_of(family), adapter_names=names).fallbacks


def test_mixed_batches_see_weights_that_were_changed_in_place():
    model = model_of(config(), config()).eval()
    fl.accelerate(model)
    ids, names = tokens(2), ["a0", "a1"]
    with torch.no_grad():
        before = model(input_ids=ids, adapter_names=names).logits
        for name, parameter in model.named_parameters():
            if "lora_B.a1" in name:
                parameter.data.mul_(-3)
        after = model(input_ids=ids, adapter_names=names).logits
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_a_mixed_batch_in_inference_mode_and_then_with_gradients():
    model = model_of(config(), config(r=5)).eval()
    fl.accelerate(model)
    ids, names = tokens(2), ["a1", "a0"]
    with torch.inference_mode():
        want = model(input_ids=ids, adapter_names=names).logits.clone()
    logits = model(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    logits.square().mean().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_generation_of_a_mixed_batch():
    model, ids = model_of(config(), config(r=5)).eval(), tokens(3, 4)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    options |= {"adapter_names": ["a1", "a0", "__base__"], "do_sample": False}
    want = model.generate(**options)
    report = fl.accelerate(model)
    assert torch.equal(model.generate(**options), want) and not report.fallbacks


SWITCHED = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "t5": ["SelfAttention.q", "wo"],  # its embeddings are tied, and merging changes all of them
}


@pytest.mark.parametrize("family", SWITCHED)
def test_everything_that_switches_adapters(family):
    """disable_adapter, set_adapter, merge_adapter, unmerge_adapter and add_weighted_adapter, with
    an adapter of DoRA among them: logits as of a PEFT model that goes through the same."""
    names, (batch,) = SWITCHED[family], batches_of(family, n=1)

    def seen(accelerated: bool):
        logits = []

        def look():
            with torch.no_grad():
                logits.append(model(**batch).logits)

        plain, dora = config(target_modules=names), config(use_dora=True, target_modules=names[:2])
        model = model_of(plain, plain, dora, family=family).eval()
        if accelerated:
            fl.accelerate(model)
        look()
        with model.disable_adapter():
            look()
        for name in ("a1", "a2"):
            model.set_adapter(name)
            look()
            model.base_model.merge_adapter()
            look()
            model.base_model.unmerge_adapter()
            look()
        model.add_weighted_adapter(["a0", "a1"], [0.7, -1.5], "sum", combination_type="linear")
        model.set_adapter("sum")
        look()
        model = model.merge_and_unload()
        look()
        return logits

    ours, theirs = seen(True), seen(False)
    for got, same in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-4)
    changes = [
        not torch.allclose(u, v, rtol=1e-3, atol=1e-3) for u, v in itertools.pairwise(theirs)
    ]
    assert changes == [True, True, False, False, True, False, False, True, False]


def test_hot_swap(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    options = {"target_modules": ["q_proj", "up_proj"]}
    other = model_of(config(**options), config(**options))
    other.save_pretrained(tmp_path)
    ids, logits = tokens(), []
    for accelerated in (True, False):
        model = model_of(config(**options)).eval()
        if accelerated:
            fl.accelerate(model)
        before = model(input_ids=ids).logits
        hotswap_adapter(model, tmp_path / "a1", adapter_name="a0", torch_device=DEVICE)
        logits.append(model(input_ids=ids).logits)
        assert not torch.allclose(before, logits[-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_hot_swap_of_what_was_prepared_for_it(tmp_path):
    """Scales become tensors, and ranks are padded with zeros."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model_of(config(r=3, lora_alpha=9)).save_pretrained(tmp_path)
    model = model_of(config(r=2))
    prepare_model_for_compiled_hotswap(model, target_rank=5, config=model.peft_config["a0"])
    hotswap_adapter(model, tmp_path / "a0", adapter_name="a0", torch_device=DEVICE)
    for layer in (m for m in model.modules() if isinstance(m, LINEAR)):
        assert isinstance(layer.scaling["a0"], torch.Tensor)
        layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()  # PEFT 0.18 freezes them
    assert not assert_same(model, batches_of("llama")).fallbacks


# Dropout.


class OurMask(torch.nn.Dropout):
    """PEFT's dropout, with the bits that ours has."""

    def forward(self, x):
        return fl.reference._dropout(x, self.p, self.training, None)


def with_our_masks(model) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, LINEAR):
            for name, dropout in module.lora_dropout.items():
                if name not in module.lora_variant and isinstance(dropout, torch.nn.Dropout):
                    module.lora_dropout[name] = OurMask(dropout.p).train(dropout.training)
    return model


@pytest.mark.parametrize("dtypes", ["fp32", slow("bf16")])
@pytest.mark.parametrize(
    "configs",
    [[{}], [{"lora_bias": True}], [{}, {"r": 5, "lora_dropout": 0.6}], [{}, {"lora_dropout": 0}]],
    ids=["one", "bias", "two", "two, one of them without"],
)
@families
def test_dropout_under_the_same_mask(family, configs, dtypes):
    """Given the masks of fused_lora, PEFT computes the same: each adapter's is its own."""
    configs = [config(**{"lora_dropout": 0.3, **options}) for options in configs]
    model = model_of(*configs, family=family, **DTYPES[dtypes])
    model.base_model.set_adapter([f"a{i}" for i in range(len(configs))])
    batches = batches_of(family, model.dtype)
    stock = with_our_masks(copy.deepcopy(model)).train()
    theirs = outputs(stock, batches)
    truths = truth(stock, batches)
    report = fl.accelerate(model.train())
    ours = outputs(model, batches)
    assert_close(ours, theirs, truths, model.dtype)
    assert not report.fallbacks
    assert not torch.equal(ours[0]["logits"], outputs(model.eval(), batches)[0]["logits"])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_dora_drops_as_peft_does(family):
    """Its masks are torch's, and what is dropped of x still goes through the base layer."""
    model = model_of(config(use_dora=True, lora_dropout=0.4), family=family).train()
    batches = batches_of(family)
    report = assert_same(model, batches)
    assert not report.fallbacks
    trained = outputs(model, batches)[0]["logits"]
    assert not torch.equal(trained, outputs(model.eval(), batches)[0]["logits"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()  # The layer decides, not its dropout.
    assert_same(model, batches)


def test_dropout_drops_at_its_rate_in_training_alone():
    """With p near 1 hardly anything is left of an adapter; in eval mode all of it."""
    model = model_of(config(lora_dropout=0.5))
    ids = tokens()
    fl.accelerate(model)
    model.train()
    torch.manual_seed(5)
    first, other = model(input_ids=ids).logits, model(input_ids=ids).logits
    torch.manual_seed(5)
    assert torch.equal(model(input_ids=ids).logits, first) and not torch.equal(first, other)
    model.eval()
    got = model(input_ids=ids).logits
    fl.restore(model)
    torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


# What stays.


def test_everything_else_of_peft_stays(tmp_path):
    names = ["embed_tokens", "q_proj", "down_proj"]
    model = model_of(config(target_modules=names), config(r=5))
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    model.save_pretrained(tmp_path / "before")
    fl.accelerate(model)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    model.save_pretrained(tmp_path / "after")
    for name in ("a0", "a1"):
        file = f"{name}/adapter_model.safetensors"
        before, after = tmp_path / "before" / file, tmp_path / "after" / file
        assert before.read_bytes() == after.read_bytes()
    for exact in (LINEAR, EMBEDDING):
        found = [m for m in model.modules() if isinstance(m, exact)]
        assert found and all(type(m) is accelerated_classes()[exact] for m in found)
    copied = pickle.loads(pickle.dumps(model))
    ids = tokens()
    assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
    model.add_adapter("later", config(r=2))
    model.set_adapter("later")
    assert_same(model, batches_of("llama"))
    merged = model.merge_and_unload()
    assert not any(isinstance(m, (LINEAR, EMBEDDING)) for m in merged.modules())


def test_reloaded_adapters_run_fused(tmp_path):
    options = {"target_modules": ["q_proj", "embed_tokens", "up_proj"]}
    model = model_of(config(**options), config(use_dora=True, target_modules=["up_proj"]))
    fl.accelerate(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a0", adapter_name="a0")
    again.load_adapter(tmp_path / "a1", adapter_name="a1")
    report, ids = fl.accelerate(again), tokens()
    for name in ("a0", "a1"):
        for one in (model, again):
            one.set_adapter(name)
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert not report.fallbacks


def test_restore():
    model = model_of(config(target_modules=["q_proj", "embed_tokens"]))
    want = outputs(model, batches := batches_of("llama"))
    fl.accelerate(model)
    fl.restore(model)
    for exact in accelerated_classes():
        assert all(type(m) is exact for m in model.modules() if isinstance(m, exact))
    assert equal(outputs(model, batches), want)


# Memory and training.

MEMORY = {
    **{name: [options] for name, options in OPTIONS.items()},
    "embedding": [{"target_modules": ["q_proj", "q", "query", "embed_tokens", "word_embeddings"]}],
    "several": [{}, {"r": 9}],
    "dropout": [{"lora_dropout": 0.3}],
    "several, dropout": [{"lora_dropout": 0.3}, {"lora_dropout": 0.1}],
    "dora, dropout": [{"use_dora": True, "lora_dropout": 0.3}],
}


@pytest.mark.parametrize("dtypes", [*DTYPES, "autocast"])
@pytest.mark.parametrize("options", MEMORY)
@families
def test_no_more_is_saved_for_the_backward_than_by_peft(family, options, dtypes):
    configs = [config(**given) for given in MEMORY[options]]
    if options == "embedding" and not FAMILIES[family].embedding:
        pytest.skip("it has no embedding")
    model = model_of(*configs, family=family, **DTYPES.get(dtypes, {})).train()
    model.base_model.set_adapter([f"a{i}" for i in range(len(configs))])
    (batch,) = batches_of(family, model.dtype, n=1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtypes == "autocast"):
        theirs = saved_storages(model, batch)
        report = fl.accelerate(model)
        ours = saved_storages(model, batch)
    assert 0 < ours <= theirs and not report.fallbacks


@pytest.mark.parametrize("dtypes", [*DTYPES, "autocast"])
@pytest.mark.parametrize("options", MEMORY)
@families
def test_the_peak_is_no_higher_than_with_peft(family, options, dtypes):
    """With as many rows as make what the rows need the most of it."""
    configs = [config(**given) for given in MEMORY[options]]
    if options == "embedding" and not FAMILIES[family].embedding:
        pytest.skip("it has no embedding")
    model = model_of(*configs, family=family, **DTYPES.get(dtypes, {})).train()
    model.base_model.set_adapter([f"a{i}" for i in range(len(configs))])
    (batch,) = batches_of(family, model.dtype, n=1, rows=64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtypes == "autocast"):
        theirs = trained_peak(model, batch)
        report = fl.accelerate(model)
        ours = trained_peak(model, batch)
    assert 0 < ours <= theirs and not report.fallbacks


@pytest.mark.parametrize("options", OPTIONS)
def test_the_usual_call_is_the_call_that_all_reasons_were_asked_for(options, monkeypatch):
    model, batches = model_of(config(**OPTIONS[options])), batches_of("llama", n=1)
    fl.accelerate(model)
    form = importlib.import_module("fused_lora.integrations.peft")._LinearForm
    right, usual = form.usual, []
    monkeypatch.setattr(form, "usual", lambda *call: usual.append(right(*call)) or usual[-1])
    want = outputs(model, batches)
    assert usual and {y is not None for y in usual} == {options != "dora"}
    monkeypatch.setattr(form, "usual", lambda *call: None)
    assert equal(outputs(model, batches), want)


def curve(model, lr: float, steps: int = 50) -> torch.Tensor:
    """The losses of a training, fp64: what a model's dtype is, its logits alone show."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        ids = torch.randint(1, 64, (4, 8), generator=generator).to(DEVICE)
        ids[:, 1:] = ids[:, :1]  # something to learn
        logits = model(input_ids=ids).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("options, lr", [("plain", 1e-2), slow("dora", 2e-3)])
def test_fifty_steps_of_training(options, lr):
    """The curve is no further from that in fp64 than twice what PEFT's is, and one that starts an
    ulp off. At 1e-2 the training of DoRA makes 1e-2 of rounding errors of 1e-7, PEFT's own too, and
    says nothing."""
    trained = ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"]
    given = config(target_modules=trained, **OPTIONS[options])
    models = [model_of(given) for _ in range(4)]
    report = fl.accelerate(models[0])
    for model in models[2:]:
        model.double()
    nudge_((p for p in models[3].parameters() if p.requires_grad), torch.float32)
    ours, theirs, true, near = (curve(model, lr) for model in models)
    assert not report.fallbacks and ours[-10:].mean() < ours[:10].mean()
    error, of_peft, of_ulps = ((one - true).abs().max() for one in (ours, theirs, near))
    assert error <= 2 * (of_peft + of_ulps) < 0.1


# What is not covered.


EMBED = {"target_modules": ["embed_tokens"]}


def without_norm(model):
    model.get_input_embeddings().base_layer.max_norm = 1e9
    return model


def sparse(model):
    model.get_input_embeddings().base_layer.sparse = True
    return model


UNCOVERED = {
    "DoRA of an embedding": (
        lambda: model_of(config(use_dora=True, **EMBED)),
        "adapter 'a0' is a DoraEmbeddingVariant",
    ),
    "another variant": (
        lambda: model_of(peft.LoraConfig(init_lora_weights="mica", target_modules=["q_proj"])),
        "adapter 'a0' is a MiCALinearVariant",
    ),
    "max_norm": (lambda: without_norm(model_of(config(**EMBED))), "its base layer has max_norm"),
    "sparse": (lambda: sparse(model_of(config(**EMBED))), "its base layer has sparse"),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_is_not_covered_runs_pefts_forward_and_is_counted(case, monkeypatch):
    build, reason = UNCOVERED[case]
    if case == "another variant" and not hasattr(peft.tuners.lora.variants, "MiCALinearVariant"):
        pytest.skip("PEFT is too old for it")
    model, batches = build(), batches_of("llama", n=1)
    sparsely = case == "sparse"  # Its gradients are sparse, and have no norm.

    def look():
        return [{"logits": model(**batches[0]).logits}] if sparsely else outputs(model, batches)

    want = look()
    report = fl.accelerate(model)
    assert not report.fused
    assert {(layer.reason, layer.route) for layer in report.layers} == {(reason, "PEFT")}
    assert equal(look(), want)
    assert {name: dict(n) for name, n in report.fallbacks.items()} == {
        layer.name: {reason: 1} for layer in report.layers
    }
    assert f"{len(report.layers)} run PEFT's forward: {reason}" in repr(report)
    monkeypatch.setenv("FUSED_LORA_STRICT", "1")
    with pytest.raises(RuntimeError, match=re.escape(f"a layer is not fused: {reason}")):
        model(**batches[0])


def test_a_layer_alone_mixes_with_dropout_as_pefts_does():
    """PEFT refuses it of a model, not of a layer."""
    model = model_of(config(lora_dropout=0.3), config()).train()
    report = fl.accelerate(model)
    layer = next(m for m in model.modules() if isinstance(m, LINEAR))
    layer(torch.randn(2, 3, 32, device=DEVICE), adapter_names=["a0", "a1"])
    ((reason, count),) = next(iter(report.fallbacks.values())).items()
    assert (reason, count) == ("a mixed batch in training, with dropout", 1)


def dora_beside_another() -> tuple[torch.nn.Module, dict]:
    model = model_of(config(), config(use_dora=True))
    model.base_model.set_adapter(["a0", "a1"])
    return model, {}


def mixed(**options) -> Callable[[], tuple[torch.nn.Module, dict]]:
    return lambda: (
        model_of(config(**options), config()),
        {"adapter_names": ["a0", "a1", "__base__"]},
    )


CALLS = {
    "DoRA beside another": (
        dora_beside_another,
        "several adapters, DoRA among them: it scales what came before it",
    ),
    "mixed, with bias": (mixed(lora_bias=True), "a mixed batch, with lora_bias"),
    "mixed, of an embedding": (mixed(**EMBED), "a mixed batch of an embedding"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_cannot_be_fused_say_why(case, monkeypatch):
    build, reason = CALLS[case]
    model, options = build()
    model.eval()  # PEFT mixes batches for inference
    batches = batches_of("llama", n=1)
    want = outputs(model, batches, **options)
    report = fl.accelerate(model)
    assert len(report.fused) == len(report.layers)
    got = outputs(model, batches, **options)
    for name, value in want[0].items():
        torch.testing.assert_close(got[0][name], value, rtol=1e-4, atol=1e-5)
    assert {why for count in report.fallbacks.values() for why in count} == {reason}
    assert f"1 calls: {reason}" in repr(report)
    monkeypatch.setenv("FUSED_LORA_STRICT", "1")
    with pytest.raises(RuntimeError, match=re.escape(f"a layer is not fused: {reason}")):
        model(**batches[0], **options)


@pytest.mark.parametrize(
    "options, part",
    [
        ({}, lambda layer: layer.base_layer),
        ({}, lambda layer: layer.lora_A["a0"]),
        ({}, lambda layer: layer.lora_B["a0"]),
        ({}, lambda layer: layer.lora_dropout["a0"]),
        ({"use_dora": True}, lambda layer: layer.lora_magnitude_vector["a0"]),
        ({"target_modules": ["embed_tokens"]}, lambda layer: layer.base_layer),
    ],
    ids=["base", "lora_A", "lora_B", "dropout", "dora", "embedding"],
)
def test_hooks_on_inner_layers_are_called(options, part):
    model, seen = model_of(config(**{"target_modules": ["q_proj"], **options})), []
    report = fl.accelerate(model)
    layer = next(m for m in model.modules() if isinstance(m, (LINEAR, EMBEDDING)))
    part(layer).register_forward_hook(lambda *args: seen.append(1))
    model(input_ids=tokens())
    assert seen == [1]
    (count,) = report.fallbacks.values()
    assert "it has hooks on its inner layers" in next(iter(count))


def test_a_models_layers_outputs_may_be_changed_in_place():
    """As they may where PEFT computes them."""
    model = model_of(config(r=2), config(use_dora=True), config(target_modules=["embed_tokens"]))
    with torch.no_grad():
        model.base_model.model.model.layers[0].input_layernorm.weight.normal_()
    batches, hooks = batches_of("llama", n=2), []
    for module in model.modules():
        if isinstance(module, (LINEAR, EMBEDDING)):
            hooks.append(module.register_forward_hook(lambda layer, args, y: y.mul_(1.5)))
    for active in (["a0"], ["a1"], ["a2"]):
        fl.restore(model)
        model.base_model.set_adapter(active)
        assert not assert_same(model, batches).fallbacks


def test_forward_mode_ad_is_pefts():
    from torch.autograd import forward_ad

    model = model_of(config(target_modules=["q_proj"]))
    layer = next(m for m in model.modules() if isinstance(m, LINEAR))
    x, tangent = torch.randn(2, 3, 32, device=DEVICE), torch.randn(2, 3, 32, device=DEVICE)

    def derivative():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent

    want = derivative()
    report = fl.accelerate(model)
    assert torch.equal(derivative(), want) and report.fallbacks


def test_pefts_cache_of_doras_weights_is_used():
    helpers = importlib.import_module("peft.helpers")
    if not hasattr(helpers, "DoraCaching"):
        pytest.skip("PEFT is too old for it")
    model = model_of(config(use_dora=True, target_modules=["q_proj"])).eval()
    want = outputs(model, batches := batches_of("llama", n=1))
    report = fl.accelerate(model)
    with helpers.DoraCaching():
        for _ in range(2):
            assert equal(outputs(model, batches), want)
    assert {why for count in report.fallbacks.values() for why in count} == {
        "PEFT's cache of DoRA's weights (DoraCaching), which its forward reads"
    }


def test_foreign_layers_are_reported_and_strictly_refused(monkeypatch):
    model = model_of(config(target_modules=["q_proj", "projection"]), family="vit")
    with monkeypatch.context() as strict:
        strict.setenv("FUSED_LORA_STRICT", "1")
        with pytest.raises(RuntimeError, match="projection: Conv2d of PEFT has no fused form"):
            fl.accelerate(model)
        assert not any(type(m) in accelerated_classes().values() for m in model.modules())
    report = fl.accelerate(model)
    left = {layer.name.rpartition(".")[2]: layer.reason for layer in report.layers if layer.reason}
    assert left == {"projection": "Conv2d of PEFT has no fused form"}
    assert len(report.fused) == 2


def test_a_model_without_peft_layers():
    for call in (fl.accelerate, fl.restore):
        with pytest.raises(ValueError, match="no LoRA layer of PEFT"):
            call(tiny_llama())
