"""The contenders that the benchmarks compare with: each computes what it claims to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from conftest import DEVICE
from fused_lora.bench import baselines, peers
from fused_lora.bench.baselines import BASELINES, MULTI_BASELINES
from fused_lora.bench.measure import gate
from fused_lora.bench.peers import MULTI_PEERS, PEERS, Tree, stub, stubbed
from fused_lora.bench.registry import (
    LORA_ADD,
    LORA_LINEAR_GROUP,
    MULTI_LORA_ADD,
    MULTI_LORA_LINEAR,
    Contender,
    GroupCase,
    LinearCase,
    MultiCase,
    QkvCase,
)
from fused_lora.bench.registry import LORA_LINEAR as OP

CPU = torch.device("cpu")
COMPILED = [name for name in BASELINES if name.startswith("compiled")]
# One row; tiles that are not full, and more than one of them; more ranks than a block holds, more
# columns than the splits hold at once.
SHAPES = (1, 16, 8, 8), (6, 10, 14, 3), (37, 70, 67, 5), (70, 40, 33, 130), (130, 40, 603, 16)
CASES = [
    LinearCase(*shape, p=p, dtype=dtype)
    for shape in SHAPES
    for p in (0.0, 0.3)
    for dtype in (torch.float32, torch.float16)
]
CASE = LinearCase(40, 48, 64, R=8)


@pytest.fixture(autouse=True)
def torch_config():
    """What a contender sets for its process ends with the test."""
    with torch._functorch.config.patch(donated_buffer=True):
        yield


def check(contender: Contender, case, device):
    if reason := contender.unavailable(device, case):
        pytest.skip(reason)
    gate(OP, case, contender, OP.tensors(case, device))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(("lorafusion form", case) for case in CASES),
        *((name, case) for name in ("addmm", "bgmv form") for case in CASES if not case.p),
    ],
    ids=str,
)
def test_baseline(name, case, device):
    check(Contender(**BASELINES[name]), case, device)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, p, device):
    check(Contender(**BASELINES[name]), CASE._replace(p=p), device)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grouped_mm(p, device):
    """On a CPU torch computes it without a kernel for it: no contender there, but the same call."""
    contender = Contender(**BASELINES["grouped_mm"])
    case = CASE._replace(p=p, dtype=torch.bfloat16)
    refused = contender.unavailable(device, case)
    assert refused is None if DEVICE == "cuda" else "CUDA" in refused
    gate(OP, case, contender, OP.tensors(case, device))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_peer(name, p, dtype, device):
    check(Contender(**PEERS[name]), CASE._replace(p=p, dtype=dtype), device)


@pytest.mark.parametrize("popularity", ["distinct", "zipf", "identical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*MULTI_PEERS, *MULTI_BASELINES, "bmm", "row loop"])
def test_form_for_many_adapters(name, dtype, popularity, device):
    contender = MULTI_LORA_LINEAR.contenders[name]
    case = MultiCase(37, 72, 80, R=8, G=5, popularity=popularity, dtype=dtype)
    if name == "grouped_mm" and DEVICE == "cpu":
        # Without a kernel for it, torch on a CPU computes it all the same.
        assert "CUDA" in contender.unavailable(device, case)
    elif reason := contender.unavailable(device, case):
        pytest.skip(reason)
    gate(MULTI_LORA_LINEAR, case, contender, MULTI_LORA_LINEAR.tensors(case, device))


@pytest.mark.parametrize("name", [n for n in MULTI_LORA_LINEAR.contenders if n != "linear"])
def test_ranks_that_differ(name, device):
    case = MultiCase(20, 40, 48, R=8, G=5, ragged=True, dtype=torch.float16)
    assert case.ranks() == [8, 4, 2, 1, 8]
    contender = MULTI_LORA_LINEAR.contenders[name]
    if reason := contender.unavailable(device, case):
        pytest.skip(reason)
    gate(MULTI_LORA_LINEAR, case, contender, MULTI_LORA_LINEAR.tensors(case, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["adapter loop", "torch", "triton", "cuda"])
def test_projections_of_one_x(name, dtype, device):
    case = QkvCase(20, 72, 48, 16, R=8, G=5, dtype=dtype)
    assert case.widths() == (40, 16, 16) and case.offsets() == (0, 40, 56)
    contender = MULTI_LORA_ADD.contenders[name]
    if reason := contender.unavailable(device, case):
        pytest.skip(reason)
    gate(MULTI_LORA_ADD, case, contender, MULTI_LORA_ADD.tensors(case, device))


@pytest.mark.parametrize("name", ["chained addmm_", "naive", "torch"])
def test_dx_alone(name, device):
    """Of a group whose adapters are frozen: x has the only gradient."""
    case = GroupCase(20, 72, 48, (40, 16, 16), R=8, dtype=torch.float32, trained=False)
    op = LORA_LINEAR_GROUP
    tensors = op.tensors(case, device)
    assert [t.requires_grad for t in tensors] == [True] + [False] * 9
    gate(op, case, op.contenders[name], tensors)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op in (LORA_ADD, LORA_LINEAR_GROUP)
        for name in op.contenders
        if name != op.floor
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_bases_and_groups(op, name, dtype, p, device):
    case = LinearCase(20, 40, 48, R=8, p=p, dtype=dtype)
    if op is LORA_LINEAR_GROUP:
        case = GroupCase(20, 72, 48, (40, 16, 16), R=8, p=p, dtype=dtype)
    contender = op.contenders[name]
    if reason := contender.unavailable(device, case):
        pytest.skip(reason)
    gate(op, case, contender, op.tensors(case, device))


def test_a_compiled_forward_has_several_backwards():
    case = CASE._replace(p=0.3)
    x, weight, a, b = OP.tensors(case, CPU)
    if reason := BASELINES["compiled"]["unavailable"](CPU, case):
        pytest.skip(reason)
    with torch._inductor.config.patch(force_disable_caches=True):
        forward = BASELINES["compiled"]["build"](case._replace(M=24), x[:24], weight, a, b)
        torch.autograd.grad(forward(), (x, a, b), torch.ones(24, case.N))
        y = forward()
        twice = [
            torch.autograd.grad(y, (x, a, b), torch.ones_like(y), retain_graph=True)
            for _ in range(2)
        ]
    for first, second in zip(*twice, strict=True):
        torch.testing.assert_close(first, second)


def test_every_case_is_compiled_for_itself():
    """torch compiles a code object a few times only, and runs it eagerly from then on."""
    compiled = [baselines._compiled(baselines._formula, CASE._replace(M=M), None) for M in (1, 2)]
    first, second = (call._torchdynamo_orig_callable.__code__ for call in compiled)
    assert first is not second
    assert baselines._compiled(baselines._formula, CASE._replace(M=1), None) is compiled[0]


@pytest.mark.parametrize("name", COMPILED)
def test_no_compiler(name, monkeypatch):
    unavailable = BASELINES[name]["unavailable"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in unavailable(CPU, CASE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton" in unavailable(torch.device("cuda"), CASE)


def test_sentences(monkeypatch):
    dropped, half = CASE._replace(p=0.1), CASE._replace(dtype=torch.float16)
    for name in ("addmm", "bgmv form"):
        assert BASELINES[name]["unavailable"](CPU, dropped) == "it has no dropout"
    for name in ("vllm", "sglang"):
        assert PEERS[name]["unavailable"](CPU, half._replace(p=0.1)) == "it has no dropout"
        assert "float32" in PEERS[name]["unavailable"](CPU, CASE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install peft" in PEERS["peft"]["unavailable"](CPU, CASE)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"dtype": torch.float16}, "float16"), ({"R": 12}, "12 elements"), ({}, None)],
)
def test_sentences_of_grouped_mm(monkeypatch, change, word):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    unavailable = BASELINES["grouped_mm"]["unavailable"]
    sentence = unavailable(
        torch.device("cuda"), CASE._replace(**{"dtype": torch.bfloat16, **change})
    )
    assert sentence is None if word is None else word in sentence


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's")
def test_a_tree_that_is_not_there(monkeypatch, tmp_path):
    unavailable = PEERS["vllm"]["unavailable"]
    half = CASE._replace(dtype=torch.float16)
    monkeypatch.delenv("FUSED_LORA_BENCH_VLLM", raising=False)
    assert "FUSED_LORA_BENCH_VLLM is not set" in unavailable(CPU, half)
    monkeypatch.setenv("FUSED_LORA_BENCH_VLLM", str(tmp_path))
    folder = tmp_path / "vllm" / "lora" / "ops" / "triton_ops"
    assert f"there is no {folder / 'lora_kernel_metadata.py'}" in unavailable(CPU, half)
    folder.mkdir(parents=True)
    for file in peers.VLLM.files:
        (folder / f"{file}.py").write_text("from vllm.envs import no_such_setting\n")
    assert "no_such_setting" in unavailable(CPU, half)
    assert "vllm" not in sys.modules


FAKE_KERNELS = """
from fakepeer import envs
from fakepeer.ops.helper import tl, triton


