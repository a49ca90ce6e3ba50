"""Compiles CUDA sources with nvcc for every chip, without a GPU, and reports what each kernel uses.

    python -P -m foveate.testing.cuda_compile [--chips 80 90a 100] [--sources FILE ...] [--json]

Without --sources: all of csrc/. Prints a table; the exit code is 1, and the rows at fault are named, if a kernel spills
or uses more shared memory than the chip has. A warning is an error, as is a machine without nvcc.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.testing.resources import Row, count_instructions, dump, print_report

CHIPS = ("80", "90a", "100")
CSRC = Path(__file__).resolve().parents[2] / "csrc"  # of a source tree; an installed copy has none
# Those of the build (NVCC_FLAGS in setup.py), and the report of what is used.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v")


def find_nvcc() -> str:
    """Path of nvcc: NVCC, on PATH, or below CUDA_HOME, as the build finds it. FileNotFoundError if there is none."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for place in (os.environ.get("NVCC"), "nvcc", *(f"{home}/bin/nvcc" for home in homes)):
        if place and (found := shutil.which(place)):
            return found
    raise FileNotFoundError(f"expected nvcc as NVCC, on PATH, or in bin/ of one of {homes}")


def cuda_sources(folder: Path = CSRC) -> list[Path]:
    """Every .cu below `folder`. Raises FileNotFoundError where there is none."""
    sources = sorted(folder.rglob("*.cu"))
    if not sources:
        raise FileNotFoundError(f"expected CUDA sources in {folder}")
    return sources


def compile_source(source: Path, chips: Sequence[str] = CHIPS, options: Sequence[str] = ()) -> list[Row]:
    """A row per kernel of `source` and chip ("90a" for sm_90a), by one call of nvcc.

    options: more of nvcc's. Raises RuntimeError with nvcc's words if it refuses or warns, and FileNotFoundError
    without nvcc.
    """
    targets = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "source.o"
        command = [find_nvcc(), *FLAGS, *targets, *options, f"-I{CSRC}", "-c", str(source), "-o", str(binary)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"expected {source.name} to compile, got:\n{result.stdout}{result.stderr}")
        rows = parse_ptxas(result.stderr)
        counts = count_instructions(dump("-sass", binary)) if rows else {}
    names = demangle([row.kernel for row in rows])
    # The spills are those that ptxas told; the other counts stand in the machine code alone.
    return [
        dataclasses.replace(row, kernel=f"{source.stem}: {name}", **_matrix_and_loads(counts, row))
        for row, name in zip(rows, names, strict=True)
    ]


def _matrix_and_loads(counts: Mapping[tuple[str, str], Mapping[str, int]], row: Row) -> dict[str, Any]:
    own = counts.get((row.chip, row.kernel), {})  # a function stands in the code of its callers
    return {name: own.get(name, 0) for name in ("mma_sync", "wgmma", "tcgen05", "loads_16")}


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_FUNCTION = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_ptxas(text: str) -> list[Row]:
    """A row per kernel, and per function that was not inlined, for each chip, from the output of `ptxas -v`.

    Names are mangled; functions have no registers of their own. Raises ValueError where those of a kernel are missing.
    """
    entries: set[tuple[str, str]] = set()
    found: dict[tuple[str, str], dict[str, Any]] = {}
    chip, values = "", dict[str, Any]()
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            chip = match[2]
            entries.add((match[1], chip))
        elif match := _FUNCTION.search(line):
            values = found.setdefault((match[1], chip), {})
        elif match := _STACK.search(line):
            values.update(zip(("stack", "spill_stores", "spill_loads"), map(int, match.groups()), strict=True))
        elif match := _USED.search(line):
            values["registers"] = int(match[1])
            shared = _SHARED.search(line)
            values["shared"] = int(shared[1]) if shared else 0
    for entry in entries:
        if not {"stack", "registers"} <= found.get(entry, {}).keys():
            raise ValueError(f"expected stack and registers of {' for '.join(entry)}, got:\n{text}")
    return [Row(name, chip, **used) for (name, chip), used in found.items()]


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names without the types of result and arguments, by c++filt; as they are where it is not installed."""
    if not names or shutil.which("c++filt") is None:
        return list(names)
    result = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [name.removeprefix("void ") for name in result.stdout.splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command line `arguments`: 0, or 1 if a row is at fault."""
    parser = argparse.ArgumentParser(prog="cuda_compile", description="Compile CUDA sources without a GPU.")
    parser.add_argument("--chips", nargs="+", default=CHIPS, metavar="N", help="90a means sm_90a")
    parser.add_argument("--json", action="store_true", help="print one line of JSON in place of the table")
    parser.add_argument("--sources", nargs="+", type=Path, metavar="FILE", help="in place of all of csrc/")
    options = parser.parse_args(arguments)
    rows = [row for source in options.sources or cuda_sources() for row in compile_source(source, options.chips)]
    return print_report(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
