"""Which backend runs, why the others do not, and that nothing falls back."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_lora as fl
from fused_lora import _extension, cli
from fused_lora.ops import dispatch, lora_linear


def arguments():
    put = {"device": DEVICE}
    return [torch.randn(*shape, **put) for shape in ((4, 6), (5, 6), (2, 6), (5, 2))]


def test_why_names_every_backend_chosen_first():
    reasons = fl.why("lora_linear", *arguments(), scale=1.0)
    assert next(iter(reasons)) == "torch" and set(reasons) == {"torch", "triton", "cuda"}
    assert reasons["torch"] is None
    with fl.use_backend("triton"):
        assert next(iter(fl.why("lora_linear", *arguments(), scale=1.0))) == "triton"
    assert next(iter(fl.why("lora_linear", *arguments(), scale=1.0, backend="cuda"))) == "cuda"


def test_why_agrees_with_the_call():
    args = arguments()
    for backend, reason in fl.why("lora_linear", *args, scale=1.0).items():
        if reason is None:
            fl.lora_linear(*args, scale=1.0, backend=backend)
        else:
            with pytest.raises(RuntimeError) as raised:
                fl.lora_linear(*args, scale=1.0, backend=backend)
            assert str(raised.value) == f"lora_linear: backend {backend!r} cannot run: {reason}"


def test_why_of_an_unknown_op():
    known = (
        "dept_embedding, dora_linear, lora_add, lora_embedding, lora_linear, lora_linear_group, "
    )
    known += "multi_lora_linear, soft_threshold_"
    with pytest.raises(ValueError, match=f"op must be one of {known}, got 'lora_conv'"):
        fl.why("lora_conv")


@pytest.mark.skipif(DEVICE != "cpu", reason="the reason is that x is on the CPU")
def test_triton_without_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = fl.why("lora_linear", *arguments(), scale=1.0)["triton"]
    assert reason == "x is on cpu; the Triton kernels run on CUDA devices"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: x is on cpu"):
        fl.lora_linear(*arguments(), scale=1.0, backend="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="the reason is that x is on the CPU")
def test_cuda_without_a_gpu_or_the_emulator(monkeypatch):
    monkeypatch.setattr(_extension, "emulates", lambda: False)
    monkeypatch.setattr(_extension, "why_missing", lambda: None)
    reason = fl.why("lora_linear", *arguments(), scale=1.0)["cuda"]
    assert reason == "x is on cpu; the CUDA kernels run on CUDA devices"
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: x is on cpu"):
        fl.lora_linear(*arguments(), scale=1.0, backend="cuda")


def test_cuda_without_the_extension(monkeypatch):
    monkeypatch.setattr(_extension, "why_missing", lambda: "the CUDA extension was not built")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: the CUDA extension was not"):
        fl.lora_linear(*arguments(), scale=1.0, backend="cuda")


def as_on_a_gpu(monkeypatch, capability):
    """From here on torch sees a GPU, on which fake tensors may be."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FUSED_LORA_EMULATED", raising=False)
    monkeypatch.setattr(_extension, "why_missing", _extension.why_missing.__wrapped__)
    monkeypatch.setattr(dispatch, "gpu_refuses", dispatch.gpu_refuses.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = SimpleNamespace(
        name="a GPU", major=capability[0], minor=capability[1], total_memory=0,
        multi_processor_count=1,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)


def test_rocm_is_refused_by_name(monkeypatch):
    """An MI300, as torch shows it: a cuda device of capability 9.4."""
    as_on_a_gpu(monkeypatch, (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    why = "this torch is built for ROCm 6.4.43482, and the kernels for NVIDIA GPUs"
    with FakeTensorMode():
        assert fl.backends() == {"torch": None, "triton": why, "cuda": why}
        ops = cli.facts()["ops"]
        x = torch.empty(4, device="cuda")
        with pytest.raises(RuntimeError) as raised:
            dispatch.require("lora_linear", "triton", lora_linear.REFUSALS, x)
    assert str(raised.value) == f"lora_linear: backend 'triton' cannot run: {why}"
    assert ops["lora_linear"] == {"torch": None, "triton": why, "cuda": why}
    assert not [op for op in ops for name in ("triton", "cuda") if ops[op].get(name, why) is None]
    with pytest.raises(RuntimeError, match=why):
        _extension.load()


def test_an_old_gpu_is_refused_by_every_op(monkeypatch):
    as_on_a_gpu(monkeypatch, (7, 5))
    monkeypatch.setattr(_extension, "why_missing", lambda: None)
    why = "cuda:0 has compute capability 7.5; the {} kernels need 8.0"
    with FakeTensorMode():
        reasons, ops = fl.backends(), cli.facts()["ops"]
    assert reasons == {"torch": None, "triton": why.format("Triton"), "cuda": why.format("CUDA")}
    found = {reason for op in ops.values() if "no CUDA C++ kernel" not in (reason := op["cuda"])}
    assert found == {why.format("CUDA")}


def test_cuda_takes_no_float64(monkeypatch):
    monkeypatch.setattr(_extension, "why_missing", lambda: None)
    args = [t.double() for t in arguments()]
    assert "take no float64" in fl.why("lora_linear", *args, scale=1.0)["cuda"]


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter runs on the CPU")
def test_interpreted_bfloat16_is_refused():
    args = [t.bfloat16() for t in arguments()]
    reason = fl.why("lora_linear", *args, scale=1.0)["triton"]
    assert reason == "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32"


def test_use_backend_nests_and_restores(monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "require", lambda op, backend, refusals, x: seen.append(backend))
    call = lambda **kw: fl.lora_linear(*arguments(), scale=1.0, **kw)  # noqa: E731
    call()
    with fl.use_backend("triton"):
        call()
        with fl.use_backend("torch"):
            call()
        call(backend="torch")
        with fl.use_backend(None):
            call()
    with pytest.raises(ZeroDivisionError), fl.use_backend("triton"):
        raise ZeroDivisionError
    call()
    assert seen == ["torch", "triton", "torch", "torch", "torch", "torch"]
    names = "backend must be one of cuda, triton, torch or None, got 'gpu'"
    with pytest.raises(ValueError, match=names), fl.use_backend("gpu"):
        pass


def test_backward_runs_where_the_forward_did(monkeypatch):
    x, weight, a, b = arguments()
    a.requires_grad_()
    with fl.use_backend("triton"):
        y = fl.lora_linear(x, weight, a, b, scale=1.0)
    seen = []
    monkeypatch.setattr(dispatch, "require", lambda op, backend, refusals, x: seen.append(backend))
    y.sum().backward()
    assert seen == ["triton"]


def test_backends_of_this_machine():
    reasons = fl.backends()
    assert next(iter(reasons)) == "torch" and set(reasons) == {"torch", "triton", "cuda"}
    assert all(reason is None or isinstance(reason, str) for reason in reasons.values())


@pytest.mark.parametrize("value,ok", [("triton", True), ("", True), ("gpu", False)])
def test_environment_variable(value, ok):
    code = "import fused_lora.ops.dispatch as d; print(d.choose(None))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FUSED_LORA_BACKEND": value},
        capture_output=True,
        text=True,
    )
    if ok:
        assert out.stdout.strip() == (value or "torch")
    else:
        message = "FUSED_LORA_BACKEND must be one of cuda, triton, torch or None, got 'gpu'"
        assert message in out.stderr
