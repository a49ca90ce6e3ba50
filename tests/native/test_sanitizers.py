"""csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer, driven by random traces without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


@pytest.fixture(scope="module")
def build_trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")

    def compile_object(source: Path, name: str, *defines: str) -> Path:
        target = folder / name
        command = [CXX, *FLAGS, *SANITIZE, *defines, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target

    pool = compile_object(ROOT / "csrc" / "pages.cpp", "pages.o")

    def build(bug: int) -> Path:
        driver = compile_object(ROOT / "tests" / "native" / "pages_trace.cpp", f"trace{bug}.o", f"-DPLANT_BUG={bug}")
        program = folder / f"trace{bug}"
        subprocess.run([CXX, *SANITIZE, str(pool), str(driver), "-o", str(program)], check=True)
        return program

    return build


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # NOTE: a preloaded library would be in front of the sanitizer's runtime, which then refuses to start.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=120)


def test_page_pool_traces(build_trace):
    result = run(build_trace(0))
    assert (result.returncode, result.stdout) == (0, "traces agree\n"), result.stderr


@pytest.mark.parametrize(
    ("bug", "report"),
    [(1, "AddressSanitizer: heap-buffer-overflow"), (2, "signed integer overflow"), (3, "trace broke")],
)
def test_planted_bug_is_caught(build_trace, bug, report):
    result = run(build_trace(bug))
    assert result.returncode != 0
    assert report in result.stderr
