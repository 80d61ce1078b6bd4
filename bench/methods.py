"""What SoRA claims, asked of a real text: quality against the parameters kept, and time a step.

    python -m fused_lora.bench.methods [--stage STAGE] [--out DIR]

A byte-level GPT learns Python's standard library and is then adapted to prose, from the same start
and with the same batches, by

    LoRA      of several ranks
    SoRA      of the largest of them, at several sparsities; and at one sparsity that is raised
              phase by phase, from the checkpoint reached
    AdaLoRA   with several budgets, each from 1.5 times its rank

Every run has the same number of steps; a point that is read after a phase has had fewer. The
learning rates are those of bench/text.py: those of AdaLoRA, higher than LoRA's and highest for its
lambdas, were the best of five pairs on the first seed.
Quality is bits per byte of held-out prose; parameters are counted as sum r (K + N) for LoRA and sum
nnz(g) (K + N + 1) for gated layers. The time of a step, optimiser included, is that of the same
model at one rank, in turns, for LoRA, SoRA and AdaLoRA here and LoRA and AdaLoRA in PEFT.
"""

import copy
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fused_lora.bench import claims
from fused_lora.bench.claims import ratio
from fused_lora.bench.report import machine
from fused_lora.bench.run import Parser, progress
from fused_lora.bench.text import GPT, KINDS, PRESETS, Settings, reference_prose, stdlib_sources
from torch import Tensor, nn

import fused_lora as fl

NAME = "methods"
TITLE = "SoRA and AdaLoRA beside LoRA, on a real text"
LORA, SORA, RAISED, ADALORA = "LoRA", "SoRA", "SoRA, λ raised", "AdaLoRA"
PEFT_LORA, PEFT_ADALORA = "PEFT LoRA", "PEFT AdaLoRA"
PENALTY = 0.1  # of AdaLoRA's orthogonality, squared, as in the paper
LAMBDA_LR = 5  # of AdaLoRA's lambdas, in the learning rate of P and Q


class Plan(NamedTuple):
    """What is run, on the model and text of a preset of bench/text.py."""

    preset: str
    seeds: int
    ranks: tuple[int, ...]  # of LoRA
    budgets: tuple[int, ...]  # of AdaLoRA: mean ranks at the end
    sparsities: tuple[float, ...]  # of SoRA, one a run
    raised: tuple[float, ...]  # one a phase
    first_steps: int  # of the first phase
    phase_steps: int  # of each later one
    timed: str  # the preset of the model that is timed
    timed_rank: int
    rounds: int

    @property
    def steps(self) -> int:
        return self.first_steps + (len(self.raised) - 1) * self.phase_steps


CPU = Plan(
    "cpu", 3, (1, 2, 4, 8, 16), (1, 2, 4, 8), (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    (2e-3, 1e-2, 5e-2), 120, 60, "cpu", 8, 30,
)  # fmt: skip
STAGES = {
    "cpu": CPU,
    "gpu": CPU._replace(timed="cuda"),
    "cpu-quick": Plan(
        "quick", 1, (1, 4), (1,), (1e-2,), (1e-3, 5e-2), 12, 6, "quick", 4, 3,
    ),
}  # fmt: skip


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    return loss_of(model, windows).item() / math.log(2)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """One pass over batches, the learning rates warmed up and brought down to zero."""
    steps, warmup = len(batches), max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - step / (steps + 1))
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in batches:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def injected(base: GPT, r: int, **options) -> GPT:
    config = fl.LoRAConfig(r=r, lora_alpha=2 * r, target_modules=list(KINDS), **options)
    return fl.inject(copy.deepcopy(base), config, adapter_dtype=torch.float32)


def adamw(model: nn.Module, lr: float, *, gates: bool = True) -> torch.optim.AdamW:
    params = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and (gates or not name.endswith(".gate"))
    ]
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


class Task:
    """The batches of a seed and what is held out, on a device."""

    def __init__(self, s: Settings, seed: int, steps: int, device: torch.device) -> None:
        prose = reference_prose()
        self.batches = [b.to(device) for b in prose.batches(replace(s, seed=seed), steps)]
        self.windows = prose.held_out_windows(s).to(device)

    def point(self, method: str, setting: str, model: nn.Module, steps: int) -> dict:
        bits = bits_per_byte(model, self.windows)
        return {
            "method": method,
            "setting": setting,
            "kept": fl.optim.kept_parameters(model),
            "bits": bits,
            "steps": steps,
        }


