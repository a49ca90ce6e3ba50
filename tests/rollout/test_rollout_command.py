"""`foveate rollout`: rollouts of a file of prompts, bad lines, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.rollout import cli
from foveate.rollout.config import EngineConfig, PruneConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.processor import load_processor
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import KeepPlan, Request, SiteKeep

pytest.importorskip("tyro")
Image = pytest.importorskip("PIL.Image")
from foveate.rollout.tools import rollout as command  # noqa: E402
from foveate.rollout.tools.reporting import Reporter  # noqa: E402
from foveate.rollout.tools.rollout import RolloutOptions, run  # noqa: E402

SMALL = EngineConfig(page_size=8, kv_memory=1 << 22, max_sequences=6)
TOLERANCE = 5e-5  # of log-probs, between batches of different sizes


@pytest.fixture
def engine(processor):
    return Engine(tiny_model("qwen2_5_vl"), processor, SMALL)


@pytest.fixture
def options(tmp_path):
    """Twelve prompts, every third with an image, and the options to complete each three times."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(12):
        line = {"id": f"p{index}", "prompt": f"number {index}?"}
        if index % 3 == 0:
            Image.fromarray(rng.integers(0, 256, (56, 84, 3), np.uint8)).save(tmp_path / f"{index}.png")
            line["images"] = [f"{index}.png"]
        lines.append(json.dumps(line))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")

    def make(output="out.jsonl", **fields):
        sampling = SamplingParams(max_tokens=4)
        fields = {"n": 3, "sampling": sampling, "engine": SMALL, "model": "tiny", **fields}
        return RolloutOptions(data=tmp_path / "data.jsonl", output=tmp_path / output, **fields)

    return make


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_place(path):
    found = {(row["id"], row["sample"]): row for row in rows(path)}
    assert len(found) == len(rows(path))
    return found


def assert_same(path, other):
    """The same samples: what is drawn is equal, what is computed differs by rounding."""
    first, second = by_place(path), by_place(other)
    assert first.keys() == second.keys()
    floats = ("logprobs", "log_kept", "entropy")
    for key, row in first.items():
        for name in floats:
            np.testing.assert_allclose(row[name], second[key][name], rtol=0, atol=TOLERANCE)
        assert {k: v for k, v in row.items() if k not in floats} == {
            k: v for k, v in second[key].items() if k not in floats
        }


def add_line(options, line):
    with options.data.open("a") as file:
        file.write(line + "\n")


def test_rows_are_the_engine_s_rollouts(engine, options, capsys):
    chosen = options(system="Look.")
    assert run(chosen, engine) == 0
    found = by_place(chosen.output)
    assert found.keys() == {(f"p{index}", sample) for index in range(12) for sample in range(3)}
    row = found["p1", 2]
    messages = [{"role": "system", "content": "Look."}, {"role": "user", "content": "number 1?"}]
    sampling = SamplingParams(max_tokens=4, seed=row["seed"])
    (group,) = engine.generate([Request(messages, n=3, sampling=sampling)])
    assert row["token_ids"] == group.rollouts[2].token_ids.tolist()
    assert row["text"] == group.rollouts[2].text
    np.testing.assert_allclose(row["logprobs"], group.rollouts[2].logprobs, rtol=0, atol=TOLERANCE)
    assert row["prompt_tokens"] == len(group.prompt_ids)
    assert (row["finish_reason"], row["weight_version"]) == (group.rollouts[2].finish_reason, 0)
    assert "12/12 prompts, 36 rollouts" in capsys.readouterr().out
    assert not chosen.output.with_suffix(".errors.jsonl").exists()


