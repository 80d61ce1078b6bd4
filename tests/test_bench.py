"""The benchmarks' own arithmetic, their gate and their report."""

import contextlib
import csv
import itertools
import json

import pytest
import torch
from conftest import DEVICE
from fused_lora.bench import run, targets
from fused_lora.bench.measure import (
    BelowFloor,
    Chip,
    Cuda,
    Interleaved,
    Spread,
    check_floor,
    gate,
)
from fused_lora.bench.registry import (
    DIRECTIONS,
    LORA_ADD,
    LORA_LINEAR_GROUP,
    GroupCase,
    LinearCase,
    MultiCase,
    Stage,
)
from fused_lora.bench.registry import LORA_LINEAR as OP
from fused_lora.bench.report import (
    MARKS,
    ROOT,
    Report,
    case_result,
    claims_of,
    committed,
    committed_claims,
    machine,
    merge,
    merged,
    render,
    rendered,
    sections,
    slug,
)
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich")
CPU = torch.device("cpu")
CASE = LinearCase(6, 10, 14, R=3)
PRESENT = {name: OP.contenders[name] for name in ("linear", "naive", "naive again", "torch")}


GROUP = GroupCase(6, 18, 14, (10, 5, 3), R=3)
FROZEN = GROUP._replace(trained=False)


@pytest.mark.parametrize(
    ("op", "case"),
    [(OP, CASE), (LORA_ADD, CASE), (LORA_LINEAR_GROUP, GROUP), (LORA_LINEAR_GROUP, FROZEN)],
    ids=lambda v: getattr(v, "name", None),
)
def test_flops_are_those_that_torch_counts(op, case):
    tensors = op.tensors(case, CPU)
    leaves = [t for t in tensors if t.requires_grad]
    forward = op.contenders["naive"].build(case, *tensors)
    with FlopCounterMode(display=False) as counter:
        y = forward()
    assert counter.get_total_flops() == op.flops(case, "forward")
    ys = [y] if isinstance(y, torch.Tensor) else y
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
    assert counter.get_total_flops() == op.flops(case, "backward")
    assert op.flops(case, "both") == op.flops(case, "forward") + op.flops(case, "backward")


def test_bytes_of_one_case():
    x, weight, a, b, y, h = 6 * 14, 10 * 14, 3 * 14, 10 * 3, 6 * 10, 6 * 3
    assert OP.bytes(CASE, "forward") == 4 * (x + weight + a + b + y + h)
    assert OP.bytes(CASE, "backward") == 4 * (y + x + weight + a + b + h + x + a + b)
    half = CASE._replace(dtype=torch.bfloat16)
    assert 2 * OP.bytes(half, "both") == OP.bytes(CASE, "both")
    once = x + 18 * 14 + 3 * a + 18 * 3 + 6 * 18  # x or dx, the weights, A, B, y or dy
    for direction in ("forward", "backward"):
        assert LORA_LINEAR_GROUP.bytes(FROZEN, direction) == 4 * once
    groups = (LORA_LINEAR_GROUP, GROUP), (LORA_LINEAR_GROUP, FROZEN)
    for op, case in ((OP, CASE), (LORA_ADD, CASE), *groups):
        assert op.bytes(case, "both") == op.bytes(case, "forward") + op.bytes(case, "backward")


@pytest.mark.parametrize("op", [LORA_ADD, LORA_LINEAR_GROUP], ids=lambda op: op.name)
def test_reports_of_other_ops(op, tmp_path):
    """One with a base that was made before, and one with several outputs."""
    case = {"lora_add": CASE, "lora_linear_group": GROUP}[op.name]
    present = {name: op.contenders[name] for name in (op.floor, "naive", "naive again", "torch")}
    measured = Interleaved(op, case, present, CPU)
    for _ in range(2):
        measured.round()
    assert not measured.refused
    results = {"op": op.name, "machine": machine(CPU), "missing": {}, "unmeasured": {}}
    report = Report(results | {"cases": [case_result(op, case, measured)]})
    report.save(tmp_path, "some")
    assert str(case) in (tmp_path / f"{op.name}-some.md").read_text()
    naive = op.contenders["naive"]
    wrong = naive._replace(build=lambda case, *ts: naive.build(case, *ts[:-1], 1.001 * ts[-1]))
    with pytest.raises(AssertionError, match="output"):
        gate(op, case, wrong, op.tensors(case, CPU))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", sorted(OP.contenders))
