"""fl.accelerate on layers that other libraries or the user have changed: PEFT's results, or PEFT's
forward with the reason."""

import copy
import pickle
import re

import numpy
import pytest
import torch
from conftest import DEVICE
from peft_models import EMBEDDING, LINEAR, config, model_of, peft, tokens
from torch import nn

import fused_lora as fl
from fused_lora.integrations.peft import accelerated_classes

accelerate = pytest.importorskip("accelerate")


class Words(nn.Module):
    """An embedding and two projections of it."""

    def __init__(self):
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, ids):
        return self.down(self.up(self.words(ids)).tanh())


def words() -> Words:
    torch.manual_seed(0)
    return Words().to(DEVICE, torch.float64)


def ids_of(rows=3, length=5) -> torch.Tensor:
    return torch.randint(0, 20, (rows, length), device=DEVICE)


def drawn(model) -> nn.Module:
    """What adapters begin with is zero in part."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def of_peft(model, cfg) -> nn.Module:
    return drawn(peft.get_peft_model(model, cfg))


def lora(model, names, **options) -> nn.Module:
    options = peft.LoraConfig(r=3, target_modules=names, init_lora_weights=False, **options)
    return of_peft(model, options)


def results(model, *args, **options) -> list[torch.Tensor]:
    """The output and the gradient of every parameter that has one."""
    model.zero_grad()
    y = model(*args, **options)
    y = getattr(y, "logits", y)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_pefts(model, *args, **options):
    """Outputs and gradients are PEFT's; returns the report and how often each reason fell back."""
    want = results(model, *args, **options)
    report = fl.accelerate(model)
    got = results(model, *args, **options)
    assert len(got) == len(want) > 1
    for u, v in zip(got, want, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-6, atol=1e-6)
    return report


def reasons(report) -> set[str]:
    return {reason for count in report.fallbacks.values() for reason in count}


# Layers that another method has adapted.

NAMES = ["up", "down"]
INNER = {
    "loha": lambda: peft.LoHaConfig(target_modules=NAMES),
    "oft": lambda: peft.OFTConfig(target_modules=NAMES, oft_block_size=4),
    "ia3": lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(target_modules=NAMES),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=NAMES, total_step=10),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(
        target_modules=["words"], token_indices=[1, 2, 3]
    ),
}


@pytest.mark.filterwarnings("ignore:.*(second time|Already found):UserWarning")
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
@pytest.mark.parametrize("method", INNER)
def test_an_adapter_within_the_base_layer_is_computed(method, mixed, monkeypatch):
    model = of_peft(words(), INNER[method]()).base_model.model
    names = [*NAMES, "words"]
    model = lora(model, names)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    drawn(model)
    options = {"adapter_names": ["other", "default", "__base__"]} if mixed else {}
    if mixed and method == "adalora":
        pytest.skip("PEFT's layer has no mixed batches")
    ids = ids_of()
    report = assert_pefts(model.eval(), ids, **options)
    held = {layer.name.rpartition(".")[2]: layer.reason for layer in report.layers if layer.reason}
    about = f"its base layer is a peft.tuners.{method}.layer."
    inner = ["words"] if method == "trainable_tokens" else NAMES
    assert all(held[name].startswith(about) for name in inner)
    assert {held[name] for name in inner} <= reasons(report)
    monkeypatch.setenv("FUSED_LORA_STRICT", "1")
    layer = model.base_model.model.get_submodule(inner[0])
    x = ids if inner == ["words"] else torch.ones(3, 16, device=DEVICE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=re.escape(f"a layer is not fused: {about}")):
        layer(x)


def test_an_adapter_within_another_of_lora():
    model = lora(words(), ["up"])
    inner = model.base_model.model.up
    outer = LINEAR(inner, "default", peft.LoraConfig(init_lora_weights=False), r=2)
    model.base_model.model.up = drawn(outer)
    report = assert_pefts(model, ids_of())
    (reason,) = {layer.reason for layer in report.layers} - {None}
    assert reason.startswith("its base layer is a peft.tuners.lora.layer.Linear")
    assert reasons(report) == {reason}


