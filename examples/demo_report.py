"""How the demo shows its results: tables in the terminal and in demo.md, a figure in demo.png."""

import math
from pathlib import Path

from fused_lora.bench.text import KINDS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

FULL, NAIVE = "full fine-tuning", "LoRA, naive"
SORA, ADALORA = "SoRA, fused_lora", "AdaLoRA, fused_lora"
REVERSED = "LoRA, naive, rows reversed"
INK, GRID = "#22303c", "#e3e8ec"
COLORS = {FULL: "#6a4c93", NAIVE: "#f4b860", SORA: "#2a9d8f", ADALORA: "#2a6f97"}
COLOR_OF_OURS, COLOR_OF_SMALL = "#d1495b", "#8d99ae"


def ours(backend: str) -> str:
    return f"LoRA, fused_lora ({backend})"


def small(rank: int) -> str:
    return f"LoRA of rank {rank}, fused_lora"


def color_of(name: str) -> str:
    return COLORS.get(name, COLOR_OF_SMALL if name.startswith("LoRA of") else COLOR_OF_OURS)


def in_bytes(n: float) -> str:
    """Three digits and a unit."""
    power = min(3, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def method_table(results: dict) -> list[list[str]]:
    header = ["", "bits/byte", "trained", "kept", "gradients", "optimiser state", "tokens/s"]
    rows = [["base, not adapted", f"{results['base']['prose']:.4f}", "0", "", "0 B", "0 B", ""]]
    for name, m in results["methods"].items():
        memory = in_bytes(m["gradient_bytes"]), in_bytes(m["optimizer_bytes"])
        speed = f"{m['tokens_per_s']:,.0f}"
        kept = f"{m['kept']:,}" if m["kept"] else ""  # full training has no adapter to count
        rows.append([name, f"{m['after']:.4f}", f"{m['trainable']:,}", kept, *memory, speed])
    peaks = [m["peak_bytes"] for m in results["methods"].values()]
    if any(peaks):
        header.append("peak above the model")
        for row, peak in zip(rows, [0, *peaks], strict=True):
            row.append(in_bytes(peak) if peak else "")
    return [header, *rows]


def tables(results: dict) -> dict[str, list[list[str]]]:
    ranks, full = results["kept_ranks"], 2 * results["rank"]
    total = sum(map(sum, ranks)) / (full * len(KINDS) * len(ranks))
    means = [f"{sum(column) / len(ranks):.1f}" for column in zip(*ranks, strict=True)]
    checks = [
        [c["what"], f"{c['measured']:.3g}", f"{c['bound']:.3g}", "yes" if c["holds"] else "NO"]
        for c in results["checks"]
    ]
    tasks, mixed = (
        [[name, *(f"{bits:.4f}" for bits in row)] for name, *row in results[key][1:]]
        for key in ("tasks", "mixed")
    )
    together, alone = results["mixed_ms"]
    times = [[phase, f"{t:.1f}"] for phase, t in results["seconds"].items()]
    return {
        "Held-out prose after adapting": method_table(results),
        f"Mean rank of {full} that SoRA keeps, {total:.0%} of all": [["", *KINDS], ["", *means]],
        "Checks": [["largest difference", "measured", "at most", "holds"], *checks],
        "Bits per byte of one merged model, its adapters swapped in place in "
        f"{results['swap_ms']:.2f} ms": [results["tasks"][0], *tasks],
        f"Bits per byte of three adapters, every row with its own: one batch in {together:.0f} ms, "
        f"three in {alone:.0f} ms": [results["mixed"][0], *mixed],
        "Time": [["phase", "seconds"], *times],
    }


def markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def terminal(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def plot_curves(axes: Axes, curves: dict[str, list]) -> None:
    for name, points in curves.items():
        naive, fused = name == NAIVE, name not in COLORS
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=color_of(name),
            linewidth=7 if naive else 2,
            linestyle="--" if fused else "-",
            zorder=2 if naive else 3,
        )
    last, before = points[-1][0], points[0][1]
    axes.axhline(before, color=INK, linewidth=1, linestyle=":")
    axes.annotate("base, not adapted", (last, before), (0, -5), ha="right", va="top",
                  textcoords="offset points", color=INK)  # fmt: skip
    axes.set_title("Held-out prose while adapting")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(color=GRID)
    axes.legend(frameon=False)


def plot_memory(axes: Axes, methods: dict[str, dict]) -> None:
    parts = {
        "trained weights": "trainable_bytes",
        "gradients": "gradient_bytes",
        "optimiser state": "optimizer_bytes",
    }
    for i, (name, m) in enumerate(methods.items()):
        places = [group + 0.29 * (i - 1) for group in range(len(parts))]
        sizes = [m[key] for key in parts.values()]
        color = color_of(name)
        bars = axes.bar(places, sizes, width=0.27, color=color, label=name)
        axes.bar_label(bars, [in_bytes(n) for n in sizes], padding=2, fontsize=8, color=INK)
    axes.set_yscale("log")
    axes.set_ylim(top=axes.get_ylim()[1] * 4)
    axes.set_xticks(range(len(parts)), parts)
    axes.set_title("What training holds beside the frozen model")
    axes.set(ylabel="bytes, log scale")
    axes.legend(frameon=False, loc="upper left")


def plot_kept(axes: Axes, methods: dict[str, dict]) -> None:
    names = [name for name, m in methods.items() if m["kept"] and name != NAIVE]
    for name in names:
        m = methods[name]
        axes.scatter(m["kept"], m["after"], s=70, color=color_of(name), label=name, zorder=3)
    axes.set_xscale("log")
    axes.margins(0.15)
    axes.set_title("Quality against the parameters kept")
    axes.set(xlabel="parameters of the adapters, log scale", ylabel="bits per byte")
    axes.grid(color=GRID, which="both")
    axes.legend(frameon=False)


def plot_ranks(axes: Axes, ranks: list[list[int]], full: int) -> None:
    axes.imshow(ranks, cmap="GnBu", vmin=0, vmax=full, aspect="auto")
    for i, row in enumerate(ranks):
        for j, rank in enumerate(row):
            color = "white" if rank > 0.6 * full else INK
            axes.text(j, i, rank, ha="center", va="center", color=color)
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set_yticks(range(len(ranks)))
    axes.set_title(f"Rank that SoRA keeps, of {full}")
    axes.set(xlabel="layer", ylabel="block")
    axes.tick_params(length=0)


def write(results: dict, folder: Path, console: Console) -> None:
    """Prints the tables and writes demo.md and demo.png."""
    text = ["# Adapting a language model", results["title"]]
    console.print(results["title"])
    for title, rows in tables(results).items():
        text += [f"## {title}", markdown(rows)]
        console.print(terminal(title, rows))
    (folder / "demo.md").write_text("\n\n".join(text) + "\n")

    figure = Figure(figsize=(13, 9.4), layout="constrained")
    (curves, kept), (memory, ranks) = figure.subplots(2, 2)
    fused = next(name for name in results["curves"] if name not in COLORS)
    plot_curves(curves, results["curves"])
    plot_kept(kept, results["methods"])
    plot_memory(memory, {name: results["methods"][name] for name in (FULL, fused, SORA)})
    plot_ranks(ranks, results["kept_ranks"], 2 * results["rank"])
    for axes in figure.axes:
        axes.spines[:].set_visible(False)
    figure.suptitle(results["title"], color=INK)
    figure.savefig(folder / "demo.png", dpi=150)
    console.print(f"{folder / 'demo.png'}, demo.md and demo.json are written")
