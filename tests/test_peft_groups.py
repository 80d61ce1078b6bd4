"""Layers that share x, under fl.accelerate: found in a call, computed together, right in any
case."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from conftest import DEVICE
from peft_models import (
    LINEAR,
    assert_close,
    batches_of,
    config,
    model_of,
    outputs,
    saved_storages,
    tokens,
    truth,
)
from tiny_models import FAMILIES
from torch.utils.checkpoint import checkpoint

import fused_lora as fl
from fused_lora.integrations import peft as integration
from fused_lora.integrations import shared_input
from fused_lora.testing import assert_near

LLAMA = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
SHARING = {
    "llama": 2 * LLAMA,
    "bert": 2 * [("query", "key", "value")],
    # Encoder, decoder, and the keys and values that the decoder makes of the encoder's output.
    "t5": [("q", "k", "v"), ("wi_0", "wi_1"), ("q", "k", "v"), ("k", "v"), ("wi_0", "wi_1")],
    "vit": 2 * [("q_proj", "k_proj", "v_proj")],
}


@pytest.fixture
def calls(monkeypatch):
    """The number of projections in each call of lora_linear_group, and 1 for each of
    lora_linear."""
    made = []

    def grouped(x, weights, *args, **options):
        made.append(len(weights))
        return fl.lora_linear_group(x, weights, *args, **options)

    def alone(*args, **options):
        made.append(1)
        return fl.lora_linear(*args, **options)

    monkeypatch.setattr(integration, "lora_linear_group", grouped)
    monkeypatch.setattr(integration, "lora_linear", alone)
    return made


@pytest.fixture(autouse=True)
def nothing_waits(request):
    shared_input._local.pending = None
    failed = request.session.testsfailed
    yield
    # Or the test says otherwise, and drops it. One that failed has said what there is to say.
    assert shared_input._local.pending is None or request.session.testsfailed > failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_shares_x_is_found_and_computed_together(family, dtype, calls):
    model = model_of(config(lora_bias=family == "bert"), family=family, dtype=dtype)
    batches = batches_of(family, dtype)
    theirs = outputs(model, batches)
    truths = truth(model, batches)
    saved = saved_storages(model, batches[0])
    report = fl.accelerate(model, sample=batches[0])
    short = [tuple(name.rpartition(".")[2] for name in group) for group in report.groups]
    assert short == SHARING[family]
    calls.clear()
    ours = outputs(model, batches)
    assert_close(ours, theirs, truths, dtype)
    assert sorted(n for n in calls if n > 1) == sorted(4 * list(map(len, SHARING[family])))
    assert sum(calls) == 4 * len(report.layers) and not report.fallbacks
    assert f"{short.count(short[0])} groups of 3 that share x" in repr(report) or family == "t5"
    assert saved_storages(model, batches[0]) <= saved


def layers_of(model):
    """q, k and v of the first layer."""
    attention = model.base_model.model.model.layers[0].self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def grouped(*configs, **options):
    model = model_of(*(configs or [config()]), **options)
    fl.accelerate(model, sample={"input_ids": tokens(1)})
    return model


def alone_of(model):
    """A copy of the model that has no groups."""
    other = copy.deepcopy(model)
    fl.accelerate(other)
    return other


def x_of(**options):
    return torch.randn(2, 3, 32, device=DEVICE, **options)


def test_another_tensor_is_computed_alone(calls):
    model = grouped()
    q, k, v = layers_of(model)
    x, other = x_of(), x_of()
    calls.clear()
    with torch.no_grad():
        got = q(x), k(other), v(other)
        assert calls == [3, 1, 1]
        want = [
            layer(t) for layer, t in zip(layers_of(alone_of(model)), (x, other, other), strict=True)
        ]
    for u, w in zip(got, want, strict=True):
        torch.testing.assert_close(u, w)


CHANGES = {
    "x, in place": lambda x: x.mul_(2),
    "gradients": lambda x: torch.set_grad_enabled(True),
    "autocast": lambda x: torch.set_autocast_enabled(DEVICE, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_between_is_seen(change):
    model = grouped()
    q, k, v = layers_of(model)
    others = layers_of(alone_of(model))
    x = x_of()
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=False):
        q(x)
        CHANGES[change](x)
        got, want = k(x), others[1](x)
        assert got.dtype == want.dtype and got.requires_grad == want.requires_grad
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(v(x), others[2](x))


def test_order_does_not_matter(calls):
    model = grouped()
    q, k, v = layers_of(model)
    x = x_of()
    calls.clear()
    v(x), k(x), q(x), v(x), k(x), k(x)
    assert calls == [1, 1, 3, 1]


def test_outputs_may_be_changed_in_place():
    model = grouped()
    other = alone_of(model)
    found = []
    for one in (model, other):
        x = x_of().fill_(0.3).requires_grad_()
        ys = [layer(x) for layer in layers_of(one)]
        ys[1].mul_(2)
        sum(y.square().sum() for y in ys).backward()
        found.append([*ys, x.grad])
    for name, u, w in zip(("q", "k", "v", "dx"), *found, strict=True):
        assert_near(name, u, w)


def test_nothing_outlives_the_next_call_of_a_group():
    model = grouped()
    q, k, v = layers_of(model)
    x = x_of()
    seen = weakref.ref(x)
    q(x), k(x)  # and then an error, say
    del x
    gc.collect()
    assert seen() is not None
    y = x_of()
    q(y), k(y), v(y)
    assert seen() is None and shared_input._local.pending is None


def test_threads_do_not_take_each_others():
    model = grouped()
    q, k, v = layers_of(model)
    x, found = x_of(), []
    with torch.no_grad():
        q(x)
        thread = threading.Thread(target=lambda: found.append(shared_input._local.pending))
        thread.start()
        thread.join()
        assert found == [None] and shared_input._local.pending is not None
        k(x), v(x)


ALONE = {
    "dropout": (lambda: grouped(config(lora_dropout=0.5)).train(), 3),
    "DoRA": (lambda: grouped(config(use_dora=True)), 0),
    "disabled": (lambda: switched(lambda m: m.base_model.disable_adapter_layers()), 0),
    "merged": (lambda: switched(lambda m: m.base_model.merge_adapter()), 0),
    "a hook before k": (
        lambda: switched(lambda m: layers_of(m)[1].register_forward_pre_hook(lambda *a: None)),
        3,
    ),
    "a hook within k": (
        lambda: switched(
            lambda m: layers_of(m)[1].lora_A["a0"].register_forward_hook(lambda *a: None)
        ),
        2,
    ),
}


def switched(change):
    model = grouped()
    change(model)
    return model


@pytest.mark.parametrize("case", ALONE)
def test_where_they_cannot_be_computed_together(case, calls):
    build, count = ALONE[case]
    model = build()
    calls.clear()
    x = x_of()
    for layer in layers_of(model):
        layer(x)
    assert calls == [1] * count


def test_hooks_behind_the_layers_see_their_outputs(calls):
    model, seen = grouped(), []
    q, k, v = layers_of(model)
    k.register_forward_hook(lambda layer, args, y: seen.append(y) or y + 1)
    x = x_of()
    calls.clear()
    q(x), v(x)
    y = k(x)
    assert calls == [3] and torch.equal(seen[0] + 1, y)


def test_layers_without_an_adapter_are_in_the_group(calls):
    model = grouped(config(), config(target_modules=["q_proj", "v_proj"]))
    model.set_adapter("a1")
    other = alone_of(model)
    x = x_of()
    calls.clear()
    got = [layer(x) for layer in layers_of(model)]
    assert calls == [3]
    for y, layer in zip(got, layers_of(other), strict=True):
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    model = model_of(config())
    fl.accelerate(model, sample={"input_ids": tokens(1)})
    other = alone_of(model)
    found = []
    for one in (model, other):
        x = x_of().fill_(0.1).requires_grad_()

        def attend(x, one=one):
            q, k, v = (layer(x) for layer in layers_of(one))
            return torch.cat((q * 2, k.sin(), v.cos()), -1).tanh()

        checkpoint(attend, x, use_reentrant=reentrant).sum().backward()
        grads = [p.grad for p in one.parameters() if p.grad is not None]
        found.append([x.grad, *grads])
    assert calls[-6:] == [1] * 6 and calls[:-6][-2:] == [3, 3]
    for u, w in zip(*found, strict=True):
        torch.testing.assert_close(u, w)


def test_a_model_with_gradient_checkpointing():
    model = model_of(config()).train()
    batches = batches_of("llama", n=1)
    want = outputs(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    report = fl.accelerate(model, sample=batches[0])
    assert len(report.groups) == 4
    (found,) = outputs(model, batches)
    for name, value in want[0].items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    shared_input._local.pending = None  # a recomputation ends as soon as it has what it needs


def test_copies_and_pickles_have_groups_of_their_own(calls):
    model = grouped()
    x = x_of()
    with torch.no_grad():
        want = [layer(x) for layer in layers_of(model)]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            calls.clear()
            mine = {id(m) for m in other.modules()}
            shared = layers_of(other)[0].fused_lora_group
            assert shared is layers_of(other)[2].fused_lora_group
            assert {id(layer) for layer in shared.layers} <= mine
            assert all(
                torch.equal(y, layer(x)) for y, layer in zip(want, layers_of(other), strict=True)
            )
            assert calls == [3]


def test_restored_and_accelerated_again():
    model = grouped()
    fl.accelerate(model)
    assert not any("fused_lora_group" in vars(m) for m in model.modules())
    model = grouped()
    fl.restore(model)
    assert not any("fused_lora_group" in vars(m) for m in model.modules())
    assert all(type(m) is LINEAR for m in model.modules() if isinstance(m, LINEAR))


def test_a_layer_that_does_not_share_in_every_call_is_in_no_group():
    class Twice(torch.nn.Module):
        """q and k get x, and then q gets another."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, again):
            y = self.q(x) + self.k(x)
            return self.q(y) + self.v(y) if again else y + self.v(x)

    import peft

    for again, count in ((False, 1), (True, 0)):
        base = Twice()
        options = peft.LoraConfig(target_modules=["q", "k", "v"], init_lora_weights=False)
        model = peft.get_peft_model(base.to(DEVICE), options)
        report = fl.accelerate(model, sample={"x": torch.ones(2, 4, device=DEVICE), "again": again})
        assert len(report.groups) == count


