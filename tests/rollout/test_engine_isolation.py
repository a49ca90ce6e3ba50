"""What callers do to the engine's surroundings: hostile inputs, other modes, swapped weights, broken tokenizers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.processor import Processor
from foveate.rollout.testing import special_id, tiny_model, tiny_processor
from foveate.rollout.text import LONGEST_CHARACTER, TextDecoder
from foveate.rollout.types import Request, VisionInputs


def greedy(prompt, max_tokens: int = 6, **fields) -> Request:
    return Request(prompt, sampling=SamplingParams(temperature=0, max_tokens=max_tokens), **fields)


def tokens(groups) -> list[list[int]]:
    return [rollout.token_ids.tolist() for group in groups for rollout in group.rollouts]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_bitwise(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, expected[name])]
    assert not changed


HOSTILE = {
    "lone surrogate": {"prompt": "a\ud800b"},
    "content of another type": {"prompt": [{"role": "user", "content": 5}]},
    "pixels of another type": {"prompt": [1], "vision": VisionInputs(object(), torch.ones(1, 3))},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_request_fails_alone(fields, make_engine):
    engine = make_engine("qwen2_5_vl")
    good = [greedy("one"), greedy("two")]
    alone = tokens(engine.generate(good))
    groups = engine.generate([good[0], greedy(**fields), good[1]])
    assert isinstance(groups[1].error, ValueError)
    assert tokens([groups[0], groups[2]]) == alone
    assert engine.memory_report()["kv_pages_used"] == 0


@pytest.mark.parametrize("fields", [{"temperature": 1e39}, {"top_p": 1e-50}, {"top_k": 2**63}], ids=str)
def test_parameters_beyond_float32_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SamplingParams(**fields)


@pytest.mark.parametrize("fields", [{"prefix_len": 2.5}, {"request_id": 7}, {"request_id": []}], ids=str)
def test_fields_of_another_type_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Request("hi", **fields)


def test_end_ids_beyond_the_vocabulary_are_never_drawn(make_engine):
    model = tiny_model("qwen2")
    model.generation_config.eos_token_id = [special_id("<|im_end|>"), 10**6]
    sampling = SamplingParams(max_tokens=4, min_tokens=2, seed=0)
    (group,) = make_engine(model).generate([Request("hi", sampling=sampling)], strict=True)
    assert len(group.rollouts[0].token_ids) >= 2


def test_weights_may_be_swapped_and_swapped_back(make_engine):
    model, other = tiny_model("qwen2"), tiny_model("qwen2", seed=1)
    engine = make_engine(model)
    mine, theirs = parameters(model), parameters(other)
    before = tokens(engine.generate([greedy("see")]))

    def swap() -> None:
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            a.data, b.data = b.data, a.data
        engine.update_weights()

    swap()
    assert tokens(engine.generate([greedy("see")])) == tokens(
        make_engine(copy.deepcopy(model)).generate([greedy("see")])
    )
    swap()
    assert tokens(engine.generate([greedy("see")])) == before
    assert_bitwise(model, mine)
    assert_bitwise(other, theirs)


def test_named_weights_of_a_shadow_survive_a_move(make_engine):
    engine = make_engine(model := tiny_model("qwen2"), dtype=torch.bfloat16)
    old = tokens(engine.generate([greedy("see")]))
    engine.update_weights(tiny_model("qwen2", seed=1).state_dict())
    new = tokens(engine.generate([greedy("see")]))
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    after = tokens(engine.generate([greedy("see")]))
    assert new != old
    # The moved norm is read anew, the rest stays what the update wrote.
    expected = tiny_model("qwen2", seed=1)
    expected.model.norm.weight.data.copy_(model.model.norm.weight)
    assert after == tokens(make_engine(expected, dtype=torch.bfloat16).generate([greedy("see")]))


def test_pixels_are_the_requests_own_from_the_start(make_engine, processor, picture):
    engine = make_engine("qwen2_5_vl")
    inputs = processor.image_processor(images=[picture(56, 84)], return_tensors="pt")
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    ids = [1, *[special_id("<|image_pad|>")] * (int(grid.prod()) // 4), 2]
    original = pixels.clone()
    (expected,) = engine.generate([greedy(ids, vision=VisionInputs(original, grid))])
    engine.update_weights()
    engine.add_request(greedy(ids, vision=VisionInputs(pixels, grid)))
    pixels.add_(1.0)
    while engine.has_unfinished:
        groups = engine.step()
    assert torch.equal(groups[0].pixel_values, original)
    torch.testing.assert_close(groups[0].rollouts[0].logprobs, expected.rollouts[0].logprobs, rtol=0, atol=5e-5)


def test_an_engine_built_under_inference_mode_leaves_a_model_to_train(make_engine):
    model = tiny_model("qwen2")
    with torch.inference_mode():
        engine = make_engine(model)
        (group,) = engine.generate([greedy("see")])
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        engine.generate([greedy("see")], strict=True)
    for value in (group.prompt_ids, group.prompt_positions, group.rollouts[0].token_ids, group.rollouts[0].logprobs):
        assert not value.is_inference()
    model(input_ids=group.prompt_ids[None]).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_another_default_device_changes_nothing(family, make_engine, chat, picture):
    engine = make_engine(family)
    requests = [greedy("text"), greedy([1, 2, 3])]
    requests += [chat("see", [picture(56, 84)], temperature=0, max_tokens=6)] if family == "qwen2_5_vl" else []
    expected = tokens(engine.generate(requests, strict=True))
    with torch.device("meta"):
        groups = engine.generate(requests, strict=True)
        (failed,) = engine.generate([greedy([10**9])])
    assert tokens(groups) == expected
    assert failed.error is not None
    assert all(group.prompt_positions.device.type == "cpu" for group in [*groups, failed])
    assert failed.rollouts[0].token_ids.device.type == "cpu"


class BrokenTokenizer:
    """Decodes nothing; all else is the tokenizer's."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        return self._tokenizer(*args, **kwargs)

    def __len__(self):
        return len(self._tokenizer)

    def decode(self, ids, **_):
        raise OverflowError("no such id")


