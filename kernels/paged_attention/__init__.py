"""Attention over a tree of paged KV segments: `store_kv`, `prefill`, `decode`.

KV pool of one layer: keys and values, each float [pages, page_size, kv_heads, head_dim], contiguous.
Grouped-query attention: query head h reads KV head h // (heads // kv_heads).

    attention(q_r) = sum over the visits of r, in depth order, of softmax-weighted values,
    partial (out, lse) pairs merged as  lse = log(e^a + e^b),  out = e^(a - lse) out_a + e^(b - lse) out_b

Source of the merge: Milakov & Gimelshein, arXiv 1805.02867 (online softmax); shared prefixes: Hydragen,
arXiv 2402.05099.
"""

from __future__ import annotations

import torch

from foveate.kernels.dispatch import choose
from foveate.kernels.paged_attention import deterministic as chunk_rule
from foveate.kernels.paged_attention import reference
from foveate.kernels.paged_attention.plan import StepPlan

__all__ = ["StepPlan", "decode", "prefill", "store_kv"]


def store_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    plan: StepPlan,
    *,
    backend: str | None = None,
) -> None:
    """Writes row r of keys and values (float [T, kv_heads, head_dim]) to pool slot `plan.slots[r]`, in place."""
    _check(keys, key_pool, plan, "keys")
    _check(values, value_pool, plan, "values")
    choose("paged_attention", backend, keys.device)
    reference.store_kv(keys, values, key_pool, value_pool, plan)


def prefill(
    queries: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    plan: StepPlan,
    *,
    scale: float,
    deterministic: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of prompt tokens, whose own segment is read causally.

    queries: float [T, heads, head_dim]. Returns float [T, heads, head_dim] in the dtype of queries; scores
    and sums are float32. deterministic: by the chunk rule (`foveate.kernels.paged_attention.deterministic`), slower.
    Raises ValueError on shapes that do not fit.
    """
    _check(queries, key_pool, plan, "queries")
    if value_pool.shape != key_pool.shape:
        raise ValueError(f"expected {list(key_pool.shape)}, got {list(value_pool.shape)} (value_pool)")
    choose("paged_attention", backend, queries.device)
    attend = chunk_rule.attend if deterministic else reference.attend
    return attend(queries, key_pool, value_pool, plan, scale)


def decode(
    queries: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    plan: StepPlan,
    *,
    scale: float,
    deterministic: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of one new token a sequence; a shared segment is read once for all rows below it.

    Arguments, result and errors as `prefill`.
    """
    return prefill(queries, key_pool, value_pool, plan, scale=scale, deterministic=deterministic, backend=backend)


def _check(rows: torch.Tensor, pool: torch.Tensor, plan: StepPlan, argument: str) -> None:
    if pool.dim() != 4 or pool.shape[1] != plan.page_size:
        raise ValueError(f"expected [pages, {plan.page_size}, kv_heads, head_dim], got {list(pool.shape)} (pool)")
    kv_heads, head_dim = pool.shape[2:]
    heads = rows.shape[1] if argument == "queries" and rows.dim() == 3 else kv_heads
    if rows.shape != (plan.num_rows, heads, head_dim):
        expected = f"[{plan.num_rows}, {'heads' if argument == 'queries' else kv_heads}, {head_dim}]"
        raise ValueError(f"expected {expected}, got {list(rows.shape)} ({argument})")
    if heads % kv_heads:
        raise ValueError(f"expected heads a multiple of {kv_heads}, got {heads} (queries)")
