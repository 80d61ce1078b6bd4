"""y_i = x W_i^T + b_i + s_i * ((drop(x) A_i^T) * g_i) B_i^T for projections i that share x.

They are q, k and v, or gate and up. With A the rows of all A_i, one after another, h = drop(x) A^T
under one mask, D = mask / (1 - p) and dh_i = s_i (dy_i B_i) * g_i side by side:

    dx = sum_i dy_i W_i + D ⊙ (dh A)      dA = dh^T drop(x)
    dB_i and dg_i from P_i = dy_i^T h_i, as in lora_linear

so x is read once for all h, once for all dA, and dx is one sum.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_lora import reference
from fused_lora.ops import dispatch, lora_linear
from fused_lora.ops import validation as check
from fused_lora.ops.lora_linear import (
    REFUSALS,
    _adapters,
    _dropout_args,
    _gated,
    _masked,
    _reduce_dy,
    _reduce_x,
    _rows,
    _scaled_mm,
    _usual,
    drawn,
    scaled_gate,
    shaped,
)

# Contract. The lists have an entry for each projection; None stands for what it does not have. h is
# that of all adapters side by side, and empty where save_h is false; hs are its parts. needs: x,
# then of every projection its weight, then lora_a, lora_b, bias and gate likewise; what is not
# needed is empty, and da holds the rows of those that are needed alone. A projection without a
# weight has its base product made elsewhere (lora_add).
_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    "lora_linear_group(Tensor x, Tensor[] weights, Tensor?[] lora_as, Tensor?[] lora_bs, "
    "Tensor?[] biases, Tensor?[] gates, Tensor? seed, float[] scales, float dropout_p, "
    "bool save_h, str backend) -> (Tensor[] ys, Tensor h)"
)
_library.define(
    "lora_linear_group_backward(Tensor[] dys, Tensor x, Tensor?[] weights, Tensor?[] lora_as, "
    "Tensor?[] lora_bs, Tensor?[] gates, Tensor?[] hs, Tensor? seed, float[] scales, "
    "float dropout_p, bool[] needs, str backend) -> "
    "(Tensor dx, Tensor[] dws, Tensor da, Tensor[] dbs, Tensor[] dbiases, Tensor[] dgates)"
)


class _Adapter(NamedTuple):
    """What the products take of one projection's adapter, in x's dtype."""

    place: int  # of its projection
    a: Tensor
    b: Tensor
    gate: Tensor | None
    scale: float


def _present(lora_as, lora_bs, gates, scales, dtype: torch.dtype) -> list[_Adapter]:
    return [
        _Adapter(i, *_adapters(a, b, dtype), gate, scale)
        for i, (a, b, gate, scale) in enumerate(zip(lora_as, lora_bs, gates, scales, strict=True))
        if a is not None
    ]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _ranks(lora_as) -> list[int]:
    return [a.shape[0] for a in lora_as if a is not None]


def _by_kind(flat, n: int) -> list:
    """Of a list of n weights, n lora_a, n lora_b and so on each kind."""
    return [flat[first : first + n] for first in range(0, len(flat), n)]


def _da_dtype(lora_as) -> torch.dtype | None:
    """That of dA for all of them: fp32 where there is a master of a 16-bit dtype among them."""
    dtypes = [a.dtype for a in lora_as]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _fake(x, weights, lora_as, lora_bs, biases, gates, seed, scales, dropout_p, save_h, backend):
    h = (math.prod(x.shape[:-1]), sum(_ranks(lora_as))) if save_h else (0,)
    return [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights], x.new_empty(h)


def _fake_backward(
    dys, x, weights, lora_as, lora_bs, gates, hs, seed, scales, dropout_p, needs, backend
):
    need_dws, need_das, *others = _by_kind(needs[1:], len(dys))
    wanted = [a for a, need in zip(lora_as, need_das, strict=True) if need]
    da = (sum(_ranks(wanted)), x.shape[-1]) if wanted else (0,)

    def like(ts, needs):
        return [
            t.new_empty(t.shape) if need else x.new_empty(0)
            for t, need in zip(ts, needs, strict=True)
        ]

    biases = [x.new_empty(dy.shape[-1]) for dy in dys]
    dbs, dbiases, dgates = map(like, (lora_bs, biases, gates), others)
    dx = x.new_empty(x.shape if needs[0] else 0)
    da = x.new_empty(da, dtype=_da_dtype(wanted))
    return dx, like(weights, need_dws), da, dbs, dbiases, dgates


def _forward(x, weights, lora_as, lora_bs, biases, gates, seed, scales, dropout_p, save_h, backend):
    dispatch.require("lora_linear_group", backend, REFUSALS, x)
    if backend != "torch":
        x, weights, lora_as, lora_bs, biases, gates = dispatch.readable(
            x, weights, lora_as, lora_bs, biases, gates
        )
    adapters = _present(lora_as, lora_bs, gates, scales, x.dtype)
    args = _rows(x), weights, biases, adapters, seed, dropout_p, save_h
    ys, h = forward_torch(*args) if backend == "torch" else forward_kernels(backend, *args)
    if x.ndim != 2:
        ys = [shaped(y, *x.shape[:-1], y.shape[1]) for y in ys]
    return ys, h


def forward_torch(x, weights, biases, adapters, seed, dropout_p, save_h):
    ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if not adapters:
        return ys, None
    x_kept, _, keep_scale = _masked(x, seed, dropout_p)
    h = _scaled_mm(keep_scale, x_kept, _joined([own.a for own in adapters], 0).t())
    for own, part in zip(adapters, h.split([own.a.shape[0] for own in adapters], 1), strict=True):
        ys[own.place].addmm_(_gated(part, own.gate), own.b.t(), alpha=own.scale)
    return ys, h if save_h else None


def _factor(adapters: list[_Adapter], x: Tensor) -> tuple[float, Tensor | None]:
    """(scale, gate fp32 [R]) whose product is s_i g_i in the rank rows of adapter i."""
    scale = adapters[0].scale
    if all(own.gate is None and own.scale == scale for own in adapters):
        return scale, None
    factors = [
        x.new_full(own.a.shape[:1], own.scale, dtype=torch.float32)
        if own.gate is None
        else own.gate.float() * own.scale
        for own in adapters
    ]
    return 1.0, _joined(factors, 0)


def forward_kernels(backend, x, weights, biases, adapters, seed, dropout_p, save_h):
    kernels = dispatch.kernels(backend)
    if backend == "cuda" and seed is None and not save_h and kernels.decodes(len(x), x.dtype):
        # Few rows: what counts is that each weight is streamed once, and x is small.
        ys = [None] * len(weights)
        for i, a, b, gate, scale in adapters:
            ys[i] = kernels.decode(x, weights[i], a, b, biases[i], scale=scale, gate=gate)
        return [
            kernels.segment_gemm([(x, weight)], bias=bias) if y is None else y
            for y, weight, bias in zip(ys, weights, biases, strict=True)
        ], None
    segments, h = [[(x, weight)] for weight in weights], None
    if adapters:
        a, (scale, gate) = _joined([own.a for own in adapters], 0), _factor(adapters, x)
        drop = _dropout_args(seed, dropout_p)
        t, h = kernels.shrink(x, a, scale=scale, gate=gate, dropout=drop, save_h=save_h)
        for own, part in zip(adapters, t.split(_ranks(own.a for own in adapters), 1), strict=True):
            segments[own.place].append((part, own.b))
    # The base products may be read while shrink still runs.
    ys = [
        kernels.segment_gemm(s, bias=bias, early=len(s) - 1)
        for s, bias in zip(segments, biases, strict=True)
    ]
    return ys, h


class _Wanted(NamedTuple):
    """What the backward makes of one projection's adapter, and what it makes it from."""

    dy: Tensor
    h: Tensor | None
    da: bool
    db: bool
    dgate: bool
    db_dtype: torch.dtype


