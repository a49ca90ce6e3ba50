"""The judge behind a server, against a real local server that answers well, badly, slowly or not at all."""

import asyncio
import json
import threading
import time
import tomllib
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest

from foveate.rollout.rewards import Fact, HTTPJudge, Perception
from foveate.rollout.rewards import chat_client as client_module
from foveate.rollout.rewards.judge_prompt import INSTRUCTION

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

FACTS = [Fact("top-left", "3"), Fact("bottom-right", "7"), Fact("left", "5"), Fact("top", "1")]
REPLY = "<think>top-left 3, left: 5, top is 2</think> <answer>x</answer>"


def think(text):
    return f"<think>{text}</think>"


@pytest.fixture
def make_judge(monkeypatch):
    """make_judge(server, **options): a judge that waits tenths of what it waits in earnest."""
    monkeypatch.setattr(client_module, "FIRST_WAIT_SECONDS", 0.02)
    judges = []

    def make(server, **options):
        options = {"attempt_seconds": 5.0, "total_seconds": 20.0, **options}
        judges.append(HTTPJudge(server.url, "judge-7b", **options))
        return judges[-1]

    yield make
    for judge in judges:
        judge.close()


def test_what_is_sent_and_what_is_read(chat_server, honest, make_judge):
    server = chat_server(lambda payload, number: honest(payload["messages"]))
    judge = make_judge(server, api_key="secret", options={"seed": 4, "max_tokens": None, "max_completion_tokens": 99})
    assert judge(REPLY, FACTS) == 2 / 4
    (request,) = server.requests
    payload = request.payload
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer secret"
    assert (payload["model"], payload["temperature"]) == ("judge-7b", 0)
    assert (payload["seed"], payload["max_completion_tokens"], "max_tokens" in payload) == (4, 99, False)
    assert [message["role"] for message in payload["messages"]] == ["system", "user"]
    assert payload["messages"][0]["content"] == INSTRUCTION
    question = json.loads(payload["messages"][1]["content"])
    assert question["text"] == "top-left 3, left: 5, top is 2"
    assert [(fact["subject"], fact["value"]) for fact in question["facts"]] == [tuple(fact) for fact in FACTS]
    schema = payload["response_format"]["json_schema"]
    assert payload["response_format"]["type"] == "json_schema"
    assert schema["strict"] is True
    assert schema["schema"]["properties"]["verdicts"]["items"]["required"] == ["id", "verdict"]


def test_replies_that_read_the_same_are_asked_once_and_empty_ones_never(chat_server, honest, make_judge):
    server = chat_server(lambda payload, number: honest(payload["messages"]))
    judge = make_judge(server)
    replies = [REPLY, "no tags", think("top-left 3"), REPLY + "other", think("top-left 3" * 10_000), "<think>open"]
    assert judge.judge_all(replies, FACTS) == [0.5, 0.0, 0.25, 0.5, 0.0, 0.0]
    assert len(server.requests) == 2
    assert judge.judge_all([], FACTS) == []
    assert judge.judge_all(["no tags"], FACTS) == [0.0]
    whole = make_judge(server, part=lambda reply: reply)
    assert whole("top-left 3", FACTS) == 0.25


def test_concurrency_is_bounded_and_used(chat_server, honest, make_judge):
    server = chat_server(lambda payload, number: honest(payload["messages"], delay=0.05))
    judge = make_judge(server, concurrency=3)
    replies = [think(f"top-left {number}") for number in range(12)]
    found = {}
    threads = [
        threading.Thread(target=lambda part=part: found.update({part: judge.judge_all(replies[part::2], FACTS)}))
        for part in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {0: [0.0] * 6, 1: [0.0, 0.25, 0.0, 0.0, 0.0, 0.0]}
    assert server.most_open == 3


@pytest.mark.parametrize(
    "failure",
    [
        {"status": 500},
        {"status": 503, "body": b"<html>busy</html>"},
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"status": 429, "headers": {"Retry-After": "soon"}},
        {"drop": "before"},
        {"drop": "headers"},
        {"drop": "body"},
        {"hang": True},
    ],
    ids=str,
)
def test_what_passes_is_tried_again(failure, chat_server, honest, make_judge):
    server = chat_server(
        lambda payload, number: SimpleNamespace(**failure) if number < 2 else honest(payload["messages"])
    )
    assert make_judge(server, attempt_seconds=0.3)(REPLY, FACTS) == 0.5
    assert len(server.requests) == 3


