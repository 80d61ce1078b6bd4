"""Adapter folders in PEFT's format: adapter_config.json beside adapter_model.safetensors."""

from fused_lora.checkpoint.model import load_adapter, save_adapter, swap_adapter
from fused_lora.checkpoint.reading import AdapterWeights, read_adapter

__all__ = ["AdapterWeights", "load_adapter", "read_adapter", "save_adapter", "swap_adapter"]
