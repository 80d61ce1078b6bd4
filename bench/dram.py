"""DRAM bytes of one forward and backward, as the GPU's counters see them.

    python -m fused_lora.bench.dram [--out DIR]         runs ncu once for each contender

One call after the L2 cache was overwritten, with what its kernels leave to each other in the cache
left there. Writes dram.json.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from fused_lora.bench.registry import LORA_LINEAR as OP
from fused_lora.bench.registry import LinearCase
from fused_lora.bench.report import machine

CASE = LinearCase(8192, 4096, 4096, dtype=torch.bfloat16)
CONTENDERS = "linear", "naive", "addmm", "lorafusion form", "torch", "triton", "cuda"
METRICS = {"read": "dram__bytes_read.sum", "write": "dram__bytes_write.sum"}
NCU = [
    "ncu",
    "--csv",
    "--page=raw",
    "--print-units=base",
    f"--metrics={','.join(METRICS.values())}",
    "--profile-from-start=off",
    "--clock-control=none",  # the clocks are left as they are
    "--cache-control=none",  # a kernel finds what the one before it left in the cache
]


def run_once(name: str) -> None:
    """The call that is counted, between the marks that ncu waits for."""
    device = torch.device("cuda")
    tensors = OP.tensors(CASE, device)
    forward = OP.contenders[name].build(CASE, *tensors)
    leaves = [t for t in tensors if t.requires_grad]
    dy = torch.randn(CASE.M, CASE.N, device=device, dtype=CASE.dtype)
    for _ in range(3):
        torch.autograd.grad(forward(), leaves, dy, allow_unused=True)
    torch.empty(2**28, dtype=torch.uint8, device=device).zero_()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    torch.autograd.grad(forward(), leaves, dy, allow_unused=True)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def parse(text: str) -> list[dict]:
    """{"kernel", "read", "write"} for each kernel of ncu's CSV, in their order.

    Raises ValueError where the text has no table of these metrics in bytes.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise ValueError(f"ncu printed no table: {' '.join(lines[-3:]) or 'nothing at all'}")
    units, *rows = csv.DictReader(lines[first:])
    for metric in METRICS.values():
        if units.get(metric) != "byte":
            raise ValueError(f"{metric} must be in byte, got {units.get(metric)!r}")
    if not rows:
        raise ValueError("ncu saw no kernel")
    return [
        {"kernel": row["Kernel Name"]}
        | {key: int(float(row[metric].replace(",", ""))) for key, metric in METRICS.items()}
        for row in rows
    ]


def count(name: str) -> dict:
    """{"read", "write", "kernels"} of a contender."""
    command = [*NCU, sys.executable, "-m", "fused_lora.bench.dram", "--run", name]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        kernels = parse(done.stdout)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; {done.stderr.strip()[-300:]}") from None
    return {key: sum(kernel[key] for kernel in kernels) for key in METRICS} | {"kernels": kernels}


def table(contenders: dict[str, dict], least: int) -> str:
    """GiB of each contender; `least` bytes: each input read and each output written once."""
    lines = [f"{'':18}     read    write      sum   kernels   GiB, both, {CASE}"]
    for name, found in contenders.items():
        read, write = (found[key] / 2**30 for key in METRICS)
        cells = f"{read:9.3f}{write:9.3f}{read + write:9.3f}"
        lines.append(f"{name:18}{cells}   {len(found['kernels']):7}")
    return "\n".join([*lines, f"{'compulsory':36}{least / 2**30:9.3f}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.bench.dram", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of dram.json")
    parser.add_argument("--run", choices=CONTENDERS, help="only the call itself: what ncu starts")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if chosen.run:
        run_once(chosen.run)
        return 0
    if shutil.which("ncu") is None:
        parser.error("there is no ncu on the PATH")
    found, failed = {}, []
    for name in CONTENDERS:
        try:
            found[name] = count(name)
        except ValueError as error:
            failed.append(str(error))
    facts = machine(torch.device("cuda"))
    chosen.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": facts, "case": str(CASE), "contenders": found, "failed": failed}
    (chosen.out / "dram.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(found, OP.bytes(CASE, "both")))
    print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
