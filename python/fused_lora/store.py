"""Adapters of a whole model by name: loaded, replaced and removed while batches run."""

import contextlib
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_lora import open_routes
from fused_lora.batch_layout import Layout, read_call
from fused_lora.checkpoint import AdapterWeights, read_adapter
from fused_lora.files import shown
from fused_lora.inject import LoRAConfig, nearest, replace_modules, targets_of
from fused_lora.names import check_takes_parameters, clean_name
from fused_lora.nn import MultiLoRALinear
from fused_lora.nn.checks import check_linear
from fused_lora.nn.multi import refuse_in_graph
from fused_lora.open_routes import Route
from fused_lora.ops.routing import AdapterRouting

OF_THE_PROCESS = (  # attributes that a copy makes anew
    "lock",
    "_changed",
    "_counting",
    "_in_use",
    "_open",
    "_retired",
    "_let_go",
    "_busy",
)
POLL = 0.05  # seconds; what a garbage collection frees cannot wake those who wait


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
    that was routed or loaded longest ago gives way, unless it is pinned or in use. Rows that name a
    removed id get the base output.

    Routes are of the thread (task, generator) that opened them; `bind` carries one into another.
    An adapter is in use while a route that names it is open, a function that was bound in it is
    there, or a checkpoint may recompute in it: until then its rows keep the adapter that they began
    with, whatever add, replace and remove do in other threads. Every change holds the store's lock
    and is enqueued on the current stream, which batches must share.

    Sizes do not tell what a layer's rows are. An input of three or more dimensions has the batch
    first; where the second is as large, that must have been seen in a call in which it is not, or
    batch_first=True says so. An input [n, K] has a row for each sequence if the model's own input
    has; in models of transformers also behind the blocks (pooled), and its rows may be the tokens
    in their order. For other layers `rows` says what a row is: {layer or the end of its name:
    "sequence" or "token"}. What is not known is a ValueError, unless the whole batch has one
    adapter.

    A copy or pickle of the model has a store of its own, without routes (AdapterStore.of).
    torch.compile breaks its graph at each layer; with fullgraph, and in torch.export, it refuses.

    Raises ValueError where target_modules or rows matches no layer, TypeError for a matching layer
    that is not a plain nn.Linear, both before anything is changed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        max_adapters: int,
        max_rank: int,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        adapter_dtype: torch.dtype | None = None,
        rows: Mapping[str, str] | None = None,
        batch_first: bool | None = None,
    ) -> None:
        check_takes_parameters("AdapterStore", model, reduced=False)
        self._model = model
        targets: dict = targets_of(model, LoRAConfig(target_modules=target_modules))
        for name, module in targets.items():
            check_linear(f"target module {name!r}", module)
        targets = {clean_name(name): module for name, module in targets.items()}
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self._layout = Layout(model, targets, rows, batch_first)
        self._used: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._pinned: set[str] = set()
        self._family = uuid.uuid4().hex  # of this store and its copies
        self.layers = {
            name: MultiLoRALinear.from_linear(
                linear, max_adapters, max_rank, adapter_dtype=adapter_dtype
            )
            for name, linear in targets.items()
        }
        for name, layer in self.layers.items():
            layer.store, layer.name_in_store = self, name
        self._first = next(iter(self.layers.values())).bank
        self._make_locks()
        replace_modules(model, {id(targets[name]): layer for name, layer in self.layers.items()})
        self._watch_calls(model)
        open_routes.carry_through_checkpoints()

    def _make_locks(self) -> None:
        """What a copy does not have: locks, and routes that are open."""
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._in_use = [0] * self.max_adapters  # how many holds an id has
        self._open = 0  # how many routes are, in any thread
        self._retired: set[int] = set()  # ids of removed names that are still in use
        self._let_go: deque[frozenset[int]] = deque()  # ids of holds that were released
        self._busy = False
        self._counting = threading.RLock()
        self.was_routed = False

    def __getstate__(self) -> dict[str, Any]:
        with self._changing():
            state = vars(self).copy()
            state["_retired_in_copy"] = sorted(self._retired)
        for name in OF_THE_PROCESS:
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        retired = state.pop("_retired_in_copy")
        vars(self).update(state)
        self._make_locks()
        self._retired.update(retired)  # nothing uses them here: the next change frees them

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, name: str) -> bool:
        return name in self._first

    def __repr__(self) -> str:
        return (
            f"AdapterStore({len(self.layers)} layers, {self.max_adapters} adapters of rank "
            f"{self.max_rank} at most): {', '.join(self.names) or 'empty'}"
        )

    @staticmethod
    def of(model: torch.nn.Module) -> "AdapterStore":
        """The store that serves a model. Raises ValueError where there is none."""
        for module in model.modules():
            if isinstance(module, MultiLoRALinear) and module.store is not None:
                return module.store
        raise ValueError("AdapterStore: the model has no layer that a store serves")

    @property
    def names(self) -> list[str]:
        return self._first.names

    def index(self, name: str) -> int:
        """The id of an adapter in every layer. Raises ValueError for an unknown name."""
        return self._first.index(name)

    def load(
        self, name: str, folder: str | Path, *, pin: bool = False, timeout: float | None = None
    ) -> int:
        """Read an adapter folder (fused_lora.checkpoint.read_adapter) and add it; its id. Base
        weights that PEFT saves beside an adapted output head must be the model's."""
        return self.add(name, read_adapter(folder, self._model), pin=pin, timeout=timeout)

    def add(
        self,
        name: str,
        adapter: Mapping[str, AdapterWeights],
        *,
        pin: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Put {module name: (lora_a, lora_b, scale, gate)} under a new name; its id.

        Where all slots are in use, or pinned, it waits up to `timeout` seconds for the end of a
        route, and never for one that it is itself called in.

        Raises before anything is written: ValueError for a name that is there, layers that the
        model lacks, a rank above max_rank, other shapes, and where every adapter is pinned;
        RuntimeError where all slots are in use.
        """
        self._check(adapter)

        def put() -> int | None:
            if name in self:
                raise ValueError(
                    f"AdapterStore: there is an adapter {name!r} already; replace it, or remove it"
                )
            if (index := self._find_id()) is not None:
                self._write(name, adapter, index)
                self._used[name] = None
                if pin:
                    self._pinned.add(name)
            return index

        return self._until(put, timeout)

    def replace(
        self,
        name: str,
        adapter: Mapping[str, AdapterWeights] | str | Path,
        *,
        timeout: float | None = 30.0,
    ) -> int:
        """Give a name another adapter (a mapping as in add, or a folder); its id.

        The id stays, unless the old adapter is in use: its routes keep it to their end, and the new
        one gets an id of its own, as in add, which later routes by this name see. `timeout` as
        there. A CUDA graph sees the new one in the id that stays, or by AdapterRouting.update.
        """
        if isinstance(adapter, (str, Path)):
            adapter = read_adapter(adapter, self._model)
        self._check(adapter)

        def put() -> int | None:
            old = self.index(name)
            if not self._in_use[old]:
                self._rewrite(name, adapter)
                return old
            if (index := self._find_id()) is not None:
                self._retire(name)
                self._write(name, adapter, index)
            return index

        return self._until(put, timeout)

    def remove(self, name: str) -> None:
        """Take a name away. Its slot is wiped and free, and rows that carry its id get the base
        output, at the end of the last route that uses it."""
        with self._changing():
            self._retire(name)
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
        return self._tensor(found)

    def _tensor(self, ids: int | list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._first.table.device)

    # Routes.

    def route(
        self,
        adapters: Tensor | AdapterRouting | Sequence[str | None] | None,
        *,
        uses: Sequence[str] | None = None,
    ) -> open_routes.Block:
        """A context manager: in its block every layer gives the rows of its input these adapters.

        One name (None: the base) or id a sequence of the batch, or ids of the batch's shape, one a
        token. The routing is made once, on entry, which returns it. Beams and returned sequences
        of generate have the adapter of their sequence. None says that the base is meant: a layer
        that is called without a route while one is open in another thread is an error.

        What is in use is what the names or the ids name; of ids on a GPU, which are not read, and
        of an AdapterRouting, which may be updated, every id, unless `uses` names the adapters.

        In a generator the block is the generator's: its consumer does not see the route.
        """
        return open_routes.Block(lambda: self._make_route(adapters, uses))

    def bind(self, fn: Callable) -> Callable:
        """fn with the route that is open here, wherever it is called, and when the route has ended:

            with store.route(["french"]):
                Thread(target=store.bind(model.generate), kwargs=batch).start()

        The route's adapters are in use until the bound function is gone. Without an open route it
        is bound to the base. Coroutine functions are bound too.

        Raises TypeError for a generator function, which works when its caller has left.
        """
        opened = open_routes.find(self)
        route = None if opened is None else opened.route
        return open_routes.bind(route or Route(self, None, frozenset()), fn)

    def _make_route(self, adapters, uses: Sequence[str] | None) -> Route:
        """A route that is held."""
        by_name = not isinstance(adapters, (Tensor, AdapterRouting)) and adapters is not None
        if uses is not None and (by_name or adapters is None):
            raise TypeError("AdapterStore: uses is for ids or an AdapterRouting, not for names")
        with self._changing():
            routing: AdapterRouting | None = None
            known: set[int] | None = set()  # the ids that the host knows; None: it does not
            if isinstance(adapters, AdapterRouting):
                routing, known = adapters, None
            elif adapters is not None:
                ids = self.ids(adapters) if by_name else adapters
                routing = AdapterRouting(ids, self.max_adapters)
                if by_name:
                    known = {-1 if name is None else self.index(name) for name in adapters}
                else:
                    known = set(routing.ids.tolist()) if ids.is_cpu else None
            if uses is not None:
                used = frozenset(map(self.index, uses))
            elif known is None:
                used = frozenset(range(self.max_adapters))
            else:
                used = frozenset(known - {-1})
            uniform = None
            if known is not None and len(known) == 1:
                uniform = AdapterRouting(self._tensor(*known), self.max_adapters)
            route = Route(self, routing, used, uniform)
            self.hold(route)
            self.was_routed = True
            return route

    def hold(self, route: Route) -> None:
        with self._changing():
            for index in route.ids:
                self._in_use[index] += 1

    def release(self, route: Route) -> None:
        """May be called from a garbage collection, so it waits for nothing."""
        self._let_go.append(route.ids)
        if self.lock.acquire(blocking=False):
            try:
                if not self._busy:
                    with self._changing():
                        pass
            finally:
                self.lock.release()

    def count_open(self, route: Route, change: int) -> None:
        if route.routing is not None:
            with self._counting:
                self._open += change

    def routing_of(self, layer: str, lead: torch.Size) -> AdapterRouting | None:
        """The routing of the rows of a layer's input of this leading shape; None: the base."""
        opened = open_routes.find(self)
        if opened is None:
            self._check_unrouted()
            return None
        route = opened.route
        if route is None or route.routing is None:
            return None
        if route.uniform is not None:
            self._layout.learn(layer, lead, _call_in(route))
            return route.uniform
        return self._layout.rows_of(layer, lead, route.routing, _call_in(route))

    def _check_unrouted(self) -> None:
        if self._open:
            raise RuntimeError(
                "AdapterStore: a layer was called without a route while one is open in another "
                "thread, task or generator; start the function as store.bind(function), or call "
                "the model in store.route(None) if the base is meant"
            )
        for opened in open_routes.chain(open_routes.innermost.get()):
            other = None if opened.route is None else opened.route.store
            if other is not None and other._family == self._family and opened.is_seen():
                raise RuntimeError(
                    "AdapterStore: the model is a copy, and the open route is of the store of the "
                    "other; AdapterStore.of(model) is its own"
                )

    # Calls of the model.

    def _watch_calls(self, model: torch.nn.Module) -> None:
        """See the inputs of the model, and of parts of it that are called alone (an encoder)."""
        parents = {path for name in self.layers for path in _parents(name)}
        watched = {model: None}
        for name, module in model.named_modules(remove_duplicate=False):
            path = clean_name(name)
            if path in parents and not f"{path}.".startswith(self._layout.lists):
                watched[module] = None
        for module in watched:
            module.register_forward_pre_hook(self._enter_call, with_kwargs=True)
            module.register_forward_hook(self._leave_call, always_call=True)
        for module in model.modules():
            if hasattr(type(module), "_expand_inputs_for_generation"):
                object.__setattr__(module, "_expand_inputs_for_generation", _Repeats(self, module))

    def _enter_call(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        refuse_in_graph()
        opened = open_routes.find(self) if open_routes.innermost.get() is not None else None
        route = None if opened is None else opened.route
        if route is None or route.routing is None or _call_in(route) is not None:
            return
        made = read_call(module, args, kwargs, route, open_routes.call.get())
        if made is not None:
            if route.uniform is None and route.routing.shape:
                self._layout.check_call(made, route.routing, route.repeats)
            open_routes.call.set(made)

    def _leave_call(self, module: torch.nn.Module, *_) -> None:
        made = open_routes.call.get()
        if made is not None and made.module is module:
            open_routes.call.set(made.outer)

    # Slots.

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """The store's lock, with what was let go accounted for; not while waiting."""
        with self.lock:
            outermost, self._busy = not self._busy, True
            try:
                if outermost:
                    self._settle()
                yield
            finally:
                if outermost:
                    self._settle()
                    self._busy = False
                    self._changed.notify_all()

    def _settle(self) -> None:
        while self._let_go:
            for index in self._let_go.popleft():
                self._in_use[index] -= 1
        for index in sorted(self._retired):
            if not self._in_use[index]:
                self._retired.remove(index)
                for layer in self.layers.values():
                    layer.bank.free(index)

    def _until(self, put: Callable[[], int | None], timeout: float | None) -> int:
        """What put returns once it is not None; put raises where waiting would not help."""
        end = time.monotonic() + (timeout or 0)
        while True:
            with self._changing():
                if (index := put()) is not None:
                    return index
                blocked = self._why_blocked()
            if (left := end - time.monotonic()) <= 0:
                raise RuntimeError(f"AdapterStore: all slots are in use: {blocked}")
            with self._changed:
                self._changed.wait(min(left, POLL))

    def _find_id(self) -> int | None:
        """An id that is free or that an adapter gives up; None where one may be free later."""
        free = self._unused_id()
        if free is None:
            in_turn = (name for name in self._used if name not in self._pinned)
            oldest = next((n for n in in_turn if not self._in_use[self.index(n)]), None)
            if oldest is not None:
                self.remove(oldest)
                self._settle()
                free = self._unused_id()
        if free is None:
            self._check_waiting()
        return free

    def _unused_id(self) -> int | None:
        return next((i for i in self._first.free_ids if not self._in_use[i]), None)

    def _check_waiting(self) -> None:
        pinned = {self.index(name) for name in self._pinned}
        awaited = set(range(self.max_adapters)) - pinned
        if not awaited:
            raise ValueError(
                f"AdapterStore: all {self.max_adapters} adapters are pinned; unpin or remove one"
            )
        here = open_routes.chain(open_routes.innermost.get())
        routes = [o.route for o in here if o.route is not None and o.route.store is self]
        mine = {index for route in routes for index in route.ids}
        if awaited <= mine:
            raise RuntimeError(
                f"AdapterStore: all slots are in use: {self._why_blocked()}; this call is made in "
                f"a route that uses each of them, and would wait for its own end"
            )

    def _why_blocked(self) -> str:
        used = [repr(name) for name in self.names if self._in_use[self.index(name)]]
        pinned = [repr(name) for name in self.names if name in self._pinned]
        parts = [f"open routes use {', '.join(used)}"] if used else []
        parts += [f"{len(self._retired)} removed adapters"] if self._retired else []
        parts += [f"pinned are {', '.join(pinned)}"] if pinned else []
        return "; ".join(parts) or "an open route uses every id"

    def _retire(self, name: str) -> None:
        self._retired.add(self.index(name))
        for layer in self.layers.values():
            layer.bank.retire(name)

    def _write(self, name: str, adapter: Mapping[str, AdapterWeights], index: int) -> None:
        for module, layer in self.layers.items():
            if module in adapter:
                weights = AdapterWeights(*adapter[module])
                layer.bank.add(
                    name,
                    weights.lora_a,
                    weights.lora_b,
                    scale=weights.scale,
                    gate=weights.gate,
                    index=index,
                )
            else:
                layer.bank.reserve(name, index)

    def _rewrite(self, name: str, adapter: Mapping[str, AdapterWeights]) -> None:
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


class _Repeats:
    """A model's _expand_inputs_for_generation, which tells the open route how often generate
    repeats each sequence."""

    def __init__(self, store: AdapterStore, model: torch.nn.Module) -> None:
        self.store = store
        self.expand: Callable = model._expand_inputs_for_generation  # type: ignore[assignment]

    def __call__(self, expand_size: int = 1, *args, **kwargs):
        opened = open_routes.find(self.store)
        if opened is not None and opened.route is not None:
            opened.route.repeats.add(expand_size)
        return self.expand(expand_size, *args, **kwargs)


def _call_in(route: Route):
    """The call of the model that is under way in a route here."""
    made = open_routes.call.get()
    while made is not None and made.route is not route:
        made = made.outer
    return made


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]
