"""Every kind of wrong input: an error that names the request and says what was expected, and nobody else is touched.

Each table maps a name to (fields of the request, a pattern of the error). What is wrong by itself raises where it is
built (test_bad_values.py); what needs the engine is an error of its request alone, found when it is added or, as NaN
is, when it runs.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.processor import Processor
from foveate.rollout.testing import special_id, tiny_model, tiny_processor
from foveate.rollout.types import Request, VisionInputs

Image = pytest.importorskip("PIL.Image")
IMAGE, VIDEO = special_id("<|image_pad|>"), special_id("<|video_pad|>")
NAN, INF = float("nan"), float("inf")
PIXELS, GRID = torch.zeros(16, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 4]])
NAN_ID, HUGE_ID = 126, 94  # embeddings of these ids are NaN, and too large for fp32 once they are normalised
BROKEN = (NAN_ID, HUGE_ID, 90)


def encoded(image: Any, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """The header of a PNG of side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
USER = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]


def closed() -> Any:
    image = Image.open(io.BytesIO(encoded(NOISE)))
    image.close()
    return image


def seen(*images: Any) -> dict:
    return {"prompt": [{"role": "user", "content": USER[0]["content"] * len(images)}], "images": images}


def items(*content: Any) -> dict:
    return {"prompt": [{"role": "user", "content": list(content)}]}


def pictured(pixels: Any = PIXELS, grid: Any = GRID, ids: Any = (1, *[IMAGE] * 4, 2), **fields: Any) -> dict:
    return {"prompt": ids, "vision": VisionInputs(pixels, grid), **fields}


def drawn(**fields: Any) -> dict:
    return {"prompt": "x", "sampling": SamplingParams(max_tokens=4, **fields)}


