"""Adapters around the layers of bitsandbytes and torchao themselves, on a CPU: what they compute,
what is kept for their backward, and models of transformers that are quantised as they are loaded.
"""

import copy
import gc
import logging
import pickle
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from tiny_llama import tiny_llama

import fused_lora as fl
from fused_lora.nn import LoRAAdapter, LoRALinear
from fused_lora.testing import assert_accurate, nudge_, saved_bytes

M, K, N, R = 17, 128, 64, 4  # blocks of 64 along K


class Base(NamedTuple):
    """A quantised layer, the weight [N, K] that it stands for, and whether x is rounded too."""

    layer: torch.nn.Module
    weight: torch.Tensor
    rounds_x: bool = False


def bitsandbytes_4bit(
    linear: torch.nn.Linear, kind: str, nested: bool = True, packed: bool = False
) -> Base:
    """On every machine a layer as on a CPU with AVX512_BF16, where it packs its weight for
    inference. packed: it has done so."""
    bnb = pytest.importorskip("bitsandbytes")
    out_features, in_features = linear.weight.shape
    layer = bnb.nn.Linear4bit(
        in_features,
        out_features,
        compute_dtype=linear.weight.dtype,
        compress_statistics=nested,
        quant_type=kind,
    )
    layer.load_state_dict(linear.state_dict())
    layer.to(DEVICE)
    layer.support_avx512bf16_for_cpu = True
    if packed:
        weight = pack(layer)
    else:
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return Base(layer, weight.to(linear.weight.dtype))


def pack(layer) -> torch.Tensor:
    """What bitsandbytes does at the first inference; returns the weight, its scales rounded."""
    functional = pytest.importorskip("bitsandbytes").functional
    data, state = layer.weight.data, copy.copy(layer.weight.quant_state)
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        scales = state.absmax
    state.absmax, state.nested = scales.bfloat16().float(), False
    weight = functional.dequantize_4bit(data, state)
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(data, layer.weight.quant_state)
    assert layer.weight.quant_state.packing_format_for_cpu
    return weight


def bitsandbytes_8bit(linear: torch.nn.Linear) -> Base:
    bnb = pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of casts, at every call
    out_features, in_features = linear.weight.shape
    layer = bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    layer.to(DEVICE)
    weight = layer.weight.CB.float() * (layer.weight.SCB / 127)[:, None]
    return Base(layer, weight.to(linear.weight.dtype), rounds_x=True)


def torchao_weight_only(linear: torch.nn.Linear, bits: int) -> Base:
    torchao = pytest.importorskip("torchao.quantization")
    if bits == 8:
        config = torchao.Int8WeightOnlyConfig()
    else:
        config = torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=torchao.PerGroup(32)
        )
    torchao.quantize_(linear, config)
    return Base(linear, linear.weight.dequantize())


BASES = {
    "nf4": lambda linear: bitsandbytes_4bit(linear, "nf4"),
    "fp4": lambda linear: bitsandbytes_4bit(linear, "fp4", nested=False),
    "nf4, packed": lambda linear: bitsandbytes_4bit(linear, "nf4", packed=True),
    "fp4, packed": lambda linear: bitsandbytes_4bit(linear, "fp4", nested=False, packed=True),
    "int8 of bitsandbytes": bitsandbytes_8bit,
    "int8 of torchao": lambda linear: torchao_weight_only(linear, 8),
    "int4 of torchao": lambda linear: torchao_weight_only(linear, 4),
}
every_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@every_base
@dtypes
@pytest.mark.parametrize("gate, p", [(False, 0.0), (True, 0.3)])
def test_output_and_gradients_are_those_of_the_dequantised_base(make, dtype, gate, p):
    base, weight, rounds_x = make(torch.nn.Linear(K, N, device=DEVICE, dtype=dtype))
    options = {"adapter_dtype": torch.float32, "gate": gate, "lora_dropout": p}
    layer = LoRAAdapter(base, r=R, init=False, **options)
    x = torch.randn(2, M, K, device=DEVICE, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, M, N, device=DEVICE, dtype=dtype)
    trained = [q for q in layer.parameters() if q.requires_grad]
    assert len(trained) == 2 + gate
    torch.manual_seed(3)
    y = layer(x)
    ours = [y, *torch.autograd.grad(y, [x, *trained], dy)]
    torch.manual_seed(3)
    drop = {"dropout_p": p, "seed": fl.reference.draw_seed(x.device) if p else None}
    # What the rounding of x changes in y is taken as it is; no gradient goes through it.
    with torch.no_grad():
        rounding = base(x) - F.linear(x, weight, base.bias) if rounds_x else torch.zeros_like(dy)

    def plain(x, weight, bias, rounding, a, b, *rest):
        *g, dy = rest
        out = F.linear(x, weight, bias) + rounding
        g = g[0] if g else None
        y = fl.reference.lora_add(out, x, a, b, scale=layer.scale, gate=g, **drop)
        return [y, *torch.autograd.grad(y, [x, a, b, *([] if g is None else [g])], dy)]

    names = ["y", "dx", "da", "db", "dgate"][: len(ours)]
    inputs = [x, weight, base.bias.to(dtype), rounding, *trained, dy]
    assert_accurate(
        names, ours, plain, [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    )


def live_tensors() -> list[torch.Tensor]:
    """By type: isinstance would ask a weak proxy of what is gone."""
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]


