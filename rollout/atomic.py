"""Folders that appear complete or not at all, whenever their writer is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fresh_folder(directory: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name `directory` at the end, unless by an exception.

    What stood under that name stays until then. What a killed process left of the same folder is removed: one process
    at a time writes to a directory.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover(directory)
    fresh = directory.with_name(f".{directory.name}.writing-{os.getpid()}")
    for left in directory.parent.glob(f".{directory.name}.writing-*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        fresh.mkdir()
        yield fresh
        _sync(fresh)
        _replace(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def recover(directory: Path) -> None:
    """Puts a folder back that stepped aside for one whose writer was killed before it took the place."""
    left = sorted(directory.parent.glob(f".{directory.name}.old-*"), key=lambda path: path.stat().st_mtime)
    if left and not directory.exists():
        os.replace(left.pop(), directory)
    for path in left:  # their writers were killed after that
        shutil.rmtree(path, ignore_errors=True)


def _replace(fresh: Path, directory: Path) -> None:
    """Renames fresh to directory. A directory cannot be renamed over a full one: that one steps aside first."""
    aside = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    if directory.exists():
        os.replace(directory, aside)
    try:
        os.replace(fresh, directory)
    except BaseException:
        if aside.exists():
            os.replace(aside, directory)
        raise
    _sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Files of a fresh folder reach the disk before its name does."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir():
            _sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
