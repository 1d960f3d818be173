"""scripts/sass: how it reads machine code, and how many instructions the CUDA kernels execute per class."""

import pytest

from benchmarks.gpu import sass

# A copy into shared memory; a sweep with a rare path (a call of nothing, 3 instructions more) and one for single elements; an end that
# waits for the store.
LISTING = """
        .section        .text.first,"ax",@progbits
first:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R28], desc[UR8][R12.64] ;
        /*0020*/                   ISETP.GE.AND P0, PT, R19, R20, PT ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   LDS.128 R16, [R14] ;
        /*0050*/                   MUFU.EX2 R5, R16 ;
        /*0060*/               @P1 BRA `(.L_x_3) ;
        /*0070*/                   FADD R6, R6, R7 ;
        /*0080*/                   FADD R6, R6, R7 ;
        /*0090*/                   FADD R6, R6, R7 ;
.L_x_3:
        /*00a0*/                   BRA.DIV UR4, `(.L_x_9) ;
.L_x_4:
        /*00b0*/                   STG.E.EF.128 desc[UR8][R22.64], R24 ;
        /*00c0*/                   BRA P2, `(.L_x_1) ;
.L_x_5:
        /*00d0*/               @P3 BRA `(.L_x_6) ;
        /*00e0*/                   LDG.E.128 R16, desc[UR8][R16.64] ;
        /*00f0*/                   BRA `(.L_x_7) ;
.L_x_6:
        /*0100*/                   LDG.E.U16 R16, desc[UR8][R16.64] ;
.L_x_7:
        /*0110*/                   FADD R6, R6, R7 ;
        /*0120*/               @P2 BRA `(.L_x_5) ;
        /*0130*/                   MEMBAR.ALL.GPU ;
        /*0140*/                   STL [R1], R2 ;
        /*0150*/                   EXIT ;
.L_x_9:
        /*0160*/                   WARPSYNC.COLLECTIVE R19, `(.L_x_10) ;
.L_x_10:
        /*0170*/                   BRA `(.L_x_4) ;
.L_x_11:
        /*0180*/                   BRA `(.L_x_11);
        .section        .nv.info,"",@"SHT_CUDA_INFO"
        /*0000*/        .byte 0x04
        .section        .text.second,"ax",@progbits
        /*0000*/                   MEMBAR.ALL.GPU ;
        /*0010*/                   STG.E.128 desc[UR8][R22.64], R24 ;
        /*0020*/                   EXIT ;
"""


def test_loops_are_found_and_counted_along_the_ordinary_path() -> None:
    first, second = sass.functions(LISTING)
    assert [function.name for function in (first, second)] == ["first", "second"]
    assert [(loop.kind, len(loop.path)) for loop in first.loops] == [("copy", 3), ("shared", 6), ("rest", 5)]
    # 8 classes in 16 bytes, of one tensor; the order is that of execution.
    assert [loop.per_class(8, 1) for loop in first.chain(8, 1, ("copy", "shared"))] == [3 / 8, 6 / 8]
    assert [loop.per_class(8, 1) for loop in first.chain(8, 1, ("rest",))] == [5 / 8]
    assert [loop.exponentials(8, 1) for loop in first.loops] == [0, 1 / 8, 0]
    assert (first.fences_after_stores, first.spills, first.registers) == (1, 1, 29)
    assert (second.loops, second.fences_after_stores, second.spills) == ([], 0, 0)  # the MEMBAR comes before the store


def test_of_loops_that_exclude_each_other_the_more_costly_counts() -> None:
    def loop(label: int, work: int) -> str:
        return f".L_x_{label}:\n /*0010*/ LDS.128 R16, [R14] ;\n" + " /*0020*/ FFMA R1, R1, R1, R1 ;\n" * work + (
            f" /*0030*/ @P0 BRA `(.L_x_{label}) ;\n"
        )  # fmt: skip

    # What threads leave for each other is added up alone: no row.
    exchange = loop(4, 1).replace("FFMA", "DADD")
    listing = '.section .text.one,"ax"\n /*0000*/ @P1 BRA `(.L_x_2) ;\n' + loop(1, 7) + " /*0040*/ BRA `(.L_x_3) ;\n"
    listing += loop(2, 2) + loop(3, 1) + exchange + " /*0050*/ EXIT ;\n"
    (function,) = sass.functions(listing)
    assert [loop.kind for loop in function.loops] == ["shared", "shared", "shared", ""]
    assert [len(loop.path) for loop in function.chain(4, 1, ("shared",))] == [9, 3]


@pytest.fixture(scope="module")
def rows() -> dict[str, sass.Row]:
    try:
        return {row.kernel: row for row in sass.rows()}
    except sass.Unavailable as reason:
        pytest.skip(str(reason))


def test_kl_takes_26_instructions_per_class_in_bfloat16(rows: dict[str, sass.Row]) -> None:
    kl = rows["soft_target::rows_kernel<Bfloat16, 1, false>"]
    # The control: the paths are whole. Two exponentials to find the sums, two for the gradient.
    assert kl.exponentials == 4
    assert kl.per_class is not None and kl.per_class <= 26, kl


@pytest.mark.parametrize("dtype", sass.LANES)
@pytest.mark.parametrize(
    ("form", "sweeps"),
    [("-1", 2), ("1", 2), ("2", 2), ("3", 2), ("4", 3)],
    ids=["labels", "kl", "reverse", "symmetric", "jsd"],
)
@pytest.mark.parametrize("general", ["false", "true"])
def test_rows_are_read_twice_and_nothing_waits_for_the_stores(
    rows: dict[str, sass.Row], dtype: str, form: str, sweeps: int, general: str
) -> None:
    row = rows[f"soft_target::rows_kernel<{dtype}, {form}, {general}>"]
    assert len(row.loops) == 1 + sweeps, "copying, and the sweeps"
    assert (row.fences, row.spills) == (0, 0)
