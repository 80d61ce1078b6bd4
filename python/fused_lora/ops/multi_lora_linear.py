"""y_i = x_i W0^T + b + s_j ((drop(x)_i A_j^T) * g_j) B_j^T with j = adapter_ids_i, -1 for none.

Row by row it is lora_linear, with the same gradients: dA_j, dB_j and dg_j are sums over the rows of
adapter j alone.
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fused_lora import reference
from fused_lora.ops import dispatch
from fused_lora.ops import validation as check
from fused_lora.ops.lora_linear import _dropout_args, _masked, _rows, _scaled_mm, shaped
from fused_lora.ops.routing import AdapterRouting

REFUSALS = {
    "cuda": dispatch.cuda_refuses,
    "triton": dispatch.triton_refuses,
    "torch": dispatch.never_refuses,
}


class Slots(NamedTuple):
    """What the kernels read of a bank: a_slots [P, R, K], bt_slots [P, R, N], rank int32 [P],
    scale fp32 [P], gate fp32 [P, R] and table int32 [G], the slot of each id."""

    a_slots: Tensor
    bt_slots: Tensor
    rank: Tensor
    scale: Tensor
    gate: Tensor
    table: Tensor


class Route(NamedTuple):
    """The tensors of an AdapterRouting."""

    ids: Tensor
    order: Tensor
    offsets: Tensor


# Contract. Slots and Route stand as their tensors, in order. h is empty where save_h is false, a
# gradient whose needs[i] is false too. needs: x, weight, a_slots, bt_slots, bias, gate.
_SLOTS = "Tensor a_slots, Tensor bt_slots, Tensor rank, Tensor scale, Tensor gate, Tensor table"
_ROUTE = "Tensor ids, Tensor order, Tensor offsets"
_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    f"multi_lora_linear(Tensor x, Tensor weight, {_SLOTS}, {_ROUTE}, Tensor? bias, Tensor? seed, "
    "float dropout_p, bool save_h, str backend) -> (Tensor y, Tensor h)"
)
_library.define(
    f"multi_lora_linear_backward(Tensor dy, Tensor x, Tensor weight, {_SLOTS}, {_ROUTE}, Tensor h, "
    "Tensor? seed, float dropout_p, bool[6] needs, str backend) "
    "-> (Tensor dx, Tensor dw, Tensor da, Tensor dbt, Tensor dbias, Tensor dgate)"
)
_library.define(
    f"multi_lora_add_(Tensor(a!) y, Tensor x, Tensor[] slots, {_ROUTE}, int[] out_offsets, "
    "str backend) -> ()"  # the six tensors of the slots of one projection after another
)


def _fake(x, weight, *rest):
    slots, route, (bias, seed, p, save_h, backend) = _unpack(rest)
    h = x.new_empty(route.ids.shape[0], slots.gate.shape[1]) if save_h else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), h


def _fake_backward(dy, x, weight, *rest):
    slots, _, (h, seed, p, needs, backend) = _unpack(rest)
    like = x, weight, slots.a_slots, slots.bt_slots, x.new_empty(weight.shape[0]), slots.gate
    return tuple(
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip(like, needs, strict=True)
    )


def _fake_add(y, x, *rest):
    return None


def _cast(slots: Slots, dtype: torch.dtype) -> Slots:
    """fp32 masters as the products take them."""
    return slots._replace(a_slots=slots.a_slots.to(dtype), bt_slots=slots.bt_slots.to(dtype))


def _forward(x, weight, slots, route, bias, seed, dropout_p, save_h, backend):
    dispatch.require("multi_lora_linear", backend, REFUSALS, x)
    forward = forward_torch if backend == "torch" else functools.partial(forward_kernels, backend)
    if backend != "torch":
        x, weight, bias = dispatch.readable(x, weight, bias)
        slots = Slots(*dispatch.readable(*slots))
    slots = _cast(slots, x.dtype)
    y, h = forward(_rows(x), weight, slots, route, bias, seed, dropout_p, save_h)
    return shaped(y, *x.shape[:-1], weight.shape[0]), h


def _backward(dy, x, weight, slots, route, h, seed, dropout_p, needs, backend):
    dispatch.require("multi_lora_linear", backend, REFUSALS, x)
    backward = (
        backward_torch if backend == "torch" else functools.partial(backward_kernels, backend)
    )
    if backend != "torch":
        dy, x, weight = dispatch.readable(dy, x, weight)
        slots = Slots(*dispatch.readable(*slots))
    need_dx, need_dw, need_da, need_db, need_dbias, need_dgate = needs
    dy, rows = _rows(dy), _rows(x)
    skinny = need_dx, need_da, need_db, need_dgate
    cast = _cast(slots, x.dtype)
    dx, da, dbt, dgate = backward(dy, rows, weight, cast, route, h, seed, dropout_p, skinny)
    dw = dy.t() @ rows if need_dw else None
    dbias = dy.sum(0) if need_dbias else None
    if need_dx:
        dx = dx.view(x.shape)
    if need_da:
        da = da.to(slots.a_slots.dtype)
    if need_db:
        dbt = dbt.to(slots.bt_slots.dtype)
    if need_dgate:
        dgate = dgate.to(slots.gate.dtype)
    return dx, dw, da, dbt, dbias, dgate


class _Segment(NamedTuple):
    """Where the rows of one adapter lie among the rows sorted by adapter, on the host."""

    slot: int
    rank: int
    begin: int
    end: int


BATCH = 8  # of fewer adapters each has a product of its own: measured on a CPU


def _few_rows_each(segments: list[_Segment]) -> tuple[list[_Segment], list[_Segment]]:
    """(those to batch, the others): as many as padding at most doubles, the short ones first."""
    by_count = sorted(segments, key=lambda s: s.end - s.begin)
    found, rows, slots = 0, 0, []
    for i, (slot, _, begin, end) in enumerate(by_count):
        rows += end - begin
        slots += [slot]
        if (max(slots) - min(slots) + 1) * (end - begin) <= 2 * rows:
            found = i + 1
    return (by_count[:found], by_count[found:]) if found >= BATCH else ([], by_count)


class _Batched(NamedTuple):
    """Adapters of one rank with few rows each, whose slots lie close together: one batched product
    over the slots first .. last, every adapter padded to `height` rows, instead of one each.
    """

    first: int
    last: int
    rank: int
    height: int
    rows: Tensor  # int64: which of the sorted rows these are
    places: Tensor  # int64: where each lies among the padded ones
    begin: int | None  # where they are so many adjacent rows as there are places, in their order

    @classmethod
    def of(cls, few: list[_Segment]) -> "_Batched":
        first, last = min(s.slot for s in few), max(s.slot for s in few) + 1
        height = max(s.end - s.begin for s in few)
        rows: list[int] = []
        places: list[int] = []
        for slot, _, begin, end in few:
            rows += range(begin, end)
            places += range((slot - first) * height, (slot - first) * height + end - begin)
        n = (last - first) * height
        adjacent = rows == [*range(rows[0], rows[0] + n)] and places == [*range(n)]
        made = torch.tensor(rows, device="cpu"), torch.tensor(places, device="cpu")
        return cls(first, last, few[0].rank, height, *made, rows[0] if adjacent else None)

    def product(self, t: Tensor, slots: Tensor, alpha: float) -> Tensor:
        """alpha * each of `rows` of t [..., D] times its own slot of slots [P, D, C]."""
        n = (self.last - self.first) * self.height
        if self.begin is not None:
            padded = t[self.begin : self.begin + n]
        else:
            padded = t.new_zeros(n, t.shape[1])
            padded.index_copy_(0, self.places, t.index_select(0, self.rows))
        padded = padded.reshape(-1, self.height, t.shape[1])
        # beta = 0: what is added is not read.
        out = torch.baddbmm(t.new_empty(()), padded, slots, beta=0, alpha=alpha).flatten(0, 1)
        return out if self.begin is not None else out.index_select(0, self.places)

    def shrunk(self, t: Tensor, slots: Tensor, alpha: float) -> Tensor:
        own = slots[self.first : self.last, : self.rank].transpose(1, 2)
        return self.product(t, own, alpha)

    def expanded(self, t: Tensor, slots: Tensor) -> Tensor:
        return self.product(t[:, : self.rank], slots[self.first : self.last, : self.rank], 1.0)


class _Sorted(NamedTuple):
    """The rows that have an adapter, sorted by it."""

    rows: Tensor | None  # int64; None: all, in the order they have
    factor: Tensor  # fp32 [rows or 1, R]: scale_j g_j
    segments: list[_Segment]
    alone: list[_Segment]  # those in no batch
    batches: list[_Batched]

    @classmethod
    def of(cls, slots: Slots, route: Route) -> "_Sorted":
        offsets, ranks, table = (t.tolist() for t in (route.offsets, slots.rank, slots.table))
        segments = [
            _Segment(slot, ranks[slot], begin, end)
            for slot, begin, end in zip(table, offsets[:-1], offsets[1:], strict=True)
            if end > begin and ranks[slot]
        ]
        if len(segments) == 1 and segments[0].end - segments[0].begin == len(route.ids):
            (only,) = segments
            factor = slots.scale[only.slot] * slots.gate[only.slot][None]
            return cls(None, factor, segments, segments, [])
        alone, batches = [], []
        for rank in {segment.rank for segment in segments}:
            few, others = _few_rows_each([s for s in segments if s.rank == rank])
            alone += others
            batches += [_Batched.of(few)] if few else []
        rows = route.order[: offsets[-1]].long()
        slot_of = slots.table[route.ids[rows]]
        factor = slots.scale[slot_of][:, None] * slots.gate[slot_of]
        return cls(rows, factor, segments, alone, batches)

    def take(self, t: Tensor) -> Tensor:
        """The rows of t [M, C] that have an adapter, sorted."""
        return t if self.rows is None else t.index_select(0, self.rows)

    def put(self, t: Tensor, M: int) -> Tensor:
        """take the other way: [M, C], zero where a row has no adapter."""
        if self.rows is None:
            return t
        return t.new_zeros(M, t.shape[1]).index_copy_(0, self.rows, t)

    def one_batch(self, t: Tensor) -> bool:
        """Whether the sorted rows, all of them, are the rows of one batch in its order."""
        if len(self.batches) != 1:
            return False
        (few,) = self.batches
        return few.begin == 0 and len(few.rows) == t.shape[0]

    def shrunk(self, t: Tensor, slots: Tensor, alpha: float = 1.0) -> Tensor:
        """alpha * each sorted row [C] times its own slot [r, C] transposed: [rows, R], zero past
        the rank."""
        if self.one_batch(t):
            (few,) = self.batches
            return F.pad(few.shrunk(t, slots, alpha), (0, slots.shape[1] - few.rank))
        out = t.new_zeros(t.shape[0], slots.shape[1])
        for few in self.batches:
            out[few.rows, : few.rank] = few.shrunk(t, slots, alpha)
        for slot, rank, begin, end in self.alone:
            out[begin:end, :rank] = _scaled_mm(alpha, t[begin:end], slots[slot, :rank].t())
        return out

    def expanded(self, t: Tensor, slots: Tensor) -> Tensor:
        """Each sorted row [R] times its own slot [r, C]: [rows, C]."""
        if self.one_batch(t):
            return self.batches[0].expanded(t, slots)
        out = t.new_zeros(t.shape[0], slots.shape[2])
        for few in self.batches:
            out.index_copy_(0, few.rows, few.expanded(t, slots))
        for slot, rank, begin, end in self.alone:
            torch.mm(t[begin:end, :rank], slots[slot, :rank], out=out[begin:end])
        return out

    def add_expanded_(self, y: Tensor, t: Tensor, slots: Tensor) -> None:
        """y [M, C] += expanded(t) in the rows where they belong."""
        if self.rows is None:
            slot, rank, _, _ = self.segments[0]
            y.addmm_(t[:, :rank], slots[slot, :rank])
        else:
            y.index_add_(0, self.rows, self.expanded(t, slots))


class _Everyone(NamedTuple):
    """All slots as one adapter of rank P R, of which each row sees its own R columns.

    P times the adapters' flops, and no value that the host would have to wait for. Zero times NaN
    is NaN, so what is not finite enters no product whose other side has zeros for the other rows or
    adapters (see _finite_rows): the results of its own adapter are NaN instead.
    """

    live: Tensor  # bool [M, R]: the row has an adapter, of at least this rank
    own: Tensor  # int64 [M, R]: its column among all
    factor: Tensor  # fp32 [M, R]: scale_j g_j
    held: Tensor  # bool [P, R]: the slot has rows here, and at least this rank

    @classmethod
    def of(cls, slots: Slots, route: Route) -> "_Everyone":
        P, R = slots.gate.shape
        j = slots.table[route.ids.clamp(min=0)].long()
        r = torch.arange(R, device=j.device)
        live = (route.ids[:, None] >= 0) & (r < slots.rank[j][:, None])
        rows = torch.zeros(P, dtype=torch.int32, device=j.device)
        rows.index_add_(0, slots.table.long(), route.offsets.diff())
        held = (rows > 0)[:, None] & (r < slots.rank[:, None])
        return cls(live, j[:, None] * R + r, slots.scale[j][:, None] * slots.gate[j], held)

    def pick(self, t: Tensor) -> Tensor:
        """[M, P R] -> each row's own [M, R]."""
        return torch.where(self.live, t.gather(1, self.own), 0)

    def spread(self, t: Tensor, broken: Tensor) -> Tensor:
        """[M, R] -> [M, P R], zero outside each row's own columns, and NaN in those of them that
        are `broken` [M, R or 1]."""
        t = torch.where(self.live, t.masked_fill(broken, float("nan")), 0)
        return t.new_zeros(t.shape[0], self.held.numel()).scatter_(1, self.own, t)

    def expanded(self, t: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices whose product [M, C] is each row of t [M, R] times its own slot [R, C]."""
        slots, broken = _finite_rows(slots.flatten(0, 1))
        return self.spread(t, broken[self.own]), slots

    def reduced(self, t: Tensor, rows: Tensor, alpha: float = 1.0) -> Tensor:
        """alpha * the sum over each slot's own rows of t_i^T rows_i: [P, R, C]."""
        rows, broken = _finite_rows(rows)
        product = _scaled_mm(alpha, self.spread(t, broken[:, None]).t(), rows)
        return product.unflatten(0, self.held.shape)


def _finite_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    """(t [I, C] with rows of zeros for those that hold NaN or an infinity, bool [I]: which do)."""
    broken = ~t.isfinite().all(1)
    return t.masked_fill(broken[:, None], 0), broken


def _on_host(x: Tensor) -> bool:
    """Where the host may look at the routing: a GPU would have to be waited for."""
    return x.is_cpu


def forward_torch(x, weight, slots, route, bias, seed, dropout_p, save_h):
    y = F.linear(x, weight, bias)
    x_kept, _, keep_scale = _masked(x, seed, dropout_p)
    if _on_host(x):
        order = _Sorted.of(slots, route)
        h = order.shrunk(order.take(x_kept), slots.a_slots, keep_scale)
        order.add_expanded_(y, (h * order.factor).to(x.dtype), slots.bt_slots)
        h = order.put(h, x.shape[0]) if save_h else None
    else:
        every = _Everyone.of(slots, route)
        h = every.pick(_scaled_mm(keep_scale, x_kept, slots.a_slots.flatten(0, 1).t()))
        y.addmm_(*every.expanded((h * every.factor).to(x.dtype), slots.bt_slots))
    return y, h if save_h else None


def backward_torch(dy, x, weight, slots, route, h, seed, dropout_p, needs):
    need_dx, need_da, need_db, need_dgate = needs
    x_kept, keep, keep_scale = (
        _masked(x, seed, dropout_p) if need_da or seed is not None else (x, None, 1.0)
    )
    dx = dy @ weight if need_dx else None
    da = torch.zeros_like(slots.a_slots) if need_da else None
    dbt = torch.zeros_like(slots.bt_slots) if need_db else None
    dgate = torch.zeros_like(slots.gate) if need_dgate else None
    if _on_host(x):
        order = _Sorted.of(slots, route)
        dy = order.take(dy)
        if need_dx or need_da:
            dh = (order.shrunk(dy, slots.bt_slots) * order.factor).to(x.dtype)
        if need_da:
            x_kept = order.take(x_kept)
        if need_db or need_dgate:
            h = order.take(h)
        for slot, rank, begin, end in order.segments:
            if need_da:
                da[slot, :rank] = _scaled_mm(
                    keep_scale, dh[begin:end, :rank].t(), x_kept[begin:end]
                )
            if need_db or need_dgate:
                bt, gate = slots.bt_slots[slot, :rank], slots.gate[slot, :rank]
                p = (h[begin:end, :rank].t() @ dy[begin:end]) * slots.scale[slot]
            if need_dgate:
                dgate[slot, :rank] = (p.to(gate.dtype) * bt).sum(1)
            if need_db:
                dbt[slot, :rank] = p * gate[:, None]
        if need_dx and keep is None:
            order.add_expanded_(dx, dh, slots.a_slots)
        elif need_dx:
            lora = order.put(order.expanded(dh, slots.a_slots) * keep_scale, x.shape[0])
            dx += lora.masked_fill_(~keep, 0)
        return dx, da, dbt, dgate

    every = _Everyone.of(slots, route)
    if need_dx or need_da:
        dh = (every.pick(dy @ slots.bt_slots.flatten(0, 1).t()) * every.factor).to(x.dtype)
    if need_da:
        da = every.reduced(dh, x_kept, keep_scale)
    if need_db or need_dgate:
        p = every.reduced(h, dy)
        scale = slots.scale[:, None]
    if need_dgate:
        dgate = scale * (p.to(slots.gate.dtype) * slots.bt_slots).sum(2)
        dgate = torch.where(every.held, dgate, 0)
    if need_db:
        dbt = (p * (scale * slots.gate)[..., None]).to(x.dtype)
        dbt = torch.where(every.held[..., None], dbt, 0)
    if need_dx:
        lora = _scaled_mm(keep_scale, *every.expanded(dh, slots.a_slots))
        dx += lora if keep is None else lora.masked_fill_(~keep, 0)
    return dx, da, dbt, dgate


def forward_kernels(backend, x, weight, slots, route, bias, seed, dropout_p, save_h):
    kernels = dispatch.kernels(backend)
    if seed is None:
        decoded = kernels.multi_decode(x, weight, slots, route, bias, save_h=save_h)
        if decoded is not None:
            return decoded
    drop = _dropout_args(seed, dropout_p)
    t, h = kernels.multi_shrink(x, slots, slots.a_slots, route, dropout=drop, save_h=save_h)
    return kernels.multi_segment_gemm(x, weight, t, slots.bt_slots, slots, route, bias=bias), h


def backward_kernels(backend, dy, x, weight, slots, route, h, seed, dropout_p, needs):
    kernels = dispatch.kernels(backend)
    need_dx, need_da, need_db, need_dgate = needs
    dx = da = dbt = dgate = None
    drop = _dropout_args(seed, dropout_p)
    if need_dx or need_da:
        dh, _ = kernels.multi_shrink(dy, slots, slots.bt_slots, route)
    if need_da:
        da = torch.zeros_like(slots.a_slots, memory_format=torch.contiguous_format)
        kernels.multi_row_reduce(x, dh, slots, route, da, dropout=drop)
    if need_db or need_dgate:
        dbt = torch.zeros_like(slots.bt_slots, memory_format=torch.contiguous_format)
        w = slots.bt_slots if need_dgate else None
        dgate = kernels.multi_row_reduce(dy, h, slots, route, dbt, scaled=True, w=w)
    if need_dx:
        mask = drop and (kernels.dropout_bits(seed, *x.shape, drop[1]), drop[2])
        dx = kernels.multi_segment_gemm(dy, weight.t(), dh, slots.a_slots, slots, route, mask=mask)
    return dx, da, dbt if need_db else None, dgate


def _add(y, x, slots, route, out_offsets, backend):
    dispatch.require("multi_lora_add_", backend, REFUSALS, x)
    if backend != "torch":
        slots = [Slots(*dispatch.readable(*own)) for own in slots]
    slots = [_cast(own, x.dtype) for own in slots]
    rows, whole = _rows(x), _rows(y)
    parts = [
        whole[:, offset : offset + own.bt_slots.shape[2]]
        for offset, own in zip(out_offsets, slots, strict=True)
    ]
    if backend != "torch":
        dispatch.kernels(backend).multi_add_(parts, rows, slots, route)
        if not y.is_inference():
            # The kernels write unseen by autograd, which must refuse a backward that saved y.
            torch.autograd.graph.increment_version(y)
        return
    for part, own in zip(parts, slots, strict=True):
        if _on_host(x):
            order = _Sorted.of(own, route)
            h = order.shrunk(order.take(rows), own.a_slots)
            order.add_expanded_(part, (h * order.factor).to(x.dtype), own.bt_slots)
        else:
            every = _Everyone.of(own, route)
            h = every.pick(rows @ own.a_slots.flatten(0, 1).t())
            part.addmm_(*every.expanded((h * every.factor).to(x.dtype), own.bt_slots))


def _op_forward(x, weight, *rest):
    slots, route, (bias, seed, p, save_h, backend) = _unpack(rest)
    y, h = _forward(x, weight, slots, route, bias, seed, p, save_h, backend)
    return y, x.new_empty(0) if h is None else h


def _op_backward(dy, x, weight, *rest):
    slots, route, (h, seed, p, needs, backend) = _unpack(rest)
    grads = _backward(dy, x, weight, slots, route, h, seed, p, needs, backend)
    return tuple(g if need else x.new_empty(0) for g, need in zip(grads, needs, strict=True))


def _op_add(y, x, slots, ids, order, offsets, out_offsets, backend):
    every = [Slots(*slots[i : i + 6]) for i in range(0, len(slots), 6)]
    _add(y, x, every, Route(ids, order, offsets), out_offsets, backend)


def _unpack(rest):
    return Slots(*rest[:6]), Route(*rest[6:9]), rest[9:]


_library.impl("multi_lora_linear", _op_forward, "CompositeExplicitAutograd")
_library.impl("multi_lora_linear_backward", _op_backward, "CompositeExplicitAutograd")
_library.impl("multi_lora_add_", _op_add, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::multi_lora_linear", _fake, lib=_library)
torch.library.register_fake("fused_lora::multi_lora_linear_backward", _fake_backward, lib=_library)
torch.library.register_fake("fused_lora::multi_lora_add_", _fake_add, lib=_library)


class MultiLoRALinearFunction(torch.autograd.Function):
    """x [..., K], weight [N, K], bias [N], the Slots, the Route, and `leaves`: lora_a [r, K],
    lora_b [N, r] and gate [r] of one slot after another, parts of the slots' memory -> y [..., N].

    backward: gradients of x, weight, bias, a_slots, bt_slots, gate and every leaf, each only where
    it is asked for. Saved: x, weight, the slots, the route, h [M, R] and the seed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, *rest):
        slots, route, (seed, dropout_p, backend, places, *leaves) = _unpack(rest)
        wanted = ctx.needs_input_grad
        of_leaf = wanted[len(wanted) - len(leaves) :]
        # a_slots, bt_slots and gate are inputs 3, 4 and 7; leaves come in threes.
        of_slots = [wanted[3 + i] or any(of_leaf[k::3]) for i, k in ((0, 0), (1, 1), (4, 2))]
        save_h = of_slots[1] or of_slots[2]
        if dispatch.watched(x):
            y, h = torch.ops.fused_lora.multi_lora_linear(
                x, weight, *slots, *route, bias, seed, dropout_p, save_h, backend
            )
        else:
            y, h = _forward(x, weight, slots, route, bias, seed, dropout_p, save_h, backend)
        ctx.save_for_backward(x, weight, *slots, *route, h, seed)
        ctx.dropout_p, ctx.backend, ctx.places, ctx.of_slots = dropout_p, backend, places, of_slots
        ctx.num_leaves = len(leaves)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, *rest = ctx.saved_tensors
        slots, route, (h, seed) = _unpack(rest)
        wanted = ctx.needs_input_grad
        need_da, need_db, need_dgate = ctx.of_slots
        needs = [wanted[0], wanted[1], need_da, need_db, wanted[2], need_dgate]
        if dispatch.watched(x):
            grads = torch.ops.fused_lora.multi_lora_linear_backward(
                dy, x, weight, *slots, *route, h, seed, ctx.dropout_p, needs, ctx.backend
            )
        else:
            grads = _backward(
                dy, x, weight, slots, route, h, seed, ctx.dropout_p, needs, ctx.backend
            )
        dx, dw, da, dbt, dbias, dgate = grads
        leaves = []
        for slot, rank in ctx.places:
            leaves.append(da[slot, :rank] if need_da else None)
            leaves.append(dbt[slot, :rank].t() if need_db else None)
            leaves.append(dgate[slot, :rank] if need_dgate else None)
        full = [dx, dw, dbias, da, dbt, None, None, dgate, *[None] * 8, *leaves]
        return tuple(g if need else None for g, need in zip(full, wanted, strict=True))


def _usual_slots(bank, x: Tensor, N: int | None) -> Slots | None:
    """The tensors of a bank for which every check of _slots_of passes; None: it shall look."""
    found: list = [getattr(bank, name, None) for name in (*_FIELDS, "table")]
    if found[5] is None and isinstance(found[2], Tensor):
        found[5] = torch.arange(len(found[2]), dtype=torch.int32, device=found[2].device)
    if not check.all_plain(*found):
        return None
    a, bt, rank, scale, gate, table = slots = Slots(*found)
    if not (a.ndim == bt.ndim == 3 and table.ndim == 1):
        return None
    (P, R, K), device, dtypes = a.shape, x.device, (x.dtype, torch.float32)
    good = (
        (K == x.shape[-1] and bt.shape == (P, R, bt.shape[2] if N is None else N))
        and (rank.shape == scale.shape == (P,) and gate.shape == (P, R) and gate.is_contiguous())
        and (rank.dtype is torch.int32 and table.dtype is torch.int32)
        and (scale.dtype is torch.float32 and gate.dtype is torch.float32)
        and (a.dtype in dtypes and bt.dtype in dtypes and x.dtype in check.DTYPES)
        and all(t.device == device for t in slots)
    )
    return slots if good else None


_FIELDS = "a_slots", "bt_slots", "rank", "scale", "gate"


def _slots_of(op: str, bank, x: Tensor, N: int | None) -> Slots:
    """The tensors of a bank, checked against x [..., K] and the output width N."""
    if (usual := _usual_slots(bank, x, N)) is not None:
        return usual
    fields = _FIELDS
    if not all(isinstance(getattr(bank, name, None), Tensor) for name in fields):
        raise TypeError(
            f"{op}: bank must be an AdapterBank or have the tensors {', '.join(fields)}, got "
            f"{type(bank).__name__}"
        )
    found = [getattr(bank, name) for name in fields]
    table = getattr(bank, "table", None)
    if table is None:  # id j is slot j
        table = torch.arange(len(found[2]), dtype=torch.int32, device=found[2].device)
    slots = Slots(*(*found, table))
    for name in ("a_slots", "bt_slots"):
        check.check_tensor(op, f"bank.{name}", getattr(slots, name))
    K = x.shape[-1]
    if slots.a_slots.ndim != 3 or slots.a_slots.shape[2] != K:
        raise ValueError(
            f"{op}: bank.a_slots must have shape [G, R, K] = [any, any, {K}], got "
            f"{list(slots.a_slots.shape)}"
        )
    G, R = slots.a_slots.shape[:2]
    width = slots.bt_slots.shape[-1] if N is None else N
    for name, wanted, spelled in (
        ("bt_slots", (G, R, width), "[G, R, N]"),
        ("rank", (G,), "[G]"),
        ("scale", (G,), "[G]"),
        ("gate", (G, R), "[G, R]"),
    ):
        check.check_shape(op, f"bank.{name}", getattr(slots, name), wanted, spelled)
    if slots.table.ndim != 1:
        raise ValueError(f"{op}: bank.table must have shape [G], got {list(slots.table.shape)}")
    int32, fp32 = torch.int32, torch.float32
    for name, dtype in (("table", int32), ("rank", int32), ("scale", fp32), ("gate", fp32)):
        if (value := getattr(slots, name)).dtype not in (dtype, torch.float64):
            raise TypeError(
                f"{op}: bank.{name} must have dtype {check.names([dtype])}, got "
                f"{check.names([value.dtype])}"
            )
    for name in ("scale", "gate"):
        check.check_tangent(op, f"bank.{name}", getattr(slots, name))
    for name, value in zip((*fields, "table"), slots, strict=True):
        check.check_device(op, f"bank.{name}", value, x)
    for name in ("a_slots", "bt_slots"):
        check.check_adapter_dtype(op, f"bank.{name}", getattr(slots, name), x)
    return slots._replace(gate=slots.gate.contiguous())


def _route_of(op: str, adapter_ids, slots: Slots, x: Tensor) -> Route:
    G = slots.table.shape[0]
    if not isinstance(adapter_ids, AdapterRouting):
        check.check_tensor(op, "adapter_ids", adapter_ids, (torch.int32, torch.int64))
        check.check_device(op, "adapter_ids", adapter_ids, x)
        adapter_ids = AdapterRouting(adapter_ids, G)
    if adapter_ids.num_adapters != G:
        raise ValueError(
            f"{op}: adapter_ids was routed for {adapter_ids.num_adapters} adapters, the bank has "
            f"{G}"
        )
    routing = adapter_ids.rows_of(x)
    check.check_device(op, "adapter_ids", routing.ids, x)
    return Route(routing.ids, routing.order, routing.offsets)


def _check_not_transformed(op: str) -> None:
    if dispatch.transformed() and forward_ad._current_level < 0:  # tangents are refused by name
        raise NotImplementedError(
            f"{op} has no transforms of torch.func (grad, vmap, jacrev), as its rows are sorted on "
            f"the host; call lora_linear with the adapter's own tensors there"
        )


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bank,
    adapter_ids: Tensor | AdapterRouting,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y_i = x_i W0^T + b + s_j ((drop(x)_i A_j^T) * g_j) B_j^T with j = adapter_ids_i; -1: the base
    alone.

    LoRA (arXiv 2106.09685), batched as in Punica (arXiv 2310.18547); with gates SoRA (arXiv
    2311.11696), an adapter each.

    Shapes: x [..., K] of any strides, weight [N, K], bias [N]; returns [..., N]. adapter_ids int32
    or int64, of x's leading shape or of its first dimensions (one id for a sequence), or an
    AdapterRouting of them, which the layers of a model share. bank is an AdapterBank, or anything
    with a_slots [G, R, K], bt_slots [G, R, N] (B transposed), rank int32 [G], scale fp32 [G] and
    gate fp32 [G, R], and, where ids are not slots, table int32, the slot of each id; no two ids of
    slots that are trained have the same. Rank rows of a slot past its rank are no part of the
    result. A slot of rank 0 gives the base.

    NaN and infinities of one adapter, in its numbers or in its rows of x and of the gradient of y,
    stay in its rows and its gradients: all others are the same, bit for bit. An element of B or A
    that is not finite makes NaN of whole rows of its adapter, or of parts of them.

    Dtypes and autocast as in lora_linear; slots in x's dtype or fp32 masters of it. Dropout, seed
    and backend as there: row i has the mask it would have in lora_linear.

    With backend="triton" no value depends on which other rows are in the batch, given its number of
    rows. Gradients: x, weight, bias, and each adapter's lora_a, lora_b and gate, zero for one
    without rows; once differentiable. Saved: x, h [M, R], the routing and the seed.

    Raises TypeError, ValueError and NotImplementedError as lora_linear does, IndexError for ids
    outside [-1, G) (see AdapterRouting), RuntimeError for a backend that cannot run.
    """
    op = "multi_lora_linear"
    backend = dispatch.choose(backend)
    _check_not_transformed(op)
    check.check_tensor(op, "x", x)
    check.check_tensor(op, "weight", weight)
    if bias is not None:
        check.check_tensor(op, "bias", bias)
    check.check_dropout(op, dropout_p)
    check.check_seed(op, seed, x)
    if x.ndim < 1:
        raise ValueError(f"{op}: x must have shape [..., K], got a 0-d tensor")
    check.check_shape(op, "weight", weight, (None, x.shape[-1]), "[N, K]")
    if bias is not None:
        check.check_shape(op, "bias", bias, (weight.shape[0],), "[N]")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check.check_device(op, name, t, x)
    autocast = check.autocast_dtype(x)
    if autocast is not None:
        x, weight, bias = (check.autocast(t, autocast) for t in (x, weight, bias))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check.check_same_dtype(op, name, t, x)
    slots = _slots_of(op, bank, x, weight.shape[0])
    route = _route_of(op, adapter_ids, slots, x)
    if not (training and dropout_p > 0):
        seed, dropout_p = None, 0.0
    elif seed is None:
        seed = reference.draw_seed(x.device)
    elif isinstance(seed, int):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)
    args = x, weight, bias, slots, route, seed, float(dropout_p), backend, bank
    if autocast is None:
        return _run(*args)
    with torch.autocast(x.device.type, enabled=False):
        return _run(*args)


def _locked(*banks):
    """The locks of AdapterBanks: no adapter is half written while a call reads it."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if len(banks) == 1:
        return getattr(banks[0], "lock", contextlib.nullcontext())
    locks = contextlib.ExitStack()
    for bank in banks:
        locks.enter_context(_locked(bank))
    return locks


def _run(x, weight, bias, slots, route, seed, dropout_p, backend, bank) -> Tensor:
    if torch.is_grad_enabled():
        with _locked(bank):  # the leaves are those of the adapters that the product reads
            places, leaves = bank.leaves() if hasattr(bank, "leaves") else ((), ())
            tensors = x, weight, bias, *slots, *leaves
            if any(t is not None and t.requires_grad for t in tensors):
                return MultiLoRALinearFunction.apply(
                    x, weight, bias, *slots, *route, seed, dropout_p, backend, places, *leaves
                )
    if dispatch.watched(x):
        return torch.ops.fused_lora.multi_lora_linear(
            x, weight, *slots, *route, bias, seed, dropout_p, False, backend
        )[0]
    with _locked(bank):
        return _forward(x, weight, slots, route, bias, seed, dropout_p, False, backend)[0]


def multi_lora_add_(
    y: Tensor,
    x: Tensor,
    bank,
    adapter_ids: Tensor | AdapterRouting,
    *,
    out_offset: int | Sequence[int] = 0,
    backend: str | None = None,
) -> Tensor:
    """y[..., out_offset : out_offset + N] += s_j ((x_i A_j^T) * g_j) B_j^T in place; returns y.

    For engines that own the base product; out_offset picks one projection of a packed output (q, k
    or v of QKV). Projections that share x are one call: bank is then a list of banks, all of as
    many ids, and out_offset a list of as many offsets, whose columns do not overlap; with
    backend="triton" they share one launch of the product with A.

    y [..., at least out_offset + N] and x [..., K] share leading shape, dtype and device; bank and
    adapter_ids as in multi_lora_linear. No gradients: an inference op.

    Raises TypeError, ValueError, IndexError and RuntimeError as multi_lora_linear does, and
    RuntimeError where y or x requires a gradient, or elements of y share memory (an expanded y).
    """
    op = "multi_lora_add_"
    backend = dispatch.choose(backend)
    _check_not_transformed(op)
    for name, t in (("y", y), ("x", x)):
        check.check_tensor(op, name, t)
    if x.ndim < 1:
        raise ValueError(f"{op}: x must have shape [..., K], got a 0-d tensor")
    check.check_device(op, "y", y, x)
    check.check_same_dtype(op, "y", y, x)
    many = isinstance(bank, list)
    banks, out_offsets = (bank, out_offset) if many else ([bank], [out_offset])
    if not isinstance(out_offsets, (list, tuple)) or len(out_offsets) != len(banks) or not banks:
        raise ValueError(
            f"{op}: out_offset must be a list of {len(banks)} offsets, one for each bank of a list "
            f"that is not empty, got {out_offsets!r}"
        )
    slots = [_slots_of(op, one, x, None) for one in banks]
    for offset in out_offsets:
        if isinstance(offset, bool) or not isinstance(offset, int):
            raise TypeError(f"{op}: out_offset must be an int, got {type(offset).__name__}")
    widths = [own.bt_slots.shape[2] for own in slots]
    spans = sorted((first, first + n) for first, n in zip(out_offsets, widths, strict=True))
    width = max(end for _, end in spans)
    if y.shape[:-1] != x.shape[:-1] or min(out_offsets) < 0 or y.shape[-1] < width:
        raise ValueError(
            f"{op}: y must have shape {[*x.shape[:-1], f'at least {width}']} for out_offset = "
            f"{out_offset}, got {list(y.shape)}"
        )
    if any(begin < end for (_, end), (begin, _) in itertools.pairwise(spans)):
        raise ValueError(f"{op}: the columns of out_offset = {list(out_offsets)} overlap: {spans}")
    check.check_written(op, "y", y)
    if y.ndim > 2 and not y.is_contiguous():
        raise ValueError(f"{op}: y of more than two dimensions must be contiguous")
    if len({own.table.shape[0] for own in slots}) > 1:
        raise ValueError(
            f"{op}: the banks of a list must have as many ids, got "
            f"{[own.table.shape[0] for own in slots]}"
        )
    route = _route_of(op, adapter_ids, slots[0], x)
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
        raise RuntimeError(f"{op} has no gradients: y and x must not require one")
    with torch.no_grad(), _locked(*banks):
        add, out = torch.ops.fused_lora.multi_lora_add_, y.resolve_neg()
        add(out, x, [t for own in slots for t in own], *route, list(out_offsets), backend)
        if out is not y:  # torch resolves the bit itself, but not of what an op writes
            y.copy_(out)
    return y


@dispatch.explains("multi_lora_linear")
def _explain(x, weight, bank, adapter_ids, bias=None, *, backend=None, **options):
    _slots_of("multi_lora_linear", bank, x, weight.shape[0])
    return dispatch.choose(backend), x, REFUSALS
