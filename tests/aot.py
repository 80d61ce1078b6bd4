"""Compile what production launches, with no GPU, and read the machine code.

    python tests/aot.py FACTS.json [default|full]

The launchers run on meta tensors under a driver that only names a GPU. Every kernel that they start
is compiled for that GPU and its cubin is read with the tools in Triton's wheel. It takes a process
of its own: what was imported under TRITON_INTERPRET cannot be compiled.
"""

import dataclasses
import fcntl
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from linecache import getline
from pathlib import Path

K, N = 4096, 4096
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32", "fp32": "float32"}
# An M for each row of segment_gemm.
BUCKETS = {"half": (16, 64, 256, 1024, 8192), "tf32": (16, 64, 8192), "fp32": (16, 8192)}
RANKS = (8, 16, 32, 64, 128, 256)
ARCHITECTURES = {"default": (80, 90, 100), "full": (80, 90, 100, 120)}
# needs: dx, dA, dB, dg.
CALLS = {
    "forward": {},
    "forward-all": {"p": 0.1, "gate": True, "bias": True, "save_h": True},
    "backward": {"needs": (True, True, True, False)},
    "backward-all": {"p": 0.1, "gate": True, "needs": (True, True, True, True)},
    "backward-frozen-b": {"gate": True, "needs": (True, True, False, False)},
    "backward-dx": {"p": 0.1, "needs": (True, False, False, False)},
    "multi-forward": {"save_h": True},
    "multi-decode": {},
    "multi-qkv": {},
    "multi-qkv-decode": {},
    "multi-backward": {"p": 0.1, "needs": (True, True, True, True)},
    "embedding": {},
    "add": {"gate": True},
    "group-backward": {"p": 0.1, "gate": True},
}
# What M changes in these calls, others meet.
ANY_M = "backward-frozen-b", "backward-dx", "multi-decode", "multi-qkv", "multi-qkv-decode"
ANY_M += "embedding", "group-backward"
SAME = "forward", "forward-all", "backward", "backward-all"  # for batches of any length
SLOTS = 64  # of the calls for many adapters


@dataclasses.dataclass(frozen=True)
class Case:
    sm: int
    dtype: str
    M: int
    R: int
    call: str

    def __str__(self):
        return f"sm_{self.sm}-{self.dtype}-M{self.M}-R{self.R}-{self.call}"


def cases(extent: str) -> list[Case]:
    """`full` meets every rank, bucket, call and dtype, and so every row of the tables."""
    found = []
    for sm, dtype in itertools.product(ARCHITECTURES[extent], DTYPES):
        buckets = BUCKETS["half" if dtype in ("bf16", "fp16") else dtype]
        if extent == "full":
            for M, R, call in itertools.product(buckets, RANKS, CALLS):
                fixed = call in ANY_M or (call == "add" and M > min(buckets))
                if M == max(buckets) or not fixed:
                    found.append(Case(sm, dtype, M, R, call))
        if dtype == "fp16" and sm in ARCHITECTURES["default"]:
            calls = "forward-all", "backward-all", "multi-forward"
            calls += "embedding", "add", "group-backward"
            found += [Case(sm, dtype, 1024, 64, call) for call in calls]
    found += [Case(90, "bf16", 8192, 16, call) for call in CALLS]
    # Another length, that must compile to the same.
    found += [Case(90, "bf16", 4096, 16, call) for call in SAME]
    # The tightest tiles of the embeddings, and the smallest of lora_add.
    found += [Case(80, "fp32", 16, 32, call) for call in ("embedding", "add")]
    return list(dict.fromkeys(found))


class NamedGPU:
    """As much of a Triton driver as compiling asks for."""

    sm = 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self):
        return self.sm

    def get_current_stream(self, device):
        return 0


