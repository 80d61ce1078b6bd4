"""The mask: Philox4x32-7 against its known answers, and the same bits from the kernels."""

import json
from pathlib import Path

import pytest
import torch
from cases import DROPOUTS, fuzz, kernels, seeds, sizes
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from fused_lora import _extension, reference
from fused_lora.ops import dispatch
from fused_lora.ops.dropout import dropout_mask

VECTORS = json.loads((Path(__file__).parent / "vectors" / "philox.json").read_text())


def test_philox_known_answer():
    words = reference.philox4x32(torch.zeros((), dtype=torch.int64), torch.tensor(0))
    assert [f"{int(w):08x}" for w in words] == VECTORS["random123"]["rounds7_zero"]


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: f"seed={c['seed']}")
def test_lanes(case):
    lanes = reference.dropout_lanes(
        torch.tensor([case["seed"]]), torch.arange(case["M"]), case["K"]
    )
    assert lanes.tolist() == case["lanes"]


@pytest.mark.parametrize("case", VECTORS["far"], ids=lambda c: f"m={c['m']}")
def test_lanes_far_out(case):
    lanes = reference.dropout_lanes(
        torch.tensor([case["seed"]]), torch.tensor([case["m"]]), case["K"]
    )
    assert lanes[0, case["k"]].item() == case["lane"]


@kernels
@given(M=sizes, K=sizes, seed=seeds)
@fuzz(25)
@pytest.mark.parametrize("p", DROPOUTS)
def test_kernel_bits_are_the_reference_mask(kernels, p, M, K, seed):
    seed_t = torch.tensor([seed], device=DEVICE)
    bits = dispatch.kernels(kernels).dropout_bits(seed_t, M, K, reference.dropout_threshold(p))
    lanes = torch.arange(8, device=DEVICE)
    keep = (bits[:, :, None] >> lanes & 1).bool().reshape(M, bits.shape[1] * 8)[:, :K]
    assert torch.equal(keep, reference.dropout_mask(seed_t, M, K, p))


@kernels
@given(M=sizes, first=st.integers(0, 40), K=sizes, more=st.integers(0, 30), seed=seeds)
@fuzz(25)
def test_columns_of_a_wider_input_take_its_mask(kernels, M, first, K, more, seed):
    first *= 8
    total = first + K + more
    seed_t = torch.tensor([seed], device=DEVICE)
    whole = reference.dropout_mask(seed_t, M, total, 0.3)[:, first : first + K]
    assert torch.equal(reference.dropout_mask(seed_t, M, K, 0.3, (first, total)), whole)
    threshold = reference.dropout_threshold(0.3)
    bits = dispatch.kernels(kernels).dropout_bits(seed_t, M, K, threshold, (first, total))
    lanes = torch.arange(8, device=DEVICE)
    keep = (bits[:, :, None] >> lanes & 1).bool().reshape(M, bits.shape[1] * 8)[:, :K]
    assert torch.equal(keep, whole)


@pytest.mark.skipif(_extension.why_missing() is not None, reason=str(_extension.why_missing()))
@given(
    M=sizes, first=st.integers(0, 40), K=sizes, more=st.integers(0, 30), seed=seeds,
    p=st.sampled_from((0.0, *DROPOUTS, 1.0)),
)  # fmt: skip
@fuzz(100)
def test_mask_of_the_torch_backend(M, first, K, more, seed, p):
    """One C++ loop makes it on a CPU: whole inputs, and columns of a wider one."""
    seed_t = torch.tensor([seed])
    for columns in (None, (8 * first, 8 * first + K + more)):
        keep = dropout_mask(seed_t, M, K, p, columns)
        assert torch.equal(keep, reference.dropout_mask(seed_t, M, K, p, columns))


@pytest.mark.skipif(_extension.why_missing() is not None, reason=str(_extension.why_missing()))
def test_the_c_plus_plus_loop_is_what_runs(monkeypatch):
    def not_meant(*args):
        raise AssertionError("the mask was made by torch's operations")

    monkeypatch.setattr(reference, "dropout_mask", not_meant)
    kept = dropout_mask(torch.tensor([3]), 2**12, 2**10, 0.5).float().mean().item()
    assert abs(kept - 0.5) < 5 * 0.5 / 2**11  # standard deviations


@pytest.mark.parametrize("p", [0.0001, *DROPOUTS, 0.9])
def test_rate(p):
    """The share of dropped elements lies within 5 standard deviations of p (rounded to 16 bits)."""
    n = 2**21
    keep = reference.dropout_mask(torch.tensor([1]), n // 256, 256, p)
    exact = reference.dropout_threshold(p) / 65536
    dropped = n - keep.sum().item()
    assert abs(dropped - n * exact) < 5 * (n * exact * (1 - exact)) ** 0.5


def test_independence():
    """Neighbours in a row, in a column and under consecutive seeds agree as often as coins do."""
    p, n = 0.5, 2**20
    a = reference.dropout_mask(torch.tensor([7]), 1024, 1024, p)
    b = reference.dropout_mask(torch.tensor([8]), 1024, 1024, p)
    pairs = {
        "row": (a[:, 1:], a[:, :-1]),
        "column": (a[1:], a[:-1]),
        "lane": (a[:, ::8], a[:, 1::8]),
        "half word": (a[:, ::2], a[:, 1::2]),
        "seed": (a, b),
    }
    for name, (u, v) in pairs.items():
        agree = (u == v).double().mean().item()
        assert abs(agree - 0.5) < 5 * 0.5 / (u.numel() ** 0.5), name
    assert a.sum().item() != n


def test_p_one_keeps_nothing_and_p_zero_everything():
    seed = torch.tensor([3])
    assert not reference.dropout_mask(seed, 64, 64, 1.0).any()
    assert reference.dropout_mask(seed, 64, 64, 0.0).all()
    assert reference.dropout_scale(1.0) == 0.0