def run_lora(base: GPT, plan: Plan, s: Settings, task: Task) -> Iterator[dict]:
    for rank in plan.ranks:
        model = injected(base, rank)
        train(model, adamw(model, s.lora_lr), task.batches)
        yield task.point(LORA, f"r = {rank}", model, plan.steps)


def sora(model: nn.Module, s: Settings, sparsity: float) -> fl.optim.SoRA:
    gates = fl.optim.named_gates(model).values()
    return fl.optim.SoRA(
        adamw(model, s.lora_lr, gates=False), gates, lr=s.gate_lr, sparsity=sparsity
    )


def run_sora(base: GPT, plan: Plan, s: Settings, task: Task) -> Iterator[dict]:
    for sparsity in plan.sparsities:
        model = injected(base, max(plan.ranks), gate=True)
        train(model, sora(model, s, sparsity), task.batches)
        yield task.point(SORA, f"λ = {sparsity:g}", model, plan.steps)


def run_raised(base: GPT, plan: Plan, s: Settings, task: Task) -> Iterator[dict]:
    """The optimiser of each phase is new: its learning rate is not what the last one ended with,
    zero."""
    model, done = injected(base, max(plan.ranks), gate=True), 0
    for sparsity in plan.raised:
        steps = plan.phase_steps if done else plan.first_steps
        train(model, sora(model, s, sparsity), task.batches[done : done + steps])
        done += steps
        yield task.point(RAISED, f"λ = {sparsity:g}", model, done)


def run_adalora(base: GPT, plan: Plan, s: Settings, task: Task) -> Iterator[dict]:
    for budget in plan.budgets:
        model = injected(base, math.ceil(1.5 * budget), adalora=True)
        allocator = fl.optim.RankAllocator(
            model,
            target_r=budget,
            total_step=plan.steps,
            t_init=plan.steps // 10,
            t_final=plan.steps // 3,
        )
        inner = adamw(model, s.adalora_lr, gates=False)
        lambdas = list(fl.optim.named_gates(model).values())
        inner.add_param_group({"params": lambdas, "lr": LAMBDA_LR * s.adalora_lr})
        optimizer = fl.optim.AdaLoRA(inner, allocator)
        train(model, optimizer, task.batches, functools.partial(orthogonality, model))
        yield task.point(ADALORA, f"budget {budget}", model, plan.steps)


RUNS = {LORA: run_lora, SORA: run_sora, RAISED: run_raised, ADALORA: run_adalora}


def orthogonality(model: nn.Module) -> Tensor:
    return PENALTY * fl.optim.orthogonality_penalty(model)


# The time of a step.


class WithLoss(nn.Module):
    """A model as PEFT wants it: what it returns has a loss, to which PEFT adds its penalty."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=loss_of(self.model, tokens))


def step_lora(base: GPT, r: int, s: Settings) -> Callable[[Tensor], None]:
    model = injected(base, r)
    return step_of(model, adamw(model, s.lora_lr))


def step_sora(base: GPT, r: int, s: Settings) -> Callable[[Tensor], None]:
    model = injected(base, r, gate=True)
    return step_of(model, sora(model, s, s.sparsity))


def step_adalora(base: GPT, r: int, s: Settings) -> Callable[[Tensor], None]:
    model = injected(base, r, adalora=True)
    allocator = fl.optim.RankAllocator(
        model, target_r=max(1, r // 2), total_step=TIMED_STEPS, delta_t=1
    )
    optimizer = fl.optim.AdaLoRA(adamw(model, s.lora_lr), allocator)
    return step_of(model, optimizer, functools.partial(orthogonality, model))


TIMED_STEPS = 1 << 20  # of a schedule that is in its middle for as long as it is timed


def step_of(model, optimizer, penalty=None) -> Callable[[Tensor], None]:
    def step(tokens: Tensor) -> None:
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()

    return step


def step_peft(base: GPT, r: int, s: Settings, *, adalora: bool) -> Callable[[Tensor], None]:
    import peft

    shared = {"lora_alpha": 2 * r, "lora_dropout": 0.0, "target_modules": list(KINDS)}
    if adalora:
        config = peft.AdaLoraConfig(
            init_r=r, target_r=max(1, r // 2), total_step=TIMED_STEPS, deltaT=1,
            orth_reg_weight=PENALTY, **shared,
        )  # fmt: skip
    else:
        config = peft.LoraConfig(r=r, **shared)
    model = peft.get_peft_model(WithLoss(copy.deepcopy(base)), config)
    optimizer = adamw(model, s.lora_lr)
    count = 0

    def step(tokens: Tensor) -> None:
        nonlocal count
        loss = model.base_model(tokens).loss  # PeftModel's own forward leaves the penalty out
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if adalora:
            count += 1
            model.base_model.update_and_allocate(count)

    return step


CONTENDERS = {
    LORA: step_lora,
    f"{LORA} again": step_lora,
    SORA: step_sora,
    ADALORA: step_adalora,
    PEFT_LORA: functools.partial(step_peft, adalora=False),
    PEFT_ADALORA: functools.partial(step_peft, adalora=True),
}


def time_steps(plan: Plan, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step of each contender, round by round."""
    s = PRESETS[plan.timed]
    base = GPT(s).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    task = Task(s, 0, plan.rounds, device)
    steps = {name: make(base, plan.timed_rank, s) for name, make in CONTENDERS.items()}
    return claims.timed(steps, task.batches, device)


