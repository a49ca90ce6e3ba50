"""Layer groups: their cut, the pages they take, the plans of a step, and the budget of prompts that lose tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from foveate.rollout.config import PruneConfig
from foveate.rollout.layer_groups import LayerGroups, layer_groups
from foveate.rollout.pages import OutOfPages, PagePool, pages_for
from foveate.rollout.planner import Planner
from foveate.rollout.prefill import Prefill
from foveate.rollout.processor import ImageInput, Prompt
from foveate.rollout.pruned import pruned
from foveate.rollout.pruners.protocol import Stage
from foveate.rollout.scheduler import Sequence
from foveate.rollout.segments import Chunk, Segment, SegmentTree, identities
from foveate.rollout.tails import tail_of
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import SiteKeep

CPU = torch.device("cpu")
FASTV = PruneConfig("fastv", 0.5)
TWO = LayerGroups(6, (Stage(2, 0.5, "before"),))  # 2 and 4 layers: a page holds 2, blocks 0 | 1, 2


def prompt_of(*parts: tuple[int, int] | int, cut: int = 0, name: int = 0) -> Prompt:
    """parts: tokens of text, or (tokens, number) of an image. cut: end of the first segment, 0 for one segment."""
    images, start = [], 0
    for part in parts:
        count = part if isinstance(part, int) else part[0]
        if not isinstance(part, int):
            images.append(ImageInput(bytes([part[1]]), torch.zeros(1, 1), torch.tensor([1, 2, 2]), start, count))
        start += count
    ids = torch.full((start,), name)
    ends = (start,) if cut == 0 else (cut, start)
    return Prompt(ids, torch.arange(start).expand(3, -1), start, tuple(images), ends)


def tables(*groups: list[list[int]]) -> tuple[np.ndarray, ...]:
    """By layer group, the pages of each block."""
    return tuple(np.array(blocks, np.int32) for blocks in groups)


@pytest.mark.parametrize(
    ("config", "layers", "starts", "per_page", "blocks"),
    [
        (None, 28, [0], 28, [1]),
        (PruneConfig("strided"), 28, [0], 28, [1]),
        (FASTV, 28, [0, 2], 2, [1, 13]),
        (PruneConfig("fastv", layer=3), 28, [0, 3], 1, [3, 25]),
        (PruneConfig("fastv", layer=12), 36, [0, 12], 12, [1, 2]),
        (PruneConfig("pyramiddrop"), 28, [0, 7, 14, 21], 7, [1, 1, 1, 1]),
        (PruneConfig("pyramiddrop"), 30, [0, 7, 15, 22], 1, [7, 8, 7, 8]),
        (PruneConfig("pyramiddrop", layers=(4, 8), ratios=(0.5, 0.5)), 10, [0, 4, 8], 2, [2, 2, 1]),
    ],
)
def test_the_cut(config, layers, starts, per_page, blocks):
    groups = layer_groups(config, layers)
    assert [part.start for part in groups.layers] == starts
    assert [layer for part in groups.layers for layer in part] == list(range(layers))
    assert (groups.layers_per_page, [len(part) for part in groups.blocks]) == (per_page, blocks)
    assert [b for part in groups.blocks for b in part] == list(range(groups.num_blocks)) == list(range(sum(blocks)))
    for part, own in zip(groups.layers, groups.blocks, strict=True):
        assert sorted({layer // per_page for layer in part}) == list(own)


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (PruneConfig("fastv", layer=4), 4, "a layer from 1 to 3, got 4"),
        (PruneConfig("pyramiddrop"), 3, "at least 4 layers"),
        (PruneConfig("pyramiddrop", layers=(1, 4)), 4, r"from 1 to 3, got \(1, 4\)"),
        (PruneConfig("pyramiddrop", layers=tuple(range(1, 9))), 20, "at most 7 stages, got 8"),
    ],
)
def test_a_cut_that_cannot_be(config, layers, message):
    with pytest.raises(ValueError, match=message):
        layer_groups(config, layers)


def test_ratios_of_the_stages():
    """Shares of an image's own tokens: keep, keep squared, ... or what was given."""
    stages = layer_groups(PruneConfig("pyramiddrop", 0.5), 28).stages
    assert [(stage.layer, stage.keep) for stage in stages] == [(7, 0.5), (14, 0.25), (21, 0.125)]
    given = layer_groups(PruneConfig("pyramiddrop", layers=(2, 4), ratios=(0.9, 0.3)), 6).stages
    assert [(stage.layer, stage.keep) for stage in given] == [(2, 0.9), (4, 0.3)]


