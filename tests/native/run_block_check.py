"""Builds tests/native/block_check.cu at the path it is given and, where there is a GPU, runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from foveate.testing.cuda_compile import find_nvcc

ROOT = Path(__file__).resolve().parents[2]


def build(output: Path, chip: str) -> str:
    """Compiles for one chip ("80", "90a"); returns what nvcc said, raises RuntimeError with it if it refused.

    FileNotFoundError without nvcc.
    """
    command = [find_nvcc(), "-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings"]
    command += [f"-gencode=arch=compute_{chip},code=sm_{chip}", "-Xcompiler", "-ffp-contract=off,-Wall,-fopenmp"]
    command += [f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "native" / "block_check.cu")]
    command += [str(ROOT / "csrc" / "common" / "device.cu"), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"expected block_check.cu to compile for sm_{chip}, got:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def chip_here() -> str:
    """That of the first GPU, "90a" without one."""
    if not torch.cuda.is_available():
        return "90a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major == 9 else "")


def main() -> int:
    output = Path(sys.argv[1])
    build(output, chip_here())
    if not torch.cuda.is_available():
        print("compiled; there is no GPU to run it")
        return 0
    return subprocess.run([str(output)], timeout=120).returncode


if __name__ == "__main__":
    raise SystemExit(main())
