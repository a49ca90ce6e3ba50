"""Rows that share a prompt against rows of one sample each: log-probs, gradients, what is fed, what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from foveate.rollout import models, prefix_groups
from foveate.rollout.config import SamplingParams
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.learner import Batch, Learner
from foveate.rollout.policy import pad, policy_logprobs, predict
from foveate.rollout.prefix_groups import Packer, Sample, attention_mask, micro_batches, row_inputs
from foveate.rollout.testing import FAMILIES, special_id, tiny_model
from foveate.rollout.types import Request, Rollout, RolloutGroup

TOLERANCE = 5e-5  # of log-probs at initializer_range 0.2; the project's contract on equality with a trainer
GROUPS = [
    ([[1, 4, 6], [1, 8, 4]], (5, 1, 9, 3), 1.0),
    ([], (4, 4), 0.5),
    ([[1, 2, 2]], (2, 7, 1), 1.0),
    ([], (6,), 1.0),
]


def make_group(spec, grids, lengths, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (3 + seed,), generator=generator).tolist()
    for _, height, width in grids:
        ids += [special_id("<|vision_start|>")] + [special_id("<|image_pad|>")] * (height * width // 4)
        ids += [special_id("<|vision_end|>"), 65]
    prompt, grid = torch.tensor(ids), torch.tensor(grids).reshape(-1, 3)
    positions, follows = torch.arange(len(ids)).expand(3, -1), len(ids)
    if spec.vision is not None:
        positions, follows = spec.vision.positions(prompt, grid)
    zeros = [torch.zeros(length) for length in lengths]
    tokens = [torch.randint(256, (length,), generator=generator) for length in lengths]
    pixels = torch.randn(int(grid.prod(-1).sum()), spec.vision.patch_dim, generator=generator) if grids else None
    return RolloutGroup(
        request=Request(ids, n=len(lengths), sampling=SamplingParams(temperature=temperature)),
        request_id=str(seed),
        prompt_ids=prompt,
        prompt_positions=positions.int(),
        next_position=follows,
        segments=torch.tensor([len(ids)], dtype=torch.int32),
        rollouts=tuple(Rollout(ids, z, z, z, "length") for ids, z in zip(tokens, zeros, strict=True)),
        image_grid_thw=grid if grids else None,
        pixel_values=pixels,
    )


def make_samples(spec):
    """Four groups, two with images of several sizes; one of their completions has one token and is never fed."""
    samples = []
    for seed, (grids, lengths, temperature) in enumerate(GROUPS):
        group = make_group(spec, grids if spec.vision else [], lengths, temperature, seed)
        samples += [Sample(group, rollout) for rollout in group.rollouts]
    return samples


def make(family, attention="sdpa", **kwargs):
    model = tiny_model(family, **kwargs)
    model.set_attn_implementation(attention)
    return model, models.describe(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_those_of_rows_alone(family, attention):
    _, spec = make(family, attention)
    samples = make_samples(spec)
    assert [len(row) for row in Packer.of(spec, True).rows(samples)] == [4, 2, 3, 1]
    with torch.no_grad():
        alone = policy_logprobs(spec, samples)
        shared = policy_logprobs(spec, samples, prefix_grouping=True)
    assert (shared.logprobs - alone.logprobs).abs().max() < TOLERANCE
    assert (shared.entropy - alone.entropy).abs().max() < TOLERANCE


def gradient(model, spec, samples, grouped):
    model.zero_grad()
    logprobs = policy_logprobs(spec, samples, prefix_grouping=grouped).logprobs
    (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)).sum().backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(first, second):
    assert first.keys() == second.keys()
    return sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "attention"), [("qwen3", "sdpa"), ("qwen2_5_vl", "eager"), ("qwen3_vl", "sdpa")])
def test_gradients_are_as_exact_as_those_of_rows_alone(family, attention, checkpointing):
    """Into every parameter, the tower's included: at most twice the distance from float64 of the repeated prompts."""
    model, spec = make(family, attention)
    double = copy.deepcopy(model).double()
    samples = make_samples(spec)
    truth = gradient(double, models.describe(double), samples, False)
    alone = gradient(model, spec, samples, False)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
    shared = gradient(model, spec, samples, True)
    assert set(truth) == {name for name, _ in model.named_parameters()}
    assert distance(shared, truth) <= 2 * distance(alone, truth)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_vl"])
def test_what_is_fed(family):
    """Each prompt and each image once in a micro-batch, all completions but their last tokens."""
    _, spec = make(family)
    samples = make_samples(spec)
    fed, seen = [], []
    spec.decoder.register_forward_pre_hook(lambda m, a, kwargs: fed.append(kwargs["inputs_embeds"]), with_kwargs=True)
    if spec.vision:
        spec.vision.tower.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    packer = Packer.of(spec, True)
    predicted = predict(spec, samples, packer)
    groups = {id(sample.group): sample.group for sample in samples}.values()
    own = sum(len(sample.rollout.token_ids) - 1 for sample in samples)
    assert sum(map(row_inputs, packer.rows(samples))) == sum(len(g.prompt_ids) for g in groups) + own
    assert fed[0].shape[:2] == (4, max(map(row_inputs, packer.rows(samples))))
    assert len(predicted.hidden) == sum(len(sample.rollout.token_ids) for sample in samples)
    assert sum(seen) == sum(len(g.pixel_values) for g in groups if g.pixel_values is not None)


