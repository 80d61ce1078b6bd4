"""save_adapter and load_adapter: there and back, with PEFT on either side, and cut short."""

import copy
import json
import multiprocessing
import os
import signal
import warnings

import pytest
import safetensors
import torch
from conftest import DEVICE
from safetensors import safe_open
from torch.nn import LayerNorm, Linear, Module, ModuleList

import fused_lora as fl
from fused_lora import files
from fused_lora.checkpoint import reading
from fused_lora.checkpoint.adalora import read_adalora
from fused_lora.checkpoint.convert import convert_peft
from fused_lora.checkpoint.reading import read_folder
from fused_lora.nn import LoRALinear, SoRALinear

D = 8
WEIGHTS, CONFIG = files.WEIGHTS, files.CONFIG


class Block(Module):
    def __init__(self):
        super().__init__()
        self.q, self.up, self.down = Linear(D, D), Linear(D, 2 * D), Linear(2 * D, D, bias=False)
        self.norm = LayerNorm(D)

    def forward(self, x):
        return self.norm(x + self.down(self.up(self.q(x)).relu()))


class Model(Module):
    """Names that end in other names, and characters that a regular expression would take amiss."""

    def __init__(self, blocks=2):
        super().__init__()
        self.layers = ModuleList(Block() for _ in range(blocks))
        self.q = Linear(D, D)
        self.a = Module()
        self.a.q = Linear(D, D)
        self.add_module("q-1+", Linear(D, D))
        self.head = Linear(D, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(getattr(self, "q-1+")(self.q(x) + self.a.q(x)))


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Model(**options).to(DEVICE, dtype)


X = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def injected(dtype=torch.float32, targets="all-linear", model=None, **options):
    """A model whose adapters do something."""
    config = fl.LoRAConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": targets, "init_lora_weights": False} | options
    )
    return fl.inject(model or build(dtype), config)


