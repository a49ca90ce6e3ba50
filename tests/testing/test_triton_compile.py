"""The compile tool tells the truth about kernels whose answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from foveate.testing.triton_compile import CHIPS, compile_in_child, compile_targets, main

SAMPLES = Path(__file__).parent / "kernel_samples.py"


@pytest.fixture(scope="module")
def report():
    return compile_in_child("--file", str(SAMPLES))


@pytest.fixture(scope="module")
def rows(report):
    return {(row.kernel.removeprefix("kernel_samples."), row.chip): row for row in report.rows}


def problems(report, name: str, chip: int) -> list[str]:
    return [text for text in report.problems if text.startswith(f"kernel_samples.{name} on sm_{chip} ")]


@pytest.mark.parametrize("chip", CHIPS)
def test_compile_plain_kernel(report, rows, chip):
    row = rows["copy", f"sm_{chip}"]
    assert 0 < row.registers < 64
    assert (row.shared, row.stack, row.spill_stores, row.spill_loads) == (0, 0, 0, 0)
    assert (row.mma_sync, row.wgmma, row.tcgen05) == (0, 0, 0)
    assert row.loads_16 == 2  # 1024 elements by 128 threads: 8 each
    assert not problems(report, "copy", chip)


@pytest.mark.parametrize(("chip", "kind"), [(80, "mma_sync"), (90, "wgmma"), (100, "tcgen05")])
def test_compile_matrix_product(report, rows, chip, kind):
    row = rows["product", f"sm_{chip}"]
    assert [name for name in ("mma_sync", "wgmma", "tcgen05") if getattr(row, name)] == [kind]
    assert row.shared > 0
    assert (row.tensor_memory > 0) == (chip == 100)
    assert not problems(report, "product", chip)


@pytest.mark.parametrize("chip", CHIPS)
def test_compile_reports_missing_matrix_instructions(report, chip):
    (text,) = problems(report, "copy_without_matrix", chip)
    assert "has no matrix instruction" in text


@pytest.mark.parametrize("chip", CHIPS)
def test_compile_reports_a_spill(report, rows, chip):
    row = rows["row_that_spills", f"sm_{chip}"]
    assert min(row.stack, row.spill_stores, row.spill_loads) > 0
    (text,) = problems(report, "row_that_spills", chip)
    assert "spills" in text


@pytest.mark.parametrize("chip", CHIPS)
def test_compile_reports_too_much_shared_memory(report, rows, chip):
    assert rows["product_too_large", f"sm_{chip}"].shared > 227 << 10
    assert any("bytes of shared memory of" in text for text in problems(report, "product_too_large", chip))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("name", "words"), [("block_of_odd_size", "power of 2"), ("argument_forgotten", "got no ['target']")]
)
def test_compile_reports_what_does_not_compile(report, name, words, chip):
    (text,) = problems(report, name, chip)
    assert "does not compile" in text
    assert words in text


def test_compile_exit_code_and_order(report):
    assert report.exit_code == 1
    assert [row.chip for row in report.rows[:3]] == ["sm_80", "sm_90", "sm_100"]
    assert len(report.rows) == 3 * 7


def test_compile_tool_that_breaks_off(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise KeyError('of this file')")
    with pytest.raises(RuntimeError, match="KeyError: 'of this file'"):
        compile_in_child("--file", str(broken))
    broken.write_text("TARGETS = []")
    with pytest.raises(RuntimeError, match="ended with 2"):
        compile_in_child("--file", str(broken))


def test_compile_without_interpreter_only(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compile_targets([])
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="got 'sm_75'"):
        compile_targets([], [75])
    assert compile_targets([]) == []


def test_compile_prints_a_table(capsys, tmp_path, monkeypatch):
    """In this process, of no kernel that could be compiled: the table and the words below it."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    source = tmp_path / "wrong.py"
    source.write_text("""
from types import SimpleNamespace
from foveate.kernels.targets import TritonTarget
TARGETS = [TritonTarget("empty", SimpleNamespace(arg_names=["x"]), {})]
""")
    assert main(["--file", str(source), "--chips", "90"]) == 1
    names, row, problem = capsys.readouterr().out.splitlines()
    assert names.split()[:4] == ["kernel", "chip", "registers", "shared"]
    assert row.split()[:3] == ["wrong.empty", "sm_90", "0"]
    assert problem.startswith("wrong.empty on sm_90 does not compile: ValueError: expected the arguments ['x']")
