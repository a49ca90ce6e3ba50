"""`Engine.score` against the trainer's forward and against the rollouts' own log-probs; what it refuses and leaves."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.policy import Sample, policy_logprobs
from foveate.rollout.runner import Runner
from foveate.rollout.testing import FAMILIES, special_id, tiny_model
from foveate.rollout.types import KeepPlan, Request, RolloutGroup

# On tiny fp32 models transformers differs from its own cached decode by 2e-5, wrong positions by more than 2e-4.
TOLERANCE = 5e-5
NOTHING = torch.empty(0)


@pytest.fixture
def requests_of(chat, picture) -> Callable[[str], list[Request]]:
    """(family) -> prompts that share beginnings and images; several temperatures, lengths, bans and filters."""

    def make(family: str) -> list[Request]:
        pictures = [picture(56, 112, 1), picture(84, 84, 2)] if family.endswith("_vl") else []
        bans = {"banned_token_ids": (5, 6, 7), "top_p": 0.8}
        return [
            chat("Which of these is larger?", pictures, n=3, seed=1, max_tokens=9, temperature=1.3),
            chat("And this one?", pictures[1:], n=2, seed=2, max_tokens=17, temperature=0.6, **bans),
            Request("Plain text.", n=2, sampling=SamplingParams(seed=3, max_tokens=1)),
            chat("Which?", pictures[:1], n=1, max_tokens=5, temperature=0),
        ]

    return make


def wiped(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with nothing but what a file would need to hold."""
    empty = {"logprobs": NOTHING, "log_kept": NOTHING, "entropy": NOTHING, "text": ""}
    return [
        dataclasses.replace(group, rollouts=tuple(dataclasses.replace(r, **empty) for r in group.rollouts))
        for group in groups
    ]


def truth(engine: Engine, group: RolloutGroup) -> list[torch.Tensor]:
    with torch.no_grad():
        return [policy_logprobs(engine.spec, [Sample(group, rollout)]).logprobs for rollout in group.rollouts]


def assert_scores(engine: Engine, groups: list[RolloutGroup], scores: list[list[torch.Tensor]]) -> None:
    for group, found in zip(groups, scores, strict=True):
        for ours, expected in zip(found, truth(engine, group), strict=True):
            torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


def pages_used(engine: Engine) -> int:
    return int(engine.memory_report()["kv_pages_used"])


@pytest.fixture
def hello(make_engine) -> tuple[Engine, RolloutGroup]:
    """An engine on a text model, and a group of two rollouts of four tokens each."""
    engine = make_engine("llama")
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    return engine, engine.generate([Request("Hello", n=2, sampling=sampling)], strict=True)[0]