@pytest.mark.parametrize("date", [False, True])
def test_the_server_says_how_long_to_wait(date, chat_server, honest, make_judge):
    times = []

    def respond(payload, number):
        times.append(time.time())
        wait = formatdate(time.time() + 2, usegmt=True) if date else "1"
        return (
            SimpleNamespace(status=429, headers={"Retry-After": wait}) if number == 0 else honest(payload["messages"])
        )

    judge = make_judge(chat_server(respond))
    assert judge(REPLY, FACTS) == 0.5
    assert times[1] - times[0] > (0.9 if date else 0.99)  # a date has whole seconds


def test_a_wait_beyond_the_time_limit_is_not_begun(chat_server, make_judge):
    server = chat_server(lambda payload, number: SimpleNamespace(status=429, headers={"Retry-After": "3600"}))
    start = time.monotonic()
    assert make_judge(server, total_seconds=100)(REPLY, FACTS) is None
    assert time.monotonic() - start < 90
    assert len(server.requests) == 1


BAD_BODIES = {
    "no JSON": b"it is all true",
    "empty": b"",
    "not UTF-8": b"\xff\xfe{",
    "deep": b"[" * 100_000,
    "no choices": b'{"choices": []}',
    "two choices": b'{"choices": [{"message": {"content": "{}"}}, {"message": {"content": "{}"}}]}',
    "a list": b"[1]",
    "null": b"null",
    "a refusal": b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}',
    "choices of another type": b'{"choices": 1}',
    "too long": b" " * (2 << 20),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_no_completion_is_unscorable_and_final(body, chat_server, make_judge, caplog):
    server = chat_server(lambda payload, number: SimpleNamespace(body=body))
    assert make_judge(server).judge_all([REPLY, "no tags"], FACTS) == [None, 0.0]
    assert len(server.requests) == 1
    assert "1 of 1 judgements failed" in caplog.text


def _verdicts(ids, *verdicts):
    return {"verdicts": [{"id": name, "verdict": verdict} for name, verdict in zip(ids, verdicts, strict=False)]}


ALL = ("stated",) * 4
WRONG_REPLIES = {
    "text": lambda ids: "All facts are stated.",
    "tags": lambda ids: "".join(f"<info{n}>1</info{n}>" for n in range(1, 5)),
    "fenced": lambda ids: f"```json\n{json.dumps(_verdicts(ids, *ALL))}\n```",
    "text before": lambda ids: "Here: " + json.dumps(_verdicts(ids, *ALL)),
    "text after": lambda ids: json.dumps(_verdicts(ids, *ALL)) + " done",
    "twice": lambda ids: json.dumps(_verdicts(ids, *ALL)) * 2,
    "cut": lambda ids: json.dumps(_verdicts(ids, *ALL))[:-2],
    "a number": lambda ids: "1",
    "NaN": lambda ids: "NaN",
    "too few": lambda ids: json.dumps(_verdicts(ids[:3], *ALL)),
    "too many": lambda ids: json.dumps(_verdicts([*ids, "x"], *ALL, "stated")),
    "another order": lambda ids: json.dumps(_verdicts(ids[::-1], *ALL)),
    "one id twice": lambda ids: json.dumps(_verdicts([ids[0]] * 4, *ALL)),
    "numbers as ids": lambda ids: json.dumps(_verdicts([1, 2, 3, 4], *ALL)),
    "another verdict": lambda ids: json.dumps(_verdicts(ids, "stated", "stated", "stated", "true")),
    "verdicts of numbers": lambda ids: json.dumps(_verdicts(ids, 1, 1, 1, 1)),
    "a list as verdict": lambda ids: json.dumps(_verdicts(ids, ["stated"], *ALL[:3])),
    "another key": lambda ids: json.dumps({**_verdicts(ids, *ALL), "score": 1}),
    "another key inside": lambda ids: json.dumps(_verdicts(ids, *ALL)).replace('"id"', '"x": 1, "id"', 1),
    "a key twice": lambda ids: '{"verdicts": [], ' + json.dumps(_verdicts(ids, *ALL))[1:],
    "a verdict twice": lambda ids: json.dumps(_verdicts(ids, *ALL)).replace(
        '"verdict": ', '"verdict": "absent", "verdict": '
    ),
    "a missing verdict": lambda ids: json.dumps({"verdicts": [{"id": name} for name in ids]}),
    "verdicts of text": lambda ids: '{"verdicts": "stated"}',
    "deep": lambda ids: "[" * 100_000,
}


