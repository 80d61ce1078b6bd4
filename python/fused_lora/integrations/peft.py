"""PEFT models on these kernels, by the class of their LoRA layers alone.

Parameters, names, hooks and everything else of PEFT stay as they are: only what forward computes
with changes. What is not covered runs PEFT's own forward, and the reason is kept.
"""

import functools
import importlib
import numbers
import os
import sys
import types
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fused_lora.integrations.shared_input import observed
from fused_lora.names import named_modules
from fused_lora.nn.checks import keep_unpacked_, kind_of, placement
from fused_lora.ops import dispatch
from fused_lora.ops import validation as check
from fused_lora.ops.dept_embedding import without_autocast
from fused_lora.ops.dora_linear import column_factor, dora_linear
from fused_lora.ops.lora_add import lora_add
from fused_lora.ops.lora_embedding import lora_embedding
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.ops.lora_linear_group import lora_linear_group
from fused_lora.ops.multi_lora_linear import multi_lora_linear
from fused_lora.ops.routing import AdapterRouting
from fused_lora.reference import AdapterSlots

BASE = "__base__"  # PEFT's name for rows without adapter
PEFT = "PEFT"  # the route of what is not covered
LARGEST_SCALE = torch.finfo(torch.float32).max


class LayerReport(NamedTuple):
    """One LoRA layer: its name, why it runs PEFT's own forward (None: it runs fused), and the ops
    that its adapters run by, or "PEFT"."""

    name: str
    reason: str | None
    route: str


class AccelerateReport:
    """What accelerate did: `layers`, `groups` (names of layers that share x and run by
    lora_linear_group), and a summary of them as text. The reasons are those that can be told before
    a call; `fallbacks` counts those of the calls that were made since."""

    def __init__(
        self, layers: list[LayerReport], modules: dict[str, Any], groups: list[tuple[str, ...]]
    ) -> None:
        self.layers, self._modules, self.groups = layers, modules, groups

    @property
    def fused(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.reason is None]

    @property
    def fallbacks(self) -> dict[str, Counter]:
        """{layer: {reason: calls}} of the fused layers that ran PEFT's own forward."""
        counts = {name: vars(m).get("fused_lora_fallbacks") for name, m in self._modules.items()}
        return {name: count for name, count in counts.items() if count}

    def __repr__(self) -> str:
        routes = Counter(layer.route for layer in self.layers if layer.reason is None)
        reasons = Counter(layer.reason for layer in self.layers if layer.reason)
        lines = [f"{len(self.fused)} of {len(self.layers)} LoRA layers run fused"]
        lines += [f"  {count} by {route}" for route, count in routes.items()]
        sizes = Counter(map(len, self.groups))
        lines += [f"  {n} groups of {size} that share x" for size, n in sizes.items()]
        lines += [f"  {count} run PEFT's forward: {why}" for why, count in reasons.items()]
        for name, count in self.fallbacks.items():
            lines += [f"  {name}, {n} calls: {why}" for why, n in count.items()]
        return "\n".join(lines)


def _strict() -> bool:
    return os.environ.get("FUSED_LORA_STRICT", "0") == "1"


def _is_own(forward, module: torch.nn.Module) -> bool:
    """Whether `forward` is that of the module's class, bound to it."""
    own = getattr(forward, "__func__", None) is type(module).forward
    return own and forward.__self__ is module


def _is_placed(module: torch.nn.Module) -> bool:
    """Whether the module's own forward is accelerate's, around that of its class."""
    forward, inner = vars(module)["forward"], vars(module).get("_old_forward")
    hooked = isinstance(forward, functools.partial) and placement(module) is not None
    return hooked and forward.func.__module__ == "accelerate.hooks" and _is_own(inner, module)


def _replaces(module: torch.nn.Module, device: torch.device) -> bool:
    """Whether the module's own forward does more than that of its class to tensors that are on
    `device`: what accelerate leaves where it takes a hook away does not, nor does the hook by which
    it keeps a module of a device_map on that device."""
    if _is_own(vars(module)["forward"], module):
        return False
    hook: Any = placement(module)
    return not (
        _is_placed(module)
        and kind_of(hook) == "accelerate.hooks.AlignDevicesHook"
        and not (hook.offload or hook.no_grad)
        and hook.execution_device is not None
        and torch.device(hook.execution_device) == device
    )


