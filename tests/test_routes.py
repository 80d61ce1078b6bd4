"""Which kernel makes a sum of segments: the tables, and what `fused-lora tune` writes into one."""

import json

import pytest
import torch
from fused_lora.triton_kernels import configs, routes
from hypothesis import given
from hypothesis import strategies as st

from fused_lora import cli, tune
from fused_lora.ops import dispatch
from fused_lora.testing import assert_accurate

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that makes rows the user's table."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("FUSED_LORA_TUNING", str(path))

    def forget():
        configs.routes.cache_clear()
        configs.route.cache_clear()

    def write(*rows, text=None):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text or json.dumps({"rows": rows}))
        forget()
        return path

    forget()
    yield write
    forget()


SIZES = {"form": "forward", "kind": "half", "sm": 90, "gpu": "G", "triton": "3.6.0"}
SIZES |= {"N": 4096, "K": 4096, "R": 16}


def found(M, **sizes):
    return configs.route(M, **(SIZES | sizes))


def test_without_a_table_there_is_no_route(table):
    assert found(2048) is None
    assert configs.table("routes")["rows"] == []  # nothing has been measured


@given(M=st.integers(1, 10**6))
def test_the_nearest_row_by_the_logarithm_of_m_is_taken(M):
    known = 64, 512, 2048, 16384
    with pytest.MonkeyPatch.context() as patch:
        rows = tuple(SIZES | {"M": m, "route": "gluon"} for m in known)
        patch.setattr(configs, "routes", lambda: rows)
        configs.route.cache_clear()
        row = found(M)
        configs.route.cache_clear()
    factor = {m: max(M / m, m / M) for m in known}
    nearest = min(factor.values())
    if nearest <= configs.REACH:
        assert factor[row["M"]] == nearest
    else:
        assert row is None


@pytest.mark.parametrize("key", SIZES)
def test_a_row_for_something_else_is_not_taken(table, key):
    table(SIZES | {"M": 2048, "route": "torch"})
    assert found(2048)["route"] == "torch"
    assert found(2048, **{key: "another"}) is None


def test_a_row_that_leaves_a_size_out_is_for_all_of_them(table):
    table({"form": "dx", "route": "gluon"}, {"route": "torch", "M": 64})
    assert found(1, form="dx", N=8)["route"] == "gluon"
    assert found(10**9, form="dx")["route"] == "gluon"
    assert found(64)["route"] == "torch" and found(1024) is None


def test_a_table_that_cannot_be_read_is_named(table):
    path = table(text="{")
    with pytest.raises(ValueError) as raised:
        configs.routes()
    assert str(raised.value).startswith(f"{path} is no table of fused-lora tune (JSONDecodeError(")
    path = table({"route": "cublas"})
    with pytest.raises(ValueError) as raised:
        configs.routes()
    assert str(raised.value) == (
        f"{path}: route must be one of triton, gluon, torch, got {{'route': 'cublas'}}"
    )


def forward(M=33, N=24, K=40, R=8, dtype=torch.float32):
    return [
        (torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)),
        (torch.randn(M, R, dtype=dtype), torch.randn(N, R, dtype=dtype)),
    ]


def plain(bias, *operands):
    x, w, t, b = operands
    return (x @ w.t() + t @ b.t() + bias,)


def run(segments, **arguments):
    bias = torch.randn(segments[0][1].shape[0])
    y = dispatch.kernels("triton").segment_gemm(segments, bias=bias, early=1, **arguments)
    assert_accurate("y", (y,), plain, (bias, *(t for pair in segments for t in pair)))


def test_the_route_torch_gives_the_sum(table, monkeypatch):
    table({"route": "torch"})
    monkeypatch.setattr(routes.plain, "segment_gemm", None)
    run(forward())


def test_the_route_triton_takes_the_config_of_its_row(table, monkeypatch):
    config = configs.segment_gemm(33, 24, torch.float32, 0) | {"BLOCK_M": 16}
    table({"route": "triton", "config": config})
    taken, launcher = [], routes.plain.segment_gemm

    def record(*arguments, config, **more):
        taken.append(config)
        return launcher(*arguments, config=config, **more)

    monkeypatch.setattr(routes.plain, "segment_gemm", record)
    run(forward())
    assert taken == [config]


def test_a_config_of_the_caller_asks_no_table(table):
    table({"route": "gluon"})
    run(forward(), config=configs.segment_gemm(33, 24, torch.float32, 0))


