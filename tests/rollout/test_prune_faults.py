"""Pruning that is asked for wrongly, or fails: backends, recorded merges, attention, the last token, the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foveate.kernels import vision_prune
from foveate.rollout import models
from foveate.rollout.config import PruneConfig
from foveate.rollout.engine import Engine
from foveate.rollout.models import tower_attention
from foveate.rollout.replay_plan import prompt_view
from foveate.rollout.runner import Runner
from foveate.rollout.stages import pieces_of
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request, RolloutGroup
from foveate.testing.hidden_tokens import TOLERANCE, kept_of

METHODS = ("random", "strided", "visionzip", "divprune", "fastv", "pyramiddrop")
VALUES = {"max_tokens": 4, "ignore_eos": True, "seed": 3}


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("qwen2_5_vl", num_hidden_layers=4).requires_grad_(False)


@pytest.fixture
def look(chat, picture) -> Callable[..., Request]:
    """look(prune=...): a request with a picture of 15 tokens."""
    return lambda prune="default", **values: dataclasses.replace(
        chat("What?", [picture(84, 140, 0)], **VALUES | values), prune=prune
    )


@pytest.mark.parametrize("method", METHODS)
def test_backends_keep_the_same_tokens(method, model, chat, look, make_engine):
    """A backend that some primitives lack breaks no step, however the engine's string names it."""

    def run(backend: str | None) -> tuple[Engine, list[RolloutGroup]]:
        engine = make_engine(model, prune=PruneConfig(method, 0.5), backend=backend)
        return engine, engine.generate([look(), chat("Text.", **VALUES)], strict=True)

    _, (expected, _) = run(None)
    for backend in ("vision_prune=cpp", "sampling=cpp,vision_prune=cpp", "vision_prune=triton", "reference"):
        engine, (group, text) = run(backend)
        assert kept_of(group.keep) == kept_of(expected.keep)
        assert text.error is None
        assert engine._runner.vision.backend == ("vision_prune=reference" if backend == "reference" else backend)


def test_the_compaction_takes_the_engines_backend(model, look, make_engine, monkeypatch):
    asked, compact = [], vision_prune.compact
    monkeypatch.setattr(vision_prune, "compact", lambda *a, backend: asked.append(backend) or compact(*a))
    for backend in ("reference", "vision_prune=cpp"):
        make_engine(model, prune=PruneConfig("fastv"), backend=backend).generate([look()], strict=True)
    assert asked == ["vision_prune=reference", "vision_prune=cpp"]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def swapped(offsets: torch.Tensor) -> torch.Tensor:
    """The same ends, with a step down between them."""
    order = offsets.clone()
    order[1:-1] = offsets[1:-1].flip(0)
    return order


WRONG_MERGES = {
    "no weight": (lambda s: {"merge_weight": None}, r"all three fields of merges, or none"),
    "no source": (lambda s: {"merge_source": None}, r"all three fields of merges, or none"),
    "weights alone": (lambda s: {"merge_offsets": None, "merge_source": None}, r"all three fields of merges, or none"),
    "few weights": (lambda s: {"merge_weight": s.merge_weight[:-1]}, r"\d+ weights, got \d+ \(keep.merge_weight\)"),
    "few offsets": (lambda s: {"merge_offsets": s.merge_offsets[:-1]}, r"9 offsets that ascend .*keep.merge_offsets"),
    "one offset": (lambda s: {"merge_offsets": s.merge_offsets[:1]}, r"9 offsets that ascend .*keep.merge_offsets"),
    "none": (lambda s: {"merge_offsets": int32()}, r"9 offsets that ascend .*keep.merge_offsets"),
    "not from 0": (lambda s: {"merge_offsets": s.merge_offsets.clamp(min=1)}, r"9 offsets that ascend from 0"),
    "descending": (lambda s: {"merge_offsets": swapped(s.merge_offsets)}, r"9 offsets that ascend from 0"),
    "another end": (
        lambda s: {"merge_source": s.merge_source[:-1], "merge_weight": s.merge_weight[:-1]},
        r"9 offsets that ascend from 0",
    ),
    "beyond": (lambda s: {"merge_source": s.merge_source + 15}, r"tokens in \[0, 15\), got .*keep.merge_source"),
    "below": (lambda s: {"merge_source": s.merge_source - 15}, r"tokens in \[0, 15\), got .*keep.merge_source"),
}


@pytest.fixture
def zipped(model, look, make_engine) -> tuple[Engine, RolloutGroup]:
    engine = make_engine(model, prune=PruneConfig("visionzip", 0.5, dominant=0.5))
    return engine, engine.generate([look()], strict=True)[0]


def with_site(group: RolloutGroup, **fields) -> RolloutGroup:
    sites = (dataclasses.replace(group.keep.sites[0], **fields), *group.keep.sites[1:])
    return dataclasses.replace(group, keep=dataclasses.replace(group.keep, sites=sites))


