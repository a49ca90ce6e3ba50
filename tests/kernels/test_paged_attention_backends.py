"""The compiled decode attention: exact, the same bits for a row in every step, and no memory read but the tokens'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from foveate import _C
from foveate.kernels import paged_attention
from foveate.kernels.dispatch import available
from foveate.kernels.paged_attention import StepPlan, deterministic
from foveate.kernels.paged_attention.tiles import tiles_of
from foveate.testing.segment_trees import Node, Step, Tree, assert_exact, attend, make_step

COMPILED = [name for name in available("paged_attention", torch.device("cpu")) if name != "reference"]
CHUNK = _C.ATTENTION_CHUNK_KEYS
decode = partial(paged_attention.decode, backend="cpp")


def group(prompt: int, own: tuple[int, ...], **sizes) -> Tree:
    """A prompt that every sample sees, and samples with so many tokens of their own, the last of each a row."""
    return Tree((Node(None, prompt, 0), *(Node(0, length, 1) for length in own)), page_size=16, **sizes)


# A prompt over several chunks below a system message, samples of its own and of two prompts.
CROWD = Tree(
    (
        Node(None, 70, 0),
        Node(0, CHUNK + 77, 0),
        *(Node(1, length, 1) for length in (1, 5, 64, 70, CHUNK + 1)),
        Node(0, 9, 0),
        *(Node(7, length, 1) for length in (1, 2)),
        Node(None, 3, 1),
    ),
    page_size=16,
    kv_heads=2,
    group=5,
    head_dim=24,
)


def check(tree: Tree) -> None:
    step = make_step(tree)
    assert_exact(tree, step, attend(tree, step, decode))


def test_it_is_there():
    assert "cpp" in COMPILED
    assert deterministic.KV_CHUNK == CHUNK  # the chunk of the contract, a constant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
def test_chunk_boundaries(length, dtype):
    check(group(length, (1, CHUNK - 1, CHUNK, CHUNK + 1), group=2, head_dim=16, dtype=dtype))


@pytest.mark.parametrize("head_dim", [1, 2, 40, 63, 64, 80, 128, _C.ATTENTION_MAX_HEAD_DIM])
@pytest.mark.parametrize(("kv_heads", "heads"), [(1, 1), (1, 7), (3, 3), (2, 14), (1, 17), (2, 66)])
def test_heads(head_dim, kv_heads, heads):
    """As many KV heads as heads, one for all, more heads than a tile has columns."""
    check(group(70, (1, 33), kv_heads=kv_heads, group=heads // kv_heads, head_dim=head_dim))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("per_kv_head", [1, 3, 4, 8])
def test_rows_of_a_tile(rows, per_kv_head):
    check(group(65, (1,) * rows, kv_heads=1, group=per_kv_head, head_dim=8))


@pytest.mark.parametrize("keys", [1, 2, 5, 6, 7, 8, 9, 63, 64, 65, 127, 128, 129])
def test_keys_of_a_block(keys):
    check(group(keys, (1, 2), head_dim=7))


def test_a_crowd():
    check(CROWD)


def test_rows_that_see_nothing_are_zero():
    """A row without visits, and one whose only segment holds no token."""
    plan = StepPlan(
        slots=torch.arange(3),
        visit_pages=np.array([1], np.int32),
        visit_page_offsets=np.array([0, 0, 1], np.int32),
        visit_kv_len=np.array([0, 2], np.int32),
        visit_rows=np.array([1, 2], np.int32),
        visit_row_offsets=np.array([0, 1, 2], np.int32),
        visit_depth=np.zeros(2, np.int32),
        visit_causal=np.array([False, False]),
        page_size=2,
    )
    keys, values = (torch.full((2, 2, 1, 4), torch.nan) for _ in range(2))
    keys[1], values[1] = 0.0, 3.0
    out = decode(torch.ones(3, 2, 4), keys, values, plan, scale=1.0)
    assert torch.equal(out, torch.tensor([0.0, 0.0, 3.0])[:, None, None].expand(3, 2, 4))


def test_no_heads():
    plan = make_step(CROWD).plan
    pools = (torch.zeros(200, 16, 2, 24) for _ in range(2))
    assert decode(torch.zeros(plan.num_rows, 0, 24), *pools, plan, scale=1.0).shape == (plan.num_rows, 0, 24)


def bits(out: torch.Tensor) -> torch.Tensor:
    return out.contiguous().view(torch.int32)


def alone(tree: Tree, step: Step, leaf: int) -> tuple[Tree, Step]:
    """The step of one leaf's row, over the same pages; its path's tokens are stored as they were."""
    nodes = tuple(replace(node, new=int(index == leaf)) for index, node in enumerate(tree.nodes))
    only = replace(tree, nodes=nodes)
    own = make_step(only)
    (row,) = step.rows[leaf]
    own.queries, own.keys, own.values = step.queries[row : row + 1], step.keys, step.values
    return only, own


def test_a_row_gives_the_same_bits_alone_and_in_a_crowd():
    step = make_step(CROWD)
    crowd = attend(CROWD, step, decode)
    for leaf, node in enumerate(CROWD.nodes):
        if node.new:
            assert torch.equal(bits(attend(*alone(CROWD, step, leaf), decode)[0]), bits(crowd[step.rows[leaf][0]]))


@pytest.mark.parametrize("group_size", [1, 5])
def test_the_number_of_siblings_changes_no_bit(group_size):
    """Other tiles, other widths of a tile, another place in one."""
    sizes = dict(kv_heads=2, group=group_size, head_dim=24)
    large = group(CHUNK + 100, (3,) * 9, **sizes)
    step = make_step(large)
    whole = attend(large, step, decode)
    for count in range(1, 9):
        nodes = tuple(replace(node, new=node.new if index > 9 - count else 0) for index, node in enumerate(large.nodes))
        some = make_step(replace(large, nodes=nodes))
        some.keys, some.values, some.queries = step.keys, step.values, step.queries[9 - count :]
        assert torch.equal(bits(attend(replace(large, nodes=nodes), some, decode)), bits(whole[9 - count :]))


def reversed_visits(plan: StepPlan) -> StepPlan:
    """The same step, the visits of each depth from the last to the first, and their rows too where they may."""
    order = sorted(range(plan.num_visits), key=lambda visit: (plan.visit_depth[visit], -visit))
    pages, rows = ([part(visit) for visit in order] for part in (plan.pages_of, plan.rows_of))
    rows = [own if plan.visit_causal[visit] else own[::-1] for visit, own in zip(order, rows, strict=True)]
    return replace(
        plan,
        visit_pages=np.concatenate(pages),
        visit_page_offsets=np.cumsum([0, *map(len, pages)]).astype(np.int32),
        visit_kv_len=plan.visit_kv_len[order],
        visit_rows=np.concatenate(rows),
        visit_row_offsets=np.cumsum([0, *map(len, rows)]).astype(np.int32),
        visit_depth=plan.visit_depth[order],
        visit_causal=plan.visit_causal[order],
    )


def test_the_order_of_siblings_changes_no_bit():
    step = make_step(CROWD)
    expected = attend(CROWD, step, decode)
    step.plan = reversed_visits(step.plan)
    assert torch.equal(bits(attend(CROWD, step, decode)), bits(expected))


def test_the_number_of_threads_changes_no_bit():
    tree = group(3 * CHUNK, tuple(range(1, 9)), group=4, head_dim=64)
    step, before, outs = make_step(tree), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(bits(attend(tree, step, decode)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_keys_that_came_in_another_step_change_no_bit():
    """Several new tokens of one segment, which decode takes as well, against one after the other."""
    tree = Tree((Node(None, CHUNK + 5, 9),), page_size=16, group=2, head_dim=16)
    step = make_step(tree)
    together = attend(tree, step, decode)
    for token, row in enumerate(step.rows[0]):
        length = CHUNK + 5 - 9 + token + 1
        one = Tree((Node(None, length, 1),), page_size=16, group=2, head_dim=16)
        own = make_step(one)
        own.queries, own.keys, own.values = step.queries[row][None], [step.keys[0][:length]], [step.values[0][:length]]
        assert torch.equal(bits(attend(one, own, decode)[0]), bits(together[row]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_cannot_be_computed_stays_alone(value):
    step = make_step(CROWD)
    expected = attend(CROWD, step, decode)
    step.queries[3] = value
    found = attend(CROWD, step, decode)
    assert found[3].isnan().all()
    others = [row for row in range(len(found)) if row != 3]
    assert torch.equal(bits(found[others]), bits(expected[others]))


def test_plans_of_other_pages_take_over_what_they_share():
    """`like`: the tiles of the first plan, with pages of their own."""
    step = make_step(CROWD)
    expected = attend(CROWD, step, decode)
    pools = [torch.full((step.num_pages, 16, 2, 24), torch.nan) for _ in range(2)]
    first, moved = step.plan, {page: step.num_pages - 1 - page for page in range(step.num_pages)}
    for pool, tokens in zip(pools, (step.keys, step.values), strict=True):
        for index, own in enumerate(tokens):
            for token, value in enumerate(own):
                pool[moved[step.pages[index][token // 16]], token % 16] = value
    pages = np.array([moved[page] for page in first.visit_pages], np.int32)
    other = replace(first, visit_pages=pages, like=first)
    assert torch.equal(bits(decode(step.queries, *pools, other, scale=24**-0.5)), bits(expected))
    (tiles,), (shared,) = first.prepared.values(), other.prepared.values()
    assert shared.tiles is tiles.tiles


WRONG_PLANS: dict[str, tuple[Callable[[StepPlan], dict], str]] = {
    "page": (lambda plan: {"visit_pages": plan.visit_pages + 99}, r"pages in \[0, \d+\), got \d+ \(visit_pages\)"),
    "page below 0": (
        lambda plan: {"visit_pages": plan.visit_pages - 99},
        r"pages >= 0, got -\d+ \(visit_pages\)",
    ),
    "row": (lambda plan: {"visit_rows": plan.visit_rows + 1}, r"rows in \[0, 8\), got \[8\] \(visit_rows\)"),
    "length": (lambda plan: {"visit_kv_len": plan.visit_kv_len + 99}, r"the room in the pages, got .*\(visit_kv_len\)"),
    "rows of a causal visit": (lambda plan: {"visit_kv_len": plan.visit_kv_len * 0}, r"number of causal rows.*_kv_len"),
    "offsets": (
        lambda plan: {"visit_row_offsets": plan.visit_row_offsets[::-1].copy()},
        r"\d+ ascending offsets from 0 to \d+, got .* \(visit_row_offsets\)",
    ),
    "page offsets": (
        lambda plan: {"visit_page_offsets": plan.visit_page_offsets + 1},
        r"ascending offsets from 0 to \d+, got .* \(visit_page_offsets\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_PLANS.values(), ids=WRONG_PLANS)
def test_wrong_plans(change, message):
    step = make_step(CROWD)
    pools = [torch.zeros(step.num_pages, 16, 2, 24) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        decode(step.queries, *pools, replace(step.plan, **change(step.plan)), scale=1.0)


def test_a_plan_is_held_against_each_pool():
    """Its tiles are made once, but a smaller pool is still refused, and what was checked does not change after."""
    step = make_step(CROWD)
    pools = [torch.zeros(step.num_pages, 16, 2, 24) for _ in range(2)]
    expected = decode(step.queries, *pools, step.plan, scale=1.0)
    small = [pool[:1].contiguous() for pool in pools]
    with pytest.raises(ValueError, match=r"pages in \[0, 1\), got \d+ \(visit_pages\)"):
        decode(step.queries, *small, step.plan, scale=1.0)
    step.plan.visit_pages[:] = 10**6
    assert torch.equal(decode(step.queries, *pools, step.plan, scale=1.0), expected)


@pytest.mark.parametrize("name", ["visit_pages", "visit_kv_len", "visit_rows"])
def test_plans_that_are_not_alike(name):
    step = make_step(CROWD)
    pools = [torch.zeros(step.num_pages, 16, 2, 24) for _ in range(2)]
    decode(step.queries, *pools, step.plan, scale=1.0)
    other = replace(step.plan, like=step.plan, **{name: getattr(step.plan, name)[:-1].copy()})
    with pytest.raises(AssertionError, match="alike"):
        decode(step.queries, *pools, other, scale=1.0)


def test_what_it_does_not_take_goes_to_the_reference_or_is_refused():
    wide = Tree(CROWD.nodes, page_size=16, head_dim=_C.ATTENTION_MAX_HEAD_DIM + 1)
    for tree in (wide, replace(CROWD, dtype=torch.float64)):
        step = make_step(tree)
        expected = attend(tree, step, partial(paged_attention.decode, backend="reference"))
        assert torch.equal(attend(tree, step, paged_attention.decode), expected)
        with pytest.raises(ValueError, match=r"got 'cpp'.*\(backend\)"):
            attend(tree, step, decode)
    step = make_step(CROWD)
    for mode in ({"deterministic": True}, {}):
        operation = paged_attention.decode if mode else paged_attention.prefill
        with pytest.raises(ValueError, match=r"expected one of \('reference',\), which .* has, got 'cpp' \(backend\)"):
            attend(CROWD, step, partial(operation, backend="cpp", **mode))


def test_dtypes_that_differ_are_named():
    step = make_step(CROWD)
    pools = [torch.randn(step.num_pages, 16, 2, 24).half() for _ in range(2)]
    dtypes = r"float32, torch.float16 and torch.float16 \(queries, key_pool, value_pool\)"
    with pytest.raises(ValueError, match=rf"which decode of torch.{dtypes} has, got 'cpp' \(backend\)"):
        decode(step.queries, *pools, step.plan, scale=1.0)
    chosen, plain = (
        paged_attention.decode(step.queries, *pools, step.plan, scale=1.0, backend=name) for name in (None, "reference")
    )
    assert torch.equal(chosen, plain)


@pytest.mark.parametrize("mode", [{"backend": "cpp"}, {"backend": "reference"}, {"deterministic": True}], ids=str)
def test_without_gradients(mode):
    step = make_step(CROWD)
    pools = [torch.zeros(step.num_pages, 16, 2, 24, requires_grad=True) for _ in range(2)]
    out = paged_attention.decode(step.queries.clone().requires_grad_(), *pools, step.plan, scale=1.0, **mode)
    assert not out.requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_traces_and_transforms_see_the_operator(grad):
    step = make_step(CROWD)
    pools = [torch.randn(step.num_pages, 16, 2, 24) for _ in range(2)]
    run = partial(decode, plan=step.plan, scale=0.5)
    with torch.set_grad_enabled(grad):
        graph = make_fx(run)(step.queries.requires_grad_(grad), *pools)
        assert torch.ops.foveate.decode_attention.default in [node.target for node in graph.graph.nodes]
        expected = run(step.queries, *pools)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = run(mode.from_tensor(step.queries), *map(mode.from_tensor, pools))
        assert isinstance(fake, FakeTensor)
        assert not fake.requires_grad
        assert torch.equal(run(step.queries, *pools), expected)  # what the plan keeps is real
        assert torch.equal(graph(step.queries, *pools), expected)
        several = torch.vmap(run, (0, None, None))(torch.stack([step.queries, -step.queries]), *pools)
        assert torch.equal(several[0], expected)
        assert torch.equal(several[1], run(-step.queries, *pools))


def operator_arguments() -> list:
    step = make_step(CROWD)
    pools = [torch.zeros(step.num_pages, 16, 2, 24) for _ in range(2)]
    tiles = tiles_of(step.plan, CROWD.group, step.num_pages, torch.device("cpu"))
    arrays = (tiles.pages, tiles.tiles, tiles.rows, tiles.row_parts, tiles.part_offsets)
    return [step.queries, *pools, *arrays, tiles.num_parts, 0.5]


def test_operator_is_registered():
    torch.library.opcheck(torch.ops.foveate.decode_attention.default, tuple(operator_arguments()))


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        (0, lambda x: x[:, :5], r"heads a multiple of 2, got 5 \(queries\)"),
        (1, lambda x: x.half(), r"float32, contiguous.*float16.*\(key_pool\)"),
        (2, lambda x: x[:-1], r"\[pages=\d+, .*\(value_pool\)"),
        (2, lambda x: x[:, :, :1], r"kv_heads=2.*\(value_pool\)"),
        (3, lambda x: x.long(), r"int32.*int64.*\(pages\)"),
        (4, lambda x: x[:, :5].contiguous(), r"size 6, got 5 \(tiles\)"),
        (6, lambda x: x[1:], r"visiting rows=.*\(row_parts\)"),
        (7, lambda x: x[1:], r"size 9, got 8 \(part_offsets\)"),
    ],
)
def test_what_does_not_fit_is_named(argument, change, message):
    arguments = operator_arguments()
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=message):
        torch.ops.foveate.decode_attention(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in available("paged_attention", torch.device("cuda", 0)), reason="no CUDA build")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_bits_of_the_cpu(dtype):
    tree = replace(CROWD, dtype=dtype)
    step = make_step(tree)
    seen: list[torch.Tensor] = []

    def on_gpu(queries, keys, values, plan, **options) -> torch.Tensor:
        out = paged_attention.decode(
            queries.cuda(), keys.cuda(), values.cuda(), replace(plan, slots=plan.slots.cuda()),
            backend="cuda", **options,
        )  # fmt: skip
        seen.append(out)
        return out.cpu()

    assert torch.equal(attend(tree, step, on_gpu), attend(tree, step, decode))
    assert seen[0].is_cuda
