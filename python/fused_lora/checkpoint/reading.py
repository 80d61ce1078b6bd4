"""Adapter folders, read strictly.

Nothing in a folder is trusted: pickles are not opened, no path leaves the folder, and every
tensor's header is checked before any is read.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_lora.checkpoint.formats import AdapterWeights, LoRAReader, reader_of
from fused_lora.files import Header, adapter_files, read_json, unchanged

PREFIX = "base_model.model."
BIASES = "none", "all", "lora_only"
LARGEST_NAME = 1024
DTYPES = "F32", "F16", "BF16"
# What is trained whole may also be, or have in buffers, one of these.
OTHER_DTYPES = (*DTYPES, "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")


@dataclass
class Adapter:
    """What a folder holds: layers {module: AdapterWeights}; others {name: tensor}, the biases and
    the modules that were trained whole; config, checked."""

    layers: dict[str, AdapterWeights]
    others: dict[str, Tensor]
    config: dict[str, Any]


@dataclass
class Keys:
    """Keys of a file by what they are: layers {module: {part: key}}, others {name: key}."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


class Others:
    """Which tensors beside the layers' are explained by bias and modules_to_save of a config."""

    def __init__(self, path: Path, config: Mapping[str, Any], layers: Iterable[str]) -> None:
        self.bias, modules = config.get("bias") or "none", config.get("modules_to_save") or []
        if self.bias not in BIASES:
            raise ValueError(f"{path}: bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
            raise TypeError(f"{path}: modules_to_save must be a list of names, got {modules!r}")
        self.modules, self.layers = tuple(modules), set(layers)

    def name(self, written: str) -> str | None:
        """The model's name of a tensor; "" for one that PEFT writes twice, None for others."""
        module, _, last = written.rpartition(".")
        dots = [i for i, c in enumerate(written) if c == "."]
        # PEFT trains every module whose name ends so.
        whole = any(written[:i].endswith(self.modules) for i in dots)
        if last == "bias" and self.bias != "none":
            layer = module.removesuffix(".base_layer")
            if layer in self.layers:
                return f"{layer}.bias" if layer != module else None
            if whole and module.endswith((".original_module", ".modules_to_save")):
                return ""
            if self.bias == "all":
                return written
        return written if whole else None


def sorted_keys(
    path: Path,
    keys: Iterable[str],
    reader: LoRAReader,
    prefix: str = PREFIX,
    others: Callable[[Iterable[str]], Others] | None = None,
) -> Keys:
    """What each key is. others: what explains the rest, made from the names of the layers.

    Raises KeyError where a layer lacks a tensor, or nothing explains one.
    """
    found, rest = Keys(), {}
    for key in keys:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            found.unexpected.append(key)
            continue
        if len(name) > LARGEST_NAME or "" in name.split("."):
            raise ValueError(f"{path}: {key[:LARGEST_NAME]!r} does not name a tensor of a model")
        for part, ending in reader.endings.items():
            if name.endswith(ending):
                found.layers.setdefault(name.removesuffix(ending), {})[part] = key
                break
        else:
            rest[name] = key
    explained = others(found.layers) if others is not None else None
    for written, key in rest.items():
        own = None if explained is None else explained.name(written)
        if own is None:
            found.unexpected.append(key)
        elif own:
            found.others[own] = key
    missing = [
        f"{prefix}{module}{ending}"
        for module, parts in found.layers.items()
        for part, ending in reader.endings.items()
        if part not in parts
    ]
    if missing or found.unexpected or not found.layers:
        raise KeyError(
            f"{path}: missing {missing or 'nothing'}, unexpected {found.unexpected or 'none'}"
        )
    return found


def _check_dtype(path: Path, header: Header, key: str, dtypes: tuple[str, ...]) -> None:
    if header[key]["dtype"] not in dtypes:
        names = f"{', '.join(dtypes[:-1])} or {dtypes[-1]}"
        raise TypeError(f"{path}: {key} must be {names}, got {header[key]['dtype']}")


def read_tensors(
    path: Path,
    header: Header,
    keys: Keys,
    reader: LoRAReader,
    opened: Callable[[], None] = lambda: None,
) -> tuple[dict[str, AdapterWeights], dict[str, Tensor]]:
    """(layers, others), once every header has been checked. `opened` is called in between."""
    from safetensors import safe_open

    for module, parts in keys.layers.items():
        for key in parts.values():
            _check_dtype(path, header, key, DTYPES)
        reader.check_shapes(path, module, parts, {p: header[k]["shape"] for p, k in parts.items()})
    for key in keys.others.values():
        _check_dtype(path, header, key, OTHER_DTYPES)

    with safe_open(path, framework="pt") as file:
        opened()

        def read(parts: dict[str, str]) -> dict[str, Tensor]:
            tensors = {part: file.get_tensor(key) for part, key in parts.items()}
            for part, tensor in tensors.items():
                if not bool(tensor.isfinite().all()):
                    raise ValueError(f"{path}: {parts[part]} has values that are NaN or infinite")
            return tensors

        layers = {
            module: reader.weights(module, read(parts)) for module, parts in keys.layers.items()
        }
        return layers, read(keys.others)


def read_folder(folder: str | Path, *, layers_only: bool = False) -> Adapter:
    """All that an adapter folder holds. Raises what read_adapter does, but with layers_only not
    set takes biases and modules_to_save."""
    folder = Path(folder)
    config_path, path = adapter_files(folder)
    still = unchanged(folder, config_path)
    config = read_json(config_path)
    reader = reader_of(config_path, config)
    for name in ("bias", "modules_to_save"):
        if layers_only and config.get(name) not in (None, "none", []):
            raise NotImplementedError(
                f"{config_path}: {name}={config[name]!r} is not supported: this model's own "
                f"parameters stay as they are"
            )

    header = Header(path)
    keys = sorted_keys(
        path, header, reader, others=lambda layers: Others(config_path, config, layers)
    )
    return Adapter(*read_tensors(path, header, keys, reader, still), config)


def read_adapter(folder: str | Path) -> dict[str, AdapterWeights]:
    """{module name: AdapterWeights} of a PEFT LoRA folder, or of one with gates (peft_type "SORA").

    The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, by rank_pattern and
    alpha_pattern, whose keys are names or ends of names.

    Raises FileNotFoundError, KeyError (tensors missing or unexpected), TypeError (dtypes, types of
    fields), ValueError (values, shapes, NaN or infinity, paths out of the folder), and
    NotImplementedError for fields that ask for something else than the layers' LoRA, biases and
    modules_to_save among them (load_adapter takes those). An unknown field is a warning.
    """
    return read_folder(folder, layers_only=True).layers
