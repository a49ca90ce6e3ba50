"""How far a long command is: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Counts prompts, samples and tokens and says so on stderr. total: prompts to come.

    rich: None shows a bar where rich is installed and stderr is a terminal.
    """

    def __init__(self, total: int, *, rich: bool | None = None):
        self.total, self.prompts, self.samples, self.tokens, self.errors = total, 0, 0, 0, 0
        self._start = self._told = time.perf_counter()
        self._bar: Any = None
        if rich if rich is not None else find_spec("rich") is not None and sys.stderr.isatty():
            self._bar = _bar(total)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, samples: int, tokens: int, *, failed: bool = False) -> None:
        """One prompt more has ended."""
        self.prompts += 1
        self.samples += samples
        self.tokens += tokens
        self.errors += failed
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, rate=self._rate)
        elif now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            print(self.line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    @property
    def line(self) -> str:
        """All counts in words."""
        errors = f", {self.errors} failed" if self.errors else ""
        return (
            f"{self.prompts}/{self.total} prompts{errors}, {self.samples} rollouts, {self.tokens} tokens, {self._rate}"
        )

    @property
    def _rate(self) -> str:
        return f"{self.tokens / max(time.perf_counter() - self._start, 1e-9):.0f} tokens/s"


def _bar(total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    bar = Progress(TextColumn("rollouts"), *columns, console=Console(stderr=True))
    bar.add_task("rollouts", total=total, rate="")
    bar.start()
    return bar
