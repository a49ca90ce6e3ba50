"""Spans of a completion with a vocabulary of their own: which ids may be drawn before, in and after them.

A model that writes `<depth> d17 d4 ... </depth>` or `<box> x y x y </box>` draws special tokens between two tags. The
mask follows the tags as they are drawn: outside a span its special ids and its closing tag are banned, inside nothing
else than them is allowed. Source of the use: perception tokens of AURORA (Bigverdi et al., arXiv 2412.03548).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from foveate.kernels.sampling import masks
from foveate.rollout.checks import is_int, require


@dataclass(frozen=True)
class TaggedSpan:
    """`opening`, then `least` to `most` ids of `inside`, then `closing`; as often as the model opens it.

    exclusive: ids of `inside` are drawn in a span only. most: None is without limit. Raises ValueError if the tags are
    among the ids inside, are the same, or the numbers make no sense.
    """

    opening: int
    closing: int
    inside: tuple[int, ...]
    least: int = 0
    most: int | None = None
    exclusive: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "inside", tuple(self.inside))
        ids = (self.opening, self.closing, *self.inside)
        whole = all(is_int(i) and i >= 0 for i in ids)
        require(whole and len(self.inside) > 0, "ids >= 0, at least one inside", ids[:9], "tagged")
        distinct = self.opening != self.closing and not {self.opening, self.closing} & {*self.inside}
        require(distinct, "two tags that are not among the ids inside", ids[:9], "tagged")
        require(is_int(self.least) and self.least >= 0, "an int least >= 0", self.least, "tagged")
        fits = self.most is None or (is_int(self.most) and self.most >= max(self.least, 1))
        require(fits, f"an int most >= {max(self.least, 1)} or None", self.most, "tagged")


class Place(NamedTuple):
    """Where a sample stands: in which span (-1: in none), and how many ids of it it has drawn."""

    span: int = -1
    length: int = 0

    @property
    def is_inside(self) -> bool:
        """Whether the last id drawn is one of a span's own."""
        return self.span >= 0 and self.length > 0


OUTSIDE = Place()


class SpanMasks:
    """The masks of one request's spans, and how a drawn id moves a sample from one to the other.

    allowed: int32 [words], bits of the ids that may be drawn at all (`foveate.kernels.sampling.masks`). early: the same
    while stop ids are banned, too. vocab: number of ids. Raises ValueError if an id lies beyond the vocabulary, a tag
    cannot be drawn, because it is banned or because an opening tag is a closing tag or an exclusive id of a span,
    nothing could be drawn in some place, two spans share an opening tag, or a closing tag is a stop id that `early`
    bans: a span that must close would end the sample too soon. Stop ids inside a span end no sample.
    """

    def __init__(self, spans: Sequence[TaggedSpan], allowed: torch.Tensor, early: torch.Tensor, vocab: int):
        self.spans = tuple(spans)
        self._of_opening = {span.opening: index for index, span in enumerate(self.spans)}
        require(len(self._of_opening) == len(self.spans), "an opening tag for each span", spans, "tagged")
        for span in self.spans:
            ids = (span.opening, span.closing, *span.inside)
            require(max(ids) < vocab, f"ids < {vocab}", [i for i in ids if i >= vocab][:9], "tagged")
            lost = [i for i in ids[:2] if not masks.has(allowed, i)]
            require(not lost, "tags that are not banned", lost, "tagged")
            stops = not masks.has(early, span.closing)
            require(not stops, "closing tags that are no stop ids, with min_tokens", span.closing, "tagged")

        def only(*ids: int) -> torch.Tensor:
            return allowed & masks.of_ids(ids, vocab).to(allowed.device)

        hidden = [i for span in self.spans for i in (span.closing, *(span.inside if span.exclusive else ()))]
        unreachable = sorted(self._of_opening.keys() & {*hidden})
        require(not unreachable, "opening tags that may be drawn outside the spans", unreachable[:9], "tagged")
        self._outside, self._outside_early = (words & ~only(*hidden) for words in (allowed, early))
        for words in (self._outside, self._outside_early):
            require(bool(words.any()), "an id that may be drawn outside the spans", None, "tagged")
        self._inside = [only(*span.inside) for span in self.spans]
        for words in self._inside:
            require(bool(words.any()), "an id inside that is not banned", None, "tagged")
        self._may_close = [only(*span.inside, span.closing) for span in self.spans]
        self._must_close = [only(span.closing) for span in self.spans]

    def mask(self, place: Place, early: bool) -> torch.Tensor:
        """int32 [words], bits of what the next id may be. The same tensor for the same place."""
        if place.span < 0:
            return self._outside_early if early else self._outside
        span = self.spans[place.span]
        if place.length < span.least:
            return self._inside[place.span]
        return (self._must_close if place.length == span.most else self._may_close)[place.span]

    def after(self, place: Place, token: int) -> Place:
        """Where a sample stands once it has drawn `token`."""
        if place.span < 0:
            return Place(self._of_opening.get(token, -1))
        return OUTSIDE if token == self.spans[place.span].closing else Place(place.span, place.length + 1)


class MaskRows:
    """The masks of a batch's rows as one tensor, which is kept for as long as the rows stay the same."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor | None] = []
        self._stacked: torch.Tensor | None = None

    def __call__(self, rows: list[torch.Tensor | None]) -> torch.Tensor | None:
        """rows: int32 [words] each, None where all ids are allowed.

        -> int32 [words] if one tensor serves all rows, [N, words] if not, None if every row allows all.
        """
        first = rows[0] if rows else None
        if all(row is first for row in rows):
            return first
        if len(rows) != len(self._rows) or any(new is not old for new, old in zip(rows, self._rows, strict=True)):
            everything = torch.full_like(next(row for row in rows if row is not None), -1)
            self._rows = rows
            self._stacked = torch.stack([everything if row is None else row for row in rows])
        return self._stacked
