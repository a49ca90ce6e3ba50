"""foveate.testing.resources and the parsers of the compile tools, on recorded text of NVIDIA's tools."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foveate.testing.cuda_compile import demangle, parse_ptxas
from foveate.testing.resources import (
    Row,
    count_instructions,
    count_ptx,
    dump,
    parse_resource_usage,
    print_report,
    problems_of,
    shared_limit,
    table_of,
)

GOOD = Row("family.kernel", "sm_90", registers=40, shared=1024)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 8}, "spills: 8 bytes of local memory, 0 bytes stored, 0 loaded"),
        ({"spill_stores": 4}, "spills: 0 bytes of local memory, 4 bytes stored, 0 loaded"),
        ({"spill_loads": 4}, "spills: 0 bytes of local memory, 0 bytes stored, 4 loaded"),
        ({"shared": (227 << 10) + 1}, "uses 232449 bytes of shared memory of 232448"),
        ({"shared": (163 << 10) + 1, "chip": "sm_80"}, "uses 166913 bytes of shared memory of 166912"),
        ({"tensor_memory": 513}, "uses 513 columns of tensor memory of 512"),
        ({"matrix": True}, "has no matrix instruction"),
        ({"error": "too hard"}, "does not compile: too hard"),
    ],
)
def test_problems(change, words):
    row = replace(GOOD, **change)
    assert problems_of(row) == [f"family.kernel on {row.chip} {words}"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"shared": 227 << 10},
        {"shared": 163 << 10, "chip": "sm_80"},
        {"tensor_memory": 512},
        *({"matrix": True, kind: 1} for kind in ("mma_sync", "wgmma", "tcgen05")),
    ],
)
def test_no_problem(change):
    assert problems_of(replace(GOOD, **change)) == []


def test_all_problems_are_named():
    assert len(problems_of(replace(GOOD, stack=8, shared=1 << 20, tensor_memory=600, matrix=True))) == 4


def test_shared_limits():
    assert shared_limit("sm_90a") == shared_limit("sm_90") == 232_448
    for chip in ("sm_75", "90", "sm_90ab", ""):
        with pytest.raises(ValueError, match=rf"got '{chip}' \(chip\)"):
            shared_limit(chip)


def test_table_has_a_line_for_each_row():
    names, *lines = table_of([GOOD, replace(GOOD, kernel="b", shared=7)]).splitlines()
    assert names.split()[:4] == ["kernel", "chip", "registers", "shared"]
    assert [line.split()[:4] for line in lines] == [["family.kernel", "sm_90", "40", "1024"], ["b", "sm_90", "40", "7"]]
    assert len({len(line) for line in (names, *lines)}) == 1
    assert len(table_of([]).splitlines()) == 1


def test_report_exit_code(capsys):
    assert print_report([GOOD], as_json=False) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert print_report([GOOD, replace(GOOD, stack=8)], as_json=False) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("family.kernel on sm_90 spills")
    assert print_report([replace(GOOD, stack=8)], as_json=True) == 1
    assert '"problems": ["family.kernel on sm_90 spills' in capsys.readouterr().out


SASS = """
Fatbin elf code:
================
arch = sm_80
	code for sm_80
		Function : first
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                            /* 0x00000a0000017a02 */
                                                                                     /* 0x000fe40000000f00 */
        /*0020*/                   HFMA2.MMA R12, -RZ, RZ, 0, 9.5367431640625e-07 ;  /* 0x00000010ff0c7435 */
        /*0050*/                   LDG.E.128 R4, [R4.64] ;                           /* 0x0000000404047981 */
        /*0060*/              @!P1 LDG.E.128.CONSTANT R4, [R4.64] ;                  /* 0x0000000404047981 */
        /*0070*/                   LDG.E.64 R4, [R4.64] ;                            /* 0x0000000404047981 */
        /*0080*/                   LDGSTS.E.BYPASS.128 [R43], [R4.64], P0 ;          /* 0x00000000042b7fae */
        /*0090*/                   STG.E.128 [R2.64], R4 ;                           /* 0x0000000000007387 */
        /*0160*/                   STL.128 [R1], R8 ;                                /* 0x0000000801007387 */
        /*0170*/                   STL [R1+0x10], R4 ;                               /* 0x0000100401007387 */
        /*0180*/              @P0  LDL.LU.64 R0, [R0] ;                              /* 0x0000000000007983 */
        /*0190*/                   LDL.U8 R0, [R0] ;                                 /* 0x0000000000007983 */
        /*3950*/                   HMMA.16816.F32.BF16 R4, R24, R8.reuse, R4 ;       /* 0x000000081804723c */
		Function : second
        /*0000*/                   BRA 0x0;                                          /* 0x0000000000007918 */
