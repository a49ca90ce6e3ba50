"""csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer, driven by random traces without Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.testing.sanitizer import build_sanitized, run_sanitized

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build_trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    pool = build_sanitized([ROOT / "csrc" / "pages.cpp"], folder / "pages.o", includes=[ROOT / "csrc"])

    def build(bug: int) -> Path:
        sources = [ROOT / "tests" / "native" / "pages_trace.cpp", pool]
        return build_sanitized(sources, folder / f"trace{bug}", [f"PLANT_BUG={bug}"], [ROOT / "csrc"])

    return build


def test_page_pool_traces(build_trace):
    result = run_sanitized(build_trace(0))
    assert (result.returncode, result.stdout) == (0, "traces agree\n"), result.stderr


@pytest.mark.parametrize(
    ("bug", "report"),
    [(1, "AddressSanitizer: heap-buffer-overflow"), (2, "signed integer overflow"), (3, "trace broke")],
)
def test_planted_bug_is_caught(build_trace, bug, report):
    result = run_sanitized(build_trace(bug))
    assert result.returncode != 0
    assert report in result.stderr


def test_race_free_loop_on_two_threads(tmp_path):
    source = tmp_path / "loop.cpp"
    source.write_text("""
#include <cstdio>
int main() {
    int sum = 0, threads = 0;
#pragma omp parallel reduction(+ : sum, threads)
    {
        threads += 1;
#pragma omp for
        for (int i = 0; i < 100; ++i) sum += i;
    }
    std::printf("%d on %d", sum, threads);
}
""")
    result = run_sanitized(build_sanitized([source], tmp_path / "loop"))
    assert (result.returncode, result.stdout) == (0, "4950 on 2"), result.stderr


def test_warning_is_refused(tmp_path):
    source = tmp_path / "unused.cpp"
    source.write_text("int main() { int unused; }")
    with pytest.raises(RuntimeError, match=r"expected unused to compile(.|\n)*unused variable"):
        build_sanitized([source], tmp_path / "unused")


def test_compiler_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(FileNotFoundError, match="expected a C\\+\\+ compiler"):
        build_sanitized([], tmp_path / "program")
