"""A linear layer with many adapters, each row of its input with its own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora.bank import AdapterBank
from fused_lora.nn.checks import check_linear, check_probability
from fused_lora.ops.multi_lora_linear import multi_lora_linear
from fused_lora.ops.routing import AdapterRouting


class MultiLoRALinear(torch.nn.Linear):
    """y_i = x_i W0^T + b + s_j ((drop(x)_i A_j^T) * g_j) B_j^T with j = adapter_ids_i; -1: the base
    alone. A linear layer with many adapters (see fused_lora.multi_lora_linear).

    A drop-in replacement of nn.Linear: weight and bias keep their names and are frozen. The
    adapters are in `bank`, an AdapterBank; they follow the layer to another device, and are no part
    of its state_dict. forward takes the ids of x's rows, or of its first dimensions: they say what
    x's dimensions are. Without ids it takes those of the AdapterStore that the layer belongs to
    (store.route), and where there are none it is the base layer.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        max_adapters, max_rank: of the bank.
        lora_dropout: probability of dropping an element of the adapters' input, in training.
        adapter_dtype: dtype of the bank; None is the weight's, torch.float32 keeps masters.

    Raises TypeError and ValueError that name the argument, before anything is allocated.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_adapters: int,
        max_rank: int,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._check_bank(dtype or torch.get_default_dtype(), lora_dropout, adapter_dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_bank(max_adapters, max_rank, lora_dropout, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        max_adapters: int,
        max_rank: int,
        lora_dropout: float = 0.0,
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> "MultiLoRALinear":
        """The form of `linear` that takes adapters; it shares its Parameters and freezes them.

        Raises TypeError for anything but a plain nn.Linear, as LoRALinear.from_linear does.
        """
        check_linear("linear", linear)
        cls._check_bank(linear.weight.dtype, lora_dropout, adapter_dtype)
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._add_bank(max_adapters, max_rank, lora_dropout, adapter_dtype)
        return layer.train(linear.training)

    @staticmethod
    def _check_bank(weight_dtype, lora_dropout, adapter_dtype) -> None:
        check_probability("lora_dropout", lora_dropout)
        if adapter_dtype not in (None, torch.float32, weight_dtype):
            raise TypeError(
                f"adapter_dtype must be None, torch.float32 or the weight's dtype, got "
                f"{adapter_dtype} for a weight of dtype {weight_dtype}"
            )

    def _add_bank(self, max_adapters, max_rank, lora_dropout, adapter_dtype) -> None:
        self.requires_grad_(False)
        self.lora_dropout = lora_dropout
        self.bank = AdapterBank(
            self.in_features,
            self.out_features,
            max_adapters,
            max_rank,
            dtype=adapter_dtype or self.weight.dtype,
            device=self.weight.device,
        )
        self.store: Any = None  # the AdapterStore that the layer belongs to, and its name there
        self.name_in_store = ""

    def reset_parameters(self) -> None:
        """Empty the bank; weight and bias are left as they are.

        Raises RuntimeError where the adapters are those of an AdapterStore.
        """
        if "bank" not in vars(self):  # nn.Linear's own construction
            super().reset_parameters()
            return
        if len(self.bank) and self.store is not None:
            raise RuntimeError(
                f"adapters {self.bank.names} belong to an AdapterStore; remove them there"
            )
        for name in self.bank.names:
            self.bank.remove(name)

    def forward(self, input: Tensor, adapter_ids: Tensor | AdapterRouting | None = None) -> Tensor:
        ids = adapter_ids
        if ids is None and self.store is not None:
            refuse_in_graph()
            ids = self.store.routing_of(self.name_in_store, input.shape[:-1])
        if ids is None:
            return F.linear(input, self.weight, self.bias)
        return multi_lora_linear(
            input,
            self.weight,
            self.bank,
            ids,
            self.bias,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, max_adapters={self.bank.max_adapters}, "
            f"max_rank={self.bank.max_rank}, adapters={len(self.bank)}"
        )

    def _apply(self, fn, recurse=True):
        self.bank._apply(fn)  # first: it may refuse
        return super()._apply(fn, recurse)


def refuse_in_graph() -> None:
    """Break the graph that is being traced, or refuse where it must be whole."""
    if torch.compiler.is_exporting():
        raise RuntimeError(f"MultiLoRALinear: {_NO_GRAPH}")
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=_NO_GRAPH)


_NO_GRAPH = (
    "a layer of an AdapterStore looks up the route of its thread, which no graph can hold: compile "
    "without fullgraph, or give the layer adapter_ids"
)
