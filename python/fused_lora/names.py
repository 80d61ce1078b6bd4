"""Names of modules as the bare model has them, whatever is wrapped around the model or its parts.

torch.compile, FullyShardedDataParallel (FSDP1), activation checkpointing, DistributedDataParallel,
DataParallel and AveragedModel keep the module that they wrap as a child: their own component of a
name, such as _orig_mod, is not one that anybody wrote.
"""

from collections.abc import Iterator
from typing import Any

from torch.nn import Module
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# Children of classes that are costly to import; no other class has children of these names.
_FSDP = "_fsdp_wrapped_module"
_CHILDREN = "_orig_mod", _FSDP, "_checkpoint_wrapped_module"
_WRAPPERS = DataParallel, DistributedDataParallel, AveragedModel


def _inner(module: Module) -> Module | None:
    """What a module is wrapped around; None where it is no wrapper."""
    children = module._modules
    if isinstance(module, _WRAPPERS):
        return children["module"]
    return next((children[name] for name in _CHILDREN if name in children), None)


def unwrapped(model: Module) -> Module:
    """The model within all that is wrapped around it."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def clean_name(name: str) -> str:
    """A name from a file without the components that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _CHILDREN)


def named_modules(
    model: Module, *, every_name: bool = False, leaves: tuple[type, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """(name, module), in the order of Module.named_modules; a wrapper is left out, and what it
    wraps has its name.

    every_name: a shared module comes under each of its names, not under the first alone. leaves:
    kinds of modules that are not looked into.
    """
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        module = unwrapped(module)
        if not every_name and id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if not isinstance(module, leaves):
            children = module._modules.items()
            waiting += [
                (f"{name}.{own}" if name else own, child)
                for own, child in reversed(children)
                if child is not None
            ]


def check_takes_parameters(op: str, model: Module, *, reduced: bool = True) -> None:
    """Raise RuntimeError for a model in FullyShardedDataParallel, which knows those Parameters
    alone that it was made with, and, where gradients of new ones are to be reduced, in
    DistributedDataParallel."""
    for module in model.modules():
        if _FSDP in module._modules or (reduced and isinstance(module, DistributedDataParallel)):
            raise RuntimeError(
                f"{op} before {type(module).__name__}: it takes no new Parameters of the model "
                f"that it is around"
            )