@every_base
def test_what_is_kept_for_the_backward(make):
    """x, A, B and h; of the weight bitsandbytes keeps no wide copy, torchao the one it makes."""
    base, weight, _ = make(torch.nn.Linear(K, N, device=DEVICE))
    layer = LoRAAdapter(base, r=R)
    x = torch.randn(M, K, device=DEVICE, requires_grad=True)
    size, _ = saved_bytes(lambda: layer(x))
    of_base, _ = saved_bytes(lambda: base(x))
    assert size - of_base <= 4 * (M * K + R * K + N * R + M * R)
    before = set(map(id, live_tensors()))
    y = layer(x)
    held = [t for t in live_tensors() if id(t) not in before]
    wide = [t for t in held if t.shape == weight.shape and t.is_floating_point()]
    assert y.requires_grad and not wide
    if type(base) is not torch.nn.Linear:
        assert of_base < weight.nbytes


FOUR_BITS = [name for name in BASES if name[:3] in ("nf4", "fp4")]
four_bits = pytest.mark.parametrize("make", [BASES[name] for name in FOUR_BITS], ids=FOUR_BITS)


def dequantised(layer) -> torch.Tensor:
    """Of the layer as it is saved: what a fresh one that loads it computes with."""
    bnb = pytest.importorskip("bitsandbytes")
    fresh = bnb.nn.Linear4bit(K, N)
    parts = {name.split("weight.")[1]: t for name, t in layer.state_dict().items() if "." in name}
    fresh.weight = bnb.nn.Params4bit.from_prequantized(layer.weight.data, parts, device=DEVICE)
    return bnb.functional.dequantize_4bit(fresh.weight.data, fresh.weight.quant_state)


def under_adapter(layer) -> torch.nn.Module:
    return LoRAAdapter(layer, r=R, init=False)


def under_peft(layer) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(layer)
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=R, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    fl.accelerate(model)
    return model


@four_bits
@pytest.mark.parametrize("adapted", [under_adapter, under_peft], ids=["own", "PEFT"])
def test_a_4_bit_weight_is_not_packed_under_an_adapter(make, adapted):
    """Inference, then a gradient, then a state: all of the weight that was loaded."""
    base, weight, _ = make(torch.nn.Linear(K, N, device=DEVICE))
    model = adapted(base).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data.zero_()
    x = torch.randn(M, K, device=DEVICE)
    with torch.no_grad():
        y = model(x)
    assert_accurate(["y"], [y], lambda *t: [F.linear(*t)], [x, weight, base.bias.detach()])
    x.requires_grad_()
    dy = torch.randn(M, N, device=DEVICE)
    for mode in (True, False):
        (dx,) = torch.autograd.grad(model.train(mode)(x), x, dy)
        assert_accurate(["dx"], [dx], lambda dy, weight: [dy @ weight], [dy, weight])
    assert torch.equal(dequantised(base), weight)


@four_bits
def test_merging_of_peft_over_4_bits_after_inference(make):
    """A merge reads and writes the weight: it is that of a model that never was called."""
    pytest.importorskip("peft")
    x, found = torch.randn(M, K, device=DEVICE), []
    linear = torch.nn.Linear(K, N, device=DEVICE)
    for called in (True, False):
        torch.manual_seed(1)
        model = under_peft(make(copy.deepcopy(linear)).layer).eval()
        with torch.no_grad():
            if called:
                model(x)
            model.base_model.merge_adapter()
            found.append(model(x))
    assert torch.equal(*found)


@four_bits
def test_restore_lets_a_4_bit_weight_pack_again(make):
    base = make(torch.nn.Linear(K, N, device=DEVICE)).layer
    model = under_peft(base)
    fl.accelerate(model)
    assert not base.support_avx512bf16_for_cpu
    fl.restore(model)
    assert base.support_avx512bf16_for_cpu


# Whole models