def test_every_contender_passes_the_gate(name, p):
    case, contender = CASE._replace(p=p), OP.contenders[name]
    if name == OP.floor:
        pytest.skip("the floor has no adapter")
    if reason := contender.unavailable(CPU, case):
        pytest.skip(reason)
    gate(OP, case, contender, OP.tensors(case, CPU))


def wrong_scale(case, x, weight, a, b):
    return lambda: OP.truth(case, x, weight, a, 1.001 * b)


def no_gradient_of_b(case, x, weight, a, b):
    return lambda: OP.truth(case, x, weight, a, b.detach()) + 0 * b.sum()


def no_dropout(case, x, weight, a, b):
    return lambda: OP.truth(case, x, weight, a, b)


def other_mask(case, x, weight, a, b):
    def forward():
        torch.rand(1)
        return OP.contenders["naive"].build(case, x, weight, a, b)()

    return forward


@pytest.mark.parametrize(
    ("build", "p"),
    [(wrong_scale, 0.0), (no_gradient_of_b, 0.0), (no_dropout, 0.5), (other_mask, 0.5)],
)
def test_the_gate_refuses(build, p):
    case = CASE._replace(p=p)
    wrong = OP.contenders["naive"]._replace(build=build)
    with pytest.raises(AssertionError, match=r"output|gradient"):
        gate(OP, case, wrong, OP.tensors(case, CPU))


def raises(case, x, weight, a, b):
    raise RuntimeError("no kernel\nfor this")


def test_a_wrong_contender_is_not_timed():
    wrong = OP.contenders["torch"]._replace(build=wrong_scale)
    broken = OP.contenders["torch"]._replace(build=raises)
    measured = Interleaved(OP, CASE, {**PRESENT, "wrong": wrong, "broken": broken}, CPU)
    assert measured.refused["wrong"].startswith("AssertionError: output: Frobenius error")
    assert measured.refused["broken"] == "RuntimeError: no kernel"
    measured.round()
    assert {name for name, *_ in measured.timed()} == set(PRESENT)


def test_a_time_that_cannot_be_is_not_reported(monkeypatch):
    slow = Chip(1.0, {torch.float32: 1.0})
    monkeypatch.setattr("fused_lora.bench.measure.chip", lambda device: slow)
    measured = Interleaved(OP, CASE, PRESENT, CPU)
    for _ in range(2):
        measured.round()
    measured.check_floors()
    assert {name for name, *_ in measured.timed()} == {"linear"}
    assert "datasheet allows no less" in measured.refused["torch, eager, both"]
    assert measured.ratio("linear", "naive", "eager", "both") is None


class HostGraphs:
    """Cuda's part, played on the host: a captured call is called, its time is given."""

    def __init__(self, seconds=1e-3):
        self.given = seconds

    def on_stream(self):
        return contextlib.nullcontext()

    def capture(self, calls):
        return lambda: [call() for call in calls]

    def seconds(self, replay):
        assert replay()
        return self.given

    def wait(self):
        pass


def test_the_same_function_twice_is_within_its_spread():
    case = LinearCase(64, 128, 128)
    measured = Interleaved(OP, case, PRESENT, CPU)
    for _ in range(60):
        measured.round()
    for direction in DIRECTIONS:
        times, again = (
            Spread.of(measured.seconds(n, "eager", direction)) for n in ("naive", "naive again")
        )
        assert again.p20 <= times.p80 and times.p20 <= again.p80
        assert len(measured.seconds("naive", "eager", direction)) == 60
        assert measured.ratio("naive again", "naive", "eager", direction).p50 == pytest.approx(
            1, abs=0.2
        )


def test_graphs_are_of_every_direction_and_divide_by_their_calls():
    measured = Interleaved(OP, CASE, PRESENT, CPU, graphs=HostGraphs(seconds=0.064))
    measured.round()
    modes = {(mode, direction) for _, mode, direction in measured.timed()}
    assert modes == {(m, d) for m in ("cold", "hot", "eager") for d in DIRECTIONS}
    for name, mode, direction in measured.timed():
        if mode != "eager":
            (seconds,) = measured.seconds(name, mode, direction)
            assert seconds == 0.064 / measured.replays[name, mode, direction][1]


