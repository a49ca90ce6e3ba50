"""What a row says about the machine, and the ceilings it is set against."""

from __future__ import annotations

import shutil
import subprocess

import machine
import pytest
import timing
import torch
from floors import Floor
from machine import Ceilings
from timing import Timer

CPU = torch.device("cpu")


def test_environment():
    found = machine.environment(CPU)
    assert set(found) == {"device", "driver", "torch", "triton", "python", "threads", "commit"}
    assert found["device"]
    assert found["driver"] is None
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())


def test_commit(monkeypatch, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FOVEATE_COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("FOVEATE_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    source = tmp_path / "source.py"
    source.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = machine.commit()
    assert clean.isalnum()
    assert len(clean) >= 7
    results = tmp_path / "benchmarks" / "results" / "rows.jsonl"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    assert machine.commit() == clean  # a row that was just written
    source.write_text("2")
    assert machine.commit() == f"{clean}-dirty"


def test_floor_takes_the_larger_bandwidth():
    floor = Floor(reads=6000, writes=4000, flops=10**6)
    assert Ceilings(copy_gb_s=10, read_gb_s=5, matmul_tflop_s=10).floor_us(floor) == pytest.approx(1.0)
    assert Ceilings(copy_gb_s=10, read_gb_s=20, matmul_tflop_s=10).floor_us(floor) == pytest.approx(0.5)
    assert Ceilings(copy_gb_s=10, read_gb_s=20, matmul_tflop_s=1).floor_us(floor) == pytest.approx(1.0)


def test_ceilings_count_bytes_and_operations():
    """With a clock that is read once a millisecond every call takes 1 ms."""
    ticks = iter(range(10**6))
    found = machine.measure_ceilings(Timer(CPU, timing.QUICK, lambda: next(ticks) * 1e-3), quick=True)
    moved = 4 * (4 << 20)  # bytes of a block
    assert found.copy_gb_s == pytest.approx(2 * moved / 1e-3 / 1e9)
    assert found.read_gb_s == pytest.approx(moved / 1e-3 / 1e9)
    assert found.matmul_tflop_s == pytest.approx(2 * 256**3 / 1e-3 / 1e12)
    assert Ceilings(12345.678, 1, 2).row()["copy_gb_s"] == 12350
