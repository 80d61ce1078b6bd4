"""bench/gpu_check.sh, with programs in place of a GPU: its stages, its time and what it keeps."""

import re
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = re.search(r"stages=\(([^)]*)\)", (ROOT / "bench/gpu_check.sh").read_text())[1].split()


def check(*arguments, **env) -> subprocess.CompletedProcess:
    command = [str(ROOT / "bench/gpu_check.sh"), *map(str, arguments)]
    path = {"PATH": env.pop("PATH", "/usr/bin:/bin")}
    return subprocess.run(command, capture_output=True, text=True, env=path | env, timeout=120)


@pytest.fixture
def fake(tmp_path):
    """A python and tools that write down how they were called; those of `broken` fail."""

    def made(broken: str = "nothing fails") -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        script = f'''#!/bin/bash
echo "$(basename "$0") $*" >> {tmp_path}/calls
for ((i = 1; i <= $#; i++)); do
    [[ ${{!i}} == --out ]] || continue
    i=$((i + 1))
    mkdir -p "${{!i}}"
    echo '{{}}' > "${{!i}}/x.json"
done
[[ "$*" == *"{broken}"* ]] && exit 3
echo "said by $*"
'''
        for name in ("python", "make", "nvidia-smi", "nvcc", "compute-sanitizer"):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:/usr/bin:/bin", "PYTHON": str(folder / "python")}

    return made


def test_all_stages_are_listed_and_end_in_time(tmp_path):
    found = check("--dry-run", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert list(dict.fromkeys(line.split(":")[0] for line in lines)) == STAGES
    spent = dict.fromkeys(STAGES, 0)
    for line in lines:
        if limit := re.match(r"([\w-]+): timeout (\d+) ", line):
            spent[limit[1]] += int(limit[2])
    assert all(0 < seconds <= 480 for stage, seconds in spent.items() if stage != "report")
    assert not list((tmp_path / "out").iterdir())


def test_every_test_file_of_the_numeric_suite_exists(tmp_path):
    files = re.findall(r"tests/test_\w+\.py", check("--dry-run", tmp_path / "out").stdout)
    assert len(set(files)) >= 12
    assert all((ROOT / name).exists() for name in files)


def test_what_a_stage_says_and_measures_is_kept(tmp_path, fake):
    found = check(tmp_path / "out", **fake())
    assert found.returncode == 0, found.stdout + found.stderr
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    logs = {f"{stage}.log" for stage in STAGES if stage != "report"}
    assert kept == logs | {"x.json", "machine.txt", "targets.txt", "tuning.json"}
    assert found.stdout.rstrip().endswith(f"fused_lora.bench.report targets {tmp_path}/out")
    calls = (tmp_path / "calls").read_text()
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"compute-sanitizer --tool {tool} --error-exitcode 9" in calls
    # The GPU is looked at and left as it is.
    assert re.findall(r"^nvidia-smi.*", calls, re.M) == ["nvidia-smi "]


def test_a_failed_stage_is_named_and_stops_no_other(tmp_path, fake):
    found = check(tmp_path / "out", "determinism", "dram", "steps", **fake("bench.dram"))
    assert found.returncode == 1
    assert "FAILED: dram (exit 3: " in found.stderr and found.stderr.count("FAILED") == 1
    assert "bench.step" in (tmp_path / "calls").read_text()
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"steps.log", "x.json"}


def test_without_a_gpu_nothing_begins(tmp_path, fake):
    found = check(tmp_path / "out", "correct", **fake("torch.cuda.is_available"))
    assert found.returncode == 2 and "torch sees no CUDA device" in found.stderr
    assert "pytest" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [([], "usage: "), (["--help"], "usage: "), (["out", "warm"], "no stage warm\nusage: ")],
)
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = check(*arguments)
    assert found.returncode == 2 and found.stderr.startswith(message)
    assert all(stage in found.stderr for stage in STAGES)


def test_it_can_be_started():
    assert (ROOT / "bench/gpu_check.sh").stat().st_mode & stat.S_IXUSR
