"""What the ranks of test_distributed.py run, without what only the tests need.

Weights, inputs and gradients are small integers in float64: every sum is exact, in any order, so
what a layer in parts computes equals what one process computes, bit for bit.
"""

import contextlib
import copy
import re
from pathlib import Path

import seeds  # noqa: F401
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import fused_lora as fl
from fused_lora.integrations.distributed import ColwiseLoRAParallel, RowwiseLoRAParallel
from fused_lora.nn.sharded import whole
from fused_lora.optim.gates import gate_counts

DIM, WIDE, R = 32, 64, 4


def integers(*shape: int, most: int = 2) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape).double()


class MLP(torch.nn.Module):
    """down(relu(gate(x)) * up(x)): the linear layers of a Llama's, and exact."""

    def __init__(self, bias: bool):
        super().__init__()
        self.gate_proj = torch.nn.Linear(DIM, WIDE, bias)
        self.up_proj = torch.nn.Linear(DIM, WIDE, bias)
        self.down_proj = torch.nn.Linear(WIDE, DIM, bias)

    def forward(self, x):
        return self.down_proj(F.relu(self.gate_proj(x)) * self.up_proj(x))


class Attention(torch.nn.Module):
    """Without softmax, which is not exact: (q k^T) v in heads of 8, as many as q_proj gives."""

    def __init__(self, bias: bool):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            torch.nn.Linear(DIM, DIM, bias) for _ in range(4)
        )

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (-1, 8)).transpose(-2, -3)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj((q @ k.mT @ v).transpose(-2, -3).flatten(-2))


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(MLP(False) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


BLOCKS = {"mlp": MLP, "attention": Attention}


def adapted(kind: str, gate=False, p=0.0, bias="none", adalora=False) -> torch.nn.Module:
    """A block with adapters in all its layers, the same on every rank. Gates are float64 too."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({kind: BLOCKS[kind](bias != "none")}).double()
    config = {"gate": gate, "adalora": adalora, "lora_dropout": p, "bias": bias}
    config |= {"r": R, "lora_alpha": 2 * R, "init_lora_weights": False}
    fl.inject(model, fl.LoRAConfig(target_modules="all-linear", **config))
    if gate or adalora:
        for layer in model[kind].children():
            layer.gate = torch.nn.Parameter(layer.gate.double())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(*parameter.shape, most=1))
    return model[kind]


def plan(kind: str, sequence: bool = False) -> dict:
    """Column-wise, then row-wise. sequence: between blocks each rank has a part of the sequence."""
    across = {"input_layouts": Shard(1)} if sequence else {}
    onward = {"output_layouts": Shard(1)} if sequence else {}
    wide = {"mlp": ["gate_proj", "up_proj"], "attention": ["q_proj", "k_proj", "v_proj"]}[kind]
    last = {"mlp": "down_proj", "attention": "o_proj"}[kind]
    styles = {name: ColwiseLoRAParallel(**across) for name in wide}
    return {**styles, last: RowwiseLoRAParallel(**onward)}


def equal(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape, f"{name}: shape {ours.shape}, want {theirs.shape}"
    assert torch.equal(ours, theirs), f"{name}: {(ours != theirs).sum()} elements differ"


def equal_gradients(model: torch.nn.Module, alone: torch.nn.Module) -> None:
    of = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        if of[name].grad is None:
            assert parameter.grad is None, f"{name} has a gradient"
        else:
            assert of[name].grad.any(), f"{name}: its gradient is zero, and compares nothing"
            equal(f"d {name}", whole(parameter.grad), of[name].grad)


def seeded(seed: int) -> None:
    """As users may: the generators of the ranks differ, and only the first one's is known."""
    torch.manual_seed(seed + 1000 * dist.get_rank())


def tensor_parallel(kind: str, sequence: bool = False, **options) -> None:
    """Loss, gradients of the input and of every parameter equal one process's."""
    alone = adapted(kind, **options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(copy.deepcopy(alone), mesh, plan(kind, sequence))
    names = {type(m).__name__ for m in model.children()}
    assert names == {f"Sharded{type(m).__name__}" for m in alone.children()}, names
    x, dy = integers(2, 8, DIM), integers(2, 8, DIM)
    torch.manual_seed(7)
    x_alone = x.clone().requires_grad_()
    y_alone = alone(x_alone)
    y_alone.backward(dy)
    seeded(7)

    def mine(t):
        return t.chunk(mesh.size(), 1)[mesh.get_local_rank()] if sequence else t

    x = mine(x).clone().requires_grad_()
    y = model(x)
    equal("y", y, mine(y_alone))
    y.backward(mine(dy))
    equal("dx", x.grad, mine(x_alone.grad))
    equal_gradients(model, alone)


def one_layer_between_torchs_own() -> None:
    """Layers of torch's styles hand on DTensors, and tensors that are still under way."""
    torch.manual_seed(0)
    alone = torch.nn.Sequential(*(torch.nn.Linear(DIM, DIM) for _ in range(4))).double()
    fl.inject(alone, fl.LoRAConfig(target_modules=["1", "2"], r=R, init_lora_weights=False))
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.copy_(integers(*parameter.shape, most=1))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    styles = [
        RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        ColwiseLoRAParallel(use_local_output=False),
        RowwiseLoRAParallel(),
        ColwiseParallel(output_layouts=Replicate()),
    ]
    model = parallelize_module(
        copy.deepcopy(alone), mesh, {str(i): style for i, style in enumerate(styles)}
    )
    x = integers(8, DIM)
    x_alone, x = x.clone().requires_grad_(), x.requires_grad_()
    y_alone, y = alone(x_alone), model(x)
    equal("y", y + 0, y_alone)
    for out in (y_alone, y):
        out.sum().backward()
    equal("dx", x.grad + 0, x_alone.grad)
    equal_gradients(model, alone)


def checkpointed() -> None:
    """An activation checkpoint runs the layers again under the same masks."""
    alone = adapted("mlp", p=0.5)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(copy.deepcopy(alone), mesh, plan("mlp"))
    x = integers(8, DIM)
    torch.manual_seed(7)
    alone(x).sum().backward()
    seeded(7)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    equal_gradients(model, alone)


def compiled() -> None:
    """torch.compile takes a sharded block whole."""
    alone = adapted("mlp", gate=True, p=0.5)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(copy.deepcopy(alone), mesh, plan("mlp"))
    x = integers(8, DIM)
    torch.manual_seed(7)
    alone(x).sum().backward()
    seeded(7)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    equal_gradients(model, alone)


def refusals() -> dict[str, str]:
    """{what: the error of it}, of the styles and of what takes no sharded layer."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))

    def error(act) -> str:
        try:
            act()
        except Exception as raised:
            return f"{type(raised).__name__}: {raised}"
        return "nothing"

    def style(make, layer, on=mesh):
        return lambda: parallelize_module(layer, on, make())

    merged = fl.nn.LoRALinear(DIM, DIM)
    merged.merge()
    model = torch.nn.ModuleDict({"mlp": adapted("mlp", gate=True)})
    parallelize_module(model, mesh, {f"mlp.{k}": v for k, v in plan("mlp").items()})
    layer = model["mlp"].up_proj
    part = torch.zeros(R, DIM), torch.zeros(WIDE, R)
    one_more = init_device_mesh("cpu", (1, ranks))
    dropping = fl.nn.LoRALinear(12 * ranks, DIM, lora_dropout=0.1)
    fsdp = torch.nn.ModuleDict({"mlp": fully_sharded(adapted("mlp", gate=True))})
    ada = torch.nn.ModuleDict({"mlp": adapted("mlp", adalora=True)})
    parallelize_module(ada, mesh, {f"mlp.{k}": v for k, v in plan("mlp").items()})
    return {
        "linear": error(style(ColwiseLoRAParallel, torch.nn.Linear(DIM, DIM))),
        "mesh": error(style(ColwiseLoRAParallel, fl.nn.LoRALinear(DIM, DIM), one_more)),
        "merged": error(style(RowwiseLoRAParallel, merged)),
        "rows": error(style(ColwiseLoRAParallel, fl.nn.LoRALinear(DIM, DIM + 1))),
        "columns": error(style(RowwiseLoRAParallel, fl.nn.LoRALinear(DIM + 1, DIM))),
        "parts of 12": error(style(RowwiseLoRAParallel, dropping)),
        "twice": error(style(ColwiseLoRAParallel, layer)),
        "merge": error(layer.merge),
        "merge a model": error(lambda: fl.merge(model)),
        "swap": error(lambda: layer.swap(*part)),
        "save": error(lambda: fl.save_adapter(model, "/nowhere")),
        "prune": error(lambda: fl.optim.prune(model)),
        "merge of FSDP2": error(lambda: fl.merge(fsdp)),
        "save of FSDP2": error(lambda: fl.save_adapter(fsdp, "/nowhere")),
        "prune of FSDP2": error(lambda: fl.optim.prune(fsdp)),
        "penalty": error(lambda: fl.optim.orthogonality_penalty(ada)),
        "allocator": error(lambda: fl.optim.RankAllocator(ada, target_r=1, total_step=9)),
    }


# ---- data parallel


def _loss(model, x):
    return model(x).sum()


def data_parallel(kind: str, how: str, gate: bool) -> None:
    """Two micro-batches, the first accumulated: gradients equal one process's on all rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone = adapted(kind, gate=gate)
    model = copy.deepcopy(alone)
    if how == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
        inner = model.module
    else:
        inner = model = fully_sharded(model, how)
    batches = integers(2, 2 * ranks, 8, DIM)
    for x in batches:
        alone(x).sum().div(2).backward()
    for i, x in enumerate(batches):
        with not_yet(model, i == 0):
            # DDP and FSDP2 take the mean over the ranks.
            model(x[rank::ranks]).sum().mul(ranks / 2).backward()
    equal_gradients(inner, alone)


@contextlib.contextmanager
def not_yet(model, accumulate: bool):
    """The gradients of a backward within are not exchanged yet."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        with model.no_sync() if accumulate else contextlib.nullcontext():
            yield
    else:
        model.set_requires_gradient_sync(not accumulate)
        yield


def fully_sharded(model, how: str = "fsdp", mesh=None, **options):
    """FSDP2: each layer a group of its own ("each"), or the block one group, base and adapters."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"mesh": mesh, "reshard_after_forward": how != "kept", **options}
    if how == "each":
        for layer in model.children():
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def masks_differ() -> list[float]:
    """Each rank's sum of the same layer on the same rows, with generators that differ."""
    model = torch.nn.parallel.DistributedDataParallel(adapted("mlp", p=0.5))
    seeded(3)
    return model(torch.ones(4, DIM).double()).detach().sum(-1).tolist()


def half_precision(gate: bool) -> None:
    """A mixed precision policy: products in bf16, parameters and their gradients in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, alone = (adapted("mlp", gate=gate).float() for _ in range(2))
    for layer in (*model.children(), *alone.children()):
        if gate:
            layer.gate.data = layer.gate.data.float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_sharded(model, mp_policy=policy)
    alone = alone.bfloat16()
    x = integers(4, DIM).bfloat16()
    y = model(x)
    assert y.dtype == torch.bfloat16
    equal("y", y, alone(x))
    y.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name
            assert whole(parameter.grad).any(), name


def masters() -> None:
    """fp32 adapters and gates on a bf16 base, in one group."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"mlp": MLP(False)}).bfloat16()
    config = fl.LoRAConfig(target_modules="all-linear", gate=True, init_lora_weights=False)
    fl.inject(model, config, adapter_dtype=torch.float32)
    alone, model = model["mlp"], fully_sharded(copy.deepcopy(model["mlp"]))
    x = torch.randn(4, DIM).bfloat16()
    for m in (alone, model):
        m(x).sum().backward()
    equal_gradients(model, alone)


def sharded_checkpointed() -> None:
    """FSDP2, whose parameters are gathered again for the second run."""
    alone = adapted("mlp", gate=True, p=0.5)
    model = fully_sharded(copy.deepcopy(alone), "each")
    x = integers(8, DIM)
    torch.manual_seed(7)
    alone(x).sum().backward()
    torch.manual_seed(7)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    equal_gradients(model, alone)


# ---- training, gates, checkpoints


def spread(model, how: str):
    """`model` over all ranks as `how` says, and the rows of a batch that this one takes."""
    if how == "alone":
        return model, slice(None)
    ranks = dist.get_world_size()
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model), slice(dist.get_rank(), None, ranks)
    if how == "tp":
        mesh = init_device_mesh("cpu", (ranks,))
        return parallelize_module(model, mesh, plan("mlp")), slice(None)
    if how == "fsdp+tp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan("mlp"))
        model = fully_sharded(model, mesh=mesh["dp"])
        return model, slice(mesh["dp"].get_local_rank(), None, 2)
    return fully_sharded(model, how), slice(dist.get_rank(), None, ranks)


def trained(model, rows: slice, gate_step: str, l1: float = 0.0) -> fl.optim.SoRA:
    """Three steps of SoRA on the mean over a batch."""
    inner = getattr(model, "module", model)
    gates = [layer.gate for layer in inner.children()]
    rest = [p for n, p in inner.named_parameters() if p.requires_grad and "gate" not in n]
    optimizer = fl.optim.SoRA(
        torch.optim.AdamW(rest, lr=0.01), gates, lr=0.05, sparsity=2.0, gate_step=gate_step
    )
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x, target = torch.randn(2, 8, DIM, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[rows]), target[rows]) + l1 * fl.optim.gate_l1(gates)
        loss.backward()
        optimizer.step()
    return optimizer


