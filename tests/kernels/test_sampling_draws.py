"""Draws, independence of rows, broken rows and errors of the sampler; test_sampling.py has the token-by-token truth."""

import doctest
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from foveate.kernels import sampling
from foveate.kernels.sampling import philox, reference

F32 = np.float32


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def backend(request, monkeypatch):
    """Every test here runs on both."""
    monkeypatch.setenv("FOVEATE_BACKEND", f"sampling={request.param}")


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


PROBABILITY_CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.25},
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
    logits = np.random.default_rng(3).normal(size=13).astype(F32) * 0.7
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
    assert kept.sum() > 1
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
    assert doctest.testmod(sampling) == (0, 4)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0, 30.0, 1e4, 1e8])
def test_the_race_finds_the_largest_score(monkeypatch, scale):
    logits = torch.randn(150, 515, generator=torch.Generator().manual_seed(5)) * scale
    race = sample(logits, min_p=1e-6)
    monkeypatch.setattr(reference, "_DIRECT_VOCAB", 515)
    assert_same_bits(race, sample(logits, min_p=1e-6))


# At 2^30 one ulp is 64: the noise vanishes, every score is z itself and ties are exact.
@pytest.mark.parametrize("direct_vocab", [0, 512], ids=["race", "direct"])
@pytest.mark.parametrize("parameters", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}])
def test_ties_go_to_the_lowest_id(monkeypatch, parameters, direct_vocab):
    monkeypatch.setattr(reference, "_DIRECT_VOCAB", direct_vocab)
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


def test_logits_of_a_graph_give_ordinary_tensors():
    logits = torch.zeros(3, 9, requires_grad=True) * 2
    assert not any(t.requires_grad or t.is_inference() for t in sample(logits, top_p=0.5))


def test_a_number_means_the_same_as_its_tensor():
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    numbers = {"temperature": 0.7, "top_k": 20, "top_p": 0.99, "min_p": 0.01}
    tensors = {k: torch.full((40,), v) for k, v in numbers.items()}
    before = logits.clone()
    assert_same_bits(sample(logits, **numbers), sample(logits, **tensors))
    assert torch.equal(logits, before)


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
    with pytest.raises(ValueError, match=r"backend of sampling for cpu, got 'cuda': .* \(FOVEATE_BACKEND\)"):
        sample(LOGITS)
    sample(LOGITS, backend="reference")
    with pytest.raises(ValueError, match="got 'cdua'"):
        sample(LOGITS, backend="cdua")
