"""Text of completions while they grow."""

from __future__ import annotations

from typing import Any

LONGEST_CHARACTER = 8  # tokens; UTF-8 has at most four bytes, and a token at least one


class TextDecoder:
    """Text of a growing completion, decoded a token at a time.

    A token may be part of a character or change how its predecessor is written, so each step decodes from
    the start of the last settled piece and takes what is new.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.text = ""
        self._ids: list[int] = []
        self._settled = 0  # tokens whose text is in self.text
        self._start = 0  # where the context of the next decode begins

    def append(self, token_id: int) -> str:
        """Returns all text so far."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._settled])
        after = self._decode(self._ids[self._start :])
        # Bytes that are no character after so many tokens never will be.
        hopeless = len(self._ids) - self._settled >= LONGEST_CHARACTER
        if len(after) > len(before) and (hopeless or not after.endswith("�")):
            self.text += after[len(before) :]
            self._start, self._settled = self._settled, len(self._ids)
        return self.text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
