"""The commands of examples/geometry3k_train.yaml and of the README: data, rollouts, three steps of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "geometry3k"
sys.path.append(str(ROOT / "examples"))  # the example's files import each other, as they do when it is run

import geometry3k_data  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder where the examples and the data are as in the repository, and runs/ is empty."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_problems_become_lines(folder, capsys):
    from foveate.rollout.config import SamplingParams
    from foveate.rollout.tools.prompts import BadLine, Defaults, read_requests

    geometry3k_data.main(["tests/data/geometry3k/problems.jsonl", "--limit", "4", "--out", "drawn"])
    geometry3k_data.main(["tests/data/geometry3k"])
    assert "10 problems: runs/geometry3k/data.jsonl" in capsys.readouterr().out
    for path, count in (("drawn", 4), ("runs/geometry3k", 10)):
        read = list(read_requests(folder / path / "data.jsonl", Defaults(2, 0, SamplingParams())))
        assert len(read) == count
        assert not [item for item in read if isinstance(item, BadLine)]
        for _, request in read:
            assert request.metadata["facts"]
            assert Path(request.images[0]).is_file()
        assert (folder / path / "model" / "model.safetensors").is_file()
    assert read[0][1].metadata["answer"] == "80"


@pytest.mark.slow
def test_the_commands_of_the_example(folder):
    """Exactly the words of the documentation, one after the other, in a fresh folder."""

    def call(line):
        program, *words = line.split()
        place = Path(sys.executable) if program == "python" else Path(sys.executable).with_name(program)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run([str(place), *words], capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for line in COMMANDS:
        shown = call(line)
    assert "model after 3 steps: runs/geometry3k/train/model" in shown
    rows = [json.loads(line) for line in Path("runs/geometry3k/rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    metrics = [json.loads(line) for line in Path("runs/geometry3k/train/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all("reward/shortness" in line for line in metrics)
    assert list(Path("runs/geometry3k/train").glob("events.*"))
    # The trained model takes the place of the first one.
    again = COMMANDS[1].replace("geometry3k/model", "geometry3k/train/model").replace("rollouts.", "after.")
    assert "10/10 prompts, 40 rollouts" in call(again)


COMMANDS = (
    "python examples/geometry3k_data.py tests/data/geometry3k",
    "foveate rollout --model runs/geometry3k/model --data runs/geometry3k/data.jsonl "
    "--output runs/geometry3k/rollouts.jsonl --n 4 --sampling.max-tokens 64",
    "foveate train --config examples/geometry3k_train.yaml",
)


def test_the_documentation_has_these_commands():
    text = (ROOT / "examples" / "geometry3k_train.yaml").read_text()
    assert all(command in " ".join(text.replace("#", " ").split()) for command in COMMANDS)
