"""Optimisers for the parameters of adapters that plain gradient steps do not serve."""

from fused_lora.ops.soft_threshold import soft_threshold_
from fused_lora.optim.adalora import AdaLoRA, RankAllocator, orthogonality_penalty
from fused_lora.optim.dept import dept_groups
from fused_lora.optim.gates import GateLog, kept_parameters, named_gates
from fused_lora.optim.groups import lora_plus_groups
from fused_lora.optim.prune import PruneReport, prune
from fused_lora.optim.schedule import SparsitySchedule, sparsity_values
from fused_lora.optim.sora import SoRA, gate_l1

__all__ = [
    "AdaLoRA",
    "GateLog",
    "PruneReport",
    "RankAllocator",
    "SoRA",
    "SparsitySchedule",
    "dept_groups",
    "gate_l1",
    "kept_parameters",
    "lora_plus_groups",
    "named_gates",
    "orthogonality_penalty",
    "prune",
    "soft_threshold_",
    "sparsity_values",
]
