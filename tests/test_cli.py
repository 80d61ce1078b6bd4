"""fused-lora doctor, verify and bench: what they tell, and that a wrong op does not pass."""

import json
import subprocess
import sys

import pytest
import torch

import fused_lora as fl
from fused_lora import cli

SMALL = ["--device", "cpu", "--shapes", "48x32", "--rows", "9", "--rank", "4", "--backend", "torch"]


def verified(capsys, *arguments: str) -> tuple[int, dict]:
    code = cli.main(["verify", "--json", *SMALL, *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_doctor_says_what_the_library_says(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["fused-lora"] == fl.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert list(found["backends"]) == list(fl.backends())
    for name, reason in fl.backends().items():
        assert found["backends"][name] == (reason or "it can run")
    x, w, a, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)
    if not found["gpus"]:
        assert found["ops"]["lora_linear"] == fl.why("lora_linear", x, w, a, b, scale=1.0)


def test_doctor_prints_every_fact(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch           {torch.__version__}\n" in printed
    assert f"default backend: {next(iter(fl.backends()))}" in printed
    for op in public_ops():
        assert f"\n{op}\n" in printed


def test_doctor_needs_neither_triton_nor_a_built_extension():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['fused_lora._C'] = None\n"
        "from fused_lora import cli; raise SystemExit(cli.main(['doctor']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "triton" in found.stdout


def public_ops() -> set[str]:
    """The functions of fused_lora and fused_lora.optim that compute something of tensors."""
    found = {name: getattr(of, name) for of in (fl, fl.optim) for name in of.__all__}
    modules = {name: getattr(one, "__module__", "") for name, one in found.items()}
    elsewhere = "fused_lora.ops.dispatch", "fused_lora.ops.routing"
    return {n for n, m in modules.items() if m.startswith("fused_lora.ops.") and m not in elsewhere}


GRADIENTS = {
    "lora_linear": "x weight a b bias gate",
    "lora_linear_group": "x weight0 weight1 weight2 a0 a2 b0 b2 bias0 bias1 gate",
    "lora_add": "base_out x a b gate",
    "dora_linear": "x weight a b factor bias",
    "multi_lora_linear": "x weight a bt bias gate",
    "multi_lora_add_": "",
    "lora_embedding": "weight a b",
    "dept_embedding": "weight prompt a b",
}


def test_verify_checks_every_output_of_every_op(capsys):
    code, found = verified(capsys)
    assert code == 0 and found["failed"] == 0
    seen = {(row["case"].split()[0], row["output"]) for row in found["rows"]}
    want = {(op, f"d{name}") for op, names in GRADIENTS.items() for name in names.split()}
    want |= {(op, "y") for op in GRADIENTS} | {("soft_threshold_", "gates")}
    assert seen == want and {op for op, _ in seen} == public_ops()
    assert {"p=0", "p=0.1"} <= {word for row in found["rows"] for word in row["case"].split()}
    # An error is a number that fp32 can have: neither nothing nor everything.
    exact = "gates", "dbase_out"
    assert all(0 < row["error"] < 1e-5 for row in found["rows"] if row["output"] not in exact)
    timed = [row for row in found["rows"] if row["output"] == "y"]
    assert timed and all(row["time over naive"] > 0 for row in timed)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_verify_takes_other_dtypes_and_shapes(capsys, dtype):
    code, found = verified(capsys, "--dtype", dtype, "--shapes", "7x5,64x48", "--rows", "3")
    assert code == 0 and found["failed"] == 0
    assert {row["case"].split()[0] for row in found["rows"]} == public_ops()


class Wrong(torch.autograd.Function):
    """x as it is, and a gradient one percent too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


def wrong_values(op):
    """One percent too large; a list for a list, and in place what is in place."""

    def call(*args, **options):
        y = op(*args, **options)
        return [one * 1.01 for one in y] if isinstance(y, list) else y * 1.01

    return call


def wrong_gradient(op):
    """That of a tensor which y is a sum over: x, or the table of words."""
    of = 1 if op.__name__.endswith("embedding") else 0

    def call(*args, **options):
        return op(*args[:of], Wrong.apply(args[of]), *args[of + 1 :], **options)

    return call


@pytest.mark.parametrize(
    "op, wrong",
    [
        *((op, wrong_values) for op in GRADIENTS),
        *((op, wrong_gradient) for op, names in GRADIENTS.items() if names),
    ],
)
def test_verify_fails_on_a_wrong_op_and_names_the_output(monkeypatch, capsys, op, wrong):
    monkeypatch.setattr(fl, op, wrong(getattr(fl, op)))
    code, found = verified(capsys)
    assert code == 1
    failed = [row for row in found["rows"] if row["verdict"] == "FAILED"]
    assert found["failed"] == len(failed) > 0
    assert {row["case"].split()[0] for row in failed} == {op}
    outputs = {row["output"] for row in failed}
    if wrong is wrong_values:
        assert "y" in outputs
    else:
        first = {"lora_add": "dbase_out"}.get(op, "dx")
        assert outputs == {"dweight" if op.endswith("embedding") else first}
    assert all(row["why"].startswith(row["output"]) for row in failed)


def test_verify_fails_on_a_wrong_soft_threshold(monkeypatch, capsys):
    monkeypatch.setattr(fl.optim, "soft_threshold_", lambda gates, xi, backend: gates)
    code, found = verified(capsys)
    assert code == 1
    assert [row["output"] for row in found["rows"] if row["why"]] == ["gates"]


def test_verify_prints_what_failed_to_stderr(monkeypatch, capsys):
    op = fl.lora_linear
    monkeypatch.setattr(fl, "lora_linear", lambda *args, **kw: op(*args, **kw) * 1.01)
    assert cli.main(["verify", *SMALL]) == 1
    printed = capsys.readouterr()
    assert "FAILED: lora_linear 48x32 r=4 p=0 float32, torch: y" in printed.err
    assert "outputs are within their bounds" in printed.out


def test_verify_names_what_it_did_not_check(monkeypatch, capsys):
    monkeypatch.setattr(cli, "refusals", lambda op, x: {"torch": None, "cuda": "no cuda here"})
    assert cli.main(["verify", *SMALL, "--backend", "torch,cuda"]) == 0
    assert "lora_linear, cuda, fp32: not checked, no cuda here" in capsys.readouterr().out


def test_verify_of_nothing_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(cli, "refusals", lambda op, x: {"cuda": "no cuda here"})
    assert cli.main(["verify", "--backend", "cuda"]) == 1
    assert "nothing was checked" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["verify", "--shapes", "48"], "wants NxK,NxK,... such as 4096x4096, got '48'"),
        (["verify", "--shapes", "0x8"], "wants NxK,NxK,... such as 4096x4096, got '0x8'"),
        (["verify", "--rank", "0"], "wants an integer of at least 1, got '0'"),
        (["verify", "--rows", "-3"], "wants an integer of at least 1, got '-3'"),
        (["verify", "--dtype", "fp8"], "wants some of fp32, bf16, fp16"),
        (["verify", "--backend", "gpu"], "wants some of cuda, triton, torch"),
        (["verify", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["repair"], "invalid choice: 'repair'"),
        (["bench", "--op", "conv"], "invalid choice: 'conv'"),
    ],
)
def test_bad_arguments_name_what_is_wanted(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_without_a_command_the_help_is_printed(capsys):
    assert cli.main([]) == 0
    assert "{doctor,verify,convert,merge,bench,tune}" in capsys.readouterr().out


def test_the_command_is_declared():
    from importlib.metadata import entry_points

    (found,) = entry_points(group="console_scripts", name="fused-lora")
    assert found.load() is cli.main
