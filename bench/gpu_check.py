"""The evidence from a CUDA GPU, the most telling first: is it right, is it a go, is it fast.

    bench/gpu_check.sh [--minutes N] [--dry-run] [--archive FILE] OUT [stage...]

The stages run in the order of the plan, each in processes of its own, for N minutes (default: no
limit). After every stage OUT/<GPU>/ has its log, its JSON and state.json, and FILE is a tar.gz of
that folder. A further call goes on where the last one ended: what passed is not run again unless it
is named. A stage that takes much longer than predicted is cut; one that no longer fits is left for
the next call. The settings of the GPU are read and never changed.

Exit status: 0; 1 where a stage failed or was cut; 2 where nothing can begin.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CACHE = "build/triton"  # compiled kernels, in a folder that can be carried to another machine
REPORT_SECONDS = 20  # kept for the summary
TOOLS = "memcheck", "racecheck", "initcheck", "synccheck"
HOPPER = (9, 0)
PYTHON = str(ROOT / ".venv/bin/python")

# What a machine must say of itself before a stage is begun.
QUESTION = """
import importlib.util, json, torch
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
print(json.dumps({
    "name": torch.cuda.get_device_name(),
    "capability": torch.cuda.get_device_capability(),
    "xdist": importlib.util.find_spec("xdist") is not None,
}))
"""


class Command(NamedTuple):
    argv: list[str]
    env: dict[str, str]


class Stage(NamedTuple):
    """seconds is a prediction for an H200 and 16 cores; `hopper` needs compute capability 9.0."""

    name: str
    seconds: int
    tells: str
    commands: list[Command]
    hopper: bool = False

    @property
    def limit(self) -> int:
        return self.seconds * 3 // 2


class Machine(NamedTuple):
    name: str = "any GPU"
    capability: tuple[int, int] = HOPPER
    xdist: bool = False

    @property
    def arch(self) -> str:
        number = "".join(map(str, self.capability))
        return f"sm_{number}a" if self.capability == HOPPER else f"sm_{number}"

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class Commands:
    """Command lines of the stages, whose results go to `out`."""

    def __init__(self, machine: Machine, out: Path) -> None:
        self.machine, self.out = machine, out
        self.gluon = {"FUSED_LORA_TUNING": "bench/gluon.json"}
        self.hopper = {**self.gluon, "FUSED_LORA_CUDA_GEMM": "sm90"}

    def tests(self, *files: str, only: str = "", **env: str) -> Command:
        workers = ["-n", "8", "--dist", "loadfile"] if self.machine.xdist else []
        paths = [f"tests/test_{name}.py" for name in files]
        chosen = ["-k", only] if only else []
        pytest = [PYTHON, "-m", "pytest", "-q", "-ra", "--tb=short", *workers, *paths, *chosen]
        return Command(pytest, {"FUSED_LORA_TEST_DEVICE": "cuda", **env})

    def bench(self, module: str, *arguments: str, to: str = "", **env: str) -> Command:
        out = ("--out", str(self.out / to))
        return Command([PYTHON, "-m", f"fused_lora.bench.{module}", *arguments, *out], env)

    def run(self, op: str, stage: str, seconds: int, to: str = "", **env: str) -> Command:
        arguments = "--op", op, "--stage", stage, "--seconds", str(seconds)
        return self.bench("run", *arguments, to=to, **env)

    def cli(self, *arguments: str) -> Command:
        return Command([PYTHON, "-m", "fused_lora.cli", *arguments], {})

    def make(self, target: str, **env: str) -> Command:
        return Command(["make", target, f"PYTHON={sys.executable}"], env)

    def sanitized(self, command: Command) -> list[Command]:
        """A run under each tool, without the cache that would hide accesses past a tensor's end."""
        options = ["--error-exitcode", "9", "--print-limit", "20"]
        env = {**command.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            Command(["compute-sanitizer", "--tool", tool, *options, *command.argv], env)
            for tool in TOOLS
        ]


