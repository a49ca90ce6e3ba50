"""Attention over a tree of KV segments against float64 softmax over each row's own tokens, gathered one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foveate.kernels import paged_attention
from foveate.kernels.paged_attention import deterministic, reference
from foveate.testing.segment_trees import FLOAT32_EPS, Node, Step, Tree, assert_exact, attend, make_step

BACKENDS = ["reference", "deterministic", "cpp"]  # the second is a mode rather than a backend
# (float32 scores alive at once, padded KV tokens gathered at once): tiles of one row, of a few, of all.
TILES = [(1, 1), (64, 5), (700, 40), (reference.SCORE_TILE, reference.MAX_BATCH_TOKENS)]


def run(tree: Tree, step: Step, backend: str = "reference") -> torch.Tensor:
    mode = {"deterministic": True} if backend == "deterministic" else {"backend": backend}
    decodes = backend == "cpp" or all(node.new <= 1 for node in tree.nodes)  # "cpp" has no prefill of its own
    return attend(tree, step, partial(paged_attention.decode if decodes else paged_attention.prefill, **mode))


def check(tree: Tree, backend: str = "reference", tiles: tuple[int, int] = TILES[-1]) -> torch.Tensor:
    step = make_step(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "SCORE_TILE", tiles[0])
        patch.setattr(reference, "MAX_BATCH_TOKENS", tiles[1])
        patch.setattr(deterministic, "KV_CHUNK", min(tiles[1] + 3, 512))
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
        adjacent=draw(st.booleans()),
    )


def _depth(parents: list[int | None], node: int) -> int:
    parent = parents[node]
    return 0 if parent is None else 1 + _depth(parents, parent)


SHARED_PROMPT = (Node(None, 9, 0), Node(0, 4, 0), Node(1, 1, 1), Node(1, 5, 1), Node(1, 4, 1), Node(0, 8, 1))
SAME_STEP = (Node(None, 5, 5), Node(0, 4, 4), Node(0, 9, 9), Node(2, 1, 1))  # ancestors computed with their children


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(tree=trees("prefill"), tiles=st.sampled_from(TILES))
@example(tree=Tree(SAME_STEP, page_size=4), tiles=TILES[-1])
def test_prefill(backend, tree, tiles):
    check(tree, backend, tiles)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(tree=trees("decode"), tiles=st.sampled_from(TILES))
@example(tree=Tree(SHARED_PROMPT, page_size=4), tiles=TILES[-1])
def test_decode(backend, tree, tiles):
    check(tree, backend, tiles)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(tree=trees("mixed"), tiles=st.sampled_from(TILES))
@example(tree=Tree((Node(None, 8, 3), Node(0, 5, 2), Node(0, 3, 1)), page_size=4, seed=1), tiles=TILES[-1])
def test_prefill_and_decode_in_one_step(backend, tree, tiles):
    check(tree, backend, tiles)


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
        check(tree, tiles=(scores + limit - 1, tokens))


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
    "no KV heads": ("key_pool", lambda x: x[:, :, :0], r"expected at least 1 KV head, got \[9, 4, 0, 5\] \(pool\)"),
    "pools": ("value_pool", lambda x: x[:, :3], r"expected \[\d+, 4, 2, 5\], got \[\d+, 3, 2, 5\] \(value_pool\)"),
}
WRONG_KV = {
    "keys rows": ("keys", lambda x: x[:-1], r"expected \[19, 2, 5\], got \[18, 2, 5\] \(keys\)"),
    "keys heads": ("keys", lambda x: x[:, :1], r"expected \[19, 2, 5\], got \[19, 1, 5\] \(keys\)"),
    "no KV heads": ("key_pool", lambda x: x[:, :, :0], r"expected at least 1 KV head, got \[9, 4, 0, 5\] \(pool\)"),
    "values heads": ("values", lambda x: x[:, :1], r"expected \[19, 2, 5\], got \[19, 1, 5\] \(values\)"),
    "values head_dim": ("values", lambda x: x[..., :4], r"expected \[19, 2, 5\], got \[19, 2, 4\] \(values\)"),
    "value pool": ("value_pool", lambda x: x[:, :3], r"expected \[pages, 4, .*\], got \[\d+, 3, 2, 5\] \(pool\)"),
}


@pytest.mark.parametrize(("argument", "change", "message"), WRONG_QUERIES.values(), ids=WRONG_QUERIES)
def test_wrong_queries(argument, change, message):
    step = make_step(Tree(SAME_STEP, page_size=4))
    tensors = {"queries": step.queries, "key_pool": torch.zeros(9, 4, 2, 5), "value_pool": torch.zeros(9, 4, 2, 5)}
    tensors[argument] = change(tensors[argument])
    for operation in (paged_attention.prefill, paged_attention.decode):
        with pytest.raises(ValueError, match=message):
            operation(**tensors, plan=step.plan, scale=1.0)


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
