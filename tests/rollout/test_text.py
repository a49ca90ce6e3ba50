"""Text that grows a token at a time against the text of all tokens at once, and stop strings in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from foveate.kernels.sampling import SampleOutput
from foveate.rollout import output
from foveate.rollout.config import SamplingParams
from foveate.rollout.processor import Prompt
from foveate.rollout.scheduler import Group, Sequence
from foveate.rollout.testing import FIRST_SPECIAL, SPECIAL, special_id, tiny_processor
from foveate.rollout.text import TextDecoder
from foveate.rollout.types import Request

TOKENIZER = tiny_processor().tokenizer
TEXTS = {
    "ascii": "Is it 3 or 4?\n",
    "two bytes": "grün öde",
    "three bytes": "数学 は 楽しい",
    "emoji": "a😀b🇩🇪c👩‍👩‍👧",
    "combining": "e\u0301 n\u0303o \u0928\u093f",
    "only an emoji": "😀",
    "replacement character": "a\ufffdb",
    "empty": "",
}


def byte_ids(text: str) -> list[int]:
    """One token a byte; the tokenizer's own ids, which are not the bytes. Special tokens are spelled, too."""
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_the_tokenizer_splits_characters():
    assert len(byte_ids("😀")) == 4


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_step(text):
    """The text so far: all whole characters, and no part of one."""
    decoder = TextDecoder(TOKENIZER)
    for count, token in enumerate(byte_ids(text), 1):
        expected = text.encode()[:count].decode(errors="ignore")
        # A replacement character at the end may be half a character: it comes with what follows.
        assert decoder.append(token) == decoder.text == expected.rstrip("\ufffd")
    assert decoder.text == text


@given(st.text(max_size=30))
@example("<|im_start|>")
def test_any_text(text):
    decoder = TextDecoder(TOKENIZER)
    for count, token in enumerate(byte_ids(text), 1):
        assert decoder.append(token) == text.encode()[:count].decode(errors="ignore").rstrip("\ufffd")


@given(st.lists(st.integers(0, FIRST_SPECIAL + len(SPECIAL) - 1), max_size=30))
def test_any_tokens(ids):
    """Bytes that are no text, and special tokens, which leave no trace: right again at each whole character."""
    decoder, letter = TextDecoder(TOKENIZER), byte_ids("x")[0]
    for count, token in enumerate(ids, 1):
        whole = TOKENIZER.decode(ids[:count], skip_special_tokens=True)
        assert decoder.append(token) == (whole if not whole.endswith("\ufffd") else decoder.text)
        assert whole.startswith(decoder.text)
    assert decoder.append(letter) == TOKENIZER.decode([*ids, letter], skip_special_tokens=True)


def sequence_of(max_tokens: int = 100, **sampling) -> Sequence:
    prompt = Prompt(torch.tensor([1]), torch.zeros(3, 1, dtype=torch.int64), 1, (), (1,))
    request = Request([1], sampling=SamplingParams(max_tokens=max_tokens, **sampling))
    stop_ids = frozenset([special_id("<|im_end|>"), *byte_ids("!")])
    group = Group(request, "a", prompt, max_tokens, stop_ids, None, None)
    group.sequences.append(Sequence(group, 0, decoder=TextDecoder(TOKENIZER) if request.sampling.stop else None))
    return group.sequences[0]


def feed(sequence: Sequence, ids: list[int]) -> int:
    """Records tokens until the sample ends; returns how many it took."""
    for count, token in enumerate(ids, 1):
        value = torch.tensor([0.5])
        output.record([sequence], SampleOutput(torch.tensor([token]), value, value, value))
        if sequence.finish_reason is not None:
            return count
    return len(ids)


def rollout_of(sequence: Sequence):
    return output.group_of(sequence.group, TOKENIZER, 0).rollouts[0]


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("so 42 END it is", ("END",), "so 42 "),
        ("ENEND", ("END",), "EN"),
        ("ENEND", ("ND", "END"), "EN"),
        ("hello", ("h",), ""),
        ("ab</a>", ("</b>", "</a>"), "ab"),
        ("1😀2", ("😀",), "1"),
        ("日本語", ("本語",), "日"),
        ("a\n\nb", ("\n\n",), "a"),
    ],
)
def test_a_stop_string_over_several_tokens(text, stop, kept):
    """The sample ends with the token that completes the string; its text ends before the string."""
    sequence = sequence_of(stop=stop)
    end = min(text.index(s) + len(s) for s in stop if s in text)
    assert feed(sequence, byte_ids(text)) == len(text[:end].encode())
    rollout = rollout_of(sequence)
    assert (rollout.finish_reason, rollout.stop_token_id, rollout.text) == ("stop", None, kept)
    assert rollout.token_ids.tolist() == byte_ids(text[:end])


def test_no_stop_string():
    sequence = sequence_of(stop=("END",), max_tokens=5)
    assert feed(sequence, byte_ids("EN EN EN")) == 5
    assert (rollout_of(sequence).finish_reason, rollout_of(sequence).text) == ("length", "EN EN")


def test_a_stop_string_counts_from_min_tokens_on():
    sequence = sequence_of(stop=("b",), min_tokens=4)
    assert feed(sequence, byte_ids("abcdef")) == 4


@pytest.mark.parametrize("stop_id", [special_id("<|im_end|>"), byte_ids("!")[0]], ids=["special", "letter"])
def test_a_stop_token_leaves_no_text(stop_id):
    sequence = sequence_of(stop=("END",))
    assert feed(sequence, [*byte_ids("EN"), stop_id, 1]) == 3
    rollout = rollout_of(sequence)
    assert (rollout.finish_reason, rollout.stop_token_id) == ("stop", stop_id)
    assert (rollout.text, len(rollout.token_ids)) == ("EN", 3)