def _hooks(module: torch.nn.Module, device: torch.device) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in vars(module) and _replaces(module, device))
    )


HOOKED = "it has hooks on its inner layers, which a fused call would pass by"


def _inner_reason(layer, x: Tensor, parts: list[torch.nn.Module], tensors: list[Tensor]):
    """Why a call that computes with these parts and tensors of the layer cannot run fused."""
    if _has_any_global_hook():
        return "hooks on all modules (torch.nn.modules.module), which a fused call would pass by"
    if any(_hooks(part, x.device) for part in parts):
        return HOOKED
    if not check.all_plain(x, *tensors):
        return "a tensor subclass, a sparse layout or forward-mode AD"
    return None


def _probability(layer, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0


def _scale(value) -> float | Tensor | None:
    """An adapter's scale as the ops take it; None where it is not one finite real number. Of a
    tensor, which PEFT's hot swap makes of it, the value is not read."""
    if isinstance(value, Tensor):
        one = value.ndim < 2 and value.numel() == 1 and check.all_plain(value)
        if not one or value.is_complex() or value.dtype == torch.bool:
            return None
        value = value.reshape(())
        return value if value.is_floating_point() else value.float()
    if isinstance(value, numbers.Real) and abs(float(value)) <= LARGEST_SCALE:
        return float(value)
    return None


def _scale_reason(layer, name: str) -> str | None:
    if _scale(value := layer.scaling[name]) is not None:
        return None
    if isinstance(value, Tensor):
        return f"adapter {name!r} is scaled by a {value.dtype} tensor of shape {list(value.shape)}"
    return f"adapter {name!r} is scaled by {value!r}"


def _base_reason(layer, wanted: type) -> str | None:
    """Why the layer that PEFT adapts, which may be adapted by another method itself, cannot be
    passed by."""
    base = layer.base_layer
    if type(base) is not wanted:
        cls = getattr(base, "PEFT_CLASS", type(base))
        name = f"{cls.__module__}.{cls.__qualname__}"
        return f"its base layer is a {name}, and not a plain nn.{wanted.__name__}"
    if (dtype := layer.base_layer.weight.dtype) not in check.DTYPES:
        return f"its weight is {dtype}"
    return None


class _LinearForm:
    """How a peft.tuners.lora.layer.Linear runs fused, and why not."""

    ROUTES = "lora_linear", "dora_linear"

    @staticmethod
    def adapters(layer) -> Any:
        return layer.lora_A

    @staticmethod
    def is_dora(layer, name: str) -> bool:
        return type(layer.lora_variant.get(name)).__name__ == "DoraLinearVariant"

    @classmethod
    def route(cls, layer, name: str) -> str:
        return cls.ROUTES[cls.is_dora(layer, name)]

    @staticmethod
    def static_reason(layer) -> str | None:
        """Why no call of this layer can run fused."""
        if layer.fan_in_fan_out:
            return "fan_in_fan_out: its weight is transposed"
        return _base_reason(layer, torch.nn.Linear)

    @classmethod
    def parts(cls, layer, name: str) -> list[torch.nn.Module]:
        """The modules that a fused call with this adapter passes by."""
        found = [layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]]
        return [*found, layer.lora_magnitude_vector[name]] if cls.is_dora(layer, name) else found

    @staticmethod
    def parts_reason(layer, name: str, dropped: bool) -> str | None:
        """Why what PEFT has put into this adapter cannot run fused."""
        if reason := _scale_reason(layer, name):
            return reason
        for projection in (layer.lora_A[name], layer.lora_B[name]):
            if type(projection) is not torch.nn.Linear:
                return f"adapter {name!r} has a {type(projection).__name__}"
        dropout = layer.lora_dropout[name]
        if dropped and type(dropout) not in (torch.nn.Identity, torch.nn.Dropout):
            return f"adapter {name!r} has a {type(dropout).__name__}"
        return None

    @classmethod
    def adapter_reason(cls, layer, name: str, dropped: bool = True) -> str | None:
        """Why this adapter of the layer cannot run fused."""
        if name in layer.lora_variant and not cls.is_dora(layer, name):
            return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
        if reason := cls.parts_reason(layer, name, dropped):
            return reason
        known = layer.base_layer.weight.dtype, torch.float32
        for projection in (layer.lora_A[name], layer.lora_B[name]):
            if projection.weight.dtype not in known:
                return f"adapter {name!r} is {projection.weight.dtype}"
        if not cls.is_dora(layer, name):
            return None
        if layer.lora_B[name].bias is not None:
            return f"adapter {name!r} is DoRA with a bias (lora_bias)"
        if layer.ephemeral_gpu_offload:
            return f"adapter {name!r} is DoRA with ephemeral_gpu_offload"
        return None

    @classmethod
    def call_reason(cls, layer, x: Tensor, names: list[str], mixed: bool) -> str | None:
        """Why this call cannot run fused, for these adapters."""
        base = layer.base_layer
        parts, tensors = [base], [base.weight]
        for name in names:
            if reason := cls.adapter_reason(layer, name, dropped=not mixed):
                return reason
            parts += cls.parts(layer, name)
            tensors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
        if reason := _inner_reason(layer, x, parts, tensors):
            return reason
        if not check.autocasting(x) and x.dtype != base.weight.dtype:
            return f"x is {x.dtype} and the weight {base.weight.dtype}"
        if len(names) > 1 and any(cls.is_dora(layer, name) for name in names):
            return "several adapters, DoRA among them: it scales what came before it"
        if names and cls.is_dora(layer, names[0]) and _dora_caching(layer):
            return "PEFT's cache of DoRA's weights (DoraCaching), which its forward reads"
        if mixed and any(_probability(layer, name) for name in names):
            return "a mixed batch in training, with dropout"
        if mixed and any(layer.lora_B[name].bias is not None for name in names):
            return "a mixed batch, with lora_bias"
        if mixed and any(getattr(layer.scaling[name], "requires_grad", False) for name in names):
            return "a mixed batch, with a scale that requires a gradient"
        return None

    @staticmethod
    def look(layer, x: Tensor) -> tuple | None:
        """(weight, bias, A, B, the bias of B, scale, dropout_p) of a call, only where there is at
        most one adapter, a plain one, and none of the reasons above holds; else None. Without an
        adapter A and B are None.

        Most calls are such, and small ones last no longer than the reasons: one look at each part.
        """
        modules = layer._modules
        own = modules["lora_A"]._modules
        names = [name for name in layer.active_adapters if name in own]
        if len(names) > 1 or layer.disable_adapters or layer.merged or layer.fan_in_fan_out:
            return None
        linear, base, device = torch.nn.Linear, modules["base_layer"], x.device
        if type(base) is not linear or _hooks(base, device) or _has_any_global_hook():
            return None
        weight = base._parameters.get("weight")
        if weight is None or "bias" not in base._parameters or weight.dtype not in check.DTYPES:
            return None
        if x.dtype != weight.dtype and not check.autocasting(x):
            return None
        bias = base._parameters["bias"]
        if not names:
            plain = check.all_plain(x, weight)
            return (weight, bias, None, None, None, 1.0, 0.0) if plain else None
        (name,) = names
        a, b, dropout = (
            own[name],
            modules["lora_B"]._modules.get(name),
            modules["lora_dropout"]._modules.get(name),
        )
        if not type(a) is type(b) is linear or name in layer.lora_variant:
            return None
        if type(dropout) not in (torch.nn.Identity, torch.nn.Dropout):
            return None
        if _hooks(a, device) or _hooks(b, device) or _hooks(dropout, device):
            return None
        lora_a, lora_b = a._parameters.get("weight"), b._parameters.get("weight")
        if lora_a is None or lora_b is None or "bias" not in b._parameters:
            return None
        known = weight.dtype, torch.float32
        if not (check.all_plain(x, weight, lora_a, lora_b) and lora_a.dtype in known):
            return None
        scale = layer.scaling[name]
        if type(scale) is not float or not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
            scale = _scale(scale)
        if lora_b.dtype not in known or scale is None:
            return None
        p = dropout.p if dropout.training and type(dropout) is torch.nn.Dropout else 0.0
        return weight, bias, lora_a, lora_b, b._parameters["bias"], scale, p

    @classmethod
    def usual(cls, layer, x: Tensor) -> Tensor | None:
        """What forward gives where one look shows that nothing is in the way, else None."""
        found = cls.look(layer, x)
        if found is None or found[2] is None:
            return None
        weight, bias, lora_a, lora_b, own, scale, p = found
        if own is not None:
            bias, own = _folded(x, bias, own, scale)
        y = lora_linear(x, weight, lora_a, lora_b, bias, scale=scale, dropout_p=p)
        return y if own is None else _with_bias(y, own, scale)

    @classmethod
    def forward(cls, layer, x: Tensor, names: list[str]) -> Tensor:
        """The base layer and the sum of these adapters."""
        if not names:
            return layer.base_layer(x)
        if cls.is_dora(layer, names[0]):
            return _dora(layer, x, names[0])
        # Side by side in one lora_linear they would be copies, which the backward would keep.
        (a, b, first, scale), *others = cls.tensors(layer, names)
        p, *drops = [_probability(layer, name) for name in names]
        bias, left = _folded(x, layer.base_layer.bias, first, scale)
        y = lora_linear(x, layer.base_layer.weight, a, b, bias, scale=scale, dropout_p=p)
        y = _with_bias(y, left, scale)
        for (a, b, own, scale), p in zip(others, drops, strict=True):
            y = lora_add(y, x, a, b, scale=scale, dropout_p=p)
            y = _with_bias(y, own, scale)
        return y

    @staticmethod
    def tensors(layer, names: list[str]) -> list[tuple[Any, Any, Any, Any]]:
        """[(A, B, the bias of B, scale)] of the adapters."""
        return [
            (
                layer.lora_A[name].weight,
                layer.lora_B[name].weight,
                layer.lora_B[name].bias,
                _scale(layer.scaling[name]),
            )
            for name in names
        ]


