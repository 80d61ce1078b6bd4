"""Tensor parallel adapters: styles for torch.distributed.tensor.parallel.parallelize_module.

Rank i of n, for y = x W0^T + b + s ((drop(x) A^T) * g) B^T:

    column-wise   rows i of W0, b and B, all of A and g:
                      y_i = x W0_i^T + b_i + s ((drop(x) A^T) * g) B_i^T
                  dx, dA and dg are sums over the ranks.
    row-wise      columns i of x, W0 and A, all of b, B and g:
                      y = sum_i [x_i W0_i^T + s ((drop(x)_i A_i^T) * g) B^T] + b
                  dB, dg and db are sums over the ranks; one reduction of y serves both products.

One seed a call serves all ranks, the first one's, and a rank drops the elements that the whole
layer would drop.
"""

import functools
from abc import abstractmethod
from typing import ClassVar

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import Parameter

from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.sharded import check_whole
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.reference import draw_seed


def _waited(t: Tensor) -> Tensor:
    """torch's styles hand on tensors that are still under way, which no kernel may read."""
    return t.trigger_wait() if isinstance(t, collectives.AsyncCollectiveTensor) else t


class _Waited(torch.autograd.Function):
    """t [...] -> t, there; backward: dt -> dt, there."""

    @staticmethod
    def forward(ctx, t):
        t = _waited(t)
        return t.view_as(t)

    @staticmethod
    def backward(ctx, dt):
        return _waited(dt)


def _summed(t: DTensor) -> Tensor:
    """A parameter that every rank has whole; the ranks' gradients of it are added up."""
    return t.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _optional(fn, t):
    return None if t is None else fn(t)


def _shared_seed(device: torch.device, mesh: DeviceMesh) -> Tensor:
    """The first rank's: int64 [1]. No host waits for it, and where an activation checkpoint runs
    the layer again the first rank draws it again."""
    return _waited(collectives.broadcast(draw_seed(device), 0, mesh.get_group()))


