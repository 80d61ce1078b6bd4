"""Go or no-go on a Hopper GPU: the base product of each of our GEMMs beside cuBLAS.

    python -m fused_lora.bench.bare [--out DIR]

y = x W0^T and dx = dy W0 of the layers of Llama 8B, bf16, M = 2048 and 8192. Each kernel is
checked against fp64 and then timed in turns with the others, by CUDA graph and with a cold L2
cache. It is a go where its best tile reaches 0.96 of cuBLAS's rate in every case: below that,
cuBLAS and addmm_ win with an adapter too. Writes bare.json and bare.txt. Exit status: 1 where a
result was wrong.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from fused_lora.bench import hopper
from fused_lora.bench.registry import LLAMA_8B
from fused_lora.bench.report import machine
from torch import Tensor

from fused_lora import tune
from fused_lora.tune import Case, Sum

CUBLAS = "cublas"
GO = 0.96
ROWS = 8192, 2048
KERNELS = "gluon", "cuda sm90", "triton", "cuda sm80"


def cases() -> list[Case]:
    return [
        Case(form, M, N, K, 16, torch.bfloat16)
        for M, (N, K), form in itertools.product(ROWS, LLAMA_8B.values(), ("forward", "dx"))
    ]


def products(segments: list[tuple[Tensor, Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """{"kernel, tile": the call}, cuBLAS's first."""
    from fused_lora.triton_kernels import routes
    from fused_lora.triton_kernels import segment_gemm_hopper as gluon

    from fused_lora import cuda_kernels as cuda

    found: dict[str, Callable[[], Tensor]] = {
        CUBLAS: functools.partial(routes.by_torch, segments),
        "triton": functools.partial(routes.plain.segment_gemm, segments),
        "cuda sm80": functools.partial(cuda.segment_gemm, segments),
    }
    for config in hopper.tiles():
        found[hopper.name(config)] = functools.partial(gluon.segment_gemm, segments, config=config)
    for tile in cuda.HOPPER_TILES:
        name = f"cuda sm90 {'x'.join(map(str, tile))}"
        found[name] = functools.partial(cuda.hopper_segment_gemm, segments, tile=tile)
    return found


def measure(case: Case, device: torch.device, timer: tune.Stopwatch) -> dict:
    """{"case", "us": {kernel and tile: median}, "wrong": {kernel and tile: why}}."""
    segments = tune.draw(case, device).segments[:1]
    truth, rows = tune.truth(Sum(segments, None))
    timers, wrong = {}, {}
    for name, product in products(segments).items():
        try:
            truth.check(["y"], [product()[rows]])
            timers[name] = timer(product)
        except Exception as error:  # of the compiler, of the driver, or a wrong result
            wrong[name] = f"{type(error).__name__}: {error}"
    seconds = tune.medians([*timers.values()], tune.ROUNDS)
    us = {name: 1e6 * s for name, s in zip(timers, seconds, strict=True)}
    return {"case": str(case), "us": us, "wrong": wrong}


def rate(row: dict, kernel: str) -> float | None:
    """The best tile's rate over cuBLAS's; None where none was timed."""
    times = [us for name, us in row["us"].items() if name.startswith(kernel)]
    return row["us"][CUBLAS] / min(times) if times and CUBLAS in row["us"] else None


def verdict(rates: Iterable[float | None]) -> str:
    known = [rate for rate in rates if rate is not None]
    if not known:
        return "not measured"
    return f"{'GO' if min(known) >= GO else 'NO GO'}, worst {min(known):.3f} of {len(known)} cases"


def table(rows: list[dict], device: str) -> str:
    """A line a case, then the verdict on each kernel."""
    lines = [f"bare GEMMs over cuBLAS's rate, {device}"]
    lines.append(f"{'':36} cublas us" + "".join(f"{kernel:>11}" for kernel in KERNELS))
    for row in rows:
        rates = [rate(row, kernel) for kernel in KERNELS]
        cells = "".join(f"{'-' if r is None else f'{r:.3f}':>11}" for r in rates)
        lines.append(f"{row['case']:36} {row['us'].get(CUBLAS, float('nan')):9.1f}{cells}")
    for kernel in KERNELS:
        lines.append(f"{kernel}: {verdict(rate(row, kernel) for row in rows)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.bench.bare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of bare.json")
    out = parser.parse_args(arguments).out
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        parser.error(f"the kernels are made for compute capability 9.0, this is {capability}")
    out.mkdir(parents=True, exist_ok=True)
    facts, rows = machine(device), []
    timer = tune.Timer(device)
    for case in cases():
        rows.append(measure(case, device, timer))
        text = table(rows, facts["device"])
        (out / "bare.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
        (out / "bare.txt").write_text(text + "\n")
    print(text)
    wrong = [(row["case"], *item) for row in rows for item in row["wrong"].items()]
    for case, name, why in wrong:
        print(f"{case}, {name}: {why}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
