"""What tests/cuda_check.py reads out of what ptxas and nvdisasm print."""

import shutil

import cuda_check
import pytest

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z6kernelPf
    {frame} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, {frame} bytes cumulative stack size, 801 bytes cmem[0]
"""

# A tile of two accumulators: begun, a stage of one product and four copies, a jump over it, and two ways on: one with
# a maximum, of which one part finds an index, and one without.
SASS = """\
\t.section\t.text._Z12tiles_kernelv,"ax",@progbits
.text._Z12tiles_kernelv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R9, R9, R9 ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   LDS R4, [R5.X4+0x10000] ;
        /*0040*/                   FADD R6, -R4, -R4 ;
        /*0050*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0060*/              @!P1 BRA `(.L_x_2) ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R9], [R6.64] ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R9], [R6.64] ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R9], [R6.64] ;
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R9], [R6.64] ;
.L_x_2:
        /*00b0*/                   HMMA.16816.F32.BF16 R4, R84.reuse, R72, R4 ;
        /*00c0*/               @P0 BRA `(.L_x_1) ;
.L_x_3:
        /*00d0*/              @!P2 BRA `(.L_x_5) ;
        /*00e0*/                   FMNMX R9, R5, R4, !PT ;
        /*00f0*/                   FSETP.GE.AND P1, PT, R9, R10, PT ;
        /*0100*/              @!P1 BRA `(.L_x_4) ;
        /*0110*/                   FSETP.NEU.AND P1, PT, R4, R9, PT ;
        /*0120*/                   RED.E.MAX.64.STRONG.GPU [R10.64], R8 ;
.L_x_4:
        /*0130*/                   BRA `(.L_x_6) ;
.L_x_5:
        /*0140*/                   STS [R9], R4 ;
.L_x_6:
        /*0150*/                   BRA `(.L_x_0) ;
        /*0160*/                   NOP ;
"""


def test_a_spill_or_a_stack_frame_is_a_fault(monkeypatch):
    def found(**bytes_of):
        use = cuda_check.parse_ptxas(PTXAS.format(**bytes_of))["_Z6kernelPf"]
        assert use["registers"] == 40 and use["shared"] == 0
        return cuda_check.faults("kernel", "sm_80", use)

    assert found(frame=0, stores=0, loads=0) == []
    assert found(frame=8, stores=4, loads=12) == [
        "kernel for sm_80: 4 bytes of spill stores",
        "kernel for sm_80: 12 bytes of spill loads",
        "kernel for sm_80: a stack frame of 8 bytes",
    ]
    monkeypatch.setitem(cuda_check.FRAMES, "kernel", 8)
    assert found(frame=8, stores=0, loads=0) == []
    assert found(frame=16, stores=0, loads=0) == ["kernel for sm_80: a stack frame of 16 bytes"]


def test_instructions_are_counted_on_the_way_that_is_taken(monkeypatch):
    monkeypatch.setattr(cuda_check, "MAXIMA", 1)
    code = cuda_check.parse_sass(SASS)["_Z12tiles_kernelv"]
    assert cuda_check.count(code) == 22
    begin, stage, end, loops = cuda_check.tile_parts(code)
    assert [cuda_check.opcode(line) for line in begin] == ["LDS", "FADD", "BRA"]
    assert [cuda_check.opcode(line) for line in stage] == ["BRA", *["LDGSTS"] * 4, "HMMA", "BRA"]
    assert [cuda_check.opcode(line) for line in end] == ["BRA", "FMNMX", "FSETP", "BRA", "BRA", "BRA"]
    assert not loops
    monkeypatch.setattr(cuda_check, "MAXIMA", 2)
    with pytest.raises(ValueError, match="2 FMNMX"):
        cuda_check.tile_parts(code)


def test_tables_go_to_their_places():
    page = "of nvcc 1.2.3:\n<!-- a: by tests/cuda_check.py -->\n<!-- end -->\ntext\n"
    once = cuda_check.fill(page, "13.0.88", {"a": "| 1 |"})
    assert once == "of nvcc 13.0.88:\n<!-- a: by tests/cuda_check.py -->\n| 1 |\n<!-- end -->\ntext\n"
    assert cuda_check.fill(once, "13.0.88", {"a": "| 1 |"}) == once


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_says_what_is_understood(tmp_path):
    source = tmp_path / "local.cu"
    source.write_text(
        "__global__ void local_kernel(int* x) {\n"
        "  int at[64];\n"
        "  for (int i = 0; i < 64; ++i) at[x[i]] = i;\n"
        "  x[0] = at[x[1]];\n"
        "}\n"
    )
    said, cubin = cuda_check.compile_kernels("nvcc", source, "sm_80", tmp_path)
    assert cubin is not None
    ((name, use),) = cuda_check.parse_ptxas(said).items()
    short = cuda_check.readable([name])[name]
    assert cuda_check.faults(short, "sm_80", use) == ["local_kernel for sm_80: a stack frame of 256 bytes"]

    source.write_text(source.read_text().replace("int at", "int unused, at"))
    said, cubin = cuda_check.compile_kernels("nvcc", source, "sm_90a", tmp_path)
    assert cubin is None and "unused" in said
