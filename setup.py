"""Maps the top-level folders to one import package and builds the native extension.

`rollout/` is imported as `foveate.rollout`, `kernels/` as `foveate.kernels`; see docs/decisions.md.
"""

from glob import glob

import pybind11
from setuptools import Extension, find_packages, setup

rollout = ["foveate.rollout", *(f"foveate.rollout.{name}" for name in find_packages("rollout"))]
kernels = ["foveate.kernels", *(f"foveate.kernels.{name}" for name in find_packages("kernels"))]

native = Extension(
    "foveate._C",
    sources=sorted([*glob("csrc/*.cpp"), *glob("bindings/*.cpp")]),
    depends=sorted([*glob("csrc/*.h"), *glob("bindings/*.h")]),
    include_dirs=["csrc", "bindings", pybind11.get_include()],
    language="c++",
    extra_compile_args=["-std=c++17", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

setup(
    packages=["foveate", *rollout, *kernels],
    package_dir={"foveate": "foveate", "foveate.rollout": "rollout", "foveate.kernels": "kernels"},
    package_data={"foveate": ["py.typed", "*.pyi"]},
    ext_modules=[native],
)