def test_compiled_there_are_no_groups(calls):
    torch._dynamo.reset()
    model = grouped()
    q, k, v = layers_of(model)
    compiled = torch.compile(lambda x: (q(x), k(x), v(x)), backend="eager", fullgraph=True)
    x = x_of()
    calls.clear()
    with torch.no_grad():
        got = compiled(x)
    assert calls == [1, 1, 1]
    for y, layer in zip(got, layers_of(alone_of(model)), strict=True):
        torch.testing.assert_close(y, layer(x))


def set_data(parameter):
    parameter.data = parameter.data * 2


def set_weight(linear):
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)


def in_place(t):
    with torch.no_grad():
        t.add_(0.5)


def trained_scale(layer):
    layer.scaling["a0"].mul_(2)


# What happens between q(x) and k(x) to k, or to what it is computed from.
SINCE = {
    "scaling": lambda k: k.scaling.update(a0=2.5),
    "a tensor's scaling": trained_scale,
    "A, in place": lambda k: in_place(k.lora_A["a0"].weight),
    "B, in place": lambda k: in_place(k.lora_B["a0"].weight),
    "A's data": lambda k: set_data(k.lora_A["a0"].weight),
    "A": lambda k: set_weight(k.lora_A["a0"]),
    "the base weight, in place": lambda k: in_place(k.base_layer.weight),
    "the base weight": lambda k: set_weight(k.base_layer),
    "the base bias": lambda k: in_place(k.base_layer.bias),
    "the bias of B": lambda k: in_place(k.lora_B["a0"].bias),
    "the active adapter": lambda k: k.set_adapter("a1"),
    "no active adapter": lambda k: k.set_adapter([]),
    "two active adapters": lambda k: k.set_adapter(["a0", "a1"]),
    "disabled": lambda k: k.enable_adapters(False),
    "merged": lambda k: k.merge(),
    "another method's": lambda k: setattr(
        k, "base_layer", torch.nn.Sequential(k.base_layer, torch.nn.Tanh())
    ),
    "a hook": lambda k: k.lora_B["a0"].register_forward_hook(lambda layer, args, y: 2 * y),
    "trained": lambda k: k.base_layer.weight.requires_grad_(),
}


