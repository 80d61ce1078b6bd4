"""fl.accelerate: forward and backward of a PEFT model, as it is and accelerated.

    python -m fused_lora.bench.accelerate [--stage STAGE] [--out DIR]

Single layers and small language models of random weights. A call is forward and backward. The PEFT
model and an accelerated copy, each of them twice, take turns within a round, in a new order each:
PEFT's second time gives the noise, and with that of the copy neither finds its code and weights in
the caches more often than the other. The copy stands behind a gate: without dropout its output and
gradients may err against fp64 twice as much as PEFT's, or it is refused by name and the exit status
is 1.
"""

import contextlib
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from fused_lora.bench import claims
from fused_lora.bench.report import machine
from fused_lora.bench.run import Parser, progress
from fused_lora.bench.step import STAGES as STEPS
from fused_lora.bench.step import StepCase, gate, llama
from torch import Tensor, nn

import fused_lora as fl

NAME = "accelerate"
TITLE = "fl.accelerate beside PEFT"
BASELINE, AGAIN = "PEFT", "PEFT again"
OURS, OURS_AGAIN = "accelerated", "accelerated again"
R = 16


class Layer(NamedTuple):
    """One nn.Linear of K inputs and N outputs, for M rows."""

    M: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.K} to {self.N}, {self.M} rows"

    def build(self, device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        """(the model without adapters, a call of it)."""
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(self.K, self.N)).to(device)
        x = torch.randn(self.M, self.K, device=device, requires_grad=True)
        return base, lambda model: model(x.to(next(model.parameters()).dtype))


class Llama(NamedTuple):
    """A Llama and its batch, as bench/step.py has them."""

    case: StepCase

    def __str__(self) -> str:
        return f"{self.case.name}, {self.case.batch} x {self.case.length} tokens"

    def build(self, device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        base = llama(self.case, device)
        shape = self.case.batch, self.case.length
        ids = torch.randint(self.case.vocab, shape, generator=torch.Generator().manual_seed(2))
        ids = ids.to(device)
        return base, lambda model: model(input_ids=ids).logits


Model = Layer | Llama

OPTIONS: dict[str, dict] = {
    "LoRA": {},
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}
ROUNDS = 9, 60


class Case(NamedTuple):
    model: Model
    options: str
    precision: str

    def __str__(self) -> str:
        return f"{self.model}, {self.options}, {self.precision}"


def _cases(precision: str, *models: Model) -> list[Case]:
    return [Case(model, options, precision) for model in models for options in OPTIONS]


_LLAMAS = [Llama(case) for case in STEPS["cpu"] if not case.p]

STAGES = {
    # Without instructions for bf16 a CPU takes many times as long as for fp32: smaller models.
    "cpu": [
        *_cases(
            "fp32",
            Layer(512, 256, 256),
            Layer(512, 1024, 1024),
            Layer(512, 1024, 4096),
            Layer(64, 2048, 2048),
            Layer(2048, 768, 768),
            *_LLAMAS,
        ),
        *_cases(
            "bf16 autocast",
            Layer(512, 256, 256),
            Layer(128, 512, 512),
            Layer(128, 256, 1024),
            Layer(16, 1024, 1024),
            Layer(1024, 192, 192),
            *(Llama(one.case._replace(batch=2, length=32)) for one in _LLAMAS[:1]),
        ),
    ],
    "cpu-quick": [
        *_cases("fp32", Layer(6, 8, 12)),
        *_cases("bf16 autocast", Layer(6, 8, 12)),
        Case(Llama(STEPS["cpu-quick"][0]), "LoRA", "fp32"),
    ],
}


def with_peft(base: nn.Module, options: str) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=R,
        lora_alpha=2 * R,
        target_modules=["0"] if isinstance(base, nn.Sequential) else "all-linear",
        init_lora_weights=False,
        **OPTIONS[options],
    )
    torch.manual_seed(1)
    return peft.get_peft_model(base, config)


