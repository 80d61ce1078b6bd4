"""Optimisers for the parameters of adapters that plain gradient steps do not serve."""

from fused_lora.ops.soft_threshold import soft_threshold_
from fused_lora.optim.adalora import AdaLoRA, RankAllocator, orthogonality_penalty
from fused_lora.optim.sora import SoRA

__all__ = ["AdaLoRA", "RankAllocator", "SoRA", "orthogonality_penalty", "soft_threshold_"]
