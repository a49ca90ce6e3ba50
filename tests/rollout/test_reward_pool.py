"""Rewards that are computed while others decode: the same numbers, bounded, and nothing hangs or crashes."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.reward_pool import RewardPool
from foveate.rollout.rewards import HTTPJudge, Perception, RewardTable, WeightedReward
from foveate.rollout.testing import tiny_model, tiny_processor
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request

QUIET = {"progress": "none", "learning_rate": 1e-3}
TIMES = ("time/", "throughput/")


def prompts(count=5, **metadata):
    """Requests of different lengths; the first takes longest."""
    return [
        Request(
            f"{index} digits? ",
            n=2,
            sampling=SamplingParams(max_tokens=2 + 3 * (count - index), ignore_eos=True),
            metadata={"answer": str(index), **metadata},
        )
        for index in range(count)
    ]


def low(group):
    totals = [float((r.token_ids < 100).float().mean()) for r in group.rollouts]
    return RewardTable({"low": totals}, totals)


def make(reward, **config):
    model = tiny_model("qwen3")
    engine = Engine(model, tiny_processor(), EngineConfig(page_size=16, kv_memory=4 << 20))
    return Trainer(model, engine, reward, GRPOConfig(**{**QUIET, **config}))


def slow_down(engine, seconds):
    """Every step of the engine takes so much longer."""
    next_batch = engine._scheduler.next
    engine._scheduler.next = lambda *words: (time.sleep(seconds), next_batch(*words))[1]


def numbers(record):
    return {name: value for name, value in record.metrics.items() if not name.startswith(TIMES)}


def test_threads_change_no_number():
    def slow(group):  # the first to finish is scored last
        time.sleep(0.02 * int(group.request.metadata["answer"]))
        return low(group)

    requests = prompts()
    requests[2] = replace(requests[2], prompt=[7] * 5000)  # beyond the context
    requests.append(requests[1])  # one object twice
    found = []
    for workers, reward in ((0, low), (1, slow), (4, slow)):
        trained = make(reward, reward_workers=workers)
        records = [trained.train_step(requests) for _ in range(2)]
        tables = [record.tables for record in records]
        tokens = [[[r.token_ids.tolist() for r in g.rollouts] for g in record.groups] for record in records]
        answers = [group.request.metadata["answer"] for group in records[0].groups]
        weights = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
        found.append((tables, tokens, answers, [numbers(record) for record in records], weights))
    assert found[0][2] == ["0", "1", "2", "3", "4", "1"]
    assert found[0][0][0][2] is None
    for other in found[1:]:
        assert other[:4] == found[0][:4]
        assert all(torch.equal(other[4][name], value) for name, value in found[0][4].items())


def test_a_finished_group_is_scored_while_others_decode():
    seen = []

    def reward(group):
        seen.append(
            (group.request.metadata["answer"], trained.engine._scheduler.has_unfinished, threading.current_thread())
        )
        return low(group)

    trained = make(reward)
    slow_down(trained.engine, 0.005)  # so that the other thread gets its turn
    trained.train_step(prompts())
    assert [answer for answer, _, _ in seen] == ["4", "3", "2", "1", "0"]
    assert [busy for _, busy, _ in seen] == [True] * 4 + [False]
    assert threading.main_thread() not in {thread for _, _, thread in seen}
    assert len({thread for _, _, thread in seen}) == 1
    seen.clear()
    trained = make(reward, reward_workers=0)
    trained.train_step(prompts())
    assert [(answer, busy) for answer, busy, _ in seen] == [(str(index), False) for index in range(5)]
    assert {thread for _, _, thread in seen} == {threading.main_thread()}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_are_in_order_and_no_more_than_asked_run_at_once(workers):
    running, most, lock = [], [], threading.Lock()

    def score(group):
        with lock:
            running.append(group)
            most.append(len(running))
        time.sleep(0.01 * (8 - group))
        with lock:
            running.remove(group)
        return -group

    with RewardPool(score, workers) as pool:
        for index in (5, 2, 7, 0, 6, 1, 4, 3):
            pool.submit(index, index)
        assert list(pool.results().items()) == [(index, -index) for index in range(8)]
    assert max(most) == max(workers, 1)
    with RewardPool(score, workers) as pool:
        assert pool.results() == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_error_is_raised_whoever_finishes_first(workers):
    def score(group):
        if group in (1, 3):
            time.sleep(0.05 * (3 - group))
            raise KeyError(group)
        return group

    def run():
        with RewardPool(score, workers) as pool:
            for index in range(5):
                pool.submit(index, index)
            pool.results()

    with pytest.raises(KeyError, match="1"):
        run()


def test_an_error_of_the_engine_drops_what_waits_and_does_not_wait_for_a_reward():
    begun, release, scored = threading.Event(), threading.Event(), []

    def score(group):
        scored.append(group)
        begun.set()
        release.wait(3600)

    def run():
        with RewardPool(score, 1) as pool:
            pool.submit(0, 0)
            pool.submit(1, 1)
            begun.wait(10)
            raise RuntimeError("the step broke")

    with pytest.raises(RuntimeError, match="step"):
        run()
    release.set()
    time.sleep(0.05)
    assert scored == [0]


def test_a_reward_that_raises_stops_the_step_and_leaves_engine_and_threads_clean():
    def broken(group):
        raise KeyError(group.request.metadata["answer"])

    trained = make(broken, reward_workers=2)
    before = threading.active_count()
    with pytest.raises(KeyError, match="0"):
        trained.train_step(prompts())
    assert not trained.engine._scheduler.has_unfinished
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before
    trained.reward = low
    assert trained.train_step(prompts()).metrics["step"] == 1


STOPPED = """
import signal, sys, time
from foveate.rollout.reward_pool import RewardPool
signal.signal(signal.SIGINT, signal.default_int_handler)