def plan(machine: Machine, out: Path) -> list[Stage]:
    """Every stage, in the order of what it tells."""
    do = Commands(machine, out)
    tenants = sorted(p.stem.removeprefix("test_") for p in ROOT.glob("tests/test_tenants*.py"))
    small = "--shapes", "200x136", "--rows", "77", "--rank", "12", "--dtype", "bf16"
    return [
        Stage(
            "setup",
            60,
            "the extension is built and loads; what the machine is",
            [
                do.make("extension", FUSED_LORA_CUDA_ARCHS=machine.arch),
                Command(["nvidia-smi"], {}),
                Command(["nvcc", "--version"], {}),
                do.cli("doctor"),
                do.cli("doctor", "--json"),
            ],
        ),
        Stage(
            "right-gemm-cuda",
            45,
            "the CUDA C++ GEMM for Hopper against fp64",
            [do.bench("hopper_cuda", "--only", "numerics")],
            hopper=True,
        ),
        Stage(
            "right-gemm-gluon",
            60,
            "the Gluon GEMM for Hopper against fp64",
            [do.bench("hopper", "--only", "numerics", **do.gluon)],
            hopper=True,
        ),
        Stage(
            "right-decode",
            40,
            "decoding on odd sizes, repeated, captured",
            [
                do.tests("cuda_kernels", "lora_linear", "multi_lora_linear", only="decod"),
                do.tests("gpu", only="decoding"),
            ],
        ),
        Stage("right-shrink", 40, "shrink on odd sizes", [do.tests("shrink")]),
        Stage("right-row-reduce", 40, "row_reduce on odd sizes", [do.tests("row_reduce")]),
        Stage(
            "right-segment-gemm",
            50,
            "segment_gemm on odd sizes",
            [do.tests("segment_gemm", "segment_gemm_sm90", "hopper")],
        ),
        Stage(
            "right-many",
            75,
            "many adapters: values, gradients, tenants apart",
            [do.tests("multi_lora_linear", "bank", *tenants)],
        ),
        Stage(
            "right-ops",
            75,
            "lora_linear, group, add: values and gradients",
            [do.tests("lora_linear", "lora_linear_group", "lora_add")],
        ),
        Stage(
            "right-ops-hopper",
            60,
            "the same on the GEMMs for Hopper",
            [do.tests("lora_linear", "lora_linear_group", **do.hopper)],
            hopper=True,
        ),
        Stage(
            "bare-gemm",
            30,
            "go or no-go: the bare GEMMs beside cuBLAS on four shapes",
            [do.bench("bare")],
            hopper=True,
        ),
        Stage(
            "layers",
            90,
            "forward, backward, both of four layers, M = 2048 and 8192",
            [do.run("lora_linear", "layers", 75)],
        ),
        Stage(
            "layers-hopper",
            90,
            "the same on the GEMMs for Hopper",
            [do.run("lora_linear", "layers", 75, to="hopper", **do.hopper)],
            hopper=True,
        ),
        Stage(
            "decode-times",
            60,
            "decoding at M = 1, 16, 64; 64 rows of 64 adapters",
            [do.run("multi_lora_linear", "quick", 10), do.run("lora_linear", "decode-layers", 40)],
        ),
        Stage(
            "sanitize-hopper",
            75,
            "compute-sanitizer over the smallest cases of the GEMM for Hopper",
            do.sanitized(do.bench("hopper_cuda", "--small", to="small")),
            hopper=True,
        ),
        Stage(
            "sanitize",
            120,
            "compute-sanitizer over the smallest cases of every op",
            do.sanitized(do.cli("verify", *small, "--backend", "triton,cuda")),
        ),
        Stage(
            "repeat",
            150,
            "streams, graphs, repetition bit for bit, offsets past 2^31",
            [do.tests("gpu")],
        ),
        Stage("suite", 360, "the correctness suite", [do.make("test-gpu")]),
        Stage(
            "times-hopper",
            150,
            "every tile of the GEMMs for Hopper, with an adapter",
            [
                do.bench("hopper_cuda", "--only", "times"),
                do.bench("hopper", "--only", "times", **do.gluon),
            ],
            hopper=True,
        ),
        Stage(
            "tune",
            300,
            "the fastest kernel for each layer of Llama 8B and 70B",
            [do.cli("tune", "--out", str(out / "tuning.json"), "--rows", "2048,8192")],
        ),
        Stage("training", 400, "training shapes", [do.run("lora_linear", "training", 380)]),
        Stage(
            "multi",
            400,
            "many adapters, decoding and training",
            [do.run("multi_lora_linear", stage, 120) for stage in ("decode", "training", "ranks")],
        ),
        Stage(
            "group",
            300,
            "q, k, v and gate, up together; lora_add",
            [
                do.run(op, stage, 70)
                for op in ("lora_linear_group", "lora_add")
                for stage in ("training", "decode")
            ],
        ),
        Stage(
            "serving",
            240,
            "multi_lora_add_, and every decoding shape",
            [do.run("multi_lora_add_", "decode", 100), do.run("lora_linear", "decode", 130)],
        ),
        Stage("steps", 240, "whole training steps of a Llama", [do.bench("step")]),
        Stage("dram", 120, "DRAM bytes by the GPU's counters", [do.bench("dram")]),
        Stage("compiled", 400, "beside torch.compile", [do.run("lora_linear", "compiled", 380)]),
        Stage("grid", 400, "every shape, rank and dtype", [do.run("lora_linear", "grid", 380)]),
        Stage("methods", 400, "SoRA, AdaLoRA, DePT", [do.bench("methods"), do.bench("dept")]),
        Stage(
            "demo", 240, "the demo", [Command([PYTHON, "examples/demo.py", "--out", str(out)], {})]
        ),
    ]


