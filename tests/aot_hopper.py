"""Compile what segment_gemm_hopper launches, with no GPU, and read the machine code.

    python tests/aot_hopper.py FACTS.json [default|full]

A process of its own, as aot.py is.
"""

import itertools
import json
import multiprocessing
import re
import sys
import tempfile
from pathlib import Path

import aot

M, N, K = 2048, 4096, 4096
# Sums of segments: the K of each, whether the right operands lie along N, and what is added.
FORMS = {
    "base": {"Ks": (K,)},
    "forward": {"Ks": (K, 16), "bias": True, "early": 1},
    "forward, wide": {"Ks": (K, 200), "early": 1},
    "dx": {"Ks": (K, 16), "turned": True, "early": 1},
    "masked dx": {"Ks": (16, K), "turned": True, "masked": 1},
    "QKV dx": {"Ks": (K, 1024, 1024, 16, 64, 8), "turned": True, "early": 3},
}


SHRINK = "shrink"


def cases(extent: str) -> list[tuple[int, str, str]]:
    """(row of tuning/hopper.json, dtype, form). `default`: every row, and most forms."""
    from fused_lora.triton_kernels import configs

    rows = range(len(configs.table("hopper")["segment_gemm"]))
    if extent == "full":
        return list(itertools.product(rows, ("bf16", "fp16"), FORMS))
    first = [(0, "bf16", form) for form in ("forward", "masked dx", "QKV dx")]
    return first + [(row, "fp16", "forward") for row in rows[1:]]


def launch(config: dict, dtype: str, Ks, *, turned=False, bias=False, masked=0, early=0):
    import torch
    from fused_lora.triton_kernels.segment_gemm_hopper import segment_gemm

    dtype = getattr(torch, aot.DTYPES[dtype])

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    segments = [(empty(M, k), empty(k, N).t() if turned else empty(N, k)) for k in Ks]
    mask = (empty(M, N // 8, dtype=torch.uint8), 1.25, masked) if masked else None
    bias = empty(N) if bias else None
    segment_gemm(segments, bias=bias, mask=mask, config=config, early=early)


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that holds no other, as text."""
    lines, begin, found = sass.splitlines(), {}, []
    for i, text in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", text):
            begin[label[1]] = i
        elif (jump := re.search(r"BRA `\((\.L_\w+)\)", text)) and jump[1] in begin:
            found.append((begin[jump[1]], i))
    inner = [
        (first, last)
        for first, last in found
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in found)
    ]
    read = [[aot.INSTRUCTION.search(text) for text in lines[a : b + 1]] for a, b in inner]
    return [[m[1] + m[2] for m in loop if m] for loop in read]


def record(name: str, meta: dict, compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = aot.tool("cuobjdump", "-res-usage", file.name)
        sass = aot.tool("nvdisasm", "-c", file.name)
    return {
        "kernel": name,
        "config": {key: meta[key] for key in meta if key.isupper()},
        "pdl": compiled.metadata.launch_pdl,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "setmaxnreg": [int(n, 16) for n in re.findall(r"USETMAXREG.* (0x\w+)", sass)],
        "instructions": sorted(set(re.findall(r"\s([A-Z]\w+)[. ;]", sass))),
        "register on the left": len(re.findall(r"HGMMA\S*\s+R\d+, R\d+, gdesc", sass)),
        "loops": [loop for loop in loops(sass) if any("HGMMA" in text for text in loop)],
    }


def launch_shrink():
    """The kernels before: the splits of K, and their sum."""
    import torch
    from fused_lora.triton_kernels.shrink import shrink

    x, a = (torch.empty(m, K, dtype=torch.bfloat16, device="meta") for m in (M, 16))
    shrink(x, a)


def compile_case(case) -> tuple[str, list[dict]]:
    from fused_lora.triton_kernels import configs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, facts = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **meta):
        compiled = run(self, *args, grid=grid, warmup=True, **meta)
        facts.append(record(self.__name__, meta, compiled) | {"grid": grid[0]})

    aot.GPU.sm = 90
    driver.set_active(aot.GPU)
    JITFunction.run = compile_only
    configs.capability, configs.overlaps = lambda device: 90, lambda device: True
    try:
        if case == SHRINK:
            launch_shrink()
        else:
            row, dtype, form = case
            launch(configs.table("hopper")["segment_gemm"][row], dtype, **FORMS[form])
    finally:
        JITFunction.run = run
    return str(case), facts


def main(path: str, extent: str = "default"):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        facts = dict(pool.imap_unordered(compile_case, [*cases(extent), SHRINK]))
    Path(path).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
