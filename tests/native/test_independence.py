"""foveate._C needs neither libtorch nor torch: one build serves every version of it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from foveate import _C

LIBTORCH = ("libtorch", "libc10", "torch_python")
NAMESPACES = ("at::", "c10::", "torch::", "caffe2::")


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_linked_libraries():
    libraries = output_of("ldd", _C.__file__)
    assert "libc." in libraries
    assert not [line for line in libraries.splitlines() if any(name in line for name in LIBTORCH)]


def test_no_cuda_library_is_needed():
    """The CUDA runtime is linked in, and it looks for the driver only when it is used: imports without a GPU."""
    libraries = output_of("ldd", _C.__file__)
    assert "not found" not in libraries
    assert not [line for line in libraries.splitlines() if "libcuda" in line or "libnv" in line]


def test_symbols():
    symbols = output_of("nm", "-DC", _C.__file__)
    assert "PyInit__C" in symbols
    names = [line.split(maxsplit=2)[-1] for line in symbols.splitlines()]
    assert not [name for name in names if name.removeprefix("U ").startswith(NAMESPACES)]


def test_import_without_torch():
    code = """
import sys
sys.modules["torch"] = None  # any import of torch now raises
from foveate import _C
pool = _C.PagePool(3)
assert pool.allocate(2) == [0, 1] and pool.num_free == 1
loaded = [name for name in sys.modules if name.split(".")[0] in ("numpy", "transformers", "triton")]
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
