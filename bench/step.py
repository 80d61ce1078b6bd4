"""A whole training step of a Llama with LoRA on every linear layer: PEFT's, PEFT's compiled, ours.

    python -m fused_lora.bench.step [--stage STAGE] [--out DIR]

A step is forward, backward and AdamW. The models are of transformers, with random weights. Loss and
adapter gradients of every contender stand behind a gate: they may err against fp64 twice as much as
PEFT's, or the contender is refused by name and the exit status is 1. Contenders take turns within a
round.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from fused_lora.bench.measure import Spread
from fused_lora.bench.report import Report, machine
from fused_lora.bench.run import Parser, contenders_named, progress
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fused_lora as fl

NAME = "training_step"
BASELINE, AGAIN = "PEFT", "PEFT again"
OURS = "torch", "triton", "cuda", "torch, compiled"
LEARNING_RATE, ALPHA_OVER_R = 1e-4, 2.0
GATED_TOKENS = 256  # of one sequence: attention in fp64 keeps its scores


class StepCase(NamedTuple):
    """A Llama and its batch."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    length: int
    R: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.float32

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.batch} x {self.length} tokens, r={self.R} p={self.p:g} {dtype}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def _cases(layer: StepCase, model: StepCase) -> list[StepCase]:
    return [case._replace(p=p) for p in (0.0, 0.1) for case in (layer, model)]


BF16 = torch.bfloat16
STAGES = {
    "gpu": _cases(
        StepCase("Llama-3-8B layer", 1, 4096, 14336, 32, 8, 256, 4, 2048, dtype=BF16),
        StepCase("1.1 B model", 22, 2048, 5632, 32, 4, 32000, 4, 1024, dtype=BF16),
    ),
    "cpu": _cases(
        StepCase("layer", 1, 512, 1408, 8, 4, 256, 2, 128),
        StepCase("8 M model", 6, 256, 704, 4, 2, 4096, 2, 128),
    ),
    "cpu-quick": [StepCase("tiny model", 2, 32, 48, 4, 2, 64, 2, 12)],
}


