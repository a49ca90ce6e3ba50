"""The demo's scenes, their words, and the statistics of their answers."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from foveate.rollout.demo.model import WORDS, make_model, make_processor
from foveate.rollout.demo.record import mcnemar
from foveate.rollout.demo.scenes import PLACES, QUESTIONS, SPLITS, scene_stream, split_sources
from foveate.rollout.demo.tasks import MAX_TOKENS, make_request, make_reward
from foveate.rollout.models import describe
from foveate.rollout.processor import PromptProcessor
from foveate.rollout.rewards import Fact, follows_format


def take(split, seed, count):
    return list(itertools.islice(scene_stream(split, seed), count))


@pytest.fixture(scope="module")
def scenes():
    return take("train", 3, 300)


@pytest.fixture(scope="module")
def tokenizer():
    return make_processor().tokenizer


def content(scene):
    return scene.image.tobytes(), scene.digits, scene.sources, scene.kind


def test_a_seed_determines_the_scenes():
    first, again, other = (take("train", seed, 40) for seed in (5, 5, 6))
    assert [content(scene) for scene in first] == [content(scene) for scene in again]
    assert not {content(scene) for scene in first} & {content(scene) for scene in other}


def test_splits_share_no_scan():
    sources = {split: set(split_sources(split)) for split in SPLITS}
    assert {split: len(ids) for split, ids in sources.items()} == SPLITS
    assert sum(SPLITS.values()) == 1797
    assert len(set().union(*sources.values())) == 1797
    for split in SPLITS:
        assert {source for scene in take(split, 0, 200) for source in scene.sources} <= sources[split]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held-out"):
        split_sources("test")


def test_answers_by_a_recount_from_the_data_set(scenes):
    labels = load_digits().target
    for scene in scenes:
        digits = [int(labels[source]) for source in scene.sources]
        assert [digit for _, digit in scene.digits] == digits
        assert 1 <= len(digits) <= 4
        at = {"top-left": digits[0]}
        expected = {"sum": np.sum(digits), "largest": np.sort(digits)[-1], "count": np.size(digits)} | at
        assert scene.answer == str(expected[scene.kind])
        if scene.kind == "top-left":
            assert scene.digits[0][0] == "top-left"


def test_digits_stand_in_their_places(scenes):
    quarters = {"top-left": (0, 0), "top-right": (0, 28), "bottom-left": (28, 0), "bottom-right": (28, 28)}
    for scene in scenes[:60]:
        pixels = np.asarray(scene.image)
        assert pixels.shape == (56, 56, 3)
        places = [place for place, _ in scene.digits]
        assert places == sorted(set(places), key=PLACES.index)
        for place, (top, left) in quarters.items():
            ink = pixels[top : top + 28, left : left + 28].max()
            assert (ink > 100) == (place in places)


def find_scan(quarter, scan):
    """(side, top, left) at which the enlarged scan stands in a 28 x 28 quarter, None if nowhere."""
    grey = Image.fromarray(np.round(scan * 255 / 16).astype(np.uint8))
    for side in range(20, 27):
        tile = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC))
        for top, left in itertools.product(range(29 - side), repeat=2):
            if np.array_equal(quarter[top : top + side, left : left + side], tile):
                return side, top, left
    return None


def test_each_scan_stands_where_the_facts_say_at_any_size_and_offset(scenes):
    scans = load_digits().images
    found = []
    for scene in scenes[:80]:
        pixels = np.asarray(scene.image)[..., 0]
        for (place, _), source in zip(scene.digits, scene.sources, strict=True):
            top, left = 28 * place.startswith("bottom"), 28 * place.endswith("right")
            found.append(find_scan(pixels[top : top + 28, left : left + 28], scans[source]))
    assert None not in found
    assert {side for side, _, _ in found} == set(range(20, 27))
    # Free jitter: both offsets take all values that the size allows, each without the other.
    assert len({(top, left) for _, top, left in found}) > 40
    assert sum(top != left for _, top, left in found) > 0.6 * len(found)


def test_shares_of_kinds_and_counts():
    scenes = take("train", 1, 2000)
    kinds, counts = Counter(scene.kind for scene in scenes), Counter(len(scene.digits) for scene in scenes)
    # Five standard errors of a share p of 2,000 scenes are at most 5 sqrt(.25 / 2000) = 0.056.
    for kind, share in zip(QUESTIONS, (1 / 8, 3 / 8, 1 / 8, 3 / 8), strict=True):
        assert abs(kinds[kind] / 2000 - share) < 0.056
    for count, share in zip((1, 2, 3, 4), (0.3, 0.3, 0.25, 0.15), strict=True):
        assert abs(counts[count] / 2000 - share) < 0.056


def test_tokenizer_round_trip(scenes, tokenizer):
    longest = 0
    for scene in scenes:
        for text in (scene.target, scene.question):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split())
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        longest = max(longest, len(tokenizer(scene.target)["input_ids"]) + 1)
    assert longest < MAX_TOKENS
    for number in range(4 * 9 + 1):
        assert tokenizer.decode(tokenizer(str(number))["input_ids"]) == str(number)
    assert len(tokenizer) == len(WORDS) == len(set(WORDS))
    assert [tokenizer.convert_tokens_to_ids(word) for word in WORDS] == list(range(len(WORDS)))


def test_chat_template(scenes, tokenizer):
    request = make_request(scenes[0])
    text = tokenizer.apply_chat_template(request.prompt, tokenize=False, add_generation_prompt=True)
    question = scenes[0].question
    image = "<|vision_start|> <|image_pad|> <|vision_end|>"
    assert text == f"<|im_start|> user {image} {question} <|im_end|> <|im_start|> assistant"
    messages = [{"role": "user", "content": "sum of digits ?"}, {"role": "assistant", "content": "7"}]
    plain = tokenizer.apply_chat_template(messages, tokenize=False)
    assert plain.strip() == "<|im_start|> user sum of digits ? <|im_end|> <|im_start|> assistant 7 <|im_end|>"


def test_an_image_is_four_tokens(scenes):
    processor, spec = make_processor(), describe(make_model(0))
    prompt = PromptProcessor(processor, spec.vision, spec.vocab_size).prepare(make_request(scenes[0]))
    assert [image.num_tokens for image in prompt.images] == [4]
    words = [WORDS[i] for i in prompt.token_ids.tolist()]
    assert words[:8] == ["<|im_start|>", "user", "<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>"]
    assert words[-3:] == ["<|im_end|>", "<|im_start|>", "assistant"]


def test_a_seed_determines_the_model():
    first, again, other = (make_model(seed).lm_head.weight for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_targets_earn_the_full_reward_and_wrong_ones_less(scenes):
    reward = make_reward()
    judge, accuracy = reward.rewards[2].judge, reward.rewards[0]
    assert [part.name for part in reward.rewards] == ["accuracy", "format", "perception", "repetition"]
    for scene in scenes[:50]:
        assert follows_format(scene.target)
        assert accuracy.score(scene.target, scene.answer) == 1.0
        facts = [Fact(*fact) for fact in scene.facts]
        assert judge(scene.target, facts) == 1.0
        place, digit = scene.digits[0]
        wrong = scene.target.replace(f"{place} {digit}", f"{place} {(digit + 1) % 10}")
        assert judge(wrong, facts) == pytest.approx(1 - 1 / len(scene.digits))
    assert make_reward(with_perception=False).weights["perception"] == 0


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    # 2 (1 + 12 + 66) / 2^12; 2 (1 + 6) / 2^6; all on one side: 2 / 2^4; a tie and nothing at all: 1.
    [(2, 10, 158 / 4096), (1, 5, 14 / 64), (0, 4, 2 / 16), (3, 3, 1.0), (0, 0, 1.0), (10, 2, 158 / 4096)],
)
def test_mcnemar_by_hand(lost, gained, p_value):
    before = [True] * lost + [False] * gained + [True, True, False]
    after = [False] * lost + [True] * gained + [True, True, False]
    test = mcnemar(before, after)
    assert (test.lost, test.gained) == (lost, gained)
    assert test.p_value == pytest.approx(p_value, rel=1e-12)


def test_mcnemar_refuses_other_scenes():
    with pytest.raises(ValueError, match="expected 2 answers, got 1"):
        mcnemar([True, False], [True])