@pytest.mark.parametrize("stop", [(), ("x",)], ids=["at the end", "on the way"])
def test_a_tokenizer_that_cannot_decode_fails_the_group_and_no_more(stop):
    processor = Processor(BrokenTokenizer(tiny_processor().tokenizer))
    engine = Engine(tiny_model("qwen2"), processor, EngineConfig(kv_memory=1 << 22))
    groups = engine.generate([Request("hi", sampling=SamplingParams(max_tokens=3, stop=stop))])
    assert "no such id" in str(groups[0].error)
    assert not engine.has_unfinished
    engine.update_weights()


def test_which_updates_change_the_tower(make_engine, chat, picture):
    model = tiny_model("qwen2_5_vl")
    engine = make_engine(model)
    weights = tiny_model("qwen2_5_vl", seed=1).state_dict()
    tower = {name: weight for name, weight in weights.items() if "visual" in name}
    language = {name: weight for name, weight in weights.items() if "visual" not in name}
    for named, version in ((language, 0), (tower, 1), ((), 2)):
        engine.update_weights(named, partial=True)
        assert engine.vision_version == version
    with pytest.raises(ValueError, match="vision_changed=False"):
        engine.update_weights(tower, partial=True, vision_changed=False)
    model.model.visual.requires_grad_(False)
    engine.update_weights()
    assert engine.vision_version == 2


def test_a_broken_copy_stops_the_engine_until_a_complete_one(make_engine):
    engine = make_engine(model := tiny_model("qwen2"))
    weights = tiny_model("qwen2", seed=1).state_dict()
    with pytest.raises(ValueError, match="meta"):
        engine.update_weights({**weights, "lm_head.weight": weights["lm_head.weight"].to("meta")})
    assert "meta" not in {p.device.type for p in model.parameters()}
    broken = torch.Tensor._make_subclass(BrokenTensor, weights["lm_head.weight"])
    with pytest.raises(RuntimeError, match="gone"):
        engine.update_weights({**weights, "lm_head.weight": broken})
    for refused in (lambda: engine.generate([greedy("see")]), lambda: engine.step()):
        with pytest.raises(ValueError, match="complete update_weights"):
            refused()
    engine.update_weights({"lm_head.weight": weights["lm_head.weight"]}, partial=True)
    with pytest.raises(ValueError, match="complete update_weights"):
        engine.step()
    engine.update_weights(weights)
    expected = make_engine(tiny_model("qwen2", seed=1)).generate([greedy("see")])
    assert tokens(engine.generate([greedy("see")])) == tokens(expected)


class BrokenTensor(torch.Tensor):
    """A tensor whose data is lost when it is read."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            raise RuntimeError("gone")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_name_that_comes_twice_is_refused(make_engine):
    engine = make_engine(model := tiny_model("qwen2"))
    before, weights = parameters(model), tiny_model("qwen2", seed=1).state_dict()
    twice = [*weights.items(), ("lm_head.weight", torch.zeros_like(weights["lm_head.weight"]))]
    with pytest.raises(ValueError, match=r"lm_head.weight.* twice"):
        engine.update_weights(twice)
    assert_bitwise(model, before)


def test_stop_strings_of_special_tokens_are_refused(make_engine):
    with pytest.raises(ValueError, match=r"stop_token_ids .*im_end.* \(stop\)"):
        make_engine("qwen2").add_request(Request("hi", sampling=SamplingParams(stop=("<|im_end|>",))))


def test_images_in_messages_beside_ready_inputs_are_refused(make_engine, processor, picture):
    inputs = processor.image_processor(images=[picture(56, 84)], return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image", "image": picture(84, 56)}]}]
    with pytest.raises(ValueError, match="images in one place, got 1 in the messages and vision"):
        make_engine("qwen2_5_vl").add_request(Request(messages, vision=VisionInputs(**inputs)))


def test_a_hook_put_on_later_is_refused_by_name(make_engine):
    engine = make_engine(model := tiny_model("qwen2"))
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, output: output * 0)
    with pytest.raises(ValueError, match=r"hooks.*model.layers.0.mlp.down_proj"):
        engine.generate([greedy("see")])
    hook.remove()
    engine.generate([greedy("see")], strict=True)


def test_a_context_beyond_the_models_is_refused(make_engine):
    with pytest.raises(ValueError, match=r"at most the model's 4096, got 5000 \(max_context\)"):
        make_engine("qwen2", max_context=5000)


def test_bytes_that_are_no_text_do_not_pile_up(processor):
    decoder, lengths = TextDecoder(processor.tokenizer), []
    real = decoder._decode
    decoder._decode = lambda ids: lengths.append(len(ids)) or real(ids)
    continuation = processor.tokenizer("é")["input_ids"][-1]
    for _ in range(100):
        decoder.append(continuation)
    assert max(lengths) <= 2 * LONGEST_CHARACTER
    assert set(decoder.text) == {"�"}


def test_numpy_pixels_are_read(make_engine, processor, picture):
    engine = make_engine("qwen2_5_vl")
    inputs = processor.image_processor(images=[picture(56, 84)], return_tensors="np")
    grid = inputs["image_grid_thw"]
    ids = np.array([1, *[special_id("<|image_pad|>")] * (int(grid.prod()) // 4), 2])
    (group,) = engine.generate([greedy(ids, vision=VisionInputs(inputs["pixel_values"], grid))], strict=True)
    assert len(group.rollouts[0].token_ids)