class Contest:
    """The contenders of one case; `refused` says why one is not timed."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device, self.random = case, device, random.Random(0)
        base, self.call = case.model.build(device)
        stock = with_peft(base, case.options)
        ours = copy.deepcopy(stock)
        report = fl.accelerate(ours)
        self.models = {BASELINE: stock, AGAIN: stock, OURS: ours, OURS_AGAIN: ours}
        self.refused = self._verdict(stock, ours)
        if report.fallbacks:
            self.refused = f"it ran PEFT's forward: {report!r}"
        if self.refused:
            del self.models[OURS], self.models[OURS_AGAIN]
        self.rounds: list[dict[str, float]] = []

    def _autocast(self):
        if self.case.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def run(self, model: nn.Module) -> Tensor:
        model.zero_grad()
        with self._autocast():
            y = self.call(model)
        y.square().mean().backward()
        return y.detach()

    def _results(self, model: nn.Module) -> Tensor:
        """Output and gradients without dropout, each divided by its norm in none of them."""
        model.eval()
        found = [self.run(model), *(p.grad for p in model.parameters() if p.grad is not None)]
        model.train()
        return torch.cat([t.double().flatten() for t in found])

    def _verdict(self, stock: nn.Module, ours: nn.Module) -> str | None:
        dtype = torch.float32 if self.case.precision == "fp32" else torch.bfloat16
        theirs, mine = self._results(stock), self._results(ours)
        double = copy.deepcopy(stock).double()
        with torch.autocast(self.device.type, enabled=False):
            precision, self.case = self.case.precision, self.case._replace(precision="fp32")
            true = self._results(double)
            self.case = self.case._replace(precision=precision)
        errors = [((found - true).norm() / true.norm()).item() for found in (mine, theirs)]
        return gate(*errors, dtype)

    def _seconds(self, model: nn.Module) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        self.run(model)
        wait()
        return time.perf_counter() - start

    def round(self) -> None:
        order = self.random.sample(list(self.models), len(self.models))
        self.rounds.append({name: self._seconds(self.models[name]) for name in order})

    def measure(self, seconds: float) -> dict:
        """As many rounds as fit in the time, from two that do not count."""
        self.round()
        start = time.perf_counter()
        self.round()
        fit = int(seconds / (time.perf_counter() - start))
        self.rounds.clear()
        for _ in range(max(ROUNDS[0], min(ROUNDS[1], fit))):
            self.round()
        return {
            "label": str(self.case),
            "options": self.case.options,
            "precision": self.case.precision,
            "refused": self.refused,
            "seconds": {name: [r[name] for r in self.rounds] for name in self.models},
        }


def ratio(row: dict, name: str = OURS) -> float:
    """The median, over the rounds, of the time over PEFT's."""
    return claims.ratio(row["seconds"], name, BASELINE)


def noise(rows: list[dict]) -> float:
    """What 95 % of the rows stay within where PEFT is timed against itself."""
    apart = sorted(abs(ratio(row, AGAIN) - 1) for row in rows)
    return apart[int(0.95 * (len(apart) - 1))]


def verdicts(results: dict) -> list[tuple[str, str, bool]]:
    """(the claim, what was measured, whether it holds)."""
    rows = results["rows"]
    timed = [row for row in rows if not row["refused"]]
    if not timed:
        return [("it runs", "every row is refused", False)]
    ratios, limit = {row["label"]: ratio(row) for row in timed}, 1 + noise(rows)
    slower = [label for label, found in ratios.items() if found > limit]
    worst = max(ratios, key=lambda label: ratios[label])
    median = statistics.median(ratios.values())
    return [
        (
            "in no row slower than PEFT by more than the noise",
            f"{len(slower)} of {len(ratios)} rows are above {limit:.2f}; the worst is "
            f"{ratios[worst]:.2f} ({worst})",
            not slower,
        ),
        ("faster in the median", f"{median:.2f} of PEFT's time", median < 1),
    ]


def markdown(results: dict) -> str:
    rows = results["rows"]
    lines = claims.heading(results)
    lines += [f"- noise: PEFT timed twice, within {noise(rows):.1%} in 95 % of rows"]
    for key in ("options", "precision"):
        for kind in dict.fromkeys(row[key] for row in rows):
            some = [ratio(row) for row in rows if row[key] == kind and not row["refused"]]
            if some:
                median = statistics.median(some)
                lines.append(f"- {kind}: {median:.2f} of PEFT's time in the median")
    lines += ["", "A time is p50 [p20 - p80] of a call; a ratio is the median of those in a round."]
    lines += [
        "",
        f"| case | {BASELINE} ms | {OURS} ms | {OURS} / {BASELINE} |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["label"]]
        for name in (BASELINE, OURS):
            found = row["seconds"].get(name)
            cells.append(claims.milliseconds(found) if found else "-")
        slow = not row["refused"] and ratio(row) > 1 + noise(rows)
        cells.append(row["refused"] or f"{ratio(row):.2f}" + " SLOWER" * slow)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *claims.answers(verdicts(results))]) + "\n"


def save(results: dict, folder: Path) -> Path:
    """Write accelerate.json and .md; returns their path without suffix."""
    return claims.save(results, markdown(results), folder)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m fused_lora.bench.accelerate", __doc__)
    parser.add_argument("--stage", choices=sorted(STAGES), default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the rounds of one case")
    chosen = parser.chosen(arguments)
    cases = progress(STAGES[chosen.stage])
    rows = [Contest(case, chosen.device).measure(chosen.seconds) for case in cases]
    results = {"op": NAME, "machine": machine(chosen.device), "rows": rows}
    save(results, chosen.out)
    print(markdown(results))
    refused = [f"REFUSED {row['label']}: {row['refused']}" for row in rows if row["refused"]]
    print(*refused, sep="\n", end="", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
