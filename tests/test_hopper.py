"""segment_gemm for compute capability 9.0: its machine code, and the kernel run by gluon_cpu.py.

FUSED_LORA_EXTENT=full compiles every form with every row and dtype, and draws more schedules.
"""

import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
from aot import facts_of
from aot_hopper import FORMS, SHRINK, cases
from cases import fuzz
from conftest import DEVICE, EXTENT
from fused_lora.bench import hopper
from fused_lora.triton_kernels import configs, routes
from gluon_cpu import COPIES, Emulated, install
from hypothesis import given
from hypothesis import strategies as st

import fused_lora as fl
from fused_lora import tune
from fused_lora.testing import assert_accurate, guarded
from fused_lora.tune import Case

BENCH = Path(__file__).parents[1] / "bench"

CASES = cases(EXTENT)
ROWS = configs.table("hopper")["segment_gemm"]
# TMA loads and stores, wgmma, barriers in shared memory, registers handed over, y by 16-byte rows.
MEANT = {"UTMALDG", "UTMASTG", "HGMMA", "SYNCS", "USETMAXREG", "STSM"}
# In a step full is waited for, the group begins and ends, for all warps, and empty is arrived at.
WAITS = ["SYNCS.PHASECHK", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "BAR.SYNC", "SYNCS.ARRIVE"]


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    if (why := routes.version_refuses()) is not None:
        pytest.skip(why)
    return facts_of("aot_hopper.py", EXTENT, tmp_path_factory.getbasetemp())


def problems(f: dict, form: dict):
    """Sentences about what is wrong with a compiled kernel."""
    c = f["config"]
    found = set(f["instructions"])
    if f["stack"] or {"LDL", "STL"} & found:
        yield f"spills: {f['stack']} bytes of stack at {f['registers']} registers"
    if not f["shared"] <= configs.hopper_shared_memory(c) <= 1024 * configs.SHARED_MEMORY[90]:
        yield f"shared memory: {f['shared']} bytes, {configs.hopper_shared_memory(c)} allowed for"
    if f["registers"] * 32 * f["warps"] > 65536:
        yield f"registers: {f['registers']} x {32 * f['warps']} threads"
    if missing := MEANT - found:
        yield f"missing: {', '.join(sorted(missing))}"
    if not {24, 240} <= set(f["setmaxnreg"]):
        yield f"registers are not handed over: {f['setmaxnreg']}"
    if f["register on the left"]:
        yield "a wgmma has a left operand in registers"
    early = bool(form.get("early"))
    if f["pdl"] != early or "ACQBULK" not in found:
        yield "the kernel before is not waited for"
    if len(f["loops"]) != 2 * len(form["Ks"]):
        yield f"{len(f['loops'])} loops of products, not one a segment for each of two consumers"
    products = c["BLOCK_M"] // 128 * c["BLOCK_K"] // 16
    for loop in f["loops"]:
        names = Counter(text.split()[0].split(".")[0] for text in loop)
        waits = [".".join(text.split()[0].split(".")[:2]) for text in loop]
        waits = [name for name in waits if name.split(".")[0] in ("SYNCS", "WARPGROUP", "BAR")]
        if waits[0] == "BAR.SYNC":
            waits = waits[1:]  # until Triton 3.8 the warps begin a step together
        in_groups = [text for text in loop if text.startswith("HGMMA")]
        if len(in_groups) != products or sum("gsb0" in text for text in in_groups) != 1:
            yield f"a step is not {products} products in one group: {in_groups}"
        if waits != WAITS:
            yield f"other waits than meant in a step: {waits}"
        if memory := {"LDS", "STS", "LDG", "STG", "LDSM", "STSM"} & set(names):
            yield f"a step moves operands by itself: {memory}"