def test_layout_by_hand():
    _, spec = make("llama")
    group = make_group(spec, [], (2, 1, 3), 0.5, 0)  # prompt of 3
    row = [Sample(group, rollout) for rollout in group.rollouts]
    batch = pad([row, row[:1]])
    (a, _), (b,), (c, d, _) = (r.token_ids.tolist() for r in group.rollouts)
    prompt = group.prompt_ids.tolist()
    assert batch.input_ids.tolist() == [[*prompt, a, c, d], [*prompt, a, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 3, 3], [0, 0, 0, 1, -1, -1]]
    assert batch.positions.tolist() == [[[0, 1, 2, 3, 3, 4], [0, 1, 2, 3, 0, 0]]] * 3
    assert batch.rows.tolist() == [0] * 6 + [1] * 2
    assert batch.columns.tolist() == [2, 3, 2, 2, 4, 5, 2, 3]
    assert batch.targets.tolist() == [
        *group.rollouts[0].token_ids,
        b,
        c,
        d,
        group.rollouts[2].token_ids[2],
        *(group.rollouts[0].token_ids),
    ]
    seen = attention_mask(spec, batch.segments, torch.float32)
    assert (seen[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]


def sibling(own, other, query, key):
    return (key <= query) & ((other >= 0) | (other == own))


def not_itself(own, other, query, key):
    return (key <= query) & ((other == 0) | ((other == own) & (key < query)) | (query == key) & (own == 0))


def no_prompt(own, other, query, key):
    return (key <= query) & (other == own)


@pytest.mark.parametrize("rule", [sibling, not_itself, no_prompt])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_a_wrong_mask_is_seen(family, rule, monkeypatch):
    _, spec = make(family)
    samples = make_samples(spec)
    with torch.no_grad():
        alone = policy_logprobs(spec, samples).logprobs
        monkeypatch.setattr(prefix_groups, "_sees", rule)
        shared = policy_logprobs(spec, samples, prefix_grouping=True).logprobs
    assert (shared - alone).abs().max() > 4 * TOLERANCE


def test_consecutive_positions_over_siblings_are_seen(monkeypatch):
    """A second completion that goes on where the first ended is another policy."""
    from foveate.rollout import policy

    _, spec = make("qwen2_5_vl")
    samples = make_samples(spec)
    right = policy.pad

    def wrong(*args):
        batch = right(*args)
        shape = batch.input_ids.shape
        return replace(batch, positions=torch.arange(shape[1]).expand(3, *shape))

    with torch.no_grad():
        alone = policy_logprobs(spec, samples).logprobs
        monkeypatch.setattr(policy, "pad", wrong)
        shared = policy_logprobs(spec, samples, prefix_grouping=True).logprobs
    assert (shared - alone).abs().max() > 4 * TOLERANCE


# Which samples share a row


def row_cost_of(prompt, completions, layer, width):
    length = prompt + completions
    return (length * layer + 2 * length**2 * width) / completions


@pytest.mark.parametrize(("prompt", "layer", "width"), [(1024, 233_000_000, 3584), (20, 20_000, 48), (7, 500, 64)])
def test_a_row_takes_what_makes_a_token_cheapest(prompt, layer, width):
    """Against the cheapest of all row sizes, searched."""
    _, spec = make("llama")
    group = replace(make_group(spec, [], (2,) * 3, 1.0, 0), prompt_ids=torch.zeros(prompt, dtype=torch.int64))
    costs = [row_cost_of(prompt, size, layer, width) for size in range(1, 20_000)]
    best = 1 + min(range(len(costs)), key=costs.__getitem__)
    for size, rows in ((best - 1, 1), (best + 2, 2)):
        halves = [torch.zeros(size // 2 + 1, dtype=torch.int64), torch.zeros(size - size // 2 + 1, dtype=torch.int64)]
        samples = [Sample(group, replace(group.rollouts[0], token_ids=ids)) for ids in halves]
        assert len(Packer(layer / (2 * width)).rows(samples)) == rows


def test_only_neighbours_of_one_group_share_a_row():
    _, spec = make("llama")
    one, other = (make_group(spec, [], (2, 2, 2), 1.0, seed) for seed in (0, 0))
    a, b, c = (Sample(one, rollout) for rollout in one.rollouts)
    x, y, _ = (Sample(other, rollout) for rollout in other.rollouts)
    shares = Packer(1e9)
    assert shares.rows([a, b, x, y, c]) == [[a, b], [x, y], [c]]
    assert Packer(None).rows([a, b, x]) == [[a], [b], [x]]
    assert shares.rows([]) == []


def test_micro_batches_count_a_shared_prompt_once():
    _, spec = make("llama")
    group = make_group(spec, [], (3, 1, 8, 1, 2), 1.0, 0)  # prompt of 3; 2, 0, 7, 0, 1 tokens are fed
    samples = [Sample(group, rollout) for rollout in group.rollouts]

    def cut(*limits):
        return [(part.start, part.stop) for part in micro_batches(samples, *limits, Packer(1e9))]

    assert cut(5, None) == [(0, 5)]
    assert cut(5, 13) == [(0, 5)]  # 3 + 10
    assert cut(5, 12) == [(0, 4), (4, 5)]
    assert cut(5, 5) == [(0, 2), (2, 3), (3, 5)]
    assert cut(2, 13) == [(0, 2), (2, 4), (4, 5)]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_no_cut_and_no_grouping_changes_the_update(family):
    """Groups split over micro-batches or not: gradients as close to float64 as those of the whole, ungrouped batch."""
    model, spec = make(family)
    samples = make_samples(spec)
    generator = torch.Generator().manual_seed(1)
    batch = Batch(samples, torch.randn(10, generator=generator), torch.arange(10) != 4, 37.5)

    def update(model, **options):
        learner = Learner(model, None, GRPOConfig(max_grad_norm=None, **options))
        learner.optimizer.step = lambda: None
        report = learner.update(batch, 1e-3)
        return {name: p.grad.double() for name, p in model.named_parameters()}, report

    truth, _ = update(copy.deepcopy(model).double(), micro_batch_size=16, prefix_grouping=False)
    whole, plain = update(model, micro_batch_size=16, prefix_grouping=False)
    tokens = []
    cuts = [{"micro_batch_size": size} for size in (1, 3, 16)] + [{"micro_batch_tokens": 60, "micro_batch_size": 16}]
    for options in cuts:
        got, report = update(model, **options)
        assert distance(got, truth) <= 2 * distance(whole, truth)
        assert report["policy/loss"] == pytest.approx(plain["policy/loss"], rel=1e-5, abs=1e-6)
        tokens.append(report["throughput/tokens_forwarded"])
    repeated = sum(row_inputs([sample]) for sample in samples)
    assert tokens[0] == repeated == plain["throughput/tokens_forwarded"]
    assert tokens[2] == sum(map(row_inputs, Packer(1e9).rows(samples))) < tokens[1] < repeated


# Attention implementations


def test_flash_attention_is_refused_by_name():
    model, spec = make("qwen3")
    samples = make_samples(spec)
    model.config._attn_implementation = "flash_attention_2"
    for call in (
        lambda: policy_logprobs(spec, samples, prefix_grouping=True),
        lambda: Learner(model, None, GRPOConfig()),
    ):
        with pytest.raises(ValueError, match=r"flash attention takes no mask .* 'flash_attention_2'"):
            call()
    Learner(model, None, GRPOConfig(prefix_grouping=False))
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match=r"'paged\|eager' \(prefix_grouping\)"):
        Learner(model, None, GRPOConfig())


def test_flex_attention_sees_the_same():
    """The rule of the block mask, tile by tile, is the mask of sdpa; the blocks it leaves out hold nothing."""
    model, spec = make("qwen3")
    samples = make_samples(spec)
    group = replace(samples[0].group, prompt_ids=torch.arange(200))
    long = [Sample(group, replace(s.rollout, token_ids=torch.arange(100))) for s in samples[:3]]
    segments = torch.zeros(2, 200 + 3 * 99, dtype=torch.int64)
    for number in range(3):
        segments[0, 200 + 99 * number : 299 + 99 * number] = number + 1
    segments[1, 150:] = prefix_groups.PADDING
    assert [row_inputs(long)] == [segments.shape[1]]
    expected = attention_mask(spec, segments, torch.float32) == 0
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        block = attention_mask(spec, segments, torch.float32)
    length = segments.shape[1]
    assert torch.equal(create_mask(block.mask_mod, 2, 1, length, length, device="cpu"), expected)
    tiles = (
        torch.nn.functional.pad(expected, (0, 512 - length, 0, 512 - length))
        .unflatten(3, (4, 128))
        .unflatten(2, (4, 128))
    )
    assert torch.equal(block.to_dense().bool(), tiles.any(-1).any(-2))
    assert not block.to_dense().all()


def test_flex_attention(monkeypatch):
    """As the other two where the CPU can: in a forward that is not compiled. With gradients it says that it cannot."""
    from transformers.integrations import flex_attention as theirs

    monkeypatch.setattr(
        theirs, "compile_friendly_flex_attention", lambda *a, training=False, **k: flex_attention(*a, **k)
    )
    model, spec = make("qwen3")
    samples = make_samples(spec)
    with torch.no_grad():
        alone = policy_logprobs(spec, samples).logprobs
        model.set_attn_implementation("flex_attention")
        shared = policy_logprobs(spec, samples, prefix_grouping=True).logprobs
    assert (shared - alone).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="no backward on the CPU"):
        policy_logprobs(spec, samples, prefix_grouping=True)
