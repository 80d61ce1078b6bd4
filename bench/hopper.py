"""The Gluon kernel of segment_gemm on a Hopper GPU: right or wrong, then its time beside cuBLAS.

    FUSED_LORA_TUNING=bench/gluon.json python -m fused_lora.bench.hopper [--out DIR]

Numerics: every tile on sizes of every kind, against fp64; the same bits when it is run again, and
when it begins while shrink still runs. Times: the bare product beside cuBLAS's, then the product
with an adapter, on the layers of Llama 8B and 70B. Writes hopper.json. Exit status: 1 where a
result was wrong.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from fused_lora.bench.report import machine

from fused_lora import tune
from fused_lora.tune import Case

BF16, FP16 = torch.bfloat16, torch.float16
# One row, edges in every direction, ranks of one and of several steps, more tiles than blocks.
NUMERIC = [
    Case(form, M, N, K, R, dtype)
    for form in tune.FORMS
    for M, N, K, R, dtype in (
        (1, 64, 64, 8, BF16),
        (77, 96, 224, 16, FP16),
        (257, 4096, 1056, 40, BF16),
        (2837, 1120, 4128, 200, BF16),
        (8192, 4096, 4096, 64, BF16),
    )
]
ROWS = 2048, 8192
AGAIN = 20  # runs that must give the same bits
ROUNDS = 20


def tiles() -> list[dict]:
    from fused_lora.triton_kernels import configs

    return configs.table("hopper")["segment_gemm"]


def name(config: dict) -> str:
    return "gluon " + "x".join(str(config[key]) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))


def numerics(cases: Iterable[Case], device: torch.device) -> list[dict]:
    """{"case", "tile", "why"}, where why is empty if all is well."""
    from fused_lora.triton_kernels import segment_gemm_hopper as hopper

    found = []
    for case, config in itertools.product(cases, tiles()):
        total = tune.draw(case, device)
        truth, rows = tune.truth(total)
        why = ""
        try:
            y = hopper.segment_gemm(total.segments, mask=total.mask, config=config)
            truth.check(["y"], [y[rows]])
            for _ in range(AGAIN):
                again = hopper.segment_gemm(total.segments, mask=total.mask, config=config)
                assert torch.equal(y, again), "other bits when it is run again"
            if case.form == "forward":
                _overlapped(total, config, hopper)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        found.append({"case": str(case), "tile": name(config), "why": why})
    return found


def _overlapped(total: tune.Sum, config: dict, hopper) -> None:
    """After shrink, and with the base product begun before shrink has ended, the same bits."""
    from fused_lora.triton_kernels.shrink import shrink

    (x, weight), (t, b) = total.segments
    a = torch.randn(t.shape[1], x.shape[1], dtype=x.dtype, device=x.device) * x.shape[1] ** -0.5
    t, _ = shrink(x, a)
    y = hopper.segment_gemm([(x, weight), (t, b)], config=config)
    for _ in range(AGAIN):
        t, _ = shrink(x, a)
        early = hopper.segment_gemm([(x, weight), (t, b)], config=config, early=1)
        assert torch.equal(y, early), "other bits when it begins before shrink has ended"


def calls(case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed: the products alone, then with an adapter."""
    from fused_lora.triton_kernels import routes
    from fused_lora.triton_kernels import segment_gemm_hopper as hopper
    from fused_lora.triton_kernels.shrink import shrink

    (x, weight), (_, b) = tune.draw(case, device).segments
    a = torch.randn(case.R, case.K, dtype=case.dtype, device=device)

    def fused(config):
        t, _ = shrink(x, a)
        return hopper.segment_gemm([(x, weight), (t, b)], config=config, early=1)

    def addmm():
        t, _ = shrink(x, a)
        return routes.by_torch([(x, weight), (t, b)])

    found: dict[str, Callable[[], object]] = {
        "cublas": lambda: F.linear(x, weight),
        "triton": lambda: routes.plain.segment_gemm([(x, weight)]),
        "with an adapter: cublas, addmm": addmm,
    }
    for config in tiles():
        found[name(config)] = lambda c=config: hopper.segment_gemm([(x, weight)], config=c)
        found[f"with an adapter: {name(config)}"] = lambda c=config: fused(c)
    return found


def times(cases: Iterable[Case], device: torch.device, timer: Callable) -> list[dict]:
    """{"case", "us": {call: median}} of each case, the calls in turns."""
    found = []
    for case in cases:
        work = calls(case, device)
        seconds: dict[str, list[float]] = {key: [] for key in work}
        for _ in range(ROUNDS):
            for key, call in work.items():
                seconds[key].append(timer(call))
        medians = {key: 1e6 * statistics.median(all_[1:]) for key, all_ in seconds.items()}
        found.append({"case": str(case), "us": medians})
    return found


def table(found: list[dict]) -> str:
    """Rates over cuBLAS's bare product: the best tile, and the best with an adapter."""
    lines = [f"{'':44} cublas us   gluon   with an adapter: gluon   cublas, addmm"]
    for row in found:
        us, base = row["us"], row["us"]["cublas"]
        bare = base / min(t for key, t in us.items() if key.startswith("gluon"))
        ours = min(t for key, t in us.items() if key.startswith("with an adapter: gluon")) / base
        theirs = us["with an adapter: cublas, addmm"] / base
        lines.append(f"{row['case']:44} {base:9.1f} {bare:7.3f} {ours:24.3f} {theirs:15.3f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.bench.hopper", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of hopper.json")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        parser.error(f"the kernel is made for compute capability 9.0, this is {capability}")
    from fused_lora.triton_kernels import configs

    if not configs.overlaps(device):
        parser.error("FUSED_LORA_TUNING names no table with the route gluon (bench/gluon.json)")
    chosen.out.mkdir(parents=True, exist_ok=True)
    result: dict = {"machine": machine(device), "numerics": numerics(NUMERIC, device)}
    path = chosen.out / "hopper.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row for row in result["numerics"] if row["why"]]
    for row in wrong:
        print(f"{row['case']}, {row['tile']}: {row['why']}", file=sys.stderr)
    print(f"{len(result['numerics']) - len(wrong)} of {len(result['numerics'])} results are right")
    if not wrong:
        cases = [Case("forward", M, N, K, 16, BF16) for M in ROWS for N, K in tune.SHAPES]
        result["times"] = times(cases, device, tune.Timer(device))
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(table(result["times"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
