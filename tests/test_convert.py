"""fused-lora convert and merge: what they write, and what they refuse."""

import json
import shlex

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from test_save_adapter import X, assert_equal, build, gated, injected, peft_model, written

import fused_lora as fl
from fused_lora import cli
from fused_lora.checkpoint import convert, merging, read_adapter
from fused_lora.checkpoint.convert import convert_loralib, convert_peft
from fused_lora.checkpoint.merging import merge_folder


def stored(path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict


def run(command: str) -> None:
    """What a shell would do with the command that a message gives."""
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    exec(code, {})


# Convert


def test_gates_are_folded(tmp_path):
    model = gated(lora_alpha=3)
    fl.save_adapter(model, tmp_path / "gated")
    fl.save_adapter(model, tmp_path / "folded", fold_gate=True)
    names = convert_peft(tmp_path / "gated", tmp_path / "converted")
    assert sorted(names) == sorted(written(tmp_path / "gated")["target_modules"])
    ours, other = (
        stored(tmp_path / n / "adapter_model.safetensors") for n in ("converted", "folded")
    )
    assert ours.keys() == other.keys()
    assert all(torch.equal(t, other[key]) for key, t in ours.items())
    assert written(tmp_path / "converted") == written(tmp_path / "folded")
    torch.testing.assert_close(peft_model(build(), tmp_path / "converted")(X), model(X))


def test_a_folder_of_peft_stays_what_it_is(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, target_modules=["q"], init_lora_weights=False, rank_pattern={"^q": 2},
        modules_to_save=["head"], bias="lora_only",
    )  # fmt: skip
    model = peft.get_peft_model(build(), config)
    model.save_pretrained(tmp_path / "a")
    convert_peft(tmp_path / "a", tmp_path / "b")
    assert written(tmp_path / "a") == written(tmp_path / "b")
    ours, other = (stored(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert ours.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in ours.items())


def lora_state(r=4):
    """What loralib's lora_state_dict gives of two of the model's layers."""
    return {
        "layers.0.up.lora_A": torch.randn(r, 8), "layers.0.up.lora_B": torch.randn(16, r),
        "layers.1.q.lora_A": torch.randn(r, 8), "layers.1.q.lora_B": torch.randn(8, r),
    }  # fmt: skip


def test_loralib(tmp_path, capsys):
    """y = x W^T + (lora_alpha / r) x A^T B^T, as loralib.Linear has it."""
    found = lora_state()
    save_file(found, tmp_path / "lora.safetensors")
    code = cli.main([
        "convert", f"{tmp_path}/lora.safetensors", f"{tmp_path}/out", "--json",
        "--from", "loralib", "--r", "4", "--lora-alpha", "6",
    ])  # fmt: skip
    assert code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == f"{tmp_path}/out" and told["layers"] == 2
    model = build()
    with torch.no_grad():
        for name in ("layers.0.up", "layers.1.q"):
            delta = found[f"{name}.lora_B"].double() @ found[f"{name}.lora_A"].double()
            layer = model.get_submodule(name).double()
            layer.weight += 6 / 4 * delta
    assert_equal(model, fl.load_adapter(build(), tmp_path / "out"))
    assert_equal(model, peft_model(build(), tmp_path / "out"))


def test_a_state_of_loralib_that_is_written_while_it_is_read(tmp_path, monkeypatch):
    """The header of one and the tensors of another do not meet: it is read again."""
    first, second = lora_state(), lora_state()
    path = tmp_path / "lora.safetensors"
    save_file(first, path)
    real, left = convert.Header, [second]

    def and_then_another(source):
        header = real(source)
        if left:
            save_file(left.pop(), tmp_path / "new")
            (tmp_path / "new").replace(path)
        return header

    monkeypatch.setattr(convert, "Header", and_then_another)
    convert_loralib(path, tmp_path / "out", 4, 6)
    found = read_adapter(tmp_path / "out")["layers.1.q"]
    assert not left and torch.equal(found.lora_a, second["layers.1.q.lora_A"])


MERGED = {"q.lora_A": torch.zeros(8, 8), "q.lora_B": torch.zeros(12, 4)}


@pytest.mark.parametrize(
    ("found", "error", "words"),
    (
        ({**lora_state(), "q.bias": torch.zeros(8)}, KeyError, r"unexpected \['q\.bias'\]"),
        ({"q.lora_A": torch.zeros(4, 8)}, KeyError, r"missing \['q\.lora_B'\]"),
        ({"lora_A": torch.zeros(4, 8)}, KeyError, r"unexpected \['lora_A'\]"),
        (MERGED, NotImplementedError, "has 8 rows, a multiple of r = 4: a MergedLinear or"),
        (lora_state(3), ValueError, r"up\.lora_A must have shape \[4, K\], got \[3, 8\]"),
        ({k: t.double() for k, t in lora_state().items()}, TypeError, "F32, F16 or BF16, got F64"),
        ({k: t * torch.nan for k, t in lora_state().items()}, ValueError, "NaN or infinite"),
    ),
)  # fmt: skip
def test_what_is_no_lora_of_loralib(tmp_path, found, error, words):
    save_file(found, tmp_path / "lora.safetensors")
    with pytest.raises(error, match=words):
        convert_loralib(tmp_path / "lora.safetensors", tmp_path / "out", 4, 6)
    assert not (tmp_path / "out").exists()


def test_a_pickle_of_loralib_is_not_opened(tmp_path):
    found = lora_state()
    torch.save(found, tmp_path / "it's.pt")
    with pytest.raises(ValueError, match=r"it's\.pt is a pickle, which is never opened") as raised:
        convert_loralib(tmp_path / "it's.pt", tmp_path / "out", 4, 6)
    run(str(raised.value).partition("made it: ")[2])
    convert_loralib(tmp_path / "it's.safetensors", tmp_path / "out", 4, 6)
    assert torch.equal(
        read_adapter(tmp_path / "out")["layers.1.q"].lora_a, found["layers.1.q.lora_A"]
    )
    with pytest.raises(FileExistsError, match="out exists; give another path, or move it away"):
        convert_loralib(tmp_path / "it's.safetensors", tmp_path / "out", 4, 6)
    with pytest.raises(FileNotFoundError, match="nothing is no file"):
        convert_loralib(tmp_path / "nothing", tmp_path / "b", 4, 6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["a", "b", "--from", "loralib", "--r", "4"], "--from loralib needs --r and --lora-alpha"),
        (["a", "b", "--r", "4"], "--r and --lora-alpha are for --from loralib"),
        (["a", "b", "--from", "pickle"], "invalid choice: 'pickle'"),
    ),
)
def test_bad_arguments(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_an_error_is_a_sentence_on_stderr(tmp_path, capsys):
    assert cli.main(["convert", f"{tmp_path}/a", f"{tmp_path}/b"]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"fused-lora convert: {tmp_path}/a has no adapter_config.json\n"
    assert printed.out == ""


# Merge

transformers = pytest.importorskip("transformers")


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def folders(tmp_path, dtype=torch.float32, shards="10GB", gate=False, **options):
    """A model in tmp_path/model, and its adapter in tmp_path/adapter."""
    llama(dtype).save_pretrained(tmp_path / "model", max_shard_size=shards)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"the weights as they were")
    model = injected(model=llama(dtype), gate=gate, **options)
    fl.save_adapter(model, tmp_path / "adapter")
    return model


def weights(folder) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in stored(path).items()}


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge(tmp_path, capsys, dtype, shards):
    """Each weight is W + scale * B diag(g) A of fp64, within one rounding; all else is the same."""
    model = folders(tmp_path, dtype, shards, gate=True, rank_pattern={"q_proj": 5})
    names = [f"{tmp_path}/{n}" for n in ("model", "adapter", "out")]
    assert cli.main(["merge", *names, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    before, after = weights(tmp_path / "model"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fl.nn.LoRALinear)}
    for name, t in after.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(t, before[name])
            continue
        a, b, g = layer.lora_a.double(), layer.lora_b.double(), layer.gate.double()
        exact = before[name].double() + layer.scale * ((b * g) @ a)
        ulp = torch.finfo(dtype).eps * exact.abs() * (0.5 if dtype != torch.float32 else 4)
        assert ((t.double() - exact).abs() <= ulp + 1e-6).all()
        assert t.dtype == dtype and not torch.equal(t, before[name])
    assert told["merged"] == len(layers) == 14 and told["replaced"] == 0
    assert told["shards"] == len(list((tmp_path / "model").glob("*.safetensors")))
    assert (told["shards"] > 1) == (shards == "20KB")
    assert told["left out"] == ["pytorch_model.bin"] and "tokenizer.json" in told["copied"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out"]
    # As transformers loads it.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        mine = model.float()(input_ids=ids).logits
        torch.testing.assert_close(
            loaded.float()(input_ids=ids).logits, mine,
            rtol=0.05, atol={torch.float32: 1e-4}.get(dtype, 0.1) * mine.abs().max().item(),
        )  # fmt: skip


def test_merge_is_what_the_module_merges(tmp_path):
    model = folders(tmp_path, torch.bfloat16, bias="none")
    merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    fl.merge(model)
    found = weights(tmp_path / "out")
    for name, layer in model.named_modules():
        if isinstance(layer, fl.nn.LoRALinear):
            assert torch.equal(found[f"{name}.weight"], layer.weight)


def test_whole_modules_take_the_place_of_the_models(tmp_path):
    model = folders(tmp_path, targets=["q_proj"], modules_to_save=["lm_head", "norm"])
    with torch.no_grad():
        for name in ("lm_head", "model.norm"):
            model.get_submodule(name).weight.normal_()
    fl.save_adapter(model, tmp_path / "adapter")
    told = merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert (told["merged"], told["replaced"]) == (2, 2)
    found = weights(tmp_path / "out")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], model.get_parameter(name))


