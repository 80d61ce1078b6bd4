"""What the gates of a model say: rows, sums by kind, curves, the table and the picture."""

import json

import pytest
import torch
from conftest import DEVICE
from torch.nn import Linear, Module, ModuleList

import fused_lora as fl
from fused_lora.optim import GateLog, prune
from fused_lora.optim.gates import block_of, by_kind, gate_counts, kind_of

SIZES = {"q_proj": (8, 8), "v_proj": (8, 4), "o_proj": (8, 8), "up_proj": (8, 16)}


class Block(Module):
    def __init__(self):
        super().__init__()
        for name, (k, n) in SIZES.items():
            setattr(self, name, Linear(k, n))


def build(blocks=3):
    model = Module()
    model.layers = ModuleList(Block() for _ in range(blocks))
    model.to(DEVICE)
    return fl.inject(model, fl.LoRAConfig(r=4, target_modules=list(SIZES), gate=True))


def close(model, kind, count):
    """Zero the first `count` gates of the layers of that name."""
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name.endswith(kind):
                layer.gate[:count] = 0


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    (
        ("model.layers.11.self_attn.q_proj", "q", 11),
        ("deberta.encoder.layer.2.attention.self.value_proj", "v", 2),
        ("bert.encoder.layer.0.attention.output.dense", "o", 0),
        ("bert.encoder.layer.0.intermediate.dense", "up", 0),
        ("bert.encoder.layer.7.output.dense", "down", 7),
        ("transformer.h.3.attn.c_proj", "o", 3),
        ("transformer.h.3.mlp.c_proj", "down", 3),
        ("transformer.h.3.attn.c_attn", "qkv", 3),
        ("encoder.block.1.layer.1.DenseReluDense.wo", "down", 1),
        ("decoder.block.1.layer.0.SelfAttention.o", "o", 1),
        ("layers.4.feed_forward.w1", "gate", 4),
        ("layers.4.feed_forward.w2", "down", 4),
        ("layers.4.attention.wo", "o", 4),
        ("classifier", "classifier", None),
        ("q", "q", None),
    ),
)
def test_kinds_and_blocks(name, kind, block):
    assert kind_of(name) == kind and block_of(name) == block


def test_rows_sums_and_curves():
    model = build()
    log = GateLog(model)
    assert {row["kept"] for row in log.rows()} == {4} and log.curves()["all"] == []
    log.record(0)
    close(model, "q_proj", 4)
    close(model, "up_proj", 1)
    record = log.record(10)
    assert record["kept"]["layers.2.q_proj"] == 0 and record["sparsity"] == 15 / 48
    assert record["parameters"] == fl.optim.kept_parameters(model)
    assert log.rows()[3] == {
        "layer": "layers.0.up_proj", "kind": "up", "block": 0, "rank": 4, "kept": 3,
        "parameters": 3 * 25,
    }  # fmt: skip
    groups = by_kind(log.rows())
    assert [g["kind"] for g in groups] == ["q", "v", "o", "up", "all"]
    assert [g["sparsity"] for g in groups] == [1, 0, 0, 0.25, 15 / 48]
    assert groups[-1] == {
        "kind": "all", "layers": 12, "rank": 48, "kept": 33, "parameters": record["parameters"],
        "sparsity": 15 / 48,
    }  # fmt: skip
    assert log.curves()["q"] == [(0, 0.0), (10, 1.0)]
    assert log.curves()["all"] == [(0, 0.0), (10, 15 / 48)]
    assert json.loads(json.dumps(log.history)) == log.history


def test_layers_that_pruning_takes_away_count_as_closed():
    model = build()
    log = GateLog(model)
    close(model, "q_proj", 4)
    before = log.record(1)
    prune(model, keep_gates=True)
    assert {**log.record(2), "step": 1} == before


def test_a_record_reads_one_tensor(monkeypatch):
    """One wait for the device, however many gates there are."""
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        was = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, was=was, name=name: reads.append(name) or was(t)
        )
    assert len(gate_counts(build())) == 12 and reads == ["tolist"]


def test_the_table():
    console = pytest.importorskip("rich.console").Console(width=100)
    model = build()
    log = GateLog(model)
    for step in (None, 50):
        if step is not None:
            close(model, "o_proj", 3)
            log.record(step)
        with console.capture() as capture:
            console.print(log.table())
    text = capture.get()
    assert "Gates, step 50" in text
    row = next(line for line in text.splitlines() if line.startswith("│ o "))
    cells = [cell.strip() for cell in row.split("│")]
    assert cells[1:6] == ["o", "3", "1.0 of 4.0", "75%", "51"] and cells[6] == "█" * 5


def test_live():
    pytest.importorskip("rich.live")
    log = GateLog(build())
    with log.live() as live:
        log.record(3)
        assert live.get_renderable().title == "Gates, step 3"


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    model = build()
    log = GateLog(model)
    for step in range(3):
        close(model, "q_proj", step)
        log.record(100 * step)
    figure = log.plot(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    curves, ranks = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in curves.lines}
    assert list(lines["q"]) == [0, 25, 50] and list(lines["all"]) == [0, 6.25, 12.5]
    assert [t.get_text() for t in ranks.get_xticklabels()] == ["q", "v", "o", "up"]
    assert [t.get_text() for t in ranks.texts[:4]] == ["2", "4", "4", "4"]
    # Without blocks, and with two layers in one place.
    single = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": Linear(4, 4)}), "q": Linear(4, 4)})
    fl.inject(single, fl.LoRAConfig(r=2, target_modules=["q"], gate=True))
    with torch.no_grad():
        single["q"].gate[0] = 0
    log = GateLog(single)
    log.record(0)
    assert [t.get_text() for t in log.plot().axes[1].texts] == ["1.5"]


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        GateLog({})
    with pytest.raises(ValueError, match="model has no SoRALinear"):
        GateLog(Linear(2, 2))
