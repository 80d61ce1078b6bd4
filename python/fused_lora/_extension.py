"""The compiled extension fused_lora._C, whose CUDA C++ kernels register themselves as it loads.

It is optional, and nothing loads it before an op wants it. FUSED_LORA_EMULATED names a library of
the same sources that runs their kernels on the CPU (tests/emulator); it is loaded instead.
"""

import functools
import importlib
import os

import torch  # its libraries must be in the process before those of the extension

_BUILD = "FUSED_LORA_BUILD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps"


def emulates() -> bool:
    """Whether the kernels run on the CPU."""
    return bool(os.environ.get("FUSED_LORA_EMULATED"))


def rocm() -> str | None:
    """None, or why no kernel runs: a torch built for ROCm names AMD's GPUs cuda devices too."""
    if torch.version.hip is None:
        return None
    return f"this torch is built for ROCm {torch.version.hip}, and the kernels for NVIDIA GPUs"


@functools.cache
def why_missing() -> str | None:
    """None where the extension is loaded or loads now, else why not, and the command that helps."""
    if emulates():
        torch.ops.load_library(os.environ["FUSED_LORA_EMULATED"])
        return None
    if (reason := rocm()) is not None:
        return reason
    try:
        importlib.import_module("fused_lora._C")
    except ModuleNotFoundError:
        return f"the CUDA extension was not built; in a checkout run: {_BUILD} ."
    except ImportError as error:
        return f"the CUDA extension does not load ({error}); in a checkout rebuild it: {_BUILD} ."
    return None


def load() -> None:
    """Load the extension, or raise RuntimeError with the sentence of why_missing()."""
    if (reason := why_missing()) is not None:
        raise RuntimeError(reason)
