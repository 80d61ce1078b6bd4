"""y = b + c ⊙ z with z = x W0^T + scale * (x A^T) B^T and c = m / ||W0 + scale * B A||: DoRA.

The norms are those of the rows, and constants in the backward (arXiv 2402.09353, section 4.3):

    dz = c ⊙ dy      dm = (the sum over the rows of dy ⊙ z) / ||W0 + scale * B A||

and the gradients behind z are those of lora_linear. It is computed as c ⊙ (z + b) + (1 - c) ⊙ b:
where c = 1, as when training begins, y is to the bit what lora_linear gives with the bias.
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
def row_norms(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor,
    rounded: torch.dtype | None = None,
) -> Tensor:
    """||W0 + scale * B A|| of every row, fp32 [N] (fp64 for fp64), or `rounded` to a dtype.

    Some rows at a time: B A is never whole. The sum ||w||^2 + 2 s w . (b A) + s^2 b (A A^T) b^T
    needs no such tile, but where B A undoes most of a row it is left with the rounding errors of
    its terms.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = lora_a.to(dtype) * scale, lora_b.to(dtype)
    rows = max(1, TILE // weight.shape[1])
    norms = [
        torch.linalg.vector_norm(torch.addmm(w.to(dtype), part, a).to(rounded or dtype), dim=1)
        for w, part in zip(weight.split(rows), b.split(rows), strict=True)
    ]
    return (norms[0] if len(norms) == 1 else torch.cat(norms)).to(dtype)


def column_factor(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, scale: float | Tensor
) -> Tensor:
    """c = m / ||W0 + scale * B A||, fp32 [N] (fp64 for fp64); 1 for a row of zeros, which has no
    direction that a magnitude could scale.

    The norms have no more digits than a 16-bit magnitude, which began as one of them: the quotient
    is then exactly 1.
    """
    rounded = magnitude.dtype if magnitude.dtype.itemsize == 2 else None
    norms = row_norms(weight, lora_a, lora_b, scale, rounded)
    zeros = norms == 0
    return (magnitude.to(norms.dtype) / norms.masked_fill(zeros, 1)).masked_fill(zeros, 1)


def _scale_columns(z: Tensor, factor: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """factor ⊙ z + (1 - factor) ⊙ bias, computed in factor's dtype and rounded once."""
    if bias is None:
        return torch.mul(z, factor, out=out)
    return torch.addcmul((1 - factor) * bias, z, factor, out=out)


class ScaleColumnsFunction(torch.autograd.Function):
    """z [..., N] with the bias in it, factor [N], bias [N] or None -> factor ⊙ (z - bias) + bias of
    z's dtype.

    backward: dy [..., N] -> dz, dfactor, and as dbias that of both: bias is to be detached in z.
    They have their inputs' shapes and dtypes, and are made only where they are asked for. Saved:
    factor, and z and bias where factor's gradient needs them.
    """

    @staticmethod
    def forward(ctx, z, factor, bias):
        saved = (z, bias) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*saved, factor)
        return _scale_columns(z, factor, bias, torch.empty_like(z))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_dz, need_dfactor, need_dbias = ctx.needs_input_grad
        z, bias, factor = ctx.saved_tensors
        dz = dfactor = dbias = None
        rows = (-1, dy.shape[-1])
        with without_autocast(dy):
            if need_dz:
                dz = torch.mul(dy, factor, out=torch.empty_like(dy))
            if need_dfactor:
                scaled = z if bias is None else z - bias.to(factor.dtype)
                dfactor = (dy.to(factor.dtype) * scaled).reshape(rows).sum(0)
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
    frozen = None if bias is None else bias.detach()
    unscaled = x, weight, lora_a, lora_b, frozen, gate, None, number, 0.0, None
    return unscaled, before, magnitude, bias


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

    m is the magnitude, and the norms are those of the rows of the adapted weight; a row of zeros is
    scaled by 1. The products are lora_linear's; B A is never made whole.

    Shapes: x [..., K] of any strides, weight [N, K], lora_a [R, K], lora_b [N, R], magnitude [N],
    bias [N]; returns [..., N].

    Dtypes, autocast, scale and backend as in lora_linear. magnitude may have any floating dtype;
    it, the norms and their quotient are fp32 (fp64 for fp64), and the norms are rounded to the
    dtype of a 16-bit magnitude.

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
    if not torch.compiler.is_compiling():  # there lora_linear asks when it runs
        dispatch.require(OP, backend, REFUSALS, args[0])
    with without_autocast(args[0]):
        if dispatch.transformed():
            dispatch.check_transformed(OP, backend)
            x, weight, lora_a, lora_b = args[:4]
            return reference.dora_linear(x, weight, lora_a, lora_b, magnitude, bias, scale=scale)
        weight, lora_a, lora_b = before
        factor = column_factor(weight, lora_a, lora_b, magnitude, scale)
        return _run(args, factor, bias, backend)


@dispatch.explains(OP)
def _explain(*args, backend=None, **kwargs):
    return dispatch.choose(backend), _prepare(*args, **kwargs)[0][0], REFUSALS
