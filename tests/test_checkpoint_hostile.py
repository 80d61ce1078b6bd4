"""Folders that somebody made to hurt: linear work, short messages, documented errors, no change."""

import json
import random
import shutil
import struct
import sys
import warnings

import pytest
import torch
from conftest import DEVICE, EXTENT
from safetensors.torch import load_file, save, save_file
from test_save_adapter import build, injected, untouched
from torch.nn import Embedding, Linear, Module
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lora as fl
from fused_lora import files
from fused_lora.checkpoint import read_adapter, reading
from fused_lora.checkpoint.adalora import read_adalora
from fused_lora.checkpoint.convert import convert_loralib, convert_peft
from fused_lora.checkpoint.merging import merge_folder
from fused_lora.files import few, short, shown, shown_name
from fused_lora.inject import nearest
from fused_lora.nn import DePT
from fused_lora.nn.dept import read_dept

P = "base_model.model."
DOCUMENTED = OSError, KeyError, TypeError, ValueError, NotImplementedError, RuntimeError
LONGEST = 2048


def text_of(error: BaseException) -> str:
    return error.args[0] if isinstance(error, KeyError) else str(error)


def header_of(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A safetensors file of zeros: {name: (dtype, shape)}."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1}[
            dtype
        ]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(end)


def folder(path, config, tensors):
    path.mkdir(exist_ok=True)
    (path / files.CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    data = tensors if isinstance(tensors, bytes) else header_of(tensors)
    (path / files.WEIGHTS).write_bytes(data)
    return path


LORA = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
ADALORA = {"peft_type": "ADALORA", "init_r": 1, "lora_alpha": 2}
Q = {f"{P}q.lora_A.weight": ("F32", [1, 8]), f"{P}q.lora_B.weight": ("F32", [8, 1])}
E = {
    f"{P}q.lora_A": ("F32", [1, 8]),
    f"{P}q.lora_B": ("F32", [8, 1]),
    f"{P}q.lora_E": ("F32", [1, 1]),
}


# Messages


def test_words_of_a_file_are_cut():
    for value in ("x" * 10**6, ["x" * 1000] * 1000, {"a" * 999: 1}, 10**4000, "\x1b[31m\n", 7):
        assert len(shown(value)) < 200
    deep: list = []
    for _ in range(sys.getrecursionlimit() * 3):
        deep = [deep]
    assert len(shown(deep)) < 200
    assert shown("a'b") == repr("a'b") and shown([1, 2]) == "[1, 2]" and shown(None) == "None"
    assert shown_name("layers.0.q") == "layers.0.q" and len(shown_name("x" * 10**6)) < 200
    for name in ("a\nb", "a\x1b[2J", "\ud800"):
        assert shown_name(name).isprintable()
    assert few(["a"]) == "['a']" and few("abc") == "['a', 'b', 'c']"
    assert few([str(i) for i in range(10**5)]) == "['0', '1', '2'] and 99997 more"
    assert len(short("x" * 10**6)) < 500 and short("a") == "a"
    many = nearest(["y" * 1000] * 1000, [f"{'y' * 1000}{i}" for i in range(100)])
    assert len(many) < LONGEST


PLAIN = ["layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight"]
MINE = [f"{P}e.lora_embedding_A.mine", f"{P}e.lora_embedding_B.mine"]
LEFT_OUT = "PEFT's save_pretrained leaves it out"
FOREIGN = {
    "none": (PLAIN, f"its keys start with 'layers.'; '{P}' is wanted"),
    "no common one": (
        [PLAIN[0], "head.lora_B.weight"],
        f"its keys, such as 'head.lora_B.weight', do not start with '{P}'",
    ),
    "of a wrapper": (
        [f"module.{key}" for key in Q],
        f"its keys start with 'module.{P}'; '{P}' is wanted",
    ),
    "an adapter's name": (
        [key.replace(".weight", ".default.weight") for key in Q],
        f"its keys have the name of an adapter, 'default', after lora_A; {LEFT_OUT}",
    ),
    "of an embedding": (
        MINE,
        f"its keys have the name of an adapter, 'mine', after lora_embedding_A; {LEFT_OUT}",
    ),
}


@pytest.mark.parametrize("keys, words", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("more", [1, 300], ids=["one layer", "many"])
def test_keys_of_another_prefix_are_one_sentence(tmp_path, keys, words, more):
    found = {
        k.replace("q.", f"q{i}.") if i else k: ("F32", [1, 8]) for i in range(more) for k in keys
    }
    path = folder(tmp_path / "a", LORA, found)
    with pytest.raises(KeyError) as raised:
        fl.load_adapter(build(), path)
    assert raised.value.args[0] == f"{path / files.WEIGHTS}: {words}"


def test_the_first_few_of_many_tensors_are_named(tmp_path):
    for unknown, config, layer in ((100_000, LORA, Q), (100_000, ADALORA, E)):
        found = layer | {f"{P}unknown.{i:07}.x": ("F32", []) for i in range(unknown)}
        path = folder(tmp_path / "a", config, header_of(found))
        with pytest.raises(KeyError) as raised:
            fl.load_adapter(build(), path)
        words = text_of(raised.value)
        assert len(words) < LONGEST
        assert words.endswith(
            f"unexpected ['{P}unknown.0000000.x', '{P}unknown.0000001.x', '{P}unknown.0000002.x'] "
            f"and 99997 more"
        )


# Work


class Counted:
    """Calls of Python functions and of builtins while it is entered."""

    def __enter__(self):
        self.calls = 0
        sys.setprofile(self._count)
        return self

    def _count(self, frame, event, arg):
        self.calls += event in ("call", "c_call")

    def __exit__(self, *error):
        sys.setprofile(None)


def of_modules_to_save(n):
    return LORA | {"modules_to_save": [f"m{i:06}" for i in range(n)]}, {
        **Q, **{f"{P}a.b.c.d.e.{i:06}.weight": ("F32", []) for i in range(n)},
    }  # fmt: skip


def of_names_with_dots(n):
    return LORA | {"modules_to_save": ["x"]}, {
        **Q, **{P + f"{i:04}" + ".a" * 27 + ".weight": ("F32", []) for i in range(n)},
    }  # fmt: skip


def of_unread_patterns(n):
    patterns = {f"(x{i})": 1 + i % 4096 for i in range(n)}
    return LORA | {"rank_pattern": patterns}, {
        key.replace("q.", f"q{i}."): value for i in range(n) for key, value in Q.items()
    }


def of_names_in_patterns(n):
    patterns = {f"x{i}": 1 for i in range(n)}
    return LORA | {"rank_pattern": patterns, "alpha_pattern": patterns}, {
        key.replace("q.", f"q{i}."): value for i in range(n) for key, value in Q.items()
    }


def of_adalora_masks(n):
    patterns = {f"q{i}.lora_E": [True] for i in range(n)}
    return ADALORA | {"rank_pattern": patterns}, {
        key.replace("q.", f"q{i}."): value for i in range(n) for key, value in E.items()
    }


def of_lengths(n):
    """As many lengths of names as a config holds, each a quarter of what is read."""
    return LORA | {"modules_to_save": ["a" * i for i in range(1, n)]}, dict(Q)


SIZES = (
    of_modules_to_save, of_names_with_dots, of_unread_patterns, of_names_in_patterns,
    of_adalora_masks, of_lengths,
)  # fmt: skip


@pytest.mark.parametrize("make", SIZES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("call", [fl.load_adapter, fl.swap_adapter], ids=lambda call: call.__name__)
def test_work_is_linear_in_the_size_of_the_files(tmp_path, make, call):
    """Four times the file is not much more than four times the calls: the square would be 16."""
    calls = []
    for n in (500, 2000):
        path = folder(tmp_path / str(n), *make(n))
        model = build() if call is fl.load_adapter else injected(targets="q", r=1)
        with Counted() as counted, pytest.raises(DOCUMENTED) as raised:
            call(model, path)
        assert len(text_of(raised.value)) < LONGEST
        calls.append(counted.calls)
    assert calls[1] < 6 * calls[0] + 1000, calls


def test_lookups_of_endings_are_few(tmp_path):
    """A set of names a length: with 100,000 names, no more than there are lengths."""
    looked = []

    class Names(set):
        def __contains__(self, name):
            looked.append(name)
            return super().__contains__(name)

    endings = reading.Endings("modules_to_save", [f"m{i}" for i in range(100_000)])
    endings._by_length = {n: Names(names) for n, names in endings._by_length.items()}
    assert endings.match("layers.m99999") and not endings.match("layers.x99999")
    assert len(looked) <= 12
    for names, words in (
        (["a" * i for i in range(1, 70)], "69 different lengths"),
        (["a", ""], "empty name"),
    ):
        with pytest.raises(ValueError, match=f"modules_to_save has .*{words}"):
            reading.Endings("modules_to_save", names)
    for names in ("abc", [1], {"a": 1}):
        with pytest.raises(TypeError, match="must be a list of names"):
            reading.Endings("modules_to_save", names)


def test_a_name_of_450_dots_is_refused(tmp_path):
    found = Q | {P + "a." * 450 + "weight": ("F32", [])}
    path = folder(tmp_path / "a", LORA | {"modules_to_save": ["x"]}, found)
    untouched(build(), path, ValueError, "does not name a tensor of a model")


def test_layers_are_made_no_larger_than_the_file(tmp_path, monkeypatch):
    """r of the config is not what is allocated, where the tensors have another rank."""
    path = folder(tmp_path / "a", LORA | {"r": 4096, "rank_pattern": {"q": 1}}, Q)
    made = []
    real = torch.Tensor.new_empty

    def new_empty(self, *size, **options):
        made.append(real(self, *size, **options))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    model = build()
    del model.a, model.layers  # other modules of that name
    model.a = Module()
    fl.load_adapter(model, path)
    assert model.q.r == 1 and model.fused_lora_config.r == 4096
    assert sum(t.numel() for t in made) < 100


# Fuzz


class Small(Module):
    """A model that DePT takes, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.q, self.lm_head = Embedding(6, 4), Linear(4, 4), Linear(4, 6)
        self.config = type("Config", (), {"is_encoder_decoder": False})()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, inputs_embeds=None, attention_mask=None):
        return self.lm_head(self.q(inputs_embeds))


def seeds(tmp_path):
    """Real folders: {name: (config, tensors)}."""
    model = Small()
    fl.inject(model, fl.LoRAConfig(
        target_modules=["q"], r=2, init_lora_weights=False, modules_to_save=["lm_head"], bias="all",
    ))  # fmt: skip
    fl.save_adapter(model, tmp_path / "lora")
    for name, options in {"sora": {"gate": True}, "adalora": {"adalora": True}}.items():
        options |= {"target_modules": ["q", "lm_head"], "r": 2, "init_lora_weights": False}
        model = fl.inject(Small(), fl.LoRAConfig(**options))
        fl.save_adapter(model, tmp_path / name)
    model = Small()
    model.embed_tokens = fl.nn.LoRAEmbedding.from_embedding(model.embed_tokens, r=2, init=False)
    fl.inject(model, fl.LoRAConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    model.fused_lora_base = ["lm_head.weight", "embed_tokens.weight"]
    fl.save_adapter(model, tmp_path / "base")
    DePT(Small(), 3, 5, 2).save(tmp_path / "dept")
    return {
        name: (
            json.loads((tmp_path / name / files.CONFIG).read_text()),
            load_file(tmp_path / name / files.WEIGHTS),
        )
        for name in ("lora", "sora", "adalora", "base", "dept")
    }


VALUES = [
    None, True, 0, -1, 1, 2, 7, 10**18, 10**400, 0.5, float("nan"), float("inf"), -1e308, "", "q",
    "x" * 5000, "none", "LORA", "SORA", "ADALORA", "DEPT", "(a+)+$", "\ud800", "\x1b[31m", [], {},
    [1], ["q"], ["lm_head"], ["x" * 2000] * 50, [[[[]]]], {"q": 1}, {"(a|a)*$": 2},
    {"q.lora_E": [True, False]},
    {"": 1}, {"q": "x" * 3000}, [True] * 5000, {"x" * 4000: {}},
]  # fmt: skip
NAMES = [
    "", ".", "..", "a" * 3000, "a." * 500 + "b", "../../x", "\x00", "\n", "\u202e", "é" * 700, "q",
    f"{P}q.lora_A.weight", f"{P}lm_head.weight", f"{P}q.base_layer.weight", f"{P}q.bias",
    f"{P}embed_tokens.lora_embedding_A", f"{P}q.lora_E", "lora_a", "prompt", "module." + P + "q",
]  # fmt: skip
SHAPES = [
    [],
    [0],
    [1],
    [2, 4],
    [4, 2],
    [2**40],
    [2**31, 2**31],
    [1] * 40,
    [0, 2**62],
    [2],
    [6, 4],
    [-1],
]
DTYPES = ["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "C64", "F4", "x" * 3000, 3, None]


def mutated_config(rng, config) -> bytes:
    config = dict(config)
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(4)
        field = rng.choice([*config, "modules_to_save", "rank_pattern", "alpha_pattern", "bias"])
        if kind == 0:
            config.pop(field, None)
        elif kind == 1:
            config[rng.choice(NAMES)] = rng.choice(VALUES)
        else:
            config[field] = rng.choice(VALUES)
    text = json.dumps(config)
    kind = rng.randrange(8)
    if kind == 0:
        text = text[: rng.randrange(len(text))]
    elif kind == 1:
        depth = rng.choice([50, 990, 50_000])
        text = text[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}"
    elif kind == 2:
        text = text[:-1] + ', "r": 1, "r": 2}'
    return text.encode("utf-8", "surrogatepass")


def mutated_weights(rng, tensors) -> bytes:
    kind = rng.randrange(4)
    tensors = dict(tensors)
    name = rng.choice(list(tensors))
    if kind == 0:  # whole files of other tensors
        if rng.random() < 0.5:
            tensors[rng.choice(NAMES)] = tensors.pop(name)
        else:
            t = tensors[name].flatten()
            tensors[name] = rng.choice([
                t, t[:0], t.double(), t.half(), t.to(torch.int8), t.bool(), t / 0, t.reshape(-1, 1),
                t.to(torch.float8_e5m2), t.to(torch.complex64), t.float() * 1e38, t.repeat(3),
            ])  # fmt: skip
        return save({k: t.contiguous().clone() for k, t in tensors.items()})
    data = bytearray(save({k: t.contiguous() for k, t in tensors.items()}))
    length = struct.unpack("<Q", data[:8])[0]
    if kind == 1:  # the header by field
        header = json.loads(data[8 : 8 + length])
        entry = header[rng.choice(list(header))]
        what = rng.choice(["dtype", "shape", "data_offsets", "name", "more"])
        if what == "dtype":
            entry[what] = rng.choice(DTYPES)
        elif what == "shape":
            entry[what] = rng.choice(SHAPES)
        elif what == "data_offsets":
            entry[what] = rng.choice(
                [[0, 0], [0, 2**62], [8, 4], [-4, 0], [0], "x", [2**63, 2**64]]
            )
        elif what == "name":
            header[rng.choice(NAMES)] = header.pop(rng.choice(list(header)))
        else:
            header["__metadata__"] = rng.choice([{}, {"a": "b"}, 3, {"x" * 3000: "y"}, {"a": 1}])
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            text = text[:-1] + b"," + text[1:]  # each key twice
        return struct.pack("<Q", len(text)) + text + bytes(data[8 + length :])
    if kind == 2:  # cut
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice([1, 4, 40])):  # bytes
        place = rng.randrange(length + 8 if rng.random() < 0.7 else len(data))
        data[place] = rng.randrange(256)
    return bytes(data)


def spoilt(rng, path, config, tensors) -> int:
    """A mutated folder at path; the bytes of its files."""
    path.mkdir()
    text = json.dumps(config).encode()
    data = save({k: t.contiguous() for k, t in tensors.items()})
    kind = rng.randrange(10)
    if kind < 4:
        text = mutated_config(rng, config)
    elif kind < 9:
        data = mutated_weights(rng, tensors)
    (path / files.CONFIG).write_bytes(text)
    (path / files.WEIGHTS).write_bytes(data)
    if kind == 9:
        name = rng.choice([files.CONFIG, files.WEIGHTS])
        (path / name).unlink()
        how = rng.randrange(5)
        if how == 0:
            (path / name).symlink_to("/etc/passwd")
        elif how == 1:
            (path / name).symlink_to(name)  # itself
        elif how == 2:
            (path / name).mkdir()
        elif how == 3:
            (path / files.READY).mkdir()
            (path / files.READY / name).write_bytes(b"{}")
    return len(text) + len(data)


def state(model):
    return (
        {k: t.clone() for k, t in model.state_dict().items()},
        {n: type(m) for n, m in model.named_modules()},
        {n for n, p in model.named_parameters() if p.requires_grad},
        len(model._forward_pre_hooks),
        set(vars(model)),
    )


def same(a, b):
    equal = a[0].keys() == b[0].keys() and all(torch.equal(t, b[0][k]) for k, t in a[0].items())
    return equal and a[1:] == b[1:]


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation has made."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.found = max(self.found, t.untyped_storage().nbytes())
        return out


def readers(tmp_path, models):
    """{name: what reads a folder into a model that it may not change where it fails}."""
    model, out = tmp_path / "model", tmp_path / "out"
    yield "read", lambda path: read_adapter(path), None
    yield "adalora", lambda path: read_adalora(path), None
    yield "dept", lambda path: read_dept(path), None
    yield "convert", lambda path: convert_peft(path, out), None
    yield "loralib", lambda path: convert_loralib(path / files.WEIGHTS, out, 2, 4), None
    yield "merge", lambda path: merge_folder(model, path, out), None
    yield "load", lambda path: fl.load_adapter(models["plain"](), path), "plain"
    yield "reload", lambda path: fl.load_adapter(models["lora"](), path), "lora"
    yield "swap", lambda path: fl.swap_adapter(models["lora"](), path), "lora"
    yield "store", lambda path: models["store"]().load("a", path), None
    yield "from_folder", lambda path: DePT.from_folder(models["plain"](), path), "plain"


CASES = 3000 if EXTENT == "full" else 240


@pytest.mark.skipif(DEVICE != "cpu", reason="no question of the device")
@pytest.mark.parametrize("part", range(4))
def test_mutated_folders(tmp_path, part):
    """Every reader takes it, or raises what is documented, in few words, and the model is as it
    was. Nothing is allocated that is larger than the file."""
    rng = random.Random(part)
    real = seeds(tmp_path)
    (tmp_path / "model").mkdir()
    save_file(Small().state_dict(), tmp_path / "model" / "model.safetensors")
    current, made = {}, []

    def plain():
        return current.setdefault("plain", Small())

    def lora():
        if "lora" not in current:
            current["lora"] = fl.inject(
                Small(), fl.LoRAConfig(target_modules=["q", "lm_head"], r=2)
            )
        return current["lora"]

    def store():
        return fl.AdapterStore(Small(), 1, 8, target_modules=["q", "lm_head"])

    def check(path, size, name, call, touched):
        """Whether the reader takes it."""
        before = None if touched is None else state(models[touched]())
        largest = Largest()
        try:
            with warnings.catch_warnings(), largest:
                warnings.simplefilter("ignore")
                call(path)
        except DOCUMENTED as error:
            words = text_of(error).replace(str(tmp_path), "")
            assert isinstance(words, str) and len(words) < LONGEST, (name, path, len(words))
            words.encode()  # no half of a character, which no terminal takes
            assert type(error) is not RecursionError, (name, path)
            if touched is not None:
                assert same(state(models[touched]()), before), (name, path, words)
            return False
        finally:
            made.append(largest.found)
            assert made[-1] < 16 * size + 4096, (name, path, made[-1])
            for left in ("out", ".out.part"):
                shutil.rmtree(tmp_path / left, ignore_errors=True)
        current.clear()
        return True

    models = {"plain": plain, "lora": lora, "store": store}
    taken: list[bool] = []
    for i in range(CASES // 4):
        config, tensors = real[rng.choice(list(real))]
        path = tmp_path / f"f{i}"
        size = spoilt(rng, path, config, tensors)
        taken += [check(path, size, *reader) for reader in readers(tmp_path, models)]
    assert 0 < sum(taken) < len(taken) / 2 and max(made) > 0


@pytest.mark.skipif(DEVICE != "cpu", reason="no question of the device")
def test_mutated_models_are_merged_into_or_refused(tmp_path):
    """The model's folder is read as strictly as the adapter's, and nothing is left of a failure."""
    rng = random.Random(4)
    config, tensors = seeds(tmp_path)["lora"]
    settings, weights = {"tie_word_embeddings": False, "vocab_size": 6}, Small().state_dict()
    merged = 0
    for i in range(CASES // 8):
        path = tmp_path / f"m{i}"
        spoilt(rng, path, settings, weights)
        for old, new in ((files.CONFIG, "config.json"), (files.WEIGHTS, "model.safetensors")):
            if (path / old).exists() or (path / old).is_symlink():
                (path / old).rename(path / new)
        if rng.random() < 0.3:
            index = {"weight_map": rng.choice([*VALUES, {"q.weight": "model.safetensors"}])}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
            if (path / "model.safetensors").is_file() and rng.random() < 0.5:
                (path / "model.safetensors").rename(path / "other.safetensors")
        try:
            merge_folder(path, tmp_path / "lora", tmp_path / "out")
            merged += 1
        except DOCUMENTED as error:
            words = text_of(error).replace(str(tmp_path), "")
            assert len(words) < LONGEST and type(error) is not RecursionError, (i, len(words))
            assert not (tmp_path / "out").exists(), i
        assert not (tmp_path / ".out.part").exists(), i
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert 0 < merged < CASES // 8
