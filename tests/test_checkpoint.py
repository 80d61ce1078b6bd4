"""read_adapter: PEFT's folders, and every way in which a folder can be bad, in under a second."""

import json
import math
import pathlib
import re
import shlex
import sys
import time

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from fused_lora.checkpoint import read_adapter
from fused_lora.checkpoint.formats import KNOWN, UNSUPPORTED

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q"]}
Q = "base_model.model.layers.0.q"


def tensors(r=3, **more):
    return {
        f"{Q}.lora_A.weight": torch.randn(r, 8),
        f"{Q}.lora_B.weight": torch.randn(5, r),
        **more,
    }


def folder(path, config=CONFIG, found=None):
    path.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "adapter_config.json").write_text(text)
    save_file(tensors() if found is None else found, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("rslora, scale", [(False, 2.0), (True, 6 / math.sqrt(3))])
def test_a_folder(tmp_path, rslora, scale):
    found = tensors()
    read = read_adapter(str(folder(tmp_path / "a", CONFIG | {"use_rslora": rslora}, found)))
    assert list(read) == ["layers.0.q"]
    weights = read["layers.0.q"]
    assert torch.equal(weights.lora_a, found[f"{Q}.lora_A.weight"])
    assert torch.equal(weights.lora_b, found[f"{Q}.lora_B.weight"])
    assert weights.scale == pytest.approx(scale) and weights.gate is None


@pytest.mark.parametrize(
    "key, read",
    [
        *((key, True) for key in ("q", "layers.0.q", "^layers.0.q$", "0.q", r"layers\.0\.q")),
        *((key, False) for key in ("^q", "^0.q", "s.0.q", "layers", "layers.0.q.x", r"layers\.0")),
    ],
)
def test_patterns_are_names_or_ends_of_names(tmp_path, key, read):
    config = CONFIG | {"rank_pattern": {key: 4}, "alpha_pattern": {key: 2, "other": 9}}
    path = folder(tmp_path / "a", config, tensors(4 if read else 3))
    (weights,) = read_adapter(path).values()
    assert weights.scale == (0.5 if read else 2)


def test_the_first_pattern_counts(tmp_path):
    config = CONFIG | {"alpha_pattern": {"x.q": 1, "0.q": 9, "layers.0.q": 5, "q": 7}}
    (weights,) = read_adapter(folder(tmp_path / "a", config)).values()
    assert weights.scale == 3


def test_names_may_have_any_character(tmp_path):
    name = "la-yers.0+1.q (x)$"
    found = {key.replace("layers.0.q", name): t for key, t in tensors(4).items()}
    config = CONFIG | {"rank_pattern": {"^" + re.escape(name): 4}}
    assert list(read_adapter(folder(tmp_path / "a", config, found))) == [name]


def test_the_tensors_tell_the_rank_where_a_pattern_is_an_expression(tmp_path):
    config = CONFIG | {"rank_pattern": {r"layers\.\d+\.(q|v)": 4}}
    (weights,) = read_adapter(folder(tmp_path / "a", config, tensors(4))).values()
    assert weights.scale == 1.5 and weights.lora_a.shape[0] == 4
    with pytest.raises(ValueError, match=r"must have shape \[3, K\], got \[5, 8\]"):
        read_adapter(folder(tmp_path / "a", config, tensors(5)))


def test_a_gated_folder(tmp_path):
    gate = torch.randn(3)
    config = CONFIG | {"peft_type": "SORA"}
    (weights,) = read_adapter(
        folder(tmp_path / "a", config, tensors(**{f"{Q}.lora_gate": gate}))
    ).values()
    assert torch.equal(weights.gate, gate)


LONG = "(a+)+" * 5 + "$"
DEEP = "[" * 100_000
MIB = " " * 2**21
KEYS = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
A = f"{{weights}}: {KEYS[0]} must have shape [3, K], got "

# What is wrong: config, tensors, the error, and its whole message.
BAD = {
    "broken": (
        '{"r": 3',
        None,
        ValueError,
        "{config}: Expecting ',' delimiter: line 1 column 8 (char 7)",
    ),
    "twice": ('{"r": 3, "r": 4}', None, ValueError, "{config}: the key 'r' occurs twice"),
    "no object": ("[1]", None, ValueError, "{config} must hold an object, got list"),
    "deep": (DEEP, None, ValueError, "{config}: too many brackets in each other"),
    "large": (MIB, None, ValueError, "{config} is larger than 1048576 bytes"),
    "unknown type": (
        {"peft_type": "EVIL"},
        None,
        ValueError,
        "{config}: peft_type must be one of LORA, SORA, got 'EVIL'",
    ),
    "a list of types": (
        {"peft_type": ["LORA"]},
        None,
        ValueError,
        "{config}: peft_type must be one of LORA, SORA, got ['LORA']",
    ),
    "r str": ({"r": "4"}, None, TypeError, "{config}: r must be an int, got '4'"),
    "r bool": ({"r": True}, None, TypeError, "{config}: r must be an int, got True"),
    "r 0": ({"r": 0}, None, ValueError, "{config}: r must lie in [1, 4096], got 0"),
    "r -1": ({"r": -1}, None, ValueError, "{config}: r must lie in [1, 4096], got -1"),
    "r 1e6": ({"r": 10**6}, None, ValueError, "{config}: r must lie in [1, 4096], got 1000000"),
    "alpha inf": (
        {"lora_alpha": math.inf},
        None,
        ValueError,
        "{config}: lora_alpha must be finite, got inf",
    ),
    "alpha nan": (
        {"lora_alpha": math.nan},
        None,
        ValueError,
        "{config}: lora_alpha must be finite, got nan",
    ),
    "alpha not in fp32": (
        {"lora_alpha": 10**40},
        None,
        ValueError,
        f"{{config}}: lora_alpha must be finite, got {10**40}",
    ),
    "alpha null": (
        {"lora_alpha": None},
        None,
        TypeError,
        "{config}: lora_alpha must be a number, got None",
    ),
    "ranks list": (
        {"rank_pattern": [3]},
        None,
        TypeError,
        "{config}: rank_pattern must be an object, got list",
    ),
    "ranks 0": (
        {"rank_pattern": {"q": 0}},
        None,
        ValueError,
        "{config}: rank_pattern['q'] must lie in [1, 4096], got 0",
    ),
    "alphas nan": (
        {"alpha_pattern": {"q": math.nan}},
        None,
        ValueError,
        "{config}: alpha_pattern['q'] must be finite, got nan",
    ),
    "alphas regex": (
        {"alpha_pattern": {LONG: 1}},
        None,
        NotImplementedError,
        f"{{config}}: alpha_pattern has the key {LONG!r}, a regular expression, "
        "which is never run; write the names of modules",
    ),
    "rslora": (
        {"use_rslora": "yes"},
        None,
        TypeError,
        "{config}: use_rslora must be true or false, got 'yes'",
    ),
    "dropout": (
        {"lora_dropout": 2},
        None,
        ValueError,
        "{config}: lora_dropout must lie in [0, 1], got 2",
    ),
    "dora": (
        {"use_dora": True},
        None,
        NotImplementedError,
        "{config}: use_dora=True is not supported: it scales the rows of the weight (DoRA)",
    ),
    "lora_bias": (
        {"lora_bias": True},
        None,
        NotImplementedError,
        "{config}: lora_bias=True is not supported: lora_B would have a bias of its own",
    ),
    "pissa": (
        {"init_lora_weights": "pissa"},
        None,
        NotImplementedError,
        "{config}: init_lora_weights='pissa' is not supported: the adapter belongs "
        "to a base weight that PEFT changes; save it as plain LoRA, with PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    ),
    "bias": (
        {"bias": "all"},
        None,
        NotImplementedError,
        "{config}: bias='all' is not supported: this model's own parameters stay as they are",
    ),
    "whole modules": (
        {"modules_to_save": ["h"]},
        None,
        NotImplementedError,
        "{config}: modules_to_save=['h'] is not supported: this model's own "
        "parameters stay as they are",
    ),
    "no lora_B": (
        {},
        {KEYS[0]: torch.zeros(3, 8)},
        KeyError,
        f"{{weights}}: missing ['{KEYS[1]}'], unexpected none",
    ),
    "extra": (
        {},
        tensors(extra=torch.zeros(1)),
        KeyError,
        "{weights}: missing nothing, unexpected ['extra']",
    ),
    "bias in file": (
        {},
        tensors(**{f"{Q}.base_layer.bias": torch.zeros(5)}),
        KeyError,
        f"{{weights}}: missing nothing, unexpected ['{Q}.base_layer.bias']",
    ),
    "magnitude": (
        {},
        tensors(**{f"{Q}.lora_magnitude_vector": torch.zeros(5)}),
        KeyError,
        f"{{weights}}: missing nothing, unexpected ['{Q}.lora_magnitude_vector']",
    ),
    "nothing": ({}, {}, KeyError, "{weights}: missing nothing, unexpected none"),
    "a gate": (
        {},
        tensors(**{f"{Q}.lora_gate": torch.ones(3)}),
        KeyError,
        f"{{weights}}: missing nothing, unexpected ['{Q}.lora_gate']",
    ),
    "no gate": (
        {"peft_type": "SORA"},
        None,
        KeyError,
        f"{{weights}}: missing ['{Q}.lora_gate'], unexpected none",
    ),
    "long gate": (
        {"peft_type": "SORA"},
        tensors(**{f"{Q}.lora_gate": torch.ones(4)}),
        ValueError,
        f"{{weights}}: {Q}.lora_gate must have shape [3], got [4]",
    ),
    "dots": (
        {},
        {k.replace("0.q", "..q"): t for k, t in tensors().items()},
        ValueError,
        "{weights}: 'base_model.model.layers...q.lora_A.weight' does not name a tensor of a model",
    ),
    "up": (
        {},
        {k.replace("layers", "../../x"): t for k, t in tensors().items()},
        ValueError,
        "{weights}: 'base_model.model.../../x.0.q.lora_A.weight' does not name a tensor of a model",
    ),
    "rank": ({}, tensors(4), ValueError, A + "[4, 8]"),
    "transposed": (
        {},
        {k: t.t().contiguous() for k, t in tensors().items()},
        ValueError,
        A + "[8, 3]",
    ),
    "one dimension": ({}, {k: t[0].clone() for k, t in tensors().items()}, ValueError, A + "[8]"),
    "empty": ({}, {k: t[:, :0].clone() for k, t in tensors().items()}, ValueError, A + "[3, 0]"),
    "int8": (
        {},
        {k: t.to(torch.int8) for k, t in tensors().items()},
        TypeError,
        f"{{weights}}: {KEYS[0]} must be F32, F16 or BF16, got I8",
    ),
    "fp64": (
        {},
        {k: t.double() for k, t in tensors().items()},
        TypeError,
        f"{{weights}}: {KEYS[0]} must be F32, F16 or BF16, got F64",
    ),
    "NaN": (
        {},
        {k: t * math.nan for k, t in tensors().items()},
        ValueError,
        f"{{weights}}: {KEYS[0]} has values that are NaN or infinite",
    ),
    "inf": (
        {},
        {k: t / 0 for k, t in tensors().items()},
        ValueError,
        f"{{weights}}: {KEYS[0]} has values that are NaN or infinite",
    ),
}


class Unread:
    """A safetensors file whose tensors are not to be read."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)

    def get_tensor(self, key):
        raise AssertionError(f"{key} was read")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder(tmp_path, monkeypatch, name):
    """The message, in under a second, and with no tensor read unless its values are what is bad."""
    config, found, error, message = BAD[name]
    config = config if isinstance(config, str) else CONFIG | config
    path = folder(tmp_path / "a", config, found)
    if name not in ("NaN", "inf"):
        real = safetensors.safe_open
        monkeypatch.setattr(safetensors, "safe_open", lambda *a, **kw: Unread(real(*a, **kw)))
    start = time.perf_counter()
    with pytest.raises(error) as raised:
        read_adapter(path)
    assert time.perf_counter() - start < 1
    wanted = message.replace("{config}", str(path / "adapter_config.json"))
    wanted = wanted.replace("{weights}", str(path / "adapter_model.safetensors"))
    assert raised.value.args[0] == wanted


def test_every_field_that_changes_the_adapter_is_refused(tmp_path):
    for name, (_, reason) in UNSUPPORTED.items():
        path = folder(tmp_path / "a", CONFIG | {name: {"x": 1}})
        with pytest.raises(NotImplementedError, match=f"{name}=.* is not supported: "):
            read_adapter(path)
        assert reason


def test_the_fields_of_peft_are_known():
    """What a newer PEFT adds must be looked at: it may change what an adapter computes."""
    peft = pytest.importorskip("peft")
    fields = set(peft.LoraConfig.__dataclass_fields__)
    assert fields - KNOWN - set(UNSUPPORTED) == set()


def test_an_unknown_field_is_a_warning(tmp_path):
    path = folder(tmp_path / "a", CONFIG | {"use_magic": True})
    with pytest.warns(UserWarning, match="unknown fields, ignored: use_magic") as caught:
        read_adapter(path)
    assert caught[0].filename == __file__


def test_names_of_modules_in_a_config_are_not_imported(tmp_path):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    config = CONFIG | {
        "megatron_core": "evil_module",
        "megatron_config": {"x": 1},
        "auto_mapping": {"parent_library": "evil_module", "base_model_class": "X"},
    }
    sys.path.insert(0, str(tmp_path))
    try:
        assert list(read_adapter(folder(tmp_path / "a", config))) == ["layers.0.q"]
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module" not in sys.modules


def test_no_pattern_of_a_config_is_run(tmp_path):
    """Not one that would run for hours, wherever it stands."""
    config = CONFIG | {"target_modules": LONG, "exclude_modules": LONG, "rank_pattern": {LONG: 5}}
    start = time.perf_counter()
    assert list(read_adapter(folder(tmp_path / "a", config))) == ["layers.0.q"]
    assert time.perf_counter() - start < 1


def test_a_truncated_file_and_a_header_of_2_to_the_60(tmp_path):
    path = folder(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-20], whole[:50], (2**60).to_bytes(8, "little") + whole[8:], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: "):
            read_adapter(path)


def test_the_header_is_small_and_no_key_of_it_occurs_twice(tmp_path):
    path = folder(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    one = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{one}, {one}}}".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="safetensors: the key 'a' occurs twice"):
        read_adapter(path)
    with file.open("wb") as out:
        out.write((2**24 + 1).to_bytes(8, "little"))
        out.truncate(2**40)  # a hole: a file that pretends to be large
    with pytest.raises(ValueError, match="a header of 16777217 bytes; at most 16777216 are read"):
        read_adapter(path)


class Bomb:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("exploded"),))


def test_a_pickle_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder(tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    torch.save({"x": Bomb()}, weights)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: "):
        read_adapter(path)
    weights.rename(path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors; a pickle is never"):
        read_adapter(path)
    with pytest.raises(NotADirectoryError, match=r"\.bin is a file; .*; a pickle is never opened"):
        read_adapter(path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="has no adapter_config"):
        read_adapter(tmp_path / "b")
    assert not (tmp_path / "exploded").exists()


def test_the_command_in_the_message_makes_safetensors(tmp_path):
    path = folder(tmp_path / "a")
    found = tensors()
    (path / "adapter_model.safetensors").unlink()
    torch.save(found, path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError) as raised:
        read_adapter(path)
    command = str(raised.value).partition("made it: ")[2]
    python, option, code = shlex.split(command)  # as a shell does
    assert (python, option) == ("python", "-c")
    exec(code, {})
    assert torch.equal(read_adapter(path)["layers.0.q"].lora_a, found[KEYS[0]])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder(tmp_path, name):
    path, other = folder(tmp_path / "a"), folder(tmp_path / "b")
    (path / name).unlink()
    (path / name).symlink_to(other / name)
    with pytest.raises(ValueError, match=r"leads out of its folder, to .*/b/.* cp -rL"):
        read_adapter(path)
    (path / name).unlink()
    (other / name).rename(path / "elsewhere")
    (path / name).symlink_to("elsewhere")
    assert read_adapter(path)