@pytest.mark.parametrize("case", WRONG_MERGES)
def test_wrong_merges_are_refused_by_name(case, zipped, monkeypatch):
    """By `score` before anything is computed, and by a trainer's replay."""
    engine, group = zipped
    change, match = WRONG_MERGES[case]
    wrong = with_site(group, **change(group.keep.sites[0]))
    monkeypatch.setattr(Runner, "forward", None)
    with pytest.raises(ValueError, match=f"request 'request-0': expected {match}"):
        engine.score([group, wrong])
    with pytest.raises(ValueError, match=f"request 'request-0': expected {match}"):
        prompt_view(wrong, models.describe(engine.model).vision)


def test_merges_are_of_their_own_image(model, chat, picture, make_engine):
    """A source that only the other, larger image has."""
    engine = make_engine(model, prune=PruneConfig("visionzip", 0.5, dominant=0.5))
    request = chat("What?", [picture(56, 84, 0), picture(112, 112, 1)], **VALUES)
    (group,) = engine.generate([request], strict=True)
    site = group.keep.sites[0]
    assert site.num_tokens.tolist() == [6, 16]
    source = site.merge_source.clone()
    source[0] = 6
    with pytest.raises(ValueError, match=r"tokens in \[0, 6\), got \[6\] \(keep.merge_source\)"):
        engine.score([with_site(group, merge_source=source)])
    assert (engine.score([group])[0][0] - group.rollouts[0].logprobs).abs().max() < TOLERANCE


def test_layer_sites_merge_nothing(model, look, make_engine):
    engine = make_engine(model, prune=PruneConfig("fastv", 0.5))
    (group,) = engine.generate([look()], strict=True)
    nothing = {"merge_offsets": torch.zeros(9, dtype=torch.int32), "merge_source": int32(), "merge_weight": int32()}
    with pytest.raises(ValueError, match="expected merged tokens at the encoder alone"):
        engine.score([with_site(group, **nothing)])


def test_an_attention_that_fails_concerns_those_who_need_it(model, look, make_engine, monkeypatch):
    """Others with the same image go on, the tower is not blamed, and it is tried again."""
    requests = [look(prune) for prune in ("default", None, PruneConfig("strided", 0.5))]
    config = PruneConfig("visionzip", 0.5)
    expected = make_engine(model, prune=config, deterministic=True).generate(requests, strict=True)
    engine = make_engine(model, prune=config, deterministic=True)
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise RuntimeError("no scores")

        patch.setattr(tower_attention, "column_scores", fail)
        groups = engine.generate(requests)
    error = "request 'request-0': expected images that visionzip can prune, got RuntimeError('no scores')"
    assert [group.error and str(group.error) for group in groups] == [error, None, None]
    assert groups[0].keep is None
    for group, other in zip(groups[1:], expected[1:], strict=True):
        assert torch.equal(group.rollouts[0].logprobs, other.rollouts[0].logprobs)
    assert engine.memory_report()["kv_pages_used"] == 0
    (again,) = engine.generate(requests[:1], strict=True)
    assert kept_of(again.keep) == kept_of(expected[0].keep)


def test_a_plan_that_drops_the_last_token_is_refused(model, look, make_engine):
    """By `score` as by a replay: nothing would predict the completion."""
    engine = make_engine(model, prune=PruneConfig("fastv", 0.2))
    request = dataclasses.replace(look(), prompt="See <|vision_start|><|image_pad|>")
    (group,) = engine.generate([request], strict=True)
    kept = group.keep.sites[0].kept
    assert kept[-1] == 14
    assert (engine.score([group])[0][0] - group.rollouts[0].logprobs).abs().max() < TOLERANCE
    others = [token for token in range(14) if token not in kept.tolist()]
    without = torch.cat([kept[:-1], int32(others[0])]).sort().values
    for wrong in (
        with_site(group, kept=without),
        with_site(group, kept=int32(), kept_offsets=int32(0, 0)),
    ):
        match = r"request 'request-0': expected the last token of the prompt to be kept, got 'dropped' \(keep.sites\)"
        with pytest.raises(ValueError, match=match):
            engine.score([wrong])
        with pytest.raises(ValueError, match=match):
            prompt_view(wrong, models.describe(model).vision)


def test_later_layers_count_in_the_budget(model, chat, picture, make_engine, monkeypatch):
    """They run on all that is left of a prompt; what exceeds the budget is a step of that prompt alone."""
    budget, steps = 24, []
    forward = Runner.forward

    def see(self, chunks):
        later = sum(piece.stop - piece.start for piece in pieces_of(chunks, 1))
        steps.append((later, len({id(chunk.segment.source) for chunk in chunks})))
        return forward(self, chunks)

    monkeypatch.setattr(Runner, "forward", see)
    engine = make_engine(model, prune=PruneConfig("fastv", 0.9), max_batch_tokens=budget)
    requests = []
    for seed in range(3):
        requests.append(chat(f"{seed}?", [picture(84, 140, seed)], system=None, **VALUES))
        requests.append(chat(f"Text {seed}.", system=None, **VALUES))
    engine.generate(requests, strict=True)
    assert any(later > budget for later, _ in steps)
    assert any(prompts > 1 for _, prompts in steps)
    assert all(later <= budget or prompts == 1 for later, prompts in steps)
