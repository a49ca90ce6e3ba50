"""`torch.ops.foveate.sample` and `score_tokens` for the backends of foveate._C, `sample_from_hidden` in Triton too."""

from __future__ import annotations

import torch

from foveate import _C
from foveate.kernels.dispatch import require, stream_of
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


def _sample_from_hidden(hidden, lm_head, bias, temperature, seeds, steps, allowed, tempered: bool, backend: str):
    given = (hidden, lm_head, bias, temperature, seeds, steps, allowed)
    ids, values = _fake_sample_from_hidden(*given, tempered, backend)
    if backend == "triton":
        from foveate.kernels.sampling import triton_kernel

        triton_kernel.sample_from_hidden(*given, ids, values, tempered)
        return ids, values
    require(backend in ("cpp", "cuda"), "'cpp', 'cuda' or 'triton'", backend, "backend")
    tiles = -(-len(lm_head) // _C.TILE_IDS)
    num_fields = _C.TILE_FIELDS if allowed is None else _C.MASKED_TILE_FIELDS
    partials = hidden.new_empty((num_fields, len(hidden), tiles), dtype=torch.float32)
    best_ids = hidden.new_empty((len(hidden), tiles), dtype=torch.int32)
    bias = None if bias is None else bias.float().contiguous()
    given = (hidden, lm_head, bias, temperature, seeds, steps, allowed)
    _C.sample_from_hidden(*given, partials, best_ids, ids, values, stream_of(hidden))
    return ids, values


def _fake_sample_from_hidden(hidden, lm_head, bias, temperature, seeds, steps, allowed, tempered: bool, backend: str):
    return torch.empty_like(seeds), hidden.new_empty((3, len(hidden)), dtype=torch.float32)


# allowed: int32 [1 or N, ceil(V / 32)], bits of the ids that may be drawn.
# -> token ids int64 [N]; logprobs, log_kept, entropy as float32 [3, N].
sample = operator(
    f"sample(Tensor logits, Tensor seeds, Tensor steps, {_PARAMETERS}) -> (Tensor, Tensor)", _sample, _fake_sample
)
# -> float32 [3, N] of the tokens given.
score = operator(f"score_tokens(Tensor logits, Tensor token_ids, {_PARAMETERS}) -> Tensor", _score, _fake_score)
# hidden [N, D], lm_head [V, D]; tempered: False if all temperatures are 0 or 1. "cuda" is for Hopper, and "cpp" its
# proof: what becomes of the logits is one source, the product of "cpp" is a plain loop.
sample_from_hidden = operator(
    "sample_from_hidden(Tensor hidden, Tensor lm_head, Tensor? bias, Tensor temperature, Tensor seeds, Tensor steps,"
    " Tensor? allowed, bool tempered, str backend) -> (Tensor, Tensor)",
    _sample_from_hidden,
    _fake_sample_from_hidden,
)
