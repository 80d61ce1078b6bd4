"""Low-rank adapters that cost almost nothing beyond the frozen layer that they adapt."""

from fused_lora import nn, optim, reference
from fused_lora.bank import AdapterBank
from fused_lora.checkpoint import load_adapter, save_adapter, swap_adapter
from fused_lora.inject import LoRAConfig, inject, merge, unmerge
from fused_lora.integrations.peft import accelerate, restore
from fused_lora.ops.dept_embedding import dept_embedding
from fused_lora.ops.dispatch import backends, use_backend, why
from fused_lora.ops.dora_linear import dora_linear
from fused_lora.ops.lora_add import lora_add
from fused_lora.ops.lora_embedding import lora_embedding
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.ops.lora_linear_group import lora_linear_group
from fused_lora.ops.multi_lora_linear import multi_lora_add_, multi_lora_linear
from fused_lora.ops.routing import AdapterRouting
from fused_lora.store import AdapterStore

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "AdapterRouting",
    "AdapterStore",
    "LoRAConfig",
    "accelerate",
    "backends",
    "dept_embedding",
    "dora_linear",
    "inject",
    "load_adapter",
    "lora_add",
    "lora_embedding",
    "lora_linear",
    "lora_linear_group",
    "merge",
    "multi_lora_add_",
    "multi_lora_linear",
    "nn",
    "optim",
    "reference",
    "restore",
    "save_adapter",
    "swap_adapter",
    "unmerge",
    "use_backend",
    "why",
]
