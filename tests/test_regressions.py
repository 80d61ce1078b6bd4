"""Where a planted fault shows and no sampled case does: equality, offsets past 2^31, infinities."""

import functools
import json
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
import triton
import triton.language as tl
from cases import CUDA_REFUSES, backends, kernels
from conftest import DEVICE
from fused_lora.triton_kernels import row_reduce as row_reduce_module
from fused_lora.triton_kernels import segment_gemm as segment_gemm_module
from fused_lora.triton_kernels import shrink as shrink_module
from fused_lora.triton_kernels.dropout import dropout_bits, keep_bits
from fused_lora.triton_kernels.shrink import shrink

import fused_lora as fl
from fused_lora import reference
from fused_lora.ops import dispatch

ROOT = Path(__file__).parent.parent
FAR = json.loads((ROOT / "tests" / "vectors" / "philox.json").read_text())["far"]


@pytest.fixture
def far(tmp_path):
    """t with each stride along `dim` 2^30 elements long, so that its fourth element lies past 2^31.

    It lies in the middle of a sparse file: an offset that wraps at 32 bits reads a zero there.
    """
    if DEVICE != "cpu":
        pytest.skip("the interpreter wraps int32 as a GPU does, and needs no 16 GiB for it")
    path = tmp_path / "sparse"
    buffer = torch.from_file(str(path), shared=True, size=2**33, dtype=torch.float16)
    path.unlink()

    def place(t, dim):
        strides = [1, 1]
        strides[dim], strides[1 - dim] = 2**30, 1
        return buffer.as_strided(t.shape, strides, 2**32).copy_(t)

    return place


@kernels
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_past_2_31_elements(far, dim, kernels):
    """Each operand in turn, along rows or columns; the results are those of a compact copy."""
    of = dispatch.kernels(kernels)
    size = [7, 7]
    size[dim] = 4
    t, others = torch.randn(size).half(), torch.randn(16, 16).half()
    mine = far(t, dim)
    left, right = others[:5, : size[1]], others[: size[0], :3]
    wide, b = others[:9, : size[1]], others[:9, :3]
    forms = [
        lambda t: of.shrink(t, left)[0],
        lambda t: of.shrink(left, t)[0],
        lambda t: of.segment_gemm([(t, left)]),
        lambda t: of.segment_gemm([(left, t)]),
        lambda t: of.row_reduce_x(t, right),
        lambda t: of.row_reduce_x(right, t),
        lambda t: torch.cat(of.row_reduce_dy(t, others[: size[1], :3], right, scale=1.0)[:2]),
        lambda t: of.row_reduce_dy(left, t.t(), others[:5, : size[0]], scale=1.0)[0],
    ]
    if kernels == "cuda":
        forms += [
            lambda t: of.decode(t, wide, left[:3], b),
            lambda t: of.decode(left, t, left[:3], others[: size[0], :3]),
            lambda t: of.decode(left, wide, t, others[:9, : size[0]]),
            lambda t: of.decode(others[:5, :6], others[: size[0], :6], others[: size[1], :6], t),
        ]
    for fn in forms:
        assert torch.equal(fn(mine), fn(t))


def test_the_mask_moves_with_the_steps_of_a_split():
    """Small inputs get a split for every step of K; large ones take several steps in each."""
    x, a = torch.randn(5, 200, device=DEVICE), torch.randn(3, 200, device=DEVICE)
    seed = torch.tensor([9], device=DEVICE)
    dropout = seed, reference.dropout_threshold(0.5), 2.0
    blocks = {"BLOCK_M": 16, "BLOCK_K": 64, "BLOCK_R": 16, "num_warps": 4, "num_stages": 1}
    t, _ = shrink(x, a, dropout=dropout, config=blocks | {"SPLIT_K": 1})
    kept = torch.where(reference.dropout_mask(seed, 5, 200, 0.5), x, 0)
    torch.testing.assert_close(t, 2.0 * kept @ a.t())


