"""csrc/paged_attention.cpp under the sanitizers, in memory of exactly the sizes that it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.testing.sanitizer import build_sanitized, run_sanitized

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    sources = [ROOT / "tests" / "native" / "attention_check.cpp", ROOT / "csrc" / "paged_attention.cpp"]
    return build_sanitized(sources, tmp_path_factory.mktemp("native") / "attention", includes=[ROOT / "csrc"])


def test_attention_stays_in_its_memory(program):
    result = run_sanitized(program)
    assert (result.returncode, result.stdout) == (0, "attention agrees\n"), result.stderr


@pytest.mark.parametrize("bug", ["1", "2", "3", "4"])
def test_planted_bug_is_caught(program, bug):
    result = run_sanitized(program, bug)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
