"""y = [P ; E[ids] + scale * (A B)[positions]], forward and backward.

With G_p = the sum of dy over the tokens at position p, which is one read of dy:

    dA = scale * G B^T      dB = scale * A^T G      dP = the sum of dy over the sequences
"""

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_lora import reference
from fused_lora.ops import dispatch
from fused_lora.ops import validation as check
from fused_lora.ops.lora_linear import shaped
from fused_lora.ops.routing import reads_ids

OP = "dept_embedding"
REFUSALS = {
    "cuda": lambda weight: f"{OP} has no CUDA C++ kernel; use backend='triton' or 'torch'",
    "triton": lambda weight: dispatch.triton_refuses(weight, "weight"),
    "torch": dispatch.never_refuses,
}

# Contract. positions has ids' shape, or [L]. A gradient whose needs[i] is false is empty.
# needs: weight, prompt, lora_a, lora_b.
_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    "dept_embedding(Tensor ids, Tensor weight, Tensor? prompt, Tensor lora_a, Tensor lora_b, "
    "Tensor? positions, float scale, str backend) -> Tensor"
)
_library.define(
    "dept_embedding_backward(Tensor dy, Tensor ids, Tensor weight, Tensor? prompt, Tensor lora_a, "
    "Tensor lora_b, Tensor? positions, float scale, bool[4] needs, str backend) "
    "-> (Tensor dweight, Tensor dprompt, Tensor da, Tensor db)"
)


def _fake(ids, weight, prompt, lora_a, lora_b, positions, scale, backend):
    m = 0 if prompt is None else prompt.shape[0]
    return weight.new_empty(*ids.shape[:-1], m + ids.shape[-1], weight.shape[1])


def _fake_backward(dy, ids, weight, prompt, lora_a, lora_b, positions, scale, needs, backend):
    return tuple(
        t.new_empty(t.shape) if need else dy.new_empty(0)
        for t, need in zip((weight, prompt, lora_a, lora_b), needs, strict=True)
    )


def sequences(ids: Tensor) -> Tensor:
    """[..., L] as [N, L]."""
    return ids if ids.ndim == 2 else ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1])


