"""What is measured: for each operation its cases, its flops and bytes, and the contenders."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fused_lora.bench.baselines import BASELINES, SCALE, torch_keep
from fused_lora.bench.peers import PEERS
from torch import Tensor

import fused_lora as fl
from fused_lora import reference

DIRECTIONS = ("forward", "backward", "both")


def _runs_anywhere(device: torch.device, case) -> str | None:
    return None


class Contender(NamedTuple):
    """One implementation of an operation.

    build(case, *tensors) returns the call that is timed. keep(case, x) is the dropout mask that
    this call uses under the same state of torch's generator. unavailable(device, case) is the
    sentence why it cannot run there, or None. One that is forward_only has no gradients.
    """

    build: Callable[..., Callable[[], Tensor]]
    keep: Callable[..., Tensor]
    unavailable: Callable[[torch.device, tuple], str | None] = _runs_anywhere
    forward_only: bool = False


class Stage(NamedTuple):
    """Cases that are measured together, those that matter most first: time may run out."""

    cases: list
    directions: tuple[str, ...] = DIRECTIONS
    contenders: tuple[str, ...] | None = None  # None: all


class Op(NamedTuple):
    """One operation, defined by truth(case, *tensors, keep=mask or None).

    tensors(case, device) are its inputs; the gradients measured are of those that require one.
    flops(case, direction) counts a multiply-add as two; bytes(case, direction) reads every input
    and writes every output once. The floor is the contender without an adapter: the 1.00 that the
    others add to, and the only one that truth is not asked of. The baseline is what ours replaces;
    "<baseline> again" is the baseline once more, and what the two differ by is the noise.
    """

    name: str
    stages: dict[str, Stage]
    tensors: Callable[..., list[Tensor]]
    truth: Callable[..., Tensor]
    flops: Callable[..., int]
    bytes: Callable[..., int]
    floor: str
    baseline: str
    ours: tuple[str, ...]
    contenders: dict[str, Contender]


# lora_linear: x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R].


class LinearCase(NamedTuple):
    M: int
    N: int
    K: int
    R: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.float32

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"M={self.M} {self.N}x{self.K} r={self.R} p={self.p:g} {dtype}"


def linear_tensors(case: LinearCase, device: torch.device) -> list[Tensor]:
    """x, the frozen weight, lora_a and lora_b of N(0, 1)."""
    M, N, K, R, _, dtype = case
    shapes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
    return [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_(name != "weight")
        for name, shape in shapes.items()
    ]


def linear_truth(case, x, weight, a, b, keep=None):
    kept = x if keep is None else x * keep * reference.dropout_scale(case.p)
    return F.linear(x, weight) + SCALE * F.linear(F.linear(kept, a), b)


def linear_flops(case: LinearCase, direction: str) -> int:
    M, N, K, R = case[:4]
    base, adapter = 2 * M * N * K, 2 * M * R * (K + N)
    forward, backward = base + adapter, base + 2 * adapter
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def linear_bytes(case: LinearCase, direction: str) -> int:
    M, N, K, R = case[:4]
    adapter, h = R * (K + N), M * R
    forward = M * K + N * K + adapter + M * N + h  # x, weight, adapter -> y, h
    backward = M * N + M * K + N * K + adapter + h + M * K + adapter  # -> dx, dA, dB
    elements = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return elements * case.dtype.itemsize


def _our_keep(case, x):
    return reference.dropout_mask(reference.draw_seed(x.device), *x.shape, case.p)


def _base(case, x, weight, a, b):
    return lambda: F.linear(x, weight)


def _naive(case, x, weight, a, b):
    def forward():
        kept = F.dropout(x, case.p) if case.p else x
        return F.linear(x, weight) + SCALE * F.linear(F.linear(kept, a), b)

    return forward


def _ours(backend: str) -> Contender:
    def build(case, x, weight, a, b):
        options = {"scale": SCALE, "dropout_p": case.p, "backend": backend}
        return lambda: fl.lora_linear(x, weight, a, b, **options)

    return Contender(build, _our_keep, lambda device, case: fl.backends()[backend])


LLAMA_8B = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096)}
LLAMA_8B |= {"down": (4096, 14336)}
LLAMA_70B = {"70B q, o": (8192, 8192), "70B gate, up": (28672, 8192)}
SHAPES = LLAMA_8B | LLAMA_70B  # layer: (N, K)
ROWS = 1, 4, 16, 64, 512, 2048, 8192, 16384
RANKS = 8, 16, 32, 64, 128
BF16, FP16 = torch.bfloat16, torch.float16


def _cpu_cases() -> list[LinearCase]:
    shapes = (512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (1024, 4096)
    return [
        *(LinearCase(M, N, K) for N, K in shapes for M in (16, 64, 128, 512)),
        *(LinearCase(128, n, n, R) for n in (1024, 4096) for R in (8, 64)),
        *(LinearCase(M, 1024, 1024, p=0.1) for M in (16, 128, 512)),
        *(LinearCase(M, 4096, 4096, p=0.1) for M in (16, 128)),
        LinearCase(512, 1024, 4096, p=0.1),
    ]


def _grid() -> list[LinearCase]:
    """Every shape, M, rank, dtype and dropout; the fewer of them are unusual, the earlier."""
    usual = {"R": 16, "p": 0.0, "dtype": BF16}
    whole = [
        LinearCase(M, N, K, R, p, dtype)
        for (N, K), M, R, p, dtype in itertools.product(
            SHAPES.values(), ROWS, RANKS, (0.0, 0.1), (BF16, FP16)
        )
    ]
    return sorted(whole, key=lambda c: sum(getattr(c, k) != v for k, v in usual.items()))


def _linear_stages() -> dict[str, Stage]:
    def bf16(rows, shapes=SHAPES, **options):
        return [
            LinearCase(M, N, K, dtype=BF16, **options) for N, K in shapes.values() for M in rows
        ]

    common = "linear", "naive", "naive again", "addmm", "torch", "triton"
    training = [case for p in (0.0, 0.1) for case in bf16((8192, 2048), p=p)]
    ragged = [LinearCase(M, 4096, 4096, dtype=BF16) for M in (2837, 4097)]
    # torch.compile takes longer for a case than all the others: it has a stage of its own.
    usual = *common, "peft", "peft, adapters in x's dtype", "lorafusion form", "grouped_mm"
    serving = *usual, "bgmv form", "vllm", "sglang"
    return {
        "cpu": Stage(_cpu_cases(), contenders=usual),
        "cpu-quick": Stage(
            [LinearCase(16, 512, 512), LinearCase(128, 1024, 1024, p=0.1)], contenders=usual
        ),
        "quick": Stage(bf16((16, 2048), {"q, o": (4096, 4096)}), contenders=usual),
        "training": Stage(training + ragged, contenders=usual),
        "decode": Stage(bf16((1, 4, 16, 64)), directions=("forward",), contenders=serving),
        "compiled": Stage(
            bf16((2048, 8192, 16), LLAMA_8B),
            contenders=(*common, "compiled", "compiled, autotuned"),
        ),
        "grid": Stage(_grid(), contenders=common),
    }


def _also(contenders: dict[str, dict]) -> dict[str, Contender]:
    return {name: Contender(**options) for name, options in contenders.items()}


LORA_LINEAR = Op(
    name="lora_linear",
    stages=_linear_stages(),
    tensors=linear_tensors,
    truth=linear_truth,
    flops=linear_flops,
    bytes=linear_bytes,
    floor="linear",
    baseline="naive",
    ours=("torch", "triton"),
    contenders={
        "linear": Contender(_base, torch_keep),
        "naive": Contender(_naive, torch_keep),
        "naive again": Contender(_naive, torch_keep),
        "torch": _ours("torch"),
        "triton": _ours("triton"),
        **_also(PEERS),
        **_also(BASELINES),
    },
)
OPS = {op.name: op for op in (LORA_LINEAR,)}
