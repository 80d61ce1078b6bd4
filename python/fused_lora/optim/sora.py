"""SoRA: the proximal step that drives gates to exact zeros (arXiv 2311.11696)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused_lora.nn.checks import check_number
from fused_lora.ops.soft_threshold import soft_threshold_


class SoRA(torch.optim.Optimizer):
    """The proximal step of SoRA: gates go to exact zeros, the rest trains as it would.

        g <- T_xi(g - lr * dL/dg),  xi = lr * sparsity
        T_xi(v) = v - xi if v > xi;  0 if -xi <= v <= xi;  v + xi if v < -xi

    (arXiv 2311.11696), the exact minimiser of xi |g|_1 + 1/2 |g - (g_t - lr * dL/dg)|^2.
    `optimizer` steps every other parameter (A, B, heads, norms), and both happen in one step(), so
    a GradScaler skips both or neither. The gates get no weight decay. A gate at zero keeps its
    gradient and comes back where that exceeds `sparsity`.

        gates = [m.gate for m in model.modules() if isinstance(m, SoRALinear)]
        rest = [p for p in model.parameters() if p.requires_grad and all(p is not g for g in gates)]
        optimizer = SoRA(torch.optim.AdamW(rest, lr=8e-4), gates, lr=8e-4, sparsity=1e-3)

    Args:
        optimizer: any torch optimizer, of the other parameters.
        gates: the gates, or parameter groups of them (dicts with "params", lr and sparsity).
        lr: eta, the step size of the gates, a float >= 0.
        sparsity: lambda, the weight of the L1 norm of the gates, a float >= 0.

    param_groups are the optimizer's groups and then the gates', so that learning rate schedulers,
    GradScaler.unscale_, clipping and zero_grad reach both; a group of gates has "sparsity", which a
    schedule may raise, and xi follows lr. A gate whose grad is None is left alone, as any parameter
    is by torch's optimizers: neither step nor threshold. No step waits for the device. state_dict()
    is in torch's form, the gates' groups last.

    Raises TypeError and ValueError where an argument is not as above, where there is no gate, or
    where a gate is also in `optimizer`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gates: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        sparsity: float,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if isinstance(gates, Tensor):
            raise TypeError("gates must be a sequence of tensors, got one tensor; pass [gate]")
        groups: list[Any] = list(gates)
        if not groups:
            raise ValueError(
                "gates is empty; the model has no gate, so use the inner optimizer alone"
            )
        self.optimizer = optimizer
        self.gate_groups: list[dict[str, Any]] = []
        super().__init__(groups, {"lr": lr, "sparsity": sparsity})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups, then the gates'; a view, as loading replaces the inner."""
        return [*self.optimizer.param_groups, *self.gate_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        # torch.optim.Optimizer.__init__ assigns the empty list that it would fill.
        if groups:
            raise AttributeError(
                "param_groups is a view; change .optimizer.param_groups or .gate_groups"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of gates. Other parameters are added to .optimizer."""
        group = {**self.defaults, **param_group}
        for name in ("lr", "sparsity"):
            check_number(name, group[name])
            if group[name] < 0:
                raise ValueError(f"{name} must be at least 0, got {group[name]}")
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        inner = {id(p) for g in self.optimizer.param_groups for p in g["params"]}
        for i, gate in enumerate(params):
            if id(gate) in inner:
                raise ValueError(
                    f"gates[{i}] of shape {list(gate.shape)} is also in optimizer, which would "
                    f"step it a second time; leave the gates out of it"
                )
        if len({id(gate) for gate in params}) < len(params):
            raise ValueError("gates holds the same tensor twice; pass each gate once")
        group["params"] = params
        super().add_param_group(group)
        self.gate_groups.append(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of the inner optimizer and one proximal step of the gates.

        closure: evaluates the model again and returns the loss, as in torch.optim; its value is
            returned.
        """
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        for group in self.gate_groups:
            gates = [g for g in group["params"] if g.grad is not None]
            if gates:
                torch._foreach_add_(gates, [g.grad for g in gates], alpha=-group["lr"])
                soft_threshold_(gates, group["lr"] * group["sparsity"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        groups = list(state["param_groups"])
        index = sum(len(g["params"]) for g in groups)
        for group in self.gate_groups:
            size = len(group["params"])
            groups.append({**group, "params": list(range(index, index + size))})
            index += size
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave. Raises ValueError where the sizes of the groups differ."""
        saved = state_dict["param_groups"]
        sizes = [len(g["params"]) for g in saved]
        wanted = [len(g["params"]) for g in self.param_groups]
        if sizes != wanted:
            raise ValueError(
                f"state_dict has parameter groups of sizes {sizes}, this optimizer has {wanted}"
            )
        first_gates = len(saved) - len(self.gate_groups)
        self.optimizer.load_state_dict({**state_dict, "param_groups": saved[:first_gates]})
        for group, values in zip(self.gate_groups, saved[first_gates:], strict=True):
            group.update({**values, "params": group["params"]})

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "optimizer": self.optimizer,
            "gate_groups": self.gate_groups,
        }