class LoRAParallel(ParallelStyle):
    """What the two styles have in common."""

    # The placement of each parameter, of x in the product, of its gradient (None: as x), of y as
    # the product makes it, and of y as it is handed on.
    parameters: ClassVar[dict[str, Placement]]
    x: ClassVar[Placement]
    dx: ClassVar[Placement | None]
    y: ClassVar[Placement]
    default_output: ClassVar[Placement]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts: Placement = input_layouts or self.x
        self.output_layouts: Placement = output_layouts or self.default_output
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )

    @abstractmethod
    def _check_sizes(self, layer: LoRALinear, ranks: int) -> None: ...

    @abstractmethod
    def _product(self, layer: LoRALinear, x: Tensor, mesh: DeviceMesh, seed) -> Tensor: ...

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        name = type(self).__name__
        if not isinstance(module, LoRALinear):
            raise TypeError(
                f"{name} shards LoRALinear and its subclasses, got {type(module).__name__}; "
                f"torch's ColwiseParallel and RowwiseParallel shard nn.Linear"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{name} takes a mesh of one dimension, got {device_mesh.ndim}: mesh['tp']"
            )
        if module.merged:
            raise RuntimeError(f"{name}: the adapter is merged; call unmerge() first")
        check_whole(name, "", module)
        self._check_sizes(module, device_mesh.size())
        for own, placement in self.parameters.items():
            if (t := getattr(module, own)) is not None:
                parts = distribute_tensor(
                    t, device_mesh, [placement], src_data_rank=self.src_data_rank
                )
                module.register_parameter(own, Parameter(parts, requires_grad=t.requires_grad))
        module.__class__ = _sharded_class(type(module))  # type: ignore[arg-type]
        module.parallel_style = self  # type: ignore[assignment]
        return module

    def forward(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """y of a layer that this style has sharded."""
        mesh = layer.weight.device_mesh  # type: ignore[attr-defined]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(_Waited.apply(x), mesh, [self.input_layouts], run_check=False)
        dx = None if self.dx is None else [self.dx]
        x = x.redistribute(placements=[self.x]).to_local(grad_placements=dx)
        dropping = layer.training and layer.lora_dropout > 0
        seed = _shared_seed(x.device, mesh) if dropping else None
        y = _Waited.apply(self._product(layer, x, mesh, seed))
        y = DTensor.from_local(y, mesh, [self.y], run_check=False)
        y = y.redistribute(placements=[self.output_layouts])
        return y.to_local() if self.use_local_output else y


class ColwiseLoRAParallel(LoRAParallel):
    """Shard a LoRALinear, SoRALinear or AdaLoRALinear over its output features.

        y_i = x W0_i^T + b_i + s ((drop(x) A^T) * g) B_i^T

    weight [N, K], bias [N] and lora_b [N, R] become DTensors in parts of N / ranks rows, lora_a and
    gate DTensors that every rank has whole, with gradients that are summed over the ranks. For
    parallelize_module, beside torch's own styles:

        plan = {"layers.*.q_proj": ColwiseLoRAParallel(), "layers.*.o_proj": RowwiseLoRAParallel()}
        parallelize_module(model, mesh["tp"], plan)  # before fully_shard, and before the optimizer

    input_layouts, output_layouts, use_local_output: as in torch's ColwiseParallel. x [..., K] comes
        replicated, or as input_layouts says (Shard(1): parts of the sequence); y [..., N / ranks]
        is this rank's columns, or as output_layouts says.

    With dropout all ranks use one mask: the seed is the first rank's, 8 bytes sent a call.

    Raises, before anything is sharded, TypeError for another module, ValueError for a mesh of more
    than one dimension or an N that the ranks do not divide, RuntimeError for a merged layer,
    NotImplementedError for one that is sharded already.
    """

    parameters: ClassVar = {
        "weight": Shard(0),
        "bias": Shard(0),
        "lora_a": Replicate(),
        "lora_b": Shard(0),
        "gate": Replicate(),
    }
    x: ClassVar = Replicate()
    dx: ClassVar = Partial()
    y: ClassVar = Shard(-1)
    default_output: ClassVar = Shard(-1)

    def _check_sizes(self, layer: LoRALinear, ranks: int) -> None:
        if layer.out_features % ranks:
            raise ValueError(
                f"ColwiseLoRAParallel: out_features is {layer.out_features}, which {ranks} ranks "
                f"do not divide"
            )

    def _product(self, layer, x, mesh, seed) -> Tensor:
        return lora_linear(
            x,
            layer.weight.to_local(),
            _summed(layer.lora_a),
            layer.lora_b.to_local(),
            _optional(DTensor.to_local, layer.bias),
            scale=layer.scale,
            gate=_optional(_summed, layer.gate),
            dropout_p=layer.lora_dropout,
            training=layer.training,
            seed=seed,
        )


class RowwiseLoRAParallel(LoRAParallel):
    """Shard a LoRALinear, SoRALinear or AdaLoRALinear over its input features.

        y = sum_i [x_i W0_i^T + s ((drop(x)_i A_i^T) * g) B^T] + b

    weight [N, K] and lora_a [R, K] become DTensors in parts of K / ranks columns, bias, lora_b and
    gate DTensors that every rank has whole, with gradients that are summed over the ranks. The
    adapter costs no communication of its own: one reduction adds up both products.

    input_layouts, output_layouts, use_local_output: as in torch's RowwiseParallel.
        x [..., K / ranks] is this rank's columns, or as input_layouts says; y [..., N] comes out
        replicated, or as output_layouts says (Shard(1): parts of the sequence, by a
        reduce-scatter).

    With dropout each rank makes its columns of the whole layer's mask, of the first rank's seed,
    for which K / ranks is a multiple of 8.

    Raises as ColwiseLoRAParallel does, ValueError for a K that the ranks do not divide, or, with
    dropout, not into parts of a multiple of 8.
    """

    parameters: ClassVar = {
        "weight": Shard(1),
        "bias": Replicate(),
        "lora_a": Shard(1),
        "lora_b": Replicate(),
        "gate": Replicate(),
    }
    x: ClassVar = Shard(-1)
    dx: ClassVar = None
    y: ClassVar = Partial()
    default_output: ClassVar = Replicate()

    def _check_sizes(self, layer: LoRALinear, ranks: int) -> None:
        dropping = layer.lora_dropout > 0
        if layer.in_features % (ranks * (8 if dropping else 1)):
            parts = "into parts of a multiple of 8, which lora_dropout needs" if dropping else ""
            raise ValueError(
                f"RowwiseLoRAParallel: in_features is {layer.in_features}, which {ranks} ranks do "
                f"not divide {parts}".rstrip()
            )

    def _product(self, layer, x, mesh, seed) -> Tensor:
        rank, K = mesh.get_local_rank(), x.shape[-1]
        # One rank adds the bias. To the others it is zero and not absent: its gradient is a sum
        # that all of them take part in.
        bias = _optional(lambda t: _summed(t) * float(rank == 0), layer.bias)
        return lora_linear(
            x,
            layer.weight.to_local(),
            layer.lora_a.to_local(),
            _summed(layer.lora_b),
            bias,
            scale=layer.scale,
            gate=_optional(_summed, layer.gate),
            dropout_p=layer.lora_dropout,
            training=layer.training,
            seed=seed,
            dropout_columns=None if seed is None else (rank * K, layer.in_features),
        )


@functools.cache
def _sharded_class(kind: type[LoRALinear]) -> type[LoRALinear]:
    """`kind`, whose parameters a style has sharded: forward is the style's, the rest its own."""

    class Sharded(kind):  # type: ignore[misc, valid-type]
        parallel_style: LoRAParallel

        def forward(self, input: Tensor) -> Tensor:
            return self.parallel_style.forward(self, input)

        def extra_repr(self) -> str:
            return f"{super().extra_repr()}, {self.parallel_style}"

    Sharded.__name__ = Sharded.__qualname__ = f"Sharded{kind.__name__}"
    return Sharded