def _dora_caching(layer) -> bool:
    from peft.tuners.lora import dora

    return getattr(dora, "ENABLE_DORA_CACHING", False) and not layer.training


def _folded(x: Tensor, bias: Tensor | None, own: Tensor | None, scale):
    """(the base layer's bias with that of lora_bias, what it lacks of that). In 16 bits it is added
    to the output: folded, it would be rounded once for all rows."""
    if own is None or x.dtype.itemsize < 4 or check.autocasting(x):
        return bias, own
    if bias is None:
        return own * scale, None
    if isinstance(scale, Tensor):  # for PEFT's hot swap
        return bias + own * scale, None
    return torch.add(bias, own, alpha=scale), None


def _with_bias(y: Tensor, own: Tensor | None, scale) -> Tensor:
    """y with a bias of lora_bias, in place."""
    return y if own is None else y.add_(own * scale)


def _dora(layer, x: Tensor, name: str) -> Tensor:
    """PEFT drops what DoRA adds to the base layer's output, c ⊙ (z + l) - z with the base product z
    and the adapter's l, and leaves that output whole."""
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    ((a, b, _, scale),) = _LinearForm.tensors(layer, [name])
    magnitude = layer.lora_magnitude_vector[name].weight
    if not (layer.training and _probability(layer, name) > 0):
        return dora_linear(x, base.weight, a, b, magnitude, base.bias, scale=scale)
    kept = dropout(x)
    with without_autocast(x):
        factor = column_factor(base.weight, a, b, magnitude, scale)
    y = F.linear(x, base.weight, base.bias)
    y = torch.addcmul(y, F.linear(kept, base.weight), factor - 1).to(y.dtype)
    return lora_add(y, kept, a, factor[:, None] * b, scale=scale)