@pytest.mark.filterwarnings("ignore:.*(second time|Already found):UserWarning")
def test_an_adapter_around_the_layer_is_computed():
    model = of_peft(lora(words(), NAMES).base_model.model, INNER["loha"]())
    report = assert_pefts(model, ids_of())
    assert len(report.fused) == len(report.layers) and not report.fallbacks


# Layers that have a forward of their own.


def dispatched(device_map, **options) -> nn.Module:
    model = lora(words(), [*NAMES, "words"])
    return accelerate.dispatch_model(model, device_map, force_hooks=True, **options)


def accelerated_of(model) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) in accelerated_classes().values()]


@pytest.fixture
def fused(monkeypatch):
    """The ops that the layers call."""
    made = []
    for name in ("lora_linear", "lora_embedding"):
        right = getattr(fl, name)

        def spy(*args, _name=name, _right=right, **options):
            made.append(_name)
            return _right(*args, **options)

        monkeypatch.setattr(f"fused_lora.integrations.peft.{name}", spy)
    return made


ALL = ["lora_embedding", "lora_linear", "lora_linear"]
DEVICE_MAP = {"": 0 if DEVICE == "cuda" else "cpu"}


def test_a_dispatched_model_is_fused_through_its_hooks(fused):
    model, ids = dispatched(DEVICE_MAP), ids_of()
    report = assert_pefts(model, ids)
    assert len(report.fused) == len(report.layers) == 3 and not report.fallbacks
    assert fused == ALL
    copied = copy.deepcopy(model)
    fused.clear()
    assert torch.equal(copied(ids), model(ids)) and fused == 2 * ALL
    fl.restore(model)
    fused.clear()
    want = model(ids)
    assert not fused and not accelerated_of(model)
    torch.testing.assert_close(copied(ids), want)


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("unhooked", ["before", "after", "accelerated"])
def test_hooks_may_come_and_go(hooked, unhooked, fused):
    """Around accelerate and restore in any order; `accelerated`: between them."""
    model, ids = lora(words(), [*NAMES, "words"]), ids_of()
    want = model(ids)

    def hook():
        accelerate.dispatch_model(model, DEVICE_MAP, force_hooks=True)

    def unhook():
        accelerate.hooks.remove_hook_from_submodules(model)

    def check(ops):
        fused.clear()
        torch.testing.assert_close(model(ids), want)
        assert fused == ops

    if hooked == "before":
        hook()
        check([])
        if unhooked == "before":
            unhook()
            check([])
        assert len(fl.accelerate(model).fused) == 3
    else:
        fl.accelerate(model)
        hook()
        check(ALL)
        if unhooked == "before":
            unhook()
    check(ALL)
    if unhooked == "accelerated":
        unhook()
        check(ALL)
    fl.restore(model)
    check([])
    if unhooked == "after":
        unhook()
        check([])
    report = fl.accelerate(model)
    assert len(report.fused) == 3 and not report.fallbacks
    check(ALL)


def test_an_offloaded_model_says_that_it_is_not_fused():
    model = lora(words(), NAMES)
    want = results(model, ids := ids_of())[0]
    accelerate.cpu_offload(model, torch.device(DEVICE_MAP[""]), offload_buffers=True)
    report = fl.accelerate(model)
    assert not report.fused
    with torch.no_grad():
        torch.testing.assert_close(model(ids), want)
    about = "it has hooks on its inner layers, which a fused call would pass by"
    assert reasons(report) == {layer.reason for layer in report.layers} == {about}


def test_the_layers_of_a_dispatched_model_are_grouped():
    model = model_of(config())
    ids = tokens()
    want = model(input_ids=ids).logits
    accelerate.dispatch_model(model, DEVICE_MAP, force_hooks=True)
    report = fl.accelerate(model, sample={"input_ids": ids})
    assert len(report.groups) == 4
    calls = []
    for layer in report._modules.values():
        group = vars(layer).get("fused_lora_group")
        if group and layer is not group.layers[0]:
            layer.lora_A.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert not report.fallbacks and not calls


