"""Curves of the demo's task: every arm is one that can run, and the table adds up."""

from __future__ import annotations

import json
import statistics

import demo_curves
import pytest

from foveate.rollout.demo.options import DemoOptions
from foveate.rollout.demo.recipe import Demo


@pytest.mark.parametrize("name", demo_curves.ARMS)
def test_arms_differ_as_their_names_say(name):
    arm = demo_curves.ARMS[name]
    config, prune = arm.config(DemoOptions()), arm.options(DemoOptions()).prune_config
    method, _, learner = name.partition("-")
    assert (prune.method if prune else config.kind) == {"rloo": "grpo"}.get(method, method)
    assert (config.of_kind("advantage") == "rloo") == (name == "rloo")
    assert config.pruned_policy == ("dense" if learner else "replay")
    assert (config.correction == "tis") == (learner == "corrected")


def test_a_run_writes_a_row_an_arm(tmp_path, monkeypatch):
    for extra in ("math_verify", "scipy", "sklearn"):
        pytest.importorskip(extra)
    monkeypatch.setattr(Demo, "warm_start", lambda self: None)
    output = tmp_path / "rows.jsonl"
    words = ["demo_curves.py", "--arms", "gspo", "visionzip-corrected", "--seeds", "3", "--steps", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--held-out", "3", "--output", str(output)])
    demo_curves.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == [("gspo", 3), ("visionzip-corrected", 3)]
    assert [[step for step, *_ in row["curve"]] for row in rows] == [[0, 2], [0, 2]]
    exact, pruned = (row["metrics"]["policy/logprob_difference_mean"] for row in rows)
    assert exact < 1e-5 < pruned


def test_the_table_has_the_means_over_seeds(tmp_path):
    values = [(0.25, 0.5), (0.5, 0.625), (0.0, 0.75)]
    rows = [
        dict(
            arm="a",
            seed=seed,
            curve=[[0, before, 0.1], [20, after, 0.25 * seed]],
            unpruned_accuracy=after / 2,
            metrics={"policy/logprob_difference_mean": seed, "policy/ess": 0.5},
        )
        for seed, (before, after) in enumerate(values)
    ]
    for index, row in enumerate(rows):
        (tmp_path / f"{index}.jsonl").write_text(json.dumps(row) + "\n")
    head, _, line = demo_curves.table(sorted(tmp_path.iterdir())).splitlines()
    assert [cell.strip() for cell in head.split("|")[1:5]] == ["arm", "seeds", "0", "20"]
    mean = statistics.fmean(after for _, after in values)
    expected = ["a", "3", "25.0", f"{100 * mean:.1f}", "50.0-75.0", f"{50 * mean:.1f}", "25.0", "1.00", "0.50"]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == expected