@pytest.mark.parametrize("reply", WRONG_REPLIES.values(), ids=WRONG_REPLIES)
def test_a_reply_of_another_form_is_unscorable(reply, chat_server, make_judge):
    def respond(payload, number):
        ids = [fact["id"] for fact in json.loads(payload["messages"][1]["content"])["facts"]]
        return SimpleNamespace(content=reply(ids))

    server = chat_server(respond)
    assert make_judge(server)(REPLY, FACTS) is None
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_a_refused_request_is_unscorable_and_final(status, chat_server, make_judge, caplog):
    server = chat_server(lambda payload, number: SimpleNamespace(status=status, headers={"Location": "/elsewhere"}))
    assert make_judge(server, api_key="secret")(REPLY, FACTS) is None
    assert len(server.requests) == 1
    assert f"got {status}" in caplog.text
    assert "secret" not in caplog.text


def test_attempts_end(chat_server, make_judge):
    server = chat_server(lambda payload, number: SimpleNamespace(status=500))
    assert make_judge(server, max_attempts=3)(REPLY, FACTS) is None
    assert len(server.requests) == 3


@pytest.mark.parametrize("how", [{"hang": True}, {"trickle": True}], ids=["silent", "a byte at a time"])
def test_a_server_that_hangs_costs_its_time_once(how, chat_server, make_judge):
    server = chat_server(lambda payload, number: SimpleNamespace(**how))
    judge = make_judge(server, concurrency=2, attempt_seconds=1.0, total_seconds=1.5, max_attempts=2)
    start = time.monotonic()
    scores = judge.judge_all([think(f"top-left {number}") for number in range(40)], FACTS)
    seconds = time.monotonic() - start
    assert scores == [None] * 40
    assert seconds < 10  # 20 rounds of 1.5 s if each reply waited for itself


def test_an_unreachable_server_and_one_that_comes_back(chat_server, honest, make_judge):
    server = chat_server(lambda payload, number: honest(payload["messages"]))
    judge = make_judge(server, attempt_seconds=0.2, total_seconds=2.0, max_attempts=2)
    server.stop()
    assert judge.judge_all([REPLY, think("top 1"), think("top 2")], FACTS) == [None] * 3
    server.start()
    time.sleep(0.25)
    assert judge(REPLY, FACTS) == 0.5


def test_one_bad_reply_leaves_its_neighbours(chat_server, honest, make_judge):
    def respond(payload, number):
        return SimpleNamespace(status=400) if "top 9" in str(payload) else honest(payload["messages"])

    judge = make_judge(chat_server(respond))
    assert judge.judge_all([REPLY, think("top 9"), think("top 1")], FACTS) == [0.5, None, 0.25]


def test_close_ends_the_thread_and_the_next_call_starts_one(chat_server, honest, make_judge):
    def alive():
        return [thread for thread in threading.enumerate() if thread.name == "foveate-judge"]

    judge = make_judge(chat_server(lambda payload, number: honest(payload["messages"])))
    for _ in range(2):
        assert not alive()
        assert judge(REPLY, FACTS) == 0.5
        (thread,) = alive()
        judge.close()
        thread.join(10)
    assert judge(REPLY, FACTS) == 0.5
    (thread,) = alive()
    judge._loop = None  # as the collector leaves it
    thread.join(10)
    assert not alive()
    judge._loop = SimpleNamespace(close=lambda ending: None)


