"""Adapters of a model, to a folder and back."""

import functools
import os
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_lora.checkpoint.adalora import ADALORA, AdaLoRAReader, save_adalora, take_adalora
from fused_lora.checkpoint.formats import READERS, AdapterWeights
from fused_lora.checkpoint.reading import (
    Adapter,
    Endings,
    check_base,
    check_cast,
    find_base,
    read_folder,
    take_base,
    taken_base,
)
from fused_lora.checkpoint.writing import adapter_config, folded, write_adapter
from fused_lora.files import few, shown, shown_name
from fused_lora.inject import LoRAConfig, _matches, inject, nearest, replace_modules
from fused_lora.names import check_takes_parameters, named_modules, unwrapped
from fused_lora.nn.adalora import AdaLoRALinear
from fused_lora.nn.adapter import ADAPTED, LoRAAdapter, weight_dtype
from fused_lora.nn.checks import check_embedding, check_linear, keeps_its_product
from fused_lora.nn.embedding import LoRAEmbedding
from fused_lora.nn.linear import LoRALinear, SoRALinear, lora_scale, set_adapter_
from fused_lora.nn.sharded import check_whole

# Of these it is known that A, B, scale and gate are all that they are.
KINDS = LoRALinear, SoRALinear, LoRAAdapter
Layer = LoRALinear | LoRAAdapter


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model within what is wrapped around it."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if isinstance(model, (*ADAPTED, LoRAEmbedding)):
        raise TypeError("model is itself an adapted layer, without a name; give what contains it")
    return model


