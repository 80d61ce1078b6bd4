"""What the gates of a model say: the rank that each layer keeps, as data, table and picture."""

from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch.nn import Parameter

from fused_lora.names import named_modules
from fused_lora.nn.adapter import ADAPTED
from fused_lora.nn.sharded import check_unflattened, whole

# How models name their projections: by the ends of module names, the longest that fits counts.
_NAMES = {
    "q": "q_proj query query_proj wq to_q q",
    "k": "k_proj key key_proj wk to_k k",
    "v": "v_proj value value_proj wv to_v v",
    "qkv": "qkv_proj qkv c_attn query_key_value Wqkv",
    "o": "o_proj out_proj wo to_out.0 attention.output.dense attn.c_proj attn.proj o",
    "gate": "gate_proj w1",
    "up": "up_proj w3 fc1 c_fc wi wi_0 wi_1 intermediate.dense dense_h_to_4h linear1 lin1 up",
    "down": "down_proj w2 fc2 mlp.c_proj DenseReluDense.wo output.dense dense_4h_to_h linear2 lin2 "
    "down",
}
_KIND_OF = {end: kind for kind, ends in _NAMES.items() for end in ends.split()}


def kind_of(name: str) -> str:
    """What a layer of that name is: q, k, v, qkv, o, the gate, up or down of a feed-forward; else
    the last part of the name."""
    parts = name.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((_KIND_OF[end] for end in ends if end in _KIND_OF), parts[-1])


def block_of(name: str) -> int | None:
    """The first number in a layer's name: which of the like blocks it is in."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def named_gates(model: torch.nn.Module) -> dict[str, Parameter]:
    """{name of the layer: its gate} of every SoRALinear, and LoRAAdapter with a gate, of model; a
    shared layer is there once. Raises NotImplementedError where FSDP1 has flattened them."""
    gates = {}
    for name, layer in named_modules(model):
        if isinstance(layer, ADAPTED) and layer.gate is not None:
            check_unflattened("named_gates", name, layer)
            gates[name] = layer.gate
    return gates


def gate_counts(model: torch.nn.Module) -> dict[str, int]:
    """{name of the layer: gates that are not zero}. It waits for the device once, for all gates;
    sharded ones are put together, so that every process calls this."""
    gates = named_gates(model)
    if not gates:
        return {}
    home = next(iter(gates.values())).device
    counts = torch.stack([torch.count_nonzero(whole(g.detach())).to(home) for g in gates.values()])
    return dict(zip(gates, counts.tolist(), strict=True))


def kept_parameters(model: torch.nn.Module) -> int:
    """The parameters of the adapters that prune(model) would leave, and their gates:

        sum over the gated layers of nnz(g) (K + N + 1) + over those without a gate of R (K + N)

    for a weight [N, K]. A shared layer counts once. It waits for the device.
    """
    counts = gate_counts(model)
    total = 0
    for name, layer in named_modules(model):
        if isinstance(layer, ADAPTED):
            wide = layer.in_features + layer.out_features
            total += layer.r * wide if layer.gate is None else counts[name] * (wide + 1)
    return total


def by_kind(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of GateLog.rows summed over the layers of each kind, in the order of a block; last the
    sum of all, of kind "all"."""
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        for kind in (row["kind"], "all"):
            total = groups.setdefault(
                kind, {"kind": kind, "layers": 0, "rank": 0, "kept": 0, "parameters": 0}
            )
            total["layers"] += 1
            for name in ("rank", "kept", "parameters"):
                total[name] += row[name]
    order = [*_NAMES, *groups]
    found = sorted(groups.values(), key=lambda g: (g["kind"] == "all", order.index(g["kind"])))
    return [{**g, "sparsity": 1 - g["kept"] / g["rank"]} for g in found]


