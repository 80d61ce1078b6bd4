"""Cutting away the ranks whose gate is zero (SoRA, arXiv 2311.11696, section 3.3; AdaLoRA)."""

import copy
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_lora.inject import LoRAConfig
from fused_lora.names import check_takes_parameters, named_modules, unwrapped
from fused_lora.nn.adalora import AdaLoRALinear
from fused_lora.nn.adapter import ADAPTED
from fused_lora.nn.checks import check_choice, kind_of
from fused_lora.nn.linear import LoRALinear, SoRALinear
from fused_lora.ops import validation as check
from fused_lora.optim.gates import named_gates


class LayerRank(NamedTuple):
    """One layer: its rank before and after, and the sizes of its weight [N, K]."""

    name: str
    before: int
    after: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class PruneReport:
    """What prune did: `layers`, and a table of them as text."""

    layers: list[LayerRank]
    keep_gates: bool

    def parameters(self, rank: str) -> int:
        """Parameters of the adapters with rank "before" or "after"; a gate counts where it is."""
        gated = rank == "before" or self.keep_gates
        return sum(
            getattr(layer, rank) * (layer.in_features + layer.out_features + gated)
            for layer in self.layers
        )

    def __str__(self) -> str:
        before, after = sum(x.before for x in self.layers), sum(x.after for x in self.layers)
        lines = [
            f"{after} of {before} ranks kept in {len(self.layers)} layers, "
            f"{self.parameters('after'):,} of {self.parameters('before'):,} parameters"
        ]
        width = max(len(layer.name) for layer in self.layers)
        lines += [f"  {x.name:{width}}  {x.before:4} -> {x.after}" for x in self.layers]
        return "\n".join(lines)


class _Cut(NamedTuple):
    """What becomes of one layer; no tensors where no rank is left."""

    layer: SoRALinear
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor | None


def _check(model, keep_gates: bool) -> dict[str, SoRALinear]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_takes_parameters("prune", model, reduced=False)
    gated = named_gates(model)
    layers: dict[str, SoRALinear] = {n: m for n, m in named_modules(model) if n in gated}
    if not layers:
        raise ValueError("model has no SoRALinear; LoRAConfig(gate=True) makes them")
    for name, layer in layers.items():
        if type(layer) not in (SoRALinear, AdaLoRALinear):
            raise TypeError(
                f"{name!r} is a {kind_of(layer)}; only a plain SoRALinear or AdaLoRALinear can "
                f"be cut, because what a subclass computes is not known"
            )
        if keep_gates and type(layer) is AdaLoRALinear:
            raise ValueError(
                f"keep_gates is for SoRA, and {name!r} is an AdaLoRALinear, whose RankAllocator "
                f"counts the ranks it began with; prune when training is done"
            )
        if layer.merged:
            raise RuntimeError(f"{name!r} is merged; call unmerge() before pruning")
        for own in ("lora_a", "lora_b", "gate"):
            t = getattr(layer, own)
            check.check_tensor("prune", f"{name}.{own}", t)
            if t.is_meta:
                raise ValueError(f"prune: {name}.{own} is on the meta device and has no values")
    return layers


def _cut(name: str, layer: SoRALinear, keep_gates: bool) -> _Cut:
    """A' = A[kept], and B' = B[:, kept] with the gate, or B' = round(B[:, kept] diag(g[kept]))."""
    gate = layer.gate.detach()
    if not torch.isfinite(gate).all():
        raise ValueError(f"prune: {name}.gate has values that are not finite; it cannot be cut")
    kept = gate.nonzero().flatten()
    a = layer.lora_a.detach()[kept]
    b = layer.lora_b.detach()[:, kept]
    if keep_gates:
        return _Cut(layer, a, b, gate[kept])
    wide = b.to(torch.promote_types(b.dtype, torch.float32))
    folded = (wide * gate[kept]).to(b.dtype)
    if not torch.isfinite(folded[torch.isfinite(b)]).all():
        raise ValueError(
            f"prune: {name}.lora_b times its gate leaves the range of {check.names([b.dtype])}; "
            f"keep fp32 masters (adapter_dtype=torch.float32)"
        )
    return _Cut(layer, a, folded, None)


