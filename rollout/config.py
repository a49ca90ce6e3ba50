"""Frozen configuration dataclasses. A value that is wrong by itself raises ValueError here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from foveate.kernels.dispatch import check_request
from foveate.rollout.checks import is_int, is_number, plain_scalars, require
from foveate.rollout.pruning import PruneConfig
from foveate.rollout.tagged import TaggedSpan

MIB = 1 << 20
FLOAT32 = torch.finfo(torch.float32)  # what a parameter becomes


def _ids(ids: object, argument: str) -> tuple[int, ...]:
    """A tuple of its own: a caller may change a list while its request waits."""
    if isinstance(ids, (tuple, list)):
        ids = tuple(i.item() if isinstance(i, np.integer) else i for i in ids)
    ok = isinstance(ids, tuple) and all(is_int(i) and i >= 0 for i in ids)
    require(ok, "a tuple of ints >= 0", ids, argument)
    return ids  # type: ignore[return-value]


def _biases(biases: object) -> tuple[tuple[int, float], ...] | None:
    """(id, bias) by ascending id."""
    if biases is None:
        return None
    pairs = tuple(biases.items()) if isinstance(biases, Mapping) else biases
    expected = "{id: bias} or (id, bias) pairs"
    require(isinstance(pairs, (tuple, list)), expected, biases, "logit_bias")
    plain = []
    for pair in pairs:  # type: ignore[attr-defined]
        require(isinstance(pair, (tuple, list)) and len(pair) == 2, expected, pair, "logit_bias")
        token, bias = (x.item() if isinstance(x, np.generic) else x for x in pair)
        require(is_int(token) and token >= 0, "ids >= 0", token, "logit_bias")
        finite = is_number(bias) and abs(bias) <= FLOAT32.max
        require(finite, "finite biases (to never draw an id use banned_token_ids)", bias, "logit_bias")
        plain.append((token, float(bias)))
    twice = len({token for token, _ in plain}) < len(plain)
    require(not twice, "each id once", biases, "logit_bias")
    return tuple(sorted(plain))


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn; the exact rules stand in `foveate.kernels.sampling`.

    temperature: 0 is greedy (lowest id on ties), else at least 1e-4. top_p in (0, 1]. top_k: 0 is off.
    min_p in [0, 1]. max_tokens: completion tokens, the stop token included. min_tokens: until that many are
    drawn, stop ids are banned and stop strings end nothing; one that came before ends the sample then.
    stop_token_ids: added to the end-of-sequence ids of the generation config; ignore_eos drops those.
    stop: strings that end a completion once they appear in its text. seed: any int, taken modulo 2^64;
    None derives one from EngineConfig.seed and the number of requests added before.
    allowed_token_ids: when given, nothing else is drawn. banned_token_ids: never drawn. tagged: spans with a
    vocabulary of their own (`foveate.rollout.tagged`), in which no id stops. max_certain: ends a sample as
    "repetition" after so many tokens in a row whose probability exceeded `certain`, as degenerate loops do (3,000 is
    usual); None is off.

    The rest changes the logits themselves, before the temperature, in this order. logit_bias: finite numbers to
    add, by id. repetition_penalty: > 0; logits of ids in prompt (image placeholders too) or completion are divided by
    it if positive, else multiplied. frequency_penalty, presence_penalty: finite; subtracted from the logits of ids of
    the completion, the former once for each time the id came. With any of them `logprobs`, `log_kept` and `entropy`
    are of the changed distribution, the one that is sampled, and no longer those of the model's own forward.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    tagged: tuple[TaggedSpan, ...] = ()
    max_certain: int | None = None
    certain: float = 0.99

    def __post_init__(self) -> None:
        plain_scalars(self)
        self._check_numbers()
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        strings = isinstance(stop, (tuple, list)) and all(isinstance(s, str) and s for s in stop)
        require(strings, "non-empty strings", stop, "stop")
        own: dict[str, Any] = {"stop": tuple(stop), "logit_bias": _biases(self.logit_bias)}
        for name in ("stop_token_ids", "banned_token_ids"):
            own[name] = _ids(getattr(self, name), name)
        if self.allowed_token_ids is not None:
            own["allowed_token_ids"] = ids = _ids(self.allowed_token_ids, "allowed_token_ids")
            require(len(ids) > 0, "None or a non-empty tuple of ints >= 0", ids, "allowed_token_ids")
        own["tagged"] = spans = tuple(self.tagged)
        require(all(isinstance(span, TaggedSpan) for span in spans), "TaggedSpans", spans, "tagged")
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        t = self.temperature
        in_range = is_number(t) and (t == 0 or 1e-4 <= t <= FLOAT32.max)
        require(in_range, "temperature 0 or in [1e-4, 3.4e38]", t, "temperature")
        p, k, m = self.top_p, self.top_k, self.min_p
        require(is_number(p) and FLOAT32.tiny <= p <= 1, "0 < top_p <= 1", p, "top_p")
        require(is_int(k) and 0 <= k < 1 << 31, "an int >= 0, below 2^31", k, "top_k")
        require(is_number(m) and 0 <= m <= 1, "0 <= min_p <= 1", m, "min_p")
        most, least = self.max_tokens, self.min_tokens
        require(is_int(most) and 1 <= most < 1 << 31, "an int >= 1, below 2^31", most, "max_tokens")
        require(is_int(least) and 0 <= least <= most, "an int, 0 <= min_tokens <= max_tokens", least, "min_tokens")
        run, p = self.max_certain, self.certain
        require(run is None or (is_int(run) and run >= 1), "an int >= 1 or None", run, "max_certain")
        require(is_number(p) and 0 < p < 1, "0 < certain < 1", p, "certain")
        require(self.seed is None or is_int(self.seed), "an int or None", self.seed, "seed")
        require(isinstance(self.ignore_eos, bool), "True or False", self.ignore_eos, "ignore_eos")
        r = self.repetition_penalty
        in_range = is_number(r) and FLOAT32.tiny <= r <= FLOAT32.max
        require(in_range, "a finite number > 0", r, "repetition_penalty")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(is_number(value) and abs(value) <= FLOAT32.max, "a finite number", value, name)

    @cached_property
    def adjustments(self) -> tuple[str, ...]:
        """Names of the parameters that make the sampled distribution another than the model's own."""
        off = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        names = tuple(name for name, value in off.items() if getattr(self, name) != value)
        return (*names, "logit_bias") if self.logit_bias else names

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(id, bias) of logit_bias, which is kept as pairs."""
        return tuple(self.logit_bias or ())  # type: ignore[arg-type]


@dataclass(frozen=True)
class EngineConfig:
    """What an `Engine` may use and how it behaves.

    device: None is the model's; another device is an error. dtype: None shares the parameters' own dtype,
    another floating dtype makes the engine keep a shadow copy (`Engine.shares_weights`). page_size: tokens.
    kv_memory: bytes; None is free memory minus 10 % on CUDA, and 1 GiB, committed as it is used, on CPU.
    vision_cache_memory: bytes. max_batch_tokens: prompt tokens of one prefill step. max_sequences: running
    samples. max_context: tokens, None is the model's. seed: base of requests without a seed. backend: None
    chooses; "cpp", or by kernel family "layers=cpp,sampling=reference" (`foveate.kernels.dispatch`). prune:
    vision-token pruning. ban_vision_tokens: never draw image, video and vision pads or ids beyond the tokenizer.
    fuse: one buffer for q, k, v and one for gate, up, into which the module's own parameters are re-pointed.
    deterministic: a request's results and `score` have the same bits in any batch and order, with any budget of tokens
    and pages; on the CPU, for one number of threads.
    """

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    page_size: int = 64
    kv_memory: int | None = None
    vision_cache_memory: int = 256 * MIB
    max_batch_tokens: int = 8192
    max_sequences: int = 512
    max_context: int | None = None
    seed: int = 0
    backend: str | None = None
    prune: PruneConfig | None = None
    ban_vision_tokens: bool = True
    fuse: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        plain_scalars(self)
        require(self.backend is None or isinstance(self.backend, str), "a str or None", self.backend, "backend")
        check_request(self.backend)
        for name in ("page_size", "max_batch_tokens", "max_sequences"):
            value = getattr(self, name)
            require(is_int(value) and value >= 1, "an int >= 1", value, name)
        for name, least, unit in (("kv_memory", 1, "bytes > 0"), ("max_context", 2, "tokens >= 2")):
            value = getattr(self, name)
            require(value is None or (is_int(value) and value >= least), f"{unit}, an int, or None", value, name)
        memory = self.vision_cache_memory
        require(is_int(memory) and memory >= 0, "bytes >= 0, an int", memory, "vision_cache_memory")
        require(is_int(self.seed), "an int", self.seed, "seed")
        for name in ("ban_vision_tokens", "fuse", "deterministic"):
            require(isinstance(getattr(self, name), bool), "True or False", getattr(self, name), name)
        floating = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        require(self.dtype is None or floating, "a floating dtype or None", self.dtype, "dtype")
        pruned = self.prune is None or isinstance(self.prune, PruneConfig)
        require(pruned, "a PruneConfig or None", self.prune, "prune")
        require(_is_device(self.device), "a device of torch or None", self.device, "device")


def _is_device(device: object) -> bool:
    if device is None or isinstance(device, torch.device):
        return True
    try:
        return isinstance(device, str) and bool(torch.device(device))
    except RuntimeError:  # torch's way to say that it knows no such name
        return False
