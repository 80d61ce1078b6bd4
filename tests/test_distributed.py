"""Adapters on torch's own engines of parallelism, on 2 and 4 processes against one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import on_ranks
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import fused_lora as fl

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without distributed"
)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def on():
    """on(n).run(fn, ...): fn on n ranks, which live as long as this module's tests."""
    started: dict[int, Ranks] = {}
    yield lambda n: started.setdefault(n, Ranks(n))
    for ranks in started.values():
        ranks.close()


both = pytest.mark.parametrize("n", [2, 4])
blocks = pytest.mark.parametrize("kind", list(on_ranks.BLOCKS))


@both
@blocks
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("gate", [False, True])
def test_tensor_parallel(on, n, kind, p, gate):
    on(n).run(on_ranks.tensor_parallel, kind, gate=gate, p=p)


@both
@blocks
def test_a_trained_bias(on, n, kind):
    on(n).run(on_ranks.tensor_parallel, kind, bias="all", gate=True, p=0.5)


@both
@blocks
def test_parts_of_the_sequence(on, n, kind):
    on(n).run(on_ranks.tensor_parallel, kind, sequence=True, bias="all", gate=True, p=0.5)


def test_adalora_layers(on):
    on(2).run(on_ranks.tensor_parallel, "mlp", adalora=True, p=0.5)


@both
def test_between_torchs_own_styles(on, n):
    on(n).run(on_ranks.one_layer_between_torchs_own)


def test_an_activation_checkpoint_of_sharded_layers(on):
    on(2).run(on_ranks.checkpointed)


@pytest.mark.slow
def test_sharded_layers_compile(on):
    on(2).run(on_ranks.compiled)


REFUSED = {
    "linear": "TypeError: ColwiseLoRAParallel shards LoRALinear and its subclasses, got Linear",
    "mesh": "ValueError: ColwiseLoRAParallel takes a mesh of one dimension, got 2",
    "merged": "RuntimeError: RowwiseLoRAParallel: the adapter is merged",
    "rows": "ValueError: ColwiseLoRAParallel: out_features is 33, which 2 ranks do not divide",
    "columns": "ValueError: RowwiseLoRAParallel: in_features is 33, which 2 ranks do not divide",
    "parts of 12": "in_features is 24, which 2 ranks do not divide into parts of a multiple of 8",
    "twice": "NotImplementedError: ColwiseLoRAParallel: weight is a DTensor",
    "merge": "NotImplementedError: merge: weight is a DTensor",
    "merge a model": "NotImplementedError: merge: mlp.gate_proj.weight is a DTensor",
    "swap": "NotImplementedError: ShardedSoRALinear.swap: weight is a DTensor",
    "save": "NotImplementedError: save_adapter: mlp.gate_proj.weight is a DTensor",
    "prune": "TypeError: 'mlp.gate_proj' is a",
    "merge of FSDP2": "NotImplementedError: merge: mlp.gate_proj.weight is a DTensor",
    "save of FSDP2": "NotImplementedError: save_adapter: mlp.gate_proj.weight is a DTensor",
    "prune of FSDP2": "NotImplementedError: prune: mlp.gate_proj.lora_a is a DTensor",
    "penalty": "NotImplementedError: AdaLoRA: mlp.gate_proj.weight is a DTensor",
    "allocator": "NotImplementedError: AdaLoRA: mlp.gate_proj.weight is a DTensor",
}


def test_what_is_refused(on):
    for errors in on(2).run(on_ranks.refusals):
        assert set(errors) == set(REFUSED)
        for what, error in errors.items():
            assert REFUSED[what] in error, f"{what}: {error}"


@both
@pytest.mark.parametrize("how", ["ddp", "fsdp", "each", "kept"])
def test_data_parallel_gradients(on, n, how):
    on(n).run(on_ranks.data_parallel, "mlp", how, gate=True)


def test_each_rank_drops_other_elements(on):
    first, second = on(2).run(on_ranks.masks_differ)
    assert first != second


@pytest.mark.parametrize("gate", [False, True])
def test_fsdp_mixed_precision(on, gate):
    on(2).run(on_ranks.half_precision, gate)


def test_fsdp_of_masters_on_a_bf16_base(on):
    on(2).run(on_ranks.masters)


def test_an_activation_checkpoint_of_fsdp(on):
    on(2).run(on_ranks.sharded_checkpointed)


@pytest.mark.parametrize("gate_step", ["sgd", "adam"])
@pytest.mark.parametrize("how,n", [("ddp", 2), ("fsdp", 2), ("tp", 2), ("fsdp", 4), ("fsdp+tp", 4)])
def test_gates_train_as_one(on, n, how, gate_step):
    on(n).run(on_ranks.gates_train, how, gate_step)


def test_whole_and_sharded_gates_in_one_optimizer(on):
    on(2).run(on_ranks.gates_of_two_kinds)


@pytest.mark.parametrize("how", ["fsdp", "tp"])
def test_checkpoint_of_two_ranks_on_four_and_on_one(on, how, tmp_path):
    folder = str(tmp_path)
    on(2).run(on_ranks.saved, folder, how)
    for again in ("fsdp", "tp", "fsdp+tp"):
        on(4).run(on_ranks.loaded, folder, again)
    on_ranks.loaded(folder, "alone")
    plain = torch.nn.ModuleDict({"mlp": on_ranks.MLP(False)})
    adapter = fl.load_adapter(plain, tmp_path / "adapter")
    want = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name, t in want.items():
        on_ranks.equal(name, adapter["mlp"].get_parameter(name), t.float())


def test_the_page_on_several_processes(on, tmp_path):
    on(4).run(on_ranks.documented, str(ROOT / "docs" / "distributed.md"), str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("way,n", [("ddp", 2), ("fsdp", 2), ("tp", 2), ("fsdp+tp", 4)])
def test_the_example_under_torchrun(way, n, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), "examples/distributed.py", way, "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    losses = [float(x) for x in re.findall(r"loss (\S+)", run.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5, run.stdout
    assert {path.name for path in tmp_path.iterdir()} > {"adapter_config.json"}