def test_another_forward_of_the_layer_is_reported_and_called():
    model = lora(words(), NAMES)
    layer, seen = model.base_model.model.up, []
    right = layer.forward

    def forward(x, *args, **options):
        seen.append(1)
        return right(x, *args, **options)

    layer.forward = forward
    report = assert_pefts(model, ids_of())
    assert [one.name for one in report.layers if one.reason] == ["base_model.model.up"]
    assert report.layers[0].reason.startswith("it has a forward of its own")
    assert len(seen) == 2


def test_a_forward_that_was_taken_while_accelerated_is_pefts_after_restore(fused):
    model, ids = lora(words(), NAMES), ids_of()
    fl.accelerate(model)
    layer = model.base_model.model.up
    right = layer.forward
    layer.forward = lambda *args, **options: right(*args, **options)
    want = model(ids)
    assert fused == ALL[1:]
    fl.restore(model)
    torch.testing.assert_close(model(ids), want)
    assert fused == ALL[1:]


def test_hooks_on_all_modules_are_called():
    model, seen = lora(words(), NAMES), []
    fl.accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(type(m)))
    try:
        model(ids_of())
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6


# Scales.

SCALES = {
    "numpy": lambda: numpy.float32(0.75),
    "an int": lambda: 3,
    "a numpy int": lambda: numpy.int64(3),
    "0-d": lambda: torch.tensor(0.75, device=DEVICE),
    "one element": lambda: torch.tensor([0.75], device=DEVICE),
    "an integer tensor": lambda: torch.tensor([3], device=DEVICE),
    "a 0-d integer tensor": lambda: torch.tensor(3, device=DEVICE),
    "fp64": lambda: torch.tensor(0.75, device=DEVICE, dtype=torch.float64),
    "trained": lambda: torch.tensor([0.75], device=DEVICE, requires_grad=True),
}
FOREIGN_SCALES = {
    "for each sample": (
        lambda: torch.rand(3, 1, 1, device=DEVICE),
        "adapter 'default' is scaled by a torch.float32 tensor of shape [3, 1, 1]",
    ),
    "for each column": (
        lambda: torch.rand(1, 16, device=DEVICE),
        "adapter 'default' is scaled by a torch.float32 tensor of shape [1, 16]",
    ),
    "boolean": (
        lambda: torch.tensor(True, device=DEVICE),
        "adapter 'default' is scaled by a torch.bool tensor of shape []",
    ),
    "infinite": (lambda: float("inf"), "adapter 'default' is scaled by inf"),
}
KINDS = {"linear": ["down"], "embedding": ["words"], "dora": ["down"]}


def scaled_model(kind, scale):
    model = lora(words(), KINDS[kind], use_dora=kind == "dora")
    (layer,) = [m for m in model.modules() if isinstance(m, (LINEAR, EMBEDDING))]
    layer.scaling["default"] = scale
    return model


@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SCALES)
def test_scales_that_peft_takes(case, kind, mixed):
    scale = SCALES[case]()
    if mixed and kind != "linear":
        pytest.skip("it is not fused, or refused by PEFT")
    model, ids = scaled_model(kind, scale).eval(), ids_of()
    names = {"adapter_names": ["default", "__base__", "default"]} if mixed else {}
    trained = case == "trained"
    want = results(model, ids, **names), scale.grad.clone() if trained else 0
    if trained:
        scale.grad = None
    report = assert_pefts(model, ids, **names)
    assert len(report.fused) == len(report.layers)
    if trained:
        assert torch.allclose(scale.grad, 2 * want[1], rtol=1e-4)
    about = {"a mixed batch, with a scale that requires a gradient"} if mixed and trained else set()
    assert reasons(report) == about


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("case", FOREIGN_SCALES)
def test_other_scales_are_pefts(case, kind):
    scale, reason = FOREIGN_SCALES[case]
    model, ids = scaled_model(kind, scale()), ids_of()
    want = model(ids)
    report = fl.accelerate(model)
    assert torch.allclose(model(ids), want, equal_nan=True)
    assert {layer.reason for layer in report.layers} == reasons(report) == {reason}


