"""The examples run from end to end, offline; a check of theirs that does not hold ends in an
error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("transformers", "accelerate"):
    pytest.importorskip(package)
EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*arguments):
    """The lines that a script printed, without those of Trainer."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "FUSED_LORA_EMULATED": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=EXAMPLES, env=env, capture_output=True, text=True
    )
    return done, [line for line in done.stdout.splitlines() if not line.startswith("{")]


def test_finetune_llama(tmp_path):
    steps = "--pretrain-steps", "40", "--steps", "20"
    done, lines = run("finetune_llama.py", "--out", tmp_path, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0].startswith("from scratch, on Python: ")
    assert lines[1].startswith("adapter: ") and "parameters trained" in lines[1]
    assert lines[2].startswith("read back: equal")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    done, lines = run(  # of a model that is there
        "finetune_llama.py", "--out", tmp_path / "again", "--model", tmp_path / "base", *steps
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "again" / "base").exists()


def test_serve_adapters(tmp_path):
    steps = "--pretrain-steps", "40", "--steps", "20", "--new", "12"
    done, lines = run("serve_adapters.py", "--out", tmp_path, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in lines if "as alone" in line]
    assert [line.split(":")[0] for line in said] == ["base", "prose", "names", "codecs"]
    assert all(": as alone: " in line for line in said)


def test_a_row_with_another_adapter_is_an_error(tmp_path):
    """Rows get their neighbours' adapters: the check sees it."""
    code = (
        "import fused_lora as fl, serve_adapters\n"
        "ids = fl.AdapterStore.ids\n"
        "fl.AdapterStore.ids = lambda self, names: ids(self, names).roll(1)\n"
        "raise SystemExit(serve_adapters.main())"
    )
    steps = "--pretrain-steps", "40", "--steps", "20", "--new", "12"
    done, lines = run("-c", code, "--out", tmp_path, *steps)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any("NOT as alone" in line for line in lines)