def _names(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """{name: module} of every name, "" for the model, without what is within a LoRAAdapter, which
    stands for its base."""
    return dict(named_modules(model, every_name=True, leaves=(LoRAAdapter,)))


def _first(names: Mapping[str, torch.nn.Module], kinds) -> dict:
    """The modules of these kinds, each under its first name."""
    first: dict[int, str] = {}
    for name, module in names.items():
        first.setdefault(id(module), name)
    return {n: m for n, m in names.items() if isinstance(m, kinds) and first[id(m)] == n}


def _adapted(names: Mapping[str, torch.nn.Module]) -> dict[str, Layer]:
    return _first(names, ADAPTED)


def _embeddings(names: Mapping[str, torch.nn.Module]) -> dict[str, LoRAEmbedding]:
    return _first(names, LoRAEmbedding)


def _other_tensors(
    names: Mapping[str, torch.nn.Module],
    layers: Iterable[str],
    modules_to_save: Iterable[str],
    bias: str,
) -> dict[str, Tensor]:
    """{name: tensor} of what is trained beside the adapters; the tensors of the model itself."""
    found = {
        f"{name}.{own}": t
        for name in modules_to_save
        for own, t in names[name].state_dict(keep_vars=True).items()
        if isinstance(t, Tensor)
    }
    for name in {"none": [], "lora_only": layers, "all": names}[bias]:
        module = names[name]
        base = module.base_layer if isinstance(module, LoRAAdapter) else module
        parameter = base._parameters.get("bias")
        if parameter is not None:
            found[f"{name}.bias" if name else "bias"] = parameter
    return found


def _whole(model: torch.nn.Module, names: Mapping[str, torch.nn.Module]) -> tuple[list[str], str]:
    """(modules_to_save by their names, bias) of a model that inject has adapted."""
    config = getattr(model, "fused_lora_config", None)
    if config is None:
        return [], "none"
    entries = config.modules_to_save or []
    saved = [n for n, m in names.items() if _matches(entries, n) and not isinstance(m, ADAPTED)]
    return saved, config.bias


def _weights(name: str, layer: Layer, fold_gate: bool) -> AdapterWeights:
    weights = AdapterWeights(layer.lora_a, layer.lora_b, layer.scale, layer.gate)
    if fold_gate:
        return folded(weights)
    if type(layer) not in KINDS:
        raise TypeError(
            f"{name} is a {type(layer).__name__}, which has no format of a checkpoint; "
            f"fold_gate=True writes what it computes as plain LoRA"
        )
    return weights


@torch.no_grad()
def save_adapter(
    model: torch.nn.Module, dir: str | os.PathLike[str], fold_gate: bool = False
) -> None:
    """Write the adapters of model into the folder dir, in PEFT's format.

    adapter_config.json and adapter_model.safetensors, from LoRALinear, LoRAAdapter and
    LoRAEmbedding layers, are what PeftModel.from_pretrained loads: layers may differ in rank and
    scale (rank_pattern, alpha_pattern), and layers that are plain again, as after pruning, are none
    of its targets. What fl.inject's config trains besides, biases and modules_to_save, goes into
    the same file, and so do base weights that load_adapter has taken from a folder. Merged or not,
    A and B are saved.

    Names are those of the bare model, whatever is wrapped around it or its parts (torch.compile,
    DistributedDataParallel, DataParallel, AveragedModel, FullyShardedDataParallel, checkpointing).

    SoRALinear layers are saved with their gates as peft_type "SORA", which PEFT refuses aloud and
    load_adapter reads; AdaLoRALinear layers as PEFT's AdaLoRA, by checkpoint.adalora.save_adalora,
    which has more options. fold_gate writes plain LoRA for PEFT instead: B <- round(B diag(g)), in
    fp32.

    The folder changes as one step: whenever the process ends, it holds the old adapter or the new
    one. One process at a time may save into a folder.

    Raises before anything is written: TypeError for a model of another kind, a layer of an unknown
    class, and dtypes other than fp32, fp16 and bf16; NotImplementedError for sharded parameters
    (FSDP1, FSDP2, tensor parallel: docs/distributed.md puts them together); ValueError where no
    layer is adapted, where some layers have a gate and others none, for a rank above 4096, and for
    NaN or infinity; RuntimeError for what is on the meta device, and for a base weight that is
    merged. A module that is at several places of the model is a warning: PEFT adapts only the
    first.
    """
    model = _unwrapped(model)
    names = _names(model)
    layers, embeddings = _adapted(names), _embeddings(names)
    if not layers and not embeddings:
        raise ValueError("model has no LoRALinear; there is no adapter to save")
    for name, layer in (*layers.items(), *embeddings.items()):
        check_whole("save_adapter", name, layer)
    if not fold_gate and any(isinstance(layer, AdaLoRALinear) for layer in layers.values()):
        return save_adalora(model, Path(dir))
    tokens = {name: _token_weights(name, layer) for name, layer in embeddings.items()}
    weights = {name: _weights(name, layer, fold_gate) for name, layer in layers.items()}
    gated = [name for name, w in weights.items() if w.gate is not None]
    if 0 < len(gated) < len(layers):
        raise ValueError(
            f"{len(gated)} of {len(layers)} layers have a gate; a checkpoint has one in every "
            f"layer or in none: fold_gate=True folds them into lora_b"
        )
    saved, bias = _whole(model, names)
    _warn_of_peft(names, layers, saved)
    adapted = (*layers.values(), *embeddings.values())
    dropouts = Counter(layer.lora_dropout for layer in layers.values()) or Counter([0.0])
    if len(dropouts) > 1:
        warnings.warn(
            f"lora_dropout differs between layers ({', '.join(f'{p:g}' for p in dropouts)}); the "
            f"most common is saved",
            stacklevel=3,
        )
    base = getattr(model, "name_or_path", None)
    config = adapter_config(
        weights | tokens,
        use_rslora=all(layer.use_rslora for layer in adapted),
        lora_dropout=dropouts.most_common(1)[0][0],
        bias=bias,
        modules_to_save=saved,
        names=names,
        base=base if isinstance(base, str) and base else None,
    )
    others = taken_base(model) | _other_tensors(names, layers, saved, bias)
    write_adapter(Path(dir), config, weights, others, tokens)


def _token_weights(name: str, layer: LoRAEmbedding) -> AdapterWeights:
    if type(layer) is not LoRAEmbedding:
        raise TypeError(f"{name} is a {type(layer).__name__}, which has no format of a checkpoint")
    return AdapterWeights(layer.lora_a, layer.lora_b, layer.scale, None)


def _warn_of_peft(
    names: Mapping[str, torch.nn.Module], layers: Mapping[str, Layer], saved: list[str]
) -> None:
    """What load_adapter reads rightly, and PEFT does not."""
    adapted = {id(layer) for layer in layers.values()}
    if again := [n for n, m in names.items() if id(m) in adapted and n not in layers]:
        warnings.warn(
            f"{again[0]} is a layer that is at several places; PEFT adapts only the first",
            stacklevel=4,
        )
    if more := [n for n in names if n not in saved and n.endswith(tuple(saved))]:
        warnings.warn(
            f"PEFT takes {more[0]} for one of modules_to_save, {saved}, whose name it ends with, "
            f"and will miss its weights",
            stacklevel=4,
        )


@torch.no_grad()
def load_adapter(model: torch.nn.Module, dir: str | os.PathLike[str]) -> torch.nn.Module:
    """Read the adapter in the folder dir, PEFT's LoRA or save_adapter's, into model; returns model.

    A folder of PEFT's AdaLoRA is read by checkpoint.adalora.load_adalora.

    A model without adapters gets them in the layers that the folder has, as by fl.inject:
    SoRALinear where there are gates, else LoRALinear, LoRAAdapter around a quantised layer and
    LoRAEmbedding for an embedding, everything else frozen; bias and modules_to_save as the config
    says. A and B keep the file's dtype or go to a wider one. Base weights that PEFT has saved
    beside them, as it does where an output head or an embedding is adapted, or of another size than
    the pretrained one, are loaded too, as PEFT does.

    A model with adapters takes the values into the Parameters that it has, rounded to their dtype,
    and the scale of the file. Its layers, their ranks, and what else is trained must be those of
    the file. A layer that has a gate takes an adapter without gates with gates of one.

    The folder is not trusted: see fused_lora.checkpoint.read_adapter for what is refused. Nothing
    of model is changed where one of these is raised: what read_adapter raises, ValueError for
    layers, shapes or ranks that do not fit, with the nearest names, TypeError for layers that are
    neither a plain nn.Linear or nn.Embedding nor quantised, RuntimeError for a layer that is
    merged, or on the meta device, and for a model without adapters in DistributedDataParallel or
    FullyShardedDataParallel, NotImplementedError for sharded parameters.
    """
    wrapped, model = model, _unwrapped(model)
    names = _names(model)
    layers, embeddings = _adapted(names), _embeddings(names)
    if not layers and not embeddings:
        check_takes_parameters("load_adapter", wrapped)
    folder = Path(dir)
    adapter = read_folder(folder, readers=READERS | ADALORA)
    if isinstance(adapter.reader, AdaLoRAReader):
        take_adalora(model, folder, adapter)
        return wrapped
    base = find_base(folder, model, adapter, load=True)
    if layers or embeddings:
        saved, bias = _whole(model, names)
        _check_layers(dir, adapter, layers)
        _check_embeddings(dir, adapter, embeddings)
        _check_others(dir, adapter, _other_tensors(names, layers, saved, bias))
    else:
        plan, dtype = _plan(dir, adapter, names)
        _adapt(model, names, adapter, plan, dtype)
        names = _names(model)
        saved, bias = _whole(model, names)
    _take(names, adapter)
    take_base(model, adapter, base)
    others = _other_tensors(names, adapter.layers, saved, bias)
    for name, t in adapter.others.items():
        others[name].copy_(t)
    return wrapped


@torch.no_grad()
def swap_adapter(model: torch.nn.Module, dir: str | os.PathLike[str]) -> torch.nn.Module:
    """Give an adapted model the adapter in the folder dir in place of its own; returns model.

        W <- round(W - s B diag(g) A + s' B' diag(g') A')          in the layers that are merged

    Layer by layer it is LoRALinear.swap: a merged layer stays merged, without a second W0, or is
    made anew, without drift, from the W0 that merge kept. The layers must be those of the folder;
    ranks and scales may differ. Where the rank stays the values are copied into the Parameters that
    are there, else those are new ones. A layer that has a gate takes an adapter without gates with
    gates of one.

    The folder is not trusted. Nothing of model is changed where one of these is raised: what
    read_adapter raises; ValueError for a model without adapters, for layers and shapes that do not
    fit, with the nearest names, for a folder with biases or modules_to_save, and for base weights
    that are not the model's; TypeError for a layer of an unknown class; RuntimeError on the meta
    device, for base weights of a layer that is merged without keep_base, and for another rank in
    DistributedDataParallel or FullyShardedDataParallel; NotImplementedError for sharded parameters.
    """
    bare = _unwrapped(model)
    names = _names(bare)
    layers, embeddings = _adapted(names), _embeddings(names)
    if not layers and not embeddings:
        raise ValueError("model has no adapter to swap; fl.load_adapter puts one into it")
    adapter = read_folder(Path(dir))
    if adapter.others:
        raise ValueError(
            f"{dir} holds more than adapters, {few(list(adapter.others))}, which a swap "
            f"would leave alone; load it into a model of its own"
        )
    _check_layers(dir, adapter, layers, swap=True)
    _check_embeddings(dir, adapter, embeddings, swap=True)
    check_base(Path(dir), bare, adapter)
    found = adapter.layers | adapter.embeddings
    if any(w.lora_a.shape[0] != names[name].r for name, w in found.items()):
        check_takes_parameters("swap_adapter to another rank", model)
    _take(names, adapter)
    return model


def _take(names: Mapping[str, torch.nn.Module], adapter: Adapter) -> None:
    for name, weights in adapter.layers.items():
        layer: Layer = names[name]  # type: ignore[assignment]
        layer.use_rslora = bool(adapter.config.get("use_rslora"))
        layer.swap(weights.lora_a, weights.lora_b, scale=weights.scale, gate=weights.gate)
    for name, weights in adapter.embeddings.items():
        embedding: LoRAEmbedding = names[name]  # type: ignore[assignment]
        embedding.use_rslora = bool(adapter.config.get("use_rslora"))
        a, b = weights.lora_a.to(embedding.lora_a), weights.lora_b.to(embedding.lora_b)
        set_adapter_(embedding, a, b, None)
        embedding.scale = weights.scale
        embedding.lora_alpha = weights.scale / lora_scale(1, embedding.r, embedding.use_rslora)


def _adapt(
    model: torch.nn.Module,
    names: Mapping[str, torch.nn.Module],
    adapter: Adapter,
    plan: LoRAConfig | None,
    dtype: torch.dtype | None,
) -> None:
    """Put the adapters of a folder into a plain model; plan: of its linear layers."""
    if plan is None:
        model.requires_grad_(False)
    else:
        inject(model, plan, adapter_dtype=dtype)
        # What the folder says; the layers were made small, and get the ranks that they have.
        model.fused_lora_config.r = adapter.config["r"]  # type: ignore[union-attr]
    new = {}
    for name, weights in adapter.embeddings.items():
        embedding: torch.nn.Embedding = names[name]  # type: ignore[assignment]
        wide = torch.promote_types(weights.lora_a.dtype, weights.lora_b.dtype)
        wide = torch.promote_types(wide, embedding.weight.dtype)
        new[id(embedding)] = LoRAEmbedding.from_embedding(
            embedding,
            weights.lora_a.shape[0],
            adapter_dtype=None if wide == embedding.weight.dtype else torch.float32,
        )
    replace_modules(model, new)


def _check_embeddings(
    dir, adapter: Adapter, embeddings: Mapping[str, LoRAEmbedding], *, swap: bool = False
) -> None:
    """The file's adapted embeddings are those of an adapted model, and so are their shapes."""
    if strange := sorted(set(adapter.embeddings) ^ set(embeddings)):
        raise ValueError(
            f"{dir}: the adapted embeddings of the folder, {few(list(adapter.embeddings))}, are "
            f"not those of the model, {few(list(embeddings))}: {shown_name(strange[0])} is in one "
            f"alone"
        )
    for name, weights in adapter.embeddings.items():
        layer = embeddings[name]
        check_whole(f"{dir}", name, layer)
        if type(layer) is not LoRAEmbedding:
            raise TypeError(f"{dir}: {name} is a {type(layer).__name__}, which takes no LoRA")
        if layer.lora_a.is_meta:
            raise RuntimeError(f"{name} is on the meta device: it is not loaded yet, or offloaded")
        R = weights.lora_a.shape[0] if swap else layer.r
        shapes = {"lora_a": (R, layer.num_embeddings), "lora_b": (layer.embedding_dim, R)}
        for part, shape in shapes.items():
            t = getattr(weights, part)
            _check_shape(f"{dir}: {part} of {name}", t, shape)
            check_cast(f"{dir}: {part} of {name}", t, getattr(layer, part).dtype)


def _check_layers(
    dir, adapter: Adapter, layers: Mapping[str, Layer], *, swap: bool = False
) -> None:
    """The file's layers are those of an adapted model, and so are their ranks but for a swap, which
    takes merged layers too."""
    if unknown := [name for name in adapter.layers if name not in layers]:
        raise ValueError(
            f"{dir}: the model has no adapted layer {shown(unknown[0])}; nearest: "
            f"{nearest(unknown[:1], layers)}"
        )
    if lacking := [name for name in layers if name not in adapter.layers]:
        raise ValueError(
            f"{dir} has no adapter for {lacking[0]!r} and {len(lacking) - 1} more of the model's "
            f"{len(layers)} adapted layers; load it into a model without adapters"
        )
    for name, weights in adapter.layers.items():
        layer = layers[name]
        check_whole(f"{dir}", name, layer)
        if type(layer) not in KINDS:
            raise TypeError(f"{dir}: {name} is a {type(layer).__name__}, which takes no LoRA")
        layer.check_values(name)
        if not swap and isinstance(layer, LoRALinear) and layer.merged:
            raise RuntimeError(f"{name} is merged; call fl.unmerge(model) before loading into it")
        if weights.gate is not None and layer.gate is None:
            raise ValueError(
                f"{dir} has a gate for {name}, which is a {type(layer).__name__}; fold the gates "
                f"first: fused-lora convert {shlex.quote(str(dir))} {shlex.quote(f'{dir}-folded')}"
            )
        R = weights.lora_a.shape[0] if swap else layer.r
        shapes = {"lora_a": (R, layer.in_features), "lora_b": (layer.out_features, R)}
        for part, shape in shapes.items():
            t = getattr(weights, part)
            _check_shape(f"{dir}: {part} of {name}", t, shape)
            check_cast(f"{dir}: {part} of {name}", t, getattr(layer, part).dtype)
        if swap and isinstance(layer, LoRALinear):
            layer.checked_swap(weights.lora_a, weights.lora_b, weights.scale, weights.gate, name)


def _check_shape(what: str, t: Tensor, shape: Iterable[int]) -> None:
    if list(t.shape) != list(shape):
        raise ValueError(f"{what} has shape {shown(list(t.shape))}; the model's has {list(shape)}")


def _check_others(dir, adapter: Adapter, mine: Mapping[str, Tensor]) -> None:
    """Biases and modules that are trained whole are the same in the file and the model."""
    missing = sorted(set(mine) - set(adapter.others))
    unexpected = sorted(set(adapter.others) - set(mine))
    if missing or unexpected:
        raise ValueError(
            f"{dir}: bias and modules_to_save do not fit the model: missing "
            f"{few(missing) if missing else 'nothing'}, unexpected "
            f"{few(unexpected) if unexpected else 'none'}"
        )
    for name, t in adapter.others.items():
        _check_shape(f"{dir}: {name}", t, mine[name].shape)
        if t.is_floating_point() != mine[name].is_floating_point() or not (
            t.is_floating_point() or t.dtype == mine[name].dtype
        ):
            raise TypeError(f"{dir}: {name} is {t.dtype}; the model's is {mine[name].dtype}")
        check_cast(f"{dir}: {name}", t, mine[name].dtype)


def _plan(
    dir, adapter: Adapter, names: Mapping[str, torch.nn.Module]
) -> tuple[LoRAConfig | None, torch.dtype | None]:
    """(config, adapter_dtype) with which inject adapts exactly the linear layers of the file; None
    where there are none. All of the file is held to the model."""
    linears = [name for name, m in names.items() if isinstance(m, torch.nn.Linear)]
    endings = Endings("modules_to_save", adapter.config.get("modules_to_save") or [])
    saved = [name for name in names if endings.match(name)]
    lies_in = set(saved)
    first: dict[int, str] = {}
    wider = False
    for name, weights in (*adapter.layers.items(), *adapter.embeddings.items()):
        if name not in names:
            raise ValueError(
                f"{dir}: the model has no module {shown(name)}; nearest: {nearest([name], linears)}"
            )
        module: Any = names[name]
        R = weights.lora_a.shape[0]
        if name in adapter.embeddings:
            check_embedding(f"{dir}: {name}", module)
            K, N = module.num_embeddings, module.embedding_dim
        else:
            if not keeps_its_product(module):
                check_linear(f"{dir}: {name}", module, placed=True)
            N, K = module.out_features, module.in_features
            dtypes = weights.lora_a.dtype, weights.lora_b.dtype, weight_dtype(module)
            wider |= functools.reduce(torch.promote_types, dtypes) != dtypes[-1]
        around = (name[:i] for i, c in enumerate(f"{name}.") if c == ".")
        if not lies_in.isdisjoint(around) or first.setdefault(id(module), name) != name:
            other = first.get(id(module), "one of modules_to_save")
            raise ValueError(f"{dir}: {name} has an adapter, and is {other} too")
        _check_shape(f"{dir}: lora_a of {name}", weights.lora_a, (R, K))
        _check_shape(f"{dir}: lora_b of {name}", weights.lora_b, (N, R))
    bias = adapter.config.get("bias") or "none"
    _check_others(dir, adapter, _other_tensors(names, adapter.layers, saved, bias))
    if not adapter.layers:
        if adapter.others:
            raise NotImplementedError(
                f"{dir} adapts embeddings alone and holds {few(list(adapter.others))} besides; "
                f"bias and modules_to_save go with adapted linear layers"
            )
        return None, None
    config = LoRAConfig(
        r=min(weights.lora_a.shape[0] for weights in adapter.layers.values()),
        lora_alpha=adapter.config["lora_alpha"],
        lora_dropout=adapter.config.get("lora_dropout") or 0.0,
        target_modules="|".join(map(re.escape, adapter.layers)),
        use_rslora=bool(adapter.config.get("use_rslora")),
        bias=bias,
        modules_to_save=saved or None,
        gate=any(w.gate is not None for w in adapter.layers.values()),
        gate_init="ones",
    )
    return config, torch.float32 if wider else None
