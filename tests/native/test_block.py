"""csrc/common: Block, the 16-bit formats and Philox against their definitions; a GPU bit for bit against the host."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveate.testing.sanitizer import build_sanitized, run_sanitized

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("native") / "block_check"
    sources, flags = [NATIVE / "block_check.cpp"], ["-Wno-unknown-pragmas"]  # those of nvcc
    return build_sanitized(sources, output, includes=[ROOT / "csrc"], flags=flags)


def test_host_block(program):
    result = run_sanitized(program)
    assert (result.returncode, result.stdout) == (0, "blocks agree\n"), result.stderr


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("1", "AddressSanitizer: heap-buffer-overflow"),
        ("2", "check failed: sum"),
        ("3", "check failed: rounded to nearest, ties to even"),
        ("4", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_planted_bug_is_caught(program, bug, report):
    result = run_sanitized(program, bug)
    assert result.returncode != 0
    assert report in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_device_block_compiles_and_gives_the_bits_of_the_host(tmp_path):
    """On a CPU it is compiled only."""
    script = [sys.executable, "-P", str(NATIVE / "run_block_check.py"), str(tmp_path / "block_check")]
    result = subprocess.run(script, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    expected = "blocks agree" if torch.cuda.is_available() else "compiled; there is no GPU to run it"
    assert result.stdout.splitlines() == [expected]
