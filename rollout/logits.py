"""Penalties and biases: what a request changes about its logits before the temperature.

For a row l of logits, bias b, repetition penalty r, frequency penalty f and presence penalty p, in this order:

    l_i += b_i
    l_i = l_i / r if l_i > 0 else l_i * r       for each id i of the prompt or the completion
    l_i -= f * (times i came in the completion)
    l_i -= p                                    for each id i of the completion

Source: the repetition penalty is that of CTRL (Keskar et al., 2019) as transformers' `RepetitionPenaltyLogitsProcessor`
has it; the others are those of OpenAI's API, which do not see the prompt; the order is that of vLLM and transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from foveate.rollout.config import SamplingParams


class TokenCounts:
    """The ids that a sample holds and how often each was drawn; grows with the sample."""

    def __init__(self, prompt_ids: torch.Tensor):
        """prompt_ids: int64 [P], ids that count as seen and not as drawn."""
        seen = prompt_ids.unique().tolist()
        self._index = {token: index for index, token in enumerate(seen)}
        self._ids, self._counts = np.array(seen, np.int64), np.zeros(len(seen), np.float32)
        self.num_drawn = 0

    @property
    def ids(self) -> np.ndarray:
        """int64 [U], each id once."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> np.ndarray:
        """float32 [U], how often each of `ids` was drawn."""
        return self._counts[: len(self._index)]

    def draw(self, token_ids: Iterable[int]) -> None:
        """Adds drawn tokens."""
        for token in token_ids:
            index = self._index.setdefault(token, len(self._index))
            if index == len(self._ids):
                room = np.zeros(max(16, index), np.int64)
                self._ids = np.concatenate([self._ids, room])
                self._counts = np.concatenate([self._counts, room.astype(np.float32)])
            self._ids[index] = token
            self._counts[index] += 1
            self.num_drawn += 1


def adjust(logits: torch.Tensor, rows: Iterable[tuple[int, SamplingParams, TokenCounts]]) -> torch.Tensor:
    """Writes biases and penalties into float32 logits [N, V] and returns them; other rows keep their bits.

    rows: (row of the logits, parameters, tokens before the one that is drawn), each row at most once.
    """
    rows = list(rows)
    biases = [(row, token, bias) for row, params, _ in rows for token, bias in params.biases]
    if biases:
        at, tokens, values = zip(*biases, strict=True)
        place = _on(logits, np.array(at)), _on(logits, np.array(tokens))
        logits[place] += _on(logits, np.array(values, np.float32))
    lengths = [len(counts.ids) for _, _, counts in rows]
    if not sum(lengths):
        return logits
    place = (
        _on(logits, np.repeat([row for row, _, _ in rows], lengths)),
        _on(logits, np.concatenate([counts.ids for _, _, counts in rows])),
    )
    factors = np.array(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, p, _ in rows], np.float32
    )
    repetition, frequency, presence = (_on(logits, np.repeat(column, lengths)) for column in factors.T)
    drawn = _on(logits, np.concatenate([counts.counts for _, _, counts in rows]))
    old = logits[place]
    new = torch.where(old > 0, old / repetition, old * repetition)
    logits[place] = new - frequency * drawn - presence * (drawn > 0)
    return logits


class Adjuster:
    """`adjust` for running samples, whose counts it keeps from step to step."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Any, TokenCounts] = WeakKeyDictionary()

    def __call__(self, logits: torch.Tensor, sequences: Sequence[Any]) -> torch.Tensor:
        """Row r of the float32 logits [N, V] is sequences[r]'s (`scheduler.Sequence`); written and returned."""
        rows = [(row, s.group.request.sampling, s) for row, s in enumerate(sequences)]
        return adjust(logits, ((row, params, self._count(s)) for row, params, s in rows if params.adjustments))

    def _count(self, sequence: Any) -> TokenCounts:
        counts = self._counts.get(sequence)
        if counts is None:
            prompt_ids, params = sequence.group.prompt.token_ids, sequence.group.request.sampling
            seen = prompt_ids if params.repetition_penalty != 1 else prompt_ids[:0]  # else only the drawn ones matter
            counts = self._counts[sequence] = TokenCounts(seen)
        counts.draw(sequence.token_ids[counts.num_drawn :])
        return counts


def _on(logits: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(logits.device)
