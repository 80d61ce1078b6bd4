"""What torch does to functions, done to every op and module: torch.compile, torch.export, autocast,
activation checkpointing, CUDA graphs, forward-mode AD, meta tensors.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fused_lora as fl
from fused_lora.reference import AdapterSlots
from fused_lora.testing import assert_accurate

K, N, R, V = 12, 9, 3, 20
SCALE = 1.3

Tensors = dict[str, torch.Tensor]


class Op(NamedTuple):
    """How an op is called: its tensors by name for M rows, and the call of them.

    rows: the tensors whose first size is M. fixed: floating tensors that have no gradient.
    """

    make: Callable[[int], Tensors]
    call: Callable[..., torch.Tensor]
    rows: tuple[str, ...]
    dropout: bool = True
    fixed: tuple[str, ...] = ()


def draw(**shapes) -> Tensors:
    """N(0, 1), and weights of variance 1 / K."""
    tensors = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    return {n: t / t.shape[-1] ** 0.5 if "weight" in n else t for n, t in tensors.items()}


def adapter(i="") -> dict[str, tuple[int, ...]]:
    return {f"lora_a{i}": (R, K), f"lora_b{i}": (N, R), f"gate{i}": (R,)}


def group(t: Tensors, of=fl, scale=SCALE, **options) -> torch.Tensor:
    names = "weight", "lora_a", "lora_b", "bias"
    weights, lora_as, lora_bs, biases = ([t.get(f"{n}{i}") for i in range(3)] for n in names)
    gates = [t.get(f"gate{i}") for i in range(3)]
    options |= {"scales": [scale, 1.0, 0.5], "gates": gates}
    return torch.cat(of.lora_linear_group(t["x"], weights, lora_as, lora_bs, biases, **options), -1)


def many(M: int) -> Tensors:
    tensors = draw(x=(M, K), weight=(N, K), bias=(N,), a_slots=(3, 4, K), bt_slots=(3, 4, N))
    tensors |= draw(gate=(3, 4)) | {"scale": torch.tensor([0.5, 1.0, 2.0], device=DEVICE)}
    tensors["rank"] = torch.tensor([1, 3, 4], dtype=torch.int32, device=DEVICE)
    return tensors | {"ids": torch.arange(M, device=DEVICE) % 4 - 1}


def multi(t: Tensors, of=fl, **options) -> torch.Tensor:
    slots = AdapterSlots(t["a_slots"], t["bt_slots"], t["rank"], t["scale"], t["gate"])
    return of.multi_lora_linear(t["x"], t["weight"], slots, t["ids"], t["bias"], **options)


def ids(M: int) -> Tensors:
    return {"ids": torch.randint(V, (M, 7), device=DEVICE)}


OPS = {
    "lora_linear": Op(
        lambda M: draw(x=(M, K), weight=(N, K), bias=(N,), **adapter()),
        lambda t, of=fl, scale=SCALE, **options: of.lora_linear(
            *(t[n] for n in ("x", "weight", "lora_a", "lora_b", "bias")),
            gate=t["gate"],
            scale=scale,
            **options,
        ),
        ("x",),
    ),
    "lora_linear_group": Op(
        # q with all, k without an adapter, v without a bias and a gate
        lambda M: draw(
            x=(M, K),
            **{f"weight{i}": (N, K) for i in range(3)},
            **{"bias0": (N,), "bias1": (N,)},
            **adapter(0),
            **{"lora_a2": (R, K), "lora_b2": (N, R)},
        ),
        group,
        ("x",),
    ),
    "lora_add": Op(
        lambda M: draw(base_out=(M, N), x=(M, K), **adapter()),
        lambda t, of=fl, scale=SCALE, **options: of.lora_add(
            t["base_out"], t["x"], t["lora_a"], t["lora_b"], gate=t["gate"], scale=scale, **options
        ),
        ("base_out", "x"),
    ),
    "multi_lora_linear": Op(many, multi, ("x", "ids"), fixed=("scale",)),
    "lora_embedding": Op(
        lambda M: ids(M) | draw(weight=(V, K), lora_a=(R, V), lora_b=(K, R)),
        lambda t, of=fl, scale=SCALE: of.lora_embedding(
            t["ids"], t["weight"], t["lora_a"], t["lora_b"], scale=scale
        ),
        ("ids",),
        dropout=False,
    ),
    "dept_embedding": Op(
        lambda M: ids(M) | draw(weight=(V, K), prompt=(2, K), lora_a=(5, R), lora_b=(R, K)),
        lambda t, of=fl, scale=SCALE: of.dept_embedding(
            t["ids"], t["weight"], t["prompt"], t["lora_a"], t["lora_b"], scale=scale
        ),
        ("ids",),
        dropout=False,
    ),
}
every_op = pytest.mark.parametrize("name", OPS)


def floating(op: Op, tensors: Tensors) -> list[str]:
    return [n for n, t in tensors.items() if t.is_floating_point() and n not in op.fixed]


def leaves(op: Op, tensors: Tensors) -> Tensors:
    wanted = floating(op, tensors)
    return {n: t.detach().requires_grad_(n in wanted) for n, t in tensors.items()}


def outcome(op: Op, fn, tensors: Tensors, dy=None, grad=torch.autograd.grad, **options) -> Tensors:
    """y and the gradient of every floating tensor; without a dy for y's cosine."""
    y = fn(tensors, **options)
    names = floating(op, tensors)
    grads = grad(y, [tensors[n] for n in names], y.detach().cos() if dy is None else dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}


