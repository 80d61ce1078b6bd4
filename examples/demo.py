"""Adapts a small language model to another kind of text, and measures what each way of it costs.

A byte-level GPT learns Python's standard library from scratch. It is then adapted to prose, the
language reference that pydoc carries: by full fine-tuning, by LoRA as plain PyTorch writes it, and
with fused_lora by LoRA of two ranks, SoRA and AdaLoRA, which find their ranks while they train. All
take the same batches. Two more texts get an adapter each, and all three answer in one batch. The
texts are on every machine that has Python; nothing is downloaded.

    python examples/demo.py             # a CPU trains 0.9 M parameters, a CUDA GPU 0.9 B
    python examples/demo.py --quick     # tiny sizes, to see that it runs

Prints what it measured, writes demo.png, demo.md and demo.json to --out, and exits with 1 where a
check does not hold.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import demo_report as report
import torch
import torch.nn.functional as F
from fused_lora.bench.text import (
    GPT,
    KINDS,
    PRESETS,
    Settings,
    Text,
    character_names,
    reference_prose,
    stdlib_sources,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import fused_lora as fl

Adapter = dict[str, tuple[Tensor, Tensor]]  # {layer: (A, B)}
PENALTY = 0.1  # of AdaLoRA's orthogonality
LAMBDA_LR = 5  # of AdaLoRA's lambdas, in the learning rate of P and Q


class NaiveLoRALinear(nn.Module):
    """The formula as it is written down, on the parameters of the given fused layer."""

    def __init__(self, layer: fl.nn.LoRALinear) -> None:
        super().__init__()
        self.weight, self.scale = layer.weight, layer.scale
        self.lora_a, self.lora_b = layer.lora_a, layer.lora_b

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.lora_a.to(x.dtype))
        return F.linear(x, self.weight) + self.scale * F.linear(h, self.lora_b.to(x.dtype))


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Run:
    """A model in training, and what was measured of it."""

    def __init__(
        self,
        name: str,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        steps: int,
        dtype: torch.dtype,
        *,
        backend: str | None = None,
        reverse_rows: bool = False,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self.name, self.model, self.optimizer, self.penalty = name, model, optimizer, penalty
        self.steps, self.dtype = steps, dtype
        self.backend, self.reverse_rows = backend, reverse_rows
        self.device = model.head.weight.device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        warmup = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 1 - step / (steps + 1))
        )
        self.losses: list[float] = []
        self.bits: list[tuple[int, float]] = []  # (step, held-out bits per byte)
        self.tokens_per_s: list[float] = []
        self.peak_bytes = 0

    def loss(self, tokens: Tensor) -> Tensor:
        # Weights wider than the dtype of the run, which only full training has, go by autocast.
        mixed = self.model.head.weight.dtype != self.dtype
        tokens = tokens.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> float:
        """Bits per byte."""
        with fl.use_backend(self.backend):
            return self.loss(windows).item() / math.log(2)

    def train(self, batches: list[Tensor]) -> None:
        losses = []
        with fl.use_backend(self.backend), self._measured(sum(b[:, 1:].numel() for b in batches)):
            for batch in batches:
                loss = self.loss(batch.flip(0) if self.reverse_rows else batch)
                self.optimizer.zero_grad()
                (loss if self.penalty is None else loss + self.penalty()).backward()
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

    def row(self) -> dict[str, float]:
        """Quality, speed, and the bytes that training holds, counted tensor by tensor."""
        optimizer, importance = self.optimizer, []
        if isinstance(optimizer, fl.optim.AdaLoRA):
            saved = optimizer.allocator.state_dict()
            importance = [*saved["sensitivity"], *saved["uncertainty"]]
        if isinstance(optimizer, fl.optim.AdaLoRA | fl.optim.SoRA):
            optimizer = optimizer.optimizer  # the proximal step keeps no state of its own
        state = [t for values in optimizer.state.values() for t in values.values()]
        state += [t for part in importance for t in part]
        return {
            "before": self.bits[0][1],
            "after": self.bits[-1][1],
            "trainable": sum(p.numel() for p in self.trained),
            "kept": fl.optim.kept_parameters(self.model),
            "trainable_bytes": sum(p.nbytes for p in self.trained),
            "gradient_bytes": sum(p.grad.nbytes for p in self.trained),
            "optimizer_bytes": sum(t.nbytes for t in state),
            "tokens_per_s": statistics.median(self.tokens_per_s),
            "peak_bytes": self.peak_bytes,
        }


def train(runs: list[Run], text: Text, s: Settings, track: Callable) -> None:
    """The same batches to every run, in turns of one segment, so that noise meets all alike."""
    windows, batches = text.held_out_windows(s), text.batches(s, runs[0].steps)
    for run in runs:
        run.bits.append((0, run.evaluate(windows)))
    turns = []
    for start in range(0, len(batches), s.segment):
        turns += [(run, batches[start : start + s.segment]) for run in runs]
        runs = [*runs[1:], runs[0]]
    for run, segment in track(turns):
        run.train(segment)
        run.bits.append((len(run.losses), run.evaluate(windows)))


def full_run(name: str, model: GPT, lr: float, steps: int, dtype: torch.dtype) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    return Run(name, model, optimizer, steps, dtype)


def inject(base: GPT, r: int, **options) -> GPT:
    """A copy of base with adapters, which are float32 whatever the dtype of the weights."""
    config = fl.LoRAConfig(r=r, lora_alpha=2 * r, target_modules=list(KINDS), **options)
    return fl.inject(copy.deepcopy(base), config, adapter_dtype=torch.float32)


def lora_run(name: str, model: GPT, s: Settings, steps: int, **options) -> Run:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lora_lr, weight_decay=0.0)
    return Run(name, model, optimizer, steps, model.head.weight.dtype, **options)


def naive_run(name: str, injected: GPT, s: Settings, **options) -> Run:
    model = copy.deepcopy(injected)
    for block in model.blocks:
        for kind in KINDS:
            setattr(block, kind, NaiveLoRALinear(getattr(block, kind)))
    return lora_run(name, model, s, s.adapt_steps, **options)


def fused_runs(injected: GPT, s: Settings) -> list[Run]:
    """One for each backend that runs here, by fl.why."""
    layer = injected.blocks[0].q
    x = layer.weight.new_empty(1, layer.in_features)
    reasons = fl.why("lora_linear", x, layer.weight, layer.lora_a, layer.lora_b, scale=layer.scale)
    return [
        lora_run(report.ours(name), copy.deepcopy(injected), s, s.adapt_steps, backend=name)
        for name, reason in reasons.items()
        if reason is None
    ]


def sora_run(base: GPT, s: Settings) -> Run:
    """Starts with twice the rank; the proximal step closes gates that do not earn their keep."""
    model = inject(base, 2 * s.rank, gate=True)
    gates = [m.gate for m in model.modules() if isinstance(m, fl.nn.SoRALinear)]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".gate")]
    adamw = torch.optim.AdamW(rest, lr=s.lora_lr, weight_decay=0.0)
    optimizer = fl.optim.SoRA(adamw, gates, lr=s.gate_lr, sparsity=s.sparsity)
    return Run(report.SORA, model, optimizer, s.adapt_steps, model.head.weight.dtype)


def small_run(base: GPT, s: Settings) -> Run:
    """Rank 1 of every 4: what the methods that find their ranks have to beat."""
    rank = max(1, s.rank // 4)
    return lora_run(report.small(rank), inject(base, rank), s, s.adapt_steps)


def adalora_run(base: GPT, s: Settings) -> Run:
    """Half of LoRA's rank in the mean, from 3 / 2 of that; the budget moves it between layers."""
    budget = s.rank // 2
    model = inject(base, math.ceil(1.5 * budget), adalora=True)
    allocator = fl.optim.RankAllocator(
        model,
        target_r=budget,
        total_step=s.adapt_steps,
        t_init=s.adapt_steps // 10,
        t_final=s.adapt_steps // 3,
    )
    gates = list(fl.optim.named_gates(model).values())
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".gate")]
    groups = [{"params": rest}, {"params": gates, "lr": LAMBDA_LR * s.adalora_lr}]
    inner = torch.optim.AdamW(groups, lr=s.adalora_lr, weight_decay=0.0)
    optimizer = fl.optim.AdaLoRA(inner, allocator)

    def penalty() -> Tensor:
        return PENALTY * fl.optim.orthogonality_penalty(model)

    dtype = model.head.weight.dtype
    return Run(report.ADALORA, model, optimizer, s.adapt_steps, dtype, penalty=penalty)


