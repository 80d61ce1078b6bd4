"""Contenders that run the files of other projects, where they are installed or unpacked.

PEERS is {name: the fields of a Contender}. Two environment variables name the folders that hold
the packages vllm and sglang, each an unpacked wheel or a source tree; neither need be installed:

    FUSED_LORA_BENCH_VLLM=.../wheel       has vllm/lora/ops/triton_ops
    FUSED_LORA_BENCH_SGLANG=.../wheel     has sglang/kernels/ops/lora/dense
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fused_lora.bench.baselines import SCALE, no_dropout, torch_keep
from torch import Tensor

from fused_lora.ops.dispatch import triton_refuses


class _Held(torch.autograd.Function):
    """The fp32 copy of a tensor as a function of it: no kernel forward, a cast backward."""

    @staticmethod
    def forward(ctx, t: Tensor, copy: Tensor):
        ctx.dtype = t.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def _peft(case, x, weight, a, b, *, autocast_adapter_dtype: bool):
    """PEFT's module around these tensors.

    By default PEFT holds 16-bit adapters in fp32: x is cast to fp32, the adapter's GEMMs and the
    addition run in fp32, and the sum is cast back. The adapters handed in and their gradients are
    16-bit here, so two small casts are added to PEFT's backward, and its fp32 adapters count among
    what it keeps.
    """
    import peft

    model = torch.nn.Sequential(torch.nn.Linear(case.K, case.N, bias=False, device="meta"))
    model[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    config = peft.LoraConfig(
        r=case.R, lora_alpha=SCALE * case.R, lora_dropout=case.p, target_modules=["0"]
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model[0]
    projections = layer.lora_A["default"], layer.lora_B["default"]
    for projection, tensor in zip(projections, (a, b), strict=True):
        del projection.weight
        projection.weight = tensor
    if not autocast_adapter_dtype or x.dtype == torch.float32:
        return lambda: layer(x)

    held = [(p, t, t.detach().float()) for p, t in zip(projections, (a, b), strict=True)]

    def forward():
        for projection, tensor, copy in held:
            projection.weight = _Held.apply(tensor, copy)
        return layer(x)

    return forward


def _fp32_keep(case, x):
    return torch_keep(case, x.float())


def _no_peft(device: torch.device, case) -> str | None:
    return None if importlib.util.find_spec("peft") else "it is not installed (pip install peft)"


@contextlib.contextmanager
def stubbed(stubs: dict[str, ModuleType]) -> Iterator[None]:
    """Imports find the stubs in place of their packages; afterwards sys.modules is as before."""
    roots = {name.partition(".")[0] for name in stubs}

    def known() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in roots]

    before = {name: sys.modules.pop(name) for name in known()}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in known():
            del sys.modules[name]
        sys.modules.update(before)


def stub(name: str, **attributes) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


class Tree(NamedTuple):
    """Kernel files of a package that is not installed, and stubs for what they import of it."""

    variable: str  # of the environment: the folder that holds the package
    package: str  # that of the files
    files: tuple[str, ...]
    stubs: Callable[[], list[ModuleType]]

    def missing(self) -> str | None:
        root = os.environ.get(self.variable)
        if not root:
            top = self.package.partition(".")[0]
            return f"{self.variable} is not set; it names the folder that holds {top}/"
        folder = Path(root, *self.package.split("."))
        paths = [folder / f"{file}.py" for file in self.files]
        lost = next((path for path in paths if not path.is_file()), None)
        return None if lost is None else f"{self.variable}: there is no {lost}"

    def load(self) -> SimpleNamespace:
        return _load(self, os.environ[self.variable])

    def why_not(self) -> str | None:
        """None where the files can be loaded, else the sentence why not."""
        if sentence := self.missing():
            return sentence
        try:
            self.load()
        except (ImportError, AttributeError) as error:
            return f"{self.variable}: these files are of another version than this knows: {error}"
        return None


@functools.cache
def _load(tree: Tree, root: str) -> SimpleNamespace:
    stubs = tree.stubs()
    parts = tree.package.split(".")
    for depth in range(1, len(parts) + 1):
        # A package whose __init__ is not run, and in whose folder files are found.
        where = [str(Path(root, *parts[:depth]))]
        stubs.append(stub(".".join(parts[:depth]), __path__=where))
    with stubbed({module.__name__: module for module in stubs}):
        names = {file: importlib.import_module(f"{tree.package}.{file}") for file in tree.files}
    return SimpleNamespace(**names)


def _vllm_stubs() -> list[ModuleType]:
    import triton
    import triton.language as tl

    def is_capability(wanted: int) -> bool:
        return torch.cuda.get_device_capability() == divmod(wanted, 10)

    def has_capability(wanted: int) -> bool:
        return torch.cuda.get_device_capability() >= divmod(wanted, 10)

    def no_custom_op(**options):
        raise AttributeError("vLLM falls back to the plain function")

    def to_device(values, dtype, device):
        return torch.tensor(values, dtype=dtype, device=device)

    silent = SimpleNamespace(info_once=lambda text: None, warning_once=lambda text: None)
    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available,
        is_device_capability=is_capability,
        has_device_capability=has_capability,
    )
    return [
        stub(
            "vllm.envs",
            VLLM_BATCH_INVARIANT=False,
            VLLM_LORA_DISABLE_PDL=False,
            VLLM_LORA_ENABLE_DUAL_STREAM=False,
            VLLM_TUNED_CONFIG_FOLDER=os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
        ),
        stub("vllm.logger", init_logger=lambda name: silent),
        stub("vllm.platforms", current_platform=platform),
        stub("vllm.triton_utils", triton=triton, tl=tl),
        stub("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2),
        stub(
            "vllm.utils.torch_utils",
            async_tensor_h2d=to_device,
            direct_register_custom_op=no_custom_op,
        ),
    ]


VLLM = Tree(
    "FUSED_LORA_BENCH_VLLM",
    "vllm.lora.ops.triton_ops",
    ("lora_kernel_metadata", "lora_shrink_op", "lora_expand_op"),
    _vllm_stubs,
)


def _one_adapter(build: Callable) -> Callable:
    """The case of one adapter of a form for many: build(case, x, weight, a, bt, ids)."""

    def of_one(case, x, weight, a, b):
        ids = torch.zeros(case.M, dtype=torch.int64)
        return build(case, x, weight, a[None], b.t()[None], ids)

    return of_one


def _many_adapters(build: Callable) -> Callable:
    return lambda case, x, weight, a, bt: build(case, x, weight, a, bt, case.ids())


def _vllm(case, x, weight, a, bt, ids):
    """vLLM's kernels, in the order of its layers: the base GEMM, zeros, shrink, expand onto y.

    The kernels are called directly, without the registered ops that vLLM calls them through, and
    the lists of rows are made beforehand. Its own VLLM_TUNED_CONFIG_FOLDER holds.
    """
    ops = VLLM.load()
    x, a, b = x.detach(), a.detach(), bt.detach().mT.contiguous()
    meta = ops.lora_kernel_metadata.LoRAKernelMeta.make(len(a), case.M, x.device)
    meta.prepare_tensors(ids.to(x.device, torch.int32))
    rows = meta.meta_args(case.M, False)

    def forward():
        y = F.linear(x, weight)
        h = torch.empty(1, case.M, case.R, dtype=torch.float32, device=x.device)
        ops.lora_shrink_op.lora_shrink(x, [a], h, *rows, SCALE)
        ops.lora_expand_op.lora_expand(h, [b], y, *rows, add_inputs=True)
        return y

    return forward


def _sglang_stubs() -> list[ModuleType]:
    off = SimpleNamespace(get=lambda: False)
    envs = SimpleNamespace(
        SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off, SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off
    )
    return [
        stub("sglang.srt.environ", envs=envs),
        stub("sglang.srt.lora.utils", LoRABatchInfo=SimpleNamespace),
        stub(
            "sglang.srt.utils",
            cached_triton_kernel=lambda key: lambda kernel: kernel,
            get_device_name=lambda: (
                torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            ),
        ),
    ]


SGLANG = Tree(
    "FUSED_LORA_BENCH_SGLANG",
    "sglang.kernels.ops.lora.dense",
    ("chunked_sgmv_shrink", "chunked_sgmv_expand"),
    _sglang_stubs,
)
CHUNK = 16  # rows: the default of --max-lora-chunk-size


def _sglang(case, x, weight, a, bt, ids):
    """The kernels of SGLang's default backend, csgmv.

    The base GEMM, shrink, expand onto y, in chunks of 16 rows of one adapter at most. The lists of
    chunks are made beforehand. Triton launches the kernels, where SGLang has a quicker launcher of
    its own: that matters to eager times, and not in a CUDA graph.
    """
    ops = SGLANG.load()
    x, a, b = x.detach(), a.detach(), bt.detach().mT.contiguous()

    def integers(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=x.device)

    order = ids.argsort(stable=True)
    counts = ids.bincount(minlength=len(a)).tolist()
    first, adapters, end = [], [], 0
    for adapter, count in enumerate(counts):
        chunks = range(end, end + count, CHUNK)
        first += chunks
        adapters += [adapter] * len(chunks)
        end += count
    batch = SimpleNamespace(
        use_cuda_graph=False,
        num_segments=len(first),
        max_len=CHUNK,
        seg_indptr=integers([*first, case.M]),
        weight_indices=integers(adapters),
        lora_ranks=integers([case.R] * len(a)),
        scalings=torch.full((len(a),), SCALE, device=x.device),
        permutation=integers(order.tolist()),
    )
    ends = integers([0, case.N])
    ends_cpu = ends.cpu()
    shrink = ops.chunked_sgmv_shrink.chunked_sgmv_lora_shrink_forward
    expand = ops.chunked_sgmv_expand.chunked_sgmv_lora_expand_forward

    def forward():
        y = F.linear(x, weight)
        h = shrink(x, a, batch, 1)
        return expand(h, b, batch, ends, case.N, y, ends_cpu)

    return forward


def _not_served(tree: Tree):
    def unavailable(device: torch.device, case) -> str | None:
        if case.dtype.itemsize != 2:
            return f"it takes float16 and bfloat16, and not {case.dtype}"
        refused = no_dropout(case) or triton_refuses(
            torch.empty(0, dtype=case.dtype, device=device)
        )
        return refused or tree.why_not()

    return unavailable


def _serving(of_ids: Callable[[Callable], Callable]) -> dict[str, dict]:
    forms = {"vllm": (_vllm, VLLM), "sglang": (_sglang, SGLANG)}
    return {
        name: {
            "build": of_ids(build),
            "keep": torch_keep,
            "unavailable": _not_served(tree),
            "forward_only": True,
        }
        for name, (build, tree) in forms.items()
    }


PEERS: dict[str, dict] = {
    "peft": {
        "build": functools.partial(_peft, autocast_adapter_dtype=True),
        "keep": _fp32_keep,
        "unavailable": _no_peft,
    },
    "peft, adapters in x's dtype": {
        "build": functools.partial(_peft, autocast_adapter_dtype=False),
        "keep": torch_keep,
        "unavailable": _no_peft,
    },
    **_serving(_one_adapter),
}
MULTI_PEERS = _serving(_many_adapters)
