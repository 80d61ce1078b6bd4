"""Every tensor of every op in every layout that torch has: strided, expanded, overlapping,
transposed, or the negative of what its memory holds."""

import functools
from types import SimpleNamespace

import pytest
import torch
from cases import CUDA
from conftest import DEVICE
from fused_lora.triton_kernels import configs

import fused_lora as fl
from fused_lora.testing import assert_accurate, guarded

M, K, N, R, G = 5, 24, 18, 3, 3
V, S = 11, 7  # words, positions


def neg(t: torch.Tensor) -> torch.Tensor:
    """The same values with a negative bit: memory holds the others' sign, two elements apart."""
    found = torch.complex(torch.full_like(t, float("nan")), -t).conj().imag
    assert found.is_neg() and torch.equal(found, t)
    return found


def strided(t: torch.Tensor) -> torch.Tensor:
    """With other numbers, or NaN, between the elements."""
    between = t + 1 if not t.is_floating_point() else torch.full_like(t, float("nan"))
    return torch.stack([between, t], -1).flatten(-2)[..., 1::2]


def expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:1].expand(t.shape)


def overlapping(t: torch.Tensor) -> torch.Tensor:
    """Windows of one vector, one element further each."""
    return guarded((sum(t.shape),), dtype=t.dtype, device=DEVICE).as_strided(t.shape, [1] * t.ndim)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS = {f.__name__: f for f in (strided, expanded, overlapping, transposed, neg)}
SLOTS = {
    "a_slots": (G, R, K), "bt_slots": (G, R, N), "gate": (G, R), "scale": (G,),
}  # fmt: skip
INTEGERS = {
    "rank": [2, 3, 1], "table": [2, 0, 1], "adapter_ids": [0, -1, 1, 2, 1],
    "ids": [[3, 0, 10, 3], [1, 1, 5, 9]], "positions": [0, 3, -1, 6], "tokens": [2, 2, 7, 0, 10],
}  # fmt: skip
LINEAR = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
SECOND = {"weight2": (6, K), "lora_a2": (2, K), "lora_b2": (6, 2), "bias2": (6,), "gate2": (2,)}


def bank_of(t, lib):
    """The slots; those of the reference in the order of the table, which it has not."""
    names = "a_slots", "bt_slots", "rank", "scale", "gate"
    if lib is fl:
        return SimpleNamespace(**{name: t[name] for name in (*names, "table")})
    return fl.reference.AdapterSlots(*(t[name][t["table"].long()] for name in names))


def lora_linear(lib, t, **options):
    five = (t[name] for name in ("x", "weight", "lora_a", "lora_b", "bias"))
    return [lib.lora_linear(*five, gate=t["gate"], scale=0.5, **options)]


def lora_linear_group(lib, t, **options):
    lists = ([t[name], t[f"{name}2"]] for name in ("weight", "lora_a", "lora_b", "bias"))
    gates = [t["gate"], t["gate2"]]
    return lib.lora_linear_group(t["x"], *lists, gates=gates, scales=[0.5, 2.0], **options)


def lora_add(lib, t, **options):
    four = (t[name] for name in ("base_out", "x", "lora_a", "lora_b"))
    return [lib.lora_add(*four, gate=t["gate"], scale=0.5, **options)]


def dora_linear(lib, t, **options):
    six = (t[name] for name in ("x", "weight", "lora_a", "lora_b", "magnitude", "bias"))
    options.pop("dropout_p", None)
    options.pop("seed", None)
    return [lib.dora_linear(*six, scale=0.5, **options)]


def multi_lora_linear(lib, t, **options):
    bank = bank_of(t, lib)
    return [
        lib.multi_lora_linear(t["x"], t["weight"], bank, t["adapter_ids"], t["bias"], **options)
    ]


def lora_embedding(lib, t, **options):
    four = (t[name] for name in ("tokens", "words", "lora_a", "lora_b"))
    return [lib.lora_embedding(*four, scale=0.5, **options)]


def dept_embedding(lib, t, **options):
    five = (t[name] for name in ("ids", "words", "prompt", "lora_a", "lora_b"))
    return [lib.dept_embedding(*five, scale=0.5, positions=t["positions"], **options)]


# The floating tensors of an op, its integers, and what its outputs are like.
OPS = {
    lora_linear: ({**LINEAR, "bias": (N,), "gate": (R,)}, (), [(M, N)]),
    lora_linear_group: (
        {**LINEAR, "bias": (N,), "gate": (R,), **SECOND}, (), [(M, N), (M, 6)],
    ),
    lora_add: (
        {"base_out": (M, N), "x": (M, K), "lora_a": (R, K), "lora_b": (N, R), "gate": (R,)}, (),
        [(M, N)],
    ),
    dora_linear: ({**LINEAR, "magnitude": (N,), "bias": (N,)}, (), [(M, N)]),
    multi_lora_linear: (
        {"x": (M, K), "weight": (N, K), "bias": (N,), **SLOTS}, ("rank", "table", "adapter_ids"),
        [(M, N)],
    ),
    lora_embedding: ({"words": (V, K), "lora_a": (R, V), "lora_b": (K, R)}, ("tokens",), [(M, K)]),
    dept_embedding: (
        {"words": (V, K), "prompt": (2, K), "lora_a": (S, R), "lora_b": (R, K)},
        ("ids", "positions"), [(2, 6, K)],
    ),
}  # fmt: skip
DROPPING = lora_linear, lora_linear_group, lora_add, multi_lora_linear


