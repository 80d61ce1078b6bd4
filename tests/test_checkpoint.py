"""read_adapter: PEFT's folders, and every way in which a folder can be bad, in under a second."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import save_file

from fused_lora.checkpoint import read_adapter

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


@pytest.mark.parametrize("key", ["q", "layers.0.q", "^layers.0.q$", "0.q"])
def test_patterns_are_names(tmp_path, key):
    config = CONFIG | {"rank_pattern": {key: 4}, "alpha_pattern": {key: 2, "other": 9}}
    (weights,) = read_adapter(folder(tmp_path / "a", config, tensors(4))).values()
    assert weights.scale == 0.5


def test_a_gated_folder(tmp_path):
    gate = torch.randn(3)
    config = CONFIG | {"peft_type": "SORA"}
    (weights,) = read_adapter(
        folder(tmp_path / "a", config, tensors(**{f"{Q}.lora_gate": gate}))
    ).values()
    assert torch.equal(weights.gate, gate)


def bad(config=None, found=None, error=ValueError, message=""):
    return pytest.param(config or CONFIG, found, error, message, id=message[:40])


LONG = "(a+)+" * 5 + "$"
BAD = [
    bad('{"r": 3', None, ValueError, "adapter_config.json: Expecting"),
    bad('{"r": 3, "r": 4}', None, ValueError, "the key 'r' occurs twice"),
    bad("[1]", None, ValueError, "must hold an object, got list"),
    bad(" " * 2**21, None, ValueError, "is larger than 1048576 bytes"),
    bad(CONFIG | {"peft_type": "EVIL"}, None, ValueError, "must be one of LORA, SORA, got 'EVIL'"),
    bad(CONFIG | {"r": "4"}, None, TypeError, "r must be an int, got '4'"),
    bad(CONFIG | {"r": 0}, None, ValueError, r"r must lie in \[1, 4096\], got 0"),
    bad(CONFIG | {"r": -1}, None, ValueError, r"r must lie in \[1, 4096\], got -1"),
    bad(CONFIG | {"r": 10**6}, None, ValueError, r"r must lie in \[1, 4096\], got 1000000"),
    bad(CONFIG | {"lora_alpha": math.inf}, None, ValueError, "lora_alpha must be finite, got inf"),
    bad(CONFIG | {"lora_alpha": math.nan}, None, ValueError, "lora_alpha must be finite, got nan"),
    bad(CONFIG | {"lora_alpha": None}, None, TypeError, "lora_alpha must be a number, got None"),
    bad(
        CONFIG | {"rank_pattern": [3]}, None, TypeError, "rank_pattern must be an object, got list"
    ),
    bad(CONFIG | {"rank_pattern": {"q": 0}}, None, ValueError, r"rank_pattern\['q'\] must lie in"),
    bad(CONFIG | {"use_dora": True}, None, NotImplementedError, "use_dora=True is not supported"),
    bad(CONFIG | {"bias": "all"}, None, NotImplementedError, "bias='all' is not supported"),
    bad(CONFIG | {"modules_to_save": ["h"]}, None, NotImplementedError, "modules_to_save="),
    bad(None, {f"{Q}.lora_A.weight": torch.zeros(3, 8)}, KeyError, "missing .*lora_B.weight"),
    bad(None, tensors(extra=torch.zeros(1)), KeyError, "unexpected .*'extra'"),
    bad(None, {}, KeyError, "missing nothing, unexpected none"),
    bad(None, tensors(4), ValueError, r"lora_A.weight must have shape \[3, K\], got \[4, 8\]"),
    bad(
        None,
        {f"{Q}.lora_A.weight": torch.zeros(8, 3), f"{Q}.lora_B.weight": torch.zeros(3, 5)},
        ValueError,
        r"must have shape \[3, K\], got \[8, 3\]",
    ),
    bad(
        None,
        {k: t.to(torch.int8) for k, t in tensors().items()},
        TypeError,
        "must be F32, F16 or BF16, got I8",
    ),
    bad(None, {k: t.double() for k, t in tensors().items()}, TypeError, "BF16, got F64"),
    bad(None, {k: t * math.nan for k, t in tensors().items()}, ValueError, "NaN or infinite"),
    bad(None, {k: t / 0 for k, t in tensors().items()}, ValueError, "NaN or infinite$"),
    bad(None, tensors(**{f"{Q}.lora_gate": torch.ones(3)}), ValueError, "gate belongs to .* SORA"),
    bad(CONFIG | {"peft_type": "SORA"}, None, ValueError, "SORA, and layers.0.q of SORA has none"),
]


@pytest.mark.parametrize("config, found, error, message", BAD)
def test_a_bad_folder(tmp_path, config, found, error, message):
    path = folder(tmp_path / "a", config, found)
    start = time.perf_counter()
    with pytest.raises(error, match=message):
        read_adapter(path)
    assert time.perf_counter() - start < 1


def test_no_pattern_of_a_config_is_run(tmp_path):
    """A regular expression that would run for hours is a name that nothing has."""
    config = CONFIG | {"target_modules": LONG, "rank_pattern": {LONG: 5}}
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


def test_a_pickle_is_not_opened(tmp_path):
    path = folder(tmp_path / "a")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors; a pickle is never"):
        read_adapter(path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder(tmp_path, name):
    path, other = folder(tmp_path / "a"), folder(tmp_path / "b")
    (path / name).unlink()
    (path / name).symlink_to(other / name)
    with pytest.raises(ValueError, match="leads out of its folder"):
        read_adapter(path)
