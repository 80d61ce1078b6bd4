"""What a run found: one JSON for each operation, and the tables and figures made from it.

    python -m fused_lora.bench.report merge DIR...     into bench/results/<machine>/
    python -m fused_lora.bench.report render           docs/measured.md and README.md from there
    python -m fused_lora.bench.report targets DIR      the targets, met or missed

Nothing is measured here: every table and figure can be made again from the JSON.
"""

import argparse
import csv
import importlib
import io
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from fused_lora.bench.claims import answers
from fused_lora.bench.measure import Interleaved, Spread
from fused_lora.bench.registry import OPS, Op

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CLAIMS = "methods", "dept", "accelerate"  # modules with claims, and results of their own form
SETTINGS = "FUSED_LORA_BENCH", "FUSED_LORA_CUDA_GEMM", "FUSED_LORA_TUNING", "OMP_NUM_THREADS"
MODE_WORDS = {
    "cold": "CUDA graph, inputs not in the L2 cache",
    "hot": "CUDA graph, the same inputs every time",
    "eager": "wall time of a call from Python",
}


def _query(*command: str) -> str:
    """What a program of the system prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers hold for."""
    facts = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        state = _query("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0")
        facts = {fields.replace(",", ", "): state, "CUDA of torch": str(torch.version.cuda)}
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
        name = f"{model}, {os.cpu_count()} cores, torch threads: {torch.get_num_threads()}"
    try:
        import triton
    except ImportError:
        facts["triton"] = "not installed"
    else:
        facts["triton"] = triton.__version__
    settings = [f"{k}={v}" for k, v in os.environ.items() if k in SETTINGS]
    program = Path(sys.argv[0])
    module = f"python -m fused_lora.bench.{program.stem}"
    command = [module if program.parent == Path(__file__).parent else program.name, *sys.argv[1:]]
    return {
        "device": name,
        **facts,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _query("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([*settings, command[0], shlex.join(command[1:])]).strip(),
        "load average": f"{os.getloadavg()[1]:.1f}, this run included",
    }


def case_result(op: Op, case, measured: Interleaved) -> dict:
    """One case of a results file: times in seconds, every repetition."""

    def entry(name, mode, direction):
        seconds = measured.seconds(name, mode, direction)
        over = {o: measured.ratio(name, o, mode, direction) for o in (op.floor, op.baseline)}
        return {
            **Spread.of(seconds)._asdict(),
            "over": {o: spread.p50 for o, spread in over.items() if spread},
            "all": [float(f"{s:.4g}") for s in seconds],
        }

    times: dict = {name: {} for name in measured.forwards}
    for name, mode, direction in measured.timed():
        times[name].setdefault(mode, {})[direction] = entry(name, mode, direction)
    directions = measured.directions
    return {
        "label": str(case),
        "case": {**case._asdict(), "dtype": str(case.dtype).removeprefix("torch.")},
        "flops": {d: op.flops(case, d) for d in directions},
        "bytes": {d: op.bytes(case, d) for d in directions},
        "times": times,
        "memory": {name: memory._asdict() for name, memory in measured.memory.items()},
        "failed": measured.failed,
        "refused": measured.refused,
    }


class Report:
    """The results of one operation on one machine, as `results` (JSON) holds them:

        {"op", "machine", "cases": [case_result...], "missing": {contender: reason},
         "unmeasured": {case: reason}}

    noise is what 95 % of the times stay within when the baseline is timed against itself. Where
    one of ours is slower than the baseline by more, the table says SLOWER.
    """

    def __init__(self, results: dict, op=None):
        self.results, self.op = results, op or OPS[results["op"]]
        self.cases, self.missing = results["cases"], results["missing"]
        timed = {name for case in self.cases for name in case["times"]}
        self.ours = [name for name in self.op.ours if name in timed]
        again = f"{self.op.baseline} again"
        found = (self.ratio(*row, again) for row in self.rows())
        apart = sorted(abs(ratio - 1) for ratio in found if ratio is not None)
        self.noise = apart[int(0.95 * (len(apart) - 1))] if apart else 0.0

    def directions(self) -> list[str]:
        return list(dict.fromkeys(d for case in self.cases for d in case["flops"]))

    def modes(self) -> list[str]:
        present = {mode for c in self.cases for modes in c["times"].values() for mode in modes}
        return [mode for mode in MODE_WORDS if mode in present]

    def rows(self) -> Iterator[tuple[dict, str, str]]:
        """(case, mode, direction) of everything that is timed."""
        for mode in self.modes():
            for case in self.cases:
                for direction in case["flops"]:
                    yield case, mode, direction

    def times(self, case: dict, mode: str, direction: str, name: str) -> dict | None:
        return case["times"].get(name, {}).get(mode, {}).get(direction)

    def ratio(self, case, mode, direction, name, over=None) -> float | None:
        found = self.times(case, mode, direction, name)
        return found and found["over"].get(over or self.op.baseline)

    def slower(self, case, mode, direction, name) -> bool:
        ratio = self.ratio(case, mode, direction, name)
        return ratio is not None and ratio > 1 + self.noise

    def present(self, mode: str) -> list[str]:
        names = dict.fromkeys(name for c in self.cases for name in c["times"])
        return [n for n in names if any(mode in c["times"].get(n, {}) for c in self.cases)]

    def memory_kinds(self) -> list[str]:
        """Of "saved" and "peak" those that were measured."""
        found = [memory for case in self.cases for memory in case["memory"].values()]
        return [kind for kind in ("saved", "peak") if any(m[kind] is not None for m in found)]

    def table(self, mode: str) -> tuple[list[str], list[list[str]]]:
        """(header, cells); a time is its p50 [p20 - p80] in ms, a ratio its p50."""
        floor, baseline, ours = self.op.floor, self.op.baseline, set(self.op.ours)
        present = self.present(mode)
        others = [name for name in present if name not in {floor, baseline, *ours}]
        header = ["case", "direction", f"{floor} ms", f"{baseline} ms"]
        header += [f"{name} / {baseline}" for name in others]
        for name in (name for name in self.ours if name in present):
            header += [f"{name} ms", f"{name} GFLOP/s", f"{name} / {floor}", f"{name} / {baseline}"]
            header += [f"{name}, {kind} MB ({baseline}'s)" for kind in self.memory_kinds()]
        rows = [row for row in self.rows() if row[1] == mode]
        return header, [self._cells(row, others, present) for row in rows]

    def _cells(self, row, others: list[str], present: list[str]) -> list[str]:
        def ms(name):
            if not (t := self.times(*row, name)):
                return "-"
            p20, p50, p80 = (1e3 * t[key] for key in ("p20", "p50", "p80"))
            return f"{p50:.3g} [{p20:.3g} - {p80:.3g}]"

        def ratio(name, over=None):
            value = self.ratio(*row, name, over)
            return "-" if value is None else f"{value:.2f}"

        case, _, direction = row
        cells = [case["label"], direction, ms(self.op.floor), ms(self.op.baseline)]
        cells += [ratio(name) for name in others]
        for name in (name for name in self.ours if name in present):
            found = self.times(*row, name)
            rate = f"{case['flops'][direction] / found['p50'] / 1e9:.0f}" if found else "-"
            mark = " SLOWER" if self.slower(*row, name) else ""
            cells += [ms(name), rate, ratio(name, self.op.floor), ratio(name) + mark]
            for kind in self.memory_kinds():
                ours, theirs = (
                    case["memory"].get(n, {}).get(kind) for n in (name, self.op.baseline)
                )
                cells.append("-" if ours is None else f"{ours / 1e6:.3g} ({theirs / 1e6:.3g})")
        return cells

    def summary(self) -> list[str]:
        """What the tables come to, a sentence a line."""
        baseline = self.op.baseline
        lines = [f"noise: {baseline} timed twice, within {self.noise:.1%} in 95 % of rows"]
        for name in self.ours:
            for mode in self.modes():
                lines += self._summary(name, mode)
        lines += [f"{name} was not measured: {why}" for name, why in self.missing.items()]
        unmeasured = self.results["unmeasured"]
        lines += [f"{case} was not measured: {why}" for case, why in list(unmeasured.items())[:9]]
        if len(unmeasured) > 9:
            lines.append(f"and {len(unmeasured) - 9} more cases were not measured")
        failed = {f"{n}: {why}" for c in self.cases for n, why in c["failed"].items()}
        return lines + sorted(failed) + [f"REFUSED {line}" for line in self.refused()]

    def refused(self) -> list[str]:
        """What is wrong, and so has no time."""
        return [
            f"{name} ({case['label']}): {why}"
            for case in self.cases
            for name, why in case.get("refused", {}).items()
        ]

    def _summary(self, name: str, mode: str) -> Iterator[str]:
        baseline, found = self.op.baseline, []
        for row in self.rows():
            if row[1] == mode and (ratio := self.ratio(*row, name)) is not None:
                found.append((ratio, row))
        if not found:
            return
        medians = []
        for direction in self.directions():
            for label, drops in (("p = 0", False), ("dropout", True)):
                ratios = [
                    r for r, (c, _, d) in found if d == direction and (c["case"]["p"] > 0) == drops
                ]
                if ratios:
                    medians.append(f"{direction}, {label}: {statistics.median(ratios):.2f}")
        yield f"{name} / {baseline}, {mode}, medians: {'; '.join(medians)}"
        worst, (case, _, direction) = max(found, key=lambda pair: pair[0])
        slower = sum(self.slower(*row, name) for _, row in found)
        yield (
            f"{name} / {baseline}, {mode}, worst: {worst:.2f} ({case['label']}, {direction}); "
            f"slower by more than the noise in {slower} of {len(found)} rows"
        )

    def markdown(self) -> str:
        lines = [f"# {self.op.name}", ""]
        lines += [*(f"- {k}: {v}" for k, v in self.results["machine"].items()), ""]
        lines += ["A time is p50 [p20 - p80]; a ratio is the median of those within a round.", ""]
        lines += [f"- {line}" for line in self.summary()]
        for mode in self.modes():
            header, cells = self.table(mode)
            lines += ["", f"## {mode}: {MODE_WORDS[mode]}", ""]
            lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
        return "\n".join(lines) + "\n"

    def flat(self) -> Iterator[dict]:
        """The rows of the CSV."""
        for case, mode, direction in self.rows():
            for name in case["times"]:
                if found := self.times(case, mode, direction, name):
                    yield {
                        "op": self.op.name,
                        **case["case"],
                        "direction": direction,
                        "mode": mode,
                        "contender": name,
                        **{key: found[key] for key in ("p20", "p50", "p80")},
                        **{f"over {o}": ratio for o, ratio in found["over"].items()},
                        **{f"{k} bytes": v for k, v in case["memory"][name].items()},
                    }

    def csv(self) -> str:
        rows, text = list(self.flat()), io.StringIO()
        names = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save(self, folder: Path, stage: str = "") -> None:
        """Write <op>.json, .csv, .md and .png, or <op>-<stage>.json and so on."""
        path = self.keep(folder, stage)
        path.with_suffix(".csv").write_text(self.csv())
        path.with_suffix(".md").write_text(self.markdown())
        self.draw(path.with_suffix(".png"))

    def keep(self, folder: Path, stage: str = "") -> Path:
        """Write the JSON alone; returns its path without suffix."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "-".join(filter(None, (self.op.name, stage)))
        path.with_suffix(".json").write_text(json.dumps(self.results, indent=1) + "\n")
        return path

    def draw(self, path: Path) -> None:
        from fused_lora.bench import plots

        plots.save(self, path)

    def print(self) -> None:
        """The tables and the summary; without rich, the Markdown."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(self.markdown())
            return
        # A terminal folds what is too wide for it; a file does not.
        console = Console() if sys.stdout.isatty() else Console(width=400)
        facts = self.results["machine"]
        for mode in self.modes():
            header, cells = self.table(mode)
            title = f"{self.op.name} on {facts['device']}, torch {facts['torch']}, {mode}"
            table = Table(title=title)
            for i, name in enumerate(header):
                table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
            for row in cells:
                red = any("SLOWER" in cell for cell in row)
                table.add_row(*row, style="red" if red else None)
            console.print(table)
        console.print(*self.summary(), sep="\n")


# What results are of: the operations, and whole training steps.
NAMES = *OPS, "training_step"


def report_of(results: dict) -> Report:
    if results["op"] in OPS:
        return Report(results)
    from fused_lora.bench.step import StepReport

    return StepReport(results)


def claims_of(op: str):
    """The module of a name in CLAIMS: its TITLE, verdicts(results) and save(results, folder)."""
    return importlib.import_module(f"fused_lora.bench.{op}")


def slug(device: str) -> str:
    """The folder of a machine's results."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def merged(parts: list[dict]) -> dict:
    """The results of several runs of one operation on one machine, without repetitions.

    Where runs share a case, a contender's times are those of the last.
    """
    whole = json.loads(json.dumps(parts[-1])) | {"cases": []}
    cases: dict[str, dict] = {}
    for part in parts:
        if part["machine"]["device"] != whole["machine"]["device"]:
            raise ValueError(
                f"results of one machine are merged, got {part['machine']['device']!r} "
                f"and {whole['machine']['device']!r}"
            )
        for case in json.loads(json.dumps(part["cases"])):
            for modes in case["times"].values():
                for directions in modes.values():
                    for entry in directions.values():
                        entry.pop("all", None)
            case.setdefault("commit", part["machine"]["commit"])
            known = cases.setdefault(case["label"], case)
            for key in {"times", "memory", "failed", "refused", "errors"} & set(case):
                known[key] |= case[key]
            known["commit"] = case["commit"]
        whole["unmeasured"] |= part["unmeasured"]
    measured = {name for case in cases.values() for name in case["times"]}
    whole["missing"] = {
        name: why for part in parts for name, why in part["missing"].items() if name not in measured
    }
    whole["unmeasured"] = {k: why for k, why in whole["unmeasured"].items() if k not in cases}
    whole["cases"] = list(cases.values())
    return whole


def merge(folders: list[Path], into: Path = RESULTS) -> list[Path]:
    """Add the results in `folders` to those of their machines; returns the folders written."""
    parts: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        results = json.loads(path.read_text())
        if results.get("op") in (*NAMES, *CLAIMS):
            key = slug(results["machine"]["device"]), results["op"]
            parts.setdefault(key, []).append(results)
    if not parts:
        raise ValueError(f"no results of a run in {', '.join(map(str, folders))}")
    for (machine, op), found in parts.items():
        if op in CLAIMS:  # a run answers for itself: the last one stands
            claims_of(op).save(found[-1], into / machine)
            continue
        before = into / machine / f"{op}.json"
        if before.exists():
            found.insert(0, json.loads(before.read_text()))
        report_of(merged(found)).save(into / machine)
    return sorted({into / machine for machine, _ in parts})


def committed(results: Path = RESULTS) -> list[tuple[Path, Report]]:
    """(path without suffix, report) of the results of every machine."""
    paths = [path for op in NAMES for path in sorted(results.glob(f"*/{op}.json"))]
    return [(path.with_suffix(""), report_of(json.loads(path.read_text()))) for path in paths]


def committed_claims(results: Path = RESULTS) -> list[tuple[Path, dict]]:
    """(path without suffix, results) of what those of CLAIMS measured, on every machine."""
    paths = [path for op in CLAIMS for path in sorted(results.glob(f"*/{op}.json"))]
    return [(path.with_suffix(""), json.loads(path.read_text())) for path in paths]


def headline(report: Report) -> str:
    """Medians over the cases without dropout: how many times the floor's, and the baseline's."""
    op = report.op
    overs = {op.floor: f"`{op.floor}`", op.baseline: op.baseline}
    header = [op.name, "mode", "direction", *(f"times {over}" for over in overs.values())]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for name in report.ours:
        for mode in report.modes():
            for direction in report.directions():
                rows = [
                    row
                    for row in report.rows()
                    if row[1:] == (mode, direction) and row[0]["case"]["p"] == 0
                ]
                medians = []
                for over in overs:
                    found = [report.ratio(*row, name, over) for row in rows]
                    known = [ratio for ratio in found if ratio is not None]
                    medians.append(f"{statistics.median(known):.2f}" if known else "-")
                if set(medians) != {"-"}:
                    lines.append(f"| {name} | {mode} | {direction} | {' | '.join(medians)} |")
    return "\n".join(lines)


def sections(results: Path = RESULTS) -> dict[str, str]:
    """{file of the project: the part of it that is made from the results}."""
    measured, readme = [], []
    for path, report in committed(results):
        facts, link = report.results["machine"], f"bench/results/{path.parent.name}/{path.name}"
        title = f"{report.op.name} on {facts['device']}"
        measured += [f"### {title}", ""]
        measured += [f"{facts['date']}, torch {facts['torch']}, commit {facts['commit']}: "]
        measured[-1] += f"`{facts['command']}`. [Table](../{link}.md), [CSV](../{link}.csv)."
        measured += ["", *(f"- {line}" for line in report.summary())]
        measured += ["", f"![{title}](../{link}.png)", ""]
        readme += [f"{title}, torch {facts['torch']}, {facts['date']}", "", headline(report), ""]
        readme += [
            f"[Every row]({link}.md), the slower ones too.",
            "",
            f"![{title}]({link}.png)",
            "",
        ]
    for path, found in committed_claims(results):
        facts, link = found["machine"], f"bench/results/{path.parent.name}/{path.name}"
        title = f"{claims_of(path.name).TITLE}, on {facts['device']}"
        measured += [f"### {title}", ""]
        measured += [f"{facts['date']}, torch {facts['torch']}, commit {facts['commit']}: "]
        measured[-1] += f"`{facts['command']}`. [Table](../{link}.md)."
        measured += [*answers(claims_of(path.name).verdicts(found)), ""]
        if path.with_suffix(".png").exists():
            measured += [f"![{title}](../{link}.png)", ""]
    return {"docs/measured.md": "\n".join(measured), "README.md": "\n".join(readme)}


MARKS = "<!-- made by `python -m fused_lora.bench.report render` -->", "<!-- until here -->"


def rendered(text: str, section: str) -> str:
    """`text` with `section` between its marks."""
    first, last = MARKS
    before, found, rest = text.partition(first)
    _, ended, after = rest.partition(last)
    if not (found and ended):
        raise ValueError(f"the lines {first!r} and {last!r} must stand in the file")
    return f"{before}{first}\n\n{section}\n{last}{after}"


def render(root: Path = ROOT) -> None:
    for path, report in committed(root / "bench/results"):
        report.save(path.parent)
    for path, found in committed_claims(root / "bench/results"):
        claims_of(path.name).save(found, path.parent)
    for name, section in sections(root / "bench/results").items():
        path = root / name
        path.write_text(rendered(path.read_text(), section))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_lora.bench.report")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("merge", help="add the results of runs to bench/results")
    add.add_argument("folders", nargs="+", type=Path)
    commands.add_parser("render", help="make docs/measured.md and README.md from bench/results")
    judge = commands.add_parser("targets", help="the targets, met or missed, by results")
    judge.add_argument("folder", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "merge":
            for folder in merge(chosen.folders):
                print(f"{folder} is up to date")
            render()
        elif chosen.command == "render":
            render()
        else:
            from fused_lora.bench import targets

            print(targets.table(chosen.folder))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
