"""exp_float of csrc/common/math.h over all exponents, infinities and NaN, under the sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.testing.sanitizer import build_sanitized, run_sanitized

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    source = ROOT / "tests" / "native" / "exp_check.cpp"
    return build_sanitized([source], tmp_path_factory.mktemp("native") / "exp", includes=[ROOT / "csrc"])


def test_exp_is_exact_and_defined(program):
    result = run_sanitized(program)
    assert (result.returncode, result.stdout) == (0, "exp agrees\n"), result.stderr


def test_planted_bug_is_caught(program):
    result = run_sanitized(program, "1")
    assert result.returncode != 0
    assert "outside the range of representable values" in result.stderr
