"""Adapter folders, read strictly.

Nothing in a folder is trusted: pickles are not opened, no path leaves the folder, every tensor's
header is checked before any is read, and the work is linear in the size of the files.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_lora.checkpoint.formats import READERS, AdapterWeights, LoRAReader, reader_of
from fused_lora.files import Header, few, read_whole, shown, shown_name
from fused_lora.names import clean_name, named_modules, unwrapped
from fused_lora.nn.adapter import LoRAAdapter

PREFIX = "base_model.model."
BIASES = "none", "all", "lora_only"
LARGEST_NAME = 1024
DEEPEST_NAME = 32
MOST_LENGTHS = 64
DTYPES = "F32", "F16", "BF16"
# What is trained whole may also be, or have in buffers, one of these.
OTHER_DTYPES = (*DTYPES, "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")
# What models call their embeddings, whose weights PEFT saves where it cannot know that the model
# has them: their adapters are trained, or the vocabulary has another size.
EMBEDDINGS = {
    *("embed_tokens", "lm_head", "wte", "word_embeddings", "tok_embeddings", "shared"),
    *("embed_in", "embed_out", "output"),
}
# How PEFT's wrapper of a module that is trained whole names what it holds.
_HELD = re.compile(r"\.(original_module|modules_to_save)\.")
_NAMED_ADAPTER = re.compile(
    r"\.(lora_[AB](?=\.[^.]+\.weight$)|lora_(?:A|B|E|embedding_A|embedding_B)(?=\.[^.]+$))\.([^.]+)"
)


@dataclass
class Adapter:
    """What a folder holds: layers {module: AdapterWeights}; embeddings, likewise, of lora_a [r, V]
    and lora_b [D, r]; others {name: tensor}, the biases and the modules that were trained whole;
    base {name: tensor}, weights of the base model; config and reader, which has checked it."""

    layers: dict[str, AdapterWeights]
    embeddings: dict[str, AdapterWeights]
    others: dict[str, Tensor]
    base: dict[str, Tensor]
    config: dict[str, Any]
    reader: LoRAReader


@dataclass
class Keys:
    """Keys of a file by what they are: layers and embeddings {module: {part: key}}, others and base
    {name: key}."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


class Endings:
    """Names, as in modules_to_save, that stand for every module whose name ends so: PEFT's rule.

    Raises TypeError for what is no list of names, ValueError for an empty name and for names of
    more than MOST_LENGTHS different lengths, each of which is looked up.
    """

    def __init__(self, what: str, names) -> None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{what} must be a list of names, got {shown(names)}")
        self._by_length: dict[int, set[str]] = {}
        for name in names:
            self._by_length.setdefault(len(name), set()).add(name)
        if 0 in self._by_length:
            raise ValueError(f"{what} has an empty name")
        if len(self._by_length) > MOST_LENGTHS:
            raise ValueError(
                f"{what} has names of {len(self._by_length)} different lengths; at most "
                f"{MOST_LENGTHS} are read"
            )

    def match(self, name: str) -> bool:
        return any(name[-n:] in names for n, names in self._by_length.items())


class Others:
    """Which tensors beside the layers' are explained by bias and modules_to_save of a config."""

    def __init__(self, path: Path, config: Mapping[str, Any], layers: Iterable[str]) -> None:
        self.bias = config.get("bias") or "none"
        if self.bias not in BIASES:
            raise ValueError(
                f"{path}: bias must be one of {', '.join(BIASES)}, got {shown(self.bias)}"
            )
        self.whole = Endings(f"{path}: modules_to_save", config.get("modules_to_save") or [])
        self.layers = set(layers)

    def name(self, written: str) -> str | None:
        """The model's name of a tensor; "" for one that PEFT writes twice, None for others."""
        module, _, last = written.rpartition(".")
        dots = [i for i, c in enumerate(written) if c == "."]
        whole = any(self.whole.match(written[:i]) for i in dots)
        if last == "bias" and self.bias != "none":
            layer = module.removesuffix(".base_layer")
            if layer in self.layers:
                return f"{layer}.bias" if layer != module else None
            if whole and module.endswith((".original_module", ".modules_to_save")):
                return ""
            if self.bias == "all":
                return written
        if whole and (held := _HELD.search(written)) and self.whole.match(written[: held.start()]):
            return ""
        return written if whole else None


