"""What is measured: for each operation its cases, its flops and bytes, and the contenders."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fused_lora.bench.baselines import (
    BASELINES,
    GROUP_BASELINES,
    MULTI_BASELINES,
    SCALE,
    torch_keep,
)
from fused_lora.bench.peers import MULTI_PEERS, PEERS
from torch import Tensor

import fused_lora as fl
from fused_lora import reference

DIRECTIONS = ("forward", "backward", "both")


def _runs_anywhere(device: torch.device, case) -> str | None:
    return None


class Contender(NamedTuple):
    """One implementation of an operation.

    build(case, *tensors) returns the call that is timed, which returns an output or a list of them.
    keep(case, x) is the dropout mask that this call uses under the same state of torch's generator.
    unavailable(device, case) is the sentence why it cannot run there, or None. One that is
    forward_only has no gradients.
    """

    build: Callable[..., Callable[[], Tensor | list[Tensor]]]
    keep: Callable[..., Tensor]
    unavailable: Callable[[torch.device, tuple], str | None] = _runs_anywhere
    forward_only: bool = False


class Stage(NamedTuple):
    """Cases that are measured together, those that matter most first: time may run out."""

    cases: list
    directions: tuple[str, ...] = DIRECTIONS
    contenders: tuple[str, ...] | None = None  # None: all


class Op(NamedTuple):
    """One operation, defined by truth(case, *tensors, keep=mask or None).

    tensors(case, device) are its inputs; the gradients measured are of those that require one.
    flops(case, direction) counts a multiply-add as two; bytes(case, direction) reads every input
    and writes every output once. The floor is the contender without an adapter: the 1.00 that the
    others add to, and the only one that truth is not asked of. The baseline is what ours replaces;
    "<baseline> again" is the baseline once more, and what the two differ by is the noise.
    """

    name: str
    stages: dict[str, Stage]
    tensors: Callable[..., list[Tensor]]
    truth: Callable[..., Tensor | list[Tensor]]
    flops: Callable[..., int]
    bytes: Callable[..., int]
    floor: str
    baseline: str
    ours: tuple[str, ...]
    contenders: dict[str, Contender]


# lora_linear: x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R].


class LinearCase(NamedTuple):
    M: int
    N: int
    K: int
    R: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.float32

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"M={self.M} {self.N}x{self.K} r={self.R} p={self.p:g} {dtype}"


def linear_tensors(case: LinearCase, device: torch.device) -> list[Tensor]:
    """x, the frozen weight, lora_a and lora_b of N(0, 1)."""
    M, N, K, R, _, dtype = case
    shapes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
    return [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_(name != "weight")
        for name, shape in shapes.items()
    ]


def linear_truth(case, x, weight, a, b, keep=None):
    kept = x if keep is None else x * keep * reference.dropout_scale(case.p)
    return F.linear(x, weight) + SCALE * F.linear(F.linear(kept, a), b)


def linear_flops(case: LinearCase, direction: str) -> int:
    M, N, K, R = case[:4]
    base, adapter = 2 * M * N * K, 2 * M * R * (K + N)
    forward, backward = base + adapter, base + 2 * adapter
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def linear_bytes(case: LinearCase, direction: str) -> int:
    M, N, K, R = case[:4]
    adapter, h = R * (K + N), M * R
    forward = M * K + N * K + adapter + M * N + h  # x, weight, adapter -> y, h
    backward = M * N + M * K + N * K + adapter + h + M * K + adapter  # -> dx, dA, dB
    elements = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return elements * case.dtype.itemsize


def _our_keep(case, x):
    return reference.dropout_mask(reference.draw_seed(x.device), *x.shape, case.p)


def _base(case, x, weight, a, b):
    return lambda: F.linear(x, weight)


def _naive(case, x, weight, a, b):
    def forward():
        kept = F.dropout(x, case.p) if case.p else x
        return F.linear(x, weight) + SCALE * F.linear(F.linear(kept, a), b)

    return forward


def _ours(backend: str) -> Contender:
    def build(case, x, weight, a, b):
        options = {"scale": SCALE, "dropout_p": case.p, "backend": backend}
        return lambda: fl.lora_linear(x, weight, a, b, **options)

    return Contender(build, _our_keep, lambda device, case: fl.backends()[backend])


LLAMA_8B = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096)}
LLAMA_8B |= {"down": (4096, 14336)}
LLAMA_70B = {"70B q, o": (8192, 8192), "70B gate, up": (28672, 8192)}
SHAPES = LLAMA_8B | LLAMA_70B  # layer: (N, K)
ROWS = 1, 4, 16, 64, 512, 2048, 8192, 16384
RANKS = 8, 16, 32, 64, 128
BF16, FP16 = torch.bfloat16, torch.float16


def _cpu_cases() -> list[LinearCase]:
    shapes = (512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (1024, 4096)
    return [
        *(LinearCase(M, N, K) for N, K in shapes for M in (16, 64, 128, 512)),
        *(LinearCase(128, n, n, R) for n in (1024, 4096) for R in (8, 64)),
        *(LinearCase(M, 1024, 1024, p=0.1) for M in (16, 128, 512)),
        *(LinearCase(M, 4096, 4096, p=0.1) for M in (16, 128)),
        LinearCase(512, 1024, 4096, p=0.1),
    ]


def _grid() -> list[LinearCase]:
    """Every shape, M, rank, dtype and dropout; the fewer of them are unusual, the earlier."""
    usual = {"R": 16, "p": 0.0, "dtype": BF16}
    whole = [
        LinearCase(M, N, K, R, p, dtype)
        for (N, K), M, R, p, dtype in itertools.product(
            SHAPES.values(), ROWS, RANKS, (0.0, 0.1), (BF16, FP16)
        )
    ]
    return sorted(whole, key=lambda c: sum(getattr(c, k) != v for k, v in usual.items()))


def _linear_stages() -> dict[str, Stage]:
    def bf16(rows, shapes=SHAPES, **options):
        return [
            LinearCase(M, N, K, dtype=BF16, **options) for N, K in shapes.values() for M in rows
        ]

    common = "linear", "naive", "naive again", "addmm", "torch", "triton", "cuda"
    training = [case for p in (0.0, 0.1) for case in bf16((8192, 2048), p=p)]
    ragged = [LinearCase(M, 4096, 4096, dtype=BF16) for M in (2837, 4097)]
    # torch.compile takes longer for a case than all the others: it has a stage of its own.
    usual = *common, "peft", "peft, adapters in x's dtype", "lorafusion form", "grouped_mm"
    serving = *usual, "bgmv form", "vllm", "sglang"
    return {
        "cpu": Stage(_cpu_cases(), contenders=usual),
        "cpu-quick": Stage(
            [LinearCase(16, 512, 512), LinearCase(128, 1024, 1024, p=0.1)], contenders=usual
        ),
        "quick": Stage(bf16((16, 2048), {"q, o": (4096, 4096)}), contenders=usual),
        "layers": Stage(bf16((8192, 2048), LLAMA_8B), contenders=(*common, "lorafusion form")),
        "training": Stage(training + ragged, contenders=usual),
        "decode-layers": Stage(
            bf16((1, 16, 64), LLAMA_8B), directions=("forward",), contenders=serving
        ),
        "decode": Stage(bf16((1, 4, 16, 64)), directions=("forward",), contenders=serving),
        "compiled": Stage(
            bf16((2048, 8192, 16), LLAMA_8B),
            contenders=(*common, "compiled", "compiled, autotuned"),
        ),
        "grid": Stage(_grid(), contenders=common),
    }


def _also(contenders: dict[str, dict]) -> dict[str, Contender]:
    return {name: Contender(**options) for name, options in contenders.items()}


LORA_LINEAR = Op(
    name="lora_linear",
    stages=_linear_stages(),
    tensors=linear_tensors,
    truth=linear_truth,
    flops=linear_flops,
    bytes=linear_bytes,
    floor="linear",
    baseline="naive",
    ours=("torch", "triton", "cuda"),
    contenders={
        "linear": Contender(_base, torch_keep),
        "naive": Contender(_naive, torch_keep),
        "naive again": Contender(_naive, torch_keep),
        "torch": _ours("torch"),
        "triton": _ours("triton"),
        "cuda": _ours("cuda"),
        **_also(PEERS),
        **_also(BASELINES),
    },
)
# lora_add: x [M, K], base_out [M, N], lora_a [R, K], lora_b [N, R].


def add_tensors(case: LinearCase, device: torch.device) -> list[Tensor]:
    """x, base_out, lora_a and lora_b of N(0, 1)."""
    M, N, K, R, _, dtype = case
    shapes = (M, K), (M, N), (R, K), (N, R)
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


def add_truth(case, x, base_out, a, b, keep=None):
    kept = x if keep is None else x * keep * reference.dropout_scale(case.p)
    return base_out + SCALE * F.linear(F.linear(kept, a), b)


def add_flops(case: LinearCase, direction: str) -> int:
    M, N, K, R = case[:4]
    forward, backward = 2 * M * R * (K + N), 4 * M * R * (K + N)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def add_bytes(case: LinearCase, direction: str) -> int:
    """The gradient of base_out is dy itself."""
    M, N, K, R = case[:4]
    adapter, h = R * (K + N), M * R
    forward = M * K + M * N + adapter + M * N + h  # x, base_out, adapter -> y, h
    backward = M * N + M * K + adapter + h + M * K + adapter  # -> dx, dA, dB
    elements = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return elements * case.dtype.itemsize


class _Copies(torch.autograd.Function):
    """What there is to move beside the adapter: base_out to y; back, x to a tensor of its size."""

    @staticmethod
    def forward(ctx, x, base_out):
        ctx.save_for_backward(x)
        return base_out.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0].clone(), dy


def _add_copies(case, x, base_out, a, b):
    return lambda: _Copies.apply(x, base_out)


def _add_naive(case, x, base_out, a, b):
    """What PEFT does around a quantised layer."""

    def forward():
        kept = F.dropout(x, case.p) if case.p else x
        return base_out + SCALE * F.linear(F.linear(kept, a), b)

    return forward


def _add_ours(backend: str) -> Contender:
    def build(case, x, base_out, a, b):
        options = {"scale": SCALE, "dropout_p": case.p, "backend": backend}
        return lambda: fl.lora_add(base_out, x, a, b, **options)

    return Contender(build, _our_keep, lambda device, case: fl.backends()[backend])


def _add_stages() -> dict[str, Stage]:
    def bf16(rows, **options):
        shapes = LLAMA_8B.values()
        return [LinearCase(M, N, K, dtype=BF16, **options) for N, K in shapes for M in rows]

    small = [LinearCase(128, 1024, 1024), LinearCase(128, 1024, 1024, p=0.1)]
    return {
        "cpu": Stage([*small, LinearCase(512, 1024, 1024), LinearCase(16, 4096, 4096)]),
        "cpu-quick": Stage([small[1]]),
        "quick": Stage([LinearCase(2048, 4096, 4096, dtype=BF16)]),
        "training": Stage([case for p in (0.0, 0.1) for case in bf16((8192, 2048), p=p)]),
        "decode": Stage(bf16((1, 16, 64)), directions=("forward",)),
    }


LORA_ADD = Op(
    name="lora_add",
    stages=_add_stages(),
    tensors=add_tensors,
    truth=add_truth,
    flops=add_flops,
    bytes=add_bytes,
    floor="copies",
    baseline="naive",
    ours=("torch", "triton", "cuda"),
    contenders={
        "copies": Contender(_add_copies, torch_keep),
        "naive": Contender(_add_naive, torch_keep),
        "naive again": Contender(_add_naive, torch_keep),
        "torch": _add_ours("torch"),
        "triton": _add_ours("triton"),
        "cuda": _add_ours("cuda"),
    },
)
# lora_linear_group: x [M, K]; of each projection weight [N_i, K], lora_a [R, K], lora_b [N_i, R].


class GroupCase(NamedTuple):
    M: int
    N: int  # of all together
    K: int
    widths: tuple[int, ...]  # the N_i
    R: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.float32
    trained: bool = True  # else the adapters are frozen, and the backward is dx alone

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        packed = "+".join(map(str, self.widths))
        frozen = "" if self.trained else ", dx alone"
        return f"M={self.M} {packed}x{self.K} r={self.R} p={self.p:g} {dtype}{frozen}"


def group_tensors(case: GroupCase, device: torch.device) -> list[Tensor]:
    """x, the frozen weights, every lora_a, every lora_b, of N(0, 1)."""
    M, _, K, widths, R, _, dtype, trained = case
    n = len(widths)
    shapes = (M, K), *((N, K) for N in widths), *[(R, K)] * n, *((N, R) for N in widths)
    return [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_(i == 0 or (trained and i > n))
        for i, shape in enumerate(shapes)
    ]


def _by_projection(tensors) -> list[tuple[Tensor, Tensor, Tensor]]:
    n = len(tensors) // 3
    return [*zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True)]


def group_truth(case, x, *tensors, keep=None):
    kept = x if keep is None else x * keep * reference.dropout_scale(case.p)
    return [
        F.linear(x, weight) + SCALE * F.linear(F.linear(kept, a), b)
        for weight, a, b in _by_projection(tensors)
    ]


def _one_projection(case: GroupCase) -> LinearCase:
    """Of all widths together: its base product is theirs."""
    return LinearCase(case.M, case.N, case.K, case.R, case.p, case.dtype)


def group_flops(case: GroupCase, direction: str) -> int:
    one, more = _one_projection(case), 2 * case.M * case.R * case.K * (len(case.widths) - 1)
    forward = linear_flops(one, "forward") + more  # the products with A
    # With dA and dh A; of a frozen adapter dy B and dh A alone.
    backward = linear_flops(one, "backward") + 2 * more if case.trained else forward
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def group_bytes(case: GroupCase, direction: str) -> int:
    """x is read once, dx written once, h and the adapters are those of each projection."""
    one, more = _one_projection(case), (len(case.widths) - 1) * case.R * case.dtype.itemsize
    h, a = case.M * more, case.K * more
    forward = linear_bytes(one, "forward") + a + h  # A -> h
    backward = linear_bytes(one, "backward") + a + h + a  # A, h -> dA
    if not case.trained:  # dy and dx in the places of y and x, and no h
        forward -= h + case.M * case.R * case.dtype.itemsize
        backward = forward
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def _group_base(case, x, *tensors):
    return lambda: [F.linear(x, weight) for weight, _, _ in _by_projection(tensors)]


def _group_naive(case, x, *tensors):
    """With one mask for all, which is less than PEFT draws."""

    def forward():
        kept = F.dropout(x, case.p) if case.p else x
        return [
            F.linear(x, weight) + SCALE * F.linear(F.linear(kept, a), b)
            for weight, a, b in _by_projection(tensors)
        ]

    return forward


def _group_ours(backend: str) -> Contender:
    def build(case, x, *tensors):
        weights, lora_as, lora_bs = (list(of) for of in zip(*_by_projection(tensors), strict=True))
        options = {"scales": [SCALE] * len(weights), "dropout_p": case.p, "backend": backend}
        return lambda: fl.lora_linear_group(x, weights, lora_as, lora_bs, **options)

    return Contender(build, _our_keep, lambda device, case: fl.backends()[backend])


def _one_by_one(backend: str) -> Contender:
    """lora_linear of each, under one seed."""

    def build(case, x, *tensors):
        options = {"scale": SCALE, "dropout_p": case.p, "backend": backend}

        def forward():
            seed = reference.draw_seed(x.device) if case.p else None
            return [
                fl.lora_linear(x, *projection, seed=seed, **options)
                for projection in _by_projection(tensors)
            ]

        return forward

    return Contender(build, _our_keep, lambda device, case: fl.backends()[backend])


def _group_stages() -> dict[str, Stage]:
    def cases(rows, groups, K=4096, **options):
        return [
            GroupCase(M, sum(widths), K, widths, **options)
            for widths, M in itertools.product(groups, rows)
        ]

    llama = (4096, 1024, 1024), (14336, 14336)  # q, k and v; gate and up
    small = (1024, 256, 256), (2048, 2048)
    return {
        "cpu": Stage(cases((16, 128), small, 1024) + cases((128,), small[:1], 1024, p=0.1)),
        "cpu-quick": Stage(cases((64,), [(512, 128, 128)], 512)),
        "quick": Stage(cases((2048,), llama[:1], dtype=BF16)),
        "training": Stage(
            cases((8192, 2048), llama, dtype=BF16)
            + cases((8192,), llama, trained=False, dtype=BF16)
            + cases((8192, 2048), llama, p=0.1, dtype=BF16)
        ),
        "decode": Stage(cases((1, 16, 64), llama, dtype=BF16), directions=("forward",)),
    }


LORA_LINEAR_GROUP = Op(
    name="lora_linear_group",
    stages=_group_stages(),
    tensors=group_tensors,
    truth=group_truth,
    flops=group_flops,
    bytes=group_bytes,
    floor="linear",
    baseline="naive",
    ours=("torch", "triton", "cuda"),
    contenders={
        "linear": Contender(_group_base, torch_keep),
        "naive": Contender(_group_naive, torch_keep),
        "naive again": Contender(_group_naive, torch_keep),
        **{backend: _group_ours(backend) for backend in ("torch", "triton", "cuda")},
        **{
            f"{backend}, one by one": _one_by_one(backend)
            for backend in ("torch", "triton", "cuda")
        },
        **_also(GROUP_BASELINES),
    },
)
# multi_lora_linear: x [M, K], weight [N, K], a_slots [G, R, K], bt_slots [G, R, N].

POPULARITIES = "distinct", "uniform", "zipf", "identical"


class MultiCase(NamedTuple):
    M: int
    N: int
    K: int
    R: int = 16
    G: int = 8
    popularity: str = "uniform"
    p: float = 0.0
    dtype: torch.dtype = torch.float32
    ragged: bool = False

    def ranks(self) -> list[int]:
        """Of every adapter: R, or where ragged R, R / 2, R / 4 and R / 8 in turn."""
        return [max(1, self.R >> (j % 4 if self.ragged else 0)) for j in range(self.G)]

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        rows = f"M={self.M} {self.N}x{self.K} r{'<=' if self.ragged else '='}{self.R}"
        return f"{rows} {self.G} adapters, {self.popularity}, p={self.p:g} {dtype}"

    def ids(self) -> Tensor:
        """The adapter of each row, the same whenever it is asked for; for M below G "distinct" has
        no adapter twice."""
        generator = torch.Generator().manual_seed(self.M * self.G)
        if self.popularity == "identical":
            return torch.zeros(self.M, dtype=torch.int64)
        if self.popularity == "distinct":
            return torch.arange(self.M) % self.G
        power = 1.5 if self.popularity == "zipf" else 0.0
        shares = torch.arange(1.0, self.G + 1) ** -power
        return torch.multinomial(shares, self.M, replacement=True, generator=generator)


def multi_tensors(case: MultiCase, device: torch.device) -> list[Tensor]:
    """x, the frozen weight and the slots, of N(0, 1), and zero past an adapter's rank."""
    M, N, K, R, G = case[:5]
    shapes = {"x": (M, K), "weight": (N, K), "a_slots": (G, R, K), "bt_slots": (G, R, N)}
    tensors = [torch.randn(shape, device=device, dtype=case.dtype) for shape in shapes.values()]
    for slots in tensors[2:]:
        for j, rank in enumerate(case.ranks()):
            slots[j, rank:] = 0
    return [t.requires_grad_(name != "weight") for name, t in zip(shapes, tensors, strict=True)]