def test_tokens_by_group():
    """Of 9, 4 and 1 image tokens a half stays, rounded up from .5 on and never none; then a tenth."""
    groups = LayerGroups(6, (Stage(2, 0.5, "before"), Stage(4, 0.1, "before")))
    prompt = prompt_of(5, (9, 1), 2, (4, 2), 3, (1, 3), 2, cut=16)
    tail = tail_of(pruned(prompt, FASTV), groups)
    assert tail.counts == ((9, 4, 1), (5, 2, 1), (1, 1, 1))
    assert tail.tokens((0, 16)) == (16, 12, 8)
    assert tail.tokens((16, 26)) == (10, 8, 7)
    assert [tail.offset(0, (0, 16), group) for group in range(3)] == [5, 5, 5]
    assert [tail.offset(1, (16, 26), group) for group in range(3)] == [0, 0, 0]
    assert [tail.offset(2, (16, 26), group) for group in range(3)] == [7, 5, 4]
    assert tail_of(prompt, groups) is None
    assert tail_of(pruned(prompt_of(8), FASTV), groups) is None


def test_a_plan_says_how_many():
    """Layers of the plan that drop nothing there count as the layers before."""
    groups = LayerGroups(6, (Stage(2, 0.5, "before"), Stage(4, 0.1, "before")))
    prompt = pruned(prompt_of(2, (4, 1), 1, (3, 2), 1), FASTV)
    sizes, offsets = torch.tensor([4, 3], dtype=torch.int32), torch.tensor([0, 2, 5], dtype=torch.int32)
    prompt.pruning.layer_sites = (SiteKeep("layer", 4, sizes, torch.tensor([0, 3, 0, 1, 2]).int(), offsets),)
    tail = tail_of(prompt, groups)
    assert tail.counts == ((4, 3), (4, 3), (2, 3))
    assert [tail.kept(group, 0).tolist() for group in range(3)] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 3]]


def test_pages_of_a_tree():
    """Every block has a table; those of the second group hold what is kept; all or none are taken."""
    pool = PagePool(40)
    tree = SegmentTree(pool, 4, TWO)
    prompt = pruned(prompt_of(6, (16, 1), 2, cut=5), FASTV)
    names = identities(prompt, (0, 0))
    assert tree.prompt_pages(prompt) == [6, pages_for(19, 4) + 2 * pages_for(11, 4)]
    assert tree.pages_needed(names, prompt) == 6 + 5 + 6 == 17
    system, rest = tree.acquire(names, prompt)
    assert [table.shape for table in system.tables] == [(1, 2), (2, 2)]
    assert [table.shape for table in rest.tables] == [(1, 5), (2, 3)]
    assert (system.tail, rest.held, rest.ends_tail, system.ends_tail) == (None, (19, 11), True, False)
    assert pool.num_used == 17
    leaf = tree.branch(rest, 5)
    assert [table.shape for table in leaf.tables] == [(1, 2), (2, 2)]
    leaf.length = 8
    tree.grow(leaf)
    assert [table.shape for table in leaf.tables] == [(1, 3), (2, 3)]
    assert len(set(system.pages + rest.pages + leaf.pages)) == pool.num_used == 26
    leaf.length = 12
    pool.allocate(12)
    assert not tree.can_grow(leaf)
    with pytest.raises(OutOfPages):
        tree.grow(leaf)
    assert [table.shape for table in leaf.tables] == [(1, 3), (2, 3)]
    for segment in (system, rest, leaf):
        tree.release(segment)
    assert pool.num_used == 12


