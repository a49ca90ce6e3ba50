"""The sampling contract against a slow version of itself in Python integers and double precision, row by row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foveate.kernels import sampling
from foveate.kernels.sampling import reference

F32 = np.float32
TINY = -float(np.finfo(np.float32).tiny)


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def backend(request, monkeypatch):
    """Every test here runs on both."""
    monkeypatch.setenv("FOVEATE_BACKEND", f"sampling={request.param}")


def plain_word(seed, step, token):
    a, b, c, d = token // 4, step, 0, 0
    for i in range(10):
        k0 = (seed % 2**32 + i * 0x9E3779B9) % 2**32
        k1 = (seed % 2**64 // 2**32 + i * 0xBB67AE85) % 2**32
        (hi0, lo0), (hi1, lo1) = divmod(0xD2511F53 * a, 2**32), divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = hi1 ^ b ^ k0, lo1, hi0 ^ d ^ k1, lo0
    return (a, b, c, d)[token % 4]


def plain_gumbel(word):
    """The noise in double precision; 1 - u is written without cancellation."""
    complement = (2**32 - 1 - word + 0.5) / 2**32
    return -math.log(-math.log1p(-complement))


def plain_kept(z, temperature, top_k, top_p, min_p, banned):
    """Ids the token is drawn from, in (z descending, id ascending) order; z float32 [V]."""
    order = sorted((i for i in range(len(z)) if not banned[i] and z[i] > -np.inf), key=lambda i: (-z[i], i))
    if temperature == 0 or not order:
        return order
    z_max = z[order[0]]
    if top_k:
        order = order[:top_k]
    if F32(top_p) < 1:
        weights = [math.floor(math.exp(float(z[i] - z_max)) * 2**40) for i in order]
        needed, prefix = math.floor(float(F32(top_p)) * 2**24) * sum(weights), 0
        for length, weight in enumerate(weights, start=1):
            prefix += weight
            if prefix * 2**24 >= needed:
                order = order[:length]
                break
    if min_p:
        floor = F32(z_max + F32(math.log(float(F32(min_p)))))
        order = [i for i in order if z[i] >= floor]
    return order


class Truth:
    """One row by the contract: token, whether its lead is safe to compare, and the values in double precision."""

    def __init__(self, logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, step=0, banned=None):
        logits = np.asarray(logits, dtype=F32)
        banned = np.zeros(len(logits), bool) if banned is None else banned
        with np.errstate(over="ignore"):
            z = logits if temperature == 0 else logits / F32(temperature)
        broken = np.isnan(z).any() or (z == np.inf).any()
        self.kept = [] if broken else plain_kept(z, temperature, top_k, top_p, min_p, banned)
        self.removed = [i for i in range(len(z)) if z[i] > -np.inf and i not in set(self.kept)]
        self.token, self.comparable = -1, True
        if not self.kept:
            return
        if temperature == 0:
            self.token = self.kept[0]
        else:
            self._draw(z, seed, step)
        exact = z.astype(np.float64)
        lse = np.logaddexp.reduce(exact)
        p = np.exp(exact - lse)
        self.logprob = exact[self.token] - lse
        self.entropy = -sum(x * (e - lse) for x, e in zip(p, exact, strict=True) if x > 0)
        self.log_kept = 0.0
        if self.removed:
            lost = math.fsum(p[self.removed])
            self.log_kept = math.log1p(-lost) if lost < 0.5 else np.logaddexp.reduce(exact[self.kept]) - lse
            self.log_kept = min(self.log_kept, TINY)

    def _draw(self, z, seed, step):
        scores = {i: F32(z[i] + F32(plain_gumbel(plain_word(seed, step, i)))) for i in sorted(self.kept)}
        self.token = max(scores, key=scores.get)
        best, second = scores[self.token], max((s for i, s in scores.items() if i != self.token), default=-np.inf)
        self.comparable = best - second > 8 * np.spacing(max(abs(best), F32(23)))


def sample(logits, **kwargs):
    logits = torch.as_tensor(logits)
    kwargs.setdefault("seeds", torch.arange(len(logits)))
    kwargs.setdefault("steps", torch.zeros(len(logits), dtype=torch.int64))
    kwargs.setdefault("temperature", 1.0)
    return sampling.sample(logits, **kwargs)


def assert_close_to(truth, token, logprob, log_kept, entropy, vocab):
    """z is exact in the truth, so the error is that of a sum of V fp32 exponentials of rounded arguments.

    Each term: a rounded argument (half an ulp, weighted by its probability) and exp (2 ulp); the sum in slabs, at
    most 64 additions deep at these sizes; log, and two subtractions at the size of the result.
    """
    eps = 2.0**-24
    bound = eps * (80 + 4 * math.log(vocab + 1) + 4 * abs(truth.logprob))
    assert logprob == pytest.approx(truth.logprob, abs=bound), token
    assert entropy == pytest.approx(truth.entropy, abs=eps * (160 + 8 * math.log(vocab + 1)))
    assert (log_kept == 0) == (not truth.removed)
    assert log_kept <= 0
    # A removed mass m gives log1p(-m): relative precision, however small m is, down to the smallest normal number.
    # Its terms sit at most 100 below the peak, where half an ulp of the argument is 100 eps relative.
    assert log_kept == pytest.approx(truth.log_kept, rel=eps * 300, abs=2.0**-126)


def check_rows(output, truths, vocab):
    """Compares token by token and returns how many rows could not be compared."""
    skipped = 0
    for row, truth in enumerate(truths):
        token, logprob, log_kept, entropy = (t[row].item() for t in output)
        if truth.token == -1:
            assert token == -1
            assert all(map(math.isnan, (logprob, log_kept, entropy)))
            continue
        assert token in truth.kept
        if not truth.comparable:
            skipped += 1
            continue
        assert token == truth.token
        assert_close_to(truth, token, logprob, log_kept, entropy, vocab)
    return skipped


def random_rows(rng, num_rows, vocab):
    """Rows of several kinds: smooth, heavily tied, peaked, with -inf, flat."""
    logits = rng.normal(size=(num_rows, vocab)).astype(F32) * rng.choice([0.01, 1, 5, 30], size=(num_rows, 1))
    logits = logits.astype(F32)
    tied = rng.random(num_rows) < 0.4
    logits[tied] = np.round(logits[tied])
    logits[(rng.random((num_rows, 1)) < 0.3) & (rng.random((num_rows, vocab)) < 0.3)] = -np.inf
    logits[rng.random(num_rows) < 0.05] = -np.inf
    logits[rng.random((num_rows, vocab)) < 0.002] = np.nan
    logits[rng.random((num_rows, vocab)) < 0.002] = np.inf
    return logits


@pytest.mark.parametrize("direct_vocab", [0, 512], ids=["race", "direct"])
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 31, 62])
def test_mixed_rows_equal_the_slow_version(monkeypatch, vocab, direct_vocab):
    monkeypatch.setattr(reference, "_DIRECT_VOCAB", direct_vocab)
    rng = np.random.default_rng(vocab)
    n = 151
    logits = random_rows(rng, n, vocab)
    temperature = rng.choice([0.0, 1e-4, 0.3, 1.0, 1.0, 2.5], n).astype(F32)
    top_k = rng.choice([0, 0, 1, 2, 5, 40, 1000], n)
    top_p = rng.choice([1.0, 1.0, 1e-9, 0.3, 0.5, 0.9, 0.999999], n).astype(F32)
    min_p = rng.choice([0.0, 0.0, 0.01, 0.3, 1.0], n).astype(F32)
    seeds, steps = rng.integers(-(2**63), 2**63 - 1, n), rng.integers(0, 2**32, n)
    banned = rng.random((n, vocab)) < rng.choice([0.0, 0.2, 0.9], (n, 1))
    as_tensors = [torch.from_numpy(x) for x in (temperature, top_k, top_p, min_p, seeds, steps, banned)]
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "steps", "banned")
    output = sample(logits, **dict(zip(names, as_tensors, strict=True)))
    assert [t.dtype for t in output] == [torch.int64, torch.float32, torch.float32, torch.float32]
    columns = zip(logits, temperature, top_k, top_p, min_p, seeds, steps, banned, strict=True)
    truths = [Truth(z, t, int(k), p, m, int(s), int(i), b) for z, t, k, p, m, s, i, b in columns]
    assert sum(truth.token == -1 for truth in truths) >= 1
    assert check_rows(output, truths, vocab) <= n // 50


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.one_of(st.floats(-40, 40, width=32), st.integers(-3, 3), st.just(-math.inf)), min_size=1),
    temperature=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0625, 10, width=32)),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.0078125, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    seed=st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
def test_any_parameters_equal_the_slow_version(logits, temperature, top_k, top_p, min_p, seed, data):
    banned = np.array(data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits))))
    output = sample(
        np.array([logits], F32),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=torch.tensor([seed]),
        banned=torch.from_numpy(banned),
    )
    truth = Truth(logits, temperature, top_k, top_p, min_p, seed, 0, banned)
    check_rows(output, [truth], len(logits))


@settings(max_examples=60, deadline=None)
@given(depth=st.floats(0, 300), temperature=st.sampled_from([0.0, 1.0]), where=st.integers(0, 4))
@example(depth=17.4, temperature=1.0, where=0)
@example(depth=87.0, temperature=1.0, where=0)
@example(depth=88.0, temperature=1.0, where=0)
@example(depth=104.0, temperature=1.0, where=0)
def test_log_kept_is_zero_only_if_nothing_was_removed(depth, temperature, where):
    logits = np.array([[1.0, 2.0, 0.5, -1.0, 1.5]], F32)
    logits[0, where] = -depth
    banned = torch.zeros(5, dtype=torch.bool)
    assert sample(logits, temperature=temperature).log_kept.item() == 0
    assert sample(logits, temperature=temperature, banned=banned).log_kept.item() == 0
    banned[where] = True
    output = sample(logits, temperature=temperature, banned=banned)
    assert output.log_kept.item() <= TINY
    check_rows(output, [Truth(logits[0], temperature, banned=banned.numpy())], 5)
    logits[0, where] = -np.inf
    assert sample(logits, temperature=temperature, banned=banned).log_kept.item() == 0


def test_what_remains_may_be_far_below_what_was_banned():
    logits = np.array([[500.0, 0.0, 1.0, 2.0, -np.inf]], F32).repeat(64, 0)
    banned = np.array([True, False, False, False, False])
    output = sample(logits, banned=torch.from_numpy(banned))
    check_rows(output, [Truth(row, seed=i, banned=banned) for i, row in enumerate(logits)], 5)
    assert set(output.token_ids.tolist()) == {1, 2, 3}
    assert output.log_kept[0].item() < -497


def test_top_p_decides_to_the_last_integer():
    """Two ids: at p = floor(2^24 share) / 2^24 the first suffices, at the next p it does not."""
    distance = np.random.default_rng(8).uniform(0.01, 9, 3000).astype(F32)
    logits = np.stack([np.zeros_like(distance), -distance], 1)
    first = 2**40
    totals = [first + math.floor(math.exp(-float(d)) * first) for d in distance]
    share = np.array([first * 2**24 // total for total in totals])
    for p, kept_all in ((share, False), (share + 1, True)):
        output = sample(logits, top_p=torch.from_numpy((p / 2**24).astype(F32)))
        assert torch.equal(output.log_kept == 0, torch.full((3000,), kept_all))


def test_top_p_arithmetic_is_exact(monkeypatch):
    monkeypatch.setattr(reference, "_integer_weights", lambda values, peak: values.long())
    rng = np.random.default_rng(9)
    for largest in (1, 9, 1000, 2**23, 2**40):
        weights = -np.sort(-rng.integers(0, largest + 1, (200, 12)))
        weights[:, 0] = largest
        top_p = rng.integers(1, 2**24, 200) / 2**24
        values, limits = torch.from_numpy(weights), torch.full((200,), 12)
        counts, reached = reference._top_p_count(values, values, limits, torch.from_numpy(top_p.astype(F32)))
        assert reached.all()
        for row, p, count in zip(weights.tolist(), top_p, counts.tolist(), strict=True):
            enough = [sum(row[:k]) * 2**24 >= int(p * 2**24) * sum(row) for k in range(1, 13)]
            assert count == enough.index(True) + 1


def test_top_p_sorts_a_whole_row_where_the_first_ids_do_not_reach_it():
    rng = np.random.default_rng(1)
    vocab = reference._FIRST_SORT * 3 + 1
    logits = rng.normal(size=(6, vocab)).astype(F32)
    logits[1] = 0
    logits[3] *= 8
    top_p = np.array([0.3, 0.9, 0.99, 0.9, 0.9, 1.0], F32)
    top_k = np.array([0, 0, 2000, 0, 7, 1500])
    output = sample(logits, top_p=torch.from_numpy(top_p), top_k=torch.from_numpy(top_k))
    truths = [Truth(logits[i], top_k=int(top_k[i]), top_p=top_p[i], seed=i) for i in range(6)]
    assert len(truths[1].kept) > reference._FIRST_SORT > len(truths[3].kept)
    assert check_rows(output, truths, vocab) == 0


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_values_are_as_exact_as_plain_fp32(scale):
    """At most twice the error of torch's own fp32 expressions against double, plus one ulp."""
    logits = torch.randn(6, 30_011, generator=torch.Generator().manual_seed(7)) * scale
    banned = torch.zeros(30_011, dtype=torch.bool)
    banned[::3] = True
    output = sample(logits, banned=banned)

    def values(z):
        logp = torch.log_softmax(z, -1)
        kept = torch.logsumexp(z[:, ~banned], -1) - torch.logsumexp(z, -1)
        return logp.gather(1, output.token_ids[:, None])[:, 0], kept, -(logp.exp() * logp).sum(-1)

    for ours, plain, exact in zip(output[1:], values(logits), values(logits.double()), strict=True):
        ulp = np.spacing(exact.abs().max().to(torch.float32).numpy())
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + ulp


def test_sample_from_hidden_is_sample_of_fp32_logits():
    g = torch.Generator().manual_seed(3)
    hidden, lm_head, bias = (torch.randn(*s, generator=g).bfloat16() for s in ((7, 16), (50, 16), (50,)))
    seeds, steps = torch.arange(7), torch.arange(7)
    shared = {"temperature": 0.9, "top_k": 11, "seeds": seeds, "steps": steps}
    for b in (None, bias):
        logits = hidden.double() @ lm_head.double().T + (0 if b is None else b.double())
        expected = sampling.sample(logits, **shared)
        output = sampling.sample_from_hidden(hidden, lm_head, bias=b, **shared)
        assert torch.equal(output.token_ids, expected.token_ids)
        # 16 products of bfloat16 are exact in fp32; their sum is off by less than 16 half ulps of its largest part.
        torch.testing.assert_close(output.logprobs, expected.logprobs, rtol=0, atol=16 * 2.0**-24 * 32)