def _rows_by_adapter(case: MultiCase, device: torch.device) -> list[tuple[int, Tensor]]:
    ids = case.ids()
    return [(j, torch.where(ids == j)[0].to(device)) for j in ids.unique().tolist()]


def multi_truth(case, x, weight, a, bt, keep=None):
    kept = x if keep is None else x * keep * reference.dropout_scale(case.p)
    y = F.linear(x, weight)
    for j, rows in _rows_by_adapter(case, x.device):
        r = case.ranks()[j]
        y = y.index_add(0, rows, SCALE * (kept[rows] @ a[j, :r].t()) @ bt[j, :r])
    return y


def multi_flops(case: MultiCase, direction: str) -> int:
    M, N, K = case[:3]
    ranks = torch.tensor(case.ranks())[case.ids()]
    base, adapter = 2 * M * N * K, 2 * int(ranks.sum()) * (K + N)
    forward, backward = base + adapter, base + 2 * adapter
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def multi_bytes(case: MultiCase, direction: str) -> int:
    """The adapters that are in the batch are read once, the gradients of all are written."""
    M, N, K, R, G = case[:5]
    ranks, ids = torch.tensor(case.ranks()), case.ids()
    adapters, h = int(ranks[ids.unique()].sum()) * (K + N), int(ranks[ids].sum())
    forward = M * K + N * K + adapters + M * N + h
    backward = M * N + M * K + N * K + adapters + h + M * K + G * R * (K + N)
    elements = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return elements * case.dtype.itemsize


