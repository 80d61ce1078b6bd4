import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CAN_BUILD = shutil.which("nvcc") and Path(sysconfig.get_path("include"), "Python.h").exists()
SHIPPED = (
    "bench",
    "csrc",
    "python",
    "triton_kernels",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy without anything built: tests that build do not meet each other in build/."""
    built = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in SHIPPED:
        source, target = ROOT / name, tmp_path / "checkout" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=built)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return tmp_path / "checkout"


def run(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_wheel(checkout: Path, **env: str) -> subprocess.CompletedProcess:
    offline = ("--no-build-isolation", "--no-deps", "--no-index")
    return run("-m", "pip", "wheel", *offline, "-w", "wheels", ".", cwd=checkout, **env)


def test_setup_needs_no_torch(checkout):
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; "
    done = run("-c", code + "runpy.run_path('setup.py')", cwd=checkout)
    assert done.returncode == 0, done.stdout
    assert done.stdout.strip() == "0.1.0"


def test_wheel_without_the_extension(checkout):
    tuning = checkout / "triton_kernels/tuning/probe.json"
    tuning.parent.mkdir(exist_ok=True)
    tuning.write_text("{}")
    # A library left by an editable install is no part of a pure-Python wheel.
    (checkout / "python/fused_lora/_C.abi3.so").write_bytes(b"")
    done = build_wheel(checkout, FUSED_LORA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout
    (wheel,) = (checkout / "wheels").iterdir()
    assert wheel.name == "fused_lora-0.1.0-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"fused_lora", "fused_lora-0.1.0.dist-info"}
    assert not [n for n in names if n.endswith(".so")]
    for source in ("python/fused_lora", "triton_kernels", "bench"):
        for file in (checkout / source).rglob("*.py"):
            inside = file.relative_to(checkout / source).as_posix()
            folder = "fused_lora" if source.startswith("python") else f"fused_lora/{source}"
            assert f"{folder}/{inside}" in names
    assert "fused_lora/triton_kernels/tuning/probe.json" in names


def test_sdist_has_all_that_a_build_needs(checkout):
    done = run("setup.py", "-q", "sdist", cwd=checkout, FUSED_LORA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    for source in ("bench", "csrc", "python", "triton_kernels"):
        for file in (checkout / source).rglob("*.*"):
            if file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                assert file.relative_to(checkout).as_posix() in names


def test_build_that_was_asked_for_fails_with_the_cause(checkout, tmp_path):
    done = build_wheel(checkout, FUSED_LORA_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert (
        f"fused-lora: FUSED_LORA_BUILD_CUDA=1, but no nvcc in CUDA_HOME={tmp_path}; "
        "install the CUDA toolkit and export CUDA_HOME=<its folder>"
    ) in done.stdout
    done = build_wheel(checkout, FUSED_LORA_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "FUSED_LORA_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in done.stdout


def test_build_that_was_not_asked_for_says_why_it_is_left_out(checkout, tmp_path):
    done = run(
        "setup.py", "build_ext", cwd=checkout, FUSED_LORA_BUILD_CUDA="auto", CUDA_HOME=str(tmp_path)
    )
    assert done.returncode == 0, done.stdout
    assert f"building without the CUDA extension: no nvcc in CUDA_HOME={tmp_path}" in done.stdout


@pytest.mark.skipif(not CAN_BUILD, reason="needs nvcc and Python.h")
def test_ninja_rebuilds_what_a_change_touches(checkout):
    for source in (checkout / "csrc").rglob("*.c*"):
        if source.name != "module.cpp":
            source.unlink()
    header = checkout / "csrc/probe.cuh"
    header.write_text("#pragma once\n")
    (checkout / "csrc/probe.cu").write_text('#include "probe.cuh"\n__global__ void probe() {}\n')

    def built() -> list[str]:
        done = run("setup.py", "build_ext", "--inplace", cwd=checkout, FUSED_LORA_BUILD_CUDA="1",
                   FUSED_LORA_CUDA_ARCHS="sm_80")  # fmt: skip
        assert done.returncode == 0, done.stdout
        return re.findall(r"^\[\d+/\d+\] .* -o (?:\S*/)?([\w.]+)", done.stdout, re.M)

    assert sorted(built()) == ["_C.abi3.so", "module.cpp.o", "probe.cu.o"]
    assert (checkout / "python/fused_lora/_C.abi3.so").exists()
    assert built() == []
    header.write_text("#pragma once\n// changed\n")
    assert built() == ["probe.cu.o", "_C.abi3.so"]


def test_import_is_light_and_needs_neither_triton_nor_the_extension():
    code = """
import sys
sys.modules["triton"] = sys.modules["fused_lora._C"] = None
import torch, fused_lora
from fused_lora.ops.soft_threshold import soft_threshold_
loaded = [m for m in sys.modules if m.startswith(("triton.", "fused_lora.triton_kernels"))]
assert not loaded, loaded
assert soft_threshold_(torch.ones(3), 0.25).tolist() == [0.75] * 3
"""
    done = run("-c", code, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout
    code = """
import sys, fused_lora
lazy = ("triton", "torch._dynamo", "peft", "fused_lora._C", "fused_lora.triton_kernels")
loaded = [m for m in sys.modules if m.startswith(lazy)]
assert not loaded, loaded
"""
    done = run("-c", code, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout
