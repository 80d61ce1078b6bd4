"""Correctness, then time.

Contenders take turns, in a new random order every round, so that whatever else the machine does
falls on all of them alike. Times are taken in up to three modes:

    cold    a CUDA graph of calls that take one of several sets of inputs in turn, more than the L2
            cache holds, between two events
    hot     the same graph over one set
    eager   wall time of a call from Python until the device is done; on a CPU the only mode, with
            its caches as the last call left them
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

from fused_lora.testing import Truth, saved_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODES = {"cpu": ("eager",), "cuda": ("cold", "hot", "eager")}
SECONDS = {"cpu": 4.0, "cuda": 1.0}  # for the rounds of one case
ROUNDS = 11, 300
COLD_BYTES = 256e6  # touched between two uses of the same memory: several L2 caches
GRAPH_SECONDS = 3e-4  # of work in a graph, beside which the start of its replay is small
GRAPH_CALLS = 64


class Chip(NamedTuple):
    """Datasheet rates: bytes/s of memory and dense flop/s by dtype, that nothing can exceed."""

    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float]


def _chip(terabytes: float, half: float, fp32: float) -> Chip:
    rates = {torch.bfloat16: half, torch.float16: half, torch.float32: fp32}
    return Chip(1e12 * terabytes, {dtype: 1e12 * rate for dtype, rate in rates.items()})


# fp32 at the TF32 rate: which of the two is in use is a setting.
CHIPS = {
    "H200": _chip(4.8, 989, 494),
    "H100": _chip(3.35, 989, 494),
    "A100": _chip(2.04, 312, 156),
    "B200": _chip(8.0, 2250, 1100),
}


def chip(device: torch.device) -> Chip | None:
    """The rates of a known GPU, else None: then no time is refused."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rates for key, rates in CHIPS.items() if key in name), None)


class Spread(NamedTuple):
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return cls(p20, statistics.median(values), p80)


Outputs = Tensor | list[Tensor]


def _listed(y: Outputs) -> list[Tensor]:
    """An operation has one output, or a list of them."""
    return [y] if isinstance(y, Tensor) else y


def _incoming(y: Outputs) -> list[Tensor]:
    return [torch.randn_like(out.detach()) for out in _listed(y)]


def _grads(
    y: Outputs, leaves: list[Tensor], dys: list[Tensor], **options
) -> tuple[Tensor | None, ...]:
    # The floor has no adapter, and so no gradients of one.
    return torch.autograd.grad(_listed(y), leaves, dys, allow_unused=True, **options)


def gate(
    op: Op, case, contender: Contender, tensors: Sequence[Tensor], truths: dict | None = None
) -> None:
    """Raise unless the output and every gradient are as accurate as `truth` in the same dtype.

    Contenders of one case may share `truths`, which is filled here: fp64 is slow on a GPU.
    """
    truths = {} if truths is None else truths
    leaves = [] if contender.forward_only else [t for t in tensors if t.requires_grad]
    key = contender.keep if case.p else None, bool(leaves)
    if key not in truths:
        truths[key] = _truth(op, case, contender, tensors, bool(leaves))
    truth, dys = truths[key]
    forward = contender.build(case, *tensors)
    torch.manual_seed(0)
    ys = _listed(forward())
    grads = torch.autograd.grad(ys, leaves, dys) if leaves else []
    outputs = [f"output {i}" for i in range(1, len(ys) + 1)] if len(ys) > 1 else ["output"]
    names = [*outputs, *(f"gradient {i}" for i in range(1, len(grads) + 1))]
    truth.check(names, [*ys, *grads])


def _truth(
    op: Op, case, contender: Contender, tensors, gradients: bool
) -> tuple[Truth, list[Tensor]]:
    """(op.truth with the contender's dropout mask, and its gradients; the dy of those)."""
    x = tensors[0].detach()
    torch.manual_seed(0)
    keep = contender.keep(case, x).to(x.dtype) if case.p else None
    dys = _incoming(op.truth(case, *tensors))
    n = len(dys)

    def truth(keep, *given):
        dys, tensors = given[:n], given[n:]
        ys = _listed(op.truth(case, *tensors, keep=keep))
        wanted = [t for t in tensors if t.requires_grad] if gradients else []
        return [*ys, *torch.autograd.grad(ys, wanted, dys)] if wanted else ys

    return Truth(truth, [keep, *dys, *tensors]), dys


