"""Progress bars: ours for long calls, where rich is installed and a person watches; transformers' kept quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], total: int, show: bool | None) -> Iterator[T]:
    """Passes items on and shows how many of total have come. show: None decides by what stderr is."""
    if show is None:
        show = sys.stderr.isatty() and find_spec("rich") is not None
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    yield from rich_track(items, description="rollouts", total=total, console=console, transient=True)


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Loading and saving without transformers' progress bars, which last for a moment and say nothing."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