def cases():
    for op, (shapes, integers, _) in OPS.items():
        for backend in ("triton", "cuda"):
            if backend == "cuda" and op in (lora_embedding, dept_embedding):
                continue
            params = CUDA if backend == "cuda" else pytest.param("triton")
            for name in (*shapes, *integers, "dy"):
                yield pytest.param(
                    op, params.values[0], name, marks=params.marks,
                    id=f"{op.__name__}-{backend}-{name}",
                )  # fmt: skip


def tensors_of(op) -> dict[str, torch.Tensor]:
    shapes, integers, outputs = OPS[op]
    made = {
        name: guarded(shape, device=DEVICE, std=shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }
    for name in integers:
        dtype = torch.int32 if name in ("rank", "table") else torch.int64
        made[name] = torch.tensor(INTEGERS[name], dtype=dtype, device=DEVICE)
    for i, shape in enumerate(outputs):
        made["dy" if i == 0 else f"dy{i}"] = guarded(shape, device=DEVICE)
    return made


def fits(t: torch.Tensor, layout: str) -> bool:
    """A vector cannot be transposed, and integers have no negative bit; nor are windows of random
    numbers ids."""
    if layout == "transposed":
        return t.ndim > 1
    return t.is_floating_point() or layout in ("strided", "expanded")


@pytest.mark.parametrize("op, backend, name", cases())
def test_any_layout_of_any_tensor(op, backend, name, monkeypatch):
    made = tensors_of(op)
    monkeypatch.setattr(configs, "DECODE_ROWS", 0)
    for layout in filter(functools.partial(fits, made[name]), LAYOUTS):
        if name == "table" and layout == "expanded":
            continue  # one slot for all ids: that has no gradient, and is below
        for p in (0.0, 0.3) if op in DROPPING and layout == "strided" else (0.0,):
            check(op, backend, {**made, name: LAYOUTS[layout](made[name])}, p)


def check(op, backend, tensors, p=0.0) -> None:
    shapes, integers, outputs = OPS[op]
    constant = {"scale"} if op is multi_lora_linear else set()
    trained = [name for name in shapes if name not in constant]
    dys = [name for name in tensors if name.startswith("dy")]
    floats = [*shapes, *dys]
    options = {"dropout_p": p, "seed": 5} if op in DROPPING and p else {}

    def run(lib, *values, **others):
        t = dict(zip(floats, values, strict=True)) | {name: tensors[name] for name in integers}
        ys = op(lib, t, **options, **others)
        return [*ys, *torch.autograd.grad(ys, [t[n] for n in trained], [t[n] for n in dys])]

    inputs = [tensors[n].detach().requires_grad_(n in trained) for n in floats]
    assert [t.is_neg() for t in inputs] == [tensors[n].is_neg() for n in floats]
    names = [*(f"y{i}" for i in range(len(outputs))), *(f"d{n}" for n in trained)]
    ours = run(fl, *inputs, backend=backend)
    assert_accurate(names, ours, functools.partial(run, fl.reference), inputs)


@pytest.mark.parametrize("backend", ["torch", "triton", CUDA])
@pytest.mark.parametrize("decode_rows", [0, 64], ids=["tiles", "decode"])
@pytest.mark.parametrize("name", ["y", "x", *SLOTS, "rank", "table", "adapter_ids"])
def test_adding_with_any_layout(backend, decode_rows, name, monkeypatch):
    monkeypatch.setattr(configs, "DECODE_ROWS", decode_rows)
    made = {**tensors_of(multi_lora_linear), "y": guarded((M, N + 3), device=DEVICE)}
    for layout in filter(functools.partial(fits, made[name]), LAYOUTS):
        if name == "y" and layout in ("expanded", "overlapping"):
            continue
        t = {**made, name: LAYOUTS[layout](made[name])}
        before, ids = t["y"].clone(), t["adapter_ids"]
        y = fl.multi_lora_add_(t["y"], t["x"], bank_of(t, fl), ids, out_offset=2, backend=backend)
        floats = ["x", *SLOTS]

        def plain(base, *values, t=t, floats=floats):
            t = {**t, **dict(zip(floats, values, strict=True))}
            bank, out = bank_of(t, fl.reference), base.clone()
            return [fl.reference.multi_lora_add_(out, t["x"], bank, t["adapter_ids"], out_offset=2)]

        assert y is t["y"]
        assert_accurate(["y"], [y], plain, [before, *(t[n] for n in floats)])
        assert torch.equal(y[:, :2], before[:, :2]) and torch.equal(y[:, -1], before[:, -1])


@pytest.mark.parametrize("backend", ["torch", "triton", CUDA])
@pytest.mark.parametrize(
    "strides, shared",
    [
        ((0, 1), True), ((1, 0), True), ((1, 1), True), ((4, 6), True), ((N - 1, 1), True),
        ((N, 1), False), ((1, M), False), ((2 * N + 1, 2), False), ((3, 2 * M + 1), False),
    ],
    ids=str,
)  # fmt: skip
def test_adding_to_elements_that_share_memory_is_refused(backend, strides, shared):
    t = tensors_of(multi_lora_linear)
    memory = torch.zeros(500, device=DEVICE)
    y = memory.as_strided((M, N), strides)
    add = functools.partial(
        fl.multi_lora_add_, y, t["x"], bank_of(t, fl), t["adapter_ids"], backend=backend
    )
    places = torch.arange(500).as_strided((M, N), strides)
    assert shared == (places.unique().numel() < places.numel())
    if shared:
        with pytest.raises(RuntimeError, match="refers to a single memory location"):
            add()
        assert not memory.any()
    else:
        assert add() is y and memory.any()
