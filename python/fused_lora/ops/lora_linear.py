"""y = x W0^T + b + scale * ((drop(x) A^T) * g) B^T, forward and backward.

With h = drop(x) A^T, D = mask / (1 - p) and dh = scale * (dy B) * g:

    dx = dy W0 + D ⊙ (dh A)      dA = dh^T drop(x)      P = dy^T h
    dB = scale * P diag(g)       dg_r = scale * sum_n B_nr P_nr
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_lora import reference
from fused_lora.ops import dispatch
from fused_lora.ops import validation as check
from fused_lora.ops.dropout import dropout_mask

REFUSALS: dict[str, Callable[[Tensor], str | None]] = {
    "cuda": dispatch.cuda_refuses,
    "triton": dispatch.triton_refuses,
    "torch": dispatch.never_refuses,
}

# Contract. h is empty where save_h is false; a gradient whose needs[i] is false is empty.
# needs: x, weight, lora_a, lora_b, bias, gate.
_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
    "Tensor? gate, Tensor? seed, float scale, float dropout_p, bool save_h, str backend, "
    "int[]? dropout_columns=None) -> (Tensor y, Tensor h)"
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
    "Tensor? gate, Tensor h, Tensor? seed, float scale, float dropout_p, bool[6] needs, "
    "str backend, int[]? dropout_columns=None) "
    "-> (Tensor dx, Tensor dw, Tensor da, Tensor db, Tensor dbias, Tensor dgate)"
)


def _fake(
    x, weight, lora_a, lora_b, bias, gate, seed, scale, dropout_p, save_h, backend, columns=None
):
    M = math.prod(x.shape[:-1])
    h = x.new_empty(M, lora_a.shape[0]) if save_h else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), h


def _fake_backward(
    dy, x, weight, lora_a, lora_b, gate, h, seed, scale, dropout_p, needs, backend, columns=None
):
    bias = x.new_empty(weight.shape[0])
    return tuple(
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip((x, weight, lora_a, lora_b, bias, gate), needs, strict=True)
    )


def _rows(t: Tensor) -> Tensor:
    """[..., C] as the matrix of its rows."""
    return t if t.ndim == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def shaped(y: Tensor, *shape: int) -> Tensor:
    """The rows y [M, C] as [..., C]. In place of a view, which torch lets nobody change that has it
    from a custom function, as F.relu_ and += do."""
    return torch.ops.aten._unsafe_view(y, shape)


def _adapters(lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 masters as the products take them."""
    if lora_a.dtype == lora_b.dtype == dtype:
        return lora_a, lora_b
    return lora_a.to(dtype), lora_b.to(dtype)


def _forward(
    x, weight, lora_a, lora_b, bias, gate, seed, scale, dropout_p, save_h, backend, columns=None
):
    dispatch.require("lora_linear", backend, REFUSALS, x)
    if backend != "torch":
        x, weight, lora_a, lora_b, bias, gate = dispatch.readable(
            x, weight, lora_a, lora_b, bias, gate
        )
    a, b = _adapters(lora_a, lora_b, x.dtype)
    forward = forward_torch if backend == "torch" else functools.partial(forward_kernels, backend)
    y, h = forward(_rows(x), weight, a, b, bias, gate, seed, scale, dropout_p, save_h, columns)
    if x.ndim != 2:
        y = shaped(y, *x.shape[:-1], weight.shape[0])
    return y, h