class Block(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.up, self.down = make(torch.nn.Linear(K, N)).layer, make(torch.nn.Linear(N, K)).layer
        self.head = torch.nn.Linear(K, 3)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


def plain_weights(model) -> dict[str, torch.Tensor]:
    """What is not the adapters', without torchao's classes."""
    state = {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n}
    own = torch.Tensor, torch.nn.Parameter
    return {n: t if type(t) in own else t.dequantize() for n, t in state.items()}


def block(make) -> Block:
    torch.manual_seed(0)
    return Block(make).to(DEVICE)


@every_base
def test_a_model_with_adapters_trains_and_comes_back(make, tmp_path):
    model, x = block(make), torch.randn(32, K, device=DEVICE)
    target = torch.randint(3, (32,), device=DEVICE)
    fl.inject(model, fl.LoRAConfig(r=R, target_modules=["up", "down", "head"]))
    assert type(model.up) is type(model.down) is LoRAAdapter and type(model.head) is LoRALinear
    before = plain_weights(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for _ in range(20):
        losses.append(F.cross_entropy(model(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(t, plain_weights(model)[n]) for n, t in before.items())
    fl.save_adapter(model, tmp_path)
    fresh = fl.load_adapter(block(make), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="alone knows how its weight is written"):
        fl.merge(model)


def quantised_llama(folder, kind: str):
    """A Llama that transformers quantises as it loads it."""
    transformers = pytest.importorskip("transformers")
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
        config = transformers.BitsAndBytesConfig(
            **(options if kind == "4 bit" else {"load_in_8bit": True})
        )
    if not folder.exists():
        # K, a multiple of a block of 64, and N, of 32, as real layers have them.
        tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=DEVICE
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # PEFT alone is wrong where it packs
            module.support_avx512bf16_for_cpu = False
    return model


kinds = pytest.mark.parametrize("kind", ["4 bit", "8 bit", "torchao"])
IDS = torch.tensor([[5, 9, 3, 7, 2, 8, 4, 6], [1, 2, 3, 4, 5, 6, 7, 8]], device=DEVICE)


@kinds
def test_trainer_of_a_quantised_llama(kind, tmp_path):
    """Trainer asks for adapters of PEFT's, until it is told that the model trains others."""
    model = quantised_llama(tmp_path / "llama", kind)
    transformers = pytest.importorskip("transformers")
    fl.inject(model, fl.LoRAConfig(r=R, target_modules="all-linear"))
    assert sum(isinstance(m, LoRAAdapter) for m in model.modules()) == 14
    options = {"max_steps": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), use_cpu=DEVICE == "cpu", **options
    )
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments, train_dataset=data)
    model.is_quantized = False
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    assert all(p.any() for n, p in model.named_parameters() if n.endswith("lora_b"))
    fl.save_adapter(model, tmp_path / "adapter")
    again = fl.load_adapter(quantised_llama(tmp_path / "llama", kind), tmp_path / "adapter")
    told = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(again.eval().generate(IDS, **told), model.eval().generate(IDS, **told))


# Layers of PEFT around quantised ones.


def peft_llama(folder, kind: str, *options, **given):
    peft = pytest.importorskip("peft")
    model = quantised_llama(folder, kind)
    torch.manual_seed(1)
    for i, more in enumerate(options or [{}]):
        own = {"r": R, "target_modules": "all-linear", "init_lora_weights": False, **given, **more}
        if i == 0:
            model = peft.get_peft_model(model, peft.LoraConfig(**own), adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", peft.LoraConfig(**own))
    return model


def results(model) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


ACCELERATED = {
    "one": [{}],
    "rslora": [{"use_rslora": True, "lora_alpha": 3}],
    "two": [{}, {"r": 9}],
}


@kinds
@pytest.mark.parametrize("options", ACCELERATED)
def test_accelerate_of_pefts_quantised_layers(kind, options, tmp_path):
    model = peft_llama(tmp_path / "llama", kind, *ACCELERATED[options])
    model.base_model.set_adapter([f"a{i}" for i in range(len(ACCELERATED[options]))])
    exact = {id(m): type(m) for m in model.modules()}
    want = results(model)
    report = fl.accelerate(model)
    assert len(report.fused) == len(report.layers) == 14
    assert {layer.route for layer in report.layers} == {"lora_add"}
    found = results(model)
    assert not report.fallbacks
    # A rounding to 8 bits may turn over for a last bit of what comes before it.
    tolerance = 2e-2 if kind == "8 bit" else 1e-4
    for ours, theirs in zip(found, want, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    again = pickle.loads(pickle.dumps(type(next(iter(layers_of(model))))))
    assert again is type(next(iter(layers_of(model))))
    fl.restore(model)
    assert {id(m): type(m) for m in model.modules()} == exact
    assert all(torch.equal(*pair) for pair in zip(results(model), want, strict=True))


def layers_of(model):
    from peft.tuners.lora.layer import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]


@every_base
@dtypes
@pytest.mark.parametrize("p, bias", [(0.3, False), (0.0, True)])
def test_a_layer_of_peft_around_a_quantised_one(make, dtype, p, bias):
    """Its base's own product, and an adapter of fp32 masters as the reference has it, in the
    precision of x."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = make(torch.nn.Linear(K, N, device=DEVICE, dtype=dtype)).layer
    if bias and type(base) is torch.nn.Linear:
        pytest.skip("PEFT has no lora_bias over torchao")
    model = torch.nn.Sequential(base)
    config = peft.LoraConfig(
        r=R, target_modules=["0"], lora_dropout=p, lora_bias=bias, init_lora_weights=False
    )
    if type(base) is not torch.nn.Linear:  # what transformers sets, and PEFT looks for
        model.is_loaded_in_4bit = "4bit" in type(base).__name__
        model.is_loaded_in_8bit = not model.is_loaded_in_4bit
    try:
        model = peft.get_peft_model(model, config)
    except TypeError as error:
        pytest.skip(str(error))  # int4 of torchao, that PEFT does not take
    (layer,) = layers_of(model)
    for name, q in layer.named_parameters():
        if "lora" in name:
            q.data = q.data.float()
    if bias:
        torch.nn.init.normal_(layer.lora_B["default"].bias)
    report = fl.accelerate(model)
    assert report.fused == ["base_model.model.0"]
    x = torch.randn(2, M, K, device=DEVICE, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, M, N, device=DEVICE, dtype=dtype)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    trained = [q for q in layer.parameters() if q.requires_grad]
    torch.manual_seed(3)
    y = layer(x)
    ours = torch.autograd.grad(y, [x, *trained], dy)
    torch.manual_seed(3)
    want = base(x)
    seed = fl.reference.draw_seed(x.device) if p else None
    scale = layer.scaling["default"]
    want = fl.reference.lora_add(want, x, a, b, scale=scale, dropout_p=p, seed=seed)
    if bias:
        want = want + layer.lora_B["default"].bias * scale
    theirs = torch.autograd.grad(want, [x, *trained], dy.to(want.dtype))
    assert not report.fallbacks and y.dtype == dtype
    for one, other in zip((y, *ours), (want, *theirs), strict=True):
        error = (one.double() - other.double()).norm()
        assert error <= 8 * torch.finfo(dtype).eps * other.double().norm()


@kinds
def test_no_more_is_kept_than_by_peft(kind, tmp_path):
    model = peft_llama(tmp_path / "llama", kind, lora_dropout=0.3).train()
    theirs, _ = saved_bytes(lambda: model(input_ids=IDS).logits)
    report = fl.accelerate(model)
    ours, _ = saved_bytes(lambda: model(input_ids=IDS).logits)
    assert 0 < ours <= theirs and not report.fallbacks


REASONS = {
    "DoRA": ({"use_dora": True}, {}, "adapter 'a0' is a DoraLinearVariant"),
    "mixed": ({}, {"adapter_names": ["a0", "__base__"]}, "a mixed batch over a quantised layer"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_not_fused_over_a_quantised_layer_says_why(case, tmp_path, monkeypatch):
    given, call, reason = REASONS[case]
    model = peft_llama(tmp_path / "llama", "4 bit", **given).eval()
    want = model(input_ids=IDS, **call).logits
    report = fl.accelerate(model)
    assert torch.equal(model(input_ids=IDS, **call).logits, want)
    assert {why for count in report.fallbacks.values() for why in count} == {reason}
    monkeypatch.setenv("FUSED_LORA_STRICT", "1")
    with pytest.raises(RuntimeError, match=re.escape(f"a layer is not fused: {reason}")):
        model(input_ids=IDS, **call)


@kinds
def test_autocast_of_pefts_quantised_layers(kind, tmp_path):
    """Against fp32, at most twice PEFT's error and what an ulp of bf16 makes."""
    model, batches = peft_llama(tmp_path / "llama", kind), [{"input_ids": IDS}]
    from peft_models import assert_close, outputs

    true = outputs(model, batches)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        theirs = outputs(model, batches)
        report = fl.accelerate(model)
        ours = outputs(model, batches)
    assert not report.fallbacks
    plain = (p for p in model.parameters() if type(p) is torch.nn.Parameter)
    nudge_(plain, torch.bfloat16)
    assert_close(ours, theirs, (true, outputs(model, batches)), torch.bfloat16)
