"""Decode attention of groups, whose prompt is read once for all samples: `python benchmarks/bench_paged_attention.py`.

One new token a sample in one layer; all samples of a group have its prompt, and `own` tokens of their own. Peers:
`unshared`, the same kernel over the same pages with a visit of the prompt for each sample, which is what a plain paged
kernel reads; and `copied`, torch's attention over a contiguous copy of the prompt for each sample, made before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import floors
import numpy as np
import torch
import torch.nn.functional as F
from common import Options, backends_of, main
from measurement import Measurement, as_exact_as
from samplers import Inputs, Run

from foveate.kernels import paged_attention
from foveate.kernels.paged_attention import StepPlan

KERNELS = ("decode",)
PAGE_SIZE = 64


@dataclass(frozen=True)
class Group:
    """Sizes of a decode step; heads are those of one layer."""

    groups: int
    samples: int
    prompt: int
    own: int
    heads: int = 14  # Qwen2.5-0.5B
    kv_heads: int = 2
    head_dim: int = 64

    @property
    def rows(self) -> int:
        return self.groups * self.samples

    @property
    def pages(self) -> tuple[int, int]:
        """Of all prompts, of all rows."""
        return self.groups * -(-self.prompt // PAGE_SIZE), self.rows * -(-self.own // PAGE_SIZE)


def plan_of(group: Group, prompt_pages: np.ndarray, own_pages: np.ndarray, shared: bool) -> StepPlan:
    """Prompts first, with all rows below them or, unshared, once for each of those; then the rows' own tokens."""
    rows_of = np.arange(group.rows).reshape(group.groups, group.samples)
    prompts = [
        (prompt_pages[g], rows) for g in range(group.groups) for rows in ([rows_of[g]] if shared else rows_of[g])
    ]
    visits = [*prompts, *((own_pages[row], row) for row in range(group.rows))]
    rows = [np.atleast_1d(rows) for _, rows in visits]
    return StepPlan(
        slots=torch.from_numpy(own_pages[:, -1] * PAGE_SIZE + (group.own - 1) % PAGE_SIZE),
        visit_pages=np.concatenate([pages for pages, _ in visits]).astype(np.int32),
        visit_page_offsets=np.cumsum([0, *(len(pages) for pages, _ in visits)]).astype(np.int32),
        visit_kv_len=np.array([group.prompt] * len(prompts) + [group.own] * group.rows, np.int32),
        visit_rows=np.concatenate(rows).astype(np.int32),
        visit_row_offsets=np.cumsum([0, *map(len, rows)]).astype(np.int32),
        visit_depth=np.array([0] * len(prompts) + [1] * group.rows, np.int32),
        visit_causal=np.array([False] * len(prompts) + [True] * group.rows),
        page_size=PAGE_SIZE,
    )


class Step:
    """One step's page tables: for all input sets, as an engine has one for all layers of a step."""

    def __init__(self, group: Group, dtype: torch.dtype, device: torch.device) -> None:
        self.group, self.dtype, self.scale = group, dtype, group.head_dim**-0.5
        prompts, own = group.pages
        pages = np.random.default_rng(0).permutation(prompts + own)
        self.prompt_pages = pages[:prompts].reshape(group.groups, -1)
        self.own_pages = pages[prompts:].reshape(group.rows, -1)
        self.plans = {
            shared: plan_of(group, self.prompt_pages, self.own_pages, shared=shared) for shared in (True, False)
        }
        for plan in self.plans.values():
            plan.slots = plan.slots.to(device)

    def make_inputs(self, generator: torch.Generator) -> Inputs:
        """queries, key_pool, value_pool, and contiguous keys and values [rows, kv_heads, prompt + own, head_dim]"""
        group = self.group
        draw = partial(torch.randn, device=generator.device, dtype=self.dtype, generator=generator)
        keys, values = draw(2, sum(group.pages), PAGE_SIZE, group.kv_heads, group.head_dim)
        queries = draw(group.rows, group.heads, group.head_dim)
        return queries, keys, values, self._copied(keys), self._copied(values)

    def _copied(self, pool: torch.Tensor) -> torch.Tensor:
        prompts = pool[torch.from_numpy(self.prompt_pages).to(pool.device)].flatten(1, 2)[:, : self.group.prompt]
        own = pool[torch.from_numpy(self.own_pages).to(pool.device)].flatten(1, 2)[:, : self.group.own]
        both = torch.cat([prompts.repeat_interleave(self.group.samples, 0, output_size=self.group.rows), own], 1)
        return both.transpose(1, 2).contiguous()

    def paged(self, shared: bool, backend: str | None) -> Run:
        def run(queries, key_pool, value_pool, *_) -> torch.Tensor:
            plan = self.plans[shared]
            return paged_attention.decode(queries, key_pool, value_pool, plan, scale=self.scale, backend=backend)

        return run

    def copied(self, queries, key_pool, value_pool, keys, values) -> torch.Tensor:
        out = F.scaled_dot_product_attention(queries[:, :, None], keys, values, scale=self.scale, enable_gqa=True)
        return out.squeeze(2)

    def plain(self, queries, key_pool, value_pool, keys, values) -> torch.Tensor:
        """Attention as it is written down, over the copies."""
        grouped = (queries * self.scale).unflatten(1, (self.group.kv_heads, -1))  # [rows, kv_heads, heads of one, D]
        return ((grouped @ keys.transpose(-1, -2)).softmax(-1) @ values).flatten(1, 2)


def sizes(options: Options) -> list[Group]:
    if options.quick:
        return [Group(groups=1, samples=2, prompt=100, own=32)]
    if options.device.type == "cpu":
        return [Group(1, samples, prompt, 32) for prompt in (256, 1000, 4096) for samples in (1, 8, 16)]
    large = dict(heads=16, kv_heads=2, head_dim=128)  # Qwen2.5-VL-3B
    larger = dict(heads=28, kv_heads=4, head_dim=128)  # and 7B
    return [Group(16, 16, 1536, 512, **heads) for heads in (large, larger)] + [Group(256, 1, 1536, 512, **large)]


def measurements(options: Options) -> Iterator[Measurement]:
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    for group in sizes(options):
        step = Step(group, dtype, options.device)
        segments = floors.group_segments(group.groups, group.samples, group.prompt, group.own)
        heads = (group.heads, group.kv_heads, group.head_dim)
        yield Measurement(
            kernel="decode",
            shape=dict(vars(group)),
            dtype=dtype,
            make_inputs=step.make_inputs,
            backends={name: step.paged(True, name) for name in backends_of("paged_attention", options.device)},
            check=as_exact_as(step.plain),
            floor=floors.tree_attention(segments, group.rows, *heads, itemsize=dtype.itemsize),
            peers={"unshared": step.paged(False, None), "copied": step.copied},
        )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, KERNELS, measurements))
