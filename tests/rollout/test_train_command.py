"""`foveate train`: options, rewards by name, what is written, going on, and several ranks."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from foveate.rollout import checkpoint, cli
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.testing import tiny_model, tiny_processor

pytest.importorskip("tyro")
from foveate.rollout.tools import train as command
from foveate.rollout.tools.reward_sources import load_reward, weighted_reward
from foveate.rollout.tools.train import TrainOptions, run

REWARD = """
from dataclasses import dataclass

def low(group):
    return [float((rollout.token_ids < 100).float().mean()) for rollout in group.rollouts]

class Source:
    name = "source"
    def __call__(self, group):
        return [float(group.request.metadata["source"] == "tests")] * len(group.rollouts)

def in_numpy(group):
    import numpy
    return numpy.array([len(rollout.token_ids) for rollout in group.rollouts], dtype=numpy.float32)

def in_torch(group):
    return low(group)[:1] and __import__("torch").tensor(low(group))

def broken(group):
    raise ValueError("a mistake of the user's")

not_a_function = 5
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny saved model."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    processor = tiny_processor()
    for part in (tiny_model("qwen2_5_vl"), processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def options(tmp_path, model):
    (tmp_path / "reward.py").write_text(REWARD)
    lines = [{"prompt": f"{i}?", "metadata": {"source": "tests"}, "facts": [["AB", "5"]]} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(output="run", eval_data=None, **grpo):
        grpo = {"prompts_per_step": 2, "learning_rate": 1e-3, "progress": "none", "save_every": 1, **grpo}
        return TrainOptions(
            model=str(model),
            data=tmp_path / "data.jsonl",
            output=tmp_path / output,
            eval_data=eval_data and tmp_path / eval_data,
            n=3,
            rewards={f"{tmp_path / 'reward.py'}:low": 1.0, f"{tmp_path / 'reward.py'}:Source": 0.5, "format": 0.1},
            sampling=SamplingParams(max_tokens=4),
            engine=EngineConfig(page_size=8, kv_memory=1 << 22),
            grpo=GRPOConfig(**grpo),
        )

    return make


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def weights_of(folder):
    return Engine.from_pretrained(folder, EngineConfig(kv_memory=1 << 22)).model.state_dict()


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_writes_metrics_options_checkpoints_and_the_model(options, model, capsys):
    chosen = options(tensorboard=True)
    trainer = run(chosen)
    assert trainer.step == 3  # one pass
    lines = metrics_of(chosen.output)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {"reward/low", "reward/source", "reward/format"} <= line.keys()
        assert line["reward/source"] == 1
        assert line["reward/total"] == pytest.approx(line["reward/low"] + 0.5 + 0.1 * line["reward/format"])
    names = {path.name for path in chosen.output.iterdir() if not path.name.startswith("events.")}
    assert names == {"metrics.jsonl", "run.yaml", "model", "step-1", "step-2", "step-3"}
    assert list(chosen.output.glob("events.*"))
    trained = weights_of(chosen.output / "model")
    assert_same_weights(trained, dict(trainer.model.state_dict()))
    assert_same_weights(trained, weights_of(chosen.output / "step-3"))  # with its own tokenizer
    assert any(not torch.equal(trained[key], value) for key, value in weights_of(model).items())
    shown = capsys.readouterr().out
    assert all(str(chosen.output / name) in shown for name in ("metrics.jsonl", "model"))


def test_going_on_is_as_if_never_stopped(options, capsys):
    whole = options("whole")
    run(whole)
    part = options("part", max_steps=2)
    run(part)
    words = ["train", "--config", str(part.output / "run.yaml")]
    assert cli.main([*words, "--grpo.max-steps", "None"]) == 1
    assert "expected a folder without a run, or --resume" in capsys.readouterr().err
    assert cli.main([*words, "--grpo.max-steps", "None", "--resume", "--keep-checkpoints", "2"]) == 0
    assert f"going on from {part.output / 'step-2'}" in capsys.readouterr().out
    assert metrics_of(part.output) == metrics_of(whole.output)
    assert_same_weights(weights_of(part.output / "model"), weights_of(whole.output / "model"))
    assert [path.name for path in checkpoint.saved(part.output)] == ["step-2", "step-3"]


def test_the_last_step_is_always_saved_and_the_command_saves_by_itself(options):
    chosen = options(save_every=2)
    run(chosen)
    assert [path.name for path in checkpoint.saved(chosen.output)] == ["step-2", "step-3"]
    never = options("never", save_every=0, max_steps=1)
    run(never)
    assert checkpoint.saved(never.output) == []
    words = ["--model", "m", "--data", str(chosen.data)]
    for more in ([], ["--grpo.learning-rate", "0.1"]):
        assert command.parse(TrainOptions, "test", [*words, *more]).grpo.save_every == command.SAVE_EVERY > 0


def test_resume_without_a_checkpoint_of_the_run_that_is_there_is_refused(options, capsys):
    chosen = options(save_every=0, max_steps=1)
    run(chosen)
    before = (chosen.output / "metrics.jsonl").read_bytes()
    assert cli.main(["train", "--config", str(chosen.output / "run.yaml"), "--resume"]) == 1
    assert "expected a checkpoint to go on from, or another folder, got" in capsys.readouterr().err
    assert (chosen.output / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 2}, "n = 3, with which the run was begun, got 2"),
        ({"sampling": SamplingParams(max_tokens=4, temperature=0.5)}, "sampling.temperature = 1.0"),
        ({"rewards": {"format": 1.0}}, "rewards = "),
        ({"grpo": GRPOConfig(prompts_per_step=2, progress="none", save_every=1)}, "learning_rate = 0.001"),
        ({"data": "other.jsonl"}, "the prompts with which the run was begun"),
    ],
)
def test_resume_with_other_options_is_refused_by_name(options, change, message, tmp_path):
    chosen = options(max_steps=1)
    (tmp_path / "other.jsonl").write_text(chosen.data.read_text().replace("0?", "9?"))
    run(chosen)
    if "data" in change:
        change = {"data": tmp_path / change["data"]}
    with pytest.raises(ValueError, match=message):
        run(replace(chosen, resume=True, **change))
    assert len(metrics_of(chosen.output)) == 1


