"""When a completion ends and what may be drawn: stop ids, stop strings, token limits, allowed and banned ids."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import special_id, tiny_model
from foveate.rollout.types import Request

EOS = special_id("<|im_end|>")


@pytest.fixture
def letters(processor) -> tuple[int, ...]:
    """One id a letter, "a" to "h"."""
    return tuple(processor.tokenizer("abcdefgh")["input_ids"])


@pytest.fixture
def run(make_engine):
    """(n=.., **SamplingParams fields) -> the rollouts of one request to a fixed tiny model."""
    engine = make_engine("qwen2")

    def one(prompt="Stop it.", n: int = 1, **sampling):
        (group,) = engine.generate([Request(prompt, n=n, sampling=SamplingParams(**sampling))], strict=True)
        return group.rollouts

    return one


def test_stop_ids_end_with_the_token(run):
    free = run(temperature=0, max_tokens=30, ignore_eos=True)[0].token_ids.tolist()
    stop = free[7]
    (rollout,) = run(temperature=0, max_tokens=30, stop_token_ids=(stop, 0), ignore_eos=True)
    assert rollout.token_ids.tolist() == free[: free.index(stop) + 1]
    assert (rollout.finish_reason, rollout.stop_token_id) == ("stop", stop)
    assert len(rollout.logprobs) == len(rollout.entropy) == len(rollout.token_ids)


def test_eos_of_the_generation_config(make_engine):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [EOS, 70]
    engine = make_engine(model)
    for eos in (EOS, 70):
        sampling = SamplingParams(max_tokens=4, allowed_token_ids=(eos,))
        ended, ignored = engine.generate(
            [Request("x", sampling=s) for s in (sampling, dataclasses.replace(sampling, ignore_eos=True))]
        )
        assert ended.rollouts[0].token_ids.tolist() == [eos]
        assert (ended.rollouts[0].finish_reason, ended.rollouts[0].stop_token_id) == ("stop", eos)
        assert ended.rollouts[0].text == ""
        assert ignored.rollouts[0].token_ids.tolist() == [eos] * 4
        assert (ignored.rollouts[0].finish_reason, ignored.rollouts[0].stop_token_id) == ("length", None)


def test_stop_ids_are_added_to_eos(run):
    rollouts = run(n=20, max_tokens=40, allowed_token_ids=(EOS, 65, 66), stop_token_ids=(65,))
    assert {rollout.stop_token_id for rollout in rollouts} == {EOS, 65}


@pytest.mark.parametrize("min_tokens", [0, 1, 5])
def test_min_tokens_as_transformers(min_tokens, make_engine):
    """transformers' min_new_tokens: no stop id among the first min_tokens tokens."""
    model = tiny_model("qwen2")
    engine = make_engine(model)
    free = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    stop = int(engine.generate([Request("Stop it.", sampling=free)])[0].rollouts[0].token_ids[2])
    sampling = dataclasses.replace(free, min_tokens=min_tokens, stop_token_ids=(stop,))
    (group,) = engine.generate([Request("Stop it.", sampling=sampling)])
    ids = group.prompt_ids[None]
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=min_tokens,
        eos_token_id=stop,
        suppress_tokens=list(range(263, 271)),
    )
    assert group.rollouts[0].token_ids.tolist() == expected[0, ids.shape[1] :].tolist()


def test_min_tokens_holds_back_stop_ids_and_counts_in_log_kept(run):
    for rollout in run(n=16, min_tokens=3, max_tokens=9, allowed_token_ids=(EOS, 65)):
        tokens = rollout.token_ids.tolist()
        assert tokens[:3] == [65] * 3
        assert EOS not in tokens[:-1]
        torch.testing.assert_close(rollout.behaviour_logprobs[:3], torch.zeros(3), atol=1e-6, rtol=0)
        assert (rollout.behaviour_logprobs[3:] < 0).all()


@pytest.mark.parametrize("count", [1, 2, 8, 9])
def test_max_tokens_around_a_page(count, run):
    for rollout in run(n=3, max_tokens=count, ignore_eos=True):
        assert (len(rollout.token_ids), rollout.finish_reason) == (count, "length")


