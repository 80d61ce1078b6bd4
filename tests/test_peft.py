"""fl.accelerate: a PEFT model on these kernels is, but for rounding, the PEFT model."""

import copy
import pickle
import re

import pytest
import torch
from conftest import DEVICE
from tiny_llama import tiny_llama

import fused_lora as fl
from fused_lora.integrations.peft import accelerated_class

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
LINEAR = peft.tuners.lora.layer.Linear


def config(**options) -> peft.LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    return peft.LoraConfig(init_lora_weights=False, **options)


def model_of(*configs, dtype=torch.float32) -> torch.nn.Module:
    """A PEFT model with adapters a0, a1 and so on; a0 is active."""
    model = peft.get_peft_model(tiny_llama(dtype), configs[0], adapter_name="a0")
    for i, found in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", found)
    return model


def tokens(rows=3, length=7) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), device=DEVICE)


def outputs(model, ids, **options) -> list[torch.Tensor]:
    """Logits and the gradients of all trainable parameters, in fp64."""
    model.zero_grad()
    logits = model(input_ids=ids, **options).logits
    logits.float().square().mean().backward()
    named = sorted((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    return [logits.detach().double(), *(grad.double() for _, grad in named)]


def assert_same(model, ids, **options):
    """Against fp64, at most twice PEFT's own error and an ulp."""
    theirs = outputs(model, ids, **options)
    true = outputs(copy.deepcopy(model).double(), ids, **options)
    report = fl.accelerate(model)
    ours = outputs(model, ids, **options)
    eps = torch.finfo(model.dtype).eps
    assert len(ours) == len(theirs) == len(true)
    for got, same, exact in zip(ours, theirs, true, strict=True):
        bound = 2 * (same - exact).norm() + 4 * eps * exact.norm()
        assert (got - exact).norm() <= bound
    return report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 7},
        {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"down_proj": 2}},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    ids=str,
)
def test_forward_and_gradients(options, dtype):
    model = model_of(config(**options), dtype=dtype)
    report = assert_same(model, tokens())
    assert len(report.fused) == len(report.layers) > 0 and not report.fallbacks
    assert repr(report) == f"{len(report.layers)} of {len(report.layers)} LoRA layers run fused"


def test_the_fused_path_is_taken(monkeypatch):
    model, calls = model_of(config()), []
    fl.accelerate(model)
    right = fl.lora_linear
    monkeypatch.setattr(
        "fused_lora.integrations.peft.lora_linear",
        lambda *args, **options: calls.append(options) or right(*args, **options),
    )
    model(input_ids=tokens())
    assert len(calls) == 2 * 7


def test_several_active_adapters_are_summed():
    model = model_of(config(r=3), config(r=8, lora_alpha=2), config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["a0", "a1", "a2"])
    assert not assert_same(model, tokens()).fallbacks


def test_mixed_batches():
    """Layers that an adapter lacks, ranks and scales that differ, rows of the base."""
    model = model_of(
        config(r=3), config(r=9, use_rslora=True), config(target_modules=["q_proj", "down_proj"])
    ).eval()
    names = ["a1", "__base__", "a2", "a0", "a1"]
    report = assert_same(model, tokens(5), adapter_names=names)
    assert not report.fallbacks
    ids = tokens(5)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for i, name in enumerate(names):
            if name != "__base__":
                model.base_model.set_adapter(name)
                alone = model(input_ids=ids[i : i + 1]).logits
                torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-4)


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


def test_disabled_merged_and_switched_as_in_peft():
    model = model_of(config(), config(r=6)).eval()
    ids = tokens()

    def seen():
        found = []
        with torch.no_grad():
            with model.disable_adapter():
                found.append(model(input_ids=ids).logits)
            model.set_adapter("a1")
            found.append(model(input_ids=ids).logits)
            model.base_model.merge_adapter()
            found.append(model(input_ids=ids).logits)
            model.base_model.unmerge_adapter()
            model.set_adapter("a0")
            found.append(model(input_ids=ids).logits)
        return found

    want = seen()
    fl.accelerate(model)
    for got, same in zip(seen(), want, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-4)


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


