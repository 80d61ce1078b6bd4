"""A linear layer with one adapter, with or without a gate.

Symbols: x [..., K], weight W0 [N, K] and bias [N] frozen, lora_a A [R, K], lora_b B [N, R], gate g
[R].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from fused_lora.nn.checks import (
    check_choice,
    check_linear,
    check_number,
    check_probability,
    check_rank,
)
from fused_lora.nn.sharded import check_whole
from fused_lora.ops import validation as check
from fused_lora.ops.lora_linear import lora_linear

KEEP_BASE = ("none", "cpu", "device")
GATE_INITS = ("normal", "ones")
INITS = (True, False, "kaiming", "gaussian")

# Elements of W0 that are merged at a time: 16 MiB of fp32, whatever the size of the layer.
_MERGE_BLOCK = 1 << 22

Layer = TypeVar("Layer", bound="LoRALinear")

# One product scale * B diag(g) A: (scale, lora_a, lora_b, gate).
Product = tuple[float, Tensor, Tensor, Tensor | None]


def lora_scale(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) in rank-stabilised LoRA (arXiv 2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def init_adapter_(lora_a: Tensor, lora_b: Tensor, init: bool | str) -> None:
    """Draw an adapter, as `init` of LoRALinear says."""
    if init == "gaussian":
        torch.nn.init.normal_(lora_a, std=1 / lora_a.shape[0])
    else:
        torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    if init is False:
        torch.nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
    else:
        torch.nn.init.zeros_(lora_b)


def init_gate_(gate: Tensor, gate_init: str) -> None:
    """Draw a gate, as `gate_init` of SoRALinear says."""
    if gate_init == "normal":
        torch.nn.init.normal_(gate)
    else:
        torch.nn.init.ones_(gate)


def leaving_wide(fn: Callable[[Tensor], Tensor], gate: Parameter) -> Callable[[Tensor], Tensor]:
    """fn, what Module._apply does to each tensor, but that the gate and its gradient keep their
    dtype."""
    grad = gate.grad

    def applied(t: Tensor) -> Tensor:
        moved = fn(t)
        # From t itself, so that no digit is lost on the way through the other dtype.
        return t.to(moved.device) if (t is gate or t is grad) and moved.dtype != t.dtype else moved

    return applied


def check_swap(layer, lora_a, lora_b, scale, gate) -> None:
    """Raise for the first argument of layer.swap that is wrong."""
    op = type(layer).__name__ + ".swap"
    check_whole(op, "", layer)
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        check.check_tensor(op, name, t)
    check.check_shape(op, "lora_a", lora_a, (None, layer.in_features), "[R, K]")
    R = lora_a.shape[0]
    if R == 0:
        raise ValueError(
            f"{op}: lora_a has shape {list(lora_a.shape)}; the rank must be at least 1"
        )
    check.check_shape(op, "lora_b", lora_b, (layer.out_features, R), "[N, R]")
    if scale is not None:
        check_number(f"{op}: scale", scale)
    if gate is not None:
        if layer.gate is None:
            raise ValueError(
                f"{op}: this layer has no gate; fold it into lora_b, or use SoRALinear"
            )
        check.check_tensor(op, "gate", gate)
        check.check_shape(op, "gate", gate, (R,), "[R]")


def check_kept(name: str, layer: torch.nn.Module, tensors: Sequence[str]) -> None:
    """Raise RuntimeError where one of the layer's tensors is no Parameter of it, as
    torch.nn.utils.prune and parametrize leave it: what is written into it would be lost."""
    for own in tensors:
        if own not in layer._parameters:
            raise RuntimeError(
                f"{name}: {own} is made anew from other tensors at each call (by prune, "
                f"parametrize or weight_norm of torch.nn.utils); take that away first"
            )


def set_adapter_(layer, lora_a: Tensor, lora_b: Tensor, gate: Tensor | None) -> None:
    """Copy into the Parameters of these shapes, and make new ones where the rank is another."""
    layer.r = lora_a.shape[0]
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b), ("gate", gate)):
        if value is None:
            continue
        old = getattr(layer, name)
        if old.shape == value.shape:
            old.copy_(value)
        else:
            setattr(layer, name, Parameter(value.clone(), requires_grad=old.requires_grad))


def _merged_blocks(
    weight: Tensor, base: Tensor, products: Sequence[Product]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows of weight, the fp32 sums for them) of base + sum of scale * B diag(g) A; fp64 for fp64.

    weight, base [N, K], which may be one tensor. What is allocated is one block of rows and the
    adapters in fp32, never a second W0.
    """
    N, K = weight.shape
    wide = torch.promote_types(weight.dtype, torch.float32)
    products = [(scale, a.to(wide), b, gate) for scale, a, b, gate in products]
    rows = max(1, _MERGE_BLOCK // max(1, K))
    block = weight.new_empty(min(rows, N), K, dtype=wide)
    for start in range(0, N, rows):
        here = slice(start, start + rows)
        part = block[: N - start]
        part.copy_(base[here])
        for scale, a, b, gate in products:
            b = b[here].to(wide)
            part.addmm_(b if gate is None else b * gate, a, alpha=scale)
        yield weight[here], part


@torch.no_grad()
def _merge_into(weight: Tensor, base: Tensor, products: Sequence[Product]) -> None:
    """weight <- round(base + sum of scale * B diag(g) A), summed in fp32 (fp64 for fp64)."""
    for rows, sums in _merged_blocks(weight, base, products):
        rows.copy_(sums)


@torch.no_grad()
def _check_merged(name: str, weight: Tensor, base: Tensor, products: Sequence[Product]) -> None:
    """Raise ValueError where _merge_into would write NaN or infinity."""
    if _is_bounded(weight, base, products):
        return
    for rows, sums in _merged_blocks(weight, base, products):
        if not bool(sums.to(rows.dtype).isfinite().all()):
            raise ValueError(f"{name}: weight would have values that {weight.dtype} cannot hold")


def _is_bounded(weight: Tensor, base: Tensor, products: Sequence[Product]) -> bool:
    """Whether no element of base + sum of scale * B diag(g) A can come near the largest of weight's
    dtype; NaN is not bounded. It takes one read of base, where the sums would take a product."""
    if not weight.numel():
        return True
    wide = torch.promote_types(weight.dtype, torch.float32)
    low, high = base.aminmax()
    bound = torch.maximum(-low, high).to(weight.device, wide)
    for scale, a, b, gate in products:
        b = b.to(wide) if gate is None else b.to(wide) * gate
        norms = [torch.linalg.vector_norm(t.to(wide), dim=d).amax() for t, d in ((a, 0), (b, 1))]
        bound = bound + abs(scale) * norms[0] * norms[1]
    return bool(bound < torch.finfo(weight.dtype).max / 2)


class LoRALinear(torch.nn.Linear):
    """y = x W0^T + b + scale * (drop(x) A^T) B^T: a linear layer with a low-rank adapter (LoRA).

    arXiv 2106.09685. A drop-in replacement of nn.Linear: weight [N, K] and bias [N] keep their
    names and are frozen; lora_a [R, K] and lora_b [N, R] are trained. x [..., K] -> y [..., N], any
    leading shape.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        r: rank, at least 1; from min(N, K) on the adapter can express any update of the weight.
        lora_alpha: scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv
            2312.03732).
        lora_dropout: probability in [0, 1] of dropping an element of the adapter's input, in
            training.
        init: "kaiming" (or True) draws A from Kaiming-uniform with a = sqrt(5), "gaussian" from
            N(0, 1/r^2); B is zero, so the layer starts as the frozen one exactly. False draws B
            too, which is for tests.
        adapter_dtype: dtype of A and B: None is the weight's; torch.float32 keeps masters over a
            half precision weight (the products are made in x's dtype). Like every parameter,
            masters follow a later .to(dtype) or .half() of the model.

    Attributes: r, lora_alpha, use_rslora, lora_dropout, scale (what forward multiplies by), merged,
    and gate, which is None here (see SoRALinear).

    Raises TypeError and ValueError that name the argument, before anything is allocated.
    """

    lora_a: Parameter
    lora_b: Parameter
    gate: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: bool | str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        weight_dtype = dtype or torch.get_default_dtype()
        self._check_adapter(weight_dtype, r, lora_alpha, lora_dropout, init, adapter_dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init, adapter_dtype)

    @classmethod
    def from_linear(
        cls: type[Layer],
        linear: torch.nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: bool | str = "kaiming",
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> Layer:
        """The adapted form of `linear`, on its device, in its dtype and training mode.

        Arguments as in the class. It shares the Parameters of `linear` and freezes them: W0 is not
        copied.

        Raises TypeError for anything but a plain nn.Linear of a dense floating weight: subclasses
        (quantised layers and others) are refused by name, and so are hooks, which would be lost.
        """
        check_linear("linear", linear)
        cls._check_adapter(linear.weight.dtype, r, lora_alpha, lora_dropout, init, adapter_dtype)
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init, adapter_dtype)
        return layer.train(linear.training)

    @staticmethod
    def _check_adapter(weight_dtype, r, lora_alpha, lora_dropout, init, adapter_dtype) -> None:
        check_rank("r", r)
        check_number("lora_alpha", lora_alpha)
        check_probability("lora_dropout", lora_dropout)
        check_choice("init", init, INITS)
        if adapter_dtype not in (None, weight_dtype, torch.float32):
            raise TypeError(
                f"adapter_dtype must be None, the weight's {weight_dtype} or torch.float32, got "
                f"{adapter_dtype}"
            )

    def _add_adapter(self, r, lora_alpha, lora_dropout, use_rslora, init, adapter_dtype) -> None:
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout, self.init = lora_dropout, init
        self.scale = self._scale_of(lora_alpha, r)
        self.merged = False
        # W0 while merged with keep_base; not a buffer, so it never enters a state_dict.
        self._base: Tensor | None = None
        self._keep_base = "none"
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        dtype = adapter_dtype or self.weight.dtype
        self.lora_a = Parameter(self.weight.new_empty(r, self.in_features, dtype=dtype))
        self.lora_b = Parameter(self.weight.new_empty(self.out_features, r, dtype=dtype))
        self.register_parameter("gate", None)
        self.reset_lora_parameters()

    def _scale_of(self, lora_alpha: float, r: int) -> float:
        """The layer's own rule."""
        return lora_scale(lora_alpha, r, self.use_rslora)

    def reset_lora_parameters(self) -> None:
        """Draw the adapter anew, as `init` says. Raises RuntimeError where it is merged."""
        if self.merged:
            raise RuntimeError(
                "the adapter is merged into weight; call unmerge() before resetting it"
            )
        self._draw_adapter()

    def reset_parameters(self) -> None:
        """Draw the adapter anew: what is trained. weight and bias are left as they are."""
        if "lora_a" in self._parameters:
            self.reset_lora_parameters()
        else:  # nn.Linear's own construction
            super().reset_parameters()

    def _draw_adapter(self) -> None:
        init_adapter_(self.lora_a, self.lora_b, self.init)

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return F.linear(input, self.weight, self.bias)
        return lora_linear(
            input,
            self.weight,
            self.lora_a,
            self.lora_b,
            self.bias,
            scale=self.scale,
            gate=self.gate,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha:g}"
        text += f", scale={self.scale:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        return text + (", merged" if self.merged else "")

    def check_values(self, name: str = "this layer") -> None:
        """Raise RuntimeError where there are no values to work on: a change would be lost."""
        check_kept(name, self, ("weight", "lora_a", "lora_b", "gate"))
        if self.weight.is_meta or self.lora_a.is_meta:
            raise RuntimeError(
                f"{name} is on the meta device: it is not loaded yet, or offloaded; merge and swap "
                f"where its values are, and offload after that"
            )

    def _product(self, sign: int) -> Product:
        return sign * self.scale, self.lora_a, self.lora_b, self.gate

    def check_merge(self, name: str = "this layer") -> None:
        """Raise ValueError where merge(), or unmerge() of a merged layer, would write NaN or
        infinity."""
        if self.merged and self._base is not None:
            return  # unmerge() copies what was there
        product = self._product(-1 if self.merged else +1)
        _check_merged(name, self.weight, self.weight, [product])

    def merge(self, keep_base: str = "none") -> None:
        """W <- round(W0 + scale * B diag(g) A), in place; it now costs what nn.Linear costs.

        The sum is made in fp32 (fp64 for fp64; torch's TF32 setting applies to its product) and
        rounded once. No second W0 is made on the way: the work is done in blocks of rows.

        keep_base: "none" keeps no copy; unmerge() then subtracts, so a weight comes back within
            half a unit in the last place of the merged weight and half a unit of its own: in bf16
            up to about a third of the weights do not come back bit for bit. "device" and "cpu" keep
            W0 there, and unmerge() gives it back bit for bit.

        While merged the adapter is not part of the graph: it gets no gradient and no dropout, and
        it must not change (swap() changes it). The Parameter stays the same object, so a module
        that is tied to this weight sees the merged one. state_dict() holds the merged weight, and
        says so: a merged layer loads no state_dict, and no LoRALinear loads that of a merged one,
        where the adapter would count twice.

        Raises before anything is written: RuntimeError where it is merged already, or has no values
        (meta device), ValueError for another keep_base, and where a sum is NaN, infinite or beyond
        what the weight's dtype holds, NotImplementedError where the parameters are sharded (FSDP2,
        tensor parallel).
        """
        check_choice("keep_base", keep_base, KEEP_BASE)
        check_whole("merge", "", self)
        self.check_values()
        if self.merged:
            raise RuntimeError("the adapter is merged already; call unmerge() first")
        self.check_merge()
        base = None
        if keep_base == "cpu":
            base = self.weight.detach().to("cpu", copy=True)
        elif keep_base == "device":
            base = self.weight.detach().clone()
        _merge_into(self.weight, self.weight, [self._product(+1)])
        self._base, self._keep_base = base, keep_base
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give W0 back, in place: bit for bit where it was kept, else within what merge() states.

        Raises before anything is written: RuntimeError where the adapter is not merged, or has no
        values (meta device), ValueError where the weight would not be finite (an adapter that was
        changed while merged), NotImplementedError where the parameters are sharded.
        """
        self.check_values()
        if not self.merged:
            raise RuntimeError("the adapter is not merged; there is nothing to undo")
        check_whole("unmerge", "", self)
        self.check_merge()
        if self._base is None:
            _merge_into(self.weight, self.weight, [self._product(-1)])
        else:
            self.weight.copy_(self._base)
        self._base, self._keep_base = None, "none"
        self.merged = False

    @torch.no_grad()
    def swap(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        scale: float | None = None,
        gate: Tensor | None = None,
    ) -> None:
        """Take another adapter in place of this one, merged or not: lora_a [R', K], lora_b [N, R'].

        Merged, the weight becomes round(W - s B diag(g) A + s' B' diag(g') A') in one fp32 pass,
        without a second W0, or is made anew from the W0 that merge() kept, without drift.

        A new adapter of the same rank is copied into the Parameters there are, so optimisers keep
        them. One of another rank becomes new Parameters: an optimiser made before still holds the
        old ones.

        scale: None applies the layer's own rule (lora_alpha / r) to the new rank; a number is
            taken, and lora_alpha becomes the one that gives it.
        gate: [R'], for SoRALinear, where None stands for ones.

        The tensors may be on any device and are cast to the dtype of the adapter. Raises TypeError
        and ValueError (of a merged layer also where the weight would not be finite), RuntimeError
        on the meta device, and NotImplementedError where the parameters are sharded, before
        anything is written.
        """
        new = self.checked_swap(lora_a, lora_b, scale, gate)
        if self.merged:
            _merge_into(self.weight, *self._swapped(new))
        if scale is not None:
            self.lora_alpha = scale / self._scale_of(1, lora_a.shape[0])
        self.scale, a, b, gate = new
        set_adapter_(self, a, b, gate)

    @torch.no_grad()
    def checked_swap(self, lora_a, lora_b, scale, gate, name: str = "this layer") -> Product:
        """Raise what swap() would raise; (scale, lora_a, lora_b, gate) as the layer would have
        them."""
        check_swap(self, lora_a, lora_b, scale, gate)
        self.check_values(name)
        R = lora_a.shape[0]
        a, b = lora_a.to(self.lora_a), lora_b.to(self.lora_b)
        if self.gate is not None:
            gate = a.new_ones(R, dtype=torch.float32) if gate is None else gate.to(self.gate)
        scale = self._scale_of(self.lora_alpha, R) if scale is None else scale
        new: Product = (scale, a, b, gate)
        if self.merged:
            _check_merged(name, self.weight, *self._swapped(new))
        return new

    def _swapped(self, new: Product) -> tuple[Tensor, list[Product]]:
        """What a merged layer makes its weight of in a swap: the base, and what is added to it."""
        if self._base is None:
            return self.weight, [self._product(-1), new]
        return self._base, [new]

    def _apply(self, fn, recurse=True):
        from_meta = self.lora_a.is_meta
        super()._apply(fn, recurse)
        if from_meta and not self.lora_a.is_meta:
            # to_empty gives memory without values; whoever loads a base has none for the adapter.
            self.merged, self._base, self._keep_base = False, None, "none"
            self.reset_lora_parameters()
        if self._base is not None:
            device = self._base.device if self._keep_base == "cpu" else self.weight.device
            self._base = self._base.to(device, self.weight.dtype)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["merged"] = True

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        name = prefix[:-1] or type(self).__name__
        if self.merged:
            errors.append(f"{name} is merged; call unmerge() before loading a state_dict into it")
        elif local_metadata.get("merged", False):
            errors.append(
                f"{name} was merged when this state_dict was made, so its adapter would count "
                f"twice; make it after unmerge(), or load its weight and bias into an nn.Linear"
            )
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )


class SoRALinear(LoRALinear):
    """y = x W0^T + b + scale * ((drop(x) A^T) * g) B^T: LoRA with a trained gate, arXiv 2311.11696.

    As LoRALinear, with a Parameter gate [R], which fused_lora.optim.SoRA drives to exact zeros: the
    ranks that the layer does not need. The gate is fp32 always: .to(dtype), .half() and .double()
    leave it, and devices it follows.

    gate_init: "normal" draws the gate from N(0, 1), as the paper's authors do; "ones" starts as
        LoRA.
    """

    gate: Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate_init: str = "normal",
        **options,
    ) -> None:
        check_choice("gate_init", gate_init, GATE_INITS)
        super().__init__(in_features, out_features, bias, device, dtype, **options)
        self._add_gate(gate_init)

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, *args, gate_init: str = "normal", **kwargs
    ) -> "SoRALinear":
        """As LoRALinear.from_linear, and gate_init."""
        check_choice("gate_init", gate_init, GATE_INITS)
        layer = super().from_linear(linear, *args, **kwargs)
        layer._add_gate(gate_init)
        return layer

    def _add_gate(self, gate_init: str) -> None:
        self.gate_init = gate_init
        self.gate = Parameter(self.lora_a.new_empty(self.r, dtype=torch.float32))
        self._reset_gate()

    def _reset_gate(self) -> None:
        init_gate_(self.gate, self.gate_init)

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        if self.gate is not None:
            self._reset_gate()

    def _apply(self, fn, recurse=True):
        return super()._apply(leaving_wide(fn, self.gate), recurse)
