"""The parity checks fail when the engine is wrong: one deliberate fault after the other, on its own functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from foveate.kernels import paged_attention, sampling
from foveate.kernels.paged_attention import reference
from foveate.kernels.sampling import SampleOutput
from foveate.rollout.config import SamplingParams
from foveate.rollout.models import decoder
from foveate.rollout.models.decoder import Decoder
from foveate.rollout.planner import Planner
from foveate.rollout.processor import PromptProcessor
from foveate.rollout.runner import Runner
from foveate.rollout.scheduler import Sequence
from foveate.rollout.testing import FAMILIES, special_id, tiny_model
from foveate.rollout.types import Request
from foveate.rollout.vision import VisionEncoder

Patch = Callable[[pytest.MonkeyPatch], None]
EVERY, VISION = FAMILIES, ("qwen2_5_vl",)
IMAGE = special_id("<|image_pad|>")
MUTANTS: dict[str, tuple[Patch, tuple[str, ...]]] = {}


def mutant(families: tuple[str, ...] = EVERY) -> Callable[[Patch], Patch]:
    """Registers a fault and the families that it must show in."""

    def register(patch: Patch) -> Patch:
        MUTANTS[patch.__name__] = (patch, families)
        return patch

    return register


def _change(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, change: Callable) -> None:
    """Replaces owner.name by a function that gives the original, then the arguments, to `change`."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def _change_positions(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """change: (positions [3, P], next_position, ids) -> (positions, next_position)"""

    def positions(original, self, ids, grids):
        planes, following = original(self, ids, grids)
        return change(planes.clone(), following, ids)

    _change(monkeypatch, PromptProcessor, "_positions", positions)


def _change_plan(monkeypatch: pytest.MonkeyPatch, change: Callable, steps=("prefill", "decode")) -> None:
    """change: (plan) -> fields of the plan to replace"""

    def plan(original, self, *rows):
        return [dataclasses.replace(made, **change(made)) for made in original(self, *rows)]

    for step in steps:
        _change(monkeypatch, Planner, step, plan)


def _change_attention(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    for name in ("prefill", "decode"):
        _change(monkeypatch, paged_attention, name, change)


@mutant(VISION)
def one_dimensional_positions(monkeypatch):
    _change_positions(monkeypatch, lambda planes, following, ids: (torch.arange(len(ids)).expand(3, -1), len(ids)))


@mutant(VISION)
def height_and_width_swapped(monkeypatch):
    _change_positions(monkeypatch, lambda planes, following, ids: (planes[[0, 2, 1]], following))


@mutant(VISION)
def sections_of_the_planes_swapped(monkeypatch):
    def rotary(original, self, positions, dtype):
        return original(self, positions[[1, 0, 2]], dtype)

    _change(monkeypatch, Decoder, "rotary", rotary)


@mutant(VISION)
def images_one_position_late(monkeypatch):
    def late(planes, following, ids):
        planes[:, ids == IMAGE] += 1
        return planes, following

    _change_positions(monkeypatch, late)


@mutant(VISION)
def text_after_images_one_position_late(monkeypatch):
    def late(planes, following, ids):
        if (places := (ids == IMAGE).nonzero()).numel():
            planes[:, int(places[-1]) + 1 :] += 1
            following += 1
        return planes, following

    _change_positions(monkeypatch, late)


@mutant()
def prompt_one_position_late(monkeypatch):
    """Only differences of positions count, so the prompt is moved against its completion."""
    _change_positions(monkeypatch, lambda planes, following, ids: (planes + 1, following))


@mutant()
def completion_one_position_late(monkeypatch):
    late = property(lambda self: self.group.prompt.next_position + len(self.token_ids))
    monkeypatch.setattr(Sequence, "next_position", late)


@mutant()
def completion_position_stands_still(monkeypatch):
    monkeypatch.setattr(Sequence, "next_position", property(lambda self: self.group.prompt.next_position))


@mutant()
def last_prompt_token_not_visible(monkeypatch):
    def hide(plan):
        return {"visit_kv_len": plan.visit_kv_len - (~plan.visit_causal & (plan.visit_kv_len > 1))}

    _change_plan(monkeypatch, hide, ("decode",))


@mutant()
def own_newest_token_not_visible(monkeypatch):
    def hide(plan):
        return {"visit_kv_len": plan.visit_kv_len - (plan.visit_causal & (plan.visit_kv_len > 1))}

    _change_plan(monkeypatch, hide, ("decode",))


@mutant()
def a_token_overwrites_its_predecessor(monkeypatch):
    def overwrite(plan):
        return {"slots": plan.slots - (plan.slots % plan.page_size == 3).long()}

    _change_plan(monkeypatch, overwrite)


@mutant()
def a_page_boundary_is_missed(monkeypatch):
    def stay(plan):
        return {"visit_kv_len": plan.visit_kv_len.clip(max=plan.page_size)}

    _change_plan(monkeypatch, stay, ("decode",))


@mutant()
def pages_in_another_order(monkeypatch):
    def reverse(plan):
        pages = plan.visit_pages.copy()
        for start, stop in zip(plan.visit_page_offsets[:-1], plan.visit_page_offsets[1:], strict=True):
            pages[start:stop] = pages[start:stop][::-1]
        return {"visit_pages": pages}

    _change_plan(monkeypatch, reverse, ("decode",))


@mutant()
def completion_of_another_sample(monkeypatch):
    def swap(plan):
        pages, leaves = plan.visit_pages.copy(), plan.visit_causal.nonzero()[0]
        firsts = plan.visit_page_offsets[leaves]
        pages[firsts] = pages[firsts[::-1]]
        return {"visit_pages": pages}

    _change_plan(monkeypatch, swap, ("decode",))


@mutant()
def prompt_of_another_request(monkeypatch):
    def swap(plan):
        pages = plan.visit_pages.copy()
        firsts = plan.visit_page_offsets[(~plan.visit_causal & (plan.visit_depth == 0)).nonzero()[0]]
        pages[firsts] = pages[firsts[::-1]]
        return {"visit_pages": pages}

    _change_plan(monkeypatch, swap, ("decode",))


@mutant()
def query_heads_read_the_wrong_kv_head(monkeypatch):
    """h % kv_heads instead of h // (heads // kv_heads)"""

    def attend(original, queries, keys, values, plan, **kwargs):
        heads, kv_heads = queries.shape[1], keys.shape[2]
        order = torch.arange(heads).view(heads // kv_heads, kv_heads).t().flatten()
        out = torch.zeros_like(queries)
        out[:, order] = original(queries[:, order], keys, values, plan, **kwargs)
        return out

    _change_attention(monkeypatch, attend)


@mutant()
def segments_merged_without_weights(monkeypatch):
    def merge(out_a, lse_a, out_b, lse_b):
        return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)

    monkeypatch.setattr(reference, "merge", merge)


