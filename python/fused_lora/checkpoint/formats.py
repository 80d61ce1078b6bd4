"""What each peft_type keeps of a layer, and what a config may say of it.

A name in a config is never imported, and a pattern never run as a regular expression.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_lora.files import shown, shown_name
from fused_lora.names import clean_name
from fused_lora.nn.checks import check_probability
from fused_lora.nn.linear import lora_scale

LARGEST_RANK = 4096

# Fields that ask for something else than LoRA: what they may be here, and what else they would do.
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "use_dora": ((False, None), "it scales the rows of the weight (DoRA)"),
    "lora_bias": ((False, None), "lora_B would have a bias of its own"),
    "fan_in_fan_out": ((False, None), "the weight would be stored as [K, N]"),
    "trainable_token_indices": ((None, [], {}), "it replaces rows of the embedding"),
    "layer_replication": ((None, []), "it changes the layers of the model"),
    "target_parameters": ((None, []), "only the weights of linear layers are adapted"),
    "alora_invocation_tokens": ((None, []), "only some of the tokens would be adapted"),
    "use_qalora": ((False, None), "it pools the input"),
    "use_bdlora": ((None, False), "its factors are block-diagonal"),
    "arrow_config": ((None,), "it routes between adapters"),
    "kasa_config": ((None,), "it changes the base weight"),
    "velora_config": ((None,), "its backward is another"),
    "monteclora_config": ((None,), "its weights are drawn at random"),
    "ensure_weight_tying": ((False, None), "adapters of tied layers would be tied"),
    "enable_lora": ((None,), "only a part of the outputs would be adapted"),
}
# With these the base weight stays the model's.
INITS = True, False, None, "gaussian", "orthogonal", "eva", "mica"
# The other fields of PEFT's config. Which modules are adapted the names of the tensors say.
KNOWN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "merge_weights", "modules_to_save", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "task_type", "use_rslora"),
}
# A name as PEFT's patterns spell it: dots, escaped or not, and no other special character.
_NAME = re.compile(r"(\^?)((?:\\\W|[^\\^$|?*+()\[\]{}])+)\$?", re.DOTALL)

# Shape, number of dimensions, and which of them is the rank.
_FORMS = {"lora_A": ("[{}, K]", 2, 0), "lora_B": ("[N, {}]", 2, 1), "lora_gate": ("[{}]", 1, 0)}


class AdapterWeights(NamedTuple):
    """The adapter of one layer: lora_a [r, K], lora_b [N, r], scale and gate [r] or None."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    gate: Tensor | None


def check_rank(name: str, r) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name} must be an int, got {shown(r)}")
    if not 1 <= r <= LARGEST_RANK:
        raise ValueError(f"{name} must lie in [1, {LARGEST_RANK}], got {shown(r)}")


def check_alpha(name: str, alpha) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(alpha)}")
    # The scale is a number in fp32. Written so that NaN fails.
    if not abs(alpha) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite, got {shown(alpha)}")


class Patterns:
    """PEFT's rank_pattern or alpha_pattern, with keys taken as names, never run as expressions.

    A key stands for the module of that name and, unless it begins with ^, for those whose name ends
    in "." + it; the first that does counts. unread: {value: key} of keys that are more than a name.
    """

    def __init__(self, field: str, patterns, check_value: Callable[[str, Any], None]) -> None:
        if not isinstance(patterns or {}, dict):
            raise TypeError(f"{field} must be an object, got {type(patterns).__name__}")
        self.unread: dict[Any, str] = {}
        self._by_name: dict[str, tuple[int, Any]] = {}
        for i, (key, value) in enumerate((patterns or {}).items()):
            check_value(f"{field}[{shown(key)}]", value)
            if spelt := _NAME.fullmatch(key):
                name = spelt[1] + clean_name(re.sub(r"\\(\W)", r"\1", spelt[2]))
                self._by_name.setdefault(name, (i, value))
            else:
                self.unread[value] = key

    def of(self, module: str, default):
        endings = [module[i + 1 :] for i, c in enumerate(module) if c == "."]
        found = [self._by_name.get(name) for name in ("^" + module, module, *endings)]
        return min((f for f in found if f is not None), default=(0, default))[1]