def _multi_loop(case, x, weight, a, bt):
    """PEFT's mixed batch: for each adapter its rows out, through both matrices, and added in."""
    groups, ranks = _rows_by_adapter(case, x.device), case.ranks()

    def forward():
        kept = F.dropout(x, case.p) if case.p else x
        y = F.linear(x, weight)
        for j, rows in groups:
            h = F.linear(kept[rows], a[j, : ranks[j]])
            y = y.index_add(0, rows, SCALE * F.linear(h, bt[j, : ranks[j]].t()))
        return y

    return forward


def _multi_bmm(case, x, weight, a, bt):
    """Each row's matrices gathered into a batch: M R (K + N) elements are written and read."""
    ids = case.ids().to(x.device)

    def forward():
        h = torch.bmm(a[ids], x[..., None])
        delta = torch.bmm(bt[ids].transpose(1, 2), h)[..., 0]
        return F.linear(x, weight) + SCALE * delta

    return forward


def _multi_rows(case, x, weight, a, bt):
    """A loop over the rows."""
    ids = case.ids().tolist()

    def forward():
        delta = torch.stack([(a[j] @ row) @ bt[j] for row, j in zip(x, ids, strict=True)])
        return F.linear(x, weight) + SCALE * delta

    return forward


def _multi_base(case, x, weight, a, bt):
    return lambda: F.linear(x, weight)