class BelowFloor(Exception):
    """A time in which the chip cannot have done the work: the measurement is wrong."""


def check_floor(op: Op, case, direction: str, mode: str, seconds: float, rates: Chip) -> None:
    """Raise BelowFloor where `seconds` for one call are less than the datasheet's rates allow.

    Only a cold call must bring every byte from memory.
    """
    floor = op.flops(case, direction) / rates.flops_per_s[case.dtype]
    if mode == "cold":
        floor = max(floor, op.bytes(case, direction) / rates.bytes_per_s)
    if seconds < floor:
        raise BelowFloor(
            f"{case}, {direction}, {mode}: {1e6 * seconds:.2f} us, where the datasheet allows no "
            f"less than {1e6 * floor:.2f} us"
        )


class Cuda:
    """How calls are captured and timed on a CUDA device."""

    def __init__(self):
        # Forward, backward and capture are on one stream: autograd runs a backward where its
        # forward ran.
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def on_stream(self):
        return torch.cuda.stream(self.stream)

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        with self.on_stream():
            for call in (*calls, *calls[:1]):
                call()  # what is compiled or allocated at first use is no part of the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, replay: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self.on_stream():
            start.record()
            replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()


class Memory(NamedTuple):
    """Bytes of a forward and backward: the most in use at once beside the inputs (None on a CPU),
    and what the forward keeps for the backward beside the inputs.
    """

    peak: int | None
    saved: int


