"""Top-k and max-min selection against sorting and greedy search in numpy; the backends token for token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from foveate.kernels import vision_prune
from foveate.kernels.dispatch import available
from foveate.kernels.vision_prune import Selection, operators, reference

BACKENDS = [name for name in available("vision_prune", torch.device("cpu")) if name != "triton"]
COMPILED = [name for name in BACKENDS if name != "reference"]
SIZES = ((0,), (), (1,), (5, 0, 17, 0, 1), (511, 512, 513, 3), (16_384, 2))


def offsets_of(sizes) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(sizes, dtype=np.int64)], dtype=torch.int32)


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def hard_scores(total: int, generator: torch.Generator) -> torch.Tensor:
    """Normal scores, and among them: ties in blocks, -inf, inf, NaN, both zeros, subnormals."""
    scores = torch.randn(total, generator=generator)
    kind = torch.randint(0, 12, (total,), generator=generator)
    scores = torch.where(kind < 5, scores.round(), scores)
    for number, value in enumerate((-torch.inf, torch.inf, torch.nan, -torch.nan, -0.0, 0.0, 1e-42)):
        scores[kind == 5 + number] = value
    return scores


def sorted_topk(scores, sizes, counts, forced) -> list[list[int]]:
    """Of each span the kept tokens, by python's sort."""
    start, kept = 0, []
    for size, count in zip(sizes, counts, strict=True):
        keys = [
            (not forced[start + i], np.isnan(s), -s if s == s else 0.0, i)
            for i, s in enumerate(scores[start : start + size].tolist())
        ]
        kept.append(sorted(key[-1] for key in sorted(keys)[: max(0, count)]))
        start += size
    return kept


def as_lists(selection: Selection) -> list[list[int]]:
    ends = selection.offsets.tolist()
    assert len(selection.indices) == ends[-1]
    return [selection.indices[a:b].tolist() for a, b in pairwise(ends)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("some_forced", [False, True])
def test_topk_is_what_sorting_keeps(backend, sizes, some_forced):
    generator = torch.Generator().manual_seed(sum(sizes))
    offsets = offsets_of(sizes)
    for share in (-1, 0, 0.1, 0.5, 0.9, 1, 2):
        scores = hard_scores(sum(sizes), generator)
        forced = torch.rand(len(scores), generator=generator) < 0.3
        counts = [int(size * share) for size in sizes]
        selection = vision_prune.select_topk(
            scores, offsets, ints(*counts), forced=forced if some_forced else None, backend=backend
        )
        assert selection.indices.dtype == selection.offsets.dtype == torch.int32
        wanted = sorted_topk(scores, sizes, counts, forced.tolist() if some_forced else [False] * len(scores))
        assert as_lists(selection) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_ties_go_to_the_lowest_index(backend):
    scores = torch.tensor([1.0, 2, 2, 2, 1, 2, 0.0, -0.0, torch.nan, torch.nan, -torch.inf])
    one = offsets_of([11])
    for count, kept in ((2, [1, 2]), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 1, 2, 3, 4, 5, 6]), (10, [*range(9), 10])):
        assert vision_prune.select_topk(scores, one, ints(count), backend=backend).indices.tolist() == kept
    equal = torch.zeros(5000)
    assert vision_prune.select_topk(equal, offsets_of([5000]), ints(1234), backend=backend).indices.tolist() == [
        *range(1234)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_topk_of_short_floats(backend, dtype):
    scores = hard_scores(400, torch.Generator().manual_seed(0)).to(dtype)
    sizes, counts = (300, 100), (77, 30)
    selection = vision_prune.select_topk(scores, offsets_of(sizes), ints(*counts), backend=backend)
    assert as_lists(selection) == sorted_topk(scores.float(), sizes, counts, [False] * 400)


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_of_many_spans_is_that_of_each(backend):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 300, (64,), generator=generator).tolist()
    counts = [size // 3 for size in sizes]
    scores = hard_scores(sum(sizes), generator)
    kept = as_lists(vision_prune.select_topk(scores, offsets_of(sizes), ints(*counts), backend=backend))
    ends = offsets_of(sizes).tolist()
    for s in range(64):
        own = scores[ends[s] : ends[s + 1]]
        alone = vision_prune.select_topk(own, offsets_of([sizes[s]]), ints(counts[s]), backend=backend)
        assert alone.indices.tolist() == kept[s]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_sum_of_counts_leaves_minus_one_and_writes_nothing_beyond(backend, monkeypatch):
    """As on a GPU, where the counts cannot be looked at."""
    monkeypatch.setattr(vision_prune, "kept_total", lambda offsets, counts, num_kept: num_kept)
    scores, offsets = torch.arange(9.0), offsets_of((4, 5))
    more = vision_prune.select_topk(scores, offsets, ints(2, 2), num_kept=6, backend=backend)
    assert more.indices.tolist() == [2, 3, 3, 4, -1, -1]
    fewer = vision_prune.select_topk(scores, offsets, ints(2, 2), num_kept=3, backend=backend)
    assert fewer.indices.tolist() == [2, 3, 3]
    features = torch.eye(9)
    more = vision_prune.select_maxmin(features, offsets, ints(2, 2), num_kept=6, backend=backend)
    assert more.indices.tolist() == [0, 1, 0, 1, -1, -1]


def greedy(features: np.ndarray, count: int) -> list[int]:
    """DivPrune by its distance matrix in float64."""
    x = features.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.divide(x, lengths, out=np.zeros_like(x), where=(lengths > 0) & np.isfinite(lengths))
    distances = 1 - x @ x.T
    chosen: list[int] = []
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    while len(chosen) < min(count, len(x)):
        closest = distances[chosen].min(0) if chosen else others.min(0)
        closest[chosen] = -np.inf
        chosen.append(int(np.argmax(closest)))
    return sorted(chosen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 127, 128, 129])