def _backward(
    dys, x, weights, lora_as, lora_bs, gates, hs, seed, scales, dropout_p, needs, backend
):
    dispatch.require("lora_linear_group", backend, REFUSALS, x)
    if backend != "torch":
        dys, x, weights, lora_as, lora_bs, gates = dispatch.readable(
            dys, x, weights, lora_as, lora_bs, gates
        )
    n, rows, need_dx = len(dys), _rows(x), needs[0]
    dys = [_rows(dy) for dy in dys]
    need_dws, need_das, need_dbs, need_dbiases, need_dgates = _by_kind(needs[1:], n)
    adapters = _present(lora_as, lora_bs, gates, scales, x.dtype)
    wanted = [
        _Wanted(dys[i], hs[i], need_das[i], need_dbs[i], need_dgates[i], lora_bs[i].dtype)
        for i, *_ in adapters
    ]
    bases = [(dy, w) for dy, w in zip(dys, weights, strict=True) if w is not None]
    da_dtype = _da_dtype([a for a, need in zip(lora_as, need_das, strict=True) if need])
    args = bases, rows, adapters, wanted, seed, dropout_p, need_dx, da_dtype
    dx, da, of_adapters = (
        backward_torch(*args) if backend == "torch" else backward_kernels(backend, *args)
    )
    dbs, dgates = [None] * n, [None] * n
    for own, want, (db, dgate) in zip(adapters, wanted, of_adapters, strict=True):
        dbs[own.place] = db if want.db else None
        dgates[own.place] = dgate.to(own.gate.dtype) if want.dgate else None
    # As in lora_linear.
    dws = [dy.t() @ rows if need else None for dy, need in zip(dys, need_dws, strict=True)]
    dbiases = [dy.sum(0) if need else None for dy, need in zip(dys, need_dbiases, strict=True)]
    return dx.view(x.shape) if need_dx else None, dws, da, dbs, dbiases, dgates


