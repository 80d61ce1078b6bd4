"""Correctness, then time: contenders take turns, so that whatever else the machine does falls on all of them."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.registry import DIRECTIONS, Contender, Op
from fused_lora.testing import assert_accurate

CPU_SECONDS, CUDA_SECONDS = 3.0, 1.0
ROUNDS = 7, 50
COLD_BYTES = (
    256e6  # what is touched between two uses of the same memory on a GPU: several times an L2
)


class Spread(NamedTuple):
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(*values * 3)
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])


def _outputs(forward: Callable[[], Tensor], tensors: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    y = forward()
    leaves = [t for t in tensors if t.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, dy)]


def gate(op: Op, case, contender: Contender, tensors: Sequence[Tensor]) -> None:
    """Raise AssertionError unless the output and every gradient are as accurate as `truth` in the same dtype."""
    keep = None
    if case.p:
        torch.manual_seed(0)
        keep = contender.keep(case, tensors[0].detach()).to(tensors[0].dtype)
    torch.manual_seed(0)
    forward = contender.build(case, *tensors)
    dy = torch.randn_like(forward().detach())
    torch.manual_seed(0)
    ours = _outputs(forward, tensors, dy)

    def truth(dy, keep, *tensors):
        return _outputs(lambda: op.truth(case, *tensors, keep=keep), tensors, dy)

    names = ["output", *(f"gradient {i}" for i in range(len(ours) - 1))]
    assert_accurate(names, ours, truth, [dy, keep, *tensors])


class Interleaved:
    """Times of the contenders of one case: every round calls each of them once, in a new random order.

    On a GPU each call takes the next of several sets of inputs, so that it finds none of them in the L2 cache.
    """

    def __init__(self, op: Op, case, contenders: dict[str, Contender], device: torch.device):
        self.cuda = device.type == "cuda"
        first = op.tensors(case, device)
        size = sum(t.numel() * t.element_size() for t in first)
        copies = max(2, math.ceil(COLD_BYTES / size)) if self.cuda else 1
        sets = [first, *(op.tensors(case, device) for _ in range(copies - 1))]
        for name, contender in contenders.items():
            if name != op.floor:
                gate(op, case, contender, first)
        self.calls = {
            name: [(contender.build(case, *tensors), tensors) for tensors in sets]
            for name, contender in contenders.items()
        }
        self.dy = torch.randn_like(self.calls[op.floor][0][0]().detach())
        self.order, self.turn, self.random = list(contenders), 0, random.Random(0)
        self.rounds: list[dict[str, dict[str, float]]] = []

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start

    def _call(self, name: str) -> tuple:
        calls = self.calls[name]
        forward, tensors = calls[self.turn % len(calls)]
        self.turn += 1
        leaves = [t for t in tensors if t.requires_grad]
        start = self._mark()
        y = forward()
        middle = self._mark()
        # The floor has no adapter, so no gradient of one.
        torch.autograd.grad(y, leaves, self.dy, allow_unused=True)
        return start, middle, self._mark()

    def round(self) -> None:
        self.random.shuffle(self.order)
        marks = {name: self._call(name) for name in self.order}
        if self.cuda:
            torch.cuda.synchronize()
        self.rounds.append(
            {
                name: dict(
                    zip(
                        DIRECTIONS,
                        (self._seconds(a, b), self._seconds(b, c), self._seconds(a, c)),
                        strict=True,
                    )
                )
                for name, (a, b, c) in marks.items()
            }
        )

    def planned(self) -> int:
        """The rounds that fit in the time for one case, from that of one round; none of it counts."""
        self.round()
        start = time.perf_counter()
        self.round()
        seconds = time.perf_counter() - start
        self.rounds.clear()
        budget = CUDA_SECONDS if self.cuda else CPU_SECONDS
        return max(ROUNDS[0], min(ROUNDS[1], int(budget / seconds)))

    def seconds(self, name: str, direction: str) -> list[float]:
        return [r[name][direction] for r in self.rounds]

    def ratio(self, name: str, other: str, direction: str) -> Spread:
        """Of the two times within each round."""
        pairs = zip(self.seconds(name, direction), self.seconds(other, direction), strict=True)
        return Spread.of([a / b for a, b in pairs])
