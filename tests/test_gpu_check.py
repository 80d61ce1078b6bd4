"""bench/gpu_check.sh, with programs in place of a GPU: its stages, its time and what it keeps."""

import importlib.util
import json
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench/gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)
STAGES = [stage.name for stage in gpu_check.plan(gpu_check.Machine(), Path("OUT"))]


def check(*arguments, **env) -> subprocess.CompletedProcess:
    command = [str(ROOT / "bench/gpu_check.sh"), *map(str, arguments)]
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=path | env, timeout=120)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs main with a python and tools that write down how they were called.

    `broken`: what fails when it is in the command line; `slow`: what does not end.
    """

    def run(*arguments, broken="nothing", slow="nothing", gpu="NVIDIA H200", capability=(9, 0)):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        answer = json.dumps({"name": gpu, "capability": capability, "xdist": True})
        script = f'''#!/bin/bash
echo "$(basename "$0") $*" >> {tmp_path}/calls
if [[ $1 == -c ]]; then
    [[ "{broken}" == GPU ]] && {{ echo "torch sees no CUDA device" >&2; exit 1; }}
    echo '{answer}'
    exit
fi
out=
for ((i = 1; i <= $#; i++)); do
    [[ ${{!i}} == --out ]] && {{ i=$((i + 1)); out=${{!i}}; }}
done
[[ -z $out || $out == *.json ]] || {{ mkdir -p "$out"; echo '{{}}' > "$out/x.json"; }}
[[ "$*" == *"{slow}"* ]] && sleep 600
[[ "$*" == *"{broken}"* ]] && exit 3
echo "said by $*"
'''
        for name in ("python", "make", "nvidia-smi", "nvcc", "compute-sanitizer"):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setattr(gpu_check, "PYTHON", str(folder / "python"))
        return gpu_check.main([*map(str, arguments)])

    return run


def calls(tmp_path) -> str:
    return (tmp_path / "calls").read_text()


def test_the_plan_names_every_stage_with_its_time(tmp_path):
    found = check("--dry-run", "--minutes", 10, tmp_path / "out")
    assert found.returncode == 0, found.stderr
    rows = re.findall(r"^ *(\d+) s +(\d+) s +(\d+) s  (\S+) +(.*)$", found.stdout, re.M)
    assert [row[3] for row in rows] == STAGES
    for _, predicted, cut, _, tells in rows:
        assert 0 < int(predicted) < int(cut) <= 600 and tells
    now = [row for row in rows if "in a further call" not in row[4]]
    assert sum(int(row[1]) for row in now) <= 600 - gpu_check.REPORT_SECONDS
    # What is right comes before what is fast, and the verdict on the GEMMs is in the first call.
    assert {"right-gemm-cuda", "right-decode", "right-many", "bare-gemm"} <= {r[3] for r in now}
    assert not (tmp_path / "out").exists()


def test_what_the_plan_names_exists():
    commands = [
        " ".join(command.argv)
        for stage in gpu_check.plan(gpu_check.Machine(), Path("OUT"))
        for command in stage.commands
    ]
    files = set(re.findall(r"tests/test_\w+\.py", " ".join(commands)))
    assert len(files) >= 12 and all((ROOT / name).exists() for name in files)
    for command in commands:
        if word := re.search(r" -k (\w+)", command):
            named = re.findall(r"tests/test_\w+\.py", command)
            assert any(
                re.search(rf"def test_\w*{word[1]}", (ROOT / name).read_text()) for name in named
            ), command
    modules = set(re.findall(r"fused_lora\.bench\.(\w+)", " ".join(commands)))
    assert len(modules) >= 7 and all((ROOT / f"bench/{name}.py").exists() for name in modules)
    from fused_lora.bench.registry import OPS

    stages = re.findall(r"--op (\w+) --stage ([\w-]+)", " ".join(commands))
    assert len(stages) >= 10 and all(stage in OPS[op].stages for op, stage in stages)


def test_what_a_stage_says_and_measures_is_kept(tmp_path, fake, capsys):
    assert fake("--archive", tmp_path / "all.tar.gz", tmp_path / "out") == 0
    out = tmp_path / "out/nvidia-h200"
    kept = {path.name for path in out.iterdir() if path.is_file()}
    assert kept == {*(f"{stage}.log" for stage in STAGES), "state.json", "summary.txt", "x.json"}
    state = json.loads((out / "state.json").read_text())
    assert [*state] == STAGES and {one["status"] for one in state.values()} == {"passed"}
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        assert {f"nvidia-h200/{name}" for name in kept} <= set(tar.getnames())
    for tool in gpu_check.TOOLS:
        assert f"compute-sanitizer --tool {tool} --error-exitcode 9" in calls(tmp_path)
    # The GPU is looked at and left as it is.
    assert re.findall(r"^nvidia-smi.*", calls(tmp_path), re.M) == ["nvidia-smi "]
    assert "NVIDIA H200" in capsys.readouterr().out


def test_a_further_call_goes_on(tmp_path, fake):
    out = tmp_path / "out"
    chosen = "right-shrink", "right-decode", "right-row-reduce"
    assert fake(out, *chosen, broken="test_shrink") == 1
    (tmp_path / "calls").unlink()
    assert fake(out) == 0
    again = calls(tmp_path)
    assert "tests/test_shrink.py" in again and "extension" in again
    assert "tests/test_row_reduce.py" not in again and "test_gpu.py -k decoding" not in again
    (tmp_path / "calls").unlink()
    assert fake(out, "right-row-reduce") == 0
    assert "tests/test_row_reduce.py" in calls(tmp_path)


def test_gpus_are_told_apart(tmp_path, fake):
    fake(tmp_path / "out", "right-shrink")
    fake(tmp_path / "out", "right-shrink", gpu="NVIDIA H100 80GB HBM3", broken="test_shrink")
    statuses = {
        path.name: json.loads((path / "state.json").read_text())["right-shrink"]["status"]
        for path in (tmp_path / "out").iterdir()
    }
    assert statuses == {"nvidia-h200": "passed", "nvidia-h100-80gb-hbm3": "failed"}


def test_other_gpus_have_no_stages_for_hopper(tmp_path, fake):
    fake(tmp_path / "out", gpu="NVIDIA A100", capability=(8, 0))
    assert not re.search(r"bench\.(hopper|bare)", calls(tmp_path))
    assert "tests/test_shrink.py" in calls(tmp_path)


def test_a_failed_stage_is_named_and_stops_no_other(tmp_path, fake, capsys):
    assert fake(tmp_path / "out", "repeat", "dram", "steps", broken="bench.dram") == 1
    said = capsys.readouterr().out
    assert re.search(r"^failed +dram .*exit 3: ", said, re.M) and said.count("exit 3") == 2
    assert "bench.step" in calls(tmp_path)


def test_a_stage_that_overruns_is_cut_and_said_so(tmp_path, fake, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check.Stage, "limit", property(lambda stage: 2))
    assert fake(tmp_path / "out", "dram", "steps", slow="bench.dram") == 1
    said = capsys.readouterr().out
    assert re.search(r"^cut +dram .* 120 predicted.*not done after 2 s", said, re.M)
    assert "bench.step" in calls(tmp_path)
    state = json.loads((tmp_path / "out/nvidia-h200/state.json").read_text())
    assert state["dram"]["seconds"] < 60
    # The next call gives it twice the time.
    fake(tmp_path / "out", "dram")
    state = json.loads((tmp_path / "out/nvidia-h200/state.json").read_text())
    assert state["dram"] | {"seconds": 0, "commit": ""} == {
        "status": "passed", "why": "", "seconds": 0, "predicted": 120, "limit": 4, "commit": "",
    }  # fmt: skip


def test_what_no_longer_fits_is_left_for_the_next_call(tmp_path, fake, capsys):
    assert fake("--minutes", 1.2, tmp_path / "out", "grid", "right-shrink") == 0
    assert "bench.run" not in calls(tmp_path) and "tests/test_shrink.py" in calls(tmp_path)
    assert re.search(r"^- +grid +not run; 400 s predicted", capsys.readouterr().out, re.M)


def test_without_a_gpu_nothing_begins(tmp_path, fake, capsys):
    assert fake(tmp_path / "out", broken="GPU") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert "pytest" not in calls(tmp_path) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: OUT"),
        (["out", "warm"], "no stage warm"),
        (["--minutes", "0", "out"], "--minutes must be positive, got 0"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = check(*arguments)
    assert found.returncode == 2 and message in found.stderr
    assert not (tmp_path / "out").exists()


def test_it_can_be_started():
    assert (ROOT / "bench/gpu_check.sh").stat().st_mode & stat.S_IXUSR


def test_verdicts_on_the_bare_gemms():
    """A kernel is a go by its best tile of each case, and by its worst case."""
    from fused_lora.bench import bare

    def row(**us):
        return {"case": "forward", "us": {"cublas": 96.0, **us}, "wrong": {}}

    rows = [
        row(**{"gluon 1x1x1": 200.0, "gluon 2x2x2": 100.0, "cuda sm90 128x128": 96.0}),
        row(**{"gluon 1x1x1": 90.0, "cuda sm90 128x128": 101.0, "triton": 120.0}),
    ]
    lines = bare.table(rows, "NVIDIA H100 80GB HBM3").splitlines()
    assert lines[0].endswith("NVIDIA H100 80GB HBM3")
    assert lines[2].split()[-4:] == ["0.960", "1.000", "-", "-"]
    assert lines[-4:] == [
        "gluon: GO, worst 0.960 of 2 cases",
        "cuda sm90: NO GO, worst 0.950 of 2 cases",
        "triton: NO GO, worst 0.800 of 1 cases",
        "cuda sm80: not measured",
    ]
    assert len(bare.cases()) == 16