def test_everything_else_of_peft_stays(tmp_path):
    model = model_of(config(), config(r=5))
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    model.save_pretrained(tmp_path / "before")
    fl.accelerate(model)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    model.save_pretrained(tmp_path / "after")
    for name in ("a0", "a1"):
        file = f"{name}/adapter_model.safetensors"
        before, after = tmp_path / "before" / file, tmp_path / "after" / file
        assert before.read_bytes() == after.read_bytes()
    linears = [m for m in model.modules() if isinstance(m, LINEAR)]
    assert linears and all(type(m) is accelerated_class() for m in linears)
    copied = pickle.loads(pickle.dumps(model))
    ids = tokens()
    assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
    model.add_adapter("later", config(r=2))
    model.set_adapter("later")
    assert_same(model, ids)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, LINEAR) for m in merged.modules())


def test_restore():
    model = model_of(config())
    want = outputs(model, ids := tokens())
    fl.accelerate(model)
    fl.restore(model)
    assert all(type(m) is LINEAR for m in model.modules() if isinstance(m, LINEAR))
    assert all(torch.equal(p, q) for p, q in zip(outputs(model, ids), want, strict=True))


UNCOVERED = {
    "DoRA": ({"use_dora": True}, "adapter 'a0' is a DoraLinearVariant"),
    "bias": ({"lora_bias": True}, r"adapter 'a0' has a bias \(lora_bias\)"),
}


@pytest.mark.parametrize("options, reason", UNCOVERED.values(), ids=UNCOVERED)
def test_what_is_not_covered_runs_pefts_forward_and_is_counted(options, reason, monkeypatch):
    model, ids = model_of(config(**options)), tokens()
    want = outputs(model, ids)
    report = fl.accelerate(model)
    assert not report.fused
    (told,) = {layer.reason for layer in report.layers}  # before any call
    assert re.fullmatch(reason, told)
    assert all(torch.equal(p, q) for p, q in zip(outputs(model, ids), want, strict=True))
    assert len(report.fallbacks) == len(report.layers)
    assert "14 run PEFT's forward: " in repr(report)
    monkeypatch.setenv("FUSED_LORA_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"a layer is not fused: {reason}"):
        model(input_ids=ids)


def test_calls_that_cannot_be_fused_say_why():
    model = model_of(config(lora_dropout=0.3), config(lora_dropout=0.3)).train()
    model.base_model.set_adapter(["a0", "a1"])
    report = fl.accelerate(model)
    model(input_ids=tokens())
    (reason,) = {why for count in report.fallbacks.values() for why in count}
    assert reason == "several adapters with dropout, each with a mask of its own"
    assert f"1 calls: {reason}" in repr(report)


def test_hooks_on_inner_layers_are_called():
    model, seen = model_of(config(target_modules=["q_proj"])), []
    report = fl.accelerate(model)
    layer = next(m for m in model.modules() if isinstance(m, LINEAR))
    layer.lora_A["a0"].register_forward_hook(lambda *args: seen.append(1))
    model(input_ids=tokens())
    assert seen == [1]
    (count,) = report.fallbacks.values()
    assert "it has hooks on its inner layers" in next(iter(count))


def test_embeddings_and_foreign_layers_are_reported():
    model = model_of(config(target_modules=["q_proj", "embed_tokens"]))
    report = fl.accelerate(model)
    left = {layer.name.rpartition(".")[2]: layer.reason for layer in report.layers if layer.reason}
    assert left == {"embed_tokens": "Embedding of PEFT has no fused form"}
    assert len(report.fused) == 2


def test_a_model_without_peft_layers():
    for call in (fl.accelerate, fl.restore):
        with pytest.raises(ValueError, match="no LoRA layer of PEFT"):
            call(tiny_llama())
