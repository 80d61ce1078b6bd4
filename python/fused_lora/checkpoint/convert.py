"""Adapters in other forms, written as plain LoRA in PEFT's."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from fused_lora.checkpoint.formats import LoRAReader
from fused_lora.checkpoint.reading import Adapter, read_folder, read_tensors, sorted_keys
from fused_lora.checkpoint.writing import adapter_config, folded, write_adapter
from fused_lora.files import PICKLES, Header, read_held, shown_name, unpickle_command


class LoralibReader(LoRAReader):
    """loralib's lora_state_dict: lora_A [r, K] and lora_B [N, r] of each layer."""

    endings: ClassVar = {"lora_A": ".lora_A", "lora_B": ".lora_B"}
    embedding_endings: ClassVar = {}

    def check_shapes(self, path, module, keys, shapes) -> None:
        a, b = shapes["lora_A"], shapes["lora_B"]
        if len(a) == len(b) == 2 and a[0] > self.rank and a[0] % self.rank == 0:
            raise NotImplementedError(
                f"{path}: {shown_name(keys['lora_A'])} has {a[0]} rows, a multiple of r = "
                f"{self.rank}: a MergedLinear or a convolution of loralib, which is no LoRA of one "
                f"linear layer; or another --r is right"
            )
        super().check_shapes(path, module, keys, shapes)


def check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; give another path, or move it away")


def convert_peft(source: Path, target: Path) -> list[str]:
    """An adapter folder of PEFT or save_adapter with its gates folded into B; the layers' names.

    The config stays as it is, but for peft_type.
    """
    check_target(target)
    adapter = read_folder(source)
    layers = {name: folded(weights) for name, weights in adapter.layers.items()}
    config = adapter.config | {"peft_type": "LORA"}
    write_adapter(target, config, layers, adapter.others | adapter.base, adapter.embeddings)
    return [*layers, *adapter.embeddings]


def convert_loralib(source: Path, target: Path, r: int, lora_alpha: float) -> list[str]:
    """loralib's lora_state_dict in a safetensors file, which has no scale: lora_alpha / r.

    Raises as read_adapter does; a pickle is refused, and not opened.
    """
    check_target(target)
    if source.suffix in PICKLES:
        raise ValueError(
            f"{source} is a pickle, which is never opened. If you trust who made it: "
            f"{unpickle_command(source, source.with_suffix('.safetensors'))}"
        )
    if not source.is_file():
        raise FileNotFoundError(f"{source} is no file; loralib's state is one of safetensors")
    reader = LoralibReader(source, config := {"r": r, "lora_alpha": lora_alpha})

    def read(opened: Callable[[], None]) -> Adapter:
        header = Header(source)
        keys = sorted_keys(source, header, reader, prefix="")
        return read_tensors(source, header, keys, reader, config, opened)

    layers = read_held(source, read).layers
    write_adapter(target, adapter_config(layers), layers, {})
    return list(layers)
