"""Modules: they hold the parameters and call the ops."""

from fused_lora.nn.adalora import AdaLoRALinear
from fused_lora.nn.adapter import LoRAAdapter
from fused_lora.nn.dept import DePT
from fused_lora.nn.embedding import DePTEmbedding, LoRAEmbedding, dept_rank
from fused_lora.nn.linear import LoRALinear, SoRALinear
from fused_lora.nn.multi import MultiLoRALinear

__all__ = [
    "AdaLoRALinear",
    "DePT",
    "DePTEmbedding",
    "LoRAAdapter",
    "LoRAEmbedding",
    "LoRALinear",
    "MultiLoRALinear",
    "SoRALinear",
    "dept_rank",
]
