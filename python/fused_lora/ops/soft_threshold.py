"""g <- T_xi(g), in place: the proximal step that drives the gates of SoRA to zero.

T_xi(v) = v - clamp(v, -xi, xi) = v - xi if v > xi;  0 if -xi <= v <= xi;  v + xi if v < -xi

The published code of SoRA runs three masks one after the other instead, which zeroes |v| < 2 xi and
keeps |v| = xi; official_compat does the same.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fused_lora import _extension
from fused_lora.ops import dispatch
from fused_lora.ops import validation as check

Gates = TypeVar("Gates", Tensor, Sequence[Tensor])

# Contract. The gates of one call are contiguous and on one device. csrc/ implements the second op.
_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    "soft_threshold_(Tensor(a!)[] gates, float xi, bool official_compat, str backend) -> ()"
)
_library.define("soft_threshold_cuda_(Tensor(a!)[] gates, float xi, bool official_compat) -> ()")


def _refuse_cuda(gate: Tensor) -> str | None:
    if not (gate.is_cuda or _extension.emulates()):
        return f"gates are on {gate.device}; the CUDA kernel runs on CUDA devices"
    if (missing := _extension.why_missing()) is not None or not gate.is_cuda:
        return missing
    return dispatch.gpu_refuses(gate.device, "CUDA")


REFUSALS = {
    "cuda": _refuse_cuda,
    "triton": lambda gate: "soft_threshold_ has no Triton kernel; use backend='cuda' or 'torch'",
    "torch": dispatch.never_refuses,
}
BEST = "torch"  # the CUDA kernel takes its place with the measurement that proves it


def _indicator(values: list[Tensor], xi: float, at_edge: float) -> tuple[Tensor, ...]:
    """1 where |v| > xi, at_edge where |v| = xi, 0 elsewhere."""
    signs = torch._foreach_abs(values)
    torch._foreach_sub_(signs, xi)
    torch._foreach_sign_(signs)
    torch._foreach_add_(signs, at_edge)
    torch._foreach_clamp_min_(signs, 0.0)
    torch._foreach_clamp_max_(signs, 1.0)
    return signs


def _soft_threshold(gates: list[Tensor], xi: float, official_compat: bool, backend: str) -> None:
    dispatch.require("soft_threshold_", backend, REFUSALS, gates[0])
    if backend == "cuda":
        torch.ops.fused_lora.soft_threshold_cuda_(gates, xi, official_compat)
        # That kernel writes unseen by autograd, which must refuse a backward that saved the gates
        # as they were.
        torch.autograd.graph.increment_version(gates)
        return
    # Half precision is computed in fp32.
    wide = [g.float() if g.itemsize == 2 else g for g in gates]
    removed = torch._foreach_clamp_min(wide, -xi)
    torch._foreach_clamp_max_(removed, xi)
    if official_compat:
        torch._foreach_mul_(removed, _indicator(wide, xi, 0.0))
    torch._foreach_sub_(wide, removed)
    if official_compat:
        torch._foreach_mul_(wide, _indicator(wide, xi, 1.0))
    for gate, result in zip(gates, wide, strict=True):
        if result is not gate:
            gate.copy_(result)


_library.impl("soft_threshold_", _soft_threshold, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fused_lora::soft_threshold_", lambda gates, xi, official_compat, backend: None, lib=_library
)


def check_xi(xi) -> None:
    op = "soft_threshold_"
    if isinstance(xi, bool) or not isinstance(xi, (int, float)):
        raise TypeError(f"{op}: xi must be a float, got {type(xi).__name__}")
    if not 0 <= xi <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: xi must be at least 0 and finite in fp32, got {xi}")


def _check(gates, xi, official_compat) -> list[Tensor]:
    op = "soft_threshold_"
    if not isinstance(gates, (Tensor, Sequence)) or isinstance(gates, str):
        raise TypeError(
            f"{op}: gates must be a torch.Tensor or a sequence of them, got {type(gates).__name__}"
        )
    check_xi(xi)
    if not isinstance(official_compat, bool):
        raise TypeError(
            f"{op}: official_compat must be a bool, got {type(official_compat).__name__}"
        )
    if isinstance(gates, Tensor):
        named = {"gates": gates}
    else:
        named = {f"gates[{i}]": gate for i, gate in enumerate(gates)}
    for name, gate in named.items():
        check.check_tensor(op, name, gate)
        strides = zip(gate.stride(), gate.shape, strict=True)
        if not gate.is_contiguous() and any(step == 0 and size > 1 for step, size in strides):
            raise ValueError(
                f"{op}: {name} is expanded (shape {list(gate.shape)}, strides {[*gate.stride()]}), "
                f"so its elements share memory; pass what it was expanded from"
            )
    # A kernel would threshold it twice, and at the same time.
    if len(set(named.values())) < len(named):
        raise ValueError(f"{op}: gates holds the same tensor twice; pass each gate once")
    return list(named.values())


@torch.no_grad()
def soft_threshold_(
    gates: Gates, xi: float, *, official_compat: bool = False, backend: str | None = None
) -> Gates:
    """Replace every gate v by its soft threshold, in place.

        T_xi(v) = v - xi if v > xi;  0 if -xi <= v <= xi;  v + xi if v < -xi

    It is the exact minimiser of xi |g|_1 + 1/2 |g - v|^2. So after a gradient step of rate eta on
    the gates, soft_threshold_(gates, eta * lambda) completes the proximal step for an L1 penalty of
    weight lambda (SoRA, arXiv 2311.11696).

    gates: a tensor, or a sequence of tensors of any shapes, strides and devices. float32, bfloat16
        and float16 are computed in fp32 and rounded once, float64 in itself. They may require
        grad; no history is recorded. Nothing of them is read on the host: NaN stays NaN and an
        infinity stays that infinity, so neither passes for a gate that was cut.
    xi: a float >= 0, finite in fp32.
    official_compat: what the published code of SoRA does, three masks one after the other: first
        v -= xi where v > xi, then v += xi where v < -xi, then v = 0 where |v| < xi. It zeroes
        |v| < 2 xi, keeps |v| = xi as it is, and minimises nothing; to repeat its runs.

    backend: "torch" (torch's own multi-tensor kernels, any device) or "cuda" (the extension's: one
        launch serves some 250 gates); None takes the best that is proved. use_backend does not
        reach it: it is a step of an optimiser and not of a model.

    Returns gates. It raises, before anything is written: TypeError for a gate that is not a
    floating tensor, an xi that is not a number, or an official_compat that is not a bool;
    ValueError for an xi that is negative or not finite, an expanded gate, the same tensor twice, or
    an unknown backend; NotImplementedError for a tensor subclass or a sparse gate; RuntimeError for
    a backend that cannot run, with the reason.
    """
    backend = dispatch.check_backend(backend) or BEST
    by_device: dict[torch.device, list[Tensor]] = {}
    for gate in _check(gates, xi, official_compat):
        by_device.setdefault(gate.device, []).append(gate)
    for group in by_device.values():
        dense = [gate if gate.is_contiguous() else gate.contiguous() for gate in group]
        torch.ops.fused_lora.soft_threshold_(dense, xi, official_compat, backend)
        for gate, result in zip(group, dense, strict=True):
            if not gate.is_contiguous():
                gate.copy_(result)
    return gates


@dispatch.explains("soft_threshold_")
def _explain(gates, xi, *, official_compat=False, backend=None):
    first = next(iter(_check(gates, xi, official_compat)), torch.empty(0, device="cpu"))
    return dispatch.check_backend(backend) or BEST, first, REFUSALS
