"""fused-lora tune: which kernel makes a sum of segments fastest on this GPU, for a model's sizes.

Each candidate is checked against fp64 and then timed, in turns with the others. The fastest becomes
a row of the user's table, which the launchers of backend "triton" read when they are first called.
Nothing is tuned at run time.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.testing import Truth

# N x K of the layers of Llama 8B and 70B.
SHAPES = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (28672, 8192),
    (8192, 28672),
)
# Those that share x there: their outputs, and K. dx is one sum over all of them.
GROUPS = (
    ((4096, 1024, 1024), 4096),
    ((14336, 14336), 4096),
    ((8192, 1024, 1024), 8192),
    ((28672, 28672), 8192),
)
ROWS = 512, 2048, 8192
FORMS = "forward", "dx", "masked dx"
ROUNDS = 12
COLD_BYTES = 2**28  # written before each call: more than an L2 cache holds
CHECKED_ROWS = 64
KEEP_SCALE = 1.25


class Case(NamedTuple):
    """A layer of N x K with an adapter of rank R, and M rows of x. Of dx it may be several, whose
    outputs are `parts` of N, and their ranks R together.
    """

    form: str
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    parts: tuple[int, ...] = ()

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        N = "+".join(map(str, self.parts or (self.N,)))
        return f"{self.form} M={self.M} {N}x{self.K} r={self.R} {dtype}"


class Sum(NamedTuple):
    """Arguments of segment_gemm."""

    segments: list[tuple[Tensor, Tensor]]
    mask: tuple[Tensor, float, int] | None


def draw(case: Case, device: torch.device) -> Sum:
    """Operands of N(0, 1), which lie as the op has them. y is [M, N], and dx [M, K]."""
    M, N, K, R = case.M, case.N, case.K, case.R

    def normal(*shape):
        return torch.randn(*shape, dtype=case.dtype, device=device)

    weight, a, b = normal(N, K), normal(R, K), normal(N, R)
    if case.form == "forward":
        return Sum([(normal(M, K), weight), (normal(M, R), b)], None)
    base = [(normal(M, len(w)), w.t()) for w in weight.split(case.parts or N)]
    lora = (normal(M, R), a.t())
    if case.form == "dx":
        return Sum([*base, lora], None)
    bits = torch.randint(0, 256, (M, (K + 7) // 8), dtype=torch.uint8, device=device)
    return Sum([lora, *base], (bits, KEEP_SCALE, 1))


def candidates(total: Sum) -> list[dict]:
    """{"route", "config"} of each kernel and tile that can make the sum."""
    from fused_lora.triton_kernels import configs, routes

    x = total.segments[0][0]
    kind, sm = configs.kind(x.dtype), configs.capability(x.device)
    found = []
    for row in configs.rows("segment_gemm", sm, kind):
        config = {key: value for key, value in row.items() if not key.startswith("max_")}
        found.append({"route": "triton", "config": config})
    if routes.gluon_refuses(*total) is None:
        rows = configs.table("hopper")["segment_gemm"]
        found += [{"route": "gluon", "config": row} for row in rows]
    if routes.torch_refuses(*total) is None:
        found.append({"route": "torch"})
    return found


def call(candidate: dict, total: Sum) -> Tensor:
    from fused_lora.triton_kernels import routes

    segments, mask = total
    if candidate["route"] == "torch":
        return routes.by_torch(segments)
    if candidate["route"] == "triton":
        return routes.plain.segment_gemm(segments, mask=mask, config=candidate["config"])
    from fused_lora.triton_kernels import segment_gemm_hopper

    return segment_gemm_hopper.segment_gemm(segments, mask=mask, config=candidate["config"])


def truth(total: Sum) -> tuple[Truth, Tensor]:
    """(what some rows of the sum are, which rows)."""
    (segments, mask), M = total, total.segments[0][0].shape[0]
    device = segments[0][0].device
    rows = torch.linspace(0, M - 1, min(M, CHECKED_ROWS), device=device).long()
    keep = None
    if mask is not None:
        bits = mask[0][rows]
        lanes = (bits[:, :, None] >> torch.arange(8, device=device)) & 1
        keep = lanes.bool().reshape(len(rows), -1)[:, : segments[0][1].shape[0]]

    def plain(*operands):
        y = operands[0] @ operands[1].t()
        if keep is not None:
            y = torch.where(keep, y * KEEP_SCALE, 0)
        for lhs, rhs in zip(operands[2::2], operands[3::2], strict=True):
            y = y + lhs @ rhs.t()
        return (y,)

    return Truth(plain, [t for lhs, rhs in segments for t in (lhs[rows], rhs)]), rows


class Timer:
    """Makes of a call a function that does its work on the current CUDA device, with other things
    in the L2 cache, and returns its seconds. It is a CUDA graph: Python's time is not in them.
    """

    def __init__(self, device: torch.device):
        self.other = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], object]) -> Callable[[], float]:
        work()  # what is compiled or allocated at the first call cannot be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            work()

        def seconds() -> float:
            self.other.zero_()
            self.begin.record()
            graph.replay()
            self.end.record()
            self.end.synchronize()
            return 1e-3 * self.begin.elapsed_time(self.end)

        return seconds


Stopwatch = Callable[[Callable[[], object]], Callable[[], float]]


def medians(timers: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """Of each, called in turns with the others; the first round is not counted."""
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(rounds):
        for timer, seconds in zip(timers, times, strict=True):
            seconds.append(timer())
    return [statistics.median(seconds[1:]) for seconds in times]


def measure(case: Case, device: torch.device, timer: Stopwatch) -> tuple[dict, dict[str, str]]:
    """(a row of the table for the case, {candidate: why it was not timed})."""
    from fused_lora.triton_kernels import routes

    total = draw(case, device)
    check, rows = truth(total)
    sound, timers, failed = [], [], {}
    for candidate in candidates(total):
        try:
            check.check(["y"], [call(candidate, total)[rows]])
            timers.append(timer(functools.partial(call, candidate, total)))
        except Exception as error:  # of the compiler, of the driver, or a wrong result
            failed[json.dumps(candidate)] = f"{type(error).__name__}: {error}"
        else:
            sound.append(candidate)
    if not sound:
        raise RuntimeError(f"no kernel makes {case}: {failed}")
    times = medians(timers, ROUNDS)
    best = min(range(len(sound)), key=times.__getitem__)
    by_torch = [t for c, t in zip(sound, times, strict=True) if c["route"] == "torch"]
    return {
        **routes.sizes(*total),
        **sound[best],
        "us": round(1e6 * times[best], 2),
        "torch us": round(1e6 * by_torch[0], 2) if by_torch else None,
    }, failed


KEYS = "form", "kind", "sm", "gpu", "triton", "N", "K", "R", "M"


def merge(old: Iterable[dict], new: Sequence[dict]) -> list[dict]:
    """The new rows, and of the old those for other sizes, versions or GPUs."""

    def key(row):
        return tuple(row.get(name) for name in KEYS)

    replaced = set(map(key, new))
    return [*new, *(row for row in old if key(row) not in replaced)]


def write(path: Path, rows: list[dict]) -> None:
    """Whoever reads the table meanwhile has the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            file.write('{"rows": [\n' + lines + "\n]}\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def tune(
    cases: Sequence[Case],
    path: Path,
    device: torch.device,
    timer: Stopwatch,
    track: Callable[[Sequence[Case]], Iterable[Case]] = iter,
) -> tuple[list[dict], dict[str, dict[str, str]]]:
    """Measure the cases and put their rows into the table at `path`, after every case.

    Returns (the rows, {case: {candidate: why it was not timed}}).
    """
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows: list[dict] = []
    failed: dict[str, dict[str, str]] = {}
    for case in track(cases):
        row, failures = measure(case, device, timer)
        rows.append(row)
        if failures:
            failed[str(case)] = failures
        write(path, merge(old, rows))
    return rows, failed


