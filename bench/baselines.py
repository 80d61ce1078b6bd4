"""Contenders that have the structure of what is in use, written here.

BASELINES is {name: the fields of a Contender}. A contender's docstring says what its form costs.
"""

import functools
import importlib.util
import os
import shutil
import types

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_lora.ops.dispatch import triton_refuses

SCALE = 2.0


def torch_keep(case, x: Tensor) -> Tensor:
    """The mask of F.dropout on a tensor like x."""
    return F.dropout(torch.ones_like(x), case.p) != 0


def no_dropout(case) -> str | None:
    return "it has no dropout" if case.p else None


class Addmm(torch.autograd.Function):
    """y [M, N] of x [M, K], weight [N, K], a [R, K], b [N, R]; no gradient of weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor):
        ctx.save_for_backward(x, weight, a, b)
        return F.linear(x, weight).addmm_(F.linear(x, a), b.t(), alpha=SCALE)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, a, b = ctx.saved_tensors
        da, db = torch.empty_like(a), torch.empty_like(b)
        da.t().addmm_(x.t(), dy @ b, beta=0, alpha=SCALE)
        db.t().addmm_(a @ x.t(), dy, beta=0, alpha=SCALE)
        dx = (dy @ weight).addmm_(dy @ b, a, alpha=SCALE)
        return dx, None, da, db


def _addmm(case, x, weight, a, b):
    """Unsloth's algebra for one linear layer (unsloth/kernels/fast_lora.py, LoRA_W).

    The adapter is added to the base product in place by a GEMM with beta = 1: y is written twice
    and read once, where the formula makes two more tensors of its size. x a^T is not kept: the
    backward computes it again, and dy b twice, so it reads dy four times and x twice. Unsloth
    takes this path without dropout only.
    """
    return lambda: Addmm.apply(x, weight, a, b)


class ChainedAddmm(torch.autograd.Function):
    """y_i [M, N_i] of x [M, K] and of n projections each weight [N_i, K], then each a [R, K], then
    each b [N_i, R]; no gradient of the weights."""

    @staticmethod
    def forward(ctx, x: Tensor, *tensors: Tensor):
        ctx.save_for_backward(x, *tensors)
        n = len(tensors) // 3
        return tuple(
            F.linear(x, weight).addmm_(F.linear(x, a), b.t(), alpha=SCALE)
            for weight, a, b in zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *tensors = ctx.saved_tensors
        n = len(dys)
        dx, das, dbs = torch.empty_like(x), [None] * n, [None] * n
        for i, dy in enumerate(dys):
            weight, a, b = tensors[i::n]
            dh = dy @ b
            dx.addmm_(dy, weight, beta=int(i > 0)).addmm_(dh, a, alpha=SCALE)
            if ctx.needs_input_grad[1 + n + i]:
                das[i] = torch.empty_like(a)
                das[i].t().addmm_(x.t(), dh, beta=0, alpha=SCALE)
            if ctx.needs_input_grad[1 + 2 * n + i]:
                dbs[i] = torch.empty_like(b)
                dbs[i].t().addmm_(a @ x.t(), dy, beta=0, alpha=SCALE)
        return dx, *[None] * n, *das, *dbs


def _chained_addmm(case, x, *tensors):
    """Unsloth's algebra for q, k and v (unsloth/kernels/fast_lora.py, LoRA_QKV).

    dx is a chain of 2n products of which all but the first are added in place by a GEMM with beta
    = 1: it is written 2n times and read 2n - 1 times. dy b is computed once, where theirs is twice.
    """
    return lambda: list(ChainedAddmm.apply(x, *tensors))


def _formula(p, x, weight, a, b):
    kept = F.dropout(x, p) if p else x
    return F.linear(x, weight) + SCALE * F.linear(F.linear(kept, a), b)


def _mask(p, x):
    return F.dropout(torch.ones_like(x), p) != 0


@functools.cache
def _compiled(fn, case, mode: str | None):
    """fn compiled for the shapes of this case alone.

    The code object is a new one: torch counts recompilations by it, and gives up after a few.
    Of a compiled forward torch allows several backwards only where no buffer is donated.
    """
    torch._functorch.config.donated_buffer = False
    fresh = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__)
    return torch.compile(fresh, fullgraph=True, dynamic=False, mode=mode)


def _compile(mode: str | None):
    """torch.compile of the formula, as it is written for eager mode.

    Inductor joins the pointwise operations around the GEMMs; a GEMM's output is still written and
    read again. The first call compiles.
    """

    def build(case, x, weight, a, b):
        call = _compiled(_formula, case, mode)
        return lambda: call(case.p, x, weight, a, b)

    return build


def _compiled_keep(case, x):
    # Inductor draws other numbers than eager torch does, the same ones in every graph.
    return _compiled(_mask, case, None)(case.p, x)


def _no_compiler(device: torch.device, case) -> str | None:
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        found = shutil.which(compiler)
        return None if found else f"torch.compile needs a C++ compiler, and there is no {compiler}"
    missing = importlib.util.find_spec("triton") is None
    return "torch.compile needs triton (pip install triton)" if missing else None


def _no_triton(device: torch.device, case) -> str | None:
    return triton_refuses(torch.empty(0, dtype=case.dtype, device=device))


def _lorafusion_form(case, x, weight, a, b):
    """LoRAFusion's kernels for one adapter (lorafusion/ops/lora_v1.py).

    Forward: dropout writes the dropped x and a byte a mask element, both kept for the backward;
    s = drop(x) a^T by cuBLAS; a Triton GEMM whose accumulator starts as scale s b^T. Backward: one
    pass over dy for ds = scale dy b and dB, both added by fp32 atomics into zeroed buffers that are
    then cast, so that neither is the same in every run; dA by cuBLAS; dx by the extended GEMM. The
    big product is Triton's, so all depends on how near that comes to cuBLAS. The tiles are theirs,
    with fewer rows where M has fewer; their atomics order memory, these are relaxed, and cost less.
    """
    from fused_lora.bench import forms

    return lambda: forms.LoraFusionForm.apply(x, weight, a, b, SCALE, case.p)


def _native_keep(case, x):
    return torch.native_dropout(x, case.p, True)[1]


def _bgmv_form(case, x, weight, a, b):
    """The serving form of Punica, as vLLM has it today (vllm/lora/ops/triton_ops), for one adapter.

    After the base GEMM three launches: zeros for an fp32 h, a shrink whose splits of K are added
    atomically, an expand that reads and writes y. The row lists of many adapters are left out, and
    there are no more splits than K has blocks, so this costs less than vLLM's.
    """
    from fused_lora.bench import forms

    tensors = [t.detach() for t in (x, weight, a, b)]
    return lambda: forms.bgmv_form(*tensors, SCALE)


def _no_bgmv(device: torch.device, case) -> str | None:
    return no_dropout(case) or _no_triton(device, case)


def _grouped_mm(case, x, weight, a, b):
    """The adapters as grouped GEMMs, as Megatron-Bridge trains several at once; here one group.

    Two grouped GEMMs beside the base, then a scaling and an addition that each pass over y; the
    price of a form that holds for any number of adapters with adjacent rows.
    """
    ends = torch.full((1,), case.M, dtype=torch.int32, device=x.device)

    def forward():
        kept = F.dropout(x, case.p) if case.p else x
        h = F.grouped_mm(kept, a.t()[None], offs=ends)
        return F.linear(x, weight) + SCALE * F.grouped_mm(h, b.t()[None], offs=ends)

    return forward


def _no_multi_grouped_mm(device: torch.device, case) -> str | None:
    if case.ragged:
        return "torch's grouped_mm takes adapters of one rank"
    return _no_grouped_mm(device, case)


def _multi_grouped_mm(case, x, weight, a, bt):
    """A grouped GEMM for each half of the adapters, between a gather of the rows, which are sorted
    by adapter beforehand, and their addition to the base product."""
    ids = case.ids().to(x.device)
    order = ids.argsort(stable=True)
    ends = ids.bincount(minlength=len(a)).cumsum(0).to(torch.int32)

    def forward():
        kept = F.dropout(x, case.p) if case.p else x
        h = F.grouped_mm(kept[order], a.mT, offs=ends)
        delta = SCALE * F.grouped_mm(h, bt, offs=ends)
        return F.linear(x, weight).index_add(0, order, delta)

    return forward


def _multi_bgmv_form(case, x, weight, a, bt):
    """Punica's gather of matrices by row, as vLLM and SGLang had it for decoding: zeros for an fp32
    h, a shrink whose splits of K are added atomically, an expand that reads and writes y."""
    from fused_lora.bench import forms

    x, weight, a = (t.detach() for t in (x, weight, a))
    b, ids = bt.detach().mT.contiguous(), case.ids().to(x.device, torch.int32)
    return lambda: forms.multi_bgmv_form(x, weight, a, b, ids, SCALE)


def _no_grouped_mm(device: torch.device, case) -> str | None:
    if device.type != "cuda":
        return f"torch's grouped_mm has a kernel for CUDA, and not for {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's grouped_mm needs compute capability 8.0"
    if case.dtype != torch.bfloat16:
        return f"torch's grouped_mm takes bfloat16, and not {case.dtype}"
    if odd := [n for n in (case.N, case.K, case.R) if n % 8]:
        return f"torch's grouped_mm needs rows of whole 16 bytes, and not {odd[0]} elements"
    return None


BASELINES: dict[str, dict] = {
    "addmm": {
        "build": _addmm,
        "keep": torch_keep,
        "unavailable": lambda device, case: no_dropout(case),
    },
    "compiled": {
        "build": _compile(None),
        "keep": _compiled_keep,
        "unavailable": _no_compiler,
    },
    "compiled, autotuned": {
        "build": _compile("max-autotune-no-cudagraphs"),
        "keep": _compiled_keep,
        "unavailable": _no_compiler,
    },
    "lorafusion form": {
        "build": _lorafusion_form,
        "keep": _native_keep,
        "unavailable": _no_triton,
    },
    "bgmv form": {
        "build": _bgmv_form,
        "keep": torch_keep,
        "unavailable": _no_bgmv,
        "forward_only": True,
    },
    "grouped_mm": {
        "build": _grouped_mm,
        "keep": torch_keep,
        "unavailable": _no_grouped_mm,
    },
}
GROUP_BASELINES: dict[str, dict] = {
    "chained addmm_": {
        "build": _chained_addmm,
        "keep": torch_keep,
        "unavailable": lambda device, case: no_dropout(case),
    },
}
MULTI_BASELINES: dict[str, dict] = {
    "bgmv form": {
        "build": _multi_bgmv_form,
        "keep": torch_keep,
        "unavailable": _no_bgmv,
        "forward_only": True,
    },
    "grouped_mm": {
        "build": _multi_grouped_mm,
        "keep": torch_keep,
        "unavailable": _no_multi_grouped_mm,
    },
}
