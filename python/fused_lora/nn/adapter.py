"""An adapter around a layer whose own product is left to it: quantised, or of another library.

Symbols: x [..., K], base(x) [..., N], lora_a A [R, K], lora_b B [N, R], gate g [R].
"""

import itertools

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_lora.nn.checks import (
    check_choice,
    check_no_peft,
    check_number,
    check_probability,
    check_rank,
    execution_device,
    keep_unpacked_,
    kind_of,
)
from fused_lora.nn.linear import (
    GATE_INITS,
    INITS,
    LoRALinear,
    check_kept,
    check_swap,
    init_adapter_,
    init_gate_,
    leaving_wide,
    lora_scale,
    set_adapter_,
)
from fused_lora.ops import validation as check
from fused_lora.ops.lora_add import lora_add


class LoRAAdapter(torch.nn.Module):
    """y = base(x) + scale * ((drop(x) A^T) * g) B^T: an adapter around any base layer.

    LoRA (arXiv 2106.09685) on a base that makes its own product, as QLoRA does (arXiv 2305.14314);
    with a gate SoRA (arXiv 2311.11696). The base is called as it is, with its hooks; its parameters
    are frozen and not looked at: nothing of its weight's size is made here. So the base may also be
    a layer that accelerate offloads to the CPU or the disk: the adapter stays where it is computed.
    Around a plain nn.Linear, LoRALinear costs less: it adds the adapter within the base product.

    Args:
        base_module: maps x [..., K] to [..., N] of x's dtype; kept as `base_layer`, so that the
            keys of its state_dict are base_layer.*, as in PEFT.
        in_features, out_features: K and N, where base_module does not have them under these names.
        r, lora_alpha, lora_dropout, use_rslora, init: as in LoRALinear.
        gate: add a Parameter gate [R], which stays fp32 at every .to(dtype); gate_init as in
            SoRALinear.
        adapter_dtype: dtype of A and B: None is that of base_module.weight where that is floating
            point, else float32, masters that serve x of every dtype but float64.

    Attributes: base_layer, in_features, out_features, r, lora_alpha, use_rslora, lora_dropout,
    scale, gate, which is None without one, and weight and bias, which are the base's.

    The gradient of x goes through the base too. Where x requires one and the base gives none
    (torch's dynamically quantised layers have no backward), forward raises RuntimeError: the
    adapter's part alone would be a wrong gradient. A base whose bias is trained is looked through
    for it in eager mode alone.

    merge() is refused: only the base knows how its weight is written.

    Raises TypeError for what is no Module, a convolution, a layer that has an adapter (PEFT's too),
    or one whose features are not known; TypeError and ValueError that name the argument for the
    others.
    """

    base_layer: torch.nn.Module
    lora_a: Parameter
    lora_b: Parameter
    gate: Parameter | None

    def __init__(
        self,
        base_module: torch.nn.Module,
        in_features: int | None = None,
        out_features: int | None = None,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: bool | str = "kaiming",
        *,
        gate: bool = False,
        gate_init: str = "normal",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_base("base_module", base_module)
        K = _features("in_features", in_features, base_module)
        N = _features("out_features", out_features, base_module)
        check_rank("r", r)
        check_number("lora_alpha", lora_alpha)
        check_probability("lora_dropout", lora_dropout)
        check_choice("init", init, INITS)
        check_choice("gate", gate, (True, False))
        check_choice("gate_init", gate_init, GATE_INITS)
        check_adapter_dtype(adapter_dtype)
        super().__init__()
        self.base_layer = base_module.requires_grad_(False)
        for module in base_module.modules():
            keep_unpacked_(module)
        self.in_features, self.out_features = K, N
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout, self.init, self.gate_init = lora_dropout, init, gate_init
        self.scale = lora_scale(lora_alpha, r, use_rslora)
        tensors = itertools.chain(base_module.parameters(), base_module.buffers())
        device = execution_device(base_module) or next((t.device for t in tensors), None)
        dtype = adapter_dtype or weight_dtype(base_module)
        self.lora_a = Parameter(torch.empty(r, K, dtype=dtype, device=device))
        self.lora_b = Parameter(torch.empty(N, r, dtype=dtype, device=device))
        own_gate = Parameter(torch.empty(r, dtype=torch.float32, device=device)) if gate else None
        self.register_parameter("gate", own_gate)
        self.reset_lora_parameters()
        self.train(base_module.training)

    def reset_lora_parameters(self) -> None:
        """Draw the adapter anew, as `init` and `gate_init` say."""
        init_adapter_(self.lora_a, self.lora_b, self.init)
        if self.gate is not None:
            init_gate_(self.gate, self.gate_init)

    def reset_parameters(self) -> None:
        """Draw the adapter anew: what is trained. The base is left as it is."""
        self.reset_lora_parameters()

    def forward(self, input: Tensor) -> Tensor:
        base_out = self.base_layer(input)
        if torch.is_grad_enabled() and input.requires_grad and not self._passes_on(base_out, input):
            raise RuntimeError(
                f"the input requires a gradient, and {kind_of(self.base_layer)} gives none of it; "
                f"the gradient of the adapter alone would be wrong"
            )
        return lora_add(
            base_out,
            input,
            self.lora_a,
            self.lora_b,
            scale=self.scale,
            gate=self.gate,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def _passes_on(self, base_out, x: Tensor) -> bool:
        """Whether the base's result has a gradient of x. What is no tensor is for lora_add to
        refuse."""
        if not isinstance(base_out, Tensor):
            return True
        trained = any(p.requires_grad for p in self.base_layer.parameters())
        if not (base_out.requires_grad and trained) or torch.compiler.is_compiling():
            return base_out.requires_grad
        return _comes_from(base_out, x)

    def check_values(self, name: str = "this layer") -> None:
        """Raise RuntimeError where a change would be lost."""
        check_kept(name, self, ("lora_a", "lora_b", "gate"))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    @torch.no_grad()
    def swap(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        scale: float | None = None,
        gate: Tensor | None = None,
    ) -> None:
        """As LoRALinear.swap: take another adapter, lora_a [R', K], lora_b [N, R'], gate [R']."""
        check_swap(self, lora_a, lora_b, scale, gate)
        self.check_values()
        R = lora_a.shape[0]
        if scale is None:
            scale = lora_scale(self.lora_alpha, R, self.use_rslora)
        else:
            self.lora_alpha = scale / lora_scale(1, R, self.use_rslora)
        self.scale = scale
        if self.gate is not None:
            gate = self.gate.new_ones(R) if gate is None else gate.to(self.gate)
        set_adapter_(self, lora_a.to(self.lora_a), lora_b.to(self.lora_b), gate)

    def merge(self, keep_base: str = "none") -> None:
        """Raises NotImplementedError: the weight is the base's own."""
        raise NotImplementedError(why_unmergeable("this layer", self))

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"
        text += f", lora_alpha={self.lora_alpha:g}, scale={self.scale:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        return text

    def _apply(self, fn, recurse=True):
        from_meta = self.lora_a.is_meta
        super()._apply(fn if self.gate is None else leaving_wide(fn, self.gate), recurse)
        if from_meta and not self.lora_a.is_meta:  # to_empty, as in LoRALinear
            self.reset_lora_parameters()
        return self


# What inject gives a layer.
ADAPTED = LoRALinear, LoRAAdapter


def check_base(name: str, base) -> None:
    if not isinstance(base, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(base).__name__}")
    if isinstance(base, torch.nn.modules.conv._ConvNd):
        raise TypeError(
            f"{name} is a {kind_of(base)}; a layer that maps [..., K] to [..., N] is wanted, and a "
            f"convolution does not"
        )
    if isinstance(base, ADAPTED):
        raise TypeError(f"{name} is a {kind_of(base)}, which has an adapter already")
    check_no_peft(name, base)


def check_adapter_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, *check.DTYPES):
        raise TypeError(
            f"adapter_dtype must be None, {check.names(check.DTYPES)}, got {check.names([dtype])}"
        )


def why_unmergeable(name: str, layer: LoRAAdapter) -> str:
    return (
        f"{name} is a LoRAAdapter around a {kind_of(layer.base_layer)}, which alone knows how its "
        f"weight is written; only a LoRALinear can be merged"
    )


def _features(name: str, given: int | None, base: torch.nn.Module) -> int:
    found = getattr(base, name, None)
    own = found if isinstance(found, int) else None
    if given is None and own is None:
        raise TypeError(
            f"base_module is a {kind_of(base)} without {name}; pass {name}, if it maps [..., K] to "
            f"[..., N]"
        )
    if given is not None:
        check_rank(name, given)
        if own not in (None, given):
            raise ValueError(f"{name} is {given}, yet base_module.{name} is {own}")
    return own if given is None else given  # type: ignore[return-value]


def weight_dtype(base: torch.nn.Module) -> torch.dtype:
    weight = getattr(base, "weight", None)
    known = isinstance(weight, Tensor) and weight.dtype in check.DTYPES
    return weight.dtype if known else torch.float32  # type: ignore[union-attr]


def _comes_from(y: Tensor, x: Tensor) -> bool:
    """Whether a backward of y, which has a graph, comes to x."""
    seen, open_nodes = set(), [y.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        if node is x.grad_fn or getattr(node, "variable", None) is x:
            return True
        seen.add(node)
        open_nodes += [before for before, _ in node.next_functions]
    return y is x
