"""Who may import whom: nn -> ops -> {kernels lazily, reference}; kernels nothing above them."""

import ast
import subprocess
import sys
from pathlib import Path

import fused_lora.triton_kernels
import pytest

import fused_lora

PACKAGE = Path(fused_lora.__file__).parent
KERNELS = Path(fused_lora.triton_kernels.__file__).parent
# What each part may import of the project, at module level and anywhere.
ALLOWED = {
    "reference": set(),
    "testing": set(),
    "files": set(),
    "names": set(),
    "_extension": set(),
    "cuda_kernels": {"_extension"},
    "ops": {"reference", "ops", "_extension", "cuda_kernels", "triton_kernels"},
    "nn": {"bank", "files", "ops", "reference"},
    "optim": {"inject", "names", "nn", "ops"},
    "inject": {"files", "names", "nn", "ops"},
    "bank": {"ops"},
    "checkpoint": {"files", "inject", "names", "nn", "optim"},
    "integrations": {"names", "nn", "ops", "reference"},
    "store": {
        "batch_layout",
        "checkpoint",
        "files",
        "inject",
        "names",
        "nn",
        "open_routes",
        "ops",
    },
    "open_routes": {"ops"},
    "batch_layout": {"names", "ops"},
    "tune": {"ops", "testing", "triton_kernels"},
    "cli": {"_extension", "bench", "checkpoint", "ops", "optim", "reference", "testing", "tune"},
}
LAZY = {"triton_kernels", "cuda_kernels", "_C"}


def imports(path: Path, package: str):
    """(imported module, True where the import is at module level) for each import in the file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], base]
                ).rstrip(".")
            found = (
                [base, *(f"{base}.{alias.name}" for alias in node.names)]
                if base == "fused_lora"
                else [base]
            )
        else:
            continue
        for name in found:
            yield name, id(node) in top


def part(name: str) -> str:
    return name.removeprefix("fused_lora.").split(".")[0]


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] != "triton_kernels" and relative.name != "__init__.py":
            yield relative.parts[0].removesuffix(".py"), path


@pytest.mark.parametrize(
    "owner,path", files(), ids=lambda v: v.name if isinstance(v, Path) else None
)
def test_directions(owner, path):
    package = ".".join(["fused_lora", *path.relative_to(PACKAGE).parts[:-1]])
    allowed = ALLOWED.get(owner)
    assert allowed is not None, f"{owner} has no entry in ALLOWED: say what it may import"
    for name, at_top in imports(path, package):
        if name == "fused_lora" or not name.startswith("fused_lora"):
            assert name not in ("triton", "triton_kernels") and not name.startswith("triton."), (
                f"{path.name} imports {name}"
            )
            continue
        assert part(name) in allowed | {owner}, f"{path.name} imports {name}"
        assert not (at_top and part(name) in LAZY), f"{path.name} imports {name} when it is loaded"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_nothing_above_them(path):
    for name, _ in imports(path, "fused_lora.triton_kernels"):
        if name.startswith("fused_lora"):
            assert name.startswith("fused_lora.triton_kernels"), f"{path.name} imports {name}"


def fresh(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_loads_neither_triton_nor_the_extension():
    code = """
import sys, torch
before = set(sys.modules)
import fused_lora
new = set(sys.modules) - before
kernels = "triton_kernels", "cuda_kernels", "_C"
print(sorted(m for m in new if m.split(".")[0] in ("triton", "triton_kernels")
             or m.startswith("fused_lora.") and m.split(".")[1] in kernels))
"""
    assert fresh(code) == "[]"


def test_everything_but_the_triton_backend_runs_with_triton_blocked():
    code = """
import sys
sys.modules["triton"] = None
import torch, fused_lora as fl
x, w, a, b = (torch.randn(s, requires_grad=True) for s in ((4, 6), (5, 6), (2, 6), (5, 2)))
y = fl.lora_linear(x, w, a, b, scale=1.0, dropout_p=0.5)
y.sum().backward()
print(torch.isfinite(b.grad).all().item(), fl.reference.lora_linear(x, w, a, b, scale=1.0).shape)
"""
    assert fresh(code) == "True torch.Size([4, 5])"
