"""Groups come out once and to their owner, however a run ends; nothing is left behind, nothing global is touched."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request


@pytest.fixture(scope="module")
def vlm():
    return tiny_model("qwen2_5_vl")


@pytest.fixture
def engine(make_engine, vlm):
    return make_engine(vlm, max_sequences=8)


def texts(count: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=6, seed=4, ignore_eos=True)
    return [Request(f"good {i}", n=2, sampling=sampling) for i in range(count)]


def tokens_of(groups) -> list[list[list[int]]]:
    return [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]


def assert_empty(engine: Engine) -> None:
    assert engine.memory_report()["kv_pages_used"] == 0
    assert not engine.has_unfinished
    assert not engine._desk.groups


def test_abort(engine):
    names = [engine.add_request(request) for request in texts(5)]  # the fifth has to wait
    expected = tokens_of(engine.generate(texts(1)))[0]
    assert len(expected[0]) == 6
    done = {group.request_id: group for group in engine.step()}
    assert sorted(done) == names
    names = [engine.add_request(request) for request in texts(5)]
    engine.step()
    engine.step()
    for name in (names[0], names[4]):
        engine.abort(name)
        with pytest.raises(ValueError, match=rf"unfinished request, got '{name}'"):
            engine.abort(name)
    assert engine.has_unfinished
    first = {group.request_id: group for group in engine.step()}
    assert first.keys() == {names[0], names[4]}
    assert tokens_of([first[names[0]]])[0] == [tokens[:2] for tokens in expected]
    assert tokens_of([first[names[4]]])[0] == [[], []]
    assert {r.finish_reason for group in first.values() for r in group.rollouts} == {"abort"}
    assert all(group.error is None for group in first.values())
    rest = []
    while engine.has_unfinished:
        rest += engine.step()
    assert [group.request_id for group in rest] == names[1:4]
    assert {r.finish_reason for group in rest for r in group.rollouts} == {"length"}
    assert_empty(engine)


def test_a_stream_closed_early_leaves_nothing(engine):
    mine = engine.add_request(texts(1)[0])
    stream = engine.stream([*texts(6), Request("quick", sampling=SamplingParams(max_tokens=1))])
    next(stream)
    stream.close()
    groups = []
    while engine.has_unfinished:
        groups += engine.step()
    assert [group.request_id for group in groups] == [mine]
    assert_empty(engine)


def test_a_stream_ends_when_its_caller_steps(engine):
    stream = engine.stream(texts(3))
    engine.add_request(dataclasses.replace(texts(1)[0], sampling=SamplingParams(max_tokens=30)))
    first, taken = next(stream), []
    while engine.has_unfinished:
        taken += engine.step()
    assert len([first, *taken, *stream]) == 4
    assert_empty(engine)


def test_requests_of_others_pass_through_generate(engine):
    """Groups that were added by hand, and a generate within a stream, all come out once, to their owner."""
    expected = tokens_of(engine.generate(texts(4)))
    added = [engine.add_request(request) for request in texts(2)]
    stream = engine.stream(texts(4))
    streamed = [next(stream)]
    assert tokens_of(engine.generate(texts(3), strict=True)) == expected[:3]
    streamed += stream
    assert sorted(tokens_of(streamed)) == sorted(expected)
    groups = []
    while engine.has_unfinished:
        groups += engine.step()
    assert sorted(group.request_id for group in groups) == sorted(added)
    assert_empty(engine)


def test_a_step_that_breaks_off_ends_what_runs(engine, monkeypatch):
    good = texts(3)
    expected = tokens_of(engine.generate(good))
    for name in ("prefill", "first_tokens", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                engine.generate(good)
        assert_empty(engine)
        assert tokens_of(engine.generate(good)) == expected


def global_state() -> tuple:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        logging.getLogger().level,
        len(logging.getLogger().handlers),
    )


def test_running_changes_nothing_global(vlm, make_engine, chat, picture):
    requests = [chat("see", [picture(56, 84)], n=2, max_tokens=5), Request([9999])]
    modes = [module.training for module in vlm.modules()]
    before = global_state()
    engine = make_engine(vlm)
    engine.generate(requests)
    engine.update_weights()
    list(engine.stream(requests))
    assert global_state() == before
    assert [module.training for module in vlm.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in vlm.parameters())


def test_callers_modes_change_nothing(vlm, make_engine, chat, picture):
    """autocast, no_grad, inference mode, another default dtype, a module in training mode."""
    requests = [chat("see", [picture(56, 84)], n=2, max_tokens=8, seed=3), *texts(2)]
    expected = make_engine(vlm).generate(requests)
    modes = [torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), torch.inference_mode()]
    for mode in modes:
        engine = make_engine(vlm)
        with mode:
            groups = engine.generate(requests, strict=True)
        assert tokens_of(groups) == tokens_of(expected)
        for group, other in zip(groups, expected, strict=True):
            assert torch.equal(group.rollouts[0].logprobs, other.rollouts[0].logprobs)
    torch.set_default_dtype(torch.float64)
    try:
        assert tokens_of(make_engine(vlm).generate(requests, strict=True)) == tokens_of(expected)
    finally:
        torch.set_default_dtype(torch.float32)
    vlm.train()
    try:
        assert tokens_of(make_engine(vlm).generate(requests, strict=True)) == tokens_of(expected)
    finally:
        vlm.eval()
