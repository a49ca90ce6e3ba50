"""Rewards by name: the built-in ones, and a user's own by import path."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.rollout.checks import require
from foveate.rollout.rewards import Accuracy, Format, Overlong, Perception, Repetition, Reward, WeightedReward
from foveate.rollout.types import RolloutGroup

BUILT_IN: dict[str, Callable[[], Reward]] = {
    kind.name: kind
    for kind in (Accuracy, Format, Overlong, Perception, Repetition)  # type: ignore[attr-defined]
}


@dataclass(frozen=True)
class FunctionReward:
    """A function `(group) -> one float or None a rollout` under a name."""

    name: str
    function: Callable[[RolloutGroup], list[float | None]]

    def __call__(self, group: RolloutGroup) -> list[float | None]:
        return list(self.function(group))


def weighted_reward(weights: Mapping[str, float]) -> WeightedReward:
    """The weighted sum of the rewards that `weights` names.

    A name is one of BUILT_IN, or "package.module:name" or "folder/file.py:name" of a function, of a class (made without
    arguments) or of an object with a `name`. Raises ValueError for what is neither or cannot be imported.
    """
    require(len(weights) > 0, "at least one reward", dict(weights), "rewards")
    rewards = {source: load_reward(source) for source in weights}
    named = {reward.name: weights[source] for source, reward in rewards.items()}
    return WeightedReward(tuple(rewards.values()), named)


def load_reward(source: str) -> Reward:
    """The reward of one name, see `weighted_reward`. RuntimeError, with its cause, where the user's own code fails."""
    if source in BUILT_IN:
        return BUILT_IN[source]()
    place, _, name = source.rpartition(":")
    expected = f"one of {sorted(BUILT_IN)}, package.module:name or file.py:name"
    require(bool(place and name), expected, source, "rewards")
    found: Any = getattr(_module(place, source), name, None)
    require(callable(found), f"a function or class {name!r} in {place}", found, f"rewards, {source}")
    if inspect.isclass(found):
        found = _run(found, source)
    return found if hasattr(found, "name") else FunctionReward(name, found)


def _module(place: str, source: str) -> Any:
    try:
        if not place.endswith(".py"):
            return _run(lambda: importlib.import_module(place), source)
        require(Path(place).is_file(), "a file", place, f"rewards, {source}")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None, place
        module, loader = importlib.util.module_from_spec(spec), spec.loader
        assert loader is not None, place
        _run(lambda: loader.exec_module(module), source)
    except ImportError as error:
        raise ValueError(f"expected a module that can be imported, got {place}: {error} (rewards, {source})") from error
    return module


def _run(code: Callable[[], Any], source: str) -> Any:
    """Calls what the user wrote: its mistakes are no wrong options, and their traceback must be seen."""
    try:
        return code()
    except ImportError:
        raise
    except Exception as error:
        raise RuntimeError(f"reward {source} could not be made: {error!r}") from error
