"""Training on the engine's own rollouts: exactness of the update, the loop, checkpoints."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from foveate.rollout import trainer as trainer_module
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.learner import Batch, Learner
from foveate.rollout.policy import Sample
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


# One update


def batch_of(model, vision, **kwargs):
    engine = Engine(model, config=SMALL)
    groups = engine.generate(prompts(3, vision, seed=1), progress=False)
    samples = [Sample(g, r) for g in groups for r in g.rollouts]
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(len(samples), generator=generator)
    weights = torch.rand(len(samples), generator=generator) / 50
    return Batch(samples, advantages, weights)


def gradient_after(model, batch, config):
    learner = Learner(model, None, config)
    learner.optimizer.step = lambda: None
    report = learner.update(batch, 1e-3)
    return {name: p.grad.double() for name, p in model.named_parameters()}, report


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_micro_batches_add_up_to_the_whole(family):
    """The gradient of any cut is as close to float64 as that of the whole batch, up to twice its error."""
    model = tiny_model(family)
    batch = batch_of(model, family == "qwen2_5_vl")
    limits = {"max_grad_norm": None, "micro_batch_size": 64}
    truth, _ = gradient_after(copy.deepcopy(model).double(), batch, GRPOConfig(**limits))
    whole, whole_report = gradient_after(model, batch, GRPOConfig(**limits))
    norm = sum(float(g.square().sum()) for g in truth.values()) ** 0.5

    def error(got):
        return sum(float((got[n] - truth[n]).square().sum()) for n in truth) ** 0.5

    assert error(whole) < 1e-4 * norm
    for cut in ({"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 40}):
        got, report = gradient_after(model, batch, GRPOConfig(**{**limits, **cut}))
        assert error(got) <= 2 * error(whole) + torch.finfo(torch.float32).eps * norm
        assert report["policy/loss"] == pytest.approx(whole_report["policy/loss"], rel=1e-5, abs=1e-7)


def test_the_first_update_is_the_policy_gradient():
    """On policy the clipped loss has the gradient of -sum w A logprob, whatever the clips are."""
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    got, report = gradient_after(model, batch, GRPOConfig(max_grad_norm=None))
    model.zero_grad()
    for sample, advantage, weight in zip(batch.samples, batch.advantages, batch.weights, strict=True):
        ids = torch.cat([sample.group.prompt_ids, sample.rollout.token_ids])[None]
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(sample.group.prompt_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, sample.rollout.token_ids[:, None])
        (-weight * advantage * chosen.sum()).backward()
    norm = sum(float(g.square().sum()) for g in got.values()) ** 0.5
    error = sum(float((p.grad - got[n]).square().sum()) for n, p in model.named_parameters()) ** 0.5
    assert error < 1e-4 * norm
    assert report["policy/clip_low"] == report["policy/clip_high"] == report["policy/clip_dual"] == 0
    assert report["optim/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("vision", [False, True])
def test_checkpointing_changes_no_gradient(vision):
    family = "qwen2_5_vl" if vision else "qwen3"
    model = tiny_model(family)
    batch = batch_of(model, vision)
    plain, _ = gradient_after(copy.deepcopy(model), batch, GRPOConfig())
    saved, _ = gradient_after(model, batch, GRPOConfig(gradient_checkpointing=True))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_old_policy_of_later_updates_is_that_of_the_first():
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    config = GRPOConfig(num_updates=3, clip_low=0.01, clip_high=0.01, learning_rate=1e-2)
    report = Learner(model, None, config).update(batch, 1e-2)
    assert report["policy/clip_low"] > 0
    assert report["policy/clip_high"] > 0
    assert report["policy/logprob_difference_max"] < TOLERANCE  # taken before the first update


def test_engine_old_logprobs_and_importance_weights():
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    shifted = [replace(s, rollout=replace(s.rollout, logprobs=s.rollout.logprobs + math.log(2))) for s in batch.samples]
    shifted = replace(batch, samples=shifted)
    engine = GRPOConfig(old_logprobs="engine", dual_clip=None, max_grad_norm=None)
    _, report = gradient_after(model, shifted, engine)  # ratio 1/2: clips where A < 0
    negative = sum(len(s.rollout.token_ids) for s, a in zip(batch.samples, batch.advantages, strict=True) if a < 0)
    count = sum(len(s.rollout.token_ids) for s in batch.samples)
    assert report["policy/clip_low"] == pytest.approx(negative / count)
    assert report["policy/logprob_difference_mean"] == pytest.approx(math.log(2), abs=TOLERANCE)
    plain, _ = gradient_after(model, batch, GRPOConfig(max_grad_norm=None))
    halved, report = gradient_after(model, shifted, GRPOConfig(max_grad_norm=None, tis_cap=2.0))
    assert report["policy/tis_weight"] == pytest.approx(0.5, abs=TOLERANCE)
    for name in plain:
        torch.testing.assert_close(halved[name], plain[name] / 2, rtol=1e-3, atol=float(plain[name].abs().max()) * 1e-4)


def test_kl_to_a_reference():
    model = tiny_model("qwen3")
    batch = replace(batch_of(model, False), advantages=torch.zeros(9))
    config = GRPOConfig(kl_coef=0.5, kl_kind="k3")
    same = Learner(model, copy.deepcopy(model), config).update(batch, 0.0)
    other = Learner(model, tiny_model("qwen3", seed=1), config).update(batch, 0.0)
    assert same["policy/kl"] == 0
    assert same["optim/grad_norm"] == 0
    assert other["policy/kl"] > 0.01
    assert other["optim/grad_norm"] > 0
    assert other["policy/loss"] > 0


def test_bf16_forward_is_close_and_parameters_stay():
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    plain, _ = gradient_after(model, batch, GRPOConfig(max_grad_norm=None))
    mixed, _ = gradient_after(model, batch, GRPOConfig(max_grad_norm=None, precision="bf16"))
    norm = sum(float(g.square().sum()) for g in plain.values()) ** 0.5
    error = sum(float((mixed[n] - plain[n]).square().sum()) for n in plain) ** 0.5
    assert 0 < error < 0.3 * norm
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_non_finite_gradient_stops_before_the_step():
    model = tiny_model("qwen3")
    batch = replace(batch_of(model, False), advantages=torch.full((9,), float("inf")))
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        Learner(model, None, GRPOConfig()).update(batch, 1e-3)
    assert_same_weights(before, weights_of(model))


def test_dropout_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no dropout.*self_attn"):
        Learner(tiny_model("qwen3", attention_dropout=0.1), None, GRPOConfig())


# The loop


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
    trained.learner.update = lambda batch, rate: (batches.append(batch), update(batch, rate))[1]
    record = trained.train_step(requests)
    half = math.sqrt(0.5)
    # {1/4, 3/4}: mean 1/2, std 1/4 sqrt 2; the third request has one scorable sample
    expected = torch.tensor([0, -half, half, 0, 0, 0]) / (1 + 1e-6 / (0.25 * math.sqrt(2)))
    torch.testing.assert_close(batches[0].advantages, expected, rtol=1e-6, atol=0)
    assert record.metrics["sample/unscorable"] == 3
    assert record.metrics["group/failed"] == 1
    assert record.metrics["reward/total"] == pytest.approx(0.5)
    assert record.tables[1] is None
    assert "'p1' failed" in caplog.text


@pytest.mark.parametrize("where", ["total", "part"])
def test_a_nan_reward_names_its_request(where):
    def broken(group):
        table = reward(group)
        bad = [*table.totals[:-1], float("nan")]
        if group.request_id != "p1":
            return table
        return replace(table, totals=bad) if where == "total" else replace(table, parts={"low": bad})

    with pytest.raises(ValueError, match=r"finite.*reward of request 'p1'"):
        make(reward=broken).train_step(prompts(2))


def test_a_short_reward_table_is_refused():
    with pytest.raises(ValueError, match=r"3 totals, got 1 .*'p0'"):
        make(reward=lambda group: RewardTable({}, [1.0])).train_step(prompts(1))


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

    def record_only(requests):
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


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_takes_the_same_next_step(tied, tmp_path):
    config = GRPOConfig(**QUIET, prompts_per_step=2, num_updates=2, warmup_steps=4, weight_decay=0.1)
    requests = prompts(6)

    def fresh():
        model = tiny_model("qwen3", tie_word_embeddings=tied)
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
    resumed.load_checkpoint(tmp_path / "two")
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
    assert json.loads((tmp_path / "last" / "trainer.json").read_text())["step"] == 9
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
