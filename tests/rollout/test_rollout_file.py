"""Files of rollouts: what they hold, and what is read of one whose writer was stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.tools.prompts import BadLine, fingerprint
from foveate.rollout.tools.rollout_file import RolloutFile
from foveate.rollout.types import Request, Rollout, RolloutGroup

SETTINGS = {"n": 2, "seed": 0, "sampling.stop": ["a"]}


def group(name, n=2, length=3):
    generator = torch.Generator().manual_seed(length)
    rollouts = tuple(
        Rollout(
            token_ids=torch.arange(length),
            logprobs=torch.randn(length, generator=generator),
            log_kept=-torch.rand(length, generator=generator) * 1e-38,  # subnormals too
            entropy=torch.rand(length, generator=generator),
            finish_reason="length",
            weight_versions=((0, length, 0),) if length else (),
            text="\u2028 \ud800 \x00 \n \u00e9",
        )
        for _ in range(n)
    )
    empty = torch.empty(0, dtype=torch.int32)
    request = Request("x", n=n, request_id=name, sampling=SamplingParams(seed=5))
    return RolloutGroup(request, name, torch.zeros(4, dtype=torch.int64), torch.zeros(3, 4), 4, empty, rollouts)


@pytest.fixture
def path(tmp_path):
    """A file with the groups a, b and c."""
    file = RolloutFile(tmp_path / "deep" / "out.jsonl")
    file.open(SETTINGS, overwrite=False)
    for index, name in enumerate("abc"):
        file.write(group(name, length=index))
    return file.path


def test_floats_are_read_back_exactly(path):
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert [(row["id"], row["sample"]) for row in rows] == [(n, i) for n in "abc" for i in range(2)]
    for row, rollout in zip(rows[4:], group("c", length=2).rollouts, strict=True):
        for key in ("logprobs", "log_kept", "entropy"):
            assert np.array(row[key], np.float32).tobytes() == getattr(rollout, key).numpy().tobytes()
        assert row["token_ids"] == [0, 1]
        assert row["text"] == rollout.text
        assert (row["seed"], row["n"], row["weight_version"], row["prompt_tokens"]) == (5, 2, 0, 4)
    assert rows[0]["weight_version"] is None
    assert rows[0]["logprobs"] == []


def test_every_cut_is_mended(path):
    """Whatever a killed writer left, complete prompts are kept and the rest is as if it had never been."""
    whole = path.read_bytes()
    rows = [line + b"\n" for line in whole.split(b"\n")[:-1]]
    ends = [sum(map(len, rows[: 2 * count])) for count in range(4)]
    near = {end + more for end in ends for more in (-1, 0, 1)} & set(range(len(whole) + 1))
    for cut in sorted({*near, *range(0, len(whole), 41)}):
        path.write_bytes(whole[:cut])
        file = RolloutFile(path)
        file.open(SETTINGS, overwrite=False)
        complete = sum(end <= cut for end in ends) - 1
        assert list(file.finished) == list("abc")[:complete]
        assert path.read_bytes() == whole[: ends[complete]]
    assert file.finished["b"] == fingerprint(group("b").request)


def test_going_on_appends(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    file = RolloutFile(path)
    file.open(SETTINGS, overwrite=False)
    file.write(group("c", length=2))
    assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name(path):
    whole = path.read_bytes()
    for settings, name in (({**SETTINGS, "seed": 1}, "seed"), ({"n": 2, "seed": 0}, "sampling.stop")):
        with pytest.raises(ValueError, match=rf"--overwrite, got .* \({name}\)"):
            RolloutFile(path).open(settings, overwrite=False)
    assert path.read_bytes() == whole
    file = RolloutFile(path)
    file.open({**SETTINGS, "seed": 1}, overwrite=True)
    assert path.read_bytes() == b""
    assert json.loads(file.settings_path.read_text())["seed"] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"not json\n",
        b"[1]\n",
        b'{"id": "a"}\n',
        b'{"id": "a", "sample": 1, "n": 2, "prompt_hash": ""}\n',
        b'{"id": "a", "sample": 0, "n": 2, "prompt_hash": ""}\n{"id": "b", "sample": 1, "n": 2, "prompt_hash": ""}\n',
        b'{"id": "a", "sample": 0, "n": 1, "prompt_hash": ""}\n' * 2,
    ],
)
def test_something_else_is_never_written_to(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\(line \d, .*out.jsonl\)"):
        RolloutFile(path).open(SETTINGS, overwrite=False)
    assert path.read_bytes() == content


def test_a_file_without_settings_is_not_ours(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(ValueError, match=r"data.run.json beside it"):
        RolloutFile(tmp_path / "data.jsonl").open(SETTINGS, overwrite=False)
    assert (tmp_path / "data.jsonl").read_text() == '{"prompt": "mine"}\n'


def test_a_check_changes_nothing(path, tmp_path):
    path.write_bytes(path.read_bytes() + b'{"torn')
    whole, file = path.read_bytes(), RolloutFile(path)
    file.write_error(BadLine(1, "old"))
    before = sorted(path.parent.iterdir())
    assert file.check(SETTINGS, overwrite=False) is False
    assert list(file.finished) == list("abc")
    assert file.check({}, overwrite=True) is True
    assert RolloutFile(tmp_path / "new" / "out.jsonl").check(SETTINGS, overwrite=False) is True
    assert not (tmp_path / "new").exists()
    assert path.read_bytes() == whole
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("old", [None, "", "{", json.dumps({**SETTINGS, "seed": 1})])
def test_an_output_without_rows_is_a_new_one(tmp_path, old):
    file = RolloutFile(tmp_path / "out.jsonl")
    file.path.touch()
    if old is not None:
        file.settings_path.write_text(old)
    file.open(SETTINGS, overwrite=False)
    assert json.loads(file.settings_path.read_text()) == SETTINGS
    file.write(group("a"))
    again = RolloutFile(file.path)
    again.open(SETTINGS, overwrite=False)
    assert list(again.finished) == ["a"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_wherever_the_first_moments_are_killed_rows_stand_beside_their_settings(tmp_path, monkeypatch, overwrite):
    """Each change that `open` makes to the disk is the last once; then the command is given again."""
    other, killed = {**SETTINGS, "seed": 1}, 0
    for moment in range(20):
        folder = tmp_path / str(moment)
        file = RolloutFile(folder / "out.jsonl")
        if overwrite:
            file.open(SETTINGS, overwrite=False)
            file.write(group("a"))
        left = [moment]

        def killing(change, left=left, torn=False):
            def changed(self, *arguments, **options):
                left[0] -= 1
                if left[0] == -1 and torn:
                    change(self, arguments[0][:9])
                if left[0] < 0:
                    raise Killed
                return change(self, *arguments, **options)

            return changed

        with monkeypatch.context() as patch:
            for name in ("mkdir", "unlink", "write_bytes", "write_text", "replace", "touch"):
                patch.setattr(type(file.path), name, killing(getattr(type(file.path), name), torn=name == "write_text"))
            try:
                file.open(other, overwrite)
            except Killed:
                killed += 1
        if file.settings_path.exists():
            assert json.loads(file.settings_path.read_text()) in (SETTINGS, other)  # never torn
        if file.path.exists() and file.path.stat().st_size:
            assert overwrite
            assert json.loads(file.settings_path.read_text()) == SETTINGS
        else:
            RolloutFile(file.path).open(other, overwrite=False)
            assert json.loads(file.settings_path.read_text()) == other
        if left[0] >= 0:
            break
    assert killed >= 4


@pytest.mark.parametrize("content", ["{", "[1]", "5"])
def test_settings_that_cannot_be_read_say_so(path, content):
    RolloutFile(path).settings_path.write_text(content)
    with pytest.raises(ValueError, match=r"expected settings in .*run.json, another --output, or --overwrite"):
        RolloutFile(path).open(SETTINGS, overwrite=False)