def _backward(
    dy, x, weight, lora_a, lora_b, gate, h, seed, scale, dropout_p, needs, backend, columns=None
):
    dispatch.require("lora_linear", backend, REFUSALS, x)
    if backend != "torch":
        dy, x, weight, lora_a, lora_b, gate = dispatch.readable(dy, x, weight, lora_a, lora_b, gate)
    a, b = _adapters(lora_a, lora_b, x.dtype)
    backward = (
        backward_torch if backend == "torch" else functools.partial(backward_kernels, backend)
    )
    need_dx, need_dw, need_da, need_db, need_dbias, need_dgate = needs
    dtypes = lora_a.dtype, lora_b.dtype
    skinny = need_dx, need_da, need_db, need_dgate
    dy, rows = _rows(dy), _rows(x)
    dx, da, db, dgate = backward(
        dy, rows, weight, a, b, gate, h, seed, scale, dropout_p, skinny, dtypes, columns
    )
    # Each is one plain product or sum that the vendor's library makes best, and LoRA itself asks
    # for neither.
    dw = dy.t() @ rows if need_dw else None
    dbias = dy.sum(0) if need_dbias else None
    if need_dx and x.ndim != 2:
        dx = dx.view(x.shape)
    if need_dgate:
        dgate = dgate.to(gate.dtype)
    return dx, dw, da, db, dbias, dgate


def _masked(x, seed, dropout_p, columns=None):
    """(x with the dropped elements at zero, the mask, 1 / (1 - p)); without a seed x itself."""
    if seed is None:
        return x, None, 1.0
    keep = dropout_mask(seed, *x.shape, dropout_p, columns)
    return torch.where(keep, x, 0), keep, reference.dropout_scale(dropout_p)


def _scaled_mm(alpha: float, lhs: Tensor, rhs: Tensor) -> Tensor:
    """alpha * lhs @ rhs, with alpha applied before the product is rounded."""
    if alpha == 1.0:
        return lhs @ rhs
    # beta = 0: what is added to is not read.
    return lhs.new_empty(lhs.shape[0], rhs.shape[1]).addmm_(lhs, rhs, beta=0, alpha=alpha)


def _gated(t: Tensor, gate: Tensor | None) -> Tensor:
    return t if gate is None else (t * gate).to(t.dtype)


def forward_torch(x, weight, a, b, bias, gate, seed, scale, dropout_p, save_h, columns=None):
    y = F.linear(x, weight, bias)  # first: it hides the time that x takes to come into the caches
    x_kept, _, keep_scale = _masked(x, seed, dropout_p, columns)
    h = _scaled_mm(keep_scale, x_kept, a.t())
    y.addmm_(_gated(h, gate), b.t(), alpha=scale)
    return y, h if save_h else None


def backward_torch(
    dy, x, weight, a, b, gate, h, seed, scale, dropout_p, needs, adapter_dtypes, columns=None
):
    need_dx, need_da, need_db, need_dgate = needs
    dx = da = db = dgate = None
    if need_dx and seed is None:
        dx = dy @ weight  # first, as in the forward
    if need_dx or need_da:
        dh = _gated(dy @ b, gate)  # its scale is applied by the products that it enters
        x_kept, keep, keep_scale = (
            _masked(x, seed, dropout_p, columns) if need_da or seed is not None else (x, None, 1.0)
        )
    if need_db or need_dgate:
        p = _scaled_mm(scale, dy.t(), h)  # [N, R]
    if need_dgate:
        dgate = (p.to(gate.dtype) * b).sum(0)
    if need_db:
        db = _gated(p, gate)
    if need_da:
        da = _scaled_mm(scale * keep_scale, dh.t(), x_kept)
    if need_dx:
        # The masked LoRA part first and the base product onto it: no temporary of x's size is
        # added.
        if seed is None:
            dx.addmm_(dh, a, alpha=scale)
        else:
            dx = _scaled_mm(scale * keep_scale, dh, a)
            dx.masked_fill_(~keep, 0).addmm_(dy, weight)
    # A cast to what a tensor is costs as much as a small product.
    if need_da and da.dtype != adapter_dtypes[0]:
        da = da.to(adapter_dtypes[0])
    if need_db and db.dtype != adapter_dtypes[1]:
        db = db.to(adapter_dtypes[1])
    return dx, da, db, dgate


def _dropout_args(seed, dropout_p):
    if seed is None:
        return None
    return seed, reference.dropout_threshold(dropout_p), reference.dropout_scale(dropout_p)


