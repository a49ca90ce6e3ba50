"""Every CUDA source compiles for every chip, without warnings and spills; the tool that says so is itself tried."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from foveate.testing.cuda_compile import CHIPS, CSRC, FLAGS, compile_source, cuda_sources, find_nvcc, main
from foveate.testing.resources import Row, problems_of

ROOT = Path(__file__).resolve().parents[2]

try:
    find_nvcc()
    REASON = ""
except FileNotFoundError as error:
    REASON = str(error)
needs_nvcc = pytest.mark.skipif(bool(REASON), reason=REASON)

COPY = """
__global__ void copy(const float4* source, float4* target) { target[threadIdx.x] = source[threadIdx.x]; }
"""
SPILLING = """
namespace sample {
template <int kSize>
__global__ void __launch_bounds__(1024, 2) sort(float* values) {
    float kept[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) kept[i] = values[i * 1024 + threadIdx.x];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) kept[i] = fmaf(kept[i], kept[j], kept[(i + j) % kSize]);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i * 1024 + threadIdx.x] = kept[i];
}
template __global__ void sort<48>(float*);
}  // namespace sample
"""
WARNING = """
__global__ void fill(float* values) {
    int unused;
    values[threadIdx.x] = 1.0f;
}
"""


compiled = cache(compile_source)


@needs_nvcc
@pytest.mark.parametrize("source", cuda_sources(), ids=lambda path: path.name)
def test_source_compiles_without_spills(source):
    assert not [problem for row in compiled(source) for problem in problems_of(row)]


@needs_nvcc
def test_attention_reads_keys_and_values_16_bytes_at_a_time():
    rows = [row for row in compiled(CSRC / "paged_attention.cu") if "AttendTile" in row.kernel]
    assert len(rows) == 3 * len(CHIPS)  # of three dtypes
    # Both of two tile widths read both.
    assert all(row.loads_16 >= 4 for row in rows)


@needs_nvcc
def test_kernels_are_found_for_every_chip():
    kernels = [{row.kernel for row in compile_all() if row.chip == f"sm_{chip}"} for chip in CHIPS]
    assert kernels[0]
    assert all(names == kernels[0] for names in kernels)


def compile_all() -> list[Row]:
    return [row for source in cuda_sources() for row in compiled(source)]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@needs_nvcc
def test_plain_kernel(tmp_path):
    rows = compile_source(write(tmp_path, "copy.cu", COPY))
    assert [row.kernel for row in rows] == ["copy: copy(float4 const*, float4*)"] * 3 or rows[0].kernel == "copy: copy"
    assert sorted(row.chip for row in rows) == ["sm_100", "sm_80", "sm_90a"]
    for row in rows:
        assert 0 < row.registers < 32
        assert (row.stack, row.shared, row.mma_sync, row.loads_16) == (0, 0, 0, 1)
        assert not problems_of(row)


@needs_nvcc
def test_planted_spill_is_an_error(tmp_path, capsys):
    source = write(tmp_path, "sort.cu", SPILLING)
    assert main(["--chips", "90a", "--sources", str(source)]) == 1
    names, row, problem = capsys.readouterr().out.splitlines()
    assert names.startswith("kernel")
    assert "sample::sort<48>" in row
    assert "on sm_90a spills: " in problem


@needs_nvcc
def test_planted_warning_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"expected fill.cu to compile(.|\n)*unused"):
        compile_source(write(tmp_path, "fill.cu", WARNING), ["80"])


def test_without_nvcc_the_tool_raises(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="expected nvcc as NVCC, on PATH"):
        compile_source(write(tmp_path, "copy.cu", COPY))


def test_without_sources_the_tool_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected CUDA sources in"):
        cuda_sources(tmp_path)


def test_flags_are_those_of_the_build():
    """setup.py runs before the package can be imported, so that it has a list of its own."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (flags,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "NVCC_FLAGS"]
    assert set(FLAGS) - {"-Xptxas", "-v"} == set(ast.literal_eval(flags)) - {"-cudart", "static"}
