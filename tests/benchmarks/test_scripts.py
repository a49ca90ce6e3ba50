"""Every benchmark runs, takes the common options, and measures what it says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import common
import pytest
import torch
from common import Options
from machine import Ceilings

SCRIPTS = sorted(path.stem for path in (Path(common.__file__).parent).glob("bench_*.py"))
KERNEL_SCRIPTS = [name for name in SCRIPTS if name not in ("bench_rollout", "bench_prune_rollout")]
CPU = torch.device("cpu")
# Microseconds of the last row of a kernel in a rehearsal, at 10 GB/s and 1 TFLOP/s.
LAST_FLOORS = {
    # bfloat16 [8, 128]: 2,048 bytes, weight 256. Forward x, weight, out; backward x, gradient, weight, two gradients.
    # 8 rows of 20 heads of 16, read and written, with two rows of 16 and a slot each.
    "bench_layers": {
        "rms_norm": 0.435,
        "rms_norm_with_backward": 1.101,
        "rope_store_kv": round(8 * (2 * 20 * 16 * 2 + 2 * 16 * 2 + 8) / 1e4, 3),
    },
    # Keys and values of 100 shared tokens and 2 * 32 own: 2 heads of 64, float32; queries and results [2, 14, 64].
    "bench_paged_attention": {"decode": round((164 * 2 * 2 * 64 * 4 + 2 * 2 * 14 * 64 * 4) / 1e4, 3)},
    # hidden [12, 16], lm_head [70, 16] and their gradients, float32; six operations a (token, dimension, id) take less
    # than the bytes: a token's target and three results, or target, mask, advantage and old log-prob.
    "bench_policy_loss": {
        "linear_logprobs": round((2 * (12 + 70) * 16 * 4 + 12 * 20) / 1e4, 3),
        "linear_policy_loss": round((2 * (12 + 70) * 16 * 4 + 12 * 17) / 1e4, 3),
    },
    # Logits [4, 62] float32, 36 bytes of state and results a row; the second reads LM head [62, 32], hidden [4, 32].
    "bench_sampling": {"sample": 0.114, "sample_from_hidden": 0.885},
    # Keys [80, 4, 128] float32, 56 queries of 128 and a float32, 80 scores; 9 rows of five planes [64] bfloat16, three
    # positions, a slot and a row number, written but for the last.
    "bench_vision_prune": {
        "attention_scores": round((80 * 4 * 128 * 4 + 56 * 129 * 4 + 80 * 4) / 1e4, 3),
        "compact": round(9 * (2 * (5 * 64 * 2 + 12 + 8) + 4) / 1e4, 3),
    },
}


def test_scripts_were_found():
    assert {"bench_layers", "bench_paged_attention", "bench_rollout", "bench_sampling"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", KERNEL_SCRIPTS)
def test_rehearsal(name, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "measure_ceilings", lambda timer, quick: Ceilings(10.0, 10.0, 1.0))
    script = importlib.import_module(name)
    file = tmp_path / "rows.jsonl"
    threads = str(torch.get_num_threads())
    arguments = ["--quick", "--device", "cpu", "--threads", threads, "--output", str(file)]
    assert common.main(script.__doc__, script.KERNELS, script.measurements, arguments) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["kernel"] for row in rows} == set(script.KERNELS)
    assert all(row["quick"] and row["ratio"] for row in rows)
    assert {row["kernel"]: row["floor_us"] for row in rows}.items() >= LAST_FLOORS[name].items()


@pytest.mark.parametrize("name", KERNEL_SCRIPTS)
def test_full_shapes_can_be_listed(name):
    """Building the list of measurements allocates no inputs and names each one once."""
    names = [
        (m.kernel, backend, str(m.shape), m.dtype)
        for m in importlib.import_module(name).measurements(Options(CPU))
        for backend in m.backends
    ]
    assert len(names) == len(set(names)) > 0


def test_rollouts_take_the_common_options(monkeypatch, capsys):
    script = importlib.import_module("bench_rollout")
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--filter", "no such model", "--threads", threads])
    script.main()
    assert not capsys.readouterr().out
    row = script.about()
    assert set(row) == {"cpu", "threads", "torch", "transformers", "commit"}