def forward_kernels(
    backend, x, weight, a, b, bias, gate, seed, scale, dropout_p, save_h, columns=None
):
    kernels = dispatch.kernels(backend)
    if backend == "cuda" and seed is None and not save_h and kernels.decodes(len(x), x.dtype):
        return kernels.decode(x, weight, a, b, bias, scale=scale, gate=gate), None
    drop = _dropout_args(seed, dropout_p)
    t, h = kernels.shrink(
        x, a, scale=scale, gate=gate, dropout=drop, columns=columns, save_h=save_h
    )
    # Nothing of the base product is made by shrink: it may be read while shrink still runs.
    return kernels.segment_gemm([(x, weight), (t, b)], bias=bias, early=1), h


def _reduce_dy(kernels, dy, b, h, gate, scale, need_dh, need_db, need_dgate, db_dtype):
    """(dh, dB, dg) from one read of dy; None where it is not needed, but dB comes with dg."""
    if need_db or need_dgate:
        return kernels.row_reduce_dy(
            dy, b, h, scale=scale, gate=gate, need_dh=need_dh, need_dgate=need_dgate,
            db_dtype=db_dtype,
        )  # fmt: skip
    dh = None
    if need_dh:
        dh, _ = kernels.shrink(dy, b.t(), scale=scale, gate=gate)
    return dh, None, None


def _reduce_x(kernels, x, dh, drop, need_da, need_dx, da_dtype, columns=None):
    """(dA or None, the mask as bits for dx or None): one pass makes both."""
    bits = None
    if need_da:
        if drop and need_dx:
            bits = torch.empty(
                x.shape[0], (x.shape[1] + 7) // 8, dtype=torch.uint8, device=x.device
            )
        da = kernels.row_reduce_x(
            x, dh, dropout=drop, columns=columns, bits=bits, da_dtype=da_dtype
        )
        return da, bits
    if drop and need_dx:
        bits = kernels.dropout_bits(drop[0], *x.shape, drop[1], columns)
    return None, bits


def backward_kernels(
    backend, dy, x, weight, a, b, gate, h, seed, scale, dropout_p, needs, adapter_dtypes,
    columns=None,
):  # fmt: skip
    kernels = dispatch.kernels(backend)
    need_dx, need_da, need_db, need_dgate = needs
    dx = None
    drop = _dropout_args(seed, dropout_p)
    dh, db, dgate = _reduce_dy(
        kernels, dy, b, h, gate, scale, need_dx or need_da, need_db, need_dgate, adapter_dtypes[1]
    )
    da, bits = _reduce_x(kernels, x, dh, drop, need_da, need_dx, adapter_dtypes[0], columns)
    if need_dx:
        base, lora = (dy, weight.t()), (dh, a.t())
        if drop:
            dx = kernels.segment_gemm([lora, base], mask=(bits, drop[2], 1))
        else:
            dx = kernels.segment_gemm([base, lora], early=1)
    return dx, da, db if need_db else None, dgate


def _op_forward(x, *args):
    return tuple(x.new_empty(0) if t is None else t for t in _forward(x, *args))


def _op_backward(dy, x, *args):
    return tuple(x.new_empty(0) if t is None else t for t in _backward(dy, x, *args))


_library.impl("lora_linear", _op_forward, "CompositeExplicitAutograd")
_library.impl("lora_linear_backward", _op_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_linear", _fake, lib=_library)
torch.library.register_fake("fused_lora::lora_linear_backward", _fake_backward, lib=_library)


class LoRALinearFunction(torch.autograd.Function):
    """x [..., K], weight [N, K], lora_a [R, K], lora_b [N, R], bias [N], gate [R] -> y [..., N].

    backward: dy [..., N] -> dx, dweight, dlora_a, dlora_b, dbias, dgate of their inputs' shapes and
    dtypes, each only where it is asked for. Saved: x, weight, the adapters, the gate, h [M, R] and
    the seed.
    """

    @staticmethod
    def forward(
        ctx, x, weight, lora_a, lora_b, bias, gate, seed, scale, dropout_p, columns, backend
    ):
        save_h = ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
        forward = torch.ops.fused_lora.lora_linear if dispatch.watched(x) else _forward
        y, h = forward(
            x, weight, lora_a, lora_b, bias, gate, seed, scale, dropout_p, save_h, backend, columns
        )
        # Under autocast it is a copy, which lives no longer than it must.
        kept = weight if any(ctx.needs_input_grad[:2]) else None
        ctx.save_for_backward(x, kept, lora_a, lora_b, gate, h, seed)
        ctx.scale, ctx.dropout_p, ctx.columns, ctx.backend = scale, dropout_p, columns, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:6]
        x, weight, lora_a, lora_b, gate, h, seed = ctx.saved_tensors
        weight = dy.new_empty(0) if weight is None else weight
        backward = torch.ops.fused_lora.lora_linear_backward if dispatch.watched(x) else _backward
        grads = backward(
            dy, x, weight, lora_a, lora_b, gate, h, seed, ctx.scale, ctx.dropout_p, needs,
            ctx.backend, ctx.columns,
        )  # fmt: skip
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return *wanted, None, None, None, None, None


