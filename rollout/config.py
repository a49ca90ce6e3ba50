"""Frozen configuration dataclasses. A value that is wrong by itself raises ValueError here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.kernels.dispatch import check_request, require

MIB = 1 << 20
FLOAT32 = torch.finfo(torch.float32)  # what a parameter becomes


def _is_id_sequence(ids: object) -> bool:
    return isinstance(ids, (tuple, list)) and all(isinstance(i, int) and i >= 0 for i in ids)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn; the exact rules stand in `foveate.kernels.sampling`.

    temperature: 0 is greedy (lowest id on ties), else at least 1e-4. top_p in (0, 1]. top_k: 0 is off.
    min_p in [0, 1]. max_tokens: completion tokens, the stop token included. min_tokens: until that many are
    drawn, stop ids are banned and stop strings end nothing; one that came before ends the sample then.
    stop_token_ids: added to the end-of-sequence ids of the generation config; ignore_eos drops those.
    stop: strings that end a completion once they appear in its text. seed: any int, taken modulo 2^64;
    None derives one from EngineConfig.seed and the number of requests added before.
    allowed_token_ids: when given, nothing else is drawn. banned_token_ids: never drawn.
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

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        t = self.temperature
        require(t == 0 or 1e-4 <= t <= FLOAT32.max, "temperature 0 or in [1e-4, 3.4e38]", t, "temperature")
        require(FLOAT32.tiny <= self.top_p <= 1, "0 < top_p <= 1", self.top_p, "top_p")
        top_k = self.top_k
        require(isinstance(top_k, int) and 0 <= top_k < 1 << 31, "an int >= 0, below 2^31", top_k, "top_k")
        require(0 <= self.min_p <= 1, "0 <= min_p <= 1", self.min_p, "min_p")
        require(
            isinstance(self.max_tokens, int) and self.max_tokens >= 1,
            "an int >= 1",
            self.max_tokens,
            "max_tokens",
        )
        require(
            0 <= self.min_tokens <= self.max_tokens,
            "0 <= min_tokens <= max_tokens",
            self.min_tokens,
            "min_tokens",
        )
        require(self.seed is None or isinstance(self.seed, int), "an int or None", self.seed, "seed")
        require(
            isinstance(self.stop, (tuple, list)) and all(isinstance(s, str) and s for s in self.stop),
            "non-empty strings",
            self.stop,
            "stop",
        )
        for name in ("stop_token_ids", "banned_token_ids"):
            ids = getattr(self, name)
            require(_is_id_sequence(ids), "a tuple of ints >= 0", ids, name)
        allowed = self.allowed_token_ids
        require(
            allowed is None or (_is_id_sequence(allowed) and len(allowed) > 0),
            "None or a non-empty tuple of ints >= 0",
            allowed,
            "allowed_token_ids",
        )


@dataclass(frozen=True)
class PruneConfig:
    """Vision-token pruning: method name and the share of image tokens that is kept."""

    method: str
    keep: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, "0 < keep <= 1", self.keep, "keep")


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
    decode_burst: decode steps between two looks at the drawn ids where the backend runs on a GPU stream; the
    reference backend looks after each. fuse: one buffer for q, k, v and one for
    gate, up, into which the module's own parameters are re-pointed. deterministic: bitwise reproducible.
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
    decode_burst: int = 8
    fuse: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_request(self.backend)
        for name in ("page_size", "max_batch_tokens", "max_sequences", "decode_burst"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, "an int >= 1", value, name)
        require(self.vision_cache_memory >= 0, "bytes >= 0", self.vision_cache_memory, "vision_cache_memory")
        require(self.kv_memory is None or self.kv_memory > 0, "bytes > 0 or None", self.kv_memory, "kv_memory")
        require(
            self.max_context is None or self.max_context >= 2,
            "tokens >= 2 or None",
            self.max_context,
            "max_context",
        )
        require(
            self.dtype is None or self.dtype.is_floating_point,
            "a floating dtype or None",
            self.dtype,
            "dtype",
        )