def by_backward(y, inputs, dy):
    """As torch.autograd.grad, which a reentrant checkpoint does not have."""
    for t in inputs:
        t.grad = None
    y.backward(dy)
    return [t.grad for t in inputs]


def assert_equal(ours: Tensors, want: Tensors) -> None:
    assert ours.keys() == want.keys()
    wrong = [name for name in want if not torch.equal(ours[name], want[name])]
    assert not wrong


def dropping(op: Op, **seed) -> dict:
    return {"dropout_p": 0.4, **seed} if op.dropout else {}


# torch.compile and torch.export


@every_op
def test_one_graph_for_every_number_of_rows(name):
    op = OPS[name]
    torch._dynamo.reset()
    counters.clear()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.call, backend=count, fullgraph=True)
    options = dropping(op, seed=3)
    for M in range(2, 12):
        tensors = leaves(op, op.make(M))
        assert_equal(
            outcome(op, compiled, tensors, **options), outcome(op, op.call, tensors, **options)
        )
    assert count.frame_count <= 2 and not counters["graph_break"]


@pytest.mark.slow
@every_op
def test_inductor(name):
    """The default compiler, which fuses what is around the op into kernels of its own."""
    op = OPS[name]
    torch._dynamo.reset()
    options = dropping(op, seed=3)

    def around(tensors, **options):
        moved = {
            n: t.sin() if n in op.rows and t.is_floating_point() else t for n, t in tensors.items()
        }
        return op.call(moved, **options).tanh()

    compiled = torch.compile(around, fullgraph=True, dynamic=True)
    for M in (5, 8):
        tensors = leaves(op, op.make(M))
        ours = outcome(op, compiled, tensors, **options)
        want = outcome(op, around, tensors, **options)
        for key, t in want.items():
            torch.testing.assert_close(ours[key], t, rtol=1e-5, atol=1e-5, msg=key)


@every_op
def test_export_keeps_one_op_for_every_number_of_rows(name):
    op = OPS[name]

    class Model(torch.nn.Module):
        def forward(self, tensors):
            return op.call(tensors)

    tensors, rows = op.make(5), torch.export.Dim("M")
    shapes = {n: {0: rows} if n in op.rows else {} for n in tensors}
    program = torch.export.export(Model(), (tensors,), dynamic_shapes=(shapes,))
    ours = [n for n in program.graph.nodes if str(n.target).startswith("fused_lora.")]
    assert [str(n.target) for n in ours] == [f"fused_lora.{name}.default"]
    again = op.make(17)
    assert torch.equal(program.module()(again), op.call(again))


