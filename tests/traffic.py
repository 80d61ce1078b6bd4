"""Which bytes kernels load and store, counted under Triton's interpreter."""

import contextlib
import inspect

import numpy as np
from torch import Tensor


class Traffic:
    """Every address that is loaded from or stored to in `counted()`.

    Tensors that kernels were given are kept alive, so that an address belongs to one tensor.
    """

    def __init__(self):
        # (kernel, "load" or "store", the addresses in the order of access, bytes of an element)
        self.accesses: list[tuple[str, str, np.ndarray, int]] = []
        self.arguments: dict[str, list[dict]] = {}
        self.kernel = ""

    def _addresses(self, what: str, kernel: str | None, tensor: Tensor) -> np.ndarray:
        """The accesses to a tensor, byte by byte."""
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        first, size = tensor.data_ptr(), tensor.element_size()
        end = first + (last + 1) * size if tensor.numel() else first
        found = [np.empty(0, np.uint64)]
        for of, kind, addresses, width in self.accesses:
            if kind == what and kernel in (None, of):
                inside = addresses[(addresses >= first) & (addresses < end)]
                found += [inside + byte for byte in range(width)]
        return np.concatenate(found)

    def loaded(self, tensor: Tensor, kernel: str | None = None) -> int:
        """Bytes, as often as they were loaded; by one kernel where it is named."""
        return len(self._addresses("load", kernel, tensor))

    def stored(self, tensor: Tensor, kernel: str | None = None) -> int:
        return len(self._addresses("store", kernel, tensor))

    def touched(self, what: str, tensor: Tensor, kernel: str | None = None) -> int:
        """Bytes, each once. what is "load" or "store"."""
        return len(np.unique(self._addresses(what, kernel, tensor)))

    def total(self, kernel: str) -> int:
        """All bytes that a kernel moved."""
        return sum(len(found) * width for of, _, found, width in self.accesses if of == kernel)

    def argument(self, kernel: str, name: str) -> Tensor:
        """What the last launch of a kernel was given."""
        return self.arguments[kernel][-1][name]


@contextlib.contextmanager
def counted():
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    traffic = Traffic()

    def record(what, ptrs, mask):
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)]
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        traffic.accesses.append((traffic.kernel, what, addresses, width))

    def masked_load(self, ptrs, mask, *rest):
        record("load", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        record("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def launched(self, *args, **kwargs):
        names = inspect.getfullargspec(self.fn).args
        known = {key: value for key, value in kwargs.items() if key in names}
        traffic.kernel = self.fn.__name__
        given = inspect.getcallargs(self.fn, *args, **known)
        traffic.arguments.setdefault(traffic.kernel, []).append(given)
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    executor.__call__ = launched
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = call
