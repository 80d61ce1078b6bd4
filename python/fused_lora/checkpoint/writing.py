"""Adapters in the words of PEFT: the config that says of them what PEFT must know, and the keys."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fused_lora.checkpoint.formats import LARGEST_RANK, READERS, AdapterWeights
from fused_lora.checkpoint.reading import PREFIX
from fused_lora.files import write_files
from fused_lora.nn.linear import lora_scale

DTYPES = torch.float32, torch.float16, torch.bfloat16
OTHER_DTYPES = (
    *(*DTYPES, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool),
)


def folded(weights: AdapterWeights) -> AdapterWeights:
    """B <- round(B diag(g)), in fp32: the same layer without a gate."""
    if weights.gate is None:
        return weights
    b = (weights.lora_b.float() * weights.gate.float()).to(weights.lora_b.dtype)
    return weights._replace(lora_b=b, gate=None)


def _check(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """What is written must be what read_adapter takes."""
    if type(t.data) is not Tensor:
        raise TypeError(f"{name} is a {type(t.data).__name__}; gather its shards before saving")
    if t.dtype not in dtypes:
        names = [str(d).removeprefix("torch.") for d in (*dtypes, t.dtype)]
        raise TypeError(
            f"{name} must be {', '.join(names[:-2])} or {names[-2]} to be saved, got {names[-1]}"
        )
    if t.is_meta:
        raise RuntimeError(f"{name} is on the meta device: it is not loaded yet, or offloaded")
    if not bool(t.isfinite().all()):
        raise ValueError(f"{name} has values that are NaN or infinite")


def _alpha(scale: float, r: int, use_rslora: bool) -> int | float:
    """The shortest lora_alpha that gives this scale."""
    alpha = scale / lora_scale(1, r, use_rslora)
    short = (f"{alpha:.{digits}g}" for digits in range(1, 17))
    alpha = next((float(s) for s in short if lora_scale(float(s), r, use_rslora) == scale), alpha)
    return int(alpha) if alpha.is_integer() else alpha


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the most common value, the others as one of PEFT's patterns).

    PEFT runs a key as (.*\\.)?(key)$: the ^ lets it match that one name.
    """
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {"^" + re.escape(n): v for n, v in values.items() if v != most}


def _taken_too(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """Modules that PEFT would adapt too, as it takes a target for the end of a name."""
    wanted = set(targets)
    return [
        name
        for name in names
        if name not in wanted
        and any(name[i + 1 :] in wanted for i, c in enumerate(name) if c == ".")
    ]


def adapter_config(
    layers: Mapping[str, AdapterWeights],
    *,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    names: Iterable[str] = (),
    base: str | None = None,
) -> dict[str, Any]:
    """adapter_config.json of these layers. names: of all modules of the model, where it is known.

    target_modules has the full names; exclude_modules, which PEFT runs as an expression of the
    whole name, those of other modules that end so.
    """
    ranks = {name: w.lora_a.shape[0] for name, w in layers.items()}
    r, rank_pattern = _common(ranks)
    lora_alpha, alpha_pattern = _common(
        {name: _alpha(w.scale, ranks[name], use_rslora) for name, w in layers.items()}
    )
    gated = any(w.gate is not None for w in layers.values())
    return {
        "peft_type": "SORA" if gated else "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": list(layers),
        "exclude_modules": "|".join(map(re.escape, _taken_too(layers, names))) or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": bias,
        "modules_to_save": list(modules_to_save) or None,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


def _stored(t: Tensor) -> Tensor:
    """A copy on the CPU that shares its memory with no other."""
    return t.detach().to("cpu", copy=True).contiguous()


def write_adapter(
    folder: Path,
    config: dict[str, Any],
    layers: Mapping[str, AdapterWeights],
    others: Mapping[str, Tensor],
    embeddings: Mapping[str, AdapterWeights] = MappingProxyType({}),
) -> None:
    """Write an adapter, as one step. others: {name in the model: tensor}, base weights too."""
    reader = READERS[config["peft_type"]]
    tensors = {}
    for name, weights in (*layers.items(), *embeddings.items()):
        endings = reader.endings if name in layers else reader.embedding_endings
        if (rank := weights.lora_a.shape[0]) > LARGEST_RANK:
            raise ValueError(f"{name} has rank {rank}; at most {LARGEST_RANK} can be saved")
        parts = {"lora_A": weights.lora_a, "lora_B": weights.lora_b}
        if weights.gate is not None:
            parts["lora_gate"] = weights.gate
        for part, t in parts.items():
            _check(f"{part} of {name}", t, DTYPES)
            tensors[f"{PREFIX}{name}{endings[part]}"] = _stored(t)
    for name, t in others.items():
        _check(name, t, OTHER_DTYPES)
        # Weight and bias of an adapted layer are, to PEFT, those of the layer within.
        module, _, last = name.rpartition(".")
        adapted = module in layers or module in embeddings
        key = f"{module}.base_layer.{last}" if adapted else name
        tensors[PREFIX + key] = _stored(t)
    write_files(folder, config, tensors)
