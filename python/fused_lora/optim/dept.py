"""The two learning rates of DePT."""

import torch

from fused_lora.nn.checks import check_number
from fused_lora.nn.embedding import DePTEmbedding


def dept_groups(
    module: torch.nn.Module,
    *,
    prompt_lr: float,
    pair_lr: float,
    weight_decay: float = 0.0,
    lr: float | None = None,
) -> list[dict]:
    """Parameter groups for any optimiser: the prompts of `module` at prompt_lr, the low-rank pairs
    at pair_lr (DePT, arXiv 2309.05173, which takes prompt_lr much larger: 0.3 beside 5e-4).

    lr: of everything else in `module` that is trained, such as LoRA adapters; a third group.

        optimizer = torch.optim.AdamW(fl.optim.dept_groups(model, prompt_lr=0.3, pair_lr=5e-4))

    Raises ValueError where module has no DePTEmbedding that is trained, for a rate that is not
    above 0, and where something else is trained and lr is None; TypeError for what is not a number.
    """
    rates = {"prompt_lr": prompt_lr, "pair_lr": pair_lr} | ({} if lr is None else {"lr": lr})
    for name, rate in rates.items():
        check_number(name, rate)
        if rate <= 0:
            raise ValueError(f"{name} must be above 0, got {rate}")
    check_number("weight_decay", weight_decay)
    layers = [m for m in module.modules() if isinstance(m, DePTEmbedding)]
    prompts = [m.prompt for m in layers if m.prompt is not None and m.prompt.requires_grad]
    pairs = [p for m in layers for p in (m.lora_a, m.lora_b) if p.requires_grad]
    if not prompts + pairs:
        raise ValueError("module has no DePTEmbedding that is trained")
    known = set(map(id, prompts + pairs))
    others = {n: p for n, p in module.named_parameters() if p.requires_grad and id(p) not in known}
    if others and lr is None:
        raise ValueError(
            f"lr must be given: {len(others)} other parameters are trained, {next(iter(others))} "
            f"among them"
        )
    groups = (prompts, prompt_lr), (pairs, pair_lr), ([*others.values()], lr)
    return [
        {"params": params, "lr": rate, "weight_decay": weight_decay}
        for params, rate in groups
        if params
    ]