def _take_base(found: Keys, rest: Mapping[str, str]) -> None:
    """Of what nothing else explains, move to `base` what PEFT saves of the base model: weight, and
    bias, in an adapted layer, and of an embedding."""
    adapted = found.layers.keys() | found.embeddings.keys()
    for written, key in rest.items():
        module, _, last = written.rpartition(".")
        layer = module.removesuffix(".base_layer")
        if layer != module and layer in adapted:
            own = last == "weight" or (last == "bias" and f"{module}.weight" in rest)
        else:
            own = last in ("weight", "bias") and module.rpartition(".")[2] in EMBEDDINGS
            own = own and module not in adapted
        if own:
            found.base[f"{layer}.{last}"] = key
        else:
            found.unexpected.append(key)


def _foreign(path: Path, keys: list[str], prefix: str) -> str | None:
    """One sentence, where the keys are those of an adapter under other names."""
    if not keys:
        return None
    first = min(keys)
    if not any(key.startswith(prefix) for key in keys):
        outer, inner, _ = first.partition(prefix)
        begin = outer + inner if inner else first.partition(".")[0] + "."
        if all(key.startswith(begin) for key in keys):
            return f"{path}: its keys start with {shown(begin)}; {shown(prefix)} is wanted"
        return f"{path}: its keys, such as {shown(first)}, do not start with {shown(prefix)}"
    named = [match for key in keys if (match := _NAMED_ADAPTER.search(key))]
    if len(named) == len(keys):
        part, name = named[0].groups()
        return (
            f"{path}: its keys have the name of an adapter, {shown(name)}, after {part}; PEFT's "
            f"save_pretrained leaves it out"
        )
    return None


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
    found = Keys()
    rest: dict[str, str] = {}
    kinds = (found.layers, reader.endings), (found.embeddings, reader.embedding_endings)
    parts = [(part, end, into) for into, endings in kinds for part, end in endings.items()]
    for key in keys:
        if not key.startswith(prefix):
            found.unexpected.append(key)
            continue
        name = clean_name(key.removeprefix(prefix))
        components = name.split(".")
        if len(key) > LARGEST_NAME or "" in components or len(components) > DEEPEST_NAME:
            raise ValueError(f"{path}: {shown(key)} does not name a tensor of a model")
        into, own = rest, name
        for part, ending, of_kind in parts:
            if name.endswith(ending):
                into, own = of_kind.setdefault(name.removesuffix(ending), {}), part
                break
        if own in into:
            raise ValueError(f"{path}: {shown(key)} and {shown(into[own])} name one tensor")
        into[own] = key
    if others is None:
        found.unexpected += rest.values()
    else:
        explained, left = others(found.layers), {}
        for written, key in rest.items():
            known = explained.name(written)
            if known is None:
                left[written] = key
            elif known:
                found.others[known] = key
        _take_base(found, left)
    missing = [
        f"{prefix}{module}{ending}"
        for into, endings in kinds
        for module, have in into.items()
        for part, ending in endings.items()
        if part not in have
    ]
    if missing or found.unexpected or not (found.layers or found.embeddings):
        nothing_else = not (found.layers or found.embeddings or missing)
        raise KeyError(
            (_foreign(path, found.unexpected, prefix) if nothing_else else None)
            or f"{path}: missing {few(missing) if missing else 'nothing'}, unexpected "
            f"{few(found.unexpected) if found.unexpected else 'none'}"
        )
    return found


def _check_dtype(path: Path, header: Header, key: str, dtypes: tuple[str, ...]) -> None:
    if header[key]["dtype"] not in dtypes:
        names = f"{', '.join(dtypes[:-1])} or {dtypes[-1]}"
        raise TypeError(f"{path}: {shown_name(key)} must be {names}, got {header[key]['dtype']}")


