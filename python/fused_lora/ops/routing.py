"""Which rows of a batch belong to which adapter."""

import math
import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fused_lora.ops import dispatch
from fused_lora.ops import validation as check

ID_DTYPES = (torch.int32, torch.int64)


class AdapterRouting:
    """The rows of a batch, sorted by adapter; made once for a batch, used by every layer.

        routing = fl.AdapterRouting(adapter_ids, num_slots)      adapter_ids [...], -1: no adapter

    adapter_ids int32 or int64, of the leading shape of x, or of its first dimensions: one id for a
    sequence of [batch, length, K]. Made on adapter_ids' device, without a host synchronisation on a
    GPU, and capturable in a CUDA graph: `update` writes another batch of the same shape into it.

    An id outside [-1, num_slots) is an IndexError on a CPU, and on a GPU where FUSED_LORA_DEBUG=1
    is set; without that a GPU treats the row as one without adapter.

    ids      int32 [M]       the adapter of each row, -1 for none
    order    int32 [M]       the rows sorted by adapter, in their own order within one; -1 last
    offsets  int32 [G + 1]   rows of adapter j: order[offsets[j] : offsets[j + 1]]

    Raises TypeError (not an integer tensor), ValueError (num_slots below 1), IndexError.
    """

    def __init__(self, adapter_ids: Tensor, num_slots: int) -> None:
        if isinstance(num_slots, bool) or not isinstance(num_slots, int) or num_slots < 1:
            raise ValueError(f"num_slots must be an int of at least 1, got {num_slots!r}")
        check.check_tensor("AdapterRouting", "adapter_ids", adapter_ids, ID_DTYPES)
        self.num_slots, self.shape = num_slots, adapter_ids.shape
        self.ids, self.order, self.offsets = self._sort(adapter_ids)
        self._wide: dict[torch.Size, AdapterRouting] = {}

    def update(self, adapter_ids: Tensor) -> None:
        """Route another batch of the same shape, in place."""
        check.check_tensor("AdapterRouting", "adapter_ids", adapter_ids, ID_DTYPES)
        if adapter_ids.shape != self.shape or adapter_ids.device != self.ids.device:
            raise ValueError(
                f"adapter_ids must have shape {list(self.shape)} on {self.ids.device} as before, "
                f"got {list(adapter_ids.shape)} on {adapter_ids.device}"
            )
        found = self._sort(adapter_ids)
        self._copy(found)
        for lead, wide in self._wide.items():
            wide._copy(self._widened(lead))

    def _copy(self, found: tuple[Tensor, Tensor, Tensor]) -> None:
        for mine, new in zip((self.ids, self.order, self.offsets), found, strict=True):
            mine.copy_(new)

    def _sort(self, adapter_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        G, ids = self.num_slots, adapter_ids.reshape(-1)
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
        if dispatch.traced(self.ids):  # what a trace makes must not outlive it
            return self._repeated(lead)
        if lead not in self._wide:
            with torch.inference_mode(False):  # what is kept may meet a call with gradients
                self._wide[lead] = self._repeated(lead)
        return self._wide[lead]

    def _repeated(self, lead: torch.Size) -> "AdapterRouting":
        wide = object.__new__(AdapterRouting)
        wide.num_slots, wide.shape, wide._wide = self.num_slots, lead, {}
        wide.ids, wide.order, wide.offsets = self._widened(lead)
        return wide

    def _widened(self, lead: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        repeats = math.prod(lead[len(self.shape) :])
        inner = torch.arange(repeats, device=self.ids.device, dtype=torch.int32)
        order = (self.order[:, None] * repeats + inner).reshape(-1)
        return self.ids.repeat_interleave(repeats), order, self.offsets * repeats


def reads_ids(ids: Tensor) -> bool:
    """Where the ids' values are looked at; on a GPU that would wait for the device."""
    if torch.compiler.is_compiling() or ids.is_meta or isinstance(ids, FakeTensor):
        return False
    return not ids.is_cuda or os.environ.get("FUSED_LORA_DEBUG", "0") == "1"