def test_maxmin_is_the_greedy_search(backend, dtype, dim):
    generator = torch.Generator().manual_seed(dim)
    sizes, counts = (16, 0, 65, 1, 130, 17), (5, 3, 65, 1, 40, 0)
    features = torch.randn(sum(sizes), dim, generator=generator).to(dtype)
    if dim == 1:  # cosines 1 and -1: equal in exact arithmetic, and in every rounding
        features = features.sign()
    selection = vision_prune.select_maxmin(features, offsets_of(sizes), ints(*counts), backend=backend)
    ends = offsets_of(sizes).tolist()
    wanted = [greedy(features[a:b].float().numpy(), count) for a, b, count in zip(ends, ends[1:], counts, strict=False)]
    assert as_lists(selection) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_maxmin_with_equal_and_degenerate_features(backend):
    features = torch.eye(4).repeat(3, 1)  # each of four directions three times
    offsets = offsets_of([12])
    for count, kept in ((4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 4, 5]), (12, [*range(12)])):
        assert vision_prune.select_maxmin(features, offsets, ints(count), backend=backend).indices.tolist() == kept
    # All cosines below 0: the third token is the farthest from its nearest other one, but not from itself.
    angles = torch.tensor([0.0, 110, 235]).deg2rad()
    apart = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert vision_prune.select_maxmin(apart, offsets_of([3]), ints(1), backend=backend).indices.tolist() == [2]
    # Their cosines with all are 0: farther than the pair in the middle is from itself.
    odd = torch.tensor([[1.0, 1e-3], [1.0, 0.0], [torch.nan, 0.0], [torch.inf, 1.0], [0.0, 0.0], [-1.0, 0.0]])
    kept = vision_prune.select_maxmin(odd, offsets_of([6]), ints(5), backend=backend).indices.tolist()
    assert kept in ([0, 2, 3, 4, 5], [1, 2, 3, 4, 5])


