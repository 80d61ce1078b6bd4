"""AdaLoRA's folders: PEFT's are read, and written as PEFT loads them; bad ones are refused."""

import copy
import json
import math

import pytest
import torch
from conftest import DEVICE
from safetensors.torch import load_file, save_file
from seeds import set_fixed_seed
from tiny_llama import tiny_llama
from torch.nn import Linear, Sequential

import fused_lora as fl
from fused_lora.checkpoint.adalora import load_adalora, read_adalora, save_adalora
from fused_lora.inject import LoRAConfig, inject
from fused_lora.nn import AdaLoRALinear
from fused_lora.optim import RankAllocator

try:
    import peft
except ImportError:
    peft = None
needs_peft = pytest.mark.skipif(peft is None, reason="needs peft")

R, TARGETS = 4, ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(1, 22, device=DEVICE).view(3, 7)


def adapted(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaLoRALinear)}


def logits(model):
    with torch.no_grad():
        return model.double()(input_ids=IDS).logits


def peft_folder(path, **options):
    """What PEFT saves after it has cut: one layer keeps nothing, another all. And its logits."""
    options = {"target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2, **options}
    config = peft.AdaLoraConfig(
        init_r=R, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, **options
    )
    base = tiny_llama()
    set_fixed_seed(0)  # which ranks are cut is a matter of the draw
    model = peft.get_peft_model(base, config)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.adalora.SVDLinear)]
    for i, layer in enumerate(layers):
        for part in (layer.lora_A, layer.lora_B, layer.lora_E):
            part["default"].grad = torch.rand_like(part["default"]) * (0, 1, 2, 1, 9, 1)[i]
    allocator = model.base_model.rankallocator
    allocator.update_ipt(model.base_model.model)
    config.rank_pattern = allocator.mask_to_budget(model.base_model.model, 12)
    model.save_pretrained(path)
    return logits(model)


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


