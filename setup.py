"""Builds fused_lora; the metadata is in pyproject.toml.

The package is pure Python plus one optional CUDA extension, fused_lora._C:

    FUSED_LORA_BUILD_CUDA   auto (default): build it where torch, nvcc and ninja are found, and else
                            say what is missing; 1: build it or fail; 0: leave it out
    FUSED_LORA_CUDA_ARCHS   the targets, as nvcc names them; default "sm_80 sm_90a compute_90"

torch is looked for, never imported: its headers and libraries are all that the build needs.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(
    p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*") if p.suffix in (".cpp", ".cu")
)

# Built against these oldest versions' stable ABIs, one file runs on every later torch and Python.
OLDEST_TORCH = (2, 11)
OLDEST_PYTHON = (3, 10)
OLDEST_CUDA = (12, 0)
ARCHS = "sm_80 sm_90a compute_90"


class CannotBuild(Exception):
    """Why there is no extension, with what would change that."""


class Toolchain(NamedTuple):
    torch: Path
    nvcc: str
    cuda: Path
    ninja: list[str]
    targets: list[str]

    @classmethod
    def find(cls) -> "Toolchain":
        if not sys.platform.startswith("linux"):
            raise CannotBuild(f"the CUDA extension is built on Linux only, this is {sys.platform}")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise CannotBuild(
                "Python.h is missing; install Python's headers (apt install python3-dev)"
            )
        archs = re.split(r"[\s,;]+", os.environ.get("FUSED_LORA_CUDA_ARCHS", ARCHS).strip())
        targets = [f"-gencode=arch=compute_{a.split('_')[-1]},code={a}" for a in archs]
        modules = find_modules("torch", "ninja")
        return cls(
            find_torch(modules["torch"]), *find_nvcc(targets), find_ninja(modules["ninja"]), targets
        )

    def compile_command(self) -> list[str]:
        return [
            *(self.nvcc, "-std=c++17", "-O3", "-lineinfo", "-Xptxas=-warn-spills"),
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
            "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH),
            "-DTORCH_STABLE_ONLY",
            "-DPy_LIMITED_API=0x{:02x}{:02x}0000".format(*OLDEST_PYTHON),
            *("-I", f"{ROOT}/csrc", "-isystem", f"{self.torch}/include"),
            *("-isystem", sysconfig.get_path("include")),
            *self.targets,
        ]

    def link_command(self) -> list[str]:
        # Not against libtorch_cuda: the library loads beside a CPU torch, and where there is a CUDA
        # torch, libtorch brings it. The toolkit that pip installs keeps cudart in lib, where nvcc
        # does not look by itself.
        return [
            *(self.nvcc, "-shared", "--no-device-link", "--cudart=static"),
            *(f"-L{self.torch}/lib", f"-L{self.cuda}/lib"),
            *("-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
        ]


def find_modules(*names: str) -> dict[str, str | None]:
    """The file of each module, here or, under pip's build isolation, in the interpreter around it.

    The isolation is a folder put on sys.path by environment variables, which -I ignores.
    """
    probe = (
        "import importlib.util as u, json, sys;"
        "print(json.dumps({m: s.origin if (s := u.find_spec(m)) else None for m in sys.argv[1:]}))"
    )
    around = subprocess.run(
        [sys.executable, "-I", "-c", probe, *names], capture_output=True, check=True
    )
    found = json.loads(around.stdout)
    return {m: s.origin if (s := importlib.util.find_spec(m)) else found[m] for m in names}


def find_torch(origin: str | None) -> Path:
    if origin is None:
        raise CannotBuild(
            "torch is not installed in this environment; run: pip install 'torch>=2.11'"
        )
    folder = Path(origin).parent
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    if version is None or tuple(map(int, version.groups())) < OLDEST_TORCH:
        raise CannotBuild(f"{folder} is older than torch 2.11; run: pip install -U 'torch>=2.11'")
    return folder


def find_nvcc(targets: list[str]) -> tuple[str, Path]:
    """nvcc and the root of its toolkit, which nvcc itself tells: on PATH there may be a wrapper."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(
        "nvcc", path=f"{home}/bin" if home else f"{os.environ['PATH']}:/usr/local/cuda/bin"
    )
    if nvcc is None:
        place = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
        raise CannotBuild(
            f"no nvcc {place}; install the CUDA toolkit and export CUDA_HOME=<its folder>"
        )
    dry = subprocess.run(
        [nvcc, "--dryrun", *targets, "-x", "cu", os.devnull], capture_output=True, text=True
    )
    root = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
    version = re.search(r"__CUDACC_VER_MAJOR__=(\d+) .*?__CUDACC_VER_MINOR__=(\d+)", dry.stderr)
    if dry.returncode != 0 or root is None or version is None:
        raise CannotBuild(f"{nvcc} refused {' '.join(targets)}: {dry.stderr.strip()[-300:]}")
    if tuple(map(int, version.groups())) < OLDEST_CUDA:
        raise CannotBuild(
            f"{nvcc} is of CUDA {'.'.join(version.groups())}; install CUDA 12.0 or later"
        )
    return nvcc, Path(root[1]).resolve()