# Autocast


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_under_autocast(name, dtype):
    """Held to the reference under the same autocast; an embedding stays fp32."""
    op = OPS[name]
    tensors = leaves(op, op.make(33))
    kept = torch.float32 if name.endswith("embedding") else dtype
    floats = {n: t for n, t in tensors.items() if t.is_floating_point()}
    dy = torch.randn_like(op.call(tensors)).to(kept)

    def run(of, given, dy):
        with torch.autocast(DEVICE, dtype=dtype):
            y = op.call({**tensors, **given}, of=of)
        wanted = [given[n] for n in floating(op, given)]
        y = y if dy.dtype == torch.float64 else y.to(dy.dtype)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    def plain(*inputs):
        *given, dy = inputs
        return run(fl.reference, dict(zip(floats, given, strict=True)), dy)

    with torch.autocast(DEVICE, dtype=dtype):
        assert op.call(tensors).dtype == kept
    ours = run(fl, floats, dy)
    assert all(g.dtype == torch.float32 for g in ours[1:])
    names = ["y", *(f"d{n}" for n in floating(op, tensors))]
    assert_accurate(names, ours, plain, [*floats.values(), dy])


# Activation checkpointing


def block_of(op: Op, tensors: Tensors):
    """What a checkpoint runs: a function of the tensors in their order, whose masks are drawn."""

    def block(*inputs):
        return op.call(dict(zip(tensors, inputs, strict=True)), **dropping(op)).tanh()

    return block


def checkpointed(op: Op, tensors: Tensors, run=None) -> Tensors:
    run = run or (lambda block, *inputs: block(*inputs))
    torch.manual_seed(3)
    return outcome(op, lambda t: run(block_of(op, t), *t.values()), tensors, grad=by_backward)


@every_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_draws_the_same_masks_again(name, reentrant):
    op = OPS[name]
    tensors = leaves(op, op.make(6))

    def run(block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=reentrant)

    assert_equal(checkpointed(op, tensors, run), checkpointed(op, tensors))


class Calls(TorchDispatchMode):
    """Counts how often an op is computed."""

    def __init__(self, op) -> None:
        super().__init__()
        self.op, self.count = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.op
        return func(*args, **(kwargs or {}))


@every_op
@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_saves_or_computes_the_op_again(name, saved):
    op, target = OPS[name], getattr(torch.ops.fused_lora, name).default
    tensors = leaves(op, op.make(6))

    def policy(context, func, *args, **kwargs):
        keep = saved and func is target
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def run(block, *inputs):
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    with Calls(target) as calls:
        ours = checkpointed(op, tensors, run)
    assert calls.count == (1 if saved else 2)
    assert_equal(ours, checkpointed(op, tensors))
    assert_equal(checkpointed(op, tensors, run), ours)  # without anyone looking on


