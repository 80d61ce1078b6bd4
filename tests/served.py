"""Served models small enough to see whose adapter a row had."""

import torch
from conftest import DEVICE

import fused_lora as fl
from fused_lora.checkpoint import AdapterWeights

K = 8


def adding(value: float, layers=("0",), K: int = K) -> dict[str, AdapterWeights]:
    """Adds the value times the input's first entry to all but the first, in each of layers."""
    a, b = torch.zeros(1, K, device=DEVICE), torch.full((K, 1), float(value), device=DEVICE)
    a[0, 0], b[0] = 1, 0
    return {name: AdapterWeights(a, b, 1.0, None) for name in layers}


def linear() -> torch.nn.Linear:
    """The identity."""
    made = torch.nn.Linear(K, K, bias=False, device=DEVICE)
    made.weight.data.copy_(torch.eye(K))
    return made


def served(model=None, max_adapters: int = 2, names: dict[str, float] | None = None, **options):
    """(model, store) with an adapter that adds its value, for each of names."""
    model = torch.nn.Sequential(linear()) if model is None else model
    store = fl.AdapterStore(model, max_adapters, 4, **options)
    for name, value in (names or {}).items():
        store.add(name, adding(value, store.layers))
    return model, store


def ones(*lead: int) -> torch.Tensor:
    return torch.ones(*lead, K, device=DEVICE)


def added(y: torch.Tensor, x: torch.Tensor | None = None) -> list:
    """What the adapters of each row added to its last entry."""
    return (y[..., -1] - (1 if x is None else x[..., -1])).tolist()
