"""Kernels that make low-rank adapters cost almost nothing beyond the frozen layer that they adapt."""

from fused_lora import reference
from fused_lora.ops.dispatch import backends, use_backend, why
from fused_lora.ops.lora_linear import lora_linear

__version__ = "0.1.0"

__all__ = ["backends", "lora_linear", "reference", "use_backend", "why"]
