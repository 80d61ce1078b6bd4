"""A real task that every machine with Python has: a byte-level GPT, and texts to adapt it to."""

import pydoc_data.topics
import random
import sysconfig
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Settings:
    width: int
    layers: int
    heads: int
    hidden: int
    context: int
    batch: int
    pretrain_steps: int
    adapt_steps: int
    segment: int  # steps between two evaluations
    held_out_windows: int
    pretrain_lr: float
    full_lr: float
    lora_lr: float
    adalora_lr: float  # singular values are small beside what B grows to, and want larger steps
    gate_lr: float
    sparsity: float
    rank: int
    code_bytes: int = 6_000_000
    seed: int = 0


PRESETS = {
    "quick": Settings(
        width=64, layers=2, heads=2, hidden=160, context=64, batch=8, pretrain_steps=120,
        adapt_steps=40, segment=10, held_out_windows=32, pretrain_lr=3e-3, full_lr=1e-3,
        lora_lr=5e-3, adalora_lr=2e-2, gate_lr=1.0, sparsity=3e-3, rank=4, code_bytes=500_000,
    ),
    "cpu": Settings(
        width=128, layers=4, heads=4, hidden=352, context=128, batch=8, pretrain_steps=750,
        adapt_steps=200, segment=20, held_out_windows=64, pretrain_lr=3e-3, full_lr=1e-3,
        lora_lr=4e-3, adalora_lr=2e-2, gate_lr=1.0, sparsity=3e-3, rank=8,
    ),
    "cuda": Settings(
        width=2048, layers=18, heads=16, hidden=5632, context=1024, batch=16, pretrain_steps=200,
        adapt_steps=60, segment=10, held_out_windows=32, pretrain_lr=3e-4, full_lr=1e-4,
        lora_lr=5e-4, adalora_lr=2.5e-3, gate_lr=1.0, sparsity=3e-3, rank=16,
    ),
}  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).type_as(x)


class Block(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads = s.heads
        self.norm1, self.norm2 = nn.RMSNorm(s.width, 1e-5), nn.RMSNorm(s.width, 1e-5)
        for kind in KINDS:
            fan_in = s.hidden if kind == "down" else s.width
            fan_out = s.hidden if kind in ("gate", "up") else s.width
            setattr(self, kind, nn.Linear(fan_in, fan_out, bias=False))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class GPT(nn.Module):
    """A decoder on bytes: rotary positions, pre-norm, SwiGLU."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.width, 1e-5)
        self.head = nn.Linear(s.width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith((".o.weight", ".down.weight"))
                gain = (2 * s.layers) ** -0.5 if residual else 1.0
                nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
        head_width = s.width // s.heads
        frequency = 10_000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angle = torch.outer(torch.arange(s.context), frequency)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


@dataclass
class Text:
    train: Tensor
    held_out: Tensor

    def batches(self, s: Settings, steps: int) -> list[Tensor]:
        """Windows of context + 1 bytes from random places of the training part."""
        generator = torch.Generator().manual_seed(s.seed)
        windows = self.train.unfold(0, s.context + 1, 1)
        places = torch.randint(len(windows), (steps, s.batch), generator=generator)
        return [windows[row].long() for row in places]

    def held_out_windows(self, s: Settings) -> Tensor:
        windows = self.held_out.unfold(0, s.context + 1, 1)
        return windows[torch.linspace(0, len(windows) - 1, s.held_out_windows).long()].long()


def as_tensor(parts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n\n".join(parts)), dtype=torch.uint8)


def stdlib_sources(s: Settings, *, codecs: bool) -> Text:
    """The standard library without its tests and codecs, or the codec tables; split by file."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test"}
    files = [
        path.read_bytes()
        for path in sorted(root.rglob("*.py"))
        if not left_out & set(path.relative_to(root).parts)
        and (path.parent.name == "encodings") == codecs
    ]
    random.Random(s.seed).shuffle(files)
    train = [file for i, file in enumerate(files) if i % 16]
    return Text(as_tensor(train)[: s.code_bytes], as_tensor(files[::16]))


def character_names(s: Settings) -> Text:
    """The names of Unicode's characters, one a line; split by runs of lines."""
    names = [unicodedata.name(chr(code), "") for code in range(0x20000)]
    counted = "CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "VARIATION"  # by numbers
    lines = [name for name in names if name and not name.startswith(counted)]
    runs = ["\n".join(lines[i : i + 64]).encode() for i in range(0, len(lines), 64)]
    random.Random(s.seed).shuffle(runs)
    return Text(as_tensor(runs[len(runs) // 8 :]), as_tensor(runs[: len(runs) // 8]))


def reference_prose() -> Text:
    """The topics of pydoc's help, split by topic.

    Topics repeat parts of each other: a paragraph that is held out is not trained on.
    """
    topics = [text.split("\n\n") for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = dict.fromkeys(p for topic in topics[::8] for p in topic)
    rest = dict.fromkeys(p for i, topic in enumerate(topics) if i % 8 for p in topic)
    train = [p.encode() for p in rest if p not in held_out]
    return Text(as_tensor(train), as_tensor([p.encode() for p in held_out]))
