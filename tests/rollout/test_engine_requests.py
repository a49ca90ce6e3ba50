"""Batches of requests: results independent of the company, prompts computed and held once, nothing left behind."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.pages import pages_for
from foveate.rollout.testing import special_id, tiny_model
from foveate.rollout.types import Request

PAGE = 8
TOLERANCE = 5e-5


def tokens_of(group) -> list[list[int]]:
    return [rollout.token_ids.tolist() for rollout in group.rollouts]


def assert_same(group, other) -> None:
    """The same tokens, log-probs within the tolerance."""
    assert group.error is None
    assert tokens_of(group) == tokens_of(other)
    for rollout, twin in zip(group.rollouts, other.rollouts, strict=True):
        for name in ("logprobs", "log_kept", "entropy"):
            torch.testing.assert_close(getattr(rollout, name), getattr(twin, name), atol=TOLERANCE, rtol=0)


def assert_empty(engine) -> None:
    """No page, sample or group is left."""
    assert engine.memory_report()["kv_pages_used"] == engine.memory_report()["kv_used"] == 0
    assert (engine.stats()["running"], engine.stats()["waiting"], engine.has_unfinished) == (0, 0, False)


@pytest.fixture
def many_requests(chat, picture):
    """64 different requests with seeds: texts, ids and images, n of 1 to 3, several filters."""

    def make() -> list[Request]:
        draw = random.Random(0)
        requests = []
        for index in range(64):
            sampling = {
                "temperature": draw.choice([0.7, 1.0, 1.3, 0]),
                "top_p": draw.choice([1.0, 0.9]),
                "top_k": draw.choice([0, 0, 30]),
                "max_tokens": draw.randint(1, 14),
                "seed": draw.choice([index, -index, 2**64 + index]),
            }
            images = [
                picture(56, 28 * draw.randint(2, 4), draw.randint(0, 5)) for _ in range(draw.choice([0, 0, 1, 2]))
            ]
            if draw.random() < 0.5:
                ids = [draw.randrange(256) for _ in range(draw.randint(1, 40))]
                requests.append(Request(ids, n=draw.randint(1, 3), sampling=SamplingParams(**sampling)))
            else:
                system = draw.choice([None, "One.", "Another one."])
                requests.append(chat("?" * draw.randint(1, 9), images, system, draw.randint(1, 3), **sampling))
        return requests

    return make


def test_alone_and_among_63_others(make_engine, many_requests):
    model = tiny_model("qwen2_5_vl")
    requests = many_requests()
    engine = make_engine(model)
    together = engine.generate(requests, strict=True)
    order = random.Random(1).sample(range(64), 64)
    shuffled = make_engine(model, page_size=3, max_batch_tokens=70, max_sequences=17, fuse=False)
    for index, group in zip(order, shuffled.generate([requests[i] for i in order], strict=True), strict=True):
        assert_same(group, together[index])
    for index in range(0, 64, 7):
        (alone,) = engine.generate([requests[index]], strict=True)
        assert_same(alone, together[index])
    assert_empty(engine)
    assert_empty(shuffled)


def test_requests_without_a_seed_are_reproducible(make_engine):
    requests = [Request("same prompt", n=3, sampling=SamplingParams(max_tokens=10)) for _ in range(3)]
    first, second, other = (make_engine("llama"), make_engine("llama"), make_engine("llama", seed=1))
    groups = first.generate(requests)
    for group, twin in zip(groups, second.generate(requests), strict=True):
        assert tokens_of(group) == tokens_of(twin)
    assert len({tuple(tokens) for group in groups for tokens in tokens_of(group)}) == 9
    assert tokens_of(first.generate(requests)[0]) != tokens_of(groups[0])
    assert tokens_of(other.generate(requests)[0]) != tokens_of(groups[0])


def test_a_seed_fixes_the_samples_whatever_n_is(make_engine):
    engine = make_engine("qwen3")
    sampling = SamplingParams(max_tokens=10, seed=-5)
    two, five = engine.generate([Request("seeded", n=n, sampling=sampling) for n in (2, 5)])
    assert tokens_of(five)[:2] == tokens_of(two)
    assert len({tuple(tokens) for tokens in tokens_of(five)}) == 5


def test_prompt_of_a_group_is_computed_and_held_once(make_engine, chat, picture):
    engine = make_engine("qwen2_5_vl", page_size=PAGE)
    request = chat("How many?", [picture(84, 84)], n=16, max_tokens=PAGE + 3, ignore_eos=True)
    engine.add_request(request)
    engine.step()
    prompt_pages = engine.memory_report()["kv_pages_used"] - 16  # each sample has its first page
    assert (engine.stats()["running"], engine.stats()["tokens"]) == (16, 16)  # those of samples that still run count
    engine.step()
    assert engine.memory_report()["kv_pages_used"] == prompt_pages + 16
    peak = 0
    groups = []
    while engine.has_unfinished:
        peak = max(peak, engine.memory_report()["kv_pages_used"])
        groups += engine.step()
    (group,) = groups
    lengths = group.segments.tolist()
    assert len(lengths) == 2
    assert sum(lengths) == len(group.prompt_ids) == engine.stats()["prefilled_tokens"]
    assert prompt_pages == sum(pages_for(length, PAGE) for length in lengths)
    assert peak == prompt_pages + 2 * 16
    assert engine.stats()["images_encoded"] == 1
    assert engine.stats()["tokens"] == 16 * (PAGE + 3)
    assert_empty(engine)


def test_equal_prompts_of_a_batch_share_segments(make_engine, chat, picture):
    engine = make_engine("qwen2_5_vl")
    sampling = {"max_tokens": 6, "seed": 3}
    image = picture(84, 84)
    requests = [chat("Equal.", [image], **sampling), chat("Equal.", [image.copy()], n=2, **sampling)]
    requests.append(chat("Another end.", [image], **sampling))
    groups = engine.generate(requests, strict=True)
    system = int(groups[0].segments[0])
    assert engine.stats()["prefilled_tokens"] == len(groups[0].prompt_ids) + len(groups[2].prompt_ids) - system
    assert engine.stats()["shared_segments"] == 3
    assert engine.stats()["images_encoded"] == 1
    assert tokens_of(groups[1])[0] == tokens_of(groups[0])[0]
    assert_empty(engine)


def test_equal_ids_with_other_images_share_nothing_but_the_prefix(make_engine, chat, picture, assert_logprobs):
    engine = make_engine("qwen2_5_vl")
    requests = [chat("Same text.", [picture(84, 84, seed)], max_tokens=6, seed=3) for seed in (1, 2)]
    groups = engine.generate(requests, strict=True)
    assert torch.equal(groups[0].prompt_ids, groups[1].prompt_ids)
    assert engine.stats()["shared_segments"] == 1
    assert_logprobs(engine.model, groups)
    assert not torch.equal(groups[0].rollouts[0].logprobs, groups[1].rollouts[0].logprobs)


def test_full_prefix_hit_while_the_first_request_runs(make_engine, assert_logprobs):
    """A later request finds the whole prompt, one finds a prefix of it, and one is that prefix."""
    engine = make_engine("llama")
    text = "A prompt of some length."
    sampling = SamplingParams(max_tokens=12, seed=8, ignore_eos=True)
    request = Request(text, n=2, sampling=sampling, prefix_len=10)
    engine.add_request(request)
    engine.step()
    engine.step()
    before = engine.stats()["prefilled_tokens"]
    later = [
        request,
        dataclasses.replace(request, prompt=text[:10] + "!?"),
        dataclasses.replace(request, prompt=text[:10]),
    ]
    for one in later:
        engine.add_request(one)
    groups = []
    while engine.has_unfinished:
        groups += engine.step()
    assert before == len(text)
    assert engine.stats()["prefilled_tokens"] == len(text) + 2
    assert_logprobs(engine.model, groups)
    assert_same(groups[0], groups[1])
    assert_empty(engine)


def test_features_are_kept_within_their_budget(make_engine, chat, picture):
    model = tiny_model("qwen2_5_vl")
    image, other = picture(56, 56, 1), picture(56, 56, 2)
    requests = [chat("a", [image, image], max_tokens=1), chat("b", [image], max_tokens=1)]
    engine = make_engine(model)
    for _ in range(2):
        engine.generate(requests, strict=True)
    assert (engine.stats()["images_encoded"], engine.stats()["image_hits"]) == (1, 1)
    one = engine.memory_report()["vision_cache"]
    assert one == 4 * model.config.text_config.hidden_size * 4  # 4 tokens, float32

    small = make_engine(model, vision_cache_memory=one)
    for picked in (image, other, image, image):
        small.generate([chat("c", [picked], max_tokens=1)], strict=True)
        assert small.memory_report()["vision_cache"] == one
    assert (small.stats()["images_encoded"], small.stats()["image_hits"]) == (3, 1)

    none = make_engine(model, vision_cache_memory=0)
    for _ in range(2):
        none.generate(requests, strict=True)
    assert (none.stats()["images_encoded"], none.memory_report()["vision_cache"]) == (2, 0)


def test_a_small_pool_and_few_slots_only_take_longer(make_engine, many_requests):
    """Room for little more than the largest request: groups wait, and nothing changes."""
    model = tiny_model("qwen2_5_vl")
    requests = many_requests()[:24]
    large = make_engine(model)
    expected = large.generate(requests, strict=True)
    bytes_a_page = large.memory_report()["kv_capacity"] // large.memory_report()["kv_pages"]
    small = make_engine(model, kv_memory=24 * bytes_a_page, max_sequences=3)
    for group, other in zip(small.generate(requests, strict=True), expected, strict=True):
        assert_same(group, other)
    assert small.stats()["steps"] > 2 * large.stats()["steps"]
    assert_empty(small)


def test_by_hand_as_by_generate(make_engine, many_requests):
    requests = many_requests()[:9]
    model = tiny_model("qwen2_5_vl")
    expected = make_engine(model).generate(requests)
    engine = make_engine(model)
    names, groups = [], {}
    for request in requests:  # one more request at each step
        names.append(engine.add_request(request))
        groups |= {group.request_id: group for group in engine.step()}
    while engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
    assert engine.step() == []
    for name, request, other in zip(names, requests, expected, strict=True):
        assert groups[name].request is request
        assert_same(groups[name], other)
    assert_empty(engine)


def test_stream_yields_groups_as_they_finish(make_engine):
    engine = make_engine("llama")
    lengths = [9, 2, 5]
    requests = [
        Request("x", request_id=str(n), sampling=SamplingParams(max_tokens=n, ignore_eos=True)) for n in lengths
    ]
    assert [group.request_id for group in engine.stream(requests)] == ["2", "5", "9"]
    assert [group.request_id for group in engine.generate(requests)] == ["9", "2", "5"]
    assert engine.generate([]) == []
    assert_empty(engine)


def test_what_a_trainer_gets(make_engine, chat, picture):
    engine = make_engine("qwen2_5_vl")
    request = dataclasses.replace(
        chat("What?", [picture(56, 84)], n=2, max_tokens=5, ignore_eos=True), metadata={"a": 1}
    )
    (group,) = engine.generate([request])
    assert group.request is request
    assert group.error is group.keep is None
    length = len(group.prompt_ids)
    tensors = {
        "prompt_ids": (group.prompt_ids, torch.int64, (length,)),
        "prompt_positions": (group.prompt_positions, torch.int32, (3, length)),
        "segments": (group.segments, torch.int32, (2,)),
        "image_grid_thw": (group.image_grid_thw, torch.int64, (1, 3)),
        "pixel_values": (group.pixel_values, torch.float32, (24, 1176)),
    }
    for index, rollout in enumerate(group.rollouts):
        assert rollout.weight_versions == ((0, 5, 0),)
        assert (rollout.finish_reason, rollout.stop_token_id) == ("length", None)
        tensors[f"token_ids {index}"] = (rollout.token_ids, torch.int64, (5,))
        for name in ("logprobs", "log_kept", "entropy", "behaviour_logprobs"):
            tensors[f"{name} {index}"] = (getattr(rollout, name), torch.float32, (5,))
    for name, (tensor, dtype, shape) in tensors.items():
        assert (tensor.dtype, tuple(tensor.shape), tensor.device.type) == (dtype, shape, "cpu"), name
        assert tensor.is_contiguous() and not tensor.is_inference() and not tensor.requires_grad, name  # noqa: PT018


def test_from_pretrained(make_engine, processor, tmp_path, chat, picture):
    from foveate.rollout.engine import Engine

    for family, images in (("qwen2_5_vl", [picture(84, 56)]), ("qwen3", [])):
        path, model = tmp_path / family, tiny_model(family)
        model.save_pretrained(path)
        processor.tokenizer.save_pretrained(path)
        if images:
            processor.image_processor.save_pretrained(path)
        engine = make_engine(model)
        loaded = Engine.from_pretrained(path, dataclasses.replace(engine.config))
        with pytest.raises(ValueError, match=r"expected an EngineConfig or None, got \{'page_size': 4\} \(config\)"):
            Engine.from_pretrained(path, {"page_size": 4})
        requests = [chat("Loaded?", images, n=2, max_tokens=6, seed=1)]
        assert_same(loaded.generate(requests, strict=True)[0], engine.generate(requests, strict=True)[0])
        assert loaded._intake.eos_ids == {special_id("<|im_end|>")}


def test_scalars_of_numpy_are_numbers(make_engine):
    """As they come from a data loader's arrays."""
    sampling = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(1), seed=np.int32(5))
    request = Request([1, 2], n=np.int64(2), prefix_len=np.int64(1), sampling=sampling)
    assert [type(value) for value in (request.n, request.prefix_len, sampling.max_tokens)] == [int] * 3
    (group,) = make_engine("qwen3").generate([request], strict=True)
    assert len(group.rollouts) == 2
