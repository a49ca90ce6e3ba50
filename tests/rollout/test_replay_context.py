"""What a replay computes, gives back and refuses, in a trainer's own forward and in the GRPO loop's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache
from transformers.integrations import flex_attention as theirs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.rollout.prefix_groups import Sample
from foveate.rollout.replay import replay
from foveate.rollout.testing import VISION_FAMILIES, tiny_model
from foveate.testing.pruned_groups import (
    GRIDS,
    USERS,
    batch_of,
    by_context,
    by_policy,
    completions,
    drawn,
    hand_made,
    image_rows,
    kept_of,
    merged,
    mixed_groups,
    model_of,
    samples_of,
    site,
)

TOLERANCE = 1e-5


def test_layers_compute_what_they_see_alone():
    model = model_of("qwen2_5_vl")
    first = drawn("encoder", 0, 0.5)
    group = hand_made(model, [[1, 8, 8]], (3,), 1, [first, drawn("layer", 2, 0.4, within=first)])
    assert [len(*kept_of(part)) for part in group.keep.sites] == [8, 3]
    seen = []
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    text = len(group.prompt_ids) - 16
    by_context(model, samples_of([group]))
    assert seen == [text + 8 + 3] * 2 + [text + 3 + 3] * 2
    seen.clear()
    by_policy(model, samples_of([group]))
    assert seen == [text + 8 + 2] * 2 + [text + 3 + 2] * 2  # the last token predicts nothing


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_logits_have_the_callers_shape(family):
    """Rows of dropped tokens and of padding, and only those, are zeros."""
    model = model_of(family)
    samples = samples_of(mixed_groups(model))[:5]
    batch = batch_of(samples)
    with replay(model, [sample.group for sample in samples]), torch.no_grad():
        output = model(**batch)
    assert output.logits.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)
    assert output.past_key_values is None
    for logits, sample in zip(output.logits, samples, strict=True):
        prompt, plan, length = sample.group.prompt_ids, sample.group.keep, len(sample.rollout.token_ids)
        gone = set(image_rows(prompt, plan.sites[-1], kept=False)) | set(range(len(prompt) + length, len(logits)))
        assert len(gone) > 0
        assert (logits == 0).all(-1).nonzero().flatten().tolist() == sorted(gone)


def varlen(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What flash attention does with a mask of two dimensions: each row alone, its padding taken out, causal."""
    assert attention_mask is None or attention_mask.dim() == 2
    heads, out = query.shape[1] // key.shape[1], torch.zeros_like(query)
    for row in range(len(query)):
        own = slice(None) if attention_mask is None else attention_mask[row].bool()
        q, k, v = query[row][:, own], key[row][:, own], value[row][:, own]
        k, v = (x.repeat_interleave(heads, dim=0) for x in (k, v))
        out[row, :, own] = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("user", ["rows", "right", "left"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_flash_attention_replays_both_sites(family, user, monkeypatch):
    """Dropped rows need no mask of four dimensions; the attention stands in for flash, which has no CPU version."""
    model = model_of(family)
    samples = samples_of(mixed_groups(model))
    with torch.no_grad():
        expected = USERS[user](model, samples)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)
        model.config.text_config._attn_implementation = "flash_attention_2"
        got = USERS[user](model, samples)
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("user", ["shared rows", *(pytest.param(u, marks=pytest.mark.slow) for u in ("rows", "right"))])
def test_flex_attention_replays_both_sites(user, monkeypatch):
    """Where the CPU can: in a forward that is not compiled, without gradients."""
    monkeypatch.setattr(
        theirs, "compile_friendly_flex_attention", lambda *a, training=False, **k: flex_attention(*a, **k)
    )
    model = model_of("qwen2_5_vl")
    samples = samples_of(mixed_groups(model))
    with torch.no_grad():
        expected = USERS[user](model, samples)
        model.config.text_config._attn_implementation = "flex_attention"
        got = USERS[user](model, samples)
    assert (got - expected).abs().max() < TOLERANCE


def test_an_attention_without_a_backend_is_refused():
    model = model_of("qwen2_5_vl")
    encoder, layered, *_ = mixed_groups(model)
    model.config.text_config._attn_implementation = "paged|sdpa"
    refused = r"eager, sdpa, flex_attention or a flash.*got 'paged\|sdpa'"
    with pytest.raises(ValueError, match=refused), replay(model, [encoder, layered]):
        pass
    with pytest.raises(ValueError, match=refused):
        by_policy(model, samples_of([layered]))
    with replay(model, [encoder]):
        pass


def untouched(model: nn.Module) -> bool:
    inner = model.model
    shadows = {"forward", "layers"} & set(inner.language_model.__dict__)
    return not shadows and not inner._forward_pre_hooks and not inner.language_model._forward_pre_hooks


def test_the_model_is_as_before():
    model = model_of("qwen2_5_vl")
    groups = mixed_groups(model)
    samples, names = samples_of(groups), list(model.state_dict())
    batch = batch_of(samples)
    batch["mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        before = model(**batch).logits
        model.model.rope_deltas = torch.full((1, 1), 37)
        with replay(model, groups):
            assert not untouched(model)
            assert list(model.state_dict()) == names
            assert (model(**batch).logits - before).abs().max() > 1e-3
            with pytest.raises(ValueError, match="outside of a replay, got 'a second one'"), replay(model, groups):
                pass
            with pytest.raises(ValueError, match="the whole model, got 'one of its decoder'"):
                by_policy(model, samples)
        assert untouched(model)
        assert model.model.rope_deltas.item() == 37  # neither read nor written
        assert torch.equal(model(**batch).logits, before)


def test_the_model_is_as_before_after_an_error():
    model = model_of("qwen2_5_vl")
    groups = mixed_groups(model)
    model.model.language_model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), replay(model, groups):
        model(**batch_of(samples_of(groups)))
    assert untouched(model)
    with pytest.raises(ZeroDivisionError):
        by_policy(model, samples_of(groups))
    assert untouched(model)


def test_rows_say_which_group_is_meant():
    """Two groups with one prompt, and images of one size that were pruned otherwise."""
    model = model_of("qwen2_5_vl")
    one = hand_made(model, GRIDS[0], (5,), 0, [drawn("layer", 1, 0.5)])
    two = dataclasses.replace(hand_made(model, GRIDS[0], (5,), 0, [merged]), request_id="other")
    samples = [Sample(two, two.rollouts[0]), Sample(one, one.rollouts[0]), Sample(two, two.rollouts[0])]
    several = r"prompt of row 0 is of several requests, got .*'r0', 'other'.*\(rows\)"
    with torch.no_grad():
        expected = by_policy(model, samples)
        with replay(model, [one, two], rows=[1, 0, 1]):
            got = completions(model(**batch_of(samples)).logits, samples)
        assert (got - expected).abs().max() < TOLERANCE
        with replay(model, [one, two]), pytest.raises(ValueError, match=several):
            model(**batch_of(samples))
        with replay(model, [one, one]):  # the same group twice is one
            model(**batch_of(samples[1:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch["input_ids"][1].fill_(7), "row 1 to begin.*'r0', 'r1'"),
        (lambda batch: batch.update(image_grid_thw=batch["image_grid_thw"].flip(0)), r"'r0', 'r1'.*\(image_grid_thw\)"),
        (lambda batch: batch.update(pixel_values=None), r"'r0', 'r1'.*patches of 3 images.*\(pixel_values\)"),
        (lambda batch: batch.update(attention_mask=torch.ones(2, 1, 9, 9)), r"\(attention_mask\)"),
        (lambda batch: batch.update(input_ids=None, inputs_embeds=torch.zeros(2, 30, 48)), "input_ids and all else"),
        (lambda batch: batch.update(output_hidden_states=True), "last hidden state alone"),
        (lambda batch: batch.update(past_key_values=DynamicCache()), "no cache"),
    ],
    ids=["ids", "grids", "pixels", "mask", "embeddings", "hidden_states", "cache"],
)
def test_a_batch_that_does_not_fit_is_refused(change, message):
    model = model_of("qwen2_5_vl")
    groups = mixed_groups(model)[:2]
    batch = batch_of([Sample(group, group.rollouts[0]) for group in groups])
    change(batch)
    with replay(model, groups), pytest.raises(ValueError, match=message):
        model(**batch)
    assert untouched(model)


@pytest.mark.parametrize("rows", [[0], [0, 2], [0, -1], [1, 0]])
def test_rows_that_do_not_fit_are_refused(rows):
    model = model_of("qwen2_5_vl")
    groups = mixed_groups(model)[:2]
    batch = batch_of([Sample(group, group.rollouts[0]) for group in groups])
    refused = r"\(rows\)|request 'r1': its prompt in row 0"
    with replay(model, groups, rows=rows), pytest.raises(ValueError, match=refused):
        model(**batch)


def with_sites(*parts):
    return lambda plan: dataclasses.replace(plan, sites=parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: dataclasses.replace(plan, next_position=plan.next_position + 1), "keep.next_position"),
        (lambda plan: dataclasses.replace(plan, positions=plan.positions[[0, 2, 1]]), "keep.positions"),
        (lambda plan: dataclasses.replace(plan, positions=plan.positions[:, 1:]), "keep.positions"),
        (with_sites(site("layer", 1, [9, 6], [[0], [1]])), "keep.num_tokens"),
        (with_sites(site("layer", 1, [6, 8], [[1, 0], [1]])), "ascending tokens"),
        (with_sites(site("layer", 1, [6, 8], [[6], [1]])), "ascending tokens"),
        (with_sites(site("patch", 0, [6, 8], [[1], [1]])), "an encoder site or none"),
        (with_sites(site("layer", 0, [6, 8], [[1], [1]])), "ascending layers >= 1"),
        (with_sites(*(site("layer", layer, [6, 8], [[1], [1]]) for layer in (2, 1))), "ascending layers >= 1"),
        (with_sites(*(site("layer", 1 + i, [6, 8], [[1 + i], [1]]) for i in (0, 1))), "those before them"),
        (with_sites(site("layer", 1, [6, 8], [[1], [1]], [[(0, 1.0)], []])), "merged tokens at the encoder"),
    ],
)
def test_a_plan_that_is_not_the_prompts_is_refused(change, message):
    """With the request's name."""
    model = model_of("qwen2_5_vl")
    group = hand_made(model, GRIDS[0], (3,), 0, [drawn("layer", 1, 0.5)])
    wrong = dataclasses.replace(group, keep=change(group.keep))
    for use in (by_context, by_policy):
        with pytest.raises(ValueError, match=f"request 'r0'.*{message}"):
            use(model, samples_of([wrong]))


def test_a_model_that_does_not_fit_is_refused():
    model = model_of("qwen2_5_vl")
    groups = [hand_made(model, GRIDS[0], (3,), 0, [drawn("layer", 4, 0.5)])]
    for use in (by_context, by_policy):
        with pytest.raises(ValueError, match=r"a layer from 1 to 3, got 4 \(keep.sites\)"):
            use(model, samples_of(groups))
    text = tiny_model("qwen2")
    with pytest.raises(ValueError, match="a model with a vision tower"), replay(text, groups):
        pass
    with pytest.raises(ValueError, match=r"request 'r0'.*a model with a vision tower"):
        by_policy(text, samples_of(groups))