def test_what_depends_on_the_whole_prompt():
    """Text before the first image belongs to every prompt; from its segment on, another end is another segment."""
    plain = prompt_of(4, (8, 1), 4, cut=3)
    other = dataclasses.replace(plain, token_ids=torch.cat([plain.token_ids[:-1], torch.tensor([9])]))
    early = dataclasses.replace(plain, boundaries=(12, 16))
    names = [identities(pruned(p, FASTV), (0, 0)) for p in (plain, other)]
    assert names[0][0] == names[1][0] == identities(plain, (0, 0))[0]
    assert names[0][1] != names[1][1]
    cut = [identities(dataclasses.replace(pruned(p, FASTV), boundaries=(12, 16)), (0, 0)) for p in (early, other)]
    assert cut[0][0] != cut[1][0], "an image's keys depend on the text behind it"
    without = [identities(dataclasses.replace(p, boundaries=(12, 16)), (0, 0)) for p in (early, other)]
    assert without[0][0] == without[1][0]
    known = pruned(plain, FASTV)
    sizes = torch.tensor([8], dtype=torch.int32)
    sites = [SiteKeep("layer", 2, sizes, torch.tensor(k).int(), torch.tensor([0, 2]).int()) for k in ([1, 2], [1, 3])]
    found = {names[0][1]}
    for site in sites:
        known.pruning.layer_sites = (site,)
        found.add(identities(known, (0, 0))[1])
    assert len(found) == 3, "another plan is another segment"


def test_plans_of_a_step_by_hand():
    """A system prefix and a prompt of which the second group holds 3 of 5 tokens; pages differ by block."""
    groups = LayerGroups(3, (Stage(1, 0.5, "before"),))  # blocks 0 | 1, 2
    planner = Planner(2, CPU, groups)
    tail = tail_of(pruned(prompt_of(1, (4, 1), 2, cut=2), FASTV), groups)
    prefix = Segment(None, None, tables=tables([[9]], [[8], [7]]), length=2, span=(0, 2))
    prompt = Segment(
        prefix, None, tables=tables([[0, 1, 2]], [[3, 4], [6, 5]]), length=5, span=(2, 7), tail=tail, held=(5, 3)
    )
    (first,) = planner.prefill([Chunk(prompt, 3, 5)])
    assert first.slots.tolist() == [3, 4]
    assert first.visit_pages.tolist() == [9, 0, 1, 2]
    assert first.visit_kv_len.tolist() == [2, 5]
    tail.is_complete = True
    second, third = planner.prefill([Chunk(prompt, 0, 3)], 1)
    assert (second.slots.tolist(), third.slots.tolist()) == ([6, 7, 8], [12, 13, 10])
    assert (second.visit_pages.tolist(), third.visit_pages.tolist()) == ([8, 3, 4], [7, 6, 5])
    assert second.visit_kv_len.tolist() == third.visit_kv_len.tolist() == [2, 3]
    leaf = Segment(prompt, None, tables=tables([[10]], [[11], [12]]), length=1)
    group = type("Group", (), {"path": [prefix, prompt], "request_id": "x"})()
    plans = planner.decode([Sequence(group, 0, leaf=leaf)])
    assert [plan.slots.tolist() for plan in plans] == [[21], [23], [25]]
    assert [plan.visit_kv_len.tolist() for plan in plans] == [[2, 5, 2], [2, 3, 2], [2, 3, 2]]
    assert [plan.visit_pages.tolist() for plan in plans] == [[9, 0, 1, 2, 10], [8, 3, 4, 11], [7, 6, 5, 12]]
    for plan in plans:
        assert plan.visit_page_offsets[-1] == len(plan.visit_pages)


def chunks_of(budget: int, *segments: Segment) -> list[tuple[int, int]]:
    step = Prefill(budget)
    for segment in segments:
        if not step.complete(segment):
            break
    return [(chunk.start, chunk.stop) for chunk in step.chunks]


@pytest.mark.parametrize(
    ("stored", "budget", "before", "expected"),
    [
        (0, 40, 0, [(0, 30)]),  # the whole prompt: later layers have fewer rows than the first
        (0, 29, 0, [(0, 29)]),
        (20, 40, 0, [(20, 30)]),
        (20, 20, 0, [(20, 30)]),  # 10 tokens, and 8 more in the later layers
        (20, 4, 0, [(20, 24)]),
        (26, 4, 0, [(26, 30)]),  # alone it may exceed the budget
        (26, 24, 6, [(0, 6), (26, 30)]),  # 6, then 4 and 14 more
        (26, 23, 6, [(0, 6), (26, 29)]),  # one too few: the last token waits
        (29, 12, 6, [(0, 6)]),
        (29, 1, 0, [(29, 30)]),
    ],
)
def test_the_budget_of_a_prompt(stored, budget, before, expected):
    """30 tokens of which the later layers hold 18, behind another prompt of `before` tokens."""
    tail = tail_of(pruned(prompt_of(2, (24, 1), 4), FASTV), TWO)
    segment = Segment(None, b"", length=stored, prompt=tail.prompt, span=(0, 30), tail=tail, held=tail.tokens((0, 30)))
    assert segment.held == (30, 18)
    other = Segment(None, b"x", prompt=prompt_of(6), span=(0, before))
    assert chunks_of(budget, *([other] if before else []), segment) == expected


