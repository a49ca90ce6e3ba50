"""Pruning inside the language model over a group's life: faults that must show, plans given, updates, aborts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from foveate.kernels import vision_prune
from foveate.kernels.vision_prune import Selection
from foveate.rollout import staged, stages
from foveate.rollout.config import PruneConfig
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request
from foveate.testing.hidden_tokens import TOLERANCE, check, eager, kept_of, oracle_logprobs, worst

FASTV, PYRAMID = PruneConfig("fastv", 0.4), PruneConfig("pyramiddrop", 0.6)
EARLY = PruneConfig("fastv", 0.25, layer=1)
# (first layer without the dropped, share, layer whose attention scores)
CUTS = {FASTV: [(2, 0.4, 1)], EARLY: [(1, 0.25, 0)], PYRAMID: [(1, 0.6, 1), (2, 0.6**2, 2), (3, 0.6**3, 3)]}
VALUES = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def model_of() -> Callable[..., nn.Module]:
    return lambda family="qwen2_5_vl", seed=3: eager(tiny_model(family, seed=seed, num_hidden_layers=4))


@pytest.fixture
def requests(chat, picture) -> Callable[..., list[Request]]:
    """Two prompts, one with two images."""

    def make(n: int = 1, **sampling) -> list[Request]:
        values = {**VALUES, "n": n, **sampling}
        return [
            chat("Which of these is larger?", [picture(56, 168, 1), picture(112, 112, 3)], seed=1, **values),
            chat("And this?", [picture(140, 84, 2)], seed=2, **values),
        ]

    return make


def keys_of_the_layer_before(patch):
    original = staged.StagedPrefill._stored_keys

    def stored(self, step):
        _, places = original(self, step)
        layer = self.groups.layers[step.group].start - 1
        return self.kv_pool[0, (layer - 1) % self.kv_pool.shape[1]], places

    patch.setattr(staged.StagedPrefill, "_stored_keys", stored)


def query_of_the_token_before(patch):
    original = staged.last_rows
    patch.setattr(staged, "last_rows", lambda pieces: [row - 1 for row in original(pieces)])


def the_least_attended(patch):
    original = vision_prune.select_topk
    patch.setattr(vision_prune, "select_topk", lambda scores, *args, **kwargs: original(-scores, *args, **kwargs))


def one_share_for_all_images(patch):
    original = vision_prune.select_topk

    def select(scores, offsets, counts, **kwargs):
        kwargs["num_kept"] = None
        found = original(scores, offsets, counts.flip(0), **kwargs)
        return Selection(found.indices[: int(counts.sum())], found.offsets)

    patch.setattr(vision_prune, "select_topk", select)


def positions_closed_up(patch):
    original = stages.StagePlan.compact

    def compact(self, selection, rows, projected):
        found, more = original(self, selection, rows, projected)
        size = len(found.hidden)
        return dataclasses.replace(found, cos=rows.cos[:size], sin=rows.sin[:size]), more

    patch.setattr(stages.StagePlan, "compact", compact)


def rows_that_waited_come_last(patch):
    original = staged.StagedPrefill._join

    def join(self, chunks, *args):
        for chunk in chunks:
            if chunk.segment.tail:
                chunk.segment.tail.held.reverse()
        return original(self, chunks, *args)

    patch.setattr(staged.StagedPrefill, "_join", join)


def deepstack_ends_with_the_first_group(patch):
    original = staged.StagedPrefill._with_levels
    patch.setattr(staged.StagedPrefill, "_with_levels", lambda self, hidden, _: original(self, hidden, None))


def numbers_of_what_was_left(patch):
    """Later stages write down places among the survivors."""
    selected = {"selected_rows": lambda selection, starts: selection.indices}
    patch.setattr(staged, "vision_prune", SimpleNamespace(**vars(vision_prune) | selected))


FAULTS = [
    (FASTV, "qwen2_5_vl", keys_of_the_layer_before),
    (PYRAMID, "qwen2_5_vl", query_of_the_token_before),
    (FASTV, "qwen2_5_vl", the_least_attended),
    (FASTV, "qwen2_5_vl", one_share_for_all_images),
    (FASTV, "qwen2_5_vl", positions_closed_up),
    (FASTV, "qwen2_5_vl", rows_that_waited_come_last),
    (EARLY, "qwen3_vl", deepstack_ends_with_the_first_group),
    (PYRAMID, "qwen2_5_vl", numbers_of_what_was_left),
]


@pytest.mark.parametrize(("config", "family", "fault"), FAULTS, ids=[fault.__name__ for *_, fault in FAULTS])
def test_a_fault_is_seen(config, family, fault, model_of, requests, make_engine, monkeypatch):
    model = model_of(family)
    check(model, make_engine(model, prune=config, max_batch_tokens=20).generate(requests()), CUTS[config])
    fault(monkeypatch)
    groups = make_engine(model, prune=config, max_batch_tokens=20).generate(requests(), strict=True)
    with pytest.raises(AssertionError):
        check(model, groups, CUTS[config])


@pytest.fixture
def twins(model_of, chat, picture, make_engine):
    """An engine, and two finished groups whose images have equal sizes."""
    model = model_of()
    requests = [chat(text, [picture(112, 112, seed)], **VALUES) for seed, text in enumerate(("What?", "Hm?"))]
    engine = make_engine(model, prune=FASTV)
    return engine, engine.generate(requests, strict=True)


def with_sites(group, *sites):
    return dataclasses.replace(group, keep=dataclasses.replace(group.keep, sites=sites))


def test_the_plan_of_another_prompt_is_seen(twins):
    """And `score` follows whatever plan it is given."""
    engine, groups = twins
    check(engine.model, groups, CUTS[FASTV])
    for group, other in (groups, groups[::-1]):
        assert worst(engine.model, [group], other.keep) > 100 * TOLERANCE
        ((row,),), (rollout,) = engine.score([with_sites(group, *other.keep.sites)]), group.rollouts
        assert (row - oracle_logprobs(engine.model, group, rollout, other.keep)).abs().max() < TOLERANCE
        assert (row - rollout.logprobs).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("cut", [[(3, 0.4, 1)], [(2, 0.4, 0)], [(2, 0.4, 2)], [(2, 0.5, 1)]])
def test_a_selection_one_layer_off_is_seen(cut, twins):
    engine, groups = twins
    with pytest.raises(AssertionError):
        check(engine.model, groups, cut)


def test_an_exit_is_replayed(twins):
    """A site that keeps nothing: no later layer sees the image."""
    engine, (group, _) = twins
    (site,), (rollout,) = group.keep.sites, group.rollouts
    nothing = dataclasses.replace(site, kept=site.kept[:0], kept_offsets=torch.zeros_like(site.kept_offsets))
    left = with_sites(group, nothing)
    ((row,),) = engine.score([left])
    assert (row - oracle_logprobs(engine.model, group, rollout, left.keep)).abs().max() < TOLERANCE


def test_plans_that_do_not_fit(twins, make_engine):
    """An engine replays what is dropped before its own layers, of any share, and refuses the rest by name."""
    engine, (group, other) = twins
    (rollout,) = group.rollouts
    for config in (PruneConfig("fastv", 0.9), PruneConfig("pyramiddrop", layers=(1, 2), ratios=(0.9, 0.1))):
        ((row,),) = make_engine(engine.model, prune=config).score([group])
        assert (row - rollout.logprobs).abs().max() < TOLERANCE
    for config in (None, EARLY, PruneConfig("divprune")):
        with pytest.raises(ValueError, match=r"request 'request-0': expected a plan .* got \[2\] \(keep.sites\)"):
            make_engine(engine.model, prune=config).score([group])
    twice = make_engine(engine.model, prune=PruneConfig("pyramiddrop", layers=(1, 2), ratios=(0.9, 0.1)))
    (site,) = other.keep.sites
    grows = with_sites(group, dataclasses.replace(group.keep.sites[0], layer=1), site)
    with pytest.raises(ValueError, match="nested sites"):
        twice.score([grows])
    with pytest.raises(ValueError, match="expected a plan"):
        twice.score([with_sites(group, site, dataclasses.replace(site, layer=1))])


def changed(model: nn.Module, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    state = model.state_dict()
    return {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def test_an_update_in_the_midst_of_a_prompt(model_of, requests, make_engine):
    """What waits for the last token waits on; the group says that its keys are of several versions."""
    model = model_of()
    engine = make_engine(model, prune=FASTV, max_batch_tokens=20)
    for request in requests(2):
        engine.add_request(request)
    engine.step()
    engine.step()
    held = engine.memory_report()["held_hidden"]
    assert held > 0
    engine.update_weights(changed(model, 0.02), in_flight="keep")
    assert engine.memory_report()["held_hidden"] == held
    groups = []
    while engine.has_unfinished:
        groups += engine.step()
    assert [group.kept_versions for group in groups] == [(0,), ()]
    assert all(len(group.keep.sites) == 1 and group.error is None for group in groups)
    check(model, groups[1:], CUTS[FASTV])
    with pytest.raises(ValueError, match="one weight version"):
        engine.score(groups[:1])


def test_a_plan_outlives_pages_and_weights(model_of, requests, make_engine):
    """A group whose prompt was taken after its first tokens keeps the plan that they were drawn under."""
    model = model_of()
    full = make_engine(model, prune=FASTV).memory_report()
    memory = 54 * full["kv_capacity"] // full["kv_pages"]
    engine = make_engine(model, prune=FASTV, kv_memory=memory)
    names = [engine.add_request(request) for request in requests(2, max_tokens=40)]
    late = engine._desk.groups[names[1]]
    while late.path or not late.sequences[0].token_ids:
        engine.step()
    sites, drawn = late.prompt.pruning.layer_sites, [len(sequence.token_ids) for sequence in late.sequences]
    assert len(sites) == 1
    assert min(drawn) > 0
    engine.update_weights(changed(model, 0.2), in_flight="keep")
    groups = {}
    while engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
    assert groups[names[1]].keep.sites == sites
    assert groups[names[1]].keep.language_version == 0
    assert {versions[-1][2] for versions in (r.weight_versions for r in groups[names[1]].rollouts)} == {1}
    (afresh,) = make_engine(model, prune=FASTV).generate(requests(1)[1:])
    assert kept_of(afresh.keep) != kept_of(groups[names[1]].keep), "the new weights would choose others"


def test_an_abort_in_the_midst_of_a_prompt(model_of, requests, make_engine):
    engine = make_engine(model_of(), prune=PYRAMID, max_batch_tokens=20)
    name = engine.add_request(requests()[0])
    engine.step()
    engine.step()
    assert engine.memory_report()["held_hidden"] > 0
    engine.abort(name)
    (group,) = engine.step()
    assert group.keep is None
    report = engine.memory_report()
    assert (report["held_hidden"], report["kv_pages_used"]) == (0, 0)


def test_a_step_that_breaks_off(model_of, requests, make_engine, monkeypatch):
    """Behind the first group: what ran fails, nothing stays, and the engine goes on."""
    model = model_of()
    engine = make_engine(model, prune=FASTV)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise RuntimeError("broken")

        patch.setattr(staged.StagedPrefill, "_choose", fail)
        engine.add_request(requests()[0])
        with pytest.raises(RuntimeError, match="broken"):
            engine.step()
    (group,) = engine.step()
    assert "broken" in str(group.error)
    assert group.keep is None
    check(model, engine.generate(requests(), strict=True), CUTS[FASTV])
    assert engine.memory_report()["kv_pages_used"] == 0