def score(group):
    sys.stdout.write("scoring\\n")
    sys.stdout.flush()
    time.sleep(3600)

try:
    with RewardPool(score, 2) as pool:
        for index in range(4):
            pool.submit(index, index)
        if sys.argv[1] == "error":
            time.sleep(0.5)
            raise OSError("the step broke")
        pool.results()
except (KeyboardInterrupt, OSError) as error:
    print(type(error).__name__, flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("how", ["KeyboardInterrupt", "error"])
def test_a_process_that_is_stopped_does_not_wait_for_a_reward(how):
    words = [sys.executable, "-c", STOPPED, how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["scoring\n"] * 2
        if how == "KeyboardInterrupt":
            process.send_signal(signal.SIGINT)
        try:
            left, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert left == {"error": "OSError\n"}.get(how, f"{how}\n")
    assert process.returncode == 130


FACTS = [("top-left", "3")]


def judged(url, **options):
    judge = HTTPJudge(url, "m", **{"part": lambda reply: reply, **options})
    return judge, WeightedReward([Perception(judge)], {"perception": 1.0})


def test_judging_over_http_overlaps_decoding_and_changes_no_number(chat_server):
    pytest.importorskip("httpx")
    pytest.importorskip("tenacity")
    busy = []

    def respond(payload, number):
        busy.append(trained.engine._scheduler.has_unfinished)
        question = json.loads(payload["messages"][1]["content"])
        verdict = "stated" if len(question["text"]) % 2 else "absent"
        content = json.dumps({"verdicts": [{"id": fact["id"], "verdict": verdict} for fact in question["facts"]]})
        return SimpleNamespace(content=content, delay=0.02)

    server, found = chat_server(respond), []
    for workers in (0, 4):
        judge, reward = judged(server.url)
        trained = make(reward, reward_workers=workers)
        slow_down(trained.engine, 0.01)
        records = [trained.train_step(prompts(facts=FACTS)) for _ in range(2)]
        found.append([(record.tables, numbers(record)) for record in records])
        assert any(busy) == (workers > 0)
        judge.close()
    assert found[0] == found[1]
    totals = {total for table in found[0][0][0] for total in table.totals}
    assert totals == {0.0, 1.0}
    assert found[0][0][1]["unscorable/perception"] == 0


@pytest.mark.parametrize("fault", [{"status": 500}, {"content": "stated"}, {"drop": "before"}, {"hang": True}], ids=str)
def test_a_step_survives_a_broken_judge_and_counts_it(fault, chat_server, monkeypatch):
    pytest.importorskip("httpx")
    pytest.importorskip("tenacity")
    monkeypatch.setattr("foveate.rollout.rewards.chat_client.FIRST_WAIT_SECONDS", 0.01)
    server = chat_server(lambda payload, number: SimpleNamespace(**fault))
    judge, reward = judged(server.url, attempt_seconds=0.2, total_seconds=0.6, max_attempts=2)
    trained = make(reward, reward_workers=5)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    record = trained.train_step(prompts(facts=FACTS))
    assert record.metrics["unscorable/perception"] == 10
    assert record.metrics["sample/unscorable"] == 10
    assert "reward/total" not in record.metrics
    assert all(table.totals == [None, None] for table in record.tables)
    after = dict(trained.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())  # nothing was learnt from nothing
    judge.close()
