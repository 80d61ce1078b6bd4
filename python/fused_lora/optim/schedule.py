"""Raising the sparsity of SoRA phase by phase (arXiv 2311.11696, algorithm 1)."""

import math
from collections.abc import Iterator
from typing import Any

from fused_lora.nn.checks import check_choice, check_number, check_rank
from fused_lora.optim.sora import SoRA


def _log_linear(a: float, b: float, t: float) -> float:
    """log((1 - t) e^a + t e^b)."""
    m = max(a, b)
    return m + math.log((1 - t) * math.exp(a - m) + t * math.exp(b - m))


# From a at t = 0 to b at t = 1.
_SPACINGS = {
    "linear": lambda a, b, t: a + t * (b - a),
    "log_linear": _log_linear,
    "exp_linear": lambda a, b, t: math.exp((1 - t) * math.log(a) + t * math.log(b)),
}


def sparsity_values(start: float, end: float, phases: int, kind: str = "linear") -> list[float]:
    """`phases` values from start to end, both included.

    kind: "linear"; "log_linear", the logarithms of equally spaced exponentials, which for values
        far below 1 is linear to within their size; "exp_linear", a geometric series (the names of
        SoRA's published code).

    Raises TypeError and ValueError that name the argument: start and end are finite and at least 0,
    above 0 with "exp_linear", phases is at least 1, and 1 phase is that of `end`.
    """
    check_rank("phases", phases)
    check_choice("kind", kind, tuple(_SPACINGS))
    for name, value in (("start", start), ("end", end)):
        check_number(name, value)
        if value < 0 or (value == 0 and kind == "exp_linear"):
            wanted = "above 0 with kind='exp_linear'" if kind == "exp_linear" else "at least 0"
            raise ValueError(f"{name} must be {wanted}, got {value}")
    between = _SPACINGS[kind]
    inner = [between(start, end, i / (phases - 1)) for i in range(1, phases - 1)]
    return [*([float(start)] if phases > 1 else []), *inner, float(end)]


class SparsitySchedule:
    """Trains at one sparsity, then raises it and trains on from where the model is.

        schedule = fl.optim.SparsitySchedule(optimizer, start=1e-4, end=7e-4, phases=7)
        for sparsity in schedule:
            scheduler = LambdaLR(optimizer, ...)  # of this phase
            for batch in batches:
                ...
            save(model)  # one model of the series, and fl.optim.kept_parameters(model)

    Each phase begins with optimizer.set_sparsity(value): lambda, or with threshold="fixed" xi. The
    values are those of sparsity_values(start, end, phases, kind).

    The learning rate of a phase is the caller's choice. restart_lr=True puts the rates that the
    groups had when the schedule was made back at the beginning of each phase, for a scheduler that
    is made then, or for none. False leaves them as the last scheduler did. In the authors'
    published code one LambdaLR ends at zero with the first phase and stays there: their later
    phases train nothing, and only the threshold, which does not follow the rate, shrinks gates.

    Iterating goes on behind the phase that is under way; state_dict() and load_state_dict() carry
    which that is (optimizer.state_dict() has the sparsity and the rates themselves).

    Raises TypeError and ValueError that name the argument.
    """

    def __init__(
        self,
        optimizer: SoRA,
        start: float,
        end: float,
        phases: int,
        kind: str = "linear",
        *,
        restart_lr: bool = True,
    ) -> None:
        if not isinstance(optimizer, SoRA):
            raise TypeError(f"optimizer must be a SoRA, got {type(optimizer).__name__}")
        check_choice("restart_lr", restart_lr, (True, False))
        self.values = sparsity_values(start, end, phases, kind)
        self.phase = -1  # the first has not begun
        self.optimizer, self.restart_lr = optimizer, restart_lr
        # A scheduler that is there already may have begun a warm-up.
        self._rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]

    def step(self) -> float:
        """Begin the next phase and return its sparsity. Raises RuntimeError after the last."""
        if self.phase + 1 >= len(self.values):
            raise RuntimeError(f"all {len(self.values)} phases have begun")
        self.phase += 1
        self.optimizer.set_sparsity(self.values[self.phase])
        if self.restart_lr:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
                # A scheduler keeps an initial_lr that it finds, and takes lr where there is none.
                group.pop("initial_lr", None)
        return self.values[self.phase]

    def __iter__(self) -> Iterator[float]:
        while self.phase + 1 < len(self.values):
            yield self.step()

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "phase": self.phase, "rates": self._rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave. Raises ValueError where the optimizer has other groups."""
        if len(state_dict["rates"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"state_dict has learning rates of {len(state_dict['rates'])} parameter groups, "
                f"the optimizer has {len(self.optimizer.param_groups)}"
            )
        self.values, self.phase = list(state_dict["values"]), state_dict["phase"]
        self._rates = list(state_dict["rates"])
