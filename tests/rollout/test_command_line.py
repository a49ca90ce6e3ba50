"""`foveate` and its commands' options: words, YAML files, and what is said about wrong ones."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from foveate.rollout import cli
from foveate.rollout.config import EngineConfig, PruneConfig, SamplingParams
from foveate.rollout.grpo import GRPOConfig

pytest.importorskip("tyro")
from foveate.rollout.tools.command_line import parse
from foveate.rollout.tools.train import TrainOptions, write_options


@dataclass(frozen=True)
class Options:
    """Options of a test."""

    model: str
    resume: bool = False
    rewards: dict[str, float] = field(default_factory=dict)
    data: Path | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)


YAML = """
model: -m
resume: true
rewards: {format: 1, "file.py:f": -2.5}
data: a b.jsonl
sampling: {stop: ["x y", z], stop_token_ids: [], allowed_token_ids: null, max_tokens: 7}
engine:
  dtype: bfloat16
  fuse: false
  backend: cpp
grpo: {learning_rate: 1e-5, betas: [0.8, 0.9], max_grad_norm: null, schedule: linear, max_steps: 3}
"""


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_yaml_file_says_what_words_say(config):
    options = parse(Options, "test", ["--config", config(YAML)])
    assert options == Options(
        model="-m",
        resume=True,
        rewards={"format": 1.0, "file.py:f": -2.5},
        data=Path("a b.jsonl"),
        sampling=SamplingParams(stop=("x y", "z"), max_tokens=7),
        engine=EngineConfig(dtype=torch.bfloat16, fuse=False, backend="cpp"),
        grpo=GRPOConfig(learning_rate=1e-5, betas=(0.8, 0.9), max_grad_norm=None, schedule="linear", max_steps=3),
    )


def test_words_win_over_the_file_wherever_they_stand(config):
    path = config(YAML)
    words = ["--model", "m", "--no-resume", "--rewards", "accuracy", "1", "--sampling.stop", "q", "--engine.fuse"]
    words += ["--grpo.learning-rate", "0.5"]
    before, after = parse(Options, "t", [*words, f"--config={path}"]), parse(Options, "t", ["--config", path, *words])
    assert before == after
    assert (before.model, before.resume, before.rewards) == ("m", False, {"accuracy": 1.0})
    assert (before.sampling.stop, before.engine.fuse, before.grpo.learning_rate) == (("q",), True, 0.5)
    assert (before.sampling.max_tokens, before.grpo.betas) == (7, (0.8, 0.9))


PRUNING = [
    ("visionzip keep=0.25", "{method: visionzip, keep: 0.25}", PruneConfig("visionzip", 0.25)),
    ("random seed=-3", "{method: random, seed: -3, keep: null}", PruneConfig("random", seed=-3)),
    ("divprune keep=1e-05", "{method: divprune, keep: 0.00001}", PruneConfig("divprune", 1e-5)),
    ("fastv", "{method: fastv}", PruneConfig("fastv")),
    (
        "pyramiddrop layers=[1,2] ratios=(0.5,0.25)",
        "{method: pyramiddrop, layers: [1, 2], ratios: [0.5, 0.25]}",
        PruneConfig("pyramiddrop", layers=(1, 2), ratios=(0.5, 0.25)),
    ),
    ("None", "null", None),
]


@pytest.mark.parametrize(("words", "text", "prune"), PRUNING)
def test_pruning_by_words_and_by_file(config, words, text, prune, tmp_path):
    given = parse(Options, "t", ["--model", "m", "--engine.prune", *words.split(), "--no-resume"])
    assert given == Options("m", engine=EngineConfig(prune=prune))
    assert parse(Options, "t", ["--model", "m", "--config", config(f"engine: {{prune: {text}}}\n")]) == given
    over = ["--config", config("engine: {prune: {method: strided}}\n"), "--engine.prune", *words.split()]
    assert parse(Options, "t", ["--model", "m", *over]) == given
    (tmp_path / "data.jsonl").touch()
    run = TrainOptions("m", tmp_path / "data.jsonl", tmp_path, engine=given.engine)
    write_options(run)
    assert parse(TrainOptions, "t", ["--config", str(tmp_path / "run.yaml")]) == run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "expected a method, got [] (prune)"),
        ("vscan", "expected one of random, strided, visionzip"),
        ("fastv keep", "expected a number, or several in brackets, got 'keep' (prune)"),
        ("random keep={[]:1}", "expected a number, or several in brackets, got 'keep={[]:1}' (prune)"),
        ("random keep=0.5 keep=0.25", "expected keep once, got 'keep=0.25' (prune)"),
        ("fastv keep=x", "expected a number, or several in brackets, got 'keep=x' (prune)"),
        ("fastv kep=1", "expected one of keep, dominant, layer, layers, ratios, seed as NAME=VALUE, got 'kep=1'"),
        ("fastv keep=2", "expected 0 < keep <= 1, got 2 (keep)"),
        ("fastv dominant=0.5", "expected no dominant for fastv, got 0.5 (dominant)"),
    ],
)
def test_wrong_pruning_ends_with_2_and_a_reason(capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        parse(Options, "test", ["--model", "m", "--engine.prune", *words.split()])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_an_empty_file_is_no_options(config):
    assert parse(Options, "t", ["--model", "m", "--config", config("# nothing\n")]) == Options("m")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "sampling: {stop: ['--', '-x', '-->', '-', '-5', '--model', None]}",
            {"stop": ("--", "-x", "-->", "-", "-5", "--model", "None")},
        ),
        ("sampling: {stop: '--'}", {"stop": ("--",)}),
        ("sampling: {stop: 'None'}", {"stop": ("None",)}),
        ("sampling: {stop: [' a=b ', '\u00e9 ']}", {"stop": (" a=b ", "\u00e9 ")}),
        ("sampling: {logit_bias: {5: -1.0, 7: 1e-5}}", {"logit_bias": ((5, -1.0), (7, 1e-5))}),
        ("sampling: {logit_bias: [[5, -1.0], [7, 2]]}", {"logit_bias": ((5, -1.0), (7, 2.0))}),
        ("sampling: {logit_bias: null, tagged: []}", {}),
        ("sampling:\nengine: {prune: null}\n", {}),
    ],
)
def test_values_that_look_like_something_else(config, text, expected):
    assert parse(Options, "t", ["--model", "m", "--config", config(text)]).sampling == SamplingParams(**expected)


def test_strings_that_look_like_something_else(config):
    text = "model: 'None'\nrewards: {'-x:f': -1.0e-5, '--': 2}\ndata: --d\n"
    options = parse(Options, "t", ["--config", config(text)])
    assert options == Options("None", rewards={"-x:f": -1e-5, "--": 2.0}, data=Path("--d"))


def test_what_a_run_writes_is_read_back(tmp_path):
    """run.yaml, for every option that words can say."""
    (tmp_path / "data.jsonl").touch()
    sampling = SamplingParams(stop=("--", "-x", "None"), logit_bias={5: -1.0, 3: 1e-7}, banned_token_ids=(4,))
    for sampled in (SamplingParams(), sampling):
        options = TrainOptions(
            "m", tmp_path / "data.jsonl", tmp_path, rewards={"a.py:f": -1e-5}, system="-- be good", sampling=sampled
        )
        write_options(options)
        assert parse(TrainOptions, "t", ["--config", str(tmp_path / "run.yaml")]) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "expected an option such as model, got modle"),
        ("sampling: {max_token: 3}", "expected an option such as sampling.max_tokens, got sampling.max_token"),
        ("engine: 3", "engine"),
        ("model: {a: 1}", "expected a value"),
        ("resume: maybe", "expected true or false, got 'maybe' (resume"),
        ("model: [", "expected a YAML file"),
        ("- model", "expected a mapping"),
        ("model: m\nsampling: {max_tokens: 0}", "expected an int >= 1, below 2^31, got 0"),
        ("model: m\nsampling: {max_tokens: many}", "max-tokens"),
        ("model: m\nengine: {dtype: float33}", "dtype"),
        ("resume: true", "model"),
        ("model: m\nmodel: n", "the key 'model' twice"),
        ("model: m\nsampling: {top_k: 3, top_k: 4}", "the key 'top_k' twice"),
        ("model: m\nsampling: [1]", "expected a mapping, got [1] (sampling"),
        ("model: m\nsampling: {logit_bias: [[5]]}", "logit"),
        ("model: m\nengine: {prune: visionzip}", "expected a mapping with a method, got 'visionzip' (engine.prune"),
        ("model: m\nengine: {prune: {keep: 0.5}}", "expected a mapping with a method, got {'keep': 0.5} (engine.prune"),
        ("model: m\nengine: {prune: {method: fastv, keep: 3}}", "expected 0 < keep <= 1, got 3"),
        ("model: m\nsampling: {tagged: [1]}", "set from Python alone, got [1] (sampling.tagged"),
    ],
)
def test_a_wrong_file_ends_with_2_and_a_reason(config, capsys, text, message):
    with pytest.raises(SystemExit) as exit_:
        parse(Options, "test", ["--config", config(text)])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(Options, "test", ["--config", "nowhere.yaml"])
    assert exit_.value.code == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("demo", "doctor", "rollout", "train"))


@pytest.mark.parametrize("name", ["doctor", "demo", "rollout", "train"])
def test_help_of_a_command(capsys, name):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert f"foveate {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "extra"), [("rollout", "rollout"), ("train", "train")])
def test_what_is_missing_is_named_with_its_extra(monkeypatch, capsys, name, extra):
    monkeypatch.setattr(cli, "find_spec", lambda module: None if module == "tyro" else find_spec(module))
    assert cli.main([name]) == 1
    assert f"expected tyro to be installed: pip install 'foveate[{extra}]'" in capsys.readouterr().err


def test_the_extras_are_there():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for command in cli.COMMANDS.values():
        assert not command.needs or command.extra in project["optional-dependencies"]


def test_commands_import_only_what_they_need():
    """Help and `doctor` without any extra; `rollout` and `train` with tyro alone."""
    code = """
import sys
for name in ("PIL", "rich", "tensorboard", "math_verify", "sklearn", "scipy", "pyarrow", "accelerate"):
    sys.modules[name] = None
import foveate.rollout.tools.rollout, foveate.rollout.tools.train
sys.modules["tyro"] = None
from foveate.rollout import cli
import foveate.rollout.tools.doctor
try:
    cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
