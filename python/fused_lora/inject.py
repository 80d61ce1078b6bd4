"""Adapters for a whole model: which layers get one, what is trained, merging them all."""

import copy
import difflib
import functools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from fused_lora.files import shown_name
from fused_lora.names import check_takes_parameters, named_modules, unwrapped
from fused_lora.nn.adalora import SCALINGS, AdaLoRALinear, check_scaling
from fused_lora.nn.adapter import (
    ADAPTED,
    LoRAAdapter,
    check_adapter_dtype,
    why_unmergeable,
)
from fused_lora.nn.checks import (
    check_choice,
    check_linear,
    check_no_peft,
    check_number,
    check_probability,
    check_rank,
    is_offloaded,
    is_quantised,
    keeps_its_product,
    kind_of,
    placement,
)
from fused_lora.nn.linear import GATE_INITS, KEEP_BASE, LoRALinear, SoRALinear
from fused_lora.nn.multi import MultiLoRALinear
from fused_lora.nn.sharded import check_whole

ALL_LINEAR = "all-linear"
_MOST_COMPARED, _LONGEST_COMPARED = 10_000, 120
BIASES = ("none", "all", "lora_only")


@dataclass(kw_only=True)
class LoRAConfig:
    """Where adapters go in a model and what they are; words and defaults are PEFT's LoraConfig's.

    target_modules: a list of module names, each matching the module of that name and those whose
        name ends in "." + it; or a str, a regular expression for the whole name; or "all-linear",
        every nn.Linear but the output head (what the model's get_output_embeddings() returns).
    exclude_modules: names or a regular expression, likewise, of modules that get no adapter.
    r, lora_alpha, lora_dropout, use_rslora: as in fused_lora.nn.LoRALinear.
    rank_pattern, alpha_pattern: {regular expression: value} for modules that differ. A key matches
        a name that it spells whole or from a dot on; the first key that matches counts.
    init_lora_weights: True (Kaiming-uniform A, zero B), "gaussian", or False (random B too, for
        tests).
    bias: biases to train: "none", "all" of the model, or "lora_only", those of adapted layers.
    modules_to_save: names of modules that are trained in full, as copies of their own (a weight
        that was tied to another stays behind); no adapter goes into them.
    gate: adapters are SoRALinear, with gates drawn as gate_init says: "normal" or "ones".
    adalora: adapters are AdaLoRALinear, scaled as adalora_scaling says: "plain" or "peft". Then
        init_lora_weights is True (AdaLoRA's own start) or False.

    Raises TypeError and ValueError that name the field.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    gate: bool = False
    gate_init: str = "normal"
    adalora: bool = False
    adalora_scaling: str = "plain"

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        check_number("lora_alpha", self.lora_alpha)
        check_probability("lora_dropout", self.lora_dropout)
        for name in ("use_rslora", "gate", "adalora"):
            check_choice(name, getattr(self, name), (True, False))
        check_choice("init_lora_weights", self.init_lora_weights, (True, False, "gaussian"))
        check_choice("bias", self.bias, BIASES)
        check_choice("gate_init", self.gate_init, GATE_INITS)
        self._check_adalora()
        self.target_modules = _names_or_regex("target_modules", self.target_modules)
        if not self.target_modules:
            raise ValueError("target_modules is empty; name at least one module")
        if self.exclude_modules is not None:
            self.exclude_modules = _names_or_regex("exclude_modules", self.exclude_modules)
        if self.modules_to_save is not None:
            if isinstance(self.modules_to_save, str):
                raise TypeError(
                    f"modules_to_save must be a list of names, got the str {self.modules_to_save!r}"
                )
            self.modules_to_save = _names_or_regex("modules_to_save", self.modules_to_save)
        for name, check_value in (("rank_pattern", check_rank), ("alpha_pattern", check_number)):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise TypeError(f"{name} must be a dict, got {type(patterns).__name__}")
            for key, value in patterns.items():
                _check_regex(f"{name} key", key)
                check_value(f"{name}[{key!r}]", value)

    def _check_adalora(self) -> None:
        check_choice("adalora_scaling", self.adalora_scaling, SCALINGS)
        if self.adalora:
            check_scaling(self.adalora_scaling, self.use_rslora)
            if self.gate:
                raise ValueError("gate and adalora exclude each other; set one of them")
            if self.init_lora_weights == "gaussian":
                raise ValueError(
                    "init_lora_weights='gaussian' is not for adalora; set True or False"
                )


def _check_regex(name: str, pattern) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must be a str, got {pattern!r} of type {type(pattern).__name__}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is not a regular expression: {error}") from error


def _names_or_regex(name: str, value) -> str | list[str]:
    if isinstance(value, str):
        _check_regex(name, value)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{name} must be a list of names or a str, got {type(value).__name__}")
    for i, entry in enumerate(value):
        if not isinstance(entry, str):
            raise TypeError(
                f"{name}[{i}] must be a str, got {entry!r} of type {type(entry).__name__}"
            )
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def _matches(patterns: str | Sequence[str], name: str) -> bool:
    """PEFT's rule: a str is a regular expression of the whole name, a list has names or endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