class Check:
    """One call of the script: what it may still spend, and what is known of every stage."""

    def __init__(self, out: Path, machine: Machine, seconds: float, archive: Path | None) -> None:
        self.out, self.machine, self.archive = out, machine, archive
        self.end = time.monotonic() + seconds
        self.path = out / "state.json"
        self.state: dict[str, dict] = {}
        if self.path.exists():
            self.state = json.loads(self.path.read_text())

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, stage: Stage) -> None:
        """Run the commands of a stage in turn; each takes what the others leave of its limit."""
        before = self.state.get(stage.name, {})
        limit = 2 * before["limit"] if before.get("status") == "cut" else stage.limit
        begin = time.monotonic()
        status, why = "passed", ""
        with (self.out / f"{stage.name}.log").open("w") as log:
            for command in stage.commands:
                left = min(limit - (time.monotonic() - begin), self.left() - REPORT_SECONDS)
                code = execute(command, log, left)
                if code is None:
                    status, why = "cut", f"not done after {time.monotonic() - begin:.0f} s"
                    break
                if code != 0:  # the other commands of the stage still tell something
                    status, why = "failed", f"exit {code}: {' '.join(command.argv)}"
        self.state[stage.name] = {
            "status": status,
            "why": why,
            "seconds": round(time.monotonic() - begin, 1),
            "predicted": stage.seconds,
            "limit": limit,
            "commit": commit(),
        }
        self.keep()
        took = self.state[stage.name]["seconds"]
        print(f"{status} after {took} s of {stage.seconds} predicted  {why}".rstrip(), flush=True)
        if status != "passed":
            print(last_lines(self.out / f"{stage.name}.log"), flush=True)

    def keep(self) -> None:
        self.path.write_text(json.dumps(self.state, indent=1) + "\n")
        if self.archive is not None:
            part = self.archive.with_name(self.archive.name + ".part")
            with tarfile.open(part, "w:gz") as tar:
                tar.add(self.out, arcname=self.out.name)
            os.replace(part, self.archive)

    def summary(self, stages: list[Stage]) -> str:
        lines = [f"{self.machine.name}: {self.out}"]
        for stage in stages:
            known = self.state.get(stage.name)
            if known is None:
                lines.append(f"{'-':8} {stage.name:20} not run; {stage.seconds} s predicted")
            else:
                took = f"{known['seconds']:6.1f} s, {known['predicted']} predicted"
                line = f"{known['status']:8} {stage.name:20} {took}, {known['commit']}"
                lines.append(f"{line}  {known['why']}".rstrip())
        return "\n".join(lines)


def execute(command: Command, log, seconds: float) -> int | None:
    """The exit status, or None for a command that was cut after `seconds`."""
    log.write(f"== {' '.join(command.argv)}\n")
    log.flush()
    if seconds <= 0:
        return None
    env = {"TRITON_CACHE_DIR": str(ROOT / CACHE), **os.environ, **command.env}
    try:
        process = subprocess.Popen(
            command.argv, stdout=log, stderr=log, cwd=ROOT, env=env, start_new_session=True
        )
    except FileNotFoundError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also what it started and did not wait for: it would hold the GPU.
        for which in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, which)
            except ProcessLookupError:
                break
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue
        process.wait()


