"""`make gpu`: each step stands for itself, within its limit; the rehearsal runs every one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, name: str = "a step", limit: float = 30.0, tool: str | None = None) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], limit, tool)


def test_outcomes(tmp_path):
    assert gpu.run(python("print('one'); print('two'); print()"), tmp_path, 60).status == "passed"
    failed = gpu.run(python("import sys; print('why'); sys.exit(3)", "tests, all"), tmp_path, 60)
    assert (failed.status, failed.last_line) == ("failed", "why")
    assert (tmp_path / "tests_all.log").read_text() == "why\n"
    skipped = gpu.run(python("", tool="no-such-tool"), tmp_path, 60)
    assert (skipped.status, skipped.last_line) == ("skipped", "no no-such-tool on the path")


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
    monkeypatch.setattr(gpu, "steps", lambda out, dry: done[::2])
    assert gpu.main(["--dry", "--out", str(tmp_path / "out")]) == 0


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
    assert len({step.name for step in gpu.steps(tmp_path, dry=False)}) == len(gpu.steps(tmp_path, dry=False))


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
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["kernel"], row["backend"]) for row in rows} >= {("rms_norm", "cpp"), ("rms_norm", "reference")}
