"""What the benchmarks of papers' claims share: contenders that take turns, and the answers."""

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fused_lora.bench.measure import Spread


def timed(
    calls: Mapping[str, Callable[[Any], object]],
    inputs: Sequence,
    device: torch.device,
    track: Callable[[Sequence], Iterable] = iter,
) -> dict[str, list[float]]:
    """Seconds of each call on each input, in a new order for every input.

    Each call is first made with the first two, which counts for nothing.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    order, seconds = random.Random(0), {name: [] for name in calls}
    for call in calls.values():
        for given in inputs[:2]:
            call(given)
    for given in track(inputs):
        for name in order.sample(list(calls), len(calls)):
            wait()
            start = time.perf_counter()
            calls[name](given)
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """The median, over rounds, of the time of one in that of another."""
    pairs = zip(seconds[name], seconds[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def milliseconds(seconds: Sequence[float]) -> str:
    """p50 [p20 - p80]."""
    p20, p50, p80 = (1e3 * t for t in Spread.of(seconds))
    return f"{p50:.4g} [{p20:.4g} - {p80:.4g}]"


def heading(result: dict) -> list[str]:
    """The lines above: what was measured, and on what machine."""
    return [f"# {result['op']}", "", *(f"- {k}: {v}" for k, v in result["machine"].items()), ""]


def answers(verdicts: Iterable[tuple[str, str, bool]]) -> list[str]:
    """A table of (the claim, what was measured, whether it holds)."""
    lines = ["", "| claim | measured | holds |", "| --- | --- | --- |"]
    return lines + [f"| {c} | {said} | {'yes' if ok else 'NO'} |" for c, said, ok in verdicts]


def save(result: dict, markdown: str, folder: Path) -> Path:
    """Write <op>.json and .md; returns their path without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / result["op"]
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown)
    return path
