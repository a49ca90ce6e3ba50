"""Penalties and biases against transformers' own processors, alone, beside other requests and under pressure."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from foveate.kernels import sampling
from foveate.rollout.config import SamplingParams
from foveate.rollout.logits import Adjuster, TokenCounts, adjust
from foveate.rollout.policy import Sample, policy_logprobs
from foveate.rollout.testing import FAMILIES, tiny_model
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request

TOLERANCE = 5e-5  # of log-probs at initializer_range 0.2; the project's contract on equality with transformers
BIAS = {65: 4.0, 66: -3.5, 7: 0.25, 200: 1.0}
PENALTIES = {
    "repetition": {"repetition_penalty": 1.7},
    "repetition below one": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.75},
    "negative": {"presence_penalty": -0.4, "frequency_penalty": -0.3},
    "bias": {"logit_bias": BIAS},
    "all": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": BIAS},
}


def adjusted(logits: torch.Tensor, prompt: list[int], drawn: list[int], params: SamplingParams) -> torch.Tensor:
    """float [V]: transformers' processors for bias and repetition, then OpenAI's formula an id at a time."""
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[i], b] for i, b in params.logit_bias]))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    row = processors(torch.tensor([prompt + drawn]), logits[None].clone())[0].double().numpy()
    for token in range(len(row)):
        times = drawn.count(token)
        row[token] -= times * params.frequency_penalty + (times > 0) * params.presence_penalty
    return torch.from_numpy(row)


def random_ids(seed: int, length: int, vocab: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def counted(prompt: list[int], drawn: list[int], params: SamplingParams) -> TokenCounts:
    counts = TokenCounts(torch.tensor(prompt if params.repetition_penalty != 1 else [], dtype=torch.int64))
    counts.draw(drawn)
    return counts


class TestAdjust:
    @pytest.mark.parametrize("lengths", [(1, 0), (0, 1), (9, 1), (40, 33), (300, 300)], ids=str)
    @pytest.mark.parametrize("case", PENALTIES)
    def test_one_row(self, case, lengths):
        params = SamplingParams(**PENALTIES[case])
        prompt, drawn = (random_ids(seed, length, 201) for seed, length in enumerate(lengths))
        logits = 3 * torch.randn(1, 201)
        logits[0, :3] = torch.tensor([0.0, -0.0, -torch.inf])
        expected = adjusted(logits[0], prompt, drawn, params)
        ours = adjust(logits.clone(), [(0, params, counted(prompt, drawn, params))])
        torch.testing.assert_close(ours[0].double(), expected, atol=4e-5, rtol=1e-6)  # counts go to 7: 7 ulp of 20
        changes = bool(params.logit_bias or drawn or (prompt and params.repetition_penalty != 1))
        assert torch.equal(ours, logits) != changes

    def test_rows_of_a_batch_do_not_touch_each_other(self):
        logits = 3 * torch.randn(9, 201)
        rows = []
        expected = logits.clone()
        for row, fields in zip((7, 1, 2, 4, 8, 0), PENALTIES.values(), strict=False):
            params = SamplingParams(**fields)
            counts = counted(random_ids(row, 5 * row, 201), random_ids(row + 9, 30 - row, 201), params)
            rows.append((row, params, counts))
            expected[row] = adjust(logits[row : row + 1].clone(), [(0, params, counts)])[0]
        ours = adjust(logits.clone(), rows)
        assert torch.equal(ours, expected)
        assert torch.equal(ours[[3, 5, 6]], logits[[3, 5, 6]])

    def test_nothing_to_do(self):
        logits = torch.randn(2, 5)
        assert torch.equal(adjust(logits.clone(), []), logits)
        nothing = SamplingParams(presence_penalty=1.0)
        assert torch.equal(adjust(logits.clone(), [(1, nothing, counted([], [], nothing))]), logits)


class TestTokenCounts:
    @pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100])
    def test_a_token_at_a_time(self, length):
        prompt, drawn = random_ids(1, 20, 50), random_ids(2, length, 60)
        counts = TokenCounts(torch.tensor(prompt))
        for token in drawn:
            counts.draw([token])
        found = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
        assert found == {token: drawn.count(token) for token in {*prompt, *drawn}}
        assert len(found) == len(counts.ids)
        assert counts.num_drawn == length


def assert_follows(model, group, forward_logits, seed: int) -> None:
    """Tokens, log-probs, entropy: of the adjusted logits of a plain forward, by transformers' processors."""
    params, prompt = group.request.sampling, group.prompt_ids.tolist()
    for index, rollout in enumerate(group.rollouts):
        tokens = rollout.token_ids.tolist()
        logits = forward_logits(model, group, rollout)
        rows = torch.stack([adjusted(row, prompt, tokens[:i], params) for i, row in enumerate(logits)]).float()
        drawn = sampling.sample(
            rows,
            temperature=params.temperature,
            top_k=params.top_k,
            seeds=torch.full((len(rows),), _signed(sampling.sample_seed(seed, index))),
            steps=torch.arange(len(rows)),
            banned=_banned_pads(model, rows.shape[1]),
        )
        assert drawn.token_ids.tolist() == tokens
        z = (rows / (params.temperature or 1.0)).log_softmax(-1)
        torch.testing.assert_close(
            rollout.logprobs, z.gather(1, rollout.token_ids[:, None])[:, 0], atol=TOLERANCE, rtol=0
        )
        torch.testing.assert_close(rollout.entropy, -(z.exp() * z).sum(-1), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(rollout.log_kept, drawn.log_kept, atol=TOLERANCE, rtol=0)


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _banned_pads(model, vocab: int) -> torch.Tensor:
    banned = torch.zeros(vocab, dtype=torch.bool)
    banned[263:] = True  # beyond the tokenizer
    for name in ("image_token_id", "video_token_id", "vision_start_token_id"):
        if hasattr(model.config, name):
            banned[getattr(model.config, name)] = True
    return banned


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_follows_transformers(family, make_engine, chat, picture, forward_logits):
    """Greedy and sampled; image placeholders count as ids of the prompt, as in input_ids."""
    model = tiny_model(family)
    pictures = [picture(56, 84)] if family.endswith("_vl") else []
    requests = [
        chat("aab?", pictures, n=2, max_tokens=12, seed=5, ignore_eos=True, **how, **fields)
        for fields in PENALTIES.values()
        for how in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 40})
    ]
    groups = make_engine(model).generate(requests, strict=True)
    plain = make_engine(model).generate([chat("aab?", pictures, max_tokens=12, temperature=0.0, ignore_eos=True)])
    for group in groups:
        assert_follows(model, group, forward_logits, 5)
    greedy = [group.rollouts[0].token_ids.tolist() for group in groups[::2]]
    assert sum(tokens != plain[0].rollouts[0].token_ids.tolist() for tokens in greedy) >= 4


