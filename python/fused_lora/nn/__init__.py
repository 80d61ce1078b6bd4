"""Modules: they hold the parameters and call the ops."""

from fused_lora.nn.adalora import AdaLoRALinear
from fused_lora.nn.linear import LoRALinear, SoRALinear
from fused_lora.nn.multi import MultiLoRALinear

__all__ = ["AdaLoRALinear", "LoRALinear", "MultiLoRALinear", "SoRALinear"]