def _together(layers: list[Any], x: Tensor) -> tuple[list[Tensor], list[tuple]] | None:
    """(what these layers make of x, in one call, and what each makes it of); None where one of them
    is not in a state for that."""
    looked = []
    for layer in layers:
        # What stands before a later layer's forward has not run yet.
        before = layer is not layers[0] and (
            layer._forward_pre_hooks or ("forward" in vars(layer) and _replaces(layer, x.device))
        )
        found = None if before else _LinearForm.look(layer, x)
        if found is None or found[-1] > 0:
            return None
        looked.append(found)
    weights, biases, lora_as, lora_bs, owns, scales, _ = map(list, zip(*looked, strict=True))
    folded = [_folded(x, *one) for one in zip(biases, owns, scales, strict=True)]
    biases, left = map(list, zip(*folded, strict=True))
    ys = lora_linear_group(x, weights, lora_as, lora_bs, biases, scales=scales)
    return [_with_bias(*one) for one in zip(ys, left, scales, strict=True)], looked


class _QuantisedForm(_LinearForm):
    """How PEFT's layers around a quantised one run fused, and why not: the base product by its own
    kernel, the adapters by lora_add."""

    @staticmethod
    def route(layer, name: str) -> str:
        return "lora_add"

    @staticmethod
    def static_reason(layer) -> str | None:
        return "fan_in_fan_out: its weight is transposed" if layer.fan_in_fan_out else None

    @classmethod
    def parts(cls, layer, name: str) -> list[torch.nn.Module]:
        return [layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]]

    @classmethod
    def adapter_reason(cls, layer, name: str, dropped: bool = True) -> str | None:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
        return cls.parts_reason(layer, name, dropped)

    @classmethod
    def call_reason(cls, layer, x: Tensor, names: list[str], mixed: bool) -> str | None:
        if mixed:
            return "a mixed batch over a quantised layer"
        parts: list[torch.nn.Module] = []
        tensors: list[Tensor] = []
        for name in names:
            if reason := cls.adapter_reason(layer, name):
                return reason
            parts += cls.parts(layer, name)
            tensors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
        if reason := _inner_reason(layer, x, parts, tensors):
            return reason
        if x.dtype not in check.DTYPES:
            return f"x is {x.dtype}"
        known = x.dtype, torch.float32
        if not check.autocasting(x) and (other := {t.dtype for t in tensors}.difference(known)):
            return f"x is {x.dtype} and an adapter {other.pop()}"
        return None

    @staticmethod
    def usual(layer, x: Tensor) -> Tensor | None:
        return None

    @classmethod
    def forward(cls, layer, x: Tensor, names: list[str]) -> Tensor:
        y = layer.base_layer(x)
        if not check.autocasting(x):
            x = x.to(y.dtype)  # what bitsandbytes gives back is not always of x's dtype
        for name, (a, b, own, scale) in zip(names, cls.tensors(layer, names), strict=True):
            y = lora_add(y, x, a, b, scale=scale, dropout_p=_probability(layer, name))
            y = _with_bias(y, own, scale)
        return y


