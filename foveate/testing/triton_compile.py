"""Compiles every registered Triton kernel for every chip, without a GPU, and reports what each uses.

    python -P -m foveate.testing.triton_compile [--chips 80 90 100] [--family layers] [--file kernels.py] [--json]

Prints a table; the exit code is 1, and the rows at fault are named, if something does not compile, spills, uses more
shared memory than the chip has, or lacks matrix instructions that it must have. It runs in a process of its own:
under TRITON_INTERPRET nothing can be compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.kernels.targets import TritonTarget, triton_targets
from foveate.testing.resources import (
    Row,
    count_instructions,
    count_ptx,
    dump,
    parse_resource_usage,
    print_report,
    shared_limit,
)

CHIPS = (80, 90, 100)


def compile_targets(targets: Iterable[tuple[str, TritonTarget]], chips: Sequence[int] = CHIPS) -> list[Row]:
    """A row per target and chip (80 for sm_80), in order; a target that does not compile has its `error` set.

    targets: (family, target), as `triton_targets()` yields them. Raises RuntimeError under TRITON_INTERPRET, and
    ValueError for a chip whose limits are unknown.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("expected a process without TRITON_INTERPRET, where Triton compiles nothing")
    for chip in chips:
        shared_limit(f"sm_{chip}")
    return [_compile(f"{family}.{target.name}", target, chip) for family, target in targets for chip in chips]


def _compile(name: str, target: TritonTarget, chip: int) -> Row:
    row = Row(name, f"sm_{chip}", matrix=target.matrix)
    try:
        metadata, code = _binary(target, chip)
    except Exception as error:  # of many kinds: the kernel's own, the compiler's, the assembler's
        return dataclasses.replace(row, error=" ".join(f"{type(error).__name__}: {error}".split()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code["cubin"])
        (usage,) = parse_resource_usage(dump("-res-usage", path)).values()
        counts: dict[str, Any] = dict(count_ptx(code["ptx"]))
        if usage["stack"]:  # only then are there any, and the machine code takes a while to print
            (spills,) = count_instructions(dump("-sass", path)).values()
            counts.update({name: spills[name] for name in ("spill_stores", "spill_loads")})
    return dataclasses.replace(
        row,
        registers=usage["registers"],
        shared=metadata.shared,  # Triton's is dynamic, of which the binary does not know
        stack=usage["stack"],
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        **counts,
    )


def _binary(target: TritonTarget, chip: int) -> tuple[Any, Mapping[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = target.kernel.arg_names
    unknown = {*target.signature, *target.constants, *target.divisible} - {*names}
    missing = {*names} - {*target.signature, *target.constants}
    if unknown or missing:
        raise ValueError(f"expected the arguments {names}, got no {sorted(missing)} and beyond them {sorted(unknown)}")
    signature = {name: "constexpr" if name in target.constants else target.signature[name] for name in names}
    # As the launcher finds them: without, there are no 16-byte accesses and no asynchronous copies.
    divisible = [name for name in names if signature[name].startswith("*") or name in target.divisible]
    source = ASTSource(
        target.kernel,
        signature,
        constexprs=dict(target.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": target.num_warps, "num_stages": target.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return compiled.metadata, compiled.asm


@dataclasses.dataclass(frozen=True)
class Report:
    """rows: one per target and chip. problems: what is wrong with them. output: all that the child wrote."""

    rows: list[Row]
    problems: list[str]
    exit_code: int
    output: str


def compile_in_child(*arguments: str, timeout: float = 600) -> Report:
    """Runs this module with `arguments` in a process without TRITON_INTERPRET.

    timeout: seconds. Raises RuntimeError with what the child wrote if it breaks off.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "foveate.testing.triton_compile", "--json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    try:
        report = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr}") from None
    rows = [Row(**row) for row in report["rows"]]
    return Report(rows, report["problems"], result.returncode, result.stdout + result.stderr)


def targets_of_file(path: Path) -> list[tuple[str, TritonTarget]]:
    """The TARGETS of a Python file that is in no package; its name stands for the family."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a Python file, got {path} (path)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return [(path.stem, target) for target in module.TARGETS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command line `arguments`: 0, or 1 if a row is at fault."""
    parser = argparse.ArgumentParser(prog="triton_compile", description="Compile all Triton kernels without a GPU.")
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS, metavar="N", help="80 means sm_80")
    parser.add_argument("--family", help="of this kernel family only")
    parser.add_argument("--file", type=Path, help="the TARGETS of this file in place of the registered ones")
    parser.add_argument("--json", action="store_true", help="print one line of JSON in place of the table")
    options = parser.parse_args(arguments)
    targets = targets_of_file(options.file) if options.file else list(triton_targets())
    chosen = [(family, target) for family, target in targets if options.family in (None, family)]
    if not chosen:
        parser.error(f"expected one of {sorted({family for family, _ in targets})}, got {options.family!r} (--family)")
    return print_report(compile_targets(chosen, options.chips), options.json)


if __name__ == "__main__":
    sys.exit(main())
