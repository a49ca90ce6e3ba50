"""Every registered Triton kernel compiles for every chip, without spills and within the chip's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.kernels import targets
from foveate.testing.triton_compile import CHIPS, compile_in_child

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("triton")
    return compile_in_child()


def test_compile_every_target_for_every_chip(report):
    assert not report.problems
    assert report.exit_code == 0


@pytest.mark.parametrize("family", targets.FAMILIES)
def test_compile_covers_the_family(report, family):
    names = {row.kernel for row in report.rows if row.kernel.startswith(f"{family}.")}
    assert names
    found = {(row.kernel, row.chip) for row in report.rows}
    assert {(name, f"sm_{chip}") for name in names for chip in CHIPS} <= found
    assert len(found) == len(report.rows)


def test_compile_list_has_every_family_with_triton_kernels():
    families = {path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernel.py")}
    assert families == set(targets.FAMILIES)
