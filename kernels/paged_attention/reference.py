"""Plain torch attention over KV segments: the definition of correct, and what prefills.

Visits of one depth and similar size are computed together, padded to a rectangle; the padded keys are
copies of valid ones and masked, so that nothing unwritten is ever read. Queries are tiled so that a tile
of scores stays in cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from foveate.kernels.paged_attention.plan import StepPlan

SCORE_TILE = 1 << 20  # float32 scores alive at once, about what a core's cache holds
MAX_BATCH_TOKENS = 1 << 15  # padded KV tokens gathered at once


@dataclass
class Batch:
    """Visits of one depth, padded: S segments, M rows and L keys each."""

    rows: torch.Tensor  # int64 [S, M]
    all_rows: bool  # rows are 0..T-1 in order: nothing to gather or scatter
    slots: torch.Tensor | slice  # int64 [S, L], or the one run of slots when S = 1 and its pages are adjacent
    kv_len: torch.Tensor | None  # int64 [S, 1] where keys are padded
    causal: bool
    first: bool  # depth 0: there is nothing to merge with
    real: torch.Tensor | None  # int64, which of the S * M rows are not padding; None if all are
    places: tuple[np.ndarray, np.ndarray]  # int64 [S, L]: of each key its page in `visit_pages`, its slot in that page
    head_rows: torch.Tensor | None = None  # int64 [S * kv_heads * L], `slots` of a pool seen as rows of one head

    @property
    def whole(self) -> bool:
        """Every row of the step, causally, over one segment that began with it."""
        one_run = isinstance(self.slots, slice) and self.all_rows
        return one_run and (self.causal or self.rows.shape[1] == 1) and self.num_keys == self.rows.shape[1]

    @property
    def num_keys(self) -> int:
        return self.slots.stop - self.slots.start if isinstance(self.slots, slice) else self.slots.shape[1]


def store_kv(keys, values, key_pool, value_pool, plan: StepPlan) -> None:
    """See `foveate.kernels.paged_attention.store_kv`."""
    key_pool.view(-1, *key_pool.shape[2:]).index_copy_(0, plan.slots, keys)
    value_pool.view(-1, *value_pool.shape[2:]).index_copy_(0, plan.slots, values)


def attend(queries, key_pool, value_pool, plan: StepPlan, scale: float) -> torch.Tensor:
    """See `foveate.kernels.paged_attention.prefill`."""
    batches = plan.prepared.get("batches")
    if batches is None:
        batches = plan.prepared["batches"] = prepare(plan, queries.device)
    num_rows, num_heads, head_dim = queries.shape
    keys = key_pool.view(-1, *key_pool.shape[2:])  # [slots, kv_heads, head_dim]
    values = value_pool.view(-1, *value_pool.shape[2:])
    if len(batches) == 1 and batches[0].whole:
        return _one_segment(queries, keys, values, batches[0], scale)
    out: torch.Tensor | None = None  # float32 [T, heads, head_dim]
    lse: torch.Tensor | None = None  # float32 [T, heads]
    scaled = queries.float() * scale
    for batch in batches:
        k, v = _gather(keys, batch), _gather(values, batch)  # [S * kv_heads, L, head_dim]
        q = scaled.view(*batch.rows.shape, num_heads, head_dim) if batch.all_rows else scaled[batch.rows]
        part, part_lse = _partial(q, k.float(), v.float(), batch)
        if batch.all_rows:
            out, lse = (part, part_lse) if out is None or lse is None else merge(out, lse, part, part_lse)
            continue
        if out is None or lse is None:
            out = scaled.new_zeros(num_rows, num_heads, head_dim)
            lse = scaled.new_full((num_rows, num_heads), -torch.inf)
        rows = batch.rows.flatten()
        if batch.real is not None:
            rows, part, part_lse = rows[batch.real], part[batch.real], part_lse[batch.real]
        if not batch.first:
            part, part_lse = merge(out[rows], lse[rows], part, part_lse)
        out[rows], lse[rows] = part, part_lse
    return torch.zeros_like(queries) if out is None else out.to(queries.dtype)


def _one_segment(queries, keys, values, batch: Batch, scale: float) -> torch.Tensor:
    """A prompt on its own: nothing to merge, so that torch's fused attention serves. float [T, heads, head_dim]"""
    q, k, v = (x.transpose(0, 1).float() for x in (queries, keys[batch.slots], values[batch.slots]))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).to(queries.dtype)


def _gather(pool: torch.Tensor, batch: Batch) -> torch.Tensor:
    if isinstance(batch.slots, slice):
        return pool[batch.slots].transpose(0, 1)  # a view
    kv_heads, head_dim = pool.shape[1:]
    # Head by head, so that the matrix products read it as it lies.
    if batch.head_rows is None:
        rows = batch.slots[:, None] * kv_heads + torch.arange(kv_heads, device=pool.device)[:, None]
        batch.head_rows = rows.view(-1)
    return pool.view(-1, head_dim).index_select(0, batch.head_rows).view(-1, batch.num_keys, head_dim)