@pytest.mark.parametrize("change", SINCE)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_changes_of_a_layer_in_between_is_seen(change, family):
    bias = family == "bert"
    if "bias" in change and not bias:
        pytest.skip("it has none")
    model = model_of(config(lora_bias=bias), config(r=3), family=family)
    (batch,) = batches_of(family, n=1)
    fl.accelerate(model, sample=batch)
    q, k, v = next(
        m for m in model.modules() if hasattr(m, "fused_lora_group")
    ).fused_lora_group.layers
    if change == "a tensor's scaling":
        k.scaling["a0"] = torch.tensor(k.scaling["a0"], device=DEVICE)
    x = x_of()
    _, before, _ = q(x), k(x), v(x)
    q(x)
    SINCE[change](k)
    got = k(x), v(x)
    fl.restore(model)
    want = k(x), v(x)
    for u, w in zip(got, want, strict=True):
        torch.testing.assert_close(u, w, rtol=1e-4, atol=1e-5)
        assert u.requires_grad == w.requires_grad
    same = torch.allclose(before, want[0], rtol=1e-3, atol=1e-3)
    assert same == (change in ("trained", "merged"))
    shared_input._local.pending = None  # a layer that is merged or disabled takes nothing


def test_x_that_changes_in_inference_mode_is_seen(calls):
    """Its tensors have no counter of changes: there are no groups."""
    model = grouped()
    q, k, _ = layers_of(model)
    calls.clear()
    with torch.inference_mode():
        x = x_of()
        q(x)
        x.mul_(2)
        got = k(x)
        assert torch.equal(got, k(x.clone())) and set(calls) == {1}
    calls.clear()
    x = x_of()
    with torch.inference_mode():  # that of a tensor that was made outside of it moves
        q(x)
        x.mul_(2)
        assert torch.equal(k(x), k(x.clone())) and calls[0] == 3


def test_weights_of_inference_mode_are_computed_alone(calls):
    model = grouped()
    q, k, _ = layers_of(model)
    with torch.inference_mode():
        k.lora_A["a0"].weight = torch.nn.Parameter(k.lora_A["a0"].weight.clone())
    x = x_of()
    with torch.no_grad():
        q(x)
        assert torch.equal(
            k(x), alone_of(model).base_model.model.model.layers[0].self_attn.k_proj(x)
        )


def test_x_that_begins_to_require_gradients_in_between():
    model = grouped()
    q, k, _ = layers_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = x_of()
    q(x)
    assert k(x.requires_grad_()).requires_grad


def test_another_backend_in_between(calls):
    model = grouped()
    q, k, _ = layers_of(model)
    x = x_of()
    calls.clear()
    q(x)
    with fl.use_backend("triton"):
        k(x)
    assert calls == [3, 1]