def test_a_contender_that_cannot_be_captured_keeps_its_eager_times():
    class Refusing(HostGraphs):
        def capture(self, calls):
            if len(measured_names) == 3:
                measured_names.append("refused")
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            measured_names.append("captured")
            return super().capture(calls)

    measured_names: list[str] = []
    measured = Interleaved(OP, CASE, PRESENT, CPU, graphs=Refusing())
    assert measured.failed == {
        "linear": "no CUDA graph of backward: operation not permitted when stream is capturing"
    }
    measured.round()
    modes = {mode for name, mode, d in measured.timed() if name == "linear" and d == "both"}
    assert modes == {"eager"}
    assert ("torch", "cold", "both") in measured.timed()


def test_forward_only_contenders_are_timed_forward():
    only = {**PRESENT, "torch": OP.contenders["torch"]._replace(forward_only=True)}
    measured = Interleaved(OP, CASE, only, CPU, graphs=HostGraphs())
    for _ in range(2):
        measured.round()
    assert {d for name, _, d in measured.timed() if name == "torch"} == {"forward"}
    assert measured.memory["torch"].saved == 0
    assert measured.ratio("torch", "naive", "cold", "forward").p50 == 1


def test_saved_memory_is_what_stands_beside_the_inputs():
    case = LinearCase(64, 128, 96, R=4)
    measured = Interleaved(OP, case, PRESENT, CPU)
    h = 4 * 64 * 4
    assert measured.memory["torch"] == (None, h)
    assert measured.memory["naive"].saved >= h
    with_mask = Interleaved(OP, case._replace(p=0.5), PRESENT, CPU)
    assert with_mask.memory["torch"].saved == h + 8  # and the seed
    assert with_mask.memory["naive"].saved > h + 64 * 96


def test_a_time_below_the_floor_is_refused():
    case = LinearCase(8192, 4096, 4096, dtype=torch.bfloat16)
    rates = Chip(4.8e12, {torch.bfloat16: 989e12})
    least = OP.flops(case, "forward") / 989e12
    check_floor(OP, case, "forward", "cold", 1.01 * least, rates)
    with pytest.raises(BelowFloor, match=r"M=8192 .* forward, cold: .* us, where the datasheet"):
        check_floor(OP, case, "forward", "cold", 0.99 * least, rates)
    decode = case._replace(M=1)
    least = OP.bytes(decode, "forward") / 4.8e12
    with pytest.raises(BelowFloor, match="cold"):
        check_floor(OP, decode, "forward", "cold", 0.99 * least, rates)
    # What is in the L2 cache need not come from memory.
    check_floor(OP, decode, "forward", "hot", 0.99 * least, rates)


def known(cases=(CASE,), **p50):
    """Results in which every contender takes 2 ms but those that are named: {name: ms}."""

    def entry(name):
        ms = p50.get(name.replace(" ", "_"), 2.0)
        quantiles = {key: ms / 1e3 for key in ("p20", "p50", "p80")}
        return {**quantiles, "over": {"linear": ms / 2, "naive": ms / 2}, "all": [ms / 1e3] * 3}

    return {
        "op": "lora_linear",
        "machine": machine(CPU),
        "missing": {"peft": "not installed", "triton": "no GPU"},
        "unmeasured": {"M=1": "time"},
        "cases": [
            {
                "label": str(case),
                "case": {**case._asdict(), "dtype": str(case.dtype).removeprefix("torch.")},
                "flops": {d: OP.flops(case, d) for d in DIRECTIONS},
                "bytes": {d: OP.bytes(case, d) for d in DIRECTIONS},
                "times": {name: {"cold": {d: entry(name) for d in DIRECTIONS}} for name in PRESENT},
                "memory": {name: {"saved": 100, "peak": 200} for name in PRESENT},
                "failed": {},
            }
            for case in cases
        ],
    }


