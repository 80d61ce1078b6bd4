"""Measures every contender of an operation, and writes what it found.

    python -m fused_lora.bench.run [--stage STAGE] [--out DIR]      also: fused-lora bench

Each number stands behind a gate: output and gradients are checked against fp64 first. What is
wrong, or faster than the chip's datasheet allows, is refused by name, and the exit status is 1. How
times are taken: fused_lora.bench.measure.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from fused_lora.bench.measure import MODES, Cuda, Interleaved
from fused_lora.bench.registry import OPS, Op, Stage
from fused_lora.bench.report import Report, case_result, machine

STAGES = {"cpu": ["cpu"], "cuda": ["training", "decode"]}


def measure(
    op: Op,
    stage: Stage,
    device: torch.device,
    *,
    seconds: float | None = None,
    only: Iterable[str] | None = None,
    case_seconds: float | None = None,
    track=lambda cases: cases,
    keep=lambda results: None,
) -> dict:
    """The results of a stage, as Report takes them.

    After `seconds` no further case is begun. `only` names the contenders beside the floor, the
    baseline and its repetition. keep(results) is called after every case.
    """
    wanted = [name for names in (stage.contenders, only) if names is not None for name in [*names]]
    always = op.floor, op.baseline, f"{op.baseline} again"
    contenders = {
        name: contender
        for name, contender in op.contenders.items()
        if name in always or not wanted or all(name in n for n in (stage.contenders, only) if n)
    }
    results: dict = {
        "op": op.name,
        "machine": machine(device),
        "cases": [],
        "missing": {},
        "unmeasured": {},
    }
    reasons: dict[str, set[str]] = {name: set() for name in contenders}
    start = time.perf_counter()
    graphs = Cuda() if "cold" in MODES[device.type] else None
    for case in track(stage.cases):
        if seconds is not None and time.perf_counter() - start > seconds:
            results["unmeasured"][str(case)] = f"the {seconds:g} s of the run were over"
            continue
        refused = {name: c.unavailable(device, case) for name, c in contenders.items()}
        for name, reason in refused.items():
            if reason:
                reasons[name].add(reason)
        present = {name: c for name, c in contenders.items() if not refused[name]}
        try:
            measured = Interleaved(op, case, present, device, stage.directions, graphs)
        except torch.cuda.OutOfMemoryError as error:
            results["unmeasured"][str(case)] = str(error).splitlines()[0]
            continue
        for _ in range(measured.plan(case_seconds)):
            measured.round()
        measured.check_floors()
        results["cases"].append(case_result(op, case, measured))
        keep(results)
    found = {name for case in results["cases"] for name in case["times"]}
    results["missing"] = {
        name: "; ".join(sorted(why)) for name, why in reasons.items() if why and name not in found
    }
    return results


def progress(cases):
    """A bar, where rich is installed."""
    try:
        from rich.progress import track
    except ImportError:
        return cases
    return track(cases, description="measuring")


class Parser(argparse.ArgumentParser):
    """The options of every benchmark, --out and --device, and those that are added; the text of
    --help is the first line of `doc`."""

    def __init__(self, prog: str, doc: str):
        super().__init__(prog=prog, description=doc.partition("\n")[0])
        self.add_argument(
            "--out", type=Path, default=Path("bench_out"), help="folder of the results"
        )
        self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    def chosen(self, arguments: list[str] | None) -> argparse.Namespace:
        """What was asked for; device is a torch.device. The threads of a CPU are set."""
        found = self.parse_args(arguments)
        if found.device.startswith("cuda") and not torch.cuda.is_available():
            self.error(f"--device {found.device}: torch sees no CUDA device")
        found.device = torch.device(found.device)
        if found.device.type == "cpu":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
        return found


def contenders_named(parser: Parser, only: str | None, known: Iterable[str]) -> list[str] | None:
    """Those of --only, "a, b": an error of the parser where one is not known."""
    names = only and [name.strip() for name in only.split(",")]
    if unknown := sorted(set(names or ()) - set(known)):
        parser.error(f"--only: no contender {', '.join(unknown)}; there are {'; '.join(known)}")
    return names


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("fused-lora bench", __doc__)
    stages = sorted({name for op in OPS.values() for name in op.stages})
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="default: every one")
    parser.add_argument("--stage", choices=stages, action="append", help="default: by the device")
    parser.add_argument("--only", help="contenders, separated by commas; default: all")
    parser.add_argument("--seconds", type=float, help="for a stage: no case is begun after them")
    parser.add_argument("--case-seconds", type=float, help="for the rounds of one case")
    chosen = parser.chosen(arguments)
    known = dict.fromkeys(name for op in OPS.values() for name in op.contenders)
    chosen.only = contenders_named(parser, chosen.only, known)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    refused: list[str] = []
    for name in chosen.op or OPS:
        op = OPS[name]
        for stage in chosen.stage or STAGES[chosen.device.type]:
            if stage not in op.stages:
                continue
            results = measure(
                op,
                op.stages[stage],
                chosen.device,
                seconds=chosen.seconds,
                only=chosen.only,
                case_seconds=chosen.case_seconds,
                track=progress,
                keep=lambda results, stage=stage: Report(results).keep(chosen.out, stage),
            )
            report = Report(results)
            report.print()
            report.save(chosen.out, stage)
            print(f"{chosen.out / op.name}-{stage}: .json, .csv, .md, .png")
            refused += report.refused()
    print(*(f"REFUSED {line}" for line in refused), sep="\n", end="", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
