"""`make gpu`: each step stands for itself, within its limit; the rehearsal runs every one."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu
import pytest
import torch
from common import Options

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, name: str = "a step", limit: float = 30.0, tool: str | None = None) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], limit, tool)


def test_outcomes(tmp_path):
    assert gpu.run(python("print('one'); print('two'); print()"), tmp_path, 60).status == "passed"
    failed = gpu.run(python("import sys; print('why'); sys.exit(3)", "tests, all"), tmp_path, 60)
    assert (failed.status, failed.last_line) == ("failed", "why")
    assert (tmp_path / "tests_all.log").read_text() == "why\n"
    skipped = gpu.run(python("", tool="no-such-tool"), tmp_path, 60)
    assert (skipped.status, skipped.last_line) == ("skipped", "found no no-such-tool")


def test_a_step_has_its_environment(tmp_path):
    step = python("import os; print(os.environ['KEY'], os.environ['PYTHONUNBUFFERED'])")
    assert gpu.run(dataclasses.replace(step, environment={"KEY": "value"}), tmp_path, 60).last_line == "value 1"
    (memcheck,) = [step for step in gpu.steps(tmp_path, dry=False) if step.name == "kernels, memcheck"]
    assert memcheck.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_tools_are_found_as_the_build_finds_nvcc(tmp_path, monkeypatch):
    def executable(folder, name):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        path = tmp_path / folder / name
        path.write_text("#!/bin/sh\necho this one\n")
        path.chmod(0o755)
        return str(path)

    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert gpu.find_tool("no-such-tool") is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    below, tool = executable("cuda/bin", "nvcc"), executable("cuda/bin", "no-such-tool")
    assert (gpu.find_tool("nvcc"), gpu.find_tool("no-such-tool")) == (below, tool)
    step = gpu.Step("tool", ["no-such-tool"], 30, "no-such-tool")
    assert gpu.run(step, tmp_path, 60).last_line == "this one"
    on_path = executable("path", "nvcc")
    assert gpu.find_tool("nvcc") == on_path
    monkeypatch.setenv("NVCC", executable("named", "nvcc"))
    assert gpu.find_tool("nvcc") == str(tmp_path / "named" / "nvcc")


@pytest.mark.parametrize(("limit", "left"), [(1.0, 60.0), (60.0, 0.0)])
def test_a_step_and_its_children_end_at_the_limit(tmp_path, limit, left):
    """The step's own limit, or what is left of the whole."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    assert gpu.run(python(child, limit=limit), tmp_path, left).status == "out of time"
    assert time.monotonic() - start < 30


