"""Offsets on a GPU are not checked before a kernel reads them; here the same code runs them under AddressSanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.testing.sanitizer import build_sanitized, run_sanitized

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    sources = [ROOT / "tests" / "native" / "advantage_check.cpp", ROOT / "csrc" / "policy_loss.cpp"]
    return build_sanitized(sources, tmp_path_factory.mktemp("native") / "advantages", includes=[ROOT / "csrc"])


def test_wrong_offsets_reach_no_other_memory(program):
    result = run_sanitized(program)
    assert (result.returncode, result.stdout) == (0, "advantages stay in bounds\n"), result.stderr


@pytest.mark.parametrize("bug", ["1", "2"])
def test_planted_bug_is_caught(program, bug):
    result = run_sanitized(program, bug)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
