"""Models in wrappers, and parts of them: found, read and written under the bare model's names."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICE
from ranks import Ranks
from safetensors.torch import load_file, save_file
from test_save_adapter import X, adapters, assert_equal, build, gated, injected, stored, written
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

import fused_lora as fl
from fused_lora.checkpoint import read_adapter
from fused_lora.names import clean_name, named_modules, unwrapped
from fused_lora.optim import kept_parameters, named_gates, prune
from fused_lora.optim.gates import gate_counts


def compiled(module):
    return torch.compile(module, backend="eager")


def around_blocks(wrap):
    """A wrapper of each block, of a layer in it, and of one beside."""

    def wrapped(model):
        model.layers[0].up = wrap(model.layers[0].up)
        model.layers[0] = wrap(model.layers[0])
        model.q = wrap(model.q)
        return model

    return wrapped


WRAPPERS = {
    "compiled": compiled,
    "compiled blocks": around_blocks(compiled),
    "checkpointed blocks": around_blocks(checkpoint_wrapper),
    "compiled, checkpointed": lambda m: compiled(around_blocks(checkpoint_wrapper)(m)),
    "DataParallel": lambda m: DataParallel(m, device_ids=[] if DEVICE == "cpu" else None),
    "AveragedModel": AveragedModel,
    "AveragedModel, compiled": lambda m: compiled(AveragedModel(around_blocks(compiled)(m))),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return WRAPPERS[request.param]


def test_names_are_those_of_the_bare_model(wrap):
    bare = build()
    bare.again = bare.head
    model = wrap(copy.deepcopy(bare))
    for every in (False, True):
        want = [n for n, _ in bare.named_modules(remove_duplicate=not every)]
        assert [n for n, _ in named_modules(model, every_name=every)] == want
    assert type(unwrapped(model)) is type(bare)
    assert clean_name("a._orig_mod.b._fsdp_wrapped_module._checkpoint_wrapped_module.c") == "a.b.c"
    assert clean_name("module.a") == "module.a"


def test_a_child_called_module_keeps_its_name():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Linear(2, 2)

    assert [n for n, _ in named_modules(Own())] == ["", "module"]


def test_saved_and_loaded(wrap, tmp_path):
    model = injected(bias="lora_only", modules_to_save=["norm"])
    fl.save_adapter(model, tmp_path / "bare")
    wrapped = wrap(copy.deepcopy(model))
    fl.save_adapter(wrapped, tmp_path / "wrapped")
    want, got = (stored(tmp_path / name) for name in ("bare", "wrapped"))
    assert want.keys() == got.keys() and all(torch.equal(t, got[k]) for k, t in want.items())
    assert written(tmp_path / "bare") == written(tmp_path / "wrapped")
    plain = wrap(build())
    assert fl.load_adapter(plain, tmp_path / "bare") is plain
    assert_equal(unwrapped(plain), model)
    with torch.no_grad():
        for layer in adapters(unwrapped(wrapped)).values():
            layer.lora_b.zero_()
    fl.load_adapter(wrapped, tmp_path / "bare")
    assert_equal(unwrapped(wrapped), model)


def test_injected_by_path(wrap):
    """By whole names, and in the place that the model calls."""
    targets = ["layers.0.up", "q", "layers.1.q"]
    bare = fl.inject(build(), fl.LoRAConfig(target_modules=targets, r=2, init_lora_weights=False))
    torch.manual_seed(0)
    model = wrap(build())
    fl.inject(model, fl.LoRAConfig(target_modules=targets, r=2, init_lora_weights=False))
    found = {n: m for n, m in named_modules(model) if isinstance(m, fl.nn.LoRALinear)}
    assert list(found) == [n for n, m in bare.named_modules() if isinstance(m, fl.nn.LoRALinear)]
    assert model.fused_lora_config.r == 2 if hasattr(model, "fused_lora_config") else True
    with torch.no_grad():
        for name, layer in found.items():
            for own in ("lora_a", "lora_b"):
                getattr(layer, own).copy_(getattr(bare.get_submodule(name), own))
    torch.testing.assert_close(model(X), bare(X))


def test_swapped_merged_and_back(wrap, tmp_path):
    fl.save_adapter(injected(r=2), tmp_path)
    bare, model = injected(), wrap(injected())
    for m in (bare, model):
        fl.swap_adapter(m, tmp_path)
        fl.merge(m, keep_base="cpu")
    torch.testing.assert_close(model(X), bare(X))
    fl.unmerge(model)
    assert_equal(unwrapped(model), fl.load_adapter(build(), tmp_path))


def test_gates_and_pruning(wrap):
    bare = gated()
    model = wrap(copy.deepcopy(bare))
    assert list(named_gates(model)) == list(named_gates(bare))
    assert gate_counts(model) == gate_counts(bare)
    assert kept_parameters(model) == kept_parameters(bare)
    x = X
    want = bare(x)
    assert [layer.name for layer in prune(model).layers] == list(named_gates(bare))
    torch.testing.assert_close(model(x), want)


def test_a_store(wrap, tmp_path):
    fl.save_adapter(injected(), tmp_path)
    model = wrap(build())
    store = fl.AdapterStore(model, 2, 4)
    store.load("a", tmp_path)
    with store.route(["a"] * len(X)):
        got = model(X)
    torch.testing.assert_close(got, injected()(X))


def test_adalora(wrap, tmp_path):
    model = wrap(injected(adalora=True))
    fl.save_adapter(model, tmp_path)
    plain = wrap(build())
    fl.load_adapter(plain, tmp_path)
    assert_equal(unwrapped(plain), unwrapped(model))


def test_keys_that_a_compiled_block_had_in_the_file(tmp_path):
    """As other libraries save such a model."""
    fl.save_adapter(injected(rank_pattern={"layers.0.up": 2}), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    found = {k.replace(".0.", ".0._orig_mod."): t for k, t in load_file(path).items()}
    save_file(found, path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("0\\\\.up", "0\\\\._orig_mod\\\\.up"))
    assert "layers.0.up" in read_adapter(tmp_path)
    assert_equal(fl.load_adapter(build(), tmp_path), injected(rank_pattern={"layers.0.up": 2}))
    one = next(k for k in found if "_orig_mod" in k)
    save_file(found | {one.replace("_orig_mod.", ""): found[one].clone()}, path)
    with pytest.raises(ValueError, match="name one tensor"):
        read_adapter(tmp_path)


# Data parallel and FSDP1, on two processes


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@contextmanager
def refused(error, words):
    """pytest.raises, but with an AssertionError, which a rank passes on."""
    try:
        yield
    except Exception as raised:
        assert isinstance(raised, error) and re.search(words, str(raised)), repr(raised)
    else:
        raise AssertionError(f"not refused: {words}")


def ddp(folder):
    from torch.nn.parallel import DistributedDataParallel

    model = injected()
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    if torch.distributed.get_rank() == 0:
        fl.save_adapter(wrapped, f"{folder}/a")
        assert_equal(fl.load_adapter(build(), f"{folder}/a"), model)
        fl.save_adapter(injected(r=2), f"{folder}/b")
    torch.distributed.barrier()
    fl.load_adapter(wrapped, f"{folder}/a")
    fl.swap_adapter(wrapped, f"{folder}/a")
    before = wrapped(X)
    fl.merge(wrapped)
    torch.testing.assert_close(wrapped(X), before)
    fl.unmerge(wrapped)
    with refused(RuntimeError, "swap_adapter to another rank before DistributedDataParallel"):
        fl.swap_adapter(wrapped, f"{folder}/b")
    plain = DistributedDataParallel(build())
    with refused(RuntimeError, "load_adapter before DistributedDataParallel"):
        fl.load_adapter(plain, f"{folder}/a")
    with refused(RuntimeError, "inject before DistributedDataParallel"):
        fl.inject(plain, fl.LoRAConfig(target_modules=["q"]))
    store = fl.AdapterStore(plain, 1, 4)
    store.load("a", f"{folder}/a")
    assert set(store.layers) == set(adapters(model))


def fsdp(folder, original):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    options = {"device_id": torch.device("cpu"), "use_orig_params": original}
    alone = gated().requires_grad_(True)
    model = copy.deepcopy(alone)
    model.layers[0] = FSDP(model.layers[0], **options)
    model = FSDP(model, **options)
    rank = torch.distributed.get_rank()
    if rank == 0:
        fl.save_adapter(alone, f"{folder}/a")
        fl.save_adapter(gated(lora_alpha=3), f"{folder}/b")
        fl.save_adapter(injected(r=2), f"{folder}/c")
    torch.distributed.barrier()
    calls = {
        "save": lambda: fl.save_adapter(model, f"{folder}/no{rank}"),
        "load": lambda: fl.load_adapter(model, f"{folder}/a"),
        "swap": lambda: fl.swap_adapter(model, f"{folder}/a"),
        "merge": lambda: fl.merge(model),
        "unmerge": lambda: fl.unmerge(model),
        "gates": lambda: named_gates(model),
        "kept": lambda: kept_parameters(model),
    }
    for call in calls.values():
        with refused(NotImplementedError, r"FullyShardedDataParallel.summon_full_params\(model\)"):
            call()
    made = FSDP(build(), **options)
    config = fl.LoRAConfig(target_modules=["q"])
    for call in (
        lambda: prune(model),
        lambda: fl.inject(made, config),
        lambda: fl.load_adapter(made, f"{folder}/c"),
        lambda: fl.AdapterStore(made, 1, 4),
    ):
        with refused(RuntimeError, "before FullyShardedDataParallel: it takes no new Parameters"):
            call()
    want = {name: g.detach().clone() for name, g in named_gates(alone).items()}
    with FSDP.summon_full_params(model):
        fl.save_adapter(model, f"{folder}/whole{rank}")
        found = named_gates(model)
        assert list(found) == list(want)
        assert all(torch.equal(found[n], g) for n, g in want.items())
        fl.load_adapter(model, f"{folder}/b")
    y = model(X)
    other = fl.load_adapter(copy.deepcopy(alone), f"{folder}/b")
    torch.testing.assert_close(y, other(X))
    with FSDP.summon_full_params(model):
        fl.swap_adapter(model, f"{folder}/a")
        fl.merge(model)
    torch.testing.assert_close(model(X), alone(X))
    with FSDP.summon_full_params(model):
        fl.unmerge(model)
    torch.testing.assert_close(model(X), alone(X))
    with FSDP.summon_full_params(model), refused(RuntimeError, "before FullyShardedDataParallel"):
        prune(model)
    return [f"{folder}/whole{rank}", f"{folder}/no{rank}"]


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo")
def test_distributed_data_parallel(two, tmp_path):
    two.run(ddp, str(tmp_path))


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo")
@pytest.mark.parametrize("original", [True, False], ids=["original", "flat"])
def test_fully_sharded_data_parallel(two, tmp_path, original):
    """Whole within summon_full_params, on each rank; refused by name elsewhere, nothing written."""
    two.run(fsdp, str(tmp_path), original)
    want = stored(tmp_path / "a")
    for rank in (0, 1):
        got = stored(tmp_path / f"whole{rank}")
        assert want.keys() == got.keys() and all(torch.equal(t, got[k]) for k, t in want.items())
        assert not (tmp_path / f"no{rank}").exists()
