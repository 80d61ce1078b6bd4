"""Adapted models under what transformers and accelerate do to models: Trainer, gradient
checkpointing, generation with a cache, tied weights, device_map."""

import gc
import resource
import warnings

import pytest
import torch
from conftest import DEVICE
from tiny_llama import tiny_llama

import fused_lora as fl
from fused_lora.nn import LoRAAdapter, LoRALinear

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

IDS = torch.tensor([[5, 9, 3, 7, 2, 8, 4, 6], [1, 2, 3, 4, 5, 6, 7, 8]], device=DEVICE)


def injected(model=None, **options) -> torch.nn.Module:
    """A Llama with adapters that are not zero, unless options say so."""
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return fl.inject(tiny_llama() if model is None else model, fl.LoRAConfig(**options))


def accelerated(model=None, **options) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    model = tiny_llama() if model is None else model
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    report = fl.accelerate(model)
    assert len(report.fused) == len(report.layers)
    return model


KINDS = {"inject": injected, "accelerate": accelerated}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def adapters(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def others(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def assert_equal(ours, want) -> None:
    assert ours.keys() == want.keys()
    wrong = [name for name in want if not torch.equal(ours[name], want[name])]
    assert not wrong


# Trainer


def trainer_of(model, folder, steps: int, **options) -> "transformers.Trainer":
    """One that learns eight sequences by heart."""
    sequences = torch.randint(1, 64, (8, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": ids, "labels": ids} for ids in sequences]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=DEVICE == "cpu",
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=data)


@every_kind
def test_trainer_trains_the_adapters_alone(make, tmp_path):
    model = make(lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    kind, frozen, before = type(model), others(model), adapters(model)
    trainer = trainer_of(model, tmp_path, 30, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    assert type(trainer.model) is kind
    assert_equal(others(model), frozen)
    assert all(not torch.equal(t, before[name]) for name, t in adapters(model).items())


@every_kind
def test_trainer_goes_on_from_a_checkpoint(make, tmp_path):
    """Two models: one is trained in one go, the other starts anew from the first one's checkpoint;
    their masks of dropout are the same."""
    once = trainer_of(make(lora_dropout=0.1), tmp_path, 6, save_steps=3)
    once.train()
    again = trainer_of(make(lora_dropout=0.1), tmp_path, 6, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 6
    assert_equal(adapters(again.model), adapters(once.model))


def test_what_trainer_has_trained_is_saved_and_read(tmp_path):
    model = injected(init_lora_weights=True)
    trainer_of(model, tmp_path / "run", 3, save_strategy="no").train()
    fl.save_adapter(model, tmp_path / "adapter")
    fresh = fl.load_adapter(tiny_llama(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(IDS).logits, model.eval()(IDS).logits)


# Gradient checkpointing


def checkpointing(model, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


def gradients(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    model.train().zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_kind
@pytest.mark.parametrize("first", [False, True], ids=["adapters first", "checkpointing first"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(make, first, reentrant):
    """The same gradients as without, of the same masks."""
    want = gradients(make(lora_dropout=0.2))
    assert len(want) == 2 * 2 * 7 and all(g.any() for n, g in want.items() if "_b" in n.lower())
    if first and make is injected:
        model = tiny_llama()
        checkpointing(model, reentrant)
        model = injected(model, lora_dropout=0.2)
    else:
        model = make(lora_dropout=0.2)
        checkpointing(model, reentrant)
    assert model.is_gradient_checkpointing
    assert_equal(gradients(model), want)


def test_a_reentrant_checkpoint_of_frozen_inputs_is_seen_to():
    """Where nothing that goes into a reentrant checkpoint requires a gradient, nothing in it gets
    one: torch warns, and the head's adapter hides it. inject asks for gradients of the inputs."""
    model = tiny_llama()
    checkpointing(model, reentrant=True)
    model.disable_input_require_grads()
    options = {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.2}
    got = gradients(injected(model, **options))
    assert_equal(got, gradients(injected(**options)))
    model.disable_input_require_grads()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert all("lm_head" in name for name in gradients(model))


# Generation


@pytest.mark.parametrize("gate", [False, True])
def test_generation_with_a_cache_is_that_of_the_merged_model(gate):
    model = injected(gate=gate).eval()
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    ours = model.generate(IDS, use_cache=True, **options)
    assert ours.shape == (2, 20)
    assert torch.equal(model.generate(IDS, use_cache=False, **options), ours)
    base = tiny_llama().eval().generate(IDS, **options)
    fl.merge(model)
    assert torch.equal(model.generate(IDS, use_cache=True, **options), ours)
    assert not torch.equal(base, ours)


# Tied weights


def test_a_tied_embedding_is_never_changed(tmp_path):
    """The head has an adapter; its weight is the embedding's. Training leaves it, merging is
    refused until they are untied, and then changes the head alone."""
    model = injected(tiny_llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    model.tie_weights()
    assert type(model.lm_head) is LoRALinear and model.lm_head.weight is embedding
    before = embedding.detach().clone()
    trainer_of(model, tmp_path / "run", 2, save_strategy="no").train()
    assert torch.equal(embedding, before)
    with torch.no_grad():
        want = model.eval()(IDS).logits
    with pytest.raises(ValueError, match=r"embed_tokens\.weight and lm_head\.weight are one tied"):
        fl.merge(model)
    assert torch.equal(embedding, before) and not model.lm_head.merged

    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    fl.merge(model)
    assert torch.equal(embedding, before) and not torch.equal(model.lm_head.weight, before)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "merged")
        plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").to(DEVICE)
        assert torch.equal(plain.eval()(IDS).logits, model(IDS).logits)


def test_weights_that_share_memory_are_tied_too():
    model = tiny_llama()
    model.lm_head.weight.data = model.get_input_embeddings().weight.data
    injected(model, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="are one tied weight"):
        fl.merge(model)


# device_map


def dispatched(model, folder, device="disk", **options):
    """Layer 1 elsewhere, as device_map puts it; all else here."""
    here = str(torch.empty(0, device=DEVICE).device)
    places = {name: here for name, _ in model.named_parameters()}
    places = {n: p for n, p in places.items() if "layers.1." not in n}
    places |= {"model.layers.1": device}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that lie on the disk
        return accelerate.dispatch_model(
            model, places, main_device=here, offload_dir=str(folder), **options
        )


def outputs(model) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of all trained parameters."""
    torch.manual_seed(2)
    model.zero_grad()
    logits = model(IDS).logits
    logits.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {n.replace("_orig", ""): g for n, g in grads.items()} | {"logits": logits.detach()}


@pytest.mark.parametrize("gate", [False, True])
def test_adapters_of_a_model_that_is_offloaded(tmp_path, gate):
    """Its weights come for each call; the adapters are here, and trained."""
    options = {"lora_dropout": 0.3, "gate": gate}
    want = outputs(injected(**options))
    model = dispatched(tiny_llama(), tmp_path)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    ours = injected(model, **options)
    away = [m for n, m in ours.named_modules() if isinstance(m, LoRAAdapter)]
    assert len(away) == 7 and all(m.lora_a.device.type == DEVICE for m in away)
    own = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    for name, p in injected(**options).named_parameters():
        if p.requires_grad:
            own[name].data.copy_(p)
    torch.testing.assert_close(outputs(ours), want, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError, match="alone knows how its weight is written"):
        fl.merge(ours)
    fl.save_adapter(ours, tmp_path / "adapter")
    plain = fl.load_adapter(tiny_llama(), tmp_path / "adapter")
    with torch.no_grad():
        want, got = plain.eval()(IDS).logits, ours.eval()(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    fl.load_adapter(dispatched(tiny_llama(), tmp_path / "again"), tmp_path / "adapter")


def test_adapters_of_a_model_whose_layers_have_a_place(tmp_path):
    """The hook that moves inputs goes over to the adapted layer, which is merged as ever."""
    want = outputs(injected())
    model = dispatched(tiny_llama(), tmp_path, DEVICE, force_hooks=True)
    hooked = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and hasattr(m, "_hf_hook")
    ]
    ours = injected(model)
    found = {n: m for n, m in ours.named_modules() if isinstance(m, LoRALinear)}
    assert len(found) == 14 and set(hooked) - {"lm_head"} == {
        n for n, m in found.items() if hasattr(m, "_hf_hook")
    }
    assert_equal(outputs(ours), want)
    fl.merge(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, want["logits"], rtol=1e-4, atol=1e-4)


def test_a_model_that_is_offloaded_after_it_has_adapters(tmp_path):
    """It serves; what would be lost is refused."""
    model = injected().eval()
    fl.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        want = model(IDS).logits
        dispatched(model, tmp_path / "weights")
        assert torch.equal(model(IDS).logits, want)
    words = r"model\.layers\.1\.\w+\.\w+_proj'? is on the meta device"
    layer = model.model.layers[1].self_attn.q_proj
    for call in (
        lambda: fl.merge(model),
        lambda: fl.load_adapter(model, tmp_path / "adapter"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
    for call in (layer.merge, lambda: layer.swap(torch.zeros(4, 32), torch.zeros(32, 4))):
        with pytest.raises(RuntimeError, match="this layer is on the meta device"):
            call()
    assert not any(m.merged for m in model.modules() if isinstance(m, LoRALinear))
    with pytest.raises(RuntimeError, match=r"lora_A of model\.layers\.1.* is on the meta device"):
        fl.save_adapter(model, tmp_path / "other")


def test_what_is_offloaded_can_not_be_trained_itself(tmp_path):
    """Its gradient would go with it: refused before anything is changed."""
    model = tiny_llama(attention_bias=True)
    dispatched(model, tmp_path)
    for options in ({"modules_to_save": ["mlp"]}, {"bias": "all"}, {"bias": "lora_only"}):
        with pytest.raises(
            TypeError, match=r"would train a part of 'model\.layers\.1\..*offloaded"
        ):
            injected(model, target_modules=["q_proj"], **options)
    injected(model, target_modules=["q_proj"], modules_to_save=["layers.0.mlp"])


def test_other_hooks_are_still_refused():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match="has hooks or its own forward"):
        injected(model)


# A thousand steps


def stepping(kind: str):
    """A step of training, and what it steps."""
    if kind == "many adapters":
        layer = fl.nn.MultiLoRALinear(32, 32, max_adapters=3, max_rank=4, device=DEVICE)
        for name in ("a", "b", "c"):
            layer.bank.add(name, torch.randn(4, 32), torch.zeros(32, 4), scale=1.0, trainable=True)
        trained = [p for n in "abc" for p in layer.bank.parameters(n)]

        def loss():
            rows = torch.randn(256, 32, device=DEVICE)
            ids = torch.randint(-1, 3, (256,), device=DEVICE)
            return layer(rows, fl.AdapterRouting(ids, 3)).square().mean()
    else:
        model = KINDS[kind](tiny_llama(num_hidden_layers=1), lora_dropout=0.1)
        trained = [p for p in model.parameters() if p.requires_grad]

        def loss():
            rows = torch.randint(1, 64, (8, int(torch.randint(3, 9, ()))), device=DEVICE)
            return model(rows, labels=rows).loss

    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def alive() -> tuple[int, int]:
    """(objects, bytes of tensors) that are alive."""
    gc.collect()
    found = gc.get_objects()
    storages = {}
    for t in found:
        if isinstance(t, torch.Tensor):
            storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
    return len(found), sum(storages.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [*KINDS, "many adapters"])
def test_a_thousand_steps_leave_nothing_behind(kind):
    """Each step saves 30 KB for its backward, and more: kept by whomever, that were 30 MB."""
    step = stepping(kind)
    for _ in range(100):
        step()
    objects, size = alive()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        step()
    after, grown = alive()
    assert grown == size
    assert after - objects < 500  # less than one in two steps
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 16 * 1024  # KiB
