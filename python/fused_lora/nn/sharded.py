"""Parameters that are in parts on several processes, which fully_shard and tensor parallel make.

Such a parameter is a DTensor. It is known by its methods, so that torch.distributed.tensor is not
loaded where nothing is sharded.
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
    """Raise NotImplementedError where a parameter of the module is sharded."""
    for own, t in module.named_parameters(name, recurse=False):
        if is_sharded(t):
            raise NotImplementedError(
                f"{op}: {own} is a {type(t.data).__name__}, in parts on several processes; put the "
                f"model together first (torch.distributed.checkpoint.state_dict."
                f"get_model_state_dict with full_state_dict=True)"
            )