GPU = NamedGPU()
ASSEMBLY = re.compile(r"// begin inline asm.*?// end inline asm", re.S)
LOC = re.compile(r"^\s*\.loc\s.*\n", re.M)
PLANTED: list[Case] = []
LAUNCHED: list[str] = []  # hashes
KERNELS: dict[str, dict] = {}  # hash -> facts
CHOSEN: dict[str, dict] = {}  # kernel -> the row that the table last gave it


def with_true_lines(ptx: str) -> str:
    """Since Triton 3.8 each line of inline assembly, as of a load, counts as one of the source."""
    return ASSEMBLY.sub(lambda found: LOC.sub("", found[0]), ptx)


@functools.cache
def install():
    """From here on a launch compiles and is recorded."""
    from fused_lora.triton_kernels import configs
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, choose, make_ptx = JITFunction.run, configs.choose, CUDABackend.make_ptx

    def compile_only(self, *args, grid, warmup, **meta):
        record(self.__name__, meta, run(self, *args, grid=grid, warmup=True, **meta))

    def remember(op, kind, sm, sizes):
        row = choose(op, kind, sm, sizes)
        if row:
            chosen = {"op": op, "family": configs.family(sm), "kind": kind, "row": row}
            name = {"segment_add": "segment_gemm"}.get(op, op.removesuffix("_u")) + "_kernel"
            CHOSEN[name] = CHOSEN[f"multi_{name}"] = chosen
        return row

    driver.set_active(GPU)
    JITFunction.run = compile_only
    CUDABackend.make_ptx = lambda self, *stage: with_true_lines(make_ptx(self, *stage))
    configs.choose = remember
    configs.capability = lambda device: GPU.sm


def call(case: Case):
    """The kernels of one forward or backward of an op, on tensors without memory."""
    import torch

    from fused_lora.ops import lora_add, lora_linear_group
    from fused_lora.ops.lora_linear import backward_kernels, forward_kernels

    dtype = getattr(torch, DTYPES[case.dtype])
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    options = {"p": 0.0, "gate": False, "bias": False, "save_h": False, **CALLS[case.call]}
    M, R, p = case.M, case.R, options["p"]

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, w, a, b = empty(M, K), empty(N, K), empty(R, K), empty(N, R)
    gate = empty(R, dtype=torch.float32) if options["gate"] else None
    seed = empty(1, dtype=torch.int64) if p else None
    GPU.sm = case.sm
    if case.call == "embedding":
        return embeddings(M, R, w)
    if case.call == "add":
        return lora_add.forward_kernels(
            "triton", empty(M, N), x, a, b, gate, seed, 2.0, p, save_h=True
        )
    if case.call == "group-backward":
        # q, k and v.
        adapters = [lora_linear_group._Adapter(i, a, b, gate, 2.0) for i in range(3)]
        dy, h = empty(M, N), empty(M, R)
        wanted = [lora_linear_group._Wanted(dy, h, True, True, True, dtype)] * 3
        return lora_linear_group.backward_kernels(
            "triton", [(dy, w)] * 3, x, adapters, wanted, seed, p, True, dtype
        )
    if case.call.endswith("decode"):
        M = min(M, 64)
        x = empty(M, K)
    if case.call.startswith("multi"):
        from fused_lora.triton_kernels import primitives

        from fused_lora.ops import multi_lora_linear as multi

        ids, order, offsets, rank, table = (
            empty(n, dtype=torch.int32) for n in (M, M, SLOTS + 1, SLOTS, SLOTS)
        )
        scale, gate = empty(SLOTS, dtype=torch.float32), empty(SLOTS, R, dtype=torch.float32)
        slots = multi.Slots(empty(SLOTS, R, K), empty(SLOTS, R, N), rank, scale, gate, table)
        route = multi.Route(ids, order, offsets)
        if "qkv" in case.call:
            y = empty(M, 3 * N)
            primitives.multi_add_(list(y.split(N, 1)), x, [slots] * 3, route)
        elif "needs" not in options:
            multi.forward_kernels(
                "triton", x, w, slots, route, empty(N), seed, p, options["save_h"]
            )
        else:
            dy, h = empty(M, N), empty(M, R)
            multi.backward_kernels("triton", dy, x, w, slots, route, h, seed, p, options["needs"])
    elif "needs" not in options:
        bias = empty(N) if options["bias"] else None
        forward_kernels("triton", x, w, a, b, bias, gate, seed, 2.0, p, options["save_h"])
    else:
        dy, h = empty(M, N), empty(M, R)
        backward_kernels(
            "triton", dy, x, w, a, b, gate, h, seed, 2.0, p, options["needs"], (dtype, dtype)
        )


