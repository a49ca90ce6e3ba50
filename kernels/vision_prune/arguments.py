"""Which backend serves each primitive, and the checks that they share."""

from __future__ import annotations

from typing import Any

import torch

from foveate.kernels.dispatch import choose_among, require

_CPU = torch.device("cpu")
# What each primitive has, of the family's backends.
_IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "attention_scores": ("triton", "reference"),
    "logsumexp": ("triton", "reference"),
    "column_scores": ("triton", "reference"),
    "select_topk": ("cuda", "cpp", "reference"),
    "select_maxmin": ("cuda", "cpp", "reference"),
    "compact": ("cuda", "cpp", "reference"),
    "compact_kv": ("cuda", "cpp", "reference"),
    "merge_similar": ("reference",),
}


def backend_for(
    primitive: str, requested: str | None = None, device: torch.device = _CPU, dtype: torch.dtype = torch.float32
) -> str:
    """The backend that serves a primitive on `device`, by the rule of `foveate.kernels.dispatch.choose_among`.

    dtype: of the floating arguments. Raises ValueError for a backend asked for by its name that the primitive lacks.
    """
    return choose_among(_IMPLEMENTED[primitive], primitive, "vision_prune", requested, device, dtype)


def check_offsets(offsets: torch.Tensor, total: int, argument: str) -> None:
    """ValueError unless offsets is int32 [S + 1] and, where its values can be seen, ascends from 0 to total."""
    fits = offsets.dtype == torch.int32 and offsets.dim() == 1 and len(offsets) > 0
    require(fits, "int32 [S + 1]", kind_of(offsets), argument)
    if not offsets.is_cuda:
        whole = int(offsets[0]) == 0 and int(offsets[-1]) == total and bool((offsets.diff() >= 0).all())
        require(whole, f"offsets that ascend from 0 to {total}", offsets.tolist(), argument)


def check_keys(
    queries: torch.Tensor,
    keys: torch.Tensor,
    slots: torch.Tensor | None,
    offsets: torch.Tensor,
    row_offsets: torch.Tensor | None,
) -> torch.Tensor:
    """The keys as [T, Hk, d]; ValueError on what does not fit."""
    require(queries.dim() == 3 and queries.is_floating_point(), "float [R, Hq, d]", kind_of(queries), "queries")
    heads, dim = queries.shape[1:]
    fits = keys.dim() in (3, 4) and keys.dtype == queries.dtype and keys.device == queries.device
    fits = fits and keys.shape[-1] == dim and keys.shape[-2] > 0 and heads % keys.shape[-2] == 0
    require(fits, f"[T, Hk, {dim}] {queries.dtype} with Hk a divisor of {heads}", kind_of(keys), "keys")
    require(keys.dim() == 3 or slots is not None, "slots with a pool of pages", None, "slots")
    keys = keys.view(-1, *keys.shape[-2:]) if keys.dim() == 4 else keys
    if slots is not None:
        fits = slots.dim() == 1 and slots.dtype in (torch.int32, torch.int64)
        require(fits, "int32 or int64 [N]", kind_of(slots), "slots")
        check_range(slots, len(keys), "slots")
    check_offsets(offsets, len(keys) if slots is None else len(slots), "offsets")
    spans = len(offsets) - 1
    if row_offsets is None:
        require(len(queries) == spans, f"{spans} queries, one a span", len(queries), "queries")
    else:
        check_offsets(row_offsets, len(queries), "row_offsets")
        require(len(row_offsets) == spans + 1, f"int32 [{spans + 1}]", kind_of(row_offsets), "row_offsets")
    return keys


def check_pools(
    source: torch.Tensor, target: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor
) -> None:
    """ValueError unless tokens can move from one pool to the other all at once."""
    shape = list(source.shape)
    fits = source.dim() == 6 and shape[0] == 2
    require(fits, "[2, layers, pages, page_size, kv_heads, head_dim]", shape, "source")
    fits = target.dim() == 6 and target.dtype == source.dtype and target.device == source.device
    fits = fits and [*target.shape[:2], *target.shape[4:]] == [*shape[:2], *shape[4:]]
    require(fits, f"layers, heads and dtype of {kind_of(source)}", kind_of(target), "target")
    for pool, name in ((source, "source"), (target, "target")):
        require(pool.shape[1] == 0 or pool[0, 0].is_contiguous(), "contiguous pages", list(pool.stride()), name)
    for slots, pool, name in ((source_slots, source, "source_slots"), (target_slots, target, "target_slots")):
        fits = slots.dim() == 1 and slots.dtype in (torch.int32, torch.int64) and len(slots) == len(source_slots)
        require(fits, f"int32 or int64 [{len(source_slots)}]", kind_of(slots), name)
        check_range(slots, pool.shape[2] * pool.shape[3], name)
    if not (source_slots.is_cuda or target_slots.is_cuda):
        both = source_slots if source.data_ptr() == target.data_ptr() else source_slots[:0]
        slots = torch.cat([both.long().unique(), target_slots.long()])
        disjoint = len(slots.unique()) == len(slots)
        require(disjoint, "no target slot twice, or also a source slot", target_slots.tolist(), "target_slots")


def check_range(indices: torch.Tensor, end: int, argument: str) -> None:
    """ValueError unless the indices, where they can be seen, lie in [0, end)."""
    if not indices.is_cuda and len(indices):
        low, high = (int(x) for x in indices.aminmax())
        require(low >= 0 and high < end, f"{argument} in [0, {end})", (low, high), argument)


def kept_total(offsets: torch.Tensor, counts: torch.Tensor, num_kept: int | None) -> int:
    """The sum of the counts, each from 0 to its span's size; waits for a GPU only where it must read one."""
    fits = counts.dtype == torch.int32 and counts.shape == (len(offsets) - 1,)
    require(fits, f"int32 [{len(offsets) - 1}]", kind_of(counts), "counts")
    if num_kept is not None and (offsets.is_cuda or counts.is_cuda):
        return num_kept
    sizes = offsets.diff()
    total = int(torch.minimum(counts.to(sizes.device).clamp(min=0), sizes).sum())
    require(num_kept in (None, total), f"{total}, the sum of the counts", num_kept, "num_kept")
    return total


def on(device: torch.device, *tensors: Any) -> tuple[Any, ...]:
    """The tensors on `device`; None stays None."""
    return tuple(tensor if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """Without a graph, with a contiguous last dimension."""
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def kind_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