def smooth() -> torch.nn.Module:
    """A gated block that trains: its products are not exact."""
    model = adapted("mlp", gate=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model


def gates_train(how: str, gate_step: str) -> None:
    """SoRA on parts of gates: the zeros, and all else, of one process."""
    alone = smooth()
    model, rows = spread(copy.deepcopy(alone), how)
    trained(alone, slice(None), gate_step, l1=0.1)
    trained(model, rows, gate_step, l1=0.1)
    inner = getattr(model, "module", model)
    counts = gate_counts(inner)
    assert counts == gate_counts(alone)
    assert 0 < sum(counts.values()) < 3 * R, f"{counts}: some gates close and some stay"
    assert fl.optim.kept_parameters(inner) == fl.optim.kept_parameters(alone)
    of = dict(alone.named_parameters())
    for name, p in inner.named_parameters():
        torch.testing.assert_close(whole(p.detach()), of[name].detach())


def gates_of_two_kinds() -> None:
    """One optimiser of whole gates and sharded ones."""
    alone = smooth()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mixed = {"up_proj": ColwiseLoRAParallel(output_layouts=Replicate())}
    model = parallelize_module(copy.deepcopy(alone), mesh, mixed)
    for m in (alone, model):
        x = torch.ones(2, DIM).double()
        m(x).square().mean().backward()
        layers = list(m.children())
        gates, rest = [layer.gate for layer in layers], [layers[0].lora_a]
        fl.optim.SoRA(torch.optim.SGD(rest, lr=0.1), gates, lr=0.1, sparsity=1.0).step()
    for layer, other in zip(model.children(), alone.children(), strict=True):
        torch.testing.assert_close(whole(layer.gate.detach()), other.gate.detach())


def saved(folder: str, how: str) -> None:
    """Three steps, then a checkpoint of what was trained; the first rank keeps it whole too."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model, rows = spread(smooth(), how)
    trained(model, rows, "sgd")
    options = StateDictOptions(ignore_frozen_params=True)
    dcp.save(get_model_state_dict(model, options=options), checkpoint_id=folder)
    options = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        torch.save(state, f"{folder}/whole.pt")
        one = torch.nn.ModuleDict({"mlp": smooth()})
        one["mlp"].load_state_dict(state, strict=False)
        for layer in one.float()["mlp"].children():
            layer.gate.data = layer.gate.data.float()
        fl.save_adapter(one, f"{folder}/adapter")


def loaded(folder: str, how: str) -> None:
    """The same values, whatever the ranks and the sharding."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    model = smooth()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    model, _ = spread(model, how)
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    want = torch.load(f"{folder}/whole.pt", weights_only=True)
    found = dict(getattr(model, "module", model).named_parameters())
    assert set(want) == {name for name, p in found.items() if p.requires_grad}
    for name, t in want.items():
        equal(name, whole(found[name].detach()), t)


def documented(page: str, folder: str) -> None:
    """The snippets of docs/distributed.md, in turn, on two blocks each."""
    code = re.findall(r"```python\n(.*?)```", Path(page).read_text(), re.DOTALL)
    ddp, fsdp, tp, checkpoint, adapter = (compile(c, page, "exec") for c in code)

    def build():
        torch.manual_seed(0)
        return Blocks()

    config = fl.LoRAConfig(target_modules="all-linear", r=R, init_lora_weights=False)
    ranks = dist.get_world_size()
    names = {"torch": torch, "fl": fl, "build": build, "config": config, "device": "cpu"}
    names |= {"dp": 2, "tp": ranks // 2, "folder": f"{folder}/dcp"}
    names["adapter_folder"] = f"{folder}/adapter"
    x = torch.randn(4, DIM)
    want = fl.inject(build(), config)(x)
    for way in (ddp, fsdp, tp):
        names["model"] = build()
        exec(way, names)
        torch.testing.assert_close(names["model"](x), want)
    before = {n: whole(p.detach()) for n, p in names["model"].named_parameters()}
    exec(checkpoint, names)
    for name, p in names["model"].named_parameters():
        equal(name, whole(p.detach()), before[name])
    exec(adapter, names)
    dist.barrier()
    torch.testing.assert_close(fl.load_adapter(build(), f"{folder}/adapter")(x), want)