def test_a_failure_stops_nothing_and_is_the_exit_status(tmp_path, monkeypatch, capsys):
    done = [python("print('fine')", "first"), python("raise SystemExit(1)", "second"), python("print('end')", "third")]
    monkeypatch.setattr(gpu, "steps", lambda out, dry: done)
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    assert gpu.main(["--dry", "--out", str(tmp_path / "out")]) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(row["name"], row["status"]) for row in summary] == [
        ("first", "passed"), ("second", "failed"), ("third", "passed"),
    ]  # fmt: skip
    assert "end" in capsys.readouterr().out.splitlines()[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(gpu.RESULTS)
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["logs", "logs/first.log", "logs/second.log", "logs/third.log"]
        assert archive.extractfile("logs/third.log").read() == b"end\n"
    monkeypatch.setattr(gpu, "steps", lambda out, dry: done[::2])
    (tmp_path / "out" / "rows.jsonl").write_text("of an earlier run")
    assert gpu.main(["--dry", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_only_a_rehearsal_may_skip_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "steps", lambda out, dry: [python("", "blocks", tool="no-such-tool")])
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu, "gpu_chip", lambda: "90a")
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    assert not capsys.readouterr().err
    assert gpu.main(["--out", str(tmp_path)]) == 1
    expected = "blocks: skipped, which counts as a failure where there is a GPU\n"
    assert capsys.readouterr().err == expected


def test_without_a_gpu_only_a_rehearsal(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "gpu_chip", lambda: None)
    assert gpu.main([]) == 1
    assert "rehearse with DRY=1" in capsys.readouterr().err


@pytest.mark.parametrize(("reply", "chip"), [("9.0\n", "90a"), ("8.9\n", "89"), ("10.0\n10.0\n", "100"), ("", None)])
def test_chip(tmp_path, monkeypatch, reply, chip):
    (tmp_path / "reply").write_text(reply)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat {tmp_path / 'reply'}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu.gpu_chip() == chip


def test_the_limits_fit_into_eight_minutes(tmp_path):
    assert gpu.TOTAL_SECONDS <= 480 - 20  # what it takes to end
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(gpu.BENCHMARKS) == benchmarks - {"rollout"}  # whole rollouts are measured against transformers, on a CPU
    names = [step.name for step in gpu.steps(tmp_path, dry=False)]
    assert len(set(names)) == len(names)
    benches, sanitizers = (
        [place for place, name in enumerate(names) if wanted(name)]
        for wanted in (lambda name: name.startswith("bench_"), lambda name: "check" in name)
    )
    assert max(benches) < min(sanitizers)
    assert len(sanitizers) == len(gpu.SANITIZERS) + 2
    for step in gpu.steps(tmp_path, dry=False):
        if step.tool == gpu.SANITIZER:  # whose exit status is otherwise that of the program
            assert int(step.command[step.command.index("--error-exitcode") + 1]) > 0


@pytest.mark.parametrize("name", gpu.SANITIZED)
def test_what_a_sanitizer_looks_at_exists(name):
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-k", gpu.SANITIZED[name]]
    result = subprocess.run([*command, f"tests/kernels/test_{name}.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout  # 5 if nothing is collected


KERNELS = [name for name, pattern in gpu.BENCHMARKS.items() if pattern and name != "prune_rollout"]


@pytest.mark.parametrize("name", KERNELS)
def test_the_rows_that_fit_into_the_time_are_of_every_kernel(name):
    script = importlib.import_module(f"bench_{name}")
    for options in (Options(torch.device("cuda")), Options(torch.device("cpu"), quick=True)):
        selected = dataclasses.replace(options, filter=gpu.BENCHMARKS[name])
        rows = [m.row("cuda") for m in script.measurements(options)]
        assert {row["kernel"] for row in rows if selected.selects(row)} == set(script.KERNELS)


def test_the_rollouts_that_fit_into_the_time():
    """One method of each site, shared and not, in a rehearsal too."""
    script = importlib.import_module("bench_prune_rollout")
    options = Options(torch.device("cpu"), filter=gpu.BENCHMARKS["prune_rollout"])
    for size in (script.GPU, script.QUICK):
        found = [(setting, script.cases_of(setting, options)) for setting in script.settings(size)]
        assert [(setting.batch, setting.sharing) for setting, cases in found if cases] == [(8, True), (8, False)]
        for _, cases in found:
            assert [case and case.method for case in cases] in ([], [None, "visionzip", "fastv"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal(tmp_path):
    if not (ROOT / ".venv" / ".test").exists():
        pytest.skip("not in the environment that make sets up")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MAKEFLAGS")}
    command = ["make", "gpu", "DRY=1", f"OUT={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = {row["name"]: row["status"] for row in json.loads((tmp_path / "summary.json").read_text())}
    assert {"build", "doctor", "tests", "bench_layers"} <= {
        name for name, status in summary.items() if status == "passed"
    }
    assert {path.name for path in tmp_path.iterdir()} == set(gpu.RESULTS)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    kernels = {(row["kernel"], row["backend"]) for row in rows if "kernel" in row}
    assert kernels >= {("rms_norm", "cpp"), ("rms_norm", "reference")}
    assert {row["method"] for row in rows if row.get("benchmark") == "prune_rollout"} == {"none", "visionzip", "fastv"}