def _lies_in(patterns: Sequence[str], name: str) -> bool:
    """The module or one that contains it matches."""
    parts = name.split(".")
    return any(_matches(patterns, ".".join(parts[:n])) for n in range(1, len(parts) + 1))


def _pattern_key(patterns: Iterable[str], name: str) -> str | None:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def nearest(wanted: Iterable[str], names: Iterable[str]) -> str:
    """The names, or last parts of them, that look most like the wanted ones, in words. Of many, or
    long ones, the first and their ends alone: both may come from a file."""
    known = list(dict.fromkeys(n for name in names for n in (name.rpartition(".")[2], name)))
    ends = [n[-_LONGEST_COMPARED:] for n in islice(known, _MOST_COMPARED)]
    near = [
        m
        for w in islice(wanted, 3)
        for m in difflib.get_close_matches(w[-_LONGEST_COMPARED:], ends, n=3, cutoff=0.5)
    ]
    return ", ".join(map(shown_name, dict.fromkeys(near or known[:5]))) or (
        "none, the model has no nn.Linear"
    )


def _find_targets(
    config: LoRAConfig, names: dict[str, torch.nn.Module], head
) -> dict[str, torch.nn.Module]:
    """{name: module} to adapt, one name a module; `names` has all names of a shared module."""
    saved = config.modules_to_save or []
    excluded = {
        id(module)
        for name, module in names.items()
        if (config.exclude_modules and _matches(config.exclude_modules, name))
        or _lies_in(saved, name)
    }
    all_linear = (
        isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    )
    targets: dict[int, str] = {}
    for name, module in names.items():
        if all_linear:
            wanted = isinstance(module, torch.nn.Linear) and module is not head
        else:
            wanted = _matches(config.target_modules, name)
        if wanted and id(module) not in excluded:
            targets.setdefault(id(module), name)
    return {name: names[name] for name in targets.values()}