def _multi_ours(backend: str) -> Contender:
    """The routing is made before, once for all layers of a model."""

    def build(case, x, weight, a, bt):
        G, R = a.shape[:2]
        rank = torch.tensor(case.ranks(), dtype=torch.int32, device=x.device)
        scale = torch.full((G,), SCALE, device=x.device)
        slots = reference.AdapterSlots(a, bt, rank, scale, torch.ones(G, R, device=x.device))
        routing = fl.AdapterRouting(case.ids().to(x.device), G)
        options = {"dropout_p": case.p, "backend": backend}
        return lambda: fl.multi_lora_linear(x, weight, slots, routing, **options)

    return Contender(build, _our_keep, lambda device, case: fl.backends()[backend])


def _few_rows(device, case):
    if case.M > 64 or case.p or case.ragged:
        return "it is a loop for 64 rows at most, without dropout, of one rank"
    return None if case.dtype.itemsize > 2 else "autograd sums its gradients in 16 bits, row by row"


def _multi_stages() -> dict[str, Stage]:
    def llama(rows, groups, **options):
        shapes = (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)
        return [
            MultiCase(M, N, K, G=G, popularity=popularity, dtype=BF16, **options)
            for (N, K), M, (G, popularity) in itertools.product(shapes, rows, groups)
        ]

    mixed = [(64, "distinct"), (64, "zipf"), (8, "uniform"), (1, "identical")]
    square = {"N": 4096, "K": 4096, "dtype": BF16}
    ranks = [
        MultiCase(M, R=R, G=64, popularity="zipf", ragged=ragged, **square)
        for R, ragged in ((64, True), (8, False), (32, False), (64, False), (128, False))
        for M in (64, 4096)
    ]
    # The shapes that SGLang publishes times of: 32 tokens of 8 adapters.
    published = [MultiCase(32, N, K, R=32, dtype=BF16) for N, K in ((24576, 4096), (4096, 12288))]
    cpu = [
        MultiCase(M, n, n, G=G, popularity=popularity)
        for n, M in itertools.product((1024, 4096), (16, 64, 256))
        for G, popularity in ((64, "distinct"), (8, "zipf"), (1, "identical"))
    ]
    return {
        "cpu": Stage([*cpu, MultiCase(256, 1024, 1024, p=0.1)]),
        "cpu-quick": Stage([MultiCase(16, 512, 512), MultiCase(64, 512, 512, popularity="zipf")]),
        "quick": Stage([MultiCase(64, 4096, 4096, G=64, popularity="distinct", dtype=BF16)]),
        "decode": Stage(published + llama((64, 1, 16, 256), mixed), directions=("forward",)),
        "training": Stage(llama((4096, 512, 8192), mixed[1:])),
        "ranks": Stage(ranks),
    }


