"""The machine that is measured: what it is, what runs on it, and the fastest it can copy, read and multiply."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from floors import Floor
from timing import Timer

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device) -> dict[str, Any]:
    """What a row was measured on and with; `driver` is None on a CPU."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def commit() -> str:
    """Short hash of the checkout, with "-dirty" where files differ from it; outside one FOVEATE_COMMIT or "unknown"."""
    git = ("git", "-C", str(ROOT))
    found = _output(*git, "rev-parse", "--short", "HEAD")
    if found is None:
        return os.environ.get("FOVEATE_COMMIT") or "unknown"
    # Rows that an earlier benchmark of the same run has appended do not count.
    changed = _output(*git, "status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return found + ("-dirty" if changed else "")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    named = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """First line that a command prints; None if it is missing, fails or prints nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.splitlines()), None)


@dataclass(frozen=True)
class Ceilings:
    """The best this machine did: bytes read and written per second of a copy, of a read, and the matrix rate."""

    copy_gb_s: float
    read_gb_s: float
    matmul_tflop_s: float

    def floor_us(self, floor: Floor) -> float:
        """The larger bandwidth counts, so that the floor of a kernel that mostly reads stays a lower bound."""
        return floor.seconds(max(self.copy_gb_s, self.read_gb_s) * 1e9, self.matmul_tflop_s * 1e12) * 1e6

    def row(self) -> dict[str, float]:
        """Three significant digits would hide drift; four do not."""
        return {name: float(f"{value:.4g}") for name, value in vars(self).items()}


def measure_ceilings(timer: Timer, quick: bool) -> Ceilings:
    """Fastest samples, on random data: zeros multiply faster than numbers do."""
    device, on_gpu = timer.device, timer.device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    elements = 4 << 20 if quick else max(timer.cache, 64 << 20)  # float32: at least four times the cache
    blocks = [torch.randn(elements, device=device, generator=generator) for _ in range(2)]
    orders = [(blocks[0], blocks[1]), (blocks[1], blocks[0])]
    # amax: a reduction without arithmetic that the read would have to wait for.
    runs = {"copy": lambda source, target: target.copy_(source), "read": lambda source, _: source.amax()}
    seconds = {name: min(timing.samples) * 1e-6 for name, timing in timer.measure(runs, orders).items()}
    moved = elements * blocks[0].element_size()
    size = (2048 if quick else 8192) if on_gpu else (256 if quick else 2048)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    factors = [tuple(torch.randn(2, size, size, device=device, generator=generator).to(dtype)) for _ in range(2)]
    product = min(timer.measure({"matmul": torch.mm}, factors)["matmul"].samples) * 1e-6
    return Ceilings(2 * moved / seconds["copy"] / 1e9, moved / seconds["read"] / 1e9, 2 * size**3 / product / 1e12)