def _names(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every name of every module, of a shared one too."""
    return {name: m for name, m in named_modules(model, every_name=True) if name}


def targets_of(model: torch.nn.Module, config: LoRAConfig) -> dict[str, torch.nn.Module]:
    """{name: module} that `config` names in `model`; ValueError with the nearest names if none, and
    TypeError for a model of PEFT."""
    check_no_peft("model", model)
    names = _names(model)
    get_head = getattr(unwrapped(model), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    targets = _find_targets(config, names, None if head is None else unwrapped(head))
    if not targets:
        wanted = config.target_modules
        hint = ""
        if isinstance(wanted, str) and wanted.lower() != ALL_LINEAR:
            hint = f" (a str is a regular expression of the whole name; for a suffix: [{wanted!r}])"
        linears = [name for name, m in names.items() if isinstance(m, torch.nn.Linear)]
        raise ValueError(
            f"target_modules={wanted!r} matches no module that is not excluded{hint}; nearest: "
            f"{nearest([wanted] if isinstance(wanted, str) else wanted, linears)}"
        )
    return targets


def _resize_token_embeddings(
    model, new_num_tokens=None, pad_to_multiple_of=None, *args, **kwargs
) -> torch.nn.Module:
    """transformers' own, which would put a plain layer in the place of an adapted one."""
    head = model.get_output_embeddings()
    if isinstance(head, (*ADAPTED, MultiLoRALinear)):
        old, pad = head.weight.shape[0], pad_to_multiple_of or 1
        new = old if new_num_tokens is None else new_num_tokens
        if (new := -(-new // pad) * pad) != old:
            raise RuntimeError(
                f"resize_token_embeddings from {old} to {new} tokens would lose the adapter of the "
                f"output head, a {kind_of(head)}; resize before the adapter is put there"
            )
    resize = type(model).resize_token_embeddings
    return resize(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def _keep_head(model: torch.nn.Module, new: Iterable[torch.nn.Module]) -> None:
    """Let no model of transformers lose an adapted output head."""
    placed = {id(module) for module in new if isinstance(module, (*ADAPTED, MultiLoRALinear))}
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", None)
        if callable(head) and hasattr(module, "resize_token_embeddings") and id(head()) in placed:
            resize = functools.partial(_resize_token_embeddings, module)
            module.resize_token_embeddings = resize  # type: ignore[assignment]


def replace_modules(model: torch.nn.Module, new: Mapping[int, torch.nn.Module]) -> None:
    """Put new[id(module)] in the place of module, everywhere in model where it occurs."""
    names = _names(model)
    for name, module in names.items():
        if id(module) in new:
            path, _, child = name.rpartition(".")
            parent = names[path] if path else unwrapped(model)
            setattr(parent, child, new[id(module)])
            if isinstance(parent, torch.nn.TransformerEncoderLayer):
                # Its fused inference path reads linear1.weight and would pass the adapter by.
                parent.activation_relu_or_gelu = 0
    _keep_head(model, new.values())


def _warn_unused(config: LoRAConfig, names: Iterable[str], targets: Iterable[str]) -> None:
    """What was asked for and met no module is most often a misspelling."""
    unused = []
    for what in ("target_modules", "exclude_modules"):
        patterns = getattr(config, what)
        if isinstance(patterns, list):
            unused += [(what, p) for p in patterns if not any(_matches([p], n) for n in names)]
    for what in ("rank_pattern", "alpha_pattern"):
        used = {_pattern_key([key], n) for key in getattr(config, what) for n in targets}
        unused += [(what, key) for key in getattr(config, what) if key not in used]
    for what, entry in unused:
        warnings.warn(
            f"{what}: {entry!r} matches no module; nearest: {nearest([entry], names)}",
            stacklevel=3,
        )


def inject(
    model: torch.nn.Module, config: LoRAConfig, *, adapter_dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """Give the layers that `config` names an adapter, in place, and freeze everything else.

    Every matching nn.Linear becomes a LoRALinear (SoRALinear with config.gate, AdaLoRALinear with
    config.adalora) that shares its weight and bias, and every matching layer of bitsandbytes or of
    torchao's quantisation a LoRAAdapter around it (which AdaLoRA has no form of). A module that
    occurs at several places of the model is replaced once, under the first of its names that
    matches unless any is excluded, and put at all of them. Then only adapters, and what config.bias
    and config.modules_to_save name, require a gradient.

    A layer that accelerate's device_map has placed keeps its place, and one that it offloads to the
    CPU or the disk gets a LoRAAdapter around it. Where a model of transformers has gradient
    checkpointing on, its enable_input_require_grads() is called: a reentrant checkpoint gives no
    gradient to what is in it unless its input requires one, and inputs of a frozen model do not.

    adapter_dtype: dtype of A and B; None is each weight's own, torch.float32 keeps fp32 masters;
        around a quantised layer see LoRAAdapter.

    Returns model, which keeps a copy of config as model.fused_lora_config. Make optimisers after
    this. Where the output head of a model of transformers is adapted, its resize_token_embeddings
    raises RuntimeError for another size: resize before.

    Nothing is changed where one of these is raised: TypeError for a model or config of another
    kind, for a model with adapters of PEFT (fl.accelerate takes it), for a model that is itself the
    layer (use LoRALinear.from_linear), for a matching module that is none of these, by name, and
    for what bias or modules_to_save would train of an offloaded layer; ValueError where no module
    matches, with the nearest names; RuntimeError where the model has adapters already, or is in
    DistributedDataParallel or FullyShardedDataParallel, which take no new Parameters. A name or
    pattern that meets nothing beside others that do is a warning.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    if any(isinstance(m, ADAPTED) for m in model.modules()):
        raise RuntimeError("model has adapters already; inject into a model only once")
    bare = unwrapped(model)
    if isinstance(bare, torch.nn.Linear):
        raise TypeError(
            f"model is itself a linear layer, which cannot be replaced in place; use "
            f"{'LoRAAdapter' if is_quantised(bare) else 'LoRALinear.from_linear'}"
        )
    check_takes_parameters("inject", model)

    names = _names(model)
    targets = targets_of(model, config)
    for name, module in targets.items():
        if keeps_its_product(module):
            check_adapter_dtype(adapter_dtype)
            if config.adalora:
                what = "quantised" if is_quantised(module) else "offloaded"
                raise TypeError(
                    f"target module {name!r} is a {kind_of(module)}, {what}; adalora is for plain "
                    f"torch.nn.Linear"
                )
            continue
        check_linear(f"target module {name!r}", module, placed=True)
        if adapter_dtype not in (None, torch.float32, module.weight.dtype):
            raise TypeError(
                f"adapter_dtype must be None, torch.float32 or the weight's dtype, got "
                f"{adapter_dtype} for {name!r} of dtype {module.weight.dtype}"
            )
    for entry in config.modules_to_save or []:
        if not any(_matches([entry], name) for name in names):
            raise ValueError(
                f"modules_to_save: {entry!r} matches no module; nearest: {nearest([entry], names)}"
            )
    for name, module in names.items():
        if is_offloaded(module):
            _check_offloaded(config, name, module, name in targets)
    _warn_unused(config, names, targets)

    model.requires_grad_(False)
    new: dict[int, torch.nn.Module] = {
        id(m): _adapted(m, name, config, adapter_dtype) for name, m in targets.items()
    }
    for name, module in names.items():
        if _matches(config.modules_to_save or [], name) and id(module) not in new:
            new[id(module)] = copy.deepcopy(module).requires_grad_(True)
    replace_modules(model, new)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
    elif config.bias == "lora_only":
        for layer in model.modules():
            if isinstance(layer, ADAPTED) and layer.bias is not None:
                layer.bias.requires_grad_(True)
    if getattr(bare, "is_gradient_checkpointing", False):
        bare.enable_input_require_grads()  # type: ignore[operator]
    bare.fused_lora_config = copy.deepcopy(config)  # type: ignore[assignment]
    return model


def _check_offloaded(config: LoRAConfig, name: str, module: torch.nn.Module, target: bool) -> None:
    """What comes for a call and goes after it keeps no gradient."""
    trained = "modules_to_save" if _lies_in(config.modules_to_save or [], name) else None
    if config.bias == "all" or (target and config.bias == "lora_only"):
        trained = "bias" if getattr(module, "bias", None) is not None else trained
    if trained is not None:
        raise TypeError(
            f"{trained}={getattr(config, trained)!r} would train a part of {name!r}, which is "
            f"offloaded; leave it on its device, or leave it frozen"
        )


def _adapted(linear, name: str, config: LoRAConfig, adapter_dtype) -> LoRALinear | LoRAAdapter:
    """The adapted form of a layer; the hook of accelerate that it has goes over to it."""
    if (hook := placement(linear)) is None or keeps_its_product(linear):
        return _with_adapter(linear, name, config, adapter_dtype)
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(linear)
    return add_hook_to_module(_with_adapter(linear, name, config, adapter_dtype), hook)


def _with_adapter(linear, name: str, config: LoRAConfig, adapter_dtype) -> LoRALinear | LoRAAdapter:
    rank_key = _pattern_key(config.rank_pattern, name)
    alpha_key = _pattern_key(config.alpha_pattern, name)
    args = {
        "r": config.r if rank_key is None else config.rank_pattern[rank_key],
        "lora_alpha": config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key],
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "init": config.init_lora_weights,
        "adapter_dtype": adapter_dtype,
    }
    if keeps_its_product(linear):
        return LoRAAdapter(linear, gate=config.gate, gate_init=config.gate_init, **args)
    if config.adalora:
        return AdaLoRALinear.from_linear(linear, scaling=config.adalora_scaling, **args)
    if config.gate:
        return SoRALinear.from_linear(linear, gate_init=config.gate_init, **args)
    return LoRALinear.from_linear(linear, **args)


def _adapted_layers(model: torch.nn.Module, merged: bool) -> dict[str, LoRALinear]:
    """The LoRALinear modules of model, all of which must be in the state `merged`."""
    layers = {name: m for name, m in named_modules(model) if isinstance(m, LoRALinear)}
    for name, module in named_modules(model):
        if isinstance(module, LoRAAdapter):
            raise NotImplementedError(why_unmergeable(repr(name), module))
    if not layers:
        raise ValueError("model has no LoRALinear; inject adapters first")
    for name, layer in layers.items():
        check_whole("unmerge" if merged else "merge", name, layer)
        layer.check_values(repr(name))
    wrong = [repr(name) for name, layer in layers.items() if layer.merged is not merged]
    if wrong:
        state = "are not merged" if merged else "are merged already"
        raise RuntimeError(f"{len(wrong)} of {len(layers)} layers {state}: {', '.join(wrong[:5])}")
    return layers


def _memory(t: torch.Tensor) -> int:
    """The same for two Parameters whose values are at one place."""
    return (t.data_ptr() if type(t) is torch.nn.Parameter else 0) or id(t)


def merge(model: torch.nn.Module, keep_base: str = "none") -> None:
    """LoRALinear.merge of every adapted layer; the model then costs what its base costs.

    Raises before anything is written: NotImplementedError where there is a LoRAAdapter, whose
    weight is its base's own, or where parameters are sharded; ValueError where there is no
    LoRALinear, for another keep_base, where a merged weight would have values that its dtype cannot
    hold (NaN, fp16 overflow), or where a weight to merge belongs to another module too, which
    merging would change; RuntimeError where a layer is merged already, or has its weight on
    the meta device.
    """
    check_choice("keep_base", keep_base, KEEP_BASE)
    layers = _adapted_layers(model, merged=False)
    owners: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        for own, parameter in module.named_parameters(name, recurse=False):
            owners.setdefault(_memory(parameter), []).append(own)
    for layer in layers.values():
        if len(shared := owners[_memory(layer.weight)]) > 1:
            raise ValueError(
                f"{' and '.join(shared)} are one tied weight, and merging would change all of "
                f"them; untie them first"
            )
    for name, layer in layers.items():
        layer.check_merge(repr(name))
    for layer in layers.values():
        layer.merge(keep_base)


def unmerge(model: torch.nn.Module) -> None:
    """LoRALinear.unmerge of every adapted layer of model.

    Raises before anything is written: NotImplementedError where there is a LoRAAdapter or
    parameters are sharded, ValueError where there is no LoRALinear or a weight would not be finite,
    RuntimeError where a layer is not merged or is on the meta device.
    """
    layers = _adapted_layers(model, merged=True)
    for name, layer in layers.items():
        layer.check_merge(repr(name))
    for layer in layers.values():
        layer.unmerge()
