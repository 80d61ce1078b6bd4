"""Checks of what modules and their configurations are made from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter

from fused_lora.files import shown
from fused_lora.ops import validation as check


def check_rank(name: str, r) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name} must be an int, got {shown(r)} of type {type(r).__name__}")
    if r < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(r)}")


def check_number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a number, got {shown(value)} of type {type(value).__name__}"
        )
    if not -check.LARGEST <= value <= check.LARGEST:
        raise ValueError(f"{name} must be finite in fp32, got {shown(value)}")


def check_probability(name: str, p) -> None:
    check_number(name, p)
    if not 0 <= p <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {shown(p)}")


def check_choice(name: str, value, choices: Sequence) -> None:
    # 1 == True, yet it is not that choice.
    if not any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices):
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}"
        )


# Linear layers of other libraries, which need not be there: their product, of a weight that they
# keep in fewer bits, is their own, and has the gradient of its input.
_QUANTISED = {
    f"bitsandbytes.nn.modules.{name}"
    for name in ("Linear4bit", "LinearFP4", "LinearNF4", "Linear8bitLt")
}


def kind_of(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_quantised(module: torch.nn.Module) -> bool:
    """A layer of bitsandbytes by its name, or an nn.Linear whose weight is a torchao tensor."""
    weight = getattr(module, "weight", None)
    return kind_of(module) in _QUANTISED or (
        type(module) is torch.nn.Linear and type(weight).__module__.split(".")[0] == "torchao"
    )


def keep_unpacked_(module: torch.nn.Module) -> bool:
    """Leave the weight of a 4-bit layer of bitsandbytes as it was loaded; True where it would not.

    On a CPU with AVX512_BF16 bitsandbytes packs the weight anew at the first inference. Whatever
    reads it takes it for the weight that was loaded: its product has no gradient of x, and what is
    dequantized, merged or saved from it is wrong. A weight that is packed is unpacked here, but its
    scales stay rounded to bfloat16.
    """
    packs = getattr(module, "support_avx512bf16_for_cpu", False)
    if packs:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    weight: Any = module._parameters.get("weight")
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        # Its inverse leaves the scales transposed, or quantizes them anew.
        scales = state.absmax.t().float().flatten()
        state.original_nested = False
        weight.data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        state.absmax = scales
    return bool(packs)


# What PEFT's layers and models are, which need not be there.
_PEFT_KINDS = {
    "peft.tuners.tuners_utils.BaseTunerLayer",
    "peft.utils.other.AuxiliaryTrainingWrapper",
    "peft.peft_model.PeftModel",
}


def check_no_peft(what: str, model: torch.nn.Module) -> None:
    """Raise TypeError where PEFT has put adapters into a model: to adapt or freeze what is in them
    would undo them."""
    for name, module in model.named_modules():
        bases = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
        if not _PEFT_KINDS.isdisjoint(bases):
            where = f"{name!r} in it" if name else "it"
            raise TypeError(
                f"{what} has adapters of PEFT: {where} is a {kind_of(module)}; use "
                f"fl.accelerate(peft_model), or give the base model, peft_model.unload()"
            )


def placement(module: torch.nn.Module):
    """The hook by which accelerate keeps a module on the device that device_map has for it, or
    None."""
    return vars(module).get("_hf_hook")


def execution_device(module: torch.nn.Module) -> torch.device | None:
    """Where accelerate's hook has it computed, or None."""
    hook = placement(module)
    for one in getattr(hook, "hooks", [hook]):
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    return None


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether its parameters are on the CPU or the disk and come for each call (accelerate)."""
    hook = placement(module)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook]))


def keeps_its_product(module: torch.nn.Module) -> bool:
    """Whether an adapter can only go around it: a layer that is quantised, or offloaded."""
    plain = type(module) is torch.nn.Linear
    return is_quantised(module) or (plain and is_offloaded(module))


def check_linear(name: str, linear, *, placed: bool = False) -> None:
    """`linear` is an nn.Linear and nothing more, and its weight a plain dense floating tensor.

    placed: the hook of accelerate's device_map is no objection.
    """
    placed = placed and placement(linear) is not None
    _check_plain(name, linear, torch.nn.Linear, ("weight", "bias"), placed)


def check_embedding(name: str, embedding) -> None:
    """`embedding` is an nn.Embedding that only looks up, and its weight a plain dense floating
    tensor."""
    _check_plain(name, embedding, torch.nn.Embedding, ("weight",))
    for option, plain in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        if (value := getattr(embedding, option)) != plain:
            raise TypeError(f"{name} has {option}={value}, which an adapted embedding has not")


def _check_plain(
    name: str, module, wanted: type, parameters: Sequence[str], placed: bool = False
) -> None:
    kind = type(module)
    if kind is not wanted:
        raise TypeError(
            f"{name} is a {kind_of(module)}; only a plain torch.nn.{wanted.__name__} can be "
            f"adapted, because what a subclass computes is not known"
        )
    for own, t in module.named_parameters():
        if own not in parameters:
            raise TypeError(
                f"{name} has a parameter {own!r} that a plain torch.nn.{wanted.__name__} has not"
            )
        if type(t) is not Parameter or t.layout != torch.strided:
            raise TypeError(
                f"{name}.{own} is a {type(t).__name__} of layout {t.layout}; a plain dense tensor "
                f"is wanted"
            )
        if t.dtype not in check.DTYPES:
            raise TypeError(
                f"{name}.{own} must have dtype {check.names(check.DTYPES)}, got "
                f"{check.names([t.dtype])}"
            )
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    # accelerate leaves a module its class's forward as its own where it takes a hook away.
    forward = getattr(vars(module).get("forward", module.forward), "__func__", None)
    if any(hooks) or (forward is not kind.forward and not placed):
        raise TypeError(
            f"{name} has hooks or its own forward, which would be lost; remove them first"
        )
