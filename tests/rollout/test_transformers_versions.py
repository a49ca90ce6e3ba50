"""The oldest release of transformers that is supported and one between it and the newest pass the same tests.

The newest is what the other tests run on. A release is installed beside the environment's own, with what it asks for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# What transformers will not be imported with in another version; `kernels` is one of its extras.
COMPANIONS = re.compile(r"(huggingface-hub|tokenizers)\b(?!.*extra)|kernels\b.*extra == .kernels.")
TESTS = ("engine_parity", "engine_pressure", "models_vl", "adapters", "policy", "weights", "replay", "replay_context")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", ["5.5.3", "5.17.0"])
def test_parity_on_another_release(version, tmp_path):
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path), f"transformers=={version}"], check=True, timeout=200)
    (release,) = distributions(name="transformers", path=[str(tmp_path)])
    asked = {line.partition(";")[0].strip() for line in release.requires or () if COMPANIONS.match(line)}
    subprocess.run([*install, str(tmp_path), "kernels-data", *sorted(asked)], check=True, timeout=200)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = "import transformers; print(transformers.__version__)"
    seen = subprocess.run([sys.executable, "-c", found], env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == version
    files = [str(HERE / f"test_{name}.py") for name in TESTS]
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
    result = subprocess.run(pytest_command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