def last_lines(path: Path, count: int = 12) -> str:
    lines = path.read_text(errors="replace").splitlines()[-count:]
    return "\n".join(f"    {line}" for line in lines)


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    if shutil.which("git") is None:
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def ask(python: str) -> Machine:
    """What GPU torch sees. Raises RuntimeError where there is none."""
    found = subprocess.run([python, "-c", QUESTION], capture_output=True, text=True, cwd=ROOT)
    if found.returncode != 0:
        raise RuntimeError((found.stderr.strip() or f"{python} says nothing").splitlines()[-1])
    known = json.loads(found.stdout.splitlines()[-1])
    return Machine(known["name"], tuple(known["capability"]), known["xdist"])


def chosen(stages: list[Stage], names: list[str], machine: Machine) -> list[Stage]:
    """The named stages, or all, that this GPU can run."""
    fit = [stage for stage in stages if not stage.hopper or machine.capability == HOPPER]
    return [stage for stage in fit if not names or stage.name in names]


def timetable(stages: list[Stage], seconds: float) -> Iterator[str]:
    """The plan, with the time at which each stage is predicted to begin."""
    yield f"{'begins':>7} {'predicted':>9} {'cut at':>7}  stage"
    begins = 0
    for stage in stages:
        fits = begins + stage.seconds + REPORT_SECONDS <= seconds
        late = "" if fits else "   (in a further call)"
        times = f"{begins:5} s {stage.seconds:7} s {stage.limit:5} s"
        yield f"{times}  {stage.name:20} {stage.tells}{late}"
        begins += stage.seconds if fits else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in plan(Machine(), Path("OUT"))]
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.sh",
        description=__doc__.partition("\n")[0],
        epilog=f"stages: {' '.join(names)}",
    )
    parser.add_argument("--minutes", type=float, help="how long it may take (default: no limit)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--archive", type=Path, help="a tar.gz of the results, after every stage")
    parser.add_argument("out", type=Path, metavar="OUT", help="results are in OUT/<GPU>")
    parser.add_argument("stages", nargs="*", metavar="stage", help="of these alone, again")
    found = parser.parse_args(arguments)
    if unknown := [name for name in found.stages if name not in names]:
        parser.error(f"no stage {unknown[0]}; stages: {' '.join(names)}")
    if found.minutes is not None and not found.minutes > 0:
        parser.error(f"--minutes must be positive, got {found.minutes:g}")
    return found


def main(arguments: list[str] | None = None) -> int:
    found = parse(arguments)
    seconds = float("inf") if found.minutes is None else 60 * found.minutes
    if found.dry_run:
        stages = chosen(plan(Machine(), found.out), found.stages, Machine())
        print(*timetable(stages, seconds), sep="\n")
        return 0
    try:
        # The project's own environment may not be there yet.
        machine = ask(PYTHON if Path(PYTHON).exists() else sys.executable)
    except RuntimeError as error:
        print(f"bench/gpu_check.sh: {error}", file=sys.stderr)
        return 2
    out = (found.out / machine.folder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, machine, seconds, found.archive and found.archive.resolve())
    stages = chosen(plan(machine, out), found.stages, machine)
    for stage in stages:
        passed = check.state.get(stage.name, {}).get("status") == "passed"
        # The extension is built and loaded on every machine anew.
        if passed and not found.stages and stage.name != "setup":
            continue
        if check.left() - REPORT_SECONDS < stage.seconds / 2:
            continue  # a shorter one may still fit
        print(f"== {stage.name}: {stage.tells}", flush=True)
        check.run(stage)
    return finish(check, stages)


def finish(check: Check, stages: list[Stage]) -> int:
    """Print and keep the state of every stage, the verdict on the GEMMs, and the targets."""
    text = [check.summary(stages)]
    if (check.out / "bare.txt").exists():
        text.append((check.out / "bare.txt").read_text())
    for folder in (check.out, check.out / "hopper"):
        if any(folder.glob("*-*.json")):
            command = [PYTHON, "-m", "fused_lora.bench.report", "targets", str(folder)]
            made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            text.append(f"{folder.name}\n{made.stdout or made.stderr}")
    print("\n\n".join(text))
    (check.out / "summary.txt").write_text("\n\n".join(text) + "\n")
    check.keep()
    statuses = {check.state.get(stage.name, {}).get("status") for stage in stages}
    return 1 if statuses & {"failed", "cut"} else 0


if __name__ == "__main__":
    raise SystemExit(main())
