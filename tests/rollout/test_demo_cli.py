"""`foveate`: options, errors, and a short run of the demo from end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from foveate.rollout import cli
from foveate.rollout.demo import recipe
from foveate.rollout.demo.options import DemoOptions
from foveate.rollout.demo.recipe import Demo, DemoSizes, first_of_each_kind, grpo_config, run_demo
from foveate.rollout.demo.tasks import MAX_TOKENS, make_request
from foveate.rollout.demo.threads import choose, thread_count
from foveate.rollout.demo.warmstart import WarmStartConfig
from foveate.rollout.pruning import PruneConfig


@pytest.fixture
def runs(monkeypatch):
    """The options that the command would run the demo with."""
    seen = []
    monkeypatch.setattr(recipe, "run_demo", seen.append)
    return seen


def test_defaults(runs):
    assert cli.main(["demo"]) == 0
    assert runs == [DemoOptions(ablate=False, steps=240, seed=0, output=Path("runs/demo"), threads=None)]


def test_every_option(runs, tmp_path):
    words = f"demo --ablate --steps 7 --seed 3 --output {tmp_path / 'x' / 'y'} --threads 2".split()
    words += ["--kind", "gspo", "--advantage", "rloo", "--prune", "divprune", "--keep", "0.75"]
    assert cli.main(words) == 0
    expected = DemoOptions(ablate=True, steps=7, seed=3, output=tmp_path / "x" / "y", threads=2)
    assert runs == [replace(expected, kind="gspo", advantage="rloo", prune="divprune", keep=0.75)]
    assert runs[0].prune_config == PruneConfig("divprune", keep=0.75)


@pytest.mark.parametrize("kind", get_args(get_type_hints(DemoOptions)["kind"]))
def test_every_kind_makes_a_configuration(kind):
    config = grpo_config(DemoOptions(kind=kind))
    assert config.kind == kind
    assert (config.aggregation_length == MAX_TOKENS) == (kind == "dr_grpo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --steps 0", "expected an int >= 1, got 0 (--steps)"),
        ("demo --seed -1", "expected an int >= 0, got -1 (--seed)"),
        ("demo --threads 0", "expected an int >= 1, got 0 (--threads)"),
        ("demo --keep 0.5", "expected no share without --prune, got 0.5 (--keep)"),
        ("demo --prune fastv --keep 0", "expected 0 < keep <= 1, got 0.0 (--keep)"),
        ("demo --prune all", "--prune"),
        ("demo --steps many", "--steps"),
        ("demo --setps 3", "--setps"),
        ("rolout", "'rollout'"),
        ("", "demo"),
    ],
)
def test_what_is_wrong_is_said(runs, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(words.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not runs


def test_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder.*--output"):
        DemoOptions(output=tmp_path / "file" / "demo")


def test_help(capsys):
    for words, expected in (["--help"], "demo"), (["demo", "--help"], "--ablate"):
        with pytest.raises(SystemExit) as exit_:
            cli.main(words)
        assert exit_.value.code == 0
        assert expected in capsys.readouterr().out


def test_missing_packages_are_named(monkeypatch, capsys, runs):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("tyro", "sklearn") else find_spec(name))
    assert cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "scikit-learn, tyro" in error
    assert "pip install 'foveate[demo]'" in error
    assert not runs


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "run_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("foveate")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout


def test_threads_are_put_back():
    before = torch.get_num_threads()

    def fail():
        with thread_count(before + 1):
            assert torch.get_num_threads() == before + 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("seconds", "count"),
    [
        ({1: 0.4}, 1),
        ({1: 0.4, 2: 5.2}, 1),
        ({1: 0.14, 2: 0.12}, 1),
        ({1: 0.2, 2: 0.1}, 2),
        ({1: 0.4, 2: 0.2, 4: 0.19}, 2),
    ],
)
def test_threads_are_added_only_where_they_pay(seconds, count):
    assert choose(seconds) == count


def test_shown_scenes_are_the_first_of_each_kind():
    class Stub:
        def __init__(self, kind):
            self.kind = kind

    kinds = ["count", "sum", "sum", "largest", "sum", "top-left", "count", "count"]
    assert first_of_each_kind([Stub(kind) for kind in kinds], 2) == [1, 2, 3, 0, 6, 5]


def test_a_run_with_another_loss_and_pruned_images(tmp_path, capsys):
    """What the options say reaches the engine and the trainer, and the report names it."""
    options = DemoOptions(steps=1, output=tmp_path, threads=1, kind="gspo", advantage="rloo", prune="fastv", keep=0.75)
    sizes = DemoSizes(held_out=3, stopping=1, warm_start=WarmStartConfig(max_steps=1, check_every=1))
    demo = Demo(options, sizes)
    engine = demo.policy(options.prune_config)
    (group,) = engine.generate([make_request(demo.record.held_out[0])], strict=True)
    (site,) = group.keep.sites
    assert (site.layer, len(site.kept)) == (1, 3)
    run_demo(options, sizes)
    words = "loss gspo, advantage rloo, images pruned by fastv, keep 0.75"
    assert f"GRPO with the perception reward, {words}: 1 steps" in capsys.readouterr().out
    assert f"Not the demo’s own recipe: {words}." in (tmp_path / "report.html").read_text(encoding="utf-8")
    (metrics,) = (json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines())
    assert metrics["policy/logprob_difference_max"] < 5e-5, "the trainer replays what the engine dropped"


@pytest.mark.slow
def test_a_short_run_from_end_to_end(tmp_path, capsys):
    """Learning is the demo's own claim; this is about the way there: every step, both arms, every file."""
    from foveate import Engine
    from foveate.rollout.demo.scenes import scene_stream
    from foveate.rollout.demo.tasks import evaluate, make_reward

    options = DemoOptions(ablate=True, steps=3, seed=1, output=tmp_path / "demo", threads=1)
    sizes = DemoSizes(held_out=24, stopping=16, warm_start=WarmStartConfig(max_steps=40))
    record = run_demo(options, sizes)
    out = capsys.readouterr().out
    lines = re.findall(r"^held-out accuracy: \d+\.\d% -> \d+\.\d% \(McNemar p = [\d.e-]+\)$", out, re.MULTILINE)
    assert lines == [record.arms[0].result]
    assert str(options.output / "report.html") in out
    assert "done in" in out

    with_perception, without = record.arms
    assert with_perception.before == without.before
    assert [step for step, _ in with_perception.evaluations] == [0, 3]
    assert len(record.held_out) == 24
    assert all(len(group) == 8 for group in with_perception.samples + record.before_samples)
    for folder in ("grpo", "ablation"):
        logged = [json.loads(line) for line in (options.output / folder / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in logged] == [1, 2, 3]
        assert max(entry["policy/logprob_difference_max"] for entry in logged) < 5e-5

    engine = Engine.from_pretrained(options.output / "model")
    again = evaluate(engine, record.held_out, make_reward())
    assert again == with_perception.after
    assert record.pruning.accuracy == again.accuracy
    assert "What pruning keeps" in (options.output / "report.html").read_text(encoding="utf-8")
    assert next(scene_stream("held-out", 0)).answer == record.held_out[0].answer


@pytest.mark.slow
def test_a_run_repeats(tmp_path, capsys):
    sizes = DemoSizes(held_out=8, stopping=8, warm_start=WarmStartConfig(max_steps=20))
    runs = [
        run_demo(DemoOptions(steps=2, seed=seed, output=tmp_path / name, threads=1), sizes)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    losses = [[loss for _, loss, _ in run.warm_start] for run in runs]
    rewards = [[metrics["reward/total"] for metrics in run.arms[0].metrics] for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert rewards[0] == rewards[1] != rewards[2]
