"""The checks that every public function makes before anything is computed or written.

Each names the argument, what came and what is wanted.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
LARGEST = torch.finfo(torch.float32).max  # a scale is a number in fp32
Spelled = Callable[[str], str]


def names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def all_plain(*values) -> bool:
    """True only where check_tensor passes for each, but for its dtype."""
    return forward_ad._current_level < 0 and all(
        type(t) in _PLAIN and t.layout is torch.strided for t in values
    )


def check_tensor(op: str, name: str, value, dtypes=DTYPES) -> None:
    """A plain dense tensor of one of the dtypes, without a forward-mode tangent."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value) not in _PLAIN:
        raise NotImplementedError(
            f"{op}: {name} is a {type(value).__name__}; tensor subclasses are not supported, "
            f"pass a plain torch.Tensor"
        )
    if value.layout is not torch.strided:
        raise NotImplementedError(
            f"{op}: {name} has layout {value.layout}; dense (strided) tensors are supported"
        )
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must have dtype {names(dtypes)}, got {names([value.dtype])}")
    check_tangent(op, name, value)


def check_tangent(op: str, name: str, value: Tensor) -> None:
    """A custom op would give forward-mode AD a silent zero tangent."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{op}: {name} carries a forward-mode tangent; only reverse-mode gradients exist"
        )


def check_shape(op: str, name: str, value: Tensor, wanted: tuple, spelled: str) -> None:
    """value.shape == wanted; None in front stands for any size. `spelled` has it in symbols."""
    shape = value.shape
    if shape == wanted or (
        wanted[0] is None and len(shape) == len(wanted) and shape[1:] == wanted[1:]
    ):
        return
    sizes = ", ".join("any" if w is None else str(w) for w in wanted)
    raise ValueError(f"{op}: {name} must have shape {spelled} = [{sizes}], got {list(shape)}")


def check_written(op: str, name: str, value: Tensor) -> None:
    """What is to be written has memory of its own for every element."""
    if value.is_contiguous():
        return
    dims = sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1)
    shared = any(step == 0 for step, _ in dims) or any(
        large < small * n  # else one lies within the steps of the other
        and small // math.gcd(small, large) < m
        and large // math.gcd(small, large) < n
        for (small, n), (large, m) in itertools.combinations(dims, 2)
    )
    if shared and value.numel():
        raise RuntimeError(
            f"{op}: {name} has strides {list(value.stride())}: unsupported operation: more than "
            f"one element of the written-to tensor refers to a single memory location. Please "
            f"clone() the tensor before performing the operation."
        )


def check_device(op: str, name: str, value: Tensor, x: Tensor, of: str = "x") -> None:
    if value.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {value.device} but {of} is on {x.device}; move one of them"
        )


def check_adapter_dtype(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """x's dtype, or fp32 masters of it."""
    if value.dtype not in (x.dtype, torch.float32):
        wanted = names(dict.fromkeys((x.dtype, torch.float32)))
        raise TypeError(f"{op}: {name} must have dtype {wanted}, got {names([value.dtype])}")


def check_scale(op: str, scale, name: str = "scale") -> None:
    """A real number, finite in fp32, or a 0-d floating tensor (whose value is not read)."""
    if isinstance(scale, Tensor):
        if scale.ndim != 0 or not scale.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be a float or a 0-d floating tensor, got a "
                f"{names([scale.dtype])} tensor of shape {list(scale.shape)}"
            )
        check_tangent(op, name, scale)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: {name} must be a float or a 0-d tensor, got {type(scale).__name__}")
    elif not -LARGEST <= scale <= LARGEST:  # torch.compile traces it, unlike math.isfinite
        raise ValueError(f"{op}: {name} must be finite in fp32, got {scale}")


def check_dropout(op: str, p) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{op}: dropout_p must be a float, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1], got {p}")


def check_seed(op: str, seed, x: Tensor) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must have dtype int64, got {names([seed.dtype])}")
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed must have one element, got shape {list(seed.shape)}")
        check_device(op, "seed", seed, x)
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(
                f"{op}: seed must be an int or an int64 tensor, got {type(seed).__name__}"
            )
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{op}: seed must fit in int64, got {seed}")


