"""csrc/sample_from_hidden.cu without a GPU: where its numbers lie, on an emulation of what copies and multiplies them,
whom its filter spares, and what the compiler makes of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from foveate.testing.cuda_compile import CSRC, compile_source, find_nvcc
from foveate.testing.resources import dump
from foveate.testing.sanitizer import build_sanitized, run_sanitized

ROOT = Path(__file__).resolve().parents[2]


def test_every_thread_holds_the_logits_it_draws_from(tmp_path):
    sources = [ROOT / "tests" / "native" / "hopper_check.cpp", ROOT / "csrc" / "sample_from_hidden.cpp"]
    program = build_sanitized(sources, tmp_path / "hopper", includes=[ROOT / "csrc"])
    result = run_sanitized(program)
    assert (result.returncode, result.stdout) == (0, "tiles agree\n"), result.stdout + result.stderr


def test_no_id_that_wins_is_spared_its_noise(tmp_path):
    source = ROOT / "tests" / "native" / "race_check.cpp"
    program = build_sanitized([source], tmp_path / "race", includes=[ROOT / "csrc"])
    result = run_sanitized(program)
    assert (result.returncode, result.stdout) == (0, "tiles race\n"), result.stdout + result.stderr


@pytest.fixture
def nvcc() -> str:
    try:
        return find_nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_the_matrix_instructions_are_not_torn_apart(nvcc):
    """Four products a step and kernel: the compiler copies them where it finds that they must wait for one another."""
    rows = compile_source(CSRC / "sample_from_hidden.cu", ["90a"])
    drawing = [row for row in rows if "draw_kernel" in row.kernel]
    assert len(drawing) == 4
    assert [row.wgmma for row in drawing] == [4] * 4
    assert [row.stack for row in drawing] == [0] * 4


def test_a_stage_is_released_without_a_fence_of_the_gpu(nvcc, tmp_path):
    """Every warp arrives at another thread block's barrier once a step; a fence there would stall the products."""
    source, binary = tmp_path / "arrive.cu", tmp_path / "arrive.cubin"
    body = "foveate::hopper::arrive_at(barrier, 1);"
    source.write_text(f'#include "common/hopper.cuh"\n__global__ void arrive(unsigned barrier) {{ {body} }}\n')
    subprocess.run([nvcc, "-cubin", "-arch=sm_90a", f"-I{CSRC}", "-o", str(binary), str(source)], check=True)
    code = dump("-sass", binary)
    assert "SYNCS.ARRIVE" in code
    assert "MEMBAR" not in code
