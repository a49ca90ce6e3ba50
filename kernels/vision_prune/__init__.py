"""The primitives of vision-token pruning: scoring, selecting, compacting, merging; each over a whole ragged batch.

A batch is S spans (the image tokens of one prompt, or of one image) laid end to end: span s is the elements
offsets[s] .. offsets[s + 1] of them, offsets int32 [S + 1] from 0 to their number. Spans may be empty. A selection is
span-local indices, ascending within each span. A span gives the same result alone and in any batch.

Integer arguments (offsets, counts, slots) are on the CPU or on the device of the other tensors. Their values are
checked where they are on the CPU; sizes that depend on them (`num_kept`) may be given, and are otherwise read, which on
a GPU waits for it unless they are on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from foveate.kernels.dispatch import require
from foveate.kernels.vision_prune import operators, reference
from foveate.kernels.vision_prune.arguments import (
    backend_for,
    check_keys,
    check_offsets,
    check_pools,
    check_range,
    kept_total,
    kind_of,
    on,
    rows_of,
)
from foveate.kernels.vision_prune.budgets import NestedBudgets, keep_count, nested_budgets

__all__ = [
    "Merge",
    "NestedBudgets",
    "Selection",
    "attention_scores",
    "backend_for",
    "column_scores",
    "compact",
    "compact_kv",
    "keep_count",
    "logsumexp",
    "merge_patches",
    "merge_similar",
    "merge_tokens",
    "nested_budgets",
    "page_slots",
    "select_maxmin",
    "select_topk",
    "selected_rows",
    "surviving_rows",
]

HELD_TOKENS = 8192  # of a span whose cosines `select_maxmin` holds: 256 MiB


class Selection(NamedTuple):
    """What was kept of a batch of spans.

    indices: int32 [sum k], within each span ascending and counted from its start; offsets: int32 [S + 1], where the
    kept tokens of each span begin.
    """

    indices: torch.Tensor
    offsets: torch.Tensor


class Merge(NamedTuple):
    """Kept tokens, and what was merged into them: kept token j becomes sum over its entries of weight times source.

    indices, offsets: as of a `Selection`. merge_offsets: int32 [sum k + 1], the entries of each kept token; one without
    entries stays as it is, and so does one that is its own only entry. merge_source: int32 [entries], span-local, the
    token itself first and the others ascending. merge_weight: float32 [entries].
    """

    indices: torch.Tensor
    offsets: torch.Tensor
    merge_offsets: torch.Tensor
    merge_source: torch.Tensor
    merge_weight: torch.Tensor


def attention_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    logsumexp: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scale: float,
    slots: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The attention that each key gets, as a mean over heads and query rows; no attention matrix is written.

        score_j = mean over heads h and the rows r of the span of exp(scale q_rh . k_j,h' - logsumexp_rh)

    queries: float [R, Hq, d], rotated. keys: float [T, Hk, d], or a pool [pages, page_size, Hk, d], contiguous in its
    last two dimensions; query head h reads key head h' = h // (Hq // Hk). logsumexp: float32 [R, Hq], over all keys
    that the row attends to, not only those scored here; -inf gives weight 0. offsets: int32 [S + 1] into the keys, or
    into slots where given: int32 or int64 [sum N], page * page_size + offset of each key. row_offsets: int32 [S + 1],
    the rows of each span; None: span s has row s. Returns float32 [sum N]; 0 for a span without rows. Sums are float32.

    Raises ValueError on shapes and dtypes that do not fit. Source of the score: the last query's, averaged over heads,
    is FastV's (arXiv 2403.06764) and PyramidDrop's (2410.17247); selected rows are SparseVLM's (2410.04417).
    """
    chosen = backend_for("attention_scores", backend, queries.device, queries.dtype)
    keys = check_keys(queries, keys, slots, offsets, row_offsets)
    fits = logsumexp.dtype == torch.float32 and logsumexp.shape == queries.shape[:2]
    require(fits, f"float32 {list(queries.shape[:2])}", kind_of(logsumexp), "logsumexp")
    if chosen == "reference":
        return reference.attention_scores(queries, keys, logsumexp, offsets, slots, row_offsets, scale)
    queries, keys, places = rows_of(queries), rows_of(keys), on(queries.device, offsets, slots, row_offsets)
    return operators.attention_scores(queries, keys, logsumexp.contiguous(), *places, scale)