def _apply(cut: _Cut) -> None:
    """The module stays the same object, so that its places in the model, its hooks, its mode and
    what else hangs on it stay. Only its class and its adapter change."""
    layer, rank, scale = cut.layer, len(cut.lora_a), cut.layer.scale
    if rank == 0:
        _remove_adapter(layer)
        return
    values = {"lora_a": cut.lora_a, "lora_b": cut.lora_b}
    if cut.gate is None:
        layer.register_parameter("gate", None)
        for name in ("gate_init", "scaling"):  # of SoRALinear, of AdaLoRALinear
            vars(layer).pop(name, None)
        layer.__class__ = LoRALinear  # type: ignore[assignment]
    else:
        values["gate"] = cut.gate
    for name, value in values.items():
        needs = getattr(layer, name).requires_grad
        setattr(layer, name, Parameter(value.contiguous(), requires_grad=needs))
    layer.r, layer.use_rslora = rank, False
    layer.lora_alpha, layer.scale = scale * rank, scale


def _remove_adapter(layer: SoRALinear) -> None:
    """What is left has the attributes of an nn.Linear, and those that others hung on it."""
    for name in ("lora_a", "lora_b", "gate"):
        del layer._parameters[name]
    plain = vars(torch.nn.Linear(1, 1, device="meta"))
    for name in set(vars(type(layer)(1, 1, device="meta", r=1))) - set(plain):
        delattr(layer, name)
    layer.__class__ = torch.nn.Linear  # type: ignore[assignment]


def _config_of_what_is_left(config: LoRAConfig, model, keep_gates: bool) -> LoRAConfig | None:
    """What inject makes the pruned layers from; None where no adapter is left."""
    layers = {name: m for name, m in named_modules(model) if isinstance(m, ADAPTED)}
    if not layers:
        return None
    patterns = {"^" + re.escape(name): m for name, m in layers.items()}
    return replace(
        copy.deepcopy(config),
        target_modules="|".join(map(re.escape, layers)),
        gate=keep_gates,
        adalora=False,
        adalora_scaling="plain",
        use_rslora=False,
        rank_pattern={key: m.r for key, m in patterns.items()},
        alpha_pattern={key: m.scale * m.r for key, m in patterns.items()},
    )


@torch.no_grad()
def prune(model: torch.nn.Module, *, keep_gates: bool = False) -> PruneReport:
    """Cut away every rank whose gate is zero, in place, and fold the gates that are left into B.

        A' = A[g != 0],  B' = round(B[:, g != 0] diag(g[g != 0])),  s' = s

    (SoRA, arXiv 2311.11696). Each SoRALinear of model becomes a LoRALinear of the rank that is
    left, with lora_alpha = s r' (and no use_rslora), so that lora_alpha / r' = s; one of rank 0
    becomes the frozen nn.Linear alone. So does each AdaLoRALinear, whose gate is its lambdas. The
    product with g is made in fp32 (fp64 for fp64) and rounded once to B's dtype, so the model
    computes what it did, within that rounding.

    The modules stay the same objects: shared ones, hooks, training mode, devices, dtypes, fp32
    masters and requires_grad stay as they are; their A and B are new Parameters without a gradient.
    So make optimisers anew, and what else holds parameters (DDP).

    keep_gates: for pruning between phases of SoRA's training: the layers stay SoRALinear, of the
        rank that is left, with their gates, and training goes on. A layer without any gate left
        loses its adapter here too.

    model.fused_lora_config, where inject left one, is made to describe what is left.

    Returns a PruneReport, which lists each layer's rank before and after. Nothing is changed where
    one of these is raised: TypeError for a model that is no module, another subclass of SoRALinear,
    or a LoRAAdapter with a gate; ValueError where there is no SoRALinear, for a gate that is not
    finite, for meta tensors, for an AdaLoRALinear with keep_gates, or where B diag(g) overflows B's
    dtype; RuntimeError where a layer is merged, or the model is in FullyShardedDataParallel;
    NotImplementedError for tensor subclasses. It waits for the device.
    """
    check_choice("keep_gates", keep_gates, (True, False))
    layers = _check(model, keep_gates)
    cuts = {name: _cut(name, layer, keep_gates) for name, layer in layers.items()}
    ranks = [
        LayerRank(name, cut.layer.r, len(cut.lora_a), cut.layer.in_features, cut.layer.out_features)
        for name, cut in cuts.items()
    ]
    for cut in cuts.values():
        _apply(cut)
    report = PruneReport(ranks, keep_gates)
    bare = unwrapped(model)
    config = getattr(bare, "fused_lora_config", None)
    if isinstance(config, LoRAConfig):
        left = _config_of_what_is_left(config, model, keep_gates)
        if left is None:
            del bare.fused_lora_config
        else:
            bare.fused_lora_config = left  # type: ignore[assignment]
    return report