@triton.jit
def scale_kernel(x_ptr, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(x_ptr + offs, FACTOR * x, mask=offs < n)


def scale(x):
    scale_kernel[(1,)](x, x.numel(), FACTOR=envs.FACTOR, BLOCK=16)
    return x
"""


@pytest.fixture
def fake_tree(monkeypatch, tmp_path) -> Tree:
    """A package with one import that is a stub, one of a file beside it, and a broken __init__."""
    folder = tmp_path / "fakepeer" / "ops"
    folder.mkdir(parents=True)
    for init in (folder, folder.parent):
        (init / "__init__.py").write_text("import a_package_that_is_not_installed\n")
    (folder / "helper.py").write_text("import triton\nimport triton.language as tl\n")
    (folder / "kernels.py").write_text(FAKE_KERNELS)
    monkeypatch.setenv("FAKE_TREE", str(tmp_path))
    stubs = [stub("fakepeer.envs", FACTOR=3.0)]
    return Tree("FAKE_TREE", "fakepeer.ops", ("kernels",), lambda: [*stubs])


def test_a_tree_is_loaded_and_leaves_no_module_behind(fake_tree, device):
    before = dict(sys.modules)
    assert fake_tree.why_not() is None
    assert {name for name in sys.modules if name.startswith("fakepeer")} == set()
    assert all(sys.modules[name] is module for name, module in before.items())
    # Triton reads a kernel's source and globals when it is first started, and that is now.
    x = fake_tree.load().kernels.scale(torch.arange(5.0, device=device))
    assert x.tolist() == [0, 3, 6, 9, 12]


def test_a_package_that_is_imported_already_stays(fake_tree, monkeypatch):
    real = SimpleNamespace(name="the installed one")
    monkeypatch.setitem(sys.modules, "fakepeer", real)
    monkeypatch.setitem(sys.modules, "fakepeer.envs", real)
    assert fake_tree.load().kernels.envs.FACTOR == 3.0
    assert sys.modules["fakepeer"] is real and sys.modules["fakepeer.envs"] is real


def test_sys_modules_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), stubbed({"fakepeer.envs": stub("fakepeer.envs")}):
        assert "fakepeer.envs" in sys.modules
        raise ZeroDivisionError
    assert "fakepeer.envs" not in sys.modules


ARCHITECTURES = 80, 90, 100


def compile_forms() -> list[dict]:
    """The kernels of a forward and backward of each Triton form, as they compile for each GPU."""
    import aot
    from fused_lora.bench import forms

    aot.install()
    x, weight, a, b = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta").requires_grad_()
        for shape in ((8192, 4096), (4096, 4096), (16, 4096), (4096, 16))
    )
    for aot.GPU.sm in ARCHITECTURES:
        y = forms.LoraFusionForm.apply(x, weight.detach(), a, b, 2.0, 0.1)
        torch.autograd.grad(y, (x, a, b), torch.empty_like(y))
        forms.bgmv_form(x[:16].detach(), weight, a.detach(), b.detach(), 2.0)
    return list(aot.KERNELS.values())


@pytest.mark.slow
def test_the_forms_compile_without_a_gpu():
    # What was imported under the interpreter cannot be compiled, and conftest asks for it on a CPU.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["FUSED_LORA_TEST_DEVICE"] = "cuda"
    found = json.loads(subprocess.check_output([sys.executable, __file__], env=env))
    kernels = ["ds_db", "expand", "extended_gemm", "extended_gemm", "split_shrink"]
    for sm in ARCHITECTURES:
        facts = sorted((f for f in found if f["sm"] == sm), key=lambda f: f["kernel"])
        assert [f["kernel"].removesuffix("_kernel") for f in facts] == kernels
        for f in facts:
            assert not f["stack"], f"{f['kernel']} spills on sm_{sm}"
            big = {90: "HGMMA", 100: "UTCHMMA"}.get(sm, "HMMA")
            unit = big if f["config"]["BLOCK_M"] >= 64 else "HMMA"
            assert f["counts"].get(unit), f"{f['kernel']} without {unit} on sm_{sm}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(json.dumps(compile_forms()))
