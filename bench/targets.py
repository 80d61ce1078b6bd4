"""The targets, set for one H200, bf16, r = 16, beside what was measured on a GPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fused_lora.bench.hopper import best
from fused_lora.bench.report import Report, merged

SQUARE, NARROW, WIDE, DOWN = (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)
QKV = (4096, 1024, 1024), 4096
LONG = 2048, 8192, 16384
# What a copy reaches, read and write together.
COPY_BYTES_PER_S = {"H200": 4.3e12, "H100": 3.0e12}


# W0, 64 adapters of r = 16, 64 rows of x and of y, 4096x4096 in bf16.
DISTINCT_BYTES = 2 * (4096**2 + 64 * 16 * 8192 + 64 * 8192)

CHAIN = "chained addmm_"
# The triton backend with every sum on the route to the Gluon kernel: fused_lora.bench.hopper.
GLUON = "gluon"


class Results(NamedTuple):
    """A report of lora_linear, one of multi_lora_linear and one of lora_linear_group, the DRAM
    bytes {contender: {"read", "write"}}, and what bench.hopper found, as far as they are known."""

    report: Report | None
    multi: Report | None
    group: Report | None
    dram: dict[str, dict]
    hopper: dict

    def cases(self, shapes, rows, p=0.0) -> Iterator[dict]:
        for case in self.report.cases if self.report else ():
            c = case["case"]
            usual = c["R"] == 16 and c["dtype"] == "bfloat16" and c["p"] == p
            if usual and (c["N"], c["K"]) in shapes and c["M"] in rows:
                yield case

    def sums(self, form, layers, rows) -> Iterator[dict[str, float]]:
        """The times {call: us} of bench.hopper for layers (the outputs of each part, K)."""
        for row in self.hopper.get("times", ()):
            layer = tuple(row["parts"]) or (row["N"],), row["K"]
            if row["form"] == form and row["M"] in rows and layer in layers:
                yield row["us"]

    @property
    def device(self) -> str | None:
        reports = [report for report in self[:3] if report]
        return reports[0].results["machine"]["device"] if reports else None

    @property
    def copy_bytes_per_s(self) -> float | None:
        """None on a GPU whose rate is not known."""
        name = self.device or ""
        return next((rate for chip, rate in COPY_BYTES_PER_S.items() if chip in name), None)

    def seconds(self, case, direction, name) -> float | None:
        found = self.report.times(case, "cold", direction, name)
        return found and found["p50"]


class Target(NamedTuple):
    """must and aim bound `value(results, contender)` from above, or where `least` from below."""

    what: str
    must: float
    aim: float
    value: Callable[[Results, str], float | None]
    least: bool = False

    def verdict(self, value: float | None) -> tuple[str, str]:
        """("met", "missed" or "not measured", what more there is to say)."""
        if value is None:
            return "not measured", ""
        missed = self.must - value if self.least else value - self.must
        if missed > 0:
            return "missed", f" by {missed:.2f}"
        aimed = value >= self.aim if self.least else value <= self.aim
        return "met", ", and the aim" if aimed else ""


def worst(values: list[float | None], least: bool = False) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return min(known) if least else max(known)


def over_floor(direction: str, shapes, rows=LONG) -> Callable:
    """The largest ratio to the bare product: in the backward that is the product of dx."""
    layers = [((N,), K) for N, K in shapes]

    def value(results: Results, name: str) -> float | None:
        if name == GLUON and direction == "backward":
            return worst([us["backward"] / us["cublas"] for us in results.sums("dx", layers, rows)])
        if name == GLUON:
            found = results.sums(direction, layers, rows)
            return worst([best(us, "with an adapter: ") / us["cublas"] for us in found])
        return worst(
            [
                results.report.ratio(case, "cold", direction, name, results.report.op.floor)
                for case in results.cases(shapes, rows)
            ]
        )

    return value


def faster_than(other: str, shapes, rows) -> Callable:
    """The smallest speedup of forward and backward over another contender."""

    def value(results: Results, name: str) -> float | None:
        speedups = []
        for case in results.cases(shapes, rows):
            theirs, ours = (results.seconds(case, "both", n) for n in (other, name))
            speedups.append(theirs / ours if theirs and ours else None)
        return worst(speedups, least=True)

    return value


def dropout_cost(direction: str) -> Callable:
    """The largest ratio of a time at p = 0.1 to that at p = 0."""

    def value(results: Results, name: str) -> float | None:
        shapes, ratios = (SQUARE, NARROW, WIDE, DOWN), []
        without = {tuple(c["case"][k] for k in "MNK"): c for c in results.cases(shapes, LONG)}
        for case in results.cases(shapes, LONG, p=0.1):
            twin = without.get(tuple(case["case"][k] for k in "MNK"))
            times = [c and results.seconds(c, direction, name) for c in (case, twin)]
            ratios.append(times[0] / times[1] if all(times) else None)
        return worst(ratios)

    return value


def share_of_bandwidth(results: Results, name: str) -> float | None:
    shares, rate = [], results.copy_bytes_per_s
    for case in results.cases((WIDE,), (1, 4, 16)):
        seconds = results.seconds(case, "forward", name)
        shares.append(case["bytes"]["forward"] / seconds / rate if seconds and rate else None)
    return worst(shares, least=True)


def dram_gib(results: Results, name: str) -> float | None:
    found = results.dram.get(name)
    return found and (found["read"] + found["write"]) / 2**30


def against_the_best(results: Results, name: str) -> float | None:
    """The smallest speedup over the best of addmm_ and torch.compile, anywhere."""
    speedups = []
    rivals = "addmm", "compiled", "compiled, autotuned"
    for case, mode, direction in results.report.rows() if results.report else ():
        ours = results.report.times(case, mode, direction, name)
        theirs = [results.report.times(case, mode, direction, rival) for rival in rivals]
        known = [t["p50"] for t in theirs if t]
        if mode == "cold" and ours and known:
            speedups.append(min(known) / ours["p50"])
    return worst(speedups, least=True)


def distinct_seconds(results: Results, name: str) -> float | None:
    """Of 64 rows that each have an adapter of their own, 4096x4096, r = 16, cold."""
    for case in results.multi.cases if results.multi else ():
        c = case["case"]
        size = c["M"], c["N"], c["K"], c["R"], c["G"], c["popularity"], c["p"], c["dtype"]
        if size == (64, 4096, 4096, 16, 64, "distinct", 0, "bfloat16"):
            found = results.multi.times(case, "cold", "forward", name)
            return found and found["p50"]
    return None


def over_vllm(results: Results, name: str) -> float | None:
    """vLLM's own kernels where they were measured, else their form."""
    ours = distinct_seconds(results, name)
    theirs = distinct_seconds(results, "vllm") or distinct_seconds(results, "bgmv form")
    return theirs / ours if ours and theirs else None


