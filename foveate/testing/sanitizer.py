"""C++ under AddressSanitizer and UndefinedBehaviorSanitizer: how programs are built with them, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fopenmp")
# "undefined" leaves out the cast of a float that fits no integer.
SANITIZE = (
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)


def compiler() -> str:
    """The C++ compiler: CXX, g++ or c++. Raises FileNotFoundError if there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise FileNotFoundError("expected a C++ compiler: CXX, g++ or c++")


def build_sanitized(
    sources: Sequence[Path],
    output: Path,
    defines: Sequence[str] = (),
    includes: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Builds `output` from C++ sources and objects; an output "*.o" is an object of one source. Returns `output`.

    defines: "NAME=value". includes: folders of headers. flags: further ones. Raises RuntimeError with the compiler's
    words if it refuses.
    """
    options = [f"-D{define}" for define in defines] + [f"-I{path}" for path in includes]
    options += ["-c"] if output.suffix == ".o" else []
    command = [compiler(), *FLAGS, *SANITIZE, *flags, *options, *map(str, sources), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"expected {output.name} to compile, got:\n{result.stderr}")
    return output


def run_sanitized(program: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs a program built by `build_sanitized`; a report is on its stderr, with a return code other than 0.

    Parallel loops run on two threads, on any machine. timeout: seconds.
    """
    # NOTE: a preloaded library would be in front of the sanitizer's runtime, which then refuses to start.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"OMP_NUM_THREADS": "2"}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, timeout=timeout)