ARRAY = r"uint8 \[height, width, 3\], got "
IDS = r"ids in \[0, 271\), got "
BAD_REQUESTS: dict[str, tuple[dict, str]] = {
    "no file": (seen("/no/where.png"), r"an image file, got '/no/where.png': .*No such file.* \(images\[0\]\)"),
    "folder": (seen("/"), r"an image file, got '/': .*directory.* \(images\[0\]\)"),
    "text file": (seen(__file__), r"an image file, got '.*test_bad_input.py': cannot identify"),
    "null in a path": (seen("a\0.png"), r"an image file, got 'a\\x00.png': embedded null"),
    "no bytes": (seen(b""), r"an image file, got b'': cannot identify"),
    "bytes of text": (seen(b"not an image"), r"an image file, got b'not an image': cannot identify"),
    "PNG cut short": (seen(encoded(NOISE)[:900]), r"an image file, got b'.*: .*truncated.* \(images\[0\]\)"),
    "JPEG cut short": (seen(encoded(NOISE, "JPEG")[:700]), r"an image file, got b'.*: .*truncated.* \(images\[0\]\)"),
    "GIF cut short": (seen(encoded(NOISE, "GIF")[:900]), r"an image file, got b'.* \(images\[0\]\)"),
    "decompression bomb": (seen(bomb(60000)), r"an image file, got b'.*: Image size \(3600000000 pixels\) exceeds"),
    "second image": (seen(NOISE, b""), r"an image file, .* \(images\[1\]\)"),
    "image in a message": (
        items({"type": "image", "image": "/no/where.png"}),
        r"got '/no/where.png'.* \(images\[0\]\)",
    ),
    "closed image": (seen(closed()), r"an image file, got .*closed.* \(images\[0\]\)"),
    "no pixels": (seen(Image.new("RGB", (0, 3))), r"at least one pixel, got \(0, 3\) \(images\[0\]\)"),
    "thin image": (
        seen(np.zeros((1, 300, 3), np.uint8)),
        r"image processor accepts, got 1 x 300 pixels: .*ratio.*\[0\]",
    ),
    "mode F": (seen(Image.new("F", (9, 9))), r"8 or 16 bits a pixel and channel, got mode F \(images\[0\]\)"),
    "mode I": (seen(Image.new("I", (9, 9))), r"got mode I \(images\[0\]\)"),
    "mode La": (seen(Image.new("La", (9, 9))), r"a mode that Pillow converts to RGB, got La \(images\[0\]\)"),
    "float array": (seen(np.full((9, 9, 3), NAN)), ARRAY + r"float64 \[9, 9, 3\] \(images\[0\]\)"),
    "16-bit array": (seen(np.zeros((9, 9, 3), np.uint16)), ARRAY + r"uint16 \[9, 9, 3\]"),
    "grey array": (seen(np.zeros((9, 9), np.uint8)), ARRAY + r"uint8 \[9, 9\]"),
    "channels first": (seen(np.zeros((3, 9, 9), np.uint8)), ARRAY + r"uint8 \[3, 9, 9\]"),
    "empty array": (seen(np.zeros((0, 9, 3), np.uint8)), ARRAY + r"uint8 \[0, 9, 3\]"),
    "object array": (seen(np.full((9, 9, 3), None)), ARRAY + r"object \[9, 9, 3\]"),
    "bf16 tensor": (seen(torch.zeros(9, 9, 3, dtype=torch.bfloat16)), ARRAY + r"bfloat16 \[9, 9, 3\]"),
    "gradient": (seen(torch.zeros(9, 9, 3, requires_grad=True)), ARRAY + r"float32 \[9, 9, 3\]"),
    "meta tensor": (seen(torch.zeros(9, 9, 3, dtype=torch.uint8, device="meta")), ARRAY + r"uint8 \[9, 9, 3\] on meta"),
    "number as image": (seen(5), r"a PIL image, an array or a path, got int \(images\[0\]\)"),
    "None as image": (seen(None), r"got NoneType \(images\[0\]\)"),
    "dict as image": (seen({"path": "a.png"}), r"got dict \(images\[0\]\)"),
    "missing image": ({"prompt": USER}, r"one placeholder an image, got 1 for 0 images"),
    "more images": ({"prompt": USER, "images": [NOISE] * 2}, r"got 1 for 2 images"),
    "images without placeholder": ({"prompt": "x", "images": [NOISE]}, r"got 0 for 1 images"),
    "placeholder in text": ({"prompt": "say <|image_pad|>"}, r"got 1 for 0 images"),
    "image of ids": ({"prompt": [1, IMAGE, 2]}, r"placeholders for 0 images, got more from 1 on \(prompt\)"),
    "images in two places": (
        {**items({"type": "image", "image": NOISE}), "images": [NOISE]},
        r"images in one place, got 1 in the messages and 1 in images \(images\)",
    ),
    "empty text": ({"prompt": ""}, r"text, chat messages or token ids, got str of length 0 \(prompt\)"),
    "empty list": ({"prompt": []}, r"got list of length 0 \(prompt\)"),
    "no ids": ({"prompt": torch.zeros(0, dtype=torch.int64)}, r"at least one token, got none \(prompt\)"),
    "None": ({"prompt": None}, r"text, chat messages or token ids, got NoneType \(prompt\)"),
    "number": ({"prompt": 5}, r"got int \(prompt\)"),
    "bytes": ({"prompt": b"text"}, r"got bytes \(prompt\)"),
    "set": ({"prompt": {1, 2}}, r"got set \(prompt\)"),
    "generator": ({"prompt": iter([1, 2])}, r"got list_iterator \(prompt\)"),
    "negative id": ({"prompt": [3, -1]}, IDS + r"-1 \(prompt\)"),
    "large id": ({"prompt": [3, 271]}, IDS + r"271 \(prompt\)"),
    "id beyond int64": ({"prompt": [3, 2**70]}, IDS + r"1180591620717411303424 \(prompt\)"),
    "id of 5000 digits": ({"prompt": [10**5000]}, IDS + r"an int of 16610 bits \(prompt\)"),
    "uint64 id": ({"prompt": np.array([2**63 + 1], np.uint64)}, IDS + r"9223372036854775809 \(prompt\)"),
    "float id": ({"prompt": [1, 1.5]}, r"token ids to be ints, got 1.5 \(prompt\[1\]\)"),
    "NaN id": ({"prompt": [NAN]}, r"token ids to be ints, got nan \(prompt\[0\]\)"),
    "bool id": ({"prompt": [1, True]}, r"token ids to be ints, got True \(prompt\[1\]\)"),
    "None id": ({"prompt": [1, None]}, r"token ids to be ints, got None \(prompt\[1\]\)"),
    "words": ({"prompt": ["a", "b"]}, r"token ids to be ints, got 'a' \(prompt\[0\]\)"),
    "nested": ({"prompt": [[1, 2]]}, r"token ids to be ints, got \[1, 2\] \(prompt\[0\]\)"),
    "a long item": ({"prompt": ["a" * 10_000_000]}, r"token ids to be ints, got 'aaa.*\.\.\..*' \(prompt\[0\]\)"),
    "float tensor": ({"prompt": torch.zeros(3)}, r"integer ids \[P\], got torch.float32 \[3\] \(prompt\)"),
    "bool array": ({"prompt": np.ones(3, bool)}, r"integer ids \[P\], got bool \[3\] \(prompt\)"),
    "2-D tensor": ({"prompt": torch.ones(1, 3, dtype=torch.int64)}, r"got torch.int64 \[1, 3\] \(prompt\)"),
    "0-D tensor": ({"prompt": torch.tensor(3)}, r"got torch.int64 \[\] \(prompt\)"),
    "video id": ({"prompt": [1, VIDEO]}, rf"no video placeholders, which are not supported, got id {VIDEO} \(prompt\)"),
    "video text": ({"prompt": "<|video_pad|>"}, r"no video placeholders"),
    "half a character": ({"prompt": "\ud800"}, r"text that the tokenizer encodes, got: .* \(prompt\)"),
    "tokenizer raises": ({"prompt": "break the tokenizer"}, r"tokenizer encodes, got: KeyError\('broken'\) \(prompt\)"),
    "long prompt": ({"prompt": [1] * 200}, r"a prompt shorter than the context of 200, got 200 \(prompt\)"),
    "longer text": ({"prompt": "y" * 5000}, r"context of 200, got 5000 \(prompt\)"),
    "larger than the pool": (
        {"prompt": [1] * 190, "n": 8},
        r"fits into 30 pages of 8 tokens of KV memory, got one of 32 pages \(kv_memory\)",
    ),
    "n": ({"prompt": "x", "n": 9}, r"n <= max_sequences = 8, got 9 \(n\)"),
    "n of 65536": ({"prompt": "x", "n": 65536}, r"n <= max_sequences = 8, got 65536 \(n\)"),
    "prefix too long": ({"prompt": [1, 2], "prefix_len": 3}, r"at most the prompt's 2 tokens, got 3 \(prefix_len\)"),
    "prefix of 5000 digits": ({"prompt": [1, 2], "prefix_len": 10**5000}, r"2 tokens, got an int of 16610 bits"),
    "prefix in an image": (pictured(prefix_len=3), r"does not cut image 0 at 1, got 3 \(prefix_len\)"),
    "no role": ({"prompt": [{"content": "x"}]}, r"messages with a role, got \{'content': 'x'\} \(prompt\)"),
    "role of int": ({"prompt": [{"role": 5, "content": "x"}]}, r"messages with a role, got .*5.* \(prompt\)"),
    "second message": ({"prompt": [USER[0], "x"]}, r"messages with a role, got 'x' \(prompt\)"),
    "content of int": ({"prompt": [{"role": "user", "content": 5}]}, r"a str or a list of items, got 5 \(prompt\[0\]"),
    "content of words": (items("a"), r"an item .*, got 'a' \(prompt\[0\]\['content'\]\[0\]\)"),
    "no type": (items({"text": "a"}), r"an item \{'type': 'text' or 'image', ...\}, got \{'text': 'a'\}"),
    "video item": (items({"type": "video", "video": "a.mp4"}), r"an item .*, got .*'video'"),
    "image_url": (items({"type": "image_url", "image_url": {"url": "x"}}), r"an item .*, got .*image_url"),
    "image by url": (items({"type": "image", "url": "x"}), r"no key but 'type' and 'image', got \['url'\]"),
    "text missing": (items({"type": "text"}), r"a str, got None \(prompt\[0\]\['content'\]\[0\]\['text'\]\)"),
    "text of ids": (items({"type": "text", "text": [1]}), r"a str, got \[1\]"),
    "template raises": (
        {"prompt": [{"role": "pirate", "content": "x"}]},
        r"template accepts, got: no pirates \(prompt\)",
    ),
    "no content": ({"prompt": [{"role": "user"}]}, r"a str or a list of items, got None \(prompt\[0\]"),
    "no pixel_values": (pictured(None), r"a tensor, got None \(pixel_values\)"),
    "pixel_values of text": (pictured(["a"]), r"a tensor, got \['a'\] \(pixel_values\)"),
    "int pixels": (pictured(PIXELS.int()), r"float \[16, 1176\], got int32 \[16, 1176\] \(pixel_values\)"),
    "complex pixels": (pictured(PIXELS.to(torch.complex64)), r"got complex64 \[16, 1176\] \(pixel_values\)"),
    "pixels of a batch": (pictured(PIXELS[None]), r"got float32 \[1, 16, 1176\] \(pixel_values\)"),
    "patch missing": (pictured(PIXELS[1:]), r"got float32 \[15, 1176\] \(pixel_values\)"),
    "patch size": (pictured(PIXELS[:, 1:]), r"got float32 \[16, 1175\] \(pixel_values\)"),
    "NaN pixel": (
        pictured(torch.full_like(PIXELS, NAN)),
        r"finite numbers, got NaN or inf in image 0 \(pixel_values\)",
    ),
    "infinite pixel": (pictured(PIXELS - INF), r"finite numbers, got NaN or inf in image 0 \(pixel_values\)"),
    "float grid": (pictured(grid=GRID.float()), r"int \[images, 3\], got float32 \[1, 3\] \(image_grid_thw\)"),
    "flat grid": (pictured(grid=GRID[0]), r"int \[images, 3\], got int64 \[3\] \(image_grid_thw\)"),
    "no grid": (pictured(grid=None), r"a tensor, got None \(image_grid_thw\)"),
    "odd grid": (pictured(grid=GRID - torch.tensor([0, 1, 0])), r"multiples of 2, got \[1, 3, 4\] .*of image 0\)"),
    "negative grid": (pictured(grid=-GRID), r"positive patch counts, .*got \[-1, -4, -4\]"),
    "grid beyond int64": (pictured(grid=[[1, 2**32, 2**32]]), r"float \[18446744073709551616, 1176\], got float32"),
    "not expanded": (pictured(ids=[1, IMAGE]), r"4 image placeholders for image 0, got 1 .*placeholders expanded"),
    "gap": (pictured(ids=[IMAGE, 1, *[IMAGE] * 3]), r"4 adjacent placeholders, got a gap \(image 0\)"),
    "touching": (
        pictured(PIXELS.repeat(2, 1), GRID.repeat(2, 1), [IMAGE] * 8),
        r"a token between two images, got none before image 1 \(prompt\)",
    ),
    "stop id": (drawn(stop_token_ids=(271,)), r"ids < 271, got \[271\] \(stop_token_ids\)"),
    "allowed id": (drawn(allowed_token_ids=(1, 300)), r"got \[300\] \(allowed_token_ids\)"),
    "banned ids": (drawn(banned_token_ids=tuple(range(999))), r"got \[271, 272, .*\.\.\.\] \(banned_token_ids\)"),
    "biased id": (drawn(logit_bias={5: 1.0, 271: 1.0}), r"ids < 271, got \[271\] \(logit_bias\)"),
    "all banned": (drawn(banned_token_ids=tuple(range(271))), r"at least one id that is allowed and not banned, got"),
    "allowed and banned": (drawn(allowed_token_ids=(5,), banned_token_ids=(5,)), r"got none \(allowed_token_ids\)"),
    "only vision allowed": (drawn(allowed_token_ids=(IMAGE,)), r"got none \(allowed_token_ids\)"),
    "only stops": (
        drawn(allowed_token_ids=(258,), min_tokens=2),
        r"an allowed id that does not stop, got .*min_tokens",
    ),
    "special stop": (
        drawn(stop="a<|im_end|>"),
        r"stop_token_ids for the special tokens .*, got 'a<\|im_end\|>' \(stop\)",
    ),
}

