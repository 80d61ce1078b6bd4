"""Correctness, then time.

Contenders take turns, so that whatever else the machine does falls on all of them alike.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from fused_lora.bench.registry import DIRECTIONS, Contender, Op
from torch import Tensor

from fused_lora.testing import assert_accurate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = {"cpu": 4.0, "cuda": 1.0}  # for one case
ROUNDS = 11, 300
COLD_BYTES = 256e6  # touched between two uses of the same memory on a GPU: several L2 caches


class Spread(NamedTuple):
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return cls(p20, statistics.median(values), p80)


def _outputs(forward: Callable[[], Tensor], tensors: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    y = forward()
    return [y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)]


def gate(op: Op, case, contender: Contender, tensors: Sequence[Tensor]) -> None:
    """Raise unless the output and every gradient are as accurate as `truth` in the same dtype."""
    x = tensors[0].detach()
    torch.manual_seed(0)
    keep = contender.keep(case, x).to(x.dtype) if case.p else None
    dy = torch.randn_like(op.truth(case, *tensors).detach())
    forward = contender.build(case, *tensors)
    torch.manual_seed(0)
    ours = _outputs(forward, tensors, dy)

    def truth(dy, keep, *tensors):
        return _outputs(lambda: op.truth(case, *tensors, keep=keep), tensors, dy)

    names = ["output", *(f"gradient {i}" for i in range(1, len(ours)))]
    assert_accurate(names, ours, truth, [dy, keep, *tensors])


class Interleaved:
    """Times of the contenders of one case, once each of them has passed the gate.

    Every round calls each contender once, in a new random order. On a GPU a call takes the next of
    several sets of inputs and finds none of it in the L2 cache; a CPU's caches are as the last
    call left them.
    """

    def __init__(self, op: Op, case, contenders: dict[str, Contender], device: torch.device):
        self.device = device
        tensors = op.tensors(case, device)
        for contender in dict.fromkeys(c for name, c in contenders.items() if name != op.floor):
            gate(op, case, contender, tensors)
        copies = 1
        if device.type == "cuda":
            copies += math.ceil(COLD_BYTES / sum(t.nbytes for t in tensors))
        sets = [tensors, *(op.tensors(case, device) for _ in range(copies - 1))]
        self.calls = {
            name: [(c.build(case, *s), [t for t in s if t.requires_grad]) for s in sets]
            for name, c in contenders.items()
        }
        self.dy = torch.randn_like(op.truth(case, *tensors).detach())
        self.turn, self.random = 0, random.Random(0)
        self.rounds: list[dict[str, dict[str, float]]] = []

    def _mark(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start, end) -> float:
        return end - start if self.device.type == "cpu" else start.elapsed_time(end) / 1e3

    def _call(self, name: str) -> tuple:
        forward, leaves = self.calls[name][self.turn % len(self.calls[name])]
        self.turn += 1
        start = self._mark()
        y = forward()
        middle = self._mark()
        # The floor has no adapter, and so no gradients of one.
        torch.autograd.grad(y, leaves, self.dy, allow_unused=True)
        return start, middle, self._mark()

    def round(self) -> None:
        names = self.random.sample(list(self.calls), len(self.calls))
        marks = {name: self._call(name) for name in names}
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.rounds.append({})
        for name, (start, middle, end) in marks.items():
            spans = (start, middle), (middle, end), (start, end)
            seconds = (self._seconds(*span) for span in spans)
            self.rounds[-1][name] = dict(zip(DIRECTIONS, seconds, strict=True))

    def plan(self) -> int:
        """The number of rounds that fit in the time for one case, from two that do not count."""
        self.round()
        start = time.perf_counter()
        self.round()
        fit = SECONDS[self.device.type] / (time.perf_counter() - start)
        self.rounds.clear()
        return max(ROUNDS[0], min(ROUNDS[1], int(fit)))

    def seconds(self, name: str, direction: str) -> list[float]:
        return [r[name][direction] for r in self.rounds]

    def ratio(self, name: str, other: str, direction: str) -> Spread:
        """Of the two times within each round."""
        pairs = zip(self.seconds(name, direction), self.seconds(other, direction), strict=True)
        return Spread.of([a / b for a, b in pairs])
