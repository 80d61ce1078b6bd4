"""Models of transformers that are small enough for a test, and a batch for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from conftest import DEVICE
from tiny_llama import tiny_llama

VOCAB, HIDDEN, INNER, HEADS = 64, 32, 48, 4


class Family(NamedTuple):
    """model(dtype), with random weights that are the same whenever it is asked for; batch(rows);
    and names of its layers, for a LoraConfig."""

    model: Callable[[torch.dtype], torch.nn.Module]
    batch: Callable[[int], dict[str, Any]]
    projection: str  # that of the queries
    embedding: str | None = None


def _ids(rows: int, length: int = 7) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), device=DEVICE)


def tiny_bert(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config).to(DEVICE, dtype)


def tiny_t5(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=INNER,
        num_layers=1,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(DEVICE, dtype)


def tiny_vit(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return ViTForImageClassification(config).to(DEVICE, dtype)


def _images(rows: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, device=DEVICE)}


def _pair(rows: int) -> dict[str, Any]:
    return {"input_ids": _ids(rows), "decoder_input_ids": _ids(rows, 5)}


def _words(rows: int) -> dict[str, Any]:
    return {"input_ids": _ids(rows)}


FAMILIES = {
    "llama": Family(tiny_llama, _words, "q_proj", "embed_tokens"),
    "bert": Family(tiny_bert, _words, "query", "word_embeddings"),
    "t5": Family(tiny_t5, _pair, "SelfAttention.q", "embed_tokens"),
    "vit": Family(tiny_vit, _images, "q_proj"),
}