def test_a_run_that_was_stopped_goes_on(engine, options, processor, monkeypatch):
    whole, stopped = options("whole.jsonl"), options("stopped.jsonl")
    run(whole, engine)
    step, left = engine.step, [4]

    def stopping():
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step()

    again, count = 0, -1
    while True:  # each run gets a few steps, until one comes through
        other = Engine(engine.model, processor, SMALL)
        step, left[0] = other.step, 6
        monkeypatch.setattr(other, "step", stopping)
        try:
            assert run(stopped, other) == 0
            break
        except KeyboardInterrupt:
            again += 1
            before, count = count, len(rows(stopped.output)) if stopped.output.exists() else 0
            assert count > before
            with stopped.output.open("ab") as file:
                file.write(b'{"id": "p11", "sample": 0, "n": 3, "pro')
    assert again >= 2
    assert_same(whole.output, stopped.output)


def test_finished_prompts_cost_nothing(engine, options):
    chosen = options()
    run(chosen, engine)
    content, requests = chosen.output.read_bytes(), engine.num_requests
    assert run(chosen, engine) == 0
    assert engine.num_requests == requests
    assert chosen.output.read_bytes() == content
    add_line(chosen, '{"prompt": "one more"}')
    assert run(chosen, engine) == 0
    assert engine.num_requests == requests + 1
    assert chosen.output.read_bytes().startswith(content)
    assert rows(chosen.output)[-1]["id"] == "13"


def test_bad_lines_are_listed_and_leave_the_rest_alone(engine, options, tmp_path, capsys):
    good = options("good.jsonl")
    run(good, engine)
    chosen = options()
    (tmp_path / "text.png").write_text("no picture")
    lines = ["{", '{"prompt": "x", "images": ["none.png"]}', '{"prompt": "x", "imags": []}', ""]
    lines += ['{"prompt": "x", "images": ["text.png"], "id": "text"}', json.dumps({"prompt": [5] * 5000})]
    for line in lines:
        add_line(chosen, line)
    assert run(chosen, engine) == 1
    assert_same(chosen.output, good.output)
    errors = {row["line"]: row for row in rows(chosen.output.with_suffix(".errors.jsonl"))}
    reasons = {13: "JSON object", 14: "none.png", 15: "'images', got 'imags'", 17: "text.png", 18: "shorter than"}
    assert errors.keys() == reasons.keys()
    assert all(reason in errors[line]["error"] for line, reason in reasons.items())
    assert (errors[13]["id"], errors[17]["id"], errors[18]["id"]) == (None, "text", "18")
    shown = capsys.readouterr()
    assert "data.jsonl, line 14: " in shown.err
    assert "5 failed" in shown.out

    # What failed is tried again; the list is of the last run alone.
    Image.new("RGB", (56, 56)).save(tmp_path / "text.png")
    assert run(options(allow_errors=True), engine) == 0
    assert {row["line"] for row in rows(chosen.output.with_suffix(".errors.jsonl"))} == {13, 14, 15, 18}
    assert len(rows(chosen.output)) == len(rows(good.output)) + 3


def test_a_changed_line_is_not_taken_for_the_old_one(engine, options):
    chosen = options()
    run(chosen, engine)
    chosen.data.write_text(chosen.data.read_text().replace("number 5?", "number 55?"))
    assert run(chosen, engine) == 1
    (error,) = rows(chosen.output.with_suffix(".errors.jsonl"))
    assert (error["line"], error["id"]) == (6, "p5")
    assert "another id or --overwrite" in error["error"]
    assert run(options(overwrite=True), engine) == 0
    assert len(rows(chosen.output)) == 36


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_nothing_is_lost_to_a_run_that_cannot_begin(engine, options, tmp_path, capsys):
    chosen = options()
    run(chosen, engine)
    (tmp_path / "notes.jsonl").write_text('{"note": 1}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    before = contents(tmp_path)
    words = ["rollout", "--model", str(tmp_path / "mistyped"), "--data", str(chosen.data), "--overwrite"]
    assert cli.main([*words, "--output", str(chosen.output)]) == 1
    assert cli.main([*words, "--output", str(tmp_path / "new.jsonl")]) == 1
    for name in ("notes.jsonl", "empty.jsonl", "broken.parquet"):
        assert cli.main([*words, "--output", str(chosen.output), "--data", str(tmp_path / name)]) == 1
    shown = capsys.readouterr().err
    assert "expected a prompt before" in shown
    assert "line 1: expected a key such as" in shown
    assert "an empty file" in shown
    assert contents(tmp_path) == before

    # The command that was meant begins as if the others had never been.
    assert run(options("new.jsonl"), engine) == 0
    assert_same(tmp_path / "new.jsonl", chosen.output)


@pytest.mark.parametrize("name", ["data.jsonl", "link.jsonl", "sub/../data.jsonl"])
def test_the_data_are_never_the_output(options, tmp_path, name):
    (tmp_path / "link.jsonl").symlink_to("data.jsonl")
    (tmp_path / "sub").mkdir()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"expected another file than .*, which is written to, got .*\(--data\)"):
        options(name, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["run.json", "errors.jsonl"])
