"""The rows of a run, as a table for the terminal, as Markdown and as JSON."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from fused_lora.bench.measure import Interleaved, Spread
from fused_lora.bench.registry import DIRECTIONS, Op

SETTINGS = "FUSED_LORA_BENCH", "OMP_NUM_THREADS"


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers hold for."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
        name = f"{model}, {os.cpu_count()} cores, torch threads: {torch.get_num_threads()}"
    settings = [f"{k}={v}" for k, v in os.environ.items() if k in SETTINGS]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join([*settings, "python", "-m", "pytest", *sys.argv[1:]]),
        "load average": f"{os.getloadavg()[1]:.1f}, this run included",
    }


def rows(op: Op, case, measured: Interleaved) -> list[dict]:
    """One row for each direction: every contender's milliseconds, and its ratios within a round."""

    def entry(name, direction):
        ms = Spread.of([1e3 * s for s in measured.seconds(name, direction)])
        over = {o: measured.ratio(name, o, direction)._asdict() for o in (op.floor, op.baseline)}
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
    """The measured rows of one operation.

    noise is what 95 % of the rows stay within when the baseline is timed against itself. Where one
    of ours is slower than the baseline by more, the row says SLOWER.
    """

    def __init__(self, op: Op, rows: list[dict], machine: dict[str, str], missing: dict[str, str]):
        self.op, self.rows, self.machine, self.missing = op, rows, machine, missing
        self.ours = [name for name in op.ours if name not in missing]
        again = sorted(abs(self.ratio(row, f"{op.baseline} again") - 1) for row in rows)
        self.noise = again[int(0.95 * (len(again) - 1))]

    def ratio(self, row: dict, name: str, over: str | None = None) -> float:
        return row["contenders"][name]["over"][over or self.op.baseline]["p50"]

    def slower(self, row: dict, name: str) -> bool:
        return self.ratio(row, name) > 1 + self.noise

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(header, cells); a time is its p50 [p20 - p80] in ms, a ratio its p50."""
        floor, baseline = self.op.floor, self.op.baseline
        own = {floor, baseline, *self.op.ours, *self.missing}
        others = [name for name in self.op.contenders if name not in own]
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
        cells += [f"{self.ratio(row, name):.2f}" for name in others]
        for name in self.ours:
            rate = row["flops"] / row["contenders"][name]["ms"]["p50"] / 1e6
            mark = " SLOWER" if self.slower(row, name) else ""
            cells += [ms(name), f"{rate:.0f}", f"{self.ratio(row, name, self.op.floor):.2f}"]
            cells += [f"{self.ratio(row, name):.2f}{mark}"]
        return cells

    def summary(self) -> list[str]:
        """What the table comes to, a sentence a line."""
        lines = [f"noise: {self.op.baseline} timed twice, within {self.noise:.1%} in 95 % of rows"]
        for name in self.ours:
            medians = []
            for direction in DIRECTIONS:
                for label, drops in (("p = 0", False), ("dropout", True)):
                    picked = (r for r in self.rows if r["direction"] == direction)
                    ratios = [self.ratio(r, name) for r in picked if (r["p"] > 0) == drops]
                    if ratios:
                        medians += [f"{direction}, {label}: {statistics.median(ratios):.2f}"]
            worst = max(self.rows, key=lambda row: self.ratio(row, name))
            slower = sum(self.slower(row, name) for row in self.rows)
            lines += [
                f"{name} / {self.op.baseline}, medians: {'; '.join(medians)}",
                f"{name} / {self.op.baseline}, worst: {self.ratio(worst, name):.2f} "
                f"({worst['case']}, {worst['direction']}); slower by more than the noise in "
                f"{slower} of {len(self.rows)} rows",
            ]
        return lines + [f"{name} was not measured: {why}" for name, why in self.missing.items()]

    def save(self, folder: Path) -> None:
        """Write <op>.json, every number, and <op>.md, the table."""
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {
            "machine": self.machine,
            "noise": self.noise,
            "missing": self.missing,
            "rows": self.rows,
        }
        (folder / f"{self.op.name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
        header, cells = self.table()
        lines = [f"# {self.op.name}", "", *(f"- {k}: {v}" for k, v in self.machine.items()), ""]
        lines += ["A time is p50 [p20 - p80]; a ratio is the median of those within a round.", ""]
        lines += [*(f"- {line}" for line in self.summary()), ""]
        lines += ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *cells)]
        (folder / f"{self.op.name}.md").write_text("\n".join(lines) + "\n")

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        header, cells = self.table()
        device, version = self.machine["device"], self.machine["torch"]
        table = Table(title=f"{self.op.name} on {device}, torch {version}")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
        for row in cells:
            table.add_row(*row, style="red" if any("SLOWER" in cell for cell in row) else None)
        # A terminal folds what is too wide for it; a file does not.
        console = Console() if sys.stdout.isatty() else Console(width=250)
        console.print(table, *self.summary(), sep="\n")