@pytest.mark.extent
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case, facts):
    (f,) = facts[str(case)]
    wrong = list(problems(f, FORMS[case[2]]))
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({"stack": 8}, "spills"),
        ({"shared": 240_000}, "shared memory"),
        ({"registers": 200}, "registers: 200"),
        ({"instructions": ["HGMMA"]}, "missing: STSM"),
        ({"setmaxnreg": []}, "handed over"),
        ({"register on the left": 1}, "in registers"),
        ({"pdl": False}, "waited for"),
        ({"loops": []}, "0 loops"),
    ],
    ids=str,
)
def test_a_fault_in_the_machine_code_is_found(fault, sentence, facts):
    (sound,) = facts[str((0, "bf16", "forward"))]
    assert any(sentence in problem for problem in problems(sound | fault, FORMS["forward"]))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "waits"),
        ("BAR.SYNC 0x0", "waits"),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "products in one group"),
        ("LDS R1, [R2]", "moves operands"),
    ],
)
def test_a_fault_in_a_loop_is_found(extra, sentence, facts):
    (sound,) = facts[str((0, "bf16", "forward"))]
    first, *others = sound["loops"]
    faulty = sound | {"loops": [[*first, extra], *others]}
    assert any(sentence in problem for problem in problems(faulty, FORMS["forward"]))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_that_a_loop_lacks_is_found(wait, facts):
    (sound,) = facts[str((0, "bf16", "forward"))]
    first, *others = sound["loops"]
    last = max(i for i, text in enumerate(first) if text.startswith(wait))
    faulty = sound | {"loops": [first[:last] + first[last + 1 :], *others]}
    assert any("other waits" in problem for problem in problems(faulty, FORMS["forward"]))


@pytest.mark.timeout(1200)
def test_the_kernels_before_let_it_begin(facts):
    """The first says so when it begins; the second says so, then waits for the first."""
    shrink, planes = facts[SHRINK]
    assert (shrink["kernel"], planes["kernel"]) == ("shrink_kernel", "sum_planes_kernel")
    assert [f["stack"] for f in (shrink, planes)] == [0, 0]
    assert not shrink["pdl"] and planes["pdl"]
    assert {"PREEXIT"} == {"PREEXIT", "ACQBULK"} & set(shrink["instructions"])
    assert {"PREEXIT", "ACQBULK"} <= set(planes["instructions"])


def test_rows_are_valid():
    assert all(configs.hopper_valid(row) for row in ROWS)
    assert not configs.hopper_valid(ROWS[0] | {"STAGES": 4})
    assert not configs.hopper_valid(ROWS[0] | {"BLOCK_M": 256})
    assert not configs.hopper_valid(ROWS[0] | {"BLOCK_N": 192})


def test_every_row_is_chosen_for_some_size():
    sizes = [2**i for i in range(6, 17)]
    chosen = {tuple(configs.segment_gemm_hopper(M, N, 132).items()) for M in sizes for N in sizes}
    assert chosen == {tuple(row.items()) for row in ROWS}


def small(stages=3, block_m=32, block_n=32, group_m=2):
    """A tile that no GPU would run, for many tiles in little time."""
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 32}
    return blocks | {"GROUP_M": group_m, "STAGES": stages}


