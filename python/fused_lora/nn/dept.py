"""DePT around a whole model: soft prompt and low-rank pair at its input, everything else frozen."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora.files import Header, read_whole, shown, shown_name, write_files
from fused_lora.nn.checks import check_choice, check_no_peft, check_number, check_rank
from fused_lora.nn.embedding import DePTEmbedding
from fused_lora.nn.linear import lora_scale

PEFT_TYPE = "DEPT"  # PEFT refuses it, where it would take the folder for something else
PADDING_SIDES = ("left", "right", None)
# What a config must hold, and nothing else.
FIELDS = ("peft_type", "prompt_length", "max_length", "r", "lora_alpha", "use_rslora")
DTYPES = "F64", "F32", "F16", "BF16"
IGNORED_LABEL = -100


class DePT(torch.nn.Module):
    """A model of transformers with a decomposed soft prompt (DePT, arXiv 2309.05173).

        the model's input = [P ; E[ids] + scale * (A B)[positions]]

    Positions count the tokens of the attention mask, so padding may be on either side. model is
    called with inputs_embeds, and with attention_mask, position_ids and token_type_ids made longer
    by the prompt; labels of every token get -100 for the prompt's rows. Logits of a model that
    predicts tokens have m rows in front. Of an encoder-decoder model the encoder has the prompt.
    Steps with a cache have no prompt, and their positions go on.

    Args:
        model: what has get_input_embeddings() (a plain nn.Embedding) and takes inputs_embeds. It
            is frozen, unless fused_lora.inject gave it adapters: what that trains is trained here
            too.
        prompt_length, max_length, r, lora_alpha, use_rslora, init, prompt_init, adapter_dtype: as
            in DePTEmbedding.
        padding_side: "right" spares a look at the mask: positions are 0 .. L-1, which is the faster
            path. "left" and None count.

    Attributes: model, embedding (the DePTEmbedding, which shares the model's word embeddings).

    Raises TypeError and ValueError that name the argument, before anything is changed.
    """

    model: Any

    def __init__(
        self,
        model: torch.nn.Module,
        prompt_length: int,
        max_length: int,
        r: int,
        lora_alpha: float = 8,
        use_rslora: bool = True,
        init: bool | str = "kaiming",
        prompt_init: str | Tensor | Sequence[int] = "vocab",
        *,
        adapter_dtype: torch.dtype | None = None,
        padding_side: str | None = None,
    ) -> None:
        check_choice("padding_side", padding_side, PADDING_SIDES)
        input_embeddings = getattr(model, "get_input_embeddings", None)
        if not callable(input_embeddings):
            raise TypeError(f"model must have get_input_embeddings(), got a {type(model).__name__}")
        check_no_peft("model", model)
        super().__init__()
        self.embedding = DePTEmbedding.from_embedding(
            input_embeddings(), prompt_length, max_length, r, lora_alpha, use_rslora,
            init, prompt_init, adapter_dtype=adapter_dtype,
        )  # fmt: skip
        self.model, self.padding_side = model, padding_side
        if not hasattr(model, "fused_lora_config"):
            model.requires_grad_(False)
        takes = inspect.signature(model.forward).parameters
        self._takes_position_ids = "position_ids" in takes
        self._encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._generating = False
        model.register_forward_pre_hook(self._generation_step, with_kwargs=True)

    @property
    def config(self):
        return self.model.config

    def reset_parameters(self) -> None:
        """Draw prompt and pair anew; the model is left as it is."""
        self._share_words()
        self.embedding.reset_parameters()

    def _share_words(self) -> None:
        """Take the model's words where they are another Parameter now, as to_empty and a
        load_state_dict that assigns leave them."""
        if (words := self.model.get_input_embeddings().weight) is not self.embedding.weight:
            self.embedding.weight = words

    def _positions(self, attention_mask: Tensor | None) -> Tensor | None:
        """-1 where the mask is 0; elsewhere how many tokens come before."""
        if attention_mask is None or self.padding_side == "right":
            return None
        counted = attention_mask.long().cumsum(-1) - 1
        return counted.masked_fill(attention_mask == 0, -1)

    def _with_prompt(self, mask: Tensor | None, value: int = 1) -> Tensor | None:
        return None if mask is None else F.pad(mask, (self.embedding.prompt_length, 0), value=value)

    def _first(self, input_ids, attention_mask):
        """(inputs_embeds, attention_mask) of a call without anything in a cache."""
        if self._encoder_decoder and attention_mask is not None and self.padding_side != "right":
            # Relative positions count what is between: tokens move up to the prompt.
            order = (attention_mask == 0).to(torch.int8).argsort(dim=-1, stable=True)
            input_ids = input_ids.gather(-1, order)
            attention_mask = attention_mask.gather(-1, order)
        self._share_words()
        embeds = self.embedding(input_ids, self._positions(attention_mask))
        return embeds, self._with_prompt(attention_mask)

    def _step(self, input_ids, mask, past: int):
        """Embeddings of the tokens that follow `past` rows of a cache; mask is over all rows."""
        self._share_words()
        L, m = input_ids.shape[1], self.embedding.prompt_length
        if mask is None:
            positions = torch.arange(past - m, past - m + L, device=input_ids.device)
        else:
            positions = (mask.long().cumsum(-1) - 1 - m)[:, -L:]
        return self.embedding(input_ids, positions, with_prompt=False)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs
    ):
        """What model gives for inputs_embeds made of input_ids [N, L].

        attention_mask [N, L], position_ids, token_type_ids and labels are of the tokens alone, and
        in steps with a cache attention_mask also of the tokens in it. All other arguments are
        passed on. Raises TypeError for inputs_embeds, ValueError for ids or a mask that are not
        [N, L].
        """
        if kwargs.get("inputs_embeds") is not None:
            raise TypeError("DePT makes inputs_embeds itself; pass input_ids")
        if input_ids is None:  # a decoder's step, over what the encoder has made
            mask = self._with_prompt(attention_mask)
            return self.model(attention_mask=mask, **kwargs)
        for name, t in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if t is not None and t.ndim != 2:
                raise ValueError(f"{name} must have shape [N, L], got {list(t.shape)}")
        m, past = self.embedding.prompt_length, _cached(kwargs)
        labels, position_ids = kwargs.get("labels"), kwargs.get("position_ids")
        if past:
            mask = self._with_prompt(attention_mask)
            embeds = self._step(input_ids, mask, past)
            if position_ids is not None:
                kwargs["position_ids"] = position_ids + m
        else:
            embeds, mask = self._first(input_ids, attention_mask)
            if position_ids is not None:
                before = torch.arange(m, device=position_ids.device).expand(len(position_ids), m)
                kwargs["position_ids"] = torch.cat((before.to(position_ids), position_ids + m), -1)
            if kwargs.get("token_type_ids") is not None:
                kwargs["token_type_ids"] = self._with_prompt(kwargs["token_type_ids"], 0)
            if labels is not None and not self._encoder_decoder and labels.shape == input_ids.shape:
                kwargs["labels"] = self._with_prompt(labels, IGNORED_LABEL)
        if position_ids is None and mask is not None and self._takes_position_ids:
            counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = counted[:, -embeds.shape[1] :]
        return self.model(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """model.generate for input_ids [N, L]: as there with inputs_embeds, it returns the new
        tokens (of an encoder-decoder model, those of the decoder)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds, mask = self._first(input_ids, attention_mask)
        self._generating = True
        try:
            return self.model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        finally:
            self._generating = False

    def _generation_step(self, model, args, kwargs):
        """The tokens that model.generate has made come as ids: they have positions too."""
        ids = kwargs.get("input_ids")
        if not self._generating or ids is None:
            return None
        if not (past := _cached(kwargs)):
            raise RuntimeError("DePT generates with a cache; leave use_cache as it is")
        # generate leaves out a mask that masks nothing.
        embeds = self._step(ids, kwargs.get("attention_mask"), past)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeds}

    def save(self, folder: str | Path) -> None:
        """Write adapter_config.json (peft_type "DEPT") and adapter_model.safetensors (prompt,
        lora_a, lora_b) into a folder, which is made where there is none; both as one step."""
        own = self.embedding
        config = {"peft_type": PEFT_TYPE} | {name: getattr(own, name) for name in FIELDS[1:]}
        tensors = {name: t.detach().contiguous() for name, t in _trained(own).items()}
        write_files(Path(folder), config, tensors)

    def load(self, folder: str | Path) -> None:
        """Take prompt, pair and scale of a folder that save() wrote: this task's, or a source
        task's to start from.

        A save that comes in between is read whole, or not at all. Raises before anything is
        changed: FileNotFoundError, NotADirectoryError, TypeError (dtypes, types of fields),
        ValueError (another peft_type, prompt length, max_length or rank; a field or tensor that is
        missing or unknown; NaN or infinity), RuntimeError where a save came in between each time.
        """
        self._take(folder, *read_dept(folder))

    @torch.no_grad()
    def _take(self, folder: str | Path, config: dict, tensors: dict[str, Tensor]) -> None:
        parameters = _trained(self.embedding)
        for name in FIELDS[1:4]:
            if config[name] != getattr(self.embedding, name):
                raise ValueError(
                    f"{folder}: {name} is {shown(config[name])}, and here "
                    f"{getattr(self.embedding, name)}"
                )
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"{folder}: {name} must have shape {list(parameter.shape)}, got "
                    f"{list(tensors[name].shape)}"
                )
            if not bool(tensors[name].to(parameter.dtype).isfinite().all()):
                raise ValueError(f"{folder}: {name} has values that {parameter.dtype} cannot hold")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
        own = self.embedding
        own.lora_alpha, own.use_rslora = config["lora_alpha"], config["use_rslora"]
        own.scale = lora_scale(own.lora_alpha, own.r, own.use_rslora)

    @classmethod
    def from_folder(cls, model: torch.nn.Module, folder: str | Path, **options) -> "DePT":
        """`model` with what save() wrote. options: adapter_dtype and padding_side."""
        config, tensors = read_dept(folder)
        dim = tensors["lora_b"].shape[1]
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        if (own := getattr(embeddings, "embedding_dim", dim)) != dim:
            raise ValueError(
                f"{folder}: the prompt is for embeddings of {dim}, and the model's have {own}"
            )
        sizes = {name: config[name] for name in FIELDS[1:]}
        made = cls(model, **sizes, **options)
        made._take(folder, config, tensors)
        return made