MULTI_LORA_LINEAR = Op(
    name="multi_lora_linear",
    stages=_multi_stages(),
    tensors=multi_tensors,
    truth=multi_truth,
    flops=multi_flops,
    bytes=multi_bytes,
    floor="linear",
    baseline="adapter loop",
    ours=("torch", "triton", "cuda"),
    contenders={
        "linear": Contender(_multi_base, torch_keep),
        "adapter loop": Contender(_multi_loop, torch_keep),
        "adapter loop again": Contender(_multi_loop, torch_keep),
        "row loop": Contender(_multi_rows, torch_keep, _few_rows),
        "bmm": Contender(
            _multi_bmm,
            torch_keep,
            lambda device, case: "it has no dropout" if case.p else None,
            forward_only=True,
        ),
        "torch": _multi_ours("torch"),
        "triton": _multi_ours("triton"),
        "cuda": _multi_ours("cuda"),
        **_also(MULTI_PEERS),
        **_also(MULTI_BASELINES),
    },
)
# multi_lora_add_: x [M, K], a packed weight [N, K] of q, k and v, their a_slots and bt_slots.


class QkvCase(NamedTuple):
    M: int
    N: int  # of q, k and v together
    K: int
    KV: int  # of k, and of v
    R: int = 16
    G: int = 8
    popularity: str = "uniform"
    p: float = 0.0  # an inference op
    dtype: torch.dtype = torch.float32

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        packed = f"{self.N - 2 * self.KV}+{self.KV}+{self.KV}x{self.K}"
        return f"M={self.M} {packed} r={self.R} {self.G} adapters, {self.popularity} {dtype}"

    def widths(self) -> tuple[int, int, int]:
        return self.N - 2 * self.KV, self.KV, self.KV

    def offsets(self) -> tuple[int, int, int]:
        return 0, self.N - 2 * self.KV, self.N - self.KV

    def ids(self) -> Tensor:
        return MultiCase(self.M, 1, 1, G=self.G, popularity=self.popularity).ids()


