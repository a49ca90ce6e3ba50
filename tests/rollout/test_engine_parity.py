"""The engine against transformers: greedy tokens of `generate`, log-probs and entropy of a plain forward, in fp32."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import FAMILIES, tiny_model
from foveate.rollout.types import Request, VisionInputs

ROPE = {"rope_theta": 10000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": ("llama", {}),
    "llama-one-kv-head-tied": (
        "llama",
        {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama-all-kv-heads-biases": (
        "llama",
        {
            "hidden_size": 40,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama-head-dim-llama3-rope": (
        "llama",
        {"num_key_value_heads": 3, "head_dim": 10, "rope_parameters": ROPE | LLAMA3 | {"rope_type": "llama3"}},
    ),
    "llama-linear-rope": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}}),
    "llama-yarn-rope": ("llama", {"rope_parameters": ROPE | YARN}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "qwen2": ("qwen2", {}),
    "qwen2-one-kv-head-tied": (
        "qwen2",
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-all-kv-heads-bias-tied": (
        "qwen3",
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 22}
        | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "qwen2_5_vl-one-kv-head-tied": (
        "qwen2_5_vl",
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}


def model_of(name: str):
    family, fields = MODELS[name]
    return tiny_model(family, seed=sorted(MODELS).index(name), **fields)


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(256), k=length)


@pytest.fixture
def mixed_requests(chat, picture):
    """(model, n, **sampling) -> prompts of mixed kinds and lengths; with images of several aspects for a VLM."""

    def make(model, n: int = 1, **sampling) -> list[Request]:
        params = SamplingParams(**sampling)
        requests = [
            Request("hi", n=n, sampling=params),
            Request(ids(41), n=n, sampling=params),
            chat("How many are there?", n=n, **sampling),
            Request(torch.tensor(ids(1)), n=n, sampling=params),
        ]
        if model.config.model_type == "qwen2_5_vl":
            wide, tall, small = picture(56, 140), picture(168, 56), picture(84, 84)
            requests += [
                chat("What is it?", [wide], n=n, **sampling),
                chat("Which one is larger, say it.", [tall, small, wide], n=n, **sampling),
                chat("And this?", [tall], system=None, n=n, **sampling),
            ]
        return requests

    return make


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logprobs(
    name, make_engine, mixed_requests, assert_greedy, assert_logprobs, banned_by_default
):
    model = model_of(name)
    engine = make_engine(model)
    groups = engine.generate(mixed_requests(model, n=2, temperature=0, max_tokens=20))
    assert_greedy(model, groups, banned_by_default(engine))
    assert_logprobs(model, groups)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs(family, fuse, make_engine, mixed_requests, assert_logprobs):
    model = tiny_model(family, seed=1)
    engine = make_engine(model, page_size=5, fuse=fuse)
    hot = mixed_requests(model, n=3, temperature=1.3, max_tokens=17)
    cold = mixed_requests(model, n=3, temperature=0.7, top_k=20, top_p=0.9, max_tokens=17)
    groups = engine.generate(hot + cold)
    assert_logprobs(model, groups)
    assert len({tuple(r.token_ids.tolist()) for group in groups for r in group.rollouts}) > len(groups)


@pytest.mark.parametrize(
    "filters",
    [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 40, "top_p": 0.8, "min_p": 0.05}],
    ids=lambda filters: "+".join(filters),
)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_kept_is_the_mass_of_the_filtered_set(temperature, filters, make_engine, forward_logits):
    """The set is what transformers' own logits warpers leave."""
    model = tiny_model("qwen2", seed=2)
    engine = make_engine(model, ban_vision_tokens=False)
    warpers = LogitsProcessorList()
    for field, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if field in filters:
            warpers.append(warper(filters[field]))
    sampling = SamplingParams(temperature=temperature, max_tokens=24, ignore_eos=True, **filters)
    (group,) = engine.generate([Request("filters", n=4, sampling=sampling)])
    for rollout in group.rollouts:
        scaled = forward_logits(model, group, rollout) / temperature
        kept = warpers(None, scaled) > -torch.inf
        assert kept.gather(1, rollout.token_ids[:, None]).all()
        mass = scaled.log_softmax(-1).masked_fill(~kept, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(rollout.log_kept, mass, atol=5e-5, rtol=0)
        torch.testing.assert_close(rollout.behaviour_logprobs, rollout.logprobs - rollout.log_kept, atol=0, rtol=0)


def test_log_kept_of_bans_and_of_nothing_removed(make_engine, forward_logits, banned_by_default):
    model = tiny_model("qwen2_5_vl")
    engine = make_engine(model)
    (group,) = engine.generate(
        [Request("bans", n=2, sampling=SamplingParams(max_tokens=12, banned_token_ids=(65, 66)))]
    )
    banned = [*banned_by_default(engine), 65, 66]
    for rollout in group.rollouts:
        removed = forward_logits(model, group, rollout).softmax(-1)[:, banned].sum(-1)
        torch.testing.assert_close(rollout.log_kept, torch.log1p(-removed), atol=5e-5, rtol=0)
        assert not set(rollout.token_ids.tolist()) & set(banned)
    free = make_engine(model, ban_vision_tokens=False)
    (group,) = free.generate([Request("free", n=2, sampling=SamplingParams(max_tokens=12))])
    assert all((rollout.log_kept == 0).all() for rollout in group.rollouts)


@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_prompts_around_page_borders(page_size, make_engine, assert_greedy, assert_logprobs):
    model = tiny_model("qwen3", seed=3)
    engine = make_engine(model, page_size=page_size, ban_vision_tokens=False)
    lengths = sorted({1, 2} | {k * page_size + d for k in (1, 2, 3) for d in (-1, 0, 1)} - {0})
    sampling = SamplingParams(temperature=0, max_tokens=page_size + 2, ignore_eos=True)
    requests = [Request(ids(length), n=2, sampling=sampling) for length in lengths]
    with_prefix = [dataclasses.replace(r, prefix_len=min(page_size, len(r.prompt))) for r in requests]
    groups = engine.generate(requests + with_prefix)
    assert_greedy(model, groups)
    assert_logprobs(model, groups)


@pytest.mark.parametrize("max_batch_tokens", [1, 64])
def test_a_prefill_budget_changes_nothing(max_batch_tokens, make_engine, mixed_requests, assert_logprobs):
    model = tiny_model("qwen2_5_vl")
    requests = mixed_requests(model, n=2, max_tokens=9, seed=4)
    small, large = make_engine(model, max_batch_tokens=max_batch_tokens), make_engine(model)
    groups, expected = small.generate(requests), large.generate(requests)
    assert small.stats()["steps"] > large.stats()["steps"]
    assert_logprobs(model, groups)
    for group, other in zip(groups, expected, strict=True):
        assert [r.token_ids.tolist() for r in group.rollouts] == [r.token_ids.tolist() for r in other.rollouts]


def test_one_request_of_many_samples(make_engine, picture, chat, assert_logprobs):
    model = tiny_model("qwen2_5_vl")
    (group,) = make_engine(model).generate([chat("Say.", [picture(84, 56)], n=64, max_tokens=5)])
    assert len(group.rollouts) == 64
    assert_logprobs(model, [group])


def test_a_trainers_own_inputs_are_the_same_prompt(make_engine, processor, picture, chat, assert_greedy):
    """pixel_values and image_grid_thw with expanded ids, and text or messages with pictures."""
    model = tiny_model("qwen2_5_vl")
    engine = make_engine(model)
    images = [picture(84, 140), picture(112, 56)]
    sampling = {"temperature": 0, "max_tokens": 16}
    made = processor.image_processor(images=images, return_tensors="pt")
    vision = VisionInputs(made["pixel_values"], made["image_grid_thw"])
    messages = chat("Compare.", images, **sampling)
    pads = [
        f"<|vision_start|>{'<|image_pad|>' * int(grid.prod() // 4)}<|vision_end|>" for grid in vision.image_grid_thw
    ]
    system, user = "<|im_start|>system\nLook well.<|im_end|>\n", "Compare.<|im_end|>\n<|im_start|>assistant\n"
    expanded = f"{system}<|im_start|>user\n{''.join(pads)}{user}"
    text = re.sub("(<.image_pad.>)+", "<|image_pad|>", expanded)
    ready = processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    system_len = len(processor.tokenizer(system, add_special_tokens=False)["input_ids"])
    requests = [
        messages,
        dataclasses.replace(messages, prompt=text),
        Request(ready, vision=vision, sampling=messages.sampling),
        Request(torch.tensor(ready), vision=vision, sampling=messages.sampling, prefix_len=system_len),
    ]
    groups = engine.generate(requests, strict=True)
    assert_greedy(model, groups, [model.config.image_token_id])
    for group in groups:
        assert group.prompt_ids.tolist() == ready
        assert torch.equal(group.pixel_values, vision.pixel_values)
        assert torch.equal(group.image_grid_thw, vision.image_grid_thw)
        assert torch.equal(group.prompt_positions, groups[0].prompt_positions)
        assert group.rollouts[0].token_ids.tolist() == groups[0].rollouts[0].token_ids.tolist()


def test_positions_are_the_models_own(make_engine, picture, chat):
    model = tiny_model("qwen2_5_vl")
    requests = [chat("Where?", [picture(168, 84), picture(56, 112)], max_tokens=1), chat("None.", max_tokens=1)]
    for group in make_engine(model).generate(requests):
        ids = torch.cat([group.prompt_ids, torch.tensor([1, 2, 3])])  # a completion, as a trainer's forward sees it
        is_image = (ids == model.config.image_token_id).int()
        planes, _ = model.model.get_rope_index(
            ids[None], mm_token_type_ids=is_image[None], image_grid_thw=group.image_grid_thw
        )
        assert group.prompt_positions.tolist() == planes[:, 0, :-3].tolist()
        assert group.prompt_positions.dtype == torch.int32
        assert planes[:, 0, -3:].tolist() == [[group.next_position + i for i in range(3)]] * 3


def test_shadow_in_double_precision(make_engine, mixed_requests, assert_logprobs):
    model = tiny_model("llama")
    engine = make_engine(model, dtype=torch.float64)
    assert not engine.shares_weights
    assert_logprobs(model, engine.generate(mixed_requests(model, n=2, max_tokens=9)))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_fp32(family, make_engine, mixed_requests, forward_logits):
    """No worse than twice transformers' own bfloat16 forward, both measured against fp32 weights."""
    exact = tiny_model(family)
    engine = make_engine(tiny_model(family, dtype=torch.bfloat16))
    groups = engine.generate(mixed_requests(exact, n=2, max_tokens=9))
    ours = theirs = 0.0
    for group in groups:
        for rollout in group.rollouts:
            truth, own = (
                forward_logits(m, group, rollout).log_softmax(-1).gather(1, rollout.token_ids[:, None])[:, 0]
                for m in (exact, engine.model)
            )
            ours = max(ours, float((rollout.logprobs - truth).abs().max()))
            theirs = max(theirs, float((own - truth).abs().max()))
    assert ours <= 2 * theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_unwritten_memory_is_never_read(family, make_engine, mixed_requests):
    model = tiny_model(family)
    requests = mixed_requests(model, n=3, max_tokens=20, seed=5)
    clean, poisoned = make_engine(model, page_size=7), make_engine(model, page_size=7)
    clean._runner.kv_pool.zero_()
    poisoned._runner.kv_pool.fill_(torch.nan)
    for group, other in zip(clean.generate(requests), poisoned.generate(requests), strict=True):
        for rollout, twin in zip(group.rollouts, other.rollouts, strict=True):
            assert rollout.token_ids.tolist() == twin.token_ids.tolist()
            assert torch.equal(rollout.logprobs, twin.logprobs)
            assert torch.isfinite(twin.logprobs).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_models(seed, make_engine, mixed_requests, assert_greedy, assert_logprobs, banned_by_default):
    draw = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    kv_heads, per_kv_head = draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3, 7])
    heads, head_dim = kv_heads * per_kv_head, draw.choice([4, 6, 10, 16, 34])
    hidden = heads * head_dim
    fields = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden}
    fields |= {"initializer_range": 0.2 * min(1, (48 / hidden) ** 0.5)}  # else wide models amplify rounding
    fields |= {"num_hidden_layers": draw.choice([1, 2, 3]), "intermediate_size": draw.choice([1, 33, 64])}
    fields |= {"tie_word_embeddings": draw.random() < 0.5}
    if family in ("llama", "qwen3"):
        fields |= {"head_dim": draw.choice([2, 8, 18]), "attention_bias": draw.random() < 0.5}
    model = tiny_model(family, seed=seed, **fields)
    engine = make_engine(model, page_size=draw.choice([1, 3, 8, 64]), max_batch_tokens=draw.choice([1, 50, 8192]))
    greedy = engine.generate(mixed_requests(model, n=2, temperature=0, max_tokens=30))
    assert_greedy(model, greedy, banned_by_default(engine))
    sampled = engine.generate(
        mixed_requests(model, n=3, max_tokens=30, temperature=draw.choice([0.7, 1.3]), top_p=0.95)
    )
    assert_logprobs(model, greedy + sampled)
