"""The soft overlong penalty against the cases of its equation."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.rewards import Overlong, Repetition, WeightedReward, overlong_penalty
from foveate.rollout.types import Request, Rollout, RolloutGroup


def make_group(lengths, max_tokens=256, reasons=None):
    def rollout(length, reason):
        values = torch.zeros(length)
        return Rollout(torch.zeros(length, dtype=torch.int64), values, values, values, reason)

    reasons = reasons or ["length"] * len(lengths)
    rollouts = tuple(rollout(length, reason) for length, reason in zip(lengths, reasons, strict=True))
    request = Request("?", n=len(lengths), sampling=SamplingParams(max_tokens=max_tokens), request_id="r")
    none = torch.zeros(0, dtype=torch.int32)
    return RolloutGroup(request, "r", none.long(), none.expand(3, 0), 0, none, rollouts)


def equation(length, limit, buffer):
    """DAPO's equation 13, case by case."""
    if length <= limit - buffer:
        return Fraction(0)
    if length <= limit:
        return Fraction((limit - buffer) - length, buffer)
    return Fraction(-1)


@pytest.mark.parametrize(("limit", "buffer"), [(10, 4), (10, 10), (7, 1), (1, 1), (20480, 4096)])
def test_the_equation(limit, buffer):
    edges = {0, 1, limit - buffer, limit - buffer + 1, limit - 1, limit, limit + 1, 2 * limit}
    for length in edges | set(range(min(limit, 30))):
        assert overlong_penalty(length, limit, buffer) == float(equation(length, limit, buffer))


def test_the_published_values():
    assert [overlong_penalty(n, 20480, 4096) for n in (16384, 18432, 20480, 20481)] == [0.0, -0.5, -1.0, -1.0]


def test_tokens_of_a_group():
    lengths = [0, 6, 7, 8, 10]
    assert Overlong(4, max_tokens=10)(make_group(lengths)) == [0.0, 0.0, -0.25, -0.5, -1.0]
    assert Overlong(4)(make_group(lengths, max_tokens=10)) == [0.0, 0.0, -0.25, -0.5, -1.0]
    assert Overlong()(make_group([8, 9, 10], max_tokens=10)) == [0.0, -0.5, -1.0]  # a fifth
    assert Overlong()(make_group([8, 9, 10, 11], max_tokens=11)) == [0.0, -1 / 3, -2 / 3, -1.0]  # rounded up: 3
    assert Overlong(4)(make_group(lengths, max_tokens=20)) == [0.0] * 5


def test_as_a_part_of_a_reward():
    reward = WeightedReward((Overlong(4), Repetition()), {"overlong": 1.0, "repetition": -2.0})
    table = reward(make_group([5, 8, 8], max_tokens=10, reasons=["stop", "length", "abort"]))
    assert table.parts["overlong"] == [0.0, -0.5, None]
    assert table.totals == [0.0, -0.5, None]
    with pytest.raises(
        ValueError, match=r"expected at least 4, the buffer, got 3 \(max_tokens of request 'r'\).*overlong"
    ):
        reward.check(make_group([1], max_tokens=3).request)
    with pytest.raises(ValueError, match="the buffer, got 3"):
        reward(make_group([1], max_tokens=3))
    Overlong(4, max_tokens=10).check(make_group([1], max_tokens=3).request)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0,), "buffer"), ((1.5,), "buffer"), ((True,), "buffer"), ((4, 3), "max_tokens"), ((4, 8.0), "max_tokens")],
)
def test_refusals_by_name(arguments, name):
    with pytest.raises(ValueError, match=rf"\({name}\)"):
        Overlong(*arguments)
