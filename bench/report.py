"""The rows of a run, as a table for the terminal, as Markdown and as JSON."""

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.measure import Interleaved, Spread
from bench.registry import DIRECTIONS, Op


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers hold for."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        name = f"{model}, {torch.get_num_threads()} threads"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["pytest", *sys.argv[1:]]),
    }


def rows(op: Op, case, measured: Interleaved) -> list[dict]:
    """One row for each direction: the milliseconds of every contender, and its ratios within a round."""

    def entry(name, direction):
        over = {o: measured.ratio(name, o, direction)._asdict() for o in (op.floor, op.baseline)}
        ms = Spread.of([1e3 * s for s in measured.seconds(name, direction)])
        return {"ms": ms._asdict(), "over": over}

    return [
        {
            "case": str(case),
            "p": case.p,
            "direction": direction,
            "rounds": len(measured.rounds),
            "flops": op.flops(case, direction),
            "bytes": op.bytes(case, direction),
            "contenders": {name: entry(name, direction) for name in measured.calls},
        }
        for direction in DIRECTIONS
    ]


class Report:
    """The measured rows of one operation, with the reasons of the contenders that are missing."""

    def __init__(self, op: Op, rows: list[dict], machine: dict[str, str], missing: dict[str, str]):
        self.op, self.rows, self.machine, self.missing = op, rows, machine, missing
        self.ours = [name for name in op.ours if name not in missing]
        again = [self._ratio(row, f"{op.baseline} again") for row in rows]
        errors = sorted(abs(ratio - 1) for ratio in again)
        self.noise = errors[int(0.95 * (len(errors) - 1))]

    def _ratio(self, row: dict, name: str, over: str | None = None) -> float:
        return row["contenders"][name]["over"][over or self.op.baseline]["p50"]

    def slower(self, name: str) -> list[dict]:
        """The rows in which `name` is slower than the baseline by more than the noise."""
        return [row for row in self.rows if self._ratio(row, name) > 1 + self.noise]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(header, cells): a time as p50 [p20 - p80] in ms, a ratio as its p50."""
        floor, baseline = self.op.floor, self.op.baseline
        others = [
            n for n in self.op.contenders if n not in (*self.ours, *self.missing, floor, baseline)
        ]
        header = ["case", "direction", f"{floor} ms", f"{baseline} ms"]
        header += [f"{name} / {baseline}" for name in others]
        for name in self.ours:
            header += [f"{name} ms", f"{name} GFLOP/s", f"{name} / {floor}", f"{name} / {baseline}"]
        return header, [self._cells(row, others) for row in self.rows]

    def _cells(self, row: dict, others: list[str]) -> list[str]:
        def ms(name):
            p20, p50, p80 = row["contenders"][name]["ms"].values()
            return f"{p50:.3g} [{p20:.3g} - {p80:.3g}]"

        cells = [row["case"], row["direction"], ms(self.op.floor), ms(self.op.baseline)]
        cells += [f"{self._ratio(row, name):.2f}" for name in others]
        for name in self.ours:
            rate = row["flops"] / row["contenders"][name]["ms"]["p50"] / 1e6
            ratio = self._ratio(row, name)
            mark = " SLOWER" if ratio > 1 + self.noise else ""
            over_floor = self._ratio(row, name, self.op.floor)
            cells += [ms(name), f"{rate:.0f}", f"{over_floor:.2f}", f"{ratio:.2f}{mark}"]
        return cells

    def summary(self) -> list[str]:
        """What the table comes to, a sentence a line."""
        baseline = self.op.baseline
        lines = [
            f"noise: the same function timed twice differs by at most {self.noise:.1%} in 95 % of the rows"
        ]
        for name in self.ours:
            medians = []
            for direction in DIRECTIONS:
                for drops, label in ((False, "p = 0"), (True, "dropout")):
                    group = [
                        self._ratio(row, name)
                        for row in self.rows
                        if row["direction"] == direction and (row["p"] > 0) == drops
                    ]
                    if group:
                        medians.append(f"{direction} ({label}) {statistics.median(group):.2f}")
            worst = max(self.rows, key=lambda row: self._ratio(row, name))
            lines += [
                f"{name} / {baseline}, median of the cases: {', '.join(medians)}",
                f"{name} / {baseline}, worst: {self._ratio(worst, name):.2f} ({worst['case']}, "
                f"{worst['direction']}); slower by more than the noise in {len(self.slower(name))} of "
                f"{len(self.rows)} rows",
            ]
        return lines + [f"{name} was not measured: {why}" for name, why in self.missing.items()]

    def save(self, folder: Path) -> None:
        """<op>.json with every number and <op>.md with the table."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "machine": self.machine,
            "noise": self.noise,
            "missing": self.missing,
            "rows": self.rows,
        }
        (folder / f"{self.op.name}.json").write_text(json.dumps(data, indent=1) + "\n")
        header, cells = self.table()
        lines = [f"# {self.op.name}", "", *(f"- {k}: {v}" for k, v in self.machine.items()), ""]
        lines += [
            "A time is p50 [p20 - p80] over the rounds; a ratio is the median of those within a round.",
            "",
        ]
        lines += [f"- {line}" for line in self.summary()]
        lines += [
            "",
            *("| " + " | ".join(r) + " |" for r in (header, ["---"] * len(header), *cells)),
        ]
        (folder / f"{self.op.name}.md").write_text("\n".join(lines) + "\n")

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        header, cells = self.table()
        table = Table(
            title=f"{self.op.name} on {self.machine['device']}, torch {self.machine['torch']}"
        )
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
        for row in cells:
            table.add_row(*row, style="red" if any("SLOWER" in cell for cell in row) else None)
        # A terminal that is too narrow folds the table; a file or a pipe has any width.
        console = Console()
        width = console.width if console.is_terminal else 240
        Console(width=width).print(table, *self.summary(), sep="\n")