def backward_torch(bases, x, adapters, wanted, seed, dropout_p, need_dx, da_dtype):
    dx = da = None
    dhs, of_adapters = [], []
    for (_, a, b, gate, scale), want in zip(adapters, wanted, strict=True):
        needs, dtypes = (False, False, want.db, want.dgate), (a.dtype, want.db_dtype)
        _, _, db, dgate = lora_linear.backward_torch(
            want.dy, x, None, a, b, gate, want.h, seed, scale, dropout_p, needs, dtypes
        )
        of_adapters.append((db, dgate))
        need_dh = need_dx or want.da
        dhs.append(_gated(_scaled_mm(scale, want.dy, b), gate) if need_dh else None)
    of_da = [dh for dh, want in zip(dhs, wanted, strict=True) if want.da]
    masked = seed is not None and need_dx and bool(adapters)
    x_kept, keep, keep_scale = _masked(x, seed if of_da or masked else None, dropout_p)
    if of_da:
        da = _scaled_mm(keep_scale, _joined(of_da, 1).t(), x_kept).to(da_dtype)
    if need_dx:
        if adapters:
            dx = _scaled_mm(keep_scale, _joined(dhs, 1), _joined([own.a for own in adapters], 0))
        if masked:
            dx.masked_fill_(~keep, 0)
        for dy, weight in bases:
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx, da, of_adapters


def backward_kernels(backend, bases, x, adapters, wanted, seed, dropout_p, need_dx, da_dtype):
    kernels = dispatch.kernels(backend)
    dx = da = bits = None
    drop = _dropout_args(seed, dropout_p)
    dhs, of_adapters = [], []
    for (_, _, b, gate, scale), want in zip(adapters, wanted, strict=True):
        dh, db, dgate = _reduce_dy(
            kernels, want.dy, b, want.h, gate, scale, need_dx or want.da, want.db, want.dgate,
            want.db_dtype,
        )  # fmt: skip
        dhs.append(dh)
        of_adapters.append((db, dgate))
    of_da = [dh for dh, want in zip(dhs, wanted, strict=True) if want.da]
    if adapters:
        dh = _joined(of_da, 1) if of_da else None
        da, bits = _reduce_x(kernels, x, dh, drop, bool(of_da), need_dx, da_dtype)
    if need_dx:
        base = [(dy, weight.t()) for dy, weight in bases]
        lora = [(_joined(dhs, 1), _joined([own.a for own in adapters], 0).t())] if adapters else []
        mask = (bits, drop[2], 1) if drop and adapters else None
        if mask:  # It is on the LoRA part alone, which then comes first.
            dx = kernels.segment_gemm(lora + base, mask=mask)
        else:
            dx = kernels.segment_gemm(base + lora, early=len(base) if lora else 0)
    return dx, da, of_adapters


def _op_forward(x, *args):
    ys, h = _forward(x, *args)
    return ys, x.new_empty(0) if h is None else h


def _op_backward(dys, x, *args):
    def filled(t):
        return [*map(filled, t)] if isinstance(t, list) else x.new_empty(0) if t is None else t

    return tuple(map(filled, _backward(dys, x, *args)))


