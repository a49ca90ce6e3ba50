"""Spans with a vocabulary of their own, and samples that end because they repeat themselves."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.kernels import sampling
from foveate.kernels.sampling import masks
from foveate.rollout.config import SamplingParams
from foveate.rollout.tagged import OUTSIDE, MaskRows, Place, SpanMasks, TaggedSpan
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request

DEPTH = TaggedSpan(opening=200, closing=201, inside=tuple(range(210, 220)), least=2, most=4)
BOX = TaggedSpan(opening=202, closing=203, inside=(48, 49, 50), least=4, most=4, exclusive=False)
SPECIAL = {*DEPTH.inside, DEPTH.closing, BOX.closing}


def read(ids: list[int], spans=(DEPTH, BOX)) -> tuple[list[tuple[int, list[int]]], list[int], bool]:
    """What a grammar of its own finds: (tag, ids inside) of each span, ids outside, whether the last is open."""
    found, outside, i = [], [], 0
    while i < len(ids):
        span = next((s for s in spans if s.opening == ids[i]), None)
        if span is None:
            outside.append(ids[i])
            i += 1
            continue
        end = ids.index(span.closing, i) if span.closing in ids[i:] else len(ids)
        found.append((span.opening, ids[i + 1 : end]))
        i = end + 1
    return found, outside, bool(found) and i > len(ids)


def request(seed: int, n: int = 4, **sampling) -> Request:
    # Tags are rare among 256 ids: a bias makes spans frequent.
    fields = {"max_tokens": 40, "ignore_eos": True, "logit_bias": {200: 8.0, 202: 8.0}, "tagged": (DEPTH, BOX)}
    return Request([3, 1, 4], n=n, sampling=SamplingParams(seed=seed, **{**fields, **sampling}))


@pytest.mark.parametrize("pressure", [{}, {"kv_memory": 60_000, "max_batch_tokens": 5}])
def test_spans_hold_what_they_may(make_engine, pressure):
    engine = make_engine("qwen3", **pressure)
    groups = engine.generate([request(seed) for seed in range(6)], strict=True)
    assert not pressure or engine.stats()["preempted"] > 0
    spans = []
    for group in groups:
        for rollout in group.rollouts:
            found, outside, is_open = read(rollout.token_ids.tolist())
            assert not SPECIAL & {*outside}
            for index, (opening, inside) in enumerate(found):
                span = DEPTH if opening == DEPTH.opening else BOX
                assert {*inside} <= {*span.inside}
                assert len(inside) <= span.most
                if not (is_open and index == len(found) - 1):
                    assert len(inside) >= span.least
            spans += [(opening, len(inside)) for opening, inside in (found[:-1] if is_open else found)]
    assert {(200, 2), (200, 3), (200, 4), (202, 4)} == {*spans}, "each legal length comes"


def test_log_kept_is_the_mass_of_the_mask(make_engine, forward_logits):
    model = tiny_model("qwen3")
    (group,) = make_engine(model, ban_vision_tokens=False).generate([request(1, logit_bias=None)], strict=True)
    for rollout in group.rollouts:
        logprobs = forward_logits(model, group, rollout).log_softmax(-1)
        vocab = logprobs.shape[1]
        everything = masks.of_ids(range(vocab), vocab)
        place, spans = OUTSIDE, SpanMasks((DEPTH, BOX), everything, everything, vocab)
        for row, token, log_kept in zip(logprobs, rollout.token_ids.tolist(), rollout.log_kept, strict=True):
            kept = row[masks.unpack(spans.mask(place, early=False), vocab)].logsumexp(0)
            torch.testing.assert_close(log_kept, kept, atol=1e-4, rtol=0)
            place = spans.after(place, token)


def test_neighbours_are_untouched(make_engine):
    plain = Request([3, 1, 4], n=2, sampling=SamplingParams(seed=9, max_tokens=20, ignore_eos=True))
    (alone,) = make_engine("qwen3").generate([plain])
    (beside, _) = make_engine("qwen3").generate([plain, request(1)])
    for one, other in zip(alone.rollouts, beside.rollouts, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()


def test_stops_and_bans_hold_outside(make_engine):
    """Stop ids end a sample outside a span only, and not before min_tokens; what is banned stays so inside."""
    sampling = {"stop_token_ids": tuple(range(64)), "min_tokens": 6, "banned_token_ids": (210, 211)}
    for group in make_engine("qwen3").generate([request(seed, **sampling) for seed in range(8)], strict=True):
        for rollout in group.rollouts:
            ids = rollout.token_ids.tolist()
            found, _, is_open = read(ids)
            assert not {210, 211} & {*ids}
            assert rollout.finish_reason == "length" or (len(ids) > 5 and ids[-1] < 64 and not is_open)
            early = [i for i in ids[:6] if i < 64]
            inside = [i for _, part in found for i in part]
            assert all(i in inside for i in early)


def test_masks_and_places():
    everything = masks.of_ids(range(256), 256)
    early = masks.of_ids(set(range(256)) - {7}, 256)
    spans = SpanMasks((DEPTH,), everything, early, 256)
    outside = spans.mask(OUTSIDE, early=False)
    assert (~masks.unpack(outside, 256)).nonzero().flatten().tolist() == [201, *DEPTH.inside]
    assert masks.has(outside, 7)
    assert not masks.has(spans.mask(OUTSIDE, early=True), 7)
    assert spans.mask(OUTSIDE, early=False) is outside
    place = spans.after(OUTSIDE, 200)
    for length, allowed in enumerate([DEPTH.inside, DEPTH.inside, *([(201, *DEPTH.inside)] * 2), (201,)]):
        assert place == Place(0, length)
        assert masks.unpack(spans.mask(place, early=False), 256).nonzero().flatten().tolist() == list(allowed)
        place = spans.after(place, 210)
    assert spans.after(Place(0, 3), 201) == OUTSIDE
    assert spans.after(OUTSIDE, 5) == OUTSIDE


def test_mask_rows_are_shared_stacked_and_kept():
    one, other = (masks.of_ids(ids, 70) for ids in ([1, 69], [2, 33]))
    rows = MaskRows()
    assert rows([]) is None
    assert rows([None, None]) is None
    assert rows([one, one]) is one
    stacked = rows([one, None, other])
    kept = [masks.unpack(row, 70).nonzero().flatten().tolist() for row in stacked]
    assert kept == [[1, 69], list(range(70)), [2, 33]]
    assert rows([one, None, other]) is stacked
    assert rows([one, other]).tolist() == [one.tolist(), other.tolist()]
    assert rows([other, one]).tolist() == [other.tolist(), one.tolist()]


def test_a_batch_has_no_mask_of_its_vocabulary(make_engine, monkeypatch):
    """Default bans are one shared row; a request with bans of its own costs a row of bits for each sample."""
    engine = make_engine("qwen2_5_vl")
    seen, draw = [], sampling.sample_from_hidden

    def recorded(*args, **given):
        assert given.get("banned") is None
        seen.append(given["allowed"])
        return draw(*args, **given)

    monkeypatch.setattr(sampling, "sample_from_hidden", recorded)
    plain = Request([3, 1, 4], n=3, sampling=SamplingParams(max_tokens=6, ignore_eos=True))
    engine.generate([plain, plain], strict=True)
    words = masks.num_words(engine.spec.vocab_size)
    assert {id(allowed) for allowed in seen} == {id(engine._intake.allowed)}
    assert seen[0].shape == (words,)
    seen.clear()
    own = Request([3, 1, 4], n=2, sampling=SamplingParams(max_tokens=6, ignore_eos=True, banned_token_ids=(5, 9)))
    engine.generate([plain, own], strict=True)
    assert {(tuple(allowed.shape), allowed.dtype) for allowed in seen} == {((5, words), torch.int32)}
    assert len({id(allowed) for allowed in seen}) == 1, "stacked once, as nothing changed"


def test_nothing_banned_is_no_mask(make_engine, monkeypatch):
    engine = make_engine("qwen3", ban_vision_tokens=False)
    seen, draw = [], sampling.sample_from_hidden
    monkeypatch.setattr(sampling, "sample_from_hidden", lambda *a, **k: (seen.append(k["allowed"]), draw(*a, **k))[1])
    engine.generate([Request([3, 1, 4], sampling=SamplingParams(max_tokens=3))], strict=True)
    assert seen
    assert all(allowed is None for allowed in seen)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inside": ()}, "ids >= 0, at least one inside"),
        ({"inside": (1, -2)}, "ids >= 0"),
        ({"opening": 1.5}, "ids >= 0"),
        ({"closing": 200}, "two tags that are not among the ids inside"),
        ({"inside": (201, 5)}, "two tags that are not among the ids inside"),
        ({"least": -1}, "an int least >= 0"),
        ({"least": 5, "most": 4}, "an int most >= 5"),
        ({"most": 0}, "an int most >= 1"),
        ({"least": 1.0}, "an int least >= 0"),
        ({"most": 2.5}, "an int most >= 1"),
    ],
)
def test_spans_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=rf"expected {message}.*\(tagged\)"):
        TaggedSpan(**{"opening": 200, "closing": 201, "inside": (210,), **fields})


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"tagged": (TaggedSpan(200, 10**6, (1,)),)}, "ids < "),
        ({"tagged": (DEPTH, TaggedSpan(200, 205, (1,)))}, "an opening tag for each span"),
        ({"banned_token_ids": (201,)}, "tags that are not banned"),
        ({"banned_token_ids": DEPTH.inside}, "an id inside that is not banned"),
        ({"tagged": (DEPTH, TaggedSpan(201, 205, (1,)))}, "opening tags that may be drawn outside the spans"),
        ({"tagged": (DEPTH, TaggedSpan(215, 205, (1,)))}, "may be drawn outside the spans, got [215]"),
        ({"stop_token_ids": (7, 203), "min_tokens": 1}, "no stop ids, with min_tokens, got 203"),
        ({"allowed_token_ids": (200, 201, 202, 203, *DEPTH.inside, *BOX.inside),
          "tagged": (TaggedSpan(200, 201, (202, 203, *DEPTH.inside, *BOX.inside)),
                     )}, None),
    ],
)  # fmt: skip
def test_spans_that_the_request_cannot_have(make_engine, sampling, message):
    engine = make_engine("qwen3")
    if message is None:  # legal: only the opening tag is left outside
        (group,) = engine.generate([request(0, logit_bias=None, **sampling)], strict=True)
        assert all(rollout.token_ids[0] == 200 for rollout in group.rollouts)
        return
    (group,) = engine.generate([request(0, **sampling)])
    assert message in str(group.error)
    assert "(tagged)" in str(group.error)
    assert repr(group.request_id) in str(group.error)
    assert engine.memory_report()["kv_pages_used"] == 0


def test_an_opening_tag_may_be_an_id_that_is_not_exclusive(make_engine):
    """49 opens a span outside of them, and is a plain id in a box."""
    inner, bias = TaggedSpan(49, 205, (220, 221), most=1), {202: 8.0, 49: 8.0}
    groups = make_engine("qwen3").generate([request(seed, tagged=(BOX, inner), logit_bias=bias) for seed in range(6)])
    spans = [s for g in groups for r in g.rollouts for s in read(r.token_ids.tolist(), (BOX, inner))[0]]
    assert any(49 in inside for opening, inside in spans if opening == BOX.opening)
    assert any(opening == 49 for opening, _ in spans)


def test_a_closing_tag_may_end_a_sample(make_engine):
    """As a stop id without min_tokens; the same tag with min_tokens is refused, for it may have to be drawn."""
    spans = (TaggedSpan(200, closing=3, inside=(210, 211), most=2),)
    fields = {"stop_token_ids": (3,), "tagged": spans, "logit_bias": {200: 30.0}}
    engine = make_engine("qwen3")
    (group,) = engine.generate([request(0, **fields)], strict=True)
    for rollout in group.rollouts:
        ids = rollout.token_ids.tolist()
        assert rollout.finish_reason == "stop"
        assert (ids[0], ids[-1]) == (200, 3)
        assert len(ids) <= 4
    (group,) = engine.generate([request(0, min_tokens=20, **fields)])
    assert "closing tags that are no stop ids, with min_tokens, got 3 (tagged)" in str(group.error)


def test_wrong_types_are_refused():
    with pytest.raises(ValueError, match=r"expected TaggedSpans, got .*\(tagged\)"):
        SamplingParams(tagged=((200, 201, (5,)),))
    for name, value in (("max_certain", 0), ("max_certain", 1.5), ("certain", 1.0), ("certain", 0)):
        with pytest.raises(ValueError, match=rf"\({name}\)"):
            SamplingParams(**{name: value})


@pytest.fixture
def stubborn():
    """A model that says 65 again and again, with probability near 1."""
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight.zero_()
        for parameter in (model.model.embed_tokens.weight,):
            parameter[:, 0] = parameter[:, 0].abs() + 50
        model.lm_head.weight[65, 0] = 20.0
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_loop_ends_as_repetition(make_engine, stubborn, temperature):
    sampling = SamplingParams(max_tokens=50, max_certain=12, temperature=temperature, ignore_eos=True)
    (group,) = make_engine(stubborn).generate([Request([1, 2], n=2, sampling=sampling)], strict=True)
    for rollout in group.rollouts:
        assert rollout.finish_reason == "repetition"
        assert rollout.token_ids.tolist() == [65] * 12
        assert (rollout.logprobs > math.log(0.99)).all()


def test_only_a_run_of_certain_tokens_counts(make_engine, stubborn):
    """An id that is not certain begins the count anew; stop ids and the length come first; off by default."""

    def run(**sampling):
        given = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0, **sampling)
        (group,) = make_engine(stubborn).generate([Request([1, 2], sampling=given)], strict=True)
        return group.rollouts[0].finish_reason, len(group.rollouts[0].token_ids)

    assert run() == ("length", 30)
    assert run(max_certain=31) == ("length", 30)
    assert run(max_certain=30) == ("repetition", 30)
    assert run(max_certain=1, stop_token_ids=(65,)) == ("stop", 1)
    # Drawn among two ids of one half each, nothing is certain.
    with torch.no_grad():
        stubborn.lm_head.weight[66, 0] = 20.0
    assert run(max_certain=2) == ("length", 30)
