"""Which tile a kernel runs with: rows of tuning/default.json, and closed forms of the sizes.

A row is chosen by the GPU's family, the kind of product and the sizes; any size on any GPU finds
one. Nothing else enters, so a result is the same, bit for bit, on every GPU of a family.

Above them routes: rows of measured times that name the kernel, and its tile, for sizes near theirs.

A row's maxnreg is what its shared memory leaves to a block: left alone, ptxas aims for more blocks
on a multiprocessor than fit, and spills for it. In a row of one Triton it is what lets as many fit
as with others.
"""

import functools
import json
import math
import os
from pathlib import Path

import torch
import triton

# A family is a tensor-core instruction; a GPU belongs to the newest entry not newer than itself.
FAMILIES = {0: "interpreter", 80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
# KiB a block, and bytes of it that the barriers of a pipeline may take.
SHARED_MEMORY = {0: 2**20, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
BARRIERS = 64
# The widest tile of ranks for each kind of product.
MAX_BLOCK_R = {"half": 128, "tf32": 128, "fp32": 64}
# What a split is sized for: two blocks or so for each multiprocessor of a large GPU.
BLOCKS_WANTED = 256
# Fixed where the batch may not matter: splits of K for a row, rows of an adapter in one block.
SPLITS_OF_K, ROWS_OF_ADAPTER = 8, 1024
# Up to so many rows each reads its own adapter, unless there are so few adapters that a tile of
# DECODE_TILE rows would be shared by them.
DECODE_ROWS, DECODE_TILE = 64, 16


# An H100 or H200 has so many multiprocessors; in a clock, each makes so many products of 16-bit
# numbers and gets so many bytes from L2.
MULTIPROCESSORS, PRODUCTS_PER_CLOCK, L2_BYTES_PER_CLOCK = 132, 2048, 46
# Barriers of the rings and arguments of the partitions of segment_gemm_hopper.
HOPPER_EXTRA = 512


@functools.cache
def table(name: str = "default") -> dict:
    return json.loads((Path(__file__).parent / "tuning" / f"{name}.json").read_text())


@functools.cache
def _cuda_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """10 * major + minor, and 0 where Triton interprets on the CPU."""
    return _cuda_capability(device.index or 0) if device.type == "cuda" else 0


def _newest(known: dict, sm: int):
    return known[max(entry for entry in known if entry <= sm)]


def family(sm: int) -> str:
    return _newest(FAMILIES, sm)


def input_precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's TF32 setting; 16-bit ones have no choice."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def kind(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if input_precision(dtype) == "tf32" else "fp32"


def block_of(size: int, cap: int) -> int:
    """The smallest power of two that holds `size`, from 16 (tl.dot's least) to `cap`."""
    return max(16, min(cap, triton.next_power_of_2(size)))


def triton_version() -> str:
    """Its first two numbers."""
    return ".".join(triton.__version__.split(".")[:2])


def rows(op: str, sm: int, kind: str) -> list[dict]:
    """The rows of an op, narrow bounds first. A string names the family that has the same ones.

    Those of another Triton are left out: a row with "triton" is for that version.
    """
    families, version = table()[op], triton_version()
    found = families[family(sm)]
    found = (families[found] if isinstance(found, str) else found)[kind]
    return [
        {key: value for key, value in row.items() if key != "triton"}
        for row in found
        if row.get("triton", version) == version
    ]


@functools.lru_cache(maxsize=4096)
def choose(op: str, kind: str, sm: int, sizes: tuple[tuple[str, int], ...]) -> dict:
    """The first row whose bounds hold all sizes, without its bounds; empty where no row does."""
    for row in rows(op, sm, kind):
        if all(size <= row.get(f"max_{name}", size) for name, size in sizes):
            return {key: value for key, value in row.items() if not key.startswith("max_")}
    return {}


def segment_gemm(M: int, N: int, dtype: torch.dtype, sm: int) -> dict:
    return choose("segment_gemm", kind(dtype), sm, (("M", M), ("MN", M * N)))


def segment_gemm_hopper(M: int, N: int, multiprocessors: int) -> dict:
    """The tile with which the rounds of blocks of one K step each take the least time."""

    def clocks(row):
        block_m, block_n, block_k = row["BLOCK_M"], row["BLOCK_N"], row["BLOCK_K"]
        rounds = triton.cdiv(triton.cdiv(M, block_m) * triton.cdiv(N, block_n), multiprocessors)
        products = block_m * block_n * block_k / PRODUCTS_PER_CLOCK
        loads = 2 * (block_m + block_n) * block_k / L2_BYTES_PER_CLOCK
        return rounds * max(products, loads)

    return min(table("hopper")["segment_gemm"], key=clocks)


def hopper_shared_memory(config: dict) -> int:
    """Bytes that a block of segment_gemm_hopper takes, at most: the ring, and y on its way out."""
    step = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"]
    y = config["BLOCK_M"] * config["BLOCK_N"]
    return 2 * (config["STAGES"] * step + y) + HOPPER_EXTRA


def hopper_valid(config: dict) -> bool:
    """Whether segment_gemm_hopper can run with a config: two warpgroups, boxes of TMA, memory."""
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    return (
        all(block & (block - 1) == 0 for block in (block_m, block_n))
        and 128 <= block_m <= 256
        and 64 <= block_n <= 256
        and block_m * block_n <= 128 * 256  # two accumulators in registers
        and config["BLOCK_K"] == 64  # 128 bytes, the widest swizzle
        and config["STAGES"] >= 2
        and hopper_shared_memory(config) <= 1024 * SHARED_MEMORY[90]
    )


def segment_add(M: int, N: int, dtype: torch.dtype, sm: int) -> dict:
    """Without a base product there is little to reuse, and K is a rank: small tiles, and no more
    threads than have 16 bytes of each operand to load."""
    return choose("segment_add", kind(dtype), sm, (("M", M), ("MN", M * N)))


def shrink(M: int, K: int, R: int, dtype: torch.dtype, sm: int) -> dict:
    """K is split until there are BLOCKS_WANTED blocks, but not below one K step."""
    row = choose("shrink", kind(dtype), sm, (("R", R),))
    block_r = block_of(R, MAX_BLOCK_R[kind(dtype)])
    blocks = triton.cdiv(M, row["BLOCK_M"]) * triton.cdiv(R, block_r)
    split = min(BLOCKS_WANTED // max(1, blocks), triton.cdiv(K, row["BLOCK_K"]))
    return row | {"BLOCK_R": block_r, "SPLIT_K": max(1, split)}


def row_reduce(M: int, C: int, R: int, dtype: torch.dtype, sm: int, with_u: bool = False) -> dict:
    """M is split into ROWS until there are BLOCKS_WANTED blocks, or the row's `blocks`: where the
    memory of a multiprocessor holds one of them, more would only mean more planes.

    Empty: for this rank u costs less as a shrink of its own.
    """
    op = "row_reduce_u" if with_u else "row_reduce"
    row = dict(choose(op, kind(dtype), sm, (("R", R), ("MC", M * C))))
    if not row:
        return {}
    block_r = block_of(R, MAX_BLOCK_R[kind(dtype)])
    blocks = triton.cdiv(C, row["BLOCK_C"]) * triton.cdiv(R, block_r)
    split = max(1, row.pop("blocks", BLOCKS_WANTED) // max(1, blocks))
    steps = max(1, triton.cdiv(M, split * row["BLOCK_M"]))
    return row | {"BLOCK_R": block_r, "ROWS": steps * row["BLOCK_M"]}


def embedding(N: int, T: int, D: int, R: int, dtype: torch.dtype, sm: int) -> dict:
    """N sequences of T rows are split into SEQUENCES until there are BLOCKS_WANTED blocks: those of
    a block share one product A B."""
    row = choose("embedding", kind(dtype), sm, (("R", R),))
    blocks = triton.cdiv(T, row["BLOCK_M"]) * triton.cdiv(D, row["BLOCK_D"])
    split = max(1, BLOCKS_WANTED // max(1, blocks))
    # A wider step of ranks spills beside the sum and the row that it is added to.
    block_r = block_of(R, row["BLOCK_R"])
    return row | {"BLOCK_R": block_r, "SEQUENCES": max(1, triton.cdiv(N, split))}


def row_by_row(M: int, G: int) -> bool:
    """Whether M rows of G adapters at most are multiplied each alone (multi_gemv) or in tiles.

    The host does not know who is in the batch: with G adapters, tiles hold M / G rows or more.
    """
    return M <= DECODE_ROWS and G * DECODE_TILE > M


def multi_shrink(K: int, R: int, dtype: torch.dtype, sm: int) -> dict:
    """How K is split depends on nothing of the batch, so neither does a row's result."""
    row = choose("multi_shrink", kind(dtype), sm, (("R", R),))
    split = min(SPLITS_OF_K, triton.cdiv(K, row["BLOCK_K"]))
    return row | {"BLOCK_R": block_of(R, MAX_BLOCK_R[kind(dtype)]), "SPLIT_K": max(1, split)}


def multi_row_reduce(R: int, dtype: torch.dtype, sm: int) -> dict:
    """ROWS likewise: an adapter's gradients do not depend on the others of the batch."""
    row = choose("multi_row_reduce", kind(dtype), sm, (("R", R),))
    return row | {"BLOCK_R": block_of(R, MAX_BLOCK_R[kind(dtype)]), "ROWS": ROWS_OF_ADAPTER}


# What may make the sum of segment_gemm: its own kernel, segment_gemm_hopper, or torch's products.
ROUTES = "triton", "gluon", "torch"
# Rows tell something of sizes with at most so many times more or fewer rows.
REACH = 4


def tuning_path() -> Path:
    """What `fused-lora tune` writes and the launchers read."""
    if path := os.environ.get("FUSED_LORA_TUNING"):
        return Path(path)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fused_lora" / "tuning.json"


@functools.cache
def routes() -> tuple[dict, ...]:
    """The user's rows, then those of tuning/routes.json."""
    path = tuning_path()
    try:
        own = json.loads(path.read_text())["rows"] if path.exists() else []
        unknown = [row for row in own if row["route"] not in ROUTES]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of fused-lora tune ({error!r}); remove it") from error
    if unknown:
        raise ValueError(f"{path}: route must be one of {', '.join(ROUTES)}, got {unknown[0]}")
    return (*own, *table("routes")["rows"])


@functools.cache
def gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def rank_bucket(R: int) -> int:
    return triton.next_power_of_2(max(1, R))


@functools.lru_cache(maxsize=4096)
def route(M: int, **sizes) -> dict | None:
    """The row for the nearest M, by the logarithm, among those that agree in all that they name.

    sizes are form, kind, sm, gpu, triton, N, K and R; a row that leaves one out is for all of them,
    and one without M for every M. The first of the tables that has a row within REACH answers.
    """
    best, distance = None, math.log(REACH) + 1e-9
    for row in routes():
        if all(row.get(key, value) == value for key, value in sizes.items()):
            away = abs(math.log(M / row.get("M", M)))
            if away < distance:
                best, distance = row, away
    return best


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may say that the next can begin: where a route's kernel makes use of it."""
    gluon = any(row["route"] == "gluon" for row in routes())
    return gluon and capability(device) == 90


def shared_memory(op: str, config: dict, sm: int, kind: str) -> int:
    """Bytes of shared memory that a block takes, at most."""
    c = {"BLOCK_R": block_of(config.get("max_R", 256), MAX_BLOCK_R[kind]), **config}
    lhs, rhs, step = {
        "segment_gemm": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
        "segment_add": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
        "shrink": ("BLOCK_M", "BLOCK_R", "BLOCK_K"),
        "multi_shrink": ("BLOCK_M", "BLOCK_R", "BLOCK_K"),
        "row_reduce": ("BLOCK_C", "BLOCK_R", "BLOCK_M"),
        "multi_row_reduce": ("BLOCK_C", "BLOCK_R", "BLOCK_M"),
        "row_reduce_u": ("BLOCK_C", "BLOCK_R", "BLOCK_M"),
        "embedding": ("BLOCK_M", "BLOCK_D", "BLOCK_R"),
    }[op]
    operands = (c[lhs] + c[rhs]) * c[step]
    # mma reads its operands into registers and frees their buffer; the others read from the buffer.
    buffers = c["num_stages"] - (family(sm) == "mma")
    if op in ("segment_gemm", "segment_add"):
        elements = max(buffers * operands, c[lhs] * c[rhs])  # or y, on its way out
    elif op == "embedding":
        # And, one at a time, an operand on its way, or the product in fp32, to where the word
        # embeddings are.
        product = c[lhs] * c[rhs] * (2 if kind == "half" else 1)
        elements = buffers * operands + max(operands, product)
    elif op == "row_reduce_u":
        # And an operand on its way, or w, which stays, and u in fp32 on its way out.
        w, u = c[lhs] * c[rhs], c[step] * c[rhs] * (2 if kind == "half" else 1)
        elements = buffers * operands + max(operands, w + u)
    else:
        elements = (buffers + 1) * operands  # a masked or a transposed operand
    return elements * (2 if kind == "half" else 4) + BARRIERS


def valid(op: str, config: dict, sm: int, kind: str) -> bool:
    """Whether a config can run: the one predicate of the tables, the tuner and the tests."""
    blocks = [value for key, value in config.items() if key.startswith("BLOCK_")]
    return (
        all(block >= 16 and block & (block - 1) == 0 for block in blocks)
        and config["num_warps"] in (1, 2, 4, 8, 16)
        and config["num_stages"] >= 1
        and config.get("ROWS", 0) % config["BLOCK_M"] == 0
        and shared_memory(op, config, sm, kind) <= 1024 * _newest(SHARED_MEMORY, sm)
    )
