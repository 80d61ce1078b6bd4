"""The specification itself, held to the papers' equations written as loops."""

import pytest
import torch
import torch.nn.functional as F

from fused_lora import reference as ref

SCALE = 0.7


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_lora_linear_is_the_equation():
    M, K, N, R = 4, 5, 6, 3
    x, w, a, b, bias, g = rand(M, K), rand(N, K), rand(R, K), rand(N, R), rand(N), rand(R)
    y = ref.lora_linear(x, w, a, b, bias, scale=SCALE, gate=g)
    for m in range(M):
        for n in range(N):
            h = [sum(x[m, k] * a[r, k] for k in range(K)) for r in range(R)]
            base = sum(x[m, k] * w[n, k] for k in range(K)) + bias[n]
            want = base + SCALE * sum(h[r] * g[r] * b[n, r] for r in range(R))
            torch.testing.assert_close(y[m, n], want)


def test_zero_b_is_the_frozen_layer():
    x, w, a = rand(4, 5), rand(6, 5), rand(3, 5)
    assert torch.equal(ref.lora_linear(x, w, a, rand(6, 3) * 0, scale=SCALE), F.linear(x, w))


def test_gate_of_ones_is_lora_and_of_zeros_the_base():
    x, w, a, b = rand(4, 5), rand(6, 5), rand(3, 5), rand(6, 3)
    plain = ref.lora_linear(x, w, a, b, scale=SCALE)
    ones, zeros = torch.ones(3).double(), torch.zeros(3).double()
    assert torch.equal(ref.lora_linear(x, w, a, b, scale=SCALE, gate=ones), plain)
    assert torch.equal(ref.lora_linear(x, w, a, b, scale=SCALE, gate=zeros), F.linear(x, w))


