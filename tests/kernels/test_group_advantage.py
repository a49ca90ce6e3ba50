"""Group advantages: against decimal arithmetic of 60 digits, by hand, and the backends among each other bit for bit."""

from __future__ import annotations

import itertools
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from foveate.kernels.dispatch import available
from foveate.kernels.policy_loss import group_advantage
from foveate.kernels.policy_loss.advantage import ADVANTAGE_KINDS, BACKENDS, BATCH_KINDS, GROUP_KINDS

HERE = [backend for backend in BACKENDS if backend in available("policy_loss")]
NORMALISED = [kind for kind in ADVANTAGE_KINDS if kind not in ("dr_grpo", "rloo")]
CENTRED = [kind for kind in ADVANTAGE_KINDS if kind != "reinforce++"]
NAN, INF = float("nan"), float("inf")


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


def advantage(rewards, group_offsets, kind="grpo", **kwargs):
    """`group_advantage` of rewards [N] or [N, R], of every backend here, which must agree bit for bit."""
    rewards = rewards[:, None] if rewards.dim() == 1 and kind == "gdpo" else rewards
    results = [group_advantage(rewards, group_offsets, kind=kind, backend=backend, **kwargs) for backend in HERE]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)
    return results[0]


# The truth: the formulas of the docstring in 60 digits, over lists


def mean_of(values):
    return sum(values) / len(values)


def std_of(values, ddof):
    return (sum((x - mean_of(values)) ** 2 for x in values) / max(1, len(values) - ddof)).sqrt()


def white(x, values, ddof, eps):
    return Decimal(0) if min(values) == max(values) else (x - mean_of(values)) / (std_of(values, ddof) + eps)


def truth(rewards, sizes, kind, weights, ddof, eps, scorable, lengths):
    """Decimals [N]; every formula is written as in its paper, tokens are really repeated."""
    rows = [[Decimal(float(x)) for x in row] for row in rewards]
    weights = [Decimal(float(w)) for w in weights]
    totals = [sum((w * x for w, x in zip(weights, row, strict=True)), Decimal(0)) for row in rows]
    eps, result, bounds = Decimal(eps), [Decimal(0)] * len(rows), np.cumsum([0, *sizes])
    whitened = {}
    for start, end in itertools.pairwise(bounds):
        group = [i for i in range(start, end) if scorable[i]]
        own = [totals[i] for i in group]
        if kind == "reinforce++":
            whitened |= dict(zip(group, own, strict=True))
        if len(group) < 2:
            continue
        for i in group:
            if kind == "grpo":
                result[i] = white(totals[i], own, ddof, eps)
            elif kind == "dr_grpo":
                result[i] = totals[i] - mean_of(own)
            elif kind == "rloo":
                result[i] = totals[i] - mean_of([totals[j] for j in group if j != i])
            elif kind == "reinforce++_baseline":
                whitened[i] = totals[i] - mean_of(own)
            elif kind == "gdpo":
                parts = [white(rows[i][k], [rows[j][k] for j in group], ddof, eps) for k in range(len(weights))]
                whitened[i] = sum((w * z for w, z in zip(weights, parts, strict=True)), Decimal(0))
    tokens = [x for i, x in whitened.items() for _ in range(lengths[i])]
    for i, x in whitened.items() if tokens else ():
        result[i] = white(x, tokens, ddof, eps)
    return result


def random_case(rng, with_lengths):
    """Multiples of 1/16 and weights that are powers of two: sums of parts are exact, and ties come up."""
    sizes = rng.integers(0, 7, size=rng.integers(1, 6)).tolist()
    count, parts = sum(sizes), int(rng.integers(1, 4))
    rewards = torch.from_numpy(rng.integers(-3, 4, size=(count, parts)) / 16)
    weights = torch.tensor([0.5, -2.0, 4.0][:parts])
    scorable = torch.from_numpy(rng.random(count) < 0.8)
    lengths = torch.from_numpy(rng.integers(0, 5, size=count)) if with_lengths else None
    return rewards, sizes, weights, scorable, lengths


