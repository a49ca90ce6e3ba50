"""What the last full-attention block of Qwen's vision towers says about each image token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from foveate.kernels.vision_prune import column_scores, merge_patches
from foveate.rollout.pruners.protocol import TowerAttention


@contextmanager
def attended(
    tower: Any, source: str, grid: Sequence[int], backend: str | None = None
) -> Iterator[Callable[[], TowerAttention]]:
    """Records queries and keys of one image's pass through the tower; yields what computes its attention afterwards.

    source: module of the tower's classes. grid: patches in time, height, width. backend: of
    `foveate.kernels.vision_prune`. Two forward hooks stand in the block for the time of the pass, and are removed
    whatever it does. Raises ValueError for a tower without full attention.
    """
    block = tower.blocks[_last_full_block(tower)].attn
    seen: dict[str, Any] = {}

    def see_arguments(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        seen.update({name: arguments[name] for name in ("cu_seqlens", "position_embeddings")})

    def see_output(_: Any, __: Any, output: torch.Tensor) -> None:
        seen["qkv"] = output

    hooks = [block.register_forward_pre_hook(see_arguments, with_kwargs=True)]
    hooks.append(block.qkv.register_forward_hook(see_output))
    try:
        rotate = import_module(source).apply_rotary_pos_emb_vision
        yield lambda: _attention(tower, rotate, grid, block.num_heads, backend, **seen)
    finally:
        for hook in hooks:
            hook.remove()


def raster_order(grid: Sequence[int], merge_size: int, window: int | None) -> torch.Tensor:
    """int64 [N], where the merged tokens of raster order stand in the tower's own order.

    A tower with windows goes through them in raster order, and in raster order through each. window: merged tokens
    along a side of one, None without. grid: patches in time, height, width.
    """
    frames, height, width = grid[0], grid[1] // merge_size, grid[2] // merge_size
    tokens = torch.arange(frames * height * width, device="cpu")
    if window is None:
        return tokens
    frame, row, column = tokens // (height * width), tokens // width % height, tokens % width
    windows_across = -(-width // window)
    windows = -(-height // window) * windows_across
    order = (frame * windows + row // window * windows_across + column // window).argsort(stable=True)
    return order.argsort()


def _last_full_block(tower: Any) -> int:
    full = getattr(tower, "fullatt_block_indexes", None)
    blocks = [index for index in range(len(tower.blocks)) if full is None or index in full]
    if not blocks:
        raise ValueError(f"expected a block with full attention, got {full} (fullatt_block_indexes)")
    return blocks[-1]


def _attention(
    tower: Any,
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    grid: Sequence[int],
    num_heads: int,
    backend: str | None,
    *,
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> TowerAttention:
    """qkv: float [P, 3 * heads * head_dim] of one image in the tower's order. cu_seqlens: int32, of its frames."""
    q, k, _ = qkv.unflatten(-1, (3, num_heads, -1)).unbind(1)  # [P, heads, head_dim]
    rotated_q, rotated_k = rotate(q, k, *position_embeddings)
    sums = column_scores(rotated_q, rotated_k, None, cu_seqlens.int(), scale=q.shape[-1] ** -0.5, backend=backend)
    means = sums / (num_heads * grid[1] * grid[2])
    unit, window = tower.spatial_merge_size**2, None
    if getattr(tower, "fullatt_block_indexes", None) is not None:
        window = tower.window_size // tower.spatial_merge_size // tower.patch_size
    order = raster_order(grid, tower.spatial_merge_size, window).to(qkv.device)
    keys = k.float().mean(1).unflatten(0, (-1, unit)).mean(1)
    return TowerAttention(merge_patches(means, unit, order), keys[order])
