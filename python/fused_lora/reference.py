"""The definition of every operation, in the shortest correct PyTorch.

Any device, any floating dtype (fp64 included); autograd derives the gradients. The tests hold every
backend to these functions. Symbols: x [..., K], weight [N, K], lora_a [R, K], lora_b [N, R], gate
[R], adapter_ids [...] with -1 for "no adapter"; M is the product of x's leading dimensions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF
PHILOX_ROUNDS = 7


class AdapterSlots(NamedTuple):
    """The adapters of one layer, in slots of a fixed size.

    B is stored transposed, so an adapter is a range of rank rows in both stacks, contiguous along
    the wide side. Rank rows at and after rank[j] are not part of adapter j and are never read.

        a_slots [G, Rmax, K]    bt_slots [G, Rmax, N]    rank int32 [G]    scale fp32 [G]    gate
        fp32 [G, Rmax]
    """

    a_slots: Tensor
    bt_slots: Tensor
    rank: Tensor
    scale: Tensor
    gate: Tensor


def pack_slots(
    adapters: Sequence[tuple[Tensor, Tensor, float, Tensor | None]], max_rank: int | None = None
) -> AdapterSlots:
    """AdapterSlots of a sequence of (lora_a [R, K], lora_b [N, R], scale, gate [R] or None)."""
    max_rank = max_rank or max(a.shape[0] for a, _, _, _ in adapters)
    first_a, first_b = adapters[0][:2]
    a_slots = first_a.new_zeros(len(adapters), max_rank, first_a.shape[1])
    bt_slots = first_b.new_zeros(len(adapters), max_rank, first_b.shape[0])
    gates = first_a.new_ones(len(adapters), max_rank, dtype=torch.float32)
    for j, (a, b, _, gate) in enumerate(adapters):
        a_slots[j, : a.shape[0]] = a
        bt_slots[j, : a.shape[0]] = b.t()
        if gate is not None:
            gates[j, : a.shape[0]] = gate
    device = first_a.device
    rank = torch.tensor([a.shape[0] for a, *_ in adapters], dtype=torch.int32, device=device)
    scale = torch.tensor([s for _, _, s, _ in adapters], dtype=torch.float32, device=device)
    return AdapterSlots(a_slots, bt_slots, rank, scale, gates)


def philox4x32(counter: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 (Salmon et al., SC 2011) of the 128-bit counters (counter, 0) under the key
    `seed`.

    counter int64 [...], seed int64 of one element. Returns four int64 tensors that hold 32-bit
    words.
    """
    c0, c1 = counter & _WORD, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    rounds = torch.arange(PHILOX_ROUNDS, device=seed.device)
    keys = (seed + rounds * 0x9E3779B9) & _WORD, ((seed >> 32) + rounds * 0xBB67AE85) & _WORD
    for k0, k1 in zip(*keys, strict=True):
        # int64 products wrap, yet their 64 bits are those of the unsigned product.
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (high >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (low >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = high, low  # their upper halves are cleared at the end
    c1, c3 = c1 & _WORD, c3 & _WORD
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """A 16-bit lane is kept iff it is at or above this: round(65536 p), ties to even."""
    return round(65536 * p)


def dropout_scale(p: float) -> float:
    """1 / (1 - p), and 0 at p = 1, where nothing is kept."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


Columns = tuple[int, int] | None


def dropout_lanes(seed: Tensor, rows: Tensor, K: int, columns: Columns = None) -> Tensor:
    """The 16-bit lanes of the given rows of a matrix of K columns: int32 [len(rows), K].

    Element (m, k) is lane k % 8 of the Philox call with counter m * ceil(K / 8) + k // 8: word
    lane // 2, the low half first. columns = (first, total): these are columns first .. first + K of
    a matrix of `total`, with its lanes; first is a multiple of 8.
    """
    first, total = columns or (0, K)
    calls = (K + 7) // 8
    counter = rows[:, None] * ((total + 7) // 8) + torch.arange(calls, device=rows.device)
    counter += first // 8
    words = torch.stack(philox4x32(counter, seed.reshape(())), dim=-1)  # [M, calls, 4]
    lanes = words.to(torch.int32).view(torch.int16)  # [M, calls, 8]; memory is little-endian
    return (lanes.to(torch.int32) & 0xFFFF).view(len(rows), calls * 8)[:, :K]


def dropout_mask(seed: Tensor, M: int, K: int, p: float, columns: Columns = None) -> Tensor:
    """True where element (m, k) of an [M, K] input is kept: bool [M, K] on seed's device.

    columns: where it lies in a wider input (see dropout_lanes).
    """
    rows = torch.arange(M, device=seed.device)
    # On a CPU a slab of rows at a time, so that the 64-bit intermediates stay in its cache.
    slab = max(1, torch.get_num_threads() * 2**18 // max(1, K)) if seed.is_cpu else max(1, M)
    threshold = dropout_threshold(p)
    return torch.cat([dropout_lanes(seed, r, K, columns) >= threshold for r in rows.split(slab)])


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's own generator of `device`: int64 [1], with no host synchronisation."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _dropout(
    x: Tensor, p: float, training: bool, seed: int | Tensor | None, columns: Columns = None
) -> Tensor:
    if not training or p == 0:
        return x
    if seed is None:
        seed = draw_seed(x.device)
    elif not isinstance(seed, Tensor):
        seed = torch.tensor([seed], dtype=torch.int64, device=x.device)
    keep = dropout_mask(seed, math.prod(x.shape[:-1]), x.shape[-1], p, columns).view(x.shape)
    return torch.where(keep, x, 0) * dropout_scale(p)


def lora_add(
    base_out, x, lora_a, lora_b, *, scale, gate=None, dropout_p=0.0, training=True, seed=None
):
    """y = base_out + scale * ((drop(x) A^T) * g) B^T."""
    x = _dropout(x, dropout_p, training, seed)
    return _added(base_out, x, lora_a, lora_b, scale, gate)


def _added(base_out, x, lora_a, lora_b, scale, gate):
    h = x @ lora_a.to(x.dtype).t()
    if gate is not None:
        h = h * gate
    return base_out + (scale * (h.to(x.dtype) @ lora_b.to(x.dtype).t())).to(base_out.dtype)


def lora_linear(
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
    """y = x W0^T + b + scale * ((drop(x) A^T) * g) B^T   (arXiv 2106.09685, 2311.11696).

    dropout_columns = (first, total): x is columns first .. first + K of a wider input, whose mask
    it takes.
    """
    dropped = _dropout(x, dropout_p, training, seed, dropout_columns)
    return _added(F.linear(x, weight, bias), dropped, lora_a, lora_b, scale, gate)


def lora_linear_group(
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
    """[lora_linear of every projection] of one x under ONE dropout mask; an adapter may be None."""
    if seed is None and training and dropout_p > 0:
        seed = draw_seed(x.device)
    n = len(weights)
    outs = []
    for w, a, b, bias, scale, gate in zip(
        weights,
        lora_as,
        lora_bs,
        biases or [None] * n,
        scales,
        gates or [None] * n,
        strict=True,
    ):
        y = F.linear(x, w, bias)
        if a is not None:
            drop = {"dropout_p": dropout_p, "training": training, "seed": seed}
            y = lora_add(y, x, a, b, scale=scale, gate=gate, **drop)
        outs.append(y)
    return outs


def dora_linear(x, weight, lora_a, lora_b, magnitude, bias=None, *, scale):
    """y = b + (m / ||W0 + scale B A||) (x W0^T + scale (x A^T) B^T), the norms of rows being
    constants (arXiv 2402.09353); a row of zeros is scaled by 1."""
    z = lora_linear(x, weight, lora_a, lora_b, scale=scale)
    exact = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.to(exact) + scale * (lora_b.to(exact) @ lora_a.to(exact))
    norms = torch.linalg.vector_norm(rows, dim=1).detach()
    zeros = norms == 0
    y = (magnitude / norms.masked_fill(zeros, 1)).masked_fill(zeros, 1) * z
    return (y if bias is None else y + bias).to(z.dtype)


def _multi_lora_delta(x, bank, adapter_ids, dropout_p, training, seed):
    G, _, N = bank.bt_slots.shape
    if adapter_ids.numel() and not (-1 <= int(adapter_ids.min()) and int(adapter_ids.max()) < G):
        raise IndexError(f"adapter_ids must lie in [-1, {G}), got {adapter_ids.unique().tolist()}")
    x = _dropout(x, dropout_p, training, seed)
    delta = x.new_zeros(*x.shape[:-1], N)
    for j, rank in enumerate(bank.rank.tolist()):
        a, bt = bank.a_slots[j, :rank].to(x.dtype), bank.bt_slots[j, :rank].to(x.dtype)
        h = (x @ a.t()) * bank.gate[j, :rank]
        delta_j = bank.scale[j] * (h.to(x.dtype) @ bt)
        delta = torch.where((adapter_ids == j)[..., None], delta_j.to(x.dtype), delta)
    return delta


def multi_lora_linear(
    x, weight, bank, adapter_ids, bias=None, *, dropout_p=0.0, training=True, seed=None
):
    """y_i = x_i W0^T + b + s_j ((drop(x)_i A_j^T) * g_j) B_j^T with j = adapter_ids_i; -1: the base
    alone.

    bank has the fields of AdapterSlots; adapter_ids has x's leading shape (or that of its first
    dimension, one adapter for each sequence).
    """
    ids = adapter_ids.reshape(adapter_ids.shape + (1,) * (x.ndim - 1 - adapter_ids.ndim))
    delta = _multi_lora_delta(x, bank, ids, dropout_p, training, seed)
    return F.linear(x, weight, bias) + delta


def multi_lora_add_(y, x, bank, adapter_ids, *, out_offset=0):
    """y[..., out_offset : out_offset + N] += s_j ((x_i A_j^T) * g_j) B_j^T, in place; returns y."""
    ids = adapter_ids.reshape(adapter_ids.shape + (1,) * (x.ndim - 1 - adapter_ids.ndim))
    delta = _multi_lora_delta(x, bank, ids, 0.0, False, None)
    y[..., out_offset : out_offset + delta.shape[-1]] += delta
    return y


def lora_embedding(ids, weight, lora_a, lora_b, *, scale, padding_idx=None):
    """e = E[ids] + scale * A^T[ids] B^T: weight [V, D], lora_a [R, V], lora_b [D, R] (as PEFT).

    The rows padding_idx of E and A^T get no gradient.
    """
    ids = ids.long()
    h = F.embedding(ids, lora_a.to(weight.dtype).t(), padding_idx)
    return F.embedding(ids, weight, padding_idx) + scale * (h @ lora_b.to(weight.dtype).t())


def dept_embedding(ids, weight, prompt, lora_a, lora_b, *, scale=1.0, positions=None):
    """[P ; E[ids] + scale (A B)[positions]]   (DePT, arXiv 2309.05173).

    ids [..., L], weight [V, D], prompt [m, D] or None, lora_a [S, R] and lora_b [R, D] by POSITION;
    positions (of ids' shape, or broadcast to it) defaults to 0 .. L-1, and a position that is
    negative, or S or more, adds nothing. Returns [..., m + L, D].
    """
    if positions is None:
        positions = torch.arange(ids.shape[-1], device=ids.device)
    S, dtype = lora_a.shape[0], weight.dtype
    inside = (positions >= 0) & (positions < S)
    rows = F.embedding(positions.long().clamp(0, S - 1), lora_a.to(dtype)) @ lora_b.to(dtype)
    e = F.embedding(ids.long(), weight) + scale * torch.where(inside[..., None], rows, 0)
    if prompt is None:
        return e
    return torch.cat((prompt.to(dtype).expand(*e.shape[:-2], -1, -1), e), dim=-2)
