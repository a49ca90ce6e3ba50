"""Wheel, sdist and editable install carry everything, and only what is ours."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"foveate": "foveate", "rollout": "foveate/rollout", "kernels": "foveate/kernels"}
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "math_verify": "math-verify", "yaml": "pyyaml"}
IMPORTS = "import foveate, foveate.rollout.pages, foveate.kernels.sampling, foveate._C"


def python_files() -> set[str]:
    """Every Python file of the package, by its path in an installed copy."""
    return {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


# NOTE: -P keeps the root off sys.path, where setuptools would find our folder in place of a package it has plugins of.
def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def setup_values() -> dict:
    """What setup.py hands to setuptools."""
    code = """
import json
from distutils.core import run_setup
import setuptools
dist = run_setup("setup.py", stop_after="init")
(native,) = dist.ext_modules
print(json.dumps({"packages": dist.packages, "sources": native.sources, "depends": native.depends}))
"""
    return json.loads(run(sys.executable, "-P", "-W", "ignore", "-c", code, cwd=ROOT).splitlines()[-1])


def test_every_folder_with_code_is_a_package(setup_values):
    expected = {str(Path(path).parent).replace("/", ".") for path in python_files()}
    assert set(setup_values["packages"]) == expected


def test_every_native_file_is_built(setup_values):
    native = [path for folder in ("csrc", "bindings") for path in (ROOT / folder).rglob("*") if path.is_file()]
    others = {".h", ".cuh", ".cu"}
    assert set(setup_values["sources"]) == {str(p.relative_to(ROOT)) for p in native if p.suffix == ".cpp"}
    assert set(setup_values["depends"]) == {str(p.relative_to(ROOT)) for p in native if p.suffix in others}
    assert {path.suffix for path in native} == others | {".cpp"}


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("demo", "judge", "parquet", "rollout", "train")
    declared = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in declared}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                roots = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"foveate"}
                assert {DISTRIBUTIONS.get(root, root).lower() for root in roots} <= names, path


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, so that nothing is built inside the working tree."""
    target = tmp_path_factory.mktemp("packaging") / "tree"
    ignored = shutil.ignore_patterns(".venv*", ".git", ".*cache", ".hypothesis", "__pycache__", "*.so", "build", "runs")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    code = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-P", "-c", code, "dist", cwd=tree).splitlines()[-1]
    return tree / "dist" / name


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, which therefore has all that a build needs."""
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "-w", str(target), str(sdist), cwd=target)
    (path,) = target.iterdir()
    return path


@pytest.mark.slow
def test_sdist_has_every_source(sdist, tree):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("foveate", "rollout", "kernels", "csrc", "bindings", "tests", "benchmarks", "examples", "docs")
    expected = {
        str(path.relative_to(tree))
        for folder in folders
        for path in (tree / folder).rglob("*")
        if path.is_file() and "egg-info" not in str(path)
    }
    top = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile", "MANIFEST.in"}
    assert expected | top <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


@pytest.mark.slow
def test_wheel_has_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"foveate", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    assert {name for name in names if name.endswith(".py")} == python_files()
    assert {"foveate/py.typed", "foveate/_C.pyi"} <= set(names)
    assert [name for name in names if re.fullmatch(r"foveate/_C\..*\.so", name)]
    assert [name for name in names if name.endswith("/LICENSE")]
    assert [name for name in names if name.endswith("/entry_points.txt")]


@pytest.mark.slow
def test_installed_wheel_imports(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    run(*pip, str(wheel), cwd=tmp_path)
    code = f"{IMPORTS}; print(foveate.__file__, foveate._C.__file__, foveate.kernels.sampling.__file__)"
    files = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in files)


def native_attributes(site: Path, tmp_path: Path) -> dict:
    code = "import json; from foveate import _C; print(json.dumps([_C.CUDA_VERSION, _C.CUDA_ARCHS, _C.__file__]))"
    return dict(
        zip(
            ("version", "archs", "file"),
            json.loads(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))),
            strict=True,
        )
    )


@pytest.mark.slow
def test_wheel_with_and_without_cuda(tree, tmp_path):
    """One after the other from one tree: a build of other settings is never taken for up to date."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    pip = [sys.executable, "-P", "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    symbols = {}
    for cuda in ("1", "0"):
        site = tmp_path / cuda
        run(*pip, "--target", str(site), str(tree), cwd=tmp_path, FOVEATE_CUDA=cuda, FOVEATE_CUDA_ARCHS="90a")
        native = native_attributes(site, tmp_path)
        assert Path(native["file"]).is_relative_to(site)
        assert (native["version"] is not None, native["archs"]) == ((True, "90a") if cuda == "1" else (False, ""))
        symbols[cuda] = run("nm", "-DC", native["file"], cwd=tmp_path)
        assert not re.search(r"\b(at|c10|torch)::", symbols[cuda])
        libraries = run("ldd", native["file"], cwd=tmp_path)
        assert not re.search(r"torch|libc10|libcuda", libraries)


@pytest.mark.slow
def test_cuda_that_is_demanded_must_be_there(tree, tmp_path):
    code = "from distutils.core import run_setup; import setuptools; run_setup('setup.py', ['build_ext'])"
    for setting, words in (("1", "expected nvcc because of FOVEATE_CUDA=1"), ("yes", "to be auto, 0 or 1, got 'yes'")):
        environment = {"PATH": str(tmp_path), "FOVEATE_CUDA": setting, "CUDA_HOME": str(tmp_path), "NVCC": ""}
        result = subprocess.run(
            [sys.executable, "-P", "-c", code],
            cwd=tree,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        if setting == "1" and Path("/usr/local/cuda/bin/nvcc").exists():
            continue  # found without being on the path
        assert result.returncode != 0
        assert words in result.stderr


@pytest.mark.slow
def test_editable_install_sees_new_files(tree, tmp_path):
    code = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    run(sys.executable, "-P", "-c", code, str(tmp_path), cwd=tree)
    (built,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    family = tree / "kernels" / "added_later"
    family.mkdir()
    (family / "__init__.py").write_text("value = 7\n")
    # NOTE: -S leaves out the editable install of the running environment, which has the same name.
    child = f"""
import site, sys
site.addsitedir({str(tmp_path / "site")!r})
sys.path.append({sysconfig.get_paths()["purelib"]!r})
{IMPORTS}
import foveate.kernels.added_later as added
print(foveate.__file__, foveate._C.__file__, foveate.rollout.__file__, added.__file__)
"""
    try:
        files = run(sys.executable, "-P", "-S", "-c", child, cwd=tmp_path).split()
    finally:
        shutil.rmtree(family)
    assert all(Path(file).is_relative_to(tree) for file in files)


@pytest.mark.slow
def test_stub_agrees_with_the_extension(tmp_path):
    pytest.importorskip("mypy")
    site = tmp_path / "foveate"
    site.mkdir()
    for name in ("__init__.py", "_C.pyi", "py.typed"):
        shutil.copy(ROOT / "foveate" / name, site)
    allowed = tmp_path / "allowed.txt"
    allowed.write_text("foveate._C.PagePool\n")  # its metaclass is pybind11's; the methods have entries of their own
    options = ["--allowlist", str(allowed), "--mypy-config-file", str(ROOT / "pyproject.toml")]
    run(sys.executable, "-P", "-m", "mypy.stubtest", "foveate._C", *options, cwd=ROOT, MYPYPATH=str(tmp_path))
