"""Layers of a model that are given one and the same x, one after another: q, k and v; gate and up.

Which they are is seen in one call of the model and then stays as it is, so that a recomputation (as
in activation checkpointing) does what the forward did. A group's first layer computes for all; each
of the others, when it is called with that very tensor and is what it was, is handed its part, and
else computes for itself.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.ops import dispatch


class _Output(NamedTuple):
    """What a layer is to be handed, and what it was computed from."""

    y: Tensor
    looked: tuple
    stamp: tuple


class _Pending(NamedTuple):
    """What a group's first layer has computed for the others, by their id."""

    x: Tensor
    state: tuple
    outputs: dict[int, _Output]


class _Local(threading.local):
    """At most one group of a thread has outputs that wait: the next call of any grouped layer takes
    them or drops them."""

    pending: _Pending | None = None


_local = _Local()


def _stamp(values: tuple) -> tuple:
    """What tells whether these are what they were, as far as autograd itself would see it: a change
    within a tensor's .data moves no counter."""
    return tuple(
        (id(t), t._version, t.data_ptr(), t.requires_grad) if isinstance(t, Tensor) else t
        for t in values
    )


def _state(x: Tensor) -> tuple:
    """What a call depends on beside the layer: x, the backend, and the modes that autograd and
    autocast are in."""
    device = x.device.type
    return (
        *_stamp((x,)),
        dispatch.choose(None),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
    )


class SharedInput:
    """The layers of one group, in the order in which they are called."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def output(
        self,
        layer,
        x: Tensor,
        look: Callable[[Any, Tensor], tuple | None],
        compute: Callable[[list[Any], Tensor], tuple[list[Tensor], list[tuple]] | None],
    ) -> Tensor | None:
        """The layer's part of what its group computed of x, or None: it is to compute for itself.

        look(layer, x) is all that the layer computes its part from, or None where that is more than
        compute can take; compute(layers, x) is (the outputs of all, what look gives of each), or
        None where they cannot be had in one call. Inference tensors have no counter of changes:
        with one of them there is no group.
        """
        waiting, _local.pending = _local.pending, None
        if dispatch.traced(x) or x.is_inference():
            return None
        if waiting and waiting.x is x and waiting.state == _state(x):
            found = waiting.outputs.pop(id(layer), None)
            if waiting.outputs:
                _local.pending = waiting
            if found is not None:
                looked = look(layer, x)
                if looked is not None and _stamp(looked) == found.stamp:
                    return found.y
                return None
        if layer is not self.layers[0] or (computed := compute(self.layers, x)) is None:
            return None
        (first, *ys), (_, *others) = computed
        if not any(isinstance(t, Tensor) and t.is_inference() for one in others for t in one):
            outputs = [_Output(y, one, _stamp(one)) for y, one in zip(ys, others, strict=True)]
            parts = dict(zip(map(id, self.layers[1:]), outputs, strict=True))
            _local.pending = _Pending(x, _state(x), parts)
        return first


def observed(model: nn.Module, layers: list[Any], call: dict[str, Any]) -> list[SharedInput]:
    """The groups that one call of the model, without gradients, shows: layers of one parent that
    got the same tensor in turn, and did so every time."""
    parents = {id(child): id(m) for m in model.modules() for child in m.children()}
    runs: list[list[Any]] = []
    last: tuple[int, Tensor] | None = None

    def note(layer, args) -> None:
        nonlocal last
        x = args[0] if args else None
        if last and last[0] == parents[id(layer)] and last[1] is x:
            runs[-1].append(layer)
        else:
            runs.append([layer])
        last = None if x is None else (parents[id(layer)], x)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[int, set[tuple[int, ...]]] = {}
    for run in runs:
        for layer in run:
            found.setdefault(id(layer), set()).add(tuple(map(id, run)))
    always = {
        run[0]: run
        for run in (tuple(r) for r in runs)
        if len(set(run)) == len(run) > 1 and all(len(found[id(layer)]) == 1 for layer in run)
    }
    return [SharedInput(list(run)) for run in always.values()]