def progress(cases: Sequence[Case]) -> Iterable[Case]:
    """A bar, where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return cases
    return track(cases, description="measuring", console=Console(stderr=True))


def line(case: Case, row: dict) -> str:
    over = f", {row['torch us'] / row['us']:.2f}x torch's" if row["torch us"] else ""
    config = row.get("config", {})
    tile = "x".join(str(config[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if config)
    return f"{case!s:44} {row['route']:7} {tile:12} {row['us']:9.2f} us{over}"


def main(arguments: argparse.Namespace) -> int:
    """What the command does with its arguments; cli.py has their parser."""
    from fused_lora.ops import dispatch

    reason: str | None
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device, and times of another machine tell nothing of yours"
    else:
        reason = dispatch.triton_refuses(torch.empty(0, device="cuda"))
    if reason is not None:
        print(f"fused-lora tune: {reason}", file=sys.stderr)
        return 2
    from fused_lora.triton_kernels import configs

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    device = torch.device("cuda", torch.cuda.current_device())
    layers: list[tuple[tuple[int, ...], int]] = [((N,), K) for N, K in arguments.shapes or SHAPES]
    cases = [
        Case(form, M, sum(parts), K, len(parts) * arguments.rank, dtypes[dtype], parts)
        for dtype in arguments.dtype
        for parts, K in layers + ([] if arguments.shapes else list(GROUPS))
        for M in arguments.rows or ROWS
        for form in arguments.form
        if form != "forward" or len(parts) == 1
    ]
    path = Path(arguments.out) if arguments.out else configs.tuning_path()
    rows, failed = tune(cases, path, device, Timer(device), progress)
    if arguments.json:
        print(json.dumps({"path": str(path), "rows": rows, "failed": failed}, indent=1))
        return 0
    for case, row in zip(cases, rows, strict=True):
        print(line(case, row))
    for name, reasons in failed.items():
        for candidate, why in reasons.items():
            print(f"{name}: not timed: {candidate}: {why}", file=sys.stderr)
    print(f"{path}: the launchers of backend 'triton' read it when they are first called")
    return 0
