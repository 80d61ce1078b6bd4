"""y = b + c ⊙ z with z = x W0^T + scale * (x A^T) B^T and c = m / ||W0 + scale * B A||: DoRA.

The norms are those of the rows, and constants in the backward (arXiv 2402.09353, section 4.3):

    dz = c ⊙ dy      dm = (the sum over the rows of dy ⊙ z) / ||W0 + scale * B A||

and the gradients behind z are those of lora_linear.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_lora import reference
from fused_lora.ops import dispatch, lora_linear
from fused_lora.ops import validation as check
from fused_lora.ops.dept_embedding import without_autocast
from fused_lora.ops.lora_linear import REFUSALS, scaled_gate

OP = "dora_linear"
TILE = 2**20  # elements of W0 + scale * B A that exist at once


@torch.no_grad()
def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor) -> Tensor:
    """||W0 + scale * B A|| of every row, fp32 [N] (fp64 for fp64).

    Some rows at a time: B A is never whole. The sum ||w||^2 + 2 s w . (b A) + s^2 b (A A^T) b^T
    needs no such tile, but where B A undoes most of a row it is left with the rounding errors of
    its terms.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = lora_a.to(dtype) * scale, lora_b.to(dtype)
    rows = max(1, TILE // weight.shape[1])
    norms = [
        torch.linalg.vector_norm(torch.addmm(w.to(dtype), part, a), dim=1)
        for w, part in zip(weight.split(rows), b.split(rows), strict=True)
    ]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def _scale_columns(z: Tensor, factor: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """factor ⊙ z + bias, computed in factor's dtype and rounded once."""
    if bias is None:
        return torch.mul(z, factor, out=out)
    return torch.addcmul(bias.to(factor.dtype), z, factor, out=out)


class ScaleColumnsFunction(torch.autograd.Function):
    """z [..., N], factor [N], bias [N] or None -> factor ⊙ z + bias of z's dtype.

    backward: dy [..., N] -> dz, dfactor, dbias of their inputs' shapes and dtypes, each only where
    it is asked for. Saved: factor, and z where factor's gradient needs it.
    """

    @staticmethod
    def forward(ctx, z, factor, bias):
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, factor)
        return _scale_columns(z, factor, bias, torch.empty_like(z))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_dz, need_dfactor, need_dbias = ctx.needs_input_grad
        z, factor = ctx.saved_tensors
        dz = dfactor = dbias = None
        rows = (-1, dy.shape[-1])
        with without_autocast(dy):
            if need_dz:
                dz = torch.mul(dy, factor, out=torch.empty_like(dy))
            if need_dfactor:
                dfactor = (dy.to(factor.dtype) * z).reshape(rows).sum(0)
            if need_dbias:
                dbias = dy.reshape(rows).sum(0)
        return dz, dfactor, dbias


def _prepare(x, weight, lora_a, lora_b, magnitude, bias=None, *, scale):
    """(lora_linear's arguments after autocast, the weights before it, magnitude, bias), checked."""
    x = check.checked_input(OP, x, 0.0, None)
    before = weight, lora_a, lora_b
    weight, bias = check.checked_base(OP, x, weight, bias)
    lora_a, lora_b = check.checked_adapter(OP, x, weight.shape[0], lora_a, lora_b, None, scale)
    check.check_tensor(OP, "magnitude", magnitude)
    check.check_shape(OP, "magnitude", magnitude, (weight.shape[0],), "[N]")
    check.check_device(OP, "magnitude", magnitude, x)
    number, gate = scaled_gate(scale, None, lora_a, x)
    base_alone = x, weight, lora_a, lora_b, None, gate, None, number, 0.0, None
    return base_alone, before, magnitude, bias


def _factor(args, before, magnitude, scale, backend):
    """m / ||W0 + scale * B A||."""
    dispatch.require(OP, backend, REFUSALS, args[0])
    norms = row_norms(*before, scale)
    return magnitude.to(norms.dtype) / norms


def _run(args, factor: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    z = lora_linear._run(args, backend)
    tensors = [t for t in (z, factor, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return ScaleColumnsFunction.apply(z, factor, bias)
    return _scale_columns(z, factor, bias, z)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor,
    backend: str | None = None,
) -> Tensor:
    """y = b + (m / ||W0 + scale * B A||) ⊙ (x W0^T + scale * (x A^T) B^T): DoRA (arXiv 2402.09353).

    m is the magnitude, and the norms are those of the rows of the adapted weight. The products are
    lora_linear's; B A is never made whole.

    Shapes: x [..., K] of any strides, weight [N, K], lora_a [R, K], lora_b [N, R], magnitude [N],
    bias [N]; returns [..., N].

    Dtypes, autocast, scale and backend as in lora_linear. magnitude may have any floating dtype;
    it, the norms and their quotient are fp32 (fp64 for fp64).

    Gradients: x, weight, lora_a, lora_b, magnitude, bias, whichever require it; the norms are
    constants in them, as in the paper; once differentiable. Saved for them are what lora_linear
    saves and, for that of magnitude, the product that it scales [M, N].

    There is no dropout here. With d = drop(x), PEFT's is dora_linear(d, ...) + F.linear(x - d, W0).

    Raises TypeError (not a tensor; dtype), ValueError (shape, device, rank 0, scale, backend),
    NotImplementedError (tensor subclass, sparse layout, forward-mode AD), RuntimeError (a backend
    that was asked for and cannot run, with the reason).
    """
    backend = dispatch.choose(backend)
    args, before, magnitude, bias = _prepare(
        x, weight, lora_a, lora_b, magnitude, bias, scale=scale
    )
    with without_autocast(args[0]):
        if dispatch.transformed():
            dispatch.check_transformed(OP, backend)
            x, weight, lora_a, lora_b = args[:4]
            return reference.dora_linear(x, weight, lora_a, lora_b, magnitude, bias, scale=scale)
        return _run(args, _factor(args, before, magnitude, scale, backend), bias, backend)


@dispatch.explains(OP)
def _explain(*args, backend=None, **kwargs):
    return dispatch.choose(backend), _prepare(*args, **kwargs)[0][0], REFUSALS
