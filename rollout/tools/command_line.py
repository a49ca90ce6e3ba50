"""Options of a command: dataclasses through tyro, from the command line and from a YAML file."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from foveate.rollout.config import require

T = TypeVar("T")


def parse(options: type[T], prog: str, arguments: Sequence[str]) -> T:
    """The options that `arguments` give; `--config FILE` stands for what a YAML file gives, and words win over it.

    Ends the process with status 2 and says why: unknown options, values that make no sense, an unreadable file.
    """
    given, path = _take_config(list(arguments))
    try:
        words = [] if path is None else yaml_words(options, path)
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    description = (
        f"{(options.__doc__ or '').strip()}\n\n--config FILE takes options from a YAML file, of the same names."
    )
    # No subcommands for `None | a dataclass`: such a field keeps its default.
    config = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(
        options, prog=prog, description=description, args=[*words, *given], config=config, registry=_registry()
    )


def yaml_words(options: type, path: Path) -> list[str]:
    """The words of a command line that say what a YAML file says: its types are then read and checked in one place.

    Nested mappings are nested dataclasses. Raises ValueError for a file that cannot be read and for an unknown key,
    naming the nearest one.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"expected a YAML file, got {path}: {error} (--config)") from error
    require(content is None or isinstance(content, dict), "a mapping", content, f"--config {path}")
    return _words(options, content or {}, "", str(path))


def _words(options: type, content: dict, prefix: str, file: str) -> list[str]:
    known, words = get_type_hints(options), []
    names = [field.name for field in fields(options)]
    for key, value in content.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
            raise ValueError(f"expected an option such as {prefix}{near[0]}, got {prefix}{key} ({file})")
        kind, option = known[key], f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(kind, type) and is_dataclass(kind):
            words += _words(kind, value, f"{option}.", file)
        else:
            words += _option_words(option, value, kind, file)
    return words


def _option_words(option: str, value: Any, kind: Any, file: str) -> list[str]:
    flag = option.replace("_", "-")
    if kind is bool:
        require(isinstance(value, bool), "true or false", value, f"{option}, {file}")
        parent, _, name = flag.rpartition(".")
        return [f"--{flag}" if value else f"--{parent}.no-{name}" if parent else f"--no-{name}"]
    if isinstance(value, dict):
        require(str(kind).startswith("dict["), "a value", value, f"{option}, {file}")
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={value}"]


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--config FILE` or `--config=FILE`, and the file."""
    for index, word in enumerate(arguments):
        if word.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], Path(word.removeprefix("--config="))
        if word == "--config" and index + 1 < len(arguments):
            return arguments[:index] + arguments[index + 2 :], Path(arguments[index + 1])
    return arguments, None


def _registry() -> ConstructorRegistry:
    """tyro with torch's dtypes and devices."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        kind = info.type
        if kind not in (torch.dtype, torch.device):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="DTYPE" if kind is torch.dtype else "DEVICE",
            instance_from_str=lambda words: _dtype(words[0]) if kind is torch.dtype else torch.device(words[0]),
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda value: [str(value).removeprefix("torch.")],
        )

    return registry


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    require(isinstance(found, torch.dtype), "a dtype such as bfloat16", name, "dtype")
    return found  # type: ignore[return-value]