def test_a_bar_and_a_table(tmp_path, capsys):
    folders(tmp_path)
    assert cli.main(["merge", *(f"{tmp_path}/{n}" for n in ("model", "adapter", "out"))]) == 0
    printed = capsys.readouterr().out
    assert "merged    14\n" in printed and "left out  pytorch_model.bin\n" in printed
    assert "merging" not in printed


def refused(tmp_path, error, words) -> str:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=words) as raised:
        merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return str(raised.value)


def test_tied_weights_are_refused(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    model = injected(model=llama(), targets=["lm_head"])
    fl.save_adapter(model, tmp_path / "adapter")
    words = r"lm_head\.weight is not stored: it is that of the embedding; merging would change both"
    message = refused(tmp_path, ValueError, words)
    run(message.partition("Untie them first: ")[2])
    merge_folder(f"{tmp_path}/model-untied", tmp_path / "adapter", tmp_path / "out")
    found, before = weights(tmp_path / "out"), weights(tmp_path / "model")
    embedding = before["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    layer = model.lm_head
    delta = layer.scale * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(found["lm_head.weight"], embedding + delta)


def test_tied_weights_that_are_both_stored(tmp_path):
    folders(tmp_path, targets=["lm_head"])
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(tmp_path, ValueError, "the output head and the embedding of .*model are tied")
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    found = stored(tmp_path / "model" / "model.safetensors")
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, tmp_path / "model" / "model.safetensors")
    words = "lm_head.weight and model.embed_tokens.weight have the same values"
    refused(tmp_path, ValueError, words)


def test_weights_that_safetensors_says_are_shared(tmp_path):
    model = build()
    model.again = model.head
    (tmp_path / "model").mkdir()
    save_model(model, str(tmp_path / "model" / "model.safetensors"))
    fl.save_adapter(injected(targets=["head"]), tmp_path / "adapter")
    refused(tmp_path, ValueError, r"(again|head)\.weight and (again|head)\.weight are one tensor")


def test_models_that_do_not_fit(tmp_path):
    folders(tmp_path, shards="20KB", targets=["q_proj"])
    model, index = tmp_path / "model", tmp_path / "model" / "model.safetensors.index.json"
    text = index.read_text()
    for name in ("../x.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(tmp_path, ValueError, "is not the name of a file in the folder")
    index.write_text("{}")
    refused(tmp_path, ValueError, "has no weight_map")
    index.write_text(text)
    shard = next(p for p in model.glob("*.safetensors") if "q_proj" in str(stored(p)))
    found = stored(shard)
    name = next(n for n in found if "q_proj" in n)
    save_file(found | {name: found[name].to(torch.float8_e4m3fn)}, shard)
    refused(tmp_path, TypeError, f"{name} of .* is F8_E4M3, which torch.float32 cannot be merged")
    save_file(found | {name: found[name][:3].clone()}, shard)
    refused(tmp_path, ValueError, r"has shape \[3, 32\]; the adapter is for \[32, 32\]")
    save_file({n: t for n, t in found.items() if n != name}, shard)
    refused(tmp_path, ValueError, f"has no tensor '{name}'; nearest: ")
    save_file(found | {name: found[name].half()}, shard)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: t * 1e3 for k, t in stored(path).items()}, path)
    refused(tmp_path, ValueError, f"{name} would have values that F16 cannot hold")
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {}}))
    refused(tmp_path, TypeError, "is quantised")
    (model / "elsewhere").symlink_to(tmp_path / "adapter")
    shard.unlink()
    shard.symlink_to(path)
    refused(tmp_path, ValueError, "leads out of its folder")
    index.unlink()
    refused(tmp_path, FileNotFoundError, "has no model.safetensors .* python -c .*save_pretrained")


