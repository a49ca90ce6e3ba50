"""`torch.ops.foveate.sample` and `score_tokens` for the backends of foveate._C, `sample_from_hidden` in Triton."""

from __future__ import annotations

import torch

from foveate import _C
from foveate.kernels.dispatch import stream_of
from foveate.kernels.library import operator

_PARAMETERS = "Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? allowed, str backend"


def _sample(logits, seeds, steps, temperature, top_k, top_p, min_p, allowed, backend: str):
    ids, values = _fake_sample(logits, seeds, steps, temperature, top_k, top_p, min_p, allowed, backend)
    _C.sample(logits, temperature, top_k, top_p, min_p, seeds, steps, allowed, None, ids, values, stream_of(logits))
    return ids, values


def _fake_sample(logits, seeds, steps, temperature, top_k, top_p, min_p, allowed, backend: str):
    return torch.empty_like(seeds), logits.new_empty((3, len(logits)), dtype=torch.float32)


def _score(logits, token_ids, temperature, top_k, top_p, min_p, allowed, backend: str) -> torch.Tensor:
    values = _fake_score(logits, token_ids, temperature, top_k, top_p, min_p, allowed, backend)
    _C.sample(logits, temperature, top_k, top_p, min_p, None, None, allowed, token_ids, None, values, stream_of(logits))
    return values


def _fake_score(logits, token_ids, temperature, top_k, top_p, min_p, allowed, backend: str) -> torch.Tensor:
    return logits.new_empty((3, len(logits)), dtype=torch.float32)


def _sample_from_hidden(hidden, lm_head, bias, temperature, seeds, steps, allowed, tempered: bool):
    from foveate.kernels.sampling import triton_kernel

    ids, values = _fake_sample_from_hidden(hidden, lm_head, bias, temperature, seeds, steps, allowed, tempered)
    triton_kernel.sample_from_hidden(hidden, lm_head, bias, temperature, seeds, steps, allowed, ids, values, tempered)
    return ids, values


def _fake_sample_from_hidden(hidden, lm_head, bias, temperature, seeds, steps, allowed, tempered: bool):
    return torch.empty_like(seeds), hidden.new_empty((3, len(hidden)), dtype=torch.float32)


# allowed: int32 [1 or N, ceil(V / 32)], bits of the ids that may be drawn.
# -> token ids int64 [N]; logprobs, log_kept, entropy as float32 [3, N].
sample = operator(
    f"sample(Tensor logits, Tensor seeds, Tensor steps, {_PARAMETERS}) -> (Tensor, Tensor)", _sample, _fake_sample
)
# -> float32 [3, N] of the tokens given.
score = operator(f"score_tokens(Tensor logits, Tensor token_ids, {_PARAMETERS}) -> Tensor", _score, _fake_score)
# hidden [N, D], lm_head [V, D]; tempered: False if all temperatures are 0 or 1.
sample_from_hidden = operator(
    "sample_from_hidden(Tensor hidden, Tensor lm_head, Tensor? bias, Tensor temperature, Tensor seeds, Tensor steps,"
    " Tensor? allowed, bool tempered) -> (Tensor, Tensor)",
    _sample_from_hidden,
    _fake_sample_from_hidden,
)