def kept_ranks(model: GPT) -> list[list[int]]:
    """Gates that are not zero: a row for each block, a column for each of KINDS."""
    gates = [[getattr(block, kind).gate for kind in KINDS] for block in model.blocks]
    return [[int(gate.count_nonzero()) for gate in row] for row in gates]


@dataclass
class Check:
    what: str
    measured: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound


def check_curves(naive: Run, reversed_rows: Run, ours: list[Run]) -> list[Check]:
    """A run may leave the naive one about as far as rounding takes it.

    How far that is, the naive run itself shows when the rows of each batch come in reverse order:
    the same mathematics, summed in another order.
    """

    def gap(run: Run) -> float:
        return max(abs(a - b) for a, b in zip(naive.losses, run.losses, strict=True))

    bound = 4 * gap(reversed_rows)
    return [Check(f"training loss, {run.name} to {naive.name}", gap(run), bound) for run in ours]


def distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def timed_call(model: GPT, ids: Tensor) -> tuple[Tensor, float]:
    """(logits, seconds) of a second call: the first one allocates and loads."""
    model(ids)
    start = clock(ids.device)
    logits = model(ids)
    return logits, clock(ids.device) - start


@torch.no_grad()
def answer(
    base: GPT, runs: dict[str, Run], texts: dict[str, Text], s: Settings
) -> tuple[list[Check], list[list], tuple[float, float]]:
    """One batch in which every row asks another adapter, beside a batch for each adapter alone.

    Returns a check, the table of bits per byte, and the milliseconds of the mixed batch and of the
    others together.
    """
    model = copy.deepcopy(base)
    store = fl.AdapterStore(
        model, len(runs), s.rank, target_modules=list(KINDS), adapter_dtype=torch.float32
    )
    for name, run in runs.items():
        layers = {n: m for n, m in run.model.named_modules() if isinstance(m, fl.nn.LoRALinear)}
        store.add(name, {n: (m.lora_a, m.lora_b, m.scale, None) for n, m in layers.items()})

    device = base.head.weight.device
    windows = {name: texts[name].held_out_windows(s).to(device) for name in runs}
    mixed = torch.stack(list(windows.values()), dim=1).flatten(0, 1)  # the texts in turn
    names = list(runs) * s.held_out_windows
    routing = fl.AdapterRouting(store.ids(names), len(runs))
    with store.route(routing):
        logits, together = timed_call(model, mixed[:, :-1])
    losses = F.cross_entropy(logits.float().mT, mixed[:, 1:], reduction="none").mean(1)
    bits = losses.view(-1, len(runs)).mean(0) / math.log(2)

    rows, apart, rounding, alone_seconds = [["", "base", "alone", "in one batch"]], [], [], 0.0
    for i, (name, run) in enumerate(runs.items()):
        alone, taken = timed_call(run.model, windows[name][:, :-1])
        alone_seconds += taken
        with fl.use_backend("torch"):
            exact = copy.deepcopy(run.model).double()(windows[name][:4, :-1])
        rounding.append(distance(alone[:4], exact))
        apart.append(distance(logits[i :: len(runs)], alone))
        rows.append([name, run.bits[0][1], run.evaluate(windows[name]), bits[i].item()])
    check = Check("logits, three adapters in a batch to each alone", max(apart), 4 * max(rounding))
    return [check], rows, (1000 * together, 1000 * alone_seconds)


