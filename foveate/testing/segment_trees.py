"""Steps of attention over trees of KV segments, and what they must give: float64 softmax over each row's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from foveate.kernels import paged_attention
from foveate.kernels.paged_attention import StepPlan

FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Node:
    """A segment: `length` tokens with keys, of which the last `new` are rows of this step."""

    parent: int | None
    length: int
    new: int


@dataclass(frozen=True)
class Tree:
    nodes: tuple[Node, ...]
    page_size: int
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 5
    dtype: torch.dtype = torch.float32
    seed: int = 0
    adjacent: bool = False  # each segment's pages are neighbours
    magnitude: float = 1.0

    def path(self, node: int) -> list[int]:
        parent = self.nodes[node].parent
        return [*self.path(parent), node] if parent is not None else [node]

    @property
    def num_rows(self) -> int:
        return sum(node.new for node in self.nodes)


@dataclass
class Step:
    """The inputs of one step over a tree, by row and by segment, and the plan made of them."""

    queries: torch.Tensor  # [T, heads, head_dim]
    keys: list[torch.Tensor]  # a segment: [length, kv_heads, head_dim]
    values: list[torch.Tensor]
    pages: list[list[int]]
    num_pages: int
    rows: list[list[int]]  # a segment: the rows of its new tokens, in token order
    plan: StepPlan


def make_step(tree: Tree) -> Step:
    rng = np.random.default_rng(tree.seed)
    sizes = [-(-node.length // tree.page_size) for node in tree.nodes]
    num_pages = sum(sizes) + 3
    order = np.arange(num_pages) if tree.adjacent else rng.permutation(num_pages)
    pages = [part.tolist() for part in np.split(order, np.cumsum(sizes))[:-1]]
    row_order = rng.permutation(tree.num_rows) if tree.seed % 2 else np.arange(tree.num_rows)
    rows = [part.tolist() for part in np.split(row_order, np.cumsum([node.new for node in tree.nodes]))[:-1]]

    def normal(rows: int, heads: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((rows, heads, tree.head_dim)) * tree.magnitude).to(tree.dtype)

    return Step(
        queries=normal(tree.num_rows, tree.kv_heads * tree.group),
        keys=[normal(node.length, tree.kv_heads) for node in tree.nodes],
        values=[normal(node.length, tree.kv_heads) for node in tree.nodes],
        pages=pages,
        num_pages=num_pages,
        rows=rows,
        plan=make_plan(tree, pages, rows),
    )


def make_plan(tree: Tree, pages: list[list[int]], rows: list[list[int]]) -> StepPlan:
    slots = torch.full((tree.num_rows,), -1)
    visits = []  # (depth, node, rows, causal)
    for index, node in enumerate(tree.nodes):
        depth = len(tree.path(index)) - 1
        for token, row in zip(range(node.length - node.new, node.length), rows[index], strict=True):
            slots[row] = pages[index][token // tree.page_size] * tree.page_size + token % tree.page_size
        if rows[index]:
            visits.append((depth, index, rows[index], True))
        below = [row for other in range(len(rows)) if index in tree.path(other)[:-1] for row in rows[other]]
        if below:
            visits.append((depth, index, below, False))
    visits.sort(key=lambda visit: visit[0])
    return StepPlan(
        slots=slots,
        visit_pages=np.array([page for visit in visits for page in pages[visit[1]]], np.int32),
        visit_page_offsets=np.cumsum([0, *(len(pages[visit[1]]) for visit in visits)]).astype(np.int32),
        visit_kv_len=np.array([tree.nodes[visit[1]].length for visit in visits], np.int32),
        visit_rows=np.array([row for visit in visits for row in visit[2]], np.int32),
        visit_row_offsets=np.cumsum([0, *(len(visit[2]) for visit in visits)]).astype(np.int32),
        visit_depth=np.array([visit[0] for visit in visits], np.int32),
        visit_causal=np.array([visit[3] for visit in visits], bool),
        page_size=tree.page_size,
    )


def attend(tree: Tree, step: Step, operation: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Stores the new tokens through `store_kv`, all others by hand, into a pool that is NaN elsewhere; attends.

    operation: `paged_attention.prefill` or `decode`, of everything but the scale.
    """
    shape = (step.num_pages, tree.page_size, tree.kv_heads, tree.head_dim)
    pools = [torch.full(shape, torch.nan, dtype=tree.dtype) for _ in range(2)]
    new = [torch.full((tree.num_rows, *shape[2:]), torch.nan, dtype=tree.dtype) for _ in range(2)]
    for index, node in enumerate(tree.nodes):
        for pool, rows, tokens in zip(pools, new, (step.keys[index], step.values[index]), strict=True):
            for token in range(node.length - node.new):
                pool[step.pages[index][token // tree.page_size], token % tree.page_size] = tokens[token]
            rows[step.rows[index]] = tokens[node.length - node.new :]
    paged_attention.store_kv(new[0], new[1], pools[0], pools[1], step.plan)
    return operation(step.queries, *pools, step.plan, scale=tree.head_dim**-0.5)


def gathered(tree: Tree, step: Step) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields (row, keys, values) with float [L, kv_heads, head_dim]: the tokens this row sees, root first."""
    for index, node in enumerate(tree.nodes):
        above = tree.path(index)[:-1]
        for token, row in enumerate(step.rows[index], node.length - node.new):
            seen = [[*(kv[i] for i in above), kv[index][: token + 1]] for kv in (step.keys, step.values)]
            yield row, torch.cat(seen[0]), torch.cat(seen[1])


def exact(tree: Tree, step: Step) -> tuple[np.ndarray, float]:
    """float64 softmax attention, [T, heads, head_dim], and the largest |log-sum-exp|."""
    out, largest = np.zeros(step.queries.shape), 0.0
    for row, keys, values in gathered(tree, step):
        for head in range(tree.kv_heads * tree.group):
            k, v = (x[:, head // tree.group].double().numpy() for x in (keys, values))
            scores = k @ step.queries[row, head].double().numpy() * tree.head_dim**-0.5
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v / weights.sum()
            largest = max(largest, abs(scores.max() + np.log(weights.sum())))
    return out, largest


def plain(tree: Tree, step: Step) -> torch.Tensor:
    """What anyone would write in float32, for the size of its error."""
    out = torch.zeros(step.queries.shape)
    for row, keys, values in gathered(tree, step):
        k, v = (x.float().repeat_interleave(tree.group, 1) for x in (keys, values))
        scores = torch.einsum("hd,lhd->hl", step.queries[row].float(), k) * tree.head_dim**-0.5
        out[row] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
    return out.to(tree.dtype)


def assert_exact(tree: Tree, step: Step, got: torch.Tensor) -> None:
    """Error at most twice that of plain float32 attention, one ulp, and what rounding scores and log-sum-exps may cost.

    Plain attention on a small tree can be right by luck, where an exponential and a quotient may cost an ulp each.
    """
    assert got.dtype == tree.dtype
    assert got.shape == step.queries.shape
    if not tree.num_rows:
        return
    truth, largest_lse = exact(tree, step)
    merges = max(len(tree.path(index)) for index, node in enumerate(tree.nodes) if node.new) - 1
    tolerance = 2 * np.abs(plain(tree, step).double().numpy() - truth).max()
    largest_value = max(float(v.abs().max()) for v in step.values)
    tolerance += torch.finfo(tree.dtype).eps * np.abs(truth).max()
    # A score rounded to eps * |score| is a weight off by as much, relatively; |lse| stands for the largest score.
    tolerance += (2 + largest_lse) * FLOAT32_EPS * largest_value
    # A log-sum-exp is rounded to eps / 2 * |lse|, twice a merge, and so much is a weight off, relatively.
    tolerance += merges * FLOAT32_EPS * largest_lse * largest_value
    error = np.abs(got.double().numpy() - truth).max()  # NaN, from an unwritten slot, fails the comparison
    assert error <= tolerance