def test_the_data_are_no_file_beside_the_output(options, tmp_path, name):
    data = options().data.rename(tmp_path / f"out.{name}")
    with pytest.raises(ValueError, match="which is written to"):
        RolloutOptions("m", data, tmp_path / "out.jsonl")


def test_rows_of_pruned_prompts_hold_what_was_kept(processor, options):
    """All that a plan says but the positions; the tokens that the same engine keeps of the same image."""
    engine = Engine(tiny_model("qwen2_5_vl"), processor, replace(SMALL, prune=PruneConfig("visionzip", 0.5)))
    done = options()
    run(done, engine)
    image = Request("<|vision_start|><|image_pad|><|vision_end|>", images=[done.data.parent / "3.png"])
    (group,) = engine.generate([replace(image, sampling=SamplingParams(max_tokens=1))], strict=True)
    found = {row["id"]: row["keep"] for row in rows(done.output)}
    expected = {field.name for field in fields(KeepPlan)} - {"positions"}
    assert all(keep.keys() == expected for keep in found.values())
    (site,), (own,) = found["p3"]["sites"], group.keep.sites
    for name in (field.name for field in fields(SiteKeep)):
        value = getattr(own, name)
        assert site[name] == (value.tolist() if isinstance(value, torch.Tensor) else value)
    assert (len(site["kept"]), found["p1"]["sites"][0]["kept"]) == (3, [])
    assert found["p3"]["config_hash"] == group.keep.config_hash