# CUDA graphs


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@every_op
def test_replays_equal_eager(name):
    """Forward and backward captured once, replayed with other values and other rows."""
    op = OPS[name]
    tensors, options = leaves(op, op.make(33)), {}
    if op.dropout:
        options = dropping(op, seed=torch.tensor([1], device=DEVICE))
    dy = torch.randn_like(op.call(tensors))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            outcome(op, op.call, tensors, dy, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(op, op.call, tensors, dy, **options)
    for _ in range(20):
        with torch.no_grad():
            for n in floating(op, tensors):
                tensors[n].copy_(torch.randn_like(tensors[n]))
        graph.replay()
        assert_equal(
            {n: t.clone() for n, t in captured.items()},
            outcome(op, op.call, tensors, dy, **options),
        )


# Forward-mode AD


@every_op
def test_no_tensor_takes_a_tangent(name):
    """A silent zero tangent would be a wrong derivative: each is refused by its name."""
    op = OPS[name]
    tensors = op.make(5)
    for n in [n for n, t in tensors.items() if t.is_floating_point()]:
        for wants in (False, True):
            with forward_ad.dual_level():
                given = {
                    m: t.detach().requires_grad_(wants and m in floating(op, tensors))
                    for m, t in tensors.items()
                }
                given[n] = forward_ad.make_dual(given[n], torch.ones_like(given[n]))
                with pytest.raises(NotImplementedError, match="carries a forward-mode tangent"):
                    op.call(given)

        def fn(t, n=n):
            return op.call({**tensors, n: t})

        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(fn, (tensors[n],), (tensors[n],))


# torch.func


every_transformable = pytest.mark.parametrize("name", [n for n in OPS if n != "multi_lora_linear"])


@every_transformable
@pytest.mark.parametrize("compiled", [False, True])
def test_func_grad_is_the_gradient(name, compiled):
    op = OPS[name]
    # The reference makes its masks in slabs, which a compiler does not trace.
    tensors, options = op.make(5), {} if compiled else dropping(op, seed=3)
    names = floating(op, tensors)

    def loss(given):
        return op.call({**tensors, **given}, **options).square().sum()

    y = op.call(leaves_of := leaves(op, tensors), **options).square().sum()
    want = torch.autograd.grad(y, [leaves_of[n] for n in names])
    grad = torch.func.grad(loss)
    if compiled:
        torch._dynamo.reset()
        grad = torch.compile(grad, backend="aot_eager", fullgraph=True)
    found = grad({n: tensors[n] for n in names})
    torch.testing.assert_close([found[n] for n in names], [*want], rtol=1e-4, atol=1e-4)


@every_transformable
def test_vmap_and_gradients_of_each_sample(name):
    op = OPS[name]
    tensors = op.make(5)
    rows = {n: tensors[n] for n in op.rows}
    others = {n: t for n, t in tensors.items() if n not in rows and t.is_floating_point()}

    def one(others, row):
        return op.call(others | {n: t[None] for n, t in row.items()})[0]

    ys = torch.vmap(one, in_dims=(None, 0))(others, rows)
    torch.testing.assert_close(ys, op.call(tensors))
    of_each = torch.func.grad(lambda others, row: one(others, row).square().sum())
    grads = torch.vmap(of_each, in_dims=(None, 0))(others, rows)
    for i in range(5):
        want = of_each(others, {n: t[i] for n, t in rows.items()})
        found = {n: g[i] for n, g in grads.items()}
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_func_grad_of_dora():
    tensors = draw(x=(5, K), weight=(N, K), lora_a=(R, K), lora_b=(N, R), magnitude=(N,))

    def loss(tensors):
        return fl.dora_linear(**tensors, scale=SCALE).square().sum()

    given = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    want = torch.autograd.grad(loss(given), [*given.values()])
    found = torch.func.grad(loss)(tensors)
    torch.testing.assert_close([*found.values()], [*want], rtol=1e-4, atol=1e-4)


@every_op
def test_a_kernel_is_not_transformed(name):
    """One sentence, and for many adapters whatever the backend."""
    op = OPS[name]
    tensors = op.make(5)
    moved = floating(op, tensors)[0]
    backends = ["torch", "triton"] if name == "multi_lora_linear" else ["triton"]
    for backend in backends:
        with fl.use_backend(backend):
            for fn in (
                lambda t: op.call({**tensors, moved: t}),
                lambda t: op.call(tensors) + t.sum(),
            ):
                with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
                    torch.func.grad(lambda t, fn=fn: fn(t).sum())(tensors[moved])


def test_multi_lora_add_is_not_transformed():
    t = many(5)
    slots = AdapterSlots(t["a_slots"], t["bt_slots"], t["rank"], t["scale"], t["gate"])
    with pytest.raises(
        NotImplementedError, match=r"multi_lora_add_ has no transforms of torch\.fun"
    ):
        torch.vmap(lambda y: fl.multi_lora_add_(y, t["x"], slots, t["ids"]))(torch.ones(2, 5, N))


# A default device, on which nothing may be made that belongs beside the arguments


@every_op
def test_a_default_device_changes_nothing(name):
    op = OPS[name]
    for options in ({}, dropping(op, seed=3)):
        tensors = leaves(op, op.make(40))
        want = outcome(op, op.call, tensors, **options)
        with torch.device("meta"):
            assert_equal(outcome(op, op.call, tensors, **options), want)


def test_gates_and_folders_under_a_default_device(tmp_path):
    gates = torch.tensor([1.0, -0.5, 0.1], device=DEVICE)
    layer = torch.nn.Sequential(torch.nn.Linear(K, N, device=DEVICE))
    layers = [copy.deepcopy(layer) for _ in range(3)]
    config = fl.LoRAConfig(target_modules=["0"], init_lora_weights=False, gate=True)
    words = torch.nn.Embedding(V, K, device=DEVICE)
    with torch.device("meta"):
        fl.optim.soft_threshold_(gates, 0.25)
        assert fl.why("soft_threshold_", [], 0.25)["torch"] is None
        assert fl.backends()["torch"] is None
        model = fl.inject(layers[0], config)
        fl.save_adapter(model, tmp_path)
        fl.load_adapter(layers[1], tmp_path)
        store = fl.AdapterStore(layers[2], 2, 8, target_modules=["0"])
        store.load("a", tmp_path)
        x = torch.ones(3, K, device=DEVICE)
        with store.route(["a", None, "a"]):
            served = layers[2](x)
        prompt = fl.nn.DePTEmbedding.from_embedding(words, 3, 8, 2, prompt_init=[4, 5]).prompt
    assert gates.tolist() == [0.75, -0.25, 0.0]
    assert torch.equal(layers[1](x), model(x))
    torch.testing.assert_close(served[::2], model(x)[::2])
    assert torch.equal(prompt, words.weight[[4, 5, 4]])


# The scale


@pytest.mark.parametrize("name", [n for n in OPS if n != "multi_lora_linear"])
@pytest.mark.parametrize("masters", [False, True])
def test_a_float64_scale_is_exact_in_fp64(name, masters):
    """A tensor gives what its number gives, to the last digits."""
    op = OPS[name]
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in op.make(5).items()}
    if masters:
        tensors |= {n: t.float() for n, t in tensors.items() if n.startswith(("lora", "gate"))}
    scale = torch.tensor(1 / 3, dtype=torch.float64, device=DEVICE)
    ours, want = op.call(tensors, scale=scale), op.call(tensors, scale=1 / 3)
    torch.testing.assert_close(ours, want, rtol=1e-14, atol=1e-14)


