"""Random batches of valid, nearly valid and absurd requests: each ends well or with an error of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.testing import VOCAB_SIZE, special_id, tiny_model, tiny_processor
from foveate.rollout.types import Request, VisionInputs

Drawn = tuple[tuple[Any, dict], dict]  # prompt and fields of a request, fields of its sampling parameters
IMAGE = special_id("<|image_pad|>")
PATCH_DIM = 3 * 2 * 14 * 14
MAX_TOKENS = 5
GOOD_PICTURES = [np.full((height, width, 3), 9, np.uint8) for height, width in ((1, 1), (30, 60), (70, 9))]

ids = st.integers(0, VOCAB_SIZE - 1)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.just(10**400),
    st.just("x" * 100_000),
)
garbage = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def arrays(shape: Any) -> Any:
    """numpy arrays and tensors of random dtypes, values and shapes."""
    dtypes = st.sampled_from(["uint8", "int64", "float32", "float64", "bool", "complex64", "float16", "uint64"])

    def build(kind: str, dtype: str, size: list[int], value: float) -> Any:
        array = np.full(size, abs(value) if dtype.startswith("u") else value).astype(dtype)
        return array if kind == "numpy" else torch.from_numpy(array)

    values = st.sampled_from([0.0, 1.0, 77.0, -1.0, 1e4])
    return st.builds(build, st.sampled_from(["numpy", "torch"]), dtypes, shape, values)


def pictures() -> Any:
    return st.one_of(
        st.sampled_from(GOOD_PICTURES),
        arrays(st.lists(st.integers(0, 40), max_size=4)),
        st.binary(max_size=40),
        garbage,
    )


def item() -> Any:
    good = st.sampled_from([{"type": "image"}, {"type": "text", "text": "ab"}, {"type": "text", "text": "<|im_end|>"}])
    near = st.fixed_dictionaries({"type": st.sampled_from(["image", "text", "video", 5])}, optional={"text": scalars})
    with_image = pictures().map(lambda image: {"type": "image", "image": image})
    return st.one_of(good, good, near, with_image, scalars)


def prompts() -> Any:
    content = st.one_of(st.text(max_size=6), st.lists(item(), max_size=3), garbage)
    roles = st.sampled_from(["user", "system", "assistant", "", 5, None])
    message = st.fixed_dictionaries({"role": roles}, optional={"content": content, "tool_calls": garbage})
    return st.one_of(
        st.text(max_size=12),
        st.sampled_from(["<|image_pad|>", "<|video_pad|>x", "<|vision_start|><|image_pad|>", "\ud800", "y" * 300]),
        st.lists(ids, min_size=1, max_size=8),
        st.lists(st.one_of(ids, st.integers(), scalars), max_size=5),
        st.lists(message, max_size=3),
        arrays(st.lists(st.integers(0, 6), max_size=3)),
        garbage,
    )


def visions() -> Any:
    def build(grid: list[int], patches: int, dtype: torch.dtype) -> VisionInputs:
        return VisionInputs(torch.zeros(patches, PATCH_DIM).to(dtype), torch.tensor([grid]))

    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32])
    near = st.builds(
        build, st.lists(st.sampled_from([1, 2, 4, -2, 3]), min_size=3, max_size=3), st.integers(0, 17), dtypes
    )
    odd = st.builds(VisionInputs, arrays(st.lists(st.integers(0, 5), max_size=3)) | garbage, garbage)
    return near | odd


def mostly(good: Any, bad: Any) -> Any:
    """`bad` once in ten."""
    return st.integers(0, 9).flatmap(lambda number: bad if number == 9 else good)


def fields_of(valid: dict[str, Any]) -> Any:
    """Up to three of the fields, now and then garbage."""
    names = st.lists(st.sampled_from(sorted(valid)), max_size=3, unique=True)
    return names.flatmap(lambda some: st.fixed_dictionaries({name: mostly(valid[name], garbage) for name in some}))


id_lists = st.lists(mostly(ids, st.integers(-1, 400)), min_size=1, max_size=4)
biases = mostly(st.floats(-50, 50), st.floats())
sampling = fields_of(
    {
        "temperature": mostly(st.sampled_from([0.0, 0.1, 1.0, 2.0]), st.floats()),
        "top_p": mostly(st.floats(0.01, 1), st.floats()),
        "top_k": mostly(st.integers(0, 300), st.integers()),
        "min_p": mostly(st.floats(0, 1), st.floats()),
        "min_tokens": st.integers(0, MAX_TOKENS),
        "stop": st.lists(st.text(min_size=1, max_size=2), max_size=2),
        "seed": st.integers(),
        "stop_token_ids": id_lists,
        "allowed_token_ids": id_lists,
        "banned_token_ids": id_lists,
        "ignore_eos": st.booleans(),
        "repetition_penalty": mostly(st.floats(0.1, 10), st.floats()),
        "presence_penalty": biases,
        "frequency_penalty": biases,
        "logit_bias": st.dictionaries(mostly(ids, st.integers(-1, 300)), biases, max_size=3),
    }
)
request_fields = fields_of(
    {
        "images": st.lists(pictures(), max_size=2),
        "vision": visions(),
        "n": mostly(st.integers(1, 8), st.integers(0, 9)),
        "prefix_len": mostly(st.integers(0, 9), st.integers()),
        "metadata": st.just({}),
    }
)


@pytest.fixture(scope="module")
def shared():
    """An engine, requests without fault, and what they return when they are alone."""
    config = EngineConfig(kv_memory=60 * 2048, page_size=8, max_sequences=8, max_context=200, max_batch_tokens=64)
    engine = Engine(tiny_model("qwen2_5_vl"), tiny_processor(), config)
    params = SamplingParams(max_tokens=MAX_TOKENS, seed=4, ignore_eos=True)
    user = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    good = [
        Request("good", n=2, sampling=params),
        Request(user, images=[np.zeros((60, 60, 3), np.uint8)], sampling=params),
    ]
    expected = [rollout.token_ids for group in engine.generate(good, strict=True) for rollout in group.rollouts]
    return SimpleNamespace(engine=engine, good=good, expected=expected)


def built(drawn: Drawn) -> Request | str:
    """The request, or what a constructor has against it."""
    (prompt, fields), params = drawn
    try:
        return Request(prompt, sampling=SamplingParams(max_tokens=MAX_TOKENS, **params), **fields)
    except ValueError as error:
        return str(error)


def check(shared: SimpleNamespace, batch: list[Drawn]) -> None:
    engine, good = shared.engine, shared.good
    results = [built(drawn) for drawn in batch]
    requests = [result for result in results if isinstance(result, Request)]
    refusals = [result for result in results if isinstance(result, str)]
    assert all(text.startswith("expected ") and ", got " in text and len(text) < 1500 for text in refusals)
    groups = engine.generate([good[0], *requests, good[1]])
    neighbours = [rollout.token_ids for group in (groups[0], groups[-1]) for rollout in group.rollouts]
    assert all(torch.equal(ours, alone) for ours, alone in zip(neighbours, shared.expected, strict=True))
    for request, group in zip(requests, groups[1:-1], strict=True):
        assert group.request is request
        assert len(group.rollouts) == request.n
        if group.error is not None:
            assert type(group.error) is ValueError
            assert str(group.error).startswith(f"request {group.request_id!r}: expected ")
            assert ", got" in str(group.error)
            assert len(str(group.error)) < 1500
            assert {(r.finish_reason, len(r.token_ids)) for r in group.rollouts} == {("error", 0)}
        else:
            assert all(1 <= len(r.token_ids) <= MAX_TOKENS for r in group.rollouts)
            assert all(torch.isfinite(r.logprobs).all() for r in group.rollouts)
    assert engine.memory_report()["kv_pages_used"] == 0
    assert not engine.has_unfinished
    assert not engine._desk.groups


pictured = st.lists(st.sampled_from(GOOD_PICTURES), min_size=1, max_size=2).map(
    lambda images: ("x<|image_pad|>" * len(images), {"images": images})
)
ready = st.sampled_from([(1, 2, 2), (1, 4, 2)]).map(
    lambda grid: (
        [5, *[IMAGE] * (grid[1] * grid[2] // 4), 6],
        {"vision": VisionInputs(torch.full((grid[1] * grid[2], PATCH_DIM), 0.5), torch.tensor([grid]))},
    )
)
plain = st.one_of(st.lists(ids, min_size=1, max_size=8), st.text(min_size=1, max_size=9)).map(lambda p: (p, {}))
requests = st.one_of(st.one_of(plain, pictured, ready), st.tuples(prompts(), request_fields))
BATCHES = st.lists(st.tuples(requests, sampling), min_size=1, max_size=4)
QUIET = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.function_scoped_fixture,
    HealthCheck.large_base_example,
]


@settings(max_examples=250, suppress_health_check=QUIET)
@given(batch=BATCHES)
def test_random_requests(shared, batch):
    check(shared, batch)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=2000, suppress_health_check=QUIET)
@given(batch=BATCHES)
def test_many_random_requests(shared, batch):
    check(shared, batch)


def test_the_engine_is_as_new_after_all(shared):
    """Runs last: requests that came through the whole file have left nothing."""
    report = shared.engine.memory_report()
    fresh = Engine(shared.engine.model, tiny_processor(), shared.engine.config).memory_report()
    assert (report["kv_pages"], report["kv_pages_used"]) == (fresh["kv_pages"], 0)
    (group,) = shared.engine.generate(shared.good[:1], strict=True)
    assert torch.equal(group.rollouts[0].token_ids, shared.expected[0])
