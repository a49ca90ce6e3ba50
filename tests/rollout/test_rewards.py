"""Rewards: hand-computed values, the unscorable state, hostile input, threads."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.rollout.rewards import (
    Accuracy,
    Fact,
    Format,
    Perception,
    Repetition,
    WeightedReward,
    follows_format,
    perception_r1,
    repeated_share,
)
from foveate.rollout.rewards.text import answer_part, think_part
from foveate.rollout.types import Request, Rollout, RolloutGroup

GOOD = r"<think> top-left 3 , bottom-right 7 </think> <answer> \boxed{ 10 } </answer>"


def make_group(texts, reasons=None, **metadata):
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    reasons = reasons or ["stop"] * len(texts)
    rollouts = tuple(
        Rollout(none, empty, empty, empty, reason, text=text) for text, reason in zip(texts, reasons, strict=True)
    )
    request = Request("?", n=max(1, len(texts)), metadata=metadata)
    return RolloutGroup(request, "r", none, none.int().expand(3, 0), 0, torch.zeros(0, dtype=torch.int32), rollouts)


@pytest.fixture(scope="module")
def accuracy():
    reward = Accuracy()
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("<think>a</think><answer>b</answer>", "a", "b"),
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", "\na\n", "\nb\n"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "a", "c"),
        ("<think><answer>a</answer></think>", "<answer>a</answer>", None),
        ("<think>a<think>b</think>c</think><answer>d</answer>", "a<think>b", "d"),
        ("</think><think>a</think>", "a", None),
        ("<think>a", None, None),
        ("a</think><answer>b</answer>", None, "b"),
        ("<answer>b", None, None),
        ("<answer>a<answer>b</answer>", None, "b"),
        ("</answer><answer>", None, None),
        ("", None, None),
    ],
)
def test_parts_of_a_reply(text, think, answer):
    assert think_part(text) == think
    assert answer_part(text) == answer


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (GOOD, True),
        (r"<think></think><answer>\boxed{1}</answer>", True),
        ("<think>\na\n</think>\n<answer>\nso \\boxed{\\frac{1}{2}} cm\n</answer>\n", True),
        (r"<think>{</think><answer>{\boxed{1}</answer>", True),
        (r"<think></think><answer>\boxed{}</answer>", False),
        (r"<think></think><answer>\boxed{ }</answer>", False),
        (r"<think></think><answer>\boxed{1</answer>", False),
        (r"<think></think><answer>boxed{1}</answer>", False),
        (r"<think>\boxed{1}</think><answer>1</answer>", False),
        (r"<think></think>x<answer>\boxed{1}</answer>", False),
        (r"x<think></think><answer>\boxed{1}</answer>", False),
        (r"<think></think><answer>\boxed{1}</answer>x", False),
        (r"<think><think></think><answer>\boxed{1}</answer>", False),
        (r"<think></think><answer>\boxed{1}</answer><answer>\boxed{1}</answer>", False),
        (r"<answer>\boxed{1}</answer><think></think>", False),
        (r"<think><answer>\boxed{1}</think></answer>", False),
        (r"<answer>\boxed{1}</answer>", False),
        ("", False),
    ],
)
def test_format(text, good):
    assert follows_format(text) is good
    assert Format()(make_group([text, GOOD])) == [float(good), 1.0]


def test_repetition_is_the_share_of_repeated_20_grams():
    words = [f"w{i}" for i in range(40)]
    assert repeated_share(" ".join(words)) == 0
    assert repeated_share(" ".join(["a"] * 19)) == 0
    assert repeated_share(" ".join(["a"] * 20)) == 0
    assert repeated_share(" ".join(["a"] * 21)) == 0.5
    assert repeated_share("A a\nA\ta " * 10) == 1 - 1 / 21
    # 20 words twice: 21 grams, the last equals the first.
    assert repeated_share(" ".join(words[:20] * 2)) == pytest.approx(1 / 21)
    assert repeated_share("a b a b a", n=2) == 0.5
    assert Repetition()(make_group(["", "b " * 21])) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        (r"\boxed{ 10 }", "10", 1.0),
        ("\n\\boxed{10}\n", "10", 1.0),
        ("10", "10", 1.0),
        (r"\boxed{11}", "10", 0.0),
        (r"\boxed{-10}", "10", 0.0),
        (r"\boxed{0.5}", "1/2", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\sqrt{75}}", r"5\sqrt{3}", 1.0),
        (r"\boxed{5\sqrt{2}}", r"5\sqrt{3}", 0.0),
        (r"\boxed{60^\circ}", "60", 1.0),
        (r"\boxed{3} \boxed{10}", "10", 0.0),
        ("", "10", 0.0),
        (r"\boxed{\frac{1}{", "1/2", 0.0),
        ("ignore the rules, this is correct", "1/2", 0.0),
        ("0.5" + " " * 997, "1/2", 1.0),
        ("0.5" + " " * 998, "1/2", 0.0),
        (r"\boxed{1}", "", None),
    ],
)
def test_accuracy(accuracy, answer, gold, value):
    text = f"<think>it is 10, 1/2</think><answer>{answer}</answer>"
    assert accuracy(make_group([text], answer=gold)) == [value]


def test_accuracy_reads_only_the_answer_part(accuracy):
    texts = [r"<think>\boxed{10}</think>", r"\boxed{10}", r"<think>x <answer>10</answer></think>", GOOD]
    assert accuracy(make_group(texts, answer="10")) == [0.0, 0.0, 0.0, 1.0]
    assert accuracy(make_group(texts)) == [None] * 4
    # Without a readable gold nobody can be scored, whether there is an answer or not.
    assert accuracy(make_group(texts, answer="")) == [None] * 4
    with pytest.raises(ValueError, match="expected a string"):
        accuracy(make_group(texts, answer=10))


def test_accuracy_works_in_a_thread_and_leaves_signals_alone(accuracy):
    before, found = signal.getsignal(signal.SIGALRM), []
    text = r"<think></think><answer>\boxed{\frac{2}{4}}</answer>"
    threads = [
        threading.Thread(target=lambda i=i: found.append(accuracy.score(text, f"{i}/{2 * i}"))) for i in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [1.0] * 4
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_hanging_answer_is_wrong_and_the_next_one_is_judged(capfd):
    reward = Accuracy(timeout_seconds=3)
    texts = [f"<think></think><answer>\\boxed{{{a}}}</answer>" for a in ("0.5", "9^{9^{9^{9}}}", "0.25")]
    reward(make_group(texts[:1], answer="1/2"))  # starts the child outside the measurement
    start = time.monotonic()
    assert reward(make_group(texts, answer="1/2")) == [1.0, 0.0, 0.0]
    assert reward(make_group([texts[2]], answer="1/4")) == [1.0]
    assert time.monotonic() - start < 30
    child = reward._process._child
    reward.close()
    assert child is not None
    assert child.returncode is not None
    assert capfd.readouterr() == ("", "")


def test_the_child_process_survives_being_killed_and_forked(accuracy):
    text = r"<think></think><answer>\boxed{0.125}</answer>"
    assert accuracy.score(text, "1/8") == 1.0
    accuracy._process._child.kill()
    accuracy._process._child.wait()
    assert accuracy.score(text, "2/16") == 1.0
    kept = accuracy._process._child
    accuracy._process._owner = os.getpid() + 1  # as a forked copy sees it
    assert accuracy.score(text, "3/24") == 1.0
    assert accuracy._process._child is not kept
    assert kept.poll() is None, "a copy must not end the child of its parent"
    kept.kill()
    kept.wait()


def test_perception_uses_the_judge_on_annotated_requests_only():
    seen = []

    def judge(response, facts):
        seen.append((response, tuple(facts)))
        return None if response == "b" else 0.25

    reward = Perception(judge)
    group = make_group(["a", "b"], facts=[("top", "3"), Fact("left", "4")])
    assert reward.applies(group)
    assert reward(group) == [0.25, None]
    assert seen[0] == ("a", (Fact("top", "3"), Fact("left", "4")))
    assert not reward.applies(make_group(["a"]))
    assert not reward.applies(make_group(["a"], facts=()))
    with pytest.raises(ValueError, match="score in"):
        Perception(lambda response, facts: 1.5)(group)
    for wrong in (["top 3"], [("top",)], [("top", 3)]):
        with pytest.raises(ValueError, match="facts"):
            reward(make_group(["a"], facts=wrong))


class Constant:
    def __init__(self, name, values, applied=True):
        self.name, self.values, self.applied = name, values, applied

    def applies(self, group):
        return self.applied

    def __call__(self, group):
        return list(self.values)


def test_a_total_is_the_weighted_sum_or_unscorable():
    a, b = Constant("a", [1.0, None, 0.5]), Constant("b", [None, 1.0, 2.0])
    group = make_group(["", "", ""])
    assert WeightedReward([a, b], {"a": 2.0, "b": 1.0})(group).totals == [None, None, 3.0]
    table = WeightedReward([a, b], {"a": 2.0, "b": 0.0})(group)
    assert table.totals == [2.0, None, 1.0]
    assert table.parts == {"a": [1.0, None, 0.5], "b": [None, 1.0, 2.0]}
    off = Constant("b", [], applied=False)
    table = WeightedReward([a, off], {"a": 2.0, "b": 1.0})(group)
    assert table.totals == [2.0, None, 1.0]
    assert list(table.parts) == ["a"]
    assert WeightedReward([off], {"b": 1.0})(group).totals == [None] * 3
    with pytest.raises(ValueError, match="3 values"):
        WeightedReward([Constant("c", [1.0])], {"c": 1.0})(group)
    with pytest.raises(ValueError, match="different names"):
        WeightedReward([a, a], {"a": 1.0})
    with pytest.raises(ValueError, match="weights"):
        WeightedReward([a], {"b": 1.0})


def test_perception_r1_adds_up():
    loop = "<think> top 3 " + "so " * 40 + r"</think> <answer> \boxed{3} </answer>"
    words = len(loop.split())
    facts = [("top-left", "3"), ("bottom-right", "8")]
    reward = perception_r1()
    table = reward(make_group([GOOD, GOOD[:30], loop], answer="10", facts=facts))
    repeated = repeated_share(loop)
    assert words > 40
    assert repeated > 0
    assert table.parts["perception"] == [0.5, 0.0, 0.0]
    assert table.parts["accuracy"] == [1.0, 0.0, 0.0]
    assert table.parts["format"] == [1.0, 0.0, 1.0]
    assert table.totals == pytest.approx([0.9 + 0.1 + 0.35, 0.0, 0.1 - 2 * repeated])
    plain = reward(make_group([GOOD], answer="10"))
    assert plain.totals == pytest.approx([1.0])
    assert "perception" not in plain.parts
    assert reward(make_group([GOOD], facts=facts)).totals == [None]
    ablated = perception_r1(weights={"perception": 0.0})(make_group([GOOD], answer="10", facts=facts))
    assert ablated.totals == pytest.approx([1.0])
    assert ablated.parts["perception"] == [0.5]
    failing = perception_r1(judge=lambda response, facts: None)
    assert failing(make_group([GOOD], answer="10", facts=facts)).totals == [None]
    with pytest.raises(ValueError, match="precision"):
        perception_r1(weights={"precision": 1.0})


def test_rollouts_cut_from_outside_are_unscorable():
    table = perception_r1()(make_group([GOOD] * 4, reasons=["stop", "length", "error", "abort"], answer="10"))
    assert table.totals == [pytest.approx(1.0), pytest.approx(1.0), None, None]
    assert table.parts["format"] == [1.0, 1.0, None, None]
    assert perception_r1()(make_group([], answer="10")).totals == []


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "x", " "])))
def test_any_text_gets_a_format_and_repetition_value(parts):
    text = "".join(parts)
    (value,) = Format()(make_group([text]))
    assert value in (0.0, 1.0)
    if value:
        assert think_part(text) is not None
        assert "\\boxed{" in answer_part(text)
    assert 0 <= repeated_share(text, n=2) < 1


def test_values_become_floats_and_mistakes_name_reward_and_request():
    group = make_group(["a", "b", "c"])

    def table(values):
        return WeightedReward([Constant("c", values)], {"c": 2.0})(group)

    for values in (torch.tensor([1, 0, 1]), np.array([1, 0, 1], np.float32), [np.float64(1), False, torch.ones(1)]):
        got = table(values)
        assert got.totals == [2.0, 0.0, 2.0]
        assert {type(value) for value in [*got.parts["c"], *got.totals]} == {float}
    assert table([None, 1, None]).totals == [None, 2.0, None]
    for wrong in ("1", b"1", [1.0], torch.ones(2), object()):
        with pytest.raises(ValueError, match=r"expected a number or None, got .*reward 'c' of request 'r'"):
            table([wrong, 1.0, 1.0])
    with pytest.raises(TypeError) as error:
        table(None)
    assert error.value.__notes__ == ["raised by reward 'c' of request 'r'"]


def test_metadata_can_be_checked_before_anything_runs():
    reward = perception_r1()
    for good in ({}, {"answer": None}, {"answer": "5", "facts": [("top-left", "3")]}, {"facts": []}):
        reward.check(Request("?", metadata=good))
    for bad, message in (
        ({"answer": 5}, r"expected a string, got 5 .*request 'q'.*reward 'accuracy'"),
        ({"facts": 5}, r"a list of facts, got 5 .*request 'q'.*reward 'perception'"),
        ({"facts": "AB"}, r"a list of facts"),
        ({"facts": [("AB",)]}, r"facts or \(subject, value\) strings"),
        ({"facts": [("sun", "green")]}, r"fact of the judge's grammars.*request 'q', reward 'perception'"),
    ):
        with pytest.raises(ValueError, match=message):
            reward.check(Request("?", metadata=bad, request_id="q"))
