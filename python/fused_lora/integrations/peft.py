"""PEFT models on these kernels, by the class of their LoRA layers alone.

Parameters, names, hooks and everything else of PEFT stay as they are: only what forward computes
with changes. What is not covered runs PEFT's own forward, and the reason is kept.
"""

import functools
import os
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.ops import validation as check
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.ops.multi_lora_linear import multi_lora_linear
from fused_lora.ops.routing import AdapterRouting
from fused_lora.reference import AdapterSlots

BASE = "__base__"  # PEFT's name for rows without adapter


class LayerReport(NamedTuple):
    """One LoRA layer: its name, and why it runs PEFT's own forward; None: it runs fused."""

    name: str
    reason: str | None


class AccelerateReport:
    """What accelerate did: `layers`, and a table of them as text. The reasons are those that can be
    told before a call; `fallbacks` counts those of the calls that were made since."""

    def __init__(self, layers: list[LayerReport], modules: dict[str, Any]) -> None:
        self.layers, self._modules = layers, modules

    @property
    def fused(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.reason is None]

    @property
    def fallbacks(self) -> dict[str, Counter]:
        """{layer: {reason: calls}} of the fused layers that ran PEFT's own forward."""
        counts = {name: vars(m).get("fused_lora_fallbacks") for name, m in self._modules.items()}
        return {name: count for name, count in counts.items() if count}

    def __repr__(self) -> str:
        reasons = Counter(layer.reason for layer in self.layers if layer.reason)
        lines = [f"{len(self.fused)} of {len(self.layers)} LoRA layers run fused"]
        lines += [f"  {count} run PEFT's forward: {why}" for why, count in reasons.items()]
        for name, count in self.fallbacks.items():
            lines += [f"  {name}, {n} calls: {why}" for why, n in count.items()]
        return "\n".join(lines)


def _static_reason(layer) -> str | None:
    """Why no call of this layer can run fused."""
    base = layer.get_base_layer()
    if type(base) is not torch.nn.Linear:
        return f"its base layer is a {type(base).__name__}, and not a plain nn.Linear"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: its weight is transposed"
    if base.weight.dtype not in check.DTYPES:
        return f"its weight is {base.weight.dtype}"
    return None


def _adapter_reason(layer, name: str, dropped: bool) -> str | None:
    """Why this adapter of the layer cannot run fused."""
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    if layer.lora_B[name].bias is not None:
        return f"adapter {name!r} has a bias (lora_bias)"
    for projection in (layer.lora_A[name], layer.lora_B[name]):
        if type(projection) is not torch.nn.Linear:
            return f"adapter {name!r} has a {type(projection).__name__}"
        if projection.weight.dtype not in (layer.get_base_layer().weight.dtype, torch.float32):
            return f"adapter {name!r} is {projection.weight.dtype}"
    dropout = layer.lora_dropout[name]
    if dropped and type(dropout) not in (torch.nn.Identity, torch.nn.Dropout):
        return f"adapter {name!r} has a {type(dropout).__name__}"
    return None


def _hooks(module: torch.nn.Module) -> bool:
    found = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return any(found) or bool(module._backward_pre_hooks) or "forward" in vars(module)


def _probability(layer, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0


def _call_reason(layer, x: Tensor, names: list[str], mixed: bool) -> str | None:
    """Why this call cannot run fused, for these adapters."""
    parts = [layer.get_base_layer()]
    for name in names:
        if reason := _adapter_reason(layer, name, dropped=not mixed):
            return reason
        parts += [layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]]
    if any(_hooks(part) for part in parts):
        return "it has hooks on its inner layers, which a fused call would pass by"
    if not check.autocasting(x) and x.dtype != parts[0].weight.dtype:
        return f"x is {x.dtype} and the weight {parts[0].weight.dtype}"
    drops = [_probability(layer, name) for name in names]
    if len(names) > 1 and any(drops):
        return "several adapters with dropout, each with a mask of its own"
    if mixed and any(drops):
        return "a mixed batch in training, with dropout"
    return None


def _fused(layer, x: Tensor, names: list[str]) -> Tensor:
    """The base layer and the sum of these adapters."""
    base = layer.get_base_layer()
    lora_a = [layer.lora_A[name].weight for name in names]
    lora_b = [layer.lora_B[name].weight for name in names]
    scales = [layer.scaling[name] for name in names]
    if len(names) == 1:
        return lora_linear(
            x, base.weight, lora_a[0], lora_b[0], base.bias, scale=scales[0],
            dropout_p=_probability(layer, names[0]),
        )  # fmt: skip
    # One adapter of the ranks of all, whose gate is each one's scale.
    like: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    gate = torch.cat([
        torch.as_tensor(scale, **like).expand(a.shape[0])
        for scale, a in zip(scales, lora_a, strict=True)
    ])  # fmt: skip
    return lora_linear(
        x, base.weight, torch.cat(lora_a), torch.cat(lora_b, 1), base.bias, scale=1.0, gate=gate
    )


