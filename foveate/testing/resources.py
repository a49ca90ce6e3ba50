"""What a compiled GPU kernel uses, read from the text of NVIDIA's tools, and which of it is an error."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Bytes of shared memory that one thread block may use: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability", by the number of the chip without its letter.
SHARED_LIMITS = {"80": 163 << 10, "86": 99 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10}
TENSOR_MEMORY_COLUMNS = 512  # of sm_100: PTX ISA, "Tensor Memory Addressing"

# Matrix instructions by their names in machine code and in PTX.
MATRIX_INSTRUCTIONS = {
    "mma_sync": re.compile(r"[HIDQOB]MMA|(wmma\.)?mma\.sync\..*"),
    "wgmma": re.compile(r"[HIQB]GMMA|wgmma\.mma_async\..*"),
    "tcgen05": re.compile(r"UTC[A-Z]*MMA|tcgen05\.mma\..*"),
}


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one chip.

    registers: per thread. shared: bytes per thread block. stack: bytes of local memory per thread.
    spill_stores, spill_loads: bytes that the code moves to and from local memory, each instruction counted once.
    mma_sync, wgmma, tcgen05, loads_16: numbers of instructions (loads_16: from global memory, 16 bytes per
    thread or more).
    tensor_memory: columns. matrix: whether a matrix instruction is demanded. error: why it does not compile.
    """

    kernel: str
    chip: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    mma_sync: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    loads_16: int = 0
    tensor_memory: int = 0
    matrix: bool = False
    error: str = ""


def shared_limit(chip: str) -> int:
    """Bytes of shared memory that a thread block may use on "sm_90a". Raises ValueError for an unknown chip."""
    match = re.fullmatch(r"sm_(\d+)[a-z]?", chip)
    if match is None or match[1] not in SHARED_LIMITS:
        raise ValueError(f"expected sm_ and one of {tuple(SHARED_LIMITS)}, got {chip!r} (chip)")
    return SHARED_LIMITS[match[1]]


def problems_of(row: Row) -> list[str]:
    """What is wrong with a compiled kernel, one sentence each; empty if nothing is."""
    if row.error:
        return [f"{row.kernel} on {row.chip} does not compile: {row.error}"]
    found = []
    if row.stack or row.spill_stores or row.spill_loads:
        found.append(
            f"spills: {row.stack} bytes of local memory, {row.spill_stores} bytes stored, {row.spill_loads} loaded"
        )
    if row.shared > shared_limit(row.chip):
        found.append(f"uses {row.shared} bytes of shared memory of {shared_limit(row.chip)}")
    if row.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"uses {row.tensor_memory} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
    if row.matrix and not row.mma_sync + row.wgmma + row.tcgen05:
        found.append("has no matrix instruction")
    return [f"{row.kernel} on {row.chip} {sentence}" for sentence in found]


def table_of(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one line each, below a line of names."""
    names = [field.name for field in dataclasses.fields(Row) if field.name not in ("matrix", "error")]
    lines = [names] + [[str(getattr(row, name)) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


def print_report(rows: Sequence[Row], as_json: bool) -> int:
    """Prints the table and the problems, or both as one line of JSON; returns the exit code, 1 for problems."""
    problems = [problem for row in rows for problem in problems_of(row)]
    if as_json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "problems": problems}))
    else:
        print("\n".join([table_of(rows), *problems]))
    return 1 if problems else 0


_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_CHIP = re.compile(r"^\s*arch = (sm_\w+)")
# NOTE: predicates such as @!P0 or @!UP1 stand before the name; the parts of the name are joined by dots.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)")


def count_instructions(sass: str) -> dict[tuple[str, str], Counter[str]]:
    """(chip, function) -> the counts of Row's fields of these names, from the output of `cuobjdump -sass`.

    The chip is "" where the text names none before the function.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    chip, current = "", Counter[str]()
    for line in sass.splitlines():
        if match := _CHIP.match(line):
            chip = match[1]
        elif match := _FUNCTION.match(line):
            current = counts.setdefault((chip, match[1]), Counter())
        elif match := _INSTRUCTION.match(line):
            current.update(_classify(match[1]))
    return counts


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes; without any of them 4


def _classify(instruction: str) -> dict[str, int]:
    name, *modifiers = instruction.split(".")
    found = _matrix_kind(name)
    width = next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 4)
    if name == "STL":
        found["spill_stores"] = width
    if name == "LDL":
        found["spill_loads"] = width
    # Copies from global to shared memory move as much per thread as loads into registers do.
    if name in ("LDG", "LDGSTS") and width >= 16:
        found["loads_16"] = 1
    return found


def _matrix_kind(name: str) -> dict[str, int]:
    return {kind: 1 for kind, pattern in MATRIX_INSTRUCTIONS.items() if pattern.fullmatch(name)}


_STATEMENT = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)(.*)")
_PTX_LOAD = re.compile(r"ld\.global\S*\.(v2\.[a-z]64|v4\.[a-z](32|64)|v8\.[a-z]32|b128)")
_PTX_COPY_BYTES = re.compile(r"\[[^]]*\],\s*\[[^]]*\],\s*(?:0x10|16)\b")


def count_ptx(ptx: str) -> Counter[str]:
    """mma_sync, wgmma, tcgen05 and loads_16 of the one kernel in a PTX text; the assembler splits none of them."""
    counts = Counter[str]()
    for match in filter(None, map(_STATEMENT.match, ptx.splitlines())):
        name, operands = match.groups()
        counts.update(_matrix_kind(name))
        copy = name.startswith("cp.async.c") and _PTX_COPY_BYTES.search(operands)
        counts["loads_16"] += bool(_PTX_LOAD.fullmatch(name) or copy)
    return counts


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def parse_resource_usage(text: str) -> dict[str, dict[str, int]]:
    """Function -> registers, stack (with local memory) and static shared memory, of `cuobjdump -res-usage`."""
    found: dict[str, dict[str, int]] = {}
    for name, line in _sections(text, re.compile(r"^\s*Function (\S+):")):
        if match := _RESOURCES.search(line):
            registers, stack, shared, local = map(int, match.groups())
            found[name] = {"registers": registers, "stack": stack + local, "shared": shared}
    return found


def _sections(text: str, heading: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Each line with the heading that it stands below."""
    name = ""
    for line in text.splitlines():
        if match := heading.match(line):
            name = match[1]
        yield name, line


def cuobjdump() -> str:
    """Path of the tool: the CUDA toolkit's, else Triton's own. Raises FileNotFoundError if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton.backends.nvidia

    bundled = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not bundled.is_file():
        raise FileNotFoundError(f"expected cuobjdump on PATH or as {bundled}")
    return str(bundled)


def dump(option: str, binary: Path) -> str:
    """Output of `cuobjdump <option> <binary>`."""
    result = subprocess.run([cuobjdump(), option, str(binary)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"cuobjdump {option}: {result.stderr.strip()}")
    return result.stdout