@pytest.mark.parametrize("scale", [SCALES["numpy"], SCALES["one element"], lambda: numpy.inf])
def test_scales_of_grouped_layers(scale):
    model, ids = model_of(config()), tokens()
    for layer in model.modules():
        if isinstance(layer, LINEAR):
            layer.scaling["a0"] = scale()
    want = model(input_ids=ids).logits
    fl.accelerate(model, sample={"input_ids": ids})
    got = model(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


# What else of PEFT stays.


def test_the_representation_is_pefts():
    model = lora(words(), [*NAMES, "words"])
    want = repr(model), model.get_layer_status()
    fl.accelerate(model)
    assert (repr(model), model.get_layer_status()) == want


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_dora_begins_as_the_frozen_layer_to_the_bit(bias, dtype, dropout):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(1031, 48, bias=bias)).to(DEVICE, dtype)
    x = torch.randn(7, 1031, device=DEVICE, dtype=dtype)
    want = base(x)
    options = peft.LoraConfig(r=4, target_modules=["0"], use_dora=True, lora_dropout=dropout)
    model = peft.get_peft_model(base, options, autocast_adapter_dtype=False).train()
    assert torch.equal(model(x), want)
    report = fl.accelerate(model)
    assert torch.equal(model(x), want) and not report.fallbacks


def test_dora_of_a_row_of_zeros():
    """PEFT gives NaN."""
    base = words()
    with torch.no_grad():
        base.up.weight[3] = 0
    ids = ids_of()
    want = base(ids)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["up"], use_dora=True))
    fl.accelerate(model)
    y, *grads = results(model, ids)
    torch.testing.assert_close(y, want)
    assert all(grad.isfinite().all() for grad in grads)


# Traces.


class Mixed(nn.Module):
    """A mixed batch, without PEFT's hooks, which no trace takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        options = {"adapter_names": ["default", "other", "__base__"]}
        base = self.model.base_model.model
        return base.down(base.up(base.words(ids), **options).tanh(), **options)


def mixed_model():
    model = lora(words(), NAMES)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False))
    return drawn(model).eval()


def fake(model, ids):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(ids))


TRACES = {
    "export": lambda model, ids: torch.export.export(model, (ids,)),
    "strict export": lambda model, ids: torch.export.export(model, (ids,), strict=True),
    "compile": lambda model, ids: torch.compile(model, backend="aot_eager", fullgraph=True)(ids),
    "fake": fake,
}


@pytest.mark.parametrize("sample", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("trace", TRACES)
def test_nothing_that_was_traced_is_kept(trace, sample):
    torch._dynamo.reset()
    model, ids = mixed_model(), ids_of()
    want = Mixed(model)(ids), model(ids)
    fl.accelerate(model, sample={"ids": ids} if sample else None)
    caches = [getattr(fl.integrations.peft, name) for name in ("_routing", "_constant")]
    for cache in caches:
        cache.cache_clear()
    for one in (Mixed(model), model):
        TRACES[trace](one, ids)
    assert all(cache.cache_info().currsize == 0 for cache in caches)
    assert fl.integrations.shared_input._local.pending is None
    for got, plain in zip((Mixed(model)(ids), model(ids)), want, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-6)
    TRACES[trace](Mixed(model), ids)  # and what eager calls keep is not in the way of a trace


def test_an_exported_model_computes_what_the_model_does(tmp_path):
    model, ids = mixed_model(), ids_of()
    fl.accelerate(model)
    with torch.no_grad():
        for one in (Mixed(model), model):
            program = torch.export.export(one, (ids,))
            torch.testing.assert_close(program.module()(ids), one(ids))


def test_a_pickled_module_is_accelerated(tmp_path):
    model, ids = mixed_model(), ids_of()
    fl.accelerate(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert len(accelerated_of(other)) == 2
        assert torch.equal(other(ids), model(ids))
