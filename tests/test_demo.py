"""The demo runs from end to end; a check that does not hold ends in an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).parents[1] / "examples"


def quick(folder, *python):
    command = [sys.executable, *(python or ["demo.py"]), "--quick", "--device", "cpu"]
    env = {**os.environ, "TRITON_INTERPRET": "0", "FUSED_LORA_EMULATED": ""}
    return subprocess.run(
        [*command, "--out", folder], cwd=EXAMPLES, env=env, capture_output=True, text=True
    )


def test_demo(tmp_path):
    run = quick(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "demo.json").read_text())
    assert results["checks"] and all(check["holds"] for check in results["checks"])
    methods = results["methods"]
    assert {"full fine-tuning", "LoRA, naive", "LoRA, fused_lora (torch)"} < set(methods)
    for name, method in methods.items():
        assert method["after"] < method["before"], name
        assert method["tokens_per_s"] > 0
    full, lora = methods["full fine-tuning"], methods["LoRA, fused_lora (torch)"]
    # AdamW keeps two floats a parameter (and a step a tensor), the gradient is one.
    assert full["gradient_bytes"] == 4 * full["trainable"]
    assert 2 * lora["gradient_bytes"] < lora["optimizer_bytes"] < 0.5 * full["optimizer_bytes"]
    for name, base, alone, mixed in results["mixed"][1:]:
        assert mixed < base and abs(mixed - alone) < 1e-4 * alone, name
    assert len(results["mixed"]) == 4
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for name in methods:
        assert name in (tmp_path / "demo.md").read_text()
        assert name in run.stdout


@pytest.mark.slow
def test_a_check_that_fails_is_an_error(tmp_path):
    """The fused layers get twice their scale; the curves part, and the demo says so."""
    code = (
        "import fused_lora as fl, demo\n"
        "fused = fl.nn.LoRALinear.forward\n"
        "def forward(self, x):\n"
        "    y = fused(self, x)\n"
        "    return y if self.merged else 2 * y - x @ self.weight.T\n"
        "fl.nn.LoRALinear.forward = forward\n"
        "raise SystemExit(demo.main())"
    )
    run = quick(tmp_path, "-c", code)
    assert run.returncode == 1, run.stdout + run.stderr
    failed = [
        c["what"]
        for c in json.loads((tmp_path / "demo.json").read_text())["checks"]
        if not c["holds"]
    ]
    assert any("training loss" in what for what in failed)