class _EmbeddingForm:
    """How a peft.tuners.lora.layer.Embedding runs fused, and why not. PEFT drops nothing here."""

    @staticmethod
    def adapters(layer) -> Any:
        return layer.lora_embedding_A

    @staticmethod
    def route(layer, name: str) -> str:
        return "lora_embedding"

    @staticmethod
    def static_reason(layer) -> str | None:
        if reason := _base_reason(layer, torch.nn.Embedding):
            return reason
        base = layer.base_layer
        options = {
            "max_norm": base.max_norm is not None,
            "scale_grad_by_freq": base.scale_grad_by_freq,
            "sparse": base.sparse,
            "embed_scale": hasattr(base, "embed_scale"),  # which PEFT applies to its adapters
        }
        if found := [name for name, given in options.items() if given]:
            return f"its base layer has {' and '.join(found)}"
        return None

    @staticmethod
    def parts(layer, name: str) -> list[torch.nn.Module]:
        return [layer.base_layer]

    @staticmethod
    def adapter_reason(layer, name: str) -> str | None:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
        if reason := _scale_reason(layer, name):
            return reason
        for half in (layer.lora_embedding_A[name], layer.lora_embedding_B[name]):
            if half.dtype not in (layer.base_layer.weight.dtype, torch.float32):
                return f"adapter {name!r} is {half.dtype}"
        if getattr(layer, "input_fns", {}).get(name) is not None:
            return f"adapter {name!r} is split over devices (tensor parallel)"
        return None

    @classmethod
    def call_reason(cls, layer, ids: Tensor, names: list[str], mixed: bool) -> str | None:
        if mixed:
            return "a mixed batch of an embedding"
        base = layer.base_layer
        tensors = [base.weight]
        for name in names:
            if reason := cls.adapter_reason(layer, name):
                return reason
            tensors += [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
        return _inner_reason(layer, ids, [base], tensors)

    @staticmethod
    def usual(layer, ids: Tensor) -> Tensor | None:
        return None

    @staticmethod
    def forward(layer, ids: Tensor, names: list[str]) -> Tensor:
        if not names:
            return layer.base_layer(ids)
        base = layer.base_layer
        adapters: list[tuple[Any, Any, Any]] = [
            (
                layer.lora_embedding_A[name],
                layer.lora_embedding_B[name],
                _scale(layer.scaling[name]),
            )
            for name in names
        ]
        (a, b, scale), *others = adapters
        padding_idx = base.padding_idx
        y = lora_embedding(ids, base.weight, a, b, scale=scale, padding_idx=padding_idx)
        for a, b, scale in others:
            # As PEFT does it: side by side the adapters would be a copy of all their tables.
            h = F.embedding(ids, a.t(), padding_idx)
            y = (y + (h @ b.t()) * scale).to(y.dtype)
        return y


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
    base = layer.base_layer
    routing_of: Any = _routing
    constant: Any = _constant
    if dispatch.traced(x):  # what a trace makes must not outlive it
        routing_of, constant = _routing.__wrapped__, _constant.__wrapped__
    known, routing = routing_of(tuple(adapter_names), x.device)
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
    scales = [0.0 if name is None else _scale(layer.scaling[name]) for name in present]
    if any(isinstance(scale, Tensor) for scale in scales):  # for PEFT's hot swap
        scale = torch.stack([torch.as_tensor(scale, **like) for scale in scales])
    else:
        scale = constant(tuple(scales), torch.float32, x.device)
    slots = AdapterSlots(
        a_slots,
        bt_slots,
        constant(tuple(ranks), torch.int32, x.device),
        scale,
        torch.ones(len(present), R, **like),
    )
    return multi_lora_linear(x, base.weight, slots, routing, base.bias)


class _Accelerated:
    """What the accelerated classes put before PEFT's forward; each has its form."""

    FORM: Any
    PEFT_CLASS: type

    def _get_name(self) -> str:
        return self.PEFT_CLASS.__name__

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer: Any = self
        if not isinstance(self, _Accelerated):  # something kept this method over restore
            return type(layer).forward(layer, x, *args, **kwargs)
        alone = not (args or kwargs or "fused_lora_group" in vars(layer))
        if alone and not torch.compiler.is_compiling():
            y = self.FORM.usual(layer, x)
            if y is not None:
                return y
        mixed = kwargs.get("adapter_names")
        if layer.disable_adapters or (layer.merged and mixed is None):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        adapters = self.FORM.adapters(layer)
        if mixed is None:
            names = [name for name in layer.active_adapters if name in adapters]
        else:
            layer._check_forward_args(x, *args, **kwargs)
            names = sorted({name for name in mixed if name in adapters})
        others = [
            key for key, value in kwargs.items() if key != "adapter_names" and value is not None
        ]
        shared = vars(layer).get("fused_lora_group")
        if shared and mixed is None and not (args or others):
            y = shared.output(layer, x, self.FORM.look, _together)
            if y is None and not torch.compiler.is_compiling():
                y = self.FORM.usual(layer, x)
            if y is not None:
                return y
        if args or others:
            reason: str | None = f"it was called with more arguments: {others or len(args)}"
        else:
            reason = self.FORM.static_reason(layer)
            reason = reason or self.FORM.call_reason(layer, x, names, mixed is not None)
        if reason is not None:
            if _strict():
                raise RuntimeError(f"FUSED_LORA_STRICT=1, and a layer is not fused: {reason}")
            if not torch.compiler.is_compiling():
                vars(layer).setdefault("fused_lora_fallbacks", Counter())[reason] += 1
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if mixed is not None:
            return _fused_mixed(layer, x, mixed)
        return self.FORM.forward(layer, x, names)


# By the exact class of PEFT. Its modules for quantised layers are loaded with those layers alone.
FORMS = {
    ("layer", "Linear"): _LinearForm,
    ("layer", "Embedding"): _EmbeddingForm,
    ("bnb", "Linear4bit"): _QuantisedForm,
    ("bnb", "Linear8bitLt"): _QuantisedForm,
    ("torchao", "TorchaoLoraLinear"): _QuantisedForm,
}


@functools.cache
def _accelerated(cls: type, form: type) -> Any:
    name = f"Accelerated{cls.__name__}"
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{cls.__module__}.{cls.__name__} whose forward runs on the ops of fused_lora.",
        "FORM": form,
        "PEFT_CLASS": cls,
    }
    return type(name, (_Accelerated, cls), namespace)


