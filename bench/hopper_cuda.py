"""The CUDA form of segment_gemm for Hopper on a GPU: right or wrong, then its time beside cuBLAS.

    python -m fused_lora.bench.hopper_cuda [--small] [--only HALF] [--out DIR]

Numerics: every tile on sizes of every kind, against fp64; the same bits when it is run again, and
when it begins while shrink still runs. Times: the bare product beside cuBLAS's, then the product
with an adapter, on the layers of Llama 8B and 70B. Writes hopper_cuda.json. Exit status: 1 where a
result was wrong. --small is for compute-sanitizer: small sizes, once each, and no times.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fused_lora.bench.registry import SHAPES
from fused_lora.bench.report import machine
from torch import Tensor

from fused_lora.testing import Truth

BF16, FP16 = torch.bfloat16, torch.float16
FORMS = "forward", "dx", "masked dx"
ROWS = 2048, 8192
AGAIN = 250  # runs that must give the same bits
ROUNDS = 21  # the first is not counted
COLD_BYTES = 2**29  # written before each call: more than an L2 cache holds
CHECKED_ROWS = 64
KEEP_SCALE = 1.25


class Case(NamedTuple):
    """A layer of N x K with an adapter of rank R, and M rows of x."""

    form: str
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.form} M={self.M} {self.N}x{self.K} r={self.R} {dtype}"


class Sum(NamedTuple):
    """Arguments of segment_gemm."""

    segments: list[tuple[Tensor, Tensor]]
    mask: tuple[Tensor, float, int] | None


def cases(*sizes: tuple) -> list[Case]:
    return [Case(form, *size) for form, size in itertools.product(FORMS, sizes)]


SMALL = cases((1, 64, 64, 8, BF16), (77, 96, 224, 16, FP16), (333, 520, 136, 40, BF16))
# Edges in every direction, ranks of one and of several steps, more tiles than blocks.
NUMERIC = [
    *SMALL,
    *cases(
        (257, 4096, 1056, 40, BF16), (2837, 1120, 4128, 200, BF16), (8192, 4096, 4096, 64, BF16)
    ),
    Case("forward", 66001, 33000, 64, 8, BF16),  # offsets past 2^31
]


def draw(case: Case, device: torch.device) -> Sum:
    """Operands of N(0, 1), which lie as the op has them. y is [M, N], and dx [M, K]."""
    M, N, K, R = case.M, case.N, case.K, case.R

    def normal(*shape):
        return torch.randn(*shape, dtype=case.dtype, device=device)

    weight, a, b = normal(N, K), normal(R, K), normal(N, R)
    if case.form == "forward":
        return Sum([(normal(M, K), weight), (normal(M, R), b)], None)
    base, lora = (normal(M, N), weight.t()), (normal(M, R), a.t())
    if case.form == "dx":
        return Sum([base, lora], None)
    bits = torch.randint(0, 256, (M, -(-K // 8)), dtype=torch.uint8, device=device)
    return Sum([lora, base], (bits, KEEP_SCALE, 1))


def truth(total: Sum) -> tuple[Truth, Tensor]:
    """(what some rows of the sum are, which rows)."""
    (segments, mask), M = total, total.segments[0][0].shape[0]
    device = segments[0][0].device
    rows = torch.linspace(0, M - 1, min(M, CHECKED_ROWS), device=device).long()
    keep = None
    if mask is not None:
        lanes = (mask[0][rows][:, :, None] >> torch.arange(8, device=device)) & 1
        keep = lanes.bool().reshape(len(rows), -1)[:, : segments[0][1].shape[0]]

    def plain(*operands):
        y = operands[0] @ operands[1].t()
        if keep is not None:
            y = torch.where(keep, y * KEEP_SCALE, 0)
        return (y + operands[2] @ operands[3].t(),)

    return Truth(plain, [t for left, right in segments for t in (left[rows], right)]), rows


def numerics(chosen: Iterable[Case], device: torch.device, again: int) -> list[dict]:
    """{"case", "tile", "why"}, where why is empty if all is well."""
    from fused_lora import cuda_kernels

    found = []
    for case in chosen:
        total = draw(case, device)
        expected, rows = truth(total)
        for tile in cuda_kernels.HOPPER_TILES:
            why = ""
            try:
                options = {"mask": total.mask, "tile": tile}
                y = cuda_kernels.hopper_segment_gemm(total.segments, **options)
                expected.check(["y"], [y[rows]])
                for _ in range(again):
                    same = cuda_kernels.hopper_segment_gemm(total.segments, **options)
                    assert torch.equal(y, same), "other bits when it is run again"
                if case.form == "forward":
                    _overlapped(total, tile, again)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            found.append({"case": str(case), "tile": "x".join(map(str, tile)), "why": why})
    return found


def _overlapped(total: Sum, tile: tuple[int, int], again: int) -> None:
    """After shrink, and with the base product begun before shrink has ended, the same bits."""
    from fused_lora import cuda_kernels

    (x, weight), (t, b) = total.segments
    a = torch.randn(t.shape[1], x.shape[1], dtype=x.dtype, device=x.device) * x.shape[1] ** -0.5
    t, _ = cuda_kernels.shrink(x, a)
    y = cuda_kernels.hopper_segment_gemm([(x, weight), (t, b)], tile=tile)
    for _ in range(again + 1):
        t, _ = cuda_kernels.shrink(x, a)
        early = cuda_kernels.hopper_segment_gemm([(x, weight), (t, b)], tile=tile, early=1)
        assert torch.equal(y, early), "other bits when it begins before shrink has ended"


def calls(case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed: the products alone, then with an adapter."""
    from fused_lora import cuda_kernels as kernels

    (x, weight), (_, b) = draw(case, device).segments
    a = torch.randn(case.R, case.K, dtype=case.dtype, device=device)

    def fused(**options):
        t, _ = kernels.shrink(x, a)
        return kernels.segment_gemm([(x, weight), (t, b)], **options)

    def early(tile):
        t, _ = kernels.shrink(x, a)
        return kernels.hopper_segment_gemm([(x, weight), (t, b)], tile=tile, early=1)

    def addmm():
        t, _ = kernels.shrink(x, a)
        return F.linear(x, weight).addmm_(t, b.t())

    found: dict[str, Callable[[], object]] = {
        "cublas": lambda: F.linear(x, weight),
        "sm80": lambda: kernels.segment_gemm([(x, weight)]),
        "with an adapter: cublas, addmm": addmm,
        "with an adapter: sm80": fused,
        "with an adapter: not early": lambda: fused(block_m="sm90"),
    }
    for tile in kernels.HOPPER_TILES:
        name = "sm90 " + "x".join(map(str, tile))
        found[name] = lambda t=tile: kernels.hopper_segment_gemm([(x, weight)], tile=t)
        found[f"with an adapter: {name}"] = lambda t=tile: early(t)
    return found


