"""The files of an adapter folder: which are opened, and how two of them change as one.

A save writes both files into PART, renames that to READY in one step, and then moves them into
place: the old config goes first, the new one comes last. So at every moment there is, by
adapter_files, the old pair or the new one, whole; and for a reader that knows nothing of READY, the
old pair, the new one, or a folder without a config, but never one file of each.
"""

import json
import os
import reprlib
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PART, READY = ".adapter.part", ".adapter.ready"
LARGEST_CONFIG, LARGEST_HEADER = 2**20, 2**24
PICKLES = ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"
# How often a folder is read that is saved meanwhile, and the pause where a file is not there.
ATTEMPTS, PAUSE = 20, 0.001
LARGEST_SHOWN = 160

T = TypeVar("T")

_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlong, _repr.maxother, _repr.maxlevel = LARGEST_SHOWN, 60, 60, 3


def shown(value: object) -> str:
    """repr(value) for a message, cut where it is long: value may be all that a file holds."""
    text = _repr.repr(value)
    return text if len(text) <= LARGEST_SHOWN else f"{text[:LARGEST_SHOWN]}..."


def shown_name(name: str) -> str:
    """A name from a file as it is, where it is short and printable; else as shown has it."""
    return name if len(name) <= LARGEST_SHOWN and name.isprintable() else shown(name)


def short(text: object) -> str:
    """The text of an error that may quote a file, cut where it is long."""
    text = str(text)
    return text if len(text) <= 3 * LARGEST_SHOWN else f"{text[: 3 * LARGEST_SHOWN]}..."


def few(names: Collection[str]) -> str:
    """The first three of names for a message, and how many more there are."""
    first = ", ".join(shown(name) for name, _ in zip(names, range(3), strict=False))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"[{first}]{more}"


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


def _config_file(folder: Path) -> Path:
    if folder.is_file():
        more = "; a pickle is never opened" if folder.suffix in PICKLES else ""
        raise NotADirectoryError(
            f"{folder} is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}{more}"
        )
    ready = (folder / READY / CONFIG).is_file()
    return inside(folder, f"{READY}/{CONFIG}" if ready else CONFIG)


def _weights_file(folder: Path, config: Path) -> Path:
    """The weights that belong to a config. Those beside a config that is READY move away first."""
    ready = config.parent.name == READY and (folder / READY / WEIGHTS).is_file()
    name = f"{READY}/{WEIGHTS}" if ready else WEIGHTS
    pickle = folder / "adapter_model.bin"
    if not (folder / name).is_file() and pickle.exists():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}; a pickle is never opened. If you trust who made it: "
            f"{unpickle_command(pickle, folder / WEIGHTS)}"
        )
    return inside(folder, name)


class _Saved(Exception):
    """A save came while something was read."""


def _again(path: Path, attempt: Callable[[], T]) -> T:
    """attempt(), as often as it takes until no save came in between, but ATTEMPTS times at most."""
    for left in reversed(range(ATTEMPTS)):
        try:
            return attempt()
        except _Saved:
            continue
        except FileNotFoundError:
            # A save moves files: what is in neither place is in the other one at once.
            if left == 0 or not path.exists():
                raise
            time.sleep(PAUSE)
    raise RuntimeError(f"{path} was saved while it was read; read it again")


def _hold(path: Path, read: Callable[[BinaryIO, Callable[[], None]], T]) -> T:
    """read(file, opened): opened() raises _Saved unless the file is still the one at path. It is
    held open, so that no other has its inode."""
    with path.open("rb") as file:

        def opened() -> None:
            now = os.stat(path) if path.exists() else None
            if now is None or not os.path.samestat(os.fstat(file.fileno()), now):
                raise _Saved

        try:
            return read(file, opened)
        except FileNotFoundError:
            raise
        except Exception:
            opened()  # else what was read may be of two saves, and the error of neither
            raise


def read_held(path: Path, read: Callable[[Callable[[], None]], T]) -> T:
    """read(opened) of one file, which opens it more than once; opened is called the last time."""
    return _again(path, lambda: _hold(path, lambda _, opened: read(opened)))


def read_whole(
    folder: Path, read: Callable[[Path, dict[str, Any], Path, Callable[[], None]], T]
) -> T:
    """read(config path, config, weights path, opened) of an adapter folder, old or new but never of
    both: where a save came in between, it is called again.

    read calls opened() when it has opened the weights for the last time. A save takes the config
    away before it touches the weights, so weights that were opened while one config was in its
    place are that config's.
    """

    def attempt() -> T:
        path = _config_file(folder)

        def read_pair(file: BinaryIO, opened: Callable[[], None]) -> T:
            config, weights = read_json(path, file=file), _weights_file(folder, path)
            try:
                return read(path, config, weights, opened)
            except Exception:
                # They were moved into place: safetensors has an error of its own for that.
                if not weights.exists():
                    raise _Saved from None
                raise

        return _hold(path, read_pair)

    return _again(folder, attempt)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return found


def parse_json(path: Path, text: str) -> dict:
    """The object in the text of a file; a key that occurs twice is an error."""
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{path}: too many brackets in each other") from None
    except ValueError as error:
        raise ValueError(f"{path}: {short(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def read_json(path: Path, largest: int = LARGEST_CONFIG, file: BinaryIO | None = None) -> dict:
    """The object in a file, of at most so many bytes; file: it is open already."""
    if file is None:
        with path.open("rb") as file:
            return read_json(path, largest, file)
    data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"{path} is larger than {largest} bytes")
    try:
        text = data.decode("utf-8")
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
            raise ValueError(f"{path}: {short(error)}") from None
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
