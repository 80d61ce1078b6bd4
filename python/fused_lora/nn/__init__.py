"""Modules: they hold the parameters and call the ops."""

from fused_lora.nn.linear import LoRALinear, SoRALinear
from fused_lora.nn.multi import MultiLoRALinear

__all__ = ["LoRALinear", "MultiLoRALinear", "SoRALinear"]