Fatbin elf code:
================
arch = sm_90a
		Function : first
        /*1490*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;  /* 0x41e00000081879f0 */
        /*39d0*/             @!UP0 UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR4], tmem[UR16], idesc[UR17], UP1 ; /* 0x0 */
"""


def test_instructions_are_counted():
    counts = count_instructions(SASS)
    assert list(counts) == [("sm_80", "first"), ("sm_80", "second"), ("sm_90a", "first")]
    assert counts["sm_80", "first"] == {"loads_16": 3, "spill_stores": 20, "spill_loads": 9, "mma_sync": 1}
    assert not counts["sm_80", "second"]
    assert counts["sm_90a", "first"] == {"wgmma": 1, "tcgen05": 1}


@pytest.mark.parametrize(
    ("line", "counted"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "loads_16"),
        ("ld.global.nc.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];", "loads_16"),
        ("ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", None),
        ("ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 ];", None),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", None),
        ("cp.async.cg.shared.global [ %r10 + 0 ], [ %rd3 + 0 ], 0x10, %r11;", "loads_16"),
        ("cp.async.ca.shared.global [ %r10 + 0 ], [ %rd3 + 0 ], 0x8, %r11;", None),
        ("cp.async.commit_group;", None),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };", "mma_sync"),
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r262}, %rd78, %rd79, %p6, 1, 1, 0, 1;", "wgmma"),
        ("wgmma.fence.sync.aligned;", None),
        ("@%p7 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p8;", "tcgen05"),
        ("tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [ %rd1 ];", None),
        ("// mma.sync.aligned", None),
    ],
)
def test_ptx_instructions_are_counted(line, counted):
    assert +count_ptx("\t" + line) == ({counted: 1} if counted else {})


def test_resource_usage_is_read():
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:32 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:968 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:255 STACK:24 SHARED:0 LOCAL:8 CONSTANT[0]:548 CONSTANT[2]:16 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert parse_resource_usage(text) == {
        "first": {"registers": 32, "stack": 0, "shared": 1024},
        "second": {"registers": 255, "stack": 32, "shared": 0},
    }
    assert parse_resource_usage("") == {}


PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_80'
ptxas info    : Function properties for _Z4copyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 1 barriers, 512 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 4.109 ms
ptxas info    : Compiling entry function '_Z6callerPfi' for 'sm_80'
ptxas info    : Function properties for _Z6callerPfi
    32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 32 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Function properties for _Z3farPfi
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_90a'
ptxas info    : Function properties for _Z4copyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers, 512 bytes smem
"""


def test_ptxas_is_read():
    assert parse_ptxas(PTXAS) == [
        Row("_Z4copyPf", "sm_80", registers=16, shared=512),
        Row("_Z6callerPfi", "sm_80", registers=255, stack=32, spill_stores=4, spill_loads=8),
        Row("_Z3farPfi", "sm_80", stack=16),
        Row("_Z4copyPf", "sm_90a", registers=18, shared=512),
    ]
    assert parse_ptxas("ptxas info    : 0 bytes gmem") == []


@pytest.mark.parametrize(
    "lost", ["Used 18", "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info"]
)
def test_ptxas_that_says_less_is_an_error(lost):
    head, _, tail = PTXAS.rpartition(lost)
    with pytest.raises(ValueError, match="expected stack and registers of _Z4copyPf for sm_90a"):
        parse_ptxas(head + tail)


def test_names_are_demangled():
    names = ["_ZN6sample4sortILi48EEEvPf", "_Z4copyPf", "plain"]
    assert demangle(names) == ["sample::sort<48>", "copy", "plain"]
    assert demangle([]) == []


def test_tool_that_refuses_is_an_error(tmp_path):
    pytest.importorskip("triton")
    broken = tmp_path / "broken.cubin"
    broken.write_bytes(b"no binary")
    with pytest.raises(RuntimeError, match="cuobjdump -sass: "):
        dump("-sass", broken)
