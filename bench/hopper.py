"""The Gluon kernel of segment_gemm on a Hopper GPU: right or wrong, then its time beside cuBLAS.

    FUSED_LORA_TUNING=bench/gluon.json python -m fused_lora.bench.hopper [--only HALF] [--out DIR]

Numerics: every tile on sizes of every kind, against fp64; the same bits when it is run again, and
when it begins while shrink still runs. Times: the base product beside cuBLAS's, then with an
adapter, of forward, dx, and dx of layers that share x, in Llama 8B and 70B. Writes hopper.json.
Exit status: 1 where a result was wrong.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
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
] + [Case(form, 257, 640, 1056, 24, BF16, (384, 128, 128)) for form in ("dx", "masked dx")]
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
    """What is timed: the base product alone, then with an adapter; of dx also the whole backward.

    A forward with an adapter begins with shrink.
    """
    from fused_lora.triton_kernels import routes
    from fused_lora.triton_kernels import segment_gemm_hopper as hopper
    from fused_lora.triton_kernels.shrink import shrink

    from fused_lora.ops import lora_linear

    segments = tune.draw(case, device).segments
    *base, (t, b) = segments

    def new(*shape):
        return torch.randn(*shape, dtype=case.dtype, device=device)

    x, a = new(case.M, case.K), new(case.R, case.K)

    def adapted(product, **options):
        left = shrink(base[0][0], a)[0] if case.form == "forward" else t
        return product([*base, (left, b)], **options)

    found: dict[str, Callable[[], object]] = {
        "cublas": lambda: routes.by_torch(base),
        "triton": lambda: routes.plain.segment_gemm(base),
        "with an adapter: cublas, addmm": lambda: adapted(routes.by_torch),
    }
    for config in tiles():
        product = functools.partial(hopper.segment_gemm, config=config)
        found[name(config)] = functools.partial(product, base)
        found[f"with an adapter: {name(config)}"] = functools.partial(
            adapted, product, early=len(base)
        )
    if case.form == "dx" and len(base) == 1:
        dy, weight, lora_b = base[0][0], base[0][1].t(), new(case.N, case.R)
        needs, dtypes = (True, True, True, False), (case.dtype, case.dtype)
        found["backward"] = lambda: lora_linear.backward_kernels(
            "triton", dy, x, weight, a, lora_b, None, t, None, 1.0, 0.0, needs, dtypes
        )
    return found


def times(cases: Iterable[Case], device: torch.device, timer: tune.Stopwatch) -> list[dict]:
    """{"case", its sizes, "us": {call: median}} of each case, the calls in turns."""
    found = []
    for case in cases:
        work = calls(case, device)
        medians = tune.medians([timer(call) for call in work.values()], ROUNDS)
        us = {key: 1e6 * seconds for key, seconds in zip(work, medians, strict=True)}
        sizes = {key: value for key, value in case._asdict().items() if key != "dtype"}
        found.append({"case": str(case), **sizes, "us": us})
    return found


def best(us: dict[str, float], kind: str = "") -> float:
    """The time of the fastest tile, of the base product or "with an adapter: "."""
    return min(t for key, t in us.items() if key.startswith(f"{kind}gluon"))


def table(found: list[dict]) -> str:
    """The best tile's rate over cuBLAS's; times with an adapter over cuBLAS's base product."""
    lines = [f"{'':44} cublas us   gluon   with an adapter: gluon   cublas, addmm"]
    for row in found:
        us, base = row["us"], row["us"]["cublas"]
        bare, ours = base / best(us), best(us, "with an adapter: ") / base
        theirs = us["with an adapter: cublas, addmm"] / base
        lines.append(f"{row['case']:44} {base:9.1f} {bare:7.3f} {ours:24.3f} {theirs:15.3f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.bench.hopper", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of hopper.json")
    parser.add_argument("--only", choices=("numerics", "times"), help="default: both")
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
    path = chosen.out / "hopper.json"
    # The other half may have been run before.
    result: dict = json.loads(path.read_text()) if path.exists() else {}
    result["machine"] = machine(device)
    wrong: list[dict] = []
    if chosen.only != "times":
        result["numerics"] = numerics(NUMERIC, device)
        path.write_text(json.dumps(result, indent=1) + "\n")
        wrong = [row for row in result["numerics"] if row["why"]]
        for row in wrong:
            print(f"{row['case']}, {row['tile']}: {row['why']}", file=sys.stderr)
        total = len(result["numerics"])
        print(f"{total - len(wrong)} of {total} results are right")
    if chosen.only != "numerics" and not wrong:
        cases = [
            Case(form, M, N, K, 16, BF16)
            for form in ("forward", "dx")
            for M in ROWS
            for N, K in tune.SHAPES
        ]
        for parts, K in tune.GROUPS:
            cases.append(Case("dx", ROWS[-1], sum(parts), K, 16 * len(parts), BF16, parts))
        result["times"] = times(cases, device, tune.Timer(device))
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(table(result["times"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