def test_a_stop_id_as_the_last_token_is_a_stop(run):
    (rollout,) = run(max_tokens=1, allowed_token_ids=(EOS,))
    assert (rollout.finish_reason, rollout.stop_token_id) == ("stop", EOS)


def first_end(text: str, stops: tuple[str, ...]) -> int:
    """Length of the shortest prefix of text that has a stop string in it; of the whole text if none."""
    return next((end for end in range(len(text) + 1) if any(s in text[:end] for s in stops)), len(text))


@pytest.mark.parametrize("stop", [("ab",), ("a",), ("gh", "hg", "ccc"), "dd"])
def test_stop_strings(stop, run, letters):
    """Letters are one token each, so text and tokens end together."""
    stops = (stop,) if isinstance(stop, str) else stop
    rollouts = run(n=12, max_tokens=60, allowed_token_ids=letters, stop=stop, seed=2)
    free = run(n=12, max_tokens=60, allowed_token_ids=letters, seed=2)
    for rollout, whole in zip(rollouts, free, strict=True):
        end = first_end(whole.text, stops)
        assert rollout.token_ids.tolist() == whole.token_ids.tolist()[:end]
        found = any(s in whole.text for s in stops)
        assert (rollout.finish_reason, rollout.stop_token_id) == ("stop" if found else "length", None)
        cut = min((whole.text[:end].find(s) for s in stops if s in whole.text[:end]), default=end)
        assert rollout.text == whole.text[:cut]
    assert any(rollout.finish_reason == "stop" for rollout in rollouts)


def test_stop_string_of_several_tokens_to_a_character(run, processor):
    both = processor.tokenizer("é")["input_ids"]
    assert len(both) == 2
    ended = []
    for rollout in run(n=12, max_tokens=6, allowed_token_ids=both, stop=("é",), seed=1):
        tokens = rollout.token_ids.tolist()
        pairs = [tokens[i : i + 2] for i in range(len(tokens) - 1)]
        assert both not in pairs[:-1]
        assert (rollout.finish_reason == "stop") == (tokens[-2:] == both)
        assert "é" not in rollout.text
        ended.append(rollout.finish_reason)
    assert set(ended) == {"stop", "length"}


def test_stop_strings_wait_for_min_tokens(run, letters):
    for rollout in run(n=8, min_tokens=6, max_tokens=20, allowed_token_ids=letters[:2], stop=("a",), seed=1):
        assert len(rollout.token_ids) >= 6


def test_text_leaves_special_tokens_out(run, letters):
    allowed = (special_id("<|im_start|>"), special_id("<|endoftext|>"), *letters)
    for rollout in run(n=8, max_tokens=20, allowed_token_ids=allowed, seed=4):
        assert rollout.text == "".join("abcdefgh"[letters.index(i)] for i in rollout.token_ids.tolist() if i in letters)


def test_allowed_and_banned_ids(run, letters):
    rollouts = run(n=30, max_tokens=10, allowed_token_ids=letters, banned_token_ids=letters[:3], temperature=1.3)
    drawn = {token for rollout in rollouts for token in rollout.token_ids.tolist()}
    assert drawn == set(letters[3:])


@pytest.mark.parametrize("ban", [True, False])
def test_vision_ids_are_banned_by_default(ban, make_engine):
    """A model that draws nothing but vision pads and ids beyond the tokenizer, if it may."""
    model = tiny_model("qwen2_5_vl", tie_word_embeddings=False)
    config = model.config
    pads = [config.image_token_id, config.video_token_id, config.vision_start_token_id, *range(263, 271)]
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(271).index_fill(0, torch.tensor(pads), 100.0))
    engine = make_engine(model, ban_vision_tokens=ban)
    (group,) = engine.generate([Request("x", n=8, sampling=SamplingParams(max_tokens=8))])
    drawn = {token for rollout in group.rollouts for token in rollout.token_ids.tolist()}
    assert drawn.isdisjoint(pads) if ban else drawn <= set(pads)
    for rollout in group.rollouts:
        assert (rollout.log_kept < -50).all() if ban else (rollout.log_kept == 0).all()
