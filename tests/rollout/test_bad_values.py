"""Values that are wrong by themselves: constructors refuse them, saying what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from foveate.rollout.checks import cut, shown
from foveate.rollout.config import EngineConfig, PruneConfig, SamplingParams
from foveate.rollout.types import Request, VisionInputs

NAN, INF = float("nan"), float("inf")
PIXELS, GRID = torch.zeros(16, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 4]])


def S(**fields: Any) -> Callable[[], SamplingParams]:
    return lambda: SamplingParams(**fields)


def R(prompt: Any = "x", **fields: Any) -> Callable[[], Request]:
    return lambda: Request(prompt, **fields)


def E(**fields: Any) -> Callable[[], EngineConfig]:
    return lambda: EngineConfig(**fields)


WRONG_VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "negative temperature": (S(temperature=-1.0), r"temperature 0 or in \[1e-4, 3.4e38\], got -1.0 \(temperature\)"),
    "tiny temperature": (S(temperature=1e-5), r"got 1e-05 \(temperature\)"),
    "NaN temperature": (S(temperature=NAN), r"got nan \(temperature\)"),
    "infinite temperature": (S(temperature=INF), r"got inf \(temperature\)"),
    "temperature beyond fp32": (S(temperature=1e39), r"got 1e\+39 \(temperature\)"),
    "temperature as text": (S(temperature="1"), r"got '1' \(temperature\)"),
    "temperature of None": (S(temperature=None), r"got None \(temperature\)"),
    "temperature as bool": (S(temperature=True), r"got True \(temperature\)"),
    "temperature as tensor": (S(temperature=torch.ones(1)), r"got tensor\(\[1.\]\) \(temperature\)"),
    "top_p 0": (S(top_p=0.0), r"0 < top_p <= 1, got 0.0 \(top_p\)"),
    "top_p above 1": (S(top_p=1.1), r"got 1.1 \(top_p\)"),
    "top_p NaN": (S(top_p=NAN), r"got nan \(top_p\)"),
    "top_p text": (S(top_p="0.5"), r"got '0.5' \(top_p\)"),
    "top_k negative": (S(top_k=-1), r"an int >= 0, below 2\^31, got -1 \(top_k\)"),
    "top_k float": (S(top_k=1.5), r"got 1.5 \(top_k\)"),
    "top_k bool": (S(top_k=True), r"got True \(top_k\)"),
    "top_k beyond int32": (S(top_k=1 << 31), r"got 2147483648 \(top_k\)"),
    "min_p negative": (S(min_p=-0.1), r"0 <= min_p <= 1, got -0.1 \(min_p\)"),
    "min_p above 1": (S(min_p=1.1), r"got 1.1 \(min_p\)"),
    "min_p NaN": (S(min_p=NAN), r"got nan \(min_p\)"),
    "max_tokens 0": (S(max_tokens=0), r"an int >= 1, below 2\^31, got 0 \(max_tokens\)"),
    "max_tokens of 5000 digits": (S(max_tokens=10**5000), r"got an int of 16610 bits \(max_tokens\)"),
    "max_tokens float": (S(max_tokens=4.0), r"got 4.0 \(max_tokens\)"),
    "max_tokens bool": (S(max_tokens=True), r"got True \(max_tokens\)"),
    "min_tokens negative": (S(min_tokens=-1), r"0 <= min_tokens <= max_tokens, got -1 \(min_tokens\)"),
    "min_tokens above max_tokens": (S(min_tokens=5, max_tokens=4), r"min_tokens <= max_tokens, got 5 \(min_tokens\)"),
    "min_tokens float": (S(min_tokens=1.5), r"got 1.5 \(min_tokens\)"),
    "seed float": (S(seed=1.0), r"an int or None, got 1.0 \(seed\)"),
    "seed text": (S(seed="a"), r"got 'a' \(seed\)"),
    "seed bool": (S(seed=False), r"got False \(seed\)"),
    "empty stop": (S(stop=""), r"non-empty strings, got \(''\,\) \(stop\)"),
    "one empty stop": (S(stop=("a", "")), r"got \('a', ''\) \(stop\)"),
    "stop of bytes": (S(stop=b"a"), r"got b'a' \(stop\)"),
    "stop of ints": (S(stop=(1,)), r"got \(1,\) \(stop\)"),
    "stop None": (S(stop=None), r"got None \(stop\)"),
    "stop id negative": (S(stop_token_ids=(-1,)), r"a tuple of ints >= 0, got \(-1,\) \(stop_token_ids\)"),
    "stop id alone": (S(stop_token_ids=5), r"got 5 \(stop_token_ids\)"),
    "banned text": (S(banned_token_ids=("a",)), r"got \('a',\) \(banned_token_ids\)"),
    "banned bool": (S(banned_token_ids=(True,)), r"got \(True,\) \(banned_token_ids\)"),
    "banned None": (S(banned_token_ids=None), r"got None \(banned_token_ids\)"),
    "nothing allowed": (S(allowed_token_ids=()), r"None or a non-empty tuple of ints >= 0, got \(\) \(allowed_token"),
    "allowed floats": (S(allowed_token_ids=[1.0]), r"got \(1.0,\) \(allowed_token_ids\)"),
    "ignore_eos int": (S(ignore_eos=1), r"True or False, got 1 \(ignore_eos\)"),
    "repetition 0": (S(repetition_penalty=0.0), r"a finite number > 0, got 0.0 \(repetition_penalty\)"),
    "repetition NaN": (S(repetition_penalty=NAN), r"got nan \(repetition_penalty\)"),
    "repetition text": (S(repetition_penalty="2"), r"got '2' \(repetition_penalty\)"),
    "presence infinite": (S(presence_penalty=-INF), r"a finite number, got -inf \(presence_penalty\)"),
    "frequency NaN": (S(frequency_penalty=NAN), r"got nan \(frequency_penalty\)"),
    "frequency None": (S(frequency_penalty=None), r"got None \(frequency_penalty\)"),
    "bias infinite": (S(logit_bias={5: -INF}), r"finite biases .*banned_token_ids\), got -inf \(logit_bias\)"),
    "bias NaN": (S(logit_bias={5: NAN}), r"got nan \(logit_bias\)"),
    "bias text": (S(logit_bias={5: "a"}), r"got 'a' \(logit_bias\)"),
    "bias of a word": (S(logit_bias={"cat": 1.0}), r"ids >= 0, got 'cat' \(logit_bias\)"),
    "bias of a negative id": (S(logit_bias={-5: 1.0}), r"ids >= 0, got -5 \(logit_bias\)"),
    "bias twice": (S(logit_bias=((5, 1.0), (5, 2.0))), r"each id once, got \(\(5, 1.0\), \(5, 2.0\)\) \(logit_bias\)"),
    "bias alone": (S(logit_bias=5), r"\{id: bias\} or \(id, bias\) pairs, got 5 \(logit_bias\)"),
    "biases without ids": (S(logit_bias=(1.0, 2.0)), r"pairs, got 1.0 \(logit_bias\)"),
    "n 0": (R(n=0), r"an int >= 1, at most 65536, got 0 \(n\)"),
    "n too large": (R(n=65537), r"got 65537 \(n\)"),
    "n enormous": (R(n=10**5000), r"got an int of 16610 bits \(n\)"),
    "n bool": (R(n=True), r"got True \(n\)"),
    "n float": (R(n=2.0), r"got 2.0 \(n\)"),
    "named": (R(n=0, request_id="mine"), r"request 'mine': an int >= 1, at most 65536, got 0 \(n\)"),
    "prefix negative": (R(prefix_len=-1), r"an int >= 0, got -1 \(prefix_len\)"),
    "prefix float": (R(prefix_len=1.0), r"got 1.0 \(prefix_len\)"),
    "id of int": (R(request_id=5), r"a str of at most 1000 characters, or None, got 5 \(request_id\)"),
    "id of bytes": (R(request_id=b"a"), r"got b'a' \(request_id\)"),
    "id too long": (R(request_id="i" * 10_000_000), r"got 'iii.*\.\.\..*' \(request_id\)"),
    "images and vision": (R(images=[1], vision=VisionInputs(PIXELS, GRID)), r"images or vision, not both, got 1"),
    "one image": (R(images=np.zeros((4, 4, 3), np.uint8)), r"a sequence of images, got array\(.* \(images\)"),
    "one path": (R(images="a.png"), r"a sequence of images, got 'a.png' \(images\)"),
    "vision as dict": (
        R(vision={"pixel_values": PIXELS}),
        r"VisionInputs or None, got \{'pixel_values': .* \(vision\)",
    ),
    "sampling as dict": (R(sampling={"temperature": 1}), r"SamplingParams, got \{'temperature': 1\} \(sampling\)"),
    "sampling None": (R(sampling=None), r"SamplingParams, got None \(sampling\)"),
    "metadata": (R(metadata=[1]), r"a mapping, got \[1\] \(metadata\)"),
    "page_size": (E(page_size=0), r"an int >= 1, got 0 \(page_size\)"),
    "page_size bool": (E(page_size=True), r"got True \(page_size\)"),
    "max_batch_tokens": (E(max_batch_tokens=0), r"got 0 \(max_batch_tokens\)"),
    "max_sequences": (E(max_sequences=1.0), r"got 1.0 \(max_sequences\)"),
    "kv_memory": (E(kv_memory=0), r"bytes > 0, an int, or None, got 0 \(kv_memory\)"),
    "kv_memory text": (E(kv_memory="1GB"), r"got '1GB' \(kv_memory\)"),
    "kv_memory NaN": (E(kv_memory=NAN), r"got nan \(kv_memory\)"),
    "vision memory": (E(vision_cache_memory=-1), r"bytes >= 0, an int, got -1 \(vision_cache_memory\)"),
    "max_context": (E(max_context=1), r"tokens >= 2, an int, or None, got 1 \(max_context\)"),
    "config seed": (E(seed=None), r"an int, got None \(seed\)"),
    "fuse": (E(fuse="no"), r"True or False, got 'no' \(fuse\)"),
    "int dtype": (E(dtype=torch.int8), r"a floating dtype or None, got torch.int8 \(dtype\)"),
    "dtype text": (E(dtype="bfloat16"), r"got 'bfloat16' \(dtype\)"),
    "device": (E(device="gpu"), r"a device of torch or None, got 'gpu' \(device\)"),
    "device number": (E(device=1.5), r"got 1.5 \(device\)"),
    "backend": (E(backend="numpy"), r"one of .*, got 'numpy' \(backend\)"),
    "backend number": (E(backend=5), r"a str or None, got 5 \(backend\)"),
    "backend of a family": (E(backend="layers=numpy"), r"family=backend.*got 'layers=numpy' \(backend\)"),
    "prune": (E(prune="vscan"), r"a PruneConfig or None, got 'vscan' \(prune\)"),
    "keep 0": (lambda: PruneConfig("x", keep=0), r"0 < keep <= 1, got 0 \(keep\)"),
    "keep text": (lambda: PruneConfig("x", keep="half"), r"got 'half' \(keep\)"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_constructors_refuse_wrong_values(case):
    build, message = WRONG_VALUES[case]
    with pytest.raises(ValueError, match=rf"(?s)^expected .*{message}") as caught:
        build()
    assert len(str(caught.value)) < 1000


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


LONG_VALUES = {
    "text": "x" * 10_000_000,
    "bytes": b"x" * 10_000_000,
    "list": list(range(1_000_000)),
    "list of lists": [["x" * 1000] * 1000] * 1000,
    "dict": dict.fromkeys(range(1000), "x" * 1000),
    "int": 10**100_000,
    "tensor": torch.zeros(1000, 1000),
    "array": np.zeros((1000, 1000)),
    "without a repr": Unprintable(),
}


@pytest.mark.parametrize("case", LONG_VALUES)
def test_errors_cut_what_they_repeat(case):
    text = shown(LONG_VALUES[case])
    assert 0 < len(text) <= 400
    assert len(cut(ValueError("x" * 10_000))) == 400


@pytest.mark.parametrize("value", ["a", 5, None, (1, 2), ["a"], {"a": 1}, 1.5, NAN, b"a", 2**64], ids=repr)
def test_short_values_are_shown_as_they_are(value):
    assert shown(value) == repr(value)