def _usual(x, weight, lora_a, lora_b, bias, gate, scale, dropout_p, seed, columns=None) -> bool:
    """True only where every check of _prepare passes and autocast has nothing to do.

    Most calls are such, and small ones last no longer than their checks: one look, no messages.
    """
    optional = [t for t in (bias, gate) if t is not None]
    if not check.all_plain(x, weight, lora_a, lora_b, *optional):
        return False
    dtype, device, known = x.dtype, x.device, (x.dtype, torch.float32)
    if not weight.ndim == lora_a.ndim == 2 or x.ndim == 0:
        return False
    (N, K), R = weight.shape, lora_a.shape[0]
    return (
        (x.shape[-1] == lora_a.shape[1] == K and lora_b.shape == (N, R) and R > 0)
        and (bias is None or (bias.shape == (N,) and bias.dtype == dtype))
        and (gate is None or (gate.shape == (R,) and gate.dtype in known))
        and (weight.dtype == dtype and lora_a.dtype in known and lora_b.dtype in known)
        and weight.device == lora_a.device == lora_b.device == device
        and (bias is None or bias.device == device)
        and (gate is None or gate.device == device)
        and (type(scale) is float and -check.LARGEST <= scale <= check.LARGEST)
        and (type(dropout_p) is float and 0.0 <= dropout_p <= 1.0)
        and (seed is None and columns is None)
        and (dtype in check.DTYPES and not check.autocasting(x))
    )


def _check(x, weight, lora_a, lora_b, bias, gate, scale, dropout_p, seed, columns):
    """Raise for the first argument that is wrong; return the tensors as autocast has them."""
    op = "lora_linear"
    x = check.checked_input(op, x, dropout_p, seed)
    check.check_columns(op, columns, x.shape[-1])
    weight, bias = check.checked_base(op, x, weight, bias)
    lora_a, lora_b = check.checked_adapter(op, x, weight.shape[0], lora_a, lora_b, gate, scale)
    return x, weight, lora_a, lora_b, bias


def scaled_gate(
    scale, gate: Tensor | None, lora_a: Tensor, x: Tensor
) -> tuple[float, Tensor | None]:
    """(scale, gate) with a scale that lives on the device in the gate, fp32 (fp64 for fp64), so
    that its value is never read by the host."""
    if not isinstance(scale, Tensor):
        return float(scale), gate
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = lora_a.new_ones(lora_a.shape[0], dtype=wide) if gate is None else gate.to(wide)
    return 1.0, gate * scale.to(x.device, wide)


def drawn(x: Tensor, dropout_p: float, training: bool, seed) -> tuple[Tensor | None, float]:
    """(seed int64 [1], dropout_p), and (None, 0.0) where nothing is dropped."""
    dropping = training and dropout_p > 0
    if not dropping:
        return None, 0.0
    if seed is None:
        seed = reference.draw_seed(x.device)
    elif isinstance(seed, int):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)
    return seed, float(dropout_p)