def test_report_shows_where_ours_is_slower(tmp_path, capsys):
    results = known()
    results["cases"][0]["times"]["torch"]["cold"]["forward"] |= {
        "p50": 4e-3,
        "over": {"linear": 2.0, "naive": 2.0},
    }
    report = Report(results)
    assert report.noise == 0
    assert [report.slower(*row, "torch") for row in report.rows()] == [True, False, False]
    report.save(tmp_path, "some")
    report.print()
    assert json.loads((tmp_path / "lora_linear-some.json").read_text()) == results
    assert (tmp_path / "lora_linear-some.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "lora_linear-some.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(PRESENT) * len(DIRECTIONS)
    assert {r["over naive"] for r in rows if r["contender"] == "torch"} == {"2.0", "1.0"}
    for text in (capsys.readouterr().out, (tmp_path / "lora_linear-some.md").read_text()):
        assert text.count("SLOWER") == 1 and "2.00 SLOWER" in text
        assert "slower by more than the noise in 1 of 3 rows" in text
        assert "peft was not measured: not installed" in text
        assert "M=1 was not measured: time" in text


def test_noise_is_the_baseline_against_itself():
    results = known(naive_again=2.2, torch=2.1)
    report = Report(results)
    assert report.noise == pytest.approx(0.1)
    assert not any(report.slower(*row, "torch") for row in report.rows())


def test_run_measures_writes_and_says_what_it_left_out(tmp_path, capsys):
    arguments = ["--stage", "cpu-quick", "--out", str(tmp_path), "--case-seconds", "0.05"]
    with torch_threads():
        assert run.main([*arguments, "--only", "torch"]) == 0
    results = json.loads((tmp_path / "lora_linear-cpu-quick.json").read_text())
    times = results["cases"][0]["times"]
    assert set(times) == {"linear", "naive", "naive again", "torch"}
    assert len(times["torch"]["eager"]["both"]["all"]) >= 11
    assert results["machine"]["torch"] == torch.__version__
    with torch_threads():
        assert run.main([*arguments, "--seconds", "0"]) == 0
    left = json.loads((tmp_path / "lora_linear-cpu-quick.json").read_text())
    assert not left["cases"] and len(left["unmeasured"]) == len(OP.stages["cpu-quick"].cases)
    with pytest.raises(SystemExit):
        run.main(["--only", "nobody"])
    assert "no contender nobody" in capsys.readouterr().err


@contextlib.contextmanager
def torch_threads():
    """The number of threads is the process's, and a run sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_wrong_result_fails_a_run_and_has_no_time(monkeypatch, tmp_path, capsys):
    wrong = OP.contenders["torch"]._replace(build=wrong_scale)
    op = OP._replace(contenders={**PRESENT, "torch": wrong}, stages={"cpu": Stage([CASE])})
    monkeypatch.setitem(run.OPS, "lora_linear", op)
    arguments = ["--op", "lora_linear", "--stage", "cpu", "--case-seconds", "0.01"]
    with torch_threads():
        assert run.main([*arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "REFUSED torch (M=6 10x14" in printed.err and "REFUSED torch" in printed.out
    (case,) = json.loads((tmp_path / "lora_linear-cpu.json").read_text())["cases"]
    assert "torch" not in case["times"] and "naive" in case["times"]


def test_what_was_measured_is_kept_when_a_run_is_stopped():
    seen, cases = [], [CASE, CASE._replace(M=7)]
    keep = lambda results: seen.append(len(results["cases"]))  # noqa: E731
    run.measure(OP, Stage(cases), CPU, only=[], case_seconds=0.01, keep=keep)
    assert seen == [1, 2]


def test_merge_keeps_the_last_time_of_a_case():
    first, second = known(torch=1.0), known((CASE, CASE._replace(M=7)), torch=3.0)
    del second["cases"][0]["times"]["naive"]
    whole = merged([first, second])
    assert [c["label"] for c in whole["cases"]] == [str(CASE), str(CASE._replace(M=7))]
    times = whole["cases"][0]["times"]
    assert times["torch"]["cold"]["both"]["p50"] == 3e-3
    assert times["naive"]["cold"]["both"]["p50"] == 2e-3
    assert "all" not in times["torch"]["cold"]["both"]
    other = known()
    other["machine"]["device"] = "another"
    with pytest.raises(ValueError, match="one machine"):
        merged([first, other])


def test_merge_and_render(tmp_path):
    Report(known(torch=1.0)).save(tmp_path / "run", "decode")
    (folder,) = merge([tmp_path / "run"], tmp_path / "bench/results")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/measured.md"):
        (tmp_path / name).write_text(f"before\n{MARKS[0]}\nstale\n{MARKS[1]}\nafter\n")
    render(tmp_path)
    readme, measured = ((tmp_path / n).read_text() for n in ("README.md", "docs/measured.md"))
    for text in (readme, measured):
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
        assert f"bench/results/{folder.name}/lora_linear.md" in text
    assert "| torch | cold | forward | 0.50 | 0.50 |" in readme
    render(tmp_path)
    assert readme == (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="must stand in the file"):
        rendered("no marks", "")


def test_what_is_committed_is_what_the_results_say():
    found = committed()
    assert found
    for path, report in found:
        assert path.with_suffix(".md").read_text() == report.markdown()
        assert path.with_suffix(".csv").read_text() == report.csv()
        assert path.parent.name == slug(report.results["machine"]["device"])
        assert path.with_suffix(".png").exists()
    for path, results in committed_claims():
        module = claims_of(path.name)
        assert path.with_suffix(".md").read_text() == module.markdown(results)
        assert path.parent.name == slug(results["machine"]["device"])
    for name, section in sections().items():
        text = (ROOT / name).read_text()
        assert text == rendered(text, section)


def on_gpu(name, **p50):
    """Results of the cases that the targets look at."""
    shapes = (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)
    cases = [
        LinearCase(M, N, K, p=p, dtype=torch.bfloat16)
        for N, K in shapes
        for M in (1, 8192)
        for p in (0.0, 0.1)
    ]
    results = known(cases, **p50)
    return results | {"machine": results["machine"] | {"device": name}}


def test_targets(tmp_path):
    (tmp_path / "lora_linear-decode.json").write_text(
        json.dumps(on_gpu("NVIDIA H200", torch=2.18, naive=3.0))
    )
    dram = {"contenders": {"torch": {"read": 2**29, "write": 2**28}}}
    (tmp_path / "dram.json").write_text(json.dumps(dram))
    lines = {line.split("  ")[0]: line for line in targets.table(tmp_path).splitlines()}
    assert lines["forward 4096x4096, M >= 2048"].endswith("1.09  met")
    assert lines["forward 14336x4096, M >= 2048"].endswith("1.09  missed by 0.03")
    assert lines["backward 1024x4096, M >= 2048"].endswith("met, and the aim")
    assert "1.38  met, and the aim" in lines["both, speedup over naive, 4096x4096, M = 8192"]
    assert lines["DRAM GiB, both, M = 8192, 4096x4096"].endswith("0.75  missed by 0.05")
    assert lines["dx of q, k and v over three addmm_"].endswith("not measured")
    assert "1.00  met, and the aim" in lines["forward at p = 0.1 over p = 0"]


def test_targets_of_many_adapters(tmp_path):
    case = MultiCase(64, 4096, 4096, G=64, popularity="distinct", dtype=torch.bfloat16)

    def times(microseconds):
        quantiles = {key: microseconds / 1e6 for key in ("p20", "p50", "p80")}
        return {"cold": {"forward": {**quantiles, "over": {}}}}

    over_floor = {
        "NVIDIA H200": "1.34  met",
        "NVIDIA H100 80GB": "0.93  met",
        "A100": "not measured",
    }
    for theirs, gpu in itertools.product(("bgmv form", "vllm"), over_floor):
        results = {**known(), "op": "multi_lora_linear", "missing": {}}
        of = {
            "torch": 20.0,
            "triton": 16.0,
            "bgmv form": 24.0,
            theirs: 24.0 + 8 * (theirs == "vllm"),
        }
        results["cases"] = [
            {
                "label": str(case),
                "case": {**case._asdict(), "dtype": "bfloat16"},
                "flops": {"forward": 1},
                "bytes": {"forward": 1},
                "times": {name: times(us) for name, us in of.items()},
                "memory": {},
                "failed": {},
            }
        ]
        (tmp_path / "multi_lora_linear-decode.json").write_text(json.dumps(results))
        (tmp_path / "lora_linear-quick.json").write_text(json.dumps(on_gpu(gpu)))
        lines = {line.split("  ")[0]: line for line in targets.table(tmp_path).splitlines()}
        line = lines["decode 64 rows of 64 adapters over vLLM's form"]
        assert ("2.00  met" if theirs == "vllm" else "1.50  met") in line
        assert over_floor[gpu] in lines["decode 64 rows of 64 adapters over its floor"]


def test_targets_on_the_route_to_the_gluon_kernel(tmp_path):
    """Of sums: forward with shrink, backward, and dx of q, k and v; by the fastest tile."""

    def row(form, N, K, *parts, **us):
        tiles = {"gluon 1x1x1": 9.0, "gluon 2x2x2": 1.0}
        adapted = {f"with an adapter: {tile}": 1.1 * t for tile, t in tiles.items()}
        us |= {"cublas": 1.0, "with an adapter: cublas, addmm": 1.3, **tiles, **adapted}
        return {"form": form, "M": 8192, "N": N, "K": K, "parts": parts, "us": us}

    times = [row("forward", 14336, 4096), row("forward", 1024, 4096)]
    times += [row("dx", 1024, 4096, backward=1.2), row("dx", 6144, 4096, 4096, 1024, 1024)]
    found = {"machine": {"device": "G"}, "numerics": [], "times": times}
    (tmp_path / "hopper.json").write_text(json.dumps(found))
    lines = {line.split("  ")[0]: line for line in targets.table(tmp_path).splitlines()}
    assert lines["forward 14336x4096, M >= 2048"].endswith("1.10  missed by 0.04")
    assert lines["forward 1024x4096, M >= 2048"].endswith("1.10  met, and the aim")
    assert lines["backward 1024x4096, M >= 2048"].endswith("1.20  met")
    assert lines["backward 4096x4096, M >= 2048"].endswith("not measured")
    assert lines["dx of q, k and v over three addmm_"].endswith("1.18  met")
    assert "on G" in lines


def test_targets_of_groups(tmp_path):
    """dx alone, of q, k and v; what is of another op is not taken for lora_linear's."""
    qkv = GroupCase(8192, 6144, 4096, (4096, 1024, 1024), dtype=torch.bfloat16, trained=False)
    times = {"torch": 1.1, "triton": 1.0, "chained addmm_": 1.27}
    cases = [
        {
            "label": str(case),
            "case": {**case._asdict(), "dtype": "bfloat16"},
            "flops": {"backward": 1},
            "bytes": {"backward": 1},
            "times": {
                name: {"cold": {"backward": {"p50": slower * ms / 1e3, "over": {}}}}
                for name, ms in times.items()
            },
            "memory": {},
            "failed": {},
        }
        for case, slower in (
            (qkv, 1), (qkv._replace(M=2048), 1), (qkv._replace(trained=True), 9),
            (qkv._replace(widths=(3072, 3072)), 9), (qkv._replace(p=0.1), 9),
        )
    ]  # fmt: skip
    cases[1]["times"]["triton"]["cold"]["backward"]["p50"] = 1.02e-3
    cases[2]["times"]["triton"]["cold"]["backward"]["p50"] = 9.0
    results = {**known(), "op": "lora_linear_group", "cases": cases, "missing": {}}
    (tmp_path / "lora_linear_group-training.json").write_text(json.dumps(results))
    found = targets.load(tmp_path)
    assert found.report is None and len(found.group.cases) == 5
    lines = {line.split("  ")[0]: line for line in targets.table(tmp_path).splitlines()}
    line = lines["dx of q, k and v over three addmm_"]
    assert line.endswith("    1.15    1.25  met")  # the slower of the two cases of triton


def test_targets_of_nothing_are_not_measured(tmp_path):
    lines = targets.table(tmp_path).splitlines()
    assert len(lines) == len(targets.TARGETS) + 2
    assert all(line.endswith("not measured") for line in lines[1:-1])
    assert lines[-1] == f"{len(targets.TARGETS)} not measured"


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_graphs_on_a_gpu():
    device = torch.device("cuda")
    present = PRESENT | {"triton": OP.contenders["triton"]}
    case = LinearCase(64, 256, 256, p=0.1, dtype=torch.bfloat16)
    measured = Interleaved(OP, case, present, device, graphs=Cuda())
    measured.round()
    assert not measured.failed
    assert {mode for _, mode, _ in measured.timed()} == {"cold", "hot", "eager"}
    assert all(0 < measured.seconds(*key)[0] < 60e-3 for key in measured.timed())
    assert all(memory.peak > 0 for memory in measured.memory.values())
