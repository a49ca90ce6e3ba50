"""`torch.ops.foveate.sample` and `score_tokens`: one operator each for all compiled backends, the last argument."""

from __future__ import annotations

import torch

from foveate import _C
from foveate.kernels.dispatch import stream_of
from foveate.kernels.library import operator

_PARAMETERS = "Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? banned, str backend"


def _sample(logits, seeds, steps, temperature, top_k, top_p, min_p, banned, backend: str):
    ids, values = _fake_sample(logits, seeds, steps, temperature, top_k, top_p, min_p, banned, backend)
    bans = _rows_of(banned)
    _C.sample(logits, temperature, top_k, top_p, min_p, seeds, steps, bans, None, ids, values, stream_of(logits))
    return ids, values


def _fake_sample(logits, seeds, steps, temperature, top_k, top_p, min_p, banned, backend: str):
    return torch.empty_like(seeds), logits.new_empty((3, len(logits)), dtype=torch.float32)


def _score(logits, token_ids, temperature, top_k, top_p, min_p, banned, backend: str) -> torch.Tensor:
    values = _fake_score(logits, token_ids, temperature, top_k, top_p, min_p, banned, backend)
    bans = _rows_of(banned)
    _C.sample(logits, temperature, top_k, top_p, min_p, None, None, bans, token_ids, None, values, stream_of(logits))
    return values


def _fake_score(logits, token_ids, temperature, top_k, top_p, min_p, banned, backend: str) -> torch.Tensor:
    return logits.new_empty((3, len(logits)), dtype=torch.float32)


def _rows_of(banned: torch.Tensor | None) -> torch.Tensor | None:
    """bool [1, V] or [N, V]."""
    return banned if banned is None else banned.reshape(-1, banned.shape[-1]).contiguous()


# -> token ids int64 [N]; logprobs, log_kept, entropy as float32 [3, N].
sample = operator(
    f"sample(Tensor logits, Tensor seeds, Tensor steps, {_PARAMETERS}) -> (Tensor, Tensor)", _sample, _fake_sample
)
# -> float32 [3, N] of the tokens given.
score = operator(f"score_tokens(Tensor logits, Tensor token_ids, {_PARAMETERS}) -> Tensor", _score, _fake_score)
