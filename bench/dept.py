"""DePT beside a plain soft prompt: time and memory of a training step, and of inference.

    python -m fused_lora.bench.dept [--stage STAGE] [--out DIR]

A T5 of transformers with random weights. A soft prompt of 100 rows is the baseline; DePT has a
shorter one and a pair of as many parameters (arXiv 2309.05173), through fl.dept_embedding and as
the published code writes it. A step is forward, backward and AdamW. The contenders take turns
within a round, in a new order each. Memory is the peak on a GPU, and on a CPU what is kept for the
backward.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from fused_lora.bench import claims
from fused_lora.bench.claims import answers, heading, milliseconds, ratio, timed
from fused_lora.bench.report import machine
from fused_lora.bench.run import Parser, progress
from torch import Tensor, nn

import fused_lora as fl

NAME = "dept"
TITLE = "DePT beside a soft prompt"
BASELINE, AGAIN = "soft prompt", "soft prompt again"
CLAIMED = 0.8  # of the baseline's time and memory: "over 20 % less"


class Plan(NamedTuple):
    """Sizes of the model, by the names of transformers' T5Config, and of the batch."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int
    batch: int
    length: int  # of the input, and max_length of DePT
    decoded: int  # tokens of the decoder
    prompt: int  # rows of the baseline's
    shorter: tuple[int, ...]  # of DePT's
    rounds: int


STAGES = {
    "base": Plan(768, 3072, 12, 12, 32128, 4, 256, 8, 100, (40, 60, 80), 12),
    "quick": Plan(64, 128, 2, 4, 100, 2, 24, 4, 20, (8,), 3),
}


