"""What the tests, and `fused-lora verify`, measure correctness with.

The tolerance comes from the data: against an fp64 truth, an implementation may err twice as much as
plain PyTorch does in the same dtype, plus a few units in the last place.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "step2", "expanded", "misaligned")
_GUARD = 64


def norms(t: Tensor) -> tuple[float, float]:
    """(Frobenius norm, largest magnitude), in fp64."""
    if not t.numel():
        return 0.0, 0.0
    t = t.detach().double()
    return t.norm().item(), t.abs().max().item()


def converted(
    tensors: Sequence[Tensor | None], fn: Callable[[Tensor], Tensor]
) -> list[Tensor | None]:
    """fn of each tensor, as leaves that require a gradient where theirs did."""
    return [None if t is None else fn(t.detach()).requires_grad_(t.requires_grad) for t in tensors]


class Truth:
    """What fn(*inputs) is in fp64, and how far an implementation of it may be from that.

    For each output, in the Frobenius and in the largest-element norm:

        |ours - truth| <= 2 (|fn - truth| + eps * spread) + eps * |truth| + eps(fp32) * size + tiny

    where eps and the smallest subnormal, tiny, are those of the coarsest dtype among ours and the
    inputs.

    Every output is a sum of products of inputs. spread = sqrt(fn(inputs^2)), what one rounding of
    every term comes to (a term has two rounded factors), and size = fn(|inputs|), the scale of a
    sum's backward error, are ulps that cancellation does not shrink. The ulp of the truth is for a
    rounded intermediate that all terms share.
    """

    def __init__(self, fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None]):
        self.plain = fn(*inputs)
        double = converted(inputs, torch.Tensor.double)
        self.true = fn(*double)
        size = fn(*converted(double, torch.abs))
        squares = fn(*converted(double, torch.square))
        dtypes = {t.dtype for t in inputs if t is not None}
        self.coarsest = max(map(torch.finfo, dtypes), key=lambda f: f.eps)
        # For each output, and of it for each norm: plain torch's error, truth, spread and size.
        self.scales = [
            tuple(zip(*map(norms, (same - true, true, square.sqrt(), terms)), strict=True))
            for same, true, square, terms in zip(self.plain, self.true, squares, size, strict=True)
        ]

    def check(self, names: Sequence[str], ours: Sequence[Tensor | None]) -> None:
        """Raise AssertionError where one of ours is too far away, or of another shape or dtype.

        An output of None is not looked at.
        """
        for name, out, same, true, scales in zip(
            names, ours, self.plain, self.true, self.scales, strict=True
        ):
            if out is None:
                continue
            assert out.shape == same.shape, (
                f"{name}: shape {tuple(out.shape)}, want {tuple(same.shape)}"
            )
            assert out.dtype == same.dtype, f"{name}: dtype {out.dtype}, want {same.dtype}"
            coarsest = max(self.coarsest, torch.finfo(out.dtype), key=lambda f: f.eps)
            eps, tiny = coarsest.eps, coarsest.smallest_normal * coarsest.eps
            sum_eps = torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps
            for norm, error, (theirs, value, spread, size) in zip(
                ("Frobenius", "max"), norms(out - true), scales, strict=True
            ):
                bound = 2 * (theirs + eps * spread) + eps * value + sum_eps * size + tiny
                # Written so that NaN fails.
                assert error <= bound, (
                    f"{name}: {norm} error {error:.2e} against fp64, above {bound:.2e}; plain "
                    f"torch has {theirs:.2e} (shape {tuple(out.shape)}, {out.dtype})"
                )


def assert_accurate(
    names: Sequence[str],
    ours: Sequence[Tensor | None],
    fn: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
) -> None:
    """Hold `ours` to the plain PyTorch function fn(*inputs): against fp64, at most twice its error
    plus a few ulps (see Truth)."""
    Truth(fn, inputs).check(names, ours)


def assert_near(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Hold two ways to the same numbers to each other: 64 ulps of all of them, in the Frobenius
    norm, since a single sum may cancel."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (
        f"{name}: {tuple(ours.shape)}, {ours.dtype}; want {tuple(theirs.shape)}, {theirs.dtype}"
    )
    (apart, _), (size, _) = norms(ours.double() - theirs.double()), norms(theirs)
    bound = 64 * torch.finfo(theirs.dtype).eps * size
    assert apart <= bound, f"{name}: apart by {apart:.2e}, above {bound:.2e}"


@torch.no_grad()
def nudge_(tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Move every number by about an ulp of dtype, at random.

    What this changes in the result of a long computation is what its roundings can: the error of
    one way to compute it is a single sample, and may be small by chance.
    """
    for t in tensors:
        t.addcmul_(t, torch.randn_like(t), value=torch.finfo(dtype).eps)


def guarded(
    shape: tuple[int, ...],
    layout: str = "contiguous",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    std: float = 1.0,
) -> Tensor:
    """A tensor of N(0, std) values in the given layout, with NaN in every byte around and between
    them.

    A kernel that reads one element outside gets NaN. "expanded" has stride 0 along its first
    dimension.
    """
    if layout == "transposed":
        swapped = (*shape[:-2], shape[-1], shape[-2])
        t = guarded(swapped, dtype=dtype, device=device, generator=generator, std=std)
        return t.transpose(-1, -2)
    if layout == "expanded":
        one = (1, *shape[1:])
        return guarded(one, dtype=dtype, device=device, generator=generator, std=std).expand(shape)
    step = 2 if layout == "step2" else 1
    wide = (*shape[:-1], shape[-1] * step)
    numel = torch.Size(wide).numel()
    first = _GUARD + (layout == "misaligned")
    buffer = torch.full((numel + 2 * _GUARD + 1,), float("nan"), dtype=dtype, device=device)
    t = buffer[first : first + numel].view(wide)[..., ::step]
    t.copy_(torch.randn(shape, generator=generator, dtype=torch.float32).mul_(std))
    return t


def saved_bytes(fn) -> tuple[int, list[Tensor]]:
    """(bytes, tensors) that autograd keeps for the backward of fn(), each storage range once."""
    saved: dict[tuple, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.dtype] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return sum(t.numel() * t.element_size() for t in saved.values()), list(saved.values())
