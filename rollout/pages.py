"""The page pool: which pages of the KV cache are in use. The memory itself belongs to the runner.

`PagePool(num_pages)` holds int32 page ids 0 .. num_pages - 1 as one bit each, in C++ (csrc/pages.h). It is
not thread-safe, and a call that raises leaves it as it was.

`allocate(n) -> list[int]`: the lowest run of n neighbouring free pages if there is one, else the n lowest
free pages; ascending. Raises OutOfPages when fewer than n are free, ValueError when n is negative.
`free(pages)`: gives pages back, all or none. Raises ValueError that names a page that is out of range, already
free or given twice.
`is_used(page) -> bool`; `num_pages`, `num_free`, `num_used`: pages, exact at any time.
"""

from __future__ import annotations

from foveate._C import OutOfPages, PagePool
from foveate.rollout.checks import require

__all__ = ["OutOfPages", "PagePool", "pages_for"]


def pages_for(tokens: int, page_size: int) -> int:
    """Number of pages that hold `tokens` tokens: ceil(tokens / page_size), 0 for no tokens.

    Raises ValueError when tokens is negative or page_size is not positive.
    """
    require(tokens >= 0, "tokens >= 0", tokens, "tokens")
    require(page_size >= 1, "page_size >= 1", page_size, "page_size")
    return -(-tokens // page_size)