class SoftPrompt(nn.Module):
    """[P ; E[ids]]."""

    def __init__(self, words: nn.Embedding, rows: int) -> None:
        super().__init__()
        self.words = words
        self.prompt = nn.Parameter(words.weight[:rows].detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat((self.prompt.expand(len(ids), -1, -1), self.words(ids)), 1)


class PublishedDePT(nn.Module):
    """[P ; E[ids] + scale * (A B)[:L]], with every intermediate made."""

    def __init__(self, words: nn.Embedding, own: fl.nn.DePTEmbedding) -> None:
        super().__init__()
        self.words, self.scale = words, own.scale
        self.prompt, self.lora_a, self.lora_b = own.prompt, own.lora_a, own.lora_b

    def forward(self, ids: Tensor) -> Tensor:
        delta = self.scale * (self.lora_a @ self.lora_b)
        inputs = self.words(ids) + delta[: ids.shape[1]]
        return torch.cat((self.prompt.expand(len(ids), -1, -1), inputs), 1)


def contenders(plan: Plan, words: nn.Embedding) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {n: SoftPrompt(words, plan.prompt) for n in (BASELINE, AGAIN)}
    for m in plan.shorter:
        r = fl.nn.dept_rank(plan.prompt, plan.length, plan.d_model, m)
        ours = fl.nn.DePTEmbedding.from_embedding(words, m, plan.length, r)
        found[f"DePT, m = {m}, r = {r}"] = ours
    m, ours = m, list(found.values())[-1]
    found[f"DePT, m = {m}, as published"] = PublishedDePT(words, ours)
    return found


def trained(embedding: nn.Module) -> list[nn.Parameter]:
    return [p for p in embedding.parameters() if p.requires_grad]


def with_embeddings(plan: Plan, device: torch.device):
    """(a frozen T5, {contender: what makes its inputs})."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = plan._asdict()
    names = "d_model", "d_ff", "num_layers", "num_heads", "vocab_size"
    config = T5Config(
        **{name: sizes[name] for name in names}, d_kv=plan.d_model // plan.num_heads,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = T5ForConditionalGeneration(config).to(device, dtype).requires_grad_(False)
    found = contenders(plan, model.get_input_embeddings())
    return model, {name: embedding.to(device) for name, embedding in found.items()}


class Batch(NamedTuple):
    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "Batch":
        ids, labels = (
            torch.randint(1, plan.vocab_size, (plan.batch, n), device=device)
            for n in (plan.length, plan.decoded)
        )
        return cls(ids, labels)


def step_of(model, embedding) -> Callable[[Batch], None]:
    optimizer = torch.optim.AdamW(trained(embedding), lr=1e-4)

    def step(batch: Batch) -> None:
        model(inputs_embeds=embedding(batch.ids), labels=batch.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference_of(model, embedding) -> Callable[[Batch], None]:
    @torch.no_grad()
    def run(batch: Batch) -> None:
        model(inputs_embeds=embedding(batch.ids), labels=batch.labels)

    return run


def memory(model, embedding, batch: Batch) -> int:
    """Bytes: the peak of a step on a GPU; elsewhere what its forward keeps for the backward, but
    the parameters, each storage once."""
    if batch.ids.is_cuda:
        step = step_of(model, embedding)
        step(batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        return torch.cuda.max_memory_allocated() - before
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *embedding.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(inputs_embeds=embedding(batch.ids), labels=batch.labels).loss
    del loss
    return sum(kept.values())


def measure(plan: Plan, device: torch.device, track: Callable = iter) -> dict:
    model, embeddings = with_embeddings(plan, device)
    batch = Batch.of(plan, device)
    result = {"op": NAME, "machine": machine(device), "plan": plan._asdict()}
    result["parameters"] = {n: sum(p.numel() for p in trained(e)) for n, e in embeddings.items()}
    result["memory"] = {n: memory(model, e, batch) for n, e in embeddings.items()}
    for what, make in (("step", step_of), ("inference", inference_of)):
        calls = {name: make(model, e) for name, e in embeddings.items()}
        result[what] = timed(calls, [batch] * plan.rounds, device, track)
    return result


def verdicts(result: dict) -> list[tuple[str, str, bool]]:
    """(the claim, what was measured, whether it holds)."""
    found = []
    for name in result["parameters"]:
        if not name.startswith("DePT") or name.endswith("as published"):
            continue
        ratios = {what: ratio(result[what], name, BASELINE) for what in ("step", "inference")}
        ratios["memory"] = result["memory"][name] / result["memory"][BASELINE]
        found += [
            (f"{name}: over 20 % less {what}", f"{share:.3f}", share <= CLAIMED)
            for what, share in ratios.items()
        ]
    return found


def markdown(result: dict) -> str:
    plan = result["plan"]
    lines = [
        *heading(result),
        f"T5 of {plan['num_layers']} layers, d_model {plan['d_model']}, {plan['batch']} inputs of "
        f"{plan['length']} tokens; ratios are to a soft prompt of {plan['prompt']} rows, and "
        f"`{AGAIN}` is the noise.",
        "",
        "| | parameters | step, ms: p50 [p20 - p80] | ratio | inference, ms | ratio | memory, MB | "
        "ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, parameters in result["parameters"].items():
        times = [
            f"{milliseconds(result[what][name])} | {ratio(result[what], name, BASELINE):.3f}"
            for what in ("step", "inference")
        ]
        kept = result["memory"][name]
        lines.append(
            f"| {name} | {parameters:,} | {' | '.join(times)} | {kept / 1e6:.4g} | "
            f"{kept / result['memory'][BASELINE]:.3f} |"
        )
    return "\n".join([*lines, *answers(verdicts(result))]) + "\n"


def save(result: dict, folder: Path) -> Path:
    """Write dept.json and .md; returns their path without suffix."""
    return claims.save(result, markdown(result), folder)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m fused_lora.bench.dept", __doc__)
    parser.add_argument("--stage", choices=sorted(STAGES), default="base")
    chosen = parser.chosen(arguments)
    result = measure(STAGES[chosen.stage], chosen.device, progress)
    path = save(result, chosen.out)
    print(markdown(result))
    print(f"{path}: .json, .md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