def qkv_tensors(case: QkvCase, device: torch.device) -> list[Tensor]:
    """x, the packed weight, and a_slots and bt_slots of q, of k and of v; of N(0, 1)."""
    shapes = [(case.M, case.K), (case.N, case.K)]
    for width in case.widths():
        shapes += [(case.G, case.R, case.K), (case.G, case.R, width)]
    return [torch.randn(shape, device=device, dtype=case.dtype) for shape in shapes]


def qkv_truth(case, x, weight, *slots, keep=None):
    y = F.linear(x, weight)
    pairs = [*zip(slots[::2], slots[1::2], strict=True)]
    for j, rows in _rows_by_adapter(case, x.device):
        parts = [SCALE * (x[rows] @ a[j].t()) @ bt[j] for a, bt in pairs]
        y = y.index_add(0, rows, torch.cat(parts, 1))
    return y


def qkv_flops(case: QkvCase, direction: str) -> int:
    return 2 * case.M * (case.N * case.K + case.R * (3 * case.K + case.N))


def qkv_bytes(case: QkvCase, direction: str) -> int:
    present = len(case.ids().unique())
    adapters = present * case.R * (3 * case.K + case.N)
    elements = case.M * case.K + case.N * case.K + adapters + case.M * case.N
    return elements * case.dtype.itemsize


