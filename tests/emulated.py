"""Builds csrc/ for the CPU: the bindings and kernels themselves, with emulator/emulator.h in place
of the GPU."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EMULATOR = Path(__file__).resolve().parent / "emulator"
BUILD = ROOT / "build" / "emulated"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


COMPILE = "g++", "-x", "c++", "-std=c++17", "-O1", "-w", "-DFUSED_LORA_EMULATE", f"-I{EMULATOR}"


def cuda_root() -> Path | None:
    """The toolkit around nvcc, as nvcc tells it: on PATH there may be a wrapper."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    found = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
    return Path(found[1]).resolve() if found else None


def why_not() -> str | None:
    """None where build() can build, else what is missing."""
    if shutil.which("g++") is None:
        return "the emulated kernels need g++"
    if cuda_root() is None:
        return "the emulated kernels need the headers of a CUDA toolkit"
    return None


def run(*arguments) -> None:
    found = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
    if found.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, arguments))}\n{found.stderr[-4000:]}")


def build(flags: tuple[str, ...] = (), other: Path | None = None, stem: str = "") -> Path:
    """The library, made once for each content of the sources; of the file csrc/<stem>.cu and what
    it includes from the folder `other`, where that is given."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    cuda = cuda_root()
    # As setup.py has it for the real library.
    target = re.search(r"^OLDEST_TORCH = \((\d+), (\d+)\)$", (ROOT / "setup.py").read_text(), re.M)
    version = "0x{:02x}{:02x}000000000000".format(*map(int, target.groups()))
    command = [
        *(*COMPILE, "-g", "-fPIC", *flags, "-isystem", f"{torch}/include"),
        *(f"-DTORCH_TARGET_VERSION={version}", "-DTORCH_STABLE_ONLY"),
        *("-isystem", f"{cuda}/include"),
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    objects = {}
    for source in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*_cpu.cpp")]):
        if other is not None and source.stem == stem:
            source = other / source.name
        key = hashlib.sha256(" ".join([str(torch), version, *flags]).encode())
        shared = [*sorted(source.parent.glob("common/*")), *sorted(EMULATOR.glob("*.h"))]
        header = source.with_suffix(".cuh")
        for path in (source, *([header] if header.exists() else []), *shared):
            key.update(path.read_bytes())
        objects[source] = BUILD / f"{source.stem}-{key.hexdigest()[:16]}.o"
    # Of an inline function that several files define, the linker takes the first.
    order = sorted(objects.values(), key=lambda made: not made.name.startswith(f"{stem}-"))
    names = " ".join(made.name for made in order)
    library = BUILD / f"emulated-{hashlib.sha256(names.encode()).hexdigest()[:16]}.so"

    with FileLock(BUILD / "lock"):
        missing = [(source, made) for source, made in objects.items() if not made.exists()]
        with ThreadPoolExecutor(2) as workers:
            for job in [
                workers.submit(run, *command, "-I", source.parent, "-c", source, "-o", made)
                for source, made in missing
            ]:
                job.result()
        if not library.exists():
            run(
                *("g++", "-shared", *flags, "-o", library, *order),
                *(f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
                *(f"-L{cuda}/lib64", f"-L{cuda}/lib", "-lcudart_static", "-ldl", "-lrt"),
                "-lpthread",
            )
    return library


def run_program(name: str, csrc: Path, folder: Path) -> subprocess.CompletedProcess:
    """emulator/<name>.cpp, which has a main() and needs no torch, over the kernels of `csrc`."""
    cuda, program = cuda_root(), folder / name
    run(
        *(*COMPILE, "-isystem", f"{cuda}/include", "-I", csrc, EMULATOR / f"{name}.cpp"),
        *("-o", program, f"-L{cuda}/lib64", f"-L{cuda}/lib", "-lcudart_static"),
        *("-ldl", "-lrt", "-lpthread"),
    )
    return subprocess.run([program], capture_output=True, text=True, timeout=120)