def operand(rows, columns, dtype=torch.float16, device="cpu"):
    """[rows, columns] in rows that begin at multiples of 16 bytes, with NaN between them."""
    wide = torch.full((rows, -(-columns // 8) * 8), float("nan"), dtype=dtype, device=device)
    wide[:, :columns] = torch.randn(rows, columns)
    return wide[:, :columns]


def operands(M, N, Ks, turned, dtype=torch.float16, device="cpu"):
    return [
        (
            operand(M, K, dtype, device),
            operand(K, N, dtype, device).t() if turned else operand(N, K, dtype, device),
        )
        for K in Ks
    ]


def check(segment_gemm, segments, *, bias=None, masked=0, **arguments):
    (M, _), (N, _) = (t.shape for t in segments[0])
    mask, keep = None, None
    if masked:
        bits = torch.randint(0, 256, (M, N // 8), dtype=torch.uint8, device=segments[0][0].device)
        mask = (bits, 1.25, masked)
        lanes = bits[:, :, None] >> torch.arange(8, device=bits.device)
        keep = (lanes & 1).bool().reshape(M, N)

    def plain(bias, *flat):
        y = 0
        for i, (lhs, rhs) in enumerate(zip(flat[::2], flat[1::2], strict=True)):
            y = y + lhs @ rhs.t()
            if i + 1 == masked:
                y = torch.where(keep, y * 1.25, 0)
        return (y if bias is None else y + bias,)

    inputs = (bias, *(t.clone() for pair in segments for t in pair))
    y = segment_gemm(segments, bias=bias, mask=mask, **arguments)
    assert_accurate("y", (y,), plain, inputs)


@given(
    M=st.integers(1, 100),
    N=st.integers(1, 12),
    Ks=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    stages=st.integers(1, 5),
    multiprocessors=st.integers(1, 6),
    group_m=st.integers(1, 3),
    turned=st.booleans(),
    bias=st.booleans(),
    early=st.integers(0, 5),
    masked=st.integers(0, 6),
    seed=st.integers(0, 2**32),
)
@fuzz(100)
def test_any_schedule_gives_the_sum(
    M, N, Ks, stages, multiprocessors, group_m, turned, bias, early, masked, seed
):
    """Whoever goes first, and however late copies arrive: y is right, each element is written once,
    and nothing waits forever."""
    masked = min(masked, len(Ks))
    early = 0 if masked else min(early, len(Ks) - 1)
    N *= 32 if masked else 8
    segments = operands(M, N, Ks, turned)
    emulated = Emulated(multiprocessors=multiprocessors)
    check(
        emulated.segment_gemm,
        segments,
        bias=guarded((N,), dtype=torch.float16) if bias else None,
        masked=masked,
        config=small(stages, group_m=group_m),
        early=early,
        late=[lhs for lhs, _ in segments[early:]],
        seed=seed,
    )
    assert emulated.overlap == (early > 0)
    assert emulated.grid == (min(multiprocessors, -(-M // 32) * -(-N // 32)),)


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("form", ["forward", "masked dx"])
def test_the_shipped_tiles_give_the_sum(form, row):
    turned = form == "masked dx"
    segments = operands(200, 288, (72, 200)[:: -1 if turned else 1], turned)
    check(Emulated().segment_gemm, segments, masked=int(turned), config=row)


def test_a_single_row_of_any_stride():
    """Of one row the distance to the next means nothing."""
    x = torch.randn(40, dtype=torch.float16).as_strided((1, 40), (3, 1))
    check(Emulated().segment_gemm, [(x, operand(16, 40))], config=small())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("R", [1, 4, 12])
def test_an_adapter_that_tma_cannot_read_is_copied(R, turned):
    """Then nothing is early: the kernel launched last is the copy."""
    (base,) = operands(33, 72, (300,), turned)
    for b in (half(72, R), half(R, 72).t(), half(72, 3 * R)[:, ::3]):
        emulated = Emulated()
        check(emulated.segment_gemm, [base, (half(33, R), b)], config=small(), early=1)
        assert not emulated.overlap


@pytest.mark.parametrize("copies", COPIES)
def test_the_names_of_any_triton_will_do(copies):
    check(Emulated(copies=copies).segment_gemm, operands(40, 24, (40, 8), False), config=small())


# A piece of the kernel, and a fault in its place.
FAULTS = {
    "the producer waits for the wrong parity": (
        "mbarrier.wait(empty.index(slot), parity ^ 1)",
        "mbarrier.wait(empty.index(slot), parity)",
    ),
    "the consumer waits for the wrong parity": (
        "mbarrier.wait(full.index(slot), parity)",
        "mbarrier.wait(full.index(slot), parity ^ 1)",
    ),
    "the parity never turns": ("it // STAGES & 1", "it // STAGES & 0"),
    "one slot is left out": ("return it % STAGES,", "return it * 2 % STAGES,"),
    "one consumer is enough": (
        "mbarrier.init(ring[3].index(slot), CONSUMERS)",
        "mbarrier.init(ring[3].index(slot), 1)",
    ),
    "a slot is free before it is read": ("warpgroup_mma_wait(0, ", "warpgroup_mma_wait(1, "),
    "a slot is never free": ("mbarrier.arrive(empty.index(slot))", "pass"),
    "half of the bytes are expected": (
        "lhs.block_type.nbytes + rhs.block_type.nbytes",
        "lhs.block_type.nbytes",
    ),
    "steps are counted from each tile on": (
        "        acc = gl.zeros(",
        "        it = 0\n        acc = gl.zeros(",
    ),
    "a segment's steps are not counted": ("            it += steps\n", ""),
    "y leaves while the next tile is written": (
        "        tma.store_wait(0)  # until",
        "        # until",
    ),
    "y without a fence": (
        "        fence_async_shared()\n        async_store(",
        "        async_store(",
    ),
    "barriers without a fence": (
        "    fence_async_shared()\n    into",
        "    into",
    ),
    "the kernel before is not waited for": ("gdc_wait()", "pass"),
    "both consumers have the same rows": (
        "lhs_ring.index(slot).slice(CONSUMER *",
        "lhs_ring.index(slot).slice(0 *",
    ),
    "both consumers write the same rows": ("+ CONSUMER * ROWS", "+ 0 * ROWS"),
    "the last tile is left out": (
        "tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)",
        "tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N) - 1",
    ),
    "the rows of another tile": (
        "pid_m * BLOCK_M, pid_n * BLOCK_N, k",
        "pid_n * BLOCK_M, pid_n * BLOCK_N, k",
    ),
    "a narrow step is too narrow": ("configs.block_of(K % block_k or block_k, block_k)", "16"),
    "bias past N": ("mask=offs_n < N, other", "mask=offs_n >= 0, other"),
    "no bias": ("acc += bias.to(", "acc += 0 * bias.to("),
    "rows are as far apart as they are long": (
        "stride = t.stride(0) if",
        "stride = 8 * triton.cdiv(t.shape[1], 8) if",
    ),
}
MASK_FAULTS = {
    "the mask is not scaled": ("acc * keep_scale", "acc"),
    "the mask comes last": ("if i + 1 == MASKED:", "if i + 1 == len(Ks):"),
    "the words of another tile": ("first_n // 32 +", "0 * first_n +"),
    "the bits backwards": ("(bits[:, :, None] >> lane", "(bits[:, :, None] >> 31 - lane"),
}


@pytest.mark.parametrize("fault", [*FAULTS, *MASK_FAULTS])
def test_a_fault_in_the_kernel_is_found(fault):
    masked = int(fault in MASK_FAULTS)
    segments = operands(70, 96 if masked else 72, (24, 72, 56), bool(masked))
    wide = torch.randn(70, 160, dtype=torch.float16)
    segments[1] = (wide[:, :72], segments[1][1])
    bias = guarded((segments[0][1].shape[0],), dtype=torch.float16)

    def run(emulated, seed):
        late = [] if masked else [lhs for lhs, _ in segments[1:]]
        early = 0 if masked else 1
        config = small(stages=2)
        options = {"config": config, "early": early, "late": late, "seed": seed}
        check(emulated.segment_gemm, segments, bias=bias, masked=masked, **options)

    run(Emulated(), 0)
    faulty = Emulated(fault=(FAULTS | MASK_FAULTS)[fault])
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(20):
            run(faulty, seed)


def misaligned(rows, columns):
    return torch.randn(rows * columns + 1, dtype=torch.float16)[1:].view(rows, columns)


def half(*shape):
    return torch.randn(*shape, dtype=torch.float16)


REFUSED = {
    "the Gluon kernel takes bfloat16 and float16, not torch.float32": lambda: [
        (torch.randn(8, 8), torch.randn(8, 8))
    ],
    "the Gluon kernel takes 6 segments at most, not 7": lambda: [(half(8, 8), half(8, 8))] * 7,
    "an operand is empty, and TMA needs something to read": lambda: [(half(8, 0), half(8, 0))],
    "y has rows 12 elements apart, and TMA needs a multiple of 16 bytes": lambda: [
        (half(8, 8), half(12, 8))
    ],
    "the right operand of segment 1 has strides (1, 8), and TMA needs elements side by side":
    lambda: [(half(8, 272), half(8, 272)), (half(8, 264), half(264, 8).t())],
    "the left operand of segment 1 has rows 260 elements apart, and TMA needs a multiple of 16 "
    "bytes": lambda: [(half(8, 272), half(8, 272)), (half(8, 260), half(8, 260))],
    "the right operand of segment 0 has strides (3, 792), and TMA needs elements side by side":
    lambda: [(half(8, 264), half(8, 792)[:, ::3])],
    "the left operand of segment 0 has strides (1, 8), and TMA needs elements side by side":
    lambda: [(half(264, 8).t(), half(8, 264))],
    "the left operand of segment 0 has rows 0 elements apart, and TMA needs a multiple of 16 bytes":
    lambda: [(half(1, 264).expand(8, 264), half(8, 264))],
    "the left operand of segment 0 does not begin at a multiple of 16 bytes, which TMA needs":
    lambda: [(misaligned(8, 264), half(8, 264))],
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_the_kernel_cannot_take_is_said(sentence):
    emulated = Emulated()
    segments = REFUSED[sentence]()
    assert emulated.module.refuses(segments) == sentence
    with pytest.raises(RuntimeError) as raised:
        emulated.segment_gemm(segments)
    assert str(raised.value) == f"segment_gemm: {sentence}"


def test_a_mask_of_no_whole_words_is_refused():
    why = Emulated().module.refuses([(half(8, 8), half(40, 8))], mask=(half(8, 5), 1.0, 1))
    assert why == "the mask of 40 columns is not made of whole 32-bit words"


@pytest.mark.parametrize("early", [-1, 2])
def test_no_more_segments_are_early_than_may_be(early):
    """After the last no wait would come, and y would be written while the kernel before reads."""
    with pytest.raises(ValueError) as raised:
        Emulated().segment_gemm([(half(8, 8), half(8, 8))] * 2, early=early)
    assert str(raised.value) == f"early must be at least 0 and less than 2, got {early}"


def test_nothing_is_early_under_a_mask():
    bits = torch.zeros(8, 4, dtype=torch.uint8)
    with pytest.raises(ValueError) as raised:
        Emulated().segment_gemm([(half(8, 8), half(32, 8))] * 2, mask=(bits, 1.0, 1), early=1)
    assert str(raised.value) == "early must be at least 0 and less than 1, got 1"


@pytest.fixture
def launches(monkeypatch):
    """(segments, whether it begins early) of each launch, where a table has this kernel for all."""
    emulated, found = install(monkeypatch), []
    monkeypatch.setenv("FUSED_LORA_TUNING", str(BENCH / "gluon.json"))
    launch = emulated.module.launch

    def recorded(*args, overlap, **meta):
        found.append((len(meta["TAILS"]), overlap))
        launch(*args, overlap=overlap, **meta)

    monkeypatch.setattr(emulated.module, "launch", recorded)
    for cache in (configs.routes, configs.route):
        cache.cache_clear()
    yield found
    for cache in (configs.routes, configs.route):
        cache.cache_clear()


def test_lora_linear_on_the_route_to_the_kernel(launches):
    """The output and all gradients."""
    x, w, a, b = (half(*shape) for shape in ((40, 64), (96, 64), (8, 64), (96, 8)))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    dy = half(40, 96)

    def run(op, p, dy, w, x, a, b, **options):
        y = op(x, w, a, b, scale=0.5, dropout_p=p, seed=7 if p else None, **options)
        return [y, *torch.autograd.grad(y, (x, a, b), dy)]

    for p in (0.0, 0.5):
        ours = run(fl.lora_linear, p, dy, w, *leaves, backend="triton")
        plain = functools.partial(run, fl.reference.lora_linear, p)
        assert_accurate(("y", "dx", "da", "db"), ours, plain, [dy, w, *leaves])
    # Forward and dx begin before the kernel that makes t or dh has ended, the masked dx does not.
    assert launches == [(2, True), (2, True), (2, True), (2, False)]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dx_of_a_group_is_one_launch(launches, p):
    """q, k and v, of which k has no adapter: dx is one sum of four segments."""
    x, ws = half(40, 64), [half(n, 64) for n in (96, 32, 40)]
    lora_as, lora_bs = [half(8, 64), None, half(16, 64)], [half(96, 8), None, half(40, 16)]
    leaves = [t.requires_grad_() for t in (x, *lora_as, *lora_bs) if t is not None]
    dys = [half(40, len(w)) for w in ws]

    def run(op, inputs, **options):
        x, a0, a2, b0, b2 = inputs[:5]
        ys = op(
            x, inputs[5:8], [a0, None, a2], [b0, None, b2], scales=[0.5, 1.0, 2.0], dropout_p=p,
            seed=7 if p else None, **options,
        )  # fmt: skip
        return [*ys, *torch.autograd.grad(ys, inputs[:5], inputs[8:])]

    inputs = [*leaves, *ws, *dys]
    ours = run(fl.lora_linear_group, inputs, backend="triton")
    names = ("q", "k", "v", "dx", "daq", "dav", "dbq", "dbv")
    assert_accurate(
        names, ours, lambda *inputs: run(fl.reference.lora_linear_group, inputs), inputs
    )
    assert launches == [(2, True), (1, False), (2, True), (4, not p)]


def test_the_benchmark_on_a_gpu_that_is_emulated(tmp_path, monkeypatch, capsys):
    install(monkeypatch)
    monkeypatch.setattr(hopper, "AGAIN", 1)
    monkeypatch.setattr(hopper, "ROUNDS", 2)
    monkeypatch.setattr(hopper, "tiles", lambda: [small()])
    cpu, fp16 = torch.device("cpu"), torch.float16
    cases = [Case(form, 40, 64, 96, 8, fp16) for form in tune.FORMS]
    assert [row["why"] for row in hopper.numerics(cases, cpu)] == [""] * 3
    masked = cases.pop()
    install(monkeypatch, fault=FAULTS["no bias"]).module.refuses = lambda *a, **b: "broken"
    assert {row["why"] for row in hopper.numerics([*cases, masked], cpu)} == {
        "RuntimeError: segment_gemm: broken"
    }
    install(monkeypatch)
    cases.append(Case("dx", 40, 96, 64, 8, fp16, (64, 32)))
    found = hopper.times(cases, cpu, lambda call: lambda: call() is not None and 2e-6)
    assert {t for row in found for t in row["us"].values()} == {2.0}
    assert [len(row["us"]) for row in found] == [5, 6, 5]
    assert hopper.table(found).splitlines()[1].split()[-4:] == ["2.0", "1.000", "1.000", "1.000"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        hopper.main([])
    assert stopped.value.code == 2 and "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("case", hopper.NUMERIC, ids=str)
def test_on_a_gpu(case):
    if configs.capability(torch.device("cuda:0")) != 90:
        pytest.skip("needs compute capability 9.0")
    assert [row for row in hopper.numerics([case], torch.device("cuda:0")) if row["why"]] == []
