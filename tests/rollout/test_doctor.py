"""`foveate doctor`: every line stands for itself, a failure is marked and sets the exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from foveate import _C
from foveate.rollout import cli
from foveate.rollout.tools import doctor


def lines(capsys, *arguments: str) -> tuple[int, list[dict]]:
    status = cli.main(["doctor", "--json", *arguments])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_report_of_a_healthy_machine(capsys):
    status, checks = lines(capsys)
    assert status == 0
    assert not [check for check in checks if check["ok"] is False]
    by_name = {(check["section"], check["name"]): check["detail"] for check in checks}
    assert by_name["found", "torch"] == torch.__version__
    assert by_name["backends on cpu", "layers"].startswith("cpp")
    assert by_name["self-test on cpu", "engine"].startswith("8 greedy tokens")
    for family in doctor.dispatch.FAMILIES:
        assert ("backends on cpu", family) in by_name
        assert ("self-test on cpu", family) in by_name


def test_a_wrong_kernel_is_found_and_the_report_goes_on(capsys, monkeypatch):
    right = doctor.layers.rms_norm
    monkeypatch.setattr(doctor.layers, "rms_norm", lambda *args, **kwargs: right(*args, **kwargs) + 1e-3)
    status, checks = lines(capsys)
    assert status == 1
    failed = [check for check in checks if check["ok"] is False]
    assert [check["name"] for check in failed] == ["layers"]
    assert "is off by 1.0e-03" in failed[0]["detail"]
    assert checks[-1]["name"] == "engine"


@pytest.mark.parametrize(
    ("family", "attribute", "wrong"),
    [
        ("sampling", "philox", type("", (), {"noise_words": staticmethod(lambda *_: torch.zeros(1, 5))})),
        ("paged_attention", "paged_attention", None),
        ("policy_loss", "policy_loss", None),
        ("vision_prune", "vision_prune", None),
    ],
)
def test_each_self_test_can_fail(capsys, monkeypatch, family, attribute, wrong):
    monkeypatch.setattr(doctor, attribute, wrong)
    status, checks = lines(capsys)
    assert status == 1
    assert [check["name"] for check in checks if check["ok"] is False] == [family]


def test_an_impossible_request_is_reported_by_family(capsys, monkeypatch):
    monkeypatch.setenv("FOVEATE_BACKEND", "layers=cuda")
    status, checks = lines(capsys)
    assert status == 1
    failed = {(check["section"], check["name"]): check["detail"] for check in checks if check["ok"] is False}
    assert "it runs on CUDA tensors" in failed["backends on cpu", "layers"]
    assert ("backends on cpu", "sampling") not in failed


@pytest.mark.parametrize(
    ("archs", "chip", "ok", "words"),
    [
        ("80 90a 100", (9, 0), True, "sm_90a"),
        ("80 90a 100", (8, 6), True, "sm_80"),
        ("80 90a 100", (12, 0), False, "FOVEATE_CUDA_ARCHS"),
        ("90", (8, 0), False, "FOVEATE_CUDA_ARCHS"),
        ("86", (8, 0), False, "FOVEATE_CUDA_ARCHS"),
    ],
)
def test_chips_the_extension_was_built_for(monkeypatch, archs, chip, ok, words):
    properties = type("", (), {"name": "GPU", "major": chip[0], "minor": chip[1], "total_memory": 2**34})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(_C, "CUDA_VERSION", "13.0")
    monkeypatch.setattr(_C, "CUDA_ARCHS", archs)
    check = doctor._gpu(0)
    assert check.ok is ok
    assert words in check.detail
    monkeypatch.setattr(_C, "CUDA_VERSION", None)
    assert "Triton serves it" in doctor._gpu(0).detail


def test_needs_no_extra():
    """What the demo needs may be missing; the text report is for people."""
    code = """
import sys
for name in ("tyro", "PIL", "math_verify", "sklearn", "scipy", "rich", "tensorboard"):
    sys.modules[name] = None
from foveate.rollout.cli import main
sys.exit(main(["doctor"]))
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all is well" in result.stdout
    assert " + layers" in result.stdout
