"""SoRA: the proximal step that drives gates to exact zeros (arXiv 2311.11696)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused_lora.nn.checks import check_choice, check_number
from fused_lora.nn.sharded import is_sharded, local_part, whole
from fused_lora.ops.dispatch import check_backend
from fused_lora.ops.soft_threshold import check_xi, soft_threshold_

# What steps the gates before the threshold: multi-tensor operations for a group.
GATE_STEPS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}
# The value in a group of gates that xi comes from.
THRESHOLDS = {"lr": "sparsity", "fixed": "xi"}


def gate_l1(gates: Iterable[Tensor]) -> Tensor:
    """sum of |g| over all gates / how many there are: the L1 term of SoRA's published code.

        loss = task_loss + weight * fl.optim.gate_l1(gates)

    Beside or instead of the threshold of SoRA. Differentiable: dL/dg = sign(g) / count, which is 0
    at g = 0, so that this term alone makes gates small but holds none at zero. Nothing is read on
    the host.

    gates: tensors of any shapes; the result is a 0-d tensor on the device of the first. Sharded
        gates are put together, so that every process calls this and gets the same term.

    Raises TypeError for one tensor in place of a sequence, ValueError for an empty one.
    """
    gates = _listed(gates)
    flat = [whole(g).flatten() for g in gates]
    return torch.cat([g.to(flat[0].device) for g in flat]).abs().mean()


def _listed(gates: Iterable) -> list:
    if isinstance(gates, Tensor):
        raise TypeError("gates must be a sequence of tensors, got one tensor; pass [gate]")
    found = list(gates)
    if not found:
        raise ValueError("gates is empty; the model has no gate, so use the inner optimizer alone")
    return found


class SoRA(torch.optim.Optimizer):
    """The proximal step of SoRA: gates go to exact zeros, the rest trains as it would.

        g <- T_xi(g - lr * dL/dg),  xi = lr * sparsity
        T_xi(v) = v - xi if v > xi;  0 if -xi <= v <= xi;  v + xi if v < -xi

    (arXiv 2311.11696), the exact minimiser of xi |g|_1 + 1/2 |g - (g_t - lr * dL/dg)|^2.
    `optimizer` steps every other parameter (A, B, heads, norms), and both happen in one step(), so
    a GradScaler skips both or neither. The gates get no weight decay. A gate at zero keeps its
    gradient and comes back where that exceeds `sparsity`.

        gates = list(fl.optim.named_gates(model).values())
        rest = [p for p in model.parameters() if p.requires_grad and all(p is not g for g in gates)]
        optimizer = SoRA(torch.optim.AdamW(rest, lr=8e-4), gates, lr=8e-4, sparsity=1e-3)

    The authors' published code differs from their paper. Its form is

        SoRA(adamw, gates, lr=8e-4, gate_step="adam", threshold="fixed", xi=3e-4,
             official_compat=True)

    and fl.optim.gate_l1 in the loss.

    Args:
        optimizer: any torch optimizer, of the other parameters.
        gates: the gates, or parameter groups of them (dicts with "params" and, where they differ,
            lr, sparsity or xi, betas, eps).
        lr: eta, the step size of the gates, a float >= 0.
        sparsity: lambda, the weight of the L1 norm of the gates, a float >= 0.
        gate_step: "sgd", the gradient step above, or "adam", where torch.optim.Adam takes the place
            of g - lr * dL/dg. (The published Adam adds eps before the correction of the bias and
            not after it: the same where eps is small against the gradients.)
        betas, eps: of "adam".
        threshold: "lr": xi = lr * sparsity. "fixed": xi is given, in place of sparsity, and does
            not follow lr; at lr = 0 it still shrinks the gates.
        xi: a float >= 0, with threshold="fixed" alone.
        official_compat: the threshold of the published code, which zeroes gates up to 2 xi (see
            soft_threshold_).
        backend: of soft_threshold_.

    param_groups are the optimizer's groups and then the gates', so that learning rate schedulers,
    GradScaler.unscale_, clipping and zero_grad reach both; a group of gates has "sparsity" or "xi",
    which a schedule may raise. A gate whose grad is None is left alone, as any parameter is by
    torch's optimizers: neither step nor threshold. No step waits for the device, and an infinite or
    NaN gate stays one. A CUDA graph can capture "sgd"; "adam" refuses, as torch's does by default.
    state_dict() is in torch's form, the gates' groups last.

    Gates that fully_shard or tensor parallel has sharded are stepped in parts, each where it is.

    Raises TypeError and ValueError where an argument is not as above, where there is no gate, or
    where a gate is also in `optimizer`; step() too, before it changes anything, where lr, sparsity
    or xi has become what it may not be.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gates: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        sparsity: float | None = None,
        gate_step: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        threshold: str = "lr",
        xi: float | None = None,
        official_compat: bool = False,
        backend: str | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        groups = _listed(gates)
        check_choice("gate_step", gate_step, tuple(GATE_STEPS))
        check_choice("threshold", threshold, tuple(THRESHOLDS))
        check_choice("official_compat", official_compat, (True, False))
        values = {"sparsity": sparsity, "xi": xi}
        name = THRESHOLDS[threshold]
        for other, value in values.items():
            if other != name and value is not None:
                raise ValueError(f"{other} is given, but threshold={threshold!r} takes {name}")
        defaults: dict[str, Any] = {"lr": lr, name: values[name]}
        if gate_step == "adam":
            defaults |= {"betas": betas, "eps": eps}
        self.optimizer = optimizer
        self.gate_optimizer: Any = None  # made with the first group
        self.gate_step, self.threshold = gate_step, threshold
        self.official_compat, self.backend = official_compat, check_backend(backend)
        super().__init__(groups, defaults)

    @property
    def gate_groups(self) -> list[dict[str, Any]]:
        return self.gate_optimizer.param_groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups, then the gates'; a view, as loading replaces them."""
        return [*self.optimizer.param_groups, *self.gate_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        # torch.optim.Optimizer.__init__ assigns the empty list that it would fill.
        if groups:
            raise AttributeError(
                "param_groups is a view; change .optimizer.param_groups or .gate_groups"
            )

    @property
    def state(self) -> Any:
        """What the inner optimizer and the step of the gates keep, by parameter; a view."""
        return {**self.optimizer.state, **self.gate_optimizer.state}

    @state.setter
    def state(self, state: Any) -> None:
        if state:
            raise AttributeError(
                "state is a view; change .optimizer.state or .gate_optimizer.state"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of gates. Other parameters are added to .optimizer."""
        known = ("params", "initial_lr", *self.defaults)
        for name in param_group:
            if name not in known:
                raise ValueError(
                    f"a group of gates has no {name!r}; it may have {', '.join(known)}"
                )
        group = {**self.defaults, **param_group}
        self._check_values(group)
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
        # torch's multi-tensor operations take no mixture of whole and sharded tensors.
        group["foreach"] = len({is_sharded(gate) for gate in params}) <= 1
        if self.gate_optimizer is None:
            make = GATE_STEPS[self.gate_step]
            self.gate_optimizer = make([group], lr=group["lr"])
        else:
            self.gate_optimizer.add_param_group(group)

    def _check_values(self, group: dict[str, Any]) -> None:
        for name in ("lr", THRESHOLDS[self.threshold]):
            check_number(name, group[name])
            if group[name] < 0:
                raise ValueError(f"{name} must be at least 0, got {group[name]}")
        if self.gate_step == "adam":
            betas = group["betas"]
            if not isinstance(betas, (tuple, list)) or len(betas) != 2:
                raise TypeError(f"betas must be two numbers, got {betas!r}")
            for i, beta in enumerate(betas):
                check_number(f"betas[{i}]", beta)
                if not 0 <= beta < 1:
                    raise ValueError(f"betas[{i}] must lie in [0, 1), got {beta}")
            check_number("eps", group["eps"])
            if group["eps"] < 0:
                raise ValueError(f"eps must be at least 0, got {group['eps']}")

    def _xi(self, group: dict[str, Any]) -> float:
        self._check_values(group)
        xi = group["lr"] * group["sparsity"] if self.threshold == "lr" else group["xi"]
        check_xi(xi)
        return xi

    def set_sparsity(self, value: float) -> None:
        """Set sparsity, or with threshold="fixed" xi, of every group of gates, from the next step
        on."""
        name = THRESHOLDS[self.threshold]
        for group in self.gate_groups:
            self._check_values({**group, name: value})
        for group in self.gate_groups:
            group[name] = value

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of the inner optimizer and one proximal step of the gates.

        closure: evaluates the model again and returns the loss, as in torch.optim; its value is
            returned.
        """
        thresholds = [self._xi(group) for group in self.gate_groups]
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.gate_optimizer.step()
        for group, xi in zip(self.gate_groups, thresholds, strict=True):
            gates = [local_part(g) for g in group["params"] if g.grad is not None]
            if gates:
                soft_threshold_(
                    gates, xi, official_compat=self.official_compat, backend=self.backend
                )
        return loss

    def state_dict(self) -> dict[str, Any]:
        inner, gates = self.optimizer.state_dict(), self.gate_optimizer.state_dict()
        first = sum(len(g["params"]) for g in inner["param_groups"])
        shifted = [
            {**group, "params": [first + i for i in group["params"]]}
            for group in gates["param_groups"]
        ]
        state = {**inner["state"], **{first + i: s for i, s in gates["state"].items()}}
        return {**inner, "state": state, "param_groups": [*inner["param_groups"], *shifted]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave. Raises ValueError, before anything is loaded, where the
        sizes of the groups differ, or where its gates had another gate_step or threshold."""
        saved = state_dict["param_groups"]
        sizes = [len(g["params"]) for g in saved]
        wanted = [len(g["params"]) for g in self.param_groups]
        if sizes != wanted:
            raise ValueError(
                f"state_dict has parameter groups of sizes {sizes}, this optimizer has {wanted}"
            )
        first_gates = len(self.optimizer.param_groups)
        inner, gates = saved[:first_gates], saved[first_gates:]
        for group in gates:
            steps = "adam" if "betas" in group else "sgd"
            if steps != self.gate_step:
                raise ValueError(
                    f"state_dict has gates of gate_step={steps!r}, this optimizer has "
                    f"{self.gate_step!r}"
                )
            if THRESHOLDS[self.threshold] not in group:
                raise ValueError(
                    f"state_dict has gates without {THRESHOLDS[self.threshold]!r}, which "
                    f"threshold={self.threshold!r} of this optimizer takes"
                )
        ids = {i for group in gates for i in group["params"]}
        state: tuple[dict, dict] = {}, {}
        for i, values in state_dict["state"].items():
            state[i in ids][i] = values
        self.optimizer.load_state_dict({**state_dict, "state": state[0], "param_groups": inner})
        # What a state_dict leaves out of a group stays as it is.
        groups = [{**own, **group} for own, group in zip(self.gate_groups, gates, strict=True)]
        self.gate_optimizer.load_state_dict({"state": state[1], "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        names = "defaults", "optimizer", "gate_optimizer", "gate_step", "threshold"
        return {name: getattr(self, name) for name in (*names, "official_compat", "backend")}