CHANGES = {
    "model": "other",
    "n": 4,
    "seed": 1,
    "system": "Look.",
    "dtype": "float32",
    "sampling.temperature": 0.5,
    "sampling.stop": ("x",),
    "sampling.logit_bias": ((5, -1.0),),
    "engine.max_context": 64,
    "engine.ban_vision_tokens": False,
    "engine.deterministic": True,
    "engine.prune": PruneConfig("strided", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_output_is_not_continued_with_other_settings(engine, options, name):
    begun = options()
    begun.data.write_text('{"prompt": "x"}\n')
    run(begun, engine)
    section, _, key = name.rpartition(".")
    changed = replace(getattr(begun, section), **{key: CHANGES[name]}) if section else CHANGES[name]
    with pytest.raises(ValueError, match=rf"--overwrite, got .* \({name}\)"):
        run(replace(begun, **{section or key: changed}), engine)


@pytest.fixture
def own_code(tmp_path, processor, monkeypatch):
    """(folder of a model, what its own code and a question on stdin leave behind)"""
    folder, traces = tmp_path / "model", []
    for part in (tiny_model("qwen3"), processor.tokenizer):
        part.save_pretrained(folder)
    (folder / "own.py").write_text("import builtins\nbuiltins.traces.append('ran')\nclass Own: pass\n")
    for name, change in (
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    monkeypatch.setattr("builtins.traces", traces, raising=False)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: traces.append("asked") or "y")
    return folder, traces


def test_a_model_folder_s_own_code_is_not_run_and_nobody_is_asked(own_code, options, tmp_path, capsys):
    folder, traces = own_code
    words = ["--model", str(folder), "--data", str(options().data), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(["rollout", *words]) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_processor(folder, has_vision=False)
    assert not traces
    with suppress(Exception):  # it is no tokenizer; that it is tried is enough
        load_processor(folder, has_vision=False, trust_remote_code=True)
    assert "ran" in traces


def test_a_long_file_does_not_wait_in_memory(engine, options, monkeypatch):
    inside, most = set(), []
    add, step = engine.add_request, engine.step

    def adding(request):
        inside.add(add(request))
        most.append(len(inside))
        return request.request_id

    def stepping():
        groups = step()
        inside.difference_update(group.request_id for group in groups)
        return groups

    monkeypatch.setattr(engine, "add_request", adding)
    monkeypatch.setattr(engine, "step", stepping)
    assert run(options(), engine) == 0
    assert max(most) == 5  # groups of three: for six running samples, six that wait, and one group more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--n 0", "(--n)"),
        ("--sampling.seed 3", "the seed in --seed"),
        ("--output out.json", "ends with .jsonl"),
        ("--data nowhere.jsonl", "expected a file, got 'nowhere.jsonl'"),
        ("--sampling.max-tokns 3", "--sampling.max-tokens"),
    ],
)
def test_wrong_options_end_with_2(options, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["rollout", "--model", "m", "--data", str(options().data), *words.split()])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_errors_of_the_user_s_are_a_line(engine, options, tmp_path, monkeypatch, capsys):
    words = ["rollout", "--model", str(tmp_path / "none"), "--data", str(options().data)]
    assert cli.main([*words, "--output", str(tmp_path / "a.jsonl")]) == 1
    assert "foveate rollout: " in capsys.readouterr().err
    monkeypatch.setattr(command, "load_engine", lambda *_: engine)
    words = [*words, "--output", str(tmp_path / "b.jsonl"), "--sampling.max-tokens", "2", "--n", "3"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--n", "2"]) == 1
    assert "expected 3, with which" in capsys.readouterr().err


def test_a_bar_and_lines(capsys, monkeypatch):
    pytest.importorskip("rich")
    with Reporter(2, rich=True) as report:
        report.add(3, 12)
        report.say("odd [line]")
        report.add(0, 0, failed=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "odd [line]" in shown
    monkeypatch.setattr("foveate.rollout.tools.reporting.SECONDS_BETWEEN_LINES", 0.0)
    with Reporter(2, rich=False) as report:
        report.add(3, 12)
    assert "1/2 prompts, 3 rollouts, 12 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_and_go_on(options, tmp_path, processor):
    """The process is killed twice, and the same command ends with what one undisturbed run gives."""
    model = tiny_model("qwen2_5_vl")
    for part in (model, processor.tokenizer, processor.image_processor):
        part.save_pretrained(tmp_path / "model")
    with options().data.open("a") as file:
        file.writelines(json.dumps({"prompt": f"more {index}"}) + "\n" for index in range(150))
    few = {"n": 4, "model": str(tmp_path / "model"), "sampling": SamplingParams(max_tokens=40)}
    whole, killed = options("whole.jsonl", **few), options("killed.jsonl", **few)
    assert run(whole, Engine(model, processor, SMALL)) == 0
    words = ["--model", killed.model, "--data", str(killed.data), "--output", str(killed.output)]
    words += ["--n", "4", "--sampling.max-tokens", "40", "--engine.kv-memory", "8000000", "--engine.max-sequences", "8"]
    program = [str(Path(sys.executable).with_name("foveate")), "rollout", *words]
    size = 0
    for _ in range(2):
        process = subprocess.Popen(program, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and (not killed.output.exists() or killed.output.stat().st_size < size + 40_000):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert killed.output.stat().st_size > size
        size = killed.output.stat().st_size
    assert size < whole.output.stat().st_size
    assert run(killed, Engine(model, processor, SMALL)) == 0
    assert_same(whole.output, killed.output)
