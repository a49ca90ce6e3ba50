"""Metrics by hand, and where they are written."""

import importlib
import json

import pytest
import torch

from foveate.rollout.metrics import (
    Clock,
    MetricsLog,
    as_floats,
    check_extras,
    completion_metrics,
    difference_metrics,
    policy_metrics,
    reward_kl_metrics,
    reward_metrics,
)
from foveate.rollout.rewards import RewardTable


def test_reward_metrics_by_hand():
    tables = [
        RewardTable({"a": [1.0, 0.0, None], "b": [4.0, 4.0, 1.0]}, [1.0, 2.0, None]),
        RewardTable({"a": [0.5, 0.5]}, [3.0, 3.0]),
        RewardTable({}, [None, 6.0]),
    ]
    assert reward_metrics(tables) == {
        "reward/total": 3.0,
        "reward/a": 0.5,
        "reward/b": 3.0,
        "group/variance": 0.25,  # of {1, 2}: 1/2, of {3, 3}: 0; one scored sample has none
        "group/zero_variance_share": 0.5,
        "sample/unscorable": 2.0,
        "unscorable/a": 1.0,
        "unscorable/b": 0.0,
    }


def test_nothing_scored_leaves_the_means_out():
    assert reward_metrics([RewardTable({"a": [None]}, [None])]) == {
        "sample/unscorable": 1.0,
        "unscorable/a": 1.0,
    }
    assert reward_metrics([]) == {"sample/unscorable": 0.0}
    assert reward_kl_metrics([], 0.5) == {"reward/kl_coef": 0.5}
    assert reward_kl_metrics([1.0, 2.0], 0.5) == {"reward/kl": 1.5, "reward/kl_coef": 0.5}


def test_completion_metrics_by_hand():
    got = completion_metrics([(1, "stop"), (4, "length"), (4, "length")])
    expected = {"length_mean": 3.0, "length_max": 4.0, "truncated_share": 2 / 3}
    assert got == {f"completion/{name}": value for name, value in expected.items()}


def test_policy_metrics():
    """Two micro-batches of 3 and 1 tokens, and a rank without any."""
    first = as_floats({"tokens": torch.tensor(3.0), "kl": torch.tensor(6.0), "ratio_max": torch.tensor(2.0)})
    assert first == {"tokens": 3.0, "kl": 6.0, "ratio_max": 2.0}
    second = {"tokens": 1.0, "kl": 4.0, "ratio_max": 1.5}
    assert policy_metrics([first, {}, second]) == {"policy/kl": 2.5, "policy/ratio_max": 2.0}
    assert as_floats({}) == policy_metrics([{}]) == policy_metrics([{"tokens": 0.0, "kl": 0.0}]) == {}


def test_difference_metrics():
    names = [f"policy/logprob_difference_{name}" for name in ("mean", "max")]
    assert difference_metrics([(3.0, 2.0, 2), (0.0, 0.0, 0), (1.0, 1.0, 2)]) == dict(
        zip(names, (1.0, 2.0), strict=True)
    )
    assert difference_metrics([(0.0, 0.0, 0)]) == {names[1]: 0.0}


def test_clock(monkeypatch):
    times = iter([0.0, 3.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    for name in ("rollout", "update", "rollout"):
        with clock.phase(name):
            pass
    got = clock.metrics(num_tokens=16)
    assert got == {
        "time/step": 8.0,
        "time/rollout_share": 7 / 8,
        "time/update_share": 1 / 8,
        "throughput/tokens_per_second": 2.0,
    }


def test_json_lines_are_appended_and_printed(tmp_path, capsys):
    for start in (1, 3):
        with MetricsLog(tmp_path / "run", 4, start - 1, "plain", 2, False) as log:
            for step in (start, start + 1):
                log.write(step, {"step": float(step), "reward/total": 0.5, "eval/accuracy": 0.125, "optim/lr": 1.0})
                assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == step
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    printed = "step 2/4  reward/total 0.5  eval/accuracy 0.125\nstep 4/4  reward/total 0.5  eval/accuracy 0.125\n"
    assert capsys.readouterr().out == printed


def test_rich_progress(capsys):
    pytest.importorskip("rich")
    with MetricsLog(None, 7, 0, "rich", 1, False) as log:
        log.write(1, {"reward/total": 0.5})
    captured = capsys.readouterr()
    assert "step 1/7  reward/total 0.5" in captured.err
    assert "1/7" in captured.err
    assert captured.out == ""


def test_none_prints_nothing(capsys):
    with MetricsLog(None, None, 0, "none", 1, False) as log:
        log.write(1, {"reward/total": 0.5})
    assert capsys.readouterr() == ("", "")


def test_tensorboard_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    with MetricsLog(tmp_path, 1, 0, "none", 1, True) as log:
        log.write(3, {"reward/total": 0.5})
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/total")] == [(3, 0.5)]


@pytest.mark.parametrize(
    ("missing", "progress", "tensorboard"), [("rich", "rich", False), ("tensorboard", "none", True)]
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, missing, progress, tensorboard):
    real = importlib.import_module

    def blocked(name, *args):
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr("importlib.import_module", blocked)
    with pytest.raises(ImportError, match=rf"needs the package {missing}: pip install 'foveate\[train\]'"):
        MetricsLog(tmp_path, 1, 0, progress, 1, tensorboard)
    with pytest.raises(ImportError, match=rf"needs the package {missing}"):
        check_extras(progress, tensorboard)
    check_extras("plain", False)


def test_tensorboard_needs_a_directory():
    with pytest.raises(ValueError, match=r"\(output_dir\)"):
        MetricsLog(None, 1, 0, "none", 1, True)


def test_auto_without_rich_prints_plainly(monkeypatch, capsys):
    def refuse(name, *args):
        raise AssertionError(name)

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("foveate.rollout.metrics.find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", refuse)
    with MetricsLog(None, 1, 0, "auto", 1, False) as log:
        log.write(1, {"reward/total": 0.5})
    assert capsys.readouterr().out == "step 1/1  reward/total 0.5\n"


@pytest.mark.parametrize("torn", [b"", b'{"step": 2.0, "rew', b"{", b'{"step": 2.0}'])
def test_a_line_that_a_killed_run_left_unfinished_is_dropped(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1.0}\n' + torn)
    with MetricsLog(tmp_path, None, 1, "none", 1, False) as log:
        log.write(2, {"step": 2.0, "a": 1.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1.0}, {"step": 2.0, "a": 1.0}]
