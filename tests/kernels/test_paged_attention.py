"""Attention over a tree of KV segments against float64 softmax over each row's own tokens, gathered one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foveate.kernels import paged_attention
from foveate.kernels.paged_attention import StepPlan, deterministic, reference

BACKENDS = ["reference", "deterministic"]  # a mode rather than a backend
FLOAT32_EPS = torch.finfo(torch.float32).eps
# (float32 scores alive at once, padded KV tokens gathered at once): tiles of one row, of a few, of all.
TILES = [(1, 1), (64, 5), (700, 40), (reference.SCORE_TILE, reference.MAX_BATCH_TOKENS)]


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
    tiles: tuple[int, int] = TILES[-1]
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


def run(tree: Tree, step: Step, backend: str = "reference") -> torch.Tensor:
    """Stores the new tokens through `store_kv`, all others by hand, into a pool that is NaN elsewhere; attends."""
    shape = (step.num_pages, tree.page_size, tree.kv_heads, tree.head_dim)
    pools = [torch.full(shape, torch.nan, dtype=tree.dtype) for _ in range(2)]
    new = [torch.full((tree.num_rows, *shape[2:]), torch.nan, dtype=tree.dtype) for _ in range(2)]
    for index, node in enumerate(tree.nodes):
        for pool, rows, tokens in zip(pools, new, (step.keys[index], step.values[index]), strict=True):
            for token in range(node.length - node.new):
                pool[step.pages[index][token // tree.page_size], token % tree.page_size] = tokens[token]
            rows[step.rows[index]] = tokens[node.length - node.new :]
    paged_attention.store_kv(*new, *pools, step.plan)
    attend = paged_attention.prefill if any(node.new > 1 for node in tree.nodes) else paged_attention.decode
    mode = {"deterministic": True} if backend == "deterministic" else {"backend": backend}
    return attend(step.queries, *pools, step.plan, scale=tree.head_dim**-0.5, **mode)


def gathered(tree: Tree, step: Step):
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
    """Error at most twice that of plain float32 attention, one ulp, and what rounding log-sum-exps costs a merge."""
    assert got.dtype == tree.dtype
    assert got.shape == step.queries.shape
    if not tree.num_rows:
        return
    truth, largest_lse = exact(tree, step)
    merges = max(len(tree.path(index)) for index, node in enumerate(tree.nodes) if node.new) - 1
    tolerance = 2 * np.abs(plain(tree, step).double().numpy() - truth).max()
    tolerance += torch.finfo(tree.dtype).eps * np.abs(truth).max()
    # A log-sum-exp is rounded to eps / 2 * |lse|, twice a merge, and so much is a weight off, relatively.
    tolerance += merges * FLOAT32_EPS * largest_lse * max(float(v.abs().max()) for v in step.values)
    error = np.abs(got.double().numpy() - truth).max()  # NaN, from an unwritten slot, fails the comparison
    assert error <= tolerance


def check(tree: Tree, backend: str = "reference") -> torch.Tensor:
    step = make_step(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "SCORE_TILE", tree.tiles[0])
        patch.setattr(reference, "MAX_BATCH_TOKENS", tree.tiles[1])
        patch.setattr(deterministic, "KV_CHUNK", min(tree.tiles[1] + 3, 512))
        got = run(tree, step, backend)
    assert_exact(tree, step, got)
    return got


@st.composite
def trees(draw: st.DrawFn, kind: str) -> Tree:
    """prefill: whole segments are new, or stored before; decode: one new token a leaf; mixed: anything."""
    page = draw(st.sampled_from([1, 2, 3, 4, 8]))
    lengths = st.sampled_from([1, max(1, page - 1), page, page + 1, 2 * page, 2 * page + 1, 17, 33])
    parents: list[int | None] = []
    for index in range(draw(st.integers(1, 8))):
        levels = [_depth(parents, i) for i in range(index)]
        parents.append(draw(st.sampled_from([None, *(i for i in range(index) if levels[i] < 3)])))
    nodes = []
    for index, parent in enumerate(parents):
        length, is_leaf = draw(lengths), index not in parents
        choices = {"prefill": [0, length], "decode": [int(is_leaf)], "mixed": [0, 1, length, (length + 1) // 2]}
        nodes.append(Node(parent, length, draw(st.sampled_from(choices[kind]))))
    return Tree(
        nodes=tuple(nodes),
        page_size=page,
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 3, 8])),
        head_dim=draw(st.sampled_from([1, 5, 8, 13, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 2**16)),
        tiles=draw(st.sampled_from(TILES)),
        adjacent=draw(st.booleans()),
    )


def _depth(parents: list[int | None], node: int) -> int:
    parent = parents[node]
    return 0 if parent is None else 1 + _depth(parents, parent)


SHARED_PROMPT = (Node(None, 9, 0), Node(0, 4, 0), Node(1, 1, 1), Node(1, 5, 1), Node(1, 4, 1), Node(0, 8, 1))
SAME_STEP = (Node(None, 5, 5), Node(0, 4, 4), Node(0, 9, 9), Node(2, 1, 1))  # ancestors computed with their children


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(tree=trees("prefill"))
@example(tree=Tree(SAME_STEP, page_size=4))
def test_prefill(backend, tree):
    check(tree, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(tree=trees("decode"))
@example(tree=Tree(SHARED_PROMPT, page_size=4))
def test_decode(backend, tree):
    check(tree, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(tree=trees("mixed"))
@example(tree=Tree((Node(None, 8, 3), Node(0, 5, 2), Node(0, 3, 1)), page_size=4, seed=1))
def test_prefill_and_decode_in_one_step(backend, tree):
    check(tree, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 4, 5])
def test_one_row(backend, length, dtype):
    check(Tree((Node(None, length, 1),), page_size=4, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nodes", [(), (Node(None, 5, 0),)], ids=["no segment", "nothing new"])
def test_no_rows(backend, nodes):
    check(Tree(nodes, page_size=4), backend)


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_tile_boundaries(num_rows, limit):
    """limit 0, 1, 2: one score fewer than `num_rows` rows need, exactly enough, one more."""
    tree = Tree((Node(None, 12, 12), Node(0, 7, 7)), page_size=4)
    scores = num_rows * 12 * tree.kv_heads * tree.group
    for tokens in (11, 12, 13, 16, 17):
        check(replace(tree, tiles=(scores + limit - 1, tokens)))


def test_a_plan_serves_every_layer():
    """What a backend derives from the plan holds nothing of the tensors of its first call."""
    tree = Tree(SHARED_PROMPT, page_size=4)
    first, second = make_step(tree), make_step(replace(tree, magnitude=2.0))
    second.plan = first.plan
    run(tree, first)
    assert_exact(tree, second, run(tree, second))


@pytest.mark.parametrize("layout", ["part of a fused projection", "heads first"])
def test_queries_with_strides(layout):
    tree = Tree(SAME_STEP, page_size=4)
    step = make_step(tree)
    expected = run(tree, step)
    if layout == "heads first":
        step.queries = step.queries.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        step.queries = torch.cat([step.queries, torch.full_like(step.queries, torch.nan)], 1)[:, : expected.shape[1]]
    assert not step.queries.is_contiguous()
    assert torch.equal(run(tree, step), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_kv_is_exact(dtype):
    tree = Tree(SAME_STEP, page_size=4, dtype=dtype, seed=1)
    step = make_step(tree)
    shape = (step.num_pages, tree.page_size, tree.kv_heads, tree.head_dim)
    rows = torch.randn(2, tree.num_rows, *shape[2:]).to(dtype)
    before = torch.randn(2, *shape).to(dtype)
    pools = before.clone()
    paged_attention.store_kv(*rows, *pools, step.plan)
    expected = before.flatten(1, 2)
    for row, slot in enumerate(step.plan.slots.tolist()):
        expected[:, slot] = rows[:, row]
    assert torch.equal(pools.flatten(1, 2), expected)


@pytest.mark.parametrize("magnitude", [1e-6, 10.0, 60.0])
def test_scores_of_any_size(magnitude):
    """Scores up to some 10^4, whose exponential overflows float32 by far."""
    check(Tree(SHARED_PROMPT, page_size=4, head_dim=8, magnitude=magnitude))


@pytest.mark.parametrize("winner", range(3))
def test_one_segment_outweighs_the_others(winner):
    """Where the log-sum-exps are 10^4 apart, the smaller weight is 0 and the result the larger one's value."""
    tree = Tree((Node(None, 1, 0), Node(0, 1, 0), Node(1, 1, 1)), page_size=2, head_dim=1, kv_heads=1, group=1)
    step = make_step(tree)
    step.queries[:] = 1.0
    for index, keys in enumerate(step.keys):
        keys[:] = 1e4 if index == winner else -1e4
    assert torch.equal(run(tree, step)[0, 0], step.values[winner][0, 0])


