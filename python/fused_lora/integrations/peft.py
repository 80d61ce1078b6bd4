"""PEFT models on these kernels, by the class of their LoRA layers alone.

Parameters, names, hooks and everything else of PEFT stay as they are: only what forward computes
with changes. What is not covered runs PEFT's own forward, and the reason is kept.
"""

import functools
import importlib
import os
import sys
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora.integrations.shared_input import observed
from fused_lora.names import named_modules
from fused_lora.ops import validation as check
from fused_lora.ops.dora_linear import dora_linear
from fused_lora.ops.lora_add import lora_add
from fused_lora.ops.lora_embedding import lora_embedding
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.ops.lora_linear_group import lora_linear_group
from fused_lora.ops.multi_lora_linear import multi_lora_linear
from fused_lora.ops.routing import AdapterRouting
from fused_lora.reference import AdapterSlots

BASE = "__base__"  # PEFT's name for rows without adapter
PEFT = "PEFT"  # the route of what is not covered


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


def _hooks(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _inner_reason(layer, x: Tensor, parts: list[torch.nn.Module], tensors: list[Tensor]):
    """Why a call that computes with these parts and tensors of the layer cannot run fused."""
    if any(_hooks(part) for part in parts):
        return "it has hooks on its inner layers, which a fused call would pass by"
    if not check.all_plain(x, *tensors):
        return "a tensor subclass, a sparse layout or forward-mode AD"
    return None


def _probability(layer, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0


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
        base = layer.get_base_layer()
        if type(base) is not torch.nn.Linear:
            return f"its base layer is a {type(base).__name__}, and not a plain nn.Linear"
        if layer.fan_in_fan_out:
            return "fan_in_fan_out: its weight is transposed"
        if base.weight.dtype not in check.DTYPES:
            return f"its weight is {base.weight.dtype}"
        return None

    @staticmethod
    def parts_reason(layer, name: str, dropped: bool) -> str | None:
        """Why what PEFT has put into this adapter cannot run fused."""
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
        known = layer.get_base_layer().weight.dtype, torch.float32
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
        base = layer.get_base_layer()
        parts, tensors = [base], [base.weight]
        for name in names:
            if reason := cls.adapter_reason(layer, name, dropped=not mixed):
                return reason
            parts += [layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]]
            tensors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
            if cls.is_dora(layer, name):
                parts.append(layer.lora_magnitude_vector[name])
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
        return None

    @staticmethod
    def usual(layer, x: Tensor) -> Tensor | None:
        """What forward gives, only where there is one plain adapter and none of the reasons above
        holds; else None.

        Most calls are such, and small ones last no longer than the reasons: one look at each part.
        """
        active, modules = layer.active_adapters, layer._modules
        if len(active) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
            return None
        (name,), base = active, modules["base_layer"]
        a, b, dropout = (
            modules[part]._modules.get(name) for part in ("lora_A", "lora_B", "lora_dropout")
        )
        linear, dropouts = torch.nn.Linear, (torch.nn.Identity, torch.nn.Dropout)
        if a is None or b is None or base is None or dropout is None:
            return None
        if not type(base) is type(a) is type(b) is linear or type(dropout) not in dropouts:
            return None
        if layer.fan_in_fan_out or _hooks(base) or _hooks(a) or _hooks(b) or _hooks(dropout):
            return None
        weight, lora_a, lora_b = (part._parameters.get("weight") for part in (base, a, b))
        if weight is None or lora_a is None or lora_b is None:
            return None
        if not check.all_plain(x, weight, lora_a, lora_b):
            return None
        known = weight.dtype, torch.float32
        if not (weight.dtype in check.DTYPES and lora_a.dtype in known and lora_b.dtype in known):
            return None
        if x.dtype != weight.dtype and not check.autocasting(x):
            return None
        p = dropout.p if dropout.training and type(dropout) is torch.nn.Dropout else 0.0
        bias: Tensor | None = base._parameters.get("bias")
        own, scale = b._parameters.get("bias"), layer.scaling[name]
        if folds := own is not None and _exact(x):
            bias = _with_own(bias, own, scale)
        y = lora_linear(x, weight, lora_a, lora_b, bias, scale=scale, dropout_p=p)
        return y if folds or own is None else _add_biases(y, layer, [name])

    @classmethod
    def forward(cls, layer, x: Tensor, names: list[str]) -> Tensor:
        """The base layer and the sum of these adapters."""
        if not names:
            return layer.base_layer(x)
        if cls.is_dora(layer, names[0]):
            return _dora(layer, x, names[0])
        # Side by side in one lora_linear they would be copies, which the backward would keep.
        (a, b, scale), *others = cls.tensors(layer, names)
        p, *drops = [_probability(layer, name) for name in names]
        bias, left = _folded(layer, x, names)
        y = lora_linear(x, layer.get_base_layer().weight, a, b, bias, scale=scale, dropout_p=p)
        for (a, b, scale), p in zip(others, drops, strict=True):
            y = lora_add(y, x, a, b, scale=scale, dropout_p=p)
        return _add_biases(y, layer, left)

    @staticmethod
    def tensors(layer, names: list[str]) -> list[tuple[Any, Any, Any]]:
        """[(A, B, scale)] of the adapters."""
        return [
            (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
            for name in names
        ]


def _dora_caching(layer) -> bool:
    from peft.tuners.lora import dora

    return getattr(dora, "ENABLE_DORA_CACHING", False) and not layer.training


def _exact(x: Tensor) -> bool:
    """Whether biases of lora_bias may be folded into the base layer's. In 16 bits they are added to
    the output: folded, they would be rounded once for all rows."""
    return x.dtype.itemsize >= 4 and not check.autocasting(x)


def _with_own(bias: Tensor | None, own: Tensor, scale: float | Tensor) -> Tensor:
    """bias + scale * own."""
    if bias is None:
        return own * scale
    if isinstance(scale, Tensor):  # for PEFT's hot swap
        return bias + own * scale
    return torch.add(bias, own, alpha=scale)


def _folded(layer, x: Tensor, names: list[str]) -> tuple[Tensor | None, list[str]]:
    """(the base layer's bias with those of lora_bias, the adapters of which it lacks them)."""
    bias = layer.get_base_layer().bias
    given = [name for name in names if layer.lora_B[name].bias is not None]
    if not _exact(x):
        return bias, given
    for name in given:
        bias = _with_own(bias, layer.lora_B[name].bias, layer.scaling[name])
    return bias, []


def _add_biases(y: Tensor, layer, names: list[str]) -> Tensor:
    """y with those of lora_bias, in place."""
    for name in names:
        y.add_(layer.lora_B[name].bias * layer.scaling[name])
    return y


def _dora(layer, x: Tensor, name: str) -> Tensor:
    """PEFT drops what DoRA scales, and that is the base product too; what was dropped of x goes
    through the base layer alone."""
    base, dropout = layer.get_base_layer(), layer.lora_dropout[name]
    dropping = layer.training and _probability(layer, name) > 0
    kept = dropout(x) if dropping else x
    ((a, b, scale),) = _LinearForm.tensors(layer, [name])
    magnitude = layer.lora_magnitude_vector[name].weight
    y = dora_linear(kept, base.weight, a, b, magnitude, base.bias, scale=scale)
    return y + F.linear(x - kept, base.weight) if dropping else y


def _together(layers: list[Any], x: Tensor) -> list[Tensor] | None:
    """What these layers make of x, in one call; None where one of them is not in a state for
    that."""
    form, projections = _LinearForm, []
    left: list[list[str]] = []
    for layer in layers:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        # What stands before a later layer's forward has not run yet.
        before = layer is not layers[0] and (layer._forward_pre_hooks or "forward" in vars(layer))
        if before or layer.disable_adapters or layer.merged or len(names) > 1:
            return None
        if form.static_reason(layer) or form.call_reason(layer, x, names, mixed=False):
            return None
        if any(form.is_dora(layer, name) or _probability(layer, name) for name in names):
            return None
        (adapter,) = form.tensors(layer, names) or [(None, None, 1.0)]
        bias, lacking = _folded(layer, x, names)
        projections.append((layer.get_base_layer().weight, bias, *adapter))
        left.append(lacking)
    weights, biases, lora_as, lora_bs, scales = map(list, zip(*projections, strict=True))
    ys = lora_linear_group(x, weights, lora_as, lora_bs, biases, scales=scales)
    return [_add_biases(*one) for one in zip(ys, layers, left, strict=True)]


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
            parts += [layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]]
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
        for name, (a, b, scale) in zip(names, cls.tensors(layer, names), strict=True):
            y = lora_add(y, x, a, b, scale=scale, dropout_p=_probability(layer, name))
        return _add_biases(
            y, layer, [name for name in names if layer.lora_B[name].bias is not None]
        )


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
        base = layer.get_base_layer()
        if type(base) is not torch.nn.Embedding:
            return f"its base layer is a {type(base).__name__}, and not a plain nn.Embedding"
        if base.weight.dtype not in check.DTYPES:
            return f"its weight is {base.weight.dtype}"
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
    def adapter_reason(layer, name: str) -> str | None:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
        for half in (layer.lora_embedding_A[name], layer.lora_embedding_B[name]):
            if half.dtype not in (layer.get_base_layer().weight.dtype, torch.float32):
                return f"adapter {name!r} is {half.dtype}"
        if getattr(layer, "input_fns", {}).get(name) is not None:
            return f"adapter {name!r} is split over devices (tensor parallel)"
        return None

    @classmethod
    def call_reason(cls, layer, ids: Tensor, names: list[str], mixed: bool) -> str | None:
        if mixed:
            return "a mixed batch of an embedding"
        base = layer.get_base_layer()
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
        base = layer.get_base_layer()
        (a, b, scale), *others = [
            (layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.scaling[name])
            for name in names
        ]
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


class _Accelerated:
    """What the accelerated classes put before PEFT's forward; each has its form."""

    FORM: Any

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer: Any = self
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
            y = shared.output(layer, x, _together)
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
            counts = vars(layer).setdefault("fused_lora_fallbacks", Counter())
            counts[reason] += 1
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
    reasons = [form.static_reason(layer), *(form.adapter_reason(layer, a) for a in adapters)]
    reason = next(filter(None, reasons), None)
    routes = sorted({form.route(layer, a) for a in adapters}) if reason is None else [PEFT]
    return LayerReport(name, reason, ", ".join(routes))


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
    a quantised layer, whose own kernel makes the base product, lora_add. Several active adapters
    are summed. The backend is that of fused_lora (see use_backend).

    What is not covered runs PEFT's own forward, and is counted with the reason in report.fallbacks:
    variants other than DoRA, DoRA beside other active adapters or over a quantised layer, other
    base layers, embeddings with max_norm, sparse or scale_grad_by_freq, mixed batches with
    lora_bias, of embeddings or over quantised layers, convolutions. With FUSED_LORA_STRICT=1 such a
    call raises RuntimeError instead, and so does accelerate itself, before it changes anything, for
    a layer of another class.

    sample, the keyword arguments of a call, lets layers that share x (q, k and v; gate and up) run
    by lora_linear_group while they have at most one active adapter each, no DoRA and no dropout in
    training. The model is called with it once, without gradients: a group is what got the same
    tensor in turn. A layer that is later called with another tensor than the first of its group
    computes for itself, and what the first computed for it is wasted. Under torch.compile there are
    no groups.

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
        layer.__class__ = classes.get(type(layer), type(layer))
        vars(layer).pop("fused_lora_group", None)
    groups = [] if sample is None else _group(model, layers, sample)
    return AccelerateReport(reports, layers, groups)


def restore(model: torch.nn.Module) -> None:
    """Undo accelerate: every layer runs PEFT's own forward again.

    Raises ValueError where there is no LoRA layer, ModuleNotFoundError without peft.
    """
    exact = {new: cls for cls, new in accelerated_classes().items()}
    for layer in _layers(model).values():
        if type(layer) in exact:
            layer.__class__ = exact[type(layer)]
            vars(layer).pop("fused_lora_fallbacks", None)
            vars(layer).pop("fused_lora_group", None)