@pytest.fixture
def look(chat, picture) -> Callable:
    """A request with one picture of 16 tokens."""
    return lambda **values: chat("What?", [picture(112, 112)], **{"max_tokens": 8, "ignore_eos": True, **values})


@pytest.mark.parametrize(
    ("config", "layers", "shares"),
    [
        (PruneConfig("fastv", 0.5), 6, [(1, 1.0), (2, 0.5)]),  # (blocks, share of the image): 2 + 4 layers, 2 a page
        (PruneConfig("fastv", 0.25, layer=1), 4, [(1, 1.0), (3, 0.25)]),
        (PruneConfig("pyramiddrop", 0.5), 4, [(1, 1.0), (1, 0.5), (1, 0.25), (1, 0.125)]),
        (PruneConfig("pyramiddrop", 0.5), 8, [(1, 1.0), (1, 0.5), (1, 0.25), (1, 0.125)]),
    ],
)
def test_pages_really_fall(config, layers, shares, look, make_engine):
    """Pages and bytes of a running group, to the last one; a page holds the same layers with any plan."""
    size = 4
    engine = make_engine(tiny_model("qwen2_5_vl", num_hidden_layers=layers), prune=config, page_size=size)
    plain = make_engine(tiny_model("qwen2_5_vl", num_hidden_layers=layers), page_size=size)
    found = {}
    for each in (engine, plain):
        each.add_request(look(n=3))
        each.step()
        found[each] = each.memory_report()
    system, end = engine._desk.groups["request-0"].prompt.boundaries
    rest = end - system
    blocks = sum(count for count, _ in shares)
    prompt = sum(count * pages_for(rest - 16 + int(16 * share), size) for count, share in shares)
    expected = blocks * pages_for(system, size) + prompt + 3 * blocks
    text = engine.model.config.get_text_config()
    page_bytes = 2 * layers // blocks * size * text.num_key_value_heads * 8 * 4
    assert found[engine]["kv_pages_used"] == expected
    assert found[engine]["kv_used"] == expected * page_bytes
    assert found[plain]["kv_used"] == (pages_for(system, size) + pages_for(rest, size) + 3) * page_bytes * blocks
    saved = sum(
        count * (pages_for(rest, size) - pages_for(rest - 16 + int(16 * share), size)) for count, share in shares
    )
    assert found[plain]["kv_used"] - found[engine]["kv_used"] == saved * page_bytes > 0
    while engine.has_unfinished:
        engine.step()
    assert engine.memory_report()["kv_pages_used"] == 0


def test_what_requests_share(look, make_engine):
    """Equal prompts their pages and their plan; the system message every prompt's; another question nothing else."""
    engine = make_engine(tiny_model("qwen2_5_vl", num_hidden_layers=4), prune=FASTV)
    names = [engine.add_request(look(seed=1)), engine.add_request(look(seed=2))]
    other = dataclasses.replace(look(seed=3), prompt=[*look().prompt[:1], {**look().prompt[1]}])
    other.prompt[1]["content"] = [{"type": "image"}, {"type": "text", "text": "What!"}]
    names.append(engine.add_request(other))
    engine.step()
    paths = [engine._desk.groups[name].path for name in names]
    assert paths[0] == paths[1]
    assert paths[2][0] is paths[0][0]
    assert paths[2][1] is not paths[0][1]
    assert engine.stats()["shared_segments"] == 2 + 1
    groups = []
    while engine.has_unfinished:
        groups += engine.step()
    assert np.array_equal(groups[0].keep.sites[0].kept, groups[1].keep.sites[0].kept)
