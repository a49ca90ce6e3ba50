"""What a profiler sees of a step: its phases by name, and the kernels as operators."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.phases import phase
from foveate.rollout.testing import tiny_model
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request

STEP = {"schedule", "decode", "prefill", "encode", "first_tokens"}
KERNELS = {"foveate::rms_norm", "foveate::rope_store_kv", "foveate::decode_attention", "foveate::sample"}


def requests() -> list[Request]:
    return [Request([5, 6, 7], n=3, sampling=SamplingParams(max_tokens=4, seed=1, ignore_eos=True))]


def parents_of(found: profile) -> dict[str, set[str]]:
    """Of each of our ranges, the ranges of ours right around it."""
    around: dict[str, set[str]] = {}
    for event in found.events():
        if event.name.startswith("foveate."):
            parent = event.cpu_parent
            while parent is not None and not parent.name.startswith("foveate."):
                parent = parent.cpu_parent
            around.setdefault(event.name, set()).add(parent.name if parent else "")
    return around


def test_the_phases_of_a_step():
    engine = Engine(tiny_model("qwen2"), config=EngineConfig(kv_memory=1 << 22, backend="cpp"))
    (plain,) = engine.generate(requests())
    with profile(activities=[ProfilerActivity.CPU]) as found:
        (group,) = engine.generate(requests())
        engine.score([group])
    around = parents_of(found)
    assert {name for name, parents in around.items() if parents == {"foveate.step"}} == {f"foveate.{n}" for n in STEP}
    assert around["foveate.sample"] == {"foveate.decode", "foveate.first_tokens"}
    assert around["foveate.plan"] == {"foveate.decode", "foveate.prefill", "foveate.score"}
    counts = {event.key: event.count for event in found.key_averages()}
    assert (counts["foveate.step"], counts["foveate.decode"], counts["foveate.first_tokens"]) == (4, 3, 1)
    assert counts.keys() >= KERNELS
    for one, other in zip(plain.rollouts, group.rollouts, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.logprobs, other.logprobs)


def test_the_phases_of_training():
    model = tiny_model("qwen2")
    engine = Engine(model, config=EngineConfig(kv_memory=1 << 22))
    trainer = Trainer(model, engine, lambda group: [0.0, 1.0, 2.0], GRPOConfig(progress="none"))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.train_step(requests())
    around = parents_of(found)
    assert around["foveate.step"] == {"foveate.rollout"}
    assert around.keys() >= {"foveate.reward", "foveate.update", "foveate.sync"}


def test_a_step_reads_what_was_drawn_in_two_copies(monkeypatch):
    """On a GPU each is a wait for the device."""
    engine = Engine(tiny_model("qwen2"), config=EngineConfig(kv_memory=1 << 22))
    for request in requests():
        engine.add_request(request)
    engine.step()
    decode, tolist, read = engine._runner.decode, torch.Tensor.tolist, []

    def counted(tensor):
        read.append(tensor.shape)
        return tolist(tensor)

    def decoded(sequences):
        drawn = decode(sequences)
        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        return drawn

    monkeypatch.setattr(engine._runner, "decode", decoded)
    engine.step()
    assert read == [(3,), (3, 3)]


def test_nothing_is_recorded_without_a_profiler():
    with profile(activities=[ProfilerActivity.CPU]):
        assert isinstance(phase("step"), record_function)
    assert isinstance(phase("step"), nullcontext)
