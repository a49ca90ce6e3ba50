"""What README.md and the guides in docs/ say works: commands, paths, Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("embedding.md", "profiling.md")}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))
TREE_LINE = re.compile(r"^(?P<path>[\w.*-]+(?:/[\w.*-]*)+|[\w.-]+\.\w+|Makefile|LICENSE)\s{2,}\S")


def fenced_blocks(markdown: str) -> list[tuple[str, str]]:
    """(language, body) of every fenced block; the language of a bare fence is ""."""
    return re.findall(r"^```([\w-]*)[^\n]*\n(.*?)^```\s*$", markdown, flags=re.MULTILINE | re.DOTALL)


def code_of(markdown: str) -> str:
    """All that is written as code: fenced blocks and `inline` spans."""
    blocks = fenced_blocks(markdown)
    prose = re.sub(r"^```.*?^```\s*$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*(body for _, body in blocks), *re.findall(r"`([^`\n]+)`", prose)])


def make_targets(markdown: str) -> list[str]:
    return sorted(set(re.findall(r"\bmake ([a-z][a-z-]*)", code_of(markdown))))


def tree_paths(markdown: str) -> list[str]:
    """Paths of a tree in a bare or text fence, one `folder/   text` a line."""
    lines = [
        line for language, body in fenced_blocks(markdown) if language in ("", "text") for line in body.split("\n")
    ]
    return [match["path"] for match in map(TREE_LINE.match, lines) if match]


def named_paths(markdown: str) -> list[str]:
    """Paths in links and inline code: those with a folder of ours or a file ending."""
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", markdown)
    spans = re.findall(r"`([\w./-]+)`", re.sub(r"^```.*?^```\s*$", "", markdown, flags=re.MULTILINE | re.DOTALL))
    tops = {path.name for path in ROOT.iterdir()}
    return sorted({*links, *(span for span in spans if "/" in span and span.split("/")[0] in tops - {"runs"})})


def python_blocks(markdown: str) -> list[str]:
    return [body for language, body in fenced_blocks(markdown) if language == "python"]


def test_readme_names_the_commands():
    assert {"demo", "test", "test-slow"} <= set(make_targets(README))


@pytest.mark.parametrize("target", make_targets(README))
def test_make_target_exists(target):
    assert target in TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_target_resolves(target):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "-n", target]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_phony_targets_are_all_there_are():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert set(phony.split()) == TARGETS


def test_ci_runs_the_test_commands():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^make .*$", script, flags=re.MULTILINE) == ["make test", "make test-slow"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_readme_has_a_tree():
    folders = {path.split("/")[0] for path in tree_paths(README) if path.endswith("/")}
    assert {"rollout", "kernels", "csrc", "bindings", "tests"} <= folders


@pytest.mark.parametrize(
    "path", [*tree_paths(README), *(p for text in (README, *GUIDES.values()) for p in named_paths(text))]
)
def test_path_exists(path):
    assert list(ROOT.glob(path.rstrip("/")))


def test_readme_has_python():
    assert python_blocks(README)


@pytest.mark.parametrize("number", range(len(python_blocks(README))))
def test_python_compiles(number):
    compile(python_blocks(README)[number], f"README.md, block {number}", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(python_blocks(README))))
def test_python_runs(number, tmp_path):
    script = tmp_path / "block.py"
    script.write_text("".join(python_blocks(README)[: number + 1]), encoding="utf-8")  # a block builds on those before
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_compiles(name):
    compile("".join(python_blocks(GUIDES[name])), name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_runs(name, tmp_path):
    """All its blocks as one script."""
    if "from trl import" in GUIDES[name]:
        pytest.importorskip("trl")
    script = tmp_path / "guide.py"
    script.write_text("".join(python_blocks(GUIDES[name])), encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_foveate_commands_run(tmp_path):
    """The lines of the README that name a program of the virtual environment and need no benchmark's minutes."""
    lines = [line for language, body in fenced_blocks(README) if language == "sh" for line in body.split("\n")]
    commands = [line for line in lines if re.match(r"\.venv/bin/(foveate|python examples)", line)]
    assert len(commands) >= 5
    for name in ("examples", "tests", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for command in commands:
        result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, command + result.stdout + result.stderr


EXAMPLE = """
Type `make demo`, or see [the log](CHANGELOG.md) and [a site](https://example.org/x.md) and `rollout/engine.py`.
```sh
make test-slow ARGS=-x
```
```
rollout/        the engine
csrc/*.cpp      C++
setup.py        maps the folders
```
```python
x = 1
```
"""


def test_the_reading_of_a_readme():
    assert make_targets(EXAMPLE) == ["demo", "test-slow"]
    assert tree_paths(EXAMPLE) == ["rollout/", "csrc/*.cpp", "setup.py"]
    assert named_paths(EXAMPLE) == ["CHANGELOG.md", "rollout/engine.py"]
    assert python_blocks(EXAMPLE) == ["x = 1\n"]
