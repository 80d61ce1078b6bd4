"""Whatever is done to a PEFT model, one that is accelerated does the same."""

import copy
import pickle
import tempfile

import pytest
import torch
from cases import fuzz
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fused_lora as fl

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")


class Block(nn.Module):
    """Projections that share x, an embedding and a head that shares its weight."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 24, bias=False), nn.Linear(16, 24)
        self.mix, self.head = nn.Linear(24, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.head(self.mix(k.tanh() * v) + q)


KINDS = {
    "plain": {"target_modules": ["q", "k", "v", "mix"]},
    "few": {"target_modules": ["k", "words"], "r": 5, "use_rslora": True},
    "ranks": {"target_modules": ["q", "k", "v"], "rank_pattern": {"k": 1}},
    "bias": {"target_modules": ["q", "v"], "lora_bias": True},
    "dora": {"target_modules": ["q", "mix"], "use_dora": True},
    "saved": {"target_modules": ["v"], "modules_to_save": ["mix"]},
    "words": {"target_modules": ["q"], "trainable_token_indices": {"words": [1, 3]}},
    "transposed": {"target_modules": ["q"], "r": 2},
    "parameters": {"target_modules": ["q"], "target_parameters": ["v.weight"]},
}


def config_of(kind) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **KINDS[kind]})


def draw(model, seed) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
            if "magnitude" in name:
                parameter.abs_().add_(0.1)


def layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def names_of(model) -> list[str]:
    return sorted(model.peft_config)


# An action changes a model, given a number to choose by; it may return another.


def add(model, n):
    kind = sorted(KINDS)[n % len(KINDS)]
    name = f"{kind}{n}"
    if name not in model.peft_config:
        model.add_adapter(name, config_of(kind))
        model.set_adapter(name)
        draw(model, n)


def delete(model, n):
    if len(names := names_of(model)) > 1:
        model.delete_adapter(names[n % len(names)])
        model.set_adapter(names_of(model)[0])


def activate(model, n):
    names = names_of(model)
    model.set_adapter(names[n % len(names)])


def activate_several(model, n):
    names = names_of(model)
    model.base_model.set_adapter([names[n % len(names)], names[-1]][: 1 + len(names) // 2])


def merge(model, n):
    model.merge_adapter()


def unmerge(model, n):
    model.unmerge_adapter()


def disable(model, n):
    model.base_model.disable_adapter_layers()


def enable(model, n):
    model.base_model.enable_adapter_layers()


def scale(model, n):
    values = 0.5, torch.tensor(0.7, device=DEVICE), torch.tensor([2], device=DEVICE), -1
    for layer in layers(model)[:: 1 + n % 2]:
        for name in layer.scaling:
            layer.scaling[name] = values[n % 4]


def rescale(model, n):
    for layer in layers(model):
        layer.scale_layer(1.5) if n % 2 else layer.unscale_layer()


def weigh(model, n):
    """A sum of the first two adapters."""
    names = names_of(model)[:2]
    model.add_weighted_adapter(names, [0.5, -1.0][: len(names)], f"sum{n}", "cat")


def change_data(model, n):
    for layer in layers(model):
        for parameter in layer.parameters():
            parameter.data.mul_(1 + 0.1 * (n % 3))


def step(model, n):
    """Of training, with an optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if trained:
        optimizer = torch.optim.SGD(trained, lr=0.01)
        model(ids_of(n)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def hook(model, n):
    layer = layers(model)[n % len(layers(model))]
    base = layer.base_layer
    [layer, base, getattr(base, "base_layer", base)][n % 3].register_forward_hook(
        lambda module, args, y: y * 1.1
    )


def place(model, n):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for layer in layers(model):
        for module in layer.modules():
            if n % 2 or module is layer:
                add_hook_to_module(module, AlignDevicesHook(DEVICE))


def displace(model, n):
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)


def copied(model, n):
    return copy.deepcopy(model)


def pickled(model, n):
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model, n):
    """The active adapter from its own folder under another name."""
    with tempfile.TemporaryDirectory() as folder:
        active = model.active_adapter
        model.save_pretrained(folder, selected_adapters=[active])
        where = folder if active == "default" else f"{folder}/{active}"
        model.load_adapter(
            where, f"again{n}", is_trainable=True, low_cpu_mem_usage=bool(n % 2),
            torch_device=DEVICE,
        )  # fmt: skip
    model.set_adapter(f"again{n}")


ACTIONS = (
    add, add, delete, activate, activate_several, merge, unmerge, disable, enable, scale, rescale,
    weigh, change_data, step, hook, place, displace, copied, pickled, saved_and_loaded,
)  # fmt: skip
OURS = ("nothing", "accelerate", "accelerate with a sample", "restore")
actions = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 20), st.sampled_from(OURS))


def ids_of(n) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 20, (3, 5), generator=generator).to(DEVICE)


def attempt(call, *args):
    """(what it gives, the kind of its error)."""
    try:
        return call(*args), None
    except Exception as error:
        return None, type(error)


def results(model, n):
    """Outputs and gradients, those of a mixed batch and those of inference mode."""
    model.zero_grad()
    ids = ids_of(n)
    y = model(ids)
    found = {"y": y.detach()}
    if y.requires_grad:
        y.square().mean().backward()
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.inference_mode():
        found["inference"] = model(ids)
    return found


def mixed(model, n):
    names = [*names_of(model), "__base__"]
    rows = [names[i % len(names)] for i in (n, 0, 1)]
    model = copy.deepcopy(model).eval()  # PEFT's hooks stay where such a call fails
    with torch.no_grad():
        return {"mixed": model(ids_of(n), adapter_names=rows)}


def assert_close(got, want) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        other = got[name]
        assert torch.allclose(other, value, rtol=1e-5, atol=1e-5, equal_nan=True), name


def assert_same(ours, theirs, n) -> None:
    for look in (results, mixed):
        (want, error), (got, other) = attempt(look, theirs, n), attempt(look, ours, n)
        assert error == other, look.__name__
        if error is None:
            assert_close(got, want)


@pytest.mark.filterwarnings("ignore")
@given(first=st.sampled_from(sorted(KINDS)), steps=st.lists(actions, min_size=4, max_size=8))
@fuzz(100)
def test_an_accelerated_model_follows(first, steps):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(Block().to(DEVICE, torch.float64), config_of(first))
    draw(theirs, 1)
    ours = copy.deepcopy(theirs)
    fl.accelerate(ours, sample={"ids": ids_of(0)})
    for action, n, own in steps:
        torch.manual_seed(n)
        made, error = attempt(action, theirs, n)
        torch.manual_seed(n)
        mine, other = attempt(action, ours, n)
        assert error == other, action.__name__
        if error is not None:
            continue
        theirs, ours = made or theirs, mine or ours
        if own == "restore":
            fl.restore(ours)
        elif own != "nothing":
            sample = {"ids": ids_of(n)} if own.endswith("sample") else None
            report = fl.accelerate(ours, sample=sample)
            assert len(report.layers) == len(layers(ours))
        assert_same(ours, theirs, n)
        assert_close(ours.state_dict(), theirs.state_dict())
    assert repr(ours) == repr(theirs)
