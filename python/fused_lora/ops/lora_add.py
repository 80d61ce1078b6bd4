"""y = base_out + scale * ((drop(x) A^T) * g) B^T, onto a base product that was made elsewhere.

With h, D and dh as in lora_linear:  d base_out = dy,  dx = D ⊙ (dh A), and dA, dB, dg as there. The
backward is that of a lora_linear_group of one projection without a weight.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_lora import reference
from fused_lora.ops import dispatch, lora_linear_group
from fused_lora.ops import validation as check
from fused_lora.ops.lora_linear import (
    REFUSALS,
    _adapters,
    _dropout_args,
    _gated,
    _masked,
    _rows,
    _scaled_mm,
    drawn,
    scaled_gate,
    shaped,
)

# Contract. h is empty where save_h is false. The backward is lora_linear_group_backward.
_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    "lora_add(Tensor base_out, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? gate, Tensor? seed, "
    "float scale, float dropout_p, bool save_h, str backend) -> (Tensor y, Tensor h)"
)


def _fake(base_out, x, lora_a, lora_b, gate, seed, scale, dropout_p, save_h, backend):
    M = math.prod(x.shape[:-1])
    h = x.new_empty(M, lora_a.shape[0]) if save_h else x.new_empty(0)
    return x.new_empty(base_out.shape), h


def _forward(base_out, x, lora_a, lora_b, gate, seed, scale, dropout_p, save_h, backend):
    dispatch.require("lora_add", backend, REFUSALS, x)
    if backend != "torch":
        base_out, x, lora_a, lora_b, gate = dispatch.readable(base_out, x, lora_a, lora_b, gate)
    a, b = _adapters(lora_a, lora_b, x.dtype)
    args = _rows(base_out), _rows(x), a, b, gate, seed, scale, dropout_p, save_h
    y, h = forward_torch(*args) if backend == "torch" else forward_kernels(backend, *args)
    return shaped(y, *base_out.shape), h


def forward_torch(base_out, x, a, b, gate, seed, scale, dropout_p, save_h):
    x_kept, _, keep_scale = _masked(x, seed, dropout_p)
    h = _scaled_mm(keep_scale, x_kept, a.t())
    y = torch.addmm(base_out, _gated(h, gate), b.t(), alpha=scale)
    return y, h if save_h else None


def forward_kernels(backend, base_out, x, a, b, gate, seed, scale, dropout_p, save_h):
    kernels = dispatch.kernels(backend)
    drop = _dropout_args(seed, dropout_p)
    t, h = kernels.shrink(x, a, scale=scale, gate=gate, dropout=drop, save_h=save_h)
    return kernels.segment_gemm([(t, b)], base=base_out), h


def _op_forward(base_out, x, *args):
    y, h = _forward(base_out, x, *args)
    return y, x.new_empty(0) if h is None else h


_library.impl("lora_add", _op_forward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_add", _fake, lib=_library)


class LoRAAddFunction(torch.autograd.Function):
    """base_out [..., N], x [..., K], lora_a [R, K], lora_b [N, R], gate [R] -> y [..., N].

    backward: dy [..., N] -> dy itself for base_out, and dx, dlora_a, dlora_b, dgate of their
    inputs' shapes and dtypes, each only where it is asked for. Saved: x, the adapters, the gate, h
    [M, R] and the seed; nothing of base_out.
    """

    @staticmethod
    def forward(ctx, base_out, x, lora_a, lora_b, gate, seed, scale, dropout_p, backend):
        save_h = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        forward = torch.ops.fused_lora.lora_add if dispatch.watched(x) else _forward
        y, h = forward(base_out, x, lora_a, lora_b, gate, seed, scale, dropout_p, save_h, backend)
        ctx.save_for_backward(x, lora_a, lora_b, gate, h, seed)
        ctx.scale, ctx.dropout_p, ctx.backend = scale, dropout_p, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, lora_a, lora_b, gate, h, seed = ctx.saved_tensors
        need_dbase, need_dx, need_da, need_db, need_dgate = ctx.needs_input_grad[:5]
        dx = da = db = dgate = None
        if need_dx or need_da or need_db or need_dgate:
            needs = [need_dx, False, need_da, need_db, False, need_dgate]
            backward = (
                torch.ops.fused_lora.lora_linear_group_backward
                if dispatch.watched(x)
                else lora_linear_group._backward
            )
            dx, _, da, (db,), _, (dgate,) = backward(
                [dy], x, [None], [lora_a], [lora_b], [gate], [h], seed, [ctx.scale],
                ctx.dropout_p, needs, ctx.backend,
            )  # fmt: skip
        grads = dy, dx, da, db, dgate
        wanted = [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]
        return *wanted, None, None, None, None


def _check(base_out, x, lora_a, lora_b, gate, scale, dropout_p, seed):
    """Raise for the first argument that is wrong; return the tensors as autocast has them."""
    op = "lora_add"
    check.check_tensor(op, "base_out", base_out)
    x = check.checked_input(op, x, dropout_p, seed)
    if base_out.shape[:-1] != x.shape[:-1] or base_out.ndim != x.ndim:
        shape = ", ".join([*map(str, x.shape[:-1]), "any"])
        raise ValueError(
            f"{op}: base_out must have shape [..., N] = [{shape}], got {list(base_out.shape)}"
        )
    check.check_device(op, "base_out", base_out, x)
    if (dtype := check.autocast_dtype(x)) is not None:
        base_out = check.autocast(base_out, dtype)
    check.check_same_dtype(op, "base_out", base_out, x)
    N = base_out.shape[-1]
    lora_a, lora_b = check.checked_adapter(op, x, N, lora_a, lora_b, gate, scale)
    return base_out, x, lora_a, lora_b


def _prepare(
    base_out,
    x,
    lora_a,
    lora_b,
    *,
    scale,
    gate=None,
    dropout_p=0.0,
    training=True,
    seed=None,
):
    """The op's arguments, checked, after autocast."""
    base_out, x, lora_a, lora_b = _check(base_out, x, lora_a, lora_b, gate, scale, dropout_p, seed)
    scale, gate = scaled_gate(scale, gate, lora_a, x)
    seed, dropout_p = drawn(x, dropout_p, training, seed)
    return base_out, x, lora_a, lora_b, gate, seed, scale, dropout_p


