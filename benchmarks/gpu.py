"""Everything that needs a GPU, in one call of less than eight minutes: build, self-test, tests, benchmarks, sanitizer.

    make gpu OUT=folder      with the python3, torch, triton and nvcc that are there; nothing is downloaded
    make gpu DRY=1           the same steps on a CPU and with small shapes: a rehearsal

The folder then holds rows.jsonl (the benchmarks' raw rows), tests.xml, summary.json and logs.tar.gz, as far as the
steps have come. A step that fails, or takes longer than its limit, does not stop the others; the exit status is 1 if
one did, or if one was skipped for want of a tool, which only a rehearsal may be. FOVEATE_COMMIT names the commit in the
rows where there is no git.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # the package as installed, so that nothing is read from the source folders
# By name, what of its rows fits into the time: regular expressions.
BENCHMARKS = {
    "layers": "rows=(8|8192),",
    "sampling": "V=62,|N=8,V=151936|N=256,V|from_hidden",
    "paged_attention": "",
    "policy_loss": "N=12,|N=8192,D=2048,",
    "vision_prune": "spans=(1|2|64),|images|T=(40|1360),",
    "prune_rollout": "(visionzip|fastv) keep=0.5 .*batch=8$",
}
SANITIZER = "compute-sanitizer"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Of the tests of kernels, those small enough for a sanitizer.
SANITIZED = {
    "layers": "rows9-D129 or rows5-D136",
    "sampling_backends": "271-everything or 5003-filters",
    "sample_from_hidden_hopper": "65-72-4096",
}
RESULTS = ("rows.jsonl", "tests.xml", "summary.json", "logs.tar.gz")
TOTAL_SECONDS, REHEARSAL_SECONDS = 450.0, 720.0  # the latter in Triton's interpreter, on a few cores


@dataclass(frozen=True)
class Step:
    """One command. limit: seconds. tool: an executable without which the step is skipped, by name.

    environment: what is added to that of every step.
    """

    name: str
    command: Sequence[str]
    limit: float
    tool: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


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
    report, blocks = f"--junitxml={out / 'tests.xml'}", str(BUILD / "block_check")
    found = [
        Step("build", [*python, *install, "--target", str(SITE), str(ROOT)], 150),
        Step("doctor", [*python, "-c", doctor], 60),
        # Triton's interpreter, which a rehearsal runs in, takes longer than a GPU.
        Step("tests", [*pytest, "not slow", report, "tests/kernels", "tests/benchmarks"], 400 if dry else 150),
    ]
    for name, pattern in BENCHMARKS.items():
        script = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--device", device]
        rows = ["--output", str(out / "rows.jsonl"), "--filter", pattern]
        found.append(Step(f"bench_{name}", [*script, *rows, *(["--quick"] if dry else [])], 75))
    found.append(Step("blocks", [*python, str(ROOT / "tests" / "native" / "run_block_check.py"), blocks], 60, "nvcc"))
    # All memory of block_check, the margins around its rows too, is copied from the host: initcheck flags none of it.
    for tool in SANITIZERS:
        found.append(Step(f"blocks, {tool}", [*sanitizer(tool), blocks], 40, SANITIZER))
    kernels = [*pytest, "gpu", *(f"tests/kernels/test_{name}.py" for name in SANITIZED), "-k"]
    # A tensor cut from a larger block of torch's cache may be overrun within that block, and memcheck sees nothing.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    chosen = " or ".join(SANITIZED.values())
    found.append(Step("kernels, memcheck", [*sanitizer("memcheck"), *kernels, chosen], 90, SANITIZER, uncached))
    shared = [*sanitizer("racecheck"), *kernels, SANITIZED["sampling_backends"]]  # whose rows share bins and sums
    found.append(Step("sampling, racecheck", shared, 60, SANITIZER))
    return found


def sanitizer(tool: str) -> list[str]:
    return [SANITIZER, "--tool", tool, "--error-exitcode", "9"]


def find_tool(name: str) -> str | None:
    """Path of an executable, found as setup.py finds nvcc: named by NVCC, on PATH, or where CUDA is installed."""
    named = os.environ.get("NVCC") if name == "nvcc" else None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [named, name, *(f"{home}/bin/{name}" for home in homes if home)]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def run(step: Step, logs: Path, limit: float) -> Outcome:
    """Runs a step; its output goes to a log of its name."""
    log = logs / f"{step.name.replace(', ', '_')}.log"
    tool = find_tool(step.tool) if step.tool else None
    if step.tool and tool is None:
        return Outcome(step.name, "skipped", 0.0, f"found no {step.tool}")
    command = [tool if word == step.tool else word for word in step.command]
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(), **step.environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(max(1.0, min(step.limit, limit))) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step.name, status, round(time.monotonic() - start, 1), lines[-1].strip() if lines else "")


def save(out: Path, logs: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes summary.json and logs.tar.gz: after each step, so that they are there if the machine is taken away."""
    (out / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(logs, arcname="logs")


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
    out, logs = options.out.resolve(), BUILD / "logs"
    out.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(BUILD, ignore_errors=True)
    logs.mkdir(parents=True)
    start = time.monotonic()
    outcomes: list[Outcome] = []
    total = REHEARSAL_SECONDS if options.dry else TOTAL_SECONDS
    for step in steps(out, options.dry):
        outcomes.append(run(step, logs, total - (time.monotonic() - start)))
        save(out, logs, outcomes)
        print(f"{outcomes[-1].seconds:6.1f} s  {outcomes[-1].status:<11} {step.name}", flush=True)
    print(f"\n{time.monotonic() - start:.0f} s in all; logs and rows in {out}")
    return exit_status(outcomes, options.dry)


def exit_status(outcomes: Sequence[Outcome], dry: bool) -> int:
    """Prints what became of every step. What is skipped has not been looked at: only a rehearsal may do so."""
    for outcome in outcomes:
        print(f"  {outcome.name:<20} {outcome.status:<11} {outcome.last_line[:120]}")
    allowed = ("passed", "skipped") if dry else ("passed",)
    bad = [outcome for outcome in outcomes if outcome.status not in allowed]
    for outcome in bad:
        why = ", which counts as a failure where there is a GPU" if outcome.status == "skipped" else ""
        print(f"{outcome.name}: {outcome.status}{why}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
