"""Adapts a small language model to another kind of text, and measures what each way of it costs.

A byte-level GPT learns Python's standard library from scratch. It is then adapted to prose, the
language reference that pydoc carries, in four ways: full fine-tuning, LoRA as plain PyTorch writes
it, LoRA with fused_lora, and SoRA with fused_lora. All take the same batches. Both texts are on
every machine that has Python; nothing is downloaded.

    python examples/demo.py             # a CPU trains 0.8 M parameters, a CUDA GPU 0.9 B
    python examples/demo.py --quick     # tiny sizes, to see that it runs

Prints what it measured, writes demo.png, demo.md and demo.json to --out, and exits with 1 where a
check does not hold.
"""

import argparse
import copy
import json
import math
import platform
import pydoc_data.topics
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import fused_lora as fl

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
FULL, NAIVE, SORA = "full fine-tuning", "LoRA, naive", "SoRA, fused_lora"
REORDERED = "LoRA, naive, rows of the batch reversed"
OURS = "LoRA, fused_lora, {}"
INK, GRID = "#22303c", "#dfe4e8"
COLORS = {FULL: "#6a4c93", NAIVE: "#f4b860", SORA: "#2a9d8f"}
COLOR_OF_OURS = "#d1495b"


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
    gate_lr: float
    sparsity: float
    rank: int
    code_bytes: int = 6_000_000
    seed: int = 0