def embeddings(M: int, R: int, weight):
    """dept_embedding and its sums over the batch, by order and by position, and lora_embedding."""
    import torch
    from fused_lora.triton_kernels.embedding import embedding, sum_segments

    def new(*shape, dtype=weight.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    ids, a, b, prompt = new(8, M // 8, dtype=torch.int64), new(256, R), new(R, K), new(16, K)
    y = embedding(ids, weight, a, b, scale=2.0, prompt=prompt)
    embedding(ids, weight, a, b, scale=2.0, prompt=prompt, positions=ids)
    tokens = ids.view(1, M)
    embedding(tokens, weight, new(R, N).t(), new(K, R).t(), scale=2.0, positions=tokens)
    sums = new(16 + M // 8, K, dtype=torch.float32)
    sum_segments(y, sums)
    sum_segments(sums[None], new(256, K, dtype=torch.float32), ids[0])
    sum_segments(y[:, 16:], new(N, K), ids)
    sum_segments(new(1, M, R), new(R, N).t(), tokens)


def tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


LINE = re.compile(r'//## File "(.+)", line (\d+)')
OPERAND = re.compile(r"(?:load\(\s*)?(\w+?)(?:_ptrs?\b|,)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
WIDTHS = {".256": 32, ".128": 16, ".64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def call_at(file: str, number: int) -> str:
    """A source line, and those after it until the brackets that it opens are closed.

    The line of a load is the one of its pointer, and since Triton 3.8 that of the call.
    """
    text = getline(file, number)
    while text.count("(") > text.count(")") and (more := getline(file, number + 1)):
        text, number = text + more, number + 1
    return text.strip()


def read_sass(sass: str) -> dict:
    """Counts of instructions, and of loads by operand: x for a call with x_ptr or x_ptrs."""
    counts, loads, place, inlined = Counter(), {}, None, False
    for text in sass.splitlines():
        if found := LINE.search(text):
            # Of a nest of inlined calls the first line is the innermost.
            place = place if inlined else (found[1], int(found[2]))
            inlined = True
        elif found := INSTRUCTION.search(text):
            inlined, (name, operands) = False, found.groups()
            base = name.split(".")[0]
            counts[base] += 1
            counts["HGMMA with a register on the left"] += bool(
                base == "HGMMA" and re.match(r"\s+R\d+, R\d+, gdesc", operands)
            )
            counts["HGMMA that ends a group"] += base == "HGMMA" and "gsb0" in operands
            if base in ("LDG", "LDGSTS"):
                width = next((w for mark, w in WIDTHS.items() if mark in name), 4)
                key = f"{'async' if base == 'LDGSTS' else 'plain'} {width}"
                call = call_at(*place)
                operand = found[1] if (found := OPERAND.search(call)) else call
                loads.setdefault(operand, Counter())[key] += 1
    return {"counts": counts, "loads": loads}


def narrow_offsets(ttir: str) -> list[str]:
    """Lines of TTIR where an offset is, or is made from, a 32-bit product that can overflow.

    Such are an offset of tt.addptr that is not i64 and, in what an offset is computed from, an i32
    product of two variables or of a stride and anything.
    """
    defined, loops, offsets = {}, [], []
    for text in ttir.splitlines():
        line = text.split(" loc(")[0].strip()
        result = re.match(r"(%[\w.$-]+)(?::\d+)? = ([\w.]+)", line)
        if line.startswith("}") and loops and " else " not in line:
            loops.pop()
        if result:
            name, op = result.groups()
            uses = re.findall(r"%[\w.$-]+", line)[1:]
            defined[name] = (op, uses, line)
            if op in ("scf.for", "scf.while", "scf.if"):
                carried = re.findall(r"(%[\w.$-]+) = (%[\w.$-]+)", line.partition("iter_args")[2])
                for inner, outer in carried:
                    defined[inner] = ("carried", [outer], line)
                if op == "scf.for":
                    counter = line.split(" = scf.for ")[1].split()[0]
                    defined[counter] = ("counter", uses[1:4], line)
                loops.append((name, [inner for inner, _ in carried]))
            if op == "tt.addptr":
                offsets.append((uses[1], line))
        elif line.startswith("scf.for"):
            loops.append((None, []))
        elif line.startswith("scf.yield") and loops:
            values = re.findall(r"%[\w.$-]+", line)
            name, carried = loops[-1]
            for inner, value in zip(carried, values, strict=False):
                defined[inner][1].append(value)
            if name:
                defined[name][1].extend(values)

    found = [line for _, line in offsets if not re.search(r"(, |x)i64>?$", line)]
    seen, todo = set(), [use for use, _ in offsets]
    while todo:
        name = todo.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        op, uses, line = defined[name]
        todo += uses
        if op == "arith.muli" and re.search(r"(: |x)i32>?$", line):
            variable = [defined.get(use, ("argument",))[0] != "arith.constant" for use in uses]
            if all(variable) or any(use.startswith("%stride") for use in uses):
                found.append(line)
    return found


@functools.cache
def read(cubin: bytes, ptx: str, ttir: str) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("nvdisasm", "-c", "-g", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "groups": ptx.count("wgmma.commit_group"),
        "narrow offsets": narrow_offsets(ttir),
        **read_sass(sass),
    }


def record(name: str, meta: dict, compiled):
    LAUNCHED.append(compiled.hash)
    if compiled.hash not in KERNELS:
        asm, metadata = compiled.asm, compiled.metadata
        KERNELS[compiled.hash] = {
            "kernel": name,
            "sm": GPU.sm,
            "config": {key: value for key, value in meta.items() if key != "enable_fp_fusion"},
            "warps": metadata.num_warps,
            "stages": metadata.num_stages,
            "shared": metadata.shared,
            **CHOSEN.get(name, {"op": None}),
            **read(asm["cubin"], asm["ptx"], asm["ttir"]),
        }


def compile_group(group: list[Case]) -> dict:
    """{"kernels": {hash: facts}, "cases": {case: hashes}}; "planted" is the group of planted.py."""
    install()
    KERNELS.clear()
    cases = {}
    if group == PLANTED:
        import planted

        GPU.sm = planted.SM
        launches = planted.LAUNCHES.items()
    else:
        launches = ((str(case), functools.partial(call, case)) for case in group)
    for name, launch in launches:
        LAUNCHED.clear()
        launch()
        cases[name] = list(LAUNCHED)
    return {"kernels": dict(KERNELS), "cases": cases}


def facts_of(harness: str, extent: str, folder: Path) -> dict:
    """What the script `harness` reads from the cubins, made once where several workers ask."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    script = Path(__file__).with_name(harness)
    path = folder / f"{script.stem}.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            env = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
            # Machine code names its source files: what another checkout compiled names others.
            env["TRITON_CACHE_DIR"] = str(script.parents[1] / "build" / "compiled")
            subprocess.run([sys.executable, script, path, extent], env=env, check=True)
    return json.loads(path.read_text())


def main(path: str, extent: str = "default"):
    by_gpu = itertools.groupby(cases(extent), key=lambda case: (case.sm, case.dtype))
    groups = [PLANTED, *(list(group) for _, group in by_gpu)]
    facts = {"kernels": {}, "cases": {}}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for part in pool.imap_unordered(compile_group, groups):
            for key, found in part.items():
                facts[key].update(found)
    Path(path).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
