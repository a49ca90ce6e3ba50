"""Maps the top-level folders to one import package and builds the native extension.

`rollout/` is imported as `foveate.rollout`, `kernels/` as `foveate.kernels`; see docs/decisions.md.

Environment variables of the build:

    FOVEATE_CUDA        auto (default: with CUDA if nvcc is found), 1 (or fail), 0 (C++ only)
    FOVEATE_CUDA_ARCHS  chips to compile for, default "80 90a 100"
    FOVEATE_CPU_FLAGS   compiler flags for the CPU, default -march=x86-64-v3 on x86-64
    NVCC                the compiler of the CUDA sources, default nvcc on the path, else under CUDA_HOME
"""

import os
import platform
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CPU_FLAGS = "-march=x86-64-v3" if platform.machine() == "x86_64" else ""
# No contraction to fused multiply-adds, on either side: the CPU and the GPU compute the same bits.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fno-wrapv",  # which the flags of Python bring: with it, loops over int stay scalar
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings", "-cudart", "static"]
INCLUDE = ["csrc", "bindings"]
CUDA_ARCHS = os.environ.get("FOVEATE_CUDA_ARCHS", "80 90a 100").replace(";", " ").split()


def find_nvcc() -> str | None:
    """Path of nvcc; None where the build is to do without. RuntimeError if it is demanded but absent."""
    wanted = os.environ.get("FOVEATE_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise RuntimeError(f"expected FOVEATE_CUDA to be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [os.environ.get("NVCC"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    nvcc = next((found for place in places if place and (found := shutil.which(place))), None)
    if nvcc is None and wanted == "1":
        raise RuntimeError("expected nvcc because of FOVEATE_CUDA=1, found none on PATH, in NVCC or under CUDA_HOME")
    return nvcc


class BuildNative(build_ext):
    """Compiles csrc/**/*.cu with nvcc, where there is one, and links them in; everything else is a plain extension."""

    def build_extension(self, extension: Extension) -> None:
        nvcc = find_nvcc()
        # A build left by other settings is not up to date, however new it is.
        settings = repr((nvcc, CUDA_ARCHS if nvcc else None, extension.extra_compile_args))
        stamp = Path(self.build_temp, "settings.txt")
        if not stamp.is_file() or stamp.read_text() != settings:
            self.force = True
        if nvcc is None:
            print("foveate._C: C++ only (no nvcc, or FOVEATE_CUDA=0)")
        else:
            self.add_cuda(extension, nvcc)
        super().build_extension(extension)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(settings)

    def add_cuda(self, extension: Extension, nvcc: str) -> None:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
        reply = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        version = re.search(r"release ([\d.]+)", reply).group(1)
        print(f"foveate._C: with CUDA {version} for {', '.join(CUDA_ARCHS)}")
        for source in sorted(glob("csrc/**/*.cu", recursive=True)):
            target = Path(self.build_temp) / Path(source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [nvcc, *NVCC_FLAGS, *targets, *(f"-I{folder}" for folder in INCLUDE)]
            command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off", "-c", source, "-o", str(target)]
            print(" ".join(command))
            subprocess.run(command, check=True)
            extension.extra_objects.append(str(target))
        quoted = [("FOVEATE_WITH_CUDA", f'"{version}"'), ("FOVEATE_CUDA_ARCHS", f'"{" ".join(CUDA_ARCHS)}"')]
        extension.define_macros += quoted
        extension.library_dirs.append(cuda_library_dir(nvcc))
        extension.libraries += ["cudart_static", "rt", "pthread", "dl"]


def cuda_library_dir(nvcc: str) -> str:
    """The folder of libcudart_static.a. nvcc on the path may be a script, so that it is asked where it lives."""
    reply = subprocess.run([nvcc, "--dryrun", "-o", os.devnull, "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", reply, re.MULTILINE)
    home = Path(top.group(1).strip() if top else Path(nvcc).resolve().parents[1])
    for folder in (home / "lib64", home / "targets" / f"{platform.machine()}-linux" / "lib", home / "lib"):
        if (folder / "libcudart_static.a").is_file():
            return str(folder)
    raise RuntimeError(f"expected libcudart_static.a beside nvcc under {home}, found none")


native = Extension(
    "foveate._C",
    sources=sorted([*glob("csrc/*.cpp"), *glob("bindings/*.cpp")]),
    depends=sorted(path for end in ("h", "cuh", "cu") for path in glob(f"[cb][si]*/**/*.{end}", recursive=True)),
    include_dirs=[*INCLUDE, pybind11.get_include()],
    language="c++",
    extra_compile_args=[*CXX_FLAGS, *os.environ.get("FOVEATE_CPU_FLAGS", CPU_FLAGS).split()],
    extra_link_args=["-fopenmp"],
)

rollout = ["foveate.rollout", *(f"foveate.rollout.{name}" for name in find_packages("rollout"))]
kernels = ["foveate.kernels", *(f"foveate.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=["foveate", "foveate.testing", *rollout, *kernels],
    package_dir={"foveate": "foveate", "foveate.rollout": "rollout", "foveate.kernels": "kernels"},
    package_data={"foveate": ["py.typed", "*.pyi"]},
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative},
)
