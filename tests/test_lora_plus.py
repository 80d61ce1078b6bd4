"""Parameter groups of LoRA+: which parameter learns how fast."""

import math

import pytest
import torch
from torch.nn import Linear, Parameter

import fused_lora as fl
from fused_lora.nn import SoRALinear
from fused_lora.optim import SoRA


class Embedded(torch.nn.Module):
    """One of everything: adapters of linear layers, gates, an adapter of an embedding, a head."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 8)
        self.embed.lora_a = Parameter(torch.zeros(2, 5))
        self.embed.lora_b = Parameter(torch.zeros(8, 2))
        self.plain = fl.nn.LoRALinear(8, 8, r=2)
        self.plain.bias.requires_grad_(True)
        self.gated = SoRALinear(8, 8, r=2)
        self.again = self.gated
        self.norm = torch.nn.LayerNorm(8)
        self.head = Linear(8, 3)
        self.embed.weight.requires_grad_(False)


def test_lora_plus_groups():
    model = Embedded()
    groups = fl.optim.lora_plus_groups(model, lr=0.1, ratio=4, weight_decay=0.2, embedding_lr=0.03)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        g["name"]: (sorted(names[id(p)] for p in g["params"]), g["lr"], g["weight_decay"])
        for g in groups
    }
    assert found == {
        "A": (["gated.lora_a", "plain.lora_a"], 0.1, 0.2),
        "B": (["gated.lora_b", "plain.lora_b"], 0.4, 0.2),
        "embeddings": (["embed.lora_a", "embed.lora_b"], 0.03, 0.2),
        "rest": (["head.weight"], 0.1, 0.2),
        "1-d": (["head.bias", "norm.bias", "norm.weight", "plain.bias"], 0.1, 0.0),
    }
    gates = list(fl.optim.named_gates(model).values())
    assert len(gates) == 1
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} | set(map(id, gates)) == trained

    # They drive an optimizer, under SoRA as well: with plain steps B moves `ratio` times as far.
    optimizer = SoRA(torch.optim.SGD(groups), gates, lr=0.1, sparsity=1.0)
    before = [p.detach().clone() for p in (model.plain.lora_a, model.plain.lora_b)]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for group in groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    torch.testing.assert_close(before[0] - model.plain.lora_a, torch.full((2, 8), 0.1))
    torch.testing.assert_close(before[1] - model.plain.lora_b, torch.full((8, 2), 0.4))


def test_lora_plus_groups_without_a_rate_of_embeddings():
    groups = fl.optim.lora_plus_groups(Embedded(), lr=0.1, embedding_lr=None)
    assert [(g["name"], len(g["params"]), g["lr"]) for g in groups] == [
        ("A", 3, 0.1),
        ("B", 3, 1.6),
        ("rest", 1, 0.1),
        ("1-d", 4, 0.1),
    ]
    layer = fl.nn.LoRALinear(4, 4, r=2)
    assert [g["name"] for g in fl.optim.lora_plus_groups(layer, lr=0.1)] == ["A", "B"]


def test_lora_plus_groups_are_those_of_peft_for_adapters():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    def build():
        return torch.nn.Sequential(Linear(8, 8), torch.nn.Embedding(4, 8))

    config = {"r": 2, "lora_alpha": 4, "target_modules": ["0"]}
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**config))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=5, loraplus_weight_decay=0.3
    )
    want = [
        (g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]])
        for g in optimizer.param_groups
        if g["params"]
    ]
    model = fl.inject(build(), fl.LoRAConfig(**config))
    got = fl.optim.lora_plus_groups(model, lr=0.1, ratio=5, weight_decay=0.3)
    assert [
        (g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in got
    ] == want


@pytest.mark.parametrize(
    ("error", "change", "words"),
    (
        (TypeError, {"model": [1]}, "model must be a torch.nn.Module, got list"),
        (ValueError, {"model": Linear(2, 2)}, "model has no lora_a or lora_b that requires"),
        (ValueError, {"lr": -1}, "lr must be at least 0, got -1"),
        (ValueError, {"ratio": math.nan}, "ratio must be finite"),
        (TypeError, {"weight_decay": None}, "weight_decay must be a number"),
        (ValueError, {"embedding_lr": -0.5}, "embedding_lr must be at least 0, got -0.5"),
    ),
)
def test_bad_lora_plus_groups(error, change, words):
    values = {"model": fl.nn.LoRALinear(4, 4), "lr": 0.1, **change}
    with pytest.raises(error, match=words):
        fl.optim.lora_plus_groups(values.pop("model"), **values)
