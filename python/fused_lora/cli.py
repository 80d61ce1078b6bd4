"""The command fused-lora: what runs on this machine, whether it is right, and how fast it is."""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OPTIONAL = "peft", "transformers", "safetensors", "matplotlib", "rich"
THRESHOLD = "soft_threshold_"
SCALE, DROPOUT, ROUNDS = 1.5, 0.1, 7


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.split("\n")[0].strip() or None


def refusals(op: str, x) -> dict[str, str | None]:
    """{backend: None if it can run the op on tensors like x, else the sentence why not}."""
    stem = {"multi_lora_add_": "multi_lora_linear"}.get(op, op.rstrip("_"))
    module = importlib.import_module(f"fused_lora.ops.{stem}")
    return {name: refuses(x) for name, refuses in module.REFUSALS.items()}


def facts() -> dict:
    """What `doctor` tells."""
    import torch

    import fused_lora as fl
    from fused_lora import _extension

    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": found.name,
                "capability": f"{found.major}.{found.minor}",
                "memory GiB": round(found.total_memory / 2**30, 1),
                "multiprocessors": found.multi_processor_count,
            }
        )
    backends = fl.backends()
    probe = torch.empty(1, device="cuda" if gpus else "cpu")
    return {
        "versions": {
            "fused-lora": fl.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda,
            "triton": _version("triton"),
            "driver": _driver(),
            **{package: _version(package) for package in OPTIONAL},
        },
        "gpus": gpus,
        "extension": _extension.why_missing() or "it is built, and it loads",
        "asked for": os.environ.get("FUSED_LORA_BACKEND") or None,
        "default": next(iter(backends)),
        "backends": {name: reason or "it can run" for name, reason in backends.items()},
        "ops": {op: refusals(op, probe) for op in (*CASES, THRESHOLD)},
    }


def doctor(arguments: argparse.Namespace) -> int:
    found = facts()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, version in found["versions"].items():
        print(f"{name:15} {version or '-'}")
    if not found["gpus"]:
        print("GPU             none that torch sees")
    for gpu in found["gpus"]:
        print(
            f"GPU             {gpu['name']}, compute capability {gpu['capability']}, "
            f"{gpu['memory GiB']} GiB, {gpu['multiprocessors']} multiprocessors"
        )
    print(f"CUDA extension  {found['extension']}")
    print(f"\ndefault backend: {found['default']}", end="")
    print(", asked for by FUSED_LORA_BACKEND" if found["asked for"] else "")
    for name, reason in found["backends"].items():
        print(f"  {name:8} {reason}")
    for op, refusals in found["ops"].items():
        print(f"{op}")
        for name, reason in refusals.items():
            print(f"  {name:8} {reason or 'can run'}")
    return 0


class Row(dict):
    """One output of one case, as a line of `verify` and an entry of its JSON."""

    def line(self) -> str:
        ratio = f"{self['time over naive']:.2f}" if self["time over naive"] else "-"
        return (
            f"{self['case']:48} {self['backend']:7} {self['output']:8} {self['error']:.1e}   "
            f"{self['error of plain torch']:.1e}   {self['verdict']:6} {ratio}"
        )


class Case(NamedTuple):
    """One call of an op, as functions of its tensors by name, which return y."""

    sizes: str
    tensors: dict[str, Any]
    ours: Callable[..., Any]
    plain: Callable[..., Any]  # the reference
    naive: Callable[..., Any]  # what one writes without either
    in_place: bool = False  # without gradients


def _draw(device, dtype, std: dict[str, float], **shapes) -> dict[str, Any]:
    """N(0, std), or N(0, 1); the gate is fp32 in every dtype."""
    import torch

    generator = torch.Generator("cpu").manual_seed(0)
    drawn = {}
    for name, shape in shapes.items():
        t = torch.randn(shape, generator=generator, device="cpu") * std.get(name, 1.0)
        drawn[name] = t.to(device, torch.float32 if name in ("gate", "factor") else dtype)
    return drawn


def _lora(t, x, p: float = 0.0):
    """scale * ((drop(x) A^T) * g) B^T."""
    import torch.nn.functional as F

    h = F.linear(F.dropout(x, p) if p else x, t["a"])
    if "gate" in t:
        h = h * t["gate"].to(x.dtype)
    return SCALE * F.linear(h, t["b"])


