"""A million draws of each filter against the distribution in double precision, and the rarest ids of a long tail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from foveate.kernels import sampling
from foveate.kernels.dispatch import available
from foveate.kernels.sampling import triton_kernel

pytestmark = pytest.mark.slow
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = "cuda" if "cuda" in available("sampling", DEVICE) else available("sampling", torch.device("cpu"))[-2]
DRAWS, CHUNK = 1_000_000, 20_000
LOGITS = torch.tensor([2.0, 2.0, 1.5, 1.0, 1.0, 0.5, 0.0, 0.0, -1.0, -2.0, -3.0, -5.0, -torch.inf])
CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "banned": {"banned": [0, 5]},
    "top_k, top_p": {"top_k": 6, "top_p": 0.9},
    "top_k, min_p": {"top_k": 7, "min_p": 0.08},
    "top_p, min_p": {"top_p": 0.95, "min_p": 0.05},
    "top_k, top_p, min_p": {"top_k": 8, "top_p": 0.95, "min_p": 0.06},
    "temperature, banned": {"temperature": 2.5, "banned": [0, 1, 11]},
    "top_k, min_p, banned": {"top_k": 7, "min_p": 0.08, "banned": [1]},
    "all": {"temperature": 1.7, "top_k": 9, "top_p": 0.9, "min_p": 0.06, "banned": [2]},
}


def kept_probabilities(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, banned=()) -> np.ndarray:
    """float64 [V], by sorting; the cases keep clear of borders that rounding could move."""
    z = LOGITS.numpy().astype(np.float64) / temperature
    z[list(banned)] = -np.inf
    order = np.argsort(-z, kind="stable")
    p = np.exp(z[order] - z[order[0]])
    size = top_k or len(z)
    before = np.cumsum(p[:size]) - p[:size]
    kept = order[:size][before / p[:size].sum() < top_p]
    kept = kept[np.exp(z[kept] - z.max()) >= min_p]
    result = np.zeros_like(z)
    result[kept] = np.exp(z[kept] - z.max())
    return result / result.sum()


def count(logits: torch.Tensor, draws: int, **given) -> torch.Tensor:
    """How often each id comes; every row has a seed of its own and one of several steps."""
    counts = torch.zeros(len(logits), dtype=torch.int64)
    if "banned" in given:
        banned = torch.zeros(len(logits), dtype=torch.bool)
        banned[given["banned"]] = True
        given["banned"] = banned.to(DEVICE)
    for start in range(0, draws, CHUNK):
        seeds = torch.arange(start, min(start + CHUNK, draws), device=DEVICE)
        rows = logits.to(DEVICE).expand(len(seeds), -1).contiguous()
        given = {"temperature": 1.0, **given}
        ids = sampling.sample(rows, seeds=seeds, steps=seeds % 7, backend=BACKEND, **given).token_ids
        counts += torch.bincount(ids.cpu(), minlength=len(logits))
    return counts


@pytest.mark.parametrize("case", CASES)
def test_a_million_draws(case):
    expected = kept_probabilities(**CASES[case])
    counts = count(LOGITS, DRAWS, **CASES[case]).numpy()
    assert counts.sum() == DRAWS
    assert counts[expected == 0].sum() == 0, "an id of probability zero was drawn"
    kept = expected > 0
    p_value = stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue if kept.sum() > 1 else 1.0
    assert p_value > 1e-4, (counts, expected * DRAWS)


@pytest.mark.skipif("triton" not in available("sampling", DEVICE), reason="needs Triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of -inf in the interpreter
@pytest.mark.parametrize("case", ["plain", "temperature", "temperature, banned"])
def test_a_million_draws_that_never_write_logits(case, monkeypatch):
    """The kernel that multiplies and draws; the interpreter has large programs and small tiles, which change no token
    (`test_sample_from_hidden.py::test_tile_shapes_change_no_token`)."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton_kernel, "_FLOAT32", triton_kernel._Shape(4096, 16, 8, 2))
        for name, value in (("VOCAB_TILE", 16), ("REDUCE_ROWS", 1024), ("REDUCE_TILES", 1)):
            monkeypatch.setattr(triton_kernel, name, value)
    expected = kept_probabilities(**CASES[case])
    counts = np.zeros(len(LOGITS), np.int64)
    banned = torch.zeros(len(LOGITS), dtype=torch.bool, device=DEVICE)
    banned[CASES[case].get("banned", [])] = True
    lm_head = torch.zeros(len(LOGITS), 16, device=DEVICE)
    for start in range(0, DRAWS, CHUNK):
        seeds = torch.arange(start, start + CHUNK, device=DEVICE)
        ids = sampling.sample_from_hidden(
            torch.zeros(CHUNK, 16, device=DEVICE), lm_head, bias=LOGITS.to(DEVICE), backend="triton", banned=banned,
            temperature=CASES[case].get("temperature", 1.0), seeds=seeds, steps=seeds % 7,
        ).token_ids  # fmt: skip
        counts += np.bincount(ids.cpu().numpy(), minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0, "an id of probability zero was drawn"
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue > 1e-4


@pytest.mark.timeout(900)
def test_a_tail_of_ten_thousand_rare_ids():
    """10,000 ids of 1e-6 each: together 1 % of the draws, none of them favoured."""
    tail, draws = 10_000, DRAWS
    logits = torch.full((tail + 8,), float(np.log(1e-6)))
    logits[[0, 1, 2, 3, -1, -2, -3, -4]] = float(np.log((1 - tail * 1e-6) / 8))
    counts = count(logits, draws)
    rare = counts[4:-4]
    spread = np.sqrt(draws * 0.01 * 0.99)
    assert abs(int(rare.sum()) - draws * 0.01) < 4.5 * spread
    # Each id is a Poisson variable of mean 1: their variance is their mean, within that of a sample of 10,000.
    assert abs(float(rare.double().var()) - 1) < 4.5 * np.sqrt(3 / tail)
    halves = rare.view(10, -1).sum(1).numpy()  # no region of the vocabulary is favoured
    assert stats.chisquare(halves).pvalue > 1e-4
