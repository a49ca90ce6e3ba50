"""The sampling contract against a slow version of itself in Python integers and double precision, row by row."""

import doctest
import math

import numpy as np
import pytest
import torch
from foveate.kernels import sampling
from foveate.kernels.sampling import philox, reference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

F32 = np.float32
TINY = -float(np.finfo(np.float32).tiny)


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


def bits(output):
    return [t.view(torch.int32) if t.dtype == torch.float32 else t for t in output]


def assert_same_bits(left, right):
    for a, b in zip(bits(left), bits(right), strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 31, 62])
def test_mixed_rows_equal_the_slow_version(vocab):
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


PROBABILITY_CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "combined": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    "banned": {"banned": [0, 3, 12]},
    "all": {"temperature": 0.8, "top_k": 6, "top_p": 0.85, "min_p": 0.02, "banned": [5]},
}


def exact_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, banned=()):
    p = np.exp(logits.astype(np.float64) / temperature)
    p[list(banned)] = 0
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("case", PROBABILITY_CASES)
def test_frequencies(case):
    parameters = dict(PROBABILITY_CASES[case])
    logits = np.random.default_rng(3).normal(size=13).astype(F32)
    expected = exact_probabilities(logits, **parameters)
    n = 40_000
    if "banned" in parameters:
        banned = torch.zeros(13, dtype=torch.bool)
        banned[parameters["banned"]] = True
        parameters["banned"] = banned
    seeds = torch.tensor([sampling.sample_seed(11, i) - 2**63 for i in range(n)])
    ids = sampling.sample(
        torch.from_numpy(logits).expand(n, 13),
        **{"temperature": 1.0, **parameters},
        seeds=seeds,
        steps=torch.zeros(n, dtype=torch.int64),
    ).token_ids
    counts = np.bincount(ids.numpy(), minlength=13)
    kept = expected > 0
    assert kept.sum() > 2
    assert counts[~kept].sum() == 0
    assert chisquare(counts[kept], expected[kept] * n).pvalue > 1e-3


def test_frequencies_over_steps_of_one_seed():
    logits = torch.zeros(20_000, 6)
    steps = torch.arange(20_000)
    ids = sample(logits, seeds=torch.full((20_000,), 42), steps=steps).token_ids
    assert chisquare(np.bincount(ids.numpy(), minlength=6)).pvalue > 1e-3
    pairs = ids[:-1:2] * 6 + ids[1::2]
    assert chisquare(np.bincount(pairs.numpy(), minlength=36)).pvalue > 1e-3


def test_docstring_answers():
    assert doctest.testmod(sampling).failed == 0
    assert doctest.testmod(sampling).attempted == 4


def test_noise_is_accurate_and_finite_everywhere():
    rng = np.random.default_rng(0)
    edges = [0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    words = edges + [int(x) for x in rng.integers(0, 2**32, 2000)]
    noise = reference.gumbel(torch.tensor(words)).double().numpy()
    exact = np.array([plain_gumbel(word) for word in words])
    # The contract lets g differ by 4 ulp; near g = 0 (e near 1) that is an ulp of 1, the argument of the log.
    assert np.all(np.abs(noise - exact) <= 4 * np.spacing(np.maximum(np.abs(exact), 1).astype(F32)))
    assert exact.max() < 22.88
    assert exact.min() > -3.14


def test_the_race_bound_holds_for_every_word():
    complements = np.append(2.0 ** np.linspace(-33, -1e-9, 4001), 1 - 2.0**-33)
    ratio = -np.log1p(-complements) / complements
    assert ratio.min() >= 1
    assert ratio.max() < 22.9 < reference._RACE_RATIO


# At 2^30 one ulp is 64: the noise vanishes, every score is z itself and ties are exact.
@pytest.mark.parametrize("parameters", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}])
def test_ties_go_to_the_lowest_id(parameters):
    logits = torch.full((4, 11), -(2.0**30))
    logits[:, [2, 5, 7, 9, 10]] = 2.0**30
    assert sample(logits, **parameters).token_ids.tolist() == [2, 2, 2, 2]
    banned = torch.zeros(11, dtype=torch.bool)
    banned[2] = True
    assert sample(logits, **parameters, banned=banned).token_ids.tolist() == [5, 5, 5, 5]