# What is kept must not be an inference tensor: a later call may want gradients.
@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _routing(names: tuple[str, ...], device: torch.device) -> tuple[list[str], AdapterRouting]:
    """(the adapters in the order of their ids, the routing), the same for every layer."""
    known = sorted({name for name in names if name != BASE})
    ids = torch.tensor([known.index(name) if name != BASE else -1 for name in names])
    return known, AdapterRouting(ids.to(device), max(1, len(known)))


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy to a GPU waits for the host: the same values are copied once."""
    return torch.tensor(values, dtype=dtype, device=device)


def _fused_mixed(layer, x: Tensor, adapter_names: list[str]) -> Tensor:
    """Every row of the batch with its own adapter; one that the layer lacks is the base."""
    base = layer.get_base_layer()
    known, routing = _routing(tuple(adapter_names), x.device)
    present = [name if name in layer.lora_A else None for name in known] or [None]
    N, K = base.weight.shape
    ranks = [0 if name is None else layer.lora_A[name].weight.shape[0] for name in present]
    R = max(1, *ranks)
    dtypes = {layer.lora_A[name].weight.dtype for name in present if name is not None}
    dtype = next(iter(dtypes), base.weight.dtype) if len(dtypes) < 2 else torch.float32
    # Copied at every call: PEFT changes weights in place where no counter tells.
    a_slots = x.new_zeros(len(present), R, K, dtype=dtype)
    bt_slots = x.new_zeros(len(present), R, N, dtype=dtype)
    for i, (name, rank) in enumerate(zip(present, ranks, strict=True)):
        if name is not None:
            a_slots[i, :rank] = layer.lora_A[name].weight
            bt_slots[i, :rank] = layer.lora_B[name].weight.t()
    like: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    scales = [0.0 if name is None else layer.scaling[name] for name in present]
    if any(isinstance(scale, Tensor) for scale in scales):  # for PEFT's hot swap
        scale = torch.stack([torch.as_tensor(scale, **like) for scale in scales])
    else:
        scale = _constant(tuple(scales), torch.float32, x.device)
    slots = AdapterSlots(
        a_slots,
        bt_slots,
        _constant(tuple(ranks), torch.int32, x.device),
        scale,
        torch.ones(len(present), R, **like),
    )
    return multi_lora_linear(x, base.weight, slots, routing, base.bias)


@functools.cache
def accelerated_class() -> type:
    """The class that an exact peft.tuners.lora.layer.Linear is given."""
    from peft.tuners.lora.layer import Linear

    class AcceleratedLinear(Linear):
        """peft.tuners.lora.layer.Linear whose forward runs on the kernels of fused_lora."""

        __qualname__ = "AcceleratedLinear"

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            if self.disable_adapters or (self.merged and kwargs.get("adapter_names") is None):
                return super().forward(x, *args, **kwargs)
            mixed = kwargs.get("adapter_names")
            if mixed is None:
                names = [name for name in self.active_adapters if name in self.lora_A]
            else:
                self._check_forward_args(x, *args, **kwargs)
                names = sorted({name for name in mixed if name in self.lora_A})
            others = [
                key for key, value in kwargs.items() if key != "adapter_names" and value is not None
            ]
            if args or others:
                reason: str | None = f"it was called with more arguments: {others or len(args)}"
            else:
                reason = _static_reason(self) or _call_reason(self, x, names, mixed is not None)
            if reason is not None:
                if os.environ.get("FUSED_LORA_STRICT", "0") == "1":
                    raise RuntimeError(f"FUSED_LORA_STRICT=1, and a layer is not fused: {reason}")
                counts = vars(self).setdefault("fused_lora_fallbacks", Counter())
                counts[reason] += 1
                return super().forward(x, *args, **kwargs)
            if mixed is not None:
                return _fused_mixed(self, x, mixed)
            return _fused(self, x, names) if names else self.base_layer(x)

    return AcceleratedLinear


def __getattr__(name: str):
    """AcceleratedLinear by its name, as pickle asks for it."""
    if name == "AcceleratedLinear":
        return accelerated_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    try:
        from peft.tuners.lora.layer import LoraLayer
    except ImportError:
        raise ModuleNotFoundError("accelerate needs peft (pip install 'fused-lora[hf]')") from None
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not found:
        raise ValueError("model has no LoRA layer of PEFT; use peft.get_peft_model first")
    return found


def accelerate(model: torch.nn.Module) -> AccelerateReport:
    """Let the LoRA layers of a PEFT model run on these kernels, in place; returns a report.

    Every exact peft.tuners.lora.layer.Linear changes its class, and nothing else: parameters and
    their names, save_pretrained, set_adapter, disable_adapter, merging, adapters that are added
    later, and hooks on the layers stay PEFT's. Several active adapters are summed; a batch with
    adapter_names runs by multi_lora_linear. The backend is that of fused_lora (see use_backend).

    What is not covered runs PEFT's own forward, and is counted with the reason in
    report.fallbacks: DoRA and other variants, lora_bias, base layers that are not a plain
    nn.Linear, embeddings and convolutions, several active adapters with dropout. With
    FUSED_LORA_STRICT=1 it raises RuntimeError instead.

    Dropout draws its masks from fused_lora's generator of bits: the same rate, other elements than
    torch's would be.

    Raises ValueError where there is no LoRA layer, ModuleNotFoundError without peft.
    """
    layers = _layers(model)
    from peft.tuners.lora.layer import Linear

    reports = []
    for name, layer in layers.items():
        exact = type(layer) in (Linear, accelerated_class())
        reason = None if exact else f"{type(layer).__name__} of PEFT has no fused form"
        if exact:
            reason = _static_reason(layer)
            for adapter in layer.lora_A:
                reason = reason or _adapter_reason(layer, adapter, dropped=True)
            layer.__class__ = accelerated_class()
        reports.append(LayerReport(name, reason))
    return AccelerateReport(reports, layers)


def restore(model: torch.nn.Module) -> None:
    """Undo accelerate: every layer runs PEFT's own forward again.

    Raises ValueError where there is no LoRA layer, ModuleNotFoundError without peft.
    """
    from_accelerated = accelerated_class()
    for layer in _layers(model).values():
        if type(layer) is from_accelerated:
            layer.__class__ = from_accelerated.__mro__[1]
            vars(layer).pop("fused_lora_fallbacks", None)