@pytest.mark.parametrize(
    ("kind", "with_lengths"), [(kind, False) for kind in ADVANTAGE_KINDS] + [(kind, True) for kind in BATCH_KINDS]
)
def test_against_sixty_digits(kind, with_lengths):
    rng, compared = np.random.default_rng(0), 0
    for ddof, eps, dtype in itertools.product((0, 1), (1e-6, 0.5), (torch.float32, torch.float64)):
        if kind not in NORMALISED and (ddof, eps) != (1, 1e-6):
            continue
        options = {"ddof": ddof, "eps": eps} if kind in NORMALISED else {}
        for _ in range(8 if kind in NORMALISED else 32):
            rewards, sizes, weights, scorable, lengths = random_case(rng, with_lengths)
            counts = [1] * len(rewards) if lengths is None else lengths.tolist()
            with localcontext(prec=60):
                exact = truth(rewards.tolist(), sizes, kind, weights, ddof, eps, scorable.tolist(), counts)
            extra = {} if lengths is None else {"lengths": lengths}
            bounds = offsets(0, *np.cumsum(sizes))
            got = advantage(rewards.to(dtype), bounds, kind, weights=weights, scorable=scorable, **options, **extra)
            expected = torch.tensor([float(x) for x in exact], dtype=torch.float64)
            # One rounding to float32; in float64 fewer than 2^8 operations on numbers below 2^4, over a std or eps
            # above 2^-5 or 0.
            bound = 2**-24 * expected.abs() + 2**-36
            assert ((got.double() - expected).abs() <= bound).all()
            compared += int((expected != 0).sum())
    assert compared > 100


def test_a_hand_computed_group():
    got = advantage(torch.tensor([1.0, 2.0, 3.0, 6.0]), offsets(0, 4), eps=0.0)
    # mean 3, squares 4 + 1 + 0 + 9 = 14, std = sqrt(14 / 3)
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0], dtype=torch.float64) / (14 / 3) ** 0.5
    assert torch.equal(got, expected.float())
    assert got.dtype == torch.float32
    assert advantage(torch.tensor([1.0, 2.0, 3.0, 6.0]), offsets(0, 4), "rloo").tolist() == [
        np.float32(x) for x in (1 - 11 / 3, 2 - 10 / 3, 0.0, 6 - 2)
    ]
    assert advantage(torch.tensor([1.0, 2.0, 3.0, 6.0]), offsets(0, 4), "dr_grpo").tolist() == [-2, -1, 0, 3]


def test_ddof_and_eps():
    rewards = torch.tensor([0.0, 1.0])
    assert torch.equal(advantage(rewards, offsets(0, 2), ddof=0, eps=0.5), torch.tensor([-0.5, 0.5]))
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64).mul(0.5 / (0.5**0.5 + 0.5)).float()
    assert torch.equal(advantage(rewards, offsets(0, 2), ddof=1, eps=0.5), expected)
    # The batch of {0, 1} and {0, 3} without group means: -1/2, 1/2, -3/2, 3/2; mean square 5/4.
    rewards = torch.tensor([0.0, 1.0, 0.0, 3.0])
    expected = torch.tensor([-0.5, 0.5, -1.5, 1.5], dtype=torch.float64).div(1.25**0.5 + 0.25).float()
    assert torch.equal(advantage(rewards, offsets(0, 2, 4), "reinforce++_baseline", ddof=0, eps=0.25), expected)


def test_many_groups_match_numpy():
    rng = np.random.default_rng(0)
    sizes = [3, 0, 8, 1, 5, 64, 2, 1, 0]
    rewards = rng.normal(size=sum(sizes)).astype(np.float32)
    expected = []
    for part in np.split(rewards.astype(np.float64), np.cumsum(sizes)[:-1]):
        std = part.std(ddof=1) if len(part) > 1 else np.inf
        expected.append((part - part.mean()) / (std + 1e-6) if len(part) else part)
    got = advantage(torch.from_numpy(rewards), offsets(0, *np.cumsum(sizes)))
    np.testing.assert_allclose(got.numpy(), np.concatenate(expected), rtol=2e-7)  # one rounding to float32


# Equal rewards


@pytest.mark.parametrize("n", [2, 3, 8, 16, 64])
@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-6])
def test_equal_rewards_have_no_phantom_advantage(n, eps):
    for a, f, k, m in itertools.product((0, 1), (0, 1), range(4), range(1, 8)):
        parts = torch.tensor([[a, f, k / m]], dtype=torch.float32).repeat(n, 1)
        weights = torch.tensor([0.9, 0.1, 0.7])
        bounds = offsets(0, n)
        assert not group_advantage(parts, bounds, weights=weights, eps=eps).any()
        total = parts @ weights
        assert not group_advantage(total, bounds, eps=eps).any() or total.unique().numel() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", CENTRED)
