"""`torch.ops.foveate.select_topk` and the other primitives of foveate._C; the scores in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foveate import _C
from foveate.kernels.dispatch import stream_of
from foveate.kernels.library import operator

Kept = tuple[torch.Tensor, torch.Tensor]


def _select_topk(scores, offsets, counts, forced, num_kept: int) -> Kept:
    indices, kept_offsets = _fake_select(scores, offsets, counts, forced, num_kept)
    _C.select_topk(scores, offsets, counts, forced, indices, kept_offsets, stream_of(scores))
    return indices, kept_offsets


def _fake_select(tokens, offsets, counts, forced, num_kept: int) -> Kept:
    return offsets.new_empty(num_kept), torch.empty_like(offsets)


def _select_maxmin(features, offsets, counts, squares, longest: int, num_cosines: int, long_spans, num_kept: int):
    indices, kept_offsets = _fake_select(features, offsets, counts, None, num_kept)
    total, dim = features.shape
    triples = [tuple(long_spans[first : first + 3]) for first in range(0, len(long_spans), 3)]
    most = max((tokens for _, tokens, _ in triples), default=0)
    sizes = (_C.maxmin_unit_elements(total, len(counts), dim), num_cosines, total, _C.maxmin_maxima_elements(most))
    units, cosines, closest, maxima = (features.new_empty(size, dtype=torch.float32) for size in sizes)
    choices = features.new_empty(_C.maxmin_choice_elements(most), dtype=torch.int64)
    memory = units, cosines, squares, closest, maxima, choices
    _C.select_maxmin(features, offsets, counts, longest, triples, *memory, indices, kept_offsets, stream_of(features))
    return indices, kept_offsets


def _fake_maxmin(features, offsets, counts, squares, longest: int, num_cosines: int, long_spans, num_kept: int) -> Kept:
    return _fake_select(features, offsets, counts, None, num_kept)


def _compact(planes: Sequence[torch.Tensor], rows: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    out = _fake_compact(planes, rows, dims)
    sources = [_as_bytes(_readable(plane), dim) for plane, dim in zip(planes, dims, strict=True)]
    targets = [_as_bytes(plane, dim) for plane, dim in zip(out, dims, strict=True)]
    for first in range(0, len(planes), _C.MAX_PLANES):
        last = first + _C.MAX_PLANES
        _C.copy_rows(sources[first:last], targets[first:last], rows, None, stream_of(rows))
    return out


def _fake_compact(planes: Sequence[torch.Tensor], rows: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    return [
        plane.new_empty((*plane.shape[:dim], len(rows), *plane.shape[dim + 1 :]))
        for plane, dim in zip(planes, dims, strict=True)
    ]


def _compact_kv(source, target, source_slots, target_slots) -> None:
    sources, targets = ([_as_bytes(part.flatten(1, 2), 1) for part in pool] for pool in (source, target))
    _C.copy_rows(sources, targets, source_slots, target_slots, stream_of(source))


def _attention_scores(queries, keys, logsumexp, offsets, slots, row_offsets, scale: float) -> torch.Tensor:
    from foveate.kernels.vision_prune import triton_kernel

    out = _fake_attention_scores(queries, keys, logsumexp, offsets, slots, row_offsets, scale)
    triton_kernel.attention_scores(queries, keys, logsumexp, offsets, slots, row_offsets, scale, out)
    return out


def _fake_attention_scores(queries, keys, logsumexp, offsets, slots, row_offsets, scale: float) -> torch.Tensor:
    return queries.new_empty(len(keys if slots is None else slots), dtype=torch.float32)


def _logsumexp(queries, keys, offsets, slots, row_offsets, scale: float) -> torch.Tensor:
    from foveate.kernels.vision_prune import triton_kernel

    out = _fake_logsumexp(queries, keys, offsets, slots, row_offsets, scale)
    triton_kernel.logsumexp(queries, keys, offsets, slots, row_offsets, scale, out)
    return out


def _fake_logsumexp(queries, keys, offsets, slots, row_offsets, scale: float) -> torch.Tensor:
    return queries.new_empty(queries.shape[:2], dtype=torch.float32)


def _column_scores(q, k, logsumexp, cu_seqlens, scale: float) -> torch.Tensor:
    from foveate.kernels.vision_prune import triton_kernel

    out = _fake_column_scores(q, k, logsumexp, cu_seqlens, scale)
    triton_kernel.column_scores(q, k, logsumexp, cu_seqlens, scale, out)
    return out


def _fake_column_scores(q, k, logsumexp, cu_seqlens, scale: float) -> torch.Tensor:
    return q.new_empty(len(q), dtype=torch.float32)


def _readable(plane: torch.Tensor) -> torch.Tensor:
    """Contiguous, or rows that are; a copy of anything else."""
    rows = plane.dim() == 2 and plane.stride(1) == 1
    return plane if rows or plane.is_contiguous() else plane.contiguous()


def _as_bytes(plane: torch.Tensor, dim: int) -> torch.Tensor:
    """uint8 [outer, T, bytes]: a view of the plane's tokens along `dim`, where the dimensions allow one."""
    shape = plane.shape
    rows = plane.view(shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel())
    # A row of one element may have any stride, where a view as bytes wants 1.
    return rows.as_strided(rows.shape, (*rows.stride()[:2], 1)).view(torch.uint8)


# -> int32 [num_kept], int32 [S + 1]
select_topk = operator(
    "select_topk(Tensor scores, Tensor offsets, Tensor counts, Tensor? forced, SymInt num_kept) -> (Tensor, Tensor)",
    _select_topk,
    _fake_select,
)
# squares: int64 [S + 1], where the matrices of cosines begin that are held; num_cosines: its last; longest: tokens of
# the longest span that has one. long_spans: of each other span its number, its tokens, and how many it keeps at most.
# Result as of select_topk.
select_maxmin = operator(
    "select_maxmin(Tensor features, Tensor offsets, Tensor counts, Tensor squares, SymInt longest, SymInt num_cosines,"
    " SymInt[] long_spans, SymInt num_kept) -> (Tensor, Tensor)",
    _select_maxmin,
    _fake_maxmin,
)
compact = operator("compact(Tensor[] planes, Tensor rows, int[] dims) -> Tensor[]", _compact, _fake_compact)
compact_kv = operator(
    "compact_kv(Tensor source, Tensor(a!) target, Tensor source_slots, Tensor target_slots) -> ()",
    _compact_kv,
    lambda source, target, source_slots, target_slots: None,
)
# Triton's: queries [R, Hq, d], keys [T, Hk, d], logsumexp float32 [R, Hq] -> float32 [sum N]
attention_scores = operator(
    "attention_scores(Tensor queries, Tensor keys, Tensor logsumexp, Tensor offsets, Tensor? slots,"
    " Tensor? row_offsets, float scale) -> Tensor",
    _attention_scores,
    _fake_attention_scores,
)
# -> float32 [R, Hq]
logsumexp = operator(
    "attention_logsumexp(Tensor queries, Tensor keys, Tensor offsets, Tensor? slots, Tensor? row_offsets,"
    " float scale) -> Tensor",
    _logsumexp,
    _fake_logsumexp,
)
# q, k [P, H, d], logsumexp float32 [H, P] -> float32 [P]
column_scores = operator(
    "column_scores(Tensor q, Tensor k, Tensor logsumexp, Tensor cu_seqlens, float scale) -> Tensor",
    _column_scores,
    _fake_column_scores,
)