def _qkv_base(case, x, weight, *slots):
    return lambda: F.linear(x, weight)


def _qkv_loop(case, x, weight, *slots):
    """For each adapter its rows through the matrices of q, of k and of v."""
    groups = _rows_by_adapter(case, x.device)

    def forward():
        y = F.linear(x, weight)
        for offset, a, bt in zip(case.offsets(), slots[::2], slots[1::2], strict=True):
            part = y[:, offset : offset + bt.shape[2]]
            for j, rows in groups:
                h = F.linear(x[rows], a[j])
                part.index_add_(0, rows, F.linear(h, bt[j].t()), alpha=SCALE)
        return y

    return forward


def _qkv_ours(backend: str) -> Contender:
    def build(case, x, weight, *slots):
        like = {"device": x.device}
        rank = torch.full((case.G,), case.R, dtype=torch.int32, **like)
        scale, gate = torch.full((case.G,), SCALE, **like), torch.ones(case.G, case.R, **like)
        pairs = zip(slots[::2], slots[1::2], strict=True)
        banks = [reference.AdapterSlots(a, bt, rank, scale, gate) for a, bt in pairs]
        routing = fl.AdapterRouting(case.ids().to(x.device), case.G)

        def forward():
            y = F.linear(x, weight)
            options = {"out_offset": case.offsets(), "backend": backend}
            return fl.multi_lora_add_(y, x, banks, routing, **options)

        return forward

    return Contender(build, _our_keep, lambda device, case: fl.backends()[backend], True)