def test_nobody_waits_for_a_judge_that_another_thread_closed(chat_server, make_judge, caplog):
    server = chat_server(lambda payload, number: SimpleNamespace(hang=True))
    judge, found = make_judge(server, attempt_seconds=60.0, total_seconds=60.0), []

    def ask(number):
        found.append(judge.judge_all([think(f"top {number}"), think(f"left {number}")], FACTS))

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    while len(server.requests) < 6:
        time.sleep(0.01)
    judge.close()
    for thread in threads:
        thread.join(10)
    assert found == [[None, None]] * 3
    assert "got close()" in caplog.text
    assert not judge._clients


def test_it_works_inside_a_running_loop(chat_server, honest, make_judge):
    judge = make_judge(chat_server(lambda payload, number: honest(payload["messages"])))

    async def inside():
        return judge(REPLY, FACTS)

    assert asyncio.run(inside()) == 0.5


def test_arguments_and_the_key_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "abc")
    judge = HTTPJudge("http://h/v1/", "m", api_key_variable="JUDGE_KEY")
    assert judge._headers == {"Authorization": "Bearer abc"}
    assert judge._url == "http://h/v1/chat/completions"
    assert HTTPJudge("http://h", "m")._headers == {}
    for wrong, name in (
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"attempt_seconds": 0.0}, "attempt_seconds"),
        ({"total_seconds": 1.0}, "total_seconds"),
        ({"api_key_variable": "NOT_SET"}, "api_key_variable"),
        ({"api_key": "a", "api_key_variable": "JUDGE_KEY"}, "api_key_variable"),
    ):
        with pytest.raises(ValueError, match=rf"\({name}\)"):
            HTTPJudge(**{"base_url": "http://h", "model": "m", **wrong})


def test_missing_packages_are_named(monkeypatch):
    from foveate.rollout.rewards import http_judge

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    (extra,) = [name for name, packages in extras if {"httpx", "tenacity"} <= set(packages)]
    monkeypatch.setattr(http_judge.importlib.util, "find_spec", lambda name: None if name == "tenacity" else name)
    with pytest.raises(ImportError) as error:
        HTTPJudge("http://h", "m")
    assert str(error.value) == f"expected tenacity to be installed: pip install 'foveate[{extra}]'"


def test_a_judge_that_raises_is_unscorable_but_its_contract_holds(caplog):
    def group(*texts, reasons=None, facts=FACTS):
        reasons = reasons or ["stop"] * len(texts)
        rollouts = [SimpleNamespace(text=t, finish_reason=r) for t, r in zip(texts, reasons, strict=True)]
        request = SimpleNamespace(metadata={"facts": facts}, request_id="r")
        return SimpleNamespace(request=request, request_id="r", rollouts=rollouts)

    asked = []

    def broken(response, facts):
        asked.append(response)
        if response == "b":
            raise json.JSONDecodeError("no", "x", 0)
        return 0.5

    assert Perception(broken)(group("a", "b", "c")) == [0.5, None, 0.5]
    assert "the judge raised JSONDecodeError" in caplog.text
    asked.clear()
    assert Perception(broken)(group("a", "x", "y", reasons=["length", "error", "abort"])) == [0.5, None, None]
    assert asked == ["a"]
    whole = SimpleNamespace(judge_all=lambda responses, facts: 1 / 0)
    assert Perception(whole)(group("a", "b")) == [None, None]
    short = SimpleNamespace(judge_all=lambda responses, facts: [1.0])
    with pytest.raises(ValueError, match="2 scores, got 1"):
        Perception(short)(group("a", "b"))
    with pytest.raises(ValueError, match="fact of the judge's grammars"):
        Perception()(group("a", facts=[Fact("?", "?")]))