def over_distinct_floor(results: Results, name: str) -> float | None:
    """Over the time in which a copy moves W0, all 64 adapters, x and y: 11.95 us on an H200."""
    ours, rate = distinct_seconds(results, name), results.copy_bytes_per_s
    return ours / (DISTINCT_BYTES / rate) if ours and rate else None


def cost_of_eight(results: Results, name: str) -> float | None:
    """The largest ratio of a training step with 8 adapters to one adapter on the same rows."""
    both: dict[tuple, dict[int, float]] = {}
    for case in results.multi.cases if results.multi else ():
        c, found = case["case"], results.multi.times(case, "cold", "both", name)
        if found and c["R"] == 16 and c["G"] in (1, 8) and c["M"] >= 512:
            both.setdefault((c["M"], c["N"], c["K"]), {})[c["G"]] = found["p50"]
    return worst([times[8] / times[1] for times in both.values() if len(times) == 2])


def chained(layer) -> Callable:
    """The smallest speedup of dx in one launch over a chain of addmm_: of the sum alone, given dh,
    where bench.hopper timed it; of a group whose adapters are frozen with the products dh = dy B,
    which both make."""
    widths, K = layer

    def value(results: Results, name: str) -> float | None:
        if name == GLUON:
            found = results.sums("dx", (layer,), LONG)
            theirs = "with an adapter: cublas, addmm"
            return worst([us[theirs] / best(us, "with an adapter: ") for us in found], least=True)
        speedups = []
        for case in results.group.cases if results.group else ():
            c = case["case"]
            usual = c["R"] == 16 and c["dtype"] == "bfloat16" and c["p"] == 0 and c["M"] in LONG
            if usual and not c["trained"] and (tuple(c["widths"]), c["K"]) == (widths, K):
                ours, theirs = (
                    results.group.times(case, "cold", "backward", n) for n in (name, CHAIN)
                )
                speedups.append(theirs["p50"] / ours["p50"] if theirs and ours else None)
        return worst(speedups, least=True)

    return value