def find_ninja(origin: str | None) -> list[str]:
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if ninja is None and origin is None:
        raise CannotBuild("ninja is not installed in this environment; run: pip install ninja")
    return [ninja] if ninja else [sys.executable, "-I", "-m", "ninja"]


def plan() -> Toolchain | None:
    """The tools to build the extension with, or None for a pure-Python package."""
    wish = os.environ.get("FUSED_LORA_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FUSED_LORA_BUILD_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    # Nothing but a build needs the tools, and nothing but a build may fail for want of them.
    if not {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"} & set(sys.argv):
        return None
    try:
        tools = Toolchain.find()
    except CannotBuild as reason:
        if wish == "1":
            sys.exit(f"fused-lora: FUSED_LORA_BUILD_CUDA=1, but {reason}")
        print(f"fused-lora: building without the CUDA extension: {reason}", file=sys.stderr)
        return None
    print(
        f"fused-lora: building the CUDA extension with {tools.nvcc} for {tools.torch}",
        file=sys.stderr,
    )
    return tools


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(tools: Toolchain, library: str) -> str:
    compile_command = shlex.join(tools.compile_command()).replace("$", "$$")
    link_command = shlex.join(tools.link_command()).replace("$", "$$")
    lines = [
        "rule compile",
        f"  command = {compile_command} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link_command} -o $out $in",
        *(f"build {source}.o: compile {ninja_path(ROOT / source)}" for source in SOURCES),
        f"build {library}: link {' '.join(f'{source}.o' for source in SOURCES)}",
    ]
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Brings build/ninja up to date, then copies the library to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        folder, target = ROOT / "build" / "ninja", Path(self.get_ext_fullpath(ext.name))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(TOOLS, target.name))
        if subprocess.run([*TOOLS.ninja, "-C", str(folder)]).returncode != 0:
            sys.exit(
                "fused-lora: the CUDA extension did not compile (see above); "
                "FUSED_LORA_BUILD_CUDA=0 installs without it"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


TOOLS = plan()
KERNELS, BENCH = "fused_lora.triton_kernels", "fused_lora.bench"

setup(
    # Subpackages here: as top-level names they belong to other projects.
    package_dir={"": "python", KERNELS: "triton_kernels", BENCH: "bench"},
    packages=[
        *find_packages("python"),
        KERNELS,
        *(f"{KERNELS}.{p}" for p in find_packages("triton_kernels")),
        BENCH,
    ],
    package_data={KERNELS: ["tuning/*.json"]},
    ext_modules=[Extension("fused_lora._C", SOURCES, py_limited_api=True)] if TOOLS else [],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)}} if TOOLS else {},
)