@pytest.mark.parametrize("budget", [8192, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_trainers(family, budget, requests_of, make_engine):
    engine = make_engine(tiny_model(family, seed=5), max_batch_tokens=budget)
    groups = engine.generate(requests_of(family), strict=True)
    scores = engine.score(wiped(groups))
    assert_scores(engine, groups, scores)
    for group, found in zip(groups, scores, strict=True):
        for ours, rollout in zip(found, group.rollouts, strict=True):
            torch.testing.assert_close(ours, rollout.logprobs, atol=TOLERANCE, rtol=0)
            assert (ours.dtype, ours.device.type, ours.is_contiguous()) == (torch.float32, "cpu", True)
            assert ours.untyped_storage().nbytes() == ours.nbytes  # one kept result keeps no other
            assert (ours.requires_grad, ours.is_inference()) == (False, False)
    assert pages_used(engine) == 0


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_scores_follow_the_weights(family, requests_of, make_engine):
    engine = make_engine(tiny_model(family, seed=5))
    groups = engine.generate(requests_of(family), strict=True)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.05)
    engine.update_weights()
    scores = engine.score(groups)
    assert_scores(engine, groups, scores)
    assert (scores[0][0] - groups[0].rollouts[0].logprobs).abs().max() > 100 * TOLERANCE


def test_a_moved_parameter_is_read_where_it_lies(hello):
    engine, group = hello
    fused = engine.model.model.layers[0].mlp.up_proj.weight
    fused.data = fused.data * 1.5
    assert_scores(engine, [group], engine.score([group]))


def test_penalties_count_what_came_before(make_engine):
    sampling = SamplingParams(
        max_tokens=12, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={65: 2.0}, seed=1
    )
    engine = make_engine(tiny_model("llama", vocab_size=271), max_batch_tokens=5)
    requests = [Request("aab", n=2, sampling=sampling), Request("b", n=2, sampling=SamplingParams(max_tokens=3))]
    groups = engine.generate(requests, strict=True)
    for group, found in zip(groups, engine.score(groups), strict=True):
        for ours, rollout in zip(found, group.rollouts, strict=True):
            torch.testing.assert_close(ours, rollout.logprobs, atol=TOLERANCE, rtol=0)


def test_a_prompt_is_prefilled_once_a_group(requests_of, make_engine, monkeypatch):
    engine = make_engine(tiny_model("qwen2_5_vl", seed=5), max_batch_tokens=7)
    groups = engine.generate(requests_of("qwen2_5_vl"), strict=True)
    fed, pages, forward = [], [], Runner.forward

    def count(self, chunks):
        fed.append(sum(chunk.stop - chunk.start for chunk in chunks))
        pages.append(pages_used(engine))
        return forward(self, chunks)

    monkeypatch.setattr(Runner, "forward", count)
    engine.score(groups[1:])  # nothing of theirs is shared but a system message, which chunks of one step may share
    prompts = sum(len(group.prompt_ids) for group in groups[1:])
    completions = sum(len(rollout.token_ids) - 1 for group in groups[1:] for rollout in group.rollouts)
    assert sum(fed) <= prompts + completions
    assert max(fed) <= 7
    assert engine.stats()["images_encoded"] == 2  # their features are still in the cache
    most = max(pages)
    fed.clear()
    engine.config = dataclasses.replace(engine.config, max_batch_tokens=8192)
    engine.score(groups[1:])
    assert len(fed) == 1
    assert most < pages[-1]  # what one step cannot run is not laid out yet


def test_completions_take_turns_in_a_small_pool(make_engine):
    model = tiny_model("llama")
    full = make_engine(model).memory_report()
    engine = make_engine(model, kv_memory=7 * full["kv_capacity"] // full["kv_pages"])
    sampling = SamplingParams(max_tokens=25, ignore_eos=True)
    groups = engine.generate([Request("Hello there", n=5, sampling=sampling)], strict=True)
    assert_scores(engine, groups, engine.score(groups))
    assert pages_used(engine) == 0


def test_greedy_groups_are_scored_at_temperature_one(make_engine):
    engine = make_engine("llama")
    groups = engine.generate([Request("Hello", sampling=SamplingParams(temperature=0, max_tokens=4))], strict=True)
    assert_scores(engine, groups, engine.score(groups))


def test_groups_without_a_token(hello):
    engine, group = hello
    empty = dataclasses.replace(group.rollouts[0], token_ids=torch.empty(0, dtype=torch.int64), logprobs=NOTHING)
    (found,) = engine.score([dataclasses.replace(group, rollouts=(empty, group.rollouts[1]))])
    assert [len(part) for part in found] == [0, 4]
    assert torch.allclose(found[1], group.rollouts[1].logprobs, atol=TOLERANCE)
    (found,) = engine.score([dataclasses.replace(group, rollouts=(empty,))])
    assert (found[0].shape, found[0].dtype) == ((0,), torch.float32)
    assert engine.score([]) == []


def test_boundaries_default_to_the_whole_prompt(hello):
    engine, group = hello
    unknown = dataclasses.replace(group, segments=torch.empty(0, dtype=torch.int32))
    cut = dataclasses.replace(group, segments=torch.tensor([2, 2, 1], dtype=torch.int32))
    assert_scores(engine, [unknown, cut], engine.score([unknown, cut]))


KEEP = KeepPlan("", "fastv", (), torch.empty(3, 0, dtype=torch.int32), 0, 0, 0)
WRONG_GROUPS = {
    "without an error": {"error": ValueError("broken")},
    "the positions of the prompt's kept tokens": {"keep": KEEP},
    r"ids in \[0, 271\), got 271 \(prompt\)": {"prompt_ids": torch.tensor([1, 271, 3, 4, 5])},
    r"\[3, 5\], got \[3, 4\] \(group.prompt_positions\)": {"prompt_positions": torch.zeros(3, 4)},
    r"sum to 5, got \[2, 2\]": {"segments": torch.tensor([2, 2])},
    r"sum to 5, got \[0, 5\]": {"segments": torch.tensor([0, 5])},
    "no images for a text model": {"pixel_values": torch.zeros(4, 1176), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    "one weight version|of one weight version": {"kept_versions": (0,)},
}
WRONG_ROLLOUTS = {
    r"ids in \[0, 271\), got \[271\]": {"token_ids": torch.tensor([1, 271, 3, 4])},
    r"ids in \[0, 271\), got \[-1\]": {"token_ids": torch.tensor([1, -1, 3, 4])},
    "int64": {"token_ids": torch.tensor([1, 2, 3, 4], dtype=torch.int32)},
    "4 log-probs, or none, got 3": {"logprobs": torch.zeros(3)},
    "at most 4091 tokens after the prompt, got 4092": {
        "token_ids": torch.ones(4092, dtype=torch.int64),
        "logprobs": NOTHING,
    },
    "one weight version": {"weight_versions": ((0, 2, 0), (2, 4, 1))},
    "free pages of 8 tokens, got": {"token_ids": torch.ones(4091, dtype=torch.int64), "logprobs": NOTHING},
}


@pytest.mark.parametrize("match", [*WRONG_GROUPS, *WRONG_ROLLOUTS])
def test_what_does_not_fit_is_refused_by_name(match, hello, make_engine):
    engine, group = hello
    if "pages" in match:
        engine = make_engine(engine.model, kv_memory=1 << 18)
    if match in WRONG_GROUPS:
        wrong = dataclasses.replace(group, request_id="mine", **WRONG_GROUPS[match])
    else:
        rollout = dataclasses.replace(group.rollouts[1], **WRONG_ROLLOUTS[match])
        wrong = dataclasses.replace(group, request_id="mine", rollouts=(group.rollouts[0], rollout))
    with pytest.raises(ValueError, match=f"request 'mine': expected .*({match})"):
        engine.score([group, wrong])
    assert pages_used(engine) == 0


def test_what_is_no_group_is_refused(hello):
    engine, group = hello
    with pytest.raises(ValueError, match="expected a RolloutGroup"):
        engine.score([group.rollouts[0]])


def test_a_group_of_a_vision_model_needs_its_placeholders(make_engine, chat, picture):
    engine = make_engine("qwen2_5_vl")
    (group,) = engine.generate([chat("What?", [picture(56, 56)], max_tokens=2)], strict=True)
    pad = special_id("<|image_pad|>")
    without = dataclasses.replace(group, prompt_ids=torch.where(group.prompt_ids == pad, 65, group.prompt_ids))
    with pytest.raises(ValueError, match=f"request '{group.request_id}': expected 4 image placeholders"):
        engine.score([without])
    with pytest.raises(ValueError, match="grids of the images"):
        engine.score([dataclasses.replace(group, image_grid_thw=None)])


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_scores_while_requests_run(family, requests_of, make_engine):
    """The prompt being half-way through its prefill is the same as a scored one."""
    engine = make_engine(tiny_model(family, seed=5), max_batch_tokens=13)
    requests = requests_of(family)
    groups = engine.generate(requests, strict=True)
    for index, request in enumerate(requests):
        engine.add_request(dataclasses.replace(request, request_id=f"again {index}"))
    again, steps = {}, 0
    while engine.has_unfinished:
        again |= {group.request_id: group for group in engine.step()}
        before, steps = pages_used(engine), steps + 1
        if steps % 3 == 1:
            assert_scores(engine, groups[:2], engine.score(groups[:2]))
        assert pages_used(engine) == before
    assert steps > 8
    for index, group in enumerate(groups):
        for rollout, twin in zip(group.rollouts, again[f"again {index}"].rollouts, strict=True):
            assert rollout.token_ids.tolist() == twin.token_ids.tolist()
            torch.testing.assert_close(rollout.logprobs, twin.logprobs, atol=TOLERANCE, rtol=0)


def test_free_pages_are_what_counts(hello):
    engine, group = hello
    pages = engine._tree.pool.allocate(engine._tree.pool.num_free - 1)
    with pytest.raises(ValueError, match=r"request 'request-0': expected 2 free pages of 8 tokens, got 1 \(kv_memory"):
        engine.score([group])
    engine._tree.pool.free(pages[:1])
    assert_scores(engine, [group], engine.score([group]))
    assert pages_used(engine) == len(pages) - 1


@pytest.mark.parametrize("name", ["forward", "logits", "_embed"])
def test_an_error_leaves_no_page_behind(name, hello, monkeypatch):
    engine, group = hello
    good = engine.score([group, group])

    def broken(*_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, name, broken)
        with pytest.raises(RuntimeError, match="broken"):
            engine.score([group, group])
    assert pages_used(engine) == 0
    for ours, before in zip(engine.score([group, group]), good, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_a_score_waits_for_its_turn(hello):
    engine, group = hello
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(engine.score([group])))
    with engine._desk.turn():
        thread.start()
        thread.join(0.05)
        assert not found
    thread.join(10)
    assert_scores(engine, [group], found)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu")])
def test_modes_of_the_caller_change_nothing(mode, hello):
    engine, group = hello
    expected = engine.score([group])[0]
    with mode():
        found = engine.score([group])[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.requires_grad, ours.is_inference()) == (False, False)
