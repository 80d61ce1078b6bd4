"""The files of an adapter folder: which are opened, and how two of them change as one.

A save writes both files into PART, renames that to READY in one step, and then moves them into
place: the old config goes first, the new one comes last. So at every moment there is, by
adapter_files, the old pair or the new one, whole; and for a reader that knows nothing of READY, the
old pair, the new one, or a folder without a config, but never one file of each.
"""

import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PART, READY = ".adapter.part", ".adapter.ready"
LARGEST_CONFIG, LARGEST_HEADER = 2**20, 2**24
PICKLES = ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"


def python_command(code: str) -> str:
    """A command line that runs code, in which strings have double quotes."""
    return f"python -c {shlex.quote(code)}"


def unpickle_command(source: Path, target: Path) -> str:
    """What makes safetensors of a pickle; weights_only runs no code of it."""
    return python_command(
        "import torch, safetensors.torch as s; "
        f't = torch.load({json.dumps(str(source))}, map_location="cpu", weights_only=True); '
        f"s.save_file({{k: v.contiguous().clone() for k, v in t.items()}}, "
        f"{json.dumps(str(target))})"
    )


def inside(folder: Path, name: str) -> Path:
    """The file of that name, which is one, and lies in the folder itself."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {name}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} leads out of its folder, to {path.resolve()}; if that is meant, copy the "
            f"files: cp -rL {shlex.quote(str(folder))} {shlex.quote(f'{folder}-copy')}"
        )
    return path


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """(config, weights) of an adapter folder, also of one whose save was cut short."""
    if folder.is_file():
        more = "; a pickle is never opened" if folder.suffix in PICKLES else ""
        raise NotADirectoryError(
            f"{folder} is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}{more}"
        )
    paths = [CONFIG, WEIGHTS]
    if (folder / READY / CONFIG).is_file():
        paths = [f"{READY}/{n}" if (folder / READY / n).is_file() else n for n in paths]
    pickle = folder / "adapter_model.bin"
    if not (folder / paths[1]).is_file() and pickle.exists():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}; a pickle is never opened. If you trust who made it: "
            f"{unpickle_command(pickle, folder / WEIGHTS)}"
        )
    return inside(folder, paths[0]), inside(folder, paths[1])


def unchanged(folder: Path, config: Path) -> Callable[[], None]:
    """A check that no save came since: one takes the config away before it touches the weights."""
    first = config.stat()

    def check() -> None:
        now = config.stat() if config.exists() else None
        if now is None or (now.st_ino, now.st_mtime_ns) != (first.st_ino, first.st_mtime_ns):
            raise RuntimeError(f"{folder} was saved while it was read; read it again")

    return check


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def parse_json(path: Path, text: str) -> dict:
    """The object in the text of a file; a key that occurs twice is an error."""
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{path}: too many brackets in each other") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict:
    if path.stat().st_size > largest:
        raise ValueError(f"{path} is larger than {largest} bytes")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    return parse_json(path, text)


class Header(dict):
    """{tensor: {"dtype", "shape", "data_offsets"}} of a safetensors file, and where its data start.

    Read and checked without a tensor being allocated.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(
                    f"{path}: a header of {length} bytes; at most {LARGEST_HEADER} are read"
                )
            text = file.read(length)
        try:
            with safe_open(path, framework="pt"):
                pass  # holds types, shapes and offsets to the size of the file
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None
        super().__init__(parse_json(path, text.decode("utf-8")))
        self.metadata = self.pop("__metadata__", {})
        self.start = 8 + length


def sync(path: Path) -> None:
    """Let what was written to a file, or renamed in a folder, survive a loss of power."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_files(folder: Path, config: dict, tensors: Mapping[str, Tensor]) -> None:
    """Make these the adapter of the folder, as one step (see above). One process at a time."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    finish(folder)
    part = folder / PART
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    try:
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(dict(tensors), part / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(part / CONFIG, part / WEIGHTS)  # safetensors gives the owner alone the file
        for path in (part / CONFIG, part / WEIGHTS, part):
            sync(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    os.rename(part, folder / READY)
    sync(folder)
    finish(folder)


def finish(folder: Path) -> None:
    """Move a save that is READY into place, from wherever an earlier attempt stopped."""
    ready = folder / READY
    if not ready.is_dir():
        return
    if (ready / CONFIG).exists():
        (folder / CONFIG).unlink(missing_ok=True)
        sync(folder)
        if (ready / WEIGHTS).exists():
            os.replace(ready / WEIGHTS, folder / WEIGHTS)
            sync(folder)
        os.replace(ready / CONFIG, folder / CONFIG)
        sync(folder)
    ready.rmdir()
