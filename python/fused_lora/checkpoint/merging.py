"""An adapter merged into the folder of a model, W <- round(W + scale * B diag(g) A), on disk.

Shards are copied, and the merged tensors written into the copies: memory holds one tensor at a
time. The result gets its name when it is whole.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fused_lora.checkpoint.convert import check_target
from fused_lora.checkpoint.formats import AdapterWeights
from fused_lora.checkpoint.reading import Adapter, read_folder
from fused_lora.files import (
    CONFIG,
    Header,
    inside,
    python_command,
    read_json,
    shown,
    shown_name,
    sync,
)
from fused_lora.inject import nearest
from fused_lora.nn.linear import _merge_into

SINGLE, INDEX, SETTINGS = "model.safetensors", "model.safetensors.index.json", "config.json"
LARGEST_INDEX = 2**26
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
# Settings, words and code of a model; other files may hold the weights as they were.
COPIED = ".json", ".jsonl", ".txt", ".model", ".jinja", ".py", ".md", ".tiktoken", ""
# Only tensors of a shape that few have are compared: a head and an embedding, not each layer's.
FEW = 4


@dataclass
class Stored:
    """A tensor of the model: its shard, dtype and shape, and where its bytes are."""

    shard: str
    dtype: str
    shape: list[int]
    start: int
    size: int


class ModelFolder:
    """model.safetensors, or the shards that model.safetensors.index.json lists, and config.json.

    Nothing but headers is read. tensors {name: Stored}, shards [file name], shared {name that is
    not stored: name of the stored tensor that it shares}, settings (config.json, or {}).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / SINGLE).is_file():
            listed = {SINGLE}
        elif (folder / INDEX).is_file():
            listed = self._listed(self.file(INDEX))
        else:
            code = (
                "from transformers import AutoModelForCausalLM as M; "
                f'M.from_pretrained({json.dumps(str(folder))}, dtype="auto")'
                f".save_pretrained({json.dumps(f'{folder}-safetensors')})"
            )
            raise FileNotFoundError(
                f"{folder} has no {SINGLE} and no {INDEX}. If it holds a model in another form: "
                f"{python_command(code)}"
            )
        self.shards = sorted(listed)
        self.tensors: dict[str, Stored] = {}
        self.shared: dict[str, str] = {}
        for shard in self.shards:
            header = Header(self.file(shard))
            for name, found in header.items():
                start, end = found["data_offsets"]
                self.tensors[name] = Stored(
                    shard, found["dtype"], found["shape"], header.start + start, end - start
                )
            self.shared |= {n: kept for n, kept in header.metadata.items() if kept in header}
        self.settings = read_json(self.file(SETTINGS)) if (folder / SETTINGS).exists() else {}
        self._others = {kept: other for other, kept in self.shared.items()} | self.shared
        self._alike: dict[tuple, list[str]] = {}
        for name, stored in self.tensors.items():
            self._alike.setdefault((*stored.shape, stored.dtype), []).append(name)

    def file(self, name: str) -> Path:
        """A file of the folder; as a link only within it, or to the blobs of a download cache."""
        path = self.folder / name
        blobs = self.folder.resolve().parent.parent / "blobs"
        if self.folder.resolve().parent.name == "snapshots" and path.resolve().parent == blobs:
            return path
        return inside(self.folder, name)

    def _listed(self, index: Path) -> set[str]:
        shards = read_json(index, LARGEST_INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index} has no weight_map")
        for name in shards.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index}: {shown(name)} is not the name of a file in the folder")
        return set(shards.values())

    def setting(self, name: str) -> Any:
        text = self.settings.get("text_config")
        return self.settings.get(name, text.get(name) if isinstance(text, dict) else None)

    def read(self, name: str) -> bytes:
        stored = self.tensors[name]
        with self.file(stored.shard).open("rb") as file:
            file.seek(stored.start)
            return file.read(stored.size)

    def holds(self, name: str, t: Tensor) -> bool:
        """Whether the tensor of this name, or the embedding that it is tied to, has these values,
        rounded as they are stored."""
        name = self.shared.get(name, name)
        if name in self.tensors:
            names = [name]
        else:
            names = [n for n, s in self.tensors.items() if s.shape == list(t.shape)]
            if not self.setting("tie_word_embeddings") or len(names) > FEW:
                return False
        for one in names:
            stored = self.tensors[one]
            dtype = DTYPES.get(stored.dtype)
            if dtype is None or stored.shape != list(t.shape):
                continue
            data = torch.frombuffer(bytearray(self.read(one)), dtype=dtype)
            if torch.equal(data.view(stored.shape), t.to(dtype)):
                return True
        return False

    def why_shared(self, name: str) -> str | None:
        """Why a change of the tensor of this name would change another, or be lost."""
        if name in self._others:
            other = shown_name(self._others[name])
            return f"{shown_name(name)} and {other} are one tensor in {self.folder}"
        tied, stored = self.setting("tie_word_embeddings"), self.tensors.get(name)
        if stored is None:
            missing = f"{shown_name(name)} is not stored: it is that of the embedding"
            return missing if tied else None
        if tied and stored.shape[:1] == [self.setting("vocab_size")]:
            return f"the output head and the embedding of {self.folder} are tied ({SETTINGS})"
        form = (*stored.shape, stored.dtype)
        alike = self._alike[form]
        if tied is None and 1 < len(alike) <= FEW:
            data = self.read(name)
            for other in alike:
                if other != name and self.read(other) == data:
                    pair = f"{shown_name(name)} and {shown_name(other)}"
                    return f"{pair} have the same values: they seem to be tied"
        return None


