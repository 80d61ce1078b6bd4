"""Checks of what modules and their configurations are made from."""

import math
from collections.abc import Sequence

import torch
from torch.nn import Parameter

from fused_lora.ops import validation as check


def check_rank(name: str, r) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name} must be an int, got {r!r} of type {type(r).__name__}")
    if r < 1:
        raise ValueError(f"{name} must be at least 1, got {r}")


def check_number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_probability(name: str, p) -> None:
    check_number(name, p)
    if not 0 <= p <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {p}")


def check_choice(name: str, value, choices: Sequence) -> None:
    # 1 == True, yet it is not that choice.
    if not any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_linear(name: str, linear) -> None:
    """`linear` is an nn.Linear and nothing more, and its weight a plain dense floating tensor."""
    kind = type(linear)
    if kind is not torch.nn.Linear:
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}; only a plain torch.nn.Linear can "
            f"be adapted, because what a subclass computes is not known"
        )
    for own, t in linear.named_parameters():
        if own not in ("weight", "bias"):
            raise TypeError(f"{name} has a parameter {own!r} that a plain torch.nn.Linear has not")
        if type(t) is not Parameter or t.layout != torch.strided:
            raise TypeError(
                f"{name}.{own} is a {type(t).__name__} of layout {t.layout}; a plain dense tensor "
                f"is wanted"
            )
        if t.dtype not in check.DTYPES:
            raise TypeError(
                f"{name}.{own} must have dtype {check.names(check.DTYPES)}, got "
                f"{check.names([t.dtype])}"
            )
    hooks = (
        linear._forward_hooks,
        linear._forward_pre_hooks,
        linear._backward_hooks,
        linear._backward_pre_hooks,
    )
    if any(hooks) or "forward" in vars(linear):
        raise TypeError(
            f"{name} has hooks or its own forward, which would be lost; remove them first"
        )