class Interleaved:
    """Times of the contenders of one case that have passed the gate.

    graphs captures and times on the device; None: there is only eager mode. `failed` has the
    contenders that cannot be captured, with the reason; they have eager times alone. `refused` has
    what is not measured because it is wrong: contenders by the gate, times by check_floors.
    """

    def __init__(
        self,
        op: Op,
        case,
        contenders: dict[str, Contender],
        device: torch.device,
        directions: Sequence[str] = DIRECTIONS,
        graphs: Cuda | None = None,
    ):
        self.op, self.case, self.device, self.directions = op, case, device, directions
        self.graphs = graphs
        self.random = random.Random(0)
        self.turn = 0
        self.rounds: list[dict[tuple[str, str, str], float]] = []  # {(contender, mode, direction)}
        self.failed: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.below: set[tuple[str, str, str]] = set()
        tensors = op.tensors(case, device)
        verdicts: dict[Contender, str | None] = {contenders[op.floor]: None}
        truths: dict = {}
        for name, contender in contenders.items():
            if contender not in verdicts:
                verdicts[contender] = self._verdict(contender, tensors, truths)
            if reason := verdicts[contender]:
                self.refused[name] = reason
        contenders = {name: c for name, c in contenders.items() if name not in self.refused}
        copies = 1
        if device.type == "cuda":
            copies += math.ceil(COLD_BYTES / sum(t.nbytes for t in tensors))
        self.sets = [tensors, *(op.tensors(case, device) for _ in range(copies - 1))]
        self.dys = _incoming(op.truth(case, *tensors))
        self.forward_only = {name for name, c in contenders.items() if c.forward_only}
        self.forwards = {
            name: [c.build(case, *tensors) for tensors in self.sets]
            for name, c in contenders.items()
        }
        self.memory = {name: self._memory(name) for name in contenders}
        self.replays: dict[tuple[str, str, str], tuple[Callable[[], None], int]] = {}
        if graphs is not None:
            for name in contenders:
                self._capture(name)

    def _verdict(self, contender: Contender, tensors: list[Tensor], truths: dict) -> str | None:
        """Why a contender is not timed. One that cannot run must not cost the others their turn."""
        try:
            gate(self.op, self.case, contender, tensors, truths)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            return f"{type(error).__name__}: {first}"
        return None

    def _leaves(self, index: int) -> list[Tensor]:
        return [t for t in self.sets[index] if t.requires_grad]

    def _directions(self, name: str) -> Sequence[str]:
        return ("forward",) if name in self.forward_only else self.directions

    def _memory(self, name: str) -> Memory:
        forward, on_gpu = self.forwards[name][0], self.device.type == "cuda"
        saved = 0
        if name not in self.forward_only:
            inputs = {t.untyped_storage().data_ptr() for t in self.sets[0]}
            kept = saved_bytes(forward)[1]
            saved = sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in inputs)
        if not on_gpu:
            return Memory(None, saved)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = forward()
        if name not in self.forward_only:
            _grads(y, self._leaves(0), self.dys)
        return Memory(torch.cuda.max_memory_allocated() - before, saved)

    def _calls(self, name: str, direction: str) -> list[Callable[[], object]]:
        """One call for each set of inputs."""

        def both(forward, leaves):
            return lambda: _grads(forward(), leaves, self.dys)

        def backward(y, leaves):
            return lambda: _grads(y, leaves, self.dys, retain_graph=True)

        forwards = self.forwards[name]
        if direction == "forward":
            return list(forwards)
        leaves = [self._leaves(i) for i in range(len(self.sets))]
        if direction == "both":
            return [both(*pair) for pair in zip(forwards, leaves, strict=True)]
        with self.graphs.on_stream():
            return [backward(y(), wanted) for y, wanted in zip(forwards, leaves, strict=True)]

    def _capture(self, name: str) -> None:
        """The graphs of a contender: of as many calls as make the start of a replay small."""
        for direction in self._directions(name):
            work = self.op.bytes(self.case, direction) / 4e12 + 1e-5
            count = min(GRAPH_CALLS, max(len(self.sets), math.ceil(GRAPH_SECONDS / work)))
            try:
                calls = self._calls(name, direction)
                cold = [calls[i % len(calls)] for i in range(count)]
                for mode, order in (("cold", cold), ("hot", calls[:1] * count)):
                    self.replays[name, mode, direction] = self.graphs.capture(order), count
            except RuntimeError as error:  # what capture forbids, among it any host sync
                self.failed[name] = f"no CUDA graph of {direction}: {str(error).splitlines()[0]}"
                self.graphs.wait()
                return

    def _eager(self, name: str) -> dict[tuple[str, str, str], float]:
        forwards = self.forwards[name]
        index = self.turn % len(forwards)
        self.turn += 1
        wait = self.graphs.wait if self.graphs else lambda: None
        wait()
        start = time.perf_counter()
        y = forwards[index]()
        wait()
        middle = end = time.perf_counter()
        if name not in self.forward_only and self.directions != ("forward",):
            _grads(y, self._leaves(index), self.dys)
            wait()
            end = time.perf_counter()
        spans = {"forward": middle - start, "backward": end - middle, "both": end - start}
        return {(name, "eager", d): spans[d] for d in self._directions(name)}

    def round(self) -> None:
        times = {}
        for name in self.random.sample(list(self.forwards), len(self.forwards)):
            times |= self._eager(name)
        for key in self.random.sample(list(self.replays), len(self.replays)):
            replay, count = self.replays[key]
            times[key] = self.graphs.seconds(replay) / count
        self.rounds.append(times)

    def plan(self, seconds: float | None = None) -> int:
        """The number of rounds that fit in the time for one case, from two that do not count."""
        self.round()
        start = time.perf_counter()
        self.round()
        fit = (seconds or SECONDS[self.device.type]) / (time.perf_counter() - start)
        self.rounds.clear()
        return max(ROUNDS[0], min(ROUNDS[1], int(fit)))

    def timed(self) -> list[tuple[str, str, str]]:
        """(contender, mode, direction) of everything that has a time."""
        return [key for key in self.rounds[0] if key not in self.below]

    def seconds(self, name: str, mode: str, direction: str) -> list[float]:
        return [r[name, mode, direction] for r in self.rounds]

    def ratio(self, name: str, other: str, mode: str, direction: str) -> Spread | None:
        """Of the two times within each round; None where the other has none."""
        if (other, mode, direction) not in self.timed():
            return None
        pairs = zip(
            self.seconds(name, mode, direction), self.seconds(other, mode, direction), strict=True
        )
        return Spread.of([a / b for a, b in pairs])

    def check_floors(self) -> None:
        """Refuse the times whose median is below what the chip allows; unknown chips pass."""
        if (rates := chip(self.device)) is None:
            return
        for name, mode, direction in self.timed():
            median = statistics.median(self.seconds(name, mode, direction))
            if name == self.op.floor:
                continue
            try:
                check_floor(self.op, self.case, direction, mode, median, rates)
            except BelowFloor as error:
                self.below.add((name, mode, direction))
                self.refused[f"{name}, {mode}, {direction}"] = f"BelowFloor: {error}"