def _prepare(
    x,
    weight,
    lora_a,
    lora_b,
    bias=None,
    *,
    scale,
    gate=None,
    dropout_p=0.0,
    training=True,
    seed=None,
    dropout_columns=None,
):
    """The op's arguments, checked, after autocast."""
    tensors = x, weight, lora_a, lora_b, bias
    others = gate, scale, dropout_p, seed, dropout_columns
    if not _usual(*tensors, *others):
        x, weight, lora_a, lora_b, bias = _check(*tensors, *others)
    scale, gate = scaled_gate(scale, gate, lora_a, x)
    seed, dropout_p = drawn(x, dropout_p, training, seed)
    return x, weight, lora_a, lora_b, bias, gate, seed, scale, dropout_p, dropout_columns


def _run_reference(x, weight, lora_a, lora_b, bias, gate, seed, scale, dropout_p, columns):
    """The op of plain PyTorch, for torch.func, whose dropout has a seed where it acts."""
    return reference.lora_linear(
        x, weight, lora_a, lora_b, bias, scale=scale, gate=gate, dropout_p=dropout_p,
        seed=seed, dropout_columns=columns,
    )  # fmt: skip


def _run(args, backend: str) -> Tensor:
    if dispatch.transformed():
        dispatch.check_transformed("lora_linear", backend)
        return _run_reference(*args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:6]):
        return LoRALinearFunction.apply(*args, backend)
    forward: Callable = torch.ops.fused_lora.lora_linear if dispatch.watched(args[0]) else _forward
    *args, columns = args
    return forward(*args, False, backend, columns)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    dropout_columns: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x W0^T + b + scale * ((drop(x) A^T) * g) B^T.

    LoRA (arXiv 2106.09685); with a gate SoRA (arXiv 2311.11696).

    Shapes: x [..., K] of any strides, weight [N, K], lora_a [R, K], lora_b [N, R], bias [N], gate
    [R]; returns [..., N]. Any size, any rank of at least 1.

    Dtypes: float32, bfloat16, float16 (and float64 with backend="torch"). weight and bias have x's
    dtype. lora_a, lora_b and gate have it or are float32 masters: products are made in x's dtype,
    sums in fp32, and a master's gradient comes back in float32. Autocast is followed as F.linear
    does; the gate stays fp32.

    scale is a number or a 0-d tensor (whose gradient exists and whose value the host never reads).
    dropout_p acts on the input of A alone, in training; its mask is a function of the seed and the
    position (Philox4x32-7), recomputed in the backward and the same in every backend. seed: an int
    or an int64 tensor of one element on x's device; None draws one from torch's generator. p = 1
    gives the base layer. dropout_columns = (first, total): x is columns first .. first + K of an
    input of `total`, and takes that input's mask there, so that row shards of a tensor parallel
    layer, with one seed, drop what the whole layer would; first is a multiple of 8.

    backend: "cuda", "triton" or "torch" runs there or raises; None takes the best that is proved
    (see fused_lora.why).

    Gradients: x, weight, lora_a, lora_b, bias, gate, whichever require it; once differentiable.
    Saved for them are x, the adapters, h [M, R] and the seed. Within torch.func's grad, vmap and
    jacrev the "torch" backend is fused_lora.reference.lora_linear; so it is with the other ops.

    Raises TypeError (not a tensor; dtype), ValueError (shape, device, rank 0, scale, dropout_p,
    seed, dropout_columns, backend), NotImplementedError (tensor subclass, sparse layout,
    forward-mode AD), RuntimeError (a backend that was asked for and cannot run, with the reason).
    """
    backend = dispatch.choose(backend)
    args = _prepare(
        x, weight, lora_a, lora_b, bias, scale=scale, gate=gate, dropout_p=dropout_p,
        training=training, seed=seed, dropout_columns=dropout_columns,
    )  # fmt: skip
    if not check.autocasting(args[0]):
        return _run(args, backend)
    # The op's own products are in the dtypes it was given.
    with torch.autocast(args[0].device.type, enabled=False):
        return _run(args, backend)


@dispatch.explains("lora_linear")
def _explain(*args, backend=None, **kwargs):
    return dispatch.choose(backend), _prepare(*args, **kwargs)[0], REFUSALS