def test_top_k_is_exact_and_breaks_ties_by_the_lowest_id():
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 0.0]]).expand(400, 7)
    for k, kept in ((1, {1}), (2, {1, 4}), (3, {0, 1, 4}), (4, {0, 1, 2, 4}), (7, set(range(7))), (99, set(range(7)))):
        assert set(sample(logits, top_k=k, temperature=3.0).token_ids.tolist()) == kept


def test_top_p_keeps_the_shortest_prefix_that_reaches_it():
    logits = torch.zeros(400, 8)
    for p, size in ((0.125, 1), (0.12501, 2), (0.5, 4), (0.50001, 5), (0.875, 7), (0.99, 8), (1.0, 8), (1e-9, 1)):
        output = sample(logits, top_p=p)
        assert set(output.token_ids.tolist()) == set(range(size))
        assert output.log_kept[0].item() == pytest.approx(math.log(size / 8), rel=1e-6)


def test_min_p_comes_after_top_p():
    # Min-p first would leave [0.5, 0.3], of which top-p 0.6 keeps one; top-p first keeps two, and so does min-p.
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.1, 0.1]])).expand(200, 4)
    assert set(sample(logits, top_p=0.6, min_p=0.5).token_ids.tolist()) == {0, 1}


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


@pytest.mark.parametrize("vocab", [40_003, 70_000])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_alone_gives_the_same_bits(vocab, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng = np.random.default_rng(2)
        logits = torch.from_numpy(rng.normal(size=(5, vocab)).astype(F32) * 4)
        logits[3, 17] = torch.nan
        banned = torch.from_numpy(rng.random(vocab) < 0.001)
        rows = {
            "temperature": torch.tensor([1.0, 0.0, 0.7, 1.0, 1.3]),
            "top_k": torch.tensor([0, 5, 50, 0, 0]),
            "top_p": torch.tensor([1.0, 1.0, 0.9, 1.0, 0.95]),
            "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.01]),
            "seeds": torch.tensor([5, 6, 7, 8, 9]),
            "steps": torch.tensor([0, 3, 5, 6, 2]),
        }
        whole = sampling.sample(logits, **rows, banned=banned)
        scored = sampling.score(
            logits, whole.token_ids.clamp(min=0), banned=banned, **{k: rows[k] for k in list(rows)[:4]}
        )
        assert_same_bits(scored, whole[1:])
        for i in range(5):
            alone = sampling.sample(
                logits[i : i + 1].clone(), banned=banned, **{k: v[i : i + 1] for k, v in rows.items()}
            )
            assert_same_bits(alone, [t[i : i + 1] for t in whole])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block", [7, 62, 1000])
def test_blocks_do_not_change_a_bit(monkeypatch, block):
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(33, 62)).astype(F32))
    whole = sample(logits, top_p=0.9)
    monkeypatch.setattr(reference, "_ROW_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(philox, "_BLOCK", 5)
    assert_same_bits(sample(logits, top_p=0.9), whole)


def test_noise_follows_seed_and_step_and_not_the_row():
    logits = torch.zeros(300, 500)
    seeds, steps = torch.arange(300) // 2, torch.arange(300) % 2
    ids = sample(logits, seeds=seeds, steps=steps).token_ids
    assert (ids[::2] != ids[1::2]).sum() > 140
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = sample(logits, seeds=seeds[order], steps=steps[order]).token_ids
    assert torch.equal(shuffled, ids[order])


def test_rows_that_cannot_be_sampled_leave_the_others_alone():
    rng = np.random.default_rng(5)
    clean = rng.normal(size=(7, 9)).astype(F32)
    broken = clean.copy()
    broken[1, 4], broken[3, 0], broken[5] = np.nan, np.inf, -np.inf
    banned = torch.zeros(7, 9, dtype=torch.bool)
    banned[6] = True
    for temperature in (0.0, 1.0):
        for filters in ({}, {"top_p": 0.9, "top_k": 4}):
            output = sample(broken, temperature=temperature, banned=banned, **filters)
            assert output.token_ids[[1, 3, 5, 6]].tolist() == [-1] * 4
            assert all(t[[1, 3, 5, 6]].isnan().all() for t in output[1:])
            good = [0, 2, 4]
            reference_rows = sample(clean, temperature=temperature, **filters)
            assert_same_bits([t[good] for t in output], [t[good] for t in reference_rows])


def test_a_banned_nan_still_spoils_its_row():
    banned = torch.tensor([False, True, False])
    assert sample(np.array([[0.0, np.nan, 1.0]], F32), banned=banned).token_ids.item() == -1


@pytest.mark.parametrize("vocab", [1, 7])
def test_no_rows(vocab):
    output = sample(np.zeros((0, vocab), F32), top_k=3, top_p=0.5, banned=torch.zeros(vocab, dtype=torch.bool))
    assert [tuple(t.shape) for t in output] == [(0,)] * 4
    assert output.token_ids.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_read_as_fp32(dtype):
    logits = torch.randn(9, 21, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_same_bits(sample(logits), sample(logits.float()))
    assert logits.dtype == dtype


def test_a_number_means_the_same_as_its_tensor():
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    numbers = {"temperature": 0.7, "top_k": 20, "top_p": 0.99, "min_p": 0.01}
    tensors = {k: torch.full((40,), v) for k, v in numbers.items()}
    before = logits.clone()
    assert_same_bits(sample(logits, **numbers), sample(logits, **tensors))
    assert torch.equal(logits, before)


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


def test_the_generators_of_torch_and_numpy_are_untouched():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    sample(torch.zeros(3, 9), top_p=0.5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


LOGITS = torch.zeros(2, 5)
BAD_ARGUMENTS = [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": 9e-5}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": torch.ones(3)}, "temperature"),
    ({"temperature": torch.ones(2, dtype=torch.int64)}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": torch.ones(2)}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.5}, "min_p"),
    ({"seeds": torch.zeros(2, dtype=torch.int32)}, "seeds"),
    ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds"),
    ({"steps": torch.tensor([0, -1])}, "steps"),
    ({"steps": torch.tensor([0, 2**32])}, "steps"),
    ({"banned": torch.zeros(5)}, "banned"),
    ({"banned": torch.zeros(4, dtype=torch.bool)}, "banned"),
    ({"backend": "triton"}, "backend"),
]


@pytest.mark.parametrize(("arguments", "name"), BAD_ARGUMENTS, ids=lambda x: str(x)[:40])
def test_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=rf"expected .*, got .*\({name}\)"):
        sample(LOGITS, **arguments)


@pytest.mark.parametrize("logits", [torch.zeros(5), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 0)])
def test_bad_logits(logits):
    with pytest.raises(ValueError, match=r"expected .*, got .*\(logits\)"):
        sample(logits)


def test_bad_token_ids_and_hidden():
    with pytest.raises(ValueError, match=r"ids in \[0, 5\), got \(0, 5\) \(token_ids\)"):
        sampling.score(LOGITS, torch.tensor([0, 5]), temperature=1.0)
    zeros = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \[N, 4\], got 'float32 \[2, 3\]' \(hidden\)"):
        sampling.sample_from_hidden(torch.zeros(2, 3), torch.zeros(5, 4), temperature=1.0, seeds=zeros, steps=zeros)


def test_the_backend_is_never_replaced_silently(monkeypatch):
    sample(LOGITS, backend="reference")
    monkeypatch.setenv("FOVEATE_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"backend of sampling among \('reference',\), got 'cuda' \(FOVEATE_BACKEND\)"):
        sample(LOGITS)
    sample(LOGITS, backend="reference")
    with pytest.raises(ValueError, match="got 'cdua'"):
        sample(LOGITS, backend="cdua")
