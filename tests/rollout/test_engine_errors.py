"""What cannot run is refused by name, what fails takes nobody with it, and nothing is left behind."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
import pickle
import re

import numpy as np
import pytest
import torch

from foveate.rollout.config import EngineConfig, PruneConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.testing import FAMILIES, special_id, tiny_model, tiny_processor
from foveate.rollout.types import Request, RequestError, VisionInputs

IMAGE, VIDEO = special_id("<|image_pad|>"), special_id("<|video_pad|>")
PATCH_DIM = 3 * 2 * 14 * 14
GRID = torch.tensor([[1, 4, 4]])
PIXELS = torch.zeros(16, PATCH_DIM)


@pytest.fixture(scope="module")
def vlm():
    return tiny_model("qwen2_5_vl")


@pytest.fixture
def engine(make_engine, vlm):
    return make_engine(vlm, max_sequences=8, max_context=200)


def texts(count: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=6, seed=4, ignore_eos=True)
    return [Request(f"good {i}", n=2, sampling=sampling) for i in range(count)]


def tokens_of(groups) -> list[list[list[int]]]:
    return [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]


def assert_empty(engine: Engine) -> None:
    assert engine.memory_report()["kv_pages_used"] == 0
    assert not engine.has_unfinished
    assert not engine._desk.groups


def pictured(ids, pixels=PIXELS, grid=GRID, **fields) -> dict:
    return {"prompt": ids, "vision": VisionInputs(pixels, grid), **fields}


USER = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]


@pytest.mark.parametrize("requests", ["text", [None], [5], [{"prompt": "x"}], [[5, 6]]], ids=str)
def test_what_is_no_request(requests, engine):
    """There is no group to hold the error: the whole call raises, and takes back what it added."""
    for call in (engine.generate, lambda given: list(engine.stream(given))):
        with pytest.raises(ValueError, match=rf"expected a Request, got {re.escape(repr(requests[0]))} \(requests\)"):
            call([*texts(1), *requests])
        assert_empty(engine)
    with pytest.raises(ValueError, match="expected a Request, got"):
        engine.add_request(requests[0])
    assert_empty(engine)


def test_one_where_several_are_asked_for(engine):
    """A list was forgotten: the call says so, before anything runs."""
    (request,) = texts(1)
    for call in (engine.generate, lambda given: list(engine.stream(given))):
        with pytest.raises(ValueError, match=r"several requests, as \[request\], got a Request \(requests\)"):
            call(request)
    with pytest.raises(ValueError, match="got a Request"):
        asyncio.run(engine.generate_async(request))
    groups = engine.generate([request])
    with pytest.raises(ValueError, match=r"several groups, as \[group\], got a RolloutGroup \(groups\)"):
        engine.score(groups[0])
    with pytest.raises(ValueError, match=r"names with tensors, got Qwen2_5_VL.* \(update_weights\)"):
        engine.update_weights(engine.model)
    assert engine.weight_version == 0
    assert_empty(engine)


def test_arguments_in_another_place(vlm):
    """A configuration, a name or a bare image processor is no processor; a dict is no configuration."""
    config, processor = EngineConfig(kv_memory=1 << 20), tiny_processor()
    for given in (config, "processor", processor.image_processor):
        with pytest.raises(ValueError, match=r"a tokenizer, or what has .*, or None, got .* \(processor\)"):
            Engine(vlm, given)
    with pytest.raises(ValueError, match=r"an EngineConfig or None, got \{'page_size': 4\} \(config\)"):
        Engine(vlm, processor, {"page_size": 4})


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_is_not_copied(copied, engine):
    """It reads one model's parameters in place: a copy would share its pages, or hold the model twice."""
    with pytest.raises(TypeError, match="got an Engine to copy"):
        copied(engine)


@pytest.mark.parametrize("request_id", ["nobody", None, 5, ["x"]], ids=str)
def test_aborting_what_is_not_there(request_id, engine):
    with pytest.raises(ValueError, match=rf"unfinished request, got {re.escape(repr(request_id))} \(request_id\)"):
        engine.abort(request_id)


