"""The snippets of the README run, and say what it says they say."""

import ast
import re
from pathlib import Path

import pytest
import torch

import fused_lora as fl
from fused_lora import _extension

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_quickstart():
    code = re.search(r"## Quickstart\n\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    model = names["model"]
    assert all(layer.merged for layer in model.modules() if isinstance(layer, fl.nn.LoRALinear))


def test_a_group_and_a_base_made_elsewhere():
    code = re.search(r"```python\n(q, k, v = .*?)```", README, re.DOTALL).group(1)
    x, base_out, lora_a, lora_b = (torch.randn(s) for s in ((3, 8), (3, 5), (2, 8), (5, 2)))
    wq, wk, wv = torch.randn(3, 5, 8)
    names = {"x": x, "base_out": base_out, "lora_a": lora_a, "lora_b": lora_b, "fl": fl, "r": 2}
    names |= {"wq": wq, "wk": wk, "wv": wv, "aq": lora_a, "bq": lora_b, "av": lora_a, "bv": lora_b}
    names |= {"alpha": 4, "quantised_linear": torch.nn.Linear(8, 5)}
    exec(compile(code, "README.md", "exec"), names)
    torch.testing.assert_close(names["k"], x @ wk.t())
    torch.testing.assert_close(names["y"], base_out + 2 * x @ lora_a.t() @ lora_b.t())
    assert names["layer"](x).shape == (3, 5)


def test_sora():
    code = re.search(r"## SoRA.*?```python\n(.*?)```", README, re.DOTALL).group(1)
    model, data = (
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)),
        torch.ones(2, 8),
    )

    def train(model, optimizer):
        model(data).square().mean().backward()
        optimizer.step()

    names = {"torch": torch, "fl": fl, "model": model, "train": train, "step": 0}
    exec(compile(code, "README.md", "exec"), names | {"evaluate": lambda model: 0.0})
    assert {type(layer) for layer in model} == {fl.nn.LoRALinear}


def test_the_dept_of_the_readme_runs():
    transformers = pytest.importorskip("transformers")
    (code,) = re.findall(r"```python\n(r = fl\.nn\.dept_rank.*?)```", README, re.DOTALL)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=80, decoder_start_token_id=0, **sizes)
    names = {"torch": torch, "fl": fl, "t5": transformers.T5ForConditionalGeneration(config)}
    exec(compile(code, "README.md", "exec"), names)
    assert names["r"] == 30
    ids = torch.randint(1, 80, (2, 5))
    names["model"](input_ids=ids, labels=ids).loss.backward()
    names["optimizer"].step()


def test_what_the_readme_says_of_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FUSED_LORA_EMULATED", raising=False)
    monkeypatch.setattr(_extension, "why_missing", lambda: None)
    said = ast.literal_eval(
        re.search(r">>> fl\.why.*?\n(\{.*?\})\n```", README, re.DOTALL).group(1)
    )
    x, weight, lora_a, lora_b = (torch.randn(s) for s in ((4, 6), (5, 6), (2, 6), (5, 2)))
    reasons = fl.why("lora_linear", x, weight, lora_a, lora_b, scale=2.0)
    assert reasons == said and next(iter(reasons)) == next(iter(said))


def test_every_public_name_has_a_docstring():
    for name in fl.__all__:
        assert getattr(fl, name).__doc__, name
