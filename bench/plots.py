"""The figure of a report: what each way costs over the bare product, and the roofline."""

import itertools
from collections import Counter
from pathlib import Path

from fused_lora.bench.measure import CHIPS

COLORS = ["#d1495b", "#2a6f97", "#2a9d8f", "#f4b860", "#6a4c93", "#8d99ae", "#bc6c25", "#3a5a40"]
INK, GRID, ALARM = "#22303c", "#e3e8ec", "#c1121f"


def main_slice(report) -> list[dict]:
    """The cases without dropout of the most common rank and dtype, by shape and rows."""
    cases = [c for c in report.cases if c["case"]["p"] == 0]
    usual = Counter((c["case"]["R"], c["case"]["dtype"]) for c in cases).most_common(1)
    kept = [c for c in cases if usual and (c["case"]["R"], c["case"]["dtype"]) == usual[0][0]]
    return sorted(kept, key=lambda c: (*shape(c), c["case"]["M"]))


def contenders(report, mode: str) -> list[str]:
    """Ours first: they have the first colours."""
    op = report.op
    hidden = {op.floor, f"{op.baseline} again"}
    names = [name for name in report.present(mode) if name not in hidden]
    return sorted(names, key=lambda name: (name not in op.ours, name != op.baseline))


def shape(case: dict) -> tuple[int, int]:
    return case["case"]["N"], case["case"]["K"]


def tick(case: dict) -> str:
    """The rows, and of many adapters how many and who asks for whom."""
    if "popularity" not in case:
        return str(case["M"])
    return f"{case['M']}, {case['G']} {case['popularity']}"


def plot_ratios(axes, report, cases: list[dict], mode: str, direction: str) -> None:
    """A group of places for each shape, in it one for each number of rows."""
    op, places = report.op, {}
    for i, (shape_of, members) in enumerate(itertools.groupby(cases, key=shape)):
        first = len(places) + i
        places |= {case["label"]: first + j for j, case in enumerate(members)}
        middle = (first + max(places.values())) / 2
        axes.annotate("{}x{}".format(*shape_of), (middle, 1.01), ha="center", fontsize=8, color=INK,
                      xycoords=("data", "axes fraction"))  # fmt: skip
    ring = {"markersize": 9, "markerfacecolor": "none", "markeredgecolor": ALARM, "zorder": 4}
    for color, name in zip(itertools.cycle(COLORS), contenders(report, mode)):
        ours = name in op.ours
        style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 2.2 if ours else 1.1}
        for _, members in itertools.groupby(cases, key=shape):
            known = [c for c in members if report.ratio(c, mode, direction, name, op.floor)]
            heights = [report.ratio(c, mode, direction, name, op.floor) for c in known]
            axes.plot([places[c["label"]] for c in known], heights, **style, zorder=2 + ours)
            for case, height in zip(known, heights, strict=True):
                if ours and report.slower(case, mode, direction, name):
                    axes.plot(places[case["label"]], height, "o", **ring)
        axes.plot([], [], **style, label=name)
    axes.plot([], [], "o", **ring, label=f"ours, slower than {op.baseline}")
    axes.axhline(1, color=INK, linewidth=1, linestyle=":")
    if axes.get_ylim()[1] > 3:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    ticks = [tick(case["case"]) for case in cases]
    axes.set_xticks(list(places.values()), ticks, fontsize=7, rotation=60)
    axes.set_title(f"{direction}, {mode}", pad=18)
    axes.set(xlabel="rows M", ylabel=f"time over that of {op.floor}")


def plot_roofline(axes, report, mode: str, direction: str) -> None:
    op = report.op
    names = [op.floor, *contenders(report, mode)]
    names = [name for name in names if name in {op.floor, op.baseline, *op.ours}]
    colors = dict(zip(contenders(report, mode), itertools.cycle(COLORS))) | {op.floor: INK}
    found = [report.times(case, mode, direction, op.floor) for case in report.cases]
    best = max(
        case["flops"][direction] / time["p50"]
        for case, time in zip(report.cases, found, strict=True)
        if time
    )
    unit, word = (1e12, "Tflop/s") if best > 1e12 else (1e9, "Gflop/s")
    intensities = []
    for name in names:
        points = []
        for case in report.cases:
            if found := report.times(case, mode, direction, name):
                flops = case["flops"][direction]
                points.append((flops / case["bytes"][direction], flops / found["p50"] / unit))
        intensities += [x for x, _ in points]
        if points:
            axes.plot(*zip(*points, strict=True), "o", markersize=4, color=colors[name],
                      alpha=0.7, label=name)  # fmt: skip
    device = report.results["machine"]["device"]
    rates = next((rates for key, rates in CHIPS.items() if key in device), None)
    if rates and intensities:
        peak = max(rates.flops_per_s.values())
        xs = sorted({min(intensities), peak / rates.bytes_per_s, max(intensities)})
        axes.plot(xs, [min(peak, x * rates.bytes_per_s) / unit for x in xs], color=INK,
                  linewidth=1, label="datasheet")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(f"{direction}: achieved rate")
    axes.set(xlabel="flops a byte of compulsory traffic", ylabel=word)


def _figure(path: Path, **options):
    """None, and a line that says so, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn: matplotlib is not installed")
        return None
    return Figure(layout="constrained", **options)


def plot_steps(report, path: Path) -> None:
    """Tokens a second of every contender, a group of bars for each case."""
    cases = report.cases
    if (figure := _figure(path, figsize=(9, 1 + 2.4 * len(cases)))) is None or not cases:
        return
    for axes, case in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
        names = list(case["times"])[::-1]
        entries = [case["times"][name]["eager"]["step"] for name in names]
        rates = [case["tokens"] / entry["p50"] for entry in entries]
        spread = [
            (rate - case["tokens"] / entry["p80"], case["tokens"] / entry["p20"] - rate)
            for rate, entry in zip(rates, entries, strict=True)
        ]
        colors = ["#2a6f97" if name in report.op.ours else "#8d99ae" for name in names]
        axes.barh(names, rates, xerr=list(zip(*spread, strict=True)), color=colors, ecolor=INK)
        axes.set_title(case["label"], fontsize=9, color=INK)
        axes.grid(color=GRID, axis="x")
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("tokens/s (p50, p20 to p80); ours in blue")
    facts = report.results["machine"]
    figure.suptitle(f"training step on {facts['device']}, torch {facts['torch']}", color=INK)
    figure.savefig(path, dpi=110)


def save(report, path: Path) -> None:
    modes, cases = report.modes(), main_slice(report)
    if not cases:
        print(f"{path.name} is not drawn: no case without dropout was measured")
        return
    mode = modes[0]
    directions = list(cases[0]["flops"])
    wide = max(5.0, 0.22 * len(cases) + 1.5)
    if (figure := _figure(path, figsize=(wide * len(directions), 9))) is None:
        return
    grid = figure.subplots(2, len(directions), squeeze=False)
    for column, direction in enumerate(directions):
        plot_ratios(grid[0][column], report, cases, mode, direction)
        plot_roofline(grid[1][column], report, mode, direction)
    for axes in figure.axes:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8)
    grid[1][0].legend(frameon=False, fontsize=8)
    facts = report.results["machine"]
    size = cases[0]["case"]
    figure.suptitle(
        f"{report.op.name} on {facts['device']}, torch {facts['torch']}: "
        f"{size['dtype']}, r = {size['R']}, p = 0",
        color=INK,
    )
    figure.savefig(path, dpi=110)
