"""Decode attention of a group: its prompt read once for all samples, against a copy of it for each sample.

One new token a sample in one layer; every sample has the same prompt and OWN tokens of its own. The copies are
attended by torch's scaled_dot_product_attention; they are made before the clock starts, and results are compared
first. Run: pytest benchmarks/bench_paged_attention.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foveate.kernels import paged_attention
from foveate.kernels.paged_attention import StepPlan

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 64, 14, 2, 64  # heads of Qwen2.5-0.5B
OWN = 32
SCALE = HEAD_DIM**-0.5


def plan_of(samples: int, prompt: int, prompt_pages: np.ndarray, own_pages: np.ndarray) -> StepPlan:
    """Visit 0 is the prompt with all rows, visit 1 + r the tokens of sample r."""
    return StepPlan(
        slots=torch.from_numpy(own_pages.astype(np.int64)) * PAGE_SIZE + OWN - 1,
        visit_pages=np.concatenate([prompt_pages, own_pages]).astype(np.int32),
        visit_page_offsets=np.cumsum([0, len(prompt_pages), *[1] * samples]).astype(np.int32),
        visit_kv_len=np.array([prompt, *[OWN] * samples], np.int32),
        visit_rows=np.concatenate([np.arange(samples)] * 2).astype(np.int32),
        visit_row_offsets=np.cumsum([0, samples, *[1] * samples]).astype(np.int32),
        visit_depth=np.array([0, *[1] * samples], np.int32),
        visit_causal=np.array([False, *[True] * samples]),
        page_size=PAGE_SIZE,
    )


def contenders(samples: int, prompt: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> attention of all samples, float32 [samples, heads, head_dim]."""
    rng = np.random.default_rng(0)
    num_pages = -(-prompt // PAGE_SIZE) + samples
    prompt_pages, own_pages = np.split(rng.permutation(num_pages), [num_pages - samples])
    plan = plan_of(samples, prompt, prompt_pages, own_pages)
    key_pool, value_pool = torch.randn(2, num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    queries = torch.randn(samples, HEADS, HEAD_DIM)

    def copies(pool: torch.Tensor) -> torch.Tensor:
        """-> [samples, kv_heads, prompt + OWN, head_dim], contiguous"""
        shared = pool[torch.from_numpy(prompt_pages)].flatten(0, 1)[:prompt]
        rows = [torch.cat([shared, own[:OWN]]) for own in pool[torch.from_numpy(own_pages)]]
        return torch.stack(rows).transpose(1, 2).contiguous()

    keys, values = copies(key_pool), copies(value_pool)
    return {
        "shared": lambda: paged_attention.decode(queries, key_pool, value_pool, plan, scale=SCALE),
        "copied": lambda: F.scaled_dot_product_attention(
            queries[:, :, None], keys, values, scale=SCALE, enable_gqa=True
        ).squeeze(2),
    }


@pytest.mark.parametrize("prompt", [256, 1000, 4096])
@pytest.mark.parametrize("samples", [1, 8, 16])
@pytest.mark.parametrize("name", ["shared", "copied"])
def test_decode(benchmark, name: str, samples: int, prompt: int) -> None:
    benchmark.group = f"{samples} samples, prompt of {prompt}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    runs = contenders(samples, prompt)
    torch.testing.assert_close(runs["shared"](), runs["copied"](), atol=1e-5, rtol=1e-5)
    benchmark(runs[name])


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))