def check_columns(op: str, columns, K: int) -> None:
    """None, or (first, total): columns first .. first + K of `total`, first a multiple of 8."""
    if columns is None:
        return
    whole = isinstance(columns, (tuple, list)) and len(columns) == 2
    if not whole or any(isinstance(n, bool) or not isinstance(n, int) for n in columns):
        raise TypeError(f"{op}: dropout_columns must be two ints (first, total), got {columns!r}")
    first, total = columns
    if first < 0 or first % 8:
        raise ValueError(
            f"{op}: dropout_columns begins at {first}; a multiple of 8 is wanted, as one call of "
            f"the generator serves 8 columns"
        )
    if first + K > total:
        raise ValueError(
            f"{op}: dropout_columns is {tuple(columns)}, but x has {K} columns, which end at "
            f"{first + K}"
        )


def check_same_dtype(op: str, name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype:
        raise TypeError(
            f"{op}: {name} must have x's dtype {names([x.dtype])}, got {names([value.dtype])}"
        )


def checked_input(op: str, x, dropout_p, seed) -> Tensor:
    """x as autocast has it, with what else a call has once."""
    check_tensor(op, "x", x)
    check_dropout(op, dropout_p)
    check_seed(op, seed, x)
    if x.ndim < 1:
        raise ValueError(f"{op}: x must have shape [..., K], got a 0-d tensor")
    return x if (dtype := autocast_dtype(x)) is None else autocast(x, dtype)


def checked_base(op: str, x: Tensor, weight, bias, spelled: Spelled = str):
    """(weight [N, K], bias [N] or None) as autocast has them, for x as it has x.

    spelled("weight") is what the caller's argument is called, here and in checked_adapter.
    """
    weight_name, bias_name = spelled("weight"), spelled("bias")
    check_tensor(op, weight_name, weight)
    check_shape(op, weight_name, weight, (None, x.shape[-1]), "[N, K]")
    if bias is not None:
        check_tensor(op, bias_name, bias)
        check_shape(op, bias_name, bias, (weight.shape[0],), "[N]")
    dtype, found = autocast_dtype(x), []
    for name, t in ((weight_name, weight), (bias_name, bias)):
        if t is not None:
            check_device(op, name, t, x)
            t = t if dtype is None else autocast(t, dtype)
            check_same_dtype(op, name, t, x)
        found.append(t)
    return found


def checked_adapter(
    op: str, x: Tensor, N: int, lora_a, lora_b, gate, scale, spelled: Spelled = str
):
    """(lora_a [R, K], lora_b [N, R]) as autocast has them, for x as it has x."""
    named = [(spelled("lora_a"), lora_a), (spelled("lora_b"), lora_b)]
    if gate is not None:
        named.append((spelled("gate"), gate))
    for name, t in named:
        check_tensor(op, name, t)
    check_scale(op, scale, spelled("scale"))
    check_shape(op, named[0][0], lora_a, (None, x.shape[-1]), "[R, K]")
    if (R := lora_a.shape[0]) == 0:
        raise ValueError(
            f"{op}: {named[0][0]} has shape [0, {lora_a.shape[1]}]; the rank must be at least 1"
        )
    check_shape(op, named[1][0], lora_b, (N, R), "[N, R]")
    if gate is not None:
        check_shape(op, named[2][0], gate, (R,), "[R]")
    for name, t in named:
        check_device(op, name, t, x)
    if (dtype := autocast_dtype(x)) is not None:
        lora_a, lora_b = (autocast_adapter(t, dtype) for t in (lora_a, lora_b))
    for (name, _), t in zip(named, (lora_a, lora_b, gate), strict=False):
        check_adapter_dtype(op, name, t, x)
    return lora_a, lora_b


def autocasting(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would compute F.linear(x, ...) in, or None where it is off."""
    return torch.get_autocast_dtype(x.device.type) if autocasting(x) else None


def autocast(t, dtype: torch.dtype):
    """As autocast casts: every floating tensor but float64."""
    return t if t is None or t.dtype == torch.float64 else t.to(dtype)


def autocast_adapter(t: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 masters stay: the op casts them itself and gives their gradients back in fp32."""
    return t if t.dtype in (torch.float32, torch.float64) else t.to(dtype)