def tough_features(trial: int, total: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Few different values, features that are nearly the same, or any."""
    features = torch.randn(total, dim, generator=generator)
    return (features * 2).round() if trial == 0 else 1 + features * 1e-4 if trial == 1 else features


@pytest.mark.parametrize("backend", COMPILED)
def test_maxmin_keeps_what_the_reference_keeps(backend):
    """Among near ties, too: features that are nearly the same, and few different values."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        sizes = torch.randint(0, 90, (int(torch.randint(0, 5, (), generator=generator)),), generator=generator).tolist()
        dim = int(torch.randint(1, 260, (), generator=generator))
        features = tough_features(trial % 3, sum(sizes), dim, generator)
        counts = ints(*(int(size * 0.4) for size in sizes))
        ours, theirs = (
            vision_prune.select_maxmin(features, offsets_of(sizes), counts, backend=name)
            for name in (backend, "reference")
        )
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.offsets, theirs.offsets)


@pytest.mark.parametrize("room", [1, 40, 41, 200, 41 * 41])
def test_maxmin_with_little_memory_keeps_the_same(room, monkeypatch):
    """However few cosines may be alive: row by row, in tiles that divide the tokens or not."""
    features = torch.randn(41 + 1 + 20, 7, generator=torch.Generator().manual_seed(0)).mul(2).round()
    arguments = features, offsets_of((41, 1, 20)), ints(30, 1, 6)
    whole = vision_prune.select_maxmin(*arguments, backend="reference")
    alive, similarities = [], reference.similarities
    monkeypatch.setattr(reference, "COSINES", room)
    monkeypatch.setattr(reference, "similarities", lambda a, b: alive.append(len(a) * len(b)) or similarities(a, b))
    kept = vision_prune.select_maxmin(*arguments, backend="reference")
    assert torch.equal(kept.indices, whole.indices)
    assert max(alive) <= max(room, 41)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("held", [0, 1, 64, 200])
def test_maxmin_of_spans_whose_cosines_are_not_held(backend, held, monkeypatch):
    """Long ones beside short ones, about the sizes of tiles, kept to none, one, some and all; the same tokens."""
    sizes = (65, 0, 1, 200, 64, 333, 2, 129, 15, 128, 201)
    asked = []
    operator = operators.select_maxmin
    monkeypatch.setattr(operators, "select_maxmin", lambda *a: asked.append(a[5:7]) or operator(*a))
    generator = torch.Generator().manual_seed(held)
    for trial, dim in enumerate((5, 127, 33)):
        features, offsets = tough_features(trial, sum(sizes), dim, generator), offsets_of(sizes)
        for counts in (
            (30, 2, 1, 100, 64, 40, 1, 129, 0, 1, 2),
            (1,) * 11,
            (0,) * 11,
            (0, 0, 0, 0, 0, 333, 2, 0, 0, 0, 0),
        ):
            monkeypatch.setattr(vision_prune, "HELD_TOKENS", 8192)
            whole = vision_prune.select_maxmin(features, offsets, ints(*counts), backend=backend)
            monkeypatch.setattr(vision_prune, "HELD_TOKENS", held)
            kept = vision_prune.select_maxmin(features, offsets, ints(*counts), backend=backend)
            assert torch.equal(kept.indices, whole.indices)
            assert torch.equal(kept.offsets, whole.offsets)
            truth = vision_prune.select_maxmin(features, offsets, ints(*counts), backend="reference")
            assert torch.equal(kept.indices, truth.indices)
            assert asked[-2] == (sum(size * size for size in sizes), [])
            assert asked[-1][0] == sum(size * size for size in sizes if size <= held)
            assert asked[-1][1][1::3] == [size for size in sizes if size > held]


