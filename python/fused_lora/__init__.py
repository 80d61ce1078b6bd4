"""Low-rank adapters that cost almost nothing beyond the frozen layer that they adapt."""

from fused_lora import nn, optim, reference
from fused_lora.inject import LoRAConfig, inject, merge, unmerge
from fused_lora.ops.dispatch import backends, use_backend, why
from fused_lora.ops.lora_linear import lora_linear

__version__ = "0.1.0"

__all__ = [
    "LoRAConfig",
    "backends",
    "inject",
    "lora_linear",
    "merge",
    "nn",
    "optim",
    "reference",
    "unmerge",
    "use_backend",
    "why",
]