def logsumexp(
    queries: torch.Tensor,
    keys: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scale: float,
    slots: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """log sum_j exp(scale q_rh . k_j,h') over all keys of the row's span, without a mask: float32 [R, Hq].

    Arguments as of `attention_scores`; offsets and slots name all the keys that a row attends to. -inf for a span
    without keys. Raises ValueError on shapes and dtypes that do not fit.
    """
    chosen = backend_for("logsumexp", backend, queries.device, queries.dtype)
    keys = check_keys(queries, keys, slots, offsets, row_offsets)
    if chosen == "reference":
        return reference.logsumexp(queries, keys, offsets, slots, row_offsets, scale)
    places = on(queries.device, offsets, slots, row_offsets)
    return operators.logsumexp(rows_of(queries), rows_of(keys), *places, scale)


_logsumexp = logsumexp  # where an argument has that name


def column_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    logsumexp: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    backend: str | None = None,
) -> torch.Tensor:
    """The attention that each key gets from all queries of its sequence, which see all of it: a column's sum.

        score_j = sum over heads h and queries i of the sequence of j of exp(scale q_ih . k_jh - logsumexp_hi)

    q, k: float [P, H, d]. logsumexp: float32 [H, P], of any strides; None computes it. cu_seqlens: int32 [S + 1].
    Returns float32 [P]; it adds up to H times the length of the sequence. Sums are float32.

    Raises ValueError on shapes and dtypes that do not fit. Source: VisionZip (arXiv 2412.04467), its score for towers
    without a class token.
    """
    chosen = backend_for("column_scores", backend, q.device, q.dtype)
    require(q.shape == k.shape, f"{kind_of(q)} as q", kind_of(k), "k")
    check_keys(q, k, None, cu_seqlens, cu_seqlens)
    if logsumexp is None:
        logsumexp = _logsumexp(q, k, cu_seqlens, scale=scale, row_offsets=cu_seqlens, backend=chosen).t()
    fits = logsumexp.dtype == torch.float32 and logsumexp.shape == (q.shape[1], len(q))
    require(fits, f"float32 {[q.shape[1], len(q)]}", kind_of(logsumexp), "logsumexp")
    if chosen == "reference":
        return reference.column_scores(q, k, logsumexp, cu_seqlens, scale)
    return operators.column_scores(rows_of(q), rows_of(k), logsumexp, *on(q.device, cu_seqlens), scale)


