"""The trainer's padded forward against transformers' own, one unpadded sequence at a time."""

import copy
from dataclasses import replace

import pytest
import torch

from foveate.rollout import models
from foveate.rollout.config import SamplingParams
from foveate.rollout.policy import pad, policy_logprobs
from foveate.rollout.prefix_groups import Packer, Sample, micro_batches, row_inputs
from foveate.rollout.testing import special_id, tiny_model
from foveate.rollout.types import Request, Rollout, RolloutGroup

TOLERANCE = 5e-5  # of log-probs at initializer_range 0.2; the project's contract on equality with a trainer
GRIDS = [[[1, 4, 6], [1, 8, 4]], [], [[1, 2, 2]]]  # two images of different aspect, none, one


def rollout(length, generator, vocab=256):
    ids = torch.randint(vocab, (length,), generator=generator)
    zeros = torch.zeros(length)
    return Rollout(ids, zeros, zeros, zeros, "length")


def group(model, grids, lengths, temperature, seed):
    """A group of random completions; an image stands between its start and end tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (3 + seed,), generator=generator).tolist()
    for _, height, width in grids:
        ids += [special_id("<|vision_start|>")] + [special_id("<|image_pad|>")] * (height * width // 4)
        ids += [special_id("<|vision_end|>"), 65]
    prompt, grid = torch.tensor(ids), torch.tensor(grids).reshape(-1, 3)
    positions, follows = torch.arange(len(ids)).expand(3, -1), len(ids)
    if grids:
        is_image = (prompt == special_id("<|image_pad|>")).int()[None]
        planes, _ = model.model.get_rope_index(prompt[None], mm_token_type_ids=is_image, image_grid_thw=grid)
        positions, follows = planes[:, 0], int(planes[0, 0, -1]) + 1  # the prompt ends with text
    return RolloutGroup(
        request=Request(ids, n=len(lengths), sampling=SamplingParams(temperature=temperature)),
        request_id=str(seed),
        prompt_ids=prompt,
        prompt_positions=positions.int(),
        next_position=follows,
        segments=torch.tensor([len(ids)], dtype=torch.int32),
        rollouts=tuple(rollout(length, generator) for length in lengths),
        image_grid_thw=grid if grids else None,
        pixel_values=torch.randn(int(grid.prod(-1).sum()), 1176, generator=generator) if grids else None,
    )


def all_groups(model, vision):
    settings = [((5, 1, 9), 1.0), ((4,), 0.5), ((2, 7), 0.0)]
    grids = GRIDS if vision else [[]] * 3
    return [
        group(model, g, lengths, t, seed) for seed, (g, (lengths, t)) in enumerate(zip(grids, settings, strict=True))
    ]


def samples_of(groups):
    return [Sample(g, r) for g in groups for r in g.rollouts]


def plain(model, sample):
    """log-softmax(logits / T) of the completion by the whole model on one sequence: its own positions and mask."""
    g, tokens = sample.group, sample.rollout.token_ids
    ids = torch.cat([g.prompt_ids, tokens])[None]
    extra = {}
    if g.pixel_values is not None:
        is_image = (ids == special_id("<|image_pad|>")).int()
        extra = {"pixel_values": g.pixel_values, "image_grid_thw": g.image_grid_thw, "mm_token_type_ids": is_image}
    elif hasattr(model.model, "rope_deltas"):
        extra = {"position_ids": torch.arange(ids.shape[1]).expand(3, 1, -1)}
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra).logits[
        0, len(g.prompt_ids) - 1 : -1
    ]
    log_p = (logits / (g.request.sampling.temperature or 1.0)).log_softmax(-1)
    return log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen2_5_vl"])
def test_logprobs_equal_an_unpadded_forward(family):
    model = tiny_model(family)
    samples = samples_of(all_groups(model, family == "qwen2_5_vl"))
    if family == "qwen2_5_vl":
        model.model.rope_deltas = torch.full((1, 1), 37)  # left over from some generate()
    with torch.no_grad():
        got = policy_logprobs(models.describe(model), samples)
        logprobs, entropy = (torch.cat(x) for x in zip(*(plain(model, s) for s in samples), strict=True))
    assert (got.logprobs - logprobs).abs().max() < TOLERANCE
    assert (got.entropy - entropy).abs().max() < TOLERANCE
    assert got.logprobs.shape == (28,)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda g: replace(g, prompt_positions=torch.arange(len(g.prompt_ids)).expand(3, -1).int()),
        lambda g: replace(g, prompt_positions=g.prompt_positions[[0, 2, 1]]),
        lambda g: replace(g, next_position=g.next_position + 1),
        lambda g: replace(g, pixel_values=g.pixel_values.flip(0)),
        lambda g: replace(g, request=Request([1], sampling=SamplingParams(temperature=0.9))),
    ],
    ids=["one_plane", "swapped_planes", "off_by_one", "other_image", "temperature"],
)
def test_a_wrong_layout_is_seen(mutate):
    model = tiny_model("qwen2_5_vl")
    right = all_groups(model, True)[0]
    spec = models.describe(model)
    with torch.no_grad():
        expected = policy_logprobs(spec, samples_of([right])).logprobs
        got = policy_logprobs(spec, samples_of([mutate(right)])).logprobs
    assert (got - expected).abs().max() > 4 * TOLERANCE


def gradient(model, logprobs_of, samples):
    model.zero_grad()
    weights = torch.linspace(-1, 1, sum(len(s.rollout.token_ids) for s in samples), dtype=torch.float64)
    logprobs = logprobs_of(samples)
    (logprobs * weights.to(logprobs.dtype)).sum().backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_repeated_forward(checkpointing):
    """Into every parameter, the tower's included, though each image passes it once and not once a sample."""
    model = tiny_model("qwen2_5_vl")
    groups = all_groups(model, True)
    double = copy.deepcopy(model).double()
    truth = gradient(double, lambda s: torch.cat([plain(double, x)[0] for x in s]), samples_of(groups))
    naive = gradient(model, lambda s: torch.cat([plain(model, x)[0] for x in s]), samples_of(groups))
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
    spec = models.describe(model)
    got = gradient(model, lambda s: policy_logprobs(spec, s).logprobs, samples_of(groups))
    assert set(got) == set(truth) == {name for name, _ in model.named_parameters()}

    def error(gradients, prefix):
        return sum(float((g - truth[n]).square().sum()) for n, g in gradients.items() if n.startswith(prefix)) ** 0.5

    for prefix in ("model.visual.", "model.language_model.", "lm_head"):
        assert sum(float(g.abs().sum()) for n, g in truth.items() if n.startswith(prefix)) > 0
        assert error(got, prefix) <= 2 * error(naive, prefix), prefix