def accelerated_classes() -> dict[type, Any]:
    """{exact class of PEFT: the class that its layers are given}, of the loaded ones."""
    import peft.tuners.lora.layer  # noqa: F401

    found = {}
    for (module, name), form in FORMS.items():
        cls = getattr(sys.modules.get(f"peft.tuners.lora.{module}"), name, None)
        if cls is not None:
            found[cls] = _accelerated(cls, form)
    return found


def __getattr__(name: str):
    """AcceleratedLinear and the others by name, as pickle asks for them."""
    for module, exact in FORMS:
        if name == f"Accelerated{exact}":
            importlib.import_module(f"peft.tuners.lora.{module}")
            return {cls.__name__: cls for cls in accelerated_classes().values()}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    try:
        from peft.tuners.lora.layer import LoraLayer
    except ImportError:
        raise ModuleNotFoundError("accelerate needs peft (pip install 'fused-lora[hf]')") from None
    found = {name: m for name, m in named_modules(model) if isinstance(m, LoraLayer)}
    if not found:
        raise ValueError("model has no LoRA layer of PEFT; use peft.get_peft_model first")
    return found


def _report(name: str, layer, form) -> LayerReport:
    if form is None:
        return LayerReport(name, f"{type(layer).__name__} of PEFT has no fused form", PEFT)
    adapters = list(form.adapters(layer))
    reason = form.static_reason(layer) or _bypass(layer)
    for adapter in adapters:
        reason = reason or form.adapter_reason(layer, adapter)
        reason = reason or _hooked_reason(form.parts(layer, adapter))
    routes = sorted({form.route(layer, a) for a in adapters}) if reason is None else [PEFT]
    return LayerReport(name, reason, ", ".join(routes))


