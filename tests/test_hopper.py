"""segment_gemm for compute capability 9.0: its machine code, and the kernel run by hopper_cpu.py.

FUSED_LORA_AOT=full compiles every form with every row and dtype.
"""

import os
from collections import Counter

import pytest
from aot import facts_of
from aot_hopper import FORMS, cases
from fused_lora.triton_kernels import configs

EXTENT = "full" if os.environ.get("FUSED_LORA_AOT") == "full" else "default"
CASES = cases(EXTENT)
ROWS = configs.table("hopper")["segment_gemm"]
# TMA loads and stores, wgmma, barriers in shared memory, registers handed over, y by 16-byte rows.
MEANT = {"UTMALDG", "UTMASTG", "HGMMA", "SYNCS", "USETMAXREG", "STSM"}


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
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
    waits = bool(form.get("early"))
    if f["pdl"] != waits or "ACQBULK" not in found:
        yield "the kernel before is not waited for"
    if len(f["loops"]) != 2 * len(form["Ks"]):
        yield f"{len(f['loops'])} loops of products, not one a segment for each of two consumers"
    products = c["BLOCK_M"] // 128 * c["BLOCK_K"] // 16
    for loop in f["loops"]:
        names = Counter(text.split()[0].split(".")[0] for text in loop)
        in_groups = [text for text in loop if text.startswith("HGMMA")]
        if len(in_groups) != products or sum("gsb0" in text for text in in_groups) != 1:
            yield f"a step is not {products} products in one group: {in_groups}"
        # The group begins and is waited for; full is waited for, and empty arrived at.
        want = {"WARPGROUP": 2, "SYNCS": 2, "BAR": 2}
        if {name: names[name] for name in want} != want:
            yield f"other waits than meant in a step: {names}"
        if memory := {"LDS", "STS", "LDG", "STG", "LDSM", "STSM"} & set(names):
            yield f"a step moves operands by itself: {memory}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case, facts):
    wrong = list(problems(facts[str(case)], FORMS[case[2]]))
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
    sound = facts[str((0, "bf16", "forward"))]
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
    sound = facts[str((0, "bf16", "forward"))]
    first, *others = sound["loops"]
    faulty = sound | {"loops": [[*first, extra], *others]}
    assert any(sentence in problem for problem in problems(faulty, FORMS["forward"]))


def test_rows_are_valid():
    assert all(configs.hopper_valid(row) for row in ROWS)
    assert not configs.hopper_valid(ROWS[0] | {"STAGES": 4})
    assert not configs.hopper_valid(ROWS[0] | {"BLOCK_M": 256})
    assert not configs.hopper_valid(ROWS[0] | {"BLOCK_N": 192})


def test_every_row_is_chosen_for_some_size():
    sizes = [2**i for i in range(6, 17)]
    chosen = {tuple(configs.segment_gemm_hopper(M, N, 132).items()) for M in sizes for N in sizes}
    assert chosen == {tuple(row.items()) for row in ROWS}