def test_each_image_passes_the_tower_once_a_group():
    model = tiny_model("qwen2_5_vl")
    seen = []
    model.model.visual.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    groups = all_groups(model, True)
    policy_logprobs(models.describe(model), samples_of(groups))
    assert seen == [sum(len(g.pixel_values) for g in groups if g.pixel_values is not None)]


def test_a_drawn_placeholder_is_an_ordinary_token():
    model = tiny_model("qwen2_5_vl")
    g = all_groups(model, True)[0]
    ids = torch.tensor([65, special_id("<|image_pad|>"), 66])
    zeros = torch.zeros(3)
    drawn = Sample(g, Rollout(ids, zeros, zeros, zeros, "length"))
    with torch.no_grad():
        got = policy_logprobs(models.describe(model), [drawn, *samples_of([g])])
        alone = policy_logprobs(models.describe(model), [drawn])
    assert got.logprobs.isfinite().all()
    assert (got.logprobs[:3] - alone.logprobs).abs().max() < TOLERANCE


def test_text_alone_in_a_vision_model():
    model = tiny_model("qwen2_5_vl")
    samples = samples_of([all_groups(model, True)[1]])
    with torch.no_grad():
        got = policy_logprobs(models.describe(model), samples).logprobs
        assert (got - plain(model, samples[0])[0]).abs().max() < TOLERANCE


def test_pad_by_hand():
    model = tiny_model("llama")
    g = group(model, [], (2, 1), 0.5, 0)  # prompt of 3
    batch = pad([[sample] for sample in samples_of([g])])
    first, second = (r.token_ids.tolist() for r in g.rollouts)
    prompt = g.prompt_ids.tolist()
    assert batch.input_ids.tolist() == [[*prompt, first[0]], [*prompt, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 0]]] * 3
    assert (batch.rows.tolist(), batch.columns.tolist()) == ([0, 0, 1], [2, 3, 2])
    assert batch.targets.tolist() == [*first, *second]
    assert batch.temperatures.tolist() == [0.5] * 3


def test_micro_batches_by_hand():
    model = tiny_model("llama")
    samples = samples_of([group(model, [], (3, 1, 8, 1, 1), 1.0, 0)])
    assert [row_inputs([s]) for s in samples] == [5, 3, 10, 3, 3]

    def cut(*limits):
        return [(part.start, part.stop) for part in micro_batches(samples, *limits, Packer(None))]

    assert cut(2, None) == [(0, 2), (2, 4), (4, 5)]
    assert cut(5, None) == cut(9, None) == [(0, 5)]
    assert cut(5, 10) == [(0, 2), (2, 3), (3, 5)]
    assert cut(5, 20) == [(0, 2), (2, 4), (4, 5)]
    assert cut(5, 1) == [(i, i + 1) for i in range(5)]
    assert list(micro_batches([], 4, None, Packer(None))) == []
