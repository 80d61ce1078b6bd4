"""What the dimensions of a layer's input mean in a model that was called with a batch.

A size tells nothing: a layer of an expert that gets as many tokens as there are sequences has an
input of the same shape as a pooled one. So a row belongs to a sequence by what the model's own call
says, by a convention of transformers, or by what the caller declares; elsewhere it is an error.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.names import clean_name
from fused_lora.ops.routing import AdapterRouting

SEQUENCE, TOKEN = "sequence", "token"
# What models of transformers call inputs with the batch first and the length second.
TEXTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "hidden_states",
    "encoder_hidden_states",
    "labels",
)
MEDIA = ("input_features", "input_values", "pixel_values")


class Call(NamedTuple):
    """A call of a served model, or of a part of it.

    lead: the leading shape of its input. lengths: those of its sequences. media: beside text it has
    inputs of which a sequence may have any number.
    """

    module: torch.nn.Module
    route: object
    lead: torch.Size
    lengths: frozenset[int]
    media: bool
    outer: "Call | None"


def read_call(module, args, kwargs, route, outer) -> Call | None:
    """What a call says of its batch; None where no input of it is a tensor."""
    named = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.ndim > 0}
    given = [v for v in args if isinstance(v, Tensor) and v.ndim > 0]
    first = next((named[k] for k in (*TEXTS, *MEDIA) if k in named), None)
    first = given[0] if given else next(iter(named.values()), None) if first is None else first
    if first is None:
        return None
    encoded = kwargs.get("encoder_outputs")
    encoded = encoded[0] if isinstance(encoded, (tuple, list, Mapping)) and len(encoded) else None
    texts = [first, encoded, *(named.get(k) for k in TEXTS)]
    leads = [_lead(t) for t in texts if isinstance(t, Tensor)]
    lengths = frozenset(lead[1] for lead in leads if len(lead) > 1)
    media = any(k in named for k in TEXTS[:2]) and any(k.startswith(MEDIA) for k in named)
    return Call(module, route, _lead(first), lengths, media, outer)


def _lead(t: Tensor) -> torch.Size:
    return t.shape[:-1] if t.is_floating_point() else t.shape


class Layout:
    """Which rows of a layer's input belong to which sequence.

    names: of the layers. rows: {layer: "sequence" | "token"}, what a row of their inputs [n, K] is;
    batch_first: every input of three or more dimensions has the batch first.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        names: Iterable[str],
        rows: Mapping[str, str] | None,
        batch_first: bool | None,
    ) -> None:
        names = list(names)
        self.batch_first = batch_first is True
        self.rows = _declared(names, rows or {})
        self.of_transformers = any(
            base.__name__ == "PreTrainedModel" for m in model.modules() for base in type(m).__mro__
        )
        # The paths of lists of modules: of blocks, of the experts of one.
        self.lists = tuple(
            f"{clean_name(name)}."
            for name, m in model.named_modules(remove_duplicate=False)
            if name and isinstance(m, (torch.nn.ModuleList, torch.nn.ModuleDict))
        )
        self.depth = {name: sum(name.startswith(path) for path in self.lists) for name in names}
        self._first: set[str] = set()  # layers that were seen to have the batch first
        self._other: set[str] = set()  # and those that were seen to have not

    def check_call(self, made: Call, routing: AdapterRouting, repeats: set[int]) -> None:
        count, batch = routing.shape[0], made.lead[0] if made.lead else None
        if batch not in {count * times for times in repeats}:
            raise ValueError(
                f"AdapterStore: the route names the adapters of {count} sequences, the model was "
                f"called with an input of leading shape {list(made.lead)}; its first dimension "
                f"must be the batch, an entry of the route for each sequence"
            )

    def rows_of(
        self, name: str, lead: torch.Size, routing: AdapterRouting, made: Call | None
    ) -> AdapterRouting:
        """The routing of the rows of a layer's input of leading shape `lead`."""
        shape = routing.shape
        if not shape:
            return routing
        times = made.lead[0] // max(1, shape[0]) if made is not None else 1
        batch, ids_per_sequence = shape[0] * times, shape[1:]
        if len(lead) > 1:
            known = lead[0] == batch and lead[1 : len(shape)] == ids_per_sequence
            if made is not None and made.media and lead[1] not in made.lengths:
                known = False
            self.learn(name, lead, made)
            if known:
                self._check_batch_first(name, lead, batch)
                return routing.spread(lead, times)
        elif len(lead) == 1:
            means = self._meaning(name, lead[0], batch, made)
            if means == SEQUENCE and not ids_per_sequence:
                return routing.spread(lead, times)
            if means == TOKEN and (not ids_per_sequence or shape[1:].numel() * batch == lead[0]):
                return routing.spread(lead, times)
        of = "" if made is None else f", in a call of leading shape {list(made.lead)}"
        raise ValueError(
            f"AdapterStore: which rows of {name!r} belong to which of the adapters is not known: "
            f"its input has leading shape {list(lead)} for ids of shape {list(shape)}{of}; leave "
            f"the layer out by target_modules, or make the store with rows={{{name!r}: 'sequence'}}"
            f" (or 'token') if a row of it is one, or give the batch one adapter"
        )

    def learn(self, name: str, lead: torch.Size, made: Call | None) -> None:
        """See which of an input's first two dimensions is the batch, where one of them is."""
        if made is None or len(lead) < 2 or not made.lead:
            return
        is_batch = [size == made.lead[0] for size in lead[:2]]
        if is_batch == [True, False]:
            self._first.add(name)
        elif is_batch == [False, True]:
            self._other.add(name)

    def _check_batch_first(self, name: str, lead: torch.Size, batch: int) -> None:
        learnt = name in self._first and name not in self._other
        if lead[1] == batch and not self.batch_first and not learnt:
            raise ValueError(
                f"AdapterStore: the input of {name!r} has leading shape {list(lead)}, and sizes do "
                f"not tell which of the two is the batch of {batch}; make the store with "
                f"batch_first=True if the first is in every layer (a call with another length "
                f"tells it too)"
            )

    def _meaning(self, name: str, n: int, batch: int, made: Call | None) -> str | None:
        """What a row of an input [n, K] is, "sequence" or "token"; None: not known."""
        lengths = frozenset() if made is None else made.lengths
        tokens = any(n == batch * length for length in lengths)
        if (declared := self.rows.get(name)) is not None:
            return declared if (tokens if declared == TOKEN else n == batch) else None
        if made is None or n not in (batch, *(batch * length for length in lengths)):
            return None
        if len(made.lead) == 1:  # the model itself was called with a row a sequence
            return SEQUENCE
        if not self.of_transformers or made.media:
            return None
        if tokens:  # flattened, in a model or in a block; not in one of a block's experts
            return TOKEN if self.depth[name] <= 1 else None
        return SEQUENCE if self.depth[name] == 0 else None  # pooled, behind the blocks


def _declared(names: list[str], rows: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for key, means in rows.items():
        if means not in (SEQUENCE, TOKEN):
            raise ValueError(
                f"AdapterStore: rows[{key!r}] must be {SEQUENCE!r} or {TOKEN!r}, got {means!r}"
            )
        mine = [name for name in names if name == key or name.endswith(f".{key}")]
        if not mine:
            raise ValueError(f"AdapterStore: rows names {key!r}, which is no layer of the store")
        found.update(dict.fromkeys(mine, means))
    return found