def check_bounds(op: str, ids: Tensor, V: int) -> None:
    """IndexError for an id outside of [0, V), where ids are looked at (see AdapterRouting)."""
    if reads_ids(ids) and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < V):
        raise IndexError(
            f"{op}: ids must lie in [0, {V}), got {int(ids.min())} to {int(ids.max())}"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(ids, positions):
    """ids and positions as [N, L] or, of positions, [1, L] for all sequences."""
    ids = sequences(ids)
    if positions is not None:
        positions = positions[None] if positions.ndim == 1 else sequences(positions)
    return ids, positions


def _forward(ids, weight, prompt, lora_a, lora_b, positions, scale, backend):
    dispatch.require(OP, backend, REFUSALS, weight)
    if backend != "torch":
        weight, prompt, lora_a, lora_b = dispatch.readable(weight, prompt, lora_a, lora_b)
    forward = forward_torch if backend == "torch" else forward_triton
    a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
    rows, at = _rows(ids, positions)
    y = forward(rows, weight, prompt, a, b, at, scale)
    return shaped(y, *ids.shape[:-1], *y.shape[1:])


def _backward(dy, ids, weight, prompt, lora_a, lora_b, positions, scale, needs, backend):
    dispatch.require(OP, backend, REFUSALS, weight)
    if backend != "torch":
        dy, weight, prompt, lora_a, lora_b = dispatch.readable(dy, weight, prompt, lora_a, lora_b)
    need_dw, need_dprompt, need_da, need_db = needs
    sums = sums_torch if backend == "torch" else sums_triton
    m = 0 if prompt is None else prompt.shape[0]
    rows, at = _rows(ids, positions)
    dy = dy.reshape(rows.shape[0], m + rows.shape[1], weight.shape[1])
    needs = need_dw, need_dprompt, need_da or need_db
    dw, dprompt, g = sums(dy, rows, m, weight.shape[0], lora_a.shape[0], at, needs)
    da = db = None
    if need_dprompt:
        dprompt = dprompt.to(prompt.dtype)
    # A and B as the forward had them. The products are tiny: they have S rows, and not N L.
    P = 0 if g is None else g.shape[0]
    if need_da:
        b = lora_b.to(weight.dtype).to(g.dtype)
        da = lora_a.new_zeros(lora_a.shape)
        da[:P] = scale * (g @ b.t())
    if need_db:
        a = lora_a[:P].to(weight.dtype).to(g.dtype)
        db = (scale * (a.t() @ g)).to(lora_b.dtype)
    return dw, dprompt, da, db


def forward_torch(ids, weight, prompt, a, b, positions, scale):
    N, L = ids.shape
    m = 0 if prompt is None else prompt.shape[0]
    if m:
        # Any word where the prompt will be: y is written once, and not put together afterwards.
        ids = F.pad(ids, (m, 0))
    y = F.embedding(ids, weight)
    if m:
        y[:, :m] = prompt
    if positions is None:
        P = min(L, a.shape[0])
        y[:, m : m + P] += torch.addmm(b.new_empty(()), a[:P], b, beta=0, alpha=scale)
    else:
        S = a.shape[0]
        inside = (positions >= 0) & (positions < S)
        found = F.embedding(positions.clamp(0, S - 1), a).masked_fill_(~inside[..., None], 0)
        found, b = found.expand(N, -1, -1), b.expand(N, -1, -1)
        y[:, m:].baddbmm_(found, b, alpha=scale)
    return y


def sums_torch(dy, ids, m, V, S, positions, needs):
    """(dE [V, D] in dy's dtype, dP [m, D], G [at most S, D] in fp32 or more), each where needed."""
    need_dw, need_dprompt, need_g = needs
    dw = dprompt = g = None
    D, dtype = dy.shape[2], wide(dy.dtype)
    tokens = dy[:, m:]
    if need_dw:
        dw = torch.ops.aten.embedding_dense_backward(tokens, ids, V, -1, False)
    if need_dprompt:
        dprompt = dy[:, :m].sum(0, dtype=dtype)
    if need_g:
        if positions is None or len(positions) != len(ids):
            tokens = tokens[:, : S if positions is None else None].sum(0, keepdim=True, dtype=dtype)
        if positions is None:
            return dw, dprompt, tokens[0]
        keys = torch.where((positions >= 0) & (positions < S), positions, S)
        g = torch.ops.aten.embedding_dense_backward(
            tokens.to(dtype).reshape(-1, D), keys.flatten().long(), S + 1, S, False
        )[:S]
    return dw, dprompt, g


def forward_triton(ids, weight, prompt, a, b, positions, scale):
    from fused_lora.triton_kernels.embedding import embedding

    check_bounds(OP, ids, weight.shape[0])
    N, L = ids.shape
    if prompt is None and positions is not None and len(positions) == N:
        # Every token has a place of its own: a step of one token a sequence fills whole tiles.
        ids, positions = ids.reshape(1, N * L), positions.reshape(1, N * L)
    y = embedding(ids, weight, a, b, scale=scale, prompt=prompt, positions=positions)
    return y if prompt is not None else y.view(N, L, weight.shape[1])


def sums_triton(dy, ids, m, V, S, positions, needs):
    """As sums_torch."""
    from fused_lora.triton_kernels.embedding import sum_segments

    need_dw, need_dprompt, need_g = needs
    dw = dprompt = g = None
    (N, L), D = ids.shape, dy.shape[2]
    tokens = dy[:, m:]
    if need_dw:
        dw = sum_segments(tokens, dy.new_empty(V, D), ids)
    shared = positions is None or len(positions) != N
    length = min(L, S) if positions is None else L
    # One read of dy gives both sums over the sequences.
    first = 0 if need_dprompt else m
    last = m + length if need_g and shared else m
    sums = sum_segments(dy[:, first:last], dy.new_empty(last - first, D, dtype=torch.float32))
    if need_dprompt:
        dprompt = sums[:m]
    if need_g:
        g = sums[m - first :]
        if positions is not None:
            tokens = g[None] if shared else tokens
            g = sum_segments(tokens, dy.new_empty(S, D, dtype=torch.float32), positions)
    return dw, dprompt, g


def _op_backward(dy, *args):
    return tuple(dy.new_empty(0) if t is None else t for t in _backward(dy, *args))


_library.impl("dept_embedding", _forward, "CompositeExplicitAutograd")
_library.impl("dept_embedding_backward", _op_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::dept_embedding", _fake, lib=_library)
torch.library.register_fake("fused_lora::dept_embedding_backward", _fake_backward, lib=_library)


class DePTEmbeddingFunction(torch.autograd.Function):
    """ids [..., L], weight [V, D], prompt [m, D], lora_a [S, R], lora_b [R, D] -> y [..., m + L,
    D].

    backward: dy [..., m + L, D] -> dweight, dprompt, dlora_a, dlora_b of their inputs' shapes and
    dtypes, each only where it is asked for. Saved: the inputs, and nothing of y's size.
    """

    @staticmethod
    def forward(ctx, ids, weight, prompt, lora_a, lora_b, positions, scale, backend):
        forward = torch.ops.fused_lora.dept_embedding if dispatch.watched(weight) else _forward
        ctx.save_for_backward(ids, weight, prompt, lora_a, lora_b, positions)
        ctx.scale, ctx.backend = scale, backend
        return forward(ids, weight, prompt, lora_a, lora_b, positions, scale, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[1:5]
        ids, weight, prompt, lora_a, lora_b, positions = ctx.saved_tensors
        backward = (
            torch.ops.fused_lora.dept_embedding_backward if dispatch.watched(dy) else _backward
        )
        with without_autocast(dy):
            grads = backward(
                dy, ids, weight, prompt, lora_a, lora_b, positions, ctx.scale, needs, ctx.backend
            )
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return None, *wanted, None, None, None


def without_autocast(x: Tensor):
    """The dtypes are those of the embedding, which autocast leaves alone."""
    if check.autocasting(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def check_ids(op: str, name: str, value) -> Tensor:
    """An integer tensor, as int32 or int64."""
    check.check_tensor(op, name, value, check.INTEGERS)
    return value if value.dtype in (torch.int32, torch.int64) else value.long()


def check_table(op: str, weight) -> None:
    check.check_tensor(op, "weight", weight)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight must have shape [V, D], both at least 1, got {list(weight.shape)}"
        )


def _check_positions(ids: Tensor, positions) -> Tensor:
    """[L], of all sequences, or of ids' shape."""
    positions = check_ids(OP, "positions", positions)
    check.check_device(OP, "positions", positions, ids, "ids")
    shape, wanted = list(positions.shape), list(ids.shape)
    own = [size for size in shape[:-1] if size != 1]
    if shape[-1:] == wanted[-1:] and not own and len(shape) <= len(wanted):
        return positions.reshape(shape[-1])
    if shape != wanted:
        raise ValueError(
            f"{OP}: positions must have ids' shape {wanted} or [L] = {wanted[-1:]}, got {shape}"
        )
    return positions


def _prepare(ids, weight, prompt, lora_a, lora_b, *, scale=1.0, positions=None):
    """The op's arguments, checked."""
    ids = check_ids(OP, "ids", ids)
    check_table(OP, weight)
    if ids.ndim < 1:
        raise ValueError(f"{OP}: ids must have shape [..., L], got a 0-d tensor")
    D = weight.shape[1]
    named = {"lora_a": lora_a, "lora_b": lora_b} | ({} if prompt is None else {"prompt": prompt})
    for name, t in named.items():
        check.check_tensor(OP, name, t)
    check.check_scale(OP, scale)
    if prompt is not None:
        check.check_shape(OP, "prompt", prompt, (None, D), "[m, D]")
    if lora_a.ndim != 2 or 0 in lora_a.shape:
        raise ValueError(
            f"{OP}: lora_a must have shape [S, R], both at least 1, got {list(lora_a.shape)}"
        )
    check.check_shape(OP, "lora_b", lora_b, (lora_a.shape[1], D), "[R, D]")
    for name, t in ({"ids": ids} | named).items():
        check.check_device(OP, name, t, weight, "weight")
    for name, t in named.items():
        check.check_adapter_dtype(OP, name, t, weight)
    if positions is not None:
        positions = _check_positions(ids, positions)
    if isinstance(scale, Tensor):
        # So that the value of a scale that lives on the device is never read by the host.
        exact = wide(weight.dtype)
        lora_b, scale = lora_b.to(exact) * scale.to(weight.device, exact), 1.0
    return ids, weight, prompt, lora_a, lora_b, positions, float(scale)


def dept_embedding(
    ids: Tensor,
    weight: Tensor,
    prompt: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = [P ; E[ids] + scale * (A B)[positions]]: the input of a model with DePT (arXiv
    2309.05173).

    A short soft prompt P stands in front of the word embeddings E[ids], to which a low-rank pair is
    added by POSITION, and not by word.

    Shapes: ids [..., L], weight E [V, D], prompt P [m, D] or None, lora_a A [S, R], lora_b B [R,
    D]; returns [..., m + L, D]. positions [L], or of ids' shape, defaults to 0 .. L-1: it is for
    steps with a KV cache (prompt=None, positions=the step's) and for padding on the left (-1 where
    there is no token). A position that is negative, or S or more, adds nothing.

    Dtypes: ids and positions of any integer dtype up to 64 bits; weight float32, bfloat16, float16
    (and float64 with backend="torch"), which is also that of y, under autocast too. prompt, lora_a
    and lora_b have it or are float32 masters: the product is made in weight's dtype, and a master's
    gradient comes back in float32.

    scale is a number or a 0-d tensor. backend: "triton" or "torch" runs there or raises; None takes
    the best that is proved (see fused_lora.why).

    Gradients: prompt, lora_a, lora_b, and weight, whichever require it; once differentiable, and
    the same from run to run: rows are added in a fixed order. Saved for them are the inputs alone.

    Raises TypeError (not a tensor; dtype), ValueError (shape, device, scale, backend), IndexError
    (an id outside of [0, V), on a CPU; on a GPU the torch backend asserts there, and the triton
    backend makes the row NaN), NotImplementedError (tensor subclass, sparse layout, forward-mode
    AD), RuntimeError (a backend that was asked for and cannot run, with the reason).
    """
    backend = dispatch.choose(backend)
    args = _prepare(ids, weight, prompt, lora_a, lora_b, scale=scale, positions=positions)
    trained = [t for t in args[1:5] if t is not None and t.requires_grad]
    with without_autocast(weight):
        if dispatch.transformed():
            dispatch.check_transformed(OP, backend)
            *tensors, positions, scale = args
            return reference.dept_embedding(*tensors, scale=scale, positions=positions)
        if torch.is_grad_enabled() and trained:
            return DePTEmbeddingFunction.apply(*args, backend)
        run: Callable = (
            torch.ops.fused_lora.dept_embedding if dispatch.watched(weight) else _forward
        )
        return run(*args, backend)


@dispatch.explains(OP)
def _explain(*args, backend=None, **kwargs):
    return dispatch.choose(backend), _prepare(*args, **kwargs)[1], REFUSALS