def _untie_command(folder: Path) -> str:
    return python_command(
        "import torch; from transformers import AutoModelForCausalLM as M; "
        f'm = M.from_pretrained({json.dumps(str(folder))}, dtype="auto"); '
        "m.config.tie_word_embeddings = False; h = m.get_output_embeddings(); "
        "h.weight = torch.nn.Parameter(h.weight.detach().clone()); "
        f"m.save_pretrained({json.dumps(f'{folder}-untied')})"
    )


class Change(NamedTuple):
    """What becomes of a stored tensor: `value` takes its place, where there is one, and the product
    of `adapter` is added, transposed where that is of an embedding."""

    value: Tensor | None
    adapter: AdapterWeights | None = None
    transposed: bool = False

    def shape(self) -> list[int]:
        if self.adapter is None:
            return list(self.value.shape)  # type: ignore[union-attr]
        sizes = [self.adapter.lora_b.shape[0], self.adapter.lora_a.shape[1]]
        return sizes[::-1] if self.transposed else sizes

    def product(self):
        """(scale, A, B, gate) of W [N, K] += scale B diag(g) A. Of an embedding E [V, D], whose
        A is [r, V] and B [D, r], it is scale A^T B^T, and it has no gate."""
        a, b, scale, gate = self.adapter
        a, b, gate = (b.t(), a.t(), None) if self.transposed else (a, b, gate)
        return scale, a, b, gate


def _changes(model: ModelFolder, adapter: Adapter) -> dict[str, Change]:
    """{stored tensor: what becomes of it}, all of which fit. A base weight that the model has
    already changes nothing."""
    changes = {f"{name}.weight": Change(None, w) for name, w in adapter.layers.items()}
    changes |= {f"{n}.weight": Change(None, w, True) for n, w in adapter.embeddings.items()}
    for name, t in (adapter.others | adapter.base).items():
        if name in adapter.others or not model.holds(name, t):
            changes[name] = changes.get(name, Change(t))._replace(value=t)
    if "quantization_config" in model.settings:
        raise TypeError(f"{model.folder} is quantised ({SETTINGS}); merge into the model it is of")
    for name, change in changes.items():
        what = shown_name(name)
        if reason := model.why_shared(name):
            raise ValueError(
                f"{reason}; merging would change both, or be lost. Untie them first: "
                f"{_untie_command(model.folder)}"
            )
        if name not in model.tensors:
            raise ValueError(
                f"{model.folder} has no tensor {shown(name)}; nearest: "
                f"{nearest([name], model.tensors)}"
            )
        stored = model.tensors[name]
        dtype = DTYPES.get(stored.dtype)
        parts = [
            t for t in (change.value, change.adapter and change.adapter.lora_a) if t is not None
        ]
        for t in parts:
            if dtype is None or dtype.is_floating_point != t.dtype.is_floating_point:
                raise TypeError(
                    f"{what} of {model.folder} is {stored.dtype}, which {t.dtype} cannot be merged "
                    f"into"
                )
        for shape in (change.shape(), list(parts[0].shape) if change.value is not None else None):
            if shape is not None and stored.shape != shape:
                raise ValueError(
                    f"{what} of {model.folder} has shape {shown(stored.shape)}; the adapter is for "
                    f"{shown(shape)}"
                )
    return changes