@pytest.mark.parametrize("place", ["model", "step-3"])
@pytest.mark.parametrize("option", ["model", "ref_model"])
def test_a_model_that_the_run_would_overwrite_is_refused(options, place, option, tmp_path):
    chosen = options("run")
    with pytest.raises(ValueError, match="expected another folder than this run writes"):
        replace(chosen, **{option: str(tmp_path / "x" / ".." / "run" / place)})
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match=r"\(--(ref-)?model\)"):
        replace(chosen, **{option: str(tmp_path / "link" / place)})
    assert replace(chosen, **{option: str(tmp_path / "run" / "base")})


@pytest.mark.parametrize("at", ["step-1", "model"])
def test_no_folder_is_there_without_its_tokenizer(options, at, monkeypatch):
    chosen = options(max_steps=1)
    write = command.save_processor

    def broken(processor, folder):
        if at in folder.name:
            raise OSError("the disk is full")
        write(processor, folder)

    monkeypatch.setattr(command, "save_processor", broken)
    with pytest.raises(OSError, match="full"):
        run(chosen)
    names = {path.name for path in chosen.output.iterdir()}
    assert names == {"metrics.jsonl", "run.yaml"} | ({"step-1"} if at == "model" else set())


def test_what_a_reward_cannot_read_is_found_before_the_model_is_loaded(options, monkeypatch, capsys):
    lines = [{"prompt": "a", "answer": 5}, {"prompt": "b", "facts": [["sun", "green"]]}, {"prompt": "c", "facts": 3}]
    chosen = replace(options(), rewards={"accuracy": 1.0, "perception": 1.0})
    chosen.data.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "d", "answer": "5"}]))
    monkeypatch.setattr(command, "load_engine", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main(["train", "--config", str(_written(chosen)), "--grpo.max-steps", "1"]) == 1
    shown = capsys.readouterr().err
    assert "line 1: expected a string, got 5 (metadata['answer'] of request '1'), reward 'accuracy'" in shown
    assert "line 2: expected a fact of the judge's grammars" in shown
    assert "line 3: expected a list of facts, got 3 (metadata['facts'] of request '3')" in shown
    assert "got '3 bad lines'" in shown
    reward = weighted_reward(chosen.rewards)
    left = command.load_prompts(replace(chosen, allow_errors=True), chosen.data, reward)
    assert [request.request_id for request in left] == ["4"]
    with pytest.raises(ValueError, match=r"request '2', reward 'perception'"):
        reward.check(replace(left[0], request_id="2", metadata={"facts": [["sun", "green"]]}))


def _written(chosen):
    """The file of the options; they are a run's to be only when it begins."""
    command.write_options(chosen)
    return chosen.output / "run.yaml"


def test_prompts_that_cannot_be_trained_on_are_bad_lines(options, capsys):
    chosen = replace(options(), sampling=SamplingParams(max_tokens=4, presence_penalty=0.5))
    with pytest.raises(ValueError, match="got '6 bad lines'"):
        run(chosen)
    assert "line 1: expected request '1' to be sampled from the model's own logits" in capsys.readouterr().err


def test_numbers_of_numpy_and_torch_are_rewards(options):
    chosen = options(max_steps=2)
    source = next(iter(chosen.rewards)).rpartition(":")[0]
    run(replace(chosen, rewards={f"{source}:in_numpy": 0.5, f"{source}:in_torch": 1.0}))
    for line in metrics_of(chosen.output):
        assert line["reward/total"] == pytest.approx(0.5 * line["reward/in_numpy"] + line["reward/in_torch"])


def test_a_mistake_in_a_reward_shows_where_it_was_made(options, tmp_path):
    chosen = options(max_steps=1)
    source = next(iter(chosen.rewards)).rpartition(":")[0]
    with pytest.raises(ValueError, match="a mistake of the user's") as error:
        cli.main(["train", "--config", str(_written(replace(chosen, rewards={f"{source}:broken": 1.0})))])
    assert error.traceback[-1].path.name == "reward.py"
    assert any("raised by reward 'broken' of request '" in note for note in error.value.__notes__)
    (tmp_path / "wrong.py").write_text("raise ValueError('at import')")
    with pytest.raises(RuntimeError, match=r"wrong\.py:f could not be made") as error:
        weighted_reward({f"{tmp_path / 'wrong.py'}:f": 1.0})
    assert str(error.value.__cause__) == "at import"


def test_a_missing_extra_is_an_error_of_the_options(options, monkeypatch, capsys):
    def missing(*_):
        raise ImportError("tensorboard=True needs the package tensorboard")

    monkeypatch.setattr("foveate.rollout.metrics.check_extras", missing)
    assert cli.main(["train", "--config", str(_written(options(tensorboard=True)))]) == 1
    assert "foveate train: tensorboard=True needs" in capsys.readouterr().err


def test_evaluations_are_greedy(options):
    chosen = options(eval_data="data.jsonl", eval_every=1)
    source = '"metadata": {"source": "tests"}'
    chosen.data.write_text(f'{{"prompt": "a", "n": 4, {source}}}\n{{"prompt": "b", {source}}}\n')
    trainer, prompts = command.prepare(chosen)
    assert [(prompt.n, prompt.sampling.temperature) for prompt in prompts] == [(4, 1.0), (3, 1.0)]
    asked = trainer.evaluate.prompts
    assert [(prompt.n, prompt.sampling.temperature) for prompt in asked] == [(1, 0.0), (1, 0.0)]
    seen = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda requests, **more: (seen.extend(requests), generate(requests, **more))[1]
    assert trainer.evaluate(1) == trainer.evaluate(2)  # no noise in it
    assert [request.sampling.temperature for request in seen] == [0.0] * 4


def test_resume_with_nothing_there_begins(options):
    chosen = options(max_steps=1)
    words = ["--model", chosen.model, "--data", str(chosen.data), "--output", str(chosen.output), "--resume"]
    few = "--n 2 --rewards format 1 --sampling.max-tokens 2 --engine.kv-memory 4000000 --grpo.max-steps"
    words += [*few.split(), "1"]
    assert cli.main(["train", *words]) == 0
    assert len(metrics_of(chosen.output)) == 1


def test_run_yaml_repeats_the_run(options, tmp_path):
    chosen = options(max_grad_norm=None, betas=(0.5, 0.6))
    command.write_options(chosen)
    again = command.parse(TrainOptions, "test", ["--config", str(chosen.output / "run.yaml")])
    assert again == chosen
    assert "resume: false" in (chosen.output / "run.yaml").read_text()
    assert yaml.safe_load((chosen.output / "run.yaml").read_text())["grpo"]["max_grad_norm"] is None


def test_evaluation_and_a_reference(options):
    chosen = options(eval_data="data.jsonl", eval_every=2, max_steps=2, kl_coef=0.1, num_updates=2)
    run(chosen)
    first, second = metrics_of(chosen.output)
    assert "eval/total" not in first
    assert second["eval/total"] == pytest.approx(second["eval/low"] + 0.5 + 0.1 * second["eval/format"])
    assert first["policy/kl"] > 0


def test_bad_lines_stop_the_run_unless_allowed(options, capsys):
    chosen = options(max_steps=1)
    with chosen.data.open("a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match=r"expected prompts, or --allow-errors, got '1 bad lines'"):
        run(chosen)
    assert "data.jsonl, line 7: expected a JSON object" in capsys.readouterr().err
    allowed = replace(chosen, allow_errors=True)
    reward = weighted_reward(allowed.rewards)
    # A prompt comes again in the next epoch: its seed belongs to the step, not to the line.
    assert [request.sampling.seed for request in command.load_prompts(allowed, allowed.data, reward)] == [None] * 6
    assert run(allowed).step == 1


def test_rewards_by_name(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    table = weighted_reward({"rewards_of_a_test:low": 0.5, "rewards_of_a_test:Source": 1.0, "repetition": -2.0})
    assert [reward.name for reward in table.rewards] == ["low", "source", "repetition"]
    assert table.weights == {"low": 0.5, "source": 1.0, "repetition": -2.0}
    assert load_reward("foveate.rollout.rewards:Format").name == "format"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("acuracy", "expected one of ['accuracy', 'format', 'overlong', 'perception', 'repetition']"),
        ("nowhere.reward:f", "expected a module that can be imported, got nowhere.reward"),
        ("nowhere.py:f", "expected a file, got 'nowhere.py'"),
        ("{folder}/reward.py:high", "expected a function or class 'high'"),
        ("{folder}/reward.py:not_a_function", "expected a function or class"),
        ("{folder}/reward.py:", "expected one of"),
    ],
)
def test_wrong_rewards_are_named(tmp_path, source, message):
    (tmp_path / "reward.py").write_text(REWARD)
    with pytest.raises(ValueError, match=r"\(rewards.*\)") as error:
        weighted_reward({source.format(folder=tmp_path): 1.0})
    assert message in str(error.value)


def test_two_rewards_of_one_name_are_refused(tmp_path):
    (tmp_path / "reward.py").write_text("def format(group):\n    return []\n")
    with pytest.raises(ValueError, match="rewards with different names"):
        weighted_reward({"format": 1.0, f"{tmp_path / 'reward.py'}:format": 1.0})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--n 0", "(--n)"),
        ("--sampling.seed 3", "the seed in --grpo.seed"),
        ("--grpo.eval-every 2", "(--eval-data)"),
        ("--keep-checkpoints 0", "(--keep-checkpoints)"),
        ("--grpo.learning-rat 2", "--grpo.learning-rate"),
        ("--rewards format", "--rewards"),
    ],
)
def test_wrong_options_end_with_2(options, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--model", "m", "--data", str(options().data), *words.split()])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_two_ranks_train_as_one(options):
    """`torchrun --no-python --nproc-per-node 2 foveate train` writes what one process writes."""
    launch = runpy.run_path(str(Path(__file__).with_name("test_parallel.py")))["launch"]
    alone, together = options("alone", adam_eps=1e-4), options("together", adam_eps=1e-4)
    run(alone)
    command.write_options(together)
    program = [str(Path(sys.executable).with_name("foveate")), "train", "--config", str(together.output / "run.yaml")]
    ended = launch(2, program)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert str(together.output / "model") in ended[0][1]
    assert ended[1][1] == ""
    for one, two in zip(metrics_of(alone.output), metrics_of(together.output), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=2e-6)
    first, second = weights_of(alone.output / "model"), weights_of(together.output / "model")
    before = weights_of(Path(alone.model))
    moved = max(float((first[key] - before[key]).abs().max()) for key in first)
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-3 * moved
