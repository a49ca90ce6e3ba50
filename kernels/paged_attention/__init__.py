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

from foveate import _C
from foveate.kernels.dispatch import choose_among
from foveate.kernels.paged_attention import deterministic as chunk_rule
from foveate.kernels.paged_attention import operators, reference
from foveate.kernels.paged_attention.plan import StepPlan

__all__ = ["StepPlan", "decode", "decode_backend", "prefill", "store_kv"]


def store_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    plan: StepPlan,
    *,
    backend: str | None = None,
) -> None:
    """Writes row r of keys and values (float [T, kv_heads, head_dim]) to pool slot `plan.slots[r]`, in place.

    backend: None chooses; plain torch is the only one. Raises ValueError on shapes that do not fit.
    """
    _check(keys, key_pool, plan, "keys")
    _check(values, value_pool, plan, "values")
    choose_among(("reference",), "store_kv", "paged_attention", backend, keys.device, keys.dtype)
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
    backend: None chooses; plain torch is the only one. Raises ValueError on shapes that do not fit.
    """
    _check_pools(queries, key_pool, value_pool, plan)
    choose_among(("reference",), "prefill", "paged_attention", backend, queries.device, queries.dtype)
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
    """Attention of one new token a sequence, without gradients; a shared segment is read once for all rows below it.

    Arguments, result and errors as `prefill`, whose plans it takes too. "cpp" and "cuda" read each chunk of 512 keys of
    a segment by itself, and merge a row's partial results in path and chunk order: the same bits for a row in every
    step. They take pools of the queries' dtype and head_dim up to 256, and what does not fit goes to the reference, as
    does what is deterministic: its bits are those of a prefill. Raises ValueError as well where the plan reaches beyond
    the pool or its own rows.
    """
    _check_pools(queries, key_pool, value_pool, plan)
    if queries.dtype == key_pool.dtype == value_pool.dtype:
        kind = (queries.device, queries.dtype, queries.shape[2])
        chosen = decode_backend(*kind, deterministic=deterministic, backend=backend)
    else:
        dtypes = f"{queries.dtype}, {key_pool.dtype} and {value_pool.dtype} (queries, key_pool, value_pool)"
        chosen = _reference_alone(f"decode of {dtypes}", queries.device, queries.dtype, backend)
    if chosen != "reference":
        return operators.attend(queries, key_pool, value_pool, plan, scale)
    attend = chunk_rule.attend if deterministic else reference.attend
    with torch.no_grad():
        return attend(queries, key_pool, value_pool, plan, scale)


def decode_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, deterministic: bool = False, backend: str | None = None
) -> str:
    """The backend that `decode` takes for queries and pools of this kind, or its ValueError."""
    if deterministic:
        return _reference_alone("deterministic decode", device, dtype, backend)
    if head_dim > _C.ATTENTION_MAX_HEAD_DIM:
        return _reference_alone(f"decode of head_dim {head_dim}", device, dtype, backend)
    return choose_among(("cuda", "cpp", "reference"), "decode", "paged_attention", backend, device, dtype)


def _reference_alone(operation: str, device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    return choose_among(("reference",), operation, "paged_attention", backend, device, dtype)


def _check_pools(queries: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor, plan: StepPlan) -> None:
    _check(queries, key_pool, plan, "queries")
    if value_pool.shape != key_pool.shape:
        raise ValueError(f"expected {list(key_pool.shape)}, got {list(value_pool.shape)} (value_pool)")


def _check(rows: torch.Tensor, pool: torch.Tensor, plan: StepPlan, argument: str) -> None:
    if pool.dim() != 4 or pool.shape[1] != plan.page_size:
        raise ValueError(f"expected [pages, {plan.page_size}, kv_heads, head_dim], got {list(pool.shape)} (pool)")
    kv_heads, head_dim = pool.shape[2:]
    if kv_heads == 0:
        raise ValueError(f"expected at least 1 KV head, got {list(pool.shape)} (pool)")
    heads = rows.shape[1] if argument == "queries" and rows.dim() == 3 else kv_heads
    if rows.shape != (plan.num_rows, heads, head_dim):
        expected = f"[{plan.num_rows}, {'heads' if argument == 'queries' else kv_heads}, {head_dim}]"
        raise ValueError(f"expected {expected}, got {list(rows.shape)} ({argument})")
    if heads % kv_heads:
        raise ValueError(f"expected heads a multiple of {kv_heads}, got {heads} (queries)")
