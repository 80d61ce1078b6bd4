"""The same training with gates on one process and on two, by DistributedDataParallel.

A module of its own, which a new process imports without the tests.
"""

import contextlib

import seeds  # noqa: F401
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_lora.nn import SoRALinear
from fused_lora.optim import SoRA, named_gates


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = SoRALinear(6, 8, r=4, init=False)
        self.second = SoRALinear(8, 3, r=4, init=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def train(model, x, target, not_yet):
    """Three steps of two micro-batches each; the first of them within not_yet()."""
    gates = list(named_gates(model).values())
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "gate" not in n]
    adamw = torch.optim.AdamW(rest, lr=0.05)
    optimizer = SoRA(adamw, gates, lr=0.05, sparsity=1.0, gate_step="adam")
    for _ in range(3):
        optimizer.zero_grad()
        batches = zip((not_yet, contextlib.nullcontext), x.chunk(2), target.chunk(2), strict=True)
        for context, some, wanted in batches:
            with context():
                (F.mse_loss(model(some), wanted) / 2).backward()
        torch.nn.utils.clip_grad_norm_(rest + gates, 0.5)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in (*rest, *gates)])


def alone():
    torch.manual_seed(0)
    return train(TwoLayers(), *data(), contextlib.nullcontext)


def one_of_two(rank: int, folder: str) -> None:
    """One process: it sees every other row of each micro-batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP spreads the parameters of process 0
    model = torch.nn.parallel.DistributedDataParallel(TwoLayers())
    x, target = (t[rank::2] for t in data())
    torch.save(train(model, x, target, model.no_sync), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