def mixed(chat) -> list[Request]:
    plain = [chat(text, n=2, max_tokens=26, seed=i, ignore_eos=True) for i, text in enumerate(("ab", "c", "ddd"))]
    strange = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, **fields))
        for r, fields in zip(plain * 3, PENALTIES.values(), strict=False)
    ]
    return [r for pair in zip(strange, plain * 3, strict=False) for r in pair]


def tokens_of(groups) -> list[list[list[int]]]:
    return [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]


def test_neighbours_without_penalties_are_untouched(make_engine, chat, monkeypatch):
    """Their tokens and log-probs are those of a batch without penalties, in which no logits are materialised here."""
    engine, requests = make_engine("llama"), mixed(chat)
    materialised = []
    real = Adjuster.__call__
    monkeypatch.setattr(Adjuster, "__call__", lambda *a: materialised.append(1) or real(*a))
    alone = engine.generate(requests[1::2], strict=True)
    assert not materialised
    beside = engine.generate(requests, strict=True)[1::2]
    assert materialised
    assert tokens_of(beside) == tokens_of(alone)
    for group, twin in zip(beside, alone, strict=True):
        for ours, theirs in zip(group.rollouts, twin.rollouts, strict=True):
            for name in ("logprobs", "log_kept", "entropy"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=TOLERANCE, rtol=0)


def test_they_survive_preemption(make_engine, chat, forward_logits):
    model = tiny_model("qwen3")
    full = make_engine(model).memory_report()
    small = make_engine(model, kv_memory=15 * full["kv_capacity"] // full["kv_pages"], max_batch_tokens=9)
    requests = mixed(chat)
    groups = small.generate(requests, strict=True)
    assert small._scheduler.num_preempted > 3
    assert tokens_of(groups) == tokens_of(make_engine(model).generate(requests, strict=True))
    assert_follows(model, groups[-2], forward_logits, groups[-2].request.sampling.seed)


def test_counts_are_let_go(make_engine, chat):
    engine = make_engine("llama")
    engine.generate(mixed(chat), strict=True)
    gc.collect()  # a group and its samples refer to each other
    assert len(engine._runner.adjuster._counts) == 0


@pytest.mark.parametrize(
    "off",
    [{"repetition_penalty": 1}, {"presence_penalty": 0}, {"frequency_penalty": -0.0}, {"logit_bias": {}}],
    ids=str,
)
def test_values_that_change_nothing(off):
    assert SamplingParams(**off).adjustments == ()


def test_biases_in_every_form():
    pairs = ((7, 0.25), (65, 4.0))
    forms = [{65: 4.0, 7: 0.25}, [(65, 4), [7, 0.25]], pairs, {np.int64(65): np.float32(4), 7: np.float64(0.25)}]
    for form in forms:
        params = SamplingParams(logit_bias=form)
        assert params.logit_bias == pairs
        assert (params.adjustments, hash(params)) == (("logit_bias",), hash(SamplingParams(logit_bias=pairs)))


def test_bans_stand_above_biases(make_engine, chat):
    request = chat("x", max_tokens=6, temperature=0.0, logit_bias={65: 90.0, 66: 60.0}, banned_token_ids=(65,))
    (group,) = make_engine("llama").generate([request], strict=True)
    assert group.rollouts[0].token_ids.tolist() == [66] * 6
    assert (group.rollouts[0].log_kept < -20).all()


@pytest.mark.parametrize("case", PENALTIES)
def test_the_trainer_refuses_them(case, make_engine, chat):
    model = tiny_model("llama")
    engine = make_engine(model)
    request = chat("x", n=2, max_tokens=3, **PENALTIES[case])
    name = next(iter(PENALTIES[case]))
    trainer = Trainer(model, engine, reward=lambda group: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=rf"expected request 'prompts\[1\]' to be .* own logits, got .* \({name}\)"):
        trainer.train_step([chat("x", n=2, max_tokens=3), request])
    assert engine.num_requests == 0
    (group,) = engine.generate([dataclasses.replace(request, request_id="mine")], strict=True)
    with pytest.raises(ValueError, match=rf"expected request 'mine' .* \({name}\)"):
        policy_logprobs(engine.spec, [Sample(group, group.rollouts[0])])
