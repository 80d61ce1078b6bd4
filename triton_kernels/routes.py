"""segment_gemm by the kernel that the tables of routes name for its sizes (see configs.route).

Without a row, and where the kernel of a row cannot run, it is the one of segment_gemm.py.
"""

import warnings

import torch
import torch.nn.functional as F
import triton

from . import configs
from . import segment_gemm as plain

# Those with which the machine code of the Gluon kernel is what tests/test_hopper.py asks for.
GLUON = "3.6", "3.7", "3.8", "3.9"


def form(segments, mask=None) -> str:
    """The kind of sum: "forward", "dx" where the right operands lie along N, "masked dx"."""
    if mask is not None:
        return "masked dx"
    return "forward" if segments[0][1].stride(1) == 1 else "dx"


def sizes(segments, mask=None) -> dict:
    """What a row is found by. R is the columns of the narrowest of several segments, and K those of
    all others: of dx of q, k and v, which are as many as those of one layer as wide as the three.
    """
    x, Ks = segments[0][0], [lhs.shape[1] for lhs, _ in segments]
    R = min(Ks) if len(Ks) > 1 else 0
    return {
        "M": x.shape[0],
        "form": form(segments, mask),
        "kind": configs.kind(x.dtype),
        "sm": configs.capability(x.device),
        "gpu": configs.gpu(x.device),
        "triton": triton.__version__,
        "N": segments[0][1].shape[0],
        "K": sum(Ks) - R,
        "R": configs.rank_bucket(R),
    }


def version_refuses() -> str | None:
    """None where Triton's Gluon is one that segment_gemm_hopper is written in."""
    if configs.triton_version() in GLUON:
        return None
    return f"the Gluon kernel is made for Triton {', '.join(GLUON)}, this is {triton.__version__}"


def gluon_refuses(segments, mask=None) -> str | None:
    """None where segment_gemm_hopper can run, else the sentence why not."""
    if (why := version_refuses()) is not None:
        return why
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


def segment_gemm(
    segments, *, base=None, bias=None, mask=None, config=None, early=0
) -> torch.Tensor:
    """y [M, N] = base + bias + sum of L R^T over the pairs (L [M, K_i], R [N, K_i]), in order.

    mask is None or (bits uint8 [M, ceil(N / 8)], keep_scale, n): after the first n segments the
    accumulator is multiplied by keep * keep_scale. base [M, N], of any strides, is not written.

    The first `early` segments, and bias, were complete before the kernel launched last began; a
    kernel may read them while that one still runs. With a config or a base, which leaves little to
    multiply, it is the kernel of segment_gemm.py.
    """
    empty = not (segments[0][0].shape[0] and segments[0][1].shape[0])
    row = None
    if config is None and base is None and not empty and configs.routes():
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
    return plain.segment_gemm(segments, base=base, bias=bias, mask=mask, config=config)