TARGETS = [
    Target("forward 4096x4096, M >= 2048", 1.10, 1.04, over_floor("forward", (SQUARE,))),
    Target("forward 14336x4096, M >= 2048", 1.06, 1.02, over_floor("forward", (WIDE,))),
    Target("forward 4096x14336, M >= 2048", 1.07, 1.03, over_floor("forward", (DOWN,))),
    Target("forward 1024x4096, M >= 2048", 1.27, 1.12, over_floor("forward", (NARROW,))),
    Target("backward 4096x4096, M >= 2048", 1.20, 1.08, over_floor("backward", (SQUARE,))),
    Target("backward 14336x4096 and 4096x14336", 1.12, 1.05, over_floor("backward", (WIDE, DOWN))),
    Target("backward 1024x4096, M >= 2048", 1.45, 1.17, over_floor("backward", (NARROW,))),
    Target("both, speedup over naive, 4096x4096, M = 8192", 1.25, 1.37,
           faster_than("naive", (SQUARE,), (8192,)), least=True),
    Target("both, speedup over addmm_, 4096x4096, M = 8192", 1.10, 1.22,
           faster_than("addmm", (SQUARE,), (8192,)), least=True),
    Target("both, speedup over LoRAFusion's form, 4096x4096, M = 8192", 1.10, 1.20,
           faster_than("lorafusion form", (SQUARE,), (8192,)), least=True),
    Target("dx of q, k and v over three addmm_", 1.15, 1.25, chained(QKV), least=True),
    Target("decode 4096x4096, M 1 to 16", 1.25, 1.08, over_floor("forward", (SQUARE,), (1, 4, 16))),
    Target("decode 64 rows of 64 adapters over vLLM's form", 1.2, 1.35, over_vllm, least=True),
    Target("decode 64 rows of 64 adapters over its floor", 1.6, 1.35, over_distinct_floor),
    Target("training with 8 adapters over one on the same rows", 1.10, 1.0, cost_of_eight),
    Target("decode 14336x4096, share of a copy's rate", 0.75, 0.88, share_of_bandwidth, least=True),
    Target("DRAM GiB, both, M = 8192, 4096x4096", 0.70, 0.50, dram_gib),
    Target("forward at p = 0.1 over p = 0", 1.05, 1.0, dropout_cost("forward")),
    Target("backward at p = 0.1 over p = 0", 1.05, 1.0, dropout_cost("backward")),
    Target("anywhere, speedup over the best of addmm_ and torch.compile", 0.98, 1.0,
           against_the_best, least=True),
]  # fmt: skip


def load(folder: Path) -> Results:
    """What a folder holds of runs on one machine, and of their DRAM traffic."""
    reports = []
    for op in ("lora_linear", "multi_lora_linear", "lora_linear_group"):
        paths = [p for p in sorted(folder.glob(f"{op}*.json")) if p.stem.partition("-")[0] == op]
        parts = [json.loads(path.read_text()) for path in paths]
        reports.append(Report(merged(parts)) if parts else None)
    paths = folder / "dram.json", folder / "hopper.json"
    dram, hopper = (json.loads(path.read_text()) if path.exists() else {} for path in paths)
    return Results(*reports, dram.get("contenders", {}), hopper)


def table(folder: Path) -> str:
    """A line a target: the value of each of ours, and the verdict on the better one."""
    results = load(folder)
    reports = [report for report in results[:3] if report]
    ours = list(dict.fromkeys(name for report in reports for name in report.ours))
    devices = [report.results["machine"]["device"] for report in reports]
    if "times" in results.hopper:
        ours.append(GLUON)
        devices.append(results.hopper["machine"]["device"])
    width = max(len(target.what) for target in TARGETS)
    lines = [f"{'target':{width}}  must   aim   " + "".join(f"{n:>8}" for n in ours)]
    counts: dict[str, int] = {}
    for target in TARGETS:
        values = {name: target.value(results, name) for name in ours}
        known = [value for value in values.values() if value is not None]
        best = (max if target.least else min)(known) if known else None
        verdict, apart = target.verdict(best)
        counts[verdict] = counts.get(verdict, 0) + 1
        cells = "".join("       -" if v is None else f"{v:8.2f}" for v in values.values())
        bounds = f"{target.must:4.2f}  {target.aim:4.2f}"
        lines.append(f"{target.what:{width}}  {bounds}  {cells}  {verdict}{apart}")
    lines += dict.fromkeys(f"on {device}" for device in devices)
    lines.append(", ".join(f"{n} {word}" for word, n in sorted(counts.items())))
    return "\n".join(lines)