def _write(file: BinaryIO, name: str, stored: Stored, change: Change) -> None:
    """Change a tensor in an open file, in fp32 (fp64 for fp64) and rounded once."""
    data = bytearray(stored.size)
    file.seek(stored.start)
    file.readinto(data)  # type: ignore[attr-defined]
    t = torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)
    base = t if change.value is None else change.value.to(t.dtype)
    if change.adapter is None:
        t.copy_(base)
    else:
        _merge_into(t, base, [change.product()])
    if not bool(t.isfinite().all()):
        raise ValueError(f"{shown_name(name)} would have values that {stored.dtype} cannot hold")
    file.seek(stored.start)
    file.write(data)


def _beside(model: ModelFolder) -> tuple[list[str], list[str]]:
    """(other files of the folder that are copied, what is not)."""
    copied: list[str] = []
    left: list[str] = []
    for path in sorted(model.folder.iterdir()):
        if path.name in model.shards:
            continue
        settings = path.suffix in COPIED and not path.name.startswith(".") and path.is_file()
        stale = path.name.endswith(".index.json") and (path.name != INDEX or SINGLE in model.shards)
        # Beside a config of an adapter, transformers would take the folder for an adapter.
        keep = settings and not stale and path.name != CONFIG
        (copied if keep else left).append(path.name)
    return copied, left


def merge_folder(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Write the folder `out`: the model with the adapter merged into its weights.

    model: model.safetensors, or shards and their index, as transformers saves them; settings and
    tokenizer are copied. adapter: a folder of PEFT's or save_adapter's, whose names are those of
    the stored tensors; its biases, modules_to_save and base weights replace the model's. Each
    weight becomes round(W + scale * B diag(g) A), of an embedding round(E + scale * A^T B^T),
    summed in fp32 (fp64 for fp64). track goes through the shards.

    Returns what was done. Raises what read_adapter does; FileExistsError where out is there;
    ValueError for tensors that are not there, or of another shape, or tied to another, whose change
    would change both; TypeError for quantised weights; OSError where the disk has no room.
    """
    out, folder = Path(out), ModelFolder(Path(model))
    check_target(out)
    changes = _changes(folder, read_folder(adapter))
    copied, left = _beside(folder)
    size = sum(folder.file(name).stat().st_size for name in (*folder.shards, *copied))
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < size:
        raise OSError(
            errno.ENOSPC, f"{out} needs {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
    part = out.parent / f".{out.name}.part"
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    try:
        for shard in track(folder.shards):
            shutil.copyfile(folder.file(shard), part / shard)
            with (part / shard).open("r+b") as file:
                for name, change in changes.items():
                    if (stored := folder.tensors[name]).shard == shard:
                        _write(file, name, stored, change)
            sync(part / shard)
        for name in copied:
            shutil.copyfile(folder.file(name), part / name)
            sync(part / name)
        sync(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()  # check_target found it empty
    os.rename(part, out)
    sync(out.parent)
    return {
        "out": str(out),
        "merged": sum(change.adapter is not None for change in changes.values()),
        "replaced": sum(change.value is not None for change in changes.values()),
        "shards": len(folder.shards),
        "bytes": size,
        "copied": copied,
        "left out": left,
    }