FINITE = r"finite logits and an allowed token, got NaN, inf or none"
FAILS_LATER: dict[str, tuple[dict, str]] = {
    "NaN embedding": ({"prompt": [5, NAN_ID, 6], "n": 2}, FINITE),
    "NaN at the end": ({"prompt": [5, 6, NAN_ID]}, FINITE),
    "infinite embedding": ({"prompt": [5, HUGE_ID, 6]}, FINITE),
    "NaN once it is drawn": (drawn(logit_bias={NAN_ID: 1e4}), FINITE),
    "infinite bias in sum": (drawn(logit_bias={5: 3.4e38}, repetition_penalty=1e-30), FINITE),
    "pixels beyond fp32": (pictured(PIXELS + 3e38), FINITE),
    "decoding raises": (
        drawn(stop="never", allowed_token_ids=(90,)),
        r"a tokenizer that decodes the drawn ids, got Ke",
    ),
    "text raises": (
        drawn(allowed_token_ids=(90,)),
        r"a tokenizer that decodes the drawn ids, got KeyError\('broken'\)",
    ),
}


class Tokenizer:
    """The tiny one, which breaks on a phrase and on id 90."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        strict = "{% if messages[0].role == 'pirate' %}{{ raise_exception('no pirates') }}{% endif %}"
        self.chat_template = tokenizer.chat_template = strict + tokenizer.chat_template

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        if "break the tokenizer" in text:
            raise KeyError("broken")
        return self._tokenizer(text, **options)

    def decode(self, ids: list[int], **options: Any) -> str:
        if 90 in ids:
            raise KeyError("broken")
        return self._tokenizer.decode(ids, **options)


@pytest.fixture(scope="module")
def one_engine():
    """One engine for all cases, what its good requests return, and those requests."""
    model, tiny = tiny_model("qwen2_5_vl"), tiny_processor()
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_ID] = NAN
        model.get_input_embeddings().weight[HUGE_ID] = 3e38
    config = EngineConfig(kv_memory=30 * 2048, page_size=8, max_sequences=8, max_context=200)
    engine = Engine(model, Processor(Tokenizer(tiny.tokenizer), tiny.image_processor), config)
    assert engine.memory_report()["kv_pages"] == 30
    params = SamplingParams(max_tokens=6, seed=4, ignore_eos=True, banned_token_ids=BROKEN)
    good = [Request("good", n=2, sampling=params), Request(USER, images=[NOISE], n=2, sampling=params)]
    good.append(Request([7, 8, 9], sampling=params))
    return SimpleNamespace(engine=engine, good=good, expected=engine.generate(good, strict=True))


@pytest.fixture
def shared(one_engine):
    """The same, left clean for the next case by one that fails."""
    yield one_engine
    for name in list(one_engine.engine._desk.groups):
        one_engine.engine.abort(name)
    one_engine.engine.step()


def assert_alone(shared: SimpleNamespace, bad: Request, message: str) -> None:
    """The request fails by name, beside neighbours whose tokens are the same, and leaves nothing behind."""
    engine = shared.engine
    failures = engine.stats()["failed"]
    groups = engine.generate([shared.good[0], bad, *shared.good[1:]])
    failed = groups.pop(1)
    for group, twin in zip(groups, shared.expected, strict=True):
        assert group.error is None
        for rollout, other in zip(group.rollouts, twin.rollouts, strict=True):
            assert torch.equal(rollout.token_ids, other.token_ids)
            torch.testing.assert_close(rollout.logprobs, other.logprobs, atol=5e-5, rtol=0)
    assert type(failed.error) is ValueError
    assert re.search(f"(?s)^request 'bad one': expected.*{message}", str(failed.error))
    assert len(str(failed.error)) < 1500
    assert (failed.request, failed.request_id, len(failed.rollouts)) == (bad, "bad one", bad.n)
    for rollout in failed.rollouts:
        assert rollout.finish_reason == "error"
        assert [len(t) for t in (rollout.token_ids, rollout.logprobs, rollout.log_kept, rollout.entropy)] == [0] * 4
    assert engine.stats()["failed"] == failures + 1
    assert engine.memory_report()["kv_pages_used"] == 0
    assert not engine.has_unfinished
    assert not engine._desk.groups


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_that_cannot_run(case, shared):
    fields, message = BAD_REQUESTS[case]
    bad = Request(**{"request_id": "bad one", **fields})
    count = shared.engine.num_requests
    with pytest.raises(ValueError, match=f"(?s)^request 'bad one': expected.*{message}"):
        shared.engine.add_request(bad)
    assert shared.engine.num_requests == count
    assert_alone(shared, bad, message)


@pytest.mark.parametrize("case", FAILS_LATER)
def test_a_request_that_fails_as_it_runs(case, shared):
    fields, message = FAILS_LATER[case]
    assert_alone(shared, Request(**{"request_id": "bad one", **fields}), message)


def safe(**fields: Any) -> dict:
    return drawn(banned_token_ids=BROKEN, **fields)


class Text(str):
    """A str, to its users."""


LEGAL = {
    "str subclass": ({"prompt": Text("good")}, {"prompt": "good"}),
    "numpy scalars": (
        {**safe(seed=np.int64(3), top_p=np.float32(0.5)), "prompt": [np.int32(5), np.uint8(6)]},
        {**safe(seed=3, top_p=0.5), "prompt": [5, 6]},
    ),
    "an image of one pixel": (seen(np.zeros((1, 1, 3), np.uint8)), seen(Image.new("RGB", (1, 1)))),
    "bytes of a file": (seen(encoded(NOISE)), seen(NOISE)),
    "keys that are None": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "text": None, "image": NOISE}]}]},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "images": (NOISE,)},
    ),
    "an unknown role": (
        {"prompt": [{"role": "judge", "content": "x"}]},
        {"prompt": "<|im_start|>judge\nx<|im_end|>\n<|im_start|>assistant\n"},
    ),
    "a seed beyond 64 bits": (safe(seed=2**64 + 9), safe(seed=9)),
}


@pytest.mark.parametrize("case", LEGAL)
def test_what_looks_strange_and_is_legal(case, shared):
    requests = [Request(**{**safe(seed=1), **fields}) for fields in LEGAL[case]]
    ours, theirs = shared.engine.generate(requests, strict=True)
    assert torch.equal(ours.prompt_ids, theirs.prompt_ids)
    assert [r.token_ids.tolist() for r in ours.rollouts] == [r.token_ids.tolist() for r in theirs.rollouts]