@pytest.mark.parametrize(
    ("route", "masked", "why"),
    [
        ("gluon", False, "the Gluon kernel is made for compute capability 9.0, and x is on cpu"),
        ("torch", True, "torch would need a pass of its own over y for the mask"),
    ],
)
def test_a_route_that_cannot_be_taken_says_so(table, route, masked, why):
    table({"route": route})
    segments = forward(N=32)
    bits = torch.full((33, 4), 255, dtype=torch.uint8)
    with pytest.warns(UserWarning) as warned:
        run(segments, mask=(bits, 1.0, 1) if masked else None)
    assert [str(w.message) for w in warned if w.category is UserWarning] == [
        f"segment_gemm: the route {route!r} is not taken: {why}"
    ]


def test_another_triton_is_refused(monkeypatch):
    monkeypatch.setattr(routes.triton, "__version__", "4.0.1")
    assert routes.gluon_refuses(forward()) == (
        "the Gluon kernel is made for Triton 3.6, 3.7, 3.8, 3.9, this is 4.0.1"
    )


def test_kernels_overlap_only_for_a_route_that_uses_it(table, monkeypatch):
    monkeypatch.setattr(configs, "capability", lambda device: 90)
    assert not configs.overlaps(CPU)
    table({"route": "gluon"})
    assert configs.overlaps(CPU)
    monkeypatch.setattr(configs, "capability", lambda device: 80)
    assert not configs.overlaps(CPU)


@pytest.mark.parametrize("form", tune.FORMS)
def test_the_fastest_candidate_becomes_the_row(form, table):
    """A timer that likes the last candidate, and finds every other slow by turns."""
    path, case = table(), tune.Case(form, 40, 32, 48, 5, torch.float32)
    names = [json.dumps(c) for c in tune.candidates(tune.draw(case, CPU))]
    clock = iter(range(10**6))

    def timer(work):
        def seconds():
            work()
            turn = next(clock)
            return 1e-6 if turn % len(names) == len(names) - 1 else 2e-6 + 1e-9 * turn

        return seconds

    (row,), failed = tune.tune([case], path, CPU, timer)
    best = json.loads(names[-1])
    assert not failed and {key: row[key] for key in best} == best
    assert row["us"] == 1.0 and (row["M"], row["R"], row["form"]) == (40, 8, form)
    table(text=path.read_text())
    segments, mask = tune.draw(case, CPU)
    assert configs.route(**routes.sizes(segments, mask)) == row


def test_a_wrong_or_broken_candidate_is_not_timed(table, monkeypatch):
    def wrong(segments, **arguments):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(routes.plain, "segment_gemm", wrong)
    case = tune.Case("forward", 8, 8, 8, 8, torch.float32)
    (row,), failed = tune.tune([case], table(), CPU, lambda work: lambda: 1.0)
    assert row["route"] == "torch" and row["torch us"] == 1e6
    (reasons,) = failed.values()
    assert set(reasons.values()) == {"RuntimeError: no such tile"}
    monkeypatch.setattr(routes, "by_torch", lambda segments: segments[0][0] * 2)
    with pytest.raises(RuntimeError, match="no kernel makes forward M=8 8x8 r=8 float32"):
        tune.tune([case], table(), CPU, lambda work: lambda: 1.0)


def test_rows_for_other_sizes_are_kept(table):
    case = tune.Case("forward", 8, 8, 8, 8, torch.float32)
    other = SIZES | {"M": 8, "route": "gluon"}
    path = table(other)
    for _ in range(2):
        tune.tune([case], path, CPU, lambda work: lambda: 1.0)
        rows = json.loads(path.read_text())["rows"]
        assert len(rows) == 2 and other in rows
    assert [p.name for p in path.parent.iterdir()] == ["tuning.json"]


def test_a_table_that_cannot_be_written_stays_as_it_was(table, monkeypatch):
    path = table({"route": "torch"})
    before = path.read_text()

    def full(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(tune.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        tune.write(path, [])
    assert path.read_text() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_tune_without_a_gpu_is_refused(capsys):
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err == (
        "fused-lora tune: torch sees no CUDA device, and times of another machine tell nothing of "
        "yours\n"
    )


def test_the_command(table, monkeypatch, capsys):
    """All of it but the device, the clock and the kernels."""
    path = table()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "triton_refuses", lambda x: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, **where: None)
    monkeypatch.setattr(tune, "Timer", lambda device: lambda work: lambda: 1e-3)
    row = {"route": "torch", "us": 1000.0, "torch us": 1000.0}
    monkeypatch.setattr(tune, "measure", lambda case, *rest: (row | {"M": case.M}, {}))
    arguments = ["--shapes", "64x32", "--rows", "16,32", "--form", "forward", "--dtype", "fp16"]
    assert cli.main(["tune", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path) and [r["M"] for r in told["rows"]] == [16, 32]
    assert cli.main(["tune", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == (
        [
            "forward",
            "M=16",
            "64x32",
            "r=16",
            "float16",
            "torch",
            "1000.00",
            "us,",
            "1.00x",
            "torch's",
        ]
    )