def _bypass(layer) -> str | None:
    """Why calls of the layer need not come to its class's forward."""
    forward = vars(layer).get("forward")
    if forward is None or _is_own(forward, layer) or _is_placed(layer):
        return None
    return "it has a forward of its own, which need not come to that of its class"


def _hooked_reason(parts: list[torch.nn.Module]) -> str | None:
    """Whether there are hooks on these parts where all tensors are on one device."""
    devices = {t.device for part in parts for t in part.parameters()}
    device = next(iter(devices), torch.device("cpu"))
    return HOOKED if any(_hooks(part, device) for part in parts) else None


def _change_class(layer, cls: Any) -> None:
    """Give the layer another class, and also the forward that accelerate's hooks have kept."""
    kept = [name for name in ("forward", "_old_forward") if _is_own(vars(layer).get(name), layer)]
    layer.__class__ = cls
    for name in kept:
        vars(layer)[name] = types.MethodType(cls.forward, layer)


def _group(model: torch.nn.Module, layers: dict[str, Any], sample: dict[str, Any]):
    """Let layers that share x in a call with `sample` run together; returns their names."""
    names = {id(layer): name for name, layer in layers.items()}
    linear = [layer for layer in layers.values() if vars(type(layer)).get("FORM") is _LinearForm]
    groups = []
    for shared in observed(model, linear, sample):
        for layer in shared.layers:
            layer.fused_lora_group = shared
        groups.append(tuple(names[id(layer)] for layer in shared.layers))
    for layer in layers.values():
        vars(layer).pop("fused_lora_fallbacks", None)
    return groups


