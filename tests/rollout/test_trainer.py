"""Training on the engine's own rollouts: the loop, options, checkpoints."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from foveate.rollout import trainer as trainer_module
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.rewards import RewardTable
from foveate.rollout.testing import special_id, tiny_model
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request, VisionInputs

TOLERANCE = 5e-5  # of log-probs, engine against trainer, at initializer_range 0.2
SMALL = EngineConfig(page_size=16, kv_memory=4 << 20)
QUIET = {"progress": "none", "learning_rate": 1e-3}


def reward(group):
    """Rewards low token ids; depends on the tokens alone."""
    totals = [float((r.token_ids < 100).float().mean()) for r in group.rollouts]
    return RewardTable({"low": totals, "length": [float(len(r.token_ids)) for r in group.rollouts]}, totals)


def prompts(count, vision=False, n=3, **sampling):
    generator = torch.Generator().manual_seed(5)
    requests = []
    for index in range(count):
        ids = torch.randint(256, (3 + index,), generator=generator).tolist()
        inputs = None
        if vision:
            grid = torch.tensor([[1, 4, 6], [1, 8, 4]] if index % 2 else [[1, 2, 4]])
            for _, height, width in grid.tolist():
                ids += [special_id("<|vision_start|>")] + [special_id("<|image_pad|>")] * (height * width // 4)
                ids += [special_id("<|vision_end|>"), 66]
            inputs = VisionInputs(torch.randn(int(grid.prod(-1).sum()), 1176, generator=generator), grid)
        params = SamplingParams(**{"max_tokens": 6, "temperature": 1.0, **sampling})
        requests.append(Request(ids, vision=inputs, n=n, sampling=params, request_id=f"p{index}"))
    return requests


def make(family="qwen3", config=None, **kwargs):
    model = tiny_model(family)
    engine = Engine(model, config=SMALL)
    return Trainer(model, engine, kwargs.pop("reward", reward), config or GRPOConfig(**QUIET), **kwargs)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_two_steps(family, tmp_path):
    config = GRPOConfig(**QUIET, prompts_per_step=2, micro_batch_size=4, eval_every=2, save_every=2)
    records = []
    trained = make(
        family,
        config,
        output_dir=tmp_path,
        callbacks=[records.append],
        evaluate=lambda step: {"accuracy": step / 10},
    )
    before = weights_of(trained.model)
    addresses = [p.data_ptr() for p in trained.model.parameters()]
    trained.train(prompts(4, family == "qwen2_5_vl"))
    assert [record.step for record in records] == [1, 2]
    assert trained.engine.weight_version == 2
    assert addresses == [p.data_ptr() for p in trained.model.parameters()]
    changed = {name for name, value in weights_of(trained.model).items() if not torch.equal(value, before[name])}
    assert changed == set(before)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [record.metrics for record in records]
    for line in lines:
        assert line["policy/logprob_difference_max"] < TOLERANCE
        shares = [line[f"time/{name}_share"] for name in ("rollout", "reward", "update", "sync")]
        assert sum(shares) == pytest.approx(1)
        assert line["reward/total"] == line["reward/low"]
        assert line["optim/lr"] == 1e-3
    assert lines[1]["eval/accuracy"] == 0.2
    assert "eval/accuracy" not in lines[0]
    assert (tmp_path / "step-2" / "model.safetensors").exists()


def test_the_policy_learns():
    config = GRPOConfig(**{**QUIET, "learning_rate": 5e-3}, prompts_per_step=2, max_steps=12, aggregation="sequence")
    records = []
    make(config=config, callbacks=[records.append]).train(prompts(2, n=16))
    rewards = [record.metrics["reward/total"] for record in records]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_unscorable_and_failed_samples_teach_nothing(caplog):
    requests = prompts(3, n=3)
    requests[1] = replace(requests[1], prompt=[7] * 5000)  # beyond the context

    def some(group):
        table = reward(group)
        return replace(table, totals=[None, 0.25, 0.75] if group.request_id == "p0" else [None, None, 0.5])

    trained = make(reward=some)
    batches = []
    update = trained.learner.update
    trained.learner.update = lambda batch, *rates: (batches.append(batch), update(batch, *rates))[1]
    record = trained.train_step(requests)
    half = math.sqrt(0.5)
    # {1/4, 3/4}: mean 1/2, std 1/4 sqrt 2; the third request has one scorable sample
    expected = torch.tensor([0, -half, half, 0, 0, 0]) / (1 + 1e-6 / (0.25 * math.sqrt(2)))
    torch.testing.assert_close(batches[0].advantages, expected, rtol=1e-6, atol=0)
    taught = torch.tensor([False, True, True, False, False, True])
    lengths = torch.tensor([len(sample.rollout.token_ids) for sample in batches[0].samples])
    assert torch.equal(batches[0].taught, taught)
    assert batches[0].denominator == int(lengths[taught].sum())
    assert record.metrics["sample/unscorable"] == 3
    assert record.metrics["group/failed"] == 1
    assert record.metrics["reward/total"] == pytest.approx(0.5)
    assert record.tables[1] is None
    assert "'p1' failed" in caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, sum),
        ({"aggregation": "sequence"}, len),
        ({"aggregation": "constant", "aggregation_length": 50}, lambda lengths: 50 * len(lengths)),
    ],
)
def test_options_reach_the_batch(options, expected):
    totals = iter([[0.0, 1.0], [2.0, 6.0]])
    config = GRPOConfig(**QUIET, **options, advantage_ddof=0, advantage_eps=0.5, warmup_steps=4)
    trained = make(config=config, reward=lambda group: RewardTable({}, next(totals)))
    update, batches = trained.learner.update, []
    trained.learner.update = lambda batch, *rates: (batches.append(batch), update(batch, *rates))[1]
    record = trained.train_step(prompts(2, n=2))
    assert batches[0].advantages.tolist() == pytest.approx([-0.5, 0.5, -0.8, 0.8])  # std 1/2 and 2, plus 1/2
    lengths = [len(r.token_ids) for g in record.groups for r in g.rollouts]
    assert batches[0].denominator == expected(lengths)
    assert batches[0].taught.all()
    assert record.metrics["optim/lr"] == 1e-3 / 4


def test_seeds_of_requests():
    def drawn(trained, requests):
        groups = trained.train_step(requests).groups
        return [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]

    prompt = prompts(1)[0]
    twins = [replace(prompt, request_id="a"), replace(prompt, request_id="b")]
    trained = make(config=GRPOConfig(**{**QUIET, "learning_rate": 0.0}))
    first, second = drawn(trained, twins), drawn(trained, twins)
    assert len({str(samples) for samples in first + second}) == 4  # another noise in each place and step
    fixed = [replace(twins[0], sampling=replace(prompt.sampling, seed=3))]
    assert drawn(trained, fixed) == drawn(trained, fixed)  # the caller's own seed stays
    other = make(config=GRPOConfig(**{**QUIET, "learning_rate": 0.0}, seed=1))
    assert drawn(other, twins) != first
    assert drawn(make(config=trained.config), twins) == first


@pytest.mark.parametrize("where", ["total", "part"])
def test_a_nan_reward_names_its_sample(where):
    def broken(group):
        table = reward(group)
        bad = [*table.totals[:-1], float("nan")]
        if group.request_id != "p1":
            return table
        return replace(table, totals=bad) if where == "total" else replace(table, parts={"low": bad})

    with pytest.raises(
        ValueError, match=r"a finite '(total|low)' or None, got nan \(reward of request 'p1', sample 2\)"
    ):
        make(reward=broken).train_step(prompts(2))


def test_a_short_reward_table_is_refused():
    with pytest.raises(ValueError, match=r"3 totals, got 1 .*'p0'"):
        make(reward=lambda group: RewardTable({}, [1.0])).train_step(prompts(1))


def test_a_gradient_that_is_not_finite_names_its_step():
    trained = make()
    trained.step = 4
    trained.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(RuntimeError, match=r"\(step 5, update 1 of 1\)"):
        trained.train_step(prompts(1))


def test_a_step_of_failures_says_why():
    requests = [replace(prompts(1)[0], prompt=[7] * 5000)]
    with pytest.raises(RuntimeError, match="got none of 1 requests"):
        make().train_step(requests)


def test_temperature_and_bans_reach_the_comparison():
    """Temperature 0.7 and a narrow top-p: the engine's whole-vocabulary log-probs are still the trainer's."""
    record = make().train_step(prompts(2, temperature=0.7, top_p=0.5))
    assert record.metrics["policy/logprob_difference_max"] < TOLERANCE


def test_order_of_prompts():
    seen = []
    trained = make(config=GRPOConfig(**QUIET, prompts_per_step=2, max_steps=6, seed=3))

    def record_only(requests, more):
        seen.append([request.request_id for request in requests])
        trained.step += 1
        return trainer_module.StepRecord(trained.step, [], [], {})

    trained.train_step = record_only
    trained.train(prompts(5))
    assert [len(batch) for batch in seen] == [2, 2, 1, 2, 2, 1]
    epochs = [[name for batch in part for name in batch] for part in (seen[:3], seen[3:])]
    assert all(sorted(epoch) == [f"p{i}" for i in range(5)] for epoch in epochs)
    assert epochs[0] != epochs[1]
    trained.step, first = 4, list(seen)
    seen.clear()
    trained.train(prompts(5))
    assert seen == first[4:]
    trained.step = 3
    seen.clear()
    trained.train(iter(prompts(5)))  # an iterator is taken as it comes, up to max_steps
    assert seen == [["p0", "p1"], ["p2", "p3"], ["p4"]]


def test_options_that_need_something():
    for config, name in (
        ({"kl_coef": 0.1}, "ref_model"),
        ({"save_every": 1}, "output_dir"),
        ({"eval_every": 1}, "evaluate"),
    ):
        with pytest.raises(ValueError, match=rf"\({name}\)"):
            make(config=GRPOConfig(**QUIET, **config))


# Checkpoints


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_a_checkpoint_loads_with_from_pretrained(family, tmp_path):
    trained = make(family)
    trained.train_step(prompts(2, family == "qwen2_5_vl"))
    trained.save_checkpoint(tmp_path / "last")
    loaded = type(trained.model).from_pretrained(tmp_path / "last")
    assert_same_weights(weights_of(loaded), weights_of(trained.model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]


def make_model(kind):
    model = tiny_model("qwen3", tie_word_embeddings=kind == "tied")
    if kind != "lora":
        return model
    peft = pytest.importorskip("peft")
    options = {"r": 2, "init_lora_weights": False, "lora_alpha": 4}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], **options))


@pytest.mark.parametrize("kind", ["plain", "tied", "lora"])
def test_a_resumed_run_takes_the_same_next_step(kind, tmp_path):
    config = GRPOConfig(**QUIET, prompts_per_step=2, num_updates=2, warmup_steps=4, weight_decay=0.1)
    requests = prompts(6)

    def fresh():
        torch.manual_seed(3)  # of the adapter
        model = make_model(kind)
        return Trainer(model, Engine(model, config=SMALL), reward, config)

    whole = fresh()
    records = []
    whole.callbacks.append(records.append)
    whole.train(requests)
    first = fresh()
    first.config = first.learner.config = replace(config, max_steps=2)
    first.train(requests)
    first.save_checkpoint(tmp_path / "two")
    resumed = fresh()
    resumed.train_step(prompts(1))  # leaves optimiser state and weights that must all be replaced
    resumed.engine.generate(prompts(1), progress=False)
    addresses = [p.data_ptr() for p in resumed.model.parameters()]
    version = resumed.engine.weight_version
    resumed.load_checkpoint(tmp_path / "two")
    assert resumed.engine.weight_version == version + 1  # nothing cached under the other weights is used
    assert addresses == [p.data_ptr() for p in resumed.model.parameters()]
    assert resumed.step == 2
    again = []
    resumed.callbacks.append(again.append)
    resumed.train(requests)
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
    tokens = [[r.token_ids.tolist() for g in record.groups for r in g.rollouts] for record in (records[2], again[0])]
    assert len(again) == 1
    assert tokens[0] == tokens[1]
    assert resumed.engine.num_requests == whole.engine.num_requests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate = 0.001, with which the run was begun, got 1.0"),
        ({"seed": 9}, "seed = 0"),
        ({"prompts_per_step": 1}, "prompts_per_step = 2"),
        ({}, "the prompts with which the run was begun"),
    ],
)
def test_a_resume_with_other_options_or_prompts_is_refused(change, message, tmp_path):
    config = GRPOConfig(**QUIET, prompts_per_step=2, max_steps=1, save_every=1)
    make(config=config, output_dir=tmp_path).train(prompts(4))
    resumed = make(config=replace(config, max_steps=2, **change), output_dir=tmp_path)
    before = weights_of(resumed.model)
    if change:
        with pytest.raises(ValueError, match=message):
            resumed.load_checkpoint(tmp_path / "step-1")
        assert_same_weights(weights_of(resumed.model), before)
        return
    resumed.load_checkpoint(tmp_path / "step-1")
    with pytest.raises(ValueError, match=message):
        resumed.train(prompts(4, n=2))
    resumed.train(prompts(4))
    assert resumed.step == 2


def test_a_resume_with_another_reference_is_refused(tmp_path):
    config = GRPOConfig(**QUIET, kl_coef=0.1)
    make(config=config, ref_model=tiny_model("qwen3")).save_checkpoint(tmp_path / "a")
    make(config=config, ref_model=tiny_model("qwen3")).load_checkpoint(tmp_path / "a")
    with pytest.raises(ValueError, match=r"ref_model = '.*', with which the run was begun"):
        make(config=config, ref_model=tiny_model("qwen3", seed=1)).load_checkpoint(tmp_path / "a")


def test_numbers_of_any_kind_are_rewards(tmp_path):
    def of_numpy(group):
        totals = [np.float32(len(r.token_ids) / 8) for r in group.rollouts]
        return RewardTable({"low": list(torch.tensor(totals)), "flag": [True] * len(totals)}, totals)

    trained = make(reward=of_numpy, output_dir=tmp_path, config=GRPOConfig(**QUIET, max_steps=1))
    trained.train(prompts(2))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["reward/total"] == line["reward/low"] > 0
    with pytest.raises(ValueError, match=r"expected a number or None, got 'much' \(reward of request 'p0'"):
        make(reward=lambda group: RewardTable({}, ["much"] * 3)).train_step(prompts(1))


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    trained = make()
    trained.save_checkpoint(tmp_path / "last")
    before = (tmp_path / "last" / "trainer.json").read_text()
    trained.step = 9

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("foveate.rollout.checkpoint.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        trained.save_checkpoint(tmp_path / "last")
    assert (tmp_path / "last" / "trainer.json").read_text() == before
    monkeypatch.undo()
    trained.save_checkpoint(tmp_path / "last")
    assert json.loads((tmp_path / "last" / "trainer.json").read_text())["state"]["step"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_another_models_checkpoint_changes_nothing(tmp_path):
    model = tiny_model("qwen3", hidden_size=24)
    Trainer(model, Engine(model, config=SMALL), reward, GRPOConfig(**QUIET)).save_checkpoint(tmp_path / "other")
    trained = make()
    before = weights_of(trained.model)
    with pytest.raises(ValueError, match="expected"):
        trained.load_checkpoint(tmp_path / "other")
    with pytest.raises(ValueError, match=r"\(directory\)"):
        trained.load_checkpoint(tmp_path / "missing")
    assert_same_weights(before, weights_of(trained.model))


def test_generators_are_restored(tmp_path):
    trained = make()
    state = torch.get_rng_state()
    trained.save_checkpoint(tmp_path / "last")
    expected = torch.rand(3)
    trained.load_checkpoint(tmp_path / "last")
    assert torch.equal(torch.rand(3), expected)
    torch.set_rng_state(state)


def test_another_models_engine_is_refused():
    with pytest.raises(ValueError, match="an engine made with this model"):
        Trainer(tiny_model("qwen3"), Engine(tiny_model("qwen3"), config=SMALL), reward, GRPOConfig(**QUIET))


def test_a_reference_that_is_the_policy_is_refused():
    model = tiny_model("qwen3")
    with pytest.raises(ValueError, match="a reference model with parameters of its own"):
        Trainer(model, Engine(model, config=SMALL), reward, GRPOConfig(**QUIET, kl_coef=0.1), ref_model=model)
