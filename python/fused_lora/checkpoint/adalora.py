"""AdaLoRA's adapters in PEFT's format, peft_type "ADALORA".

A layer has lora_A [k, K], lora_B [N, k] and lora_E [k, 1]: Q, P and lambda of the k triplets that
were kept. rank_pattern says which these are of the init_r at the start, {"layer.lora_E": booleans},
and k may be zero. The scale stays lora_alpha / (init_r + 1e-5), whatever k is.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_lora.checkpoint.formats import (
    UNSUPPORTED,
    AdapterWeights,
    LoRAReader,
    check_alpha,
    check_rank,
)
from fused_lora.checkpoint.reading import (
    PREFIX,
    Adapter,
    check_cast,
    find_base,
    read_folder,
    take_base,
    taken_base,
)
from fused_lora.files import few, shown, shown_name, write_files
from fused_lora.inject import LoRAConfig, inject, nearest
from fused_lora.names import clean_name, named_modules
from fused_lora.nn.adalora import AdaLoRALinear
from fused_lora.nn.adapter import ADAPTED, LoRAAdapter
from fused_lora.nn.checks import check_probability
from fused_lora.nn.embedding import LoRAEmbedding
from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.sharded import check_whole
from fused_lora.optim.adalora import RankAllocator

PEFT_TYPE = "ADALORA"
DTYPES = torch.float32, torch.float16, torch.bfloat16
_FORMS = {"lora_A": "[{}, K]", "lora_B": "[N, {}]", "lora_E": "[{}, 1]"}


class AdaLoRAReader(LoRAReader):
    """What a config of peft_type "ADALORA" says of the tensors of its layers; it is checked first.

    r, alpha_pattern and use_rslora are not looked at, as PEFT's AdaLoRA looks at none of them.
    """

    endings: ClassVar = {"lora_A": ".lora_A", "lora_B": ".lora_B", "lora_E": ".lora_E"}
    embedding_endings: ClassVar = {}

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        for field, (plain, reason) in UNSUPPORTED.items():
            if config.get(field) not in plain:
                raise NotImplementedError(
                    f"{path}: {field}={shown(config[field])} is not supported: {reason}"
                )
        for field in ("bias", "modules_to_save"):
            if config.get(field) not in (None, "none", []):
                raise NotImplementedError(
                    f"{path}: {field}={shown(config[field])} is not supported"
                )
        check_rank(f"{path}: init_r", config.get("init_r"))
        check_alpha(f"{path}: lora_alpha", config.get("lora_alpha"))
        self.init_r, self.alpha = config["init_r"], config["lora_alpha"]
        patterns = config.get("rank_pattern") or {}
        if not isinstance(patterns, dict):
            raise TypeError(
                f"{path}: rank_pattern must be an object, got {type(patterns).__name__}"
            )
        self._masks: dict[str, list[bool]] = {}
        for key, mask in patterns.items():
            module, ending, adapter = key.rpartition(".lora_E")
            if not module or "." in adapter.removeprefix("."):
                raise ValueError(
                    f"{path}: rank_pattern has the key {shown(key)}, which is no lora_E"
                )
            if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
                raise TypeError(f"{path}: rank_pattern[{shown(key)}] must be a list of booleans")
            if len(mask) != self.init_r:
                raise ValueError(
                    f"{path}: rank_pattern[{shown(key)}] must have init_r = {self.init_r} "
                    f"entries, got {len(mask)}"
                )
            self._masks[clean_name(module)] = mask
        check_probability(f"{path}: lora_dropout", config.get("lora_dropout") or 0.0)

    def mask(self, module: str) -> list[bool]:
        """Which of the triplets at the start the module still has."""
        return self._masks.get(module, [True] * self.init_r)

    def check_modules(self, path: Path, layers: Collection[str]) -> None:
        if strangers := sorted(set(self._masks).difference(layers)):
            raise KeyError(
                f"{path}: rank_pattern names {few(strangers)}, of which no tensor exists"
            )

    def check_shapes(
        self, path: Path, module: str, keys: dict[str, str], shapes: dict[str, list[int]]
    ) -> None:
        """Hold the tensors of a layer, {part: key} and {part: shape}, to the config."""
        k = sum(self._masks[module]) if module in self._masks else self.init_r
        for part, shape in shapes.items():
            wide = {"lora_A": [k, *shape[1:]], "lora_B": [*shape[:1], k], "lora_E": [k, 1]}[part]
            if len(shape) != 2 or shape != wide:
                raise ValueError(
                    f"{path}: {shown_name(keys[part])} must have shape {_FORMS[part].format(k)}, "
                    f"got {shown(shape)}"
                )

    def weights(self, module: str, tensors: dict[str, Tensor]) -> AdapterWeights:
        a, b, e = (tensors[part] for part in self.endings)
        # PEFT takes the rank for a lora_alpha that is not positive.
        alpha = self.alpha if self.alpha > 0 else a.shape[0]
        return AdapterWeights(a, b, alpha / (self.init_r + 1e-5), e[:, 0])


ADALORA = {PEFT_TYPE: AdaLoRAReader}


def read_adalora(folder: str | Path) -> dict[str, AdapterWeights]:
    """{module name: AdapterWeights} of a PEFT AdaLoRA folder: what each layer still has.

    lora_a is Q [k, K], lora_b is P [N, k] and gate is lambda [k], of the k triplets kept; a layer
    that kept none is left out, as it adds nothing. The scale is lora_alpha / (init_r + 1e-5).

    Raises what fused_lora.checkpoint.read_adapter raises, for the same reasons.
    """
    layers = read_folder(folder, readers=ADALORA).layers
    return {module: weights for module, weights in layers.items() if weights.lora_a.shape[0]}


def load_adalora(model: torch.nn.Module, folder: str | Path) -> torch.nn.Module:
    """Read a PEFT AdaLoRA folder into model; returns model.

    A model without adapters gets AdaLoRALinear of rank init_r in the layers of the folder, as by
    fl.inject with adalora_scaling="peft"; A and B stay fp32 where the file has them so. A model
    with AdaLoRALinear in those layers, of rank init_r, takes the values into the Parameters it has.
    Triplets that were cut get a lambda of zero and keep the P and Q that the layer has, so that
    they can come back when training goes on.

    Raises, before model is changed: what read_adalora raises; ValueError for layers and shapes
    that do not fit, with the nearest names; TypeError for layers of another kind.
    """
    take_adalora(model, folder, read_folder(folder, readers=ADALORA))
    return model


@torch.no_grad()
def take_adalora(model: torch.nn.Module, folder: str | Path, adapter: Adapter) -> None:
    """What load_adalora does with what it has read."""
    found, config = adapter.layers, adapter.config
    reader: AdaLoRAReader = adapter.reader  # type: ignore[assignment]
    modules = dict(named_modules(model))
    base = find_base(folder, model, adapter, load=True)
    for name, weights in found.items():
        linear = modules.get(name)
        if not isinstance(linear, torch.nn.Linear):
            names = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear)]
            raise ValueError(
                f"{folder}: the model has no nn.Linear {shown(name)}; nearest: "
                f"{nearest([name], names)}"
            )
        K, N = weights.lora_a.shape[1], weights.lora_b.shape[0]
        if (N, K) != tuple(linear.weight.shape):
            raise ValueError(
                f"{folder}: {name} is of a weight of shape {[N, K]}, the model's has "
                f"{list(linear.weight.shape)}"
            )
    adapted = {name: m for name, m in modules.items() if isinstance(m, ADAPTED)}
    if adapted:
        _check_adapted(folder, adapted, set(found), reader.init_r)
        for name, weights in found.items():
            check_whole(f"{folder}", name, modules[name])
            for part in ("lora_a", "lora_b"):
                t: Tensor = getattr(weights, part)
                check_cast(f"{folder}: {part} of {name}", t, getattr(modules[name], part).dtype)
    else:
        wide = any(
            torch.promote_types(w.lora_a.dtype, modules[n].weight.dtype) != modules[n].weight.dtype
            for n, w in found.items()
        )
        targets = "|".join(map(re.escape, found))
        plan = LoRAConfig(
            r=reader.init_r, lora_alpha=reader.alpha, target_modules=targets, adalora=True,
            adalora_scaling="peft", lora_dropout=config.get("lora_dropout") or 0.0,
        )  # fmt: skip
        inject(model, plan, adapter_dtype=torch.float32 if wide else None)
        modules = dict(named_modules(model))
    for name, weights in found.items():
        _take(modules[name], reader.mask(name), weights)
    take_base(model, adapter, base)


def _take(layer, mask: list[bool], weights) -> None:
    """Spread the triplets that are left over the places they had."""
    kept = torch.tensor(mask, device=layer.gate.device)
    a, b, gate = layer.lora_a.clone(), layer.lora_b.clone(), torch.zeros_like(layer.gate)
    a[kept], b[:, kept], gate[kept] = (
        weights.lora_a.to(a),
        weights.lora_b.to(b),
        weights.gate.to(gate),
    )
    layer.swap(a, b, scale=weights.scale, gate=gate)


def _check_adapted(
    folder, adapted: dict[str, LoRALinear | LoRAAdapter], found: set[str], init_r: int
) -> None:
    for name, layer in adapted.items():
        if not isinstance(layer, AdaLoRALinear):
            raise TypeError(f"{folder}: {name} is a {type(layer).__name__}, not an AdaLoRALinear")
        if layer.r != init_r:
            raise ValueError(f"{folder}: init_r is {init_r}, and {name} has rank {layer.r}")
    if set(adapted) != found:
        raise ValueError(
            f"{folder}: its layers are not the model's: without "
            f"{few(sorted(set(adapted) - found))}, and with {few(sorted(found - set(adapted)))}"
        )


def _common(values: dict[str, Any], what: str) -> Any:
    if len(set(values.values())) > 1:
        (one, a), (two, b) = list({v: (n, v) for n, v in values.items()}.values())[:2]
        raise ValueError(
            f"PEFT's AdaLoRA has one {what} for all layers: {one} has {a} and {two} has {b}"
        )
    return next(iter(values.values()))


@torch.no_grad()
def save_adalora(
    model: torch.nn.Module,
    folder: str | Path,
    *,
    cut: bool = True,
    allocator: RankAllocator | None = None,
) -> None:
    """Write the AdaLoRALinear layers of model into folder, as PEFT writes and loads them.

    cut: triplets whose lambda is zero are left out, and rank_pattern says which; a layer may keep
        none. False keeps all, without a rank_pattern, as PEFT does before its first choice: for a
        model that is to be trained from there, all of whose lambdas may still be zero.
    allocator: its schedule is written, for PEFT to train with; without one it is of one step.

    Raises before anything is written: ValueError where there is no AdaLoRALinear, where another
    adapter is beside, where ranks or scales differ between layers, which PEFT has one of, for a
    scale that is not positive, which PEFT replaces, and for NaN or infinity; TypeError for dtypes
    other than fp32, fp16 and bf16.
    """
    kinds = (*ADAPTED, LoRAEmbedding)
    adapted = {name: m for name, m in named_modules(model) if isinstance(m, kinds)}
    layers = {name: m for name, m in adapted.items() if isinstance(m, AdaLoRALinear)}
    if not layers:
        raise ValueError("model has no AdaLoRALinear; there is no adapter to save")
    if others := [name for name in adapted if name not in layers]:
        raise ValueError(f"model has other adapters than AdaLoRALinear: {', '.join(others)}")
    r = _common({name: layer.r for name, layer in layers.items()}, "init_r")
    alpha = _common({name: _peft_alpha(layer) for name, layer in layers.items()}, "lora_alpha")
    if alpha <= 0:
        raise ValueError(f"lora_alpha must be positive, got {alpha}: PEFT replaces it by the rank")
    tensors, rank_pattern = {}, {}
    for name, layer in layers.items():
        check_whole("save_adalora", name, layer)
        kept = (layer.gate != 0) if cut else torch.ones_like(layer.gate, dtype=torch.bool)
        parts = layer.lora_a[kept], layer.lora_b[:, kept], layer.gate[kept, None]
        for ending, t in zip(AdaLoRAReader.endings.values(), parts, strict=True):
            if t.dtype not in DTYPES:
                raise TypeError(f"{name}{ending} must be fp32, fp16 or bf16, got {t.dtype}")
            if not bool(t.isfinite().all()):
                raise ValueError(f"{name}{ending} has values that are NaN or infinite")
            tensors[f"{PREFIX}{name}{ending}"] = t.cpu().contiguous()
        rank_pattern[f"{name}.lora_E"] = kept.tolist()
    for name, t in taken_base(model).items():
        module, _, own = name.rpartition(".")
        key = f"{module}.base_layer.{own}" if module in layers else name
        tensors[PREFIX + key] = t.detach().to("cpu", copy=True).contiguous()
    config = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "init_r": r,
        "lora_alpha": alpha,
        "lora_dropout": _common({n: m.lora_dropout for n, m in layers.items()}, "lora_dropout"),
        "target_modules": list(layers),
        "exclude_modules": _ends_alike(model, set(layers)),
        "rank_pattern": None if all(map(all, rank_pattern.values())) else rank_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **_schedule(allocator),
    }
    write_files(Path(folder), config, tensors)


def _peft_alpha(layer: AdaLoRALinear) -> float:
    """The shortest lora_alpha that gives the layer's scale in PEFT."""
    alpha = layer.scale * (layer.r + 1e-5)
    short = (float(f"{alpha:.{digits}g}") for digits in range(1, 17))
    alpha = next((s for s in short if s / (layer.r + 1e-5) == layer.scale), alpha)
    return int(alpha) if alpha.is_integer() else alpha


def _ends_alike(model: torch.nn.Module, targets: set[str]) -> str | None:
    """An expression for modules that PEFT would adapt too, as it takes a name for an ending."""
    endings = tuple("." + name for name in targets)
    names = [n for n, _ in named_modules(model) if n.endswith(endings) and n not in targets]
    return "|".join(map(re.escape, names)) or None


def _schedule(allocator: RankAllocator | None) -> dict[str, Any]:
    """In PEFT's words. It refuses a config without total_step."""
    if allocator is None:
        return {"total_step": 1}
    return {
        "target_r": allocator.target_r,
        "total_step": allocator.total_step,
        "tinit": allocator.t_init,
        "tfinal": allocator.t_final,
        "deltaT": allocator.delta_t,
        "beta1": allocator.beta1,
        "beta2": allocator.beta2,
    }
