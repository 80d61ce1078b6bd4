"""segment_gemm by the kernel that the tables of routes name for its sizes (see configs.route).

Without a row, and where the kernel of a row cannot run, it is the one of segment_gemm.py.
"""

import warnings

import torch
import torch.nn.functional as F
import triton

from . import configs
from . import segment_gemm as plain

# Those whose Gluon has been seen to compile the kernel.
GLUON = "3.6", "3.7", "3.8"


def form(segments, mask=None) -> str:
    """The kind of sum: "forward", "dx" where the right operands lie along N, "masked dx"."""
    if mask is not None:
        return "masked dx"
    return "forward" if segments[0][1].stride(1) == 1 else "dx"


def sizes(segments, mask=None) -> dict:
    """What a row is found by. K is the widest segment, R the columns of all others."""
    x, Ks = segments[0][0], [lhs.shape[1] for lhs, _ in segments]
    return {
        "M": x.shape[0],
        "form": form(segments, mask),
        "kind": configs.kind(x.dtype),
        "sm": configs.capability(x.device),
        "gpu": configs.gpu(x.device),
        "triton": triton.__version__,
        "N": segments[0][1].shape[0],
        "K": max(Ks),
        "R": configs.rank_bucket(sum(Ks) - max(Ks)),
    }


def gluon_refuses(segments, mask=None) -> str | None:
    """None where segment_gemm_hopper can run, else the sentence why not."""
    if ".".join(triton.__version__.split(".")[:2]) not in GLUON:
        return (
            f"the Gluon kernel is made for Triton {', '.join(GLUON)}, this is {triton.__version__}"
        )
    from . import segment_gemm_hopper

    return segment_gemm_hopper.refuses(segments, mask=mask)


def torch_refuses(segments, mask=None) -> str | None:
    return None if mask is None else "torch would need a pass of its own over y for the mask"


def by_torch(segments, *, bias=None):
    """The same sum by torch's products, each of them added to y and rounded."""
    (lhs, rhs), *others = segments
    y = F.linear(lhs, rhs, bias)
    for lhs, rhs in others:
        y.addmm_(lhs, rhs.t())
    return y


def segment_gemm(segments, *, bias=None, mask=None, config=None, early=0) -> torch.Tensor:
    """y [M, N] = bias + sum of L R^T over the pairs (L [M, K_i], R [N, K_i]), in their order.

    mask is None or (bits uint8 [M, ceil(N / 8)], keep_scale, n): after the first n segments the
    accumulator is multiplied by keep * keep_scale.

    The first `early` segments, and bias, were complete before the kernel launched last began; a
    kernel may read them while that one still runs. With a config it is the kernel of segment_gemm.
    """
    empty = not (segments[0][0].shape[0] and segments[0][1].shape[0])
    row = None
    if config is None and not empty and configs.routes():
        row = configs.route(**sizes(segments, mask))
    if row is not None and row["route"] != "triton":
        refuses = {"gluon": gluon_refuses, "torch": torch_refuses}[row["route"]]
        if (why := refuses(segments, mask)) is not None:
            warnings.warn(
                f"segment_gemm: the route {row['route']!r} is not taken: {why}", stacklevel=2
            )
        elif row["route"] == "torch":
            return by_torch(segments, bias=bias)
        else:
            from . import segment_gemm_hopper

            return segment_gemm_hopper.segment_gemm(
                segments, bias=bias, mask=mask, config=row.get("config"), early=early
            )
    elif row is not None:
        config = row.get("config")
    return plain.segment_gemm(segments, bias=bias, mask=mask, config=config)
