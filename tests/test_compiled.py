"""Every shipped configuration, compiled for the GPUs it is meant for, and its machine code.

FUSED_LORA_EXTENT=full compiles every rank, dtype and architecture, and so every row of the tables.
"""

import pytest
import torch
from aot import ARCHITECTURES, SAME, cases, facts_of, read_sass, with_true_lines
from conftest import EXTENT
from fused_lora.triton_kernels import configs

CASES = cases(EXTENT)
# The operands that a kernel exists to read.
BIG = {
    "segment_gemm_kernel": ("lhs", "rhs"),
    "shrink_kernel": ("x", "a"),
    "row_reduce_kernel": ("z",),
    "sum_planes_kernel": ("plane",),
    "matmul_kernel": ("x", "w"),
    "multi_segment_gemm_kernel": ("lhs", "rhs", "v"),
    "multi_shrink_kernel": ("x", "a"),
    "multi_row_reduce_kernel": ("z",),
    "multi_gemv_shrink_kernel": ("a",),
    "multi_gemv_add_kernel": ("v",),
    "embedding_kernel": ("w", "b"),
}
# wgmma and tcgen05 take TF32 only along K: an operand that lies across K is turned as it is copied,
# element by element.
TURNED = {("segment_gemm", "rhs"), ("segment_gemm", "v"), ("row_reduce", "z"), ("shrink", "a")}
REGISTERS = 65536  # of a multiprocessor

pytestmark = [pytest.mark.timeout(3600), pytest.mark.extent]


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    return facts_of("aot.py", EXTENT, tmp_path_factory.getbasetemp())


def tensor_core(f: dict) -> str:
    """The instruction that is meant: the family's own where a product has 64 rows, else HMMA."""
    c = f["config"]
    lhs_m = f["kernel"].endswith(("segment_gemm_kernel", "embedding_kernel"))
    rows = c["BLOCK_M"] if lhs_m else c["BLOCK_R"]
    own = {"mma": "HMMA", "wgmma": "HGMMA", "tcgen05": "UTCHMMA"}[f["family"]]
    return own if rows >= 64 else "HMMA"


def shared_limit(sm: int) -> int:
    """A family's rows serve its smallest GPU."""
    same = [known for known in configs.SHARED_MEMORY if configs.family(known) == configs.family(sm)]
    return 1024 * min(configs.SHARED_MEMORY[known] for known in same)


def problems(f: dict):
    """Sentences about what is wrong with a kernel."""
    counts = f["counts"]
    if f["stack"] or counts.get("LDL") or counts.get("STL"):
        yield (
            f"spills: {f['stack']} bytes of stack, {counts.get('LDL', 0)} local loads, "
            f"{counts.get('STL', 0)} local stores at {f['registers']} registers"
        )
    if f["shared"] > shared_limit(f["sm"]):
        yield f"shared memory: {f['shared']} bytes of {shared_limit(f['sm'])}"
    if f["registers"] * 32 * f["warps"] > REGISTERS:
        yield f"registers: {f['registers']} x {32 * f['warps']} threads of {REGISTERS}"
    for line in f["narrow offsets"]:
        yield f"32-bit offset: {line}"
    if f["stages"] > 1 and counts["HGMMA with a register on the left"]:
        yield "a pipelined wgmma has a left operand in registers, which ptxas can miscompile"
    if (groups := counts["HGMMA that ends a group"]) > f["groups"]:
        yield f"wgmma is serialized: {groups} groups where {f['groups']} are meant"
    for operand in f["loads"]:
        if not operand.isidentifier():
            yield f"a load of no known operand: {operand}"
    for operand in BIG.get(f["kernel"], ()):
        loads = f["loads"].get(operand, {})
        size = {key: int(key.split()[1]) * n for key, n in loads.items()}
        wide = sum(size[key] for key in size if key.endswith(" 16"))
        turned = (
            f.get("kind") == "tf32"
            and f["family"] != "mma"
            and (f["kernel"].removeprefix("multi_").removesuffix("_kernel"), operand) in TURNED
        )
        if operand in ("lhs", "rhs") and "y" in f["loads"]:
            continue  # the form that adds to y has no base product
        if not size or (wide < 0.75 * sum(size.values()) and not turned):
            yield f"narrow loads of {operand}: {loads}"
    if f["op"] is None:
        return
    row = {**f["row"], **{key: v for key, v in f["config"].items() if key == "BLOCK_R"}}
    if not configs.valid(f["op"], row, f["sm"], f["kind"]):
        yield f"configs.valid refuses {row}"
    estimate = configs.shared_memory(f["op"], row, f["sm"], f["kind"])
    if f["shared"] > estimate:
        yield f"shared memory: {f['shared']} bytes where configs allows for {estimate}"
    found = {name for name in ("HMMA", "HGMMA", "UTCHMMA") if counts.get(name)}
    if f["kind"] == "fp32" and found:
        yield f"an IEEE product runs on tensor cores: {found}"
    if f["kind"] != "fp32" and tensor_core(f) not in found:
        yield f"{tensor_core(f)} is missing: {found or 'no tensor cores'}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case, facts):
    kernels = [facts["kernels"][key] for key in facts["cases"][str(case)]]
    assert kernels
    wrong = [
        f"{f['kernel']} for sm_{f['sm']} with {f['config']}: {problem}"
        for f in kernels
        for problem in problems(f)
    ]
    assert not wrong, "\n".join(wrong)