def test_strict_raises_when_all_have_ended(engine):
    good = texts(3)
    expected = tokens_of(engine.generate(good))
    with pytest.raises(RequestError, match=r"2 of 5 requests failed.*'x'.*got 999") as caught:
        engine.generate([*good, Request([999], request_id="x"), Request([-1])], strict=True)
    assert tokens_of(caught.value.groups[:3]) == expected
    assert [group.error is None for group in caught.value.groups] == [True] * 3 + [False] * 2
    assert_empty(engine)


def test_text_models_take_no_images(make_engine):
    engine = make_engine("llama")
    for fields in ({"images": [np.zeros((56, 56, 3), np.uint8)]}, {"vision": VisionInputs(PIXELS, GRID)}):
        with pytest.raises(ValueError, match="expected no images for a text model"):
            engine.add_request(Request("x", **fields))


def test_what_needs_a_processor(vlm):
    engine = Engine(vlm, None, EngineConfig(kv_memory=1 << 20))
    for fields, message in (
        ({"prompt": "text"}, "no tokenizer"),
        ({"prompt": USER}, "no tokenizer"),
        ({"prompt": [1], "images": [np.zeros((56, 56, 3), np.uint8)]}, "no image processor"),
        (
            {"prompt": [1], "sampling": SamplingParams(stop=("x",))},
            "no stop strings, because the engine has no tokenizer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_request(Request(**fields))
    (group,) = engine.generate([Request(**pictured([1, *[IMAGE] * 4, 2]), sampling=SamplingParams(max_tokens=2))])
    assert group.rollouts[0].text == ""


def test_duplicate_ids(engine):
    one = dataclasses.replace(texts(3)[0], request_id="same")
    unnamed = texts(1)
    groups = engine.generate([one, one, Request([-1]), *unnamed, *unnamed])
    assert [group.error is None for group in groups] == [True, False, False, True, True]
    assert len({group.request_id for group in groups}) == 4
    assert groups[2].request_id in str(groups[2].error)
    assert "'same': expected an id that is not in use" in str(groups[1].error)
    engine.add_request(one)
    engine.abort("same")  # ended, but not handed out yet
    (group,) = engine.generate([one])
    assert "not in use" in str(group.error)
    assert [group.request_id for group in engine.step()] == ["same"]
    assert engine.generate([one])[0].error is None  # handed out: free again
    assert_empty(engine)


def test_pool_too_small(make_engine, vlm):
    full = make_engine(vlm).memory_report()
    engine = make_engine(vlm, kv_memory=4 * full["kv_capacity"] // full["kv_pages"])  # pages of 8 tokens
    fits = Request([1] * 16, n=2, sampling=SamplingParams(max_tokens=9))
    assert engine.generate([fits], strict=True)[0].error is None
    for fields in ({"prompt": [1] * 17}, {"n": 3}, {"sampling": SamplingParams(max_tokens=18)}):
        with pytest.raises(ValueError, match=r"fits into 4 pages of 8 tokens.*got one of [56] pages \(kv_memory\)"):
            engine.add_request(dataclasses.replace(fits, **fields))
    with pytest.raises(ValueError, match=r"at least one page of \d+ bytes, got 9 \(kv_memory\)"):
        make_engine(vlm, kv_memory=9)


def test_max_tokens_are_cut_by_the_context(engine, caplog):
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    with caplog.at_level(logging.WARNING, "foveate"):
        groups = engine.generate([Request([1] * length, sampling=params) for length in (150, 151, 199)])
    assert [len(group.rollouts[0].token_ids) for group in groups] == [50, 49, 1]
    assert {group.rollouts[0].finish_reason for group in groups} == {"length"}
    assert [record.getMessage() for record in caplog.records] == [
        "request 'request-1': max_tokens cut from 50 to 49 by the context of 200",
        "request 'request-2': max_tokens cut from 50 to 1 by the context of 200",
    ]


def test_nan_in_one_picture_fails_that_request_alone(engine, chat, picture):
    good = [chat("fine", [picture(56, 56)], max_tokens=5, seed=1, n=2), *texts(3)]
    expected = tokens_of(engine.generate(good, strict=True))
    engine._runner.vision.clear()
    # Finite, but their squares are not.
    bad = Request(**pictured([1, *[IMAGE] * 4, 2], torch.full_like(PIXELS, 3e38)), n=2, request_id="nan")
    groups = engine.generate([good[0], bad, *good[1:]])
    assert "request 'nan': expected finite logits" in str(groups[1].error)
    assert [(r.finish_reason, len(r.token_ids)) for r in groups[1].rollouts] == [("error", 0)] * 2
    assert torch.equal(groups[1].prompt_ids, torch.tensor([1, *[IMAGE] * 4, 2]))
    assert tokens_of([groups[0], *groups[2:]]) == expected
    assert tokens_of(engine.generate(good, strict=True)) == expected
    assert_empty(engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_after_some_tokens(family, make_engine):
    """An embedding row that is NaN spoils the prompts that hold its id and the samples that draw it."""
    model = tiny_model(family)
    engine = make_engine(model)
    letter = engine._processor.tokenizer("~")["input_ids"][0]
    ban = SamplingParams(max_tokens=20, seed=1, banned_token_ids=(letter,), ignore_eos=True)
    good = [Request(f"good {i}", n=2, sampling=ban) for i in range(3)]
    expected = tokens_of(engine.generate(good, strict=True))
    with torch.no_grad():
        model.get_input_embeddings().weight[letter] = torch.nan
    force = dataclasses.replace(ban, banned_token_ids=(), allowed_token_ids=(letter,))
    bad = [Request("a ~", n=2, sampling=ban), Request("draws it", n=2, sampling=force)]
    groups = engine.generate([bad[0], *good, bad[1]])
    assert tokens_of(groups[1:4]) == expected
    for group in (groups[0], groups[4]):
        assert "expected finite logits" in str(group.error)
        assert tokens_of([group]) == [[[], []]]
    assert tokens_of(engine.generate(good, strict=True)) == expected
    assert_empty(engine)


MODELS = {
    "sliding window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        r"full attention.*sliding_attention \(layer 1\)",
    ),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_type one of .*'dynamic'",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_unsupported_models(case, make_engine):
    family, fields, message = MODELS[case]
    with pytest.raises(ValueError, match=message):
        make_engine(tiny_model(family, **fields))


def test_unsupported_families_and_config(make_engine, vlm):
    import transformers as hf

    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    for model, name in ((gpt2, "gpt2"), (torch.nn.Linear(2, 2), "Linear")):
        with pytest.raises(ValueError, match=rf"a model of one of .*qwen2_5_vl.*, got '{name}' \(model\)"):
            make_engine(model)
    with pytest.raises(ValueError, match=r"model's device cpu, got 'meta' \(device\)"):
        make_engine(vlm, device="meta")
    for backend, reason in (
        ("cuda", "CUDA tensors"),
        ("numpy", "expected one of"),
        ("layers=numpy", "family=backend"),
    ):
        with pytest.raises(ValueError, match=rf"got '{backend}'.*{reason}|{reason}.*got '{backend}'"):
            make_engine(vlm, backend=backend)
    assert make_engine(vlm, device="cpu").shares_weights
    with pytest.raises(ValueError, match=r"a parameter with data, got one on meta \(model.embed_tokens.weight\)"):
        make_engine(tiny_model("llama").to("meta"))
    with pytest.raises(ValueError, match=r"a layer from 1 to 1, got 2 \(prune.layer\)"):
        make_engine(vlm, prune=PruneConfig("fastv"))


@pytest.mark.parametrize("name", ["interrupt", "resume", "sleep", "wake"])
def test_promised_names(name, engine):
    with pytest.raises(NotImplementedError, match=f"Engine.{name} comes with a later release"):
        getattr(engine, name)()