def _qkv_stages() -> dict[str, Stage]:
    # What SGLang publishes a time of, and the q, k and v of Llama-3-8B.
    shapes = [{"N": 10240, "KV": 1024, "R": 32}, {"N": 6144, "KV": 1024}]
    decode = [
        QkvCase(M, K=4096, G=G, popularity=popularity, dtype=BF16, **shape)
        for shape in shapes
        for M, G, popularity in ((32, 8, "uniform"), (64, 64, "distinct"), (1, 8, "uniform"))
    ]
    small = [QkvCase(M, 768, 512, 128) for M in (16, 64)]
    stages = {"cpu": small, "cpu-quick": small[:1], "quick": decode[:1], "decode": decode}
    return {name: Stage(cases, directions=("forward",)) for name, cases in stages.items()}


MULTI_LORA_ADD = Op(
    name="multi_lora_add_",
    stages=_qkv_stages(),
    tensors=qkv_tensors,
    truth=qkv_truth,
    flops=qkv_flops,
    bytes=qkv_bytes,
    floor="linear",
    baseline="adapter loop",
    ours=("torch", "triton", "cuda"),
    contenders={
        "linear": Contender(_qkv_base, torch_keep, forward_only=True),
        "adapter loop": Contender(_qkv_loop, torch_keep, forward_only=True),
        "adapter loop again": Contender(_qkv_loop, torch_keep, forward_only=True),
        "torch": _qkv_ours("torch"),
        "triton": _qkv_ours("triton"),
        "cuda": _qkv_ours("cuda"),
    },
)
OPS = {
    op.name: op
    for op in (LORA_LINEAR, LORA_ADD, LORA_LINEAR_GROUP, MULTI_LORA_LINEAR, MULTI_LORA_ADD)
}