@torch.no_grad()
def check_pruning(run: Run, windows: Tensor) -> Check:
    """What prune leaves, plain LoRA of fewer ranks, is the gated model but for rounding."""
    ids = windows[:4, :-1].to(run.device)
    with fl.use_backend("torch"):
        exact = copy.deepcopy(run.model).double()(ids)
    gated, pruned = run.model(ids), copy.deepcopy(run.model)
    fl.optim.prune(pruned)
    what = f"logits, {run.name} to what prune leaves of it"
    return Check(what, distance(pruned(ids), gated), 4 * distance(gated, exact))


def adapter_of(model: GPT) -> Adapter:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fl.nn.LoRALinear)}
    return {n: (m.lora_a.detach().clone(), m.lora_b.detach().clone()) for n, m in layers.items()}


def swap(model: GPT, adapter: Adapter) -> None:
    for name, (lora_a, lora_b) in adapter.items():
        model.get_submodule(name).swap(lora_a, lora_b)


@torch.no_grad()
def serve(
    base: GPT, prose: Run, codecs: Run, texts: dict[str, Text], s: Settings
) -> tuple[list[Check], list[list], float]:
    """Merges, swaps the task of the merged model in place, there and back, and unmerges.

    Returns checks, the table of bits per byte of each text under each adapter, and the median
    milliseconds of a swap. The model of `codecs` stays merged.
    """

    model = prose.model
    windows = {name: text.held_out_windows(s) for name, text in texts.items()}
    ids = windows["prose"][:4, :-1].to(prose.device)
    with fl.use_backend("torch"):
        exact = copy.deepcopy(model).double()(ids)
    unmerged = model(ids)
    fl.merge(model, keep_base="device")
    merged = model(ids)
    bits = [["base", prose.bits[0][1], codecs.bits[0][1]]]
    bits.append(["prose adapter", *(prose.evaluate(w) for w in windows.values())])

    there, back, milliseconds = adapter_of(codecs.model), adapter_of(model), []
    for adapter in [there, back] * 5 + [there]:
        start = clock(prose.device)
        swap(model, adapter)
        milliseconds.append(1000 * (clock(prose.device) - start))
    bits.append(["codec adapter", *(prose.evaluate(w) for w in windows.values())])
    swapped = model(ids)
    fl.merge(codecs.model)
    never_swapped = codecs.model(ids)
    fl.unmerge(model)
    changed = [model.get_parameter(name) != weight for name, weight in base.named_parameters()]

    rounding = distance(unmerged, exact)  # what the dtype itself does to the logits
    checks = [
        Check("logits, merged to unmerged", distance(merged, unmerged), 4 * rounding),
        Check("logits, swapped to the other model", distance(swapped, never_swapped), 0),
        Check("weights changed by merge and unmerge", sum(int(c.sum()) for c in changed), 0),
    ]
    return checks, [["", *windows], *bits], statistics.median(milliseconds)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def machine(device: torch.device, dtype: torch.dtype) -> str:
    name = f"{torch.get_num_threads()} threads of {platform.machine()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of frozen weights and of products; default: bfloat16 on a GPU, float32 on a CPU",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    s = PRESETS["quick" if arguments.quick else device.type]
    torch.manual_seed(s.seed)
    # A terminal folds what is too wide for it; a file does not.
    console = Console(width=None if sys.stdout.isatty() else 120)
    seconds: dict[str, float] = {}
    code, codecs = stdlib_sources(s, codecs=False), stdlib_sources(s, codecs=True)
    texts = {"prose": reference_prose(), "codec tables": codecs}
    three = {**texts, "character names": character_names(s)}

    with Progress(console=console) as progress:

        def track(description: str) -> Callable:
            return lambda turns: progress.track(turns, description=f"{description:22}")

        with timed(seconds, "train the base"):
            pretrain = full_run("base", GPT(s).to(device), s.pretrain_lr, s.pretrain_steps, dtype)
            train([pretrain], code, s, track("train the base"))
            base = pretrain.model.to(dtype)
        with timed(seconds, "adapt to prose"):
            injected = inject(base, s.rank)
            wide = copy.deepcopy(base).float()
            full = full_run(report.FULL, wide, s.full_lr, s.adapt_steps, dtype)
            naive = naive_run(report.NAIVE, injected, s)
            reversed_rows = naive_run(report.REVERSED, injected, s, reverse_rows=True)
            ours, gated = fused_runs(injected, s), [sora_run(base, s), adalora_run(base, s)]
            runs = [full, naive, reversed_rows, *ours, small_run(base, s), *gated]
            train(runs, texts["prose"], s, track("adapt to prose"))
            held_out = texts["prose"].held_out_windows(s)
            pruned = [check_pruning(run, held_out) for run in gated]
        with timed(seconds, "adapt to two other texts"):
            others = {
                name: lora_run(name, copy.deepcopy(injected), s, s.adapt_steps // 2)
                for name in ("codec tables", "character names")
            }
            for name, other in others.items():
                train([other], three[name], s, track(f"adapt to {name}"))
        with timed(seconds, "answer in one batch"):
            served, mixed, milliseconds = answer(base, {"prose": ours[0], **others}, three, s)
        with timed(seconds, "merge and swap"):
            checks, tasks, swap_ms = serve(base, ours[0], others["codec tables"], texts, s)

    checks = check_curves(naive, reversed_rows, ours) + pruned + served + checks
    parameters = sum(p.numel() for p in base.parameters())
    results = {
        "title": f"{parameters:,} parameters, {machine(device, dtype)}",
        "base": {"code": pretrain.bits[-1][1], "prose": full.bits[0][1]},
        "methods": {run.name: run.row() for run in runs},
        "curves": {run.name: run.bits for run in runs if run is not reversed_rows},
        "mixed": mixed,
        "mixed_ms": milliseconds,
        "tasks": tasks,
        "swap_ms": swap_ms,
        "checks": [asdict(check) | {"holds": check.holds} for check in checks],
        "rank": s.rank,
        "kept_ranks": kept_ranks(gated[0].model),
        "seconds": seconds,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "demo.json").write_text(json.dumps(results, indent=1))
    report.write(results, arguments.out, console)
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
