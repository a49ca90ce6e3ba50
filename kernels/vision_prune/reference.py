"""Plain torch pruning primitives: the definition of correct, and the backend of every device without a compiled one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

QUERY_TILE = 1 << 20  # float32 scores alive at once, about what a core's cache holds
COSINES = 1 << 22  # float32 cosines of a span alive at once: all of 2,048 tokens, of more tokens as many rows as fit
LANES, VECTOR = 32, 4  # of the sum of squares: the order of a warp that reads 16 bytes at a time


def spans_of(offsets: torch.Tensor, total: int) -> torch.Tensor:
    """int64 [total], the span that each element lies in. offsets: int [S + 1]."""
    return torch.searchsorted(offsets, torch.arange(total, device=offsets.device), right=True) - 1


def attention_scores(queries, keys, logsumexp, offsets, slots, row_offsets, scale: float) -> torch.Tensor:
    """See `foveate.kernels.vision_prune.attention_scores`."""
    out = queries.new_zeros(len(keys) if slots is None else len(slots), dtype=torch.float32)
    for rows, (start, stop) in _pairs(row_offsets, offsets):
        if rows.start == rows.stop or start == stop:
            continue
        logits = _logits(queries[rows], _rows(keys, slots, start, stop), scale)  # [Hq, R, N]
        lse = logsumexp[rows].t()[..., None]
        weights = torch.where(lse == -torch.inf, 0.0, (logits - lse).exp())
        out[start:stop] = weights.flatten(0, 1).mean(0)
    return out


def logsumexp(queries, keys, offsets, slots, row_offsets, scale: float) -> torch.Tensor:
    """See `foveate.kernels.vision_prune.logsumexp`."""
    out = queries.new_full(queries.shape[:2], -torch.inf, dtype=torch.float32)
    for rows, (start, stop) in _pairs(row_offsets, offsets):
        if start == stop:
            continue
        keys_of_span = _rows(keys, slots, start, stop)
        for part in _tiles(rows, stop - start, queries.shape[1]):
            out[part] = _logits(queries[part], keys_of_span, scale).logsumexp(-1).t()
    return out


def column_scores(q, k, logsumexp, cu_seqlens, scale: float) -> torch.Tensor:
    """See `foveate.kernels.vision_prune.column_scores`."""
    out = q.new_zeros(len(k), dtype=torch.float32)
    for rows, (start, stop) in _pairs(cu_seqlens, cu_seqlens):
        for part in _tiles(rows, stop - start, q.shape[1]):
            logits = _logits(q[part], k[start:stop], scale)
            out[start:stop] += (logits - logsumexp[:, part, None]).exp().sum((0, 1))
    return out


def select_topk(scores, offsets, counts, forced, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `foveate.kernels.vision_prune.select_topk`."""
    spans = spans_of(offsets, len(scores))
    order = torch.sort(_keys(scores, forced), descending=True, stable=True).indices
    order = order[torch.sort(spans[order], stable=True).indices]  # spans in order, within each the best first
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - offsets[spans]
    return keep_ranks(ranks, offsets, counts, num_kept)


