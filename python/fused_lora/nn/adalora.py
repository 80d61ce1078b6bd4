"""A linear layer with an adapter in the form of a singular value decomposition (AdaLoRA)."""

import torch

from fused_lora.nn.checks import check_choice
from fused_lora.nn.linear import LoRALinear, SoRALinear

SCALINGS = ("plain", "peft")
_STD = 0.02  # of P and Q at the start, as the paper's authors draw them


def check_scaling(scaling: str, use_rslora: bool) -> None:
    check_choice("scaling", scaling, SCALINGS)
    if scaling == "peft" and use_rslora:
        raise ValueError("scaling='peft' is lora_alpha / (r + 1e-5), which use_rslora contradicts")


class AdaLoRALinear(SoRALinear):
    """y = x W0^T + b + scale * ((drop(x) Q^T) * lambda) P^T: AdaLoRA's P diag(lambda) Q.

    arXiv 2303.10512. lora_a is Q [R, K], lora_b is P [N, R] and gate is lambda [R]: the singular
    values, signed, which a plain optimizer trains (AdamW) and fused_lora.optim.AdaLoRA sets to zero
    where the budget of ranks has no room for them. P and Q are only driven towards orthogonality,
    by fused_lora.optim.orthogonality_penalty. All else is as in SoRALinear: the same op, and a gate
    that stays fp32.

    Args (the others as in LoRALinear):
        init: True draws P and Q from N(0, 0.02^2) and sets lambda to zero, so the layer starts as
            the frozen one exactly. False draws all three, which is for tests.
        scaling: "plain" is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; "peft" is
            lora_alpha / (r + 1e-5), as the authors' code and PEFT have it, without use_rslora. In
            both r is the rank at the start: the scale stays as it is when lambdas become zero.

    Raises TypeError and ValueError that name the argument, before anything is allocated.
    """

    scaling = "plain"

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
        init: bool = True,
        scaling: str = "plain",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_scaling(scaling, use_rslora)
        super().__init__(
            in_features,
            out_features,
            bias,
            device,
            dtype,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init=init,
            adapter_dtype=adapter_dtype,
        )
        self._set_scaling(scaling)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: torch.nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: bool = True,
        *,
        scaling: str = "plain",
        adapter_dtype: torch.dtype | None = None,
    ) -> "AdaLoRALinear":
        """As LoRALinear.from_linear, and scaling."""
        check_scaling(scaling, use_rslora)
        layer: AdaLoRALinear = super().from_linear(  # type: ignore[assignment]
            linear, r, lora_alpha, lora_dropout, use_rslora, init, adapter_dtype=adapter_dtype
        )
        layer._set_scaling(scaling)
        return layer

    @staticmethod
    def _check_adapter(weight_dtype, r, lora_alpha, lora_dropout, init, adapter_dtype) -> None:
        check_choice("init", init, (True, False))
        LoRALinear._check_adapter(weight_dtype, r, lora_alpha, lora_dropout, init, adapter_dtype)

    def _set_scaling(self, scaling: str) -> None:
        self.scaling = scaling
        self.scale = self._scale_of(self.lora_alpha, self.r)

    def _scale_of(self, lora_alpha: float, r: int) -> float:
        if self.scaling == "peft":
            return lora_alpha / (r + 1e-5)
        return super()._scale_of(lora_alpha, r)

    def _draw_adapter(self) -> None:
        if not self.init:
            return super()._draw_adapter()
        torch.nn.init.normal_(self.lora_a, std=_STD)
        torch.nn.init.normal_(self.lora_b, std=_STD)

    def _reset_gate(self) -> None:
        if not self.init:
            return super()._reset_gate()
        torch.nn.init.zeros_(self.gate)