class Timer:
    """Seconds of one call on the current CUDA device, with its L2 cache full of other things."""

    def __init__(self, device: torch.device):
        self.other = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, work: Callable[[], object]) -> float:
        self.other.zero_()
        self.begin.record()
        work()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3


def times(chosen: Iterable[Case], device: torch.device, timer: Callable) -> list[dict]:
    """{"case", "us": {call: median}} of each case, the calls in turns."""
    found = []
    for case in chosen:
        work = calls(case, device)
        seconds: dict[str, list[float]] = {key: [] for key in work}
        for _ in range(ROUNDS):
            for key, call in work.items():
                seconds[key].append(timer(call))
        medians = {key: 1e6 * statistics.median(taken[1:]) for key, taken in seconds.items()}
        found.append({"case": str(case), "us": medians})
    return found


def table(found: list[dict]) -> str:
    """The bare product's rate over cuBLAS's, then times over cuBLAS's bare product."""
    lines = [f"{'':40} cublas us   rate   with an adapter:   sm90    sm80   cublas, addmm"]
    for row in found:
        us, base = row["us"], row["us"]["cublas"]
        bare = base / min(t for key, t in us.items() if key.startswith("sm90"))
        ours = min(t for key, t in us.items() if key.startswith("with an adapter: sm90")) / base
        older, theirs = (us[f"with an adapter: {key}"] / base for key in ("sm80", "cublas, addmm"))
        lines.append(
            f"{row['case']:40} {base:9.1f} {bare:6.3f} {ours:24.3f} {older:7.3f} {theirs:15.3f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.bench.hopper_cuda", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="for hopper_cuda.json")
    parser.add_argument("--small", action="store_true", help="small sizes, once each, no times")
    parser.add_argument("--only", choices=("numerics", "times"), help="default: both")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        parser.error(f"the kernel is made for compute capability 9.0, this is {capability}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "hopper_cuda.json"
    # The other half may have been run before.
    result: dict = json.loads(path.read_text()) if path.exists() else {}
    result["machine"] = machine(device)
    wrong: list[dict] = []
    if chosen.small or chosen.only != "times":
        checked, again = (SMALL, 0) if chosen.small else (NUMERIC, AGAIN)
        result["numerics"] = numerics(checked, device, again)
        path.write_text(json.dumps(result, indent=1) + "\n")
        wrong = [row for row in result["numerics"] if row["why"]]
        for row in wrong:
            print(f"{row['case']}, {row['tile']}: {row['why']}", file=sys.stderr)
        total = len(result["numerics"])
        print(f"{total - len(wrong)} of {total} results are right")
    if not (wrong or chosen.small or chosen.only == "numerics"):
        layers = [Case("forward", M, N, K, 16, BF16) for M in ROWS for N, K in SHAPES.values()]
        result["times"] = times(layers, device, Timer(device))
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(table(result["times"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