_library.impl("lora_linear_group", _op_forward, "CompositeExplicitAutograd")
_library.impl("lora_linear_group_backward", _op_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_linear_group", _fake, lib=_library)
torch.library.register_fake("fused_lora::lora_linear_group_backward", _fake_backward, lib=_library)


class LoRALinearGroupFunction(torch.autograd.Function):
    """x [..., K] and of n projections each weight [N_i, K], then each lora_a [R_i, K], lora_b [N_i,
    R_i], bias [N_i] and gate [R_i], any but the weights None -> n tensors y_i [..., N_i].

    backward: gradients of their inputs' shapes and dtypes, each only where it is asked for; an
    output that nothing came from costs nothing. Saved: x, the weights, the adapters, the gates, h
    [M, sum of R_i] and the seed.
    """

    @staticmethod
    def forward(ctx, x, n, scales, seed, dropout_p, backend, *tensors):
        ctx.set_materialize_grads(False)
        weights, lora_as, lora_bs, biases, gates = _by_kind(tensors, n)
        _, _, need_dbs, _, need_dgates = _by_kind(ctx.needs_input_grad[6:], n)
        save_h = any(need_dbs) or any(need_dgates)
        forward = torch.ops.fused_lora.lora_linear_group if dispatch.watched(x) else _forward
        ys, h = forward(
            x, weights, lora_as, lora_bs, biases, gates, seed, scales, dropout_p, save_h, backend
        )
        # As in lora_linear.
        kept = [
            w if ctx.needs_input_grad[0] or need else None
            for w, need in zip(weights, ctx.needs_input_grad[6:], strict=False)
        ]
        ctx.save_for_backward(x, seed, h, *kept, *lora_as, *lora_bs, *gates)
        ctx.n, ctx.scales, ctx.dropout_p, ctx.backend = n, scales, dropout_p, backend
        ctx.save_h = save_h
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, seed, h, *saved = ctx.saved_tensors
        weights, lora_as, lora_bs, gates = _by_kind(saved, ctx.n)
        hs = [None] * ctx.n
        if ctx.save_h:
            have = [i for i, a in enumerate(lora_as) if a is not None]
            for i, part in zip(have, h.split(_ranks(lora_as), 1), strict=True):
                hs[i] = part
        live = [i for i, dy in enumerate(dys) if dy is not None]
        if not live:
            return (None,) * len(ctx.needs_input_grad)
        kinds = _by_kind(ctx.needs_input_grad[6:], ctx.n)
        needs = [ctx.needs_input_grad[0], *(kind[i] for kind in kinds for i in live)]
        of_live = [
            [of[i] for i in live] for of in (dys, weights, lora_as, lora_bs, gates, hs, ctx.scales)
        ]
        dys, weights, lora_as, lora_bs, gates, hs, scales = of_live
        backward = (
            torch.ops.fused_lora.lora_linear_group_backward if dispatch.watched(x) else _backward
        )
        dx, dws, da, dbs, dbiases, dgates = backward(
            dys, x, weights, lora_as, lora_bs, gates, hs, seed, scales, ctx.dropout_p, needs,
            ctx.backend,
        )  # fmt: skip
        das = _split_da(da, lora_as, _by_kind(needs[1:], len(live))[1])
        grads = [None] * (5 * ctx.n)
        for k, of_kind in enumerate((dws, das, dbs, dbiases, dgates)):
            for i, grad in zip(live, of_kind, strict=True):
                grads[k * ctx.n + i] = grad if kinds[k][i] else None
        return dx if needs[0] else None, None, None, None, None, None, *grads


def _split_da(da, lora_as, needs) -> list[Tensor | None]:
    """Each dA from the rows of those that are needed, in its adapter's dtype."""
    ranks = _ranks(a for a, need in zip(lora_as, needs, strict=True) if need)
    parts = iter(da.split(ranks)) if ranks else iter(())
    return [
        next(parts).to(a.dtype) if need else None for a, need in zip(lora_as, needs, strict=True)
    ]


_SPELLED = {"weight": "weights", "lora_a": "lora_as", "lora_b": "lora_bs", "bias": "biases"}
_SPELLED |= {"gate": "gates", "scale": "scales"}


def _check_lists(op: str, weights, **lists) -> None:
    for name, values in {"weights": weights, **lists}.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{op}: {name} must be a list, got {type(values).__name__}")
        if len(values) != len(weights):
            raise ValueError(
                f"{op}: {name} must have an entry for each of the {len(weights)} weights, got "
                f"{len(values)}"
            )
    if not weights:
        raise ValueError(f"{op}: weights is empty; there must be at least one projection")


def _check_one(op, i, x, weight, a, b, bias, gate, scale, dropout_p, seed):
    """Raise for the first argument of projection i that is wrong; return x and the projection as
    autocast has them."""

    def spelled(name):
        return f"{_SPELLED[name]}[{i}]"

    x = check.checked_input(op, x, dropout_p, seed)
    weight, bias = check.checked_base(op, x, weight, bias, spelled)
    if a is not None and b is not None:
        a, b = check.checked_adapter(op, x, weight.shape[0], a, b, gate, scale, spelled)
        scale, gate = scaled_gate(scale, gate, a, x)
        return x, (weight, a, b, bias, gate, scale)
    halves = ("lora_a", a), ("lora_b", b), ("gate", gate)
    if wrong := [spelled(name) for name, t in halves if t is not None]:
        raise ValueError(
            f"{op}: projection {i} has {' and '.join(wrong)}, but no whole adapter; lora_as[{i}] "
            f"and lora_bs[{i}] must both be tensors, or both None and gates[{i}] too"
        )
    return x, (weight, None, None, bias, None, 1.0)


def _prepare(
    x,
    weights,
    lora_as,
    lora_bs,
    biases=None,
    *,
    scales,
    gates=None,
    dropout_p=0.0,
    training=True,
    seed=None,
):
    """The op's arguments, checked, after autocast."""
    op = "lora_linear_group"
    _check_lists(op, weights, lora_as=lora_as, lora_bs=lora_bs, scales=scales)
    n = len(weights)
    biases, gates = ([None] * n if ts is None else ts for ts in (biases, gates))
    _check_lists(op, weights, biases=biases, gates=gates)
    projections = []
    for i, one in enumerate(zip(weights, lora_as, lora_bs, biases, gates, scales, strict=True)):
        if not _usual(x, *one, dropout_p, seed):
            x, one = _check_one(op, i, x, *one, dropout_p, seed)
        projections.append(one)
    *tensors, scales = map(list, zip(*projections, strict=True))
    seed, dropout_p = drawn(x, dropout_p, training, seed)
    return x, n, scales, seed, dropout_p, tensors


def _run(args, backend: str) -> list[Tensor]:
    x, n, scales, seed, dropout_p, tensors = args
    if dispatch.transformed():
        dispatch.check_transformed("lora_linear_group", backend)
        *tensors, gates = tensors
        return reference.lora_linear_group(
            x, *tensors, scales=scales, gates=gates, dropout_p=dropout_p, seed=seed
        )
    flat = [t for of_kind in tensors for t in of_kind]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat)):
        return list(LoRALinearGroupFunction.apply(x, n, scales, seed, dropout_p, backend, *flat))
    forward: Callable = torch.ops.fused_lora.lora_linear_group if dispatch.watched(x) else _forward
    return forward(x, *tensors, seed, scales, dropout_p, False, backend)[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scales: Sequence[float | Tensor],
    gates: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """y_i = x W_i^T + b_i + s_i * ((drop(x) A_i^T) * g_i) B_i^T for projections i that share x.

    q, k and v, or gate and up, in one call: x is read once for all the products with A, and once
    for all dA; the gradients of x are summed in one accumulator with the kernels' backends. LoRA
    (arXiv 2106.09685); with gates SoRA (arXiv 2311.11696).

    Shapes: x [..., K] of any strides; lists with an entry for each projection: weights [N_i, K],
    lora_as [R_i, K], lora_bs [N_i, R_i], biases [N_i], gates [R_i], and scales, each a number or a
    0-d tensor. lora_as[i] and lora_bs[i] may be None: the base alone, whose scale is not looked at;
    so may each bias and gate, and biases and gates as a whole. Returns the list of y_i [..., N_i].

    Dtypes, autocast, scale, seed and backend as in lora_linear. dropout_p acts on the input of the
    A_i alone, in training, with ONE mask for the group, which is that of lora_linear under the same
    seed.

    Gradients: x and every tensor of the lists, whichever require it; once differentiable. Saved for
    them are x (once), the adapters, h [M, sum of R_i] and the seed. dx is rounded once with the
    kernels ("cuda": once for every 8 segments, which are the projections and one for the adapters),
    once for each projection with "torch".

    Raises TypeError (not a list or a tensor; dtype), ValueError (length of a list, half an adapter,
    shape, device, rank 0, scale, dropout_p, seed, backend), NotImplementedError (tensor subclass,
    sparse layout, forward-mode AD), RuntimeError (a backend that was asked for and cannot run, with
    the reason).
    """
    backend = dispatch.choose(backend)
    args = _prepare(
        x, weights, lora_as, lora_bs, biases, scales=scales, gates=gates, dropout_p=dropout_p,
        training=training, seed=seed,
    )  # fmt: skip
    if not check.autocasting(args[0]):
        return _run(args, backend)
    # The op's own products are in the dtypes it was given.
    with torch.autocast(args[0].device.type, enabled=False):
        return _run(args, backend)


@dispatch.explains("lora_linear_group")
def _explain(*args, backend=None, **kwargs):
    return dispatch.choose(backend), _prepare(*args, **kwargs)[0], REFUSALS
