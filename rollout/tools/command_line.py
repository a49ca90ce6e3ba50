"""Options of a command: dataclasses through tyro, from the command line and from a YAML file."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from foveate.rollout.checks import require
from foveate.rollout.pruning import OPTIONS, PruneConfig

T = TypeVar("T")
AS_IT_IS = "\0"  # before a string of a file that would else read as an option or as None; no word of a shell holds it


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
    # No subcommands for `None | a dataclass`: such a field keeps its default, unless a rule of `_registry` reads it.
    config = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(
        options, prog=prog, description=description, args=[*words, *given], config=config, registry=_registry()
    )


def yaml_words(options: type, path: Path) -> list[str]:
    """The words of a command line that say what a YAML file says: its types are then read and checked in one place.

    Nested mappings are nested dataclasses. Raises ValueError for a file that cannot be read, for a key that stands
    twice, and for an unknown key, naming the nearest one.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
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
        if is_dataclass(kind):
            require(value is None or isinstance(value, dict), "a mapping", value, f"{option}, {file}")
            words += _words(kind, value or {}, f"{option}.", file)  # type: ignore[arg-type]
        elif PruneConfig in get_args(kind):
            words += _pruning_option(option, value, file)
        elif any(is_dataclass(part) for part in get_args(kind)):
            require(not value, "nothing: it is set from Python alone", value, f"{option}, {file}")
        else:
            words += _option_words(option, value, kind, file)
    return words


def _pruning_option(option: str, value: Any, file: str) -> list[str]:
    mapping = value is None or (isinstance(value, dict) and isinstance(value.get("method"), str))
    require(mapping, "a mapping with a method", value, f"{option}, {file}")
    return [f"--{option}", *(["None"] if value is None else _pruning_words(value))]


def _option_words(option: str, value: Any, kind: Any, file: str) -> list[str]:
    flag = option.replace("_", "-")
    if kind is bool:
        require(isinstance(value, bool), "true or false", value, f"{option}, {file}")
        parent, _, name = flag.rpartition(".")
        return [f"--{flag}" if value else f"--{parent}.no-{name}" if parent else f"--no-{name}"]
    if isinstance(value, dict):
        mapping = any(get_origin(part) in (dict, Mapping) for part in (kind, *get_args(kind)))
        require(mapping, "a value", value, f"{option}, {file}")
        value = list(value.items())
    as_it_is = _holds_strings(kind)
    if isinstance(value, list):
        parts = [part for item in value for part in (item if isinstance(item, (list, tuple)) else [item])]
        return [f"--{flag}", *(_word(part, as_it_is) for part in parts)]
    return [f"--{flag}={_word(value, as_it_is)}"]


def _holds_strings(kind: Any) -> bool:
    return kind is str or any(_holds_strings(part) for part in get_args(kind))


def _word(value: Any, as_it_is: bool) -> str:
    """A value as tyro reads it back; a string that looks like a number is one where numbers are asked for."""
    text = str(value)
    taken_for_another = text == "None" or (text.startswith("-") and not _is_number(text))
    return AS_IT_IS + text if as_it_is and isinstance(value, str) and taken_for_another else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Loader(yaml.SafeLoader):
    """YAML without keys that stand twice, of which the last would win."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(name)
        return node


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--config FILE` or `--config=FILE`, and the file."""
    for index, word in enumerate(arguments):
        if word.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], Path(word.removeprefix("--config="))
        if word == "--config" and index + 1 < len(arguments):
            return arguments[:index] + arguments[index + 2 :], Path(arguments[index + 1])
    return arguments, None


def _registry() -> ConstructorRegistry:
    """tyro with torch's dtypes and devices, with pruning, and with strings as a file has them."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not str:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR",
            instance_from_str=lambda words: words[0].removeprefix(AS_IT_IS),
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
        )

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

    registry.primitive_rule(_pruning_rule)
    return registry


def _pruning_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if PruneConfig not in get_args(info.type):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="METHOD [NAME=VALUE ...]",
        instance_from_str=_pruning,
        is_instance=lambda value: value is None or isinstance(value, PruneConfig),
        str_from_instance=lambda value: ["None"] if value is None else _pruning_words(asdict(value)),
    )


def _pruning(words: list[str]) -> PruneConfig | None:
    if words == ["None"]:
        return None
    require(len(words) > 0, "a method", words, "prune")
    given = {}
    for word in words[1:]:
        name, _, value = word.partition("=")
        require(name in OPTIONS | {"keep"}, f"one of keep, {', '.join(sorted(OPTIONS))} as NAME=VALUE", word, "prune")
        require(name not in given, f"{name} once", word, "prune")
        try:
            given[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(f"expected a number, or several in brackets, got {word!r} (prune)") from error
    return PruneConfig(words[0], **given)


def _pruning_words(given: Mapping[str, Any]) -> list[str]:
    """What `_pruning` reads. given: by field, with the method."""
    rest = (f"{name}={value}".replace(" ", "") for name, value in given.items() if value is not None)
    return [given["method"], *(word for word in rest if not word.startswith("method="))]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    require(isinstance(found, torch.dtype), "a dtype such as bfloat16", name, "dtype")
    return found  # type: ignore[return-value]