def keep_ranks(ranks, offsets, counts, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each span the tokens of rank below its count, ascending. ranks: int64 [sum N], 0 is the best."""
    spans = spans_of(offsets, len(ranks))
    counts = torch.minimum(counts.clamp(min=0), offsets.diff())
    kept_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    kept = ranks < counts[spans]
    # Beyond the last place lies a place for what is not kept: no size depends on what a device holds.
    places = torch.where(kept, kept.cumsum(0) - 1, num_kept).clamp(max=num_kept)
    indices = torch.full((num_kept + 1,), -1, dtype=torch.int32, device=ranks.device)
    indices[places] = (torch.arange(len(ranks), device=ranks.device) - offsets[spans]).int()
    return indices[:num_kept], kept_offsets


def surviving_rows(rows, starts, lengths, num_rows: int, num_out: int) -> torch.Tensor:
    """See `foveate.kernels.vision_prune.surviving_rows`."""
    steps = torch.zeros(num_rows + 1, dtype=torch.int32, device=rows.device)
    one = steps.new_ones(len(starts))
    steps.index_add_(0, starts, one).index_add_(0, starts + lengths, -one)
    survives = steps[:-1].cumsum(0) == 0
    survives[rows] = True
    return positions(survives, num_out).int()


def compact(planes: Sequence[torch.Tensor], rows: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """See `foveate.kernels.vision_prune.compact`."""
    return [plane.index_select(dim, rows) for plane, dim in zip(planes, dims, strict=True)]


def compact_kv(source, target, source_slots, target_slots) -> None:
    """See `foveate.kernels.vision_prune.compact_kv`."""
    source, target = (pool.view(*pool.shape[:2], -1, *pool.shape[4:]) for pool in (source, target))
    target.index_copy_(2, target_slots.long(), source.index_select(2, source_slots))


def select_maxmin(features, offsets, counts, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `foveate.kernels.vision_prune.select_maxmin`."""
    ranks = torch.full((len(features),), len(features), device=features.device)
    units = unit_rows(features)
    for count, (start, stop) in zip(counts.tolist(), _bounds(offsets), strict=True):
        for rank, token in enumerate(_farthest(units[start:stop], min(count, stop - start))):
            ranks[start + token] = rank
    return keep_ranks(ranks, offsets, counts, num_kept)


def _farthest(units: torch.Tensor, count: int) -> list[int]:
    """The tokens that max-min selection picks, in its order. units: float32 [N, D]

    At most COSINES cosines are alive; where those of all pairs are more, a chosen token's are computed when it is.
    """
    if count <= 0:
        return []
    closest = units.new_empty(len(units))  # of each token, the largest similarity to another one
    tile = max(1, COSINES // len(units))
    for start in range(0, len(units), tile):
        cosines = similarities(units[start : start + tile], units)
        cosines.diagonal(start).fill_(-torch.inf)
        closest[start : start + tile] = cosines.amax(1)
    chosen: list[int] = []
    while True:
        chosen.append(int((closest == closest.min()).nonzero()[0]))
        last = chosen[-1]
        if len(chosen) == count:
            return chosen
        row = cosines[last] if tile >= len(units) else similarities(units[last : last + 1], units)[0]
        closest = row.clone() if len(chosen) == 1 else torch.maximum(closest, row)
        closest[chosen] = torch.inf


def merge_similar(features, offsets, indices, kept_offsets, counts) -> tuple[torch.Tensor, ...]:
    """See `foveate.kernels.vision_prune.merge_similar`. The last three are read on the host, and offsets."""
    units, device, total = unit_rows(features), features.device, len(features)
    left = [size - kept for size, kept in zip(_sizes(offsets), _sizes(kept_offsets), strict=True)]
    wanted = [min(max(count, 0), rest) for count, rest in zip(counts.tolist(), left, strict=True)]
    merges = [0 < count < rest for count, rest in zip(wanted, left, strict=True)]
    strides = [rest // count if count else 1 for count, rest in zip(wanted, left, strict=True)]
    starts, spans = offsets.to(device)[:-1].long(), spans_of(offsets.to(device), total)

    dominant = torch.zeros(total, dtype=torch.bool, device=device)
    dominant[indices + starts[spans_of(kept_offsets.to(device), len(indices))]] = True
    ranks = (~dominant).cumsum(0) - 1 - _on(device, [0, *accumulate(left)][:-1], spans)  # among the rest of the span
    stride = _on(device, strides, spans)
    target = ~dominant & (ranks % stride == 0) & (ranks // stride < _on(device, wanted, spans))
    joins = ~dominant & _on(device, merges, spans).bool()  # merging spans: targets and what they absorb
    others = positions(joins & ~target, sum(m * (rest - c) for m, rest, c in zip(merges, left, wanted, strict=True)))
    targets = positions(target, sum(wanted))
    best = _most_similar(units, others, targets, merges, left, wanted)

    number = torch.zeros(total, dtype=torch.long, device=device)  # of the target that a token belongs to
    number[targets] = torch.arange(len(targets), device=device)
    number[others] = best
    absorbed = torch.zeros(len(targets), dtype=torch.long, device=device)
    absorbed.index_add_(0, best, torch.ones_like(best))
    entries = positions(joins, sum(m * rest for m, rest in zip(merges, left, strict=True)))
    # Target by target, itself first, then what it absorbs, which ascends as it was.
    keys = number[entries] * 2 + ~target[entries]
    entries = entries[torch.sort(keys, stable=True).indices]
    weights = torch.where(target[entries], 1.0, 1.0 / absorbed[number[entries]].float())
    sizes = torch.zeros(total, dtype=torch.long, device=device)
    sizes[targets] = absorbed + 1
    kept = positions(dominant | target, len(indices) + len(targets))
    sizes = (sizes * joins)[kept]
    ends = [0, *accumulate(size + count for size, count in zip(_sizes(kept_offsets), wanted, strict=True))]
    return (
        (kept - starts[spans[kept]]).int(),
        torch.tensor(ends, dtype=torch.int32, device="cpu").to(device, non_blocking=True),
        torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int(),
        (entries - starts[spans[entries]]).int(),
        weights,
    )


def _most_similar(units, others, targets, merges, left, wanted) -> torch.Tensor:
    """int64, for each row in others the number in targets of the most similar row of its span, the first of equals."""
    found, first, place = [others[:0]], 0, 0
    for merging, rest, count in zip(merges, left, wanted, strict=True):
        if merging:
            rows, columns = others[first : first + rest - count], targets[place : place + count]
            cosines = similarities(units[rows], units[columns])
            numbers = torch.arange(place, place + count, device=units.device)
            is_best = cosines == cosines.amax(1, keepdim=True)
            found.append(torch.where(is_best, numbers, len(targets)).amin(1))
            first += rest - count
        place += count
    return torch.cat(found)


def positions(mask: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [count], ascending, where a mask is set; what a wrong count leaves over is -1."""
    # Beyond the last place lies a place for the others: no size depends on what a device holds.
    places = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    out = torch.full((count + 1,), -1, dtype=torch.long, device=mask.device)
    out[places] = torch.arange(len(mask), device=mask.device)
    return out[:count]


def _on(device: torch.device, values: list[int], spans: torch.Tensor) -> torch.Tensor:
    """int64, the value of each element's span."""
    return torch.tensor(values, dtype=torch.long, device="cpu").to(device, non_blocking=True)[spans]


def _sizes(offsets: torch.Tensor) -> list[int]:
    return offsets.diff().tolist()


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """float32 [N, D], each row divided by its length; zeros where that is 0 or not finite.

    Squares are added up in the order of the compiled code: element i to accumulator i mod 128, four neighbours of
    these from the first to the last, the 32 sums by halving.
    """
    x = features.float()
    parts = -(-x.shape[1] // (LANES * VECTOR))
    padded = x.new_zeros(len(x), parts, LANES, VECTOR)
    padded.view(len(x), parts * LANES * VECTOR)[:, : x.shape[1]] = x * x
    total = x.new_zeros(len(x), LANES, VECTOR)
    for part in padded.unbind(1):
        total = total + part
    lanes = total[..., 0]
    for v in range(1, VECTOR):
        lanes = lanes + total[..., v]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    lengths = lanes.double().sqrt().float()  # rounded correctly, which torch's float32 root is not everywhere
    usable = (lengths > 0) & (lengths < torch.inf)
    return torch.where(usable, x / lengths, 0.0)


def similarities(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float32 [M, N], the products of the rows of a [M, D] and b [N, D], dimension after dimension.

    Products and sums are rounded one by one, so that every backend finds the same bits, and so the same selection.
    """
    out = a.new_zeros(len(a), len(b))
    for left, right in zip(a.t().contiguous(), b.t().contiguous(), strict=True):
        out += left[:, None] * right
    return out


def merge_tokens(features, indices, kept_offsets, offsets, merge_offsets, merge_source, merge_weight) -> torch.Tensor:
    """See `foveate.kernels.vision_prune.merge_tokens`."""
    places = torch.arange(len(indices), device=indices.device)
    starts = offsets[torch.searchsorted(kept_offsets, places, right=True) - 1]  # of each kept token's span
    sizes = merge_offsets.diff().long()
    own = features[(starts + indices).long()]
    owners = torch.repeat_interleave(places, sizes, output_size=len(merge_source))
    entries = features[(starts[owners] + merge_source).long()].float() * merge_weight[:, None]
    sums = torch.segment_reduce(entries, "sum", offsets=merge_offsets.long(), axis=0)
    return torch.where((sizes > 0)[:, None], sums.to(features.dtype), own)


def _keys(scores: torch.Tensor, forced: torch.Tensor | None) -> torch.Tensor:
    """int64 [sum N]: larger for larger scores, the same for -0 and 0; 0 for NaN; forced tokens above all others."""
    bits = (scores.float() + 0.0).view(torch.int32).long()
    keys = torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits | 0x80000000)
    keys = torch.where(scores.isnan(), 0, keys)
    return keys if forced is None else keys + (forced.long() << 32)


def _bounds(offsets: torch.Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(pairwise(ends))


def _pairs(row_offsets: torch.Tensor | None, offsets: torch.Tensor) -> list[tuple[slice, tuple[int, int]]]:
    """Of each span its rows of the queries and its elements."""
    spans = _bounds(offsets)
    rows = [(s, s + 1) for s in range(len(spans))] if row_offsets is None else _bounds(row_offsets)
    return [(slice(*r), span) for r, span in zip(rows, spans, strict=True)]


def _rows(keys: torch.Tensor, slots: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    return keys[start:stop] if slots is None else keys[slots[start:stop].long()]


def _tiles(rows: slice, num_keys: int, heads: int) -> list[slice]:
    size = max(1, QUERY_TILE // max(1, num_keys * heads))
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _logits(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 [Hq, R, N]. queries: [R, Hq, d], keys: [N, Hk, d]; query head h reads key head h // (Hq // Hk)."""
    kv_heads, dim = keys.shape[1:]
    # Contiguous, so that a product's bits do not depend on how its arguments lie in memory.
    q = queries.float().transpose(0, 1).reshape(kv_heads, -1, dim).contiguous()  # [Hk, Hq / Hk * R, d]
    product = q @ keys.float().contiguous().permute(1, 2, 0)
    return product.view(queries.shape[1], len(queries), -1).mul_(scale)
