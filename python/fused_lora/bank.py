"""Many adapters of one layer, in slots of a fixed size.

An id is what rows of a batch name; a table on the device says in which slot its adapter lies. There
is one slot more than there are ids, so a new adapter is written beside the old one and then takes
its place in one store: work that is captured in a CUDA graph sees the one or the other, whole.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_lora.ops import dispatch
from fused_lora.ops import validation as check

DTYPES = torch.float32, torch.bfloat16, torch.float16


class AdapterBank:
    """The adapters of one layer by name, as multi_lora_linear reads them.

        bank = fl.AdapterBank(in_features, out_features, max_adapters, max_rank)
        j = bank.add("french", lora_a, lora_b, scale=2.0)
        y = fl.multi_lora_linear(x, weight, bank, adapter_ids)     # rows with id j speak French

    Ranks may differ, up to max_rank; an adapter may have a gate (SoRA). An id stays that of its
    name until the name is removed; then its slot is wiped, and rows that still carry it get the
    base output, until add gives the id away again.

    add, replace and remove enqueue their writes on the current stream, and take the bank's lock,
    as multi_lora_linear does while it enqueues: they may be called from any thread while batches
    run. Memory is allocated once, here.

    trainable: lora_a, lora_b and gate of the adapter are leaf Parameters (see parameters); they
    are views of the slot, so what an optimizer does to them is served at once. replace of such an
    adapter copies into them.

    Attributes: a_slots [P, R, K] and bt_slots [P, R, N] with P = max_adapters + 1, B transposed;
    rank int32 [P], scale fp32 [P], gate fp32 [P, R]; table int32 [max_adapters], the slot of each
    id. Rank rows past an adapter's rank are zero.

    Raises TypeError and ValueError that name the argument (sizes below 1, dtype, shapes, a rank
    above max_rank, a name that is taken or unknown, a full bank), before anything is written.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        max_adapters: int,
        max_rank: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {
            "in_features": in_features,
            "out_features": out_features,
            "max_adapters": max_adapters,
            "max_rank": max_rank,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"AdapterBank: {name} must be an int of at least 1, got {size!r}")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in DTYPES:
            raise TypeError(
                f"AdapterBank: dtype must be {check.names(DTYPES)}, got {check.names([dtype])}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.max_adapters, self.max_rank = max_adapters, max_rank
        slots = max_adapters + 1
        self.a_slots = torch.zeros(slots, max_rank, in_features, dtype=dtype, device=device)
        self.bt_slots = torch.zeros(slots, max_rank, out_features, dtype=dtype, device=device)
        self._number_slots()
        self.lock = threading.RLock()
        self._ids: dict[str, int] = {}
        self._places = list(range(max_adapters))  # the table, on the host
        self._spare = max_adapters
        self._free_ids = list(range(max_adapters))
        self._trained: dict[int, tuple[Parameter, Parameter, Parameter]] = {}  # by id

    def _number_slots(self) -> None:
        """What there is beside the slots, of a bank without adapters."""
        slots, device = self.max_adapters + 1, self.a_slots.device
        self.rank = torch.zeros(slots, dtype=torch.int32, device=device)
        self.scale = torch.zeros(slots, dtype=torch.float32, device=device)
        self.gate = torch.ones(slots, self.max_rank, dtype=torch.float32, device=device)
        self.table = torch.arange(self.max_adapters, dtype=torch.int32, device=device)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def __repr__(self) -> str:
        return (
            f"AdapterBank({self.in_features}, {self.out_features}, {self.max_adapters}, "
            f"{self.max_rank}, dtype={self.a_slots.dtype}, device={self.a_slots.device}): "
            f"{len(self)} adapters"
        )

    @property
    def names(self) -> list[str]:
        with self.lock:
            return list(self._ids)

    @property
    def free_ids(self) -> list[int]:
        """The ids that add may take, in the order in which it takes them."""
        with self.lock:
            return list(self._free_ids)

    def index(self, name: str) -> int:
        """The id of an adapter. Raises ValueError for a name that is not in the bank."""
        with self.lock:
            if name not in self._ids:
                raise ValueError(
                    f"AdapterBank: there is no adapter {name!r}; there are "
                    f"{', '.join(map(repr, self._ids)) or 'none'}"
                )
            return self._ids[name]

    def add(
        self,
        name: str,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        scale: float,
        gate: Tensor | None = None,
        trainable: bool = False,
        index: int | None = None,
    ) -> int:
        """Put an adapter (lora_a [r, K], lora_b [N, r], gate [r]) into a free slot; its id: `index`
        of free_ids, or the first of them."""
        self.check(lora_a, lora_b, scale, gate)
        with self.lock:
            index = self._take_id(name, index)
            self._write(self._places[index], lora_a, lora_b, scale, gate)
            if trainable:
                views = self._views(self._places[index], lora_a.shape[0], gate is not None)
                self._trained[index] = views
            return index

    def _take_id(self, name: str, index: int | None) -> int:
        if name in self._ids:
            raise ValueError(
                f"AdapterBank: there is an adapter {name!r} already; replace it, or remove it"
            )
        if not self._free_ids:
            raise ValueError(
                f"AdapterBank: all {self.max_adapters} slots are taken; remove an adapter, or "
                f"make the bank with a larger max_adapters"
            )
        if index is None:
            index = self._free_ids[0]
        elif index not in self._free_ids:
            raise ValueError(f"AdapterBank: index {index} is not free; {self._free_ids} are")
        self._free_ids.remove(index)
        self._ids[name] = index
        return index

    def replace(
        self,
        name: str,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        scale: float,
        gate: Tensor | None = None,
    ) -> int:
        """Give a name another adapter; its id, which stays.

        The rank of a trainable adapter stays too: its Parameters do.
        """
        self.check(lora_a, lora_b, scale, gate)
        with self.lock:
            index = self.index(name)
            if index in self._trained:
                rank = self._trained[index][0].shape[0]
                if lora_a.shape[0] != rank:
                    raise ValueError(
                        f"AdapterBank: {name!r} is trainable with rank {rank}; lora_a must have "
                        f"shape [{rank}, {self.in_features}], got {list(lora_a.shape)}"
                    )
                self._write(self._places[index], lora_a, lora_b, scale, gate)
                return index
            self._write(self._spare, lora_a, lora_b, scale, gate)
            self._serve_spare(index)
            return index

    def clear(self, name: str) -> None:
        """Take a name's adapter away, and leave it its id; its rows get the base output."""
        with self.lock:
            index = self.index(name)
            if index in self._trained:
                raise ValueError(f"AdapterBank: {name!r} is trainable; remove it")
            self._wipe(self._spare)
            self._serve_spare(index)

    def remove(self, name: str) -> None:
        """Free the slot of a name, and wipe it; rows that carry its id get the base output from
        here on. The Parameters of a trainable adapter are views of the slot: copy them before."""
        with self.lock:
            self.free(self.retire(name))

    def retire(self, name: str) -> int:
        """Take a name away, and leave its adapter to the rows that carry its id, until free."""
        with self.lock:
            index = self.index(name)
            del self._ids[name]
            self._trained.pop(index, None)
            return index

    def free(self, index: int) -> None:
        """Wipe the slot of a retired id, which add may take from here on."""
        with self.lock:
            self._wipe(self._places[index])
            self._free_ids.append(index)

    def reserve(self, name: str, index: int | None = None) -> int:
        """Give a name an id (see add) without an adapter: its rows get the base output, until
        replace."""
        with self.lock:
            index = self._take_id(name, index)
            self._wipe(self._places[index])
            return index

    def parameters(self, name: str) -> tuple[Parameter, Parameter, Parameter]:
        """(lora_a [r, K], lora_b [N, r], gate [r]) of a trainable adapter: leaves, and views of its
        slot. The gate of an adapter that was added without one does not require a gradient."""
        with self.lock:
            index = self.index(name)
            if index not in self._trained:
                raise ValueError(f"AdapterBank: {name!r} was added without trainable=True")
            return self._trained[index]

    def leaves(self) -> tuple[tuple[tuple[int, int], ...], tuple[Parameter, ...]]:
        """(((slot, rank), ...), their Parameters in threes) of the trainable adapters."""
        if torch.compiler.is_compiling():  # a graph has no locks
            return self._leaves()
        with self.lock:
            return self._leaves()

    def _leaves(self):
        places = tuple(
            (self._places[index], views[0].shape[0]) for index, views in self._trained.items()
        )
        return places, tuple(p for views in self._trained.values() for p in views)

    def check(self, lora_a: Tensor, lora_b: Tensor, scale: float, gate: Tensor | None) -> None:
        """Raise what add and replace would raise for this adapter."""
        op = "AdapterBank"
        for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
            check.check_tensor(op, name, t)
        check.check_scale(op, scale)
        if isinstance(scale, Tensor):
            raise TypeError(f"{op}: scale must be a float, got a Tensor")
        check.check_shape(op, "lora_a", lora_a, (None, self.in_features), "[r, K]")
        rank = lora_a.shape[0]
        if not 1 <= rank <= self.max_rank:
            raise ValueError(
                f"{op}: lora_a has rank {rank}; the bank takes 1 to max_rank = {self.max_rank}"
            )
        check.check_shape(op, "lora_b", lora_b, (self.out_features, rank), "[N, r]")
        if gate is not None:
            check.check_tensor(op, "gate", gate)
            check.check_shape(op, "gate", gate, (rank,), "[r]")

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """fn of every tensor, as nn.Module.to has it; scale and gate stay fp32. Trainable adapters
        keep their Parameters. What to_empty moves is an empty bank; RuntimeError where it has
        adapters, whose values would be lost, or that came from the meta device and have none."""
        with self.lock, torch.no_grad():
            a_slots = fn(self.a_slots)
            emptied = "to_empty" in getattr(fn, "__qualname__", "")
            from_meta = self.a_slots.is_meta and not a_slots.is_meta
            if from_meta and self._ids:
                raise RuntimeError(
                    f"AdapterBank: adapters {self.names} were added on the meta device and have no "
                    f"values; move the bank first, and add them then"
                )
            if emptied and self._ids:
                raise RuntimeError(
                    f"AdapterBank: to_empty would lose the values of adapters {self.names}; remove "
                    f"them first, or move the layer by .to"
                )
            self.a_slots, self.bt_slots = a_slots, fn(self.bt_slots)
            if from_meta or emptied:
                self.a_slots.zero_()
                self.bt_slots.zero_()
                self._number_slots()
            device = self.a_slots.device
            for name in ("rank", "scale", "gate", "table"):
                setattr(self, name, getattr(self, name).to(device))
            self._point_into_slots()

    def _point_into_slots(self) -> None:
        """Let the Parameters of trainable adapters be views of their slots again."""
        for index, views in self._trained.items():
            rank, gated = views[0].shape[0], views[2].requires_grad
            here = self._views(self._places[index], rank, gated)
            for mine, there in zip(views, here, strict=True):
                mine.data = there.data

    def __getstate__(self) -> dict:
        state = vars(self).copy()
        del state["lock"]
        return state

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.lock = threading.RLock()
        self._point_into_slots()

    def _kernels(self):
        """The CUDA C++ kernels, where that backend was asked for; "triton" has none for a bank."""
        if dispatch.choose(None) != "cuda":
            return None
        dispatch.require("AdapterBank", "cuda", {"cuda": dispatch.cuda_refuses}, self.a_slots)
        return dispatch.kernels("cuda")

    def _serve_spare(self, index: int) -> None:
        """Let the spare slot be that of an id, whose slot is the spare one then."""
        self._flip(index, self._spare)
        self._places[index], self._spare = self._spare, self._places[index]

    def _flip(self, index: int, slot: int) -> None:
        if (kernels := self._kernels()) is not None:
            kernels.flip_(self.table, index, slot)
        else:
            self.table[index].fill_(slot)

    @torch.no_grad()
    def _write(self, slot: int, lora_a, lora_b, scale: float, gate) -> None:
        if (kernels := self._kernels()) is not None:
            kernels.write_slot_(self, slot, lora_a, lora_b, scale, gate)
            return
        rank = lora_a.shape[0]
        self.a_slots[slot, :rank].copy_(lora_a)
        self.bt_slots[slot, :rank].copy_(lora_b.t())
        self.a_slots[slot, rank:].zero_()
        self.bt_slots[slot, rank:].zero_()
        self.gate[slot].fill_(1)
        if gate is not None:
            self.gate[slot, :rank].copy_(gate)
        self.scale[slot].fill_(scale)
        self.rank[slot].fill_(rank)

    @torch.no_grad()
    def _wipe(self, slot: int) -> None:
        """Leave nothing of an adapter: what is multiplied by 0 may be NaN."""
        for t in (self.rank, self.scale, self.a_slots, self.bt_slots):
            t[slot].zero_()
        self.gate[slot].fill_(1)

    def _views(self, slot: int, rank: int, gated: bool) -> tuple[Parameter, Parameter, Parameter]:
        return (
            Parameter(self.a_slots[slot, :rank]),
            Parameter(self.bt_slots[slot, :rank].t()),
            Parameter(self.gate[slot, :rank], requires_grad=gated),
        )
