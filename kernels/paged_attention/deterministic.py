"""Attention by the chunk rule: a row's bits depend on its query and its keys alone.

Keys are cut every KV_CHUNK tokens from the start of their segment, and rows into blocks of ROW_BLOCK. Each (row block,
chunk) is computed by itself in one fixed shape, padded with rows of zeros and with keys that are hidden, and a row's
partial results are merged in path and chunk order:

    peak' = max(peak, p),  total' = total e^(peak - peak') + t e^(p - peak'),  out' likewise;  out / total at the end

Hence it matters neither which rows are computed together, nor how a prompt was cut into steps, nor whether keys came
one by one or together: a hidden key has the weight 0, and one more of them adds 0. This rests on a matrix product of
one shape rounding each of its rows alike, wherever it stands, which the tests check.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from foveate.kernels.paged_attention.plan import StepPlan

KV_CHUNK = 512
ROW_BLOCK = 16


@dataclass(frozen=True)
class Tile:
    """rows: int64 [ROW_BLOCK], of the step; T stands for padding. visible: int64 [ROW_BLOCK, 1], how many of the
    chunk's keys each row sees, None if all see KV_CHUNK."""

    rows: torch.Tensor
    visible: torch.Tensor | None


@dataclass(frozen=True)
class KeyChunk:
    """slots: int64 [KV_CHUNK], the first one repeated at the end of a shorter chunk: hidden, but never unwritten."""

    slots: torch.Tensor
    tiles: list[Tile]


@dataclass(frozen=True)
class Partial:
    """Attention so far: out float32 [kv_heads, T + 1, group, head_dim]; peak, total [kv_heads, T + 1, group, 1]."""

    out: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor


def attend(queries, key_pool, value_pool, plan: StepPlan, scale: float) -> torch.Tensor:
    """See `foveate.kernels.paged_attention.prefill`."""
    chunks = plan.prepared.get("chunks")
    if chunks is None:
        chunks = plan.prepared["chunks"] = prepare(plan, queries.device)
    kv_heads = key_pool.shape[2]
    q = F.pad(queries.float() * scale, (0, 0, 0, 0, 0, 1))
    q = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()  # [kv_heads, T + 1, group, head_dim]
    partial = Partial(torch.zeros_like(q), torch.full_like(q[..., :1], -torch.inf), torch.zeros_like(q[..., :1]))
    for chunk in chunks:
        keys, values = (
            pool.view(-1, *pool.shape[2:])[chunk.slots].float().transpose(0, 1).contiguous()  # [kv_heads, L, head_dim]
            for pool in (key_pool, value_pool)
        )
        for tile in chunk.tiles:
            _add(partial, q, keys, values, tile)
    out = torch.where(partial.total == 0, 0.0, partial.out / partial.total)[:, :-1]
    return out.transpose(0, 1).flatten(1, 2).to(queries.dtype)


def _add(partial: Partial, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: Tile) -> None:
    q = queries[:, tile.rows]  # [kv_heads, ROW_BLOCK, group, head_dim]
    scores = torch.bmm(q.flatten(1, 2), keys.transpose(1, 2)).view(*q.shape[:3], KV_CHUNK)
    if tile.visible is not None:
        hidden = torch.arange(KV_CHUNK, device=q.device) >= tile.visible  # [ROW_BLOCK, KV_CHUNK]
        scores.masked_fill_(hidden[:, None], -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    # A row that sees nothing here has the peak -inf and must get weights 0, not NaN.
    weights = scores.sub_(peak.clamp(min=torch.finfo(torch.float32).min)).exp_()
    out = torch.bmm(weights.flatten(1, 2), values).view_as(q)
    before = partial.peak[:, tile.rows]
    after = torch.maximum(before, peak)
    # No fused multiply-add: torch may round one in a loop's tail otherwise than in its body.
    old, new = (before - after).exp_(), (peak - after).exp_()
    partial.out[:, tile.rows] = partial.out[:, tile.rows] * old + out * new
    partial.total[:, tile.rows] = partial.total[:, tile.rows] * old + weights.sum(-1, keepdim=True) * new
    partial.peak[:, tile.rows] = after


def prepare(plan: StepPlan, device: torch.device) -> list[KeyChunk]:
    """Cuts the visits of a plan, in their order, which is that of the paths."""
    chunks = []
    for visit in range(plan.num_visits):
        kv_len, rows = int(plan.visit_kv_len[visit]), plan.rows_of(visit).astype(np.int64)
        seen = np.full(len(rows), kv_len)
        if plan.visit_causal[visit]:
            seen += np.arange(1 - len(rows), 1)
        for start in range(0, kv_len if len(rows) else 0, KV_CHUNK):
            slots = torch.from_numpy(_slots(plan, visit, start, min(start + KV_CHUNK, kv_len)))
            chunks.append(KeyChunk(slots.to(device), _tiles(rows, seen - start, plan.num_rows, device)))
    return chunks


def _tiles(rows: np.ndarray, visible: np.ndarray, padding: int, device: torch.device) -> list[Tile]:
    """visible: int64 [rows], keys that each row sees from the chunk's first one on; any if it sees none or all."""
    tiles = []
    for start in range(0, len(rows), ROW_BLOCK):
        block, seen = np.full(ROW_BLOCK, padding), np.full((ROW_BLOCK, 1), KV_CHUNK)
        part = slice(start, start + ROW_BLOCK)
        block[: len(rows[part])], seen[: len(rows[part]), 0] = rows[part], visible[part]
        if (visible[part] > 0).any():
            hides = (seen < KV_CHUNK).any()
            tiles.append(Tile(torch.from_numpy(block).to(device), torch.from_numpy(seen).to(device) if hides else None))
    return tiles


def _slots(plan: StepPlan, visit: int, start: int, stop: int) -> np.ndarray:
    tokens = np.arange(start, start + KV_CHUNK)
    tokens[stop - start :] = start
    pages = plan.pages_of(visit).astype(np.int64)
    return pages[tokens // plan.page_size] * plan.page_size + tokens % plan.page_size