def merge_patches(scores: torch.Tensor, unit: int = 4, order: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of each `unit` neighbouring patches' scores, in another order: float32 [P / unit].

    scores: float32 [P], the patches of a merged token next to each other, as Qwen's towers have them. order: int [P /
    unit], which merged token stands at each place of the result (the tower's reverse index takes windows to raster
    order); None leaves them. The sum runs over a token's patches in order. ValueError if unit does not divide P.
    """
    fits = scores.dim() == 1 and unit >= 1 and len(scores) % unit == 0
    require(fits, f"float32 [P] with P a multiple of {unit}", list(scores.shape), "scores")
    merged = sum(scores.view(-1, unit).unbind(1), torch.zeros_like(scores[::unit])) / unit
    return merged if order is None else merged[order]


def select_topk(
    scores: torch.Tensor,
    offsets: torch.Tensor,
    counts: torch.Tensor,
    *,
    forced: torch.Tensor | None = None,
    num_kept: int | None = None,
    backend: str | None = None,
) -> Selection:
    """Of each span exactly counts[s] tokens: those of the highest scores, the lowest index first among equals.

    scores: float32, float16 or bfloat16 [sum N]; -0 equals 0; NaN is below -inf, and NaNs are equal. offsets: int32
    [S + 1]. counts: int32 [S]; below 0 counts as 0, above N as N. A quota for a part of a span makes the part a span
    of its own. forced: bool [sum N], tokens that come before all others, by score among themselves, and count in k.
    num_kept: the sum of the counts so bounded; what a wrong one leaves over is -1.

    Deterministic: integers only, so that every backend keeps the same tokens. Raises ValueError on shapes, dtypes, and
    values that are on the CPU and do not fit.
    """
    chosen = backend_for("select_topk", backend, scores.device)
    fits = scores.dim() == 1 and scores.dtype in (torch.float32, torch.float16, torch.bfloat16)
    require(fits, "float32, float16 or bfloat16 [N]", kind_of(scores), "scores")
    fits = forced is None or (forced.dtype == torch.bool and forced.shape == scores.shape)
    require(fits, f"bool [{len(scores)}]", None if forced is None else kind_of(forced), "forced")
    check_offsets(offsets, len(scores), "offsets")
    num_kept = kept_total(offsets, counts, num_kept)
    offsets, counts = on(scores.device, offsets, counts)
    if chosen == "reference":
        return Selection(*reference.select_topk(scores, offsets, counts, forced, num_kept))
    return Selection(*operators.select_topk(scores.contiguous(), offsets, counts, forced, num_kept))


def select_maxmin(
    features: torch.Tensor,
    offsets: torch.Tensor,
    counts: torch.Tensor,
    *,
    num_kept: int | None = None,
    backend: str | None = None,
) -> Selection:
    """Of each span counts[s] tokens that are far from each other: greedy max-min of the cosine distance.

    First the token whose nearest other token is farthest away; then, again and again, the token whose nearest chosen
    one is farthest away. The lowest index among equals. A distance is 1 - cos, and compared by its cosine; a token
    whose feature has no finite length above 0 has the cosine 0 with all.

    features: float [sum N, D]. offsets, counts, num_kept: as of `select_topk`. The indices ascend; the order in which
    tokens were chosen is not kept. Meanwhile the compiled backends hold the cosines of spans of at most HELD_TOKENS
    tokens, 4 N^2 bytes, and of longer ones N^2 / 16 bytes: a chosen token's cosines are then computed once more, at
    the price of a launch for each. The reference holds at most 16 MiB, or a row. The tokens in float32 come on top.

    Deterministic: a cosine is a sum of products in float32, dimension after dimension, on every backend, so that all
    keep the same tokens. Raises ValueError as `select_topk`. Source: DivPrune (arXiv 2503.02175).
    """
    chosen = backend_for("select_maxmin", backend, features.device, features.dtype)
    require(features.dim() == 2 and features.is_floating_point(), "float [N, D]", kind_of(features), "features")
    check_offsets(offsets, len(features), "offsets")
    num_kept = kept_total(offsets, counts, num_kept)
    places, wanted = on(features.device, offsets, counts)
    if chosen == "reference":
        return Selection(*reference.select_maxmin(features, places, wanted, num_kept))
    sizes = offsets.diff().tolist()
    squares = [size * size if size <= HELD_TOKENS else 0 for size in sizes]
    ends = torch.tensor([0, *accumulate(squares)], dtype=torch.int64, device="cpu")
    longest = max((size for size in sizes if size <= HELD_TOKENS), default=0)
    long_spans = [(span, size, min(size, num_kept)) for span, size in enumerate(sizes) if size > HELD_TOKENS]
    (starts,) = on(features.device, ends)
    features = features.detach().contiguous()
    kept = operators.select_maxmin(
        features, places, wanted, starts, longest, int(ends[-1]), [*chain(*long_spans)], num_kept
    )
    return Selection(*kept)


def selected_rows(selection: Selection, starts: torch.Tensor) -> torch.Tensor:
    """int32 [sum k], rows of a flat batch: the selection's indices, counted from where each span starts in it.

    starts: int32 [S], the row of each span's first token; a selection's own offsets[:-1] gives rows of the spans laid
    end to end.
    """
    (starts,) = on(selection.indices.device, starts)
    return selection.indices + starts[reference.spans_of(selection.offsets, len(selection.indices))].int()


def surviving_rows(
    selection: Selection, starts: torch.Tensor, lengths: torch.Tensor, num_rows: int, num_out: int
) -> torch.Tensor:
    """int32 [num_out], ascending: the rows of a flat batch that lie in no span, and those of the selection.

    starts, lengths: int32 [S], the rows of each span; spans do not overlap. num_rows: rows of the batch. num_out: rows
    that survive, num_rows - sum(lengths) + sum(k); what a wrong one leaves over is -1.
    """
    starts, lengths = on(selection.indices.device, starts, lengths)
    return reference.surviving_rows(selected_rows(selection, starts), starts, lengths, num_rows, num_out)


def compact(
    planes: Sequence[torch.Tensor],
    rows: torch.Tensor,
    *,
    dims: Sequence[int] | None = None,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """The rows of all planes, copied byte by byte into new contiguous tensors, in one pass.

    planes: tensors of any dtype with T tokens along dimension dims[i] (None: 0 for all); hidden states, residuals and
    deepstack planes [T, D], positions [3, T] with dim 1, slots [T]. One whose rows are not contiguous is copied first.
    rows: int32 [T'], ascending or not, in [0, T). Bits are copied: an integer never passes through a float. Raises
    ValueError on shapes that do not fit, and on rows that are on the CPU and out of range.
    """
    planes = list(planes)
    require(len(planes) > 0, "a plane or more", len(planes), "planes")
    dims = [0] * len(planes) if dims is None else list(dims)
    require(len(dims) == len(planes), f"{len(planes)} dimensions", len(dims), "dims")
    fits = all(0 <= dim < plane.dim() for plane, dim in zip(planes, dims, strict=True))
    require(fits, "a dimension of each plane", dims, "dims")
    tokens = [plane.shape[dim] for plane, dim in zip(planes, dims, strict=True)]
    require(len(set(tokens)) == 1, "as many tokens in each plane", tokens, "planes")
    require(rows.dim() == 1 and rows.dtype == torch.int32, "int32 [T']", kind_of(rows), "rows")
    check_range(rows, tokens[0], "rows")
    chosen = backend_for("compact", backend, planes[0].device)
    (rows,) = on(planes[0].device, rows)
    if chosen == "reference":
        return reference.compact(planes, rows, dims)
    return operators.compact(planes, rows, dims)


def compact_kv(
    source: torch.Tensor,
    target: torch.Tensor,
    source_slots: torch.Tensor,
    target_slots: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Copies the keys and values of tokens from slots of one pool to slots of another, or of the same, in place.

    source, target: float [2, layers, pages, page_size, kv_heads, head_dim] of equal layers, heads and dtype, contiguous
    in the last four dimensions (a run of a pool's layers is pool[:, first:last]). source_slots, target_slots: int32 or
    int64 [n], page * page_size + offset (`page_slots`); no target slot twice, and none that is a source slot of the
    same pool: kept tokens move to other pages, and the old ones are freed after. Raises ValueError on shapes, and on
    slots that are on the CPU and do not fit.
    """
    check_pools(source, target, source_slots, target_slots)
    chosen = backend_for("compact_kv", backend, source.device)
    source_slots, target_slots = on(source.device, source_slots, target_slots)
    if chosen == "reference":
        return reference.compact_kv(source, target, source_slots, target_slots)
    operators.compact_kv(source, target, source_slots.long(), target_slots.long())


def page_slots(pages: torch.Tensor, tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    """int64 [n], pool slots of tokens: pages[token // page_size] * page_size + token % page_size.

    pages: int32 or int64, the pages of a segment, first token first, or of many, laid end to end. tokens: int32 or
    int64 [n], counted from the first of these pages.
    """
    tokens = tokens.long()
    return pages.long()[tokens // page_size] * page_size + tokens % page_size


def merge_similar(
    features: torch.Tensor,
    offsets: torch.Tensor,
    selection: Selection,
    counts: torch.Tensor,
    *,
    backend: str | None = None,
) -> Merge:
    """Adds counts[s] contextual tokens to a selection, and merges into them the tokens that are left.

    Of the M tokens of a span that the selection leaves, every M // c-th from the first on is a target, c in
    all; each other one goes to the target of the largest cosine, the first of equals. A target becomes itself plus
    the mean of the n tokens that went to it: weight 1 for itself, 1 / n for each of them. A span with c = M has nothing
    to merge, and no entries.

    features: float [sum N, D], what is compared: VisionZip takes the mean over heads of a block's keys; their cosines
    are those of `select_maxmin`. offsets: int32 [S + 1]. selection: the dominant tokens. counts: int32 [S]; c is at
    most M. Sizes follow from offsets, selection.offsets and counts: this waits for a GPU only where they lie on it.
    Raises ValueError on shapes and dtypes that do not fit.

    Deterministic. Source: VisionZip (arXiv 2412.04467), its contextual tokens.
    """
    require(features.dim() == 2 and features.is_floating_point(), "float [N, D]", kind_of(features), "features")
    check_offsets(offsets, len(features), "offsets")
    fits = counts.shape == (len(offsets) - 1,) and selection.offsets.shape == offsets.shape
    require(fits, f"int32 [{len(offsets) - 1}]", kind_of(counts), "counts")
    backend_for("merge_similar", backend, features.device, features.dtype)
    return Merge(*reference.merge_similar(features, offsets, *selection, counts))


def merge_tokens(features: torch.Tensor, offsets: torch.Tensor, merge: Merge) -> torch.Tensor:
    """The kept tokens after merging: float [sum k, D], with gradients to features, added up in float32 in order.

    features: float [sum N, D], what is merged. offsets: int32 [S + 1]. merge: as `merge_similar` returns it, or the
    same fields of a recorded plan.
    """
    check_offsets(offsets, len(features), "offsets")
    (offsets, *parts) = on(features.device, offsets, *merge)
    indices, kept_offsets, *entries = parts
    return reference.merge_tokens(features, indices, kept_offsets, offsets, *entries)