def llama(case: StepCase, device: torch.device) -> nn.Module:
    """Random weights, the same whenever it is asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=case.layers,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        vocab_size=case.vocab,
        max_position_embeddings=case.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device, case.dtype)


def with_peft(case: StepCase, device: torch.device, **options) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=case.R,
        lora_alpha=ALPHA_OVER_R * case.R,
        lora_dropout=case.p,
        target_modules="all-linear",
        init_lora_weights=False,
    )
    model = llama(case, device)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config, **options)


def with_ours(case: StepCase, device: torch.device) -> nn.Module:
    """The adapters are fp32, as PEFT holds them."""
    config = fl.LoRAConfig(
        r=case.R,
        lora_alpha=ALPHA_OVER_R * case.R,
        lora_dropout=case.p,
        target_modules="all-linear",
    )
    return fl.inject(llama(case, device), config, adapter_dtype=torch.float32)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """{"layer's name A" or B: parameter}, under the names of the model without adapters."""
    prefix, found = "base_model.model.", {}
    for name, module in model.named_modules():
        name = name.removeprefix("_orig_mod.").removeprefix(prefix)
        if isinstance(module, fl.nn.LoRALinear):
            found |= {f"{name} A": module.lora_a, f"{name} B": module.lora_b}
        elif hasattr(module, "lora_A"):
            pair = module.lora_A["default"].weight, module.lora_B["default"].weight
            found |= {f"{name} A": pair[0], f"{name} B": pair[1]}
    return found


class Contender(NamedTuple):
    model: Callable[[StepCase, torch.device], nn.Module]
    backend: str | None = None  # of ours
    compiled: bool = False

    def unavailable(self) -> str | None:
        return fl.backends()[self.backend] if self.backend else None


def _peft_in_dtype(case, device):
    return with_peft(case, device, autocast_adapter_dtype=False)


CONTENDERS = {
    BASELINE: Contender(with_peft),
    AGAIN: Contender(with_peft),
    "PEFT, adapters in the model's dtype": Contender(_peft_in_dtype),
    "PEFT, compiled": Contender(with_peft, compiled=True),
    "torch": Contender(with_ours, backend="torch"),
    "triton": Contender(with_ours, backend="triton"),
    "cuda": Contender(with_ours, backend="cuda"),
    "torch, compiled": Contender(with_ours, backend="torch", compiled=True),
}


class Training:
    """A contender's model and optimiser."""

    def __init__(self, contender: Contender, case: StepCase, device: torch.device, start: dict):
        self.backend = contender.backend
        self.model = contender.model(case, device)
        self.adapters = adapters(self.model)
        with torch.no_grad():
            for name, value in start.items():
                self.adapters[name].copy_(value)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=LEARNING_RATE, fused=device.type == "cuda"
        )
        self.forward = torch.compile(self.model) if contender.compiled else self.model

    def backward(self, tokens: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with fl.use_backend(self.backend):
            loss = self.forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
        return loss.detach()

    def step(self, tokens: Tensor) -> None:
        self.backward(tokens)
        self.optimizer.step()

    def gradients(self, tokens: Tensor) -> Tensor:
        """The loss and all gradients of adapters in one fp64 vector, without dropout."""
        self.model.eval()
        loss = self.backward(tokens)
        self.model.train()
        grads = [self.adapters[name].grad.flatten() for name in sorted(self.adapters)]
        return torch.cat([loss.reshape(1), *grads]).double()


def gate(error: float, of_baseline: float, dtype: torch.dtype) -> str | None:
    """What is wrong with an error against fp64 of more than twice the baseline's and an ulp."""
    if error <= 2 * of_baseline + torch.finfo(dtype).eps:
        return None
    return (
        f"its gradients differ from fp64 by {error:.2e}, those of {BASELINE} by {of_baseline:.2e}"
    )


class Steps:
    """The contenders of one case that have passed the gate, and why the others are refused."""

    def __init__(self, case: StepCase, contenders: dict[str, Contender], device: torch.device):
        self.case, self.device, self.random = case, device, random.Random(0)
        generator = torch.Generator().manual_seed(2)
        shape = case.batch, case.length
        self.tokens = torch.randint(case.vocab, shape, generator=generator).to(device)
        few = self.tokens[:1, :GATED_TOKENS]
        peft = with_peft(case, device)
        start = {name: t.detach().clone() for name, t in adapters(peft).items()}
        del peft
        truth = self._truth(start, few)
        self.trainings: dict[str, Training] = {}
        self.errors: dict[str, float] = {}
        self.peaks: dict[str, int | None] = {}
        self.refused: dict[str, str] = {}
        for name, contender in contenders.items():  # the baseline first
            before = self._allocated()
            try:
                training = Training(contender, case, device, start)
                found = training.gradients(few)
                peak = self._peak(training, before)
            except Exception as failure:
                if name == BASELINE:
                    raise
                self.refused[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
                continue
            error = ((found - truth).norm() / truth.norm()).item()
            reason = gate(error, self.errors.get(BASELINE, error), case.dtype)
            if reason:
                self.refused[name] = reason
                continue
            self.errors[name], self.peaks[name] = error, peak
            self.trainings[name] = training
        with FlopCounterMode(display=False) as counter:
            self.trainings[BASELINE].step(self.tokens)
        self.flops = counter.get_total_flops()
        self.rounds: list[dict[str, float]] = []

    def _truth(self, start: dict[str, Tensor], tokens: Tensor) -> Tensor:
        double = Contender(lambda case, device: with_peft(case, device).double())
        return Training(double, self.case, self.device, start).gradients(tokens)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _peak(self, training: Training, before: int) -> int | None:
        """The most memory in use in a step, the model's and the optimiser's own among it."""
        training.step(self.tokens)
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        training.step(self.tokens)
        return torch.cuda.max_memory_allocated() - before

    def _seconds(self, training: Training) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        training.step(self.tokens)
        wait()
        return time.perf_counter() - start

    def round(self) -> None:
        order = self.random.sample(list(self.trainings), len(self.trainings))
        self.rounds.append({name: self._seconds(self.trainings[name]) for name in order})

    def result(self) -> dict:
        """As a Report takes it: one mode, "eager", and one direction, "step"."""
        times = {}
        for name in self.trainings:
            seconds = [r[name] for r in self.rounds]
            over = statistics.median(r[name] / r[BASELINE] for r in self.rounds)
            entry = {**Spread.of(seconds)._asdict(), "over": {BASELINE: over}, "all": seconds}
            times[name] = {"eager": {"step": entry}}
        case = self.case
        return {
            "label": str(case),
            "case": {**case._asdict(), "dtype": str(case.dtype).removeprefix("torch.")},
            "tokens": case.tokens,
            "trained": sum(t.numel() for t in self.trainings[BASELINE].trained),
            "flops": {"step": self.flops},
            "times": times,
            "errors": self.errors,
            "memory": {name: {"peak": peak} for name, peak in self.peaks.items()},
            "failed": {},
            "refused": self.refused,
        }


def measure(
    cases: Iterable[StepCase],
    device: torch.device,
    *,
    rounds: int,
    seconds: float | None = None,
    only: Iterable[str] | None = None,
) -> dict:
    """Results as StepReport takes them. After `seconds` no further case is begun; `only` names the
    contenders beside the baseline and its repetition."""
    missing = {name: why for name, c in CONTENDERS.items() if (why := c.unavailable())}
    chosen = {
        name: c
        for name, c in CONTENDERS.items()
        if name not in missing and (only is None or name in {BASELINE, AGAIN, *only})
    }
    results: dict = {"op": NAME, "machine": machine(device), "cases": [], "unmeasured": {}}
    results["missing"] = missing
    start = time.perf_counter()
    for case in cases:
        if seconds is not None and time.perf_counter() - start > seconds:
            results["unmeasured"][str(case)] = f"the {seconds:g} s of the run were over"
            continue
        torch.compiler.reset()
        measured = Steps(case, chosen, device)
        for _ in range(rounds):
            measured.round()
        results["cases"].append(measured.result())
    return results


class StepOp(NamedTuple):
    name: str = NAME
    floor: str = BASELINE
    baseline: str = BASELINE
    ours: tuple[str, ...] = OURS


class StepReport(Report):
    """Tokens a second instead of flops, and one row a contender."""

    def __init__(self, results: dict):
        super().__init__(results, StepOp())

    def tokens_per_s(self, case: dict, name: str) -> float:
        return case["tokens"] / case["times"][name]["eager"]["step"]["p50"]

    def table(self, mode: str) -> tuple[list[str], list[list[str]]]:
        header = [
            "case",
            "contender",
            "ms",
            "tokens/s",
            f"speed over {BASELINE}",
            "peak GB",
            "error",
        ]
        rows = []
        for case in self.cases:
            for name, modes in case["times"].items():
                entry, peak = modes[mode]["step"], case["memory"][name]["peak"]
                p20, p50, p80 = (1e3 * entry[key] for key in ("p20", "p50", "p80"))
                slow = self.slower(case, mode, "step", name) and name in self.op.ours
                rows.append(
                    [
                        case["label"],
                        name,
                        f"{p50:.4g} [{p20:.4g} - {p80:.4g}]",
                        f"{self.tokens_per_s(case, name):.0f}",
                        f"{1 / entry['over'][BASELINE]:.2f}" + " SLOWER" * slow,
                        "-" if peak is None else f"{peak / 1e9:.2f}",
                        f"{case['errors'][name]:.1e}",
                    ]
                )
        return header, rows

    def flat(self):
        for case in self.cases:
            for name, modes in case["times"].items():
                entry = modes["eager"]["step"]
                yield {
                    "op": NAME,
                    **case["case"],
                    "contender": name,
                    **{key: entry[key] for key in ("p20", "p50", "p80")},
                    f"over {BASELINE}": entry["over"][BASELINE],
                    "tokens/s": self.tokens_per_s(case, name),
                    "peak bytes": case["memory"][name]["peak"],
                    "error": case["errors"][name],
                }

    def draw(self, path: Path) -> None:
        from fused_lora.bench.plots import plot_steps

        plot_steps(self, path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m fused_lora.bench.step", __doc__)
    parser.add_argument("--stage", choices=sorted(STAGES), help="default: by the device")
    parser.add_argument("--only", help="contenders, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, help="no case is begun after them")
    chosen = parser.chosen(arguments)
    if chosen.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {chosen.rounds}")
    chosen.only = contenders_named(parser, chosen.only, CONTENDERS)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    stage = chosen.stage or ("gpu" if chosen.device.type == "cuda" else "cpu")
    results = measure(
        progress(STAGES[stage]),
        chosen.device,
        rounds=chosen.rounds,
        seconds=chosen.seconds,
        only=chosen.only,
    )
    report = StepReport(results)
    report.print()
    report.save(chosen.out, stage)
    print(f"{chosen.out / NAME}-{stage}: .json, .csv, .md, .png")
    print(*(f"REFUSED {line}" for line in report.refused()), sep="\n", end="", file=sys.stderr)
    return 1 if report.refused() else 0


if __name__ == "__main__":
    raise SystemExit(main())