def merge(out_a, lse_a, out_b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
    """Two partial attentions over disjoint keys -> one. out: float32 [N, heads, head_dim], lse: [N, heads]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return out_a * weight_a + out_b * weight_b, lse


def _partial(q, k, v, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [S, M, heads, head_dim], scaled; k, v: [S * kv_heads, L, head_dim] -> out [S*M, heads, head_dim], lse."""
    num_segments, num_rows, num_heads, head_dim = q.shape
    kv_heads = k.shape[0] // num_segments
    group = num_heads // kv_heads
    q = q.view(num_segments, num_rows, kv_heads, group, head_dim).permute(0, 2, 1, 3, 4)
    tile = max(1, SCORE_TILE // (num_segments * num_heads * batch.num_keys))
    outs, lses = [], []
    for start in range(0, num_rows, tile):
        stop = min(start + tile, num_rows)
        seen = batch.num_keys - num_rows + stop if batch.causal else batch.num_keys
        rows = q[:, :, start:stop].reshape(num_segments * kv_heads, -1, head_dim)
        scores = torch.bmm(rows, k[:, :seen].transpose(1, 2))  # [S * kv_heads, tile * group, seen]
        _mask(scores.view(num_segments, kv_heads, stop - start, group, seen), batch, start, num_rows)
        weights = scores.softmax(-1)
        shape = (num_segments, kv_heads, stop - start, group)
        outs.append(torch.bmm(weights, v[:, :seen]).view(*shape, head_dim).transpose(1, 2))
        # The largest weight is e^(its score - lse).
        lses.append((scores.amax(-1) - weights.amax(-1).log_()).view(shape).transpose(1, 2))
    out, lse = (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 1))
    return out.reshape(-1, num_heads, head_dim), lse.reshape(-1, num_heads)


def _mask(scores, batch: Batch, start: int, num_rows: int) -> None:
    """Sets the scores of keys a row must not see to -inf; scores: [S, kv_heads, rows, group, seen]."""
    device, seen = scores.device, scores.shape[-1]
    if batch.causal and scores.shape[2] > 1:
        last = torch.arange(start, start + scores.shape[2], device=device) + batch.num_keys - num_rows
        hidden = torch.arange(seen, device=device) > last[:, None]  # [rows, seen]
        scores.masked_fill_(hidden[None, None, :, None], -torch.inf)
    if batch.kv_len is not None:
        padded = torch.arange(seen, device=device) >= batch.kv_len  # [S, seen]
        scores.masked_fill_(padded[:, None, None, None], -torch.inf)


def prepare(plan: StepPlan, device: torch.device) -> list[Batch]:
    """Groups the visits of a plan into padded batches, in depth order."""
    made = None if plan.like is None else plan.like.prepared.get("batches")
    if made is not None:
        return [replace(b, slots=_slots(plan, b.places, b.kv_len is None, device), head_rows=None) for b in made]
    num_rows = np.diff(plan.visit_row_offsets)
    buckets: dict[tuple, list[int]] = {}
    for visit in range(plan.num_visits):
        kv_len, rows, causal = (
            int(plan.visit_kv_len[visit]),
            int(num_rows[visit]),
            bool(plan.visit_causal[visit]),
        )
        if rows == 0 or kv_len == 0:
            continue
        causal &= rows > 1
        # A causal batch is never padded: its mask is one triangle for all.
        size = (kv_len, rows) if causal else (_ceil_pow2(kv_len), _ceil_pow2(rows))
        buckets.setdefault((int(plan.visit_depth[visit]), causal, *size), []).append(visit)
    batches = []
    for (depth, causal, kv_len, _), visits in sorted(buckets.items()):
        limit = max(1, MAX_BATCH_TOKENS // kv_len)
        for i in range(0, len(visits), limit):
            batches.append(_batch(plan, visits[i : i + limit], causal, depth == 0, device))
    return batches


def _batch(plan: StepPlan, visits: list[int], causal: bool, first: bool, device: torch.device) -> Batch:
    kv_len = plan.visit_kv_len[visits].astype(np.int64)
    counts = np.diff(plan.visit_row_offsets)[visits]
    rows = np.empty((len(visits), counts.max()), np.int64)
    for i, visit in enumerate(visits):
        rows[i] = plan.rows_of(visit)[0]
        rows[i, : counts[i]] = plan.rows_of(visit)
    even_rows, even_keys = bool((counts == counts[0]).all()), bool((kv_len == kv_len[0]).all())
    real = None
    if not even_rows:
        real = torch.from_numpy((np.arange(rows.shape[1]) < counts[:, None]).ravel().nonzero()[0]).to(device)
    places = _places(plan, visits, kv_len)
    return Batch(
        rows=torch.from_numpy(rows).to(device),
        all_rows=np.array_equal(rows.ravel(), np.arange(plan.num_rows)),
        slots=_slots(plan, places, even_keys, device),
        kv_len=None if even_keys else torch.from_numpy(kv_len[:, None]).to(device),
        causal=causal,
        first=first,
        real=real,
        places=places,
    )


def _places(plan: StepPlan, visits: list[int], kv_len: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Batch.places`. Tokens past the end repeat the last one: masked, but never unwritten memory."""
    tokens = np.minimum(np.arange(kv_len.max()), kv_len[:, None] - 1)
    return plan.visit_page_offsets[visits].astype(np.int64)[:, None] + tokens // plan.page_size, tokens % plan.page_size


def _slots(plan: StepPlan, places: tuple[np.ndarray, np.ndarray], even: bool, device) -> torch.Tensor | slice:
    """even: no key is padding."""
    pages, offsets = places
    slots = plan.visit_pages[pages].astype(np.int64) * plan.page_size + offsets
    first, last = int(slots[0, 0]), int(slots[0, -1])
    if len(slots) == 1 and even and last - first == slots.shape[1] - 1 and (np.diff(slots[0]) == 1).all():
        return slice(first, last + 1)
    return torch.from_numpy(slots).to(device)


def _ceil_pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()