def _run(args, backend: str) -> Tensor:
    if dispatch.transformed():
        dispatch.check_transformed("lora_add", backend)
        *tensors, gate, seed, scale, p = args
        return reference.lora_add(*tensors, scale=scale, gate=gate, dropout_p=p, seed=seed)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5]):
        return LoRAAddFunction.apply(*args, backend)
    forward: Callable = torch.ops.fused_lora.lora_add if dispatch.watched(args[1]) else _forward
    return forward(*args, False, backend)[0]


def lora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = base_out + scale * ((drop(x) A^T) * g) B^T: an adapter on a base product made elsewhere.

    For layers whose base product is another library's (quantised weights; QLoRA, arXiv
    2305.14314). LoRA (arXiv 2106.09685); with a gate SoRA (arXiv 2311.11696). base_out is read, not
    written: y is a new tensor, summed in fp32 and rounded once.

    Shapes: base_out [..., N] and x [..., K] of any strides and one leading shape, lora_a [R, K],
    lora_b [N, R], gate [R]; returns [..., N]. Any size, any rank of at least 1.

    Dtypes: base_out has x's. These, autocast, scale, dropout_p, seed and backend are as in
    lora_linear.

    Gradients: base_out (which is that of y), x (of the adapter's part: that of the base is behind
    base_out), lora_a, lora_b, gate, whichever require it; once differentiable. Saved for them are
    x, the adapters, h [M, R] and the seed; nothing of base_out.

    Raises TypeError (not a tensor; dtype), ValueError (shape, device, rank 0, scale, dropout_p,
    seed, backend), NotImplementedError (tensor subclass, sparse layout, forward-mode AD),
    RuntimeError (a backend that was asked for and cannot run, with the reason).
    """
    backend = dispatch.choose(backend)
    args = _prepare(
        base_out, x, lora_a, lora_b, scale=scale, gate=gate, dropout_p=dropout_p,
        training=training, seed=seed,
    )  # fmt: skip
    if not check.autocasting(args[1]):
        return _run(args, backend)
    # The op's own products are in the dtypes it was given.
    with torch.autocast(args[1].device.type, enabled=False):
        return _run(args, backend)


@dispatch.explains("lora_add")
def _explain(*args, backend=None, **kwargs):
    return dispatch.choose(backend), _prepare(*args, **kwargs)[1], REFUSALS