def test_a_scale_is_not_rounded_with_a_gate_in_bf16():
    values = {"x": 1.125, "weight": 0.0, "lora_a": 1.0, "lora_b": 1.0}
    tensors = [torch.full((1, 1), v, dtype=torch.bfloat16, device=DEVICE) for v in values.values()]
    gate = torch.full((1,), 1.25, dtype=torch.bfloat16, device=DEVICE)
    y = fl.lora_linear(*tensors, scale=torch.tensor(1.13, device=DEVICE), gate=gate)
    assert y.item() == torch.tensor(1.125 * 1.25 * 1.13).bfloat16().item()


@pytest.mark.parametrize("name", [n for n in OPS if n != "multi_lora_linear"])
@pytest.mark.parametrize(
    "scale", [1e39, -1e39, 10**400, float("inf")], ids=["1e39", "-", "int", "inf"]
)
def test_a_scale_is_a_number_in_fp32(name, scale):
    op = OPS[name]
    for dtype in (torch.float32, torch.float64):
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in op.make(5).items()}
        with pytest.raises(ValueError, match="must be finite in fp32, got"):
            op.call(tensors, scale=scale)


def test_a_bank_takes_a_number_in_fp32():
    bank = fl.AdapterBank(K, N, 2, R, device=DEVICE)
    with pytest.raises(ValueError, match="scale must be finite in fp32"):
        bank.add("a", torch.ones(R, K), torch.ones(N, R), scale=1e39)