def test_a_download_cache_has_links(tmp_path):
    """snapshots/<revision>/file -> ../../blobs/<hash>"""
    folders(tmp_path, targets=["q_proj"])
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate((tmp_path / "model").iterdir()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    told = merge_folder(snapshot, tmp_path / "adapter", tmp_path / "out")
    assert told["merged"] == 2 and not (tmp_path / "out" / "config.json").is_symlink()
    (snapshot / "secret.json").symlink_to(tmp_path / "adapter" / "adapter_config.json")
    with pytest.raises(ValueError, match=r"secret\.json leads out of its folder"):
        merge_folder(snapshot, tmp_path / "adapter", tmp_path / "out2")


def test_no_room_and_no_place(tmp_path, monkeypatch, capsys):
    folders(tmp_path, targets=["q_proj"])
    usage = merging.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(merging.shutil, "disk_usage", lambda path: usage._replace(free=10))
        refused(tmp_path, OSError, r"out needs 0\.0 GiB, and 0\.0 GiB are free")
    (tmp_path / "out").mkdir()
    merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    arguments = [f"{tmp_path}/{n}" for n in ("model", "adapter", "out")]
    capsys.readouterr()
    assert cli.main(["merge", *arguments]) == 1
    words = f"fused-lora merge: {tmp_path}/out exists; give another path, or move it away\n"
    assert capsys.readouterr().err == words


def test_an_error_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    folders(tmp_path, shards="20KB")
    real, left = merging.sync, [3]

    def sync(path):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(merging, "sync", sync)
    with pytest.raises(KeyboardInterrupt):
        merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]
