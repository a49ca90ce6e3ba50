"""Everything that needs a GPU, in one call of less than eight minutes: build, self-test, tests, sanitizer, benchmarks.

    make gpu OUT=folder      with the python3, torch, triton and nvcc that are there; nothing is downloaded
    make gpu DRY=1           the same steps on a CPU and with small shapes: a rehearsal

Logs, test reports and the benchmarks' raw rows are left in the folder. A step that fails, or takes longer than its
limit, does not stop the others; the exit status is 1 if one did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # the package as installed, so that nothing is read from the source folders
BENCHMARKS = ("layers", "sampling", "paged_attention")
TOTAL_SECONDS = 450.0


@dataclass(frozen=True)
class Step:
    """One command. limit: seconds. tool: an executable without which the step is skipped, by name."""

    name: str
    command: Sequence[str]
    limit: float
    tool: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step: passed, failed, out of time, or skipped; seconds; the last line it printed."""

    name: str
    status: str
    seconds: float
    last_line: str


def steps(out: Path, dry: bool) -> list[Step]:
    """All steps, in their order."""
    python = [sys.executable, "-P"]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m"]
    device = "cpu" if dry else "cuda"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--upgrade"]
    doctor = "import sys; from foveate.rollout.cli import main; sys.exit(main(['doctor']))"
    check = [sys.executable, "-P", str(ROOT / "tests" / "native" / "run_block_check.py"), str(BUILD / "block_check")]
    selected = "not slow" if dry else "not slow and (gpu or not gpu)"
    found = [
        Step("build", [*python, *install, "--target", str(SITE), str(ROOT)], 150),
        Step("doctor", [*python, "-c", doctor], 60),
        Step("tests", [*pytest, selected, f"--junitxml={out / 'tests.xml'}", "tests/kernels", "tests/benchmarks"], 150),
        Step("blocks", check, 60, tool="nvcc"),
    ]
    for tool in ("memcheck", "racecheck", "synccheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        found.append(Step(f"blocks, {tool}", [*sanitizer, str(BUILD / "block_check")], 60, tool="compute-sanitizer"))
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    layers = [*pytest, "gpu", "tests/kernels/test_layers.py", "-k", "rows9-D129 or rows5-D136"]
    found.append(Step("kernels, memcheck", [*sanitizer, *layers], 90, tool="compute-sanitizer"))
    for name in BENCHMARKS:
        script = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--device", device]
        rows = ["--output", str(out / "rows.jsonl")]
        found.append(Step(f"bench_{name}", [*script, *rows, *(["--quick"] if dry else [])], 120))
    return found


def run(step: Step, out: Path, limit: float) -> Outcome:
    """Runs a step; its output goes to a log of its name."""
    log = out / f"{step.name.replace(', ', '_')}.log"
    if step.tool is not None and shutil.which(step.tool) is None:
        return Outcome(step.name, "skipped", 0.0, f"no {step.tool} on the path")
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if process.wait(max(1.0, min(step.limit, limit))) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step.name, status, round(time.monotonic() - start, 1), lines[-1].strip() if lines else "")


def environment() -> dict[str, str]:
    """That of every step: the package as installed, compiled for the GPU that is here (a rehearsal's is sm_90a)."""
    chip = gpu_chip()
    build = {"FOVEATE_CUDA": "auto" if chip is None else "1", "FOVEATE_CUDA_ARCHS": chip or "90a"}
    return {**os.environ, **build, "PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1"}


def gpu_chip() -> str | None:
    """ "90a" and the like of the first GPU; None without one."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return None
    reply = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if reply.returncode != 0 or not reply.stdout.strip():
        return None
    chip = reply.stdout.split()[0].replace(".", "")
    return f"{chip}a" if chip == "90" else chip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of logs and rows")
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU")
    options = parser.parse_args(arguments)
    if not options.dry and gpu_chip() is None:
        print("make gpu: expected an NVIDIA GPU, nvidia-smi shows none; rehearse with DRY=1", file=sys.stderr)
        return 1
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    (out / "rows.jsonl").unlink(missing_ok=True)
    start = time.monotonic()
    outcomes = []
    for step in steps(out, options.dry):
        outcomes.append(run(step, out, TOTAL_SECONDS - (time.monotonic() - start)))
        print(f"{outcomes[-1].seconds:6.1f} s  {outcomes[-1].status:<11} {step.name}", flush=True)
    (out / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    print(f"\n{time.monotonic() - start:.0f} s in all; logs and rows in {out}")
    for outcome in outcomes:
        print(f"  {outcome.name:<20} {outcome.status:<11} {outcome.last_line[:120]}")
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