PRESETS = {
    "quick": Settings(
        width=64, layers=2, heads=2, hidden=160, context=64, batch=8, pretrain_steps=120,
        adapt_steps=40, segment=10, held_out_windows=32, pretrain_lr=3e-3, full_lr=1e-3,
        lora_lr=5e-3, gate_lr=1.0, sparsity=3e-3, rank=4, code_bytes=500_000,
    ),
    "cpu": Settings(
        width=128, layers=4, heads=4, hidden=352, context=128, batch=8, pretrain_steps=900,
        adapt_steps=240, segment=20, held_out_windows=64, pretrain_lr=3e-3, full_lr=1e-3,
        lora_lr=4e-3, gate_lr=1.0, sparsity=3e-3, rank=8,
    ),
    "cuda": Settings(
        width=2048, layers=18, heads=16, hidden=5632, context=1024, batch=16, pretrain_steps=200,
        adapt_steps=60, segment=10, held_out_windows=32, pretrain_lr=3e-4, full_lr=1e-4,
        lora_lr=5e-4, gate_lr=1.0, sparsity=3e-3, rank=16,
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


class NaiveLoRALinear(nn.Module):
    """The formula as it is written down, on the parameters of the given fused layer."""

    def __init__(self, layer: fl.nn.LoRALinear) -> None:
        super().__init__()
        self.weight, self.scale = layer.weight, layer.scale
        self.lora_a, self.lora_b = layer.lora_a, layer.lora_b

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.lora_a.to(x.dtype))
        return F.linear(x, self.weight) + self.scale * F.linear(h, self.lora_b.to(x.dtype))


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


def reference_prose() -> Text:
    """The topics of pydoc's help, split by topic.

    Topics repeat parts of each other: a paragraph that is held out is not trained on.
    """
    topics = [text.split("\n\n") for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = dict.fromkeys(p for topic in topics[::8] for p in topic)
    rest = dict.fromkeys(p for i, topic in enumerate(topics) if i % 8 for p in topic)
    train = [p.encode() for p in rest if p not in held_out]
    return Text(as_tensor(train), as_tensor([p.encode() for p in held_out]))


class Run:
    """A model in training, and what was measured of it."""

    def __init__(
        self, name: str, model: GPT, optimizer: torch.optim.Optimizer, steps: int, *,
        dtype: torch.dtype, backend: str | None = None, reorder: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.model, self.optimizer = name, model, optimizer
        self.dtype, self.backend, self.reorder = dtype, backend, reorder
        self.device = model.head.weight.device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        warmup = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 1 - step / (steps + 1))
        )
        self.losses: list[float] = []
        self.bits: list[tuple[int, float]] = []
        self.tokens_per_s: list[float] = []
        self.peak_bytes = 0

    def loss(self, tokens: Tensor) -> Tensor:
        # Weights wider than the dtype of the run, which only full training has, go by autocast.
        mixed = self.model.head.weight.dtype != self.dtype
        tokens = tokens.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def train(self, batches: list[Tensor]) -> None:
        losses = []
        with fl.use_backend(self.backend), self._measured(sum(b[:, 1:].numel() for b in batches)):
            for batch in batches:
                loss = self.loss(batch.flip(0) if self.reorder else batch)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.schedule.step()
                losses.append(loss.detach())
        self.losses += torch.stack(losses).tolist()

    @contextmanager
    def _measured(self, tokens: int) -> Iterator[None]:
        """Speed, and on a GPU the most memory in use above what was there before."""
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = clock(self.device)
        yield
        self.tokens_per_s.append(tokens / (clock(self.device) - start))
        if on_gpu:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before)

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> float:
        """Bits per byte."""
        with fl.use_backend(self.backend):
            return self.loss(windows).item() / math.log(2)

    def row(self) -> dict[str, float]:
        """The last bits per byte, the speed, and the bytes that training holds beside the model."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        state = [t for values in optimizer.state.values() for t in values.values()]
        return {
            "before": self.bits[0][1],
            "after": self.bits[-1][1],
            "trainable": sum(p.numel() for p in self.trained),
            "trainable_bytes": sum(p.nbytes for p in self.trained),
            "gradient_bytes": sum(p.grad.nbytes for p in self.trained),
            "optimizer_bytes": sum(t.nbytes for t in state if isinstance(t, Tensor)),
            "tokens_per_s": statistics.median(self.tokens_per_s),
            "peak_bytes": self.peak_bytes,
        }


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def full_run(name: str, model: GPT, lr: float, steps: int, dtype: torch.dtype) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    return Run(name, model, optimizer, steps, dtype=dtype)


def inject(base: GPT, s: Settings, r: int, **options) -> GPT:
    """A copy of base with adapters, which are float32 whatever the dtype of the weights."""
    config = fl.LoRAConfig(r=r, lora_alpha=2 * r, target_modules=list(KINDS), **options)
    return fl.inject(copy.deepcopy(base), config, adapter_dtype=torch.float32)


def lora_run(name: str, model: GPT, s: Settings, steps: int, **options) -> Run:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lora_lr, weight_decay=0.0)
    return Run(name, model, optimizer, steps, dtype=model.head.weight.dtype, **options)


def naive_run(name: str, injected: GPT, s: Settings, **options) -> Run:
    model = copy.deepcopy(injected)
    for block in model.blocks:
        for kind in KINDS:
            setattr(block, kind, NaiveLoRALinear(getattr(block, kind)))
    return lora_run(name, model, s, s.adapt_steps, **options)


def sora_run(base: GPT, s: Settings) -> Run:
    """Starts with twice the rank; the proximal step closes the gates that do not earn their keep."""
    model = inject(base, s, 2 * s.rank, gate=True)
    gates = [m.gate for m in model.modules() if isinstance(m, fl.nn.SoRALinear)]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".gate")]
    adamw = torch.optim.AdamW(rest, lr=s.lora_lr, weight_decay=0.0)
    optimizer = fl.optim.SoRA(adamw, gates, lr=s.gate_lr, sparsity=s.sparsity)
    return Run(SORA, model, optimizer, s.adapt_steps, dtype=model.head.weight.dtype)


def runnable_backends(model: GPT) -> list[str]:
    layer = model.blocks[0].q
    x = layer.weight.new_empty(1, layer.in_features)
    reasons = fl.why("lora_linear", x, layer.weight, layer.lora_a, layer.lora_b, scale=layer.scale)
    return [backend for backend, reason in reasons.items() if reason is None]


def train(runs: list[Run], text: Text, s: Settings, steps: int, track: Callable) -> None:
    """The same batches to every run, in turns of one segment, so that noise meets all alike."""
    windows, batches = text.held_out_windows(s), text.batches(s, steps)
    for run in runs:
        run.bits.append((0, run.evaluate(windows)))
    segments = [(i, batches[i : i + s.segment]) for i in range(0, steps, s.segment)]
    turns = [(runs[(k + j) % len(runs)], *segments[k]) for k in range(len(segments)) for j in range(len(runs))]
    for run, start, segment in track(turns):
        run.train(segment)
        run.bits.append((start + len(segment), run.evaluate(windows)))


@dataclass
class Check:
    what: str
    measured: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound


def largest_gap(one: Run, other: Run) -> float:
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def adapters(model: GPT) -> dict[str, tuple[Tensor, Tensor]]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fl.nn.LoRALinear)}
    return {n: (m.lora_a.detach().clone(), m.lora_b.detach().clone()) for n, m in layers.items()}


def swap(model: GPT, adapter: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (lora_a, lora_b) in adapter.items():
        model.get_submodule(name).swap(lora_a, lora_b)


@torch.no_grad()
def serve(base: GPT, prose: Run, codecs: Run, texts: dict[str, Text], s: Settings):
    """Merge, change the task of the merged model in place and back, unmerge.

    Returns the checks, the milliseconds of a swap, and {text: {adapter: bits per byte}}.
    """

    def distance(one: Tensor, other: Tensor) -> float:
        return (one.double() - other.double()).abs().max().item()

    model, device = prose.model, prose.device
    ids = texts["prose"].held_out_windows(s)[:4, :-1].to(device)
    held_out = {name: text.held_out_windows(s) for name, text in texts.items()}
    with fl.use_backend("torch"):
        exact = copy.deepcopy(model).double()(ids)
    unmerged = model(ids)
    fl.merge(model, keep_base="device")
    merged = model(ids)
    bits = {
        text: {"base": run.bits[0][1], "prose adapter": prose.evaluate(held_out[text])}
        for text, run in (("prose", prose), ("codec tables", codecs))
    }

    there, back, milliseconds = adapters(codecs.model), adapters(model), []
    for adapter in [there, back] * 5 + [there]:
        start = clock(device)
        swap(model, adapter)
        milliseconds.append(1000 * (clock(device) - start))
    for name, windows in held_out.items():
        bits[name]["codec adapter"] = prose.evaluate(windows)
    swapped = model(ids)
    fl.merge(codecs.model)
    trained_so = codecs.model(ids)
    fl.unmerge(model)
    changed = sum(
        (model.get_parameter(name) != weight).sum().item()
        for name, weight in base.named_parameters()
    )
    checks = [
        Check("logits, merged to unmerged", distance(merged, unmerged), 4 * distance(unmerged, exact)),
        Check("logits, after a swap to the model so trained", distance(swapped, trained_so), 0.0),
        Check("weights that unmerging did not give back", changed, 0.0),
    ]  # fmt: skip
    return checks, statistics.median(milliseconds), bits


def adapt(base: GPT, text: Text, s: Settings, dtype: torch.dtype, track: Callable) -> list[Run]:
    """Every way to adapt, from the same base; LoRA also in the same start A and B."""
    injected = inject(base, s, s.rank)
    full = copy.deepcopy(base).float()
    runs = [
        full_run(FULL, full, s.full_lr, s.adapt_steps, dtype),
        naive_run(NAIVE, injected, s),
        naive_run(REORDERED, injected, s, reorder=True),
        *(
            lora_run(OURS.format(backend), copy.deepcopy(injected), s, s.adapt_steps, backend=backend)
            for backend in runnable_backends(injected)
        ),
        sora_run(base, s),
    ]
    train(runs, text, s, s.adapt_steps, track)
    return runs


def kept_ranks(model: GPT) -> list[list[int]]:
    """Gates that are not zero: a row for each block, a column for each of KINDS."""
    gates = [[getattr(block, kind).gate for kind in KINDS] for block in model.blocks]
    return [[int(gate.count_nonzero()) for gate in row] for row in gates]


def in_bytes(n: float) -> str:
    """As 12.3 MB, with three digits."""
    power = min(3, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def plot_curves(axes, runs: list[Run]) -> None:
    for run in runs:
        naive, ours = run.name == NAIVE, run.backend is not None
        axes.plot(
            *zip(*run.bits, strict=True), label=run.name, color=COLORS.get(run.name, COLOR_OF_OURS),
            linewidth=7 if naive else 2, linestyle="--" if ours else "-", zorder=2 if naive else 3,
        )  # fmt: skip
    steps, before = runs[0].bits[-1][0], runs[0].bits[0][1]
    axes.axhline(before, color=INK, linewidth=1, linestyle=":")
    axes.annotate("base model", (steps, before), (0, -4), ha="right", va="top",
                  textcoords="offset points", color=INK)  # fmt: skip
    axes.set_title("Held-out prose while adapting")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(color=GRID)
    axes.legend(frameon=False)


def plot_memory(axes, runs: list[Run]) -> None:
    parts = {"trained\nweights": "trainable_bytes", "gradients": "gradient_bytes",
             "optimiser\nstate": "optimizer_bytes"}  # fmt: skip
    for i, run in enumerate(runs):
        sizes = [run.row()[key] for key in parts.values()]
        places = [group + 0.27 * (i - 1) for group in range(len(parts))]
        color = COLORS.get(run.name, COLOR_OF_OURS)
        bars = axes.bar(places, sizes, width=0.25, color=color, label=run.name)
        axes.bar_label(bars, [in_bytes(size) for size in sizes], padding=2, fontsize=8, color=INK)
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set_xticks(range(len(parts)), parts)
    axes.set_title("Memory that training holds (log scale)")
    axes.set(ylabel="bytes")
    axes.legend(frameon=False)


def plot_ranks(axes, ranks: list[list[int]], full: int) -> None:
    axes.imshow(ranks, cmap="GnBu", vmin=0, vmax=full, aspect="auto")
    for i, row in enumerate(ranks):
        for j, rank in enumerate(row):
            color = "white" if rank > 0.6 * full else INK
            axes.text(j, i, rank, ha="center", va="center", color=color)
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set_yticks(range(len(ranks)))
    axes.set_title(f"Rank that SoRA keeps, of {full}")
    axes.set(ylabel="block")
    axes.tick_params(length=0)


def plot(path: Path, runs: list[Run], ours: Run, s: Settings, title: str) -> None:
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    curves, memory, ranks = figure.subplots(1, 3, width_ratios=(1.3, 1.1, 1))
    plot_curves(curves, [run for run in runs if not run.reorder])
    plot_memory(memory, [runs[0], ours, runs[-1]])
    plot_ranks(ranks, kept_ranks(runs[-1].model), 2 * s.rank)
    for axes in (curves, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, color=INK)
    figure.savefig(path, dpi=150)


def method_table(base_bits: tuple[float, float], runs: list[Run]) -> list[list[str]]:
    rows = [["", "bits/byte before", "after", "trainable", "gradients", "optimiser state", "tokens/s"]]
    rows.append(["base model", *(f"{bits:.4f}" for bits in base_bits), "0", "0 B", "0 B", ""])
    for run in runs:
        row = run.row()
        rows.append([
            run.name, f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['trainable']:,}",
            in_bytes(row["gradient_bytes"]), in_bytes(row["optimizer_bytes"]),
            f"{row['tokens_per_s']:,.0f}",
        ])  # fmt: skip
    if any(run.peak_bytes for run in runs):
        rows[0].append("peak memory above the model")
        rows[1].append("")
        for row, run in zip(rows[2:], runs, strict=True):
            row.append(in_bytes(run.peak_bytes))
    return rows


def check_table(checks: list[Check]) -> list[list[str]]:
    return [
        ["check", "measured", "at most", ""],
        *([c.what, f"{c.measured:.3g}", f"{c.bound:.3g}", "holds" if c.holds else "FAILS"] for c in checks),
    ]  # fmt: skip


def markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def show(console: Console, title: str, rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the frozen weights; default bfloat16 on a GPU, else float32")  # fmt: skip
    return parser.parse_args()


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def main() -> int:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    s = PRESETS["quick" if arguments.quick else device.type]
    torch.manual_seed(s.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    console, seconds = Console(), {}

    with Progress(*Progress.get_default_columns()[:2], TimeElapsedColumn(), console=console) as progress:

        def track(description: str) -> Callable:
            return lambda turns: progress.track(turns, description=f"{description:28}")

        code, codecs = stdlib_sources(s, codecs=False), stdlib_sources(s, codecs=True)
        texts = {"prose": reference_prose(), "codec tables": codecs}
        with timed(seconds, "train the base"):
            pretrain = full_run("base", GPT(s).to(device), s.pretrain_lr, s.pretrain_steps, dtype)
            train([pretrain], code, s, s.pretrain_steps, track("train the base on code"))
            base = pretrain.model.to(dtype)
        with timed(seconds, "adapt to prose"):
            runs = adapt(base, texts["prose"], s, dtype, track("adapt it to prose"))
        with timed(seconds, "adapt to codec tables"):
            other = lora_run("codecs", inject(base, s, s.rank), s, s.adapt_steps // 2)
            train([other], codecs, s, s.adapt_steps // 2, track("adapt it to codec tables"))
        naive, reordered, *ours = [run for run in runs if run.name.startswith("LoRA")]
        with timed(seconds, "merge and swap"):
            checks, swap_ms, task_bits = serve(base, ours[-1], other, texts, s)

    # A path may leave the naive one as far as rounding takes it, which other sums of rows show.
    bound = 4 * largest_gap(naive, reordered)
    checks = [
        *(Check(f"training loss, {run.name} to naive", largest_gap(naive, run), bound) for run in ours),
        *checks,
    ]
    title = (
        f"{sum(p.numel() for p in base.parameters()):,} parameters on {device_name(device)}, "
        f"{str(dtype).removeprefix('torch.')}, torch {torch.__version__}"
    )
    tables = {
        "Adapting to prose": method_table(runs),
        "Checks": check_table(checks),
        f"Bits per byte of one merged model, whose task is swapped in place in {swap_ms:.2f} ms":
            task_table(task_bits),
        "Seconds": [["", *seconds], ["", *(f"{t:.1f}" for t in seconds.values())]],
    }  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
