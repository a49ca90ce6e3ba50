"""Training on pruned rollouts: by replay, by a dense learner, and with a share of pruned groups."""

from __future__ import annotations

import pytest

from foveate.rollout import schedules
from foveate.rollout.batch import make_batch
from foveate.rollout.collect import Collector
from foveate.rollout.config import EngineConfig, PruneConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.metrics import Clock
from foveate.rollout.rewards import RewardTable
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request, VisionInputs
from foveate.testing.pruned_groups import hand_made, mixed_groups, model_of

ENCODER, LAYER = PruneConfig("divprune", 0.3), PruneConfig("fastv", 0.3, layer=1)
GRIDS = [[[1, 4, 6], [1, 8, 4]], [[1, 6, 6]]]
OPTIONS = {"progress": "none", "prompts_per_step": 2, "learning_rate": 0.0}


def reward(group) -> RewardTable:
    return RewardTable({}, [float(rollout.token_ids.sum() % 7) for rollout in group.rollouts])


def requests_of(model) -> list[Request]:
    made = [hand_made(model, grids, (1,), seed) for seed, grids in enumerate(GRIDS)]
    return [
        Request(
            group.prompt_ids,
            vision=VisionInputs(group.pixel_values, group.image_grid_thw),
            n=3,
            sampling=SamplingParams(max_tokens=8, ignore_eos=True),
        )
        for group in made
    ]


def step_of(prune: PruneConfig | None, **options):
    """Without bans: what is drawn is drawn from the whole vocabulary, as the trainer's log-probs are."""
    model = model_of("qwen2_5_vl")
    config = EngineConfig(kv_memory=1 << 22, page_size=8, prune=prune, ban_vision_tokens=False)
    engine = Engine(model, config=config)
    trainer = Trainer(model, engine, reward, GRPOConfig(**{**OPTIONS, **options}))
    return trainer.train_step(requests_of(model))


@pytest.mark.parametrize("prefix_grouping", [False, True])
@pytest.mark.parametrize("prune", [ENCODER, LAYER], ids=["encoder", "layer"])
def test_the_loop_learns_the_policy_that_was_sampled(prune, prefix_grouping):
    """By default; a dense learner sees another policy, which the metrics say."""
    replayed = step_of(prune, prefix_grouping=prefix_grouping)
    assert all(group.keep is not None for group in replayed.groups)
    assert replayed.metrics["policy/logprob_difference_max"] < 5e-5
    dense = step_of(prune, prefix_grouping=prefix_grouping, pruned_policy="dense")
    assert all(group.keep is not None for group in dense.groups)  # the record tells what was sampled
    assert dense.metrics["policy/logprob_difference_max"] > 0.1
    more = sum(len(group.prompt_ids) - group.keep.positions.shape[1] for group in dense.groups)
    forwarded = [record.metrics["throughput/tokens_forwarded"] for record in (dense, replayed)]
    assert forwarded[0] - forwarded[1] == more * (1 if prefix_grouping else 3)


def test_a_dense_learner_is_corrected():
    """Weights of the mismatch leave less than the whole sample effective, and a rejection takes tokens out."""
    replayed = step_of(ENCODER, correction="tis").metrics
    assert replayed["policy/ess"] == pytest.approx(1, abs=1e-3)
    dense = step_of(ENCODER, correction="tis", pruned_policy="dense").metrics
    assert dense["policy/ess"] < 0.99
    assert dense["policy/mismatch_k3"] > 100 * abs(replayed["policy/mismatch_k3"])
    bounds = {"rejection": "geometric", "rejection_low": 0.9999, "rejection_high": 1.0001}
    rejected = [
        step_of(ENCODER, pruned_policy=policy, **bounds).metrics["policy/dropped"] for policy in ("replay", "dense")
    ]
    assert rejected == [0, 1]


def test_a_dense_batch_forgets_the_plans():
    model = model_of("qwen2_5_vl")
    groups = mixed_groups(model)[:2]
    tables = [RewardTable({}, [0.0] * len(group.rollouts)) for group in groups]
    dense = make_batch(groups, tables, GRPOConfig(pruned_policy="dense"), None).samples
    assert all(sample.group.keep is None for sample in dense)
    assert len({id(sample.group) for sample in dense}) == 2  # one object a group: its samples share a row
    assert all(group.keep is not None for group in groups)
    replayed = make_batch(groups, tables, GRPOConfig(), None).samples
    assert [sample.group.keep for sample in replayed] == [groups[0].keep] * 3 + [groups[1].keep] * 2


def test_the_share_of_pruned_groups():
    config = GRPOConfig(pruned_share=0.8, pruned_share_end=0.2, max_steps=6)
    shares = [schedules.pruned_share(config, step) for step in (0, 3, 6, 9)]
    assert shares == pytest.approx([0.8, 0.5, 0.2, 0.2])
    assert schedules.pruned_share(GRPOConfig(pruned_share=0.3), 100) == 0.3
    for share, expected in ((1.0, [False] * 2), (0.0, [True] * 2)):
        record = step_of(ENCODER, pruned_share=share)
        assert [group.keep is None for group in record.groups] == expected


def test_which_groups_are_pruned_is_drawn_anew_each_step():
    model = model_of("qwen2_5_vl")
    engine = Engine(model, config=EngineConfig(kv_memory=1 << 22, prune=ENCODER))
    collector = Collector(engine, reward, GRPOConfig(pruned_share=0.25), Clock())
    many = requests_of(model) * 200
    first, again, later = (
        [request.prune is None for request in collector._shared_out(many, step, 0)] for step in (0, 0, 1)
    )
    assert first == again != later
    deviation = (400 * 0.25 * 0.75) ** 0.5
    assert abs(first.count(False) - 100) < 4 * deviation
    rest = [request.prune is None for request in collector._shared_out(many[7:20], 0, 7)]
    assert rest == first[7:20]  # a draw goes with the place in the step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruned_policy": "sparse"}, "pruned_policy"),
        ({"pruned_share": 1.1}, "pruned_share"),
        ({"pruned_share_end": -0.1, "max_steps": 3}, "pruned_share_end"),
        ({"pruned_share_end": 0.5}, "max_steps"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=rf"\({message}\)"):
        GRPOConfig(**options)


def test_a_share_needs_an_engine_that_prunes_at_the_encoder():
    with pytest.raises(ValueError, match=r"an engine that prunes at the encoder.*\(pruned_share\)"):
        step_of(LAYER, pruned_share=0.5)


def test_a_resume_with_other_pruning_is_refused(tmp_path):
    """Else the rest of the run would be another policy's, and nothing would say so."""

    def trainer(prune: PruneConfig | None) -> Trainer:
        model = model_of("qwen2_5_vl")
        return Trainer(model, Engine(model, config=EngineConfig(kv_memory=1 << 22, prune=prune)), reward)

    trainer(ENCODER).save_checkpoint(tmp_path / "a")
    trainer(PruneConfig("divprune", 0.3)).load_checkpoint(tmp_path / "a")
    for other in (None, PruneConfig("divprune", 0.4), LAYER):
        with pytest.raises(ValueError, match=r"prune = .*'divprune'.*, with which the run was begun, got .*\(prune\)"):
            trainer(other).load_checkpoint(tmp_path / "a")
    trainer(PruneConfig("pyramiddrop", layers=(1, 2))).save_checkpoint(tmp_path / "b")  # through JSON and back
    trainer(PruneConfig("pyramiddrop", layers=(1, 2))).load_checkpoint(tmp_path / "b")
