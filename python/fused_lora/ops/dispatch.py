"""Which backend runs an op, and why the others do not.

"torch" runs everywhere. "triton" needs an NVIDIA GPU of compute capability 8.0 or later. "cuda"
needs that and the compiled extension. Nothing falls back: a backend that was asked for runs or
raises the reason.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fused_lora import _extension

BACKENDS = ("cuda", "triton", "torch")

# The order in which None chooses. A backend enters it, in front, with the measurement that proved
# it.
PROVEN = ("torch",)

_forced: str | None = None


def check_backend(name: str | None, argument: str = "backend") -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    return name


_forced = check_backend(os.environ.get("FUSED_LORA_BACKEND") or None, "FUSED_LORA_BACKEND")


def choose(backend: str | None) -> str:
    """The call's own backend, else use_backend's, else FUSED_LORA_BACKEND's, else the best."""
    return check_backend(backend) or _forced or PROVEN[0]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op that names no backend runs on `name` ("cuda", "triton", "torch";
    None: the best).

    It is a setting of the process, like torch.backends: set it from one thread. The backward of an
    op runs on the backend of its forward, wherever backward() is called.
    """
    global _forced
    before, _forced = _forced, check_backend(name)
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; Linux only)"
    return None


@functools.cache
def gpu_refuses(device: torch.device, kernels: str) -> str | None:
    """None where `kernels` ("Triton", "CUDA") run on this cuda device, else why not."""
    if (reason := _extension.rocm()) is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{device} has compute capability {major}.{minor}; the {kernels} kernels need 8.0"
    return None


def triton_interprets() -> bool:
    """Triton kernels are interpreted on the CPU when this is set before they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refuses(x: torch.Tensor, name: str = "x") -> str | None:
    """None where the Triton kernels can run on x, else the sentence why not."""
    if (missing := _triton_missing()) is not None:
        return missing
    if x.dtype == torch.float64:
        return "the Triton kernels accumulate in fp32 and take no float64; backend='torch' does"
    if not x.is_cuda:
        if triton_interprets() and x.device.type == "cpu":
            if x.dtype == torch.bfloat16:
                return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32"
            return None
        return f"{name} is on {x.device}; the Triton kernels run on CUDA devices"
    if triton_interprets():
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU; unset it and start again"
    return gpu_refuses(x.device, "Triton")


def watched(x: torch.Tensor) -> bool:
    """True where a call must be a registered op: a compiler or a dispatch mode looks on, or x has
    no data. In plain eager mode the dispatcher would only add its time.
    """
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or x.is_meta
        or isinstance(x, FakeTensor)
    )


def transformed() -> bool:
    """True within torch.func's grad, vmap and jacrev, which see through no autograd Function that
    keeps what its forward made."""
    return torch._C._are_functorch_transforms_active()


def traced(x: torch.Tensor) -> bool:
    """True where what is made of x, or beside it, may be a tracer's or a transform's tensor, which
    must not be kept for a later call."""
    return watched(x) or transformed()


def check_transformed(op: str, backend: str) -> None:
    """Raise NotImplementedError for a kernel within torch.func, where only plain PyTorch runs."""
    if backend != "torch":
        raise NotImplementedError(
            f"{op}: backend {backend!r} has no transforms of torch.func (grad, vmap, jacrev); "
            f"backend='torch' has"
        )


def never_refuses(x: torch.Tensor) -> str | None:
    return None


def cuda_refuses(x: torch.Tensor) -> str | None:
    """None where the CUDA C++ kernels can run on x, else the sentence why not."""
    if (missing := _extension.why_missing()) is not None:
        return missing
    if x.dtype == torch.float64:
        return "the CUDA kernels accumulate in fp32 and take no float64; backend='torch' does"
    if _extension.emulates():
        if x.device.type == "cpu":
            return None
        return "FUSED_LORA_EMULATED is set, which runs kernels on the CPU; unset it and start again"
    if not x.is_cuda:
        return f"x is on {x.device}; the CUDA kernels run on CUDA devices"
    return gpu_refuses(x.device, "CUDA")


def readable(*args) -> list:
    """Tensors, lists of them and None as kernels read them, which are given addresses.

    No address tells of a negative bit, which z.conj().imag has and torch's own operations see. And
    of a vector the kernels are given no stride.
    """
    return [_readable(t) for t in args]


def _readable(t):
    if t is None:
        return None
    if isinstance(t, (list, tuple)):
        return [_readable(one) for one in t]
    if t.is_neg():
        t = t.resolve_neg()
    return t.contiguous() if t.ndim == 1 else t


def kernels(backend: str):
    """The launchers of "cuda" or "triton", which have the same names and arguments."""
    if backend == "cuda":
        from fused_lora import cuda_kernels

        return cuda_kernels
    from fused_lora.triton_kernels import primitives

    return primitives


def require(op: str, backend: str, refusals: dict[str, Callable[[torch.Tensor], str | None]], x):
    """Raise RuntimeError with the reason where `backend` cannot run `op` on x."""
    if (reason := refusals[backend](x)) is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")


def backends() -> dict[str, str | None]:
    """{backend: None if it can run on this machine, else the sentence why not}, chosen first."""
    reasons: dict[str, str | None] = {"torch": None}
    if torch.cuda.is_available():
        probe = torch.empty(0, device="cuda")
        reasons |= {"triton": triton_refuses(probe), "cuda": cuda_refuses(probe)}
    else:
        reasons |= {
            "triton": triton_refuses(torch.empty(0, device="cpu")),
            "cuda": _extension.why_missing(),
        }
        if reasons["cuda"] is None and not _extension.emulates():
            reasons["cuda"] = "torch sees no CUDA device"
    chosen = choose(None)
    return {name: reasons[name] for name in sorted(BACKENDS, key=lambda b: b != chosen)}


_EXPLAINERS: dict[str, Callable[..., tuple[str, torch.Tensor, dict]]] = {}


def explains(op: str):
    """Register the function that maps an op's arguments to (chosen, x, {backend: refusal})."""

    def register(fn):
        _EXPLAINERS[op] = fn
        return fn

    return register


def why(op: str, *args, **kwargs) -> dict[str, str | None]:
    """Which backends can run this call, and why the others cannot.

    Takes an op's name and the arguments of one call of it, checks them as the op would, runs
    nothing, and returns {backend: None if it can run, else the sentence why not} with the backend
    that None chooses first:

        fl.why("lora_linear", x, weight, lora_a, lora_b, scale=2.0)
        {"torch": None, "triton": "x is on cpu; the Triton kernels run on CUDA devices", "cuda":
        ...}

    Raises ValueError for a name that is not an op, and whatever the op raises for bad arguments.
    """
    if op not in _EXPLAINERS:
        raise ValueError(f"op must be one of {', '.join(sorted(_EXPLAINERS))}, got {op!r}")
    chosen, x, refusals = _EXPLAINERS[op](*args, **kwargs)
    return {b: refusals[b](x) for b in sorted(BACKENDS, key=lambda b: (b != chosen, b != "torch"))}