def test_equal_groups_beside_others_have_no_phantom_advantage(kind, dtype):
    """Groups of equal rewards 0.9 a + 0.1 f + 0.7 k / m, and one group that gives the batch a std."""
    weights, sizes = torch.tensor([0.9, 0.1, 0.7], dtype=dtype), [2, 3, 7, 8, 13, 16]
    rows = [(a, f, k / m) for a, f, k, m in itertools.product((0, 1), (0, 1), range(7), range(1, 8))]
    rows = rows[:: len(rows) // 30]
    parts = [torch.tensor([row], dtype=dtype).expand(sizes[i % 6], 3) for i, row in enumerate(rows)]
    parts.append(torch.rand(5, 3, dtype=dtype))
    bounds = offsets(0, *np.cumsum([len(part) for part in parts]))
    for options in [{"eps": eps} for eps in (0.0, 1e-9, 1e-6)] if kind in NORMALISED else [{}]:
        got = advantage(torch.cat(parts), bounds, kind, weights=weights, **options)
        assert not got[:-5].any()
        assert (got[-5:] != 0).all()


def test_the_phantom_advantage_exists_in_float32():
    """The case the float64 mean and the equality check are there for: without them it is not 0."""
    worst = 0.0
    for k, m in itertools.product(range(7), range(1, 8)):
        reward = np.float32(0.9) + np.float32(0.1) + np.float32(0.7 * k / m)
        mean = np.float32(sum([reward] * 7, np.float32(0)) / np.float32(7))
        std = np.float32(abs(reward - mean))
        worst = max(worst, abs(float((reward - mean) / (std + np.float32(1e-6)))))
        assert not advantage(torch.full((7,), float(reward)), offsets(0, 7)).any()
    assert worst > 0.1


@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_a_batch_of_equal_rewards(kind):
    options = {"eps": 0.0} if kind in NORMALISED else {}
    assert not advantage(torch.full((12,), 0.1), offsets(0, 5, 12), kind, **options).any()
    if kind in BATCH_KINDS:
        lengths = torch.arange(12)
        assert not advantage(torch.full((12,), 0.1), offsets(0, 5, 12), kind, lengths=lengths, **options).any()
        varied = torch.arange(12.0)
        assert not advantage(varied, offsets(0, 5, 12), kind, lengths=lengths * 0, **options).any()


@pytest.mark.parametrize("kind", ["grpo", "reinforce++", "reinforce++_baseline", "gdpo"])
def test_a_large_offset_costs_no_digits(kind):
    """E[x^2] - E[x]^2 of these is 0 or negative; two passes are exact but for the last bits."""
    rewards = torch.tensor([0.0, 1.0, 2.0, 0.0, 2.0, 4.0], dtype=torch.float64)
    bounds = offsets(0, 3, 6)
    torch.testing.assert_close(
        advantage(rewards + 2.0**40, bounds, kind), advantage(rewards, bounds, kind), rtol=2e-7, atol=0
    )


# Who counts


@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_unscorable_members_are_as_if_they_were_not_there(kind):
    """Groups of at most 32: their sums then run over the members in order, wherever they stand."""
    rewards, scorable = torch.rand(40), torch.rand(40) < 0.7
    spoilt = rewards.masked_fill(~scorable, NAN)
    sizes = [9, 1, 0, 20, 10]
    kept = [int(part.sum()) for part in scorable.split(sizes)]
    got = advantage(spoilt, offsets(0, *np.cumsum(sizes)), kind, scorable=scorable)
    assert torch.equal(got[scorable], advantage(rewards[scorable], offsets(0, *np.cumsum(kept)), kind))
    assert not got[~scorable].any()
    assert not advantage(spoilt, offsets(0, 40), kind, scorable=torch.zeros(40, dtype=torch.bool)).any()


def test_unscorable_members_leave_the_baseline():
    rewards = torch.tensor([1.0, NAN, 3.0, 100.0, 7.0, 7.0])
    scorable = torch.tensor([True, False, True, False, False, True])
    got = advantage(rewards, offsets(0, 4, 6), scorable=scorable, eps=0.0)
    # group one is {1, 3}: mean 2, std sqrt(2); group two has one scorable member
    half = torch.tensor(0.5, dtype=torch.float64).sqrt().float()
    assert torch.equal(got, torch.stack([-half, torch.tensor(0.0), half, *torch.zeros(3)]))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_a_broken_reward_breaks_its_group_alone(kind, bad):
    scorable = torch.tensor([True, True, False, True, True, True, True])
    got = advantage(torch.tensor([bad, 1.0, 2.0, 0.0, 1.0, bad, bad]), offsets(0, 3, 5, 7), kind, scorable=scorable)
    assert got[:2].isnan().all()
    assert got[5:].isnan().all()
    assert got[2] == 0
    assert torch.equal(got[3:5], advantage(torch.tensor([0.0, 1.0]), offsets(0, 2), kind))
    assert advantage(torch.tensor([bad]), offsets(0, 1), kind).isnan().all()


def test_a_broken_part_breaks_its_group():
    parts = torch.tensor([[1.0, NAN], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    for weights in (None, torch.tensor([1.0, 0.0])):
        got = advantage(parts, offsets(0, 2, 4), "gdpo", weights=weights)
        assert got.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_one_sample_a_group(kind):
    rewards, bounds = torch.tensor([0.0, 2.0, 4.0]), offsets(0, 1, 2, 2, 3)
    got = advantage(rewards, bounds, kind, **({"eps": 0.0} if kind in NORMALISED else {}))
    assert got.tolist() == ([-1.0, 0.0, 1.0] if kind == "reinforce++" else [0.0] * 3)
    if kind == "reinforce++_baseline":  # alone, and no part of the batch's mean or std
        with_alone = advantage(torch.tensor([0.0, 1.0, 0.0, 3.0, 9.0]), offsets(0, 2, 4, 5), kind)
        assert torch.equal(with_alone[:4], advantage(torch.tensor([0.0, 1.0, 0.0, 3.0]), offsets(0, 2, 4), kind))
        assert with_alone[4] == 0


# Shapes


@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_single_and_empty(kind):
    assert torch.equal(advantage(torch.tensor([5.0]), offsets(0, 1), kind), torch.zeros(1))
    assert advantage(torch.zeros(0), offsets(0), kind).shape == (0,)
    assert advantage(torch.zeros(0, 3), offsets(0, 0, 0), kind).shape == (0,)
    assert not advantage(torch.zeros(4, 0), offsets(0, 4), kind).any()


def test_weights_and_parts():
    parts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    weights = torch.tensor([0.5, 2.0])
    for kind in ADVANTAGE_KINDS[:-1]:
        expected = advantage(torch.tensor([0.5, 2.0, 2.5]), offsets(0, 3), kind)
        assert torch.equal(advantage(parts, offsets(0, 3), kind, weights=weights), expected)
        expected = advantage(torch.tensor([1.0, 1.0, 2.0]), offsets(0, 3), kind)
        assert torch.equal(advantage(parts, offsets(0, 3), kind), expected)
    # "gdpo" sees the columns: their scale does not matter, and members 0 and 1 lack one each.
    got = advantage(parts * torch.tensor([1.0, 100.0]), offsets(0, 3), "gdpo", eps=0.0)
    assert torch.equal(got[0], got[1])
    assert got[2] > 0


@pytest.mark.parametrize("kind", BATCH_KINDS)
def test_lengths_count_tokens(kind):
    """Equal lengths change nothing but the degrees of freedom; a sample without tokens gets a value, and counts not."""
    rewards, bounds = torch.rand(30), offsets(0, 10, 17, 30)
    plain = advantage(rewards, bounds, kind, ddof=0)
    many = torch.full((30,), 10**12)  # a tensor of tokens would not fit anywhere
    torch.testing.assert_close(advantage(rewards, bounds, kind, ddof=0, lengths=many), plain, rtol=2e-7, atol=1e-9)
    lengths = torch.randint(1, 9, (30,), dtype=torch.int32)
    got = advantage(rewards, bounds, kind, lengths=lengths)
    assert torch.equal(got, advantage(rewards, bounds, kind, lengths=lengths.long()))
    assert not torch.equal(got, advantage(rewards, bounds, kind))
    mean = (got.double() * lengths).sum() / lengths.sum()
    assert mean.abs() < 1e-6
    lengths[3] = 0
    without = advantage(rewards, bounds, kind, lengths=lengths)
    assert without[3] != 0
    torch.testing.assert_close((without.double() * lengths).sum() / lengths.sum(), mean * 0, rtol=0, atol=1e-6)


def test_types_and_strides():
    wide = torch.rand(12, 6)
    rewards, bounds = wide[::2, 1::2], offsets(0, 0, 2, 2, 6, 6)[::2]
    weights, scorable = torch.rand(6)[::2], torch.tensor([True, False] * 6)[::2]
    lengths = torch.arange(12)[::2]
    for kind in ADVANTAGE_KINDS:
        extra = {"lengths": lengths} if kind in BATCH_KINDS else {}
        got = advantage(rewards, bounds, kind, weights=weights, scorable=scorable, **extra)
        same = {name: value.contiguous() for name, value in extra.items()}
        contiguous = rewards.contiguous(), bounds.contiguous()
        expected = advantage(*contiguous, kind, weights=weights.double(), scorable=scorable.contiguous(), **same)
        assert torch.equal(got, expected)
        half = rewards.bfloat16()
        assert torch.equal(advantage(half, bounds, kind), advantage(half.float(), bounds, kind))
        assert torch.equal(advantage(half, bounds, kind), advantage(half.double(), bounds, kind))
    assert not group_advantage(rewards.clone().requires_grad_(), bounds).requires_grad


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_a_group_gives_the_same_bits_alone_and_in_a_batch(kind):
    rewards, sizes = torch.rand(400), [1, 33, 0, 100, 2, 264]
    bounds = offsets(0, *np.cumsum(sizes))
    alone = [advantage(part, offsets(0, len(part)), kind) for part in rewards.split(sizes)]
    assert torch.equal(advantage(rewards, bounds, kind), torch.cat(alone))


@pytest.mark.parametrize(
    ("kwargs", "name", "reason"),
    [
        ({"kind": "ppo"}, "kind", "one of"),
        ({"ddof": 2}, "ddof", "0 or 1"),
        ({"eps": -1.0}, "eps", ">= 0"),
        ({"kind": "rloo", "ddof": 0}, "ddof", "'rloo' divides by no std"),
        ({"kind": "dr_grpo", "eps": 1e-4}, "eps", "'dr_grpo' divides by no std"),
        ({"kind": "grpo", "lengths": torch.ones(4, dtype=torch.int64)}, "lengths", "'grpo' has a baseline of samples"),
        ({"kind": "gdpo"}, "rewards", r"\[N, R\] for 'gdpo'"),
        ({"kind": "reinforce++", "lengths": torch.ones(4)}, "lengths", "int32 or int64"),
        ({"kind": "reinforce++", "lengths": torch.tensor([1, 1, -1, 1])}, "lengths", ">= 0"),
        ({"weights": torch.ones(2)}, "weights", r"rewards \[N, R\]"),
        ({"rewards": torch.ones(4, 3), "weights": torch.ones(2)}, "weights", r"float \[3\]"),
        ({"scorable": torch.ones(4)}, "scorable", "bool"),
        ({"rewards": torch.ones(4, dtype=torch.int64)}, "rewards", "float"),
        ({"rewards": torch.ones(4, 1, 1)}, "rewards", "float"),
        ({"group_offsets": offsets(0, 3)}, "group_offsets", "from 0 to 4"),
        ({"group_offsets": offsets(1, 4)}, "group_offsets", "from 0 to 4"),
        ({"group_offsets": offsets(0, 5, 4)}, "group_offsets", "ascending"),
        ({"group_offsets": offsets(0)}, "group_offsets", "groups of 4 samples"),
        ({"group_offsets": torch.tensor([0, 4])}, "group_offsets", "int32"),
    ],
)
def test_refusals_by_name(kwargs, name, reason):
    arguments = {"rewards": torch.ones(4), "group_offsets": offsets(0, 4), **kwargs}
    with pytest.raises(ValueError, match=rf"{reason}.*\({name}\)"):
        group_advantage(**arguments)
