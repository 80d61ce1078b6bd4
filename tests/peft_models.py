"""PEFT models of every family, and what the tests compare of them."""

import copy
import itertools
import re

import pytest
import torch
from conftest import DEVICE
from tiny_models import FAMILIES

import fused_lora as fl
from fused_lora.testing import nudge_

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
LINEAR, EMBEDDING = peft.tuners.lora.layer.Linear, peft.tuners.lora.layer.Embedding

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 7},
    "rank_pattern": {"rank_pattern": {"q_proj": 9, "key": 1}, "alpha_pattern": {"wo": 2}},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True, "use_rslora": True},
}
DTYPES = {
    "fp32": {},
    "bf16, fp32 adapters": {"dtype": torch.bfloat16},
    "bf16": {"dtype": torch.bfloat16, "masters": False},
}


def config(**options) -> peft.LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    return peft.LoraConfig(init_lora_weights=False, **options)


def model_of(*configs, family="llama", dtype=torch.float32, masters=True) -> torch.nn.Module:
    """A PEFT model with adapters a0, a1 and so on; a0 is active. masters: they are fp32, which is
    what PEFT makes of those of a 16-bit base unless it is told not to."""
    model = peft.get_peft_model(FAMILIES[family].model(dtype), configs[0], adapter_name="a0")
    for i, found in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", found)
    with torch.no_grad():  # What begins at zero or at what it was is no test.
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name or ("lora_B" in name and name.endswith("bias")):
                parameter.normal_()
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            if "lora_" in name and not masters:
                parameter.data = parameter.data.to(dtype)
    return model


def tokens(rows=3, length=7) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), device=DEVICE)


def batches_of(family: str, dtype: torch.dtype = torch.float32, n: int = 4, rows: int = 3):
    """n batches, of which every dtype has the same."""
    torch.manual_seed(1)
    return [in_dtype(FAMILIES[family].batch(rows), dtype) for _ in range(n)]


def in_dtype(batch: dict, dtype: torch.dtype) -> dict:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}


def outputs(model, batches, dtype=None, **options) -> list[dict[str, torch.Tensor]]:
    """Of each batch the logits and the gradients of all trainable parameters, in fp64. The masks of
    a batch are the same in every call."""
    found = []
    for i, batch in enumerate(batches):
        model.zero_grad()
        torch.manual_seed(7 + i)
        logits = model(**in_dtype(batch, dtype or model.dtype), **options).logits
        logits.float().square().mean().backward()
        grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": logits.detach().double(), **grads})
    return found


def rms(values) -> float:
    return sum(float(v.norm()) ** 2 for v in values) ** 0.5


def truth(model, batches, dtype=None, **options):
    """The outputs of the model in fp64, and those of one whose numbers are an ulp of dtype off."""
    exact = copy.deepcopy(model).double()
    true = outputs(exact, batches, torch.float64, **options)
    nudge_(exact.parameters(), dtype or model.dtype)
    return true, outputs(exact, batches, torch.float64, **options)


def root_mean_square(values) -> float:
    squares = [value**2 for value in values]
    return (sum(squares) / len(squares)) ** 0.5


def kind_of(name: str) -> str:
    """lora_A, lora_B, lora_B bias, and so on."""
    found = re.search(r"lora_[A-Za-z_]+", name)
    return found.group() + " bias" * name.endswith("bias") if found else name


def assert_close(ours, theirs, truths, dtype) -> None:
    """Against fp64, at most twice PEFT's own error and what an ulp of every parameter makes, for
    the logits and the gradients.

    The error of one tensor, or of one way to compute, is a matter of luck: compared is the root
    mean square over all tensors of a kind, in all batches, in units of each tensor's size. The
    gradient of a key's bias is zero but for rounding: none is smaller than a quarter of its kind.
    """
    true, rounded = truths
    kinds: dict[str, list[str]] = {}
    for name in true[0]:
        kinds.setdefault(kind_of(name), []).append(name)
    assert all(one.keys() == true[0].keys() for one in (*ours, *theirs, *true)) and len(kinds) > 1
    for kind, names in kinds.items():
        sizes = {name: rms(e[name] for e in true) for name in names}
        least = root_mean_square(sizes.values()) / 4
        of_ours, of_peft, of_ulps = (
            root_mean_square(
                rms(u[n] - e[n] for u, e in zip(found, true, strict=True)) / max(size, least)
                for n, size in sizes.items()
            )
            for found in (ours, theirs, rounded)
        )
        bound = 2 * (of_peft + of_ulps) + torch.finfo(dtype).eps
        assert of_ours <= bound, (
            f"{kind}: {of_ours:.2e} > {bound:.2e}, PEFT has {of_peft:.2e}, an ulp {of_ulps:.2e}"
        )


def assert_same(model, batches, **options):
    """The report of accelerate, after which the model's logits and gradients are PEFT's."""
    theirs = outputs(model, batches, **options)
    truths = truth(model, batches, **options)
    report = fl.accelerate(model)
    assert_close(outputs(model, batches, **options), theirs, truths, model.dtype)
    return report


def equal(some, others) -> bool:
    return all(
        one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
        for one, other in zip(some, others, strict=True)
    )


def saved_storages(model, batch, **options) -> int:
    """Bytes of all that the forward keeps for the backward but parameters, a storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(**batch, **options).logits
    del logits
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(call) -> int:
    """The most that torch's allocator has given out at once in call(), beside what was there."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    given = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in given))


def trained_peak(model, batch) -> int:
    """Of a forward and a backward, the gradients among it."""

    def call():
        model(**batch).logits.square().mean().backward()

    model.zero_grad(set_to_none=True)
    peak = peak_bytes(call)
    model.zero_grad(set_to_none=True)
    return peak