class GateLog:
    """The ranks that the gates of a model keep, step by step.

        log = fl.optim.GateLog(model)
        with log.live():  # a table in the terminal; needs rich
            for step, batch in enumerate(batches):
                ...
                if step % 50 == 0:
                    log.record(step)
        log.plot("gates.png")  # needs matplotlib

    record() waits for the device once; nothing else of training does. Layers that prune(model,
    keep_gates=True) takes away in between count as closed, and ranks are those at the beginning.
    `history` is plain data: [{"step", "sparsity", "parameters", "kept": {layer: rank}}].

    Raises TypeError for anything but a module, ValueError where no layer has a gate.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        gated = named_gates(model)
        layers = {n: m for n, m in named_modules(model) if n in gated}
        if not layers:
            raise ValueError(
                "model has no SoRALinear; inject with LoRAConfig(gate=True) makes them"
            )
        self.model = model
        self.ranks = {name: m.r for name, m in layers.items()}
        self._wide = {name: m.in_features + m.out_features + 1 for name, m in layers.items()}
        self.history: list[dict[str, Any]] = []

    def record(self, step: int) -> dict[str, Any]:
        """Append what the gates are now, and return it."""
        counts = gate_counts(self.model)
        kept = {name: counts.get(name, 0) for name in self.ranks}
        self.history.append(
            {
                "step": step,
                "sparsity": 1 - sum(kept.values()) / sum(self.ranks.values()),
                "parameters": sum(n * self._wide[name] for name, n in kept.items()),
                "kept": kept,
            }
        )
        return self.history[-1]

    def rows(self, record: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """A row for each layer: layer, kind, block, rank, kept, parameters; of the last record, or
        of one of history. Before the first all gates count as open."""
        if record is None:
            record = self.history[-1] if self.history else {"kept": self.ranks}
        return [
            {
                "layer": name,
                "kind": kind_of(name),
                "block": block_of(name),
                "rank": rank,
                "kept": record["kept"][name],
                "parameters": record["kept"][name] * self._wide[name],
            }
            for name, rank in self.ranks.items()
        ]

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """{kind: [(step, share of its gates that are zero)]}, with "all" last."""
        found: dict[str, list[tuple[int, float]]] = {g["kind"]: [] for g in by_kind(self.rows())}
        for record in self.history:
            for group in by_kind(self.rows(record)):
                found[group["kind"]].append((record["step"], group["sparsity"]))
        return found

    def table(self):
        """A rich.table.Table of the last record: the rank that each kind of layer keeps."""
        from rich.table import Table

        groups = by_kind(self.rows())
        step = f"step {self.history[-1]['step']}" if self.history else "before training"
        table = Table(title=f"Gates, {step}", title_justify="left", title_style="bold")
        for name in ("kind", "layers", "mean rank kept", "gates at zero", "parameters"):
            table.add_column(name, justify="left" if name == "kind" else "right")
        table.add_column("open", min_width=20)
        for g in groups:
            if g["kind"] == "all":
                table.add_section()
            mean = f"{g['kept'] / g['layers']:.1f} of {g['rank'] / g['layers']:.1f}"
            bar = "█" * round(20 * (1 - g["sparsity"]))
            cells = str(g["layers"]), mean, f"{g['sparsity']:.0%}", f"{g['parameters']:,}", bar
            table.add_row(g["kind"], *cells)
        return table

    def live(self):
        """A context in which the terminal shows table(), as of the last record."""
        from rich.live import Live

        return Live(get_renderable=self.table, refresh_per_second=4)

    def plot(self, path: str | PathLike | None = None):
        """A matplotlib Figure, written to `path` if given: the share of gates at zero against the
        step, and the rank that each layer keeps in the end."""
        from matplotlib.figure import Figure

        rows = self.rows()
        blocks = sorted({row["block"] for row in rows}, key=lambda b: (b is None, b))
        figure = Figure(figsize=(12, max(4.2, 0.3 * len(blocks) + 1.6)), layout="constrained")
        curves, ranks = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _plot_curves(curves, self.curves())
        _plot_ranks(ranks, rows, blocks)
        for axes in figure.axes:
            axes.spines[:].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


_COLORS = ["#d1495b", "#2a6f97", "#2a9d8f", "#f4b860", "#6a4c93", "#8d99ae", "#bc6c25", "#3a5a40"]
_INK, _GRID = "#22303c", "#e3e8ec"


def _plot_curves(axes, curves: dict[str, list[tuple[int, float]]]) -> None:
    for i, (kind, points) in enumerate(curves.items()):
        steps, shares = [p[0] for p in points], [100 * p[1] for p in points]
        total = kind == "all"
        color = _INK if total else _COLORS[i % len(_COLORS)]
        axes.plot(steps, shares, color=color, linewidth=3 if total else 1.6, label=kind)
    axes.set_title("Gates at zero")
    axes.set(xlabel="step", ylabel="% of the gates", ylim=(-2, 102))
    axes.grid(color=_GRID)
    axes.margins(x=0.02)
    axes.legend(frameon=False, ncols=2)


def _plot_ranks(axes, rows: list[dict[str, Any]], blocks: list[int | None]) -> None:
    """A row for each block, a column for each kind; several layers in one place are averaged."""
    kinds = [g["kind"] for g in by_kind(rows)[:-1]]
    cells: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        place = blocks.index(row["block"]), kinds.index(row["kind"])
        cells.setdefault(place, []).append(row["kept"])
    means = {place: sum(kept) / len(kept) for place, kept in cells.items()}
    grid = [
        [means.get((i, j), float("nan")) for j in range(len(kinds))] for i in range(len(blocks))
    ]
    full = max(row["rank"] for row in rows)
    shades = axes.pcolormesh(grid, cmap="GnBu", vmin=0, vmax=full, edgecolors="white", linewidth=2)
    shades.set_clip_on(False)
    axes.invert_yaxis()
    for (i, j), mean in means.items():
        color = "white" if mean > 0.6 * full else _INK
        axes.text(
            j + 0.5, i + 0.5, f"{mean:.3g}", ha="center", va="center", color=color, fontsize=9
        )
    axes.set_xticks([j + 0.5 for j in range(len(kinds))], kinds)
    axes.set_yticks([i + 0.5 for i in range(len(blocks))], ["" if b is None else b for b in blocks])
    parameters = sum(row["parameters"] for row in rows)
    axes.set_title(f"Rank kept, of {full}: {parameters:,} parameters in all")
    axes.set(xlabel="layer", ylabel="block" if blocks != [None] else "")
    axes.tick_params(length=0)
