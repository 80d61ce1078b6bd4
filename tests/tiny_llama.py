"""A Llama of transformers, small enough for a test."""

import torch
from conftest import DEVICE


def tiny_llama(dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    """Two layers with random weights, the same whenever it is asked for; options of LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options)).to(DEVICE, dtype)