def random_parts(*lse: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Partial results of 7 rows, 3 heads and 5 dimensions, with log-sum-exps around the given ones."""
    return [(torch.randn(7, 3, 5), torch.randn(7, 3) + centre) for centre in lse]


@pytest.mark.parametrize("centres", [(0, 0, 0), (0, 5, -5), (80, 88, 90), (-90, -100, -110), (1e4, 1e4, -1e4)])
def test_merge_is_associative_and_exact(centres):
    a, b, c = random_parts(*centres)
    outs, lses = (torch.stack(parts).double() for parts in zip(a, b, c, strict=True))
    truth = (lses.softmax(0)[..., None] * outs).sum(0)
    largest = max(1.0, float(lses.abs().max()))
    for out, lse in (reference.merge(*reference.merge(*a, *b), *c), reference.merge(*a, *reference.merge(*b, *c))):
        # Two merges, each rounding a log-sum-exp and, relatively, products and sums.
        assert (lse - lses.logsumexp(0)).abs().max() <= 2 * FLOAT32_EPS * largest
        assert (out - truth).abs().max() <= 8 * FLOAT32_EPS * largest * outs.abs().max()


def test_merge_commutes():
    a, b = random_parts(0, 1)
    for left, right in zip(reference.merge(*a, *b), reference.merge(*b, *a), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("centre", [0, 80, -1e4])
def test_merge_has_a_neutral_element(centre):
    (part,) = random_parts(centre)
    nothing = torch.zeros(7, 3, 5), torch.full((7, 3), -torch.inf)
    for merged in (reference.merge(*part, *nothing), reference.merge(*nothing, *part)):
        assert all(torch.equal(got, expected) for got, expected in zip(merged, part, strict=True))


WRONG_QUERIES = {
    "rows": ("queries", lambda x: x[:-1], r"expected \[19, heads, 5\], got \[18, 6, 5\] \(queries\)"),
    "dims": ("queries", lambda x: x.flatten(1), r"expected \[19, heads, 5\], got \[19, 30\] \(queries\)"),
    "head_dim": ("queries", lambda x: x[..., :4], r"expected \[19, heads, 5\], got \[19, 6, 4\] \(queries\)"),
    "heads": ("queries", lambda x: x[:, :5], r"expected heads a multiple of 2, got 5 \(queries\)"),
    "page_size": ("key_pool", lambda x: x[:, :3], r"expected \[pages, 4, kv_heads, head_dim\], got \[.*, 3, 2, 5\]"),
    "pool dims": ("key_pool", lambda x: x[0], r"expected \[pages, 4, kv_heads, head_dim\], got \[4, 2, 5\] \(pool\)"),
    "pools": ("value_pool", lambda x: x[:, :3], r"expected \[\d+, 4, 2, 5\], got \[\d+, 3, 2, 5\] \(value_pool\)"),
}
WRONG_KV = {
    "keys rows": ("keys", lambda x: x[:-1], r"expected \[19, 2, 5\], got \[18, 2, 5\] \(keys\)"),
    "keys heads": ("keys", lambda x: x[:, :1], r"expected \[19, 2, 5\], got \[19, 1, 5\] \(keys\)"),
    "values heads": ("values", lambda x: x[:, :1], r"expected \[19, 2, 5\], got \[19, 1, 5\] \(values\)"),
    "values head_dim": ("values", lambda x: x[..., :4], r"expected \[19, 2, 5\], got \[19, 2, 4\] \(values\)"),
    "value pool": ("value_pool", lambda x: x[:, :3], r"expected \[pages, 4, .*\], got \[\d+, 3, 2, 5\] \(pool\)"),
}


@pytest.mark.parametrize(("argument", "change", "message"), WRONG_QUERIES.values(), ids=WRONG_QUERIES)
def test_wrong_queries(argument, change, message):
    step = make_step(Tree(SAME_STEP, page_size=4))
    tensors = {"queries": step.queries, "key_pool": torch.zeros(9, 4, 2, 5), "value_pool": torch.zeros(9, 4, 2, 5)}
    tensors[argument] = change(tensors[argument])
    for attend in (paged_attention.prefill, paged_attention.decode):
        with pytest.raises(ValueError, match=message):
            attend(**tensors, plan=step.plan, scale=1.0)


@pytest.mark.parametrize(("argument", "change", "message"), WRONG_KV.values(), ids=WRONG_KV)
def test_wrong_keys_and_values(argument, change, message):
    step = make_step(Tree(SAME_STEP, page_size=4))
    tensors = {name: torch.zeros(19, 2, 5) for name in ("keys", "values")}
    tensors |= {name: torch.zeros(9, 4, 2, 5) for name in ("key_pool", "value_pool")}
    tensors[argument] = change(tensors[argument])
    with pytest.raises(ValueError, match=message):
        paged_attention.store_kv(**tensors, plan=step.plan)


def test_unknown_backend():
    tree = Tree(SAME_STEP, page_size=4)
    with pytest.raises(ValueError, match=r"paged_attention .* got 'fpga': the backends are .* \(backend\)"):
        run(tree, make_step(tree), backend="fpga")
