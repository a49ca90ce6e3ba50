"""Attention scores, column scores and their log-sum-exp against attention matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.kernels import vision_prune
from foveate.kernels.dispatch import available
from foveate.kernels.vision_prune import arguments

SCALE = 0.4
EPS = torch.finfo(torch.float32).eps
BACKENDS = [name for name in available("vision_prune", torch.device("cpu")) if name in ("reference", "triton")]
# (query heads, key heads, head dimension): of a decoder, of a tower (80 is no power of two), and small odd ones
HEADS = ((7, 1, 128), (2, 2, 80), (6, 3, 5), (1, 1, 72))
# Tokens of each span: empty ones, one, one past a tile of 16, 32 and 64 keys.
SIZES = ((5, 0, 17, 1, 33), (65, 0), (0, 0))


def offsets_of(sizes) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)


def ragged_rows(spans: int) -> torch.Tensor:
    """Row offsets: 0, 3, 1, 20 rows, again and again."""
    return offsets_of(([0, 3, 1, 20] * spans)[:spans])


def matrix(queries: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """float64 [Hq, R, N], logits of all rows and keys."""
    q, k = queries.double().numpy(), keys.double().numpy()
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("rhd,nhd->hrn", q, k) * SCALE


def plain_matrix(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """As `matrix`, in float32, one product after another."""
    k = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = torch.zeros(queries.shape[1], len(queries), len(keys))
    for left, right in zip(queries.float().unbind(-1), k.unbind(-1), strict=True):
        logits += left.t()[:, :, None] * right.t()[:, None]
    return logits * SCALE


def log_sum(logits: np.ndarray) -> np.ndarray:
    peak = logits.max(-1, keepdims=True, initial=-1e300)
    with np.errstate(divide="ignore"):
        return (peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True)))[..., 0]


class Errors:
    """What results may err by, in float32.

    A logit: twice what the plain code's do, over all of a case. A log-sum-exp as much, with roundings of itself and of
    the logarithm. A mean or sum of e^(logit - lse) relatively as much, with the roundings of the exponents and the sum.
    """

    def __init__(self) -> None:
        self.logits, self.largest, self.terms = 0.0, 0.0, 1

    def see(self, exact: np.ndarray, plain: torch.Tensor) -> None:
        if exact.size:
            self.logits = max(self.logits, 2 * float(np.abs(plain.double().numpy() - exact).max()))
            self.largest = max(self.largest, float(np.abs(exact).max()))
            self.terms = max(self.terms, exact.size)

    def assert_lse(self, actual: torch.Tensor, exact: torch.Tensor) -> None:
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=2 * EPS, atol=self.logits + 8 * EPS)

    def assert_scores(self, actual: torch.Tensor, exact: torch.Tensor) -> None:
        assert actual.dtype == torch.float32
        relative = self.logits + EPS * (3 * self.largest + 8 + np.log2(self.terms))
        torch.testing.assert_close(actual.double(), exact, rtol=relative, atol=0)


def draw(rows: int, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    query_heads, key_heads, dim = heads
    return torch.randn(rows, query_heads, dim).to(dtype), torch.randn(tokens, key_heads, dim).to(dtype)


def pairs(row_offsets: torch.Tensor, offsets: torch.Tensor) -> list[tuple[slice, slice]]:
    ends = zip(row_offsets.tolist(), row_offsets[1:].tolist(), offsets.tolist(), offsets[1:].tolist(), strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in ends]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_attention_scores_and_logsumexp(backend, dtype, heads, sizes, ragged):
    offsets = offsets_of(sizes)
    rows = ragged_rows(len(sizes)) if ragged else None
    every = torch.arange(len(sizes) + 1) if rows is None else rows
    queries, keys = draw(int(every[-1]), int(offsets[-1]), heads, dtype)
    lse = vision_prune.logsumexp(queries, keys, offsets, scale=SCALE, row_offsets=rows, backend=backend)
    given = torch.full(queries.shape[:2], -torch.inf)
    exact, exact_lse = torch.zeros(len(keys), dtype=torch.float64), torch.empty(queries.shape[:2], dtype=torch.float64)
    errors = Errors()
    for row, span in pairs(every, offsets):
        logits = matrix(queries[row], keys[span])
        errors.see(logits, plain_matrix(queries[row], keys[span]))
        exact_lse[row] = torch.from_numpy(log_sum(logits)).t()
        if logits.size:
            given[row] = (exact_lse[row] + 0.5).float()  # of all keys the row attends to, more than those scored
            exact[span] = torch.from_numpy(np.exp(logits - given[row].double().numpy().T[..., None]).mean((0, 1)))
    errors.assert_lse(lse, exact_lse)
    scores = vision_prune.attention_scores(
        queries, keys, given, offsets, scale=SCALE, row_offsets=rows, backend=backend
    )
    errors.assert_scores(scores, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2, 80), (3, 3, 5), (1, 1, 128)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_column_scores(backend, dtype, heads, sizes):
    offsets = offsets_of(sizes)
    q, k = draw(int(offsets[-1]), int(offsets[-1]), heads, dtype)
    exact, lse, errors = torch.zeros(len(k), dtype=torch.float64), torch.empty(heads[0], len(k)), Errors()
    for _, span in pairs(offsets, offsets):
        logits = matrix(q[span], k[span])
        errors.see(logits, plain_matrix(q[span], k[span]))
        lse[:, span] = torch.from_numpy(log_sum(logits)).float()
        exact[span] = torch.from_numpy(np.exp(logits - lse[:, span, None].double().numpy()).sum((0, 1)))
    scores = vision_prune.column_scores(q, k, lse, offsets, scale=SCALE, backend=backend)
    errors.assert_scores(scores, exact)
    alone = vision_prune.column_scores(q, k, None, offsets, scale=SCALE, backend=backend)
    torch.testing.assert_close(alone, scores)
    sums = torch.tensor([alone[span].sum() for _, span in pairs(offsets, offsets)])
    torch.testing.assert_close(sums, heads[0] * torch.tensor(sizes, dtype=torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_by_slots_and_in_pages(backend):
    offsets = offsets_of((5, 0, 40))
    queries, keys = draw(3, 45, (4, 2, 16), torch.float32)
    wanted = vision_prune.logsumexp(queries, keys, offsets, scale=SCALE, backend=backend)
    scores = vision_prune.attention_scores(queries, keys, wanted, offsets, scale=SCALE, backend=backend)
    pool = torch.full((16, 4, 2, 16), torch.nan)
    slots = torch.randperm(64)[:45]
    pool.view(-1, 2, 16)[slots] = keys
    for some in (slots, slots.int()):
        given = {"slots": some, "scale": SCALE, "backend": backend}
        assert torch.equal(vision_prune.logsumexp(queries, pool, offsets, **given), wanted)
        assert torch.equal(vision_prune.attention_scores(queries, pool, wanted, offsets, **given), scores)
    wide = torch.full((3, 8, 17), torch.nan)
    wide[:, ::2, :16] = queries
    strided = vision_prune.attention_scores(wide[:, ::2, :16], keys, wanted, offsets, scale=SCALE, backend=backend)
    assert torch.equal(strided, scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_span_gives_the_same_bits_alone_and_in_any_batch(backend):
    # The interpreter takes a second for each span.
    spans = 64 if backend == "reference" else 9
    sizes = [int(n) for n in torch.randint(0, 40, (spans,))]
    offsets, rows = offsets_of(sizes), ragged_rows(spans)
    queries, keys = draw(spans, sum(sizes), (4, 2, 16), torch.float32)
    many = torch.randn(int(rows[-1]), 4, 16)
    given = {"scale": SCALE, "backend": backend}
    lse = vision_prune.logsumexp(queries, keys, offsets, **given)
    scores = vision_prune.attention_scores(queries, keys, lse, offsets, **given)
    many_lse = vision_prune.logsumexp(many, keys, offsets, row_offsets=rows, **given)
    many_scores = vision_prune.attention_scores(many, keys, many_lse, offsets, row_offsets=rows, **given)
    columns = vision_prune.column_scores(keys, keys, None, offsets, **given)
    for s, (row, span) in enumerate(pairs(rows, offsets)):
        own, own_rows = offsets_of([sizes[s]]), offsets_of([row.stop - row.start])
        one, its_keys = slice(s, s + 1), keys[span]
        assert torch.equal(vision_prune.logsumexp(queries[one], its_keys, own, **given), lse[one])
        alone = vision_prune.attention_scores(queries[one], its_keys, lse[one], own, **given)
        assert torch.equal(alone, scores[span])
        alone = vision_prune.logsumexp(many[row], its_keys, own, row_offsets=own_rows, **given)
        assert torch.equal(alone, many_lse[row])
        alone = vision_prune.attention_scores(many[row], its_keys, alone, own, row_offsets=own_rows, **given)
        assert torch.equal(alone, many_scores[span])
        assert torch.equal(vision_prune.column_scores(its_keys, its_keys, None, own, **given), columns[span])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_attends_to_nothing_counts_for_nothing(backend):
    queries, keys = draw(2, 9, (2, 1, 8), torch.float32)
    offsets, rows = offsets_of([9]), offsets_of([2])
    lse = torch.full((2, 2), -torch.inf)
    given = {"scale": SCALE, "row_offsets": rows, "backend": backend}
    assert not vision_prune.attention_scores(queries, keys, lse, offsets, **given).any()
    lse[0] = vision_prune.logsumexp(queries, keys, offsets, **given)[0]
    half = vision_prune.attention_scores(queries, keys, lse, offsets, **given)
    torch.testing.assert_close(half.sum(), torch.tensor(0.5))


def test_the_long_way_through_the_reference_is_tiled(monkeypatch):
    q = torch.randn(70, 2, 8)
    offsets = offsets_of((3, 67))
    whole = vision_prune.column_scores(q, q, None, offsets, scale=SCALE, backend="reference")
    monkeypatch.setattr("foveate.kernels.vision_prune.reference.QUERY_TILE", 500)
    tiled = vision_prune.column_scores(q, q, None, offsets, scale=SCALE, backend="reference")
    torch.testing.assert_close(tiled, whole)


def test_merge_patches():
    scores = torch.arange(12.0)
    order = torch.tensor([2, 0, 1])
    assert vision_prune.merge_patches(scores).tolist() == [1.5, 5.5, 9.5]
    assert vision_prune.merge_patches(scores, 4, order).tolist() == [9.5, 1.5, 5.5]
    assert vision_prune.merge_patches(scores[:0]).tolist() == []
    with pytest.raises(ValueError, match=r"expected float32 \[P\] with P a multiple of 5, got \[12\] \(scores\)"):
        vision_prune.merge_patches(scores, 5)


def test_float64_is_served_by_the_reference():
    queries, keys = draw(1, 4, (2, 1, 8), torch.float64)
    lse = vision_prune.logsumexp(queries, keys, offsets_of([4]), scale=SCALE)
    assert lse.dtype == torch.float32


def test_which_backend_serves_what(monkeypatch):
    monkeypatch.delenv("FOVEATE_BACKEND", raising=False)
    assert arguments.backend_for("select_topk") == "cpp"
    assert arguments.backend_for("attention_scores") == "reference"
    monkeypatch.setenv("FOVEATE_BACKEND", "cpp")
    assert arguments.backend_for("attention_scores") == "reference"
    for asked in ("vision_prune=cpp", "sampling=cpp,vision_prune=cpp"):  # of the family
        assert arguments.backend_for("attention_scores", asked) == "reference"
        assert arguments.backend_for("attention_scores", asked, dtype=torch.float64) == "reference"
        assert arguments.backend_for("select_topk", asked) == "cpp"
    assert arguments.backend_for("select_topk", "sampling=cpp,vision_prune=triton") == "cpp"
    assert arguments.backend_for("merge_similar", "vision_prune=triton") == "reference"
    with pytest.raises(ValueError, match=r"\('triton', 'reference'\), which column_scores has, got 'cpp' \(backend\)"):
        arguments.backend_for("column_scores", "cpp")
    with pytest.raises(ValueError, match=r"which select_topk has, got 'triton' \(backend\)"):
        arguments.backend_for("select_topk", "triton")


def test_what_does_not_fit_is_named():
    queries, keys, offsets = torch.randn(2, 4, 8), torch.randn(9, 2, 8), offsets_of((4, 5))
    lse = torch.zeros(2, 4)

    def score(queries=queries, keys=keys, lse=lse, offsets=offsets, **given):
        return vision_prune.attention_scores(queries, keys, lse, offsets, scale=SCALE, **given)

    for message, given in (
        (r"expected float \[R, Hq, d\].*\(queries\)", {"queries": queries[0]}),
        (r"with Hk a divisor of 4.*\(keys\)", {"keys": torch.randn(9, 3, 8)}),
        (r"expected slots with a pool of pages, got None \(slots\)", {"keys": keys.view(3, 3, 2, 8)}),
        (r"expected slots in \[0, 9\), got \(0, 9\) \(slots\)", {"slots": torch.tensor([0, 9, 1])}),
        (r"expected offsets that ascend from 0 to 9, got \[0, 4, 8\] \(offsets\)", {"offsets": offsets_of((4, 4))}),
        (r"expected int32 \[S \+ 1\], got 'int64 \[3\] on cpu' \(offsets\)", {"offsets": offsets.long()}),
        (r"expected 3 queries, one a span, got 2 \(queries\)", {"offsets": offsets_of((4, 0, 5))}),
        (r"expected int32 \[3\].*\(row_offsets\)", {"row_offsets": offsets_of((1, 1, 0))}),
        (r"expected float32 \[2, 4\].*\(logsumexp\)", {"lse": lse.double()}),
    ):
        with pytest.raises(ValueError, match=message):
            score(**given)
    with pytest.raises(ValueError, match=r"as q, got .*\(k\)"):
        vision_prune.column_scores(queries, keys, None, offsets, scale=SCALE)


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
def test_operators_are_registered():
    queries, keys, offsets, lse = torch.randn(2, 4, 8), torch.randn(9, 2, 8), offsets_of((4, 5)), torch.zeros(2, 4)
    ops = torch.ops.foveate
    torch.library.opcheck(ops.attention_scores.default, (queries, keys, lse, offsets, None, None, SCALE))
    torch.library.opcheck(ops.attention_logsumexp.default, (queries, keys, offsets, torch.arange(9), None, SCALE))
    torch.library.opcheck(ops.column_scores.default, (keys, keys, torch.zeros(2, 9), offsets, SCALE))
