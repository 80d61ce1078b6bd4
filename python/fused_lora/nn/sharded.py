"""Parameters that are in parts on several processes.

fully_shard (FSDP2) and tensor parallel make a DTensor of each. It is known by its methods, so that
torch.distributed.tensor is not loaded where nothing is sharded. FullyShardedDataParallel (FSDP1)
flattens them: a layer is left with a piece of one dimension, or with a view that it does not own.
"""

import torch
from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")


def local_part(t: Tensor) -> Tensor:
    """What of t this process holds, sharing its memory; t itself where it is not sharded."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def whole(t: Tensor) -> Tensor:
    """t put together, which every process has to ask for; t itself where it is not sharded."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


def check_whole(op: str, name: str, module: torch.nn.Module) -> None:
    """Raise NotImplementedError where a parameter of an adapted layer is sharded."""
    for own, t in module.named_parameters(name, recurse=False):
        if is_sharded(t):
            raise NotImplementedError(
                f"{op}: {own} is a {type(t.data).__name__}, in parts on several processes; put the "
                f"model together first (torch.distributed.checkpoint.state_dict."
                f"get_model_state_dict with full_state_dict=True)"
            )
    check_unflattened(op, name, module)


def check_unflattened(op: str, name: str, module: torch.nn.Module) -> None:
    """Raise NotImplementedError where FSDP1 has flattened the parameters of an adapted layer."""
    for own, dims in (("lora_a", 2), ("lora_b", 2), ("gate", 1), ("weight", 2)):
        t = module._parameters.get(own, vars(module).get(own))
        # prune and weight_norm leave a tensor in the module too, and beside it what it is made of.
        if t is None or any(f"{own}_{part}" in module._parameters for part in ("orig", "g")):
            continue
        if own in vars(module) or t.ndim != dims or (own == "gate" and len(t) != module.r):
            raise NotImplementedError(
                f"{op}: {f'{name}.{own}' if name else own} is flattened by "
                f"FullyShardedDataParallel, in parts on several processes; do this within "
                f"FullyShardedDataParallel.summon_full_params(model)"
            )
