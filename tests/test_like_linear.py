"""What an nn.Linear or an nn.Embedding can do, done to every module: it works, or one sentence says
why not.
"""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch.nn.utils import (
    parameters_to_vector,
    parametrizations,
    parametrize,
    prune,
    vector_to_parameters,
)

import fused_lora as fl
from fused_lora.nn import AdaLoRALinear, LoRALinear, SoRALinear

K, N, R, V = 12, 9, 3, 20
ROWS = torch.arange(6)[:, None] * torch.linspace(-1, 1, K)
IDS = torch.arange(6).reshape(2, 3)


def with_bank() -> fl.nn.MultiLoRALinear:
    layer = fl.nn.MultiLoRALinear(K, N, max_adapters=2, max_rank=R)
    for name in ("a", "b"):
        layer.bank.add(name, torch.randn(R, K), torch.randn(N, R), scale=0.5)
    return layer


class Routed(torch.nn.Module):
    """A layer with many adapters, called as one without ids is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = with_bank()
        self.register_buffer("ids", torch.tensor([0, -1, 1, 0, 1, -1]))

    def forward(self, x):
        return self.layer(x, self.ids)


class Words(torch.nn.Module):
    """What takes the embeddings of words, as a model of transformers does."""

    class config:
        is_encoder_decoder = False

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = torch.nn.Embedding(V, K), torch.nn.Linear(K, N)

    def get_input_embeddings(self):
        return self.words

    def forward(self, inputs_embeds=None, attention_mask=None):
        return self.head(inputs_embeds)


# How each is made, and what goes into it.
MODULES = {
    "LoRALinear": (lambda: LoRALinear(K, N, r=R, init=False), ROWS),
    "SoRALinear": (lambda: SoRALinear(K, N, r=R, init=False), ROWS),
    "AdaLoRALinear": (lambda: AdaLoRALinear(K, N, r=R, init=False), ROWS),
    "LoRAAdapter": (
        lambda: fl.nn.LoRAAdapter(torch.nn.Linear(K, N), r=R, init=False, gate=True),
        ROWS,
    ),
    "MultiLoRALinear": (Routed, ROWS),
    "LoRAEmbedding": (lambda: fl.nn.LoRAEmbedding(V, K, r=R, init=False), IDS),
    "DePTEmbedding": (
        lambda: fl.nn.DePTEmbedding(V, K, prompt_length=2, max_length=5, r=R, init=False),
        IDS,
    ),
    "DePT": (lambda: fl.nn.DePT(Words(), 2, 5, R, init=False), IDS),
}
FLOATING = [n for n, (_, x) in MODULES.items() if x.is_floating_point()]


@pytest.fixture(params=MODULES)
def made(request):
    """(a module, its input)."""
    make, x = MODULES[request.param]
    return make().to(DEVICE), x.to(DEVICE)


def values(module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def trained(module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def gradients(module, x) -> list[torch.Tensor]:
    """y, and the gradients of what is trained."""
    y = module(x)
    wanted = trained(module)
    grads = torch.autograd.grad(y.square().sum(), wanted) if wanted else ()
    return [y.detach(), *grads]


def assert_alike(ours, want, x) -> None:
    for mine, theirs in zip(gradients(ours, x), gradients(want, x), strict=True):
        assert torch.equal(mine, theirs)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = copy.deepcopy(module)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    other.load_state_dict(state)
    return other


def state_assigned(module):
    other = copy.deepcopy(module)
    other.load_state_dict(values(module), assign=True)
    return other


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
    "weights_only": state_saved_and_loaded,
    "assign": state_assigned,
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_duplicate_is_the_same_and_its_own(made, duplicate):
    module, x = made
    other = duplicate(module)
    assert_alike(other, module, x)
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in module.parameters()
    ]
    before = values(module)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_it_compiles_whole(made):
    module, x = made
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_alike(compiled, module, x)


def test_it_exports(made):
    module, x = made
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), module(x))


def test_inputs_may_change_in_place_under_inference_mode(made):
    module, x = made
    x, other = x.clone(), x.flip(0)
    want = module(x).detach(), module(other).detach()
    with torch.inference_mode():
        assert torch.equal(module(x), want[0])
        x.copy_(other)
        assert torch.equal(module(x), want[1])
    assert_alike(module, copy.deepcopy(module), x)  # and it trains after that


def test_parameters_may_change_in_place_under_inference_mode(made):
    module, x = made
    module(x)
    other = copy.deepcopy(module)
    with torch.inference_mode():
        for one in (module, other):
            for p in one.parameters():
                p.mul_(0.5)
        y = module(x)
    assert torch.equal(y, other(x).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_it_goes_to_another_dtype(made, dtype, swap):
    module, x = made
    given = x.to(dtype) if x.is_floating_point() else x
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        module.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert module(given).dtype == dtype
    for name, p in module.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith("gate") else dtype)
    assert all(t.isfinite().all() for t in gradients(module, given))


def test_it_is_moved_while_it_has_gradients(made):
    module, x = made
    wanted = trained(module)
    if wanted:
        module(x).square().sum().backward()
        grads = [p.grad.clone() for p in wanted]
        module.double()
        for p, grad in zip(trained(module), grads, strict=True):
            assert p.grad.dtype == p.dtype and torch.equal(p.grad.float(), grad)


def test_its_memory_is_shared(made):
    module, x = made
    other = copy.deepcopy(module)
    module.share_memory()
    assert all(p.is_shared() for p in module.parameters())
    assert_alike(module, other, x)


def test_every_parameter_can_be_trained_and_frozen(made):
    module, x = made
    module.requires_grad_(True)
    parameters = [*module.parameters()]
    grads = torch.autograd.grad(module(x).square().sum(), parameters)
    assert all(g.shape == p.shape and g.any() for g, p in zip(grads, parameters, strict=True))
    module.requires_grad_(False)
    assert not module(x).requires_grad


def test_parameters_as_one_vector(made):
    module, x = made
    want = gradients(module, x)
    vector = parameters_to_vector(module.parameters()).detach()
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    vector_to_parameters(vector, module.parameters())
    assert all(torch.equal(t, u) for t, u in zip(gradients(module, x), want, strict=True))


def test_hooks_see_what_goes_in_and_comes_out(made):
    module, x = made
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    module.register_forward_hook(lambda m, args, y: y * 2)
    module.register_full_backward_hook(lambda m, grads_in, grads_out: seen.append(grads_out[0]))
    want = copy.deepcopy(module)(x)
    given = x.clone().requires_grad_(x.is_floating_point())
    y = module(given)
    assert torch.equal(y, want)
    if y.requires_grad:
        y.sum().backward()
        assert seen[0] is x or torch.equal(seen[0], x)
        assert torch.equal(seen[-1], torch.ones_like(y))


def test_a_functional_call_takes_other_parameters(made):
    module, x = made
    others = {n: p * 0.5 for n, p in module.named_parameters()}
    found = torch.func.functional_call(module, others, (x,))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.5)
    assert torch.equal(found, module(x))


def test_autocast_gives_what_the_base_gives(made):
    module, x = made
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = module(x)
        like = torch.nn.Linear(K, N, device=DEVICE)(ROWS.to(DEVICE))
    embedding = not x.is_floating_point() and not isinstance(module, fl.nn.DePT)
    assert y.dtype == (torch.float32 if embedding else like.dtype)


def test_a_training_step_of_every_optimizer(made):
    module, x = made
    if not trained(module):
        assert isinstance(module, Routed)  # the bank's Parameters are its own
        return
    before = values(module)
    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
        opt = optimizer(module.parameters(), lr=0.1)
        module(x).square().sum().backward()
        opt.step()
    names = {n for n, p in module.named_parameters() if p.requires_grad}
    moved = {n for n, t in module.named_parameters() if not torch.equal(t, before[n])}
    assert moved == names


# What is more of a linear layer


three = pytest.mark.parametrize("cls", [LoRALinear, SoRALinear, AdaLoRALinear])


def layer_of(cls, **options):
    return cls(K, N, r=R, init=False, device=DEVICE, **options)


@three
def test_its_weight_is_that_of_the_base(cls):
    layer, x = layer_of(cls), ROWS.to(DEVICE)
    assert torch.equal(F.linear(x, layer.weight, layer.bias), torch.nn.Linear.forward(layer, x))


def pruned(layer, name):
    prune.l1_unstructured(layer, name, amount=0.5)


def parametrized(layer, name):
    parametrize.register_parametrization(layer, name, torch.nn.Tanh())


def normed(layer, name):
    parametrizations.weight_norm(layer, name)


MADE_ANEW = {"prune": pruned, "parametrize": parametrized, "weight_norm": normed}


@three
@pytest.mark.parametrize("change", MADE_ANEW.values(), ids=MADE_ANEW)
@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
def test_what_is_made_anew_at_each_call_is_computed_with_but_not_written(cls, change, name):
    """Merging or swapping would write into a tensor that nobody reads again."""
    layer, x = layer_of(cls), ROWS.to(DEVICE)
    change(layer, name)
    weight, a, b = layer.weight, layer.lora_a, layer.lora_b
    h = x @ a.T if layer.gate is None else (x @ a.T) * layer.gate
    want = x @ weight.T + layer.bias + layer.scale * h @ b.T
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    words = f"this layer: {name} is made anew from other tensors at each call"
    for refused in (layer.merge, lambda: layer.swap(torch.ones(R, K), torch.ones(N, R))):
        with pytest.raises(RuntimeError, match=words):
            refused()
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "gate"])
def test_an_adapter_around_a_layer_likewise(name):
    make, x = MODULES["LoRAAdapter"]
    layer, x = make().to(DEVICE), x.to(DEVICE)
    parametrized(layer, name)
    want = layer(x)
    with pytest.raises(RuntimeError, match=f"this layer: {name} is made anew from other tensors"):
        layer.swap(torch.ones(R, K), torch.ones(N, R))
    assert torch.equal(layer(x), want)


@three
def test_a_weight_that_is_tied_stays_tied(cls):
    words = torch.nn.Embedding(N, K, device=DEVICE)
    linear = torch.nn.Linear(K, N, bias=False, device=DEVICE)
    linear.weight = words.weight
    both = torch.nn.ModuleList([words, cls.from_linear(linear, r=R)])
    again = pickle.loads(pickle.dumps(copy.deepcopy(both)))
    for words, layer in (both, again, both.to(torch.bfloat16)):
        assert layer.weight is words.weight


@three
@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_merged_layer_is_saved_merged(cls, duplicate):
    layer, x = layer_of(cls), ROWS.to(DEVICE)
    want = layer(x)
    layer.merge("cpu")
    if duplicate in (state_saved_and_loaded, state_assigned):
        with pytest.raises(RuntimeError, match=r"merged; call unmerge\(\) before loading"):
            duplicate(layer)
        return
    other = duplicate(layer)
    assert other.merged and torch.equal(other(x), layer(x))
    other.unmerge()
    assert torch.equal(other(x), want) and layer.merged


@three
def test_skip_init_leaves_out_the_weight_alone(cls):
    layer = torch.nn.utils.skip_init(cls, K, N, r=R, device=DEVICE)
    trained = [layer.lora_a, layer.lora_b, *([] if layer.gate is None else [layer.gate])]
    assert all(p.isfinite().all() for p in trained) and layer.lora_a.any()
    layer.load_state_dict(torch.nn.Linear(K, N).state_dict(), strict=False)
    x = ROWS.to(DEVICE)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_lora_alpha_is_one_number_everywhere():
    """So that a layer, a config and a folder without it mean the same."""
    found = {}
    for name in fl.nn.__all__:
        cls = getattr(fl.nn, name)
        for make in (cls, *(getattr(cls, n) for n in dir(cls) if n.startswith("from_"))):
            parameters = inspect.signature(make).parameters
            if "lora_alpha" in parameters:
                found[name, make.__name__] = parameters["lora_alpha"].default
    assert len(found) >= 10 and set(found.values()) == {8}, found
    assert fl.LoRAConfig(target_modules=["0"]).lora_alpha == 8
    assert LoRALinear(K, N).scale == SoRALinear(K, N).scale == AdaLoRALinear(K, N).scale == 1


@three
def test_a_trace_is_the_layer(cls):
    layer, x = layer_of(cls).eval(), ROWS.to(DEVICE)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert torch.equal(traced(x.flip(0)), layer(x.flip(0)))


@three
def test_symbolic_tracing_is_refused(cls):
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got Proxy"):
        torch.fx.symbolic_trace(layer_of(cls))