class LoRAReader:
    """peft_type LORA: lora_A.weight [r, K] and lora_B.weight [N, r] of each layer.

    A reader is made from a config, which it checks; it then knows the tensors of a layer by the
    `endings` of their names, checks their shapes and makes AdapterWeights of them. An embedding,
    whose inputs are its tokens, has A [r, V] and B [D, r] under `embedding_endings`. unknown:
    fields of the config that say nothing to it.
    """

    endings: ClassVar = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
    embedding_endings: ClassVar = {"lora_A": ".lora_embedding_A", "lora_B": ".lora_embedding_B"}
    unknown: Sequence[str] = ()

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        for field, (plain, reason) in UNSUPPORTED.items():
            if config.get(field) not in plain:
                raise NotImplementedError(
                    f"{path}: {field}={shown(config[field])} is not supported: {reason}"
                )
        init = config.get("init_lora_weights")
        if init not in INITS:
            raise NotImplementedError(
                f"{path}: init_lora_weights={shown(init)} is not supported: the adapter belongs to "
                f"a base weight that PEFT changes; save it as plain LoRA, with PEFT's "
                f"save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        self.unknown = sorted(set(config) - KNOWN - set(UNSUPPORTED))
        check_rank(f"{path}: r", config.get("r"))
        check_alpha(f"{path}: lora_alpha", config.get("lora_alpha"))
        self.rank, self.alpha = config["r"], config["lora_alpha"]
        self.ranks = Patterns(f"{path}: rank_pattern", config.get("rank_pattern"), check_rank)
        self.alphas = Patterns(f"{path}: alpha_pattern", config.get("alpha_pattern"), check_alpha)
        for key in self.alphas.unread.values():
            raise NotImplementedError(
                f"{path}: alpha_pattern has the key {shown(key)}, a regular expression, "
                f"which is never run; write the names of modules"
            )
        self.use_rslora = config.get("use_rslora") or False
        if not isinstance(self.use_rslora, bool):
            raise TypeError(
                f"{path}: use_rslora must be true or false, got {shown(self.use_rslora)}"
            )
        check_probability(f"{path}: lora_dropout", config.get("lora_dropout") or 0.0)

    def check_shapes(
        self, path: Path, module: str, keys: dict[str, str], shapes: dict[str, list[int]]
    ) -> None:
        """Hold the tensors of a layer, {part: key} and {part: shape}, to the config."""
        rank = self.ranks.of(module, self.rank)
        if len(shapes["lora_A"]) == 2 and shapes["lora_A"][0] in self.ranks.unread:
            # A key that is not read may have meant this module: the tensor tells the rank.
            rank = shapes["lora_A"][0]
        for part, shape in shapes.items():
            form, dims, axis = _FORMS[part]
            if len(shape) != dims or shape[axis] != rank or 0 in shape:
                raise ValueError(
                    f"{path}: {shown_name(keys[part])} must have shape {form.format(rank)}, got "
                    f"{shown(shape)}"
                )

    def check_modules(self, path: Path, layers: Collection[str]) -> None:
        """Hold the names of the layers to the config."""

    def weights(self, module: str, tensors: dict[str, Tensor]) -> AdapterWeights:
        a, b = tensors["lora_A"], tensors["lora_B"]
        alpha = self.alphas.of(module, self.alpha)
        scale = lora_scale(alpha, a.shape[0], self.use_rslora)
        return AdapterWeights(a, b, scale, tensors.get("lora_gate"))


class SoRAReader(LoRAReader):
    """peft_type SORA, which PEFT refuses, where it would ignore the gates: lora_gate [r] too."""

    endings: ClassVar = {**LoRAReader.endings, "lora_gate": ".lora_gate"}


READERS: dict[str, type[LoRAReader]] = {"LORA": LoRAReader, "SORA": SoRAReader}


def reader_of(
    path: Path, config: dict[str, Any], readers: Mapping[str, type[LoRAReader]]
) -> LoRAReader:
    """The reader that the config's peft_type asks for."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in readers:
        wanted = f"one of {', '.join(readers)}" if len(readers) > 1 else next(iter(readers))
        raise ValueError(f"{path}: peft_type must be {wanted}, got {shown(kind)}")
    return readers[kind](path, config)