@pytest.mark.parametrize("backend", COMPILED)
def test_a_wrong_sum_of_counts_of_spans_whose_cosines_are_not_held(backend, monkeypatch):
    monkeypatch.setattr(vision_prune, "kept_total", lambda offsets, counts, num_kept: num_kept)
    monkeypatch.setattr(vision_prune, "HELD_TOKENS", 4)
    features, offsets = torch.eye(9), offsets_of((4, 5))
    more = vision_prune.select_maxmin(features, offsets, ints(2, 2), num_kept=6, backend=backend)
    assert more.indices.tolist() == [0, 1, 0, 1, -1, -1]
    fewer = vision_prune.select_maxmin(features, offsets, ints(2, 2), num_kept=3, backend=backend)
    assert fewer.indices.tolist() == [0, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_maxmin_of_many_spans_is_that_of_each(backend):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 40, (64,), generator=generator).tolist()
    counts = [size // 3 for size in sizes]
    features = 1 + torch.randn(sum(sizes), 33, generator=generator) * 1e-3
    kept = as_lists(vision_prune.select_maxmin(features, offsets_of(sizes), ints(*counts), backend=backend))
    ends = offsets_of(sizes).tolist()
    for s in range(64):
        own = features[ends[s] : ends[s + 1]]
        alone = vision_prune.select_maxmin(own, offsets_of([sizes[s]]), ints(counts[s]), backend=backend)
        assert alone.indices.tolist() == kept[s]


def test_unit_rows_have_the_length_one():
    features = torch.randn(7, 133)
    features[2] = 0
    units = reference.unit_rows(features).double()
    exact = features.double() / features.double().norm(dim=1, keepdim=True)
    exact[2] = 0
    # The square root halves the error of the sum, which is of 9 terms in each of 128 places and 7 halvings.
    torch.testing.assert_close(units, exact, rtol=10 * 2**-24, atol=0)


def contextual(features: np.ndarray, dominant: list[int], count: int) -> dict[int, dict[int, float]]:
    """VisionZip's contextual tokens in float64: kept token -> source -> weight."""
    rest = [i for i in range(len(features)) if i not in dominant]
    count = min(count, len(rest))
    targets = rest[:: max(1, len(rest) // count)][:count] if count else []
    x = features.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    groups: dict[int, list[int]] = {token: [] for token in [*dominant, *targets]}
    for token in rest:
        if targets and token not in targets:
            groups[targets[int(np.argmax(x[targets] @ x[token]))]].append(token)
    merges = len(rest) > len(targets) > 0
    return {
        token: {token: 1.0} | {source: 1 / len(group) for source in group} if merges and token in targets else {}
        for token, group in sorted(groups.items())
    }


def test_merge_similar_and_merge_tokens():
    generator = torch.Generator().manual_seed(0)
    sizes, kept, counts = (40, 0, 9, 6, 3, 20), (10, 2, 3, 6, 0, 4), (7, 1, 9, 2, 0, 5)
    offsets, keys = offsets_of(sizes), torch.randn(78, 12, generator=generator)
    selection = vision_prune.select_topk(torch.rand(78, generator=generator), offsets, ints(*kept))
    merge = vision_prune.merge_similar(keys, offsets, selection, ints(*counts))
    features = torch.randn(78, 5, generator=generator, dtype=torch.float64)
    whole, gradient = [], torch.zeros(78, 5, dtype=torch.float64)
    ends, entries = offsets.tolist(), merge.merge_offsets.tolist()
    place = 0
    for s, dominant in enumerate(as_lists(selection)):
        exact = contextual(keys[ends[s] : ends[s + 1]].numpy(), dominant, counts[s])
        first = merge.offsets[s]
        assert merge.indices[first : merge.offsets[s + 1]].tolist() == list(exact)
        for token, weights in exact.items():
            part = slice(entries[place], entries[place + 1])
            assert merge.merge_source[part].tolist() == list(weights)
            assert merge.merge_weight[part].tolist() == [float(np.float32(w)) for w in weights.values()]
            for source, weight in (weights or {token: 1.0}).items():
                gradient[ends[s] + source] += weight
            whole.append(sum(w * features[ends[s] + source] for source, w in (weights or {token: 1.0}).items()))
            place += 1
    given = features.float().requires_grad_()
    merged = vision_prune.merge_tokens(given, offsets, merge)
    torch.testing.assert_close(merged.double(), torch.stack(whole), rtol=1e-6, atol=1e-6)
    merged.sum().backward()
    torch.testing.assert_close(given.grad.double(), gradient, rtol=1e-6, atol=1e-6)


def test_merge_tokens_leaves_the_bits_of_what_was_not_merged():
    offsets = offsets_of([6])
    selection = Selection(ints(1, 4), ints(0, 2))
    merge = vision_prune.merge_similar(torch.randn(6, 3), offsets, selection, ints(1))
    assert merge.indices.tolist() == [0, 1, 4]
    assert merge.merge_source.tolist() == [0, 2, 3, 5]
    features = torch.randn(6, 3).bfloat16()
    features[2] = torch.inf
    out = vision_prune.merge_tokens(features, offsets, merge)
    assert torch.equal(out[1:], features[[1, 4]])
    assert out[0].isinf().all()


def test_of_equal_cosines_the_lowest_target_absorbs():
    """The other targets are their own only entry."""
    merge = vision_prune.merge_similar(torch.ones(8, 3), offsets_of([8]), Selection(ints(), ints(0, 0)), ints(3))
    assert merge.indices.tolist() == [0, 2, 4]
    assert merge.merge_offsets.tolist() == [0, 6, 7, 8]
    assert merge.merge_source.tolist() == [0, 1, 3, 5, 6, 7, 2, 4]
    assert merge.merge_weight.tolist() == [1] + [float(np.float32(0.2))] * 5 + [1, 1]


def test_merging_reads_nothing_from_the_device():
    """On "meta" there is nothing to read; the sizes are those that real tensors give."""
    generator = torch.Generator().manual_seed(0)
    sizes, kept, counts = (40, 0, 9, 6, 3, 7), (10, 0, 3, 6, 0, 2), (7, 1, 9, 2, 0, 5)
    offsets, keys = offsets_of(sizes), torch.randn(sum(sizes), 12, generator=generator)
    selection = vision_prune.select_topk(torch.rand(sum(sizes), generator=generator), offsets, ints(*kept))
    there = Selection(selection.indices.to("meta"), selection.offsets)
    real = vision_prune.merge_similar(keys, offsets, selection, ints(*counts))
    found = vision_prune.merge_similar(keys.to("meta"), offsets, there, ints(*counts))
    for result, expected in zip(found, real, strict=True):
        assert (result.device.type, result.shape, result.dtype) == ("meta", expected.shape, expected.dtype)


def test_what_does_not_fit_is_named():
    scores, offsets, counts = torch.randn(5), offsets_of((2, 3)), ints(1, 1)
    for message, call in (
        (r"or bfloat16 \[N\], got 'float64", lambda: vision_prune.select_topk(scores.double(), offsets, counts)),
        (
            r"bool \[5\], got 'bool \[4\]",
            lambda: vision_prune.select_topk(scores, offsets, counts, forced=scores[1:] > 0),
        ),
        (r"ascend from 0 to 5, got \[0, 2, 4\]", lambda: vision_prune.select_topk(scores, offsets_of((2, 2)), counts)),
        (r"int32 \[2\], got 'int32 \[1\]", lambda: vision_prune.select_topk(scores, offsets, counts[:1])),
        (r"2, the sum of the counts, got 3", lambda: vision_prune.select_topk(scores, offsets, counts, num_kept=3)),
        (r"float \[N, D\], got 'float32 \[5\]", lambda: vision_prune.select_maxmin(scores, offsets, counts)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_operators_are_registered():
    scores, offsets, counts = torch.randn(5), offsets_of((2, 3)), ints(1, 2)
    torch.library.opcheck(torch.ops.foveate.select_topk.default, (scores, offsets, counts, scores > 0, 3))
    features, maxmin = torch.randn(5, 4), torch.ops.foveate.select_maxmin.default
    torch.library.opcheck(maxmin, (features, offsets, counts, torch.tensor([0, 4, 13]), 3, 13, [], 3))
    torch.library.opcheck(maxmin, (features, offsets, counts, torch.tensor([0, 4, 4]), 2, 4, [1, 3, 2], 3))