class Notes:
    """The points of every run that is done, in a file: a measurement that was cut off goes on."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, json.loads(json.dumps(plan._asdict()))
        self.runs: dict[str, list[dict]] = {}
        if path.exists():
            found = json.loads(path.read_text())
            if found["plan"] != self.plan:
                raise ValueError(f"{path} is of another plan; remove it, or choose another --out")
            self.runs = found["runs"]

    def points(self, name: str, run: Iterator[dict]) -> list[dict]:
        """Those of the file, or of run, which then is made."""
        if name not in self.runs:
            self.runs[name] = list(run)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"plan": self.plan, "runs": self.runs}) + "\n")
        return self.runs[name]


def pretrained(s: Settings, device: torch.device) -> GPT:
    torch.manual_seed(s.seed)
    base = GPT(s).to(device)
    code = stdlib_sources(s, codecs=False)
    optimizer = torch.optim.AdamW(base.parameters(), lr=s.pretrain_lr, betas=(0.9, 0.95))
    train(base, optimizer, [b.to(device) for b in code.batches(s, s.pretrain_steps)])
    return base


def measure(plan: Plan, device: torch.device, notes: Path, track: Callable = iter) -> dict:
    s = PRESETS[plan.preset]
    base, known, points = pretrained(s, device), Notes(notes, plan), []
    for seed, (method, run) in track(list(itertools.product(range(plan.seeds), RUNS.items()))):
        torch.manual_seed(seed)
        task = Task(s, seed, plan.steps, device)
        found = known.points(f"{method}, seed {seed}", run(base, plan, s, task))
        points += [{"seed": seed, **point} for point in found]
    task = Task(s, 0, 1, device)
    result = {
        "op": NAME,
        "machine": machine(device),
        "model": f"{sum(p.numel() for p in base.parameters()):,} parameters, {plan.steps} steps",
        "before": bits_per_byte(base, task.windows),
        "plan": plan._asdict(),
        "points": points,
        "seconds": time_steps(plan, device),
    }
    notes.unlink()
    return result


# What the numbers say.


class Curve(NamedTuple):
    """Means over the seeds, a point for each setting, in the order of the settings."""

    settings: list[str]
    kept: list[float]
    bits: list[float]
    apart: list[float]  # largest less smallest bits among the seeds
    steps: list[int]


def curve(results: dict, method: str) -> Curve:
    groups: dict[str, list[dict]] = {}
    for found in results["points"]:
        if found["method"] == method:
            groups.setdefault(found["setting"], []).append(found)
    of = list(groups.values())
    return Curve(
        list(groups),
        [statistics.mean(p["kept"] for p in group) for group in of],
        [statistics.mean(p["bits"] for p in group) for group in of],
        [max(p["bits"] for p in group) - min(p["bits"] for p in group) for group in of],
        [group[0]["steps"] for group in of],
    )


def at_equal_parameters(lora: Curve, parameters: float) -> float | None:
    """Bits of LoRA with so many parameters: between its ranks by the logarithm of their number,
    None outside them."""
    pairs = sorted(zip(lora.kept, lora.bits, strict=True))
    for (k0, b0), (k1, b1) in itertools.pairwise(pairs):
        if k0 <= parameters <= k1:
            return b0 + (b1 - b0) * math.log(parameters / k0) / math.log(k1 / k0)
    return None


def verdicts(results: dict) -> list[tuple[str, str, bool]]:
    """(the claim, what was measured, whether it holds)."""
    lora, sora = curve(results, LORA), curve(results, SORA)
    noise = statistics.mean(lora.apart)
    found = []
    for setting, parameters, bits, steps in zip(
        sora.settings, sora.kept, sora.bits, sora.steps, strict=True
    ):
        other = at_equal_parameters(lora, parameters)
        if other is None:
            continue
        said = (
            f"{setting}, {parameters:,.0f} parameters, {steps} steps: {bits:.4f} bits, LoRA "
            f"{other:.4f}; LoRA's seeds are {noise:.4f} apart"
        )
        found.append(("SoRA at equal parameters is at least as good", said, bits <= other + noise))
    share = [parameters / max(lora.kept) for parameters in sora.kept]
    fewer = [i for i, part in enumerate(share) if part <= 0.7]
    if fewer:
        i, best = fewer[0], lora.bits[lora.kept.index(max(lora.kept))]
        said = (
            f"{share[i]:.0%} of LoRA's largest at {sora.settings[i]}: {sora.bits[i]:.4f} bits, "
            f"LoRA {best:.4f}"
        )
        found.append(
            ("quality is held at 70 % of the parameters", said, sora.bits[i] <= best + noise)
        )
    for claim, name, other, bound in (
        ("a step of SoRA takes at most 1.03 of LoRA's", SORA, LORA, 1.03),
        ("a step of SoRA takes less than 0.9 of PEFT AdaLoRA's", SORA, PEFT_ADALORA, 0.9),
    ):
        share = ratio(results["seconds"], name, other)
        again = ratio(results["seconds"], f"{LORA} again", LORA)
        said = f"{share:.3f}; LoRA in itself: {again:.3f}"
        found.append((claim, said, share <= bound))
    return found


def markdown(results: dict) -> str:
    lines = [
        *claims.heading(results),
        f"{results['model']}, {results['plan']['seeds']} seeds; before adapting: "
        f"{results['before']:.4f} bits per byte of held-out prose.",
        "",
        "| method | setting | parameters kept | bits a byte | seeds apart | steps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method in (LORA, SORA, RAISED, ADALORA):
        for row in zip(*curve(results, method), strict=True):
            setting, parameters, bits, apart, steps = row
            lines.append(
                f"| {method} | {setting} | {parameters:,.0f} | {bits:.4f} | {apart:.4f} | {steps} |"
            )
    lines += ["", "| a step of | ms: p50 [p20 - p80] | of LoRA's |", "| --- | --- | --- |"]
    for name, seconds in results["seconds"].items():
        share = ratio(results["seconds"], name, LORA)
        lines.append(f"| {name} | {claims.milliseconds(seconds)} | {share:.3f} |")
    return "\n".join([*lines, *claims.answers(verdicts(results))]) + "\n"


COLORS = {LORA: "#8d99ae", SORA: "#d1495b", RAISED: "#edae49", ADALORA: "#2a6f97"}


def draw(results: dict, path: Path) -> None:
    from fused_lora.bench.plots import GRID, INK, _figure

    if (figure := _figure(path, figsize=(10, 4.2))) is None:
        return
    quality, speed = figure.subplots(1, 2, width_ratios=(3, 2))
    for method, color in COLORS.items():
        found = curve(results, method)
        half = [apart / 2 for apart in found.apart]
        quality.errorbar(found.kept, found.bits, half, color=color, marker="o", label=method)
    quality.set_xscale("log")
    quality.set(xlabel="parameters kept", ylabel="bits a byte of held-out prose")
    quality.legend(frameon=False)
    names = list(results["seconds"])[::-1]
    ratios = [ratio(results["seconds"], name, LORA) for name in names]
    speed.barh(names, ratios, color=[COLORS.get(name, "#c9d1d9") for name in names])
    speed.axvline(1, color=INK, linewidth=0.8)
    speed.set_xlabel("time of a step, of LoRA's")
    for axes in (quality, speed):
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    facts = results["machine"]
    figure.suptitle(f"LoRA, SoRA and AdaLoRA on {facts['device']}", color=INK)
    figure.savefig(path, dpi=110)


def save(results: dict, folder: Path) -> Path:
    """Write methods.json, .md and .png; returns their path without suffix."""
    path = claims.save(results, markdown(results), folder)
    draw(results, path.with_suffix(".png"))
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m fused_lora.bench.methods", __doc__)
    parser.add_argument("--stage", choices=sorted(STAGES), help="default: by the device")
    chosen = parser.chosen(arguments)
    stage = chosen.stage or ("gpu" if chosen.device.type == "cuda" else "cpu")
    notes = chosen.out / f"{NAME}.unfinished.json"
    results = measure(STAGES[stage], chosen.device, notes, progress)
    path = save(results, chosen.out)
    print(path.with_suffix(".md").read_text())
    print(f"{path}: .json, .md, .png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
