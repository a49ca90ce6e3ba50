"""Where the numbers of csrc/sample_from_hidden.cu lie, on an emulation of what copies and multiplies them."""

from __future__ import annotations

from pathlib import Path

from foveate.testing.sanitizer import build_sanitized, run_sanitized

ROOT = Path(__file__).resolve().parents[2]


def test_every_thread_holds_the_logits_it_draws_from(tmp_path):
    sources = [ROOT / "tests" / "native" / "hopper_check.cpp", ROOT / "csrc" / "sample_from_hidden.cpp"]
    program = build_sanitized(sources, tmp_path / "hopper", includes=[ROOT / "csrc"])
    result = run_sanitized(program)
    assert (result.returncode, result.stdout) == (0, "tiles agree\n"), result.stdout + result.stderr


def test_no_id_that_wins_is_spared_its_noise(tmp_path):
    source = ROOT / "tests" / "native" / "race_check.cpp"
    program = build_sanitized([source], tmp_path / "race", includes=[ROOT / "csrc"])
    result = run_sanitized(program)
    assert (result.returncode, result.stdout) == (0, "tiles race\n"), result.stdout + result.stderr
