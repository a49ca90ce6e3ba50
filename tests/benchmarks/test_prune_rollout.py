"""Rollouts with pruned images: the numbers of a rehearsal, and what is refused."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from pruned_rollouts import Contender, Setting, check_groups, check_keeping_all, plain_memory

from foveate.rollout.config import PruneConfig
from foveate.rollout.testing import tiny_model

with torch.device("meta"):  # torch notes once what allocates memory: not when a test has replaced it
    torch.empty(0)

FASTV = PruneConfig("fastv", 0.5)
SMALL = Setting(sharing=True, batch=8, grid=(4, 6), new_tokens=4)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2_5_vl", num_hidden_layers=4)


@pytest.fixture
def script(monkeypatch, model):
    found = importlib.import_module("bench_prune_rollout")
    monkeypatch.setattr(found, "tiny_vl", lambda: (model, {}))
    return found


def test_rehearsal(script, tmp_path, capsys):
    """A prompt of 59 tokens, 24 of them of a picture, takes 4 pages of 16, and 3 where 12 of these are kept: with FastV
    in half of the layers. A sample takes one page of its own.
    """
    file = tmp_path / "rows.jsonl"
    wanted = "(fastv|strided|random) keep=0.5 .*batch=8"
    arguments = ["--quick", "--device", "cpu", "--threads", str(torch.get_num_threads()), "--filter", wanted]
    script.main([*arguments, "--output", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(capsys.readouterr().out.splitlines()) == len(rows) == 6
    found = {(row["method"], row["sharing"]): row for row in rows}
    page = 16 * 2 * 4 * 2 * 8 * 4  # tokens, keys and values, layers, heads, dimensions, bytes
    for sharing, prompts in ((True, 1), (False, 8)):
        pages = {method: prompts * own + 8 for method, own in (("none", 4), ("fastv", 2 + 1.5), ("random", 3))}
        assert {method: found[method, sharing]["kv_bytes"] for method in pages} == {
            m: n * page for m, n in pages.items()
        }
        assert found["none", sharing]["kv_memory"] == 8 * 5 * page
        fits = {method: 40 * 8 // n if sharing else int(40 // (n / 8)) for method, n in pages.items()}
        assert {m: found[m, sharing]["fits"] for m in pages} == {
            m: n // 8 * 8 if sharing else n for m, n in fits.items()
        }
        for row in (found[method, sharing] for method in pages):
            assert row["n"] == (8 if sharing else 1)
            assert (row["prompt_tokens"], row["image_tokens"], row["pairs"], row["quick"]) == (59, 24, 1, True)
            total = row["encode_s"] + row["prefill_s"] + row["decode_s"]
            assert row["tokens_per_second"] == pytest.approx(8 * 4 / total, rel=1e-3)
            assert row["decode_tokens_per_second"] == pytest.approx(8 * 3 / row["decode_s"], rel=1e-3)
    assert all(found["none", sharing]["speedup"] == 1 for sharing in (True, False))


def test_nothing_is_selected(script, capsys):
    script.main(["--quick", "--device", "cpu", "--filter", "no such method"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("prune", [None, FASTV, PruneConfig("random", 0.25)])
@pytest.mark.parametrize("sharing", [True, False])
def test_as_many_fit_as_it_says(prune, sharing, model):
    """That many samples run at once to their end; those of one request more do not."""
    setting = Setting(sharing, 8, (6, 8), 40)
    contender = Contender(model, setting, prune, plain_memory(model, setting))
    samples, n = contender.fits(), setting.n
    assert samples >= 8
    first, *_ = contender.requests
    for more in (0, n):
        engine = Contender(model, setting, prune, plain_memory(model, setting)).engine
        for number in range((samples + more) // n):  # prompts that differ in their first token
            engine.add_request(replace(first, prompt=torch.cat([torch.tensor([number]), first.prompt[1:]])))
        most = 0
        while engine.has_unfinished:
            engine.step()
            most = max(most, engine.stats()["running"])
        stats = engine.stats()
        assert (most == samples + more and stats["preempted"] == 0) == (more == 0)


@pytest.mark.parametrize("prune", [None, PruneConfig("visionzip", 0.5), FASTV])
@pytest.mark.parametrize("sharing", [True, False])
def test_a_picture_for_each_group(prune, sharing, model, monkeypatch):
    """Encoded once for the samples of a group, whether they are one request or eight."""
    contender = Contender(model, replace(SMALL, sharing=sharing, batch=16), prune, 1 << 24)
    tower, encoded = contender.engine._runner.vision, []
    encode = tower.encode
    monkeypatch.setattr(tower, "encode", lambda images, *rest: encoded.extend(images) or encode(images, *rest))
    for _ in range(2):
        encoded.clear()
        contender.run()
        assert len(encoded) == len({image.content_hash for image in encoded}) == 2
    seen = [request.vision.pixel_values.data_ptr() for request in contender.requests]
    each = len(seen) // 2
    assert seen == [seen[0]] * each + [seen[-1]] * each


def test_what_is_checked(model, monkeypatch):
    contender = Contender(model, SMALL, FASTV, 1 << 24)
    contender.run()
    groups = contender.engine.generate(contender.requests)
    check_groups(groups, SMALL, FASTV)
    for setting, prune in ((replace(SMALL, new_tokens=5), FASTV), (SMALL, PruneConfig("fastv", 0.25))):
        with pytest.raises(AssertionError):
            check_groups(groups, setting, prune)
    setting = Setting(True, 2, (4, 6), 8)
    check_keeping_all(model, ["fastv", "random"], setting)
    monkeypatch.setattr("pruned_rollouts.PruneConfig", lambda method, keep: PruneConfig(method, 0.5))
    with pytest.raises(AssertionError, match="random"):
        check_keeping_all(model, ["random"], setting)


def test_the_large_model(script):
    """3.75 billion parameters, with the LM head tied; nothing is allocated."""
    model = script.qwen_3b(torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 3_754_622_976
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
