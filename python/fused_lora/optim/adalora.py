"""AdaLoRA: a shrinking budget of ranks, shared by all layers by importance (arXiv 2303.10512)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.names import named_modules
from fused_lora.nn.adalora import AdaLoRALinear
from fused_lora.nn.checks import check_choice, check_number
from fused_lora.nn.sharded import check_whole

PENALTIES = ("squared", "unsquared")


def _layers(model: torch.nn.Module) -> dict[str, AdaLoRALinear]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {name: m for name, m in named_modules(model) if isinstance(m, AdaLoRALinear)}
    if not layers:
        raise ValueError("model has no AdaLoRALinear; inject with LoRAConfig(adalora=True) first")
    for name, layer in layers.items():
        check_whole("AdaLoRA", name, layer)
    return layers


def _check_count(name: str, count, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an int, got {count!r} of type {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of tensors of one shape, dtype and device, which one stack can hold."""
    places: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        places.setdefault((t.shape, t.dtype, t.device), []).append(i)
    return list(places.values())


class _Smoothed:
    """I_ and U_ of one kind of tensors, P, Q or lambda, of all layers.

    Tensors that are alike share a stack, so that a model takes a few kernels and not some a layer.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params, self.places = params, _alike(params)
        self.sensitivity, self.uncertainty = self._zeros(), self._zeros()

    def _zeros(self) -> list[Tensor]:
        first = [(len(places), self.params[places[0]]) for places in self.places]
        return [
            p.new_zeros(n, *p.shape, dtype=torch.promote_types(p.dtype, torch.float32))
            for n, p in first
        ]

    def _each(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The parts of stacks in the order of params."""
        order = [i for places in self.places for i in places]
        parts = dict(zip(order, (t for stack in stacks for t in stack.unbind()), strict=True))
        return [parts[i] for i in range(len(order))]

    def update(self, beta1: float, beta2: float) -> None:
        """Take the gradients in; a tensor without one is left alone."""
        rows = [
            (p, p.grad, *smoothed)
            for p, *smoothed in zip(
                self.params, self._each(self.sensitivity), self._each(self.uncertainty), strict=True
            )
            if p.grad is not None
        ]
        if not rows:
            return
        params, grads, sensitivity, uncertainty = map(list, zip(*rows, strict=True))
        now = torch._foreach_mul(
            [p.to(s.dtype) for p, s in zip(params, sensitivity, strict=True)],
            [g.to(s.dtype) for g, s in zip(grads, sensitivity, strict=True)],
        )
        torch._foreach_abs_(now)
        torch._foreach_lerp_(sensitivity, now, 1 - beta1)
        torch._foreach_sub_(now, sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(uncertainty, now, 1 - beta2)

    def importance(self, dim: int | None) -> list[Tensor]:
        """s(w) of each tensor, its mean over dim."""
        both = zip(self.sensitivity, self.uncertainty, strict=True)
        scores = [i * u for i, u in both]
        return self._each(scores if dim is None else [s.mean(dim) for s in scores])


class RankAllocator:
    """Which triplets (lambda_i, column i of P, row i of Q) of a model's AdaLoRALinear stay.

    Each entry w of P, lambda and Q has an importance s(w), each triplet the sum of its parts'
    (arXiv 2303.10512):

        I = |w * dL/dw|                          I_ <- beta1 I_ + (1 - beta1) I
        s(w) = I_ * U_                           U_ <- beta2 U_ + (1 - beta2) |I - I_|
        S_i = s(lambda_i) + mean_n s(P_ni) + mean_k s(Q_ik)

    After step t the b(t) triplets of largest S of all layers together keep their lambda, and the
    lambdas of all others are set to zero; their gradients live on, and a later S may let them
    back. With b_0 the ranks of all layers and b_T = target_r * number of layers,

        b(t) = b_0                                                        t <= t_init
        b(t) = floor(b_T + (b_0 - b_T) (1 - (t - t_init) / (T - t_final - t_init))^3)   between
        b(t) = b_T                                                        t >= T - t_final

    with T = total_step. Nothing is cut until t_init, and then at every delta_t-th step; from step
    T - t_final on the choice is fixed. A layer may lose all of its ranks. Of equal S the one of the
    earlier layer, and there of the smaller index, stays.

    A step is update(), the optimizer's step, allocate(); fused_lora.optim.AdaLoRA makes it one
    call. No step waits for the device: b(t) follows from the number of steps alone. I_ and U_
    take two numbers for each of P, lambda and Q, in fp32 (fp64 for fp64), until T - t_final.

    Args:
        model: its AdaLoRALinear modules are the layers; make it after these are where they train.
        target_r: the average rank of a layer at the end, at most that at the start.
        total_step, t_init, t_final, delta_t: counts of steps, as above.
        beta1, beta2: floats in (0, 1).

    Attributes: step_count, the t above; names, the layers'; ranks, theirs at the start.

    Raises TypeError and ValueError that name the argument, NotImplementedError where parameters are
    sharded (FSDP2, tensor parallel): importance is a sum over all of P and Q.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        target_r: int,
        total_step: int,
        t_init: int = 0,
        t_final: int = 0,
        delta_t: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        layers = _layers(model)
        for name, count, least in (
            ("target_r", target_r, 1),
            ("total_step", total_step, 1),
            ("t_init", t_init, 0),
            ("t_final", t_final, 0),
            ("delta_t", delta_t, 1),
        ):
            _check_count(name, count, least)
        if t_init + t_final >= total_step:
            raise ValueError(
                f"t_init + t_final must be below total_step, or no step is left to cut in; got "
                f"{t_init} + {t_final} and {total_step}"
            )
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            check_number(name, beta)
            if not 0 < beta < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {beta}")
        self.names = list(layers)
        self.ranks = [layer.r for layer in layers.values()]
        self.target_r, self.total_step, self.delta_t = target_r, total_step, delta_t
        self.t_init, self.t_final, self.beta1, self.beta2 = t_init, t_final, beta1, beta2
        if target_r * len(layers) > sum(self.ranks):
            raise ValueError(
                f"target_r must be at most the average rank of the layers, "
                f"{sum(self.ranks) / len(layers):g}, got {target_r}"
            )
        self.q: list[Tensor] = [layer.lora_a for layer in layers.values()]
        self.p: list[Tensor] = [layer.lora_b for layer in layers.values()]
        self.lambdas: list[Tensor] = [layer.gate for layer in layers.values()]
        self.step_count = 0
        self._mask: Tensor | None = None  # 0 and 1 [b_0], of all layers in turn
        self._smoothed: list[_Smoothed] = []  # of q, p and lambdas

    @property
    def masks(self) -> dict[str, Tensor]:
        """{layer: bool [R], False where its lambda was set to zero} of the last choice made."""
        if self._mask is None:
            masks = [torch.ones_like(gate) for gate in self.lambdas]
        else:
            masks = self._by_layer(self._mask)
        return {name: mask.bool() for name, mask in zip(self.names, masks, strict=True)}

    def budget(self, step: int) -> int:
        """b(step): how many triplets of all layers keep their lambda after that step."""
        first, last = sum(self.ranks), self.target_r * len(self.ranks)
        if step <= self.t_init:
            return first
        if step >= self.total_step - self.t_final:
            return last
        left = 1 - (step - self.t_init) / (self.total_step - self.t_final - self.t_init)
        return int((first - last) * left**3 + last)

    @torch.no_grad()
    def update(self) -> None:
        """Take the gradients of this step into I_ and U_, before the parameters are stepped."""
        if self.step_count >= self.total_step - self.t_final:
            return
        if not self._smoothed:
            self._smoothed = [_Smoothed(part) for part in (self.q, self.p, self.lambdas)]
        for part in self._smoothed:
            part.update(self.beta1, self.beta2)

    @torch.no_grad()
    def allocate(self) -> None:
        """Count a step, after the parameters were stepped, and set the lambdas to zero that b(t)
        has no room for.

        Raises RuntimeError where a choice is to be made and update() was never called.
        """
        last, step = self.total_step - self.t_final, self.step_count + 1
        chooses = self.t_init < step <= last and (step % self.delta_t == 0 or step == last)
        if chooses:
            self._mask = self._chosen(self.budget(step))
        self.step_count = step
        if step >= last:
            self._smoothed = []
        if self._mask is not None and (chooses or step > last):
            torch._foreach_mul_(self.lambdas, self._by_layer(self._mask))

    def _by_layer(self, mask: Tensor) -> list[Tensor]:
        masks = mask.split(self.ranks)
        return [m.to(g.device) for m, g in zip(masks, self.lambdas, strict=True)]

    def _chosen(self, budget: int) -> Tensor:
        """[b_0], 1 at the `budget` triplets of largest S and 0 at the others."""
        if not self._smoothed:
            raise RuntimeError("allocate() has no importance to go by; call update() at every step")
        q, p, lambdas = (
            part.importance(dim) for part, dim in zip(self._smoothed, (-1, -2, None), strict=True)
        )
        scores = torch._foreach_add(lambdas, torch._foreach_add(p, q))
        flat = torch.cat([s.to(scores[0].device) for s in scores])
        order = torch.sort(flat, descending=True, stable=True).indices
        return torch.zeros_like(flat, dtype=torch.float32).index_fill_(0, order[:budget], 1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step_count": self.step_count,
            "ranks": self.ranks,
            "mask": self._mask,
            "sensitivity": [part.sensitivity for part in self._smoothed],
            "uncertainty": [part.uncertainty for part in self._smoothed],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave; the schedule and betas stay those given to this allocator.

        Raises ValueError, and loads nothing, where it is of layers of other ranks or sizes.
        """
        if state_dict["ranks"] != self.ranks:
            raise ValueError(
                f"state_dict is of layers of ranks {state_dict['ranks']}, this allocator has "
                f"{self.ranks}"
            )
        smoothed = []
        if state_dict["sensitivity"]:
            smoothed = [_Smoothed(part) for part in (self.q, self.p, self.lambdas)]
        for name in ("sensitivity", "uncertainty"):
            for part, saved in zip(smoothed, state_dict[name], strict=True):
                own = getattr(part, name)
                if [t.shape for t in own] != [t.shape for t in saved]:
                    raise ValueError(
                        f"state_dict has {name} of shapes {[list(t.shape) for t in saved]}, this "
                        f"allocator has {[list(t.shape) for t in own]}"
                    )
                for mine, theirs in zip(own, saved, strict=True):
                    mine.copy_(theirs)
        mask = state_dict["mask"]
        self._mask = None if mask is None else mask.to(self.lambdas[0].device, copy=True)
        self._smoothed, self.step_count = smoothed, state_dict["step_count"]


class AdaLoRA(torch.optim.Optimizer):
    """AdaLoRA's step: gradients into the importance, `optimizer`'s step, lambdas set to zero.

    The three happen in one step(), in the order of the paper's algorithm 1 (arXiv 2303.10512): the
    importance is of the parameters that the gradients were taken at. A GradScaler skips all of them
    or none, and a step it skips is not counted.

        allocator = RankAllocator(model, target_r=4, total_step=1000, t_init=100, t_final=300)
        optimizer = AdaLoRA(torch.optim.AdamW(trained, lr=1e-3), allocator)
        loss = loss_of(model(x)) + 0.1 * orthogonality_penalty(model)

    Args:
        optimizer: any torch optimizer that steps without a closure, of P, Q and lambda and
            whatever else is trained.
        allocator: the RankAllocator of the same layers.

    param_groups are those of `optimizer`, so that learning rate schedulers, GradScaler.unscale_,
    clipping and zero_grad reach them; state_dict() is its own and the allocator's.

    Raises TypeError where an argument is of another type, ValueError where a lambda is not in
    `optimizer`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, allocator: RankAllocator) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not isinstance(allocator, RankAllocator):
            raise TypeError(f"allocator must be a RankAllocator, got {type(allocator).__name__}")
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, gate in zip(allocator.names, allocator.lambdas, strict=True):
            if id(gate) not in stepped:
                raise ValueError(
                    f"the gate of {name!r} is not in optimizer, so it would never train; make "
                    f"optimizer of all parameters that require a gradient"
                )
        self.optimizer, self.allocator = optimizer, allocator
        super().__init__(optimizer.param_groups, optimizer.defaults)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups; a view, as loading replaces them."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        # torch.optim.Optimizer.__init__ assigns the empty list that it would fill.
        if groups:
            raise AttributeError("param_groups is a view; change .optimizer.param_groups")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        # torch.optim.Optimizer.__init__ adds those that are there.
        if all(param_group is not group for group in self.optimizer.param_groups):
            self.optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of everything.

        closure: evaluates the model again and returns the loss, as in torch.optim; it is called
            once, and its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.allocator.update()
        self.optimizer.step()
        self.allocator.allocate()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), "allocator": self.allocator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave. Raises ValueError where it is of other parameters."""
        if "allocator" not in state_dict:
            raise ValueError("state_dict has no 'allocator'; it is not one of AdaLoRA")
        inner = {key: value for key, value in state_dict.items() if key != "allocator"}
        self.optimizer.load_state_dict(inner)
        self.allocator.load_state_dict(state_dict["allocator"])

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "optimizer": self.optimizer,
            "allocator": self.allocator,
        }