def _linear_case(shape, rows, rank, dtype, device, p) -> Case:
    import torch.nn.functional as F

    import fused_lora as fl

    N, K = shape
    std = {"a": K**-0.5, "weight": K**-0.5}
    tensors = _draw(
        device, dtype, std,
        weight=(N, K), x=(rows, K), a=(rank, K), b=(N, rank), bias=(N,), gate=(rank,),
    )  # fmt: skip

    def of(op):
        return lambda t, **options: op(
            t["x"], t["weight"], t["a"], t["b"], t["bias"],
            scale=SCALE, gate=t["gate"], **options,
        )  # fmt: skip

    def naive(t):
        return F.linear(t["x"], t["weight"], t["bias"]) + _lora(t, t["x"], p)

    ours, plain = of(fl.lora_linear), of(fl.reference.lora_linear)
    return Case(f"{N}x{K} r={rank} p={p:g}", tensors, ours, plain, naive)


def _add_case(shape, rows, rank, dtype, device, p) -> Case:
    import fused_lora as fl

    N, K = shape
    tensors = _draw(
        device, dtype, {"a": K**-0.5},
        base_out=(rows, N), x=(rows, K), a=(rank, K), b=(N, rank), gate=(rank,),
    )  # fmt: skip

    def of(op):
        return lambda t, **options: op(
            t["base_out"], t["x"], t["a"], t["b"], scale=SCALE, gate=t["gate"], **options
        )

    def naive(t):
        return t["base_out"] + _lora(t, t["x"], p)

    ours, plain = of(fl.lora_add), of(fl.reference.lora_add)
    return Case(f"{N}x{K} r={rank} p={p:g}", tensors, ours, plain, naive)