OPS = sorted(configs.table())
FAMILIES = {configs.family(sm): sm for sm in ARCHITECTURES["default"]}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", configs.MAX_BLOCK_R)
def test_every_row_is_compiled(op, family, kind, facts):
    def frozen(row):
        return frozenset((k, v) for k, v in row.items() if not k.startswith("max_"))

    compiled = {
        frozen(f["row"])
        for f in facts["kernels"].values()
        if (f["op"], f.get("family"), f.get("kind")) == (op, family, kind)
    }
    assert compiled == {frozen(row) for row in configs.rows(op, FAMILIES[family], kind)}


@pytest.mark.parametrize("sm", configs.SHARED_MEMORY)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", configs.MAX_BLOCK_R)
def test_rows_are_valid(op, kind, sm):
    rows = configs.rows(op, sm, kind)
    assert all(configs.valid(op, row, sm, kind) for row in rows)
    # The last row takes every size; of row_reduce_u every row is bounded.
    if op != "row_reduce_u":
        assert not [key for key in rows[-1] if key.startswith("max_")]


def test_a_row_may_be_for_one_triton(monkeypatch):
    def multi_row_reduce(version):
        monkeypatch.setattr(configs.triton, "__version__", version)
        configs.choose.cache_clear()
        return configs.multi_row_reduce(64, torch.bfloat16, 90)

    others = [multi_row_reduce(version) for version in ("3.6.0", "3.9.1")]
    own = multi_row_reduce("3.8.0")
    configs.choose.cache_clear()
    assert others[0] == others[1] and own == others[0] | {"maxnreg": 80}
    assert "triton" not in own


@pytest.mark.parametrize("line", [1, 2])
def test_a_load_is_known_by_its_call_or_its_pointer(line, tmp_path):
    source = tmp_path / "kernel.py"
    source.write_text("z = tl.load(\n    z_ptr + offs,\n    other=0.0,\n)\ny = stuff()\n")
    sass = '//## File "{}", line {}\n        /*0010*/  @P0 LDG.E.128 R4, desc[UR4][R2.64] ;\n'
    assert read_sass(sass.format(source, line))["loads"] == {"z": {"plain 16": 1}}
    assert read_sass(sass.format(source, 5))["loads"] == {"y = stuff()": {"plain 16": 1}}


def test_inline_assembly_has_no_lines_of_its_own():
    ptx = "\t.loc 1 62 14\n// begin inline asm\n{}mov;\n{}ld;\n// end inline asm\n\t.loc 1 66 4\n"
    lines = [f"\t.loc\t1 {n} 14    // planes.py:{n}:14\n" for n in (62, 63)]
    assert with_true_lines(ptx.format(*lines)) == ptx.format("", "")


@pytest.mark.parametrize("call", SAME)
def test_m_does_not_recompile(call, facts):
    """Batches of other lengths run the same kernels."""
    names = (f"sm_90-bf16-M{M}-R16-{call}" for M in (4096, 8192))
    compiled = [set(facts["cases"][name]) for name in names]
    assert compiled[0] == compiled[1]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    {
        "sound": None,
        "spills": "spills",
        "shared memory": "shared memory",
        "unaligned rows": "narrow loads",
        "32-bit offsets": "32-bit offset",
        "register on the left of wgmma": "left operand in registers",
        "wgmma serialized": "serialized",
    }.items(),
)
def test_planted_faults_are_found(fault, sentence, facts):
    (key,) = facts["cases"][fault]
    found = list(problems(facts["kernels"][key]))
    assert found if sentence else not found, found
    if sentence:
        assert any(sentence in problem for problem in found), found
