"""Adapter folders in PEFT's format: adapter_config.json beside adapter_model.safetensors.

Nothing in a folder is trusted: pickles are not opened, no path leaves the folder, no pattern of the
config is run as a regular expression, and every tensor's header is checked before any is read.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_TYPES = "LORA", "SORA"  # SORA: with gates; PEFT refuses it, where it would ignore them
LARGEST_CONFIG, LARGEST_RANK = 2**20, 4096
# Fields that change what an adapter computes, and what they may be here.
UNSUPPORTED: dict[str, tuple] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
}
_KEY = re.compile(r"(.+)\.(lora_A|lora_B)\.weight|(.+)\.lora_gate")


class AdapterWeights(NamedTuple):
    """The adapter of one layer: lora_a [r, K], lora_b [N, r], scale and gate [r] or None."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    gate: Tensor | None


def inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        others = "; a pickle is never opened" if (folder / "adapter_model.bin").exists() else ""
        raise FileNotFoundError(f"{folder} has no {name}{others}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of its folder, to {path.resolve()}")
    return path


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(k for k, _ in pairs if [p[0] for p in pairs].count(k) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def read_json(path: Path) -> dict:
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path} is larger than {LARGEST_CONFIG} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, got {type(config).__name__}")
    return config


def check_supported(path: Path, config: dict) -> None:
    for field, plain in UNSUPPORTED.items():
        if config.get(field) not in plain:
            raise NotImplementedError(f"{path}: {field}={config[field]!r} is not supported")


def _read_config(path: Path) -> dict:
    config = read_json(path)
    kind = config.get("peft_type")
    if kind not in PEFT_TYPES:
        raise ValueError(f"{path}: peft_type must be one of {', '.join(PEFT_TYPES)}, got {kind!r}")
    check_supported(path, config)
    check_rank(f"{path}: r", config.get("r"))
    check_alpha(f"{path}: lora_alpha", config.get("lora_alpha"))
    for field, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise TypeError(f"{path}: {field} must be an object, got {type(patterns).__name__}")
        for key, value in patterns.items():
            check(f"{path}: {field}[{key!r}]", value)
    return config


def check_rank(name: str, r) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name} must be an int, got {r!r}")
    if not 1 <= r <= LARGEST_RANK:
        raise ValueError(f"{name} must lie in [1, {LARGEST_RANK}], got {r}")


def check_alpha(name: str, alpha) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"{name} must be a number, got {alpha!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"{name} must be finite, got {alpha}")


def _of(patterns: dict | None, module: str, default):
    """The value for a module of PEFT's rank_pattern or alpha_pattern, whose keys are taken as
    names, or ends of names, and not as regular expressions."""
    for key, value in (patterns or {}).items():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == name or module.endswith("." + name):
            return value
    return default


def _modules(path: Path, keys: list[str]) -> dict[str, dict[str, str]]:
    """{module: {"lora_A", "lora_B", "lora_gate": key}}."""
    found: dict[str, dict[str, str]] = {}
    unexpected = []
    for key in keys:
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None or not key.startswith(PREFIX):
            unexpected.append(key)
        else:
            part = match[2] or "lora_gate"
            found.setdefault(match[1] or match[3], {})[part] = key
    missing = [
        f"{PREFIX}{module}.{part}.weight"
        for module, parts in found.items()
        for part in ("lora_A", "lora_B")
        if part not in parts
    ]
    if missing or unexpected or not found:
        raise KeyError(f"{path}: missing {missing or 'nothing'}, unexpected {unexpected or 'none'}")
    return found


def read_adapter(folder: str | Path) -> dict[str, AdapterWeights]:
    """{module name: AdapterWeights} of a PEFT LoRA folder, or of one with gates (peft_type "SORA").

    The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, by rank_pattern and
    alpha_pattern, whose keys are names or ends of names.

    Raises FileNotFoundError, KeyError (tensors missing or unexpected), TypeError (dtypes, types of
    fields), ValueError (values, shapes, NaN or infinity, paths out of the folder), and
    NotImplementedError for fields that ask for something else than LoRA.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    config_path = inside(folder, CONFIG)
    config, path = _read_config(config_path), inside(folder, WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            modules = _modules(path, list(file.keys()))
            shapes = {
                key: checked_header(path, key, file.get_slice(key))
                for parts in modules.values()
                for key in parts.values()
            }
            for module, parts in modules.items():
                _check_shapes(path, config, module, parts, shapes)
            tensors = {key: file.get_tensor(key) for key in shapes}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {key} has values that are NaN or infinite")
    return {
        module: AdapterWeights(
            tensors[parts["lora_A"]],
            tensors[parts["lora_B"]],
            _scale(config, module, shapes[parts["lora_A"]][0]),
            tensors.get(parts.get("lora_gate", "")),
        )
        for module, parts in modules.items()
    }


def _scale(config: dict, module: str, rank: int) -> float:
    alpha = _of(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def checked_header(path: Path, key: str, header) -> list[int]:
    if header.get_dtype() not in ("F32", "F16", "BF16"):
        raise TypeError(f"{path}: {key} must be F32, F16 or BF16, got {header.get_dtype()}")
    return header.get_shape()


def _check_shapes(path: Path, config: dict, module: str, parts: dict, shapes: dict) -> None:
    rank = _of(config.get("rank_pattern"), module, config["r"])
    wanted = {"lora_A": (2, 0), "lora_B": (2, 1), "lora_gate": (1, 0)}
    for part, key in parts.items():
        dims, axis = wanted[part]
        shape = shapes[key]
        if len(shape) != dims or shape[axis] != rank:
            form = {"lora_A": f"[{rank}, K]", "lora_B": f"[N, {rank}]", "lora_gate": f"[{rank}]"}
            raise ValueError(f"{path}: {key} must have shape {form[part]}, got {shape}")
    if ("lora_gate" in parts) != (config["peft_type"] == "SORA"):
        raise ValueError(
            f"{path}: a gate belongs to peft_type SORA, and {module} of "
            f"{config['peft_type']} has {'one' if 'lora_gate' in parts else 'none'}"
        )
