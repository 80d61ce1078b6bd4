"""Adapters of a whole model by name: loaded, replaced and removed while batches run."""

import contextlib
import contextvars
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fused_lora.checkpoint import AdapterWeights, read_adapter
from fused_lora.files import shown
from fused_lora.inject import LoRAConfig, nearest, replace_modules, targets_of
from fused_lora.names import check_takes_parameters
from fused_lora.nn import MultiLoRALinear
from fused_lora.nn.checks import check_linear
from fused_lora.ops.routing import AdapterRouting


class AdapterStore:
    """Many adapters for one model, each row of a batch with its own.

        store = fl.AdapterStore(model, max_adapters=64, max_rank=64)
        store.load("french", "path/of/a/PEFT/folder")
        with store.route(["french", None, "french"]):    # or ids, one a sequence or one a token
            model.generate(**batch)

    The linear layers that target_modules names (PEFT's words; "all-linear" is every one but the
    output head) become MultiLoRALinear in place. An adapter may lack layers, and have ranks and
    scales of its own in each. Outside of route the model is the base.

    A name has one id in every layer. load and add take a free one; where there is none, the adapter
    that was routed or loaded longest ago gives way, unless it is pinned. Rows that name a removed
    id get the base output. Every change holds the store's lock and is enqueued on the current
    stream, so batches may run in other threads; routes are of the thread (or task) that made them.

    Raises ValueError where target_modules matches no layer, TypeError for a matching layer that is
    not a plain nn.Linear, both before anything is changed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        max_adapters: int,
        max_rank: int,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_takes_parameters("AdapterStore", model, reduced=False)
        self._model = model
        targets: dict = targets_of(model, LoRAConfig(target_modules=target_modules))
        for name, module in targets.items():
            check_linear(f"target module {name!r}", module)
        self.max_adapters, self.max_rank, self.lock = max_adapters, max_rank, threading.RLock()
        self._routing: contextvars.ContextVar[AdapterRouting | None] = contextvars.ContextVar(
            "fused_lora routing", default=None
        )
        self._used: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._pinned: set[str] = set()
        self.layers = {
            name: MultiLoRALinear.from_linear(
                linear, max_adapters, max_rank, adapter_dtype=adapter_dtype
            )
            for name, linear in targets.items()
        }
        for layer in self.layers.values():
            layer.current_routing = self._routing.get
        replace_modules(model, {id(targets[name]): layer for name, layer in self.layers.items()})
        self._first = next(iter(self.layers.values())).bank

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, name: str) -> bool:
        return name in self._first

    def __repr__(self) -> str:
        return (
            f"AdapterStore({len(self.layers)} layers, {self.max_adapters} adapters of rank "
            f"{self.max_rank} at most): {', '.join(self.names) or 'empty'}"
        )

    @property
    def names(self) -> list[str]:
        return self._first.names

    def index(self, name: str) -> int:
        """The id of an adapter in every layer. Raises ValueError for an unknown name."""
        return self._first.index(name)

    def load(self, name: str, folder: str | Path, *, pin: bool = False) -> int:
        """Read an adapter folder (fused_lora.checkpoint.read_adapter) and add it; its id. Base
        weights that PEFT saves beside an adapted output head must be the model's."""
        return self.add(name, read_adapter(folder, self._model), pin=pin)

    def add(self, name: str, adapter: Mapping[str, AdapterWeights], *, pin: bool = False) -> int:
        """Put {module name: (lora_a, lora_b, scale, gate)} under a new name; its id.

        Raises before anything is written: ValueError for a name that is there, layers that the
        model lacks, a rank above max_rank, other shapes, and where every adapter is pinned.
        """
        self._check(adapter)
        with self.lock:
            if name in self:
                raise ValueError(
                    f"AdapterStore: there is an adapter {name!r} already; replace it, or remove it"
                )
            if len(self) == self.max_adapters:
                self._evict()
            for module, layer in self.layers.items():
                if module in adapter:
                    weights = AdapterWeights(*adapter[module])
                    index = layer.bank.add(
                        name,
                        weights.lora_a,
                        weights.lora_b,
                        scale=weights.scale,
                        gate=weights.gate,
                    )
                else:
                    index = layer.bank.reserve(name)
            self._used[name] = None
            if pin:
                self._pinned.add(name)
            return index

    def replace(self, name: str, adapter: Mapping[str, AdapterWeights] | str | Path) -> int:
        """Give a name another adapter (a mapping as in add, or a folder); its id, which stays.

        Layer by layer: a batch that is enqueued meanwhile sees the old or the new one whole in each
        layer.
        """
        if isinstance(adapter, (str, Path)):
            adapter = read_adapter(adapter, self._model)
        self._check(adapter)
        with self.lock:
            index = self.index(name)
            for module, layer in self.layers.items():
                if module in adapter:
                    weights = AdapterWeights(*adapter[module])
                    layer.bank.replace(
                        name,
                        weights.lora_a,
                        weights.lora_b,
                        scale=weights.scale,
                        gate=weights.gate,
                    )
                else:
                    layer.bank.clear(name)
            return index

    def remove(self, name: str) -> None:
        """Free the id of a name; rows that carry it get the base output from here on."""
        with self.lock:
            self.index(name)
            for layer in self.layers.values():
                layer.bank.remove(name)
            del self._used[name]
            self._pinned.discard(name)

    def pin(self, name: str) -> None:
        """Never evict this adapter."""
        with self.lock:
            self.index(name)
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        with self.lock:
            self.index(name)
            self._pinned.discard(name)

    def ids(self, names: Sequence[str | None]) -> Tensor:
        """int64 [len(names)] on the model's device; None is -1, the base."""
        if isinstance(names, str):
            raise TypeError(f"AdapterStore: names must be a list, got the str {names!r}")
        with self.lock:
            found = [-1 if name is None else self.index(name) for name in names]
            for name in names:
                if name is not None:
                    self._used.move_to_end(name)
        return torch.tensor(found, dtype=torch.int64, device=self._first.table.device)

    @contextlib.contextmanager
    def route(
        self, adapters: Tensor | AdapterRouting | Sequence[str | None]
    ) -> Iterator[AdapterRouting]:
        """In this block every layer gives the rows of its input these adapters.

        One name (None: the base) or id a sequence of the batch, or ids of the batch's shape, one a
        token. The routing is made once, here.
        """
        if not isinstance(adapters, AdapterRouting):
            ids = adapters if isinstance(adapters, Tensor) else self.ids(adapters)
            adapters = AdapterRouting(ids, self.max_adapters)
        token = self._routing.set(adapters)
        try:
            yield adapters
        finally:
            self._routing.reset(token)

    def _evict(self) -> None:
        oldest = next((name for name in self._used if name not in self._pinned), None)
        if oldest is None:
            raise ValueError(
                f"AdapterStore: all {self.max_adapters} adapters are pinned; unpin or remove one"
            )
        self.remove(oldest)

    def _check(self, adapter: Mapping[str, AdapterWeights]) -> None:
        if not isinstance(adapter, Mapping):
            raise TypeError(
                f"AdapterStore: adapter must be a mapping of module names, got "
                f"{type(adapter).__name__}"
            )
        unknown = [module for module in adapter if module not in self.layers]
        if unknown:
            raise ValueError(
                f"AdapterStore: the model has no layer {shown(unknown[0])} that takes adapters; "
                f"nearest: {nearest(unknown[:1], self.layers)}"
            )
        for module, weights in adapter.items():
            try:
                self.layers[module].bank.check(*AdapterWeights(*weights))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{module}: {error}") from None