def _trained(embedding: DePTEmbedding) -> dict[str, Tensor]:
    own: dict[str, Tensor] = {"lora_a": embedding.lora_a, "lora_b": embedding.lora_b}
    return own if embedding.prompt is None else own | {"prompt": embedding.prompt}


def _cached(kwargs: dict) -> int:
    """How many rows the cache holds, by whichever name this version of transformers has for it."""
    for name in ("past_key_values", "cache"):
        if (cache := kwargs.get(name)) is not None:
            return int(cache.get_seq_length())
    return 0


def _check_dept(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != PEFT_TYPE:
        raise ValueError(f"{path}: peft_type must be {PEFT_TYPE!r}")
    if (wrong := set(config) ^ set(FIELDS)) != set():
        raise ValueError(f"{path}: fields missing or unknown: {_listed(wrong)}")
    for name in ("max_length", "r") + (("prompt_length",) if config["prompt_length"] != 0 else ()):
        check_rank(f"{path}: {name}", config[name])
    check_number(f"{path}: lora_alpha", config["lora_alpha"])
    check_choice(f"{path}: use_rslora", config["use_rslora"], (True, False))


def _check_tensors(path: Path, config: dict[str, Any], header: Header) -> None:
    """They are those of the config: their sizes in the file, before any is allocated."""
    m, S, r = (config[name] for name in FIELDS[1:4])
    shapes = {"lora_a": (S, r), "lora_b": (r, None)} | ({"prompt": (m, None)} if m else {})
    if (wrong := set(header) ^ set(shapes)) != set():
        raise ValueError(f"{path}: tensors missing or unknown: {_listed(wrong)}")
    dims = header["lora_b"]["shape"][1:] or [1]
    for name, (rows, columns) in shapes.items():
        wanted, found = [rows, columns or dims[0]], header[name]["shape"]
        if found != wanted:
            raise ValueError(f"{path}: {name} must have shape {wanted}, got {shown(found)}")
        if header[name]["dtype"] not in DTYPES:
            raise TypeError(
                f"{path}: {name} must be {', '.join(DTYPES)}, got {header[name]['dtype']}"
            )


def _listed(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown_name, sorted(names)[:3])) + more


def read_dept(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """(config, tensors) of a folder that DePT.save wrote, where it is saved meanwhile of the old
    save or the new one; raises as DePT.load does."""
    from safetensors import safe_open

    def read(path: Path, config: dict, weights: Path, opened: Callable[[], None]):
        _check_dept(path, config)
        _check_tensors(weights, config, header := Header(weights))
        with safe_open(weights, framework="pt") as file:
            opened()
            tensors = {name: file.get_tensor(name) for name in header}
        for name, t in tensors.items():
            if not bool(t.isfinite().all()):
                raise ValueError(f"{folder}: {name} has values that are not finite numbers")
        return config, tensors

    return read_whole(Path(folder), read)