@mutant()
def prompt_reads_its_future(monkeypatch):
    def see_all(plan):
        return {"visit_causal": plan.visit_causal & False}

    _change_plan(monkeypatch, see_all, ("prefill",))


@mutant()
def keys_of_the_wrong_layer(monkeypatch):
    _read_wrong_layer(monkeypatch, use_keys=True)


@mutant()
def values_of_the_wrong_layer(monkeypatch):
    _read_wrong_layer(monkeypatch, use_keys=False)


def _read_wrong_layer(monkeypatch: pytest.MonkeyPatch, use_keys: bool) -> None:
    """The second of two layers reads what the first one stored."""
    pools: list[torch.Tensor] = []

    def attend(original, queries, keys, values, plan, **kwargs):
        pools.append(keys if use_keys else values)
        wrong = pools[-2] if len(pools) % 2 == 0 else pools[-1]
        return original(queries, *((wrong, values) if use_keys else (keys, wrong)), plan, **kwargs)

    _change_attention(monkeypatch, attend)


@mutant(("qwen2", "qwen2_5_vl"))
def qkv_bias_dropped(monkeypatch):
    def heads(original, self, x, layer):
        return original(self, x, dataclasses.replace(layer, qkv=[(weight, None) for weight, _ in layer.qkv]))

    _change(monkeypatch, Decoder, "heads", heads)