@pytest.mark.parametrize("lane", range(8))
def test_a_lane_at_the_threshold_is_kept(lane):
    seed = torch.tensor([11], device=DEVICE)
    threshold = reference.dropout_lanes(seed, torch.arange(1, device=DEVICE), 8)[0, lane].item()
    for t, kept in ((threshold, 1), (threshold + 1, 0)):
        assert dropout_bits(seed, 1, 8, t).item() >> lane & 1 == kept
        assert reference.dropout_mask(seed, 1, 8, t / 65536)[0, lane].item() == kept


@pytest.mark.parametrize("p,threshold", [(0.1, 6554), (0.3, 19661), (1 / 3, 21845), (0.9, 58982)])
def test_the_threshold_is_rounded_to_nearest(p, threshold):
    assert reference.dropout_threshold(p) == threshold


@triton.jit
def keep_bits_kernel(seed_ptr, bits_ptr, m, call, calls, threshold):
    offs_m = m + tl.arange(0, 1).to(tl.int64)
    bits = keep_bits(tl.load(seed_ptr), offs_m, call + tl.arange(0, 1), calls, threshold)
    tl.store(bits_ptr + tl.arange(0, 1), tl.reshape(bits, [1]))


@pytest.mark.parametrize("case", FAR, ids=lambda c: f"m={c['m']}")
def test_kernel_counters_are_64_bits(case):
    """Row 2^31 + 5 of 512 calls each: the counter has a high word."""
    bits = torch.empty(1, dtype=torch.int32, device=DEVICE)
    seed = torch.tensor([case["seed"]], device=DEVICE)
    m, k, K, lane = case["m"], case["k"], case["K"], case["lane"]
    for threshold, kept in ((lane, 1), (lane + 1, 0)):
        keep_bits_kernel[(1,)](seed, bits, m, k // 8, K // 8, threshold)
        assert bits.item() >> k % 8 & 1 == kept


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_counters_of_the_cuda_kernels_are_64_bits(tmp_path):
    program = tmp_path / "far.cpp"
    calls = [(c["seed"], c["m"] * (c["K"] // 8) + c["k"] // 8, c["lane"]) for c in FAR]
    lines = [
        f'std::printf("%u\\n", keep_bits(uint64_t({seed}LL), {counter}ULL, {lane + above}));'
        for seed, counter, lane in calls
        for above in (0, 1)
    ]
    program.write_text(
        '#include <cstdio>\n#include "common/philox.cuh"\nusing fused_lora::keep_bits;\n'
        f"int main() {{ {' '.join(lines)} }}\n"
    )
    includes = (f"{ROOT}/csrc", f"{ROOT}/tests/emulator", f"{emulated.cuda_root()}/include")
    subprocess.run(
        ["g++", "-std=c++17", "-w", "-DFUSED_LORA_EMULATE", *(f"-I{i}" for i in includes),
         program, "-o", tmp_path / "far"],
        check=True,
    )  # fmt: skip
    found = subprocess.run([tmp_path / "far"], capture_output=True, text=True, check=True)
    bits = [int(line) for line in found.stdout.split()]
    kept = [bits[2 * i + above] >> c["k"] % 8 & 1 for i, c in enumerate(FAR) for above in (0, 1)]
    assert kept == [1, 0] * len(FAR)


@backends
def test_an_infinity_that_is_dropped_stays_out_of_h(backend):
    x, weight = torch.randn(64, 64, device=DEVICE), torch.randn(9, 64, device=DEVICE)
    a = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    b = torch.randn(9, 3, device=DEVICE, requires_grad=True)
    seed = torch.tensor([4], device=DEVICE)
    x = torch.where(reference.dropout_mask(seed, 64, 64, 0.5), x, float("inf"))
    y = fl.lora_linear(x, weight, a, b, scale=1.0, dropout_p=0.5, seed=seed, backend=backend)
    da, db = torch.autograd.grad(y, (a, b), torch.ones_like(y))
    assert torch.isfinite(da).all() and torch.isfinite(db).all()


def test_master_gradients_are_not_rounded_to_16_bits():
    """Each gradient of an fp32 master has bits that a 16-bit number has not."""
    x, weight = torch.randn(33, 40, device=DEVICE).half(), torch.randn(20, 40, device=DEVICE).half()
    a = torch.randn(8, 40, device=DEVICE, requires_grad=True)
    b = torch.randn(20, 8, device=DEVICE, requires_grad=True)
    gate = torch.randn(8, device=DEVICE, requires_grad=True)
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.float16, enabled=enabled):
            y = fl.lora_linear(x, weight, a, b, gate=gate, scale=1.0, backend="triton")
        for grad in torch.autograd.grad(y, (a, b, gate), torch.ones_like(y)):
            assert not torch.equal(grad, grad.half().float())


class Launches(list):
    """The operations of the CUDA extension, by name as they are called."""

    def __getattr__(self, name):
        self.append(name)
        return getattr(torch.ops.fused_lora, name)


OF_FORWARD = {
    "torch": [],
    "triton": ["shrink_kernel", "segment_gemm_kernel"],
    "cuda": ["shrink_cuda", "segment_gemm_cuda"],
}
OF_BACKWARD = {
    "torch": [],
    "triton": ["row_reduce_kernel", "row_reduce_kernel", "segment_gemm_kernel"],
    "cuda": [
        *("row_reduce_cuda", "sum_rows_cuda", "sum_columns_cuda"),
        *("row_reduce_cuda", "sum_columns_cuda", "segment_gemm_cuda"),
    ],
}


@backends
def test_the_kernels_of_the_backend_that_was_asked_for(backend, monkeypatch):
    launched = Launches()
    if CUDA_REFUSES is None:
        monkeypatch.setattr(dispatch.kernels("cuda"), "_ops", launched)
    for module in (shrink_module, segment_gemm_module, row_reduce_module):

        def launch(kernel, *args, launch=module.launch, **meta):
            launched.append(kernel.fn.__name__)
            launch(kernel, *args, **meta)

        monkeypatch.setattr(module, "launch", launch)
    x, weight, a, b = (
        torch.randn(s, device=DEVICE, requires_grad=True) for s in ((4, 6), (5, 6), (2, 6), (5, 2))
    )
    grad = functools.partial(torch.autograd.grad, inputs=(x, a, b))
    y = fl.lora_linear(x, weight, a, b, scale=1.0, backend=backend)
    assert launched == OF_FORWARD[backend]
    grad(y, grad_outputs=torch.ones_like(y))
    assert launched == OF_FORWARD[backend] + OF_BACKWARD[backend]


X, W, A, B = (6, 8), (5, 8), (2, 8), (5, 2)
IN_PLACE = {
    "lora_linear": lambda x, w, a, b, ids: fl.lora_linear(x, w, a, b, scale=1.0),
    "lora_add": lambda x, w, a, b, ids: fl.lora_add(x @ w.t(), x, a, b, scale=1.0),
    "lora_linear_group": lambda x, w, a, b, ids: fl.lora_linear_group(
        x, [w, w], [a, None], [b, None], scales=[1.0, 1.0]
    )[0],
    "multi_lora_linear": lambda x, w, a, b, ids: fl.multi_lora_linear(
        x, w, reference.pack_slots([(a, b, 1.0, None)]), ids * 0
    ),
    "lora_embedding": lambda x, w, a, b, ids: fl.lora_embedding(ids, w.t(), a, b, scale=1.0),
    "dept_embedding": lambda x, w, a, b, ids: fl.dept_embedding(ids, w, None, b, a),
}


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("lead", [(6,), (2, 3)], ids=str)
def test_an_output_may_be_changed_in_place(op, lead):
    """As F.relu_ and += change that of nn.Linear; torch forbids it of a custom function's views."""
    x, w, a, b = (torch.randn(s, device=DEVICE, requires_grad=True) for s in (X, W, A, B))
    ids = torch.randint(0, 5, lead, device=DEVICE)
    y = IN_PLACE[op](x.view(*lead, 8), w, a, b, ids)
    assert not y._is_view()
    (changed,) = torch.autograd.grad(y.mul_(2).sum(), a)
    (want,) = torch.autograd.grad(IN_PLACE[op](x.view(*lead, 8), w, a, b, ids).sum() * 2, a)
    torch.testing.assert_close(changed, want)
