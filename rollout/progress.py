"""A progress bar for long calls, where rich is installed and a person watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
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