# Meta tensors, and modules that are built of them


@pytest.mark.parametrize("name", [n for n in OPS if n != "multi_lora_linear"])
def test_no_scale_takes_a_tangent(name):
    tensors, scale = OPS[name].make(5), torch.tensor(2.0, device=DEVICE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scale, torch.ones_like(scale))
        with pytest.raises(NotImplementedError, match="carries a forward-mode tangent"):
            OPS[name].call(tensors, scale=dual)


@every_op
def test_meta_tensors_give_meta_results(name):
    op = OPS[name]
    real = outcome(op, op.call, leaves(op, op.make(5)), **dropping(op))
    meta = leaves(op, {n: t.to("meta") for n, t in op.make(5).items()})
    for options in ({}, dropping(op)):
        found = outcome(op, op.call, meta, **options)
        assert all(t.is_meta for t in found.values())
        form = lambda t: (t.shape, t.dtype)  # noqa: E731
        assert {n: form(t) for n, t in found.items()} == {n: form(t) for n, t in real.items()}


ROWS = torch.arange(6)[:, None] * torch.linspace(-1, 1, K)
IDS = torch.arange(6).reshape(2, 3)
# How a module is made on a device, and what goes into it.
MODULES = {
    "LoRALinear": (lambda device: fl.nn.LoRALinear(K, N, device=device, init=False), ROWS),
    "SoRALinear": (lambda device: fl.nn.SoRALinear(K, N, device=device, init=False), ROWS),
    "AdaLoRALinear": (lambda device: fl.nn.AdaLoRALinear(K, N, device=device, init=False), ROWS),
    "LoRAAdapter": (
        lambda device: fl.nn.LoRAAdapter(
            torch.nn.Linear(K, N, device=device), init=False, gate=True
        ),
        ROWS,
    ),
    "MultiLoRALinear": (
        lambda device: fl.nn.MultiLoRALinear(K, N, device=device, max_adapters=2, max_rank=R),
        ROWS,
    ),
    "LoRAEmbedding": (lambda device: fl.nn.LoRAEmbedding(V, K, device=device, init=False), IDS),
    "DePTEmbedding": (
        lambda device: fl.nn.DePTEmbedding(
            V, K, device=device, prompt_length=2, max_length=5, r=R, init=False
        ),
        IDS,
    ),
}
every_module = pytest.mark.parametrize("make, x", MODULES.values(), ids=MODULES)


@every_module
def test_modules_are_built_on_meta_and_filled_later(make, x):
    real, meta, x = make(DEVICE), make("meta"), x.to(DEVICE)
    want = real(x)
    y = meta(x.to("meta"))
    assert y.is_meta and y.shape == want.shape and all(p.is_meta for p in meta.parameters())
    filled = meta.to_empty(device=DEVICE)
    filled.load_state_dict(real.state_dict())
    assert torch.equal(filled(x), want)


@pytest.mark.parametrize("name", ["MultiLoRALinear", "LoRAEmbedding", "DePTEmbedding"])
def is_trained(name: str) -> bool:
    return name.startswith(("lora_a", "lora_b", "gate", "prompt"))


@every_module
def test_reset_parameters_draws_what_is_trained_alone(make, x):
    layer = make(DEVICE)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.reset_parameters()
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]) != is_trained(name)
    if isinstance(layer, fl.nn.MultiLoRALinear):
        layer.bank.add("a", torch.ones(R, K), torch.ones(N, R), scale=1.0)
        layer.reset_parameters()
        assert not len(layer.bank) and not layer.bank.rank.any()


