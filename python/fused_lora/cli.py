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

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OPS = "lora_linear", "multi_lora_linear", "soft_threshold_"
OPTIONAL = "peft", "transformers", "safetensors", "matplotlib", "rich"
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
    module = importlib.import_module(f"fused_lora.ops.{op.rstrip('_')}")
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
        "ops": {op: refusals(op, probe) for op in OPS},
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


def _linear_case(shape, rows, rank, dtype, device, backend, p) -> Iterator[Row]:
    """lora_linear and its gradients."""
    import torch
    import torch.nn.functional as F

    import fused_lora as fl

    N, K = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size, std=1.0):
        return (torch.randn(*size, generator=generator) * std).to(device, dtype)

    x, a, b = draw(rows, K), draw(rank, K, std=K**-0.5), draw(N, rank)
    leaves = [t.requires_grad_() for t in (x, a, b, draw(N), draw(rank).float())]
    weight, dy = draw(N, K, std=K**-0.5), draw(rows, N)
    options = {"dropout_p": p, "seed": 7} if p else {}

    def of(op, weight, dy, *leaves, **more):
        x, a, b, bias, gate = leaves
        y = op(x, weight, a, b, bias, scale=SCALE, gate=gate, **options, **more)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    def naive():
        x, a, b, bias, gate = leaves
        kept = F.dropout(x, p) if p else x
        h = F.linear(kept, a) * gate.to(x.dtype)
        y = F.linear(x, weight, bias) + SCALE * F.linear(h, b)
        torch.autograd.grad(y, leaves, dy)

    name = f"lora_linear {N}x{K} r={rank} p={p:g}"
    outputs = "y", "dx", "da", "db", "dbias", "dgate"
    ops = fl.lora_linear, fl.reference.lora_linear
    yield from _compared(name, outputs, backend, of, ops, (weight, dy, *leaves), naive)


def _threshold_case(shape, rows, rank, dtype, device, backend, p) -> Iterator[Row]:
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


def _multi_case(shape, rows, rank, dtype, device, backend, p) -> Iterator[Row]:
    """multi_lora_linear: adapters of several ranks, rows without one, and every gradient."""
    import torch

    import fused_lora as fl
    from fused_lora.reference import AdapterSlots

    N, K = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size, std=1.0):
        return (torch.randn(*size, generator=generator) * std).to(device, dtype)

    ranks = torch.tensor([rank, max(1, rank // 2), rank, 1], dtype=torch.int32, device=device)
    scale = torch.full((4,), SCALE, device=device)
    ids = (torch.arange(rows, device=device) * 7) % 5 - 1
    x, a, bt = draw(rows, K), draw(4, rank, K, std=K**-0.5), draw(4, rank, N)
    leaves = [t.requires_grad_() for t in (x, a, bt, draw(N), draw(4, rank).float())]
    weight, dy = draw(N, K, std=K**-0.5), draw(rows, N)
    options = {"dropout_p": p, "seed": 7} if p else {}

    def of(op, weight, dy, *leaves, **more):
        x, a, bt, bias, gate = leaves
        bank = AdapterSlots(a, bt, ranks, scale.to(gate.dtype), gate)
        y = op(x, weight, bank, ids, bias, **options, **more)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    def naive():
        y = torch.nn.functional.linear(x, weight, leaves[3])
        for j in range(4):
            own, r = torch.where(ids == j)[0], int(ranks[j])
            h = (x[own] @ leaves[1][j, :r].t()) * leaves[4][j, :r].to(dtype)
            y = y.index_add(0, own, SCALE * h @ leaves[2][j, :r])
        torch.autograd.grad(y, leaves, dy)

    name = f"multi_lora_linear {N}x{K} r<={rank} p={p:g}"
    outputs = "y", "dx", "da", "dbt", "dbias", "dgate"
    ops = fl.multi_lora_linear, fl.reference.multi_lora_linear
    yield from _compared(name, outputs, backend, of, ops, (weight, dy, *leaves), naive)


def _compared(name, outputs, backend, of, ops, inputs, naive) -> Iterator[Row]:
    """A row for each of of(op, *inputs), held to the reference in fp64."""

    from fused_lora.testing import Truth

    op, reference = ops
    inputs = [t.detach().requires_grad_(i > 1) for i, t in enumerate(inputs)]

    def ours():
        return of(op, *inputs, backend=backend)

    def plain(*inputs):
        return of(reference, *inputs)

    got, truth = ours(), Truth(plain, inputs)
    ratio = _over(ours, naive, inputs[0].device)
    for i, output in enumerate(outputs):
        why = ""
        try:
            alone = [t if i == k else None for k, t in enumerate(got)]
            truth.check(outputs, alone)
        except AssertionError as error:
            why = str(error)
        yield Row(
            {
                "case": f"{name} {str(inputs[0].dtype).removeprefix('torch.')}",
                "backend": backend,
                "output": output,
                "error": _relative(got[i], truth.true[i]),
                "error of plain torch": _relative(truth.plain[i], truth.true[i]),
                "verdict": "FAILED" if why else "ok",
                "why": why,
                "time over naive": None if i else ratio,
            }
        )


# For each op its cases, and the probabilities of dropout that they take.
CASES: dict[str, tuple[Callable[..., Iterator[Row]], tuple[float, ...]]] = {
    "lora_linear": (_linear_case, (0.0, DROPOUT)),
    "multi_lora_linear": (_multi_case, (0.0, DROPOUT)),
    "soft_threshold_": (_threshold_case, (0.0,)),
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
    for op, (cases, probabilities) in CASES.items():
        # The gates are vectors in fp32: soft_threshold_ has one case.
        of_op = (shapes, dtypes) if op != "soft_threshold_" else (shapes[:1], ["fp32"])
        for name, shape, short, p in itertools.product(backends, *of_op, probabilities):
            dtype = getattr(torch, DTYPES[short])
            reason = refusals(op, torch.empty(1, dtype=dtype, device=device))[name]
            if reason is not None:
                skipped[f"{op}, {name}, {short}"] = reason
                continue
            for row in cases(shape, rows, arguments.rank, dtype, device, name, p):
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