def read_tensors(
    path: Path,
    header: Header,
    keys: Keys,
    reader: LoRAReader,
    config: dict[str, Any],
    opened: Callable[[], None],
) -> Adapter:
    """All of a file, once every header has been checked. `opened` is called in between."""
    from safetensors import safe_open

    for module, parts in (*keys.layers.items(), *keys.embeddings.items()):
        for key in parts.values():
            _check_dtype(path, header, key, DTYPES)
        reader.check_shapes(path, module, parts, {p: header[k]["shape"] for p, k in parts.items()})
    for key in keys.others.values():
        _check_dtype(path, header, key, OTHER_DTYPES)
    for key in keys.base.values():
        _check_dtype(path, header, key, (*DTYPES, "F64"))

    with safe_open(path, framework="pt") as file:
        opened()

        def read(parts: dict[str, str]) -> dict[str, Tensor]:
            tensors = {part: file.get_tensor(key) for part, key in parts.items()}
            for part, tensor in tensors.items():
                if not bool(tensor.isfinite().all()):
                    raise ValueError(
                        f"{path}: {shown_name(parts[part])} has values that are NaN or infinite"
                    )
            return tensors

        def weights(kind: dict[str, dict[str, str]]) -> dict[str, AdapterWeights]:
            return {module: reader.weights(module, read(parts)) for module, parts in kind.items()}

        return Adapter(
            weights(keys.layers),
            weights(keys.embeddings),
            read(keys.others),
            read(keys.base),
            config,
            reader,
        )


def read_folder(
    folder: str | Path,
    *,
    layers_only: bool = False,
    readers: Mapping[str, type[LoRAReader]] = READERS,
) -> Adapter:
    """All that an adapter folder holds, in the formats of `readers` {peft_type: reader}; where it
    is saved meanwhile, the old or the new one. Raises what read_adapter does, but with layers_only
    not set takes biases, modules_to_save and adapters of embeddings."""

    def read(
        config_path: Path, config: dict[str, Any], path: Path, opened: Callable[[], None]
    ) -> Adapter:
        reader = reader_of(config_path, config, readers)
        for name in ("bias", "modules_to_save"):
            if layers_only and config.get(name) not in (None, "none", []):
                raise NotImplementedError(
                    f"{config_path}: {name}={shown(config[name])} is not supported: this model's "
                    f"own parameters stay as they are"
                )
        header = Header(path)
        keys = sorted_keys(
            path, header, reader, others=lambda layers: Others(config_path, config, layers)
        )
        if layers_only and keys.embeddings:
            raise NotImplementedError(
                f"{path}: {shown_name(next(iter(keys.embeddings)))} is an embedding, whose adapter "
                f"has no place in a linear layer; fl.load_adapter and fl.swap_adapter read it"
            )
        reader.check_modules(config_path, keys.layers)
        return read_tensors(path, header, keys, reader, config, opened)

    adapter = read_whole(Path(folder), read)
    if unknown := adapter.reader.unknown:
        names = ", ".join(map(shown_name, unknown[:3]))
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        warnings.warn(f"{folder}: unknown fields, ignored: {names}{more}", stacklevel=3)
    return adapter