@every_module
@pytest.mark.parametrize("by", ["loading the base", "reset_parameters"])
def test_the_adapter_of_what_comes_from_meta_is_drawn(make, x, by):
    real = make(DEVICE)
    with torch.device("meta"):
        layer = make(None)
    layer.to_empty(device=DEVICE)
    base = {n: t for n, t in real.state_dict().items() if not is_trained(n)}
    if by == "reset_parameters":
        layer.reset_parameters()
    layer.load_state_dict(base, strict=False)
    if by == "reset_parameters":
        layer.reset_parameters()
    found = layer.state_dict()
    assert all(t.isfinite().all() for t in found.values())
    assert all(torch.equal(found[n], t) for n, t in base.items())


def test_a_prompt_of_words_is_nan_until_there_are_words():
    layer = fl.nn.DePTEmbedding(V, K, device="meta", prompt_length=2, max_length=5, r=R)
    layer.to_empty(device=DEVICE)
    assert layer.prompt.isnan().all()
    words = torch.randn(V, K, device=DEVICE)
    layer.load_state_dict({"weight": words, "prompt": torch.ones(2, K)}, strict=False)
    assert (layer.prompt == 1).all()
    layer.load_state_dict({"weight": words}, strict=False)
    assert (layer.prompt == 1).all()


def test_the_bank_of_a_store_is_not_emptied_behind_it():
    model = torch.nn.Sequential(torch.nn.Linear(K, N, device=DEVICE))
    store = fl.AdapterStore(model, 2, R, target_modules=["0"])
    model[0].reset_parameters()
    store.add("a", {"0": (torch.ones(R, K), torch.ones(N, R), 1.0, None)})
    with pytest.raises(RuntimeError, match=r"adapters \['a'\] belong to an AdapterStore"):
        model[0].reset_parameters()
    assert model[0].bank.names == store.names == ["a"]


@pytest.mark.parametrize("name", ["MultiLoRALinear", "LoRAEmbedding", "DePTEmbedding"])
def test_modules_compile_for_every_number_of_rows(name):
    make, x = MODULES[name]
    torch._dynamo.reset()
    counters.clear()
    layer, count = make(DEVICE), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    for M in range(2, 12):
        rows = x[torch.arange(M) % len(x)].to(DEVICE)
        ours, want = compiled(rows), layer(rows)
        assert torch.equal(ours, want)
        if trained:
            grads = [torch.autograd.grad(y.square().sum(), trained) for y in (ours, want)]
            assert all(torch.equal(u, v) for u, v in zip(*grads, strict=True))
    assert count.frame_count <= 2 and not counters["graph_break"]


def test_a_bank_that_is_built_on_meta_serves_once_it_is_filled():
    make, x = MODULES["MultiLoRALinear"]
    real, x = make(DEVICE), x.to(DEVICE)
    filled = make("meta").to_empty(device=DEVICE)
    filled.load_state_dict(real.state_dict())
    ids = torch.tensor([0, -1, 1, 0, 1, -1], device=DEVICE)
    assert torch.equal(filled(x, ids), real(x))  # nothing is in it
    assert torch.equal(filled.bank.a_slots, real.bank.a_slots)  # and nothing undefined
    for layer in (real, filled):
        torch.manual_seed(1)
        layer.bank.add("a", torch.randn(2, K), torch.randn(N, 2), scale=0.5)
    assert torch.equal(filled(x, ids), real(x, ids)) and not torch.equal(real(x, ids), real(x))


def test_adapters_that_were_added_on_meta_are_not_served():
    make, _ = MODULES["MultiLoRALinear"]
    layer = make("meta")
    layer.bank.add("a", torch.empty(2, K, device="meta"), torch.empty(N, 2, device="meta"), scale=1)
    with pytest.raises(RuntimeError, match=r"adapters \['a'\] were added on the meta device"):
        layer.to_empty(device=DEVICE)