@needs_peft
def test_a_folder_of_peft_and_back(tmp_path):
    want = peft_folder(tmp_path / "peft")
    model = fl.load_adapter(tiny_llama(), tmp_path / "peft")
    ranks = [int(layer.gate.count_nonzero()) for layer in adapted(model).values()]
    assert 0 in ranks and R in ranks and sum(ranks) == 12
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {True}

    fl.save_adapter(model, tmp_path / "ours")
    theirs, ours = config_of(tmp_path / "peft"), config_of(tmp_path / "ours")
    assert theirs["rank_pattern"] == ours["rank_pattern"]
    assert (ours["init_r"], ours["lora_alpha"]) == (R, 6)
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[key]) for key, t in first.items())

    back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    for got in (logits(model), logits(back)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (want - logits(tiny_llama())).abs().max() > 0.01


@needs_peft
def test_a_folder_before_the_first_choice(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=R, lora_alpha=-1, target_modules=TARGETS, init_lora_weights=False, total_step=9
    )
    theirs = peft.get_peft_model(tiny_llama(), config)
    theirs.save_pretrained(tmp_path)
    ours = load_adalora(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-12, atol=1e-12)


@needs_peft
def test_what_is_read_is_what_peft_computes_and_a_bank_takes_it(tmp_path):
    want = peft_folder(tmp_path)
    model = tiny_llama().double()
    found = read_adalora(tmp_path)
    for name, weights in found.items():
        linear = model.get_submodule(name)
        a, b, gate = (t.double() for t in (weights.lora_a, weights.lora_b, weights.gate))
        with torch.no_grad():
            linear.weight += weights.scale * (b * gate) @ a
    torch.testing.assert_close(logits(model), want, rtol=1e-12, atol=1e-12)
    assert len(found) == 5
    bank = fl.AdapterBank(32, 32, max_adapters=1, max_rank=R)
    weights = next(w for name, w in found.items() if "q_proj" in name)
    bank.add("one", weights.lora_a, weights.lora_b, scale=weights.scale, gate=weights.gate)


def trained(scaling="plain", **kwargs):
    model = Sequential(Linear(5, 6), Linear(6, 5)).to(DEVICE)
    config = LoRAConfig(
        r=R, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False, adalora=True,
        adalora_scaling=scaling, **kwargs,
    )  # fmt: skip
    return inject(model, config)


def plain():
    return Sequential(Linear(5, 6), Linear(6, 5)).to(DEVICE)


@pytest.mark.parametrize("scaling", ("plain", "peft"))
@pytest.mark.parametrize("cut", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_round_trip(tmp_path, scaling, cut, dtype):
    model = trained(scaling, lora_dropout=0.25).to(dtype).eval()
    with torch.no_grad():
        model[0].gate.copy_(torch.tensor([0.0, 2.0, 0.0, -1.0]))
        model[1].gate.zero_()
    save_adalora(model, tmp_path / "a", cut=cut)
    save_adalora(model, tmp_path / "a", cut=cut)
    shapes = {
        k: list(t.shape) for k, t in load_file(tmp_path / "a/adapter_model.safetensors").items()
    }
    key = "base_model.model.{}.lora_{}"
    assert shapes[key.format(0, "A")] == [2 if cut else 4, 5]
    assert shapes[key.format(1, "B")] == [5, 0 if cut else 4]
    assert shapes[key.format(1, "E")] == [0 if cut else 4, 1]
    base = copy.deepcopy(plain()).to(dtype)
    base.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora" not in k and "gate" not in k}
    )
    fresh, again = load_adalora(base, tmp_path / "a").eval(), trained(scaling).to(dtype).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        again[0].gate.fill_(7)
        again[1].lora_a.fill_(7)
    again[0].merge("device")
    load_adalora(again, tmp_path / "a")
    again[0].unmerge()
    x = torch.randn(9, 5, device=DEVICE, dtype=dtype)
    for m in (fresh, again):
        assert torch.equal(m(x), model(x))
        assert [layer.scale for layer in m] == [model[0].scale] * 2
        assert torch.equal(m[0].gate, model[0].gate) and not m[1].gate.any()
    assert fresh[0].lora_dropout == 0.25 and fresh[0].lora_a.dtype == dtype
    assert fresh[1].lora_a.any() and fresh[1].lora_b.any()  # and so may come back


def test_fp32_masters_stay(tmp_path):
    save_adalora(trained(), tmp_path)
    model = load_adalora(plain().bfloat16(), tmp_path)
    assert {layer.lora_a.dtype for layer in model} == {torch.float32}


@needs_peft
def test_the_schedule_is_written_for_peft(tmp_path):
    model = trained()
    allocator = RankAllocator(model, target_r=2, total_step=50, t_init=3, t_final=5, delta_t=2)
    save_adalora(model, tmp_path, allocator=allocator)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    found = [getattr(config, n) for n in ("target_r", "total_step", "tinit", "tfinal", "deltaT")]
    assert found == [2, 50, 3, 5, 2] and config.rank_pattern is None


@needs_peft
def test_peft_adapts_no_other_layer(tmp_path):
    """A layer whose name ends in that of another."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.inner = Linear(5, 5), torch.nn.ModuleDict({"q": Linear(5, 5)})

        def forward(self, x):
            return self.inner["q"](self.q(x))

    model = inject(
        Model(), LoRAConfig(target_modules="q", r=3, adalora=True, init_lora_weights=False)
    )
    save_adalora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path)
    kinds = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.adalora.SVDLinear)]
    assert kinds == ["base_model.model.q"]
    x = torch.randn(4, 5)
    torch.testing.assert_close(theirs(x), model(x))


# What is refused

CONFIG = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 6}
Q = "base_model.model.0"
HALF = {"rank_pattern": {"0.lora_E": [True, False, True]}}


def tensors(k=3, **more):
    return {
        f"{Q}.lora_A": torch.randn(k, 5),
        f"{Q}.lora_B": torch.randn(6, k),
        f"{Q}.lora_E": torch.randn(k, 1),
        **more,
    }


def folder(path, config=CONFIG, found=None):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors() if found is None else found, path / "adapter_model.safetensors")
    return path


def test_a_folder_by_hand(tmp_path):
    found = tensors(2)
    for key in ("0.lora_E", "0.lora_E.default"):
        config = CONFIG | {"rank_pattern": {key: [True, False, True]}}
        (weights,) = read_adalora(folder(tmp_path / "a", config, found)).values()
        assert torch.equal(weights.lora_b, found[f"{Q}.lora_B"]) and weights.scale == 6 / 3.00001
        assert torch.equal(weights.gate, found[f"{Q}.lora_E"][:, 0])
    model = load_adalora(plain(), tmp_path / "a")
    assert type(model[1]) is Linear and (model[0].gate != 0).tolist() == [True, False, True]


def bad(config=None, found=None, error=ValueError, message=""):
    return pytest.param(CONFIG | (config or {}), found, error, message, id=message[:40])


BAD = [
    bad({"peft_type": "LORA"}, None, ValueError, "peft_type must be ADALORA, got 'LORA'"),
    bad({"init_r": None}, None, TypeError, "init_r must be an int, got None"),
    bad({"init_r": 0}, None, ValueError, r"init_r must lie in \[1, 4096\], got 0"),
    bad({"lora_alpha": math.inf}, None, ValueError, "lora_alpha must be finite, got inf"),
    bad({"use_dora": True}, None, NotImplementedError, "use_dora=True is not supported"),
    bad({"rank_pattern": [1]}, None, TypeError, "rank_pattern must be an object, got list"),
    bad({"rank_pattern": {"0": [True] * 3}}, None, ValueError, "key '0', which is no lora_E"),
    bad({"rank_pattern": {"0.lora_E.a.b": []}}, None, ValueError, "which is no lora_E"),
    bad({"rank_pattern": {"0.lora_E": [1, 0, 1]}}, None, TypeError, "must be a list of booleans"),
    bad({"rank_pattern": {"0.lora_E": 2}}, None, TypeError, "must be a list of booleans"),
    bad({"rank_pattern": {"0.lora_E": [True]}}, None, ValueError, "init_r = 3 entries, got 1"),
    bad({"rank_pattern": {"9.lora_E": [True] * 3}}, None, KeyError, r"names \['9'\]"),
    bad(HALF, None, ValueError, r"lora_A must have shape \[2, K\], got \[3, 5\]"),
    bad(None, tensors(2), ValueError, r"lora_A must have shape \[3, K\], got \[2, 5\]"),
    bad(None, tensors() | {f"{Q}.lora_E": torch.ones(3)}, ValueError, r"shape \[3, 1\], got \[3\]"),
    bad(None, tensors() | {f"{Q}.lora_B": torch.ones(3, 6)}, ValueError, r"\[N, 3\], got \[3, 6\]"),
    bad(None, {f"{Q}.lora_A": torch.zeros(3, 5)}, KeyError, "missing .*lora_B.*lora_E"),
    bad(None, tensors(extra=torch.zeros(1)), KeyError, "unexpected .*'extra'"),
    bad(None, {}, KeyError, "missing nothing, unexpected none"),
    bad(None, {k: t.int() for k, t in tensors().items()}, TypeError, "BF16, got I32"),
    bad(None, {k: t * math.nan for k, t in tensors().items()}, ValueError, "NaN or infinite"),
]


@pytest.mark.parametrize("config, found, error, message", BAD)
def test_a_bad_folder(tmp_path, config, found, error, message):
    path, model = folder(tmp_path / "a", config, found), plain()
    for call in (read_adalora, lambda path: load_adalora(model, path)):
        with pytest.raises(error, match=message):
            call(path)
    assert type(model[0]) is Linear


def test_a_model_that_does_not_fit_is_unchanged(tmp_path):
    path = folder(tmp_path / "a")
    other = inject(plain(), LoRAConfig(target_modules=["0"], r=3))
    both = trained()
    cases = [
        (Sequential(torch.nn.ReLU()), ValueError, "no nn.Linear '0'; nearest: none"),
        (Sequential(Linear(6, 5)), ValueError, r"shape \[6, 5\], the model's has \[5, 6\]"),
        (other, TypeError, "0 is a LoRALinear, not an AdaLoRALinear"),
        (both, ValueError, "init_r is 3, and 0 has rank 4"),
    ]
    for model, error, words in cases:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=words):
            load_adalora(model, path)
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    both = inject(plain(), LoRAConfig(target_modules=["0", "1"], r=3, adalora=True))
    with pytest.raises(ValueError, match=r"without \['1'\], and with \[\]"):
        load_adalora(both, path)


def test_what_cannot_be_saved(tmp_path):
    def changed(change, **kwargs):
        model = trained(**kwargs)
        with torch.no_grad():
            change(model)
        return model

    cases = [
        (plain(), ValueError, "model has no AdaLoRALinear"),
        (changed(lambda m: m.append(fl.nn.LoRALinear(5, 5))), ValueError, "other adapters.*: 2"),
        (trained(rank_pattern={"1": 2}), ValueError, "one init_r for all layers: 0 has 4 and 1"),
        (trained(alpha_pattern={"1": 2}), ValueError, "one lora_alpha for all layers: 0 has"),
        (trained(alpha_pattern={".": -1}), ValueError, "lora_alpha must be positive, got -1"),
        (trained().double(), TypeError, "0.lora_A must be fp32, fp16 or bf16, got torch.float64"),
        (changed(lambda m: m[1].lora_b.fill_(math.nan)), ValueError, "1.lora_B has values"),
    ]
    for model, error, words in cases:
        with pytest.raises(error, match=words):
            save_adalora(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()