def _gram_distances(tensors: Sequence[Tensor], columns: bool) -> list[Tensor]:
    """Z^T Z - I (Z Z^T - I without columns) of tensors Z, [n, R, R] for each n that are alike."""
    found = []
    for places in _alike(tensors):
        # One product for all that are alike: plain autograd then costs what a closed form would.
        z = torch.stack([tensors[i] for i in places])
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            gram = z.mT @ z if columns else z @ z.mT
            found.append(gram - torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device))
    return found


def orthogonality_penalty(model: torch.nn.Module, kind: str = "squared") -> Tensor:
    """How far P and Q of a model's AdaLoRALinear are from orthogonal; a term of the loss.

    kind: "squared", of the paper (arXiv 2303.10512),

            sum over layers of |P^T P - I|_F^2 + |Q Q^T - I|_F^2     d/dP = 4 P (P^T P - I)

        or "unsquared", of the authors' code and PEFT,

            mean over all P and Q of |P^T P - I|_F and |Q Q^T - I|_F

        whose gradient is zero where P is orthogonal exactly. Its weights in a loss are not those
        of the other: PEFT's default is 0.5 of "unsquared".

    Returns a 0-d tensor, made in fp32 (fp64 for fp64) under autocast too. Raises TypeError and
    ValueError that name the argument, NotImplementedError where parameters are sharded.
    """
    check_choice("kind", kind, PENALTIES)
    layers = _layers(model).values()
    found = _gram_distances([layer.lora_b for layer in layers], columns=True)
    found += _gram_distances([layer.lora_a for layer in layers], columns=False)
    first = found[0]
    if kind == "squared":
        parts = [distance.square().sum() for distance in found]
        return torch.stack([part.to(first) for part in parts]).sum()
    parts = [torch.linalg.vector_norm(distance, dim=(1, 2)) for distance in found]
    return torch.cat([part.to(first) for part in parts]).mean()
