"""Serves three adapters in one batch: each row of it is answered by an adapter of its own.

    python examples/serve_adapters.py                 # a CPU takes under a minute
    python examples/serve_adapters.py --out run       # keeps, or takes, base and adapters in run

A small byte-level Llama, trained on Python's standard library, gets three adapters: for prose, for
the names of Unicode's characters, for tables of codecs (see finetune_llama.py). An AdapterStore
takes them from their folders; one call of generate, with a cache, answers for all three and for the
base. Exits with 1 where a row is not what its adapter says alone, in a model that has no other.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import finetune_llama as finetune
import torch
from fused_lora.bench.text import character_names, reference_prose, stdlib_sources
from transformers import AutoModelForCausalLM, set_seed

import fused_lora as fl

PROMPTS = {None: "def read(", "prose": "The object ", "names": "LATIN ", "codecs": "    0x00"}


def prepare(out: Path, steps: int, pretrain_steps: int) -> Path:
    """out/base and out/<adapter> for each text, trained where they are not there."""
    s = finetune.SETTINGS
    base = out / "base"
    texts = {
        "prose": reference_prose,
        "names": lambda: character_names(s),
        "codecs": lambda: stdlib_sources(s, codecs=True),
    }
    set_seed(s.seed)
    if not (base / "config.json").exists():
        finetune.pretrained(base, s, pretrain_steps)
    for name, text in texts.items():
        if not (out / name / "adapter_config.json").exists():
            finetune.adapted(base, text(), out / name, s, steps)
    return base


def generate(model, prompts: list[str], new: int) -> torch.Tensor:
    """int64 [len(prompts), new], greedily; prompts are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([list(p.rjust(longest, "\0").encode()) for p in prompts])
    ids = ids.to(model.device)
    mask = (ids != 0).long()
    found = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return found[:, longest:].cpu()


def serve(out: Path, base: Path, new: int) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base).to(device).eval()
    store = fl.AdapterStore(model, max_adapters=3, max_rank=finetune.SETTINGS.rank)
    names = list(PROMPTS)
    for name in names[1:]:
        store.load(name, out / name)
    prompts = list(PROMPTS.values())

    start = time.perf_counter()
    with store.route(names):  # one a row; None is the base
        together = generate(model, prompts, new)
    seconds = time.perf_counter() - start

    wrong, apart = 0, 0.0
    for i, name in enumerate(names):
        alone = AutoModelForCausalLM.from_pretrained(base).to(device).eval()
        if name is not None:
            fl.load_adapter(alone, out / name)
        start = time.perf_counter()
        same = torch.equal(generate(alone, [prompts[i]], new)[0], together[i])
        apart += time.perf_counter() - start
        wrong += not same
        said = bytes(together[i].tolist()).decode(errors="replace")
        print(f"{name or 'base'}: {'as alone' if same else 'NOT as alone'}: {prompts[i] + said!r}")
    count = together.numel()
    print(f"{count} tokens in one batch: {seconds:.2f} s; one after the other: {apart:.2f} s")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="a folder for base and adapters")
    parser.add_argument("--steps", type=int, default=60, help="of each adapter (default 60)")
    parser.add_argument("--pretrain-steps", type=int, default=250, help="(default 250)")
    parser.add_argument("--new", type=int, default=40, help="tokens a row (default 40)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        out = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = prepare(out, options.steps, options.pretrain_steps)
        return serve(out, base, options.new)


if __name__ == "__main__":
    sys.exit(main())