def test_gate_gradients_are_sora_s():
    """dg_j = sum_m h_mj u_mj with u = s dy B, and s sum_n B_nj P_nj with P = dy^T h."""
    x, w, a, b, dy = rand(4, 5), rand(6, 5), rand(3, 5), rand(6, 3), rand(4, 6)
    g = torch.tensor([1.5, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    (dg,) = torch.autograd.grad(ref.lora_linear(x, w, a, b, scale=SCALE, gate=g), g, dy)
    h, u = x @ a.t(), SCALE * dy @ b
    torch.testing.assert_close(dg, (h * u).sum(0))
    torch.testing.assert_close(dg, SCALE * (b * (dy.t() @ h)).sum(0))
    assert dg[1] != 0


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_dropout_masks_the_input_of_a_alone(p):
    x, w, a, b = rand(8, 16), rand(6, 16), rand(3, 16), rand(6, 3)
    keep = ref.dropout_mask(torch.tensor([5]), 8, 16, p)
    want = F.linear(x, w) + SCALE * ((x * keep / (1 - p)) @ a.t() @ b.t())
    torch.testing.assert_close(ref.lora_linear(x, w, a, b, scale=SCALE, dropout_p=p, seed=5), want)
    drop = {"dropout_p": p, "training": False, "seed": 5}
    assert torch.equal(
        ref.lora_linear(x, w, a, b, scale=SCALE, **drop), ref.lora_linear(x, w, a, b, scale=SCALE)
    )


def test_leading_dimensions_count_as_rows():
    x, w, a, b = rand(2, 3, 16), rand(6, 16), rand(3, 16), rand(6, 3)
    kw = {"scale": SCALE, "dropout_p": 0.5, "seed": 5}
    flat = ref.lora_linear(x.view(6, 16), w, a, b, **kw)
    assert torch.equal(ref.lora_linear(x, w, a, b, **kw), flat.view(2, 3, 6))


def test_group_is_its_projections_under_one_mask():
    x = rand(8, 16)
    ws, as_ = [rand(6, 16), rand(4, 16), rand(5, 16)], [rand(3, 16), None, rand(2, 16)]
    bs, biases = [rand(6, 3), None, rand(5, 2)], [rand(6), rand(4), None]
    gates, scales = [None, None, rand(2)], [0.5, 1.0, 2.0]
    drop = {"dropout_p": 0.5, "seed": 9}
    ys = ref.lora_linear_group(x, ws, as_, bs, biases, scales=scales, gates=gates, **drop)
    for i in (0, 2):
        want = ref.lora_linear(
            x, ws[i], as_[i], bs[i], biases[i], scale=scales[i], gate=gates[i], **drop
        )
        assert torch.equal(ys[i], want)
    assert torch.equal(ys[1], F.linear(x, ws[1], biases[1]))
    torch.manual_seed(0)
    twice = [part[:1] * 2 for part in (ws, as_, bs)]
    drawn = ref.lora_linear_group(x, *twice, scales=[1.0, 1.0], dropout_p=0.5)
    assert torch.equal(*drawn)


def test_lora_add_is_lora_linear_without_its_base():
    x, w, a, b, g = rand(8, 16), rand(6, 16), rand(3, 16), rand(6, 3), rand(3)
    kw = {"scale": SCALE, "gate": g, "dropout_p": 0.5, "seed": 9}
    added = ref.lora_add(F.linear(x, w), x, a, b, **kw)
    assert torch.equal(added, ref.lora_linear(x, w, a, b, **kw))


def ragged_bank(K=5, N=6):
    adapters = [
        (rand(3, K), rand(N, 3), 0.5, None),
        (rand(1, K), rand(N, 1), 2.0, rand(1).float()),
        (rand(4, K), rand(N, 4), 1.0, rand(4).float()),
    ]
    return adapters, ref.pack_slots(adapters, max_rank=7)


def test_slots_hold_rank_rows_and_nothing_reads_past_the_rank():
    adapters, bank = ragged_bank()
    assert bank.a_slots.shape == (3, 7, 5) and bank.bt_slots.shape == (3, 7, 6)
    assert bank.rank.tolist() == [3, 1, 4] and bank.rank.dtype == torch.int32
    assert bank.scale.dtype == bank.gate.dtype == torch.float32
    for j, (a, b, _, _) in enumerate(adapters):
        assert torch.equal(bank.a_slots[j, : len(a)], a)
        assert torch.equal(bank.bt_slots[j, : len(a)], b.t())
        for stack in (bank.a_slots, bank.bt_slots, bank.gate):
            stack[j, len(a) :] = float("nan")
    ids = torch.tensor([0, 1, 2, -1])
    assert torch.isfinite(ref.multi_lora_linear(rand(4, 5), rand(6, 5), bank, ids)).all()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_multi_lora_is_each_row_alone(ids_dtype):
    adapters, bank = ragged_bank()
    x, w, bias = rand(7, 5), rand(6, 5), rand(6)
    ids = torch.tensor([2, 0, -1, 1, 1, 2, -1], dtype=ids_dtype)
    y = ref.multi_lora_linear(x, w, bank, ids, bias)
    for m, j in enumerate(ids.tolist()):
        want = F.linear(x[m], w, bias)
        if j >= 0:
            a, b, scale, gate = adapters[j]
            want = ref.lora_linear(x[m], w, a, b, bias, scale=scale, gate=gate)
        torch.testing.assert_close(y[m], want)
    tokens = x.expand(2, 7, 5)
    one_a_sequence = ref.multi_lora_linear(tokens, w, bank, torch.tensor([1, -1]), bias)
    torch.testing.assert_close(one_a_sequence[1], F.linear(x, w, bias))
    a, b, scale, gate = adapters[1]
    want = ref.lora_linear(x, w, a, b, bias, scale=scale, gate=gate)
    torch.testing.assert_close(one_a_sequence[0], want)


def test_multi_lora_trains_each_adapter_as_alone():
    adapters, bank = ragged_bank()
    slots = [t.requires_grad_() for t in bank[:2]]
    x, w, dy = rand(6, 5), rand(6, 5), rand(6, 6)
    ids = torch.tensor([0, 2, 0, -1, 2, 2])
    da, dbt = torch.autograd.grad(ref.multi_lora_linear(x, w, bank, ids), slots, dy)
    for j, (a, b, scale, gate) in enumerate(adapters):
        a, b = a.requires_grad_(), b.requires_grad_()
        rows = ids == j
        y = ref.lora_linear(x[rows], w, a, b, scale=scale, gate=gate)
        want_a, want_b = torch.autograd.grad(y, (a, b), dy[rows])
        torch.testing.assert_close(da[j, : len(a)], want_a)
        torch.testing.assert_close(dbt[j, : len(a)], want_b.t())
        assert not da[j, len(a) :].any()
    assert not da[1].any()


def test_multi_lora_add_writes_its_slice_alone():
    _, bank = ragged_bank()
    x, w, ids = rand(4, 5), rand(6, 5), torch.tensor([0, -1, 2, 1])
    packed = rand(4, 20)
    before = packed.clone()
    assert ref.multi_lora_add_(packed, x, bank, ids, out_offset=3) is packed
    delta = ref.multi_lora_linear(x, w, bank, ids) - F.linear(x, w)
    torch.testing.assert_close(packed[:, 3:9] - before[:, 3:9], delta)
    assert torch.equal(packed[:, :3], before[:, :3]) and torch.equal(packed[:, 9:], before[:, 9:])


@pytest.mark.parametrize("ids", [[0, 3], [-2, 0]])
def test_adapter_ids_out_of_range(ids):
    _, bank = ragged_bank()
    with pytest.raises(IndexError, match=r"adapter_ids must lie in \[-1, 3\)"):
        ref.multi_lora_linear(rand(2, 5), rand(6, 5), bank, torch.tensor(ids))


def test_lora_embedding():
    V, D, R = 11, 6, 3
    weight, a, b, ids = rand(V, D), rand(R, V), rand(D, R), torch.tensor([[3, 0], [10, 3]])
    merged = weight + SCALE * (b @ a).t()
    torch.testing.assert_close(
        ref.lora_embedding(ids, weight, a, b, scale=SCALE), F.embedding(ids, merged)
    )


def test_dept_embedding():
    """E'_i = E[ids_i] + scale (A B)_i by position, the prompt in front, nothing past S."""
    V, D, S, R, m, L = 11, 6, 4, 3, 2, 7
    weight, prompt, a, b = rand(V, D), rand(m, D), rand(S, R), rand(R, D)
    ids = torch.randint(V, (3, L))
    e = ref.dept_embedding(ids, weight, prompt, a, b, scale=SCALE)
    assert e.shape == (3, m + L, D)
    for i in range(3):
        torch.testing.assert_close(e[i, :m], prompt)
        for t in range(L):
            want = weight[ids[i, t]] + (SCALE * (a @ b)[t] if t < S else 0)
            torch.testing.assert_close(e[i, m + t], want)
    position = torch.tensor([3])
    step = ref.dept_embedding(ids[:, 3:4], weight, None, a, b, scale=SCALE, positions=position)
    torch.testing.assert_close(step[:, 0], e[:, m + 3])