def base_modules(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """{name of a weight or bias: (its module, "weight" or "bias")}, under each of its names; of a
    LoRAAdapter those of its base."""
    return {
        f"{name}.{own}": (module, own)
        for name, module in named_modules(model, every_name=True, leaves=(LoRAAdapter,))
        for own in ("weight", "bias")
        if isinstance(getattr(module, own, None), Tensor)
    }


def find_base(
    folder: str | Path, model: torch.nn.Module, adapter: Adapter, *, load: bool
) -> dict[str, Tensor]:
    """{name: tensor of the model} of the base weights of a folder, of a merged layer the W0 that is
    kept; load: they are to be written. Raises where there is none to load into, or to compare with.
    """
    places = base_modules(model) if adapter.base else {}
    found = {}
    for name, t in adapter.base.items():
        if name not in places:
            raise ValueError(f"{folder} holds {shown_name(name)}, which the model has not")
        module, own = places[name]
        mine, what = getattr(module, own), f"{folder}: {shown_name(name)}"
        if own == "weight" and getattr(module, "merged", False):
            mine = None if load else module._base
            if mine is None:
                raise RuntimeError(
                    f"{what} is of the base model, and here the adapter is merged into it; call "
                    f"fl.unmerge(model) first" + ("" if load else ", or merge with keep_base")
                )
        if mine.is_meta:
            raise RuntimeError(f"{what} is on the meta device: it is not loaded yet, or offloaded")
        if type(mine.data) is not Tensor or not mine.is_floating_point():
            raise TypeError(
                f"{what} is a {type(mine.data).__name__} of {mine.dtype} in the model, which is "
                f"not to be compared with values of {t.dtype}"
            )
        if t.shape != mine.shape:
            raise ValueError(
                f"{what} has shape {shown(list(t.shape))}; the model's has "
                f"{list(mine.shape)}: give it the vocabulary that the adapter was trained with "
                f"(resize_token_embeddings)"
            )
        check_cast(what, t, mine.dtype)
        found[name] = mine
    return found


def check_base(folder: str | Path, model: torch.nn.Module, adapter: Adapter) -> None:
    """Raise ValueError for a base weight of a folder that is not the model's, rounded as that."""
    for name, mine in find_base(folder, model, adapter, load=False).items():
        if not torch.equal(mine, adapter.base[name].to(mine)):
            raise ValueError(
                f"{folder} holds {shown_name(name)} of the base model, and the model's has other "
                f"values: it is not the model that the adapter was trained on; fl.load_adapter "
                f"into a model of its own loads both"
            )


@torch.no_grad()
def take_base(model: torch.nn.Module, adapter: Adapter, mine: Mapping[str, Tensor]) -> None:
    """Load the base weights of a folder, as PEFT does; save_adapter then writes them again."""
    for name, t in mine.items():
        t.copy_(adapter.base[name])
    unwrapped(model).fused_lora_base = list(mine)  # type: ignore[assignment]


def taken_base(model: torch.nn.Module) -> dict[str, Tensor]:
    """The base weights that take_base has loaded, of a merged layer the W0 that is kept."""
    found = {}
    names = getattr(unwrapped(model), "fused_lora_base", ())
    places = base_modules(model) if names else {}
    for module, own, name in ((*places[name], name) for name in names if name in places):
        found[name] = getattr(module, own)
        if own == "weight" and getattr(module, "merged", False):
            if (kept := module._base) is None:
                raise RuntimeError(
                    f"{name} came with the adapter and is saved with it, but is merged; call "
                    f"fl.unmerge(model) first, or merge with keep_base"
                )
            found[name] = kept
    return found


def check_cast(what: str, t: Tensor, dtype: torch.dtype) -> None:
    if t.is_floating_point() and not bool(t.to(dtype).isfinite().all()):
        raise ValueError(f"{what} has values that {dtype} cannot hold")


def read_adapter(
    folder: str | Path, model: torch.nn.Module | None = None
) -> dict[str, AdapterWeights]:
    """{module name: AdapterWeights} of a PEFT LoRA folder, or of one with gates (peft_type "SORA").

    The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, by rank_pattern and
    alpha_pattern, whose keys are names or ends of names. PEFT saves base weights beside an adapted
    output head: model is what they are held to; without one they are left out.

    Where the folder is saved meanwhile, the old adapter is read or the new one. Raises
    FileNotFoundError, KeyError (tensors missing or unexpected), TypeError (dtypes, types of
    fields), ValueError (values, shapes, NaN or infinity, paths out of the folder, a base weight
    that is not the model's), RuntimeError for a folder that is saved each time it is read, and
    NotImplementedError for fields that ask for something else than the layers' LoRA, biases,
    modules_to_save and embeddings among them (load_adapter takes those). An unknown field is a
    warning.
    """
    adapter = read_folder(folder, layers_only=True)
    if model is not None:
        check_base(folder, model, adapter)
    return adapter.layers
