"""What is measured: for each operation its cases, its flops and bytes, and the contenders."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_lora as fl
from fused_lora import reference

DIRECTIONS = ("forward", "backward", "both")


def _runs_anywhere(device: torch.device) -> str | None:
    return None


class Contender(NamedTuple):
    """One implementation of an operation.

    build(case, *tensors) returns the call that is timed. keep(case, x) is the dropout mask that
    this call uses under the same state of torch's generator. unavailable(device) is the sentence
    why it cannot run there, or None.
    """

    build: Callable[..., Callable[[], Tensor]]
    keep: Callable[..., Tensor]
    unavailable: Callable[[torch.device], str | None] = _runs_anywhere


class Op(NamedTuple):
    """One operation, defined by truth(case, *tensors, keep=mask or None).

    tensors(case, device) are its inputs; the gradients measured are of those that require one.
    flops(case, direction) counts a multiply-add as two; bytes(case, direction) reads every input
    and writes every output once. The floor is the contender without an adapter: the 1.00 that the
    others add to, and the only one that truth is not asked of. The baseline is what ours replaces.
    """

    name: str
    cases: dict[str, list]
    tensors: Callable[..., list[Tensor]]
    truth: Callable[..., Tensor]
    flops: Callable[..., int]
    bytes: Callable[..., int]
    floor: str
    baseline: str
    ours: tuple[str, ...]
    contenders: dict[str, Contender]


# lora_linear: x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R].

SCALE = 2.0


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


def _torch_keep(case, x):
    return F.dropout(torch.ones_like(x), case.p) != 0


def _our_keep(case, x):
    return reference.dropout_mask(reference.draw_seed(x.device), *x.shape, case.p)


def _base(case, x, weight, a, b):
    return lambda: F.linear(x, weight)


def _naive(case, x, weight, a, b):
    def forward():
        kept = F.dropout(x, case.p) if case.p else x
        return F.linear(x, weight) + SCALE * F.linear(F.linear(kept, a), b)

    return forward


def _peft(case, x, weight, a, b):
    """PEFT's module with these tensors in it; its adapters have x's dtype, like everyone's."""
    import peft

    model = torch.nn.Sequential(torch.nn.Linear(case.K, case.N, bias=False, device="meta"))
    model[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    config = peft.LoraConfig(
        r=case.R, lora_alpha=SCALE * case.R, lora_dropout=case.p, target_modules=["0"]
    )
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    for projection, tensor in ((layer.lora_A["default"], a), (layer.lora_B["default"], b)):
        del projection.weight
        projection.weight = tensor
    return lambda: layer(x)


def _peft_missing(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("peft") else "it is not installed (pip install peft)"


def _ours(backend: str) -> Contender:
    def build(case, x, weight, a, b):
        options = {"scale": SCALE, "dropout_p": case.p, "backend": backend}
        return lambda: fl.lora_linear(x, weight, a, b, **options)

    return Contender(build, _our_keep, lambda device: fl.backends()[backend])


def _cpu_cases() -> list[LinearCase]:
    shapes = (512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (1024, 4096)
    return [
        *(LinearCase(M, N, K) for N, K in shapes for M in (16, 64, 128, 512)),
        *(LinearCase(128, n, n, R) for n in (1024, 4096) for R in (8, 64)),
        *(LinearCase(M, 1024, 1024, p=0.1) for M in (16, 128, 512)),
        *(LinearCase(M, 4096, 4096, p=0.1) for M in (16, 128)),
        LinearCase(512, 1024, 4096, p=0.1),
    ]


def _cuda_cases() -> list[LinearCase]:
    """The projections of Llama-3-8B: q and o, k and v, gate and up, down."""
    shapes = (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)
    return [
        LinearCase(M, N, K, p=p, dtype=torch.bfloat16)
        for p in (0.0, 0.1)
        for N, K in shapes
        for M in (16, 512, 2048, 8192)
    ]


LORA_LINEAR = Op(
    name="lora_linear",
    cases={
        "cpu": _cpu_cases(),
        "cpu quick": [LinearCase(16, 512, 512), LinearCase(128, 1024, 1024, p=0.1)],
        "cuda": _cuda_cases(),
        "cuda quick": [LinearCase(M, 4096, 4096, dtype=torch.bfloat16) for M in (16, 2048)],
    },
    tensors=linear_tensors,
    truth=linear_truth,
    flops=linear_flops,
    bytes=linear_bytes,
    floor="linear",
    baseline="naive",
    ours=("torch", "triton"),
    contenders={
        "linear": Contender(_base, _torch_keep),
        "naive": Contender(_naive, _torch_keep),
        "naive again": Contender(_naive, _torch_keep),
        "peft": Contender(_peft, _torch_keep, _peft_missing),
        "torch": _ours("torch"),
        "triton": _ours("triton"),
    },
)