def accelerate(model: torch.nn.Module, sample: dict[str, Any] | None = None) -> AccelerateReport:
    """Let the LoRA layers of a PEFT model run on these kernels, in place; returns a report.

    Every exact Linear and Embedding of peft.tuners.lora.layer, Linear4bit and Linear8bitLt of its
    bnb and TorchaoLoraLinear of its torchao changes its class, and nothing else: parameters and
    their names, save_pretrained, set_adapter, disable_adapter, merging, adapters that are added
    later, and hooks on the layers stay PEFT's. Linear layers run by lora_linear, with DoRA by
    dora_linear, batches with adapter_names by multi_lora_linear; embeddings by lora_embedding; over
    a quantised layer, whose own kernel makes the base product, lora_add; a 4-bit weight stays as it
    was loaded, and is not packed for inference on a CPU. Several active adapters are summed. The
    backend is that of fused_lora (see use_backend).

    What is not covered runs PEFT's own forward, and is counted with the reason in report.fallbacks:
    variants other than DoRA, DoRA beside other active adapters or over a quantised layer, other
    base layers, those that another method of PEFT has adapted among them, hooks on inner layers
    (but accelerate's that have nothing to move), scales that are not one finite number, embeddings
    with max_norm, sparse or scale_grad_by_freq, mixed batches with lora_bias, of embeddings or over
    quantised layers, convolutions. With FUSED_LORA_STRICT=1 such a
    call raises RuntimeError instead, and so does accelerate itself, before it changes anything, for
    a layer of another class.

    sample, the keyword arguments of a call, lets layers that share x (q, k and v; gate and up) run
    by lora_linear_group while they have at most one active adapter each, no DoRA and no dropout in
    training. The model is called with it once, without gradients: a group is what got the same
    tensor in turn. A layer that is later called with another tensor than the first of its group, or
    that has changed since, computes for itself, and what the first computed for it is wasted. Under
    torch.compile and with inference tensors, whose changes nothing counts, there are no groups.

    Dropout draws its masks from fused_lora's generator of bits: the same rate, other elements than
    torch's would be; with DoRA they are torch's.

    Raises ValueError where there is no LoRA layer, ModuleNotFoundError without peft, RuntimeError
    as said.
    """
    layers = _layers(model)
    classes = accelerated_classes()
    forms = {cls: new.FORM for exact, new in classes.items() for cls in (exact, new)}
    reports = [_report(name, layer, forms.get(type(layer))) for name, layer in layers.items()]
    foreign = [one for one in reports if type(layers[one.name]) not in forms]
    if foreign and _strict():
        raise RuntimeError(f"FUSED_LORA_STRICT=1, and {foreign[0].name}: {foreign[0].reason}")
    for layer in layers.values():
        _change_class(layer, classes.get(type(layer), type(layer)))
        vars(layer).pop("fused_lora_group", None)
        if type(layer) in forms and keep_unpacked_(layer.base_layer):
            layer.fused_lora_packs = True
    groups = [] if sample is None else _group(model, layers, sample)
    return AccelerateReport(reports, layers, groups)


def restore(model: torch.nn.Module) -> None:
    """Undo accelerate: every layer runs PEFT's own forward again.

    Raises ValueError where there is no LoRA layer, ModuleNotFoundError without peft.
    """
    exact = {new: cls for cls, new in accelerated_classes().items()}
    for layer in _layers(model).values():
        if type(layer) in exact:
            _change_class(layer, exact[type(layer)])
            vars(layer).pop("fused_lora_fallbacks", None)
            vars(layer).pop("fused_lora_group", None)
            if vars(layer).pop("fused_lora_packs", False):
                layer.base_layer.support_avx512bf16_for_cpu = True
