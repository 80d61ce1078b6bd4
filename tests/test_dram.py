"""bench/dram.py reads what ncu prints."""

import json
import os
import stat

import pytest
import torch
from fused_lora.bench import dram
from fused_lora.bench.registry import LORA_LINEAR, LinearCase

READ, WRITE = dram.METRICS.values()
PRINTED = f'''==PROF== Connected to process 17
==PROF== Profiling "gemm" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 17
"ID","Process Name","Kernel Name","Context","{READ}","{WRITE}"
"","","","","byte","byte"
"0","python3","void gemm<float, 2>(int, float*)","1","1,073,741,824","536870912"
"1","python3","shrink_kernel","1","1024.000000","0"
'''


def test_every_kernel_is_read():
    assert dram.parse(PRINTED) == [
        {"kernel": "void gemm<float, 2>(int, float*)", "read": 2**30, "write": 2**29},
        {"kernel": "shrink_kernel", "read": 1024, "write": 0},
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "ncu printed no table: nothing at all"),
        ("==ERROR== ERR_NVGPUCTRPERM\n", "ncu printed no table: ==ERROR== ERR_NVGPUCTRPERM"),
        (PRINTED.replace('"byte","byte"', '"Mbyte","byte"'), "must be in byte, got 'Mbyte'"),
        (PRINTED.replace(WRITE, "other"), "must be in byte, got None"),
        ("\n".join(PRINTED.splitlines()[:5]), "ncu saw no kernel"),
    ],
    ids=["nothing", "no permission", "other units", "no metric", "no kernel"],
)
def test_what_is_no_measurement_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        dram.parse(text)


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    """An ncu that prints the table, but for the contender "naive"."""
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    (program.parent / "table").write_text(PRINTED)
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *naive) echo denied >&2; exit 9;; esac\n'
        f'echo "$@" >> {program.parent}/calls\ncat {program.parent}/table\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dram, "machine", lambda device: {"device": "a GPU"})
    return program.parent / "calls"


def test_one_run_a_contender_into_one_file(fake_ncu, tmp_path, capsys):
    assert dram.main(["--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "dram.json").read_text())
    assert set(found["contenders"]) == set(dram.CONTENDERS) - {"naive"}
    assert found["contenders"]["torch"]["read"] == 2**30 + 1024
    assert found["contenders"]["torch"]["write"] == 2**29
    assert found["failed"] == ["naive: ncu printed no table: nothing at all; denied"]
    printed = capsys.readouterr()
    assert "naive: ncu printed no table" in printed.err
    assert "1.000    0.500    1.500         2" in printed.out
    for line in fake_ncu.read_text().splitlines():
        assert f"--metrics={READ},{WRITE}" in line and "--profile-from-start=off" in line
        assert "--clock-control=none" in line and "fused_lora.bench.dram --run" in line


def test_contenders_exist_and_the_case_is_the_one_of_the_target():
    assert set(dram.CONTENDERS) <= set(LORA_LINEAR.contenders)
    assert LinearCase(8192, 4096, 4096, dtype=torch.bfloat16) == dram.CASE
    least = LORA_LINEAR.bytes(dram.CASE, "both") / 2**30
    assert 0.37 < least < 0.45


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        dram.main([])
    assert stopped.value.code == 2 and "sees no CUDA device" in capsys.readouterr().err
