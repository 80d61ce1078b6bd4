"""Optimisers for the parameters of adapters that plain gradient steps do not serve."""

from fused_lora.ops.soft_threshold import soft_threshold_
from fused_lora.optim.dept import dept_groups
from fused_lora.optim.sora import SoRA

__all__ = ["SoRA", "dept_groups", "soft_threshold_"]
