"""Files of prompts: what a line may hold, and what is said about one that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from foveate.rollout.config import SamplingParams
from foveate.rollout.tools.prompts import BadLine, Defaults, count_lines, fingerprint, read_requests

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def write(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / "folder" / "b.png")

    def make(*lines):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"".join((s if isinstance(s, bytes) else json.dumps(s).encode()) + b"\n" for s in lines))
        return path

    return make


def read(path, **defaults):
    settings = {"n": 3, "seed": 1, "sampling": SamplingParams(max_tokens=5), **defaults}
    return list(read_requests(path, Defaults(**settings)))


def test_what_lines_become(write, tmp_path):
    path = write(
        {"prompt": "what?", "images": ["a.png", "folder/b.png"], "id": 7, "answer": "5", "facts": [["AB", "1"]]},
        b"",
        {"prompt": [1, 2, 3], "n": 2, "seed": 11, "metadata": {"source": "x"}, "answer": None},
        {"text": "raw", "id": "b"},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}]},
    )
    (first, one), (third, two), (_, three), (_, four) = read(path, system="Look.")
    assert (first, third) == (1, 3)
    assert [r.request_id for r in (one, two, three, four)] == ["7", "3", "b", "5"]
    system = {"role": "system", "content": "Look."}
    images = [{"type": "image"}, {"type": "image"}]
    assert one.prompt == [system, {"role": "user", "content": [*images, {"type": "text", "text": "what?"}]}]
    assert [Path(image) for image in one.images] == [tmp_path / "a.png", tmp_path / "folder" / "b.png"]
    assert one.metadata == {"answer": "5", "facts": [["AB", "1"]]}
    assert (one.n, one.sampling.max_tokens) == (3, 5)
    assert (two.prompt, two.n, two.sampling.seed, two.metadata) == ([1, 2, 3], 2, 11, {"source": "x"})
    assert three.prompt == "raw"
    item = four.prompt[1]["content"][0]
    assert (item["type"], Path(item["image"])) == ("image", tmp_path / "a.png")
    assert count_lines(path) == 4


def test_an_image_root(write, tmp_path):
    path = write({"prompt": "?", "images": ["b.png"]})
    assert isinstance(read(path)[0], BadLine)
    (_, request) = read(path, image_root=tmp_path / "folder")[0]
    assert [Path(image) for image in request.images] == [tmp_path / "folder" / "b.png"]


def test_seeds_follow_from_seed_and_id_alone(write):
    def seeds(path, seed=1):
        return {request.request_id: request.sampling.seed for _, request in read(path, seed=seed)}

    lines = [{"prompt": "x", "id": name} for name in "abc"]
    together = seeds(write(*lines))
    assert len(set(together.values())) == 3
    assert seeds(write(*lines[::-1])) == together
    assert seeds(write(lines[1])) == {"b": together["b"]}
    assert not set(seeds(write(*lines), seed=2).values()) & set(together.values())
    assert all(0 <= value < 1 << 53 for value in together.values())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": ', "expected a JSON object"),
        (b"\xff\xfe", "expected a JSON object"),
        (b"[1, 2]", "expected a JSON object, got [1, 2]"),
        (b"[" * 100_000, ""),
        ({"promt": "x"}, "expected a key such as 'prompt', got 'promt'"),
        ({"prompt": "x", "image": []}, "expected a key such as 'images', got 'image'"),
        ({"id": 1}, "expected either prompt or text"),
        ({"prompt": "x", "text": "y"}, "expected either prompt or text"),
        ({"prompt": ""}, "(prompt)"),
        ({"prompt": 5}, "(prompt)"),
        ({"prompt": [{"content": "x"}]}, "expected messages with a role"),
        ({"prompt": [{"role": "user"}, 3]}, "expected messages with a role"),
        ({"text": ["x"]}, "(text)"),
        ({"prompt": "x", "images": "a.png"}, "expected a list of paths"),
        ({"prompt": "x", "images": ["none.png"]}, "none.png"),
        ({"prompt": "x", "images": [5]}, "expected a path, got 5"),
        ({"prompt": "x", "images": ["folder"]}, "expected an image file"),
        ({"prompt": "x", "images": ["a" * 300]}, "File name too long, got"),
        ({"prompt": "x", "images": ["data:image/png;base64," + "iVBO" * 9999]}, "expected a path, not a data URL, got"),
        ({"prompt": [{"role": "user", "content": [{"image": "HTTPS://h/a.png"}]}]}, "expected a path, not a https URL"),
        ({"prompt": "x", "n": 0}, "(n)"),
        ({"prompt": "x", "n": "3"}, "(n)"),
        ({"prompt": "x", "seed": 0.5}, "(seed)"),
        ({"prompt": "x", "id": [1]}, "(id)"),
        ({"prompt": "x", "id": True}, "(id)"),
        ({"prompt": "x", "metadata": 3}, "(metadata)"),
        ({"prompt": "x", "id": "first"}, "that of line 1"),
    ],
)
def test_a_bad_line_says_why_and_the_rest_goes_on(write, line, reason):
    path = write({"prompt": "x", "id": "first"}, line, {"prompt": "y", "id": "last"})
    first, bad, last = read(path)
    assert (first[1].request_id, last[1].request_id) == ("first", "last")
    assert isinstance(bad, BadLine)
    assert bad.line == 2
    assert reason in bad.reason
    assert len(bad.reason) < 700


def test_an_image_that_may_not_be_looked_at_is_one_bad_line(write, monkeypatch):
    path, is_file = write({"prompt": "x", "images": ["a.png"]}, {"prompt": "y"}), Path.is_file

    def refused(self):
        if self.name == "a.png":
            raise PermissionError(13, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", refused)
    bad, (_, request) = read(path)
    assert "expected an image file: Permission denied, got" in bad.reason
    assert request.request_id == "2"


def test_a_byte_order_mark_is_no_part_of_the_first_line(write):
    path = write(b'\xef\xbb\xbf{"prompt": "x"}', {"prompt": "y"})
    assert [item[1].request_id for item in read(path)] == ["1", "2"]
    path = write(b"\xef\xbb\xbf", {"prompt": "y"}, b'\xef\xbb\xbf{"prompt": "z"}')
    (number, _), bad = read(path)
    assert (number, bad.line, count_lines(path)) == (2, 3, 2)


def test_a_fingerprint_sees_what_a_line_asks(write):
    base = {"prompt": "x", "id": "a", "images": ["a.png"]}
    changes = [{}, {"prompt": "y"}, {"images": ["folder/b.png"]}, {"images": []}, {"n": 9}, {"seed": 4}]
    prints = [fingerprint(read(write({**base, **change}))[0][1]) for change in changes]
    assert len(set(prints)) == len(changes)
    assert prints[0] == fingerprint(read(write(base, {"prompt": "more"}))[0][1])
    assert fingerprint(read(write({**base, "answer": "5"}))[0][1]) == prints[0]


def test_a_fingerprint_is_the_same_however_the_file_is_named(write, tmp_path, monkeypatch):
    item = {"type": "image", "image": "folder/b.png"}
    lines = [{"prompt": "x", "images": ["a.png", str(tmp_path / "a.png")]}]
    lines += [{"prompt": [{"role": "user", "content": [item]}]}]
    path = write(*lines)
    monkeypatch.chdir(tmp_path)
    spellings = (path, Path("data.jsonl"), Path("folder/../data.jsonl"))
    found = [[fingerprint(request) for _, request in read(spelling)] for spelling in spellings]
    assert found[0] == found[1] == found[2]
    other = write({**lines[0], "images": ["a.png", "a.png"]}, lines[1])
    assert fingerprint(read(other)[0][1]) != found[0][0]


def test_parquet(tmp_path, write):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    write()
    picture = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = [
        {"id": 1, "prompt": "x", "images": [picture], "answer": "5"},
        {"id": 2, "prompt": "y", "images": [{"bytes": None, "path": "folder/b.png"}], "answer": None},
        {"id": 3, "prompt": "z", "images": [{"bytes": b"no picture", "path": None}], "answer": None},
    ]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert count_lines(path) == 3
    (_, one), (_, two), bad = read(path)
    assert np.asarray(one.images[0]).tolist() == np.full((8, 8, 3), 7).tolist()
    assert one.metadata == {"answer": "5"}
    assert [Path(image) for image in two.images] == [tmp_path / "folder" / "b.png"]
    assert two.metadata == {}
    assert (bad.line, bad.id) == (3, "3")
    assert fingerprint(one) == fingerprint(read(path)[0][1])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'foveate.parquet.'"):
        read(tmp_path / "data.parquet")
