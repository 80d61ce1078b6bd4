"""Fine-tunes a Llama-architecture model with transformers.Trainer, and saves the adapter.

    python examples/finetune_llama.py --out run                      # a CPU takes under a minute
    python examples/finetune_llama.py --out run --model <folder>     # a model of your own, by bytes

Without --model a small byte-level Llama is first trained from scratch on Python's standard library.
It is then adapted to the language reference that pydoc carries: the base is frozen, fl.inject gives
its linear layers an adapter, Trainer trains that and nothing else. The texts are on every machine
that has Python; nothing is downloaded.

Writes --out/base (the model) and --out/adapter (in PEFT's format), reads both back, and exits with
1 where what was read is not what was trained.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch
from fused_lora.bench.text import PRESETS, Settings, Text, reference_prose, stdlib_sources
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fused_lora as fl

SETTINGS: Settings = dataclasses.replace(
    PRESETS["quick"], width=96, layers=2, heads=4, hidden=256, context=64, batch=8
)


class Windows(torch.utils.data.Dataset):
    """Runs of bytes of a text, each beginning in the middle of the one before."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.windows = text.unfold(0, length, length // 2)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = self.windows[i].long()
        return {"input_ids": ids, "labels": ids}  # the model itself shifts the labels


def small_llama(s: Settings) -> LlamaForCausalLM:
    """A Llama whose tokens are bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=s.width,
        intermediate_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads // 2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: PreTrainedModel, text: Text, s: Settings, *, steps: int, lr: float, out: Path):
    """(bits per byte of what is held out before, after); model is trained in place."""
    torch.use_deterministic_algorithms(False)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=s.batch,
        per_device_eval_batch_size=s.batch,
        learning_rate=lr,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="linear",
        weight_decay=0.0,
        logging_steps=max(1, steps // 5),
        save_strategy="no",  # a checkpoint would hold the base too; the adapter is saved below
        report_to=[],
        seed=s.seed,
    )
    held_out = Windows(text.held_out, s.context)
    held_out.windows = held_out.windows[:: max(1, len(held_out) // s.held_out_windows)]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(text.train, s.context),
        eval_dataset=held_out,
    )
    before = trainer.evaluate()["eval_loss"] / math.log(2)
    trainer.train()
    return before, trainer.evaluate()["eval_loss"] / math.log(2)


def pretrained(folder: Path, s: Settings, steps: int) -> PreTrainedModel:
    """A model of the standard library's sources, which is saved in folder."""
    model = small_llama(s)
    text = stdlib_sources(s, codecs=False)
    before, after = train(model, text, s, steps=steps, lr=s.pretrain_lr, out=folder)
    print(f"from scratch, on Python: {before:.3f} -> {after:.3f} bits per byte")
    model.save_pretrained(folder)
    return model


def adapted(base: Path, text: Text, folder: Path, s: Settings, steps: int) -> PreTrainedModel:
    """The model in `base` with an adapter for a text, which is saved in folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = fl.LoRAConfig(
        r=s.rank, lora_alpha=2 * s.rank, lora_dropout=0.05, target_modules="all-linear"
    )
    fl.inject(model, config)
    before, after = train(model, text, s, steps=steps, lr=s.lora_lr, out=folder)
    fl.save_adapter(model, folder)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of = sum(p.numel() for p in model.parameters())
    print(
        f"{folder.name}: {before:.3f} -> {after:.3f} bits per byte, {trained:,} of {of:,} "
        f"parameters trained"
    )
    if not after < before:
        raise SystemExit(f"{folder.name}: training has made it worse")
    return model


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder, made where there is none"
    )
    parser.add_argument("--model", type=Path, help="a folder of a causal model of transformers")
    parser.add_argument("--steps", type=int, default=120, help="of the adapter (default 120)")
    parser.add_argument("--pretrain-steps", type=int, default=250, help="(default 250)")
    options = parser.parse_args()
    s = SETTINGS
    set_seed(s.seed)
    base = options.model or options.out / "base"
    if options.model is None:
        with torch.enable_grad():
            pretrained(base, s, options.pretrain_steps)
    text = reference_prose()
    folder = options.out / "adapter"
    with torch.enable_grad():
        model = adapted(base, text, folder, s, options.steps).eval()

    again = fl.load_adapter(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    again.to(model.device)
    rows = text.held_out_windows(s)[:4, : s.context].to(model.device)
    want = model(rows).logits
    read = torch.equal(again(rows).logits, want)
    fl.merge(again)
    apart = (again(rows).logits - want).abs().max() / want.abs().max()
    print(f"read back: {'equal' if read else 'NOT equal'}; merged: within {apart:.1e}")
    return 0 if read and apart < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