def adapters(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def pruned(ranks: dict[str, int], cls=LoRALinear, **options) -> Module:
    """A model as pruning leaves it: a layer of its own rank each, those of rank 0 plain."""
    model = build().requires_grad_(False)
    for name, r in ranks.items():
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        layer = cls.from_linear(getattr(parent, child), r=r, init=False, **options)
        setattr(parent, child, layer)
    return model


def exact(model, x=X):
    """In fp64, where two models of the same weights agree to the last digits."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        found = model(x.double()) if x.is_floating_point() else model(input_ids=x).logits
    return found


def assert_equal(ours, theirs, x=X):
    torch.testing.assert_close(exact(ours, x), exact(theirs, x), rtol=1e-9, atol=1e-11)


def peft_model(base, folder):
    """PEFT's, with not one warning: it warns of keys that it does not find."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # what transformers says of its own
        return peft.PeftModel.from_pretrained(base, folder)


def written(folder) -> dict:
    return json.loads((folder / CONFIG).read_text())


def stored(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict


# There and back


RANKS = {"layers.0.q": 1, "layers.0.up": 4, "layers.1.up": 4, "layers.1.down": 7, "q": 4, "q-1+": 2}
MODELS = {
    "plain": lambda: injected(),
    "bf16": lambda: injected(torch.bfloat16),
    "fp32 masters": lambda: fl.inject(
        build(torch.bfloat16),
        fl.LoRAConfig(r=2, target_modules=["q"], init_lora_weights=False),
        adapter_dtype=torch.float32,
    ),
    "rslora": lambda: injected(use_rslora=True),
    "patterns": lambda: injected(rank_pattern={"q": 2}, alpha_pattern={"0.up": 0.3, "q": 7}),
    "pruned": lambda: pruned(RANKS, lora_alpha=3.3),
    "pruned, rslora": lambda: pruned(RANKS, use_rslora=True),
    "biases": lambda: injected(bias="all", targets=["q"]),
    "biases of layers": lambda: injected(bias="lora_only", targets=["q", "down"]),
    "whole modules": lambda: injected(modules_to_save=["head", "norm"]),
    "whole modules and biases": lambda: injected(modules_to_save=["head"], bias="all"),
}


def trained(model):
    """What is trained besides adapters, moved away from where it was."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora" not in name:
                p.add_(torch.randn_like(p))
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return trained(MODELS[request.param]())


def test_into_a_plain_model(model, tmp_path):
    fl.save_adapter(model, tmp_path / "a")
    dtype = model.head.weight.dtype
    other = build(dtype)
    assert fl.load_adapter(other, tmp_path / "a") is other
    mine, theirs = adapters(model), adapters(other)
    assert list(mine) == list(theirs)
    for name, layer in mine.items():
        assert torch.equal(layer.lora_a, theirs[name].lora_a)
        assert torch.equal(layer.lora_b, theirs[name].lora_b)
        assert (layer.r, layer.lora_alpha) == (
            theirs[name].r,
            pytest.approx(theirs[name].lora_alpha),
        )
        assert layer.scale == theirs[name].scale and layer.use_rslora == theirs[name].use_rslora
    assert_equal(model, other)
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert names[0] == names[1]


def test_into_an_injected_model_and_its_own_parameters(model, tmp_path):
    fl.save_adapter(model, tmp_path / "a")
    other = fl.load_adapter(build(model.head.weight.dtype), tmp_path / "a")
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.zero_()
    before = dict(other.named_parameters())
    fl.load_adapter(other, tmp_path / "a")
    assert all(p is before[n] for n, p in other.named_parameters())
    assert_equal(model, other)


def test_into_peft(model, tmp_path):
    fl.save_adapter(model, tmp_path / "a")
    theirs = peft_model(build(model.head.weight.dtype), tmp_path / "a")
    assert_equal(model, theirs)
    layers = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert layers == list(adapters(model))


def test_more_layers_than_peft_lists_one_by_one(tmp_path):
    """From 20 targets on PEFT shortens the list to endings."""
    ranks = {
        f"layers.{i}.{n}": 1 + (i + j) % 5 for i in range(8) for j, n in enumerate(("q", "up"))
    }
    names = {**ranks, "q": 3, **{f"layers.{i}.down": 2 for i in range(1, 6)}}
    torch.manual_seed(0)
    base = Model(blocks=8)
    model = copy.deepcopy(base)
    for name, r in names.items():
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, LoRALinear.from_linear(getattr(parent, child), r=r, init=False))
    fl.save_adapter(model, tmp_path)
    theirs = peft_model(copy.deepcopy(base), tmp_path)
    assert_equal(model, theirs)
    assert_equal(model, fl.load_adapter(copy.deepcopy(base), tmp_path))


def test_the_config_names_each_layer_and_no_other(tmp_path):
    fl.save_adapter(pruned(RANKS, lora_alpha=8), tmp_path)
    config = written(tmp_path)
    assert config["target_modules"] == list(RANKS) and config["r"] == 4
    assert config["exclude_modules"] == r"layers\.1\.q|a\.q"
    assert config["rank_pattern"] == {
        r"^layers\.0\.q": 1, r"^layers\.1\.down": 7, r"^q\-1\+": 2,
    }  # fmt: skip
    assert config["alpha_pattern"] == {} and config["lora_alpha"] == 8
    assert config["peft_type"] == "LORA" and config["modules_to_save"] is None


def test_rslora_of_some_layers_only_becomes_a_scale(tmp_path):
    model = pruned({"q": 4})
    model.head = LoRALinear.from_linear(model.head, r=4, lora_alpha=16, use_rslora=True, init=False)
    fl.save_adapter(model, tmp_path)
    config = written(tmp_path)
    assert not config["use_rslora"] and config["alpha_pattern"] == {"^head": 32}
    assert_equal(model, fl.load_adapter(build(), tmp_path))
    assert_equal(model, peft_model(build(), tmp_path))


def test_a_scale_that_was_set_counts(tmp_path):
    model = pruned({"q": 3})
    model.q.scale = 0.7
    fl.save_adapter(model, tmp_path)
    assert_equal(model, fl.load_adapter(build(), tmp_path))


def test_a_llama(tmp_path):
    pytest.importorskip("transformers")
    from tiny_llama import tiny_llama

    ids = torch.randint(1, 64, (2, 7), device=DEVICE)
    model = injected(model=tiny_llama(), lora_dropout=0.25, targets="all-linear")
    fl.save_adapter(model, tmp_path)
    assert written(tmp_path)["lora_dropout"] == 0.25
    assert_equal(model, peft_model(tiny_llama(), tmp_path), ids)
    other = fl.load_adapter(tiny_llama(), tmp_path)
    assert_equal(model, other, ids)
    assert other.model.layers[0].mlp.up_proj.lora_dropout == 0.25


# From PEFT


PEFT = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"up": 5}},
    "patterns": {
        "rank_pattern": {"layers.1.q": 2, r"^q$": 6, "up": 1},
        "alpha_pattern": {"layers.0.up": 3, r"^layers\.1\.up": 0.5, "up": 7},
    },
    "a regular expression of ranks": {"rank_pattern": {r"layers\.\d\.(q|up)": 2}},
    "biases": {"bias": "all"},
    "biases of layers": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["head", "score"]},
    "biases and whole modules": {"bias": "all", "modules_to_save": ["head"]},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_peft(tmp_path, options, dtype):
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q", "up"], **options}
    theirs = peft.get_peft_model(build(dtype), peft.LoraConfig(**options))
    for name, p in theirs.named_parameters():
        if p.requires_grad or "lora_" in name:
            p.data.add_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = fl.load_adapter(build(dtype), tmp_path)
    assert_equal(ours, theirs)
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.zero_()
    assert_equal(fl.load_adapter(ours, tmp_path), theirs)


def test_nothing_is_rounded_into_a_plain_model(tmp_path):
    """An adapter in fp32 or bf16 keeps its digits over a base in fp16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = injected(dtype, targets=["up"])
        fl.save_adapter(model, tmp_path)
        other = fl.load_adapter(build(torch.float16), tmp_path)
        assert torch.equal(other.layers[0].up.lora_a, model.layers[0].up.lora_a.float())
        assert other.layers[0].up.weight.dtype == torch.float16


# Gates


def gated(**options):
    model = pruned(RANKS, SoRALinear, **options)
    with torch.no_grad():
        model.q.gate[1] = 0
    return model


def test_gates_there_and_back(tmp_path):
    model = gated()
    fl.save_adapter(model, tmp_path)
    assert written(tmp_path)["peft_type"] == "SORA"
    key = "base_model.model.layers.1.down.lora_gate"
    assert torch.equal(stored(tmp_path)[key], model.layers[1].down.gate)
    other = fl.load_adapter(build(), tmp_path)
    assert all(type(layer) is SoRALinear for layer in adapters(other).values())
    assert all(torch.equal(m.gate, adapters(other)[n].gate) for n, m in adapters(model).items())
    assert_equal(model, other)


def test_peft_refuses_gates_aloud(tmp_path):
    peft = pytest.importorskip("peft")
    fl.save_adapter(gated(), tmp_path)
    with pytest.raises(KeyError, match="SORA"):
        peft.PeftModel.from_pretrained(build(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folded_gates_are_plain_lora_for_peft(tmp_path, dtype):
    model = gated().to(dtype)
    fl.save_adapter(model, tmp_path, fold_gate=True)
    assert written(tmp_path)["peft_type"] == "LORA"
    found = stored(tmp_path)
    assert not any("gate" in key for key in found)
    for name, layer in adapters(model).items():
        b = (layer.lora_b.double() * layer.gate.double()).float()  # fp64 tells the product exactly
        assert torch.equal(found[f"base_model.model.{name}.lora_B.weight"], b.to(dtype))
    theirs = peft_model(build(dtype), tmp_path)
    if dtype == torch.float32:
        torch.testing.assert_close(theirs(X), model(X))
    assert_equal(theirs, fl.load_adapter(build(dtype), tmp_path))
    assert model.q.gate is not None


def test_an_adapter_without_gates_has_gates_of_one_in_sora_layers(tmp_path):
    model = injected()
    fl.save_adapter(model, tmp_path)
    other = fl.load_adapter(injected(gate=True), tmp_path)
    assert torch.equal(other.q.gate, torch.ones_like(other.q.gate))
    assert_equal(model, other)


# What does not fit


def untouched(model, folder, error, words):
    """load_adapter raises, and neither a tensor nor a module of the model has changed."""
    before = {k: t.clone() for k, t in model.state_dict().items()}
    kinds = {name: type(m) for name, m in model.named_modules()}
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(error, match=words):
        fl.load_adapter(model, folder)
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains


@pytest.fixture
def saved(tmp_path):
    fl.save_adapter(injected(targets=["q", "head"]), tmp_path / "a")
    return tmp_path / "a"


def test_a_plain_model_that_does_not_fit(saved, tmp_path):
    model = build()
    del model.a
    untouched(model, saved, ValueError, r"the model has no module 'a\.q'; nearest: q")
    model = build()
    model.head = Linear(D, 6)
    words = r"lora_b of head has shape \[5, 3\]; the model's has \[6, 3\]"
    untouched(model, saved, ValueError, words)
    model = build()
    model.head = torch.nn.Bilinear(D, D, 5)
    untouched(model, saved, TypeError, "head is a .*Bilinear; only a plain torch.nn.Linear")
    model = build()
    model.a.q = model.q
    untouched(model, saved, ValueError, r"q has an adapter, and is a\.q too")
    untouched(Linear(D, 5), saved, ValueError, "the model has no module")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    (
        ({"r": 2}, ValueError, r"lora_a of a\.q has shape \[3, 8\]; the model's has \[2, 8\]"),
        ({"targets": ["q"]}, ValueError, r"the model has no adapted layer 'head'; nearest: "),
        ({"targets": ["q", "head", "up"]}, ValueError, r"no adapter for 'layers\.0\.up' and"),
        ({"bias": "lora_only"}, ValueError, r"do not fit the model: missing \['a\.q\.bias', "),
    ),
)  # fmt: skip
def test_an_injected_model_that_does_not_fit(saved, options, error, words):
    untouched(injected(**{"targets": ["q", "head"], **options}), saved, error, words)


def test_more_that_does_not_fit(saved, tmp_path):
    model = injected(targets=["q", "head"])
    fl.merge(model)
    untouched(model, saved, RuntimeError, "is merged; call fl.unmerge")
    fl.save_adapter(pruned({"q": 3}, SoRALinear), tmp_path / "gated")
    words = "has a gate for q, which is a LoRALinear; fold .*fused-lora convert"
    untouched(pruned({"q": 3}), tmp_path / "gated", ValueError, words)
    wide = pruned({"q": 3})
    with torch.no_grad():
        wide.q.lora_b.fill_(1e6)
    fl.save_adapter(wide, tmp_path / "wide")
    words = "lora_b of q has values that torch.float16 cannot hold"
    untouched(pruned({"q": 3}).half(), tmp_path / "wide", ValueError, words)
    fl.save_adapter(injected(targets=["q"], modules_to_save=["head"]), tmp_path / "whole")
    model = build()
    model.head = Linear(D, 6)
    words = r"head\.bias has shape \[5\]; the model's has \[6\]"
    untouched(model, tmp_path / "whole", ValueError, words)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        fl.load_adapter([], saved)


def test_a_subclass_of_unknown_kind(tmp_path):
    class Other(SoRALinear):
        pass

    model = build()
    model.q = Other.from_linear(model.q, r=2, init=False)
    with pytest.raises(TypeError, match="q is a Other, which has no format of a checkpoint; fold_"):
        fl.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    fl.save_adapter(model, tmp_path / "a", fold_gate=True)
    torch.testing.assert_close(model(X), fl.load_adapter(build(), tmp_path / "a")(X))
    with pytest.raises(TypeError, match="q is a Other, which takes no LoRA"):
        fl.load_adapter(model, tmp_path / "a")


def nan(model):
    model.q.lora_a.data[0, 0] = float("nan")
    return model


def mixed():
    model = pruned({"q": 3})
    model.head = SoRALinear.from_linear(model.head, r=2)
    return model


@pytest.mark.parametrize(
    ("model", "error", "words"),
    (
        (lambda: 3, TypeError, "model must be a torch.nn.Module, got int"),
        (build, ValueError, "model has no LoRALinear; there is no adapter to save"),
        (lambda: LoRALinear(4, 4), TypeError, "model is itself an adapted layer"),
        (lambda: nan(pruned({"q": 3})), ValueError, "lora_A of q has values that are NaN or inf"),
        (lambda: pruned({"q": 3}).double(), TypeError, "lora_A of q must be .* got float64"),
        (mixed, ValueError, "1 of 2 layers have a gate"),
        (lambda: pruned({"q": 4097}), ValueError, "q has rank 4097; at most 4096 can be saved"),
    ),
)  # fmt: skip
def test_what_is_not_saved(tmp_path, model, error, words):
    with pytest.raises(error, match=words):
        fl.save_adapter(model(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


# Names


def test_wrapped_models(tmp_path):
    model = injected()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    compiled.layers[0] = torch.compile(model.layers[0], backend="eager")
    fl.save_adapter(compiled, tmp_path)
    assert_equal(plain, fl.load_adapter(build(), tmp_path))
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_b.zero_()
    assert fl.load_adapter(compiled, tmp_path) is compiled
    torch.testing.assert_close(compiled(X), plain(X))


def test_what_peft_would_not_load_rightly_is_a_warning(tmp_path):
    model = build()
    model.again = model.q
    model = injected(model=model, targets=["q"])
    with pytest.warns(UserWarning, match="again is a layer that is at several places; PEFT adapts"):
        fl.save_adapter(model, tmp_path)
    model = build()
    model.lm_head = Linear(D, 5)
    model = injected(model=model, targets=["q"], modules_to_save=["head"])
    with pytest.warns(UserWarning, match="PEFT takes lm_head for one of modules_to_save, .'head'."):
        fl.save_adapter(model, tmp_path)
    model = pruned({"q": 2, "head": 2})
    model.q.lora_dropout = 0.1
    with pytest.warns(UserWarning, match=r"lora_dropout differs between layers \(0.1, 0\)"):
        fl.save_adapter(model, tmp_path)


# Cut short


STEPS = "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod"


class Cut(BaseException):
    """Not an error that anything could handle."""


def cut_at(step, monkeypatch, cut):
    """Call cut() instead of the step-th change of the file system."""
    left = [step]

    def counted(real):
        def call(*args, **options):
            if left[0] == 0:
                cut()
            left[0] -= 1
            return real(*args, **options)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def pair(folder):
    """The rank of the config and of the weights, as another reader finds them, or None."""
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        return None
    return written(folder)["r"], stored(folder)["base_model.model.q.lora_A.weight"].shape[0]


@pytest.fixture(scope="module")
def old_and_new():
    return pruned({"q": 2}), pruned({"q": 3})


def all_steps(tmp_path, old_and_new, attempt):
    """Cut a save at every step, by attempt(step, folder, model) -> whether it was cut."""
    old, new = old_and_new
    seen, step = set(), 0
    while True:
        folder = tmp_path / str(step)
        fl.save_adapter(old, folder)
        (folder / "notes.txt").write_text("kept")
        cut = attempt(step, folder, new)
        assert pair(folder) in (None, (2, 2), (3, 3))
        (weights,) = read_folder(folder).layers.values()
        rank = weights.lora_a.shape[0]
        assert torch.equal(weights.lora_a, (old if rank == 2 else new).q.lora_a)
        seen.add((pair(folder), rank))
        fl.save_adapter(pruned({"q": 5}), folder)  # the next save clears up
        assert pair(folder) == (5, 5)
        assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, "notes.txt"]
        if not cut:
            break
        step += 1
    # Before, on the way (PEFT finds no config, we find the new one), and after.
    assert {((2, 2), 2), (None, 3), ((3, 3), 3)} <= seen and step > 10


def test_an_error_at_any_step_leaves_the_old_or_the_new_adapter(tmp_path, old_and_new):
    def attempt(step, folder, new):
        def cut():
            raise Cut

        with pytest.MonkeyPatch.context() as monkeypatch:
            cut_at(step, monkeypatch, cut)
            try:
                fl.save_adapter(new, folder)
            except Cut:
                return True
        return False

    all_steps(tmp_path, old_and_new, attempt)


@pytest.mark.skipif(not hasattr(os, "fork") or DEVICE != "cpu", reason="forks this process")
def test_a_kill_at_any_step_leaves_the_old_or_the_new_adapter(tmp_path, old_and_new):
    def attempt(step, folder, new):
        child = os.fork()
        if child == 0:
            try:
                monkeypatch = pytest.MonkeyPatch()
                cut_at(step, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
                fl.save_adapter(new, folder)
            finally:
                os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    all_steps(tmp_path, old_and_new, attempt)


def test_an_error_while_the_files_are_written_leaves_nothing_behind(tmp_path, monkeypatch):
    fl.save_adapter(pruned({"q": 2}), tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        fl.save_adapter(pruned({"q": 3}), tmp_path)
    assert pair(tmp_path) == (2, 2) and sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


# Where a save may come in between, in each reader.
STEPS_OF_A_READ = (
    (files, "_config_file"), (files, "read_json"), (files, "_weights_file"), (reading, "Header"),
    (reading, "sorted_keys"), (reading, "read_tensors"),
)  # fmt: skip


@pytest.mark.parametrize(
    "place, name", STEPS_OF_A_READ, ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("adalora", [False, True], ids=["lora", "adalora"])
def test_a_save_while_the_folder_is_read(tmp_path, monkeypatch, place, name, adalora):
    """Whenever it comes: the old adapter or the new one, never the config of one with the weights
    of another. One that comes each time is an error."""
    first, second = (injected(lora_alpha=a, adalora=adalora, targets=["q"]) for a in (2, 6))
    with torch.no_grad():
        second.q.lora_a.zero_()
    fl.save_adapter(first, tmp_path)
    real, left, calls = getattr(place, name), [1], []

    def and_a_save(*args, **options):
        calls.append(name)
        if left[0] > 0:
            left[0] -= 1
            fl.save_adapter(second, tmp_path)
        found = real(*args, **options)
        if left[0] > 0:
            left[0] -= 1
            fl.save_adapter(second, tmp_path)
        return found

    monkeypatch.setattr(place, name, and_a_save)
    for saves in (1, 2):
        fl.save_adapter(first, tmp_path)
        left[0] = saves
        model = fl.load_adapter(build(), tmp_path)
        old = model.q.scale == first.q.scale
        assert old or model.q.scale == second.q.scale
        assert torch.equal(model.q.lora_a, (first if old else second).q.lora_a)
        assert left == [0]
    if name != "_config_file":
        left[0], calls[:] = 10**6, []
        with pytest.raises(RuntimeError, match="was saved while it was read; read it again"):
            fl.load_adapter(build(), tmp_path)
        assert len(calls) == files.ATTEMPTS


def test_weights_that_are_moved_into_place_while_they_are_read(tmp_path, monkeypatch):
    """safetensors opens them by name twice, the second time by torch, which has its own error."""
    saved = injected(lora_alpha=2, targets=["q"])
    fl.save_adapter(saved, tmp_path)
    ready = tmp_path / files.READY
    ready.mkdir()
    for name in (CONFIG, WEIGHTS):
        os.replace(tmp_path / name, ready / name)
    real = safetensors.safe_open

    def moved(path, *args, **options):
        if (ready / WEIGHTS).exists():
            os.replace(ready / WEIGHTS, tmp_path / WEIGHTS)
            torch.UntypedStorage.from_file(str(path), False, 8)
        return real(path, *args, **options)

    monkeypatch.setattr(safetensors, "safe_open", moved)
    model = fl.load_adapter(build(), tmp_path)
    assert model.q.scale == saved.q.scale and torch.equal(model.q.lora_a, saved.q.lora_a)


def save_in_a_loop(folder, started, stop):
    """Two adapters in turn, which differ in rank, scale and values."""
    torch.set_num_threads(1)
    models = [pruned({"q": r}, lora_alpha=3 * r) for r in (2, 3)]
    while not stop.is_set():
        for model in models:
            fl.save_adapter(model, folder)
            started.set()


def save_adalora_in_a_loop(folder, started, stop):
    models = [injected(r=r, lora_alpha=3 * r, adalora=True, targets="q") for r in (2, 3)]
    while not stop.is_set():
        for model in models:
            fl.save_adapter(model, folder)
            started.set()


def read_in_many_ways(folder, out, i):
    """(rank, scale over rank's own) by each reader."""
    (weights,) = read_folder(folder).layers.values()
    yield weights.lora_a.shape[0], weights.scale
    layer = fl.load_adapter(build(), folder).q
    yield layer.r, layer.scale
    model = pruned({"q": 4})
    fl.swap_adapter(model, folder)
    yield model.q.r, model.q.scale
    store = fl.AdapterStore(build(), 1, 4)
    store.load("a", folder)
    bank = store.layers["q"].bank
    yield int(bank.rank[store.index("a")]), float(bank.scale[store.index("a")])
    convert_peft(folder, out / str(i))
    (weights,) = read_folder(out / str(i)).layers.values()
    yield weights.lora_a.shape[0], weights.scale


def read_adalora_in_many_ways(folder, out, i):
    (weights,) = read_adalora(folder).values()
    yield weights.lora_a.shape[0], round(weights.scale, 3)
    layer = fl.load_adapter(build(), folder).q
    yield layer.r, round(layer.scale, 3)


@pytest.mark.skipif(DEVICE != "cpu", reason="starts processes")
@pytest.mark.parametrize(
    "save, read",
    [(save_in_a_loop, read_in_many_ways), (save_adalora_in_a_loop, read_adalora_in_many_ways)],
    ids=["lora", "adalora"],
)
def test_a_process_that_saves_in_a_loop_beside_one_that_loads(tmp_path, save, read):
    """Every load is of the one or of the other, whole: each has the scale 3."""
    context = multiprocessing.get_context("spawn")
    started, stop = context.Event(), context.Event()
    folder = tmp_path / "a"
    process = context.Process(target=save, args=(folder, started, stop))
    process.start()
    try:
        assert started.wait(120)
        for i in range(25):
            for rank, scale in read(folder, tmp_path, i):
                assert rank in (2, 3) and scale == 3
    finally:
        stop.set()
        process.join(60)
        process.kill()
    assert process.exitcode == 0


def test_others_may_read_what_the_owner_may_read_of_the_config(tmp_path):
    fl.save_adapter(pruned({"q": 2}), tmp_path)
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in (CONFIG, WEIGHTS)}
    assert len(modes) == 1


@pytest.mark.parametrize("keep_base", ["none", "cpu"])
@pytest.mark.parametrize("merged", [False, True])
def test_swap_adapter(merged, keep_base, tmp_path):
    """Another rank and scale, into a model that is merged or not; and back again."""
    torch.manual_seed(5)
    first, other = injected(), injected(r=5, lora_alpha=2, use_rslora=True)
    for model, name in ((first, "first"), (other, "other")):
        fl.save_adapter(model, tmp_path / name)
    before, want = first(X), other(X)
    base = {name: t.clone() for name, t in build().state_dict().items()}
    if merged:
        fl.merge(first, keep_base=keep_base)
    assert fl.swap_adapter(first, tmp_path / "other") is first
    assert all(m.merged is merged and m.r == 5 for m in adapters(first).values())
    torch.testing.assert_close(first(X), want, rtol=1e-4, atol=1e-5)
    fl.save_adapter(first, tmp_path / "again")
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    fl.swap_adapter(first, tmp_path / "first")
    torch.testing.assert_close(first(X), before, rtol=1e-4, atol=1e-5)
    if merged and keep_base == "cpu":
        fl.unmerge(first)
        assert all(torch.equal(first.state_dict()[name], t) for name, t in base.items())


def test_a_swap_that_does_not_fit_changes_nothing(tmp_path):
    fl.save_adapter(injected(targets=["q", "up"]), tmp_path / "fewer")
    fl.save_adapter(injected(model=build(blocks=3)), tmp_path / "deeper")
    fl.save_adapter(injected(bias="all"), tmp_path / "biases")
    model = injected()
    fl.merge(model)
    before = {name: t.clone() for name, t in model.named_parameters()}
    for folder, words in {
        "fewer": "has no adapter for .* more of the model's",
        "deeper": r"the model has no adapted layer 'layers\.2\.\w+'; nearest: ",
        "biases": "holds more than adapters, .*, which a swap would leave alone",
    }.items():
        with pytest.raises(ValueError, match=words):
            fl.swap_adapter(model, tmp_path / folder)
        assert all(torch.equal(t, before[name]) for name, t in model.named_parameters())
    with pytest.raises(ValueError, match="model has no adapter to swap"):
        fl.swap_adapter(build(), tmp_path / "fewer")
