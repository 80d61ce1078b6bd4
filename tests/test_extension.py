"""The compiled extension, without a GPU: what it registers, computes and contains."""

import importlib
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from cases import fuzz
from hypothesis import given
from hypothesis import strategies as st
from test_soft_threshold import DTYPES, SIZES, closed_form, edges, same

from fused_lora import _extension

CAN_BUILD = shutil.which("nvcc") and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.fixture(scope="module")
def library() -> Path:
    reason = _extension.why_missing()
    # Where it can be built, a missing extension is a failure and not a reason to skip.
    if reason is not None and not CAN_BUILD:
        pytest.skip(reason)
    assert reason is None
    return Path(importlib.import_module("fused_lora._C").__file__)


def run(*command) -> str:
    tool = shutil.which(str(command[0]))
    if tool is None:
        pytest.skip(f"{command[0]} is not on this machine")
    return subprocess.run(
        [tool, *map(str, command[1:])], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """Triton's wheel carries one."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return str(bundled) if bundled and bundled.exists() else "cuobjdump"


def test_registers_the_cuda_kernel(library):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("fused_lora::soft_threshold_cuda_", "CUDA")
    assert has_kernel("fused_lora::_soft_threshold_host_", "CPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_twin_at_the_edges_of_chunks_and_tables(library, dtype):
    """The host twin runs the kernel's own chunk table and index map, thread by thread.

    A table has 254 places: 255 gates need a second one, and so does a gate of 254 full chunks and
    one element more.
    """
    lists = [
        [torch.randn(n).to(dtype) for n in SIZES],
        *([torch.randn(3).to(dtype) for _ in range(count)] for count in (253, 254, 255, 600)),
        [torch.randn(254 * 65536 + 1, dtype=torch.float32).to(dtype), torch.randn(5).to(dtype)],
    ]
    for gates in lists:
        want = [closed_form(g, 0.3) for g in gates]
        torch.ops.fused_lora._soft_threshold_host_(gates, 0.3)
        for got, expected in zip(gates, want, strict=True):
            same(got, expected)


@fuzz(100)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(SIZES[:8]), st.sampled_from(DTYPES)), min_size=1, max_size=40
    ),
    xi=st.floats(0, 4, width=32),
    seed=st.integers(0, 2**31),
)
def test_host_twin_equals_foreach(library, sizes, xi, seed):
    generator = torch.Generator().manual_seed(seed)
    gates = [torch.randn(n, generator=generator).to(dtype) for n, dtype in sizes]
    twins = [g.clone() for g in gates]
    torch.ops.fused_lora._soft_threshold_host_(gates, xi)
    torch.ops.fused_lora.soft_threshold_(twins, xi, "torch")
    for got, expected in zip(gates, twins, strict=True):
        same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_twin_at_the_edges_of_the_threshold(library, dtype):
    v, want = edges(dtype, 0.25)
    torch.ops.fused_lora._soft_threshold_host_([v], 0.25)
    same(v, want)


def test_host_twin_writes_only_the_gates(library):
    buffer = torch.full((3 * 65536,), 1.0)
    torch.ops.fused_lora._soft_threshold_host_(
        [buffer[7 : 7 + 65537], buffer[100_000:100_001]], 0.25
    )
    want = torch.full_like(buffer, 1.0)
    want[7 : 7 + 65537] = want[100_000] = 0.75
    same(buffer, want)


def test_bindings_refuse_what_the_kernel_cannot_address(library):
    op = torch.ops.fused_lora._soft_threshold_host_
    good = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"^soft_threshold_: gates\[1\] must be contiguous$"):
        op([good, torch.ones(8)[::2]], 0.5)
    with pytest.raises(
        RuntimeError, match=r"^soft_threshold_: gates\[1\] must be a floating tensor$"
    ):
        op([good, torch.arange(4)], 0.5)
    same(good, torch.ones(4))


def test_machine_code_has_no_spills(library, cuobjdump):
    usage = run(cuobjdump, "-res-usage", library)
    stacks = {}
    for part in re.split(r"^Fatbin elf code:$", usage, flags=re.M)[1:]:
        arch = re.search(r"arch = (\w+)", part)[1]
        stacks.setdefault(arch, []).extend(re.findall(r"STACK:(\d+)", part))
    assert {"sm_80", "sm_90a"} <= stacks.keys()
    assert all(stack == "0" for sizes in stacks.values() for stack in sizes), stacks
    assert len(stacks["sm_90a"]) == len(DTYPES)
    # Local memory: what was spilled, or indexed at run time, the table of chunks above all.
    sass = run(cuobjdump, "-sass", library)
    assert "soft_threshold_kernel" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)


def test_carries_ptx_for_later_gpus(library, cuobjdump):
    assert "sm_90.ptx" in run(cuobjdump, "-lptx", library)


def test_needs_no_cuda_library(library):
    """One file serves a CPU torch and a CUDA torch: cudart is inside, libtorch_cuda is optional."""
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", library))
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [n for n in needed if "cuda" in n or "python" in n]
    undefined = [line.split() for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    assert [(kind, name) for kind, name in undefined if "cuda" in name.lower()] == [
        ("w", "aoti_torch_get_current_cuda_stream")
    ]


def test_says_why_it_is_missing(monkeypatch):
    def not_built(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def not_loading(name):
        raise ImportError("undefined symbol: torch_list_size")

    why_missing = _extension.why_missing.__wrapped__
    monkeypatch.setattr(importlib, "import_module", not_built)
    assert why_missing() == (
        "the CUDA extension was not built; in a checkout run: "
        "FUSED_LORA_BUILD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."
    )
    monkeypatch.setattr(importlib, "import_module", not_loading)
    assert "does not load (undefined symbol: torch_list_size)" in why_missing()
    monkeypatch.setattr(_extension, "why_missing", why_missing)
    with pytest.raises(RuntimeError, match="FUSED_LORA_BUILD_CUDA=1 pip install"):
        _extension.load()
