"""y = E[ids] + scale * A^T[ids] B^T, forward and backward: LoRA of an embedding, by token.

With h = A^T[ids] and u = scale * dy B, both [M, R]:

    dA^T_v = the sum of u over the tokens with id v      dB = scale * dy^T h

but for the word padding_idx, whose rows of E and of A^T get no gradient.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_lora import reference
from fused_lora.ops import dispatch
from fused_lora.ops import validation as check
from fused_lora.ops.dept_embedding import (
    check_bounds,
    check_ids,
    check_table,
    wide,
    without_autocast,
)
from fused_lora.ops.lora_linear import shaped

OP = "lora_embedding"
REFUSALS = {
    "cuda": lambda weight: f"{OP} has no CUDA C++ kernel; use backend='triton' or 'torch'",
    "triton": lambda weight: dispatch.triton_refuses(weight, "weight"),
    "torch": dispatch.never_refuses,
}

# Contract. A gradient whose needs[i] is false is empty. needs: weight, lora_a, lora_b. padding_idx
# is -1 where there is none.
_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    "lora_embedding(Tensor ids, Tensor weight, Tensor lora_a, Tensor lora_b, float scale, "
    "str backend) -> Tensor"
)
_library.define(
    "lora_embedding_backward(Tensor dy, Tensor ids, Tensor weight, Tensor lora_a, Tensor lora_b, "
    "float scale, int padding_idx, bool[3] needs, str backend) "
    "-> (Tensor dweight, Tensor da, Tensor db)"
)


def _fake(ids, weight, lora_a, lora_b, scale, backend):
    return weight.new_empty(*ids.shape, weight.shape[1])


def _fake_backward(dy, ids, weight, lora_a, lora_b, scale, padding_idx, needs, backend):
    return tuple(
        t.new_empty(t.shape) if need else dy.new_empty(0)
        for t, need in zip((weight, lora_a, lora_b), needs, strict=True)
    )


def _forward(ids, weight, lora_a, lora_b, scale, backend):
    dispatch.require(OP, backend, REFUSALS, weight)
    if backend != "torch":
        weight, lora_a, lora_b = dispatch.readable(weight, lora_a, lora_b)
    forward = forward_torch if backend == "torch" else forward_triton
    a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
    return shaped(forward(ids.flatten(), weight, a, b, scale), *ids.shape, weight.shape[1])


def _backward(dy, ids, weight, lora_a, lora_b, scale, padding_idx, needs, backend):
    dispatch.require(OP, backend, REFUSALS, weight)
    if backend != "torch":
        dy, weight, lora_a, lora_b = dispatch.readable(dy, weight, lora_a, lora_b)
    backward = backward_torch if backend == "torch" else backward_triton
    a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
    dy = dy.reshape(ids.numel(), weight.shape[1])
    dtypes = lora_a.dtype, lora_b.dtype
    return backward(dy, ids.flatten(), weight, a, b, scale, padding_idx, needs, dtypes)


def forward_torch(ids, weight, a, b, scale):
    y = F.embedding(ids, weight)
    return y.addmm_(F.embedding(ids, a.t()), b.t(), alpha=scale)


def backward_torch(dy, ids, weight, a, b, scale, padding_idx, needs, dtypes):
    need_dw, need_da, need_db = needs
    dw = da = db = None
    by_id = torch.ops.aten.embedding_dense_backward
    if need_dw:
        dw = by_id(dy, ids, weight.shape[0], padding_idx, False)
    if need_da:
        u = torch.addmm(b.new_empty(()), dy, b, beta=0, alpha=scale)
        # Many tokens may share an id: they are added in fp32.
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        da = by_id(u, ids, a.shape[1], padding_idx, False).t().to(dtypes[0]).contiguous()
    if need_db:
        h = F.embedding(ids, a.t())
        db = torch.addmm(b.new_empty(()), dy.t(), h, beta=0, alpha=scale).to(dtypes[1])
    return dw, da, db


def forward_triton(ids, weight, a, b, scale):
    from fused_lora.triton_kernels.embedding import embedding

    check_bounds(OP, ids, weight.shape[0])
    # As DePT with the ids for positions: the columns of A are what a position adds.
    return embedding(ids[None], weight, a.t(), b.t(), scale=scale, positions=ids[None])


def backward_triton(dy, ids, weight, a, b, scale, padding_idx, needs, dtypes):
    from fused_lora.triton_kernels.embedding import sum_segments
    from fused_lora.triton_kernels.row_reduce import row_reduce_dy
    from fused_lora.triton_kernels.shrink import shrink

    need_dw, need_da, need_db = needs
    dw = da = db = u = None
    if need_dw:
        dw = sum_segments(dy[None], weight.new_empty(weight.shape), ids)
    if need_db:
        # Where an id is out of range the forward wrote NaN, and the loss has said so.
        h = F.embedding(ids.clamp(0, a.shape[1] - 1), a.t())
        u, db, _ = row_reduce_dy(dy, b, h, scale=scale, need_dh=need_da, db_dtype=dtypes[1])
    elif need_da:
        u, _ = shrink(dy, b.t(), scale=scale)
    if need_da:
        da = a.new_empty(a.shape, dtype=dtypes[0])
        sum_segments(u[None], da.t(), ids)
    for rows in (dw, None if da is None else da.t()):
        if padding_idx >= 0 and rows is not None:
            rows[padding_idx].zero_()
    return dw, da, db


def _op_backward(dy, *args):
    return tuple(dy.new_empty(0) if t is None else t for t in _backward(dy, *args))


_library.impl("lora_embedding", _forward, "CompositeExplicitAutograd")
_library.impl("lora_embedding_backward", _op_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_embedding", _fake, lib=_library)
torch.library.register_fake("fused_lora::lora_embedding_backward", _fake_backward, lib=_library)


class LoRAEmbeddingFunction(torch.autograd.Function):
    """ids [...], weight [V, D], lora_a [R, V], lora_b [D, R] -> y [..., D].

    backward: dy [..., D] -> dweight, dlora_a, dlora_b of their inputs' shapes and dtypes, each only
    where it is asked for. Saved: the inputs alone.
    """

    @staticmethod
    def forward(ctx, ids, weight, lora_a, lora_b, scale, padding_idx, backend):
        forward = torch.ops.fused_lora.lora_embedding if dispatch.watched(weight) else _forward
        ctx.save_for_backward(ids, weight, lora_a, lora_b)
        ctx.scale, ctx.padding_idx, ctx.backend = scale, padding_idx, backend
        return forward(ids, weight, lora_a, lora_b, scale, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[1:4]
        backward = (
            torch.ops.fused_lora.lora_embedding_backward if dispatch.watched(dy) else _backward
        )
        with without_autocast(dy):
            grads = backward(dy, *ctx.saved_tensors, ctx.scale, ctx.padding_idx, needs, ctx.backend)
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return None, *wanted, None, None, None


def _check_padding(padding_idx, V: int) -> int:
    """padding_idx as the op takes it."""
    if padding_idx is None:
        return -1
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        kind = type(padding_idx).__name__
        raise TypeError(f"{OP}: padding_idx must be an int or None, got {kind}")
    if not 0 <= padding_idx < V:
        raise ValueError(f"{OP}: padding_idx must lie in [0, {V}), got {padding_idx}")
    return padding_idx


def _prepare(ids, weight, lora_a, lora_b, *, scale, padding_idx=None):
    """The op's arguments, checked."""
    ids = check_ids(OP, "ids", ids)
    check_table(OP, weight)
    V, D = weight.shape
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        check.check_tensor(OP, name, t)
    check.check_scale(OP, scale)
    padding_idx = _check_padding(padding_idx, V)
    check.check_shape(OP, "lora_a", lora_a, (None, V), "[R, V]")
    R = lora_a.shape[0]
    if R == 0:
        raise ValueError(f"{OP}: lora_a has shape [0, {V}]; the rank must be at least 1")
    check.check_shape(OP, "lora_b", lora_b, (D, R), "[D, R]")
    for name, t in (("ids", ids), ("lora_a", lora_a), ("lora_b", lora_b)):
        check.check_device(OP, name, t, weight, "weight")
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        check.check_adapter_dtype(OP, name, t, weight)
    if isinstance(scale, Tensor):
        # So that the value of a scale that lives on the device is never read by the host.
        exact = wide(weight.dtype)
        lora_b, scale = lora_b.to(exact) * scale.to(weight.device, exact), 1.0
    return ids, weight, lora_a, lora_b, float(scale), padding_idx


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = E[ids] + scale * A^T[ids] B^T: an embedding adapted by token (LoRA, arXiv 2106.09685).

    It equals F.embedding(ids, E + scale * (B A)^T). The layout is PEFT's.

    Shapes: ids [...], weight E [V, D], lora_a A [R, V], lora_b B [D, R]; returns [..., D].

    Dtypes: ids of any integer dtype up to 64 bits; weight float32, bfloat16, float16 (and float64
    with backend="torch"), which is also that of y, under autocast too. lora_a and lora_b have it or
    are float32 masters: the product is made in weight's dtype, and a master's gradient comes back
    in float32.

    scale is a number or a 0-d tensor. padding_idx is a word whose rows of E and of A^T get no
    gradient, as in nn.Embedding; they are read like all others. backend: "triton" or "torch" runs
    there or raises; None takes the best that is proved (see fused_lora.why).

    Gradients: lora_a (dense, zero for words that are not in ids), lora_b, and weight, whichever
    require it; once differentiable, and the same from run to run: the tokens of one word are added
    in their order. Saved for them are the inputs alone.

    Raises TypeError (not a tensor; dtype), ValueError (shape, device, rank 0, scale, padding_idx,
    backend), IndexError (an id outside of [0, V), on a CPU; on a GPU the torch backend asserts
    there, and the triton backend makes the row NaN), NotImplementedError (tensor subclass, sparse
    layout, forward-mode AD), RuntimeError (a backend that was asked for and cannot run, with the
    reason).
    """
    backend = dispatch.choose(backend)
    args = _prepare(ids, weight, lora_a, lora_b, scale=scale, padding_idx=padding_idx)
    with without_autocast(weight):
        if dispatch.transformed():
            dispatch.check_transformed(OP, backend)
            *tensors, scale, _ = args
            return reference.lora_embedding(*tensors, scale=scale, padding_idx=padding_idx)
        if torch.is_grad_enabled() and any(t.requires_grad for t in args[1:4]):
            return LoRAEmbeddingFunction.apply(*args, backend)
        run: Callable = (
            torch.ops.fused_lora.lora_embedding if dispatch.watched(weight) else _forward
        )
        return run(*args[:5], backend)


@dispatch.explains(OP)
def _explain(*args, backend=None, **kwargs):
    return dispatch.choose(backend), _prepare(*args, **kwargs)[1], REFUSALS
