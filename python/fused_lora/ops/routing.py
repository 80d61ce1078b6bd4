"""Which rows of a batch belong to which adapter."""

import math
import os
import threading
from collections import OrderedDict

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fused_lora.ops import dispatch
from fused_lora.ops import validation as check

ID_DTYPES = (torch.int32, torch.int64)
KEPT = 8  # shapes of x for which a routing keeps its rows
_lock = threading.Lock()  # of what every routing keeps; not one each, which could not be pickled


class AdapterRouting:
    """The rows of a batch, sorted by adapter; made once for a batch, used by every layer.

        routing = fl.AdapterRouting(adapter_ids, num_adapters)   adapter_ids [...], -1: no adapter

    adapter_ids int32 or int64, of the leading shape of x, or of its first dimensions: one id for a
    sequence of [batch, length, K]. Made on adapter_ids' device, without a host synchronisation on a
    GPU, and capturable in a CUDA graph: `update` writes another batch of the same shape into it.
    It keeps the rows of the last few shapes of x that it met, and of all that a graph has captured.

    An id outside [-1, num_adapters) is an IndexError on a CPU, and on a GPU where
    FUSED_LORA_DEBUG=1 is set; without that a GPU treats the row as one without adapter.

    ids      int32 [M]       the adapter of each row, -1 for none
    order    int32 [M]       the rows sorted by adapter, in their own order within one; -1 last
    offsets  int32 [G + 1]   rows of adapter j: order[offsets[j] : offsets[j + 1]]

    Raises TypeError (not an integer tensor), ValueError (num_adapters below 1), IndexError.
    """

    def __init__(self, adapter_ids: Tensor, num_adapters: int) -> None:
        if isinstance(num_adapters, bool) or not isinstance(num_adapters, int) or num_adapters < 1:
            raise ValueError(f"num_adapters must be an int of at least 1, got {num_adapters!r}")
        check.check_tensor("AdapterRouting", "adapter_ids", adapter_ids, ID_DTYPES)
        self.num_adapters, self.shape = num_adapters, adapter_ids.shape
        self.ids, self.order, self.offsets = self._sort(adapter_ids)
        self._wide: OrderedDict[tuple[torch.Size, int], AdapterRouting] = OrderedDict()
        self._captured: set[tuple[torch.Size, int]] = set()  # a graph reads them: never dropped

    def update(self, adapter_ids: Tensor) -> None:
        """Route another batch of the same shape, in place."""
        check.check_tensor("AdapterRouting", "adapter_ids", adapter_ids, ID_DTYPES)
        if adapter_ids.shape != self.shape or adapter_ids.device != self.ids.device:
            raise ValueError(
                f"adapter_ids must have shape {list(self.shape)} on {self.ids.device} as before, "
                f"got {list(adapter_ids.shape)} on {adapter_ids.device}"
            )
        found = self._sort(adapter_ids)
        with _lock:
            self._copy(found)
            for (lead, times), wide in self._wide.items():
                wide._copy(self._spread(lead, times))

    def _copy(self, found: tuple[Tensor, Tensor, Tensor]) -> None:
        for mine, new in zip((self.ids, self.order, self.offsets), found, strict=True):
            mine.copy_(new)

    def _sort(self, adapter_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        G, ids = self.num_adapters, adapter_ids.reshape(-1)
        known = (ids >= -1) & (ids < G)
        if reads_ids(ids) and not bool(known.all()):
            raise IndexError(
                f"adapter_ids must lie in [-1, {G}), got {ids[~known].unique().tolist()}"
            )
        ids = torch.where(known, ids, -1)
        # The rows without adapter sort behind those of every adapter.
        key = torch.where(ids < 0, G, ids)
        key, order = torch.sort(key, stable=True)
        slots = torch.arange(G + 1, device=ids.device, dtype=key.dtype)
        offsets = torch.searchsorted(key, slots)
        return ids.to(torch.int32), order.to(torch.int32), offsets.to(torch.int32)

    def rows_of(self, x: Tensor) -> "AdapterRouting":
        """The routing of x's rows: itself, or with each id repeated over x's further dimensions."""
        lead = x.shape[:-1]
        if self.shape == lead:
            return self
        if self.shape != lead[: len(self.shape)]:
            raise ValueError(
                f"adapter_ids must have the leading shape of x, {list(lead)} or the first of its "
                f"dimensions, got {list(self.shape)}"
            )
        return self.spread(lead)

    def spread(self, lead: torch.Size, times: int = 1) -> "AdapterRouting":
        """The routing of as many rows as `lead` has, in which every sequence (entry of the first
        dimension of adapter_ids) is there `times` in a row, and every id then has equally many
        adjacent rows."""
        if self.shape == lead and times == 1:
            return self
        if dispatch.traced(self.ids):  # what a trace makes must not outlive it
            return self._spread_routing(lead, times)
        key = lead, times
        with _lock:
            if (wide := self._wide.get(key)) is None:
                with torch.inference_mode(False):  # what is kept may meet a call with gradients
                    wide = self._wide[key] = self._spread_routing(lead, times)
            self._wide.move_to_end(key)
            if self.ids.is_cuda and torch.cuda.is_current_stream_capturing():
                self._captured.add(key)
            if len(self._wide) - len(self._captured) > KEPT:
                del self._wide[next(k for k in self._wide if k not in self._captured)]
        return wide

    def _spread_routing(self, lead: torch.Size, times: int) -> "AdapterRouting":
        wide = object.__new__(AdapterRouting)
        wide.num_adapters, wide.shape = self.num_adapters, lead
        wide._wide, wide._captured = OrderedDict(), set()
        wide.ids, wide.order, wide.offsets = self._spread(lead, times)
        return wide

    def _spread(self, lead: torch.Size, times: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, order, offsets = self.ids, self.order, self.offsets
        if times > 1 and len(self.shape) > 1:
            ids, order, offsets = self._sort(ids.view(self.shape).repeat_interleave(times, 0))
        repeats = math.prod(lead) // max(1, ids.shape[0])
        inner = torch.arange(repeats, device=ids.device, dtype=torch.int32)
        order = (order[:, None] * repeats + inner).reshape(-1)
        return ids.repeat_interleave(repeats), order, offsets * repeats


def reads_ids(ids: Tensor) -> bool:
    """Where the ids' values are looked at; on a GPU that would wait for the device."""
    if torch.compiler.is_compiling() or ids.is_meta or isinstance(ids, FakeTensor):
        return False
    return not ids.is_cuda or os.environ.get("FUSED_LORA_DEBUG", "0") == "1"
