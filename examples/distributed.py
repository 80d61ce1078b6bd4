"""Trains LoRA adapters of a small language model on several processes, in any of four ways.

    torchrun --nproc-per-node 2 examples/distributed.py ddp       # each process has the whole model
    torchrun --nproc-per-node 2 examples/distributed.py fsdp      # a part of every parameter
    torchrun --nproc-per-node 2 examples/distributed.py tp        # a part of every layer
    torchrun --nproc-per-node 4 examples/distributed.py fsdp+tp   # both, on a mesh of 2 x 2

On CUDA devices where there are as many as processes, else on the CPU. Prints the loss, the same in
every way but for what dropout drops, and writes the adapter to --out, in PEFT's format.
"""

import argparse
import itertools
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import fused_lora as fl
from fused_lora.integrations.distributed import ColwiseLoRAParallel, RowwiseLoRAParallel

VOCABULARY, DIM, HEADS, LENGTH, BATCH = 256, 128, 4, 64, 16
CONFIG = fl.LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
PLAN = {
    "blocks.*.q": ColwiseLoRAParallel(),
    "blocks.*.k": ColwiseLoRAParallel(),
    "blocks.*.v": ColwiseLoRAParallel(),
    "blocks.*.o": RowwiseLoRAParallel(),
    "blocks.*.up": ColwiseLoRAParallel(),
    "blocks.*.down": RowwiseLoRAParallel(),
}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(DIM), torch.nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(DIM, DIM) for _ in range(4))
        self.up, self.down = torch.nn.Linear(DIM, 4 * DIM), torch.nn.Linear(4 * DIM, DIM)

    def forward(self, x):
        z = self.norm1(x)
        # As many heads as this process has: tensor parallel leaves a part of them.
        q, k, v = (
            f(z).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, DIM)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x @ self.embedding.weight.t()


def build() -> torch.nn.Module:
    """The same on every process."""
    torch.manual_seed(0)
    return fl.inject(Model(), CONFIG)


def spread(model, way: str, device: str):
    """(model over all processes, how many parts a batch has, which of them is this process's)"""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if way == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model), ranks, rank
    names = {"fsdp": ("dp",), "tp": ("tp",), "fsdp+tp": ("dp", "tp")}[way]
    sizes = (2, ranks // 2) if way == "fsdp+tp" else (ranks,)
    mesh = init_device_mesh(device, sizes, mesh_dim_names=names)
    if "tp" in names:
        parallelize_module(model, mesh["tp"], PLAN)
    if "dp" in names:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        return model, mesh["dp"].size(), mesh["dp"].get_local_rank()
    return model, 1, 0


def batches(text: bytes, device: str):
    """Rows of ids [BATCH, LENGTH + 1], the same on every process."""
    ids = torch.tensor(list(text))
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        yield torch.stack([ids[i : i + LENGTH + 1] for i in starts.tolist()]).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", nargs="?", choices=["ddp", "fsdp", "tp", "fsdp+tp"], default="fsdp")
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--out", type=Path, help="folder of the adapter")
    args = parser.parse_args()
    local = int(os.environ["LOCAL_RANK"])
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if on_gpus else "cpu"
    if on_gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpus else "gloo")

    model, parts, part = spread(build().to(device), args.way, device)
    # After the model is spread: the parameters are others now.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    torch.manual_seed(2 + part)  # parts of a batch drop other elements
    data = batches(Path(__file__).read_bytes(), device)
    for step, ids in enumerate(itertools.islice(data, args.steps)):
        rows = ids[part::parts]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step:3}  loss {mean.item() / dist.get_world_size():.4f}")

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=whole)  # every process takes part
    if dist.get_rank() == 0 and args.out is not None:
        one = build()
        one.load_state_dict(state, strict=False)
        fl.save_adapter(one, args.out)
        print(f"the adapter is in {args.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
