"""Parameter groups of LoRA+ (arXiv 2402.12354)."""

from typing import Any

import torch
from torch.nn import Parameter

from fused_lora.nn.checks import check_number
from fused_lora.optim.gates import named_gates


def lora_plus_groups(
    model: torch.nn.Module,
    *,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float | None = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer in which B learns `ratio` times as fast as A.

        A: lr    B: lr * ratio    A and B of embeddings: embedding_lr    the rest: lr

    (LoRA+, arXiv 2402.12354: with one rate for both, A and B of wide layers cannot both learn
    features; the best ratio is well above 1. 16 and the rate of embeddings are its published
    code's.) Weight decay acts on all of these but biases, norms and whatever else has one dimension
    or none. (PEFT's create_loraplus_optimizer gives such parameters B's rate.)

        optimizer = torch.optim.AdamW(fl.optim.lora_plus_groups(model, lr=1e-4, ratio=16))

    The groups hold every parameter of model that requires a gradient, once, but the gates that
    fl.optim.named_gates finds, which are fl.optim.SoRA's; a group without a parameter is left out,
    and the "name" of each says which it is.

    lr, ratio, weight_decay: floats at least 0.
    embedding_lr: of A and B in embedding layers; None treats them as the others.

    Raises TypeError and ValueError that name the argument; ValueError where no layer of model has a
    trainable lora_a or lora_b.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    numbers = {"lr": lr, "ratio": ratio, "weight_decay": weight_decay}
    if embedding_lr is not None:
        numbers["embedding_lr"] = embedding_lr
    for name, value in numbers.items():
        check_number(name, value)
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    rates = {"A": lr, "B": lr * ratio, "embeddings": embedding_lr, "rest": lr, "1-d": lr}
    found: dict[str, list[Parameter]] = {name: [] for name in rates}
    seen = set(map(id, named_gates(model).values()))
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[_group(module, own, parameter, embedding_lr is not None)].append(parameter)
    if not (found["A"] or found["B"] or found["embeddings"]):
        raise ValueError("model has no lora_a or lora_b that requires a gradient; inject adapters")
    return [
        {
            "name": name,
            "params": params,
            "lr": rates[name],
            "weight_decay": 0.0 if name == "1-d" else weight_decay,
        }
        for name, params in found.items()
        if params
    ]


def _group(module: torch.nn.Module, own: str, parameter: Parameter, embeddings: bool) -> str:
    if own in ("lora_a", "lora_b"):
        if embeddings and isinstance(module, torch.nn.Embedding):
            return "embeddings"
        return "A" if own == "lora_a" else "B"
    return "rest" if parameter.ndim > 1 else "1-d"