@mutant(("qwen3",))
def head_norms_dropped(monkeypatch):
    def heads(original, self, x, layer):
        return original(self, x, dataclasses.replace(layer, q_norm=None, k_norm=None))

    _change(monkeypatch, Decoder, "heads", heads)


@mutant()
def gate_and_up_swapped(monkeypatch):
    def mlp(original, self, x, layer):
        return original(
            self, x, dataclasses.replace(layer, gate_up=[(w.roll(len(w) // 2, 0), b) for w, b in layer.gate_up])
        )

    _change(monkeypatch, Decoder, "mlp", mlp)


@mutant()
def norm_epsilon_forgotten(monkeypatch):
    """1e-2 instead of 1e-6, so that it shows on random weights."""
    _change(
        monkeypatch, decoder, "rms_norm", lambda original, x, weight, eps, **kwargs: original(x, weight, 1e-2, **kwargs)
    )


@mutant(VISION)
def features_of_another_image(monkeypatch):
    def encode(original, self, *images):
        features = original(self, *images)
        for key in features:
            others = [k for k in features if k != key and features[k].shape == features[key].shape]
            if others:
                return features | {key: features[others[0]], others[0]: features[key]}
        return features

    _change(monkeypatch, VisionEncoder, "encode", encode)


@mutant(VISION)
def features_one_token_late(monkeypatch):
    def encode(original, self, *images):
        return {key: feature.roll(1, 0) for key, feature in original(self, *images).items()}

    _change(monkeypatch, VisionEncoder, "encode", encode)


@mutant(VISION)
def images_not_seen(monkeypatch):
    def embed(original, self, chunks):
        tokens = torch.cat([chunk.segment.source.token_ids[chunk.span] for chunk in chunks])
        return torch.nn.functional.embedding(tokens, self.weights.embed), None

    _change(monkeypatch, Runner, "_embed", embed)


@mutant()
def logprobs_over_the_kept_set(monkeypatch):
    def sample(original, *args, **kwargs):
        drawn = original(*args, **kwargs)
        return SampleOutput(drawn.token_ids, drawn.logprobs - drawn.log_kept, drawn.log_kept, drawn.entropy)

    _change(monkeypatch, sampling, "sample_from_hidden", sample)


@pytest.fixture(scope="module")
def models():
    return {family: tiny_model(family, seed=7) for family in EVERY}


@pytest.fixture
def assert_parity(models, make_engine, chat, picture, assert_greedy, assert_logprobs, banned_by_default):
    """(family, temperature): a batch in which every fault can show, checked against transformers.

    Segments of several pages, two images of one shape in one prompt, two samples a group, a plain prompt.
    """

    def check(family: str, temperature: float) -> None:
        engine = make_engine(models[family], backend="reference")
        engine._runner.kv_pool.zero_()  # a fault that reads unwritten memory must show in the numbers, not as NaN
        sampling = {"temperature": temperature, "max_tokens": 20, "ignore_eos": True, "seed": 11}
        pictures = [picture(56, 112, 1), picture(56, 112, 2), picture(140, 56, 3)] if family in VISION else []
        requests = [
            chat("Which of these is larger?", pictures, n=2, **sampling),
            chat("What do you see, and where?", pictures[1:2], system="Another system.", n=2, **sampling),
            Request("Plain text of some length.", n=2, sampling=SamplingParams(**sampling)),
        ]
        groups = engine.generate(requests, strict=True)
        if temperature == 0:
            assert_greedy(engine.model, groups, banned_by_default(engine))
        assert_logprobs(engine.model, groups)

    return check


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("family", EVERY)
def test_no_mutant(family, temperature, assert_parity):
    assert_parity(family, temperature)


CASES = [(family, name, 0) for name, (_, families) in MUTANTS.items() for family in families]
CASES += [("qwen2_5_vl", name, 1.0) for name, (_, families) in MUTANTS.items() if "qwen2_5_vl" in families]


@pytest.mark.parametrize(("family", "name", "temperature"), CASES)
def test_mutant_is_caught(family, name, temperature, assert_parity, monkeypatch):
    MUTANTS[name][0](monkeypatch)
    with pytest.raises(AssertionError):
        assert_parity(family, temperature)
