"""Rewards of groups to the batch of a step: which kind of advantage, which columns, what the loss is divided by."""

from types import SimpleNamespace

import pytest
import torch

from foveate.rollout.batch import make_batch
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.rewards import RewardTable


def make(lengths, tables, weights=None, **options):
    """One group for each list of lengths; a table is totals, or parts whose sum is the total."""
    groups = [
        SimpleNamespace(
            rollouts=[SimpleNamespace(token_ids=torch.zeros(length, dtype=torch.int64)) for length in group],
            request_id=f"p{index}",
            error=ValueError("too long"),
        )
        for index, group in enumerate(lengths)
    ]
    read = [
        table if table is None else RewardTable({}, table) if isinstance(table, list) else table for table in tables
    ]
    return make_batch(groups, read, GRPOConfig(**options), weights)


def white(values, weights=None):
    """Over tokens where weights are their numbers; ddof 1."""
    x = torch.tensor(values, dtype=torch.float64)
    x = x.repeat_interleave(torch.tensor(weights)) if weights else x
    return ((x - x.mean()) / (x.std() + 1e-6)).float()


LENGTHS, TOTALS = [[2, 4], [1, 3, 5]], [[0.0, 1.0], [0.0, 0.0, 3.0]]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("dr_grpo", [-0.5, 0.5, -1.0, -1.0, 2.0]),
        ("rloo", [-1.0, 1.0, -1.5, -1.5, 3.0]),
    ],
)
def test_kinds_over_the_group(advantage, expected):
    batch = make(LENGTHS, TOTALS, advantage=advantage)
    assert batch.advantages.tolist() == pytest.approx(expected)
    assert batch.denominator == 15
    assert batch.taught.all()


@pytest.mark.parametrize(
    ("advantage", "scores"),
    [("reinforce++", [0.0, 1.0, 0.0, 0.0, 3.0]), ("reinforce++_baseline", [-0.5, 0.5, -1.0, -1.0, 2.0])],
)
def test_kinds_over_the_batch_count_tokens(advantage, scores):
    lengths = [2, 4, 1, 3, 5]
    got = make(LENGTHS, TOTALS, advantage=advantage).advantages
    torch.testing.assert_close(got.repeat_interleave(torch.tensor(lengths)), white(scores, lengths))


def test_the_kind_of_loss_chooses_the_advantage():
    got = make(LENGTHS, TOTALS, kind="dr_grpo", aggregation_length=10)
    assert got.advantages.tolist() == pytest.approx([-0.5, 0.5, -1.0, -1.0, 2.0])
    assert got.denominator == 50
    assert make(LENGTHS, TOTALS, kind="gspo").denominator == 5  # sequences
    own = make(LENGTHS, TOTALS, kind="gspo", advantage="rloo").advantages
    assert own.tolist() == pytest.approx([-1.0, 1.0, -1.5, -1.5, 3.0])


def test_gdpo_normalises_each_part():
    """Both parts of the first group, one of which does not apply to the second; a part of weight 0 is not read."""
    tables = [
        RewardTable({"a": [0.0, 1.0], "b": [10.0, 30.0], "seen": [None, 7.0]}, [1.0, 4.0]),
        RewardTable({"a": [2.0, 0.0]}, [2.0, 0.0]),
    ]
    got = make([[2, 2], [2, 2]], tables, {"a": 1.0, "b": 0.5, "seen": 0.0}, advantage="gdpo").advantages
    half = 0.5**0.5
    torch.testing.assert_close(got, white([-1.5 * half, 1.5 * half, half, -half]), rtol=1e-5, atol=0)


def test_gdpo_leaves_out_a_sample_without_one_of_its_parts():
    """Or without a total, as one that the engine broke off."""
    tables = [RewardTable({"a": [0.0, 1.0, None, 0.5]}, [0.0, 1.0, 2.0, None])]
    batch = make([[2, 2, 2, 2]], tables, {"a": 1.0}, advantage="gdpo")
    assert batch.taught.tolist() == [True, True, False, False]
    assert batch.advantages[2:].tolist() == [0, 0]
    assert batch.denominator == 4


def test_what_cannot_be_learnt_from(caplog):
    batch = make([[2, 0, 3], [4], [1, 1]], [[1.0, 0.0, None], None, [0.0, 1.0]])
    assert [len(sample.rollout.token_ids) for sample in batch.samples] == [2, 3, 1, 1]
    assert batch.taught.tolist() == [True, False, True, True]
    assert batch.advantages[:2].tolist() == [0, 0]  # one scorable sample has no group to compare with
    assert batch.denominator == 4
    assert "'p1' failed" in caplog.text
    nothing = make([[2, 3]], [[None, None]])
    assert not nothing.taught.any()
    assert nothing.denominator == 1
    with pytest.raises(RuntimeError, match="too long"):
        make([[2]], [None])