def _group_case(shape, rows, rank, dtype, device, p) -> Case:
    """Projections with all, without an adapter, and without bias and gate; their y side by side."""
    import torch
    import torch.nn.functional as F

    import fused_lora as fl

    (N, K), few = shape, max(1, shape[0] // 4)
    adapters = {"a0": (rank, K), "b0": (N, rank), "a2": (rank, K), "b2": (few, rank)}
    std = {f"{name}{i}": K**-0.5 for name in ("a", "weight") for i in range(3)}
    tensors = _draw(
        device, dtype, std, x=(rows, K), weight0=(N, K), weight1=(few, K), weight2=(few, K),
        bias0=(N,), bias1=(few,), gate=(rank,), **adapters,
    )  # fmt: skip

    def of(op):
        def call(t, **options):
            lists = ([t.get(f"{n}{i}") for i in range(3)] for n in ("weight", "a", "b", "bias"))
            gates = [t["gate"], None, None]
            return torch.cat(op(t["x"], *lists, scales=[SCALE] * 3, gates=gates, **options), -1)

        return call

    def naive(t):
        ys = [F.linear(t["x"], t[f"weight{i}"], t.get(f"bias{i}")) for i in range(3)]
        ys[0] = ys[0] + _lora({"a": t["a0"], "b": t["b0"], "gate": t["gate"]}, t["x"], p)
        ys[2] = ys[2] + _lora({"a": t["a2"], "b": t["b2"]}, t["x"], p)
        return torch.cat(ys, -1)

    ours, plain = of(fl.lora_linear_group), of(fl.reference.lora_linear_group)
    return Case(f"{N}+{few}+{few}x{K} r={rank} p={p:g}", tensors, ours, plain, naive)


def _dora_case(shape, rows, rank, dtype, device, p) -> Case:
    """The norms are constants in it: what is compared is the sum of products that they scale."""
    import torch
    import torch.nn.functional as F

    import fused_lora as fl

    N, K = shape
    std = {"a": K**-0.5, "weight": K**-0.5}
    tensors = _draw(
        device, dtype, std,
        weight=(N, K), x=(rows, K), a=(rank, K), b=(N, rank), factor=(N,), bias=(N,),
    )  # fmt: skip
    whole = tensors["weight"].double() + SCALE * tensors["b"].double() @ tensors["a"].double()
    norms = torch.linalg.vector_norm(whole, dim=1)

    def ours(t, **options):
        magnitude = t["factor"] * norms.to(t["factor"].dtype)
        return fl.dora_linear(
            t["x"], t["weight"], t["a"], t["b"], magnitude, t["bias"], scale=SCALE, **options
        )

    def plain(t):
        z = fl.reference.lora_linear(t["x"], t["weight"], t["a"], t["b"], scale=SCALE)
        return (t["factor"] * z + t["bias"]).to(z.dtype)

    def naive(t):
        weight = t["weight"] + SCALE * t["b"] @ t["a"]
        norms = torch.linalg.vector_norm(weight, dim=1).detach()
        z = F.linear(t["x"], t["weight"]) + _lora(t, t["x"])
        return (t["factor"] / norms * z + t["bias"]).to(z.dtype)

    return Case(f"{N}x{K} r={rank}", tensors, ours, plain, naive)


def _bank(tensors, rank: int, device):
    """(bank of tensors, ids): adapters of several ranks, and rows without one."""
    import torch

    from fused_lora.reference import AdapterSlots

    ranks = torch.tensor([rank, max(1, rank // 2), rank, 1], dtype=torch.int32, device=device)
    scale = torch.full((4,), SCALE, device=device)
    ids = (torch.arange(len(tensors["x"]), device=device) * 7) % 5 - 1

    def bank(t):
        return AdapterSlots(t["a"], t["bt"], ranks, scale.to(t["gate"].dtype), t["gate"])

    def naive(t, y):
        for j, r in enumerate(ranks.tolist()):
            own = torch.where(ids == j)[0]
            h = (t["x"][own] @ t["a"][j, :r].t()) * t["gate"][j, :r].to(y.dtype)
            y = y.index_add(0, own, SCALE * h @ t["bt"][j, :r])
        return y

    return bank, ids, naive


def _multi_case(shape, rows, rank, dtype, device, p) -> Case:
    import torch.nn.functional as F

    import fused_lora as fl

    N, K = shape
    std = {"a": K**-0.5, "weight": K**-0.5}
    tensors = _draw(
        device, dtype, std,
        weight=(N, K), x=(rows, K), a=(4, rank, K), bt=(4, rank, N), bias=(N,), gate=(4, rank),
    )  # fmt: skip
    bank, ids, added = _bank(tensors, rank, device)

    def of(op):
        return lambda t, **options: op(t["x"], t["weight"], bank(t), ids, t["bias"], **options)

    def naive(t):
        return added(t, F.linear(t["x"], t["weight"], t["bias"]))

    ours, plain = of(fl.multi_lora_linear), of(fl.reference.multi_lora_linear)
    return Case(f"{N}x{K} r<={rank} p={p:g}", tensors, ours, plain, naive)


def _multi_add_case(shape, rows, rank, dtype, device, p) -> Case:
    import fused_lora as fl

    (N, K), offset = shape, 3
    tensors = _draw(
        device, dtype, {"a": K**-0.5},
        y=(rows, N + offset), x=(rows, K), a=(4, rank, K), bt=(4, rank, N), gate=(4, rank),
    )  # fmt: skip
    bank, ids, added = _bank(tensors, rank, device)

    def of(op):
        return lambda t, **options: op(
            t["y"].clone(), t["x"], bank(t), ids, out_offset=offset, **options
        )

    def naive(t):
        y = t["y"].clone()
        y[:, offset:] = added(t, y[:, offset:])
        return y

    ours, plain = of(fl.multi_lora_add_), of(fl.reference.multi_lora_add_)
    return Case(f"{N}x{K} r<={rank}", tensors, ours, plain, naive, in_place=True)


def _embedding_case(shape, rows, rank, dtype, device, p) -> Case:
    import torch
    import torch.nn.functional as F

    import fused_lora as fl

    V, D = shape
    tensors = _draw(device, dtype, {"a": 1.0}, weight=(V, D), a=(rank, V), b=(D, rank))
    ids = torch.arange(rows, device=device) % min(V, max(1, rows // 3))

    def of(op):
        return lambda t, **options: op(ids, t["weight"], t["a"], t["b"], scale=SCALE, **options)

    def naive(t):
        return F.embedding(ids, t["weight"]) + SCALE * F.embedding(ids, t["a"].t()) @ t["b"].t()

    ours, plain = of(fl.lora_embedding), of(fl.reference.lora_embedding)
    return Case(f"{V}x{D} r={rank}", tensors, ours, plain, naive)


def _dept_case(shape, rows, rank, dtype, device, p) -> Case:
    import torch
    import torch.nn.functional as F

    import fused_lora as fl

    (V, D), m = shape, 3
    S = max(1, rows // 2)  # the last tokens are beyond the pair
    tensors = _draw(device, dtype, {}, weight=(V, D), prompt=(m, D), a=(S, rank), b=(rank, D))
    ids = torch.arange(4 * rows, device=device).view(4, rows) % min(V, rows)

    def of(op):
        return lambda t, **options: op(
            ids, t["weight"], t["prompt"], t["a"], t["b"], scale=SCALE, **options
        )

    def naive(t):
        words = F.embedding(ids, t["weight"])
        first = words[:, :S] + SCALE * t["a"] @ t["b"]
        return torch.cat((t["prompt"].expand(len(ids), -1, -1), first, words[:, S:]), 1)

    ours, plain = of(fl.dept_embedding), of(fl.reference.dept_embedding)
    return Case(f"{V}x{D} r={rank} m={m}", tensors, ours, plain, naive)


def _threshold_case(rank, device, backend) -> Iterator[Row]:
    """soft_threshold_, which plain torch computes exactly."""
    import torch

    import fused_lora as fl

    gates = torch.randn(64 * rank, device=device)
    want = gates.sign() * (gates.abs() - 0.25).clamp(min=0)
    got = fl.optim.soft_threshold_(gates.clone(), 0.25, backend=backend)
    yield Row(
        {
            "case": f"soft_threshold_ of {gates.numel()} gates",
            "backend": backend,
            "output": "gates",
            "error": _relative(got, want),
            "error of plain torch": 0.0,
            "verdict": "ok" if torch.equal(got, want) else "FAILED",
            "why": "" if torch.equal(got, want) else "the gates are not sign(g) max(|g| - xi, 0)",
            "time over naive": None,
        }
    )


def _compared(op, backend, make, shape, rows, rank, dtype, device, p) -> Iterator[Row]:
    """A row for y and every gradient of a case, held to the reference in fp64."""
    import torch

    from fused_lora.testing import Truth

    case: Case = make(shape, rows, rank, dtype, device, p)
    names = list(case.tensors)
    leaves = [t.requires_grad_(not case.in_place) for t in case.tensors.values()]
    options = {"dropout_p": p, "seed": 7} if p else {}
    with torch.no_grad():
        dy = torch.randn_like(case.naive(case.tensors))

    def of(call, *inputs, **options):
        *leaves, dy = inputs
        y = call(dict(zip(names, leaves, strict=True)), **options)
        return [y] if case.in_place else [y, *torch.autograd.grad(y, leaves, dy)]

    def ours():
        return of(case.ours, *leaves, dy, backend=backend, **options)

    outputs = ["y"] if case.in_place else ["y", *(f"d{name}" for name in names)]
    got = ours()
    truth = Truth(lambda *inputs: of(case.plain, *inputs, **options), [*leaves, dy])
    ratio = _over(ours, lambda: of(case.naive, *leaves, dy), dy.device)
    for i, output in enumerate(outputs):
        why = ""
        try:
            truth.check(outputs, [t if i == k else None for k, t in enumerate(got)])
        except AssertionError as error:
            why = str(error)
        yield Row(
            {
                "case": f"{op} {case.sizes} {str(dy.dtype).removeprefix('torch.')}",
                "backend": backend,
                "output": output,
                "error": _relative(got[i], truth.true[i]),
                "error of plain torch": _relative(truth.plain[i], truth.true[i]),
                "verdict": "FAILED" if why else "ok",
                "why": why,
                "time over naive": None if i else ratio,
            }
        )


# For each op its case, and the probabilities of dropout that it takes.
CASES: dict[str, tuple[Callable[..., Case], tuple[float, ...]]] = {
    "lora_linear": (_linear_case, (0.0, DROPOUT)),
    "lora_linear_group": (_group_case, (0.0, DROPOUT)),
    "lora_add": (_add_case, (0.0, DROPOUT)),
    "dora_linear": (_dora_case, (0.0,)),
    "multi_lora_linear": (_multi_case, (0.0, DROPOUT)),
    "multi_lora_add_": (_multi_add_case, (0.0,)),
    "lora_embedding": (_embedding_case, (0.0,)),
    "dept_embedding": (_dept_case, (0.0,)),
}


def _relative(t, true) -> float:
    true = true.double()
    return ((t.double() - true).norm() / true.norm().clamp(min=1e-300)).item()


def _over(ours: Callable[[], object], naive: Callable[[], object], device) -> float:
    """The median ratio of a few calls in turns: rough, `fused-lora bench` measures."""
    import torch

    def seconds(call):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in (ours, naive):
        seconds(call)
    return statistics.median(seconds(ours) / seconds(naive) for _ in range(ROUNDS))


def _planned(
    shapes, rows, rank, dtypes, backends, device
) -> Iterator[tuple[str, str, str, Iterator[Row]]]:
    """(op, backend, dtype, its rows, which are made as they are taken) of every case."""
    import torch

    for op, (make, probabilities) in CASES.items():
        for name, shape, short, p in itertools.product(backends, shapes, dtypes, probabilities):
            dtype = getattr(torch, DTYPES[short])
            yield op, name, short, _compared(op, name, make, shape, rows, rank, dtype, device, p)
    for name in backends:
        # The gates are vectors in fp32.
        yield THRESHOLD, name, "fp32", _threshold_case(rank, device, name)


def verify(arguments: argparse.Namespace) -> int:
    import torch

    from fused_lora.ops import dispatch

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    shapes = arguments.shapes or ([(4096, 4096), (1024, 4096)] if on_gpu else [(512, 384)])
    rows = arguments.rows or (512 if on_gpu else 64)
    dtypes = arguments.dtype or (["bf16", "fp16", "fp32"] if on_gpu else ["fp32"])
    backends = arguments.backend or dispatch.BACKENDS
    found: list[Row] = []
    skipped: dict[str, str] = {}
    if not arguments.json:
        print(f"{'case':48} backend output   error     torch's   verdict time / naive, roughly")

    plan = _planned(shapes, rows, arguments.rank, dtypes, backends, device)
    for op, name, short, lines in plan:
        probe = torch.empty(1, dtype=getattr(torch, DTYPES[short]), device=device)
        if (reason := refusals(op, probe)[name]) is not None:
            skipped[f"{op}, {name}, {short}"] = reason
            continue
        for row in lines:
            found.append(row)
            if not arguments.json:
                print(row.line(), flush=True)
    failed = [row for row in found if row["verdict"] != "ok"]
    if arguments.json:
        print(json.dumps({"rows": found, "skipped": skipped, "failed": len(failed)}, indent=1))
    else:
        for what, why in skipped.items():
            print(f"{what}: not checked, {why}")
        for row in failed:
            print(f"FAILED: {row['case']}, {row['backend']}: {row['why']}", file=sys.stderr)
        print(f"{len(found) - len(failed)} of {len(found)} outputs are within their bounds")
    if not found:
        print("fused-lora verify: nothing was checked", file=sys.stderr)
    return 1 if failed or not found else 0


def bench(arguments: list[str]) -> int:
    try:
        from fused_lora.bench import run
    except ModuleNotFoundError as error:
        print(f"fused-lora bench: {error} (pip install 'fused-lora[bench]')", file=sys.stderr)
        return 1
    return run.main(arguments)


def _track(shards: list[str]):
    """A bar on stderr, where rich is installed: stdout has the report."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return shards
    return track(shards, description="merging", console=Console(stderr=True))


def convert(arguments: argparse.Namespace) -> dict:
    from fused_lora.checkpoint.convert import convert_loralib, convert_peft

    source, target = Path(arguments.source), Path(arguments.target)
    if arguments.form == "loralib":
        layers = convert_loralib(source, target, arguments.r, arguments.lora_alpha)
    else:
        layers = convert_peft(source, target)
    return {"out": str(target), "layers": len(layers)}


def merge(arguments: argparse.Namespace) -> dict:
    from fused_lora.checkpoint.merging import merge_folder

    track = iter if arguments.json else _track
    return merge_folder(arguments.model, arguments.adapter, arguments.out, track)


def written(arguments: argparse.Namespace) -> int:
    """Run a command that writes a folder, and tell what it did, or why it did not."""
    command = {"convert": convert, "merge": merge}[arguments.command]
    start = time.perf_counter()
    try:
        found = command(arguments)
    except (OSError, KeyError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        # str(KeyError) is the repr of its message.
        words = error.args[0] if isinstance(error, KeyError) else error
        print(f"fused-lora {arguments.command}: {words}", file=sys.stderr)
        return 1
    found["seconds"] = round(time.perf_counter() - start, 3)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        print(f"{name:9} {', '.join(value) or '-' if isinstance(value, list) else value}")
    return 0


def _shapes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"wants NxK,NxK,... such as 4096x4096, got {text!r}")
    return [(int(m[1]), int(m[2])) for m in found if m]


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"wants some of {', '.join(known)}, separated by commas, got {unknown[0]!r}"
            )
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants an integer of at least 1, got {text!r}")
    return int(text)


def _integers(text: str) -> list[int]:
    return [_positive(part.strip()) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="fused-lora", description=__doc__)
    version = f"fused-lora {_version('fused-lora')}"
    whole.add_argument("--version", action="version", version=version)
    commands = whole.add_subparsers(dest="command")
    tell = commands.add_parser("doctor", help="versions, GPUs, and which backend runs, and why")
    tell.add_argument("--json", action="store_true")
    check = commands.add_parser(
        "verify", help="every op against fp64, beside plain torch's error, in under a minute"
    )
    check.add_argument("--device", choices=("cpu", "cuda"))
    check.add_argument("--dtype", type=_names(tuple(DTYPES)), help="bf16,fp16,fp32")
    check.add_argument("--shapes", type=_shapes, help="NxK,... of your model's layers")
    check.add_argument("--rank", type=_positive, default=16)
    check.add_argument("--rows", type=_positive, help="of x")
    check.add_argument("--backend", type=_names(("cuda", "triton", "torch")))
    check.add_argument("--json", action="store_true")
    change = commands.add_parser(
        "convert", help="an adapter as plain LoRA in PEFT's format: gates folded, loralib's state"
    )
    change.add_argument("source", help="a folder; of loralib, a safetensors file")
    change.add_argument("target", help="the folder to write")
    change.add_argument("--from", dest="form", choices=("peft", "loralib"), default="peft")
    change.add_argument("--r", type=_positive, help="of loralib, whose state has no scale")
    change.add_argument("--lora-alpha", type=float, help="of loralib, whose state has no scale")
    change.add_argument("--json", action="store_true")
    join = commands.add_parser(
        "merge", help="a model's folder with an adapter merged into its safetensors"
    )
    join.add_argument("model", help="folder of the model, as transformers saves it")
    join.add_argument("adapter", help="folder of the adapter, PEFT's or save_adapter's")
    join.add_argument("out", help="the folder to write")
    join.add_argument("--json", action="store_true")
    commands.add_parser("bench", help="measure (fused-lora bench --help)", add_help=False)
    tune = commands.add_parser(
        "tune", help="time the kernels for a model's sizes on this GPU; later calls take the best"
    )
    tune.add_argument("--shapes", type=_shapes, help="NxK,... (default: Llama 8B and 70B)")
    tune.add_argument("--rows", type=_integers, help="of x: 512,2048,8192")
    tune.add_argument("--rank", type=_positive, default=16)
    tune.add_argument("--dtype", type=_names(tuple(DTYPES)), default=["bf16"])
    forms = "forward", "dx", "masked dx"
    tune.add_argument("--form", type=_names(forms), default=forms, help=", ".join(forms))
    tune.add_argument("--out", help="the table (default: FUSED_LORA_TUNING, or the user's cache)")
    tune.add_argument("--json", action="store_true")
    return whole


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["bench"]:
        return bench(given[1:])
    whole = parser()
    arguments = whole.parse_args(given)
    if arguments.command is None:
        whole.print_help()
        return 0
    if arguments.command == "doctor":
        return doctor(arguments)
    if arguments.command == "tune":
        from fused_lora import tune

        return tune.main(arguments)
    if arguments.command == "convert":
        scale = arguments.r, arguments.lora_alpha
        if arguments.form == "loralib" and None in scale:
            whole.error("--from loralib needs --r and --lora-alpha: the scale is not in the file")
        if arguments.form == "peft" and scale != (None, None):
            whole.error("--r and --lora-alpha are for --from loralib; PEFT's config has its own")
    if arguments.command in ("convert", "merge"):
        return written(arguments)
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            whole.error("--device cuda: torch sees no CUDA device")
    return verify(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
